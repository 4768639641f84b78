"""ACE: the sheet's numbers, one level for all rows, and the methods it comes down to."""

import pytest
import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.interventions import SetPoint
from innsteer.steerers.ablation import Ablation
from innsteer.steerers.ace import AffineConceptEditing


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def fit(source: Tensor, target: Tensor, **fields) -> SetPoint:
    acts = Activations.of_sides(source, target, paired=False)
    return AffineConceptEditing(**fields).fit(acts)[acts.site]


@pytest.mark.parametrize(
    ("alpha", "expected", "coordinate"),
    [(0.0, [1.4, -1.8], 0.4472), (1.0, [5.4, 0.2], 4.9193)],
)
@pytest.mark.parametrize("along", [0.0, 3.0, -50.0])
def test_the_coordinate_is_set_whatever_it_was(alpha, expected, coordinate, along):
    harmless, harmful = torch.tensor([[0.0, 1.0]]), torch.tensor([[4.0, 3.0]])
    r = torch.tensor([2.0, 1.0]) / 5**0.5
    h = torch.tensor([[5.0, 0.0]]) + along * r
    moved = fit(harmless, harmful, alpha=alpha)(h, torch.ones(1, 1))
    torch.testing.assert_close(moved, torch.tensor([expected]), rtol=0, atol=1e-5)
    assert float(moved @ r) == pytest.approx(coordinate, abs=1e-4)


def test_at_alpha_every_row_stands_there_along_the_difference_and_nowhere_else_moves():
    source, target = draw(40, 5) + 3, draw(60, 5, 1) + torch.arange(5.0)
    means = source.mean(0), target.mean(0)
    r = torch.nn.functional.normalize(means[1] - means[0], dim=0)
    h = 4 * draw(9, 5, 2)
    for alpha in (-1.0, 0.0, 0.3, 1.0, 2.0):
        moved = fit(source, target, alpha=alpha)(h, torch.ones(9, 1))
        level = (means[0] + alpha * (means[1] - means[0])) @ r
        torch.testing.assert_close(moved @ r, level.expand(9), rtol=0, atol=1e-4)
        across = torch.eye(5) - torch.outer(r, r)
        torch.testing.assert_close(moved @ across, h @ across, rtol=0, atol=1e-5)


def test_where_the_source_mean_is_nothing_alpha_zero_is_ablation():
    source, target = draw(40, 5), draw(40, 5, 1) + 2
    source = source - source.double().mean(0).float()
    acts = Activations.of_sides(source, target)
    h, coef = draw(9, 5, 2), torch.linspace(-1, 2, 9).unsqueeze(1)
    expected = Ablation().fit(acts)[acts.site](h, coef)
    torch.testing.assert_close(fit(source, target, alpha=0.0)(h, coef), expected)


def test_the_public_codes_alpha_is_this_one_less_the_share_of_target_rows():
    # its reference is the mean of all rows
    source, target = draw(30, 5), draw(90, 5, 1) + 2
    r = torch.nn.functional.normalize(target.mean(0) - source.mean(0), dim=0)
    pooled = torch.cat([source, target]).mean(0)
    own = fit(source, target, alpha=0.5 + 0.75)(draw(9, 5, 2), torch.ones(9, 1))
    level = (pooled + 0.5 * (target.mean(0) - source.mean(0))) @ r
    torch.testing.assert_close(own @ r, level.expand(9), rtol=0, atol=1e-5)


def test_two_behaviours_add_their_moves():
    parts = [
        Activations.of_sides(draw(20, 4, seed), draw(20, 4, seed + 1) + seed, behaviour=name)
        for name, seed in (("warm", 2), ("brief", 4))
    ]
    both = AffineConceptEditing().fit(Activations.together(parts))[parts[0].site]
    h, one = draw(6, 4, 9), torch.ones(6, 1)
    moves = [AffineConceptEditing().fit(part)[part.site](h, one) - h for part in parts]
    mixed = both(h, torch.tensor([[0.5, -2.0]]).expand(6, 2))
    torch.testing.assert_close(mixed, h + 0.5 * moves[0] - 2 * moves[1], rtol=0, atol=1e-4)


def test_a_small_gap_beside_a_massive_dimension_is_set_exactly():
    source, target = (8192 + 0.01 * draw(200, 3, seed) for seed in (0, 1))
    target = target + 0.05
    moved = fit(source, target)(source, torch.ones(200, 1))
    r = torch.nn.functional.normalize((target.double() - source.double()).mean(0), dim=0)
    left = (target.double().mean(0) - moved.double()) @ r
    assert left.abs().max() < 2e-3  # two roundings of 8192 in float32


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_level_that_is_no_number_is_refused(alpha):
    with pytest.raises(InputError, match="alpha"):
        AffineConceptEditing(alpha=alpha)
