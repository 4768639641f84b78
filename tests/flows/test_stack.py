"""The stack starts as the identity; normalisation, mixing and subspaces do what they say."""

import math

import pytest
import torch

from innsteer.errors import InputError, UnknownName
from innsteer.flows import (
    LU,
    ActNorm,
    AffineCoupling,
    Chain,
    Householder,
    Permute,
    Reverse,
    Standardise,
    Subspace,
    coupling_stack,
)
from innsteer.flows.stack import MIXINGS

F64 = torch.float64


def rows(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("width", [2, 5, 8, 31])
@pytest.mark.parametrize("couplings", [1, 2, 3, 4, 7])
def test_a_fresh_stack_is_the_identity(mixing, width, couplings):
    flow = coupling_stack(width, couplings=couplings, hidden=4, mixing=mixing)
    x = rows(6, width).float() * 100
    z, log_det = flow.forward_log_det(x)
    assert torch.equal(log_det, torch.zeros(6))
    if mixing == "householder" and couplings > 2:
        torch.testing.assert_close(z, x, rtol=1e-5, atol=1e-3)
    else:
        assert torch.equal(z, x) and torch.equal(flow.inverse(x), x)


@pytest.mark.parametrize("mixing", ["permute", "householder", "lu"])
def test_pairs_after_the_first_see_mixed_coordinates(mixing):
    flow = coupling_stack(8, hidden=4, mixing=mixing, actnorm=False)
    x = rows(3, 8).float()
    kinds = [type(part).__name__ for part in flow.parts]
    assert [kind == "AffineCoupling" for kind in kinds] == [True] * 2 + [False] + [True] * 2 + [
        False
    ]
    assert not torch.allclose(flow.parts[2](x), x, atol=1e-2)


def test_every_pair_of_couplings_moves_every_coordinate_once():
    flow = coupling_stack(5, couplings=2, hidden=8, actnorm=False)
    with torch.no_grad():
        for part in flow.parts:
            part.net[-1].bias.fill_(1.0)
    assert (flow(torch.zeros(1, 5)) != 0).all()


def test_the_seed_decides_weights_and_every_coupling_has_its_own():
    one, same, other = (coupling_stack(6, hidden=4, seed=s) for s in (0, 0, 1))
    weights = [
        [p.net[0].weight for p in f.parts if isinstance(p, AffineCoupling)]
        for f in (one, same, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not torch.equal(weights[0][0], weights[2][0])
    assert not torch.equal(weights[0][0], weights[0][2])


def test_initialise_standardises_what_each_actnorm_puts_out():
    flow = coupling_stack(6, hidden=4).double()
    z = flow.initialise(rows(50, 6) * 3 + 2)
    torch.testing.assert_close(z.mean(0), torch.zeros(6, dtype=F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(6, dtype=F64))


def test_initialise_barely_moves_a_stack_on_standardised_rows():
    x = rows(200, 6)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    flow = coupling_stack(6, hidden=4).double()
    torch.testing.assert_close(flow.initialise(x), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("spread", "gain"), [(1e9, -1.9), (1e-9, 1.9), (0.0, 1.9)])
def test_actnorm_gain_is_bounded_and_still_has_a_gradient(spread, gain):
    flow = ActNorm(2).double()
    flow.initialise(rows(9, 2) * spread)
    assert flow.log_gain.tolist() == pytest.approx([gain, gain])
    flow.forward_log_det(rows(3, 2))[1].sum().backward()
    assert flow.raw_gain.grad.abs().min() > 0.05
    with torch.no_grad():
        flow.raw_gain.fill_(1e6)
    assert flow.log_gain.abs().max() <= 2


def test_standardise_keeps_digits_of_a_small_spread_on_a_massive_mean():
    x = rows(1000, 3) * torch.tensor([1e-3, 5.0, 70.0]) + torch.tensor([0.0, 100.0, 1e4])
    flow = Standardise(3)
    flow.initialise(x.float())
    z = flow.double()(x.float().double())
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3, dtype=F64), rtol=1e-4, atol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=F64), rtol=0, atol=1e-4)


def test_a_dead_dimension_meets_the_floor():
    flow = Standardise(2)
    flow.initialise(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
    assert flow.std.tolist() == pytest.approx([1.0, 1e-6])
    assert flow(torch.tensor([[2.0, 8.0]])).isfinite().all()


def test_the_fixed_log_det_is_the_share_of_standardising_alone():
    basis = torch.linalg.qr(rows(5, 3))[0]
    inner = Chain([Reverse(3), Standardise(3), coupling_stack(3, hidden=4)])
    flow = Subspace(inner.double(), basis)
    flow.initialise(rows(30, 5) * 10)
    std = inner.parts[1].std
    assert float(flow.fixed_log_det) == pytest.approx(-float(std.log().sum()))
    assert float(flow.fixed_log_det) < -3
    free = flow.forward_log_det(rows(4, 5))[1] - flow.fixed_log_det
    torch.testing.assert_close(free, torch.zeros(4, dtype=F64), rtol=0, atol=1e-9)
    assert float(ActNorm(3).fixed_log_det) == 0


@pytest.mark.parametrize("kind", [Permute, Householder, LU])
def test_back_undoes_a_fresh_mixing(kind):
    flow = kind(9, seed=4).double()
    x = rows(4, 9)
    assert not torch.allclose(flow(x), x, atol=1e-3)
    torch.testing.assert_close(flow.back().double()(flow(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_householder_is_the_product_of_its_reflections_and_orthogonal(k):
    flow = Householder(7, reflections=k, seed=2).double()
    with torch.no_grad():
        flow.vectors.mul_(torch.arange(1, k + 1)[:, None])  # lengths must not matter
    product = torch.eye(7, dtype=F64)
    for v in flow.vectors.detach():
        product = product @ (torch.eye(7, dtype=F64) - 2 * torch.outer(v, v) / v.dot(v))
    matrix = flow(torch.eye(7, dtype=F64)).detach()
    torch.testing.assert_close(matrix, product, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(7, dtype=F64), rtol=0, atol=1e-12)


def subspace(width=9, k=4):
    inner = coupling_stack(k, hidden=8).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=F64))
    return Subspace(inner, torch.linalg.qr(rows(width, k, seed=8))[0])


def test_the_orthogonal_complement_of_a_subspace_passes_untouched():
    flow, x = subspace(), rows(20, 9)
    rest = torch.eye(9, dtype=F64) - flow.basis @ flow.basis.T
    for way in (flow.forward, flow.inverse):
        moved = way(x) - x
        assert moved.norm(dim=-1).min() > 0.1
        assert (moved @ rest).abs().max() < 1e-12
    torch.testing.assert_close(flow(x) @ flow.basis, flow.inner(x @ flow.basis))


def test_a_subspace_along_the_axes_leaves_other_coordinates_bit_for_bit():
    flow, x = Subspace(subspace().inner, torch.eye(9, 4, dtype=F64)), rows(20, 9)
    assert torch.equal(flow(x)[:, 4:], x[:, 4:])
    assert torch.equal(flow.inverse(x)[:, 4:], x[:, 4:])


@pytest.mark.parametrize(
    ("basis", "named"),
    [
        (torch.ones(5, 2), "not orthonormal"),
        (torch.eye(5, 2) * 1.001, "not orthonormal"),
        (torch.eye(5, 2) * math.nan, "not orthonormal"),
        (torch.eye(5, 3), r"shape \(5, 3\) for an inner flow of width 2"),
        (torch.eye(1, 2), r"shape \(1, 2\)"),
        (torch.eye(5)[0], r"shape \(5,\)"),
    ],
)
def test_a_basis_that_is_not_orthonormal_is_refused(basis, named):
    with pytest.raises(InputError, match=named):
        Subspace(Reverse(2), basis)


@pytest.mark.parametrize("flow", [Standardise(2), ActNorm(2), coupling_stack(2, hidden=2)])
@pytest.mark.parametrize(
    ("x", "named"),
    [
        (torch.zeros(4, 3), r"shape \(4, 3\)"),
        (torch.zeros(2), r"shape \(2,\)"),
        (torch.zeros(1, 2), "1 rows"),
        (torch.tensor([[0.0, 1.0], [math.inf, 0.0], [math.nan, 1.0]]), "2 of 3 rows hold NaN"),
    ],
)
def test_rows_without_a_mean_and_spread_are_refused(flow, x, named):
    with pytest.raises(InputError, match=named):
        flow.initialise(x)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Chain([]), "widths"),
        (lambda: Chain([Reverse(2), Reverse(3)]), r"widths \[2, 3\]"),
        (lambda: Reverse(0), "width 0"),
        (lambda: ActNorm(2, bound=0.0), "bound 0"),
        (lambda: LU(2, bound=-1.0), "bound -1"),
        (lambda: Householder(2, reflections=0), "0 reflections"),
        (lambda: coupling_stack(4, couplings=0), "0 couplings"),
        (lambda: coupling_stack(1), "width 1"),
        (lambda: Subspace(Reverse(1), torch.eye(3, 1)).initialise(torch.zeros(2, 2)), "shape"),
    ],
)
def test_sizes_out_of_range_are_refused(make, named):
    with pytest.raises(InputError, match=named):
        make()


def test_an_unknown_mixing_is_named_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'permute'"):
        coupling_stack(4, mixing="permutation")


@pytest.mark.parametrize("flow", [Permute(5, seed=1), LU(5, seed=1)])
def test_the_order_is_saved_and_not_drawn_anew(flow):
    assert flow.state_dict()["order"].tolist() == flow.order.tolist() != list(range(5))
