"""One contract for every metric on the shelf; each law is seen to fail on a broken copy."""

import random
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from innsteer import metrics
from innsteer.backends.base import Completion, Kind
from innsteer.errors import UnknownName
from innsteer.metrics.base import Measured, Metric, Score

KINDS = get_args(Kind)
TEXTS = (
    "Yes. A lovely, quiet room, and the bed was soft.",
    "No, it's a dull and broken thing; I can't help with that.",
    "I'm sorry, but I can't help with that.",
    "so so so so so so so so so so so so so so so so so so so so",
)


def completion(kind, item, draw, *, seed=0, asked=256):
    """A completion that every metric of its kind can read."""
    n = draw.randint(2, 6)
    values = {
        "kl": tuple(draw.random() for _ in range(n)),
        "sure": tuple(draw.choice([0.5, 0.95]) for _ in range(n - 1)) + (0.95,),
        "same": tuple(draw.choice([0.0, 1.0]) for _ in range(n)),
        "match": (draw.random() / 2,),
        "other": (draw.random() / 2,),
        "shift": (draw.gauss(0, 1),),
        "true": tuple(-5 * draw.random() for _ in range(n)),
        "false": tuple(-5 * draw.random() for _ in range(n)),
        "log_prob": tuple(-9 * draw.random() for _ in range(n)),
        "base_log_prob": tuple(-5 * draw.random() for _ in range(n)),
        "asked": (float(asked),),
    }
    text, key = draw.choice(TEXTS), draw.choice(["Yes", "No"])
    steered = draw.randint(0, n)
    return Completion(
        item, kind, "?", text, values, key, seed=seed, tokens=n, steered=steered
    )  # fmt: skip


def sample_for(metric, items=9, seeds=1, start=0):
    draw = random.Random(start)
    asked = getattr(metric, "asked", 256)
    return [
        completion(metric.kind, f"item-{n}", draw, seed=seed, asked=asked)
        for n in range(items)
        for seed in range(seeds)
    ]


# --- the laws, each as a function, so that a broken copy can be held against it ------------------


def is_labelled(metric):
    assert metric.kind in KINDS and metric.unit
    assert metric.better in ("higher", "lower", "neither")


def interval_holds_the_figure(metric):
    for items in (1, 2, 9):
        score = metric.score(sample_for(metric, items))
        assert score.low <= score.value <= score.high
        assert score.level == 0.95


def counts_items(metric):
    assert metric.score(sample_for(metric, 7)).n == 7
    assert metric.score(sample_for(metric, 7, seeds=3)).n == 7


def order_is_nothing(metric):
    given = sample_for(metric, 7, seeds=2)
    shuffled = random.Random(1).sample(given, len(given))
    assert metric.score(given) == metric.score(shuffled)


def seeds_are_averaged(metric):
    """An item answered three times alike weighs as much as one answered once."""
    given = sample_for(metric)
    again = [replace(given[0], seed=seed) for seed in (1, 2)]
    once, thrice = metric.score(given), metric.score([*given, *again])
    assert thrice.n == once.n
    assert thrice[:3] == pytest.approx(once[:3])


def is_deterministic(metric):
    given = sample_for(metric)
    assert metric.score(given) == metric.score(given)


def other_kinds_are_ignored(metric):
    given = sample_for(metric)
    noise = [
        replace(c, item=f"other-{kind}", kind=kind)
        for kind in KINDS
        if kind != metric.kind
        for c in given[:2]
    ]
    assert metric.score([*noise, *given]) == metric.score(given)


def nothing_gives_none(metric):
    assert metric.score([]) is None
    assert metric.difference([], []) is None
    assert metric.difference(sample_for(metric), []) is None


def own_difference_is_zero(metric):
    given = sample_for(metric, seeds=2)
    assert metric.difference(given, given)[:4] == (0.0, 0.0, 0.0, 9)


def difference_is_of_shared_items(metric):
    ours, theirs = sample_for(metric), sample_for(metric, start=5)
    gap = metric.difference(ours[:6], theirs[2:])
    assert gap.n == 4
    expected = metric.score(ours[2:6]).value - metric.score(theirs[2:6]).value
    assert gap.value == pytest.approx(expected)
    assert gap.low <= gap.value <= gap.high


LAWS = (
    is_labelled,
    interval_holds_the_figure,
    counts_items,
    order_is_nothing,
    seeds_are_averaged,
    is_deterministic,
    other_kinds_are_ignored,
    nothing_gives_none,
    own_difference_is_zero,
    difference_is_of_shared_items,
)


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr("innsteer.metrics.base.RESAMPLES", 100)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", metrics.names())
def test_every_metric_keeps_every_law(name, law):
    needed = {"sentiment": "vaderSentiment", "language": "py3langid"}
    if (family := metrics.get(name).family) in needed:
        pytest.importorskip(needed[family])
    law(metrics.get("scored:builtins:len" if name == "scored" else name))


@pytest.mark.parametrize("name", metrics.names())
def test_a_metric_is_named_by_its_file_and_explains_itself(name):
    assert metrics.get(name).name == name
    assert type(metrics.get(name)).__doc__


def test_an_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownName, match="did you mean 'neutral_cost'"):
        metrics.get("neutral_cots")


# --- broken copies -------------------------------------------------------------------------------


class Whole(Metric):
    """The mean of ``shift``: the honest copy."""

    kind = "pair"
    unit = "nats"
    better = "higher"

    def measure(self, completion):
        return Measured(completion.values["shift"][0])


class Unlabelled(Whole):
    better = "more"


class Outside(Whole):
    def score(self, completions, **how):
        found = super().score(completions, **how)
        return found and found._replace(low=found.value + 1)


class CountsRows(Whole):
    def score(self, completions, **how):
        found = super().score(completions, **how)
        return found and found._replace(n=len(completions))


class KeepsLast(Whole):
    """Takes an item's last completion for all of them."""

    def items(self, completions):
        return {item: [rows[-1]] for item, rows in self._rows(completions).items()}

    def _rows(self, completions):
        found = {}
        for one in completions:
            if one.kind == self.kind:
                found.setdefault(one.item, []).append(self.measure(one))
        return found


class SeedsAsItems(KeepsLast):
    """Every seed weighs like an item of its own."""

    def items(self, completions):
        return self._rows(completions)


class Restless(Whole):
    def score(self, completions, **how):
        return super().score(completions, seed=random.getrandbits(30))


class Greedy(Whole):
    """Reads every kind."""

    def items(self, completions):
        return super().items([replace(c, kind=self.kind) for c in completions])


class NeverNone(Whole):
    def score(self, completions, **how):
        return super().score(completions, **how) or Score(0.0, 0.0, 0.0, 0)


class Unpaired(Whole):
    def difference(self, ours, theirs, **how):
        one, two = self.score(ours), self.score(theirs)
        if one is None or two is None:
            return None
        low, high = one.low - two.high, one.high - two.low
        return Score(one.value - two.value, low, high, one.n)


BROKEN = (
    (is_labelled, Unlabelled),
    (interval_holds_the_figure, Outside),
    (counts_items, CountsRows),
    (order_is_nothing, KeepsLast),
    (seeds_are_averaged, SeedsAsItems),
    (is_deterministic, Restless),
    (other_kinds_are_ignored, Greedy),
    (nothing_gives_none, NeverNone),
    (own_difference_is_zero, Unpaired),
    (difference_is_of_shared_items, Unpaired),
)


@pytest.mark.parametrize(("law", "broken"), BROKEN, ids=lambda part: part.__name__)
def test_every_law_catches_a_broken_copy(law, broken):
    law(Whole())
    with pytest.raises(AssertionError):
        law(broken())


def test_every_law_has_a_broken_copy():
    assert [law for law, _ in BROKEN] == list(LAWS)


# --- the interval --------------------------------------------------------------------------------


def test_ninety_five_percent_intervals_cover_about_as_often(monkeypatch):
    monkeypatch.setattr("innsteer.metrics.base.RESAMPLES", 200)
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(150):
        made = [
            Completion(f"{n}", "pair", values={"shift": (x,)})
            for n, x in enumerate(rng.normal(3.0, 2.0, 40))
        ]
        score = Whole().score(made, seed=trial)
        covered += score.low <= 3.0 <= score.high
    assert 0.88 <= covered / 150 <= 0.99


def test_a_lower_level_gives_a_narrower_interval():
    given = sample_for(Whole(), 20)
    wide, narrow = Whole().score(given), Whole().score(given, level=0.5)
    assert narrow.level == 0.5
    assert narrow.high - narrow.low < wide.high - wide.low
