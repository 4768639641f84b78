"""Linear-AcT: the official code's numbers, exact lines, and what unequal sides and weights do."""

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.steerers.linear_act import Diagonal, LinearAcT, coupled, percentile


def fit(source: Tensor, target: Tensor, **fields) -> Diagonal:
    acts = Activations.of_sides(source, target, paired=False)
    return LinearAcT(**fields).fit(acts)[acts.site]


def line(part: Diagonal) -> tuple[Tensor, Tensor]:
    """Slope and intercept, in float64."""
    gains, centres, shifts = (
        part.gains[0].double(),
        part.centres[0].double(),
        part.shifts[0].double(),
    )
    return gains + 1, shifts - gains * centres


def normal(n: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
    """The quantiles of a normal distribution at n middles, shuffled."""
    rows = [[NormalDist(mean, spread).inv_cdf((i + 0.5) / n)] for i in range(n)]
    return torch.tensor(rows)[torch.randperm(n, generator=torch.Generator().manual_seed(n))]


@pytest.mark.parametrize("support", ["q_all", "q_0_100", "q_5_95"])
def test_lines_intervals_and_steered_rows_are_those_of_the_official_code(shared, support):
    folder = shared / "goldens" / "linear-act"
    cases = json.loads((folder / "case.json").read_text(encoding="utf-8"))["cases"]
    (case,) = (case for case in cases if case["params"]["quantiles_src"] == support)
    golden = load_file(folder / case["file"])
    part = fit(golden["X_source"], golden["X_target"], support=support)
    slope, intercept = (each.float() for each in line(part))
    torch.testing.assert_close(slope, golden["slope"], rtol=1e-5, atol=0)
    torch.testing.assert_close(intercept, golden["intercept"], rtol=1e-5, atol=1e-4)
    if support != "q_all":  # there the code's bounds are +-1e6, ours every number
        torch.testing.assert_close(part.lows[0], golden["q_low"], rtol=0, atol=1e-6)
        torch.testing.assert_close(part.highs[0], golden["q_high"], rtol=0, atol=1e-6)
    h = golden["H"]
    for strength in case["params"]["strengths"]:
        steered = part(h, torch.full((len(h), 1), strength))
        torch.testing.assert_close(steered, golden[f"H_steered_{strength:g}"], rtol=1e-4, atol=1e-4)


def test_from_n_0_1_to_n_3_4_the_line_is_two_h_plus_three():
    part = fit(normal(200), normal(200, 3, 2))
    slope, intercept = line(part)
    assert float(slope) == pytest.approx(2, abs=1e-5)
    assert float(intercept) == pytest.approx(3, abs=1e-5)
    h = torch.tensor([[1.0], [1.0], [1.0]])
    steered = part(h, torch.tensor([[1.0], [0.5], [0.0]])).squeeze(1)
    torch.testing.assert_close(steered, torch.tensor([5.0, 3.0, 1.0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(50, 80), (200, 70), (40, 120)])
def test_sides_of_unequal_numbers_give_nearly_the_same_line(n, m):
    slope, intercept = line(fit(normal(n), normal(m, 3, 2)))
    assert float(slope) == pytest.approx(2, rel=0.03)
    assert float(intercept) == pytest.approx(3, abs=1e-4)


def test_a_side_whose_rows_stand_twice_is_the_same_side():
    source, target = normal(30), normal(30, 3, 2)
    expected = line(fit(source, target))
    for got in (line(fit(source.repeat(2, 1), target)), line(fit(source, target.repeat(3, 1)))):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_the_coupling_keeps_both_sides_and_their_order():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 1, generator=draw).double(), torch.randn(7, 1, generator=draw).double()
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]).double()
    left, right, mass = coupled(x, y, weight, torch.ones(7).double())
    for rows, own, share in ((x, left, weight / 7.5), (y, right, torch.ones(7).double() / 7)):
        for value, wanted in zip(rows, share, strict=True):
            assert float(mass[own == value].sum()) == pytest.approx(float(wanted), abs=1e-12)
    assert (left.diff(dim=0) >= 0).all() and (right.diff(dim=0) >= 0).all()


def test_a_source_that_is_the_target_stays():
    rows = normal(40)
    slope, intercept = line(fit(rows, rows.flip(0)))
    torch.testing.assert_close(slope, torch.ones(1).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(intercept, torch.zeros(1).double(), rtol=0, atol=1e-6)


def test_the_gaussian_form_takes_the_ratio_of_deviations():
    draw = torch.Generator().manual_seed(1)
    source = torch.randn(40, 3, generator=draw)
    target = torch.rand(25, 3, generator=draw) ** 4 * 5
    slope, intercept = line(fit(source, target, form="gaussian"))
    expected = target.double().std(0, correction=0) / source.double().std(0, correction=0)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)
    expected = target.double().mean(0) - expected * source.double().mean(0)
    torch.testing.assert_close(intercept, expected, rtol=1e-5, atol=1e-5)
    assert (slope > line(fit(source, target))[0]).all()  # a line fits another shape less steeply


def test_the_gaussian_form_has_a_floor_under_both_deviations():
    source, target = 1e-5 * normal(20), normal(20)
    slope, _ = line(fit(source, target, form="gaussian"))
    assert float(slope) == pytest.approx(float(target.std(correction=0)) / 1e-4, rel=1e-5)
    slope, _ = line(fit(target, torch.ones(20, 1), form="gaussian"))
    assert float(slope) == pytest.approx(1e-4 / float(target.std(correction=0)), rel=1e-3)


@pytest.mark.parametrize("form", ["sorted", "gaussian"])
def test_a_dimension_without_variation_in_the_source_is_shifted_only(form):
    source = torch.full((30, 1), 8192.25)
    slope, _ = line(part := fit(source, normal(30, 3, 2), support="q_all", form=form))
    assert float(slope) == 1
    moved = part(source, torch.ones(30, 1))
    torch.testing.assert_close(moved, torch.full((30, 1), 3.0), rtol=0, atol=1e-3)


def test_outside_the_open_interval_a_dimension_stays_while_others_move():
    source = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    part = fit(source, source + 1)
    h = torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.5, 1.0], [-1.0, 1.0]])
    expected = h + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(part(h, torch.ones(4, 1)), expected, rtol=0, atol=1e-6)
    without = fit(source, source + 1, support="q_all")
    torch.testing.assert_close(without(h, torch.ones(4, 1)), h + 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.33, 0.5, 0.95, 1.0])
def test_a_percentile_is_that_of_numpy_and_weight_two_is_the_row_twice(share):
    rows = torch.randn(23, 1, generator=torch.Generator().manual_seed(2)).double().sort(0).values
    counts = torch.arange(23) % 3 + 1
    for count in (torch.ones_like(counts), counts):
        mass = (count.double() / count.sum()).unsqueeze(1)
        expected = np.quantile(np.repeat(rows.squeeze(1), count), share)
        got = percentile(rows, mass, float(count.sum()), share)
        assert float(got) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("support", ["q_5", "q_95_5", "q_0_101", "q_5_5", "all", "", "q_-1_5"])
def test_a_support_that_is_no_interval_is_refused(support):
    with pytest.raises(InputError, match="support="):
        LinearAcT(support=support)


def test_an_unknown_form_and_weights_too_small_for_percentiles_are_refused():
    with pytest.raises(UnknownName, match="gaussian"):
        LinearAcT(form="gauss")
    acts = Activations.of_sides(torch.zeros(3, 1), torch.ones(3, 1))
    acts.rows.weight[:] = 1 / 3
    with pytest.raises(InputError, match="sum to 1"):
        LinearAcT().fit(acts)
    assert LinearAcT(support="q_all").fit(acts)[acts.site].shifts.tolist() == [[1.0]]
