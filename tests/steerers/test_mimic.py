"""MiMiC: analytic maps between Gaussians, shrinkage against scikit-learn, and its limits."""

import pytest
import torch
from sklearn import covariance as sklearn_covariance
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.interventions import Affine
from innsteer.steerers.diffmean import DiffMean
from innsteer.steerers.mimic import MiMiC, gaussian_map, ledoit_wolf, oas


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(covariance: Tensor, mean: float = 0.0, n: int = 60, seed: int = 0) -> Tensor:
    """Rows with exactly this covariance, and the same mean in every dimension."""
    rows = draw(n, len(covariance), seed)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.mT @ rows / n)).mT
    return white @ torch.linalg.cholesky(covariance).mT + mean


def fit(source: Tensor, target: Tensor, **fields) -> Affine:
    acts = Activations.of_sides(source, target, paired=False)
    return MiMiC(**fields).fit(acts)[acts.site]


CASES = {
    "diagonal": ([[1.0, 0.0], [0.0, 4.0]], [[4.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.5]]),
    "turned": (
        [[1.0, 0.8], [0.8, 1.0]],
        [[1.0, -0.8], [-0.8, 1.0]],
        [[5 / 3, -4 / 3], [-4 / 3, 5 / 3]],
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=[*CASES])


@every_case
def test_the_map_between_two_gaussians_is_the_analytic_one(case):
    source, target, expected = (torch.tensor(part, dtype=torch.float64) for part in case)
    mapped = gaussian_map(source, target)
    torch.testing.assert_close(mapped, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mapped @ source @ mapped.mT, target, rtol=0, atol=1e-12)


@every_case
def test_rows_with_these_covariances_give_that_map_about_the_source_mean(case):
    source, target, expected = (torch.tensor(part, dtype=torch.float64) for part in case)
    rows, wanted = exact(source, 3.0), exact(target, -1.0, n=90, seed=1)
    part = fit(rows, wanted, shrinkage=0.0)
    torch.testing.assert_close(
        part.residuals[0].double(), expected - torch.eye(2), atol=1e-6, rtol=0
    )
    moved = part(rows.float(), torch.ones(len(rows), 1)).double()
    torch.testing.assert_close(moved.mean(0), wanted.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved.mT.cov(correction=0), target, rtol=0, atol=1e-4)


def test_the_map_is_symmetric_and_positive_and_fits_in_many_dimensions_of_uneven_scale():
    scale = torch.logspace(-1, 3, 30, dtype=torch.float64)
    source, target = ((draw(80, 30, seed) * scale).mT.cov() for seed in (0, 1))
    mapped = gaussian_map(source, target)
    assert torch.linalg.eigvalsh(mapped)[0] > 0
    torch.testing.assert_close(mapped, mapped.mT, rtol=0, atol=1e-12)
    unit = torch.outer(scale, scale)
    torch.testing.assert_close(mapped @ source @ mapped / unit, target / unit, rtol=0, atol=1e-6)


def test_the_map_is_the_papers_formula():
    source, target = (draw(80, 6, seed).mT.cov() for seed in (0, 1))

    def power(covariance: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance)
        return (vectors * values**exponent) @ vectors.mT

    middle = power(power(source, 0.5) @ target @ power(source, 0.5), 0.5)
    expected = power(source, -0.5) @ middle @ power(source, -0.5)
    torch.testing.assert_close(gaussian_map(source, target), expected, rtol=0, atol=1e-12)


def test_a_target_without_variation_in_a_dimension_is_reached():
    source, target = draw(80, 3).mT.cov(), torch.diag(torch.tensor([1.0, 0.0, 2.0]).double())
    mapped = gaussian_map(source, target)
    torch.testing.assert_close(mapped @ source @ mapped, target, rtol=0, atol=1e-12)


def test_equal_covariances_give_diffmean():
    rows = draw(40, 5)
    acts = Activations.of_sides(rows, rows.flip(0) + torch.arange(5), paired=False)
    h, coef = draw(8, 5, 3).float(), torch.full((8, 1), 0.7)
    expected = DiffMean().fit(acts)[acts.site](h, coef)
    torch.testing.assert_close(MiMiC().fit(acts)[acts.site](h, coef), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [15, 300])
@pytest.mark.parametrize(
    ("own", "theirs"),
    [(ledoit_wolf, sklearn_covariance.ledoit_wolf), (oas, sklearn_covariance.oas)],
)
def test_shrinkage_is_that_of_scikit_learn(own, theirs, n):
    rows = draw(n, 20) @ draw(20, 20, 1)
    rows = rows - rows.mean(0)
    _, expected = theirs(rows.numpy(), assume_centered=True)
    got = own(rows, rows.mT @ rows / n, torch.ones(n, dtype=torch.float64))
    assert 0 < expected < 1 and got == pytest.approx(expected, rel=1e-9)


def test_shrinkage_keeps_variances_so_that_at_one_only_slopes_are_left():
    source, target = draw(30, 4) @ draw(4, 4, 1) * 100, draw(30, 4, 2)
    part = fit(source, target, shrinkage=1.0)
    slopes = target.std(0) / source.std(0)
    torch.testing.assert_close(
        part.residuals[0].double(), torch.diag(slopes - 1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shrinkage", ["oas", "ledoit-wolf", 0.2])
def test_fewer_rows_than_dimensions_still_give_a_tame_map(shrinkage):
    part = fit(draw(20, 50), draw(20, 50, 1) + 1, shrinkage=shrinkage)
    values = torch.linalg.eigvalsh(part.residuals[0].double() + torch.eye(50))
    assert 0.1 < values[0] and values[-1] < 10


def test_a_singular_covariance_is_refused_when_nothing_may_be_shrunk():
    with pytest.raises(InputError, match="singular in the 50 dimensions"):
        fit(draw(20, 50), draw(20, 50, 1), shrinkage=0.0)


def test_a_dimension_without_variation_in_the_source_gets_the_shift_only():
    source, target = draw(40, 3), draw(40, 3, 1) + 2
    source[:, 1] = 8192.25
    part = fit(source, target)
    assert part.residuals[0, 1].abs().max() == 0 and part.residuals[0, :, 1].abs().max() == 0
    assert float(part.shifts[0, 1]) == pytest.approx(float(target[:, 1].mean()) - 8192.25, rel=1e-6)
    assert part.residuals[0, 0, 0] != 0


@pytest.mark.parametrize("shrinkage", ["oas", "ledoit-wolf", 0.0])
def test_a_row_of_weight_two_is_the_row_twice(shrinkage):
    turn = torch.ones(3, 3).double().triu()  # correlated, so that shrinkage stays below 1
    source, target = draw(20, 3) @ turn, draw(20, 3, 1) @ turn * 2
    twice = fit(
        torch.cat([source, source[:9]]), torch.cat([target, target[:5]]), shrinkage=shrinkage
    )
    acts = Activations.of_sides(source, target)
    acts.rows.weight[[*range(9), *range(20, 25)]] = 2
    part = MiMiC(shrinkage=shrinkage).fit(acts)[acts.site]
    torch.testing.assert_close(part.residuals, twice.residuals, rtol=0, atol=1e-6)


def test_one_source_row_gives_a_shift():
    part = fit(torch.zeros(1, 2), draw(9, 2) + 3)
    assert part.residuals.abs().max() == 0 and (part.shifts > 1).all()


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_a_shrinkage_out_of_range_is_refused(shrinkage):
    with pytest.raises(InputError, match="between 0 and 1"):
        MiMiC(shrinkage=shrinkage)
    with pytest.raises(UnknownName, match="ledoit-wolf"):
        MiMiC(shrinkage="ledoit")
