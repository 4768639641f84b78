"""Spherical steering: the sheet's numbers, the sphere, the gate, and the part of the angle."""

import math

import pytest
import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.steerers.spherical import Sphere, SphericalSteering, gate


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def fit(source: Tensor, target: Tensor, **fields) -> Sphere:
    acts = Activations.of_sides(source, target, paired=False)
    return SphericalSteering(**fields).fit(acts)[acts.site]


def at(degrees: float) -> Tensor:
    """A row of norm 2 at an angle from the axis."""
    angle = math.radians(degrees)
    return torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)]])


def axis(**fields) -> Sphere:
    """A sphere about 0 with the axis (1, 0), as the authors have it."""
    return fit(-torch.eye(2)[:1], torch.eye(2)[:1] * 3, centred=False, **fields)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(120, [1.0, 1.7321]), (92, [0.8686, 1.8015]), (-120, [1.0, -1.7321])]
)
def test_a_row_moves_its_part_of_the_angle_at_its_norm(degrees, expected):
    moved = axis(alpha=0.5, beta=0.0)(at(degrees), torch.ones(1, 1))
    torch.testing.assert_close(moved, torch.tensor([expected]), rtol=0, atol=2e-4)


def test_a_row_that_has_the_behaviour_stays_bit_for_bit():
    part = axis(alpha=0.5, beta=0.0)
    assert torch.equal(part(at(88), torch.ones(1, 1)), at(88))
    # beta moves the bound: it fires below cos = -atanh(beta) / kappa
    for beta, bound in ((-0.15, 0.0076), (0.4, -0.0212)):
        cosine = torch.tensor([bound - 1e-3, bound + 1e-3])
        assert (gate(cosine, 20.0, beta) > 0).tolist() == [True, False]


def test_the_gate_is_a_softmax_of_both_directions():
    cosine = torch.linspace(-0.2, 0.2, 9)
    has, lacks = torch.softmax(20 * torch.stack([cosine, -cosine]), 0)
    torch.testing.assert_close(gate(cosine, 20.0, -1.0), (lacks - has + 1) / 2)


def test_strength_scales_the_part_and_never_passes_either_pole():
    part = axis(alpha=0.5, beta=0.0)
    for strength, degrees in {0.5: 90, 2.0: 0, 9.0: 0, -0.5: 150, -3.0: 180}.items():
        moved = part(at(120), torch.full((1, 1), strength))
        torch.testing.assert_close(moved, at(degrees), rtol=0, atol=1e-4)


def test_about_the_centre_distances_stay_and_rows_keep_to_their_arc():
    source, target = draw(40, 6) + 9, draw(60, 6, 1) + 9 + 2 * torch.eye(6)[2]
    part = fit(source, target, alpha=0.6, beta=-1.0, kappa=2.0)
    centre = (source.mean(0) + target.mean(0)) / 2
    torch.testing.assert_close(part.centres[0], centre)
    moved = part(source, torch.ones(40, 1))
    start, end, m = source - centre, moved - centre, part.axes[0]
    torch.testing.assert_close(end.norm(dim=1), start.norm(dim=1), rtol=1e-5, atol=0)
    # what is beside the axis keeps its direction
    across = [rows - (rows @ m).unsqueeze(1) * m for rows in (start, end)]
    cosine = torch.nn.functional.cosine_similarity(*across)
    torch.testing.assert_close(cosine, torch.ones(40), rtol=0, atol=1e-4)
    assert ((end - start) @ m > 1e-3).all()


@pytest.mark.parametrize("centred", [True, False])
def test_without_alpha_source_rows_reach_the_target_mean_along_the_difference(centred):
    shift = -3.0 if not centred else 50.0
    source, target = draw(50, 8) + shift, draw(70, 8, 1) + shift + 1
    part = fit(source, target, centred=centred)
    assert 0 < float(part.shares[0]) < 1
    moved = part(source, torch.ones(50, 1))
    m = part.axes[0]
    torch.testing.assert_close((moved @ m).mean(), (target @ m).mean(), rtol=0, atol=1e-3)


def test_where_the_gate_lets_too_few_through_alpha_is_one():
    # about 0, all cosines are positive: nothing fires
    source, target = 0.1 * draw(20, 3) + 5, 0.1 * draw(20, 3, 1) + 6
    acts = Activations.of_sides(source, target)
    method = SphericalSteering(centred=False)
    fitted = method.fit(acts)
    assert float(fitted[acts.site].shares[0]) == 1
    assert method.diagnose(acts, fitted) == {"fired": 0.0}
    assert SphericalSteering().diagnose(acts, SphericalSteering().fit(acts)) == {"fired": 1.0}


def test_a_row_right_opposite_goes_through_the_centre():
    moved = axis(alpha=0.5, beta=0.0)(torch.tensor([[-2.0, 0.0]]), torch.ones(1, 1))
    torch.testing.assert_close(moved, torch.zeros(1, 2), rtol=0, atol=1e-5)


def test_two_behaviours_move_the_same_row_each():
    parts = [
        Activations.of_sides(draw(20, 4, seed), draw(20, 4, seed + 1) + seed, behaviour=name)
        for name, seed in (("warm", 1), ("brief", 2))
    ]
    both = SphericalSteering().fit(Activations.together(parts))[parts[0].site]
    h, one = draw(6, 4, 9), torch.ones(6, 1)
    moves = [SphericalSteering().fit(part)[part.site](h, one) - h for part in parts]
    torch.testing.assert_close(both(h, torch.ones(6, 2)), h + sum(moves), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"alpha": 1.1}, {"alpha": float("nan")}, {"kappa": 0.0}, {"beta": 1.0}, {"beta": -1.1}],
    ids=str,
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        SphericalSteering(**fields)
