"""RE-Control: the authors' climbs and loss, a written-out gradient, and what a value learns."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from innsteer.activations import Activations, Rows
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerers.re_control import Answers, Climb, REControl


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Tensor]:
    folder = shared / "goldens" / "re-control"
    case = json.loads((folder / "case.json").read_text())["cases"][0]
    assert case["params"]["lr_steps"] == [[1, 30], [0.1, 5]]
    return load_file(folder / case["file"])


def theirs(golden: dict[str, Tensor], rate: float = 1.0, steps: int = 1) -> Climb:
    """The golden's value network in our module."""
    part = Climb(12, hidden=16, steps=steps).requires_grad_(False)
    part.inner[0], part.bias[0] = golden["sd.fc1.weight"], golden["sd.fc1.bias"]
    part.outer[0], part.level[0] = golden["sd.fc3.weight"][0], golden["sd.fc3.bias"][0]
    part.rates[0] = rate
    return part


def drawn(width: int = 5, k: int = 1, *, steps: int = 7, hidden: int = 16) -> Climb:
    """Random values on rows of a mean and spread of their own, in float64."""
    draw = torch.Generator().manual_seed(0)
    part = Climb(width, k, hidden=hidden, steps=steps).double().requires_grad_(False)
    for tensor in (part.inner, part.bias, part.outer, part.level, part.mean):
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    part.std.copy_(torch.linspace(0.5, 3, width))
    part.rates.copy_(torch.linspace(0.05, 0.1, k))
    return part


def rows(n: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ones(h: Tensor, strength: float = 1.0) -> Tensor:
    return torch.full((len(h), 1), strength, dtype=h.dtype)


# --- the authors' numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "steps"), [(1, 30), (0.1, 5)])
def test_rows_end_where_the_authors_do(golden, rate, steps):
    h, expected = golden["h"].view(-1, 12), golden[f"h_opt_{rate}_{steps}"].view(-1, 12)
    part = theirs(golden, rate / 2, steps)
    torch.testing.assert_close(part.values(h), golden["V_h"].view(-1, 1), rtol=0, atol=1e-6)
    assert (expected - h).norm(dim=-1).mean() > 0.1
    torch.testing.assert_close(part(h, ones(h, 2.0)), expected, rtol=0, atol=1e-5)


def test_the_loss_is_the_authors_with_the_reward_at_the_end_of_an_answer(golden):
    mask = golden["mask"].bool()
    ends = mask.cumsum(1) * mask == mask.sum(1, keepdim=True)
    count = int(mask.sum())
    whole = golden["states"][mask]
    reward = golden["labels"].expand_as(mask)[mask]
    answers = Answers(whole, torch.zeros(count).long(), ends[mask], reward, torch.ones(count))
    # Theirs is a sum over an answer's rows, and a mean over answers.
    loss = answers.loss(theirs(golden), torch.arange(count)) * count / len(mask)
    torch.testing.assert_close(loss[None], golden["loss_last_token"], rtol=0, atol=1e-5)


# --- the climb -----------------------------------------------------------------------------------


def test_each_step_follows_autograds_gradient_of_the_weighed_sum_of_values():
    part, h = drawn(k=2), rows(20, 5)
    coef = rows(20, 2, 2)
    z = (h - part.mean) / part.std
    for _ in range(7):
        z = z.detach().requires_grad_()
        value = (coef * part.rates * part.values(z * part.std + part.mean)).sum()
        z = z + torch.autograd.grad(value, z)[0]
    expected = z * part.std + part.mean
    torch.testing.assert_close(part(h, coef), expected.detach(), rtol=0, atol=1e-12)
    assert (part(h, coef) - h).norm(dim=-1).min() > 1e-3


def test_values_rise_with_a_strength_and_fall_with_a_negative_one():
    part, h = drawn(), rows(20, 5)
    down, here, up = (part.values(part(h, ones(h, s))) for s in (-0.1, 0.0, 0.1))
    assert (down < here).all() and (here < up).all()


@pytest.mark.parametrize("steps", [1, 9])
def test_a_linear_value_adds_its_weight_for_every_step(steps):
    # One unit, always on: V(z) = 3 (z . w + 100) + level, in raw units moved by std.
    part, h = drawn(4, steps=steps, hidden=1), rows(10, 4)
    part.bias.fill_(100)
    part.outer.fill_(3)
    expected = h + 1.5 * steps * part.rates * 3 * part.inner[0, 0] * part.std
    torch.testing.assert_close(part(h, ones(h, 1.5)), expected, rtol=0, atol=1e-12)


def test_one_newton_step_reaches_a_linear_values_target():
    # V(h) = w . h; a step of (target - V) / |w|^2 is the strength that leads there.
    part, h = drawn(4, steps=1, hidden=1), rows(10, 4)
    part.bias.fill_(100)
    part.outer.fill_(1)
    part.rates.fill_(1)
    gap = 120 - part.values(h)
    moved = part(h, gap / part.inner[0, 0].square().sum())
    torch.testing.assert_close(part.values(moved), torch.full((10, 1), 120.0).double())


def test_a_climb_survives_beside_a_massive_dimension():
    part = drawn()
    h = rows(9, 5) + 8192 * torch.eye(5).double()[0]
    part.mean[0] += 8192
    coef = ones(h, 1e-3)
    exact = part.displacement(h, coef)
    rounded = part.float().displacement(h.float(), coef.float()).double()
    assert ((rounded - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 1e-4


# --- the fit -------------------------------------------------------------------------------------


def two_behaviours() -> Activations:
    """Rows without pairs that differ in one dimension for either behaviour."""
    records, values = [], []
    for b, name in enumerate(("warm", "brief")):
        for side in ("source", "target"):
            shift = 3.0 * torch.eye(5)[2 * b] * (side == "target")
            values.append(rows(30, 5, seed=b).float() + 1 + shift)
            records += [{"behaviour": name, "item": f"{i}", "side": side} for i in range(30)]
    return Activations({Site(0): torch.cat(values)}, Rows.of(records), ("brief", "warm"))


def test_each_behaviour_has_a_value_of_its_own_side():
    acts = two_behaviours()
    fitted = REControl(hidden=32, epochs=60).fit(acts)
    part = fitted[acts.site]
    for column, name in enumerate(acts.behaviours):
        low, high = (part.values(side)[:, column].mean() for side in acts.sides(acts.site, name))
        assert abs(low) < 0.25 and abs(high - 1) < 0.25
    assert REControl().diagnose(acts, fitted)["accuracy"] > 0.9
    h, one = rows(9, 5).float(), torch.eye(2)
    moves = [part(h, one[k].expand(9, 2)) - h for k in range(2)]
    assert moves[0].mean(0).argmax() == 2 and moves[1].mean(0).argmax() == 0


def test_a_step_carries_source_rows_as_far_as_the_means_are_apart_or_is_given():
    acts = two_behaviours()
    part = REControl(hidden=32).fit(acts)[acts.site]
    for column, name in enumerate(acts.behaviours):
        source, target = acts.sides(acts.site, name)
        coef = torch.eye(2)[column].expand(30, 2)
        far = ((part(source, coef) - source) / part.std).norm(dim=-1).mean()
        gap = ((target.mean(0) - source.mean(0)) / part.std).norm()
        torch.testing.assert_close(far, gap, rtol=0.02, atol=0)
    given = REControl(hidden=32, rate=0.5).fit(acts)[acts.site]
    assert given.rates.tolist() == [0.5, 0.5]


def test_answers_are_rows_in_the_order_of_their_tokens():
    records = [
        {"behaviour": "b", "item": item, "side": side, "token": token}
        for token in (10, 9)
        for side in ("target", "source", "unmoved")
        for item in ("x", "y")
    ]
    values = torch.arange(12.0).unsqueeze(1)
    answers = Answers.of(Activations({Site(0): values}, Rows.of(records), ("b",)), Site(0))
    assert answers.rows[:, 0].tolist() == [8, 2, 6, 0, 9, 3, 7, 1]
    assert answers.last.tolist() == [False, True] * 4
    assert answers.reward.tolist() == [0, 0, 1, 1] * 2


def test_rows_before_the_end_take_the_value_that_follows():
    # Every answer begins with the same row, and ends well as often as badly: the first row is worth
    # 1/2, and an end between that and its reward, for the loss pulls at both rows of a step.
    start, end = torch.zeros(1, 2), torch.tensor([[3.0, 0.0]])
    records, values = [], []
    for side, place in (("source", -end), ("target", end)):
        for item in range(20):
            values += [start, place + rows(1, 2, item).float() / 10]
            records += [
                {"behaviour": "b", "item": f"{item}", "side": side, "token": token}
                for token in (4, 5)
            ]
    acts = Activations({Site(0): torch.cat(values)}, Rows.of(records), ("b",))
    method = REControl(hidden=32, epochs=60, learning_rate=1e-2, weight_decay=0.0)
    part = method.fit(acts)[Site(0)]
    found = part.values(torch.cat([-end, start, end]))[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.05)


def test_a_giant_is_refused_before_it_is_built():
    with pytest.raises(InputError, match="2000 values"):
        REControl(hidden=4096).build({Site(0): 8192}, k=2000)


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"steps": 10**9}, {"hidden": 0}, {"epochs": 0}, {"batch": 0}]
    + [{"rate": 0.0}, {"rate": math.nan}, {"learning_rate": -1.0}, {"weight_decay": -1.0}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        REControl(**fields)
