"""Selective steering: the sheet's and the official code's numbers, and which layers are turned."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from innsteer.activations import Activations, Rows
from innsteer.errors import InputError, UnknownName
from innsteer.site import Site
from innsteer.steerers.angular import Turn, planes
from innsteer.steerers.selective import SelectiveSteering, discriminative

STREAMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def turn(first: Tensor, second: Tensor, degrees: float) -> Turn:
    """A fitted turn of one behaviour."""
    part = Turn(len(first))
    part.firsts[0], part.seconds[0], part.angles[0] = first, second, math.radians(degrees)
    return part


def golden(shared) -> tuple[dict[str, Tensor], Activations]:
    """The official code's numbers, and its rows as a recording."""
    folder = shared / "goldens" / "selective-steering"
    (case,) = json.loads((folder / "case.json").read_text(encoding="utf-8"))["cases"]
    data, values = load_file(folder / case["file"]), {}
    for module in case["params"]["modules"]:
        _, _, layer, norm = module.split(".")
        sides = data[f"neg_{module}"], data[f"pos_{module}"]
        values[Site(int(layer), STREAMS[norm])] = torch.cat(sides)
    counts = {"source": len(sides[0]), "target": len(sides[1])}
    records = [
        {"behaviour": "b", "item": f"{side}-{i}", "side": side}
        for side, count in counts.items()
        for i in range(count)
    ]
    return data, Activations(values, Rows.of(records), ("b",))


@pytest.mark.parametrize(
    ("theta", "expected"),
    [(0, [3.0, 4, 5]), (90, [-4.0, 3, 5]), (180, [-3.0, -4, 5])],
)
def test_a_row_turns_by_theta(theta, expected):
    part = turn(torch.eye(3)[0], torch.eye(3)[1], theta)
    moved = part(torch.tensor([[3.0, 4.0, 5.0]]), torch.ones(1, 1))
    torch.testing.assert_close(moved, torch.tensor([expected]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [0, 45, 90, 200])
def test_turned_rows_are_those_of_the_official_code(shared, degrees):
    data, _ = golden(shared)
    moved = turn(data["b1"], data["b2"], degrees)(data["H"], torch.ones(len(data["H"]), 1))
    torch.testing.assert_close(moved, data[f"H_selective_{degrees}"], rtol=0, atol=2e-4)


def test_plane_and_layers_are_those_of_the_official_code(shared):
    data, acts = golden(shared)
    found = planes(acts, "b", "sites")
    first, second = found[acts.sites[0]]
    torch.testing.assert_close(first.float(), data["b1"], rtol=0, atol=1e-4)
    second = second.float() * torch.sign(second.float() @ data["b2"])  # its sign is arbitrary
    torch.testing.assert_close(second, data["b2"], rtol=0, atol=1e-4)
    chosen = discriminative(acts, "b", {site: plane[0] for site, plane in found.items()}, 0.0)
    expected = {site for site, kept in zip(acts.sites, data["mask"], strict=True) if kept}
    assert chosen == expected and 0 < len(chosen) < len(acts.sites)
    method = SelectiveSteering(plane="sites", theta=45.0)
    fitted = method.fit(acts)
    turned = {site for site, part in fitted.items() if part.angles.any()}
    assert turned == expected
    assert method.diagnose(acts, fitted)["discriminative"] == len(expected) / len(acts.sites)


def test_turns_add_and_minus_s_undoes_s_at_the_same_norm():
    acts = Activations.of_sides(draw(40, 6) + 3, draw(40, 6, 1) + 4)
    part, h = SelectiveSteering(theta=70.0).fit(acts)[acts.site], 5 * draw(9, 6, 2)
    assert float(part.angles[0]) == pytest.approx(math.radians(70))
    one = torch.ones(9, 1)
    torch.testing.assert_close(part(part(h, 0.4 * one), 0.9 * one), part(h, 1.3 * one))
    torch.testing.assert_close(part(part(h, one), -one), h, rtol=0, atol=1e-5)
    torch.testing.assert_close(part(h, one).norm(dim=1), h.norm(dim=1))
    assert (part(h, one) - h).norm(dim=1).min() > 0.1


def test_without_theta_the_source_mean_reaches_the_target_along_the_difference():
    source, target = draw(50, 8) + 6, draw(50, 8, 1) + 6 + 3 * torch.eye(8)[0]
    acts = Activations.of_sides(source, target)
    moved = SelectiveSteering().fit(acts)[acts.site](source, torch.ones(50, 1)).mean(0)
    gap = target.mean(0) - source.mean(0)
    torch.testing.assert_close(moved @ gap, target.mean(0) @ gap, rtol=1e-5, atol=0)


def layers(*middles: float) -> Activations:
    """A residual and an mlp site per layer; middles shift both sides along their difference."""
    base = Activations.of_sides(draw(30, 1), draw(30, 1))
    ahead = 2 * torch.eye(4)[0]
    values = {}
    for n, middle in enumerate(middles):
        for stream, extra in (("residual", 0.0), ("mlp", middle)):
            rows = 0.3 * draw(60, 4, n) + torch.eye(4)[1] + extra * ahead
            values[Site(n, stream)] = (
                rows + torch.cat([-ahead, ahead]).reshape(2, 4)[torch.arange(60) // 30]
            )
    return Activations(values, base.rows, base.behaviours)


def turned(acts: Activations, **fields) -> set[str]:
    fitted = SelectiveSteering(theta=30.0, **fields).fit(acts)
    return {str(site) for site, part in fitted.items() if part.angles.any()}


def test_a_layer_is_turned_when_all_of_its_sites_lie_opposite():
    assert turned(layers(0.0, 2.0)) == {"0.mlp", "0.residual"}
    assert turned(layers(0.8, 0.0), margin=0.5) == {"1.mlp", "1.residual"}


def test_sides_lie_opposite_by_the_direction_of_their_rows_and_either_way_round():
    source, target = torch.tensor([[-1.0], [-1.0], [-1.0], [9.0]]), torch.ones(4, 1)
    acts = Activations.of_sides(source, target)
    for first, margin in ((1.0, 0.0), (-1.0, 0.0), (1.0, 0.4)):
        assert discriminative(
            acts, "behaviour", {acts.site: torch.full((1,), first).double()}, margin
        )
    assert not discriminative(acts, "behaviour", {acts.site: torch.ones(1).double()}, 0.6)


def test_where_no_layer_is_discriminative_all_are_turned():
    acts = layers(2.0, 3.0)
    assert turned(acts) == {str(site) for site in acts.sites}
    method = SelectiveSteering(theta=30.0)
    assert method.diagnose(acts, method.fit(acts)) == {"discriminative": 0.0}


def test_fields_out_of_range_are_refused():
    with pytest.raises(InputError, match="margin"):
        SelectiveSteering(margin=-0.1)
    with pytest.raises(InputError, match="theta"):
        SelectiveSteering(theta=float("inf"))
    with pytest.raises(UnknownName, match="means"):
        SelectiveSteering(plane="mine")
