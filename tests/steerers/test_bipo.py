"""BiPO: what its loss is, and the vector that it trains, one way and the other."""

import math
from dataclasses import replace

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
from innsteer.steerer import Interventions, side_means
from innsteer.steerers.bipo import BiPO
from innsteer.training import preference

SITE = Site(1)
WORDS = ("tea", "rain", "ice", "iron", "wool", "jazz", "rope", "dusk")


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def contrast(kind, *, swapped=False):
    """Questions answered by Y for the behaviour and N against it, or in words."""
    source, target, key = {"choice": ("N", "Y", "Y"), "open": ("no, not at all", "yes", None)}[kind]
    if swapped:
        source, target, key = target, source, source if key else None
    items = [Item(f"{n}", f"Is {w} good?", source, target, key, w) for n, w in enumerate(WORDS)]
    return Contrast("b", kind, tuple(items))


def through(kind, **how):
    hf = HF(tiny.tiny_language_model("llama"))
    still = hf.reference([Prompt(w, f"Tell me about {w}.") for w in WORDS], None)
    return Through(hf, [contrast(kind, **how)], [SITE], [still])


@pytest.fixture(scope="module")
def run():
    return through("choice")


def shift(vector):
    """A map that can be trained."""
    maps = Interventions({SITE: Shift(len(vector))})
    part = maps[SITE]
    del part.shifts
    part.shifts = torch.nn.Parameter(vector.unsqueeze(0))
    return maps


@pytest.mark.parametrize("kind", ["choice", "open"])
def test_an_edit_that_does_nothing_loses_ln_2_per_pair_and_is_told_where_to_go(kind):
    run = through(kind)
    maps = shift(torch.zeros(tiny.WIDTH))
    loss = preference(0.1)(run, maps, run.items())
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    grad = maps[SITE].shifts.grad[0]
    assert grad.norm() > 1e-3
    ahead = preference(0.1)(run, shift(-grad / grad.norm()), run.items())
    assert ahead < math.log(2) - 1e-3


@pytest.mark.parametrize("kind", ["choice", "open"])
def test_the_loss_by_hand(kind):
    run, v = through(kind), draw(1, tiny.WIDTH)[0]
    items, beta, maps = run.items(), 0.3, shift(v)
    with torch.no_grad():
        plain = run.answers(None, items, [0.0] * len(items))
        total = 0.0
        for sign in (1.0, -1.0):
            edited = run.answers(maps, items, [sign] * len(items))
            raised = (edited.target - plain.target) - (edited.source - plain.source)
            total -= torch.sigmoid(sign * beta * raised).log().mean() / 2
        assert abs(total - math.log(2)) > 1e-3
        torch.testing.assert_close(preference(beta)(run, maps, items), total)


def test_the_other_answers_and_the_other_vector_lose_as_much():
    v, loss = draw(1, tiny.WIDTH)[0], []
    for swapped, vector in ((False, v), (True, -v), (True, v)):
        run = through("open", swapped=swapped)
        with torch.no_grad():
            loss.append(float(preference()(run, shift(vector), run.items())))
    assert loss[0] == pytest.approx(loss[1], abs=1e-6) and abs(loss[0] - loss[2]) > 1e-4


@pytest.mark.parametrize("kind", ["choice", "open"])
def test_trained_through_a_model_it_prefers_one_way_and_the_other(kind):
    run = through(kind)
    maps = BiPO(steps=30, learning_rate=0.1).fit_through(run)
    assert maps.sites == run.sites and type(maps[SITE]) is Shift
    items = run.items()
    plain, up, down, half = (
        torch.sub(*run.answers(maps, items, [s] * len(items))).mean() for s in (0.0, 1.0, -1.0, 0.1)
    )
    assert up - plain > 1 and plain - down > 1
    small = torch.sub(*run.answers(maps, items, [-0.1] * len(items))).mean()
    # Antisymmetric to first order.
    assert half - plain == pytest.approx(float(plain - small), rel=0.25)


def test_a_large_beta_is_content_sooner(run):
    lengths = [
        float(BiPO(beta=beta, steps=45, learning_rate=0.1).fit_through(run)[SITE].shifts.norm())
        for beta in (0.1, 100.0)
    ]
    assert lengths[1] < 0.7 * lengths[0]


def test_on_rows_it_is_the_difference_of_means():
    source = draw(80, 4)
    acts = Activations.of_sides(source, source + torch.tensor([5.0, -2, 0, 0]))
    part = BiPO().fit(acts)[acts.site]
    low, high = side_means(acts, acts.site, "behaviour")
    torch.testing.assert_close(part.shifts[0], (high - low).float(), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"batch": 0}, {"epochs": 0}, {"patience": -1}, {"beta": math.nan}]
    + [{"learning_rate": -1.0}, {"weight_decay": math.inf}, {"unmoved": -1.0}],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        BiPO(**fields)


def test_the_weight_of_what_shall_not_move_holds_it(run):
    places, moved = list(range(len(run.unmoved))), []
    for weight in (0.0, 5.0):
        method = replace(BiPO(steps=30, learning_rate=0.1, patience=0), unmoved=weight)
        maps = method.fit_through(run)
        moved.append(float(run.divergence(maps, places, torch.ones(1)).mean()))
    assert moved[1] < 0.5 * moved[0]


def test_a_training_follows_from_its_seed(run):
    method, state = BiPO(steps=3, batch=3), torch.get_rng_state()
    one, two, other = (method.fit_through(run, seed=seed)[SITE].shifts for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
