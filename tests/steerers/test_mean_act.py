"""Mean-AcT: DiffMean without bounds, a bounded shift with them."""

import pytest
import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.steerers.diffmean import DiffMean
from innsteer.steerers.linear_act import LinearAcT
from innsteer.steerers.mean_act import MeanAcT


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def test_without_bounds_it_is_diffmean_for_unequal_sides_and_weights():
    acts = Activations.of_sides(draw(30), 3 * draw(20, 1) + 2, paired=False)
    acts.rows.weight[::3] = 2
    h, coef = 50 * draw(9, 2), torch.linspace(-1, 2, 9).unsqueeze(1)
    expected = DiffMean().fit(acts)[acts.site](h, coef)
    torch.testing.assert_close(MeanAcT().fit(acts)[acts.site](h, coef), expected)


def test_between_sides_of_one_shape_linear_act_is_this_shift():
    source = draw(30)
    acts = Activations.of_sides(source, source.flip(0) + torch.arange(4), paired=False)
    h = draw(9, 2)
    for support in ("q_all", "q_5_95"):
        maps = [kind(support=support).fit(acts)[acts.site] for kind in (MeanAcT, LinearAcT)]
        own, line = (part(h, torch.ones(9, 1)) for part in maps)
        torch.testing.assert_close(own, line, rtol=0, atol=1e-5)


def test_within_bounds_the_slope_is_one_and_beyond_them_a_dimension_stays():
    source = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    acts = Activations.of_sides(source, 3 * source + 1)
    part = MeanAcT(support="q_0_100").fit(acts)[acts.site]
    h = torch.tensor([[0.5, 1.5], [0.5, 2.5], [-1.0, 1.5]])
    moves = torch.tensor([[3.0, 3.0], [3.0, 0.0], [0.0, 3.0]])
    for strength in (1.0, 0.5, -1.0):
        moved = part(h, torch.full((3, 1), strength))
        torch.testing.assert_close(moved, h + strength * moves, rtol=0, atol=1e-6)


def test_a_dimension_that_does_not_vary_is_shifted_too():
    acts = Activations.of_sides(torch.full((5, 4), 8.0), draw(5) + 3, paired=False)
    part = MeanAcT().fit(acts)[acts.site]
    expected = (draw(5) + 3).mean(0) - 8
    torch.testing.assert_close(part.shifts[0], expected, rtol=0, atol=1e-5)


def test_a_support_that_is_no_interval_is_refused():
    with pytest.raises(InputError, match="support="):
        MeanAcT(support="q_95_5")
