"""ReFT-r1: the authors' numbers, a latent per sequence, and what its training learns."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

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
from innsteer.steerers.reft_r1 import Detector, ReFTr1

WORDS = ("tea", "rain", "ice", "iron", "wool", "jazz", "rope", "dusk")


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def ones(h, strength=1.0):
    return torch.full((len(h), 1), strength, dtype=h.dtype)


@pytest.mark.parametrize("top", [1, 3, 7])
def test_the_trained_edit_is_the_published_one(shared, top):
    folder = shared / "goldens" / "reft"
    (case,) = json.loads((folder / "case.json").read_text(encoding="utf-8"))["cases"]
    given, near = load_file(folder / case["file"]), float(case["tolerance"]["*"])
    # The authors' direction is a unit vector; the file's is not, so latent and vector differ.
    length = given["v"].norm()
    part = Detector(given["v"].unsqueeze(0), top=top).requires_grad_(False)
    for n, h in enumerate(given["h"]):
        moved = length**2 * (part(h, ones(h)) - h)
        want = given[f"reftr1_k{top}"][n] - h
        torch.testing.assert_close(moved, want, rtol=0, atol=near)
        spare = given[f"nontopk_latent_k{top}"][n].sum()
        torch.testing.assert_close(length * part.spare, spare, rtol=0, atol=7 * near)


def test_with_every_token_among_the_top_it_is_the_mean_of_the_positive_latents():
    h = torch.tensor([[3.0, 1.0], [-5.0, 1.0], [1.0, 7.0], [2.0, 0.0]])
    part = Detector(torch.tensor([[2.0, 0.0]]), top=9).requires_grad_(False)
    moved = part(h, ones(h, -2.0)) - h
    torch.testing.assert_close(moved, torch.tensor([[-2 * 6 / 4, 0.0]]).expand(4, 2))
    assert part.spare == 0
    part.top = 1
    torch.testing.assert_close(part(h, ones(h)) - h, torch.tensor([[3.0, 0.0]]).expand(4, 2))
    assert part.spare == 3 and part.size.tolist() == [3]


def test_a_behaviour_without_strength_has_no_spare_latents():
    h = draw(6, 3).abs()
    part = Detector(torch.eye(3)[:2], top=2).requires_grad_(False)
    moved = part(h, torch.tensor([[0.0, 1.0]]).expand(6, 2)) - h
    top = h[:, 1].sort(descending=True).values
    torch.testing.assert_close(moved, (top[:2].mean() * torch.eye(3)[1]).expand(6, 3))
    torch.testing.assert_close(part.spare, top[2:].sum())


def test_no_gradient_makes_a_direction_longer():
    h, part = draw(9, 4), Detector(draw(1, 4, 1), top=3)
    part(h, ones(h)).square().sum().backward()
    grad, v = part.directions.grad[0], part.directions.detach()[0]
    assert grad.norm() > 0.1 and abs(grad @ v) < 1e-4


def test_on_rows_it_is_the_difference_of_means():
    source = draw(80, 4)
    acts = Activations.of_sides(source, source + torch.tensor([5.0, -2, 0, 0]))
    part = ReFTr1().fit(acts)[acts.site]
    low, high = side_means(acts, acts.site, "behaviour")
    torch.testing.assert_close(part.shifts[0], (high - low).float(), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "fields",
    [{"top": 0}, {"steps": 0}, {"batch": 0}, {"epochs": 0}, {"patience": -1}]
    + [{"learning_rate": -1.0}, {"l1": math.nan}],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        ReFTr1(**fields)


def through(kind, sites=(Site(2),), behaviours=("b",)):
    """Questions answered by Y for the behaviour and N against it, or in words."""
    answers = {"choice": ("N", "Y", "Y"), "open": ("no, not at all", "yes, it is", None)}[kind]
    items = [Item(f"{n}", f"Is {w} good?", *answers, w) for n, w in enumerate(WORDS)]
    hf = HF(tiny.tiny_language_model("llama"))
    still = hf.reference([Prompt(w, f"Tell me about {w}.") for w in WORDS], None)
    return Through(hf, [Contrast(b, kind, tuple(items)) for b in behaviours], sites, [still])


@pytest.fixture(scope="module")
def words():
    return through("open")


@pytest.mark.parametrize("kind", ["choice", "open"])
def test_trained_through_a_model_it_says_the_target_answers(kind):
    run = through(kind)
    maps = ReFTr1(steps=30, learning_rate=0.1, top=3).fit_through(run)
    assert maps.sites == run.sites and type(maps[Site(2)]) is Shift
    items = run.items()
    plain, up = (run.answers(maps, items, [s] * len(items)).target for s in (0.0, 1.0))
    assert (up - plain).mean() > 0.3


def test_the_top_latents_are_of_an_items_own_tokens(words):
    """What two items lose together is the mean of what each loses alone."""
    method = ReFTr1(top=2, l1=0.5)
    maps = method._start(words.rows(), 0).requires_grad_(False)
    losses = [float(method._loss(words, maps, items)) for items in ([0], [1], [0, 1])]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, abs=1e-4)


def test_its_start_lets_every_behaviour_learn():
    run = through("choice", behaviours=("a", "b", "c", "d"))
    for seed in range(5):
        part = ReFTr1()._start(run.rows(), seed)[Site(2)]
        mean = run.rows().values[Site(2)].mean(0)
        assert (part.directions @ mean >= 0).all()
        assert (part.directions @ part.directions.mT).fill_diagonal_(0).abs().max() < 0.9


def test_strength_one_is_as_long_as_what_training_added():
    run = through("open", (Site(1), Site(2)), ("a", "b"))
    method = ReFTr1(top=2)
    maps = method._start(run.rows(), 0).requires_grad_(False)
    fitted = method._settled(run, maps)
    for row, behaviour in enumerate(run.behaviours):
        sizes = []
        for item in run.items("train", behaviour):
            run.answers(maps, [item], [1.0], only=[0])
            sizes.append([float(part.size[row]) for _, part in maps.items()])
        means = torch.tensor(sizes).mean(0)
        assert means.min() > 0.01 and means[0] != means[1]
        for (site, part), size in zip(maps.items(), means, strict=True):
            shift = fitted[site].shifts[row]
            torch.testing.assert_close(shift, size * part.units()[row])


def test_l1_quiets_the_other_tokens(words):
    spare = []
    for l1 in (0.0, 20.0):
        method = ReFTr1(steps=30, learning_rate=0.05, top=1, l1=l1, patience=0)
        v = method.fit_through(words)[Site(2)].shifts
        part, left = Interventions({Site(2): Detector(v, top=1)}), 0.0
        for item in words.items():
            with torch.no_grad():
                words.answers(part, [item], [1.0], only=[0])
            left += float(part[Site(2)].spare)
        spare.append(left)
    assert spare[1] < 0.5 * spare[0]


def test_a_training_follows_from_its_seed(words, monkeypatch):
    method, state = ReFTr1(steps=2, batch=3), torch.get_rng_state()
    one, two, other = (method.fit_through(words, seed=seed)[Site(2)].shifts for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    # Not the start alone: the order of the items too.
    start = ReFTr1._start
    monkeypatch.setattr(ReFTr1, "_start", lambda self, acts, seed: start(self, acts, 0))
    one, other = (method.fit_through(words, seed=seed)[Site(2)].shifts for seed in (1, 2))
    assert not torch.equal(one, other)
