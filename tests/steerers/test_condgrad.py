"""CondGrad: a probe says which way, the mean gradient says where to; the sheet's numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from innsteer.activations import Activations, Rows
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerers.condgrad import CondGrad, Conditional

WORDS = ("tea", "rain", "ice", "iron", "wool", "jazz", "rope", "dusk", "salt", "moss")


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def sheet() -> Conditional:
    """w = (1, 0), b = 0, sigma = 1, kappa = 1, g = (0, 1)."""
    part = Conditional(2).double()
    with torch.no_grad():
        part.probe[0, 0], part.write[0, 1] = 1.0, 1.0
    return part.requires_grad_(False)


def seeking(n=80, d=5, *, seed=0, gap=3.0, lift=2.0, behaviour="b", across=1):
    """Rows whose first dimension tells the key, moved along another one, the way the key says."""
    keys = torch.tensor([1.0, -1.0] * (n // 2))
    rows = draw(n, d, seed)
    rows[:, 0] += gap * keys
    move = torch.zeros(n, d)
    move[:, across] = lift * keys
    acts = Activations.of_sides(rows - move / 2, rows + move / 2, behaviour=behaviour)
    names = np.array(["Y" if key > 0 else "N" for key in keys] * 2)
    return replace(acts, rows=replace(acts.rows, key=names))


def joined(*parts):
    values = torch.cat([part.values[part.site] for part in parts])
    records = [record for part in parts for record in part.rows.records()]
    names = tuple(dict.fromkeys(name for part in parts for name in part.behaviours))
    return Activations({parts[0].site: values}, Rows.of(records), names)


def ones(h, strength=1.0):
    return torch.full((len(h), 1), strength, dtype=h.dtype)


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_the_sheets_row_moves_by_the_bounded_readout(strength):
    h = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    want = [[0.5, pytest.approx(math.tanh(0.5) * strength, abs=1e-12)]]
    assert sheet()(h, ones(h, strength)).tolist() == want
    assert math.tanh(0.5) == pytest.approx(0.4621, abs=5e-5)


def test_where_the_write_is_across_the_probe_strengths_add_and_undo_each_other():
    part, h = sheet(), draw(9, 2).double()
    twice = part(part(h, ones(h, 0.7)), ones(h, -1.9))
    torch.testing.assert_close(twice, part(h, ones(h, -1.2)), rtol=0, atol=1e-12)
    back = part(part(h, ones(h, 3.0)), ones(h, -3.0))
    torch.testing.assert_close(back, h, rtol=0, atol=1e-12)
    part.write[0, 0] = 0.5  # now the probe sees what was written
    assert (part(part(h, ones(h)), ones(h)) - part(h, ones(h, 2.0))).norm() > 0.1
    assert (part(part(h, ones(h)), ones(h, -1.0)) - h).norm() > 0.1


def test_a_row_is_pushed_the_way_its_key_says_by_about_a_lift():
    acts = seeking()
    part, fresh = CondGrad().fit(acts)[Site(0)], seeking(seed=1)
    source, target = fresh.sides(Site(0))
    h, keys = (source + target) / 2, torch.tensor([1.0, -1.0] * 40)
    for strength in (1.0, -1.0):
        move = part(h, ones(h, strength)) - h
        assert (move[:, 1].sign() == strength * keys).double().mean() > 0.97
    moved = (part(h, ones(h)) - h)[:, 1].abs()
    assert 1.4 < moved.mean() < 2.0  # tanh of a probe at about kappa
    assert part.write[0].norm().item() == pytest.approx(2, rel=1e-4)
    assert part.write[0, 1].item() == pytest.approx(2, rel=1e-4)


def test_the_probe_is_kappa_standard_deviations_of_its_training_rows():
    acts = seeking()
    part = CondGrad(kappa=1.7).fit(acts)[Site(0)]
    source, target = acts.sides(Site(0))
    reads = ((source + target) / 2) @ part.probe[0] + part.bias[0]
    assert reads.std(correction=0).item() == pytest.approx(1.7, rel=1e-4)


def test_kappa_is_the_dial_of_how_sharply_the_probe_decides():
    acts, h = seeking(), draw(40, 5, 3)
    found = {kappa: CondGrad(kappa=kappa).fit(acts)[Site(0)] for kappa in (0.25, 1.0, 4.0, 1e4)}
    for kappa, part in found.items():
        torch.testing.assert_close(part.probe, kappa * found[1.0].probe, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(part.write, found[1.0].write)
    moved = [float((part(h, ones(h)) - h).norm(dim=1).mean()) for part in found.values()]
    assert moved == sorted(moved) and moved[0] < 0.5 * moved[1]
    sure = found[1e4](h, ones(h)) - h
    torch.testing.assert_close(sure.norm(dim=1), torch.full((40,), 2.0), rtol=1e-3, atol=0)


def test_open_items_get_a_constant_vector():
    gap = torch.tensor([1.0, 2.0, 0.0])
    h = draw(30, 3)
    part = CondGrad().fit(Activations.of_sides(h, h + gap))[Site(0)]
    move = part(9 * h, ones(h)) - 9 * h
    torch.testing.assert_close(move, gap.expand(30, 3), rtol=0, atol=1e-4)


def test_two_behaviours_have_probes_and_vectors_of_their_own():
    one, two = seeking(behaviour="one"), seeking(seed=1, behaviour="two", across=2)
    both = CondGrad().fit(joined(one, two))[Site(0)]
    alone = [CondGrad().fit(acts)[Site(0)] for acts in (one, two)]
    h = draw(9, 5, 4)
    want = h + 0.5 * (alone[0](h, ones(h)) - h) - 2 * (alone[1](h, ones(h)) - h)
    got = both(h, torch.tensor([[0.5, -2.0]]).expand(9, 2))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_validation_rows_choose_the_penalty_and_enter_nothing_else():
    train, grid = seeking(), (1e-4, 1.0)
    records = [
        row | {"split": "validation", "pair": "v" + row["pair"]}
        for row in seeking(seed=2).rows.records()
    ]
    held = seeking(seed=2)
    held = replace(held, rows=Rows.of(records))
    part = CondGrad(grid=grid).fit(joined(train, held))[Site(0)]
    sharp, shy = (CondGrad(grid=(value,)).fit(train)[Site(0)] for value in (1.0, 1e-4))
    assert torch.equal(part.write, sharp.write)
    assert torch.equal(part.probe, sharp.probe)
    swapped = ["N" if key == "Y" else "Y" for key in held.rows.key]
    turned = replace(held, rows=replace(held.rows, key=np.array(swapped)))
    part = CondGrad(grid=grid).fit(joined(train, turned))[Site(0)]
    assert torch.equal(part.probe, shy.probe)


def test_items_of_one_answer_or_of_three_are_refused():
    acts = seeking()
    acts.rows.key[:] = "Y"
    with pytest.raises(InputError, match="one key only"):
        CondGrad().fit(acts)
    acts.rows.key[:] = ["A", "B", "C", "A"] * 40
    with pytest.raises(InputError, match="3 kinds"):
        CondGrad().fit(acts)


@pytest.mark.parametrize(
    "fields",
    [{"kappa": 0.0}, {"kappa": -1.0}, {"kappa": math.inf}, {"kappa": math.nan}]
    + [{"grid": ()}, {"grid": (1.0, 0.0)}, {"grid": (math.nan,)}],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        CondGrad(**fields)


def choice():
    """Questions that Y and N match in turn."""
    items = [
        Item(f"{n}", f"Is {w} good?", *(("N", "Y", "Y") if n % 2 else ("Y", "N", "N")), w)
        for n, w in enumerate(WORDS)
    ]
    return Contrast("b", "choice", tuple(items))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fitted_through_a_model_it_steers_what_the_model_answers(kind):
    run = Through(HF(tiny.tiny_language_model(kind)), [choice()], [Site(2)])
    method = CondGrad()
    maps = method.fit_through(run)
    assert method.through and not any(p.requires_grad for p in maps.parameters())
    plain, up, down = (
        torch.sub(*run.answers(maps, run.items(), [s] * len(WORDS))) for s in (0.0, 1.0, -1.0)
    )
    assert (up - plain).mean() > 0.05 and (down - plain).mean() < -0.05
    assert ((up > plain) & (down < plain)).double().mean() > 0.5
