"""Tuning: recording, fitting, and strength at a cost budget."""

import math
from dataclasses import replace

import pytest
import torch

import tiny
from innsteer import fitting, tuning
from innsteer.backends.base import Prompt, Sampling, silent
from innsteer.backends.hf import HF
from innsteer.calibration import BUDGET
from innsteer.errors import (
    BudgetError,
    DataError,
    InputError,
    MismatchError,
)
from innsteer.interventions import Shift
from innsteer.metrics import get as get_metric
from innsteer.site import Site
from innsteer.steerer import Interventions, get
from innsteer.steering import Steering
from innsteer.suites.behaviour import neutral
from words import contrast, yes_or_no

OPEN, CHOICE = contrast(), contrast(yes_or_no)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(scope="module")
def fitted(model):
    return fitting.fit(model, OPEN, "diffmean", sites=[Site(1)])


@pytest.fixture(autouse=True)
def few_neutral_prompts(monkeypatch):
    monkeypatch.setattr(tuning.suites, "neutral", lambda part: neutral(part)[:12])


@pytest.fixture(scope="module")
def meter(model):
    backend = HF(model)
    reference = backend.reference(neutral("validation")[:8], Sampling(12, 1.0, 0))
    return backend.meter(reference, [Site(1)])


# --- strength ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.002, 0.02, BUDGET, 0.5])
def test_the_search_spends_the_budget_to_three_percent(meter, fitted, budget):
    strength, _ = tuning._search({"neutral_cost": meter}, fitted.edit, budget, silent)
    assert (
        0.97 * budget
        <= tuning._worst({"neutral_cost": meter}, fitted.edit, strength, "value")
        <= budget
    )


def test_a_larger_budget_gives_a_larger_strength(meter, fitted):
    found = [
        tuning._search({"neutral_cost": meter}, fitted.edit, budget, silent)
        for budget in (0.01, 0.05, 0.2)
    ]
    assert found == sorted(found) and found[0] < found[-1]


class Priced:
    """A meter of a made-up cost."""

    def __init__(self, monkeypatch, cost):
        self.asked = []

        def priced(costs, steering, strength, end):
            self.asked.append(strength)
            return cost(strength)

        monkeypatch.setattr(tuning, "_worst", priced)


def test_the_search_needs_few_steps_where_the_cost_is_quadratic(monkeypatch):
    priced = Priced(monkeypatch, lambda s: 0.003 * s * s)
    strength, _ = tuning._search({}, None, 0.1, silent)
    assert 0.97 * 0.1 <= 0.003 * strength**2 <= 0.1
    assert len(priced.asked) <= 3


@pytest.mark.parametrize(
    "cost",
    [lambda s: 7.0, lambda s: math.nan, lambda s: math.inf],
    ids=["never below", "nan", "inf"],
)
def test_a_cost_that_never_meets_the_budget_is_an_error(monkeypatch, cost):
    Priced(monkeypatch, cost)
    with pytest.raises(BudgetError, match=r"no strength of this steering spends 0\.1 nats"):
        tuning._search({}, None, 0.1, silent)


@pytest.mark.parametrize(
    "cost", [lambda s: 0.0, lambda s: 0.05 * (1 - math.exp(-s))], ids=["zero", "saturates below"]
)
def test_a_cost_that_never_reaches_the_budget_is_told_apart(monkeypatch, cost):
    Priced(monkeypatch, cost)
    strength, spent = tuning._search({}, None, 0.1, silent)
    assert strength > 100 and spent == pytest.approx(cost(strength))


def test_a_cost_that_hardly_falls_is_met_where_it_does(monkeypatch):
    """Behind a gate a few prompts may cost all there is at nearly any strength."""
    Priced(monkeypatch, lambda s: 0.11 if s > 0.02 else s**2)
    strength, _ = tuning._search({}, None, 0.1, silent)
    assert 0.01 < strength <= 0.02


def test_a_cost_that_jumps_over_the_budget_gives_the_last_strength_below(monkeypatch):
    Priced(monkeypatch, lambda s: 0.01 if s < 2.5 else 1.0)
    strength, spent = tuning._search({}, None, 0.1, silent)
    assert strength == pytest.approx(2.5, rel=1e-3) and spent == 0.1


def test_a_map_that_does_nothing_has_no_strength(model):
    site = Site(1)
    none = Steering(get("diffmean"), Interventions({site: Shift(tiny.WIDTH)}), (OPEN.behaviour,))
    with pytest.raises(BudgetError, match="no strength of this steering spends"):
        tuning.tune(model, none, OPEN, preview=True)


class Effect:
    """A meter of a made-up effect: a choice's answer has this probability at a strength."""

    def __init__(self, monkeypatch, effect):
        self.asked = []
        monkeypatch.setattr(tuning, "_said", lambda found, _: found)
        self.effect = effect

    def __call__(self, edits, displacement=None):
        strength = float(edits[0].coef.max())
        if displacement is not None:
            self.asked.append(strength)
            displacement.append(strength)
        return self.effect(strength)


def saturating(strength):
    return 0.4 + 0.5 * math.tanh(3 * strength)


@pytest.mark.parametrize(
    ("effect", "limit", "spent", "wanted", "asked"),
    [
        (saturating, 1.41, 0.95 * BUDGET, 1.0, [0.5, 1.0]),
        (saturating, 0.3, 0.95 * BUDGET, 0.3, [0.3]),
        (saturating, 1e4, 0.0, 1.0, [0.5, 1.0, 2.0, 4.0]),
        (saturating, 7.2, BUDGET, 1.0, [0.5, 1.0, 2.0, 4.0, 7.2]),
        (saturating, 1.4, BUDGET, 1.4, [0.5, 1.4]),
        (saturating, 0.6, BUDGET, 0.6, []),
        (lambda s: 0.4 + 0.01 * s, 7.2, BUDGET, 7.2, [0.5, 1.0, 2.0, 4.0, 7.2]),
        (lambda s: 0.4 - 0.01 * s, 7.2, BUDGET, 7.2, [0.5, 1.0, 2.0, 4.0, 7.2]),
    ],
    ids=[
        "just below",
        "all below",
        "costs nothing",
        "late cost",
        "near the limit",
        "below all",
        "linear",
        "the wrong way",
    ],
)
def test_strength_is_the_smallest_with_the_effect(
    fitted, monkeypatch, effect, limit, spent, wanted, asked
):
    scored = Effect(monkeypatch, effect)
    assert tuning._enough(scored, fitted.edit, CHOICE, limit, spent, BUDGET) == wanted
    assert scored.asked == pytest.approx(asked)


def test_open_answers_get_the_whole_budget_where_they_can_spend_it(fitted, monkeypatch):
    """Their preference is near 1 far below it: that says nothing of how far they moved."""
    scored = Effect(monkeypatch, lambda s: 0.5 + 0.5 * math.tanh(9 * s))
    assert tuning._enough(scored, fitted.edit, OPEN, 7.2, BUDGET, BUDGET) == 7.2
    assert tuning._enough(scored, fitted.edit, OPEN, 1e4, 0.0, BUDGET) == 0.5


@pytest.mark.parametrize(("limit", "by"), [(1.0, "cost"), (6.0, "control")])
def test_a_tuned_steering_says_what_decided(model, fitted, monkeypatch, limit, by):
    monkeypatch.setattr(tuning, "_search", lambda *_: (limit, BUDGET))
    monkeypatch.setattr(tuning, "_enough", lambda *_: 1.0)
    tuned = tuning.tune(model, fitted, OPEN, preview=True, fractions=(1.0,), search_tokens=60)
    assert [dose.strength for dose in tuned.calibration["formal-ish"].doses] == [0.0, 1.0]
    assert tuned.resolve() == 1.0 and tuned.provenance["tuning"]["formal-ish"]["by"] == by


def test_the_effect_of_choices_is_what_is_said_and_of_pairs_the_preference(model, fitted):
    backend = HF(model)
    edit = fitted.edit(2.0)
    for items, name in ((CHOICE, "answer_mass"), (OPEN, "preference")):
        held = items.part("validation")
        found = tuning.control_meter(backend, held, [Site(1)])([edit])
        value = tuning._said(found, held)
        whole = get_metric(name).score(tuning.control(found, held)).value
        assert 0 < value < whole if items is CHOICE else value == whole


def test_a_check_on_too_few_prompts_fails_before_the_search(model, fitted, monkeypatch):
    monkeypatch.setattr(tuning, "_search", None)
    with pytest.raises(BudgetError, match="tokens of 12 prompts; expected at least 2000 tokens"):
        tuning.tune(model, fitted, OPEN)


def test_the_check_shrinks_strength_until_the_interval_lies_within_the_budget(meter, fitted):
    from innsteer.metrics import get as metric

    start, _ = tuning._search({"neutral_cost": meter}, fitted.edit, 0.05, silent)

    def high(strength):
        return tuning._worst({"neutral_cost": meter}, fitted.edit, strength, "high")

    strength = tuning.within(high, start, 0.05)
    assert 0 < strength < start
    score = metric("neutral_cost").score(meter([fitted.edit(strength)]), level=0.9)
    assert score.high <= 0.05


def test_what_cannot_work_fails_before_any_work(model, fitted, monkeypatch):
    monkeypatch.setattr(tuning, "HF", None)
    for budget in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="above 0"):
            tuning.tune(model, fitted, OPEN, budget=budget)
    with pytest.raises(DataError, match="validation part"):
        tuning.tune(model, fitted, contrast(parts=("train",) * 4 + ("test",)))


def test_tune_measures_a_curve_and_says_that_it_is_a_preview(model, fitted):
    tuned = tuning.tune(
        model, fitted, OPEN, preview=True, search_tokens=100, both_ways=True, fractions=(0.5, 1.0)
    )
    curve = tuned.calibration["formal-ish"]
    assert curve.preview and curve.budget == BUDGET
    strengths = [dose.strength for dose in curve.doses]
    s = curve.strength
    assert strengths == [-s, -s / 2, 0.0, s / 2, s]
    plain = curve.doses[2]
    assert (plain.nats, plain.displacement, plain.control) == (0, 0, 0.5)
    assert 0.97 * BUDGET <= curve.at_budget.nats <= BUDGET
    assert plain.nats < curve.doses[3].nats < curve.doses[4].nats
    assert all(dose.low <= dose.nats <= dose.high for dose in curve.doses)
    assert curve.doses[3].displacement == pytest.approx(curve.doses[4].displacement / 2, rel=1e-4)
    assert (
        tuned.resolve() == s and tuned.provenance["tuning"]["formal-ish"]["control"] == "preference"
    )
    assert tuned.identity == fitted.identity
    assert fitted.calibration == {}


def test_a_checked_strength_is_no_preview(model, fitted, monkeypatch):
    monkeypatch.setattr(tuning.suites, "neutral", lambda part: neutral(part)[:100])
    real = Sampling
    monkeypatch.setattr(tuning, "Sampling", lambda n, t, s: real(3, t, s))
    tuned = tuning.tune(
        model, fitted, CHOICE, search_tokens=60, check_tokens=200, fractions=(1.0,), seed=1
    )
    curve = tuned.calibration["formal-ish"]
    assert not curve.preview and curve.tokens >= 200
    assert tuned.provenance["tuning"]["formal-ish"]["control"] == "alignment"


@pytest.mark.parametrize("grows", [0.8, 1.0, 2.0])
@pytest.mark.parametrize("first", [1.1, 1.5])
def test_the_check_leaves_as_much_to_what_feeds_back_as_to_a_shift(grows, first):
    """The cost of feedback grows with strength itself, not with its square."""
    strength = tuning.within(lambda s: 0.1 * first * s**grows, 1.0, 0.1)
    assert 0.94 < first * strength**grows <= 1


def test_the_search_finds_the_power_by_which_cost_grows(monkeypatch):
    for grows in (0.8, 1.0, 2.0, 3.0):
        asked = []

        def worst(costs, edit, strength, end, grows=grows, asked=asked):
            asked.append(strength)
            return 0.4 * strength**grows

        monkeypatch.setattr(tuning, "_worst", worst)
        strength, _ = tuning._search({}, None, 0.1, silent)
        assert 0.097 <= 0.4 * strength**grows <= 0.1 and len(asked) <= 4, grows


def test_noise_between_nearly_equal_strengths_is_no_power():
    """Costs 3 % off at strengths 1 % apart once sent the check down to 0.6 of what was right."""
    noise = iter([1.0, 1.03, *[1.0] * 20])
    strength = tuning.within(lambda s: 0.102 * s**2 * next(noise), 1.0, 0.1)
    assert strength > 0.95


@pytest.mark.parametrize("most", [5.0, 0.3])
def test_a_cost_without_bound_at_large_strengths_is_searched_below_them(monkeypatch, most):
    law = lambda s: 1e-4 * s**2 if s < most else math.inf  # noqa: E731
    monkeypatch.setattr(tuning, "_worst", lambda costs, edit, strength, end: law(strength))
    strength, _ = tuning._search({}, None, 0.1, silent)
    assert 0.9 * most < strength < most


def test_the_check_ends_where_the_cost_saturates_at_a_small_strength():
    """A gate that lets a few prompts through: they cost all there is, at 1 as at 4."""
    asked = []

    def cost(strength):
        asked.append(strength)
        return 0.12 * (1 - math.exp(-20 * strength))

    strength = tuning.within(cost, 4.0, 0.1)
    assert asked[-1] == strength and 0.01 < strength < 0.1
    with pytest.raises(BudgetError, match="stays above"):
        tuning.within(lambda s: 0.2, 4.0, 0.1)


def test_the_curve_is_measured_on_the_tokens_of_the_check(model, fitted, monkeypatch):
    monkeypatch.setattr(tuning.suites, "neutral", lambda part: neutral(part)[:100])
    real = Sampling
    monkeypatch.setattr(tuning, "Sampling", lambda n, t, s: real(3, t, s))
    backend = HF(model)
    how = {"search_tokens": 30, "check_tokens": 200, "fractions": (0.5, 1.0)}
    curve = tuning.tune(backend, fitted, OPEN, **how).calibration["formal-ish"]
    whole = backend.meter(
        backend.reference(neutral("validation")[:100], real(3, 1.0, 0)), [Site(1)]
    )
    at_budget = curve.at_budget
    assert at_budget.strength == curve.strength and curve.tokens == whole.reference.tokens
    costs = {"neutral_cost": whole}
    for dose in curve.doses:
        cost = tuning._worst(costs, fitted.edit, dose.strength, "value")
        assert dose.nats == pytest.approx(cost, abs=1e-7)
    assert at_budget.nats <= at_budget.high <= BUDGET
    assert curve.resolve("budget") == curve.resolve(f"{BUDGET}nat") == curve.strength


# --- control -------------------------------------------------------------------------------------


def test_control_of_choices_is_the_answers_probability(model, fitted):
    backend, items = HF(model), CHOICE.validation
    edit = fitted.edit(2.0)
    made = tuning.control(tuning.control_meter(backend, items, [Site(1)])([edit]), items)
    prompts = [Prompt(i.id, i.prompt, (i.target, i.source)) for i in items.items]
    for item, one, (match, other) in zip(
        items.items, made, backend.score(prompts, [edit]), strict=True
    ):
        assert (one.kind, one.item, one.key) == ("choice", item.id, item.key)
        assert one.values["match"][0] == pytest.approx(math.exp(sum(match)), rel=1e-4)
        assert one.values["other"][0] == pytest.approx(math.exp(sum(other)), rel=1e-4)


def test_control_of_pairs_is_the_shift_in_log_odds(model, fitted):
    backend, items = HF(model), OPEN.validation
    edit = fitted.edit(2.0)
    made = tuning.control(tuning.control_meter(backend, items, [Site(1)])([edit]), items)
    prompts = [Prompt(i.id, i.prompt, (i.target, i.source)) for i in items.items]
    steered, plain = backend.score(prompts, [edit]), backend.score(prompts)
    for one, after, before in zip(made, steered, plain, strict=True):
        odds = [sum(side[0]) - sum(side[1]) for side in (after, before)]
        assert one.kind == "pair" and one.key == ""
        assert one.values["shift"][0] == pytest.approx(odds[0] - odds[1], abs=1e-3)
    assert any(abs(one.values["shift"][0]) > 0.01 for one in made)


def test_lone_answers_are_dealt_into_pairs_each_under_its_own_prompt(model, fitted):
    sides = [
        replace(item, **{"source" if n % 3 else "target": None})
        for n, item in enumerate(OPEN.items)
    ]
    items, backend = replace(OPEN, items=tuple(sides)), HF(model)
    edit = fitted.edit(2.0)
    made = tuning.control(tuning.control_meter(backend, items, [Site(1)])([edit]), items)
    targets = [i for i in sides if i.target]
    sources = [i for i in sides if i.source]
    assert len(made) == min(len(targets), len(sources)) and len(targets) != len(sources)

    def gain(item, text):
        (after,), (before,) = (
            backend.score([Prompt(item.id, item.prompt, (text,))], edits)[0]
            for edits in ([edit], [])
        )
        return sum(after) - sum(before)

    for one, t, s in zip(made, targets, sources, strict=False):
        asked = gain(t, t.target) - gain(s, s.source)
        assert one.values["shift"][0] == pytest.approx(asked, abs=1e-3)


def test_items_with_one_side_only_cannot_be_scored(model):
    lone = replace(OPEN, items=tuple(replace(i, source=None) for i in OPEN.items))
    with pytest.raises(InputError, match="texts of one side only"):
        tuning.control_meter(HF(model), lone, [Site(1)])


def test_joint_tuning_holds_both_halves_to_the_budget(model, fitted, monkeypatch):
    prompts = tuple(Prompt(f"in-format-{n}", text) for n, text in enumerate(("one two", "three")))
    monkeypatch.setattr(tuning.suites, "in_format", lambda contrast, part: prompts)
    backend = HF(model)
    sites = list(fitted.interventions)
    neutral = backend.meter(backend.reference(tuning.suites.neutral("validation"), None), sites)
    half = backend.meter(backend.reference(prompts, None), sites)
    alone, _ = tuning._search({"neutral_cost": neutral}, fitted.edit, 0.05, silent)
    costs = {"neutral_cost": neutral, "in_format_cost": half}
    both, _ = tuning._search(costs, fitted.edit, 0.05, silent)
    worst = max(
        tuning._worst({name: meter}, fitted.edit, both, "value") for name, meter in costs.items()
    )
    assert both <= alone and 0.97 * 0.05 <= worst <= 0.05


def test_joint_tuning_of_a_behaviour_without_in_format_prompts_is_an_error(model, fitted):
    with pytest.raises(InputError, match="in-format"):
        tuning._in_format(HF(model), OPEN, list(fitted.interventions))


# --- siblings ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning.suites, "neutral", lambda part: neutral(part)[:12])
        fitted = fitting.fit(model, OPEN, "innsteer", sites=[Site(1)], hidden=8, epochs=30)
        return tuning.tune(model, fitted, OPEN, preview=True, search_tokens=60)


def sibling(scale=1.0, noise=1e-3):
    """The model with a little noise in its weights, as an update or a quantisation leaves it."""
    other = tiny.tiny_language_model()
    draw = torch.Generator().manual_seed(5)
    for name, weight in other.model.named_parameters():
        weight.mul_(1 + noise * torch.randn(weight.shape, generator=draw))
        if "down_proj" in name or "o_proj" in name:
            weight.mul_(scale)
    return other


def test_a_steering_moves_to_a_sibling_where_it_holds(tuned):
    other = sibling()
    with pytest.raises(MismatchError):
        tuned.check(other)
    moved = tuning.recalibrate(other, tuned, OPEN, search_tokens=60)
    moved.check(other)
    assert moved.identity != tuned.identity
    notes = moved.provenance["recalibrated"]
    assert notes["from"] == tuned.identity and notes["differs"] == ["weights"]
    assert notes["strength"] == pytest.approx(1, abs=0.2) and notes["round_trip"] < 1e-4
    curve = moved.calibration[OPEN.behaviour]
    assert curve.budget == tuned.calibration[OPEN.behaviour].budget and curve.preview
    for one, own in zip(
        moved.interventions.state_dict().values(),
        tuned.interventions.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(one, own)


def test_a_sibling_on_which_it_does_not_hold_is_refused_with_the_figures(tuned):
    with pytest.raises(MismatchError, match=r"not hold .*(displacement|strength) [\d.e-]+, no"):
        tuning.recalibrate(sibling(scale=4.0), tuned, OPEN, search_tokens=60)


def test_only_a_tuned_steering_moves_and_only_to_a_sibling(model, fitted, tuned):
    with pytest.raises(InputError, match="without calibration of"):
        tuning.recalibrate(sibling(), fitted, OPEN)
    with pytest.raises(InputError, match="is the model that this steering was fitted on"):
        tuning.recalibrate(model, tuned, OPEN)
    with pytest.raises(MismatchError, match="no sibling of .*another depth or width"):
        tuning.recalibrate(tiny.tiny_language_model(num_hidden_layers=1), tuned, OPEN)
    other = sibling()
    other.tokenizer.chat_template = other.tokenizer.chat_template.replace("user", "person")
    other.tokenizer.chat_template += "\n"
    with pytest.raises(MismatchError, match="another weights, template"):
        tuning.recalibrate(other, tuned, OPEN)
