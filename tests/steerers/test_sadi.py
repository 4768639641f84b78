"""SADI: the sheet's numbers, the authors' ranking, and how far strength 1 goes."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.steerers.sadi import SADI, Scale


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def fit(source, target, **fields):
    acts = Activations.of_sides(source, target, paired=False)
    return SADI(**fields).fit(acts)[acts.site]


def test_the_chosen_dimensions_are_multiplied_and_no_other():
    h = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    part = fit(h, h + torch.tensor([0.0, 5.0, 1.0, 6.0]), count=2, delta=2.0)
    assert part(h, torch.ones(1, 1)).tolist() == [[1, 6, 3, 12]]
    assert part(-h, torch.ones(1, 1)).tolist() == [[-1, -6, -3, -12]]
    one = fit(h, h + torch.tensor([0.0, 5.0, 1.0, 6.0]), count=1, delta=4.0)
    assert one(h, torch.ones(1, 1)).tolist() == [[1, 2, 3, 20]]
    assert torch.equal(fit(h, h + 1, delta=0.0)(h, torch.ones(1, 1)), h)


def test_raised_dimensions_are_the_authors_at_every_layer_in_their_order(shared):
    folder = shared / "goldens" / "sadi"
    (case,) = json.loads((folder / "case.json").read_text(encoding="utf-8"))["cases"]
    given = load_file(folder / case["file"])
    seen = 0
    for layer in range(given["hidden_pos"].shape[1]):
        listed = [int(n) for at, n in given["max_hidden"] if at == layer]
        sides = given["hidden_neg"][:, layer], given["hidden_pos"][:, layer]
        # One more at a time: the list's order.
        for count in range(1, len(listed) + 1):
            scales = fit(*sides, rank="raised", count=count, delta=1.0).scales[0]
            assert scales.nonzero().squeeze(-1).tolist() == sorted(listed[:count])
        seen += len(listed)
    assert seen == len(given["max_hidden"]) == 128


def test_apart_damps_where_amplifying_would_lead_away():
    source = torch.tensor([[3.0, -3.0, -2.0, 1.0]])
    target = source + torch.tensor([[1.0, 4.0, -3.0, -5.0]])
    raised, apart = (
        fit(source, target, rank=rank, count=3, delta=0.5).scales[0].tolist()
        for rank in ("raised", "apart")
    )
    assert raised == [0.5, 0.5, 0.5, 0.0] and apart == [0.0, -0.5, 0.5, -0.5]


@pytest.mark.parametrize("rank", ["raised", "apart"])
@pytest.mark.parametrize("count", [1, 3, 99])
def test_strength_one_goes_as_far_along_the_difference_as_the_target_mean(rank, count):
    source, target = draw(40, 6) + draw(1, 6, 3) * 4, draw(60, 6, 1)
    part, gap = fit(source, target, rank=rank, count=count), target.mean(0) - source.mean(0)
    for strength in (1.0, -0.5):
        move = (part(source, torch.full((40, 1), strength)) - source).mean(0)
        torch.testing.assert_close(move @ gap, strength * (gap @ gap), rtol=1e-4, atol=1e-4)
        assert (move != 0).sum() == min(count, 6)


def test_where_the_target_is_less_of_the_same_it_damps():
    source = draw(40, 4) / 9 + 5
    for rank in ("raised", "apart"):
        part = fit(source, source / 2, rank=rank)
        torch.testing.assert_close(part.scales[0], torch.full((4,), -0.5), rtol=0, atol=0.01)


def test_two_behaviours_add_their_moves():
    parts = [
        Activations.of_sides(draw(20, 4, seed) + 1, draw(20, 4, seed + 1) + seed, behaviour=name)
        for name, seed in (("warm", 2), ("brief", 4))
    ]
    both = SADI(count=2).fit(Activations.together(parts))[parts[0].site]
    h, one = draw(6, 4, 9), torch.ones(6, 1)
    moves = [SADI(count=2).fit(part)[part.site](h, one) - h for part in parts]
    mixed = both(h, torch.tensor([[0.5, -2.0]]).expand(6, 2))
    torch.testing.assert_close(mixed, h + 0.5 * moves[0] - 2 * moves[1], rtol=0, atol=1e-4)
    assert type(both) is Scale


def test_a_mask_that_leads_nowhere_is_refused_and_not_where_delta_is_given():
    source = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    target = source + torch.tensor([2.0, 0.0])
    with pytest.raises(InputError, match="leads nowhere.*set delta"):
        fit(source, target, count=1)
    assert fit(source, target, count=1, rank="raised", delta=3.0).scales.tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("fields", [{"count": 0}, {"delta": math.nan}, {"delta": math.inf}])
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        SADI(**fields)


def test_an_unknown_rank_is_refused():
    with pytest.raises(UnknownName, match="rank"):
        SADI(rank="signed")
