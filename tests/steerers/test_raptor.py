"""RAPTOR: the sheet's move, the probability that is reached, and how the penalty is chosen."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.interventions import SetPoint
from innsteer.steerers.iti import labelled
from innsteer.steerers.raptor import RAPTOR, ridge_probe


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def overlapping(n: int = 60, d: int = 5) -> Activations:
    """Sides that overlap, in dimensions of uneven scale and far from 0."""
    scale = torch.logspace(-1, 3, d, dtype=torch.float64)
    source, target = draw(n, d), draw(n, d, 1) + torch.linspace(1, 0, d)
    return Activations.of_sides(source * scale + 7 * scale, target * scale + 7 * scale)


def held_from(acts: Activations, first: int) -> Activations:
    """The same with the items from the first on as validation part."""
    split = np.where(acts.rows.item.astype(int) < first, "train", "validation")
    return replace(acts, rows=replace(acts.rows, split=split))


def ones(rows: Tensor, strength: float = 1.0) -> Tensor:
    return torch.full((len(rows), 1), strength, dtype=rows.dtype)


def test_the_sheets_row_moves_by_its_least_step():
    # w = (3, 4), b = 0, p = 0.9: ln 9 / 5 along (0.6, 0.8).
    part = SetPoint(2)
    part.reads.copy_(torch.tensor([[0.6, 0.8]]))
    part.writes.copy_(part.reads)
    part.levels.fill_(math.log(9) / 5)
    moved = part(torch.zeros(1, 2), torch.ones(1, 1))[0]
    torch.testing.assert_close(moved, torch.tensor([0.2637, 0.3516]), rtol=0, atol=1e-4)
    assert float(torch.sigmoid(moved @ torch.tensor([3.0, 4.0]))) == pytest.approx(0.9, abs=1e-6)
    beyond = torch.tensor([[4.0, -1.0]])  # w.h = 8 already: pulled back
    pulled = part(beyond, torch.ones(1, 1))[0] @ torch.tensor([3.0, 4.0])
    assert float(torch.sigmoid(pulled)) == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("grid", [(1e-3,), (10.0,), (1e-3, 0.1, 10.0)])
def test_every_row_reaches_the_probability_by_a_move_along_the_normal(p, grid):
    acts, method = overlapping(), RAPTOR(p=p, grid=grid)
    probe = method.probe(acts, acts.site, "behaviour")
    part, rows = method.fit(acts)[acts.site].double(), acts.values[acts.site].double()
    moved = part(rows, ones(rows))
    reached = torch.sigmoid(probe.log_odds(moved))
    torch.testing.assert_close(reached, torch.full_like(reached, p), rtol=0, atol=2e-3)
    normal = (probe.weight / probe.weight.norm()).unsqueeze(1)
    across = (moved - rows) - (moved - rows) @ normal @ normal.mT
    assert across.norm() < 1e-5 * (moved - rows).norm()


def test_a_strength_is_the_share_of_the_way():
    acts = overlapping()
    part, rows = RAPTOR(p=0.8).fit(acts)[acts.site], acts.values[acts.site]
    whole = part(rows, ones(rows)) - rows
    for strength in (0.5, -1.0, 2.0):
        move = part(rows, ones(rows, strength)) - rows
        torch.testing.assert_close(move, strength * whole, rtol=1e-4, atol=1e-3)


def test_the_probe_is_scikit_learns_on_standardised_rows_mapped_back():
    acts = overlapping()
    rows, is_target, weight = labelled(acts, acts.site, "behaviour")
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    model = LogisticRegression(C=0.3, tol=1e-10, max_iter=5000)
    model.fit(((rows - mean) / spread).numpy(), is_target.numpy())
    probe = ridge_probe(rows, is_target, weight, 0.3)
    expected = model.decision_function(((rows - mean) / spread).numpy())
    np.testing.assert_allclose(probe.log_odds(rows).numpy(), expected, rtol=0, atol=1e-5)
    assert float(probe.log_odds(rows).abs().max()) > 1


def test_isotropic_rows_give_the_difference_of_means_and_others_fishers_direction():
    root = torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 1.0]]).double())
    gap = torch.tensor([1.0, 0.0])
    for mix, expected in ((torch.eye(2).double(), [1.0, 0.0]), (root, [0.781, -0.625])):
        source, target = draw(4000, 2) @ mix.mT - gap, draw(4000, 2, 1) @ mix.mT + gap
        acts = Activations.of_sides(source, target)
        unit = RAPTOR(grid=(1.0,)).fit(acts)[acts.site].reads[0]
        torch.testing.assert_close(unit, torch.tensor(expected), rtol=0, atol=0.04)


def test_without_p_the_source_mean_comes_as_far_as_the_target_whatever_the_penalty():
    acts = overlapping()
    source, target = acts.sides(acts.site)
    gap = (target - source).double().mean(0)
    for C in (1e-4, 1.0, 100.0):
        part = RAPTOR(grid=(C,)).fit(acts)[acts.site].double()
        rows = source.double()
        move = (part(rows, ones(rows)) - rows).mean(0)
        assert float(move @ gap / (gap @ gap)) == pytest.approx(1, abs=1e-4)


def test_held_out_accuracy_chooses_the_penalty_before_their_loss():
    # Noise of covariance [[1, .8], [.8, 1]]: a heavy penalty reads the first dimension, a light one
    # (5.6, -4.4). Of the held-out rows it gets 3 in 10 just wrong, and is very sure of the others.
    noise = torch.tensor([[1.0, 0.8], [0.0, 0.6]]).double()
    gap = torch.tensor([1.0, 0.0])
    source, target = draw(400, 2) @ noise - gap, draw(400, 2, 1) @ noise + gap
    held = torch.tensor([[2.0, 2.8]] * 3 + [[3.0, -3.0]] * 7).double()
    acts = Activations.of_sides(torch.cat([source, -held]), torch.cat([target, held]))
    acts = held_from(acts, 400)
    assert (wrong(acts, fixed(acts, 1e-5)), wrong(acts, fixed(acts, 1.0))) == (0, 0.3)
    found = RAPTOR(grid=(1e-5, 1.0)).probe(acts, acts.site, "behaviour")
    torch.testing.assert_close(found.weight, fixed(acts, 1e-5).weight)


def test_of_equally_right_penalties_the_better_calibrated_one_is_taken():
    acts = held_from(Activations.of_sides(draw(60, 3), draw(60, 3, 1) + 20), 40)
    assert wrong(acts, fixed(acts, 1e-4)) == wrong(acts, fixed(acts, 100.0)) == 0
    for grid in ((1e-4, 100.0), (100.0, 1e-4)):
        found = RAPTOR(grid=grid).probe(acts, acts.site, "behaviour")
        torch.testing.assert_close(found.weight, fixed(acts, 100.0).weight)


def fixed(acts: Activations, C: float):
    """The probe of one penalty."""
    return RAPTOR(grid=(C,)).probe(acts, acts.site, "behaviour")


def wrong(acts: Activations, probe) -> float:
    """The share of validation rows that a probe gets wrong."""
    rows, is_target, _ = labelled(acts.where(split="validation"), acts.site, "behaviour")
    return float(((probe.log_odds(rows) > 0) != is_target).double().mean())


def test_the_final_probe_is_fitted_on_all_training_rows():
    acts = overlapping()
    found = RAPTOR(grid=(0.1, 0.1)).probe(acts, acts.site, "behaviour", seed=3)
    expected = ridge_probe(*labelled(acts, acts.site, "behaviour"), 0.1)
    torch.testing.assert_close(found.weight, expected.weight)


def test_a_dimension_without_variation_is_left_alone():
    acts = overlapping()
    acts.values[acts.site][:, 2] = 8192.25
    part = RAPTOR().fit(acts)[acts.site]
    assert part.reads[0, 2] == 0 and part.reads[0].norm() == pytest.approx(1)


def test_sides_of_one_mean_are_refused():
    rows = draw(20, 3)
    with pytest.raises(InputError, match="one mean"):
        RAPTOR().fit(Activations.of_sides(rows, rows))


@pytest.mark.parametrize(
    "fields",
    [{"p": 0.0}, {"p": 1.0}, {"p": float("nan")}, {"grid": ()}, {"grid": (1.0, -1.0)}]
    + [{"holdout": 0.0}, {"holdout": 1.0}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        RAPTOR(**fields)
