"""Latent steps: flows of their own in strength, whatever their weights."""

import pytest
import torch

from innsteer.errors import InputError
from innsteer.flows import Shear, Step, Translation

WIDTH = 6
SIZES = {"write": (1, 2, 5), "k": (1, 3), "units": (1, 4)}


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def moved_off(step: Step) -> Step:
    """The step in float64, every parameter away from its start."""
    step = step.double()
    with torch.no_grad():
        for number, parameter in enumerate(step.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=number + 1))
    return step


STEPS = {
    "translation": (lambda: Translation(WIDTH), 1),
    "translation-2": (lambda: Translation(WIDTH, 2), 2),
} | {
    f"shear-{write}-{k}-{units}": (lambda w=write, k=k, u=units: Shear(WIDTH, w, k, u), k)
    for write in SIZES["write"]
    for k in SIZES["k"]
    for units in SIZES["units"]
}
every_step = pytest.mark.parametrize("name", STEPS)


def made(name: str) -> tuple[Step, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step, latent rows, and two strengths for each of them."""
    build, k = STEPS[name]
    return moved_off(build()), draw(7, WIDTH), draw(7, k, seed=8), draw(7, k, seed=9)


@every_step
@torch.no_grad()
def test_two_steps_are_one_of_summed_strengths(name):
    step, z, a, b = made(name)
    assert (step(z, a) - z).abs().max() > 1e-2  # it does move them
    torch.testing.assert_close(step(step(z, a), b), step(z, a + b), rtol=0, atol=1e-12)


@every_step
@torch.no_grad()
def test_the_negative_strength_undoes_and_no_strength_is_nothing(name):
    step, z, a, _ = made(name)
    torch.testing.assert_close(step(step(z, a), -a), z, rtol=0, atol=1e-12)
    assert torch.equal(step(z, torch.zeros_like(a)), z)


@every_step
@torch.no_grad()
def test_each_behaviour_has_a_strength_of_its_own_and_they_add(name):
    step, z, a, _ = made(name)
    parts = [a * one for one in torch.eye(a.shape[1], dtype=a.dtype)]
    whole = sum(step(z, part) - z for part in parts)
    torch.testing.assert_close(step(z, a) - z, whole, rtol=0, atol=1e-12)
    assert all((step(z, part) - z).abs().max() > 1e-3 for part in parts)


@every_step
def test_the_jacobian_has_determinant_1(name):
    step, z, a, _ = made(name)
    for row, coef in zip(z, a, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda r, coef=coef: step(r[None], coef[None])[0], row
        )
        sign, log_det = torch.linalg.slogdet(jacobian)
        assert sign == 1 and abs(float(log_det)) < 1e-12


@every_step
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours_and_none_is_fine(name):
    step, z, a, _ = made(name)
    alone = torch.cat([step(z[i : i + 1], a[i : i + 1]) for i in range(len(z))])
    torch.testing.assert_close(step(z, a), alone, rtol=0, atol=1e-12)
    assert step(z[:0], a[:0]).shape == (0, WIDTH)


@every_step
def test_it_compiles_without_a_graph_break(name):
    step, z, a, _ = made(name)
    torch.compiler.reset()
    with torch.inference_mode():
        quick = torch.compile(step, fullgraph=True, backend="eager")(z, a)
        torch.testing.assert_close(quick, step(z, a), rtol=0, atol=1e-12)


@every_step
def test_a_fresh_step_moves_nothing(name):
    build, k = STEPS[name]
    z = draw(7, WIDTH).float()
    with torch.no_grad():
        assert torch.equal(build()(z, torch.ones(7, k)), z)


@every_step
def test_gradients_reach_every_parameter(name):
    step, z, a, _ = made(name)
    step(z, a).pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in step.parameters())


@torch.no_grad()
def test_a_translation_moves_every_row_alike():
    step, z, a, _ = made("translation-2")
    torch.testing.assert_close(step(z, a), z + a @ step.shifts, rtol=0, atol=0)


@pytest.mark.parametrize("write", SIZES["write"])
@torch.no_grad()
def test_a_shear_reads_nothing_that_it_writes_and_writes_nothing_that_it_reads(write):
    step = moved_off(Shear(WIDTH, write, 2, 3))
    z, coef = draw(7, WIDTH), draw(7, 2, seed=8)
    other = z.clone()
    other[:, :write] += draw(7, write, seed=3, scale=100)
    edits = [step(rows, coef) - rows for rows in (z, other)]
    torch.testing.assert_close(edits[0], edits[1], rtol=0, atol=1e-12)
    assert torch.equal(step(z, coef)[:, write:], z[:, write:])
    other = z.clone()
    other[:, -1] += 1  # what is read does count
    assert (step(other, coef) - other - edits[0]).abs().max() > 1e-3


@torch.no_grad()
def test_a_shear_moves_no_row_farther_than_its_write_vectors_are_long():
    step = moved_off(Shear(WIDTH, 2, 2, 3))
    far = draw(200, WIDTH, scale=1e6)
    coef = draw(200, 2, seed=8)
    length = (step(far, coef) - far).norm(dim=-1)
    bound = (coef.abs() * step.write.norm(dim=-1).sum(-1)).sum(-1)
    assert (length <= bound + 1e-9 * far.norm(dim=-1)).all()
    assert (step.reads(far[:, 2:]).abs() <= 1).all() and step.reads(far[:, 2:]).abs().max() > 0.9
    assert ((step.openness(far[:, 2:]) >= 0) & (step.openness(far[:, 2:]) <= 1)).all()


@torch.no_grad()
def test_a_shear_has_the_formulas_numbers():
    step = Shear(3, 2, units=2).double()
    step.read.copy_(torch.tensor([[[0.5], [-1.0]]]))
    step.read_bias.copy_(torch.tensor([[0.25, 1.0]]))
    step.gate.copy_(torch.tensor([[2.0]]))
    step.gate_bias.fill_(-1.0)
    step.write.copy_(torch.tensor([[[1.0, 0.0], [3.0, -2.0]]]))
    z = torch.tensor([[10.0, 20.0, 0.5]], dtype=torch.float64)
    first, second, gate = (torch.tensor(v).double() for v in (0.5, 0.5, 0.0))
    first, second, gate = torch.tanh(first), torch.tanh(second), torch.sigmoid(gate)
    wanted = [10 + 2 * gate * (first + 3 * second), 20 + 2 * gate * -2 * second, 0.5]
    moved = step(z, torch.full((1, 1), 2.0, dtype=torch.float64))[0]
    torch.testing.assert_close(moved, torch.tensor(wanted).double(), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_closed_gate_stops_its_own_behaviour_alone():
    step = moved_off(Shear(WIDTH, 1, 2))
    step.gate.zero_()
    step.gate_bias.copy_(torch.tensor([-1e4, 1e4]))
    z = draw(7, WIDTH)
    first, second = (one.expand(7, 2) for one in torch.eye(2, dtype=z.dtype))
    assert torch.equal(step(z, first), z)
    assert (step(z, second) - z).abs().max() > 0.1


@pytest.mark.parametrize("sizes", [(3, 0), (3, 3), (3, -1), (1, 1), (3, 1, 1, 0)], ids=str)
def test_a_size_out_of_range_is_refused_with_its_numbers(sizes):
    width, write, *_ = sizes
    with pytest.raises(InputError, match=rf"writes {write} of {width} coordinates.*one coordinate"):
        Shear(*sizes)
