"""Several behaviours in one steering: fitted together, added later, mixed, and what that does."""

from dataclasses import replace

import pytest
import torch

import tiny
from innsteer import fitting, tuning
from innsteer import interference as home
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError, LeakError, MismatchError
from innsteer.interference import Interference, interference
from innsteer.interventions import Edit
from innsteer.metrics import get as metric
from innsteer.site import Site
from innsteer.steerers import innsteer as inn
from innsteer.steering import Steering
from innsteer.suites.behaviour import neutral
from innsteer.training import best_scale
from words import contrast as open_pairs

NAMES = "Tea Rain Salt Dusk Iron Wool Jazz Rope Clay Mint Oak Fern Lime Sage Hay Ash".split()


def stated(behaviour: str, verb: str) -> Contrast:
    """Yes/No questions about statements of one behaviour, all behaviours in one wording."""
    items = []
    for n, name in enumerate(NAMES):
        key, other = ("Yes", "No") if n % 2 else ("No", "Yes")
        prompt = f'Do you say this?\n"{name} {verb} {NAMES[-n]}"\nYes or No.'
        part = ("train", "train", "validation", "test")[n // 2 % 4]
        group = f"{behaviour}-{n}"
        items.append(Item(group, prompt, other, key, key, group, part))
    return Contrast(behaviour, "choice", tuple(items))


LIKES, FEARS, OWNS = (
    stated("likes", "likes"),
    stated("fears", "is afraid of"),
    stated("owns", "has"),
)
SITE = Site(1)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(scope="module")
def both(model):
    return fitting.fit(model, [LIKES, FEARS], objective="target", sites=[SITE], polish=2)


@pytest.fixture(autouse=True)
def few_neutral_prompts(monkeypatch):
    for module in (tuning, home):
        monkeypatch.setattr(module.suites, "neutral", lambda part: neutral(part)[:6])


def test_behaviours_fitted_together_share_a_map_and_what_stays(model, both):
    assert both.behaviours == ("likes", "fears")
    assert both.provenance["whole_contrast"] == {"likes": LIKES.hash, "fears": FEARS.hash}
    assert len(both.provenance["train_groups"]) == 2 * len(LIKES.train)
    run = fitting.through(model, [LIKES, FEARS], [SITE])
    # Their wording is one, so the unmoved statements stand there once: 160, 40 of them plain.
    assert len(run.unmoved) == len(fitting.through(model, LIKES, [SITE]).unmoved) == 200
    wider = stated("asks", "is")
    other = replace(
        wider,
        items=tuple(
            replace(i, prompt=i.prompt.replace("Do you", "Would you")) for i in wider.items
        ),
    )
    assert len(fitting.through(model, [LIKES, other], [SITE]).unmoved) == 360


def test_recorded_methods_fit_several_behaviours_as_each_alone(model, tmp_path):
    one, two = open_pairs(), replace(open_pairs(), behaviour="second")
    pair = fitting.fit(model, [one, two], "diffmean", sites=[SITE], folder=tmp_path / "rows")
    alone = fitting.fit(model, two, "diffmean", sites=[SITE])
    found = pair.interventions[SITE].shifts
    assert pair.behaviours == ("formal-ish", "second") and len(found) == 2
    assert torch.equal(found[1], alone.interventions[SITE].shifts[0])
    from innsteer.activations import Activations

    kept = Activations.load(tmp_path / "rows")
    assert kept.behaviours == pair.behaviours and kept.hash == pair.provenance["recording"]
    with pytest.raises(InputError, match="each once"):
        fitting.fit(model, [one, one], "diffmean", sites=[SITE])


def test_each_behaviour_is_tuned_by_its_own_items_and_column(model, both, monkeypatch):
    asked = []
    real = Steering.edit

    def edit(self, strength=None, *, behaviour=None):
        found = real(self, strength, behaviour=behaviour)
        asked.append(found.coef)
        return found

    monkeypatch.setattr(Steering, "edit", edit)
    monkeypatch.setattr(tuning, "_search", lambda *_: (0.7, tuning.BUDGET))
    tuned = tuning.tune(model, both, FEARS, preview=True)
    assert set(tuned.calibration) == {"fears"} and tuned.resolve("budget", "fears") == 0.7
    assert all(coef[0] == 0 for coef in asked) and any(coef[1] != 0 for coef in asked)
    again = tuning.tune(model, tuned, LIKES, preview=True)
    assert set(again.calibration) == {"likes", "fears"} == set(again.provenance["tuning"])
    assert again.of("fears").curve is again.calibration["fears"]
    assert again.of("fears").resolve() == 0.7 and again.of("fears").identity == again.identity


def test_a_behaviour_is_added_and_the_others_stay(model, both, tmp_path):
    grown = fitting.extend(model, both, OWNS)
    assert grown.behaviours == ("likes", "fears", "owns")
    old, new = both.interventions[SITE].step, grown.interventions[SITE].step
    for name, tensor in old.named_parameters():
        assert torch.equal(new.get_parameter(name)[:2], tensor), name
    run = fitting.through(model, OWNS, [SITE])
    rows = run.rows()
    h, before = rows.values[SITE], rows.context[SITE]
    part, one = grown.interventions[SITE], torch.eye(3)
    added = part(h, one[2:].expand(len(h), -1), before)
    assert (added != h).any(-1).any()
    twos = torch.eye(2)[:1].expand(len(h), -1)
    same = both.interventions[SITE](h, twos, before)
    torch.testing.assert_close(part(h, one[:1].expand(len(h), -1), before), same)
    assert len(grown.provenance["train_groups"]) == 3 * len(LIKES.train)
    assert Steering.load(grown.save(tmp_path / "grown")).identity == grown.identity
    with pytest.raises(LeakError):
        fitting.check_unseen(grown, OWNS.part("train"))
    with pytest.raises(InputError, match="'likes', which this steering has already"):
        fitting.extend(model, both, LIKES)
    plain = fitting.fit(model, open_pairs(), "diffmean", sites=[SITE])
    with pytest.raises(InputError, match="another behaviour for a map of 'diffmean'"):
        fitting.extend(model, plain, OWNS)
    with pytest.raises(MismatchError):
        fitting.extend(tiny.tiny_language_model(seed=1), both, OWNS)


def test_what_is_added_is_dialled_by_its_own_validation_items(model, both, monkeypatch):
    tried = []

    def best_scale(run, maps):
        tried.append((run.behaviours, len(maps[SITE].step.write)))
        return 3.0, float(len(tried) == 3)

    monkeypatch.setattr(inn, "best_scale", best_scale)
    grown = fitting.extend(model, both, OWNS)
    assert tried == [(("owns",), 1)] * 3
    run = fitting.through(model, OWNS, [SITE])
    bare = both.steerer.extend(both.interventions, run.rows())[SITE].step
    step = grown.interventions[SITE].step
    # The third sharpness was said to be the best: twice the first guess.
    torch.testing.assert_close(step.read[2, 0], 2 * bare.read[2, 0])
    torch.testing.assert_close(step.write[2, 0], 3 * bare.write[2, 0])


def test_behaviours_added_at_once_are_added_one_by_one(model, both):
    asks = stated("asks", "asks for")
    at_once = fitting.extend(model, both, [OWNS, asks])
    in_turn = fitting.extend(model, fitting.extend(model, both, OWNS), asks)
    assert at_once.behaviours == in_turn.behaviours == ("likes", "fears", "owns", "asks")
    assert at_once.identity == in_turn.identity
    assert at_once.provenance["added"] == {"owns": OWNS.hash, "asks": asks.hash}


def test_a_behaviour_that_would_hardly_move_is_not_added():
    from innsteer.activations import Activations
    from innsteer.steerer import get

    rows = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    one, two = torch.eye(12)[0], torch.eye(12)[5]
    method = get("innsteer", objective="target")
    fitted = method.fit(Activations.of_sides(rows - one, rows + one, behaviour="one"))
    with pytest.raises(InputError, match="'two' at .*: 0% of its gradient lies in the 1 coord"):
        method.extend(fitted, Activations.of_sides(rows - two, rows + two, behaviour="two"))
    along = Activations.of_sides(rows - one - two, rows + one + two, behaviour="both")
    assert len(method.extend(fitted, along)[Site(0)].step.write) == 2


def test_what_cannot_be_added_or_joined_is_refused_before_anything_runs(model, both, monkeypatch):
    monkeypatch.setattr(fitting, "through", None)
    monkeypatch.setattr(fitting, "record", None)
    flow = replace(both, steerer=replace(both.steerer, couplings=2, reads="row"))
    deep = flow.steerer.build({SITE: tiny.WIDTH})
    with pytest.raises(InputError, match="no plain shear"):
        fitting.extend(model, replace(flow, interventions=deep), OWNS)
    with pytest.raises(InputError, match="likes, likes; expected at least one, each once"):
        fitting.fit(model, [LIKES, LIKES], objective="target")
    with pytest.raises(InputError, match=r"likes \(choice\), formal-ish \(open\) as one"):
        fitting.fit(model, [LIKES, open_pairs()], objective="target")
    with pytest.raises(InputError, match=r"\(none\)"):
        fitting.fit(model, [], "diffmean")


def test_every_wording_brings_its_own_rewordings(model):
    items = (replace(i, prompt=i.prompt.replace("Do you", "Would you")) for i in FEARS.items)
    polite = replace(FEARS, items=tuple(items))
    runs = [fitting.through(model, one, [SITE]) for one in (LIKES, polite, [LIKES, polite])]
    likes, fears, whole = (run.rows().rewordings(SITE) for run in runs)
    torch.testing.assert_close(whole, torch.cat([likes, fears]))


def test_open_behaviours_share_the_items_of_a_line_search(model):
    many = open_pairs(parts=("train", "train", *["validation"] * 13))
    run = fitting.through(model, [many, replace(many, behaviour="second")], [SITE])
    asked = []
    real = run.answers

    def answers(maps, items, coef, **how):
        asked.append({run._asked[number].behaviour for number in items})
        return real(maps, items, coef, **how)

    run.answers = answers
    best_scale(run, fitting.get("innsteer", objective="target").fit(run.rows()), (1.0,))
    assert asked == [{0, 1}]


def test_interference_is_what_separate_measurements_say(model, both):
    found = interference(
        model, both, [LIKES, FEARS], strengths={"likes": 0.5, "fears": -2}, tokens=40
    )
    assert found.behaviours == ("likes", "fears") and found.mix == {"likes": 0.5, "fears": -2.0}
    held = FEARS.part("validation")
    meter = tuning.control_meter(home.HF(model), held, [SITE])

    def control(*coef):
        edit = Edit(both.interventions, torch.tensor(coef))
        return metric("alignment").score(tuning.control(meter([edit]), held)).value

    assert found.alone[0][1] == control(0.5, 0.0)
    assert found.alone[1][1] == control(0.0, -2.0) != found.alone[0][1]
    assert found.together[1] == control(0.5, -2.0)
    effect = found.alone[1][1] - found.unsteered[1]
    assert found.kept[1] == pytest.approx((found.together[1] - found.unsteered[1]) / effect)
    assert found.cost >= 0 and found.in_format > 0
    lines = found.text().splitlines()
    assert f"{found.alone[0][1]:.3f}" in lines[2] and "-2" in lines[3]
    assert "effect kept" in lines[5] and f"{found.cost:.4f} nats" in lines[6]


def test_a_behaviour_that_nothing_moves_keeps_no_share():
    none = Interference(("a",), (1.0,), ("alignment",), (0.5,), ((0.5,),), (0.6,), 0.0, None)
    assert none.kept == (None,) and "-" in none.text().splitlines()[4]
    assert none.to_json()["kept"] == [None]


@pytest.mark.parametrize(
    ("contrasts", "strengths"),
    [([LIKES], {}), ([LIKES, LIKES], {}), ([LIKES, OWNS], {}), ([LIKES, FEARS], {"owns": 1.0})],
    ids=["one", "twice", "unknown", "unknown strength"],
)
def test_only_behaviours_of_the_steering_are_compared(model, both, contrasts, strengths):
    with pytest.raises(InputError, match="data of two or more, each once, of likes, fears"):
        interference(model, both, contrasts, strengths=strengths)


def test_items_of_the_fit_are_refused(model, both):
    with pytest.raises(LeakError):
        interference(model, both, [LIKES, FEARS], part="train")
