"""Standings: rows, ranks by input, Holm, what may be concluded, and the ways to print them."""

import json
import math
import re

import pytest

from innsteer.comparing.standings import page, save, standings
from innsteer.errors import InputError


def record(name, task, shift, *, seed=0, input="classes", metric="alignment", failed="", **more):
    """A cell as a comparison writes it: twelve items whose alignment is 0.5 + shift."""
    cell = {"contender": name, "method": name, "fields": {}, "input": input}
    cell |= {"task": task, "seed": seed, "control": metric}
    if failed:
        return cell | {"failed": failed}
    items = {f"{n:02d}": [[0.5 + shift + 0.01 * (n % 3), 1.0, "Yes"]] for n in range(12)}
    half = {
        "strength": 2.0,
        "items": {metric: items, "said_alignment": items, "answer_mass": items},
        "costs": {"neutral_cost": [0.05, 0.04, 0.06, 90, 0.95], "in_format_cost": [0.01] * 5},
        "tokens_per_second": 50.0 if name == "unsteered" else 40.0,
        "samples": [["Is it so?", "<b>Yes</b>"]],
    }
    point = {"layer": 3, "strength": 2.0, "control": 0.6, "neutral": 0.05, "in_format": 0.01}
    run = {
        "fit_seconds": 8.0,
        "fits": 4,
        "bytes": 2048,
        "memory": 3 << 20,
        "layer": 3,
        "evaluations": [point],
    }
    return cell | {"tested": {"neutral": half, "both": half}} | (run if input else {}) | more


TASKS = [f"t{n}" for n in range(8)]


def cells(**shifts):
    """Contender -> shift (or shift and input), on every task, varied a little by task."""
    found = []
    for name, how in shifts.items():
        shift, input = how if isinstance(how, tuple) else (how, "classes")
        found += [
            record(name.replace("_", "-"), task, shift + 0.002 * n, input=input)
            for n, task in enumerate(TASKS)
        ]
    return found


@pytest.fixture
def records():
    return cells(
        unsteered=(0.0, ""),
        random_direction=(0.01, ""),
        weak=0.1,
        strong=0.3,
        aimed=(0.4, "target"),
        through=(0.2, "model"),
    )


def by_name(table):
    return {row.name: row for row in table.rows}


def test_rows_stand_by_control_with_their_gap_to_the_reference(records):
    both, neutral = sorted(standings(records, against="strong"), key=lambda table: table.half)
    assert (both.half, neutral.half) == ("both", "neutral")
    names = [row.name for row in both.rows]
    assert names == ["aimed", "strong", "through", "weak", "random-direction", "unsteered"]
    rows = by_name(both)
    assert rows["weak"].control.value == pytest.approx(0.5 + 0.1 + 0.007 + 0.01)
    assert rows["weak"].ahead.value == pytest.approx(0.2)
    assert rows["aimed"].ahead.value == pytest.approx(-0.1)
    assert rows["strong"].ahead is None and rows["strong"].p is None
    assert rows["weak"].fit_seconds == 2.0 and rows["weak"].size == 2048
    assert rows["weak"].memory == 3 << 20
    assert rows["weak"].speed == pytest.approx(0.8) and rows["unsteered"].speed == 1.0
    assert rows["weak"].costs == {"neutral_cost": 0.05, "in_format_cost": 0.01}
    assert rows["weak"].said.value == rows["weak"].control.value == rows["weak"].mass.value
    head, *lines = both.grid()
    assert {len(line) for line in lines} == {len(head)} and lines[0][head.index("mass")] == "0.92"


def test_no_ranking_mixes_what_was_fitted_on_other_rows(records):
    rows = by_name(standings(records)[0])
    ranks = {name: row.rank.value for name, row in rows.items() if row.rank}
    classes = {"strong": 1, "weak": 2, "random-direction": 3}
    assert ranks == classes | {"aimed": 1, "through": 2}, "the unsteered have no rank"


def test_holm_counts_every_comparison_that_was_named(records):
    rows = by_name(standings(records, against="strong")[0])
    tested = {name: row.p for name, row in rows.items() if row.p is not None}
    assert set(tested) == {"weak", "aimed", "through", "random-direction"}
    # The least that 2,000 draws can tell, times four comparisons and fewer.
    assert sorted(tested.values()) == [4 / 2000] * 4
    assert rows["unsteered"].ahead is not None


def test_a_conclusion_names_what_is_sure_and_what_is_not(records):
    more = [*records, *cells(twin=0.3)]
    said = standings(more, against="strong")[0].conclusion
    assert "strong is ahead of through, weak and random-direction, is behind aimed" in said
    assert "cannot be told from twin" in said and "5 comparisons" in said
    assert "for no other model" in said and "so few tasks" not in said
    few = [cell for cell in records if cell["task"] in TASKS[:2]]
    assert "so few tasks" in standings(few, against="strong")[0].conclusion


def test_who_lacks_a_task_has_a_figure_and_no_rank(records):
    failed = record("half", TASKS[0], 0, failed="no strength within 0.0953 nats")
    more = [*records, failed, *(record("half", task, 0.9) for task in TASKS[1:])]
    table = standings(more, against="strong", left_out=["late on 8 of its cells"])[0]
    row = by_name(table)["half"]
    assert row.tasks == 7 and row.control.value > 1.3
    assert row.rank is None and row.p is None and row.ahead is None
    assert by_name(table)["strong"].rank.value == 1, "as without it"
    words = table.missing()
    assert words == ["half failed on t0: no strength within 0.0953 nats", "late on 8 of its cells"]
    assert "Left out: half failed on t0" in table.markdown()
    assert "left out: late on 8 of its cells" in table.text()


def test_who_failed_everywhere_is_a_row_that_says_so(records):
    more = [*records, *(record("never", task, 0, failed="needs more rows") for task in TASKS)]
    table = standings(more, against="strong")[0]
    assert table.rows[-1].name == "never" and table.rows[-1].control is None
    assert "| never | recorded classes | failed |" in table.markdown()
    assert page([table], more, {})


def test_seeds_of_a_task_share_its_weight(records):
    once = standings(records, against="strong")[0]
    twice = [*records, *(record("weak", task, 0.1 + 0.2, seed=1) for task in TASKS)]
    row = by_name(standings(twice, against="strong")[0])["weak"]
    assert row.tasks == 8 and row.control.n == by_name(once)["weak"].control.n
    assert row.control.value == pytest.approx(0.5 + 0.01 + (0.1 + 0.007 + 0.3) / 2)


def test_each_metric_of_control_has_its_table(records):
    open_ones = [
        record(name, "open", shift, metric="preference")
        for name, shift in (("x", 0), ("weak", 0.2))
    ]
    tables = standings([*records, *open_ones], against="weak")
    assert [(t.metric, t.half) for t in tables] == [
        (metric, half) for metric in ("alignment", "preference") for half in ("neutral", "both")
    ]
    assert tables[2].tasks == ("open",) and len(tables[2].rows) == 2
    assert by_name(tables[2])["x"].effect != by_name(tables[2])["x"].effect, "NaN: one task"


def test_a_reference_that_is_not_there_is_refused(records):
    with pytest.raises(InputError, match="against 'nobody'; expected one of unsteered"):
        standings(records, against="nobody")
    with pytest.raises(InputError, match="expected one of none"):
        standings([])


def test_a_table_has_the_tasks_of_its_reference_and_names_the_others(records):
    table = standings([*records, record("few", TASKS[0], 0.2)], against="few")[0]
    assert table.tasks == ("t0",) and {row.tasks for row in table.rows} == {1}
    assert by_name(table)["strong"].ahead.value == pytest.approx(-0.1)
    assert table.missing() == [f"{task}, where few has no figure" for task in TASKS[1:]]
    never = [record("never", task, 0, failed="needs more rows") for task in TASKS]
    table = standings([*records, *never], against="never")[0]
    assert table.conclusion.startswith("Nothing may be concluded") and len(table.tasks) == 8


def test_rows_that_lack_tasks_stand_last_and_say_so(records):
    more = [*records, *(record("half", task, 0.9) for task in TASKS[:4])]
    table = standings(more, against="strong")[0]
    assert table.rows[-1].name == "half" and table.rows[-1].control.value > 1.3
    assert "| half (4 of 8 tasks) |" in table.markdown()


def test_only_comparisons_that_were_named_share_the_level(records):
    rows = by_name(standings(records, against="strong", named=["weak", "unsteered"])[0])
    assert {name: row.p for name, row in rows.items() if row.p is not None} == {"weak": 1 / 2000}
    assert rows["aimed"].ahead is not None


def test_where_no_strength_is_within_the_budget_a_method_stands_as_the_plain_model(records):
    def stripped(cell):
        if (cell["contender"], cell["task"]) != ("strong", "t3"):
            return cell
        tested = {"neutral": cell["tested"]["neutral"]}
        return {**cell, "tested": tested, "unmet": {"both": "too dear"}}

    cells = [stripped(cell) for cell in records]
    neutral, both = standings(cells, against="strong")
    rows = by_name(both)
    assert rows["strong"].tasks == 8 and rows["strong"].unmet == ("t3",)
    assert rows["strong"].control.value == pytest.approx(
        by_name(neutral)["strong"].control.value - 0.3 / 8
    )
    told = "stands as the plain model does: strong on t3."
    assert told in both.markdown() and told in both.text() and told in page([both], cells, {})
    assert not neutral.notes() and not both.missing()


def test_what_was_dosed_again_is_noted(records):
    (cell,) = [c for c in records if (c["contender"], c["task"]) == ("weak", "t1")]
    cell["tested"]["both"] = {**cell["tested"]["both"], "over": [3.0]}
    neutral, both = standings(records)
    assert both.notes() == [
        "Dosed again, because the test part cost more than the budget allows: weak on t1."
    ]
    assert not neutral.notes()


def test_of_what_is_better_low_the_lower_stands_first_and_is_ahead(records):
    for cell in records:
        for half in cell["tested"].values():
            half["items"]["over_refusal"] = half["items"]["refusal"] = half["items"]["alignment"]
        cell["measures"] = ["refusal", "over_refusal"]
    found = {t.metric: t for t in standings(records, against="strong") if t.half == "both"}
    assert [found[name].rows[0].name for name in ("refusal", "over_refusal")] == [
        "aimed",
        "unsteered",
    ]
    assert by_name(found["refusal"])["strong"].rank.value == 1
    assert by_name(found["over_refusal"])["strong"].rank.value == 3
    assert "strong is ahead of aimed, is behind" in found["over_refusal"].conclusion
    assert "strong is ahead of through, weak" in found["refusal"].conclusion


def test_tables_are_text_markdown_latex_and_json(records, tmp_path):
    tables = standings([*records, *cells(**{"a|b_c": 0.2})], against="strong")
    markdown = tables[0].markdown()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    latex = tables[0].latex()
    assert latex.count(r"\\") == len(tables[0].rows) + 1 and r"95 \%" in latex
    assert len({line.count(" & ") for line in latex.splitlines() if r"\\" in line}) == 1
    assert "strong" in tables[0].text() and max(map(len, tables[0].text().splitlines()[:6])) < 130
    path = save(tmp_path, tables, records, {"model": "tiny"})
    data = json.loads((tmp_path / "tables.json").read_text(), parse_constant=pytest.fail)
    assert [len(table["rows"]) for table in data["tables"]] == [7, 7]
    first = data["tables"][0]["rows"][0]
    assert first["name"] == "aimed" and set(first["control"]) == {
        "value",
        "low",
        "high",
        "n",
        "level",
    }
    assert path.name == "comparison.html" and (tmp_path / "tables.tex").stat().st_size > 500
    assert (tmp_path / "tables.md").read_text().count("###") == 2


def test_raw_cells_are_a_table_too(records, tmp_path, monkeypatch):
    from pyarrow import parquet

    one, failed = records[16], {**records[17], "failed": "no such layer"}
    del failed["tested"]
    half = {**records[18], "unmet": {"both": "too dear"}, "tested": dict(records[18]["tested"])}
    del half["tested"]["both"]
    one = {**one, "measures": ["said_alignment", "mc1"]}
    one["tested"]["both"]["items"]["mc1"] = {"a": [[1.0, 1.0, ""]], "b": [[0.0, 1.0, ""]]}
    every = [one, failed, half]
    save(tmp_path, standings(every), every, {})
    rows = parquet.read_table(tmp_path / "cells.parquet").to_pylist()
    assert [(row["contender"], row["within"], row["failed"]) for row in rows] == [
        (one["contender"], "neutral", ""),
        (one["contender"], "both", ""),
        (failed["contender"], None, "no such layer"),
        (half["contender"], "neutral", ""),
        (half["contender"], "both", "too dear"),
    ]
    (alone,) = [t for t in standings([one]) if (t.metric, t.half) == ("alignment", "both")]
    assert rows[1]["control"] == pytest.approx(alone.rows[0].control.value)
    assert rows[1]["mc1"] == 0.5, "a benchmark's own measures too"
    assert rows[2]["control"] is rows[4]["control"] is rows[4]["neutral_cost"] is None
    assert rows[0]["neutral_cost"] == one["tested"]["neutral"]["costs"]["neutral_cost"][0]
    monkeypatch.setattr("innsteer.comparing.standings.find_spec", lambda name: None)
    save(tmp_path / "without", [], [one], {})
    assert not (tmp_path / "without" / "cells.parquet").exists()


def test_a_page_holds_every_plot_and_text_of_a_model_is_only_text(records):
    html = page(standings(records, against="strong"), records, {"model": "tiny"})
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', html, re.S).group(1))
    assert [plot["id"] for plot in plots] == [
        "ranking-0",
        "ranking-1",
        *(f"task-{n}" for n in range(8)),
    ]
    assert all(f'id="{plot["id"]}"' in html for plot in plots)
    shown = [y for trace in plots[0]["data"] for y in trace["y"]]
    assert sorted(shown) == sorted({cell["contender"] for cell in records})
    marks = [trace for trace in plots[2]["data"] if trace["mode"] == "markers"]
    assert [trace["text"][0] for trace in marks] == list(
        dict.fromkeys(c["contender"] for c in records)
    )
    assert math.isclose(marks[3]["y"][0], 0.81)
    assert "<b>Yes</b>" not in html and "&lt;b&gt;Yes" in html
