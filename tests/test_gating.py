"""Gates: calibrated where they say, in raw units, one per behaviour."""

import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from torch import Tensor

from innsteer import gating
from innsteer.errors import InputError, UnknownName
from innsteer.gating import Gate, Gated, auroc, fit_gate, mahalanobis
from innsteer.interventions import Shift

SCALES = torch.tensor([0.1, 1.0, 50.0, 3.0])
both_kinds = pytest.mark.parametrize("kind", ["lda", "logistic"])


def rows(n: int, *, seed: int, away: float = 0.0) -> Tensor:
    """Rows as a residual has them: unlike spreads, one massive dimension."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.tensor([1.0, -1.0, 0.5, 0.0])
    centre = torch.tensor([0.0, 1.0, 4000.0, -2.0])
    return (torch.randn(n, 4, generator=draw) + away * steps) * SCALES + centre


def opened(gate: tuple[Tensor, Tensor], h: Tensor) -> Tensor:
    return (h.double() @ gate[0] + gate[1]).sigmoid()


# --- fitting -------------------------------------------------------------------------------------


@both_kinds
def test_a_gate_keeps_statements_and_leaves_unrelated_rows_that_it_has_not_seen(kind):
    gate = fit_gate(rows(300, seed=0), rows(100, seed=1, away=5), kind=kind)
    # lda's least open fiftieth of statements is half shut and below, by its threshold.
    assert opened(gate, rows(300, seed=2)).mean() > 0.9
    assert opened(gate, rows(300, seed=3, away=5)).mean() < 0.02


def test_the_logit_is_0_at_the_quantile_and_the_slope_at_the_median_of_the_held_rows():
    held = rows(101, seed=2)
    weight, bias = fit_gate(
        rows(300, seed=0),
        rows(100, seed=1, away=5),
        kind="lda",
        held=held,
        quantile=0.1,
        room=0.0,
        slope=4.0,
    )
    logits = (held.double() @ weight + bias).sort().values
    assert logits[50].item() == pytest.approx(4.0, abs=1e-9)
    # The least score with a tenth of the rows at or below it: the eleventh of 101.
    assert logits[10].item() == pytest.approx(0.0, abs=1e-9)
    assert (logits[:10] < 0).all()


def test_room_lowers_the_threshold_towards_the_unrelated_rows():
    own, other, held = rows(300, seed=0), rows(100, seed=1, away=5), rows(101, seed=2)
    numbers = {"kind": "lda", "held": held, "quantile": 0.1, "slope": 1.0}
    logits = {}
    for room in (0.0, 0.5, 1.0):
        weight, bias = fit_gate(own, other, room=room, **numbers)
        inside, outside = ((part.double() @ weight + bias).sort().values for part in (held, other))
        assert inside[50].item() == pytest.approx(1.0, abs=1e-9)
        logits[room] = inside[10].item(), outside[89].item()
    assert logits[0.0][0] == pytest.approx(0.0, abs=1e-9)
    assert logits[1.0][1] == pytest.approx(0.0, abs=1e-9)
    # Half-way: both ends lie equally far from it.
    assert logits[0.5][0] == pytest.approx(-logits[0.5][1], abs=1e-9)
    assert logits[0.5][0] > 0


def test_rewordings_turn_the_direction_away_from_what_they_change():
    own, other = rows(300, seed=0), rows(100, seed=1, away=5)
    line = torch.zeros(own.shape[1])
    line[1] = 1.0
    change = 20 * SCALES * line * torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    plain, told = (
        fit_gate(own, other, kind="lda", rewordings=given)[0] * SCALES for given in (None, change)
    )
    assert (told @ line.double()).abs() < 0.05 * (plain @ line.double()).abs()
    none = fit_gate(own, other, kind="lda", rewordings=change[:0])[0] * SCALES
    assert torch.equal(none, plain)


def test_where_the_kinds_overlap_room_changes_nothing():
    own, other = rows(300, seed=0), rows(100, seed=1, away=0.2)
    shut, wide = (fit_gate(own, other, kind="lda", room=room) for room in (0.0, 1.0))
    assert torch.equal(shut[0], wide[0]) and torch.equal(shut[1], wide[1])


def test_without_shrinkage_lda_is_fishers_direction():
    own, other = rows(400, seed=0), rows(400, seed=1, away=2)
    # Both sides have one covariance, so pooled and own agree up to the sample.
    fisher = LinearDiscriminantAnalysis().fit(torch.cat([own, other]), [1] * 400 + [0] * 400)
    expected = torch.from_numpy(fisher.coef_[0]) * SCALES
    got = fit_gate(own, other, kind="lda", shrinkage=0.0)[0] * SCALES
    assert torch.cosine_similarity(got, expected, dim=0) > 0.98


def test_full_shrinkage_is_the_difference_of_standardised_means():
    own, other = rows(400, seed=0).double(), rows(100, seed=1, away=5).double()
    spread = own.std(0, correction=0)
    expected = (own.mean(0) - other.mean(0)) / spread
    got = fit_gate(own, other, kind="lda", shrinkage=1.0)[0] * spread
    torch.testing.assert_close(got / got.norm(), expected / expected.norm(), rtol=0, atol=1e-9)


def test_the_shrunk_discriminant_is_the_formula():
    own, other = rows(50, seed=0).double(), rows(40, seed=1, away=3).double()
    z = (own - own.mean(0)) / own.std(0, correction=0)
    away = (other - own.mean(0)) / own.std(0, correction=0)
    shrunk = 0.7 * torch.cov(z.mT, correction=0) + 0.3 * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(shrunk, z.mean(0) - away.mean(0)) / own.std(0, correction=0)
    got = fit_gate(own, other, kind="lda", shrinkage=0.3)[0]
    torch.testing.assert_close(got / got.norm(), expected / expected.norm(), rtol=0, atol=1e-9)


@both_kinds
def test_units_of_a_dimension_and_an_offset_change_nothing(kind):
    parts = rows(100, seed=0), rows(60, seed=1, away=2)
    other = [part.double() * 8 / SCALES - 17 for part in parts]
    first = opened(fit_gate(*parts, kind=kind), parts[0])
    second = opened(fit_gate(*other, kind=kind), other[0])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


@both_kinds
def test_a_weight_of_2_is_the_row_twice_and_a_light_row_is_none(kind, monkeypatch):
    # One penalty: which of them wins hangs on how the parts are dealt.
    monkeypatch.setattr(gating, "PENALTIES", (0.1,))
    own, other = rows(100, seed=0), rows(60, seed=1, away=3)
    weight = torch.ones(100)
    weight[:30] = 2.0
    twice = fit_gate(torch.cat([own, own[:30]]), other, kind=kind)
    heavy = fit_gate(own, other, kind=kind, weights=weight)
    torch.testing.assert_close(heavy[0] * SCALES, twice[0] * SCALES, rtol=1e-4, atol=1e-4)
    far = torch.cat([own, rows(5, seed=4, away=9)])
    light = torch.cat([torch.ones(100), torch.full((5,), 1e-8)])
    with_far = fit_gate(far, other, kind=kind, weights=light)
    torch.testing.assert_close(
        with_far[0] * SCALES, fit_gate(own, other, kind=kind)[0] * SCALES, rtol=1e-4, atol=1e-4
    )


def test_the_logistic_gate_is_balanced():
    # 20 times as many statements of the same kind must not move the threshold.
    few, many = rows(40, seed=0), rows(800, seed=0)
    other = rows(40, seed=1, away=2)
    midway = (few.double().mean(0) + other.double().mean(0)) / 2
    for own in (few, many):
        assert 0.25 < opened(fit_gate(own, other, kind="logistic"), midway[None]).item() < 0.75


def test_the_seed_decides_the_parts_and_nothing_else_does():
    parts = rows(30, seed=0), rows(30, seed=1, away=1)
    before = torch.get_rng_state()
    first, again = (fit_gate(*parts, kind="logistic", seed=3) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(torch.get_rng_state(), before)


def test_a_dimension_in_which_statements_agree_does_not_decide():
    own, other = rows(200, seed=0), rows(100, seed=1, away=5)
    own[:, 3], other[:, 3] = 1.0, 2.0
    gate = fit_gate(own, other, kind="lda")
    new = rows(200, seed=2)
    new[:, 3] = 1.0 + 1.2e-7  # off by a rounding of float32
    assert opened(gate, new).mean() > 0.9


def test_a_single_held_statement_gives_a_threshold_and_a_slope():
    own, held = rows(200, seed=0), rows(1, seed=2)
    gate = fit_gate(own, rows(100, seed=1, away=5), kind="lda", held=held, room=0.0)
    assert opened(gate, held).item() == pytest.approx(0.5, abs=1e-9)
    assert opened(gate, rows(100, seed=3, away=5)).max() < 1e-6


def test_more_dimensions_than_statements_can_be_fitted():
    draw = torch.Generator().manual_seed(0)
    own, other = torch.randn(20, 60, generator=draw), torch.randn(20, 60, generator=draw) + 1
    assert opened(fit_gate(own, other, kind="lda"), other).max() < 0.5
    assert opened(fit_gate(own, other, kind="lda"), own).median() > 0.99


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"statements": torch.zeros(1, 4)}, "statements of shape"),
        ({"unrelated": torch.zeros(0, 4)}, "unrelated rows of shape"),
        ({"unrelated": torch.zeros(3, 5)}, "unrelated rows of shape"),
        ({"held": torch.zeros(0, 4)}, "held statements of shape"),
        ({"shrinkage": 1.5}, "shrinkage"),
        ({"quantile": 0.5}, "quantile"),
        ({"slope": 0.0}, "slope"),
        ({"weights": torch.zeros(9)}, "weights"),
    ],
    ids=str,
)
def test_what_cannot_be_fitted_is_refused(change, match):
    given = {"statements": rows(9, seed=0), "unrelated": rows(9, seed=1)} | change
    own, other = given.pop("statements"), given.pop("unrelated")
    with pytest.raises(InputError, match=match):
        fit_gate(own, other, kind="lda", **given)


def test_rows_that_are_no_different_are_refused():
    own = rows(9, seed=0)
    with pytest.raises(InputError, match="same mean"):
        fit_gate(own, own, kind="lda")


def test_an_unknown_kind_is_refused():
    with pytest.raises(UnknownName, match="lda"):
        fit_gate(rows(9, seed=0), rows(9, seed=1), kind="svm")


# --- figures -------------------------------------------------------------------------------------


def test_auroc_is_sklearns_with_ties():
    draw = torch.Generator().manual_seed(0)
    inside = torch.randint(3, 12, (40,), generator=draw).float()
    outside = torch.randint(0, 9, (70,), generator=draw).float()
    expected = roc_auc_score([1] * 40 + [0] * 70, torch.cat([inside, outside]))
    assert auroc(inside, outside) == pytest.approx(expected, abs=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - expected, abs=1e-12)


def test_mahalanobis_is_sklearns_ledoit_wolf_on_standardised_rows():
    own, other = rows(60, seed=0).double(), rows(20, seed=1, away=3).double()
    mean, spread = own.mean(0), own.std(0, correction=0)
    model = LedoitWolf().fit(((own - mean) / spread).numpy())
    expected = torch.from_numpy(model.mahalanobis(((other - mean) / spread).numpy())).sqrt()
    torch.testing.assert_close(mahalanobis(other, own), expected, rtol=0, atol=1e-9)


# --- the gated map -------------------------------------------------------------------------------


def gated() -> Gated:
    """Two behaviours: the first opens with coordinate 0, the second with coordinate 1."""
    inner, gate = Shift(3, 2), Gate(3, 2)
    inner.shifts.copy_(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 10.0]]))
    gate.weight.copy_(torch.eye(3)[:2] * 100)
    return Gated(inner, gate)


def test_each_behaviour_has_its_own_gate():
    h = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [1, 1, 0], [-1, -1, 0], [0, 0, 0]])
    moved = gated()(h, torch.ones(5, 2)) - h
    assert moved[:, 2].tolist() == pytest.approx([1, 10, 11, 0, 5.5])
    assert not moved[:, :2].any()


def test_strengths_add_where_the_gate_reads_what_the_edit_leaves_and_else_they_do_not():
    h, ones = torch.tensor([[0.01, -0.02, 0.0]]), torch.ones(1, 2)
    part = gated()
    torch.testing.assert_close(part(part(h, ones), -ones), h, rtol=0, atol=1e-6)
    part.gate.weight[0, 2] = -1.0
    assert (part(part(h, ones), -ones) - h).norm() > 0.1


def test_a_shut_gate_lets_nothing_of_a_great_strength_through():
    h = torch.tensor([[-1.0, -1.0, 0.0]])
    assert torch.equal(gated()(h, torch.full((1, 2), 1e6)), h)


def test_width_and_sizes_are_the_inner_maps():
    class Sized(Shift):
        sizes = {"rank": 3}

    assert Gated(Sized(5), Gate(5)).sizes == {"rank": 3}
    assert Gated(Shift(5), Gate(5)).sizes == {} and Gated(Shift(5), Gate(5)).width == 5
