"""LEACE: the official code's numbers, what no linear classifier finds, and least movement."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.interventions import SetPoint
from innsteer.steerers.ace import AffineConceptEditing
from innsteer.steerers.leace import Leace, reading
from innsteer.steerers.mimic import covariance


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng, dtype=torch.float64)


def exact(wanted: Tensor, n: int = 60, seed: int = 0) -> Tensor:
    """Rows of mean 0 with exactly this covariance."""
    rows = draw(n, len(wanted), seed)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.mT @ rows / n)).mT
    return white @ torch.linalg.cholesky(wanted).mT


def turned(d: int = 5, seed: int = 7) -> Tensor:
    """A covariance with correlations and uneven scales."""
    root = draw(d, d, seed) * torch.logspace(0, 1.5, d)
    return root.mT @ root


def fit(source: Tensor, target: Tensor, **fields) -> SetPoint:
    acts = Activations.of_sides(source.float(), target.float(), paired=False)
    return Leace(**fields).fit(acts)[acts.site].double()


def erase(part: SetPoint, rows: Tensor) -> Tensor:
    return part(rows, torch.ones(len(rows), 1))


@pytest.mark.parametrize("name", ["d8-plain", "d8-noshrink", "d8-default"])
def test_erased_rows_are_those_of_the_official_code(shared, name):
    folder = shared / "goldens" / "leace"
    cases = json.loads((folder / "case.json").read_text(encoding="utf-8"))["cases"]
    (case,) = (case for case in cases if case["name"] == name)
    golden = load_file(folder / case["file"])
    rows, concept = golden["X"], golden["Z"]
    sides = rows[concept == 0], rows[concept == 1]
    gap, mean = sides[1].mean(0) - sides[0].mean(0), rows.mean(0)
    spread = covariance(rows - mean, torch.ones(len(rows)).double(), 0.0)
    if name == "d8-default":  # that code's own shrinkage is not ours; the map of it is
        spread = golden["sigma_xx"]
    h = golden["H"]
    erased = h - ((h - mean) @ reading(gap, spread)).unsqueeze(1) * gap
    torch.testing.assert_close(erased, golden["H_erased"], rtol=1e-8, atol=1e-8)
    if name != "d8-default":
        fitted = erase(fit(*sides, shrinkage=0.0), h)
        scale = rows.std(0)
        torch.testing.assert_close(fitted / scale, erased / scale, rtol=1e-4, atol=1e-4)


def test_on_the_two_dimensional_fixture_the_map_is_known():
    rows = exact(torch.tensor([[1.0, 0.8], [0.8, 1.0]]).double())
    shift = torch.tensor([1.0, 0.0])
    part = fit(rows - shift, rows + shift, shrinkage=0.0)
    h = torch.tensor([[1.0, 1.0], [5.0, -2.0]]).double()
    expected = torch.stack([0.8 * h[:, 1], h[:, 1]], 1)
    torch.testing.assert_close(erase(part, h), expected, rtol=0, atol=1e-5)
    twice = erase(part, erase(part, h))
    torch.testing.assert_close(twice, erase(part, h), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shrinkage", [0.0, "oas", 1.0])
def test_the_means_coincide_and_no_linear_classifier_is_left(shrinkage):
    rows = exact(turned())
    source, target = rows, exact(turned(seed=8), n=90, seed=1) + 4
    part = fit(source, target, shrinkage=shrinkage)
    moved = erase(part, source), erase(part, target)
    both = torch.cat([source, target])
    for side in moved:
        torch.testing.assert_close(side.mean(0), both.mean(0), rtol=0, atol=1e-4)
    label = torch.arange(150) >= 60

    def told(rows: Tensor) -> float:
        rows = rows / rows.std(0)
        return LogisticRegression(C=1e6).fit(rows, label).score(rows, label)

    assert told(both) > 0.8
    assert told(torch.cat(moved)) == pytest.approx(0.6)  # the larger side's share


def test_it_moves_rows_less_than_the_projection_that_erases_the_same():
    rows = exact(turned())
    source, target = rows, rows + torch.tensor([1.0, -2.0, 0.0, 3.0, 1.0])
    both = torch.cat([source, target])

    gap = (target - source).mean(0)
    part = fit(source, target, shrinkage=0.0)

    def moved() -> float:
        return float((erase(part, both) - both).square().sum())

    least, own = moved(), part.reads[0].clone()
    # Every reading with w.v = 1 takes the means together; v / |v|^2 is the plain projection.
    tilts = [tilt - (tilt @ gap) / (gap @ gap) * gap for tilt in 0.01 * draw(5, 5, 3)]
    for other in (gap / (gap @ gap), *(own + tilt for tilt in tilts)):
        part.reads[0] = other
        torch.testing.assert_close(
            erase(part, source).mean(0), erase(part, target).mean(0), rtol=0, atol=1e-4
        )
        assert moved() > 1.0001 * least


def test_of_isotropic_rows_it_is_the_projection_off_the_difference():
    rows = exact(2 * torch.eye(4).double())
    source, target = rows, rows + torch.tensor([1.0, 2.0, 0.0, -1.0])
    h = draw(9, 4, 3)
    # the sides' common mean is alpha = 1/2 for ace
    acts = Activations.of_sides(source.float(), target.float())
    expected = AffineConceptEditing(alpha=0.5).fit(acts)[acts.site](h, torch.ones(9, 1))
    part = fit(source, target, shrinkage=0.0)
    torch.testing.assert_close(erase(part, h), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 2.0])
def test_with_alpha_both_means_go_to_that_level(alpha):
    source, target = exact(turned()), exact(turned(seed=8), n=90, seed=1) + 4
    part = fit(source, target, alpha=alpha)
    level = source.mean(0) + alpha * (target.mean(0) - source.mean(0))
    for side in (source, target):
        torch.testing.assert_close(erase(part, side).mean(0), level, rtol=0, atol=1e-4)


def test_fewer_rows_than_dimensions_and_a_dimension_that_stands_still():
    source, target = draw(15, 40), draw(15, 40, 1) + 1
    for side in (source, target):  # the last bit of float32 is no variation
        side[:, 3] = 8192 + (side[:, 3] > 0.5) * 2**-10
    acts = Activations.of_sides(source.float(), target.float())
    for shrinkage in ("oas", "ledoit-wolf", 0.0):
        part = Leace(shrinkage=shrinkage).fit(acts)[acts.site].double()
        assert part.reads[0, 3] == part.writes[0, 3] == 0
        gap = erase(part, target).mean(0) - erase(part, source).mean(0)
        assert gap.abs().max() < 1e-3
        assert float(part.reads.norm() * part.writes.norm()) < 10


def test_a_row_of_weight_two_is_the_row_twice():
    source, target = exact(turned()), exact(turned(seed=8), seed=1) + 4
    twice = fit(torch.cat([source, source[:9]]), torch.cat([target, target[:5]]), alpha=1.0)
    acts = Activations.of_sides(source.float(), target.float())
    acts.rows.weight[[*range(9), *range(60, 65)]] = 2
    part = Leace(alpha=1.0).fit(acts)[acts.site].double()
    torch.testing.assert_close(erase(part, source), erase(twice, source), rtol=0, atol=1e-4)


def test_equal_means_leave_rows_as_they_are():
    rows = draw(20, 3)
    torch.testing.assert_close(erase(fit(rows, rows), rows), rows, rtol=0, atol=0)


def test_fields_out_of_range_are_refused():
    with pytest.raises(InputError, match="alpha"):
        Leace(alpha=float("nan"))
    with pytest.raises(InputError, match="shrinkage"):
        Leace(shrinkage=1.5)
    with pytest.raises(UnknownName, match="oas"):
        Leace(shrinkage="none")
