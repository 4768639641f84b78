"""SSV: the vector that says the target answers, trained through a model, and on rows alone."""

import math

import pytest
import torch

import tiny
from innsteer.activations import Activations
from innsteer.backends.base import Prompt
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError
from innsteer.interventions import Shift
from innsteer.site import Site
from innsteer.steerer import side_means
from innsteer.steerers.ssv import SSV, learners
from innsteer.training import target

WORDS = ("tea", "rain", "ice", "iron", "wool", "jazz", "rope", "dusk")


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_on_rows_it_is_the_difference_of_means():
    spread = torch.tensor([9.0, 1.0, 0.1, 1.0])
    source = draw(80, 4) * spread
    acts = Activations.of_sides(source, source + draw(80, 4, 1) / 4 + torch.tensor([5.0, -2, 0, 0]))
    part = SSV().fit(acts)[acts.site]
    low, high = side_means(acts, acts.site, "behaviour")
    torch.testing.assert_close(part.shifts[0], (high - low).float(), rtol=0, atol=0.1)


def test_a_step_is_in_units_of_the_rows():
    """Rows ten times as long get a vector ten times as long, by the same course."""
    source = draw(40, 4)
    target = source + torch.tensor([1.0, 0.0, -0.5, 0.0])
    one, ten = (
        SSV(epochs=5).fit(Activations.of_sides(c * source, c * target))[Site(0)].shifts
        for c in (1.0, 10.0)
    )
    assert one.norm() > 0.1
    torch.testing.assert_close(ten, 10 * one, rtol=1e-3, atol=1e-4)


def test_a_training_starts_at_no_edit_in_every_unit():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 4.0], [1.0, 0.0], [-1.0, 4.0]])
    part = learners(Activations.of_sides(rows[:2], rows[2:]))[Site(0)]
    assert part.unit.item() == pytest.approx(math.sqrt((1 + 4) / 2))
    h = draw(3, 2)
    assert torch.equal(part(h, torch.ones(3, 1)), h)
    part.shifts.data = torch.tensor([[1.0, 0.0]])
    moved = part(h, torch.full((3, 1), -2.0)) - h
    torch.testing.assert_close(moved, torch.tensor([-2 * math.sqrt(2.5), 0.0]).expand(3, 2))


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"batch": 0}, {"epochs": 0}, {"patience": -1}]
    + [{"learning_rate": -1.0}, {"weight_decay": math.nan}, {"unmoved": math.inf}],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        SSV(**fields)


def test_unpaired_rows_are_refused():
    with pytest.raises(InputError, match="no pairs"):
        SSV().fit(Activations.of_sides(draw(9, 2), draw(9, 2, 1), paired=False))


def through(kind, sites=(Site(1), Site(2))):
    """Questions answered by Y for the behaviour and N against it, or in words."""
    answers = {"choice": ("N", "Y", "Y"), "open": ("no, not at all", "yes, it is", None)}[kind]
    items = [Item(f"{n}", f"Is {w} good?", *answers, w) for n, w in enumerate(WORDS)]
    hf = HF(tiny.tiny_language_model("llama"))
    still = hf.reference([Prompt(w, f"Tell me about {w}.") for w in WORDS], None)
    return Through(hf, [Contrast("b", kind, tuple(items))], list(sites), [still])


@pytest.fixture(scope="module")
def run():
    return through("choice")


@pytest.mark.parametrize("kind", ["choice", "open"])
def test_trained_through_a_model_it_says_the_target_answers(kind):
    run = through(kind)
    maps = SSV(steps=30, learning_rate=0.1).fit_through(run)
    assert maps.sites == run.sites
    for _, part in maps.items():
        assert type(part) is Shift and part.shifts.norm() > 0
    items = run.items()
    plain, up = (run.answers(maps, items, [s] * len(items)).target for s in (0.0, 1.0))
    assert (up - plain).mean() > 1


def test_the_map_is_the_one_that_was_trained(run, monkeypatch):
    """What is put into activation units at the end has the loss that the training saw."""
    seen = []

    def watched(*args):
        seen.append(target(*args))
        return seen[-1]

    monkeypatch.setattr("innsteer.steerers.ssv.target", watched)
    maps = SSV(steps=15, learning_rate=0.1, patience=0).fit_through(run)
    held_out = [float(value) for value in seen if not value.requires_grad]
    assert len(held_out) == 2
    own = float(target(run, maps, run.items()))
    assert own == pytest.approx(min(held_out), abs=1e-4) and own < held_out[0] - 1


def test_the_weight_of_what_shall_not_move_holds_it(run):
    places, moved = list(range(len(run.unmoved))), []
    for weight in (0.0, 20.0):
        method = SSV(unmoved=weight, steps=30, learning_rate=0.1, patience=0)
        maps = method.fit_through(run)
        moved.append(float(run.divergence(maps, places, torch.ones(1)).mean()))
    assert moved[1] < 0.5 * moved[0]


def test_a_training_follows_from_its_seed(run):
    method, state = SSV(steps=3, batch=3), torch.get_rng_state()
    one, two, other = (method.fit_through(run, seed=seed)[Site(1)].shifts for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
