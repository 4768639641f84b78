"""Comparing: equal evaluations for every contender, cells on disk, controls that always stand."""

import json
import math
import time
from collections import Counter
from dataclasses import replace
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny
from innsteer import fitting
from innsteer.activations import Activations
from innsteer.backends.hf import HF
from innsteer.comparing import Comparison, Contender, Protocol, contenders, task
from innsteer.comparing import comparison as sharing
from innsteer.comparing.search import MOST, TOO_DEAR, Evaluation, Search
from innsteer.comparing.standings import HALVES, _costs_plot, page, standings
from innsteer.comparing.task import Cell, shuffled
from innsteer.errors import BudgetError, InnsteerError, InputError, MissingPackage, UnknownName
from innsteer.site import Site
from innsteer.suites import behaviour as suites
from words import contrast, yes_or_no

CHOICE, OPEN = contrast(yes_or_no), contrast()
OTHER = replace(CHOICE, behaviour="another", items=CHOICE.items[:-1])
SMALL = {"evaluations": 9, "items": 6, "search_tokens": 20, "answers": 3}


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Prompts at the size of a test."""
    neutral, own = suites.neutral, suites.in_format
    monkeypatch.setattr(suites, "neutral", lambda part: neutral(part)[:4])
    monkeypatch.setattr(suites, "in_format", lambda of, part: own(of, part)[:6])


def lasting(value):
    """What a record says that is no time and no memory."""
    times = {"seconds", "fit_seconds", "record_seconds", "search_seconds", "tokens_per_second"}
    times.add("memory")
    if isinstance(value, dict):
        return {key: lasting(part) for key, part in value.items() if key not in times}
    return [*map(lasting, value)] if isinstance(value, list) else value


def comparison(model, folder, *rows, tasks=(CHOICE,), **how):
    how = {"protocol": Protocol.of(model, layers=(0, 1, 2), **SMALL)} | how
    return Comparison(model, tasks, folder, contenders=rows, **how)


# --- contenders ----------------------------------------------------------------------------------


def test_every_method_of_the_shelf_contends_on_all_that_it_can_be_fitted_on():
    found = {(one.method, one.input) for one in contenders([CHOICE])}
    assert {("diffmean", "classes"), ("diffmean", "target"), ("loreft", "model")} <= found
    assert ("gated", "target") in found and ("gated", "classes") not in found
    assert ("innsteer", "model") in found and ("innsteer", "classes") in found
    assert {one.input for one in contenders([CHOICE, OPEN])} == {"classes", "model"}
    names = [one.name for one in contenders([CHOICE])]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"method": "difmean"}, UnknownName, "did you mean 'diffmean'"),
        ({"method": "ridge", "grids": 1}, UnknownName, "grids"),
        ({"method": "loreft", "input": "target"}, InputError, "expected 'model'"),
        ({"method": "gated", "input": "classes"}, InputError, "expected 'target'"),
        ({"method": "unsteered", "input": "classes"}, InputError, "expected neither"),
        ({"method": "diffmean", "alone": True}, InputError, "a rule of its own among layers"),
        ({"method": "iti", "input": "target"}, InputError, "expected 'classes'"),
        ({"method": "lora", "input": "classes"}, InputError, "expected input 'model'"),
        ({"method": "lora", "ranks": 4}, UnknownName, "did you mean 'rank'"),
        ({"method": "lora", "loss": "sad"}, UnknownName, "did you mean 'said'"),
        ({"method": "lora", "learning_rate": 0.0}, InputError, "above 0, below 1"),
        ({"method": "lora", "rank": 0}, InputError, "1 to 100000"),
    ],
)
def test_a_contender_that_cannot_be_is_refused(how, error, said):
    with pytest.raises(error, match=said):
        Contender.of(how.pop("method"), **how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"layers": ()}, "at least one"),
        ({"layers": (1, 1)}, "all distinct"),
        ({"layers": (0, 1, 2, 3), "evaluations": 11}, "at least 12"),
        ({"layers": (0,), "budget": 0.0}, "above 0"),
        ({"layers": (0,), "budget": math.inf}, "above 0"),
    ],
)
def test_a_protocol_that_cannot_be_kept_is_refused(how, said):
    with pytest.raises(InputError, match=said):
        Protocol(**how)


def test_candidate_layers_of_the_embedded_model_s_depth():
    class Deep:
        layout = type("Layout", (), {"blocks": [None] * 30})

    assert Protocol.of(Deep()).layers == (9, 14, 19, 24)


# --- search --------------------------------------------------------------------------------------


def law(power, *, peak=math.inf, unit=0.01):
    """Cost grows by a power law; control grows up to a strength and falls beyond it."""

    def evaluate(strength):
        control = 0.5 + 0.1 * (strength if strength <= peak else max(2 * peak - strength, 0))
        return Evaluation(0, strength, control, unit * strength**power, unit / 2, control)

    return evaluate


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("unit", [1e-4, 0.01, 3.0])
def test_a_search_spends_the_budget_in_few_evaluations(power, unit):
    search = Search(law(power, unit=unit), 0.1)
    for _ in range(8):
        search.step("neutral")
    best = search.best("neutral")
    limit = min((0.1 / unit) ** (1 / power), MOST)
    assert 0.8 * limit < best.strength <= limit and len(search.tried) == 8


def test_a_search_finds_a_peak_below_the_budget():
    search = Search(law(2.0, peak=1.2), 0.1)
    for _ in range(10):
        search.step("neutral")
    assert search.best("neutral").strength == pytest.approx(1.2, abs=0.35)


def test_the_in_format_half_may_leave_nothing_within_the_budget():
    def costly(strength):
        return Evaluation(0, strength, 0.6, 0.001 * strength**2, 0.5)

    search = Search(costly, 0.1)
    for _ in range(6):
        search.step("both")
    assert search.best("both") is None and search.best("neutral").control == 0.6


def test_a_search_finds_what_lies_far_below_a_cost_that_hardly_falls():
    """Behind a gate a few prompts may cost all there is at nearly any strength."""

    def flat(strength):
        return Evaluation(0, strength, 0.6, 0.11 if strength > 0.1 else strength**2, 0.0)

    search = Search(flat, 0.1)
    for _ in range(8):
        search.step("neutral")
    assert 0 < search.best("neutral").strength <= 0.1


def test_of_strengths_that_align_alike_the_one_that_says_most_is_taken():
    """Behind a gate no cost binds, and a share of two answers stays where neither is ever said."""

    def gated(strength):
        control = min(0.95 + 0.01 * (strength - 1), 0.96) if strength >= 1 else 0.5 + 0.4 * strength
        return Evaluation(0, strength, control, 0.0, 0.0, 0.9 if strength < 4 else 0.1)

    search, whole = Search(gated, 0.1), Search(gated, 0.1, whole=True)
    for one in (search, whole):
        for _ in range(8):
            one.step("neutral")
    assert max(search.tried) == MOST and 1 <= search.best("neutral").strength < 4
    assert sum(strength < 4 for strength in search.tried) >= 3, "looked for where it was fitted"
    assert whole.best("neutral").strength == MOST, "open answers move last"
    assert whole.done("neutral") and not search.done("neutral")


def test_a_layer_is_not_dropped_for_a_guess_that_lands_just_above_the_budget():
    def layer(**tried):
        search = Search(law(2.0), 0.1)
        for strength, (cost, control) in enumerate(tried.values(), 1):
            search.tried[strength] = Evaluation(0, strength, control, cost, 0.0)
        return search.worth("neutral")

    assert layer(first=(0.01, 0.8), guess=(0.102, 0.97)) == 0.97
    assert layer(first=(0.01, 0.8), guess=(0.5, 0.97)) == 0.8
    assert layer(first=(9.0, 0.9)) < layer(first=(3.0, 0.6)) < 0


@pytest.mark.parametrize("unit", [0.05, 0.5, 3.0])
def test_a_layer_of_an_open_task_is_kept_for_what_it_moves_at_one_cost(unit):
    """Two layers that move alike per root of cost are alike, wherever two guesses landed."""

    def layer(cost, moved):
        search = Search(
            lambda s: Evaluation(0, s, 1.0, cost * s**2, 0.0, moved * s), 0.1, whole=True
        )
        for _ in range(2):
            search.step("neutral")
        return search

    first, second = layer(unit, 4.0), layer(4 * unit, 8.0)
    assert first.worth("neutral") == pytest.approx(second.worth("neutral"))
    assert layer(unit, 5.0).worth("neutral") > first.worth("neutral")
    for _ in range(6):
        first.step("neutral")
    assert first.done("neutral") and first.best("neutral").neutral >= 0.097
    assert not Search(law(2.0), 0.1, whole=True).done("neutral"), "nothing tried"


@pytest.mark.parametrize("grows", [1.0, 2.0])
def test_what_feeds_back_is_kept_for_what_it_moves_at_the_budget(grows):
    """At 2.4 budgets, with a cost that grows as its shift does, it has 2.4 times its due."""
    search = Search(lambda s: Evaluation(0, s, 1.0, s**grows, 0.0, s), 0.1, whole=True)
    for _ in range(2):
        search.step("neutral")
    assert search.worth("neutral") == pytest.approx(0.1 ** (1 / grows))
    search.step("neutral")
    assert search.next("neutral") and search.best("neutral").neutral > 0.09


def test_what_can_never_say_much_is_not_kept_for_what_its_cost_would_leave():
    """A place that moves next to nothing at next to no cost stops at the largest strength."""
    real = Search(lambda s: Evaluation(0, s, 1.0, 0.025 * s**2, 0.0, 1.5 * s), 0.1, whole=True)
    for law in (lambda s: 4e-6 * s, lambda s: 2e-5 * s**0.6, lambda s: 4e-8 * s**2):
        feeble = Search(
            lambda s, law=law: Evaluation(0, s, 1.0, law(s), 0.0, 0.005 * s), 0.1, whole=True
        )
        for one in (real, feeble):
            for _ in range(3):
                one.step("neutral")
        assert feeble.worth("neutral") == pytest.approx(0.005 * MOST)
        assert feeble.worth("neutral") < real.worth("neutral")


def test_a_strength_at_which_control_is_no_number_is_not_taken():
    search = Search(
        lambda s: Evaluation(0, s, 0.0, 0.09, 0.0, -TOO_DEAR if s >= 1 else s), 0.1, whole=True
    )
    search.step("neutral")
    assert search.best("neutral") is None
    search.tried[0.5] = Evaluation(0, 0.5, 0.6, 0.05, 0.0, 0.5)
    assert search.best("neutral").strength == 0.5


def test_three_looks_decide_where_that_leaves_enough(model, tmp_path):
    for evaluations, first in ((24, 3), (12, 2), (9, 1)):
        few = Protocol.of(model, layers=(0, 1, 2), **SMALL | {"evaluations": evaluations})
        whole = comparison(model, tmp_path, Contender.of("diffmean"), protocol=few)
        whole.run()
        (record,) = whole.found()
        tried = Counter(one["layer"] for one in record["evaluations"])
        assert min(tried.values()) == first and tried.total() == evaluations, tried


def test_a_map_that_costs_nothing_is_tried_up_to_the_largest_strength():
    search = Search(lambda s: Evaluation(0, s, 0.5, 0.0, 0.0), 0.1)
    for _ in range(6):
        search.step("neutral")
    assert max(search.tried) == MOST and len(search.tried) == 6


# --- cells ---------------------------------------------------------------------------------------


def test_every_contender_gets_the_same_evaluations_and_all_are_tested(model, tmp_path):
    rows = [*map(Contender.of, ("unsteered", "random-direction", "shuffled-labels", "diffmean"))]
    rows += [Contender.of("diffmean", "target"), Contender.of("condgrad")]
    whole = comparison(model, tmp_path, *rows)
    assert whole.plan() == {"cells": 6, "left": 6, "evaluations": 45, "seconds": None}
    seen = []
    whole.run(progress=lambda *at: seen.append(at))
    assert [done for _, done, _ in seen] == list(range(6)) and not whole.left()
    records = {record["contender"]: record for record in whole.found()}
    for name, record in records.items():
        assert "failed" not in record, record
        assert set(record["tested"]) == {"neutral", "both"}
        half = record["tested"]["both"]
        assert set(half["items"]) >= {"alignment", "answer_mass", "said_alignment"}
        assert len(half["items"]["alignment"]) == len(CHOICE.part("test"))
        if name != "unsteered":
            tried = record["evaluations"]
            assert len(tried) == 9 and {one["layer"] for one in tried} == {0, 1, 2}
            kept = [one for one in tried if one["layer"] == record["layer"]]
            assert len(kept) >= 5, "halving leaves most to the layer that is kept"
            assert half["costs"]["neutral_cost"][0] < 0.2
    alike = [
        record["tested"]
        for record in records.values()
        if len({half.get("strength") for half in record["tested"].values()}) == 1
    ]
    assert len(alike) > 1, "the plain model, and one whose budgets bind alike"
    assert all(tested["both"] == tested["neutral"] for tested in alike), "not tested twice"
    plain = records["unsteered"]["tested"]["both"]
    assert plain["costs"]["neutral_cost"][0] == plain["costs"]["in_format_cost"][0] == 0
    tables = standings(whole.found(), against="diffmean")
    assert len(tables) == 2 and len(tables[0].rows) == 6
    assert whole.plan()["seconds"] == 0


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("innsteer", {"objective": "target", "polish": 2}),
        ("gated", {"method": "condgrad"}),
        ("condgrad", {}),
        ("residual_mlp", {"polish": 2}),
    ],
)
def test_a_fit_is_the_one_that_a_user_gets(model, tmp_path, method, fields):
    contender = Contender.of(method, "model", **fields)
    whole = comparison(model, tmp_path, contender)
    site = Site(1)
    own = task.Task(whole.backend, CHOICE, whole.protocol, "", {})
    made = own.fit(Cell(contender, CHOICE, 0), task.Place((site,)))
    (maps,) = made.arm(1.0).edits
    theirs = fitting.fit(model, CHOICE, contender.steerer, sites=[site]).interventions.state_dict()
    ours = maps.interventions.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_recorded_rows_are_read_as_the_protocol_says(model, tmp_path):
    row, place = Contender.of("diffmean"), task.Place((Site(1),))
    fits = []
    for read in (None, "last"):
        how = Protocol.of(model, layers=(1,), **SMALL, read=read)
        made = task.Task(HF.of(model), OPEN, how, "", {}).fit(Cell(row, OPEN, 0), place)
        alone = fitting.fit(model, OPEN, "diffmean", sites=[Site(1)], read=read).interventions
        fits.append(made.arm(1.0).edit.interventions.state_dict())
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(fits[-1][name], value)
    assert any((fits[0][name] != value).any() for name, value in fits[1].items())


def settled(cost, spent):
    """A strength from 1 on whose check costs ``cost`` and whose test costs ``spent``."""
    stand = SimpleNamespace(protocol=SimpleNamespace(budget=0.1))

    def tested(strength):
        return {"costs": {"neutral_cost": [spent(strength)], "in_format_cost": [9.0]}}

    return task.Task._settled(stand, cost, 1.0, tested, ("neutral_cost",))


def test_what_costs_too_much_on_the_test_part_is_dosed_again():
    found = settled(lambda s: 0.1 * s**2, lambda s: 0.2 * s**2)
    assert found["over"] == [1.0] and 0.5 < found["strength"] < 0.75
    assert found["costs"]["neutral_cost"][0] <= 0.11
    assert settled(lambda s: 0.1 * s**2, lambda s: 0.109)["over"] == []
    with pytest.raises(BudgetError, match="3 strengths within 0.1 nats .* than 1.1 times"):
        settled(lambda s: 0.1 * s**2, lambda s: 0.5)


def test_a_cost_that_is_no_number_is_over_every_budget(model, tmp_path, monkeypatch):
    real = task._scored

    def broken(name, made):
        found = real(name, made)
        return found._replace(value=math.nan, high=math.nan) if name == "neutral_cost" else found

    monkeypatch.setattr(task, "_scored", broken)
    whole = comparison(model, tmp_path, Contender.of("diffmean"))
    whole.run()
    (record,) = whole.found()
    assert not record["tested"] and set(record["unmet"]) == {"neutral", "both"}
    strengths = [one["strength"] for one in record["evaluations"]]
    assert {one["neutral"] for one in record["evaluations"]} == {task.TOO_DEAR}
    assert min(strengths) < 0.01, "ever smaller strengths are tried"


def test_control_that_is_no_number_is_the_least_of_all(model, tmp_path, monkeypatch):
    real = task._scored

    def broken(name, made):
        found = real(name, made)
        return found._replace(value=math.nan) if name == "alignment" else found

    monkeypatch.setattr(task, "_scored", broken)
    whole = comparison(model, tmp_path, Contender.of("diffmean"))
    whole.run()
    (record,) = whole.found()
    assert {one["control"] for one in record["evaluations"]} == {0.0} and record["tested"]


def test_a_fit_whose_numbers_fail_leaves_a_cell_that_says_so(model, tmp_path, monkeypatch):
    def singular(self, acts, *, seed=0):
        raise torch.linalg.LinAlgError("singular matrix")

    monkeypatch.setattr(type(Contender.of("diffmean").steerer), "fit", singular)
    whole = comparison(model, tmp_path, Contender.of("diffmean"), Contender.of("ridge"))
    whole.run()
    first, second = whole.found()
    assert first["failed"] == "singular matrix" and second["tested"]


def test_a_rule_of_its_own_among_layers_is_kept_and_has_a_form_at_one(model, tmp_path):
    rows = [Contender.of("iti", heads=2), Contender.of("iti", heads=2, alone=True)]
    rows += [Contender.of("selective"), Contender.of("selective", "target", alone=True)]
    whole = comparison(model, tmp_path, *rows)
    whole.run()
    iti, one, every, last = whole.found()
    depth = len(model.layout.blocks)
    assert iti["contender"] == "iti heads=2" and one["contender"] == "iti heads=2 at one layer"
    assert iti["fits"] == 1 and 1 <= len(iti["sites"]) <= 2
    assert all(site.endswith(".heads") for site in iti["sites"] + one["sites"])
    assert one["fits"] == 3 and len(one["sites"]) == 1
    assert every["sites"] == [f"{n}.residual" for n in range(depth)]
    assert last["fits"] == 3 and len(last["sites"]) == 1
    for record in (iti, one, every, last):
        assert len(record["evaluations"]) == 9 and record["tested"]["both"]["items"]["alignment"]


def test_loops_contend_with_their_twin_on_rows_of_one_chain(model, tmp_path, monkeypatch):
    made = []
    real = task.linearised

    def counted(*args, **how):
        made.append(real(*args, **how))
        return made[-1]

    monkeypatch.setattr(task, "linearised", counted)
    rows = [Contender.of("alqr", prompts=2), Contender.of("alqr", prompts=2, loop="open")]
    found = comparison(model, tmp_path, *rows)
    found.run()
    assert len(made) == 1
    for record in found.found():
        assert record["input"] == "model" and len(record["sites"]) == 3, record
        assert record["tested"] or record["unmet"]
        assert len(record["evaluations"]) == SMALL["evaluations"]


def test_validation_chooses_the_value_that_no_data_decides(model, tmp_path):
    few = Protocol.of(model, layers=(1,), **SMALL | {"evaluations": 12})
    rows = [Contender.of("pid"), Contender.of("pid", setpoint=3.5)]
    whole = comparison(model, tmp_path, *rows, protocol=few)
    whole.run()
    chosen, named = whole.found()
    levels = [*rows[0].steerer.choices["setpoint"]]
    tried = Counter(one["chosen"]["setpoint"] for one in chosen["evaluations"])
    assert chosen["fits"] == 4 and sorted(tried) == levels and tried.total() == 12
    assert max(tried, key=tried.get) == chosen["chosen"]["setpoint"], "its strength was searched"
    assert named["fits"] == 1 and named["chosen"] == {} and len(named["evaluations"]) == 12
    once = [one["neutral"] for one in chosen["evaluations"] if one["strength"] == 1]
    assert len({*once}) == 4, "another set-point is another map"
    scarce = comparison(model, tmp_path, rows[0])
    scarce.run()
    assert scarce.found()[0]["fits"] == 1, "nine evaluations do not suffice for four values"
    drawn = _costs_plot(whole.found(), "x")["data"]
    assert [len(line["x"]) for line in drawn[::2]] == [max(tried.values()), 12]


def test_a_lora_contends_by_its_scale_and_leaves_the_model_as_it_was(model, tmp_path):
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    rows = [Contender.of("unsteered"), Contender.of("diffmean")]
    rows.append(Contender.of("lora", rank=2, steps=15, learning_rate=1e-2, held=4))
    whole = comparison(model, tmp_path, *rows)
    whole.run()
    plain, diffmean, lora = whole.found()
    assert lora["contender"] == "lora rank=2 steps=15 learning_rate=0.01 held=4"
    assert lora["input"] == "model" and lora["layer"] is None and lora["sites"] == []
    assert len(lora["evaluations"]) == 9 and lora["fits"] == 1 and lora["bytes"] > 0
    assert lora["fit_seconds"] > 0 and lora["record_seconds"] > 0
    costs = {one["strength"]: one["neutral"] for one in lora["evaluations"]}
    assert len(set(costs.values())) > 3, "its scale is the strength"
    items = [one["tested"]["neutral"]["items"]["alignment"] for one in (plain, lora)]
    assert items[0].keys() == items[1].keys() and items[0] != items[1]
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "lora" in page(standings(whole.found()), whole.found(), whole.context())
    other = comparison(model, tmp_path, Contender.of("lora", rank=2, steps=15, held=4))
    assert other.left(), "a learning rate decides a cell"


def test_a_lora_that_fails_leaves_the_model_as_it_was(model, tmp_path, monkeypatch):
    monkeypatch.setattr(task.Task, "_dosed", lambda *_: 1 / 0)
    names = set(model.model.state_dict())
    with pytest.raises(ZeroDivisionError):
        comparison(model, tmp_path, Contender.of("lora", steps=1, held=2)).run()
    assert set(model.model.state_dict()) == names


def test_an_interrupted_comparison_goes_on_and_measures_nothing_twice(model, tmp_path):
    rows = [Contender.of("diffmean"), Contender.of("ridge", grid=[1.0, 10.0])]
    first = comparison(model, tmp_path, *rows)

    def stop(stage, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(progress=stop)
    assert len(first.left()) == 1 and first.left_out() == [
        "ridge grid=[1.0, 10.0] on 1 of its cells"
    ]
    assert first.plan()["seconds"] > 0
    (done,) = (tmp_path / "cells").iterdir()
    before = done.stat().st_mtime_ns
    again = comparison(model, tmp_path, *rows)
    again.run()
    assert not again.left() and done.stat().st_mtime_ns == before
    fresh = comparison(model, tmp_path / "fresh", *rows)
    fresh.run()
    assert lasting(fresh.found()) == lasting(again.found())


def test_cells_shared_by_processes_are_those_of_one(model, tmp_path):
    rows = [Contender.of("unsteered"), Contender.of("diffmean")]
    few = Protocol.of(model, layers=(1,), evaluations=2, items=4, search_tokens=20, answers=2)
    one, two = (
        comparison(model, tmp_path / name, *rows, tasks=(CHOICE, OTHER), protocol=few)
        for name in ("one", "two")
    )
    one.run()
    told = []
    two.run(jobs=2, progress=lambda *at: told.append(at))
    assert told[-1] == ("cells", 4, 4) and not two.left()
    for mine, theirs in zip(one.found(), two.found(), strict=True):
        # Their neutral prompts are all there are, these the few of a test.
        assert mine["contender"] == theirs["contender"] and mine["task"] == theirs["task"]
        assert theirs["tested"].keys() == {"neutral", "both"}
        if mine["contender"] == "unsteered":
            assert mine["tested"]["both"]["items"] == theirs["tested"]["both"]["items"]


def test_a_meter_serves_all_layers_and_a_neutral_one_all_tasks(model, tmp_path, monkeypatch):
    made, real = [], task.Task._make

    def make(task, name):
        made.append((task.contrast.behaviour, name))
        return real(task, name)

    monkeypatch.setattr(task.Task, "_make", make)
    few = Protocol.of(model, layers=(0, 1), evaluations=4, items=4, search_tokens=20, answers=2)
    rows, tasks = [Contender.of("diffmean")], (CHOICE, OTHER)
    whole = comparison(model, tmp_path, *rows, tasks=tasks, protocol=few)
    monkeypatch.setattr(sharing, "_mine", [(whole, Event(), {})])
    for share in whole._shares([0, 1], 2):
        sharing._share(share)
    assert not whole.left() and len(set(made)) == len(made)
    counts = Counter(name for _, name in made)
    assert counts["search validation"] == counts["check validation"] == counts["check test"] == 1
    assert counts["control validation"] == counts["in_format validation"] == 2


def test_what_fails_in_a_process_is_told_and_the_others_stop(model, tmp_path):
    whole = comparison(model, tmp_path, Contender.of("diffmean"), tasks=(CHOICE, OTHER))
    whole.tasks = (CHOICE, replace(OTHER, items=OTHER.items[:1]))
    with pytest.raises(InnsteerError):
        whole.run(jobs=2)
    with pytest.raises(InputError, match="0 jobs"):
        whole.run(jobs=0)


def test_processes_share_tasks_and_part_one_only_where_some_would_be_idle(model, tmp_path):
    rows = [*map(Contender.of, ("unsteered", "diffmean", "ridge", "mimic"))]
    two = comparison(model, tmp_path, *rows, tasks=(CHOICE, OTHER))
    assert two._shares(range(8), 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    one = comparison(model, tmp_path, *rows)
    assert one._shares([0, 1, 3], 2) == [[0, 3], [1]]
    assert one._shares([3], 4) == [[3]]


def test_prefixes_run_once_for_all_that_fit_through_the_model(model, tmp_path, monkeypatch):
    made, real = [], task.through

    def counted(backend, contrast, sites, **how):
        made.append(tuple(sites))
        return real(backend, contrast, sites, **how)

    monkeypatch.setattr(task, "through", counted)
    few = {"steps": 1, "batch": 2}
    rows = [Contender.of("loreft", **few), Contender.of("loreft", rank=2, **few)]
    rows += [Contender.of("condgrad"), Contender.of("ridge", "target")]
    whole = comparison(model, tmp_path, *rows)
    whole.run()
    each = [(Site(layer),) for layer in (0, 1, 2)]
    assert sorted(made) == sorted([*each, tuple(site for (site,) in each)])
    made.clear()
    comparison(model, tmp_path / "gradients", Contender.of("condgrad")).run()
    assert made == [tuple(site for (site,) in each)], "gradients come with the rows"
    found = {record["contender"]: record for record in whole.found()}
    assert not any("failed" in record for record in found.values())
    assert all(record["memory"] is None or record["memory"] > 0 for record in found.values())
    alone = fitting.fit(model, CHOICE, "condgrad", sites=(Site(found["condgrad"]["layer"]),))
    shared = task.Task(HF.of(model), CHOICE, whole.protocol, "", {})
    fit = shared.fit(Cell(rows[2], CHOICE, 0), task.Place(tuple(alone.interventions)))
    for name, value in alone.interventions.state_dict().items():
        torch.testing.assert_close(fit.arm(1.0).edit.interventions.state_dict()[name], value)


def test_what_decides_a_cell_names_its_file(model, tmp_path):
    base = comparison(model, tmp_path, Contender.of("ridge"))
    others = [
        comparison(model, tmp_path, Contender.of("ridge", "target")),
        comparison(model, tmp_path, Contender.of("ridge", grid=[2.0])),
        comparison(model, tmp_path, Contender.of("ridge"), seeds=(1,)),
        comparison(model, tmp_path, Contender.of("ridge"), tasks=(OPEN,)),
        comparison(
            model,
            tmp_path,
            Contender.of("ridge"),
            protocol=Protocol.of(model, layers=(1,), **SMALL),
        ),
        comparison(tiny.tiny_language_model("qwen2"), tmp_path, Contender.of("ridge")),
    ]
    half = tiny.tiny_language_model()
    half.model.to(torch.bfloat16)
    others.append(comparison(half, tmp_path, Contender.of("ridge")))
    found = [one.path(one.cells()[0]) for one in (base, *others)]
    assert len(set(found)) == len(found)
    renamed = replace(tiny.tiny_language_model(), name="elsewhere")
    there = comparison(renamed, tmp_path, Contender.of("ridge"))
    assert there.path(there.cells()[0]) == found[0], "the model, wherever it lies"
    same = comparison(model, tmp_path, Contender.of("diffmean"), Contender.of("ridge"))
    assert same.path(same.cells()[1]) == found[0], "other rows of the table do not matter"


def test_a_method_that_refuses_leaves_a_cell_that_says_so(model, tmp_path, monkeypatch):
    def never(*args):
        raise BudgetError("the cost stays above 0.0953 nats at every strength tried")

    monkeypatch.setattr(task, "within", never)
    whole = comparison(model, tmp_path, Contender.of("diffmean"))
    whole.run()
    (record,) = whole.found()
    assert not record["tested"] and not whole.left()
    assert record["unmet"]["both"].startswith("the cost stays above")
    assert ["failed" in table.markdown() for table in standings([record])] == [True, True]


def test_a_budget_that_cannot_be_met_leaves_the_figures_of_the_other(model, tmp_path, monkeypatch):
    def bare(cost, strength, budget):
        if next(halves) == "both":
            raise BudgetError("the cost stays above 0.0953 nats at every strength tried")
        return strength

    halves = iter(HALVES)
    monkeypatch.setattr(task, "within", bare)
    whole = comparison(model, tmp_path, Contender.of("unsteered"), Contender.of("diffmean"))
    whole.run()
    plain, record = whole.found()
    assert list(record["tested"]) == ["neutral"] and list(record["unmet"]) == ["both"]
    neutral, both = standings([plain, record], against="diffmean")
    assert [row.control is None for row in neutral.rows] == [False, False]
    assert both.notes() == [
        "No strength is within the budget; it stands as the plain model does: "
        "diffmean on formal-ish."
    ]
    first, second = both.rows
    assert first.control == second.control
    assert page([neutral, both], [plain, record], {})


def test_the_time_of_a_fit_is_its_own_and_recording_is_charged_to_all(model, tmp_path, monkeypatch):
    recorded = task.record_parts

    def slow(*args, **how):
        time.sleep(1)
        return recorded(*args, **how)

    monkeypatch.setattr(task, "record_parts", slow)
    rows = [Contender.of("random-direction"), Contender.of("diffmean"), Contender.of("ridge")]
    whole = comparison(model, tmp_path, *rows)
    whole.run()
    for record in whole.found():
        assert record["fit_seconds"] < 1 <= record["record_seconds"] < 20


def test_an_error_of_the_software_is_no_result(model, tmp_path, monkeypatch):
    def broken(*args, **how):
        raise RuntimeError("a bug")

    monkeypatch.setattr(task, "fit_rows", broken)
    whole = comparison(model, tmp_path, Contender.of("diffmean"))
    with pytest.raises(RuntimeError):
        whole.run()
    assert len(whole.left()) == 1


def test_a_package_that_is_missing_is_no_result(model, tmp_path, monkeypatch):
    def missing(control):
        raise MissingPackage("vaderSentiment", "the sentiment scorer", "demo")

    monkeypatch.setattr(task, "require_scorer", missing)
    whole = comparison(model, tmp_path, Contender.of("diffmean"))
    with pytest.raises(MissingPackage):
        whole.run()
    assert len(whole.left()) == 1


def test_an_instruction_is_an_arm_where_one_is_known(model, tmp_path):
    rows = [Contender.of("prompt-only"), Contender.of("unsteered")]
    assert len(comparison(model, tmp_path, *rows).cells()) == 1
    told = comparison(model, tmp_path, *rows, instructions={CHOICE.behaviour: "Always say Yes."})
    told.run()
    asked, plain = told.found()
    assert asked["contender"] == "prompt-only" and asked["tested"]["both"]["items"]
    assert asked["tested"]["both"]["costs"]["neutral_cost"][0] > 0.01
    assert asked["tested"]["both"]["samples"][0][0].endswith("Always say Yes.")
    assert asked["tested"]["both"]["items"] != plain["tested"]["both"]["items"]
    other = comparison(model, tmp_path, *rows, instructions={CHOICE.behaviour: "Say No."})
    assert len(other.left()) == 1
    with pytest.raises(UnknownName, match="behaviour 'unknown'"):
        comparison(model, tmp_path, *rows, instructions={"unknown": "Say No."})


def test_open_answers_are_compared_by_preference_within_the_neutral_cost(model, tmp_path):
    whole = comparison(
        model, tmp_path, Contender.of("unsteered"), Contender.of("diffmean"), tasks=(OPEN,)
    )
    whole.run()
    for record in whole.found():
        assert record["control"] == "preference" and set(record["tested"]) == {"neutral"}
        assert "preference" in record["tested"]["neutral"]["items"]


def test_what_has_no_seed_runs_once(model, tmp_path):
    rows = [Contender.of("unsteered"), Contender.of("diffmean")]
    cells = comparison(model, tmp_path, *rows, seeds=(0, 1)).cells()
    assert [(c.contender.method, c.seed) for c in cells] == [
        ("unsteered", 0), ("diffmean", 0), ("diffmean", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"tasks": ()}, "tasks without distinct names: none"),
        ({"tasks": (CHOICE, CHOICE)}, "tasks without distinct names"),
        ({"rows": [Contender.of("diffmean")] * 2}, "contenders without distinct names"),
        ({"seeds": ()}, "seeds without"),
    ],
)
def test_names_that_are_not_distinct_are_refused(model, tmp_path, how, said):
    rows = how.pop("rows", [Contender.of("diffmean")])
    with pytest.raises(InputError, match=said):
        comparison(model, tmp_path, *rows, **how)


def test_shuffled_labels_swap_whole_items_and_nothing_else():
    rows = torch.arange(80.0).reshape(80, 1)
    acts = Activations.of_sides(rows[:40], rows[40:])
    mixed = shuffled(acts, 0)
    assert torch.equal(mixed.values[acts.site], acts.values[acts.site])
    changed = mixed.rows.side != acts.rows.side
    assert 20 < changed.sum() < 60
    for item in set(acts.rows.item.tolist()):
        assert len(set(changed[acts.rows.item == item].tolist())) == 1
    assert np.array_equal(shuffled(acts, 0).rows.side, mixed.rows.side)
    assert not np.array_equal(shuffled(acts, 1).rows.side, mixed.rows.side)
    still = replace(acts, rows=replace(acts.rows, side=np.full(80, "unmoved")))
    assert np.array_equal(shuffled(still, 0).rows.side, still.rows.side)


def test_cells_are_plain_json(model, tmp_path):
    whole = comparison(model, tmp_path, Contender.of("diffmean"))
    whole.run()
    (path,) = (tmp_path / "cells").iterdir()
    json.loads(path.read_text(), parse_constant=pytest.fail)
