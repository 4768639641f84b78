"""Ridge: it finds a known affine map, shrinks to a shift, and heeds rows that must not move."""

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from torch import Tensor

from innsteer.activations import Activations, Rows
from innsteer.errors import InputError
from innsteer.interventions import Affine
from innsteer.site import Site
from innsteer.steerers.ridge import Ridge


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def joined(*parts: Activations) -> Activations:
    """One recording of several."""
    values = torch.cat([part.values[part.site] for part in parts])
    records = [record for part in parts for record in part.rows.records()]
    return Activations({parts[0].site: values}, Rows.of(records), parts[0].behaviours)


def still(rows: Tensor, **columns) -> Activations:
    """Rows that must not move."""
    records = [
        {"behaviour": "behaviour", "item": f"u{i}", "side": "unmoved"} | columns
        for i in range(len(rows))
    ]
    return Activations({Site(0): rows}, Rows.of(records), ("behaviour",))


def as_split(acts: Activations, split: str) -> Activations:
    records = [
        row | {"split": split, "pair": split + row["pair"], "item": split + row["item"]}
        for row in acts.rows.records()
    ]
    return replace(acts, rows=Rows.of(records))


def fit(acts: Activations, *penalties: float, **fields) -> Affine:
    return Ridge(**fields | ({"grid": penalties} if penalties else {})).fit(acts)[acts.site]


def test_a_known_affine_map_is_recovered_at_a_tiny_penalty():
    source, turn, shift = draw(60, 5), draw(5, 5, 1), draw(1, 5, 2)
    part = fit(Activations.of_sides(source, source @ turn.mT + shift), 1e-10)
    torch.testing.assert_close(part.residuals[0], turn - torch.eye(5), rtol=0, atol=1e-5)
    h = 5 * draw(9, 5, 3)
    torch.testing.assert_close(part(h, torch.ones(9, 1)), h @ turn.mT + shift, rtol=0, atol=1e-4)


def test_at_a_huge_penalty_the_mean_shift_is_left():
    source, target = draw(40, 5), draw(40, 5, 1) + 2
    part = fit(Activations.of_sides(source, target), 1e9)
    assert part.residuals.abs().max() < 1e-6
    expected = (target - source).mean(0, keepdim=True)
    torch.testing.assert_close(part.shifts, expected, rtol=0, atol=1e-6)


def test_in_standardised_units_it_is_the_ridge_of_scikit_learn_on_the_moves():
    source, target = draw(30, 6).double(), draw(30, 6, 1).double()
    source = source - source.mean(0)
    source = source / source.std(0, correction=0)
    part = fit(Activations.of_sides(source, target), 0.3)
    other = SklearnRidge(alpha=0.3 * 30).fit(source.numpy(), (target - source).numpy())
    expected = torch.from_numpy(other.coef_).float()
    torch.testing.assert_close(part.residuals[0], expected, rtol=0, atol=1e-5)


def test_the_penalty_has_no_unit():
    # the same rows in other units per dimension: the same map in those units
    source, target, units = draw(30, 4), draw(30, 4, 1), torch.tensor([1.0, 1e3, 1e-2, 30.0])
    plain = fit(Activations.of_sides(source, target), 0.5)
    scaled = fit(Activations.of_sides(source * units, target * units), 0.5)
    expected = plain.residuals[0] * units.unsqueeze(1) / units
    torch.testing.assert_close(scaled.residuals[0], expected, rtol=1e-4, atol=1e-8)


def test_rows_that_must_not_move_pull_the_map_to_the_identity_where_they_are():
    source, calm = draw(40, 3), draw(40, 3, 1) + torch.tensor([8.0, 0.0, 0.0])
    pairs = Activations.of_sides(source, source + torch.tensor([0.0, 2.0, 0.0]))
    alone, both = fit(pairs, 1e-3), fit(joined(pairs, still(calm)), 1e-3)
    ignored = fit(joined(pairs, still(calm)), 1e-3, unmoved=0.0)

    def moved(part: Affine, rows: Tensor) -> float:
        return float((part(rows, torch.ones(len(rows), 1)) - rows).norm(dim=1).mean())

    assert moved(alone, calm) == pytest.approx(2, abs=0.05)
    assert moved(both, calm) < 0.5 and moved(both, source) == pytest.approx(2, abs=0.3)
    assert torch.equal(ignored.residuals, alone.residuals)


def test_more_weight_on_rows_that_must_not_move_moves_them_less():
    source, calm = draw(40, 3), draw(40, 3, 1) + 3
    acts = joined(Activations.of_sides(source, source + 2), still(calm))
    moved = [
        float((fit(acts, 1.0, unmoved=unmoved)(calm, torch.ones(40, 1)) - calm).norm())
        for unmoved in (0.0, 0.1, 1.0, 10.0)
    ]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.2 * moved[0]
    heavy = replace(acts.rows, weight=torch.where(torch.tensor(acts.rows.side == "unmoved"), 10, 1))
    heavy = replace(heavy, weight=heavy.weight.double().numpy())
    part = fit(replace(acts, rows=heavy), 1.0)
    assert float((part(calm, torch.ones(40, 1)) - calm).norm()) == pytest.approx(moved[-1])


def test_validation_pairs_choose_the_penalty():
    source, turn = draw(60, 4), draw(4, 4, 1)
    train = Activations.of_sides(source, source @ turn.mT)
    other = draw(60, 4, 2)
    for held, chosen in (
        (Activations.of_sides(other, other @ turn.mT), 1e-6),  # the same map: trust the pairs
        (Activations.of_sides(other, other), 1e6),  # no map at all
    ):
        part = fit(joined(train, as_split(held, "validation")), 1e-6, 1e6)
        assert torch.equal(part.residuals, fit(train, chosen).residuals)


@pytest.mark.parametrize(("noise", "chosen"), [(0.0, 1e-6), (5.0, 1e6)])
def test_without_validation_pairs_held_out_training_pairs_choose(noise, chosen):
    source, turn = draw(40, 12), draw(12, 12, 1)
    target = source @ turn.mT if not noise else source + noise * draw(40, 12, 2)
    acts = Activations.of_sides(source, target)
    assert torch.equal(fit(acts, 1e-6, 1e6).residuals, fit(acts, chosen).residuals)


def test_a_single_pair_gives_its_shift():
    part = fit(Activations.of_sides(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])))
    assert part.residuals.abs().max() == 0 and part.shifts.tolist() == [[1.0, 2.0]]


def test_the_tokens_of_a_pair_are_meaned_by_weight():
    source, target = draw(20, 2), draw(20, 2, 1)
    plain = Activations.of_sides(source, target)
    twice = joined(plain, plain.where(side="target"))
    twice.values[twice.site][40:] += 4
    twice.rows.weight[40:] = 3
    expected = Activations.of_sides(source, target + 3)
    torch.testing.assert_close(fit(twice, 0.1).shifts, fit(expected, 0.1).shifts, rtol=0, atol=1e-5)


def test_a_pair_weighs_as_much_as_its_lighter_side():
    acts = Activations.of_sides(torch.zeros(2, 1), torch.tensor([[0.0], [4.0]]))
    acts.rows.weight[:] = [1.0, 3.0, 9.0, 5.0]
    assert fit(acts, 1.0).shifts.tolist() == [[3.0]]


def test_two_behaviours_have_their_own_maps_and_add():
    source, turns = draw(30, 3), draw(6, 3, 1).reshape(2, 3, 3)
    names, h, mix = ("warm", "brief"), draw(5, 3, 2), torch.tensor([[0.5, -2.0]])
    parts = [
        Activations.of_sides(source + 1, source @ turn.mT, behaviour=name)
        for name, turn in zip(names, turns, strict=True)
    ]
    both = fit(replace(joined(*parts), behaviours=names), 1e-9)
    alone = [fit(part, 1e-9)(h, torch.ones(5, 1)) - h for part in parts]
    expected = h + 0.5 * alone[0] - 2 * alone[1]
    torch.testing.assert_close(both(h, mix.expand(5, 2)), expected, rtol=0, atol=1e-4)


def test_a_dimension_that_does_not_vary_gets_a_shift_only():
    source, target = draw(30, 3), draw(30, 3, 1)
    source[:, 1] = 8192.25
    part = fit(Activations.of_sides(source, target), 1e-6)
    assert part.residuals[0, :, 1].abs().max() == 0 and part.residuals[0, 0, 0] != 0
    assert float(part.shifts[0, 1]) == pytest.approx(float(target[:, 1].mean()) - 8192.25, rel=1e-6)


def test_unpaired_rows_are_refused():
    acts = Activations.of_sides(draw(9, 2), draw(9, 2, 1), paired=False)
    with pytest.raises(InputError, match="'behaviour' has no whole pair"):
        Ridge().fit(acts)


@pytest.mark.parametrize(
    "fields",
    [{"grid": ()}, {"grid": (1.0, 0.0)}, {"grid": (float("nan"),)}, {"unmoved": -1.0}]
    + [{"holdout": 0.0}, {"holdout": 1.0}],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        Ridge(**fields)


def test_an_affine_map_too_wide_for_memory_is_refused():
    with pytest.raises(InputError, match="2\\^30"):
        Ridge().build({Site(0): 65_536})
