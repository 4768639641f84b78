"""HPR: the authors' outputs and loss, turns that keep the norm, and what the angles learn."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from innsteer.activations import Activations, Rows
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerers.hpr import HPR, Pairs, Turn


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Tensor]:
    folder = shared / "goldens" / "hpr"
    case = json.loads((folder / "case.json").read_text())["cases"][0]
    assert case["params"]["num_guidance_module_layers"] == 2
    return load_file(folder / case["file"])


def theirs(golden: dict[str, Tensor], **fields) -> Turn:
    """The golden's probe and angle network in our module."""
    part = Turn(8, hidden=(4,), **fields).requires_grad_(False)
    part.normals[0] = golden["w"][0] / golden["w"].norm()
    for layer, place in enumerate((0, 2)):
        part.weights[layer][0] = golden[f"sd.angle_model.model.{place}.weight"]
        part.biases[layer][0] = golden[f"sd.angle_model.model.{place}.bias"]
    return part


def fixed(normals: list[list[float]], *angles: float, **fields) -> Turn:
    """Turns by the same angles for all rows, in float64."""
    part = Turn(len(normals[0]), len(normals), **fields).double().requires_grad_(False)
    part.normals.copy_(torch.nn.functional.normalize(torch.tensor(normals).double(), dim=-1))
    part.biases[0][:, 0] = torch.logit(torch.tensor(angles, dtype=torch.float64) / math.pi)
    return part


def rows(n: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ones(h: Tensor, strength: float = 1.0) -> Tensor:
    return torch.full((len(h), 1), strength, dtype=h.dtype)


# --- the authors' numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1])
def test_rows_end_where_the_authors_do(golden, strength):
    part, h = theirs(golden, gate=True), golden["h"].view(-1, 8)
    torch.testing.assert_close(part.angles(h), golden["angle"].view(-1, 1), rtol=0, atol=1e-5)
    expected = golden[f"h_alpha{strength}"].view(-1, 8)
    away = (expected - h).norm(dim=-1) > 0
    assert away.double().mean().item() == pytest.approx(7 / 24)
    moved = part(h, ones(h, strength))
    assert torch.equal(moved[~away], h[~away])
    # They divide by the sine of the angle to the mirror image, which costs rows near w's plane.
    along = (h @ part.normals[0]).abs() / h.norm(dim=-1)
    assert (far := along > 0.1).any() and (~far & away).any()
    torch.testing.assert_close(moved[far], expected[far], rtol=0, atol=1e-4)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-2)


def test_the_mirror_image_is_the_householder_matrix(golden):
    part, h = theirs(golden), golden["h"].view(-1, 8)
    behind = 2 * torch.asin(-(h @ part.normals[0]) / h.norm(dim=-1))
    moved = part(h, (behind / part.angles(h)[:, 0]).unsqueeze(-1))
    torch.testing.assert_close(moved, h @ golden["householder"].mT, rtol=0, atol=1e-4)


def test_the_angles_that_are_taught_are_those_of_the_authors_loss(golden):
    acts = Activations.of_sides(golden["neg"], golden["pos"])
    part, pairs = theirs(golden), Pairs.of(acts, acts.site, "behaviour")
    source, target = pairs.source.float(), pairs.target.float()
    none = math.acos(1 - 1e-7)  # as they clamp it
    missed = torch.cat([part.angles(source)[:, 0] - pairs.angles, part.angles(target)[:, 0] - none])
    margins = torch.cat([-source, target]) @ golden["w"][0]
    loss = torch.nn.functional.softplus(-margins).mean() + missed.square().mean()
    torch.testing.assert_close(loss[None].float(), golden["loss"], rtol=0, atol=1e-4)


# --- the turn ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "expected"), [(1, (2, 3)), (0.5, (0, 13**0.5)), (-1, (-46 / 13, -9 / 13))]
)
def test_by_hand(strength, expected):
    # The angle to the mirror image, 1.1760, its half, and as much the other way.
    part, h = fixed([[1, 0]], 2 * math.asin(2 / 13**0.5)), torch.tensor([[-2.0, 3.0]]).double()
    moved = part(h, ones(h, strength))
    torch.testing.assert_close(
        moved, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_one_behaviour_turns_in_the_plane_of_row_and_normal_by_its_angle():
    part, h = fixed([[1.0, 2, 0, 0, -1]], 0.7), rows(40, 5)
    moved = part(h, ones(h, 1.5))
    cosine = torch.nn.functional.cosine_similarity(h, moved)
    torch.testing.assert_close(cosine.acos(), torch.full((40,), 1.05).double(), rtol=0, atol=1e-7)
    plane = torch.linalg.qr(torch.stack([h, part.normals.expand(40, -1)], -1))[0]
    left = moved - (plane @ (plane.mT @ moved.unsqueeze(-1))).squeeze(-1)
    assert left.abs().max() < 1e-12
    assert ((moved - h) @ part.normals[0] > 0)[h @ part.normals[0] < 0].all()


def test_a_mix_keeps_the_norm_and_adds_the_turns():
    part, h = fixed([[1.0, 0, 0, 0], [1, 3, 0, 0]], 0.9, 0.4), rows(40, 4)
    coef = rows(40, 2, 2)
    moved = part(h, coef)
    torch.testing.assert_close(moved.norm(dim=-1), h.norm(dim=-1), rtol=1e-12, atol=0)
    single = [part(h, coef * keep) - h for keep in torch.eye(2).double()]
    assert (moved - h - sum(single)).norm(dim=-1).max() > 0.1
    small = 1e-4 * coef
    turns = sum(part(h, small * keep) - h for keep in torch.eye(2).double())
    torch.testing.assert_close(part(h, small) - h, turns, rtol=0, atol=1e-6)


def test_a_behaviour_without_strength_adds_nothing_to_another():
    both, one = fixed([[1.0, 0, 0], [1, 3, 0]], 0.9, 0.4), fixed([[1.0, 3, 0]], 0.4)
    h, mix = rows(9, 3), torch.tensor([[0.0, 1.3]], dtype=torch.float64).expand(9, 2)
    torch.testing.assert_close(both(h, mix), one(h, ones(h, 1.3)), rtol=0, atol=1e-12)


def test_the_gate_turns_rows_of_the_source_side_only():
    h = rows(40, 3)
    shut, open_ = (fixed([[1.0, 0, 0]], 0.5, gate=gate)(h, ones(h)) for gate in (True, False))
    source = h[:, 0] < 0
    assert torch.equal(shut[source], open_[source]) and torch.equal(shut[~source], h[~source])
    assert (open_ - h).norm(dim=-1).min() > 0


def test_rows_along_the_normal_and_rows_of_zeros_stay():
    h = torch.tensor([[3.0, 0], [-3, 0], [0, 0]]).double()
    assert torch.equal(fixed([[1.0, 0]], 0.5)(h, ones(h)), h)


def test_a_turn_survives_beside_a_massive_dimension():
    part = fixed([[0.0, 1, 1, 1]], 0.3)
    h = rows(9, 4) + 8192 * torch.eye(4).double()[0]
    coef = ones(h, 1e-3)
    exact = part.displacement(h, coef)
    rounded = part.float().displacement(h.float(), coef.float()).double()
    assert ((rounded - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 1e-5


# --- the fit -------------------------------------------------------------------------------------


def turned(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows near -e0's side and their targets: turned towards e0 by 0.4, or by 1.2 if h1 > 0."""
    h = rows(n, 5, seed)
    h[:, 0] = -0.2 * h[:, 0].abs()
    angle = torch.where(h[:, 1] > 0, 1.2, 0.4).double()
    part = fixed([[1.0, 0, 0, 0, 0]], 1.0)
    return h.float(), part(h, angle.unsqueeze(-1)).float(), angle.float()


def test_angles_are_learnt_row_by_row_and_are_none_on_target_rows():
    source, target, _ = turned()
    method = HPR(epochs=30, batch=50, learning_rate=2e-2)
    part = method.fit(Activations.of_sides(source, target))[Site(0)]
    source, target, angle = turned(seed=1)
    assert (part.angles(source)[:, 0] - angle).abs().mean() < 0.15
    assert part.angles(target).mean() < 0.15
    moved = part(source, ones(source))
    assert (moved - target).norm(dim=-1).mean() < 0.3 * (source - target).norm(dim=-1).mean()


def test_a_strong_penalty_gives_the_difference_of_means_and_a_weak_one_parts_the_sides():
    # Of both sides the mean lies far off, on one side of the difference's plane.
    source, target = rows(60, 3), rows(60, 3, 2)
    source, target = source + torch.tensor([9.0, 8, 0]), target + torch.tensor([9.0, 14, 0])
    acts = Activations.of_sides(source.float(), target.float())
    tight, loose = (HPR(C=C, epochs=1).fit(acts) for C in (1e-9, 10.0))
    gap = (target - source).mean(0)
    normal = tight[acts.site].normals[0].double()
    torch.testing.assert_close(normal, gap / gap.norm(), rtol=0, atol=1e-4)
    assert HPR().diagnose(acts, tight)["accuracy"] == 0
    assert HPR().diagnose(acts, loose)["accuracy"] > 0.95


def two_behaviours(weights: tuple[float, ...] = (1.0,) * 40) -> Activations:
    """Pairs that differ in one dimension for either behaviour."""
    records, values = [], []
    for b, name in enumerate(("warm", "brief")):
        for side in ("source", "target"):
            shift = 4.0 * torch.eye(5)[2 * b] * (1 if side == "target" else -1)
            values.append(rows(40, 5, seed=b).float() + shift)
            records += [
                {"behaviour": name, "item": f"{i}", "pair": f"{i}", "side": side, "weight": w}
                for i, w in enumerate(weights)
            ]
    return Activations({Site(0): torch.cat(values)}, Rows.of(records), ("brief", "warm"))


def test_every_behaviour_has_its_own_normal_and_angles():
    acts = two_behaviours()
    both = HPR(epochs=30, learning_rate=2e-2).fit(acts)[acts.site]
    assert both.normals.argmax(-1).tolist() == [2, 0]
    for column, name in enumerate(acts.behaviours):
        source, target = acts.sides(acts.site, name)
        wanted = torch.nn.functional.cosine_similarity(source, target).acos().mean()
        assert abs(both.angles(source)[:, column].mean() - wanted) < 0.1
        assert both.angles(target)[:, column].mean() < 0.1


def test_a_pair_of_weight_two_counts_twice_in_the_normal():
    acts = two_behaviours((2.0,) * 10 + (1.0,) * 30)
    plain = two_behaviours()
    few = plain.where(item=[f"{i}" for i in range(10)])
    again = [
        row | {"item": "x" + row["item"], "pair": "x" + row["pair"]} for row in few.rows.records()
    ]
    twice = Activations(
        {acts.site: torch.cat([plain.values[acts.site], few.values[acts.site]])},
        Rows.of(plain.rows.records() + again),
        plain.behaviours,
    )
    got, expected, other = (HPR(epochs=1).fit(a)[a.site].normals for a in (acts, twice, plain))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (got - other).abs().max() > 1e-3


def test_widths_halve_but_not_to_nothing():
    part = HPR(layers=4).build({Site(0): 40}, k=3)[Site(0)]
    assert [tuple(w.shape) for w in part.weights] == [
        (3, 20, 40), (3, 10, 20), (3, 8, 10), (3, 1, 8)
    ]  # fmt: skip
    assert len(HPR(layers=1).build({Site(0): 40})[Site(0)].weights) == 1


def test_unpaired_rows_are_refused():
    with pytest.raises(InputError, match="no pairs"):
        HPR().fit(Activations.of_sides(rows(9, 2).float(), rows(9, 2).float(), paired=False))


def test_a_giant_is_refused_before_it_is_built():
    with pytest.raises(InputError, match="2000 networks"):
        HPR().build({Site(0): 8192}, k=2000)


@pytest.mark.parametrize(
    "fields",
    [{"layers": 0}, {"layers": 9}, {"epochs": 0}, {"batch": 0}]
    + [{"learning_rate": 0.0}, {"C": -1.0}, {"C": math.nan}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        HPR(**fields)
