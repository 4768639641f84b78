"""LoReFT: the published edit's numbers, its start, and its training on rows and through a model."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import tiny
from innsteer.activations import Activations, Rows
from innsteer.backends.base import Prompt
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError, UnknownName
from innsteer.site import Site
from innsteer.steerers.loreft import LoReFT, LowRank
from innsteer.training import LOSSES

WORDS = ("tea", "rain", "ice", "iron", "wool", "jazz", "rope", "dusk")
both_forms = pytest.mark.parametrize("form", ["loreft", "tanh"])


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def ones(h, strength=1.0):
    return torch.full((len(h), 1), strength, dtype=h.dtype)


def published(rotation, weight, bias):
    """h + R'(W h + b - R h) as this project's map: on rows that are not standardised."""
    part = LowRank(rotation.shape[1], rank=len(rotation)).requires_grad_(False)
    part.write[0], part.read[0], part.bias[0] = rotation, weight - rotation, bias
    return part


def test_it_is_the_published_edit(shared):
    folder = shared / "goldens" / "reft"
    (case,) = json.loads((folder / "case.json").read_text(encoding="utf-8"))["cases"]
    given = load_file(folder / case["file"])
    part = published(given["R"].mT, given["W"], given["b"])
    h = given["h"].flatten(0, 1)
    got, want = part(h, ones(h)), given["loreft"].flatten(0, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=float(case["tolerance"]["*"]))


def test_the_published_edit_by_hand():
    rotation = torch.linalg.qr(draw(6, 2))[0].mT
    weight, bias, h = draw(2, 6, 1), draw(1, 2, 2)[0], draw(5, 6, 3)
    part = published(rotation, weight, bias)
    want = h + (h @ weight.mT + bias - h @ rotation.mT) @ rotation
    torch.testing.assert_close(part(h, ones(h)), want, rtol=0, atol=1e-5)
    # In the rows of R the edit sets what stands there; beside them nothing moves.
    torch.testing.assert_close(part(h, ones(h)) @ rotation.mT, h @ weight.mT + bias)
    beside = torch.eye(6) - rotation.mT @ rotation
    torch.testing.assert_close(part(h, ones(h)) @ beside, h @ beside)


def test_standardising_is_a_change_of_units_alone():
    part, h = published(draw(2, 4), draw(2, 4, 1), draw(1, 2, 2)[0]), 7 * draw(5, 4, 3) + 9
    other = LowRank(4, rank=2).requires_grad_(False)
    other.load_state_dict(part.state_dict())
    other.mean.copy_(torch.tensor([9.0, 1.0, 0.0, -5.0]))
    other.std.copy_(torch.tensor([7.0, 0.1, 1.0, 3.0]))
    z = (h - other.mean) / other.std
    torch.testing.assert_close(other(h, ones(h)) - h, part(z, ones(z)) - z)


def test_tanh_bounds_the_move():
    part = LowRank(4, rank=2, form="tanh").requires_grad_(False)
    part.write[0], part.read[0] = draw(2, 4), 100 * draw(2, 4, 1)
    h = 1e3 * draw(50, 4, 2)
    assert (part(h, ones(h)) - h).norm(dim=1).max() <= part.write[0].norm(dim=1).sum() * 1.01


def test_behaviours_have_ranks_of_their_own_and_add():
    part = LowRank(4, k=2, rank=2, form="tanh").requires_grad_(False)
    part.write.copy_(draw(4, 4).view(2, 2, 4))
    part.read.copy_(draw(4, 4, 1).view(2, 2, 4))
    h = draw(5, 4, 2)
    one, two = (part(h, row.expand(5, 2)) - h for row in torch.eye(2))
    got = part(h, torch.tensor([[0.5, -2.0]]).expand(5, 2))
    torch.testing.assert_close(got, h + 0.5 * one - 2 * two)


@both_forms
def test_it_starts_at_the_identity_on_standardised_rows(form):
    acts = Activations.of_sides(3 * draw(40, 5) + 7, 3 * draw(40, 5, 1) + 7)
    part = LoReFT(rank=2, form=form)._start(acts, 0)[Site(0)]
    h = draw(9, 5, 2)
    assert torch.equal(part(h, ones(h)), h)
    rows = torch.cat(acts.sides(Site(0)))
    torch.testing.assert_close(part.mean, rows.mean(0))
    assert all(p.requires_grad for p in part.parameters())
    # Something must be random where the gradient shall not be 0 from the start.
    random = part.write if form == "loreft" else part.read
    assert random.abs().min() > 0
    loss = part.displacement(h, ones(h)).sum()
    assert sum(float(g.norm()) for g in torch.autograd.grad(loss, list(part.parameters()))) > 0


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_rows_of_r_are_orthonormal_after_a_fit(rank):
    h = draw(40, 5)
    part = LoReFT(rank=rank, epochs=5).fit(Activations.of_sides(h, h + 1))[Site(0)]
    wide = min(rank, 5)
    product = part.write[0] @ part.write[0].mT
    torch.testing.assert_close(product, torch.eye(wide), rtol=0, atol=1e-5)
    assert torch.equal(part.rotation(), part.write)


@both_forms
def test_on_rows_it_learns_a_move_that_depends_on_the_row(form):
    """Rows with a positive first dimension go up, the others down."""
    h = draw(300, 4)
    gap = torch.zeros(300, 4)
    gap[:, 1] = 2 * h[:, 0].sign()
    acts = Activations.of_sides(h - gap / 2, h + gap / 2)
    part = LoReFT(rank=2, form=form, epochs=100).fit(acts)[Site(0)]
    fresh = draw(200, 4, 1)
    for strength in (1.0, -1.0):
        move = part(fresh, ones(fresh, strength)) - fresh
        right = move[:, 1].sign() == strength * fresh[:, 0].sign()
        assert right.double().mean() > 0.9
        assert move[:, [0, 2, 3]].abs().mean() < 0.3 * move[:, 1].abs().mean()


def test_rows_that_must_not_move_are_heeded_on_rows():
    h, calm = draw(80, 3), draw(80, 3, 1) + torch.tensor([3.0, 0.0, 0.0])
    pairs = Activations.of_sides(h, h + torch.tensor([0.0, 2.0, 0.0]))
    records = [{"behaviour": "", "item": f"u{n}", "side": "unmoved"} for n in range(len(calm))]
    both = Activations(
        {Site(0): torch.cat([pairs.values[Site(0)], calm])},
        Rows.of(pairs.rows.records() + records),
        pairs.behaviours,
    )
    moved = [
        float((part(calm, ones(calm)) - calm).norm(dim=1).mean())
        for part in (LoReFT(rank=3).fit(acts)[Site(0)] for acts in (pairs, both))
    ]
    assert moved[1] < 0.7 < 1.5 < moved[0], moved


@pytest.mark.parametrize(
    "fields",
    [{"rank": 0}, {"steps": 0}, {"batch": 0}, {"epochs": 0}, {"patience": -1}]
    + [{"learning_rate": -1.0}, {"weight_decay": math.nan}, {"unmoved": math.inf}],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        LoReFT(**fields)


@pytest.mark.parametrize("fields", [{"form": "reft"}, {"loss": "kl"}])
def test_an_unknown_form_or_loss_is_refused(fields):
    with pytest.raises(UnknownName, match=next(iter(fields))):
        LoReFT(**fields)


@pytest.fixture(scope="module")
def run():
    """Questions that Y and N match in turn, and prompts to leave alone."""
    items = [
        Item(f"{n}", f"Is {w} good?", *(("N", "Y", "Y") if n % 2 else ("Y", "N", "N")), w)
        for n, w in enumerate(WORDS)
    ]
    hf = HF(tiny.tiny_language_model("llama"))
    still = hf.reference([Prompt(w, f"Tell me about {w}.") for w in WORDS], None)
    return Through(hf, [Contrast("b", "choice", tuple(items))], [Site(1), Site(2)], [still])


@both_forms
@pytest.mark.parametrize("loss", LOSSES)
def test_trained_through_a_model_it_steers_what_the_model_answers(run, form, loss):
    method = LoReFT(rank=4, form=form, loss=loss, steps=30, learning_rate=0.02)
    maps = method.fit_through(run)
    assert method.through and maps.sites == run.sites
    assert not any(p.requires_grad for p in maps.parameters())
    items = run.items()
    plain, up, down = (run.answers(maps, items, [s] * len(items)) for s in (0.0, 1.0, -1.0))
    if loss == "odds":
        plain, up, down = (torch.sub(*both)[None] for both in (plain, up, down))
    assert (up[0] - plain[0]).mean() > 0.5
    if loss != "target":  # which knows no other direction
        last = down[-1] if loss == "said" else -down[0]
        before = plain[-1] if loss == "said" else -plain[0]
        assert (last - before).mean() > 0.5


def test_the_weight_of_what_shall_not_move_holds_it(run):
    places, moved = list(range(len(run.unmoved))), []
    for weight in (0.0, 20.0):
        method = LoReFT(rank=4, unmoved=weight, steps=30, learning_rate=0.02, patience=0)
        maps = method.fit_through(run)
        moved.append(float(run.divergence(maps, places, torch.ones(1)).mean()))
    assert moved[1] < 0.5 * moved[0]


def test_a_training_follows_from_its_seed(run):
    method, state = LoReFT(rank=2, steps=3), torch.get_rng_state()
    one, two, other = (method.fit_through(run, seed=seed)[Site(1)].read for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
