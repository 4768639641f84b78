"""Gaussian AcT: moments that arrive, the sheet's line, and its sibling with correlations."""

import pytest
import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.steerers.gaussian_act import GaussianAcT
from innsteer.steerers.mean_act import MeanAcT
from innsteer.steerers.mimic import MiMiC


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def uneven() -> Activations:
    """Sides of unequal numbers, spread and shape, with weights."""
    acts = Activations.of_sides(draw(30) * torch.arange(1, 5), draw(50, 1) ** 3 + 2, paired=False)
    acts.rows.weight[::3] = 2
    return acts


def moments(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation."""
    share = weight / weight.sum()
    mean = share @ rows
    return mean, (share @ (rows - mean).square()).sqrt()


def test_source_rows_get_the_targets_mean_and_spread():
    acts = uneven()
    source, target = acts.sides(acts.site)
    weight = torch.from_numpy(acts.rows.weight).float()
    moved = GaussianAcT().fit(acts)[acts.site](source, torch.ones(30, 1))
    torch.testing.assert_close(
        moments(moved, weight[:30]), moments(target, weight[30:]), rtol=1e-4, atol=1e-4
    )


def test_from_n_0_1_to_n_3_4_the_line_is_two_h_plus_three_and_half_of_it_at_half_strength():
    source, target = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])
    part = GaussianAcT().fit(acts := Activations.of_sides(source, target))[acts.site]
    steered = part(torch.ones(4, 1), torch.tensor([[1.0], [0.5], [0.0], [-1.0]]))
    assert steered.squeeze(1).tolist() == pytest.approx([5.0, 3.0, 1.0, -3.0], abs=1e-5)


def test_it_is_mimic_with_all_correlations_shrunk_away():
    acts, h = uneven(), draw(9, 2) * 5
    own, other = (
        method.fit(acts)[acts.site](h, torch.ones(9, 1))
        for method in (GaussianAcT(), MiMiC(shrinkage=1.0))
    )
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_equal_spreads_give_the_shift_of_the_means():
    source = draw(30)
    acts = Activations.of_sides(source, -source + torch.arange(4), paired=False)
    h = draw(9, 2)
    own, shift = (
        kind().fit(acts)[acts.site](h, torch.ones(9, 1)) for kind in (GaussianAcT, MeanAcT)
    )
    torch.testing.assert_close(own, shift, rtol=0, atol=1e-5)


def test_outside_the_support_a_dimension_stays():
    source = torch.tensor([[0.0], [1.0], [2.0]])
    acts = Activations.of_sides(source, 2 * source + 3)
    h = torch.tensor([[1.5], [9.0]])
    bounded, free = (
        GaussianAcT(support=support).fit(acts)[acts.site](h, torch.ones(2, 1))
        for support in ("q_0_100", "q_all")
    )
    torch.testing.assert_close(bounded, torch.tensor([[6.0], [9.0]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(free, torch.tensor([[6.0], [21.0]]), rtol=0, atol=1e-5)


def test_a_support_that_is_no_interval_is_refused():
    with pytest.raises(InputError, match="support="):
        GaussianAcT(support="q_95_5")
