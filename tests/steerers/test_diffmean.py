"""DiffMean: the numbers of the 2-D fixture and what must not matter."""

import torch

from innsteer.activations import Activations, Rows
from innsteer.site import Site
from innsteer.steerers.diffmean import DiffMean


def shift(acts: Activations) -> torch.Tensor:
    return DiffMean().fit(acts)[acts.site].shifts


def exact(mean: float, n: int = 200) -> torch.Tensor:
    """Rows with mean (mean, 0) and covariance [[1, .8], [.8, 1]], exactly."""
    rows = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.mT @ rows / n)).mT
    wanted = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    rows = white @ torch.linalg.cholesky(wanted).mT
    return rows + rows.new_tensor([mean, 0.0])


def test_on_the_two_dimensional_fixture_the_shift_is_two_and_nothing():
    # within-class covariance does not turn it: LDA would give (5.556, -4.444)
    acts = Activations.of_sides(exact(-1), exact(1))
    torch.testing.assert_close(shift(acts), torch.tensor([[2.0, 0.0]]), rtol=0, atol=1e-6)


def test_the_order_of_pairs_and_pairing_itself_do_not_matter():
    source, target = exact(-1)[:50], exact(1)[:50]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    expected = shift(Activations.of_sides(source, target))
    others = [
        Activations.of_sides(source, target[order]),
        Activations.of_sides(source, target, paired=False),
        Activations.of_sides(source[order], target, paired=False),
    ]
    for acts in others:
        torch.testing.assert_close(shift(acts), expected, rtol=0, atol=1e-6)


def test_strength_one_carries_the_source_mean_onto_the_target_mean():
    source, target = exact(-1).float(), exact(1, n=90).float()
    part = DiffMean().fit(Activations.of_sides(source, target, paired=False))[Site(0)]
    moved = part(source, torch.ones(len(source), 1))
    torch.testing.assert_close(moved.mean(0), target.mean(0), rtol=0, atol=1e-5)


def test_strengths_add_and_minus_s_undoes_s():
    part = DiffMean().fit(Activations.of_sides(exact(-1), exact(1)))[Site(0)]
    h = exact(0, n=8).float()
    ones = torch.ones(8, 1)
    twice = part(part(h, 0.5 * ones), 0.75 * ones)
    torch.testing.assert_close(twice, part(h, 1.25 * ones), rtol=0, atol=1e-6)
    torch.testing.assert_close(part(part(h, ones), -ones), h, rtol=0, atol=1e-6)


def test_every_behaviour_has_its_own_row_in_the_order_of_coef():
    steps = {"warm": [0.0, 3.0], "brief": [-1.0, 0.0]}
    records, rows = [], []
    for name, step in steps.items():
        for side in ("source", "target"):
            rows += [torch.tensor(step) * (side == "target")] * 2
            records += [{"behaviour": name, "item": f"{i}", "side": side} for i in range(2)]
    acts = Activations({Site(0): torch.stack(rows)}, Rows.of(records), ("brief", "warm"))
    assert shift(acts).tolist() == [[-1.0, 0.0], [0.0, 3.0]]


def test_a_small_gap_survives_beside_a_massive_dimension():
    # a mean that is rounded to float32 is off by up to 5e-4 at 8192
    draw = torch.Generator().manual_seed(0)
    source, target = (8192 + torch.randn(300, 2, generator=draw) for _ in range(2))
    expected = target.double().mean(0) - source.double().mean(0)
    got = shift(Activations.of_sides(source, target))[0].double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


def test_only_training_rows_count():
    train = Activations.of_sides(exact(-1), exact(1))
    records = train.rows.records() + [
        row | {"split": split} for split in ("validation", "test") for row in train.rows.records()
    ]
    other = train.values[train.site]
    values = torch.cat([other, 7 * other, -other])
    acts = Activations({Site(0): values}, Rows.of(records), train.behaviours)
    assert torch.equal(shift(acts), shift(train))


def test_a_row_counts_by_its_weight():
    acts = Activations.of_sides(torch.zeros(2, 1), torch.tensor([[0.0], [4.0]]))
    acts.rows.weight[:] = [1.0, 5.0, 1.0, 3.0]
    assert shift(acts).tolist() == [[3.0]]


def test_sites_are_fitted_apart_and_the_seed_is_not_used():
    base = Activations.of_sides(exact(-1), exact(1))
    rows = base.values[base.site]
    acts = Activations({Site(2): rows, Site(0, "mlp"): rows[:, :1]}, base.rows, base.behaviours)
    fitted, again = DiffMean().fit(acts, seed=0), DiffMean().fit(acts, seed=1)
    assert [fitted[site].shifts.shape[-1] for site in fitted] == [1, 2]
    assert torch.equal(fitted[Site(2)].shifts, again[Site(2)].shifts)
