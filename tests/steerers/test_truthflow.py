"""TruthFlow: the sheet's constants, the flow by hand, and corrections that rows foretell."""

import math

import pytest
import torch

from innsteer.activations import Activations, Rows
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerers.truthflow import TIMES, Corrected, TruthFlow, Velocity


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def ones(h, strength=1.0):
    return torch.full((len(h), 1), strength, dtype=h.dtype)


def turned(n, seed=0, degrees=60.0):
    """Source rows of two dimensions, far from 0, and corrections that are the same rows turned."""
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    rows = draw(n, 2, seed)
    source = 50 + 3 * rows
    return Activations.of_sides(source, source + 4 + 2 * rows @ turn)


def filled(width=3, levels=1):
    velocity = Velocity(width, levels)
    velocity.draw(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for n, tensor in enumerate(velocity.up[0].parameters()):
            tensor.copy_(draw(tensor.numel(), 1, n).view(tensor.shape))
    return velocity.requires_grad_(False)


# --- the sheet -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4])
def test_of_equal_corrections_every_row_gets_that_one(rank):
    shift, source = torch.tensor([3.0, -1.0, 0.0, 2.0]), torch.zeros(6, 4)
    acts = Activations.of_sides(source, source + shift)
    part = TruthFlow(rank=rank, epochs=2).fit(acts)[acts.site]
    h = draw(9, 4)
    torch.testing.assert_close(part(h, ones(h)), h + shift, rtol=0, atol=1e-5)


def test_all_directions_project_on_everything_and_one_on_its_own_line():
    acts = turned(40)
    whole, line = (TruthFlow(rank=rank, epochs=1).fit(acts)[acts.site] for rank in (2, 1))
    h = acts.sides(acts.site)[0]
    kept = line.directions[0]
    edit = whole(h, ones(h)) - h
    torch.testing.assert_close(whole.directions[0].mT @ whole.directions[0], torch.eye(2))
    torch.testing.assert_close(line(h, ones(h)) - h, edit @ kept.mT @ kept, rtol=0, atol=1e-4)
    assert (edit - edit @ kept.mT @ kept).norm() > 1


# --- the flow ------------------------------------------------------------------------------------


def test_without_a_network_the_velocity_is_that_of_independent_gaussians():
    rows, velocity = draw(5, 3), Velocity(3, 2)
    for time in (0.0, 0.3, 0.5, 1.0):
        # E[c - h | x] where x = (1 - t) h + t c, of unit variances: cov(c - h, x) / var(x).
        factor = (time - (1 - time)) / ((1 - time) ** 2 + time**2)
        moved = velocity.displacement(rows, torch.full((5, 1), time))
        torch.testing.assert_close(moved, factor * rows)


def test_the_network_by_hand():
    rows, time, velocity = draw(5, 3), torch.linspace(0, 1, 5).unsqueeze(1), filled()
    waves = torch.stack([(math.pi * n * time[:, 0]).cos() for n in range(1, TIMES + 1)], 1)
    down, up = velocity.down[0], velocity.up[0]
    low = torch.cat([rows, waves], 1) @ down.weight.mT + down.bias
    low = low * torch.sigmoid(low)
    want = torch.cat([low, rows, waves], 1) @ up.weight.mT + up.bias
    plain = Velocity(3, 1).displacement(rows, time)
    torch.testing.assert_close(velocity.displacement(rows, time), plain + want)


def test_levels_halve_the_width_down_to_the_narrowest():
    sizes = [(layer.in_features - TIMES, layer.out_features) for layer in Velocity(80, 4).down]
    assert sizes == [(80, 40), (40, 20), (20, 16), (16, 16)]
    assert [layer.out_features for layer in Velocity(80, 4).up] == [80, 40, 20, 16]


def test_the_path_is_that_of_the_midpoint_rule():
    part = Corrected(3, 1, rank=3, levels=1, steps=2).requires_grad_(False)
    part.velocities[0].load_state_dict(filled().state_dict())
    part.mean[0], part.gain[0], part.directions[0] = torch.arange(3.0), 0.5, torch.eye(3)
    part.reach[0] = 100.0
    part.lift_mean[0], part.lift_std[0] = torch.tensor([1.0, 2.0, 3.0]), 2.0
    h, velocity = draw(4, 3, 5), filled()
    x = (h - torch.arange(3.0)) / 2
    for start in (0.0, 0.5):
        half = x + 0.25 * velocity.displacement(x, torch.full((4, 1), start))
        x = x + 0.5 * velocity.displacement(half, torch.full((4, 1), start + 0.25))
    want = h - 1.5 * (torch.tensor([1.0, 2.0, 3.0]) + 2 * x)
    torch.testing.assert_close(part(h, ones(h, -1.5)), want)


def test_more_steps_come_to_one_end():
    acts = turned(60)
    found = {}
    for steps in (4, 8, 256):
        method = TruthFlow(steps=steps, epochs=10)
        h = acts.sides(acts.site)[0]
        found[steps] = method.fit(acts)[acts.site](h, ones(h))
    error = [float((found[n] - found[256]).norm()) for n in (4, 8)]
    assert 0 < error[1] < 0.4 * error[0]  # of second order: about a quarter


# --- the fit -------------------------------------------------------------------------------------


def test_corrections_that_the_row_tells_are_foretold_and_others_are_not():
    acts, fresh = turned(150), turned(100, seed=1)
    held = [row | {"split": "validation"} for row in fresh.rows.records()]
    values = torch.cat([acts.values[acts.site], fresh.values[acts.site]])
    both = Activations({acts.site: values}, Rows.of(acts.rows.records() + held), acts.behaviours)
    method = TruthFlow(learning_rate=3e-3)
    figures = method.diagnose(both, method.fit(both))
    assert figures["foretold"] > 0.9 and figures["held_out"] == 1
    source = values[both.rows.side == "source"]
    noise = Activations({acts.site: values.clone()}, both.rows, both.behaviours)
    noise.values[acts.site][both.rows.side == "target"] = source + draw(250, 2, 3)
    figures = method.diagnose(noise, method.fit(noise))
    assert figures["foretold"] < -0.5  # one of the usual size, which is not its own


def test_figures_without_validation_rows_are_of_the_fitted_ones():
    acts = turned(40)
    method = TruthFlow(epochs=2)
    assert method.diagnose(acts, method.fit(acts))["held_out"] == 0


def test_directions_are_those_of_corrections_about_0_and_by_weight():
    lifts = torch.tensor([3.0, 0.0, 0.0]) + draw(200, 3) * torch.tensor([0.1, 2.0, 0.1])
    acts = Activations.of_sides(draw(200, 3, 1), draw(200, 3, 1) + lifts)
    first = TruthFlow(rank=1, epochs=1).fit(acts)[acts.site].directions[0, 0]
    assert abs(first[0]) > 0.95  # about their mean it would be the second dimension
    acts.rows.weight[:] = [0.001 if abs(lift) < 2 else 1.0 for lift in lifts[:, 1].tolist()] * 2
    first = TruthFlow(rank=1, epochs=1).fit(acts)[acts.site].directions[0, 0]
    assert abs(first[1]) > 0.7


def test_fewer_pairs_than_directions_leave_the_rest_of_them_zero():
    acts = Activations.of_sides(draw(3, 6), draw(3, 6, 1))
    found = TruthFlow(epochs=1).fit(acts)[acts.site].directions[0]
    assert found.shape == (6, 6) and found[:3].norm() > 1 and not found[3:].any()


def test_a_dimension_in_which_no_source_row_varied_does_not_blow_up():
    source = draw(60, 3) * torch.tensor([1.0, 1.0, 0.0]) + 5
    acts = Activations.of_sides(source, source + draw(60, 3, 1))
    part = TruthFlow(epochs=1).fit(acts)[acts.site]
    other = source + torch.tensor([0.0, 0.0, 1.0])
    torch.testing.assert_close(
        part(other, ones(other)) - other, part(source, ones(source)) - source
    )


def test_a_row_beyond_the_source_rows_is_read_where_its_ray_leaves_their_ball():
    acts = turned(60)
    part = TruthFlow(epochs=2).fit(acts)[acts.site]
    source = acts.sides(acts.site)[0]
    mean, std = source.mean(0), source.std(0, correction=0)
    edge = ((source - mean) / std).norm(dim=-1).quantile(0.99)
    ray = torch.nn.functional.normalize(draw(8, 2, 5), dim=-1)
    at, beyond, inside = (mean + std * ray * edge * far for far in (1.0, 9.0, 0.5))
    edits = [part(h, ones(h)) - h for h in (at, beyond, inside)]
    torch.testing.assert_close(edits[1], edits[0], rtol=0, atol=1e-3)
    assert (edits[2] - edits[0]).norm(dim=-1).min() > 0.1


def test_strengths_scale_the_correction_and_behaviours_add():
    part = Corrected(3, 2, rank=2, levels=1, steps=3).requires_grad_(False)
    for n, tensor in enumerate(part.buffers()):
        tensor.copy_(draw(tensor.numel(), 1, n).view(tensor.shape))
    for velocity in part.velocities:
        velocity.load_state_dict(filled().state_dict())
    h = draw(5, 3, 9)
    one, two = (part(h, row.expand(5, 2)) - h for row in torch.eye(2))
    assert (one - two).norm() > 0.1
    got = part(h, torch.tensor([[0.5, -2.0]]).expand(5, 2))
    torch.testing.assert_close(got, h + 0.5 * one - 2 * two)


def test_one_pair_unpaired_rows_and_weights_of_nothing_are_refused():
    with pytest.raises(InputError, match="one pair"):
        TruthFlow().fit(Activations.of_sides(draw(1, 2), draw(1, 2, 1)))
    with pytest.raises(InputError, match="no pairs"):
        TruthFlow().fit(Activations.of_sides(draw(9, 2), draw(9, 2, 1), paired=False))
    acts = turned(5)
    acts.rows.weight[2] = 0.0
    with pytest.raises(InputError, match="weights"):
        TruthFlow().fit(acts)


@pytest.mark.parametrize(
    "fields",
    [{name: 0} for name in ("rank", "levels", "steps", "times", "epochs", "batch")]
    + [{"levels": 17}, {"steps": 1001}, {"learning_rate": 0.0}, {"learning_rate": math.nan}],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        TruthFlow(**fields)


def test_networks_that_no_memory_holds_are_refused():
    with pytest.raises(InputError, match="40000"):
        TruthFlow().build({Site(0): 40_000})
