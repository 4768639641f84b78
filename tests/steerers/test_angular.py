"""Angular steering: the sheet's and the official code's numbers, norms, and the planes."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.site import Site
from innsteer.steerers.angular import AngularSteering, Turn, common_plane, planes


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def turn(first: Tensor, second: Tensor, degrees: float, **fields) -> Turn:
    """A fitted turn of one behaviour."""
    part = Turn(len(first), **fields)
    part.firsts[0], part.seconds[0], part.angles[0] = first, second, math.radians(degrees)
    return part


def rays(*degrees: float) -> Tensor:
    """Unit rows of a plane."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def fit(source: Tensor, target: Tensor, **fields) -> Turn:
    acts = Activations.of_sides(source, target, paired=False)
    return AngularSteering(**fields).fit(acts)[acts.site]


def golden(shared) -> tuple[dict, dict[str, Tensor]]:
    folder = shared / "goldens" / "selective-steering"
    (case,) = json.loads((folder / "case.json").read_text(encoding="utf-8"))["cases"]
    return case, load_file(folder / case["file"])


@pytest.mark.parametrize(
    ("theta", "expected"), [(0, [5.0, 0, 5]), (90, [0.0, 5, 5]), (180, [-5.0, 0, 5])]
)
def test_every_row_lands_on_the_ray_at_theta(theta, expected):
    part = turn(torch.eye(3)[0], torch.eye(3)[1], theta, absolute=True)
    moved = part(torch.tensor([[3.0, 4, 5], [-4.0, 3, 5]]), torch.ones(2, 1))
    torch.testing.assert_close(moved, torch.tensor([expected] * 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["angular", "adaptive"])
@pytest.mark.parametrize("degrees", [0, 45, 90, 200])
def test_turned_rows_are_those_of_the_official_code(shared, name, degrees):
    _, data = golden(shared)
    part = turn(data["b1"], data["b2"], degrees, absolute=True, adaptive=name == "adaptive")
    moved = part(data["H"], torch.ones(len(data["H"]), 1))
    torch.testing.assert_close(moved, data[f"H_{name}_{degrees}"], rtol=0, atol=2e-4)


def test_the_common_plane_is_that_of_the_official_code(shared):
    _, data = golden(shared)
    first, component = common_plane(data["candidates"].double())
    second = torch.nn.functional.normalize(component - (component @ first) * first, dim=0)
    torch.testing.assert_close(first.float(), data["b1"], rtol=0, atol=1e-4)
    second = second.float() * torch.sign(second.float() @ data["b2"])  # its sign is arbitrary
    torch.testing.assert_close(second, data["b2"], rtol=0, atol=1e-4)


def test_norms_stay_at_every_strength_and_what_is_outside_the_plane():
    part = fit(draw(40, 6) + 3, draw(40, 6, 1) + 4 * torch.eye(6)[0], theta=30.0)
    h = 5 * draw(9, 6, 2)
    across = torch.eye(6) - part.firsts.mT @ part.firsts - part.seconds.mT @ part.seconds
    for strength in (-1.0, 0.3, 1.0, 1.7):
        moved = part(h, torch.full((9, 1), strength))
        torch.testing.assert_close(moved.norm(dim=1), h.norm(dim=1), rtol=1e-6, atol=0)
        torch.testing.assert_close(moved @ across, h @ across, rtol=0, atol=1e-5)
    assert (part(h, torch.ones(9, 1)) - h).norm(dim=1).min() > 0.1


def test_strength_is_the_share_of_the_shorter_way_round():
    part = turn(torch.eye(2)[0], torch.eye(2)[1], 170, absolute=True)
    for strength, angles in {1.0: [170, 170], 0.5: [130, -170], -1.0: [10, -110]}.items():
        moved = part(rays(90, -150), torch.full((2, 1), strength))
        torch.testing.assert_close(moved, rays(*angles), rtol=0, atol=1e-6)


def test_adaptive_leaves_rows_on_the_other_side():
    part = turn(torch.eye(2)[0], torch.eye(2)[1], 90, absolute=True, adaptive=True)
    h = torch.tensor([[3.0, 4.0], [-3.0, 4.0]])
    expected = torch.tensor([[0.0, 5.0], [-3.0, 4.0]])
    torch.testing.assert_close(part(h, torch.ones(2, 1)), expected, rtol=0, atol=1e-5)


def test_without_theta_source_rows_reach_the_target_along_the_difference():
    source, target = draw(50, 8) + 6, draw(70, 8, 1) + 6 + 3 * torch.eye(8)[0]
    part = fit(source, target)
    moved = part(source, torch.ones(50, 1))
    gap = target.mean(0) - source.mean(0)
    torch.testing.assert_close(moved.mean(0) @ gap, target.mean(0) @ gap, rtol=1e-5, atol=0)
    # the plane holds both means
    inside = part.firsts.mT @ part.firsts + part.seconds.mT @ part.seconds
    for side in (source, target):
        torch.testing.assert_close(side.mean(0) @ inside, side.mean(0), rtol=0, atol=1e-4)


def test_where_norms_do_not_suffice_the_angle_is_that_of_the_difference():
    source, target = 0.1 * draw(20, 4) + torch.eye(4)[1], torch.eye(4)[:1].expand(20, 4) * 50
    assert float(fit(source, target).angles[0]) == 0.0


def several(*shifts: Tensor) -> Activations:
    """Sites whose means differ by the given vectors."""
    base = Activations.of_sides(draw(30, 1), draw(30, 1))
    values = {
        Site(n): torch.cat([draw(30, len(shift), 2) + 1, draw(30, len(shift), 3) + 1 + shift])
        for n, shift in enumerate(shifts)
    }
    return Activations(values, base.rows, base.behaviours)


def test_sites_share_the_authors_plane_or_have_their_own():
    shifts = [torch.tensor(shift) for shift in ([9.0, 0, 0, 0], [8.0, 6, 0, 0], [6.0, 9, 1, 0])]
    acts = several(*shifts)
    shared = planes(acts, "behaviour", "sites")
    assert all(torch.equal(shared[site][n], shared[Site(0)][n]) for site in shared for n in (0, 1))
    own = planes(acts, "behaviour", "means")
    torch.testing.assert_close(shared[Site(0)][0], own[Site(1)][0])  # the one in the middle
    assert (own[Site(0)][0] - own[Site(1)][0]).norm() > 0.1
    for first, second in [*shared.values(), *own.values()]:
        basis = torch.stack([first, second])
        torch.testing.assert_close(basis @ basis.mT, torch.eye(2).double())
    mean = sum(part.double().mean(0) for part in acts.values.values())
    assert float(mean @ shared[Site(0)][1]) > 0


def test_in_a_shared_plane_each_site_turns_on_its_own_side_of_the_difference():
    shifts = [torch.tensor(shift) for shift in ([9.0, 0, 0, 0], [8.0, 6, 0, 0], [6.0, 9, 1, 0])]
    acts = several(*shifts)
    second = planes(acts, "behaviour", "sites")[Site(0)][1].float()
    for site, far in zip(acts.sites, (60, 60, -60), strict=True):
        acts.values[site] = acts.values[site] + far * second
    fitted = AngularSteering(plane="sites").fit(acts)
    for site, part in fitted.items():
        source, _ = acts.sides(site)
        moved = part(source, torch.ones(30, 1))
        assert (source.mean(0) @ part.seconds[0]).sign() == part.angles[0].sign()
        assert float((moved @ part.seconds[0]).mean() / (source @ part.seconds[0]).mean()) > 0.5
    assert fitted[Site(0)].angles[0] * fitted[Site(2)].angles[0] < 0


def test_the_plane_of_sites_is_of_one_width():
    shifts = torch.tensor([9.0, 0, 0]), torch.tensor([8.0, 6, 0]), torch.ones(5), torch.arange(5.0)
    found = planes(several(*shifts), "behaviour", "sites")
    assert [len(found[site][0]) for site in found] == [3, 3, 5, 5]


@pytest.mark.parametrize(
    ("source", "target", "plane"),
    [
        (torch.zeros(3, 2), torch.ones(3, 2), "means"),  # on one line through 0
        (torch.ones(3, 2), torch.ones(3, 2), "means"),  # no difference
        (torch.ones(3, 2), torch.eye(2)[:1].expand(3, 2), "sites"),  # one site
    ],
)
def test_without_a_plane_a_fit_is_refused(source, target, plane):
    with pytest.raises(InputError, match="no plane"):
        fit(source, target, plane=plane)


def test_fields_out_of_range_are_refused():
    with pytest.raises(InputError, match="theta"):
        AngularSteering(theta=float("nan"))
    with pytest.raises(UnknownName, match="means"):
        AngularSteering(plane="mine")
