"""Evaluation: every arm on one suite, beside the arms that a figure needs to mean something."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from edits import seen
from innsteer import evaluation, fitting, metrics, tuning
from innsteer.backends.base import Sampling
from innsteer.backends.hf import HF
from innsteer.backends.lora import LoRA
from innsteer.calibration import Calibration, Dose
from innsteer.errors import InputError, MissingPackage, UnknownName
from innsteer.evaluation import PROMPT_ONLY, RANDOM, UNSTEERED, Arm, Sizes
from innsteer.interventions import Shift
from innsteer.metrics import negative_sentiment
from innsteer.report import Report, pages
from innsteer.site import Site, Where
from innsteer.steerer import Interventions
from innsteer.suites import behaviour as suites
from words import contrast, yes_or_no

SIZES = Sizes(
    neutral_prompts=6, asides=2, aside_tokens=4, long=((8, 2),), trails=1, cloud=3
)  # fmt: skip
OPEN, CHOICE = contrast(), contrast(yes_or_no)


def tuned(steering, *, strength=3.0, budget=0.5, both_ways=True):
    """A steering with a made-up calibration whose cost is quadratic."""
    signs = (-1, 0, 1) if both_ways else (0, 1)
    doses = tuple(
        Dose(s * strength, s * s * budget, 0, 1, abs(s) / 5, 0.5 + s / 4, 0.4, 0.9) for s in signs
    )
    curve = Calibration(doses, budget, strength, 100, preview=True)
    return steering.tuned({steering.behaviours[0]: curve})


def small(suite):
    """The suite at the size of a test."""
    return replace(
        suite,
        prompts=suite.prompts[:3],
        sampling=replace(suite.sampling, new_tokens=6),
        neutral=suite.neutral[:8],
        in_format=suite.neutral[8:12],
        plain=suite.plain[:2],
        neutral_tokens=5,
        instruction="Be kind.",
    )


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(scope="module")
def ours(model):
    return tuned(fitting.fit(model, OPEN, "diffmean", sites=[Site(1)]))


@pytest.fixture(scope="module")
def suite():
    return small(suites.load(OPEN))


@pytest.fixture(scope="module")
def report(model, ours, suite):
    other = tuned(fitting.fit(model, OPEN, "diffmean", sites=[Site(2)]), both_ways=False)
    return evaluation.compare(model, {"one": ours, "two": other}, suite, sizes=SIZES)


@pytest.fixture(scope="module")
def chosen(model):
    steering = tuned(fitting.fit(model, CHOICE, "diffmean", sites=[Site(1)]), strength=-3.0)
    return evaluation.compare(model, {"away": steering}, small(suites.load(CHOICE)), sizes=SIZES)


# --- arms ----------------------------------------------------------------------------------------


def test_every_steering_stands_beside_the_arms_that_give_it_meaning(report):
    assert report.arms == (UNSTEERED, PROMPT_ONLY, RANDOM, "one", "two")


def test_a_lora_is_an_arm_and_leaves_the_others_as_they_are(ours, suite, report):
    plain = tiny.tiny_language_model()
    lora = LoRA(plain, targets=["v_proj"])
    for weight in lora.weights:
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    found = evaluation.compare(plain, {"one": ours}, suite, adapters={"mine": lora}, sizes=SIZES)
    assert found.arms == (UNSTEERED, PROMPT_ONLY, RANDOM, "one", "mine")
    for arm in (UNSTEERED, PROMPT_ONLY, "one"):
        assert [f for f in found.figures if f.arm == arm and not f.against] == [
            f for f in report.figures if f.arm == arm and not f.against
        ]
    cost = found.figure("mine", "neutral_cost")
    assert cost.value > 0.01 and cost.strength == 1
    own = {(c.kind, c.item): (c.text, c.values) for c in found.completions if c.arm == "mine"}
    like = {(c.kind, c.item): (c.text, c.values) for c in found.completions if c.arm == UNSTEERED}
    moved = {kind for (kind, item), one in own.items() if one != like[kind, item]}
    assert moved == {kind for kind, _ in like} and own.keys() == like.keys()
    assert any("mine changes weights" in note for note in found.notes)


def test_arms_without_distinct_names_are_refused(model, suite):
    for arms in ([], [Arm("a"), Arm("a")]):
        with pytest.raises(InputError, match="all distinct"):
            evaluation.evaluate(model, arms, suite)


def test_a_steering_that_was_not_tuned_is_refused(model, suite):
    with pytest.raises(InputError, match="'raw' was not tuned"):
        evaluation.compare(model, {"raw": fitting.fit(model, OPEN, "diffmean")}, suite)


def test_a_scorer_that_is_not_there_is_an_error_before_any_work(model, suite, monkeypatch):
    monkeypatch.setattr(evaluation, "_Run", None)
    with pytest.raises(UnknownName, match="metric 'alignmant'"):
        evaluation.evaluate(model, [Arm("a")], replace(suite, control="alignmant"))

    def missing():
        raise MissingPackage("vaderSentiment", "the sentiment scorer", "demo")

    monkeypatch.setattr(negative_sentiment, "_vader", missing)
    with pytest.raises(MissingPackage, match="pip install"):
        evaluation.evaluate(model, [Arm("a")], replace(suite, control="negative_sentiment"))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_random_arm_moves_activations_as_far_as_the_last_steering(model, ours, suite, seed):
    stronger = tuned(ours, strength=5.0)
    arms = evaluation.standard_arms(model, {"a": ours, "b": stronger}, suite, seed=seed)
    moved = {}
    meter = HF(model).meter(HF(model).reference(suite.neutral[:8], None), divergence=False)
    for arm in arms[2:]:
        moved[arm.name] = []
        meter(arm.edits, displacement=moved[arm.name])
    assert np.mean(moved[RANDOM]) == pytest.approx(np.mean(moved["b"]), rel=1e-4)
    assert np.mean(moved[RANDOM]) > 1.5 * np.mean(moved["a"])
    assert arms[2].strength > 0 and arms[2].edit.where == ours.where


def test_the_random_arm_of_a_gated_steering_moves_the_behaviours_own_prompts(model, ours, suite):
    """A gate may leave every neutral prompt alone; a random arm of strength 0 would say nothing."""
    contexts = []
    for prompt in suite.prompts:
        ids = torch.tensor([model.encode(prompt.conversation).ids])
        with seen(model, Site(1)) as held:
            model.model(ids)
        contexts.append(held[0][0, max(1, ids.shape[1] - 65) : -1].mean(0))
    known = torch.stack(contexts)

    class OnOwn(Shift):
        contextual = True

        def displacement(self, h, coef, context=None):
            on = (context - known[:, None]).norm(dim=-1).amin(0) < 1e-3
            return on[:, None] * super().displacement(h, coef)

    gated = OnOwn(tiny.WIDTH)
    gated.shifts.copy_(ours.interventions[Site(1)].shifts)
    steering = replace(ours, interventions=Interventions({Site(1): gated}))
    arms = evaluation.standard_arms(model, {"a": steering}, suite)
    plain = evaluation.standard_arms(model, {"a": ours}, suite)
    assert arms[2].strength == pytest.approx(plain[2].strength, rel=1e-3) != 0


def test_the_random_direction_is_drawn_by_the_seed(model, ours, suite):
    def drawn(seed):
        arm = evaluation.standard_arms(model, {"a": ours}, suite, seed=seed)[2]
        return arm.edit.interventions[Site(1)].shifts

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


def test_without_an_instruction_there_is_no_prompt_only_arm(model, ours, suite):
    bare = replace(suite, instruction="")
    assert [a.name for a in evaluation.standard_arms(model, {"a": ours}, bare)] == [
        UNSTEERED,
        RANDOM,
        "a",
    ]


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["neutral_cost", "neutral_p99", "in_format_cost", "edited_share"])
def test_the_plain_model_costs_exactly_nothing(report, name):
    figure = report.figure(UNSTEERED, name)
    assert (figure.value, figure.low, figure.high) == (0, 0, 0)


def test_the_plain_model_agrees_with_itself_and_prefers_nothing(report):
    assert report.figure(UNSTEERED, "preference").value == 0.5
    agreement = report.figure(UNSTEERED, "agreement")
    assert agreement is None or agreement.value == 1.0


def test_every_steered_arm_has_a_cost(report):
    for arm in (RANDOM, "one", "two"):
        assert report.figure(arm, "neutral_cost").value > 0
        assert report.figure(arm, "edited_share").value == 1.0
    assert report.figure("one", "in_format_cost").value > 0


def test_an_instruction_costs_on_the_very_same_continuations(report):
    assert report.figure(PROMPT_ONLY, "neutral_cost").value > 0
    assert report.figure(PROMPT_ONLY, "edited_share").value == 0
    neutral = [c for c in report.completions if c.kind == "neutral"]
    plain, prompted = ([c for c in neutral if c.arm == arm] for arm in (UNSTEERED, PROMPT_ONLY))
    for one, other in zip(plain, prompted, strict=True):
        assert (one.item, one.tokens) == (other.item, other.tokens)
        assert one.values["base_log_prob"] == other.values["base_log_prob"]
        assert one.values["log_prob"] != other.values["log_prob"]


def test_answers_are_read_by_the_unsteered_model_without_the_instruction(report, model, suite):
    asked = {prompt.item: prompt for prompt in suite.prompts}
    for one in report.completions:
        if one.kind == "sample" and one.text:
            prompt = replace(asked[one.item], answers=(one.text,))
            ((expected,),) = HF(model).score([prompt])
            assert one.values["base_log_prob"] == pytest.approx(expected, abs=1e-3)
    assert "Be kind." in next(c.prompt for c in report.completions if c.arm == PROMPT_ONLY)


def test_differences_are_paired_with_the_plain_model(report):
    for name in ("perplexity", "preference", "bits_per_byte", "refusal", "over_refusal"):
        metric = metrics.get(name)
        ours, plain = (
            [c for c in report.completions if c.arm == arm and c.kind == metric.kind]
            for arm in ("one", UNSTEERED)
        )
        gap, found = metric.difference(ours, plain), report.figure("one", name, UNSTEERED)
        assert (found.value, found.low, found.high, found.n) == gap[:4]
        assert found.n == len({c.item for c in plain})
        assert report.figure(UNSTEERED, name, UNSTEERED) is None
    assert report.figure("one", "neutral_cost", UNSTEERED) is None


def test_figures_of_the_formality_scorer_are_left_to_behaviours_that_name_it(report, model, suite):
    assert report.figure("one", "formality") is None
    found = evaluation.evaluate(
        model, [Arm("a")], replace(suite, control="formality"), sizes=replace(SIZES, long=())
    )
    assert found.figure("a", "formality") and not found.figure("a", "sentiment")


def test_control_ranges_stand_where_both_ways_were_measured(report, model, ours, suite):
    found = [f for f in report.figures if f.metric.startswith("control_range")]
    assert {(f.arm, f.metric) for f in found} == {
        ("one", f"control_range@{nats}nat") for nats in ("0.01", "0.03", "0.5")
    }
    figure = report.figure("one", "control_range@0.5nat")
    assert figure.strength == pytest.approx(3.0)
    meter = tuning.control_meter(HF(model), suite.items, [Site(1)])
    preference = metrics.get("preference")
    ends = [
        preference.score(tuning.control(meter([ours.edit(s)]), suite.items)).value for s in (3, -3)
    ]
    assert figure.value == pytest.approx(ends[0] - ends[1], abs=1e-5)


def test_a_cost_beyond_the_curve_has_no_control_range(model, ours, suite):
    cheap = tuned(ours, budget=0.02)
    run = evaluation._Run(HF(model), suite, SIZES, 0, lambda *_: None)
    assert [f.metric for f in run.ranges({"one": cheap})] == [
        "control_range@0.01nat",
        "control_range@0.02nat",
    ]


# --- notes, cards, trails, files -----------------------------------------------------------------


def test_a_cell_over_its_budget_is_noted(model, ours, suite, report):
    assert not any(note.startswith("one costs") for note in report.notes)
    poor = tuned(ours, budget=1e-4)
    found = evaluation._notes([Arm(UNSTEERED)], {"one": poor}, suite, report.figures, False)
    assert any("one costs" in n and "over 10 % above the budget of 0.0001" in n for n in found)
    assert any("prompt-only arm is missing" in n for n in found)


def test_small_sizes_or_an_unchecked_strength_make_a_preview(report, model, suite):
    assert report.preview and any(note.startswith("A preview") for note in report.notes)
    assert Sizes().preview is False and evaluation.PREVIEW.preview is True
    bare = replace(suite, prompts=(), items=None, plain=(), in_format=())
    whole = replace(bare, neutral=suites.neutral("test"), neutral_tokens=24)
    full = evaluation.evaluate(model, [Arm("a")], whole)
    assert not full.preview and not any("preview" in note.lower() for note in full.notes)
    assert evaluation.evaluate(model, [Arm("a")], whole, sizes=SIZES).preview
    # Full sizes of a suite that holds too little are a preview all the same.
    assert evaluation.evaluate(model, [Arm("a")], bare).preview


def test_a_card_holds_the_arms_own_figures_and_the_plain_models(report):
    (card,) = evaluation.card(report, "one").values()
    assert {f["arm"] for f in card["figures"]} == {"one", UNSTEERED}
    assert all(not f["against"] for f in card["figures"])
    assert card["model"] == "tiny-llama" and card["preview"]
    json.dumps(card, allow_nan=False)


def test_trails_show_every_token_of_an_answer(report):
    assert {trail.arm for trail in report.trails} == {RANDOM, "one", "two"}
    for trail in report.trails:
        assert len(trail.tokens) == len(trail.displacement) > 0
        # The last token of an answer is edited like the ones before it.
        assert all(moved > 0 for moved in trail.displacement)


@pytest.mark.parametrize(
    ("where", "steered"),
    [("all", True), ("generated", True), ("assistant", True), ("prompt", False), ("range:0:2", 0)],
)
def test_a_trail_shows_what_happened_to_the_answers_own_tokens(model, ours, suite, where, steered):
    run = evaluation._Run(HF(model), suite, SIZES, 0, lambda *_: None)
    edit = replace(ours.edit(), where=Where.parse(where))
    arm, backend = Arm("one", edit, 3.0), HF(model)
    made = backend.generate(suite.prompts[:1], [edit], Sampling(5))[0]
    prompt = replace(suite.prompts[0], answers=(made.text,))
    trail = run._trail(arm, prompt, made)
    assert len(trail.displacement) == len(trail.tokens)
    assert [moved > 0 for moved in trail.displacement] == [bool(steered)] * len(trail.tokens)
    # A constant shift over a smaller norm moves further: compare with the activations themselves.
    if steered:
        states = model.model(
            torch.tensor(backend.forced([prompt]).ids), output_hidden_states=True
        ).hidden_states[2][0]
        shift = 3.0 * ours.interventions[Site(1)].shifts.norm()
        expected = (shift / states.norm(dim=-1))[-len(trail.tokens) :]
        assert trail.displacement == pytest.approx(expected.tolist(), rel=1e-3)


def test_a_map_across_sites_is_measured_and_not_drawn(model, suite):
    steering = tuned(fitting.fit(model, OPEN, "pid"), strength=0.5)
    found = evaluation.compare(model, {"held": steering}, suite, sizes=SIZES)
    assert found.figure("held", "neutral_cost").value > 1e-4
    assert found.clouds == () and found.trails
    assert any(note.startswith("No scatter of held") for note in found.notes)


def test_clouds_hold_the_sides_before_and_after(report):
    assert {cloud.title for cloud in report.clouds} == {
        "one: residual stream at 1.residual",
        "two: residual stream at 2.residual",
    }
    for cloud in report.clouds:
        # The page's own names: another one would have no colour.
        assert set(cloud.groups) == set(pages.GROUPS)
        assert {len(points) for points in cloud.groups.values()} == {3}
        source, steered = (np.array(cloud.groups[name]) for name in ("source", "steered"))
        # A constant shift moves every point alike.
        assert np.ptp(steered - source, axis=0) == pytest.approx(0, abs=1e-4)
        assert np.abs(steered - source).max() > 0.01


def test_a_report_is_saved_and_read_back(report, tmp_path):
    folder = report.save(tmp_path / "report")
    again = Report.load(folder)
    assert (again.arms, again.figures) == (report.arms, report.figures)
    assert len(again.completions) == len(report.completions)
    with pytest.raises(InputError, match="exists already"):
        report.save(folder)


def test_samples_are_drawn_by_the_seed(model, suite):
    warm = replace(suite, sampling=Sampling(8, 1.0), items=None, plain=(), in_format=())
    sizes = replace(SIZES, asides=0, long=(), neutral_prompts=1)

    def texts(seed):
        made = evaluation.evaluate(model, [Arm("a")], warm, sizes=sizes, seed=seed)
        return [c.text for c in made.completions if c.kind == "sample"]

    assert texts(0) == texts(0) != texts(1)


# --- choices -------------------------------------------------------------------------------------


def test_choices_are_measured_by_alignment_and_by_what_is_said(chosen):
    assert chosen.control == "alignment"
    for arm in chosen.arms:
        assert 0 <= chosen.figure(arm, "alignment").value <= 1
        assert 0 <= chosen.figure(arm, "answer_mass").value <= 1
        assert chosen.figure(arm, "said_alignment").n == 3
    assert chosen.figure("away", "alignment", UNSTEERED)
    assert chosen.clouds == ()


def test_sampled_answers_to_choices_carry_their_keys(chosen):
    keys = {item.id: item.key for item in CHOICE.test.items}
    sampled = [c for c in chosen.completions if c.kind == "sample"]
    assert {c.item for c in sampled} == set(keys)
    assert all(c.key == keys[c.item] for c in sampled)
    assert {c.strength for c in sampled if c.arm == "away"} == {-3.0}
