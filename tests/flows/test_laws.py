"""Laws that hold for every flow, over one list of them."""

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save

from innsteer.flows import (
    LU,
    ActNorm,
    AffineCoupling,
    Chain,
    Flow,
    Householder,
    Permute,
    Reverse,
    Standardise,
    Subspace,
    coupling_stack,
)

WIDTH = 7  # odd on purpose: the halves of a coupling differ


def _basis() -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(WIDTH, 4, generator=draw, dtype=torch.float64))[0]


FLOWS: dict[str, Callable[[], Flow]] = {
    "standardise": lambda: Standardise(WIDTH),
    "actnorm": lambda: ActNorm(WIDTH),
    "coupling": lambda: AffineCoupling(WIDTH, hidden=8),
    "coupling-flip": lambda: AffineCoupling(WIDTH, hidden=8, flip=True, s_max=0.75),
    "coupling-split": lambda: AffineCoupling(WIDTH, hidden=8, split=5, depth=2, activation="tanh"),
    "coupling-exp": lambda: AffineCoupling(WIDTH, hidden=8, activation="gelu", log_scale=torch.sin),
    "coupling-additive": lambda: AffineCoupling(WIDTH, hidden=8, additive=True),
    "reverse": lambda: Reverse(WIDTH),
    "permute": lambda: Permute(WIDTH, seed=1),
    "householder": lambda: Householder(WIDTH, reflections=3),
    "lu": lambda: LU(WIDTH),
    "subspace": lambda: Subspace(coupling_stack(4, hidden=8), _basis()),
    "chain": lambda: Chain([Standardise(WIDTH), ActNorm(WIDTH), LU(WIDTH), Reverse(WIDTH)]),
    "stack": lambda: coupling_stack(WIDTH, hidden=8),
    "stack-alternate": lambda: coupling_stack(WIDTH, hidden=8, mixing="alternate", couplings=3),
    "stack-householder": lambda: coupling_stack(WIDTH, hidden=8, mixing="householder"),
    "stack-lu": lambda: coupling_stack(WIDTH, hidden=8, mixing="lu", couplings=5, actnorm=False),
}
every_flow = pytest.mark.parametrize("name", FLOWS)
# dimensions of very different spread, as in a residual stream
SPREAD = torch.logspace(-1, 2, WIDTH, dtype=torch.float64)


def rows(n: int = 5, *, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=draw, dtype=torch.float64)


def trained(name: str, *, noise: float = 0.3, spread: torch.Tensor = SPREAD) -> Flow:
    """A flow in float64, initialised and with every parameter moved off its start."""
    flow = FLOWS[name]().double()
    flow.initialise(rows(40, seed=1) * spread + 3)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in flow.parameters():
            step = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
            parameter.add_(noise * step)
    return flow


@every_flow
def test_inverse_undoes_forward_and_forward_undoes_inverse(name):
    flow, x = trained(name), rows()
    with torch.inference_mode():
        assert (flow(x) - x).abs().max() > 1e-3  # there is something to undo
        torch.testing.assert_close(flow.inverse(flow(x)), x, rtol=0, atol=1e-10)
        torch.testing.assert_close(flow(flow.inverse(x)), x, rtol=0, atol=1e-10)


@every_flow
def test_log_det_is_that_of_the_autograd_jacobian(name):
    flow, x = trained(name), rows()
    z, log_det = flow.forward_log_det(x)
    jacobian = torch.stack([torch.func.jacrev(lambda r: flow(r[None])[0])(row) for row in x])
    torch.testing.assert_close(z, flow(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-9)


@every_flow
@pytest.mark.parametrize("way", ["forward_log_det", "inverse"])
def test_gradients_reach_every_parameter(name, way):
    flow = trained(name)
    z = flow.forward_log_det(rows())
    loss = z[0].square().sum() + z[1].sum() if way == "forward_log_det" else None
    loss = flow.inverse(rows()).pow(3).sum() if loss is None else loss
    if not list(flow.parameters()):
        return
    loss.backward()
    for key, parameter in flow.named_parameters():
        if "vectors" in key and way == "forward_log_det" and name == "householder":
            continue  # a rotation changes neither ||z||^2 nor the log-determinant
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@every_flow
def test_gradients_of_the_inverse_agree_with_finite_differences(name):
    flow, z = trained(name), rows(2).requires_grad_()
    assert torch.autograd.gradcheck(flow.inverse, z)
    for parameter in flow.parameters():

        def of_parameter(_, p=parameter):
            return flow.inverse(z.detach())

        assert torch.autograd.gradcheck(of_parameter, parameter, fast_mode=True)


@every_flow
def test_weights_survive_saving_and_loading(name):
    flow, x = trained(name), rows()
    empty = FLOWS[name]().double()
    with torch.no_grad():  # so that nothing agrees by construction
        for tensor in empty.state_dict().values():
            tensor.copy_(tensor.flip(0) if tensor.dtype == torch.int64 else tensor + 1)
    assert not torch.equal(empty(x), flow(x)) or not flow.state_dict()
    empty.load_state_dict(load(save(flow.state_dict())))
    assert torch.equal(empty(x), flow(x)) and torch.equal(empty.inverse(x), flow.inverse(x))
    assert torch.equal(empty.forward_log_det(x)[1], flow.forward_log_det(x)[1])


@every_flow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_without_a_graph_break_and_keeps_the_dtype(name, dtype):
    torch.compiler.reset()
    flow, x = trained(name).to(dtype), rows().to(dtype)
    for method in (flow.forward, flow.inverse, lambda x: flow.forward_log_det(x)[1]):
        with torch.inference_mode():
            plain = method(x)
            quick = torch.compile(method, fullgraph=True, backend="eager")(x)
        assert plain.dtype == quick.dtype == dtype and len(plain) == len(x)
        torch.testing.assert_close(quick, plain)


@every_flow
def test_float32_round_trip_is_within_1e_5_of_the_row(name):
    # as in use: rows like those of the start, weights of a trained size
    flow = trained(name, noise=0.1, spread=torch.ones(WIDTH)).float()
    x = rows(64).float() + 3
    with torch.inference_mode():
        error = (flow.inverse(flow(x)) - x).norm(dim=-1) / x.norm(dim=-1)
    assert error.max() < 1e-5


@every_flow
def test_a_row_does_not_depend_on_its_neighbours_and_none_is_fine(name):
    flow, x = trained(name), rows()
    with torch.inference_mode():
        for way in (flow.forward, flow.inverse):
            alone = torch.cat([way(row[None]) for row in x])
            torch.testing.assert_close(way(x), alone, rtol=0, atol=1e-12)
            assert way(x[:0]).shape == (0, WIDTH)
        assert flow.forward_log_det(x[:0])[1].shape == (0,)


@every_flow
def test_nothing_happens_in_place(name):
    flow, x = trained(name), rows()
    before, state = x.clone(), copy.deepcopy(flow.state_dict())
    with torch.inference_mode():
        flow(x), flow.inverse(x), flow.forward_log_det(x)
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[key]) for key, value in flow.state_dict().items())


@every_flow
def test_initialise_returns_forward_and_leaves_no_graph(name):
    flow, x = FLOWS[name]().double(), rows(20) * SPREAD
    z = flow.initialise(x)
    assert not z.requires_grad
    torch.testing.assert_close(z, flow(x).detach(), rtol=0, atol=1e-12)


@every_flow
def test_construction_is_seeded_and_leaves_the_global_generator_alone(name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = FLOWS[name](), FLOWS[name]()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@every_flow
def test_huge_inputs_stay_finite_and_come_back(name):
    flow, x = trained(name), rows() * 1e8
    with torch.inference_mode():
        z, log_det = flow.forward_log_det(x)
        back = flow.inverse(z)
    assert z.isfinite().all() and log_det.isfinite().all()
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10 * float(x.abs().max()))
