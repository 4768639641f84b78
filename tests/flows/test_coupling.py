"""Couplings against closed forms, the public implementations' outputs, and zuko."""

import json
import math

import pytest
import torch
import zuko.transforms
from safetensors.torch import load_file
from torch import nn

from innsteer.errors import InputError, UnknownName
from innsteer.flows import LU, AffineCoupling, Permute

F64 = torch.float64


class ByHand(nn.Module):
    """t = a^2 and raw = a."""

    def forward(self, a):
        return torch.cat([a**2, a], -1)


def test_the_hand_made_coupling_of_two_dimensions_has_its_closed_form_values():
    coupling = AffineCoupling(2).double()
    coupling.net = ByHand()
    h = torch.tensor([[0.5, 1.0]], dtype=F64)
    z, log_det = coupling.forward_log_det(h)
    assert z[0].tolist() == pytest.approx([0.5, 1.8374], abs=5e-5)
    assert log_det.item() == pytest.approx(0.4621, abs=5e-5)
    v = torch.tensor([[1.0, 0.0]], dtype=F64)
    assert coupling.inverse(z + v)[0].tolist() == pytest.approx([1.5, -0.1669], abs=5e-5)
    slope = (coupling.inverse(z + 0.01 * v) - h) / 0.01
    assert slope[0].tolist() == pytest.approx([1.0, -1.4110], abs=5e-5)
    jacobian = torch.func.jacrev(lambda r: coupling(r[None])[0])(h[0])
    assert torch.linalg.solve(jacobian, v[0]).tolist() == pytest.approx([1, -1.4164], abs=5e-5)


LOG_SCALES = {
    "nflows-default-d6": lambda u: (torch.sigmoid(u + 2) + 1e-3).log(),
    "nflows-exp-d6": lambda u: 0.9 * torch.tanh(u),
    "normflows-exp": lambda u: u,
    "normflows-sigmoid_inv": lambda u: torch.sigmoid(u + 2).log(),
}


@pytest.mark.parametrize("name", LOG_SCALES)
def test_outputs_of_nflows_and_normflows_are_reproduced(shared, name):
    folder = shared / "goldens" / "flow-coupling"
    known = {case["name"]: case for case in json.loads((folder / "case.json").read_text())["cases"]}
    tensors = load_file(folder / known[name]["file"])
    width, moved = 6, torch.arange(6) >= 3
    if "mask" in tensors:  # nflows: any set of coordinates, outputs [shift, scale]
        moved, order = tensors["mask"] > 0, torch.arange(6)
        x, z = tensors["x"], tensors["z"]
    else:  # normflows: halves given apart, outputs interleaved
        order = torch.cat([torch.arange(0, 6, 2), torch.arange(1, 6, 2)])
        x = torch.cat([tensors["z1"], tensors["z2"]], -1)
        z = torch.cat([tensors["z1"], tensors["z2_out"]], -1)
    coupling = AffineCoupling(width, hidden=10, log_scale=LOG_SCALES[name]).double()
    coupling.net.load_state_dict(
        {
            "0.weight": tensors["net.a.weight"],
            "0.bias": tensors["net.a.bias"],
            "2.weight": tensors["net.b.weight"][order],
            "2.bias": tensors["net.b.bias"][order],
        }
    )
    cut = torch.cat([torch.where(~moved)[0], torch.where(moved)[0]])
    ours, log_det = coupling.forward_log_det(x[:, cut])
    back = coupling.inverse(z[:, cut])
    torch.testing.assert_close(ours, z[:, cut], rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, tensors["logdet"], rtol=0, atol=1e-9)
    torch.testing.assert_close(back, x[:, cut], rtol=0, atol=1e-9)
    torch.testing.assert_close(
        back[:, 3:],
        tensors["x_back"][:, cut][:, 3:] if "mask" in tensors else tensors["x_back"],
        rtol=0,
        atol=1e-9,
    )


def randomised(flow):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return flow


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["bounded", "softclip"])
def test_zuko_with_the_same_conditioner_gives_the_same_rows_and_log_det(flip, kind):
    def clip(u):  # zuko's own bound, asymptotically |log(1e-3)|
        return u / (1 + (u / math.log(1e-3)).abs())

    scale = {"log_scale": clip} if kind == "softclip" else {"s_max": 0.75}
    coupling = randomised(AffineCoupling(5, hidden=6, flip=flip, **scale).double())

    def meta(a):
        shift, raw = coupling.net(a).chunk(2, -1)
        if kind == "softclip":
            inner = zuko.transforms.MonotonicAffineTransform(shift, raw)
        else:
            inner = zuko.transforms.AffineTransform(shift, (0.75 * raw.tanh()).exp())
        return zuko.transforms.DependentTransform(inner, 1)

    conditions = (torch.arange(5) >= 2) if flip else (torch.arange(5) < 2)
    oracle = zuko.transforms.CouplingTransform(meta, conditions)
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    z, log_det = coupling.forward_log_det(x)
    z_zuko, ladj = oracle.call_and_ladj(x)
    torch.testing.assert_close(z, z_zuko, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, ladj, rtol=0, atol=1e-12)
    torch.testing.assert_close(coupling.inverse(z), oracle.inv(z_zuko), rtol=0, atol=1e-12)


def test_zuko_agrees_on_permuted_and_triangular_maps():
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    permute = Permute(5, seed=3)
    assert torch.equal(permute(x), zuko.transforms.PermutationTransform(permute.order)(x))
    flow = randomised(LU(5, seed=3).double())
    lower = flow.packed.tril(-1) + torch.eye(5)
    upper = flow.log_diagonal.exp()[:, None] * (flow.packed.triu(1) + torch.eye(5))
    expected = x[:, flow.order] @ (lower @ upper).mT
    torch.testing.assert_close(flow(x), expected, rtol=0, atol=1e-12)
    assert flow.log_diagonal.abs().max() <= 1


@pytest.mark.parametrize("flip", [False, True])
def test_one_half_passes_and_the_other_moves(flip):
    coupling = randomised(AffineCoupling(5, split=2, hidden=6, flip=flip).double())
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    same = (coupling(x) == x).all(0)
    assert same.tolist() == ([False] * 2 + [True] * 3 if flip else [True] * 2 + [False] * 3)


@pytest.mark.parametrize("s_max", [0.75, 1.0])
def test_the_log_scale_stays_within_its_bound_for_huge_inputs(s_max):
    coupling = randomised(AffineCoupling(6, hidden=6, s_max=s_max).double())
    x = 1e12 * torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    jacobian = torch.stack([torch.func.jacrev(lambda r: coupling(r[None])[0])(row) for row in x])
    s = jacobian.diagonal(dim1=1, dim2=2).log()
    assert s.abs().max() <= s_max + 1e-12 and s.abs().max() > 0.99 * s_max


def test_an_additive_coupling_keeps_volume_and_needs_no_scale_outputs():
    coupling = randomised(AffineCoupling(6, hidden=6, additive=True).double())
    assert coupling.net[-1].out_features == 3
    assert coupling.forward_log_det(torch.ones(2, 6, dtype=F64))[1].tolist() == [0, 0]


def test_hidden_layers_differ_by_seed_and_spread_like_torch_linear():
    first, second = AffineCoupling(400, seed=0), AffineCoupling(400, seed=1)
    weight = first.net[0].weight.detach()
    assert not torch.equal(weight, second.net[0].weight)
    assert weight.abs().max() == pytest.approx(200**-0.5, rel=1e-2)
    assert not first.net[-1].weight.any() and not first.net[-1].bias.any()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"split": 0}, "cut at 0"),
        ({"split": 4}, "cut at 4"),
        ({"hidden": 0}, "hidden=0"),
        ({"depth": 0}, "depth=0"),
        ({"s_max": 0.0}, "s_max=0"),
        ({"s_max": math.nan}, "s_max=nan"),
    ],
)
def test_sizes_that_make_no_coupling_are_refused(fields, named):
    with pytest.raises(InputError, match=named):
        AffineCoupling(4, **fields)


def test_an_unknown_activation_is_named_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'relu'"):
        AffineCoupling(4, activation="rellu")
