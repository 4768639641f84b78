"""ODESteer: the authors' outputs, a written-out gradient, and the reductions that must hold."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from innsteer.activations import Activations, Rows
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerers.odesteer import ODESteer, SketchField


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Tensor]:
    folder = shared / "goldens" / "odesteer"
    case = json.loads((folder / "case.json").read_text())["cases"][0]
    known = {"degree": 2, "n_components": 256, "gamma": 0.1, "coef0": 1.0, "steps": 10}
    assert case["params"] == case["params"] | known
    return load_file(folder / case["file"])


def theirs(golden: dict[str, Tensor], time: float = 1.0, steps: int = 10) -> SketchField:
    """The golden's sketch and classifier in our module."""
    part = SketchField(8, components=256, steps=steps)
    part.buckets.copy_(golden["index_hash"])
    part.signs.copy_(golden["bit_hash"])
    part.weight[0], part.bias[0], part.times[0] = golden["coef"], golden["intercept"][0], time
    return part


def drawn(width: int, k: int = 1, *, seed: int = 0, **fields) -> SketchField:
    """A random sketch with random classifiers, in float64."""
    draw = torch.Generator().manual_seed(seed)
    part = SketchField(width, k, **({"components": 64} | fields)).double()
    part.buckets.copy_(torch.randint(part.components, part.buckets.shape, generator=draw))
    part.signs.copy_(2 * torch.randint(2, part.signs.shape, generator=draw) - 1)
    part.weight.copy_(torch.randn(part.weight.shape, generator=draw))
    part.times.fill_(2.0)
    return part


def rows(n: int, width: int, *, seed: int = 1) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the authors' numbers ------------------------------------------------------------------------


def test_features_log_odds_and_field_are_the_authors(golden):
    part, h = theirs(golden), golden["H"]
    torch.testing.assert_close(part.features(h), golden["features_H"], rtol=0, atol=1e-5)
    field = part.field(h[None])[0]
    torch.testing.assert_close(field, golden["vector_field_H"], rtol=0, atol=1e-5)
    # Their log density ratio takes the sizes of the sides, 60 and 90 rows, out of the odds.
    ratio = part.log_odds(h)[:, 0] + torch.tensor(90 / 60).log()
    torch.testing.assert_close(ratio, golden["log_dre_H"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("time", [0.5, 2, 5])
@pytest.mark.parametrize(("steps", "name"), [(10, "euler"), (1, "step")])
def test_paths_end_where_the_authors_do(golden, time, steps, name):
    h, expected = golden["H"], golden[f"H_{name}_{time}"]
    assert (expected - h).norm(dim=-1).min() > 0.4 * time
    for strength in (1.0, 2.0):  # strength scales the length of the path
        part = theirs(golden, time / strength, steps)
        moved = part(h, torch.full((10, 1), strength))
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4 * time)


def test_the_fit_is_the_authors_classifier_and_nearer_its_optimum(golden):
    source, target = golden["neg"], golden["pos"]
    ours = theirs(golden)
    ones = (torch.ones(90, dtype=torch.float64), torch.ones(60, dtype=torch.float64))
    ours.weight.zero_()
    ODESteer(components=256).fit_classifier(ours, 0, source, target, *ones)

    def objective(part: SketchField) -> float:
        margins = torch.cat([-part.log_odds(source.double()), part.log_odds(target.double())])
        loss = torch.nn.functional.softplus(-margins).sum()
        return float(loss + 0.5 * part.weight.double().square().sum())

    # Theirs stops at a gradient of 1e-4 per row, on float32 features.
    assert objective(ours) < objective(theirs(golden)) < objective(ours) + 1e-3
    torch.testing.assert_close(ours.weight[0], golden["coef"], rtol=0, atol=0.02)
    field = ours.field(golden["H"][None])[0]
    torch.testing.assert_close(field, golden["vector_field_H"], rtol=0, atol=5e-3)


# --- the field -----------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("components", [64, 63])
def test_the_written_out_gradient_is_autograds(degree, normalise, components):
    part = drawn(5, degree=degree, normalise=normalise, components=components)
    x = rows(6, 5).requires_grad_()
    gradient = torch.autograd.grad(part.log_odds(x).sum(), x)[0]
    unit = gradient / gradient.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(part.field(x.detach()[None])[0], unit, rtol=0, atol=1e-12)


def test_the_field_is_tangential_on_normalised_rows_and_else_it_is_not():
    x = rows(20, 6)[None]
    along = {flag: (drawn(6, normalise=flag).field(x) * x).sum(-1).abs() for flag in (True, False)}
    assert along[True].max() < 1e-12
    assert along[False].max() > 0.1


def test_features_approximate_the_polynomial_kernel():
    x = rows(4, 6)
    unit = x / x.norm(dim=-1, keepdim=True)
    kernel = (0.5 * unit @ unit.mT + 1).square()
    draws = [drawn(6, seed=s, components=512, gamma=0.5).features(x) for s in range(200)]
    mean = torch.stack([phi @ phi.mT for phi in draws]).mean(0)
    torch.testing.assert_close(mean, kernel, rtol=0, atol=0.03)


@pytest.mark.parametrize("steps", [1, 7])
def test_linear_features_add_a_unit_direction_times_the_length(steps):
    part = drawn(5, degree=1, normalise=False, steps=steps)
    part.buckets.copy_(torch.arange(6))
    w = (part.signs[0] * part.weight[0, :6])[:5]
    h = rows(4, 5)
    moved = part(h, torch.full((4, 1), 1.5, dtype=torch.float64))
    torch.testing.assert_close(moved, h + 1.5 * 2 * w / w.norm(), rtol=0, atol=1e-12)


def test_two_gaussians_of_one_covariance_give_the_fisher_direction_everywhere():
    # A sketch without collisions holds every monomial: bucket 3 i + j for u_i u_j.
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    draw = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(covariance)
    source, target = torch.randn(2, 20_000, 2, generator=draw) @ root.mT
    source, target = source - torch.tensor([0.5, 0]), target + torch.tensor([0.5, 0])
    part = SketchField(2, components=9, gamma=1.0, normalise=False)
    part.buckets.copy_(torch.tensor([[0, 3, 6], [0, 1, 2]]))
    ones = torch.ones(20_000, dtype=torch.float64)
    method = ODESteer(components=9, gamma=1.0, normalise=False, C=1e3)
    method.fit_classifier(part, 0, source, target, ones, ones)
    fisher = torch.linalg.solve(covariance, torch.tensor([1.0, 0]))
    assert (fisher / fisher.norm())[0] < 0.8  # not the difference of means
    grid = torch.tensor(list(itertools.product([-1.0, 0, 1], repeat=2)))
    cosines = part.field(grid[None])[0] @ (fisher / fisher.norm())
    assert cosines.min() > 0.995


def test_a_path_has_the_length_that_was_asked_for_and_a_negative_one_leads_down():
    part, h = drawn(6, steps=50), rows(8, 6)
    odds = {s: part.log_odds(part(h, torch.full((8, 1), s).double())) for s in (-0.2, 0.0, 0.2)}
    assert (odds[-0.2] < odds[0.0]).all() and (odds[0.0] < odds[0.2]).all()
    short = torch.full((8, 1), 0.01, dtype=torch.float64)
    lengths = (part(h, short) - h).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.02), rtol=1e-3, atol=0)


def test_no_gradient_is_no_move():
    part, h = drawn(6), rows(8, 6)
    part.weight.zero_()
    assert torch.equal(part(h, torch.ones(8, 1)), h)


def test_a_path_survives_beside_a_massive_dimension():
    part = drawn(6, normalise=False)
    h = rows(8, 6) + 8192 * torch.eye(6, dtype=torch.float64)[0]
    coef = torch.full((8, 1), 1e-3, dtype=torch.float64)
    exact = part.displacement(h, coef)
    rounded = part.float().displacement(h.float(), coef.float()).double()
    assert ((rounded - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 1e-4


# --- the method ----------------------------------------------------------------------------------


def two_behaviours() -> Activations:
    records, values = [], []
    for b, name in enumerate(("warm", "brief")):
        for side in ("source", "target"):
            shift = 3.0 * torch.eye(5)[2 * b] * (side == "target")
            values.append(rows(30, 5, seed=b).float() + 1 + shift)
            records += [{"behaviour": name, "item": f"{i}", "side": side} for i in range(30)]
    return Activations({Site(0): torch.cat(values)}, Rows.of(records), ("brief", "warm"))


def test_every_behaviour_has_its_own_path_and_a_mix_sums_them():
    acts = two_behaviours()
    part = ODESteer(components=128).fit(acts)[acts.site]
    h, one = rows(9, 5).float(), torch.eye(2)
    moves = [part(h, one[k].expand(9, 2)) - h for k in range(2)]
    assert moves[0].mean(0).argmax() == 2 and moves[1].mean(0).argmax() == 0
    mixed = part(h, torch.ones(9, 2)) - h
    torch.testing.assert_close(mixed, moves[0] + moves[1], rtol=0, atol=1e-5)


def test_the_length_is_the_distance_of_the_means_or_the_given_one():
    acts = two_behaviours()
    fitted = ODESteer(components=128).fit(acts)[acts.site]
    torch.testing.assert_close(fitted.times, torch.full((2,), 3.0), rtol=1e-5, atol=0)
    assert ODESteer(components=128, T=5).fit(acts)[acts.site].times.tolist() == [5.0, 5.0]


def test_the_seed_draws_the_sketch():
    acts = two_behaviours()
    first, second = (ODESteer(components=128).fit(acts, seed=s)[acts.site] for s in (0, 1))
    assert not torch.equal(first.buckets, second.buckets)
    assert not torch.equal(first.signs, second.signs)
    assert set(first.signs.flatten().tolist()) == {-1, 1}


def test_more_rows_than_components_give_the_same_optimum():
    # 120 rows: 64 components are solved as they are, padded ones within the rows' span.
    acts = two_behaviours()
    small = drawn(5, components=64).float()
    source, target = acts.sides(acts.site, "warm")
    source, target = torch.cat([source] * 2), torch.cat([target] * 2)
    ones = torch.ones(60, dtype=torch.float64)
    phi = torch.cat([small.features(side.double()) for side in (source, target)])
    from innsteer.steerers.odesteer import logistic

    is_target = torch.arange(120) >= 60
    plain = logistic(phi, is_target, torch.cat([ones, ones]), 1.0)
    padded = torch.cat([phi, torch.zeros(120, 100, dtype=torch.float64)], -1)
    within = logistic(padded, is_target, torch.cat([ones, ones]), 1.0)
    torch.testing.assert_close(within[0][:64], plain[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(within[1], plain[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"components": 0}, {"degree": 5}, {"gamma": 0.0}, {"T": -1.0}, {"C": 0.0}]
    + [{"coef0": -1.0}, {"T": float("nan")}, {"steps": 10**9}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        ODESteer(**fields)
