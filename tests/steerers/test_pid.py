"""PID: recursions in closed form on toy blocks, loops by hand in a model, and refusals."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

import tiny
import words
from edits import seen
from innsteer import exchange, fitting, tuning
from innsteer.activations import Activations, Rows
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.errors import InputError, UnknownName
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.site import Site
from innsteer.steerer import Interventions
from innsteer.steerers.pid import PID, Controller
from innsteer.steering import Steering


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def recording(layers, d: int = 5, k: int = 1) -> Activations:
    """Sides about different means at each block, some rows of each for validation and test."""
    values, records = {}, []
    for layer in layers:
        parts = []
        for behaviour in range(k):
            for side in range(2):
                mean = draw(1, d, seed=100 * layer + 10 * behaviour + side) * 3
                parts.append(mean + draw(8, d, seed=1000 + 100 * layer + 10 * behaviour + side))
        values[Site(layer)] = torch.cat(parts)
    for behaviour in range(k):
        for side in ("source", "target"):
            for i in range(8):
                split = "train" if i < 6 else ("validation", "test")[i % 2]
                row = {"behaviour": f"b{behaviour}", "item": f"{side}{i}", "side": side}
                records.append(row | {"split": split})
    return Activations(values, Rows.of(records), tuple(f"b{n}" for n in range(k)))


def one(level: float, gains, *, resets: bool = False) -> Controller:
    """A controller of one coordinate that is held at a level."""
    part = Controller(1, 1, gains, resets=resets)
    part.directions[0], part.levels[0] = 1.0, level
    return part.double()


def rollout(parts, blocks, x: Tensor, strength: float = 1.0) -> list[Tensor]:
    """Inputs of toy blocks ``[n, d]`` under controllers, and the last one's output."""
    coef, carry, seen = torch.full((len(x), 1), strength, dtype=x.dtype), parts[0].start(x), [x]
    for part, block in zip(parts, blocks, strict=True):
        carry = part.enter(x, coef, carry)
        x, carry = part.leave(block(x), coef, carry)
        seen.append(x)
    return seen


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_p_alone_on_a_scalar_chain_goes_to_its_fixed_point_in_powers(strength):
    """x' = a x + p (b - x): x* = p b / (1 - a + p), and what is left shrinks by a - p."""
    a, b, steps = 1.2, 3.0, 9
    p = strength * 0.5
    parts = [one(b, (0.5, 0, 0)) for _ in range(steps)]
    seen = rollout(parts, [lambda x: a * x] * steps, torch.tensor([[7.0]]).double(), strength)
    fixed = p * b / (1 - a + p)
    for step, x in enumerate(seen):
        assert float(x) == pytest.approx(fixed + (a - p) ** step * (7 - fixed), abs=1e-9)


def test_all_three_gains_on_blocks_that_add_nothing():
    """e = 1, then 0.15, then -0.1275: worked out on paper from kp = 1/2, ki = 1/4, kd = 1/10."""
    parts = [one(1.0, (0.5, 0.25, 0.1)) for _ in range(3)]
    seen = rollout(parts, [lambda x: x] * 3, torch.zeros(1, 1).double())
    controls = [float(after - before) for before, after in zip(seen, seen[1:], strict=False)]
    assert controls == pytest.approx([0.85, 0.2775, 0.164125], abs=1e-12)


def test_the_sum_leaves_out_the_block_at_which_it_is_reset():
    """With ki alone and a held input (a plant of its own): I = 0, e, 2e, then 0 and e again."""
    parts = [one(2.0, (0, 1.0, 0), resets=n % 3 == 0) for n in range(5)]
    seen, x = [], torch.ones(1, 1).double()
    carry, coef = parts[0].start(x), torch.ones(1, 1)
    for part in parts:
        carry = part.enter(x, coef, carry)
        new, carry = part.leave(x, coef, carry)
        seen.append(float(new - x))
    assert seen == [0.0, 1.0, 2.0, 0.0, 1.0]


def test_the_first_difference_is_the_error_itself():
    part, x = one(2.0, (0, 0, 0.5)), torch.zeros(1, 1).double()
    coef = torch.ones(1, 1)
    first, carry = part.leave(x, coef, part.enter(x, coef, part.start(x)))
    second, _ = part.leave(x, coef, part.enter(x, coef, carry))
    assert float(first) == 1.0 and float(second) == 0.0


def test_directions_may_turn_from_block_to_block():
    """The sum and the difference are of vectors: another block's error keeps its direction."""
    parts = [Controller(2, 1, (0, 1.0, 0.5)) for _ in range(2)]
    for n, part in enumerate(parts):
        part.directions[0, n], part.levels[0] = 1.0, 2.0
    seen = rollout(parts, [torch.zeros_like] * 2, torch.zeros(1, 2))
    assert seen[1].tolist() == [[3.0, 0.0]]
    # e_1 = (0, 2), e_0 = (2, 0): u_1 = e_0 + e_1 + (e_1 - e_0) / 2
    assert seen[2].tolist() == [[1.0, 3.0]]


def test_a_negative_strength_holds_rows_on_the_other_side():
    part = Controller(1, 1, (1.0, 0, 0))
    part.directions[0], part.levels[0], part.origins[0] = 1.0, 2.0, 10.0
    x = torch.tensor([[4.0], [11.0], [30.0]])
    for strength, wanted in ((1.0, 12.0), (-1.0, 8.0)):
        assert (rollout([part], [lambda x: x], x, strength)[1] == wanted).all()
    half = rollout([part], [lambda x: x], x, -0.25)[1]
    torch.testing.assert_close(half, x + 0.25 * (8 - x), rtol=0, atol=1e-6)


def test_with_kp_1_a_row_at_the_source_mean_gets_the_difference_of_means():
    acts = recording(range(3))
    maps = PID(kp=1, ki=0, kd=0).fit(acts)
    train = acts.where(split="train")
    for layer in (1, 2):
        source, target = (rows.mean(0) for rows in train.sides(Site(layer - 1)))
        h, coef, part = source[None], torch.ones(1, 1), maps[Site(layer)]
        out = draw(1, 5, seed=layer)
        moved = part.leave(out, coef, part.enter(h, coef, part.start(h)))[0] - out
        torch.testing.assert_close(moved[0], target - source, rtol=1e-5, atol=1e-5)


# --- what is fitted ------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["source", "zero"])
def test_set_points_are_those_of_the_block_below(origin):
    acts = recording((1, 2, 5, 6, 8), k=2)
    method = PID(setpoint=2.5, origin=origin, reset=3)
    maps = method.fit(acts)
    assert list(maps) == [Site(2), Site(6)]
    assert [part.resets for _, part in maps.items()] == [False, True]
    train = acts.where(split="train")
    for site, part in maps.items():
        for row, behaviour in enumerate(acts.behaviours):
            sides = train.sides(Site(site.layer - 1), behaviour)
            source, target = (rows.double().mean(0) for rows in sides)
            gap = target - source
            centre = source if origin == "source" else torch.zeros(5)
            assert float(part.levels[row]) == pytest.approx(2.5 * float(gap.norm()), rel=1e-6)
            torch.testing.assert_close(part.directions[row].double(), gap / gap.norm())
            assert float(part.origins[row]) == pytest.approx(
                float(centre.double() @ gap / gap.norm()), abs=1e-6
            )
    figures = method.diagnose(acts, maps)
    gaps = [float(level) / 2.5 for _, part in maps.items() for level in part.levels]
    assert figures == pytest.approx({"gap_least": min(gaps), "gap_most": max(gaps)}, rel=1e-6)


def test_a_block_whose_sides_agree_is_left_alone():
    acts = recording(range(3))
    values = dict(acts.values)
    values[Site(0)] = values[Site(0)].clone()
    values[Site(0)][:] = 1.0
    flat = Activations(values, acts.rows, acts.behaviours)
    maps = PID().fit(flat)
    assert not maps[Site(1)].directions.any() and maps[Site(2)].directions.any()
    with pytest.raises(InputError, match="equal means of both sides of 'b0'.*all 1 blocks"):
        PID().fit(flat.at(Site(0), Site(1)))


@pytest.mark.parametrize(
    ("sites", "match"),
    [
        ((Site(3),), "no two of which are of neighbours.*--together"),
        ((Site(1), Site(3)), "no two of which"),
        ((Site(0), Site(1, "mlp")), r"1.mlp.*outputs of blocks; name the layer alone: 1"),
    ],
)
def test_sites_that_do_not_show_a_blocks_input_are_refused(sites, match):
    acts = recording([0])
    values = {site: acts.values[Site(0)] for site in sites}
    with pytest.raises(InputError, match=match):
        PID().fit(Activations(values, acts.rows, acts.behaviours))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"origin": "mean"}, UnknownName),
        ({"kp": -0.1}, InputError),
        ({"ki": float("nan")}, InputError),
        ({"kd": float("inf")}, InputError),
        ({"setpoint": 0.0}, InputError),
        ({"setpoint": -1.0}, InputError),
        ({"reset": -1}, InputError),
    ],
    ids=str,
)
def test_fields_that_cannot_be_are_refused(fields, error):
    with pytest.raises(error):
        PID(**fields)


# --- in a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(scope="module")
def steering(model):
    return fitting.fit(model, words.contrast(), "pid", kp=0.4, ki=0.2, kd=0.3, reset=2)


IDS = [10, 11, 12, 13, 14, 15]


def loop(model, maps: Interventions, gains, reset: int, state: dict, first: int):
    """The authors' rule as plain hooks on tokens from ``first`` on; ``state`` is its memory."""
    stack, seen = ExitStack(), {}
    for site, part in maps.items():
        block = model.layout.blocks[site.layer].module

        def before(_, args, layer=site.layer):
            seen[layer] = args[0][0, first:]

        def after(_, args, output, layer=site.layer, part=part):
            x, v, d = seen[layer], part.directions[0], output.shape[-1]
            error = (part.levels[0] - x @ v + part.origins[0])[:, None] * v
            total = state.get("sum", torch.zeros(d)) + error
            if reset and layer % reset == 0:
                total = total * 0
            previous = state.get("previous", torch.zeros(d))
            control = gains[0] * error + gains[1] * total + gains[2] * (error - previous)
            state.update(sum=total, previous=error)
            new = output.clone()
            new[0, first:] += control
            return new

        stack.callback(block.register_forward_pre_hook(before).remove)
        stack.callback(block.register_forward_hook(after).remove)
    return stack


@pytest.mark.parametrize("gains", [(0.6, 0, 0), (0.4, 0.2, 0.3)], ids=["P", "PID"])
@pytest.mark.parametrize("origin", ["source", "zero"])
def test_a_first_pass_is_the_authors_loop(model, gains, origin):
    kp, ki, kd = gains
    fitted = fitting.fit(
        model, words.contrast(), "pid", kp=kp, ki=ki, kd=kd, origin=origin, reset=2
    )
    ids = torch.tensor([IDS])
    with torch.no_grad():
        plain = model.model(ids).logits
        with loop(model, fitted.interventions, gains, 2, {}, first=3):
            want = model.model(ids).logits
        with fitted.on(model, 1.0, prompt_lengths=[4]):
            got = model.model(ids).logits
    assert (want - plain).abs().max() > 0.05
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_pass_starts_anew_where_the_authors_loop_goes_on(model, steering):
    """Token by token over a cache, and in one pass: one answer here, two with their loop."""
    gains, ids = (0.4, 0.2, 0.3), torch.tensor([IDS])

    def tokens() -> Tensor:
        cache, parts = None, []
        for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
            out = model.model(ids[:, part], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        return torch.cat(parts, 1)

    with torch.no_grad():
        with steering.on(model, 1.0, prompt_lengths=[4]):
            whole, stepwise = model.model(ids, use_cache=False).logits, tokens()
        torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-5)
        state: dict = {}
        with loop(model, steering.interventions, gains, 2, state, first=-1):
            theirs = tokens()
    torch.testing.assert_close(theirs[:, 3], whole[:, 3], rtol=1e-4, atol=1e-5)
    assert (theirs[:, 4:] - whole[:, 4:]).abs().max() > 1e-2


def test_it_is_tuned_saved_loaded_and_speaks(model, steering, tmp_path, monkeypatch):
    short = tuning.suites.neutral("validation")[:12]
    monkeypatch.setattr(tuning.suites, "neutral", lambda part: short)
    assert list(steering.interventions) == [Site(n) for n in range(1, tiny.LAYERS)]
    tuned = tuning.tune(model, steering, words.contrast(), preview=True, search_tokens=60)
    dose = tuned.curve.at_budget
    assert 0.9 * dose.nats < tuned.curve.budget and tuned.curve.strength > 0.01
    assert dose.control > 0.5 and dose.displacement > 0
    loaded = Steering.load(tuned.save(tmp_path / "pid"))
    assert loaded.identity == tuned.identity and loaded.steerer == steering.steerer
    prompts = [Prompt("a", "What is tea?"), Prompt("b", "What is rain?")]
    said = [HF(model).generate(prompts, [s.edit("budget")], Sampling(4)) for s in (tuned, loaded)]
    assert said[0] == said[1] and all(one.steered for one in said[0])


def test_as_a_vector_it_is_the_mean_of_what_it_adds(model):
    fitted = fitting.fit(model, words.contrast(), "pid", sites=[Site(1), Site(2)], ki=0, kd=0)
    ((site, vector),) = exchange.as_vector(model, fitted, words.contrast(), 0.5).items()
    part = fitted.interventions[Site(2)]
    assert site == Site(2)
    along = float(vector @ part.directions[0])
    torch.testing.assert_close(vector, along * part.directions[0], rtol=1e-3, atol=1e-4)
    sums, count = 0.0, 0
    for item in words.contrast().train.items:
        for text in (item.source, item.target):
            row = model.encode(item.prompt, answer=text)
            with seen(model, Site(1)) as held, torch.no_grad():
                model.model(torch.tensor([row.ids]))
            x = held[0][0, row.prompt - 1 :]
            errors = part.levels[0] + part.origins[0] - x @ part.directions[0]
            sums, count = sums + 0.5 * 0.7 * float(errors.sum()), count + len(x)
    assert along == pytest.approx(sums / count, rel=1e-3)


def test_two_behaviours_share_the_blocks(model):
    acts = recording(range(3), d=tiny.WIDTH, k=2)
    maps = PID(kp=0.5, ki=0.1, kd=0.1).fit(acts)
    ids = torch.tensor([IDS])

    def logits(*edits: Edit) -> Tensor:
        with torch.no_grad(), Attachment(model, edits, prompt_lengths=[4]):
            return model.model(ids).logits

    both = logits(Edit(maps, torch.tensor([0.3, -0.4])))
    first = logits(Edit(maps, torch.tensor([0.3, 0.0])))
    alone = PID(kp=0.5, ki=0.1, kd=0.1).fit(
        Activations(
            {site: rows[:16] for site, rows in acts.values.items()},
            Rows.of(acts.rows.records()[:16]),
            ("b0",),
        )
    )
    torch.testing.assert_close(first, logits(Edit(alone, torch.tensor([0.3]))), rtol=0, atol=1e-5)
    assert (both - first).abs().max() > 1e-2
