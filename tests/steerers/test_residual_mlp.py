"""Residual MLP: the control that need not be invertible, on rows and through a model."""

import math

import pytest
import torch

import tiny
from innsteer.activations import Activations, Rows
from innsteer.backends.base import Prompt
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerers.residual_mlp import Residual, ResidualMLP
from innsteer.training import said

WORDS = ("tea", "rain", "ice", "iron", "wool", "jazz", "rope", "dusk")


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def ones(h, strength=1.0):
    return torch.full((len(h), 1), strength, dtype=h.dtype)


def filled(width=3, k=1, hidden=4):
    part = Residual(width, k, hidden=hidden).requires_grad_(False)
    for n, tensor in enumerate([part.inner, part.bias, part.outer]):
        tensor.copy_(draw(tensor.numel(), 1, n).view(tensor.shape))
    part.mean.copy_(draw(1, width, 3)[0])
    part.std.copy_(draw(1, width, 4)[0].exp())
    return part


def test_the_map_by_hand():
    part, h = filled(), draw(5, 3, 9)
    z = (h - part.mean) / part.std
    units = (z @ part.inner[0].mT + part.bias[0]).clamp_min(0)
    want = h - 1.5 * units @ part.outer[0]
    torch.testing.assert_close(part(h, ones(h, -1.5)), want)


def test_two_behaviours_have_units_of_their_own_and_add():
    part, h = filled(k=2), draw(5, 3, 9)
    one, two = (part(h, row.expand(5, 2)) - h for row in torch.eye(2))
    assert (one - two).norm() > 0.1
    got = part(h, torch.tensor([[0.5, -2.0]]).expand(5, 2))
    torch.testing.assert_close(got, h + 0.5 * one - 2 * two)


def test_strengths_neither_add_nor_undo_each_other():
    part, h = filled(), draw(5, 3, 9)
    assert (part(part(h, ones(h)), ones(h)) - part(h, ones(h, 2.0))).norm() > 0.1
    assert (part(part(h, ones(h)), ones(h, -1.0)) - h).norm() > 0.1


def xor(n=400, seed=0):
    """Rows that go up where two dimensions have one sign, else down: no linear map does that."""
    h = draw(n, 4, seed)
    gap = torch.zeros(n, 4)
    gap[:, 3] = 2 * (h[:, 0] * h[:, 1]).sign()
    return h, gap


def test_on_rows_it_learns_a_move_that_no_linear_map_makes():
    h, gap = xor()
    method = ResidualMLP(hidden=32)
    part = method.fit(Activations.of_sides(h - gap / 2, h + gap / 2))[Site(0)]
    fresh, want = xor(seed=1)
    for strength in (1.0, -1.0):
        move = part(fresh, ones(fresh, strength)) - fresh
        right = move[:, 3].sign() == strength * want[:, 3].sign()
        assert right.double().mean() > 0.85
    assert not any(p.requires_grad for p in part.parameters())


def test_rows_that_must_not_move_are_heeded():
    h, calm = draw(80, 3), draw(80, 3, 1) + torch.tensor([8.0, 0.0, 0.0])
    pairs = Activations.of_sides(h, h + torch.tensor([0.0, 2.0, 0.0]))
    records = [{"behaviour": "", "item": f"u{n}", "side": "unmoved"} for n in range(len(calm))]
    both = Activations(
        {Site(0): torch.cat([pairs.values[Site(0)], calm])},
        Rows.of(pairs.rows.records() + records),
        pairs.behaviours,
    )
    moved = [
        float((part(calm, ones(calm)) - calm).norm(dim=1).mean())
        for part in (ResidualMLP(hidden=16).fit(acts)[Site(0)] for acts in (pairs, both))
    ]
    assert moved[1] < 0.3 < 1.5 < moved[0]


def test_hidden_units_are_per_behaviour():
    part = ResidualMLP(hidden=5).build({Site(0): 7}, k=3)[Site(0)]
    assert part.inner.shape == part.outer.shape == (3, 5, 7) and part.bias.shape == (3, 5)


def test_unpaired_rows_are_refused():
    with pytest.raises(InputError, match="no pairs"):
        ResidualMLP().fit(Activations.of_sides(draw(9, 2), draw(9, 2, 1), paired=False))


@pytest.mark.parametrize(
    "fields",
    [{"hidden": 0}, {"epochs": 0}, {"polish": -1}, {"polish_batch": 0}]
    + [{"learning_rate": -1.0}, {"polish_rate": math.nan}, {"polish_unmoved": math.inf}],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        ResidualMLP(**fields)


@pytest.fixture(scope="module")
def run():
    """Questions that Y and N match in turn, and prompts to leave alone."""
    items = [
        Item(f"{n}", f"Is {w} good?", *(("N", "Y", "Y") if n % 2 else ("Y", "N", "N")), w)
        for n, w in enumerate(WORDS)
    ]
    hf = HF(tiny.tiny_language_model("llama"))
    still = hf.reference([Prompt(w, f"Tell me about {w}.") for w in WORDS], None)
    return Through(hf, [Contrast("b", "choice", tuple(items))], [Site(2)], [still])


def test_without_polish_it_is_the_fit_on_the_rows_that_seek(run):
    method = ResidualMLP(hidden=8, epochs=20, polish=0)
    through, plain = method.fit_through(run), method.fit(run.rows())
    for name, value in plain.state_dict().items():
        assert torch.equal(through.state_dict()[name], value)
    assert method.through


def test_fitted_through_a_model_it_steers_and_polish_lowers_the_loss(run):
    losses, items = [], run.items()
    for polish in (0, 30):
        method = ResidualMLP(hidden=16, polish=polish, polish_rate=0.01, polish_unmoved=0.0)
        maps = method.fit_through(run)
        assert not any(p.requires_grad for p in maps.parameters())
        up, down = (torch.sub(*run.answers(maps, items, [s] * len(items))) for s in (1.0, -1.0))
        assert (up - down).mean() > 0.1
        losses.append(float(said(run, maps, items)))
    assert losses[1] < losses[0]


def test_a_fit_follows_from_its_seed(run):
    method, state = ResidualMLP(hidden=4, epochs=3, polish=3), torch.get_rng_state()
    one, two, other = (method.fit_through(run, seed=seed)[Site(2)].outer for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
