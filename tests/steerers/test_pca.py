"""PCA: the sheet's fixture, the order of pairs, the vote for the sign, and the length."""

import pytest
import torch
from torch import Tensor

from innsteer.activations import Activations, Rows
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerers.pca import PCA, reading_vector


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(covariance: Tensor, mean: Tensor, n: int = 60) -> Tensor:
    """Rows with exactly this mean and covariance."""
    rows = draw(n, len(covariance))
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.mT @ rows / n)).mT
    return white @ torch.linalg.cholesky(covariance).mT + mean


def fit(source: Tensor, target: Tensor, **fields) -> Tensor:
    """The shift ``[d]`` that is fitted on these pairs."""
    acts = Activations.of_sides(source, target)
    return PCA(**fields).fit(acts)[acts.site].shifts[0]


def fixture() -> tuple[Tensor, Tensor]:
    """Pairs whose means are 2 apart, with independent noise of covariance [[1, .8], [.8, 1]]."""
    noise = 2 * torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    source = draw(60, 2, 1)
    return source, source + exact(noise, torch.tensor([2.0, 0.0]))


def test_the_sheets_pairs_give_its_uncentred_component():
    shift = fit(*fixture(), length=1)
    torch.testing.assert_close(shift, torch.tensor([0.944, 0.331]), rtol=0, atol=1e-3)


def test_it_is_what_random_orders_give_on_the_mean_of_many_pairs():
    source, target = fixture()
    flips = 2.0 * torch.randint(2, (40, 60), generator=torch.Generator().manual_seed(2)) - 1
    apart = (flips.unsqueeze(-1) * (target - source)).flatten(0, 1)
    centred = apart - apart.mean(0)
    component = torch.linalg.svd(centred, full_matrices=False)[2][0].float()
    shift = fit(source, target, length=1)
    assert float((component @ shift).abs()) > 0.9999


def test_the_sign_is_the_pairs_own_whatever_the_rows():
    source = draw(30, 2)
    for sign in (1.0, -1.0):
        lift = sign * torch.tensor([2.0, 0.0]) + 1e-6 * draw(30, 2, 1)
        shift = fit(source, source + lift)
        torch.testing.assert_close(shift, sign * torch.tensor([2.0, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("weights", "sign"), [([1, 1, 1], 1), ([1, 1, 2], -1), ([1, 1, 3], -1)])
def test_most_pairs_decide_the_sign_and_the_mean_where_they_are_as_many(weights, sign):
    weight = torch.tensor(weights).double()
    for unit in torch.nn.functional.normalize(draw(10, 3), dim=1):
        lifts = torch.stack([unit, unit, -9 * unit])
        for order in ([0, 1, 2], [2, 1, 0]):  # the decomposition's own sign hangs on the order
            found = reading_vector(lifts[order], weight[order])
            torch.testing.assert_close(found, sign * unit, rtol=0, atol=1e-9)


def test_strength_one_carries_the_source_mean_to_the_targets_along_the_direction():
    source, target = fixture()
    shift = fit(source, target).double()
    moved = (source + shift).mean(0)
    assert float((target.mean(0) - moved) @ shift) == pytest.approx(0, abs=1e-5)
    assert float(fit(source, target, length=8).norm()) == pytest.approx(8, rel=1e-6)


def test_fewer_pairs_than_dimensions_give_a_direction_within_their_differences():
    source, lift = draw(4, 20), draw(4, 20, 1)
    shift = fit(source, source + lift, length=1).double()
    within = torch.linalg.lstsq(lift.mT, shift.unsqueeze(1)).solution.squeeze(1) @ lift
    torch.testing.assert_close(within, shift, rtol=0, atol=1e-5)


def test_behaviours_and_sites_have_directions_of_their_own_and_add():
    records = [
        {"behaviour": name, "item": f"{i}", "pair": f"{i}", "side": side}
        for name in ("warm", "brief")
        for side in ("source", "target")
        for i in range(10)
    ]
    rows = draw(40, 3).float() * 0.1
    rows[10:20, 0] += 2
    rows[30:, 1] -= 3
    sites = {Site(0): rows, Site(4): -rows}
    maps = PCA().fit(Activations(sites, Rows.of(records), ("brief", "warm")))
    expected = torch.tensor([[0.0, -3.0, 0.0], [2.0, 0.0, 0.0]])
    torch.testing.assert_close(maps[Site(0)].shifts, expected, rtol=0, atol=0.25)
    torch.testing.assert_close(maps[Site(4)].shifts, -maps[Site(0)].shifts)
    mixed = maps[Site(0)](torch.zeros(1, 3), torch.tensor([[0.5, 2.0]]))
    brief, warm = maps[Site(0)].shifts
    torch.testing.assert_close(mixed[0], 0.5 * brief + 2 * warm)


def test_agreement_is_the_share_of_pairs_that_point_along_the_shift():
    source = torch.zeros(4, 2)
    target = torch.tensor([[1.0, 0], [1, 0], [2, 0], [-1, 0]])
    acts = Activations.of_sides(source, target)
    assert PCA().diagnose(acts, PCA().fit(acts)) == {"agreement": 0.75}
    acts.rows.weight[[3, 7]] = 3
    assert PCA().diagnose(acts, PCA().fit(acts)) == {"agreement": 0.5}


def test_rows_without_pairs_and_lengths_out_of_range_are_refused():
    with pytest.raises(InputError, match="no whole pair"):
        PCA().fit(Activations.of_sides(draw(5, 2), draw(5, 2, 1), paired=False))
    for length in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="length="):
            PCA(length=length)
