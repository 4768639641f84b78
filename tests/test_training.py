"""Training: the best state is kept, the seed decides, what shall not move is held down."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from innsteer.activations import Activations, Rows
from innsteer.backends.base import Prompt
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import FormatError, InputError
from innsteer.interventions import Shift
from innsteer.site import Site
from innsteer.steerer import Answers, Intervention, Interventions
from innsteer.training import (
    LOSSES,
    best_scale,
    lessons,
    odds,
    preference,
    said,
    target,
    teach,
    train_through,
)

SITE = Site(1)
WORDS = ("tea", "rain", "ice", "iron", "wool", "jazz", "rope", "dusk")


class Push(Intervention):
    """A constant vector that can be trained."""

    def __init__(self, width=tiny.WIDTH, k=1):
        super().__init__()
        self.width = width
        self.vector = nn.Parameter(torch.zeros(k, width))

    def displacement(self, h, coef):
        return coef @ self.vector.to(h.dtype)


def push(k=1):
    return Interventions({SITE: Push(k=k)})


def contrast(name="yes"):
    items = [
        Item(f"{n}", f"Is {w} good?", "N", "Y", "Y", w, "validation" if n > 5 else "train")
        for n, w in enumerate(WORDS)
    ]
    return Contrast(name, "choice", tuple(items))


@pytest.fixture(scope="module")
def run():
    hf = HF(tiny.tiny_language_model("llama"))
    still = [Prompt(word, f"Tell me about {word}.") for word in WORDS]
    return Through(hf, [contrast()], [SITE], [hf.reference(still, None)])


def held_out(run, maps, loss=said):
    with torch.no_grad():
        return float(loss(run, maps, run.items("validation")))


# --- losses --------------------------------------------------------------------------------------


class Told:
    """A runner that answers from a table: item -> log-probabilities at any strength."""

    behaviours, sites, unmoved = ("b",), (SITE,), ()

    def answers(self, interventions, items, coef, *, only=None):
        both = [(-1.0 * n - s, -2.0 * n + s) for n, s in zip(items, coef, strict=True)]
        return Answers(*torch.tensor(both).unbind(1))


def test_the_losses_are_their_formulas():
    # target = -n - s, source = -2n + s
    assert said(Told(), None, [1, 3]).item() == pytest.approx(
        0.5 * ((2 + 4) / 2 + (-(-2 - 1) + -(-6 - 1)) / 2)
    )
    assert target(Told(), None, [1, 3]).item() == pytest.approx((2 + 4) / 2)

    def soft(x):
        return math.log1p(math.exp(x))

    # margins n - 2s
    want = (soft(-(1 - 2)) + soft(-(3 - 2)) + soft(1 + 2) + soft(3 + 2)) / 4
    assert odds(Told(), None, [1, 3]).item() == pytest.approx(want)
    # raised by -2s over the plain margin n
    want = (soft(0.1 * 2) + soft(0.1 * 2)) / 2
    assert preference(0.1)(Told(), None, [1, 3]).item() == pytest.approx(want)
    assert LOSSES == {"said": said, "odds": odds, "target": target}


def test_a_preference_asks_the_plain_model_once_per_item_and_never_with_the_edit():
    class Asked(Told):
        plain = []

        def answers(self, interventions, items, coef, *, only=None):
            if interventions is None:
                assert not torch.is_grad_enabled() and not any(coef)
                self.plain += items
            return super().answers(interventions, items, coef, only=only)

    run, loss, maps = Asked(), preference(), push()
    for items in ([1, 2], [2, 3, 1], [3, 3]):
        loss(run, maps, items)
    assert run.plain == [1, 2, 3]


# --- through the model ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_training_lowers_the_validation_loss(run, loss):
    maps = push()
    before = held_out(run, maps, loss)
    course = train_through(run, maps, loss=loss, steps=30, every=10, learning_rate=0.05, unmoved=0)
    after = held_out(run, maps, loss)
    assert after < before - 0.2
    assert course.held_out[0] == pytest.approx(before, abs=1e-4)
    assert min(course.held_out) == pytest.approx(after, abs=1e-4)
    assert course.steps[course.held_out.index(min(course.held_out))] == course.kept > 0
    assert course.gradients == 30 * 6 and len(course.seconds) == len(course.steps)


@pytest.mark.parametrize("said_away", [True, False], ids=["away", "far"])
def test_a_training_that_only_does_harm_gives_the_start_back(run, said_away):
    maps = push()
    train_through(run, maps, steps=60, every=10, learning_rate=0.1)
    start = maps[SITE].vector.detach().clone()

    def away(run, maps, items):
        """Leads to the other answer, and is judged by the right one."""
        return -said(run, maps, items) if torch.is_grad_enabled() else said(run, maps, items)

    course = train_through(
        run,
        maps,
        loss=away if said_away else said,
        steps=6,
        every=1,
        learning_rate=0.1 if said_away else 1e4,
        patience=0,
    )
    assert min(course.held_out[1:]) > course.held_out[0] and course.kept == 0
    assert torch.equal(maps[SITE].vector, start)


def test_the_best_state_is_kept_not_the_last(run):
    """A loss that falls until the third validation and rises after it."""
    maps, seen = push(), []

    def loss(run, maps, items):
        value = maps[SITE].vector.sum() * 0
        if torch.is_grad_enabled():
            return maps[SITE].vector.sum()
        seen.append(maps[SITE].vector.detach().clone())
        return value + (3.0, 2.0, 1.0, 5.0, 4.0, 4.0)[len(seen) - 1]

    course = train_through(run, maps, loss=loss, steps=10, every=2, unmoved=0, patience=0)
    assert course.steps == [0, 2, 4, 6, 8, 10] and course.kept == 4
    assert torch.equal(maps[SITE].vector, seen[2]) and not torch.equal(seen[2], seen[-1])


@pytest.mark.parametrize(("patience", "steps"), [(1, [0, 2, 4]), (2, [0, 2, 4, 6]), (0, 6)])
def test_patience_ends_a_training_that_does_not_get_better(run, patience, steps):
    values = iter([2.0, 1.0, 5.0, 5.0, 5.0, 5.0])

    def loss(run, maps, items):
        live = torch.is_grad_enabled()
        return maps[SITE].vector.sum() if live else torch.tensor(next(values))

    course = train_through(run, push(), loss=loss, steps=10, every=2, unmoved=0, patience=patience)
    assert (course.steps if patience else len(course.steps)) == steps and course.kept == 2


def test_a_step_is_no_longer_than_the_clipped_gradient_lets_it_be(run, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        norms.append(float(self.param_groups[0]["params"][0].grad.norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train_through(run, push(), steps=3, unmoved=0, clip=1e6)
    free = max(norms)
    norms.clear()
    train_through(run, push(), steps=3, unmoved=0, clip=free / 10)
    assert max(norms) == pytest.approx(free / 10, rel=1e-4)


@pytest.mark.parametrize("where", ["loss", "gradient", "start"])
def test_what_is_not_finite_is_refused(run, where):
    maps = push()

    def loss(run, maps, items):
        vector = maps[SITE].vector
        value = vector.sum()
        if where == "gradient":
            # 0 * inf in the backward pass alone
            return value + (vector.abs().sum() * 0).sqrt()
        if where == "start" or torch.is_grad_enabled():
            return value * float("nan")
        return value

    with pytest.raises(InputError, match="a loss of nan"):
        train_through(run, maps, loss=loss, steps=4, every=2, unmoved=0)


def test_a_training_follows_from_its_seed_and_leaves_the_global_dice_alone(run):
    state, found = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        maps = push()
        train_through(run, maps, steps=8, batch=2, every=4, unmoved_batch=2, seed=seed)
        found.append(maps[SITE].vector.detach().clone())
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)
        state = torch.get_rng_state()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_shall_not_move_holds_the_divergence_down(run):
    places, moved = list(range(len(run.unmoved))), []
    for weight in (0.0, 1.0, 30.0):
        maps = push()
        train_through(run, maps, steps=40, every=10, learning_rate=0.05, unmoved=weight, patience=0)
        with torch.no_grad():
            nats = [run.divergence(maps, places, sign * torch.ones(1)).mean() for sign in (1, -1)]
        moved.append(float(sum(nats)) / 2)
    assert moved[0] > 0.3 and moved[2] < moved[1] < moved[0] and moved[2] < 0.3 * moved[0]


def test_every_validation_asks_the_same_of_what_shall_not_move():
    """Else a lucky draw of signs would look like a better state."""
    hf = HF(tiny.tiny_language_model("llama"))
    still = [Prompt(word, f"Tell me about {word}.") for word in WORDS]
    two = [contrast(), contrast("no")]
    run = Through(hf, two, [SITE], [hf.reference(still, None)])
    maps = push(k=2)
    with torch.no_grad():
        maps[SITE].vector[0] = 0.3
    course = train_through(run, maps, steps=6, every=1, learning_rate=0.0, patience=0)
    assert len(set(course.held_out)) == 1


def test_a_map_without_parameters_is_refused(run):
    with pytest.raises(InputError, match="without parameters"):
        train_through(run, Interventions({SITE: Shift(tiny.WIDTH)}))
    with pytest.raises(InputError, match="without parameters"):
        train_through(run, push().requires_grad_(False))


def test_without_validation_items_the_training_items_are_taken(run):
    items = tuple(replace(item, split="train") for item in contrast().items)
    hf = HF(tiny.tiny_language_model("llama"))
    whole = Through(hf, [replace(contrast(), items=items)], [SITE])
    maps = push()
    course = train_through(whole, maps, steps=10, every=5, learning_rate=0.05)
    with torch.no_grad():
        last = float(said(whole, maps, whole.items()))
    assert last == pytest.approx(min(course.held_out), abs=1e-4)
    assert last < course.held_out[0] - 0.1


# --- strength ------------------------------------------------------------------------------------


class Peaked(Told):
    """Answers are likeliest at a strength, the one for the target at +best, the other at -best."""

    def __init__(self, best, key="Yes"):
        self.best, self.key, self.asked = best, key, []

    def keys(self, items):
        return [self.key for _ in items]

    def items(self, split="train", behaviour=None):
        return {"train": [0, 1], "validation": [2, 3, 4]}[split]

    def answers(self, interventions, items, coef, *, only=None):
        self.asked += items
        strength = torch.tensor(coef)
        return Answers(-((strength - self.best) ** 2), -((strength + self.best) ** 2))


@pytest.mark.parametrize("best", [0.5, 2.0, 4.5])
def test_the_best_scale_is_the_grids_best_on_validation_items(best):
    run = Peaked(best + 0.1)
    scale, gain = best_scale(run, push())
    assert scale == best and gain == pytest.approx(math.exp(-0.01))
    assert set(run.asked) == {2, 3, 4}
    assert best_scale(run, push(), (1.0, 3.0))[0] == (1.0 if best < 2 else 3.0)


def test_the_gain_on_open_answers_is_a_log_probability():
    assert best_scale(Peaked(2.0, key=""), push()) == (2.0, 0.0)


def test_the_best_scale_of_a_map_is_the_one_with_the_most_right_answers(run):
    maps = push()
    train_through(run, maps, steps=20, every=10, learning_rate=0.05, unmoved=0)
    grid, gains, held = (0.1, 1.0, 3.0, 20.0), {}, run.items("validation")
    for scale in grid:
        own = push()
        own[SITE].vector.data = scale * maps[SITE].vector.data
        with torch.no_grad():
            towards = run.answers(own, held, [1.0] * len(held)).target
            away = run.answers(own, held, [-1.0] * len(held)).source
        right = torch.cat([towards, away])
        gains[scale] = float((right if "" in run.keys(held) else right.exp()).mean())
    found, gain = best_scale(run, maps, grid)
    assert found == max(gains, key=gains.get) and gain == pytest.approx(gains[found], rel=1e-4)


# --- on rows -------------------------------------------------------------------------------------


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def joined(*parts):
    """One recording of several."""
    values = torch.cat([part.values[part.site] for part in parts])
    records = [record for part in parts for record in part.rows.records()]
    names = tuple(dict.fromkeys(name for part in parts for name in part.behaviours))
    return Activations({parts[0].site: values}, Rows.of(records), names)


def still(rows, behaviour=""):
    records = [
        {"behaviour": behaviour, "item": f"u{i}", "side": "unmoved"} for i in range(len(rows))
    ]
    return Activations({Site(0): rows}, Rows.of(records), ("warm",))


def test_lessons_go_there_and_back_and_stay():
    source, gap, calm = draw(3, 2), torch.tensor([4.0, 1.0]), draw(2, 2, 1)
    warm = Activations.of_sides(source, source + gap, behaviour="warm")
    brief = Activations.of_sides(source, source - gap, behaviour="brief")
    warm.rows.weight[:] = [1.0, 2.0, 3.0] * 2
    given = lessons(joined(warm, brief, still(calm)), Site(0))
    own = [source, source + gap, calm, source, source - gap, calm]
    torch.testing.assert_close(given.start, torch.cat(own))
    there = [source + gap, source, calm, source - gap, source, calm]
    torch.testing.assert_close(given.end, torch.cat(there))
    assert given.coef.tolist() == [
        *[[1.0, 0.0]] * 3, *[[-1.0, 0.0]] * 3, [1.0, 0.0], [-1.0, 0.0],
        *[[0.0, 1.0]] * 3, *[[0.0, -1.0]] * 3, [0.0, 1.0], [0.0, -1.0],
    ]  # fmt: skip
    plain = torch.tensor([1.0, 2, 3, 1, 2, 3, 1, 1, *[1.0] * 8])
    torch.testing.assert_close(given.weight, plain / plain.mean())
    # There and back are held out together, or a held-out row would be known from its way back.
    assert given.pair.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9]


def test_lessons_may_have_other_ends_than_the_rows():
    source = draw(3, 2)
    given = lessons(
        Activations.of_sides(source, source + 4),
        Site(0),
        lambda middle, one: (middle - one.sum(), middle + one.sum()),
    )
    torch.testing.assert_close(given.start, torch.cat([source + 1, source + 3]))
    torch.testing.assert_close(given.end, torch.cat([source + 3, source + 1]))


def test_lessons_are_of_the_training_part_and_of_pairs():
    source = draw(4, 2)
    acts = Activations.of_sides(source, source + 1)
    acts.rows.split[[3, 7]] = "validation"
    assert len(lessons(acts, Site(0)).start) == 6
    with pytest.raises(InputError, match="no pairs"):
        lessons(Activations.of_sides(source, source, paired=False), Site(0))


def test_a_taught_map_does_what_the_lessons_say():
    source, gap = draw(40, 3), torch.tensor([2.0, 0.0, -1.0])
    given = lessons(Activations.of_sides(source, source + gap), Site(0))
    part = Push(3)
    teach(part, given, epochs=150, learning_rate=0.05)
    torch.testing.assert_close(part.vector[0], gap, rtol=0, atol=0.05)


def test_heavy_lessons_count_more():
    source = draw(40, 1)
    acts = Activations.of_sides(source, source + torch.tensor([1.0, 3.0] * 20)[:, None])
    acts.rows.weight[:] = [9.0, 1.0] * 40
    part = Push(1)
    teach(part, lessons(acts, Site(0)), epochs=150, learning_rate=0.05)
    assert part.vector.item() == pytest.approx(1.2, abs=0.15)  # 0.9 * 1 + 0.1 * 3


def test_what_stays_pulls_the_map_back():
    source, gap = draw(40, 2), torch.tensor([2.0, 0.0])
    acts = Activations.of_sides(source, source + gap, behaviour="warm")
    part = Push(2)
    teach(part, lessons(joined(acts, still(draw(80, 2))), Site(0)), epochs=150, learning_rate=0.05)
    # as many rows that stay as rows that go, there or back
    assert part.vector[0, 0].item() == pytest.approx(1, abs=0.25)


def test_teaching_follows_from_its_seed_and_leaves_the_global_dice_alone():
    source = draw(40, 2)
    given = lessons(Activations.of_sides(source, source + draw(40, 2, 1)), Site(0))
    found, state = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        part = Push(2)
        teach(part, given, epochs=5, batch=8, seed=seed)
        found.append(part.vector.detach().clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_teaching_keeps_the_state_that_is_best_on_held_out_rows():
    source, seen = draw(40, 2), []
    given = lessons(Activations.of_sides(source, source + 1), Site(0))

    class Watched(Push):
        def displacement(self, h, coef):
            moved = super().displacement(h, coef)
            if not torch.is_grad_enabled():  # a validation
                left = (moved - coef).square().sum().item()
                seen.append((left, self.vector.detach().clone()))
            return moved

    part = Watched(2)
    part.vector.data.fill_(1.0)
    part.vector.data[0, 0] += 1e-3  # nearly right: long steps do harm
    teach(part, given, epochs=40, learning_rate=1.0, patience=3)
    best = min(range(len(seen)), key=lambda n: seen[n][0])
    assert best < len(seen) - 1 == best + 3
    assert torch.equal(part.vector, seen[best][1])


def test_teaching_refuses_a_loss_that_is_not_finite_and_a_map_without_parameters():
    source = draw(8, 2)
    given = lessons(Activations.of_sides(source, source + 1), Site(0))
    part = Push(2)
    part.vector.data.fill_(float("nan"))
    with pytest.raises(InputError, match="nan"):
        teach(part, given)
    with pytest.raises(InputError, match="without parameters"):
        teach(Shift(2), given)


# --- long trainings ------------------------------------------------------------------------------


class Stopped(Exception):
    """What ends a training from outside."""


def trained(run, **how):
    maps = push()
    settings = {"steps": 12, "batch": 4, "every": 4, "patience": 0, "unmoved": 0.5}
    course = train_through(run, maps, **settings | how)
    return maps[SITE].vector.detach().clone(), course


def test_parts_of_a_batch_add_up_to_the_batch(run):
    whole, _ = trained(run, unmoved=0.0)
    parts, course = trained(run, unmoved=0.0, accumulate=3)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)
    assert course.gradients == 48


def test_a_rate_rises_before_it_falls(run):
    """After one step AdamW has moved every coordinate by the rate alone."""
    first = trained(run, steps=8, every=1, warmup=4, unmoved=0.0, learning_rate=0.1)[1]
    assert first.steps == list(range(9))
    moved = {}
    for warmup in (0, 4):
        maps = push()
        states = []
        train_through(
            run,
            maps,
            steps=8,
            batch=4,
            every=1,
            patience=0,
            unmoved=0.0,
            learning_rate=0.1,
            warmup=warmup,
            watch=lambda _: states.append(maps[SITE].vector.detach().clone()),
        )
        moved[warmup] = [
            float((b - a).abs().max()) for a, b in zip(states, states[1:], strict=False)
        ]
    assert moved[0][0] == pytest.approx(0.1, rel=1e-3)
    assert moved[4][0] == pytest.approx(0.025, rel=1e-3)
    assert max(moved[4]) > 2 * moved[4][0] and moved[4][-1] < 0.5 * max(moved[4])


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("end", [4, 6, 12])
def test_an_interrupted_training_goes_on_to_the_same_numbers(run, tmp_path, end, warmup):
    want, course = trained(run, warmup=warmup)
    path = tmp_path / "deep" / "training.safetensors"

    def stop(stage, done, total):
        if done == end:
            raise Stopped

    with pytest.raises(Stopped):
        trained(run, warmup=warmup, checkpoint=path, progress=stop)
    told = []
    found, again = trained(
        run, warmup=warmup, checkpoint=path, progress=lambda _, done, __: told.append(done)
    )
    assert told[0] == (end - 1) // 4 * 4
    assert torch.equal(found, want)
    assert (again.steps, again.held_out, again.kept) == (course.steps, course.held_out, course.kept)
    done, _ = trained(run, warmup=warmup, checkpoint=path)  # it was at its end
    assert torch.equal(done, want)


def test_a_checkpoint_of_another_training_is_refused(run, tmp_path):
    path = tmp_path / "training.safetensors"
    trained(run, checkpoint=path, steps=4)
    for other in (
        {"steps": 5},
        {"steps": 4, "seed": 1},
        {"steps": 4, "accumulate": 2},
        {"steps": 4, "about": "x"},
    ):
        with pytest.raises(InputError, match="another training"):
            trained(run, checkpoint=path, **other)
    path.write_bytes(b"torn")
    with pytest.raises(FormatError, match="no checkpoint"):
        trained(run, checkpoint=path, steps=4)
