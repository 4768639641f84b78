"""Readouts: pairs taken apart, the write direction, and the probe of the key."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from innsteer.activations import Activations, Rows
from innsteer.errors import InputError
from innsteer.readouts import GRID, Aims, aims, mean_lift, nuisances, probe
from innsteer.site import Site

SITE = Site(0)


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def table(records, values):
    names = tuple(dict.fromkeys(row["behaviour"] for row in records if row["behaviour"]))
    return Activations({SITE: values}, Rows.of(records), names)


def row(side, pair, *, behaviour="b", **columns):
    return {"behaviour": behaviour, "item": pair, "side": side, "pair": pair} | columns


def given(rows, lifts, keys, weight=None):
    """Aims of a choice, all of weight 1 unless told."""
    keys = torch.as_tensor(keys, dtype=torch.float64)
    weight = torch.ones(len(keys)) if weight is None else torch.as_tensor(weight)
    return Aims(rows.double(), lifts.double(), keys, weight.double(), True)


# --- aims ----------------------------------------------------------------------------------------


def test_pairs_are_joined_by_name_whatever_their_order():
    order = ["c", "a", "b"]
    records = [row("target", p, key="Yes") for p in order]
    records += [row("source", p, key="Yes") for p in sorted(order)]
    records += [row("source", "alone"), {"behaviour": "b", "item": "u", "side": "unmoved"}]
    records += [row("target", "a", behaviour="other"), row("source", "a", behaviour="other")]
    target = {"a": 10.0, "b": 20.0, "c": 30.0}
    values = [[target[p]] for p in order] + [[1.0], [2.0], [3.0], [99.0], [98.0], [5.0], [7.0]]
    acts = table(records, torch.tensor(values))
    found = aims(acts, SITE, "b")
    assert found.rows.dtype == found.keys.dtype == torch.float64
    assert found.rows.flatten().tolist() == [5.5, 11, 16.5]
    assert found.lifts.flatten().tolist() == [9, 18, 27]
    assert aims(acts, SITE, "other").rows.tolist() == [[6.0]]


def test_keys_become_plus_and_minus_one_in_the_order_of_their_names():
    for names in (("No", "Yes"), ("A", "B")):
        keys = [names[n % 2] for n in range(4)]
        acts = table(
            [row(side, f"{n}", key=keys[n]) for side in ("source", "target") for n in range(4)],
            draw(8, 2),
        )
        found = aims(acts, SITE, "b")
        assert found.keys.tolist() == [-1, 1, -1, 1] and found.choice


def test_items_without_keys_are_no_choice_and_all_plus_one():
    acts = Activations.of_sides(draw(3, 2), draw(3, 2, 1))
    found = aims(acts, SITE, "behaviour")
    assert found.keys.tolist() == [1, 1, 1] and not found.choice


def parts(keys):
    """Pairs with a key and a split each."""
    records = [
        row(side, f"{n}", key=key, split=split, weight=float(n + 1))
        for side in ("source", "target")
        for n, (key, split) in enumerate(keys)
    ]
    return table(records, torch.arange(2.0 * len(keys)).unsqueeze(1))


def test_a_part_has_its_own_pairs_and_their_weights():
    acts = parts([("Yes", "train"), ("No", "validation"), ("No", "train"), ("Yes", "test")])
    train, held = aims(acts, SITE, "b"), aims(acts, SITE, "b", "validation")
    assert train.rows.flatten().tolist() == [2, 4] and train.weight.tolist() == [1, 3]
    assert held.rows.flatten().tolist() == [3] and held.weight.tolist() == [2]


def test_a_part_with_one_kind_of_answer_keeps_the_sign_of_that_answer():
    acts = parts([("Yes", "train"), ("No", "train"), ("No", "validation"), ("No", "validation")])
    assert aims(acts, SITE, "b").keys.tolist() == [1, -1]
    assert aims(acts, SITE, "b", "validation").keys.tolist() == [-1, -1]


def test_a_part_that_is_not_there_is_empty_but_for_the_training_part():
    acts = parts([("Yes", "train"), ("No", "train")])
    held = aims(acts, SITE, "b", "validation")
    assert len(held.rows) == len(held.keys) == len(held.weight) == 0
    with pytest.raises(InputError, match="'b' has no pairs"):
        aims(acts.where(side="source"), SITE, "b")
    with pytest.raises(InputError, match="'c' has no pairs"):
        aims(acts, SITE, "c")


def test_more_than_two_kinds_of_answers_are_refused():
    acts = parts([("A", "train"), ("B", "train"), ("C", "train")])
    with pytest.raises(InputError, match="3 kinds: A, B, C"):
        aims(acts, SITE, "b")


# --- direction -----------------------------------------------------------------------------------


def test_the_direction_is_that_of_the_keyed_lifts_and_as_long_as_one():
    """The gradients of one answer's odds nearly all point one way; lifts turn with the key."""
    way = torch.tensor([0.6, 0.8, 0.0]).double()
    keys = torch.tensor([1.0, -1.0] * 20).double()
    lifts = 3 * keys[:, None] * way + 0.01 * draw(40, 3)
    found = mean_lift(given(draw(40, 3), lifts, keys))
    torch.testing.assert_close(found, 3 * way, rtol=0, atol=0.01)
    # Lifts without their keys cancel: the usual misreading.
    assert lifts.mean(0).norm() < 0.02


def test_a_long_lift_has_no_more_say_on_the_way_than_a_short_one():
    lifts = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    found = mean_lift(given(draw(2, 2), lifts, [1, 1]))
    assert found[0].item() == pytest.approx(found[1].item())


def test_lifts_across_the_direction_do_not_make_it_longer():
    lifts = torch.tensor([[2.0, 1.0], [2.0, -1.0]])
    torch.testing.assert_close(
        mean_lift(given(draw(2, 2), lifts, [1, 1])), torch.tensor([2.0, 0.0]).double()
    )


def test_weights_count_in_the_direction():
    lifts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert mean_lift(given(lifts, lifts, [1, 1], [1.0, 0.0])).tolist() == [1, 0]
    twice = mean_lift(given(lifts[[0, 0, 1]], lifts[[0, 0, 1]], [1, 1, 1]))
    torch.testing.assert_close(mean_lift(given(lifts, lifts, [1, 1], [2.0, 1.0])), twice)


# --- probe ---------------------------------------------------------------------------------------


def keyed(n, *, seed=0, gap=3.0, noise=1.0, turned=False):
    """Rows in unlike units; the key stands in the second dimension."""
    keys = torch.tensor([1.0, -1.0] * (n // 2))
    rows = noise * draw(n, 4, seed)
    rows[:, 1] += gap * (-keys if turned else keys)
    rows = rows * torch.tensor([1.0, 50.0, 0.1, 1.0]) + torch.tensor([0.0, -800.0, 5.0, 1.0])
    return given(rows, draw(n, 4), keys)


def test_the_probe_reads_a_separable_key_in_the_units_of_the_rows():
    weight, bias = probe(keyed(80), keyed(40, seed=1))
    seen = keyed(200, seed=2)
    right = ((seen.rows @ weight + bias) * seen.keys > 0).double().mean()
    assert right > 0.98 and weight.dtype == torch.float64
    # Per standard deviation, the second dimension has nearly all the weight.
    share = (weight * seen.rows.std(0)).abs()
    assert share[1] > 5 * share[[0, 2, 3]].max()


def test_the_units_of_the_rows_do_not_matter():
    one = keyed(60)
    units, shift = torch.tensor([1e3, 1e-2, 1.0, 7.0]).double(), torch.tensor([5.0, 0, 0, -9])
    other = one._replace(rows=one.rows * units + shift.double())
    (w, b), (v, c) = probe(one, grid=(0.01,)), probe(other, grid=(0.01,))
    torch.testing.assert_close(other.rows @ v + c, one.rows @ w + b, rtol=1e-4, atol=1e-5)


def test_held_out_rows_choose_the_penalty():
    grid, train = (1e-4, 1.0), keyed(40)
    fits = {penalty: probe(train, grid=(penalty,))[0] for penalty in grid}
    assert fits[1.0].norm() > 3 * fits[1e-4].norm()
    assert torch.equal(probe(train, keyed(40, seed=1), grid=grid)[0], fits[1.0])
    # Where the rows say nothing there, or lie, the shy probe is better.
    assert torch.equal(probe(train, keyed(40, seed=1, turned=True), grid=grid)[0], fits[1e-4])


def test_without_held_out_rows_folds_choose_the_penalty():
    grid = (1e-4, 1.0)
    clear, noisy = keyed(40), keyed(40, gap=0.0)
    for part, chosen in ((clear, 1.0), (noisy, 1e-4)):
        empty = part._replace(rows=part.rows[:0], keys=part.keys[:0], weight=part.weight[:0])
        want = probe(part, grid=(chosen,))[0]
        assert torch.equal(probe(part, grid=grid)[0], want)
        assert torch.equal(probe(part, empty, grid=grid)[0], want)


def test_one_key_only_is_refused():
    part = keyed(10)
    with pytest.raises(InputError, match="one key only"):
        probe(part._replace(keys=torch.ones(10).double()))


def test_weights_count_in_the_probe():
    part = keyed(40)
    heavy = torch.tensor([3.0, 1.0, 1.0, 2.0] * 10).double()
    again = torch.repeat_interleave(torch.arange(40), heavy.long())
    twice = Aims(*(column[again] for column in part[:4]), True)
    weighed = probe(part._replace(weight=heavy), grid=(0.01,))
    more = probe(twice._replace(weight=torch.ones(len(again)).double()), grid=(0.01,))
    torch.testing.assert_close(weighed[0], more[0], rtol=1e-4, atol=1e-9)
    assert weighed[1] == pytest.approx(more[1], rel=1e-4)
    # A row that weighs nothing, however far, changes nothing.
    far = torch.cat([part.rows, 1e3 + part.rows[:4]])
    keys, light = torch.cat([part.keys, -part.keys[:4]]), torch.ones(44).double()
    light[40:] = 1e-12
    beside = Aims(far, far, keys, light, True)
    torch.testing.assert_close(
        probe(beside, grid=(0.01,))[0], probe(part, grid=(0.01,))[0], rtol=1e-3, atol=1e-6
    )


def test_a_dimension_that_does_not_vary_is_survived():
    part = keyed(40)
    part.rows[:, 3], part.rows[:, 2] = 8192.25, 0.0
    weight, bias = probe(part)
    assert torch.isfinite(weight).all() and np.isfinite(bias)
    assert ((part.rows @ weight + bias) * part.keys > 0).double().mean() > 0.95


def test_a_probe_is_blind_to_directions_and_reads_the_rest():
    """Rows whose key stands twice; without the louder place the other is read."""
    part = keyed(80)
    part.rows[:, 2] += 0.3 * part.keys
    blind = torch.tensor([[0.0, 7.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    weight, bias = probe(part, keyed(40, seed=1), grid=(0.01,), blind=blind)
    assert (blind.double() @ weight).abs().max() < 1e-9 * weight.abs().max()
    right = ((part.rows @ weight + bias) * part.keys > 0).double().mean()
    assert right > 0.95
    plain, empty = (probe(part, grid=(0.01,), blind=b)[0] for b in (None, blind[:0]))
    assert torch.equal(plain, empty)


def test_nuisances_are_what_other_words_change_most():
    rows = draw(60, 4) * torch.tensor([1.0, 50.0, 0.1, 1.0])
    # Every rewording shifts the third dimension alike, some the first; per spread, not in size.
    moves = torch.zeros(20, 4)
    moves[:, 2], moves[::2, 0] = 0.5, 1.0
    first, second = nuisances(moves, rows.double(), 2)
    assert first[2].abs() / 0.1 > 5 * (first / rows.std(0))[[0, 1, 3]].abs().max() * 1.0
    assert (second / rows.std(0)).abs().argmax() == 0
    assert nuisances(moves, rows.double(), 0).shape == (0, 4)
    with pytest.raises(InputError, match="nuisances=3 without prompts in other words"):
        nuisances(moves[:0], rows.double(), 3)


def test_the_probe_follows_from_its_seed_and_leaves_the_global_dice_alone():
    part, state, other = keyed(40), torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = probe(part, grid=GRID, seed=1), probe(part, grid=GRID, seed=1)
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == other).all()


def test_aims_of_weighed_rows_reach_the_probe():
    acts = parts([("Yes", "train"), ("No", "train")])
    heavy = replace(acts, rows=replace(acts.rows, weight=acts.rows.weight * 2))
    assert aims(heavy, SITE, "b").weight.tolist() == [2, 4]
