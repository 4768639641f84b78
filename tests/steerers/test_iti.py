"""ITI: the authors' probes, ranks, directions and spreads; who is chosen, and that others stay."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from innsteer import fitting
from innsteer.activations import Activations, Rows
from innsteer.errors import InputError, UnknownName
from innsteer.site import Site, Where
from innsteer.steerers.iti import ITI, labelled, spread
from words import contrast

HEADS = [Site(0, "heads"), Site(1, "heads"), Site(2, "heads")]


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Tensor]:
    folder = shared / "goldens" / "iti"
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))["cases"][0]
    assert case["params"]["K"] == 5
    return load_file(folder / case["file"])


def theirs(golden: dict[str, Tensor], *, join: bool = False) -> Activations:
    """The golden's rows: a question is an item; ``join`` trains on the validation part too."""
    questions = torch.repeat_interleave(torch.arange(40), golden["question_sizes"])
    parts = {int(i): "train" for i in golden["train_idx"]}
    parts |= {int(i): "train" if join else "validation" for i in golden["val_idx"]}
    records = [
        {
            "behaviour": "true",
            "item": f"{question}",
            "side": ("source", "target")[label],
            "split": parts.get(question, "test"),
        }
        for question, label in zip(questions.tolist(), golden["labels"].tolist(), strict=True)
    ]
    values = {site: golden["activations"][:, site.layer].flatten(1) for site in HEADS}
    return Activations(values, Rows.of(records), ("true",))


def in_heads(maps, sites=HEADS) -> Tensor:
    """The shifts as ``[layers, heads, 8]``, zeros at sites that are left out."""
    kept = {site: part.shifts[0] for site, part in maps.items()}
    return torch.stack([kept.get(site, torch.zeros(32)).reshape(4, 8) for site in sites])


# --- the authors' numbers ------------------------------------------------------------------------


def test_probes_are_as_accurate_and_rank_as_the_authors(golden):
    ranked = ITI(head_width=8).ranked(theirs(golden), "true")
    accuracy = torch.zeros(3, 4, dtype=torch.float64)
    for head in ranked:
        accuracy[head.site.layer, head.start // 8] = head.accuracy
    one_row = 1 / int(golden["question_sizes"][golden["val_idx"]].sum())
    torch.testing.assert_close(accuracy, golden["head_acc"], rtol=0, atol=one_row + 1e-9)
    first = [[head.site.layer, head.start // 8] for head in ranked[:5]]
    assert first == golden["top_heads"].tolist()


def test_the_five_best_heads_are_shifted_and_no_other(golden):
    shifts = in_heads(ITI(heads=5, head_width=8).fit(theirs(golden)))
    assert shifts.abs().sum(-1).nonzero().tolist() == golden["selected_sorted"].tolist()


def test_mean_directions_and_spreads_are_the_authors(golden):
    acts = theirs(golden, join=True)
    apart = in_heads(ITI(head_width=8).fit(acts))
    torch.testing.assert_close(apart.flatten(0, 1), golden["com_directions"], rtol=0, atol=1e-5)
    shifts = in_heads(ITI(head_width=8, alpha=15).fit(acts))
    for unit, sigma, (layer, head) in selected(golden, "com"):
        own = torch.nn.functional.normalize(shifts[layer, head], dim=0)
        torch.testing.assert_close(own, unit, rtol=0, atol=1e-5)
        rows = golden["activations"][:, layer, head]
        # Theirs is of every row; a fit's is of the training part, and that at strength 1 / 15.
        everything = spread(rows @ unit, torch.ones(len(rows)))
        torch.testing.assert_close(everything, sigma, rtol=0, atol=1e-5)
        rows, _, weight = labelled(acts.where(split="train"), HEADS[layer], "true")
        expected = 15 * spread(rows[:, 8 * head : 8 * head + 8] @ unit.double(), weight)
        assert float(shifts[layer, head].norm()) == pytest.approx(float(expected), rel=1e-5)


def test_probe_directions_are_the_authors_to_their_optimisers_precision(golden):
    shifts = in_heads(ITI(head_width=8, direction="probe").fit(theirs(golden)))
    for unit, _, (layer, head) in selected(golden, "probe"):
        own = torch.nn.functional.normalize(shifts[layer, head], dim=0)
        torch.testing.assert_close(own, unit, rtol=0, atol=1e-2)


def selected(golden: dict[str, Tensor], kind: str):
    """Unit direction, spread and (layer, head) of each head that the authors select."""
    places = golden["selected_sorted"].tolist()
    return zip(golden[f"{kind}_unit"], golden[f"{kind}_sigma"], places, strict=True)


# --- the method ----------------------------------------------------------------------------------


def telling(width: int = 4, *, good: tuple[tuple[int, int], ...], n: int = 60) -> Activations:
    """Heads of width 2 at three sites; the good ones (layer, head) tell the sides apart."""
    draw = torch.Generator().manual_seed(0)
    values = {site: torch.randn(2 * n, width, generator=draw) for site in HEADS}
    for layer, head in good:
        values[HEADS[layer]][n:, 2 * head] += 6
    table = Activations.of_sides(values[HEADS[0]][:n], values[HEADS[0]][n:])
    return replace(table, values=values)


def held_from(acts: Activations, first: int) -> Activations:
    """The same with the items from the first on as validation part."""
    split = np.where(acts.rows.item.astype(int) < first, "train", "validation")
    return replace(acts, rows=replace(acts.rows, split=split))


def test_heads_that_are_not_chosen_get_nothing_and_their_sites_are_left_out():
    acts = telling(good=((0, 1), (2, 0)))
    maps = ITI(heads=2, head_width=2).fit(acts)
    assert list(maps) == [HEADS[0], HEADS[2]]
    for site, start in ((HEADS[0], 2), (HEADS[2], 0)):
        shift = maps[site].shifts[0]
        assert shift[start] > 5 and shift[2 - start : 4 - start].tolist() == [0, 0]


def test_held_out_rows_choose_the_head_not_the_rows_that_the_probes_saw():
    acts = held_from(telling(good=((0, 0), (1, 1))), 40)
    (first,) = ITI(heads=1, head_width=2).fit(acts)
    (second,) = set(HEADS[:2]) - {first}
    # There alone, the sides change places.
    index = torch.from_numpy(acts.rows.split == "validation")
    acts.values[first][index] = acts.values[first][index].flip(0)
    assert list(ITI(heads=1, head_width=2).fit(acts)) == [second]


def test_without_a_validation_part_whole_items_are_held_out():
    # Many rows of an item lie close together and their sides at random: to have seen the item is
    # to know its side, which tells nothing of another item.
    draw = torch.Generator().manual_seed(0)
    centres = 9 * torch.randn(20, 32, generator=draw)
    items = torch.arange(20).repeat_interleave(6)
    rows = centres[items] + 0.01 * torch.randn(120, 32, generator=draw)
    records = [
        {"behaviour": "b", "item": f"{i}", "side": ("source", "target")[i % 2]}
        for i in items.tolist()
    ]
    acts = Activations({Site(0): rows}, Rows.of(records), ("b",))
    accuracies = [ITI().ranked(acts, "b", seed=seed)[0].accuracy for seed in range(8)]
    assert sum(accuracies) / 8 < 0.75


def test_a_shift_is_alpha_standard_deviations_long():
    # Projections -1 and 1 equally often: sigma = 1.
    source, target = torch.tensor([[-1.0, 5.0]] * 4), torch.tensor([[1.0, 5.0]] * 4)
    acts = Activations.of_sides(source, target)
    torch.testing.assert_close(ITI(alpha=15).fit(acts)[Site(0)].shifts, torch.tensor([[15.0, 0]]))
    torch.testing.assert_close(ITI().fit(acts)[Site(0)].shifts, torch.tensor([[2.0, 0]]))


def test_the_probes_direction_is_not_the_means_where_dimensions_correlate():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 400, 2, generator=draw) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    acts = Activations.of_sides(
        noise[0] - torch.tensor([1.0, 0]), noise[1] + torch.tensor([1.0, 0])
    )
    shift = ITI(direction="probe").fit(acts)[Site(0)].shifts[0]
    unit = shift / shift.norm()
    torch.testing.assert_close(unit, torch.tensor([0.781, -0.625]), rtol=0, atol=0.05)
    apart = ITI().fit(acts)[Site(0)].shifts[0]
    torch.testing.assert_close(shift @ unit, apart @ unit)  # as far as the means along it


def test_behaviours_choose_heads_of_their_own():
    one, other = (telling(good=good) for good in (((0, 0),), ((1, 1),)))
    records = [
        row | {"behaviour": name}
        for name, part in (("one", one), ("other", other))
        for row in part.rows.records()
    ]
    values = {site: torch.cat([one.values[site], other.values[site]]) for site in HEADS}
    maps = ITI(heads=1, head_width=2).fit(Activations(values, Rows.of(records), ("other", "one")))
    assert list(maps) == [HEADS[0], HEADS[1]]
    assert maps[HEADS[0]].shifts[0].abs().max() == 0 and maps[HEADS[0]].shifts[1, 0] > 5
    assert maps[HEADS[1]].shifts[1].abs().max() == 0 and maps[HEADS[1]].shifts[0, 2] > 5


def test_weights_count_in_the_accuracy():
    acts = held_from(telling(good=((0, 0),)), 40)
    wrong = (acts.rows.side == "target") & (acts.rows.split == "validation")
    acts.values[HEADS[0]][torch.from_numpy(wrong)] -= 6

    def accuracy() -> float:
        ranked = ITI(head_width=2).ranked(acts, "behaviour")
        (found,) = (head for head in ranked if head[1:3] == (HEADS[0], 0))
        return found.accuracy

    assert accuracy() < 0.6
    acts.rows.weight[wrong] = 1e-6
    assert accuracy() > 0.95


def test_on_a_model_it_is_a_bias_of_the_output_projection():
    model = tiny.tiny_language_model()
    steering = fitting.fit(model, contrast(), ITI(heads=3), where=Where("all"))
    told = fitting.fit(
        model, contrast(), ITI(heads=3, head_width=12), sites=HEADS, where=Where("all")
    )
    assert [*told.interventions] == [*steering.interventions], "the heads of all layers, as wide"
    for site, part in told.interventions.items():
        assert torch.equal(part.shifts, steering.interventions[site].shifts)
    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        plain = model.model(ids).logits
        with steering.on(model, strength=2.0):
            steered = model.model(ids).logits
        for site, part in steering.interventions.items():
            out = model.layout.blocks[site.layer].attention_out
            out.bias = torch.nn.Parameter(2.0 * part.shifts[0] @ out.weight.mT)
        baked = model.model(ids).logits
    assert (steered - plain).norm() > 1
    torch.testing.assert_close(steered, baked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [None, 3])
def test_heads_of_unknown_width_are_refused(width):
    with pytest.raises(InputError, match=f"head_width={width} for rows of 4"):
        ITI(head_width=width).fit(telling(good=()))


@pytest.mark.parametrize(
    "fields",
    [{"heads": 0}, {"head_width": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"C": -1.0}]
    + [{"holdout": 0.0}, {"holdout": 1.0}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        ITI(**fields)


def test_an_unknown_direction_is_refused():
    with pytest.raises(UnknownName, match="probe"):
        ITI(direction="com")
