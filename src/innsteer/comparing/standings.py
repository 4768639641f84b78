"""Standings: the table of a comparison, with intervals, ranks and what may be concluded."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from innsteer import metrics
from innsteer.comparing.statistics import Draws, Items, holm, resample
from innsteer.errors import InputError
from innsteer.files import fresh_file, write_json, write_text
from innsteer.metrics.base import Measured, Score
from innsteer.report import pages
from innsteer.report.figures import PLAIN, UNSTEERED

LEVEL = 0.05
"""Of the whole family of comparisons."""
INPUTS = {
    "classes": "recorded classes",
    "target": "target-seeking rows",
    "model": "the model",
    "": "nothing, or as a control",
}
COLOURS = {
    "classes": "var(--arm-3)",
    "target": "var(--arm-1)",
    "model": "var(--arm-4)",
    "": "var(--arm-0)",
}
SIGNS = {"classes": "\u25c6", "target": "\u25b2", "model": "\u25cf", "": "\u25a0"}
SYMBOLS = {"classes": "diamond", "target": "triangle-up", "model": "circle", "": "square"}
Half = Literal["neutral", "both"]
"""Which costs the budget binds: the neutral one alone, or the worse of it and the in-format one."""
HALVES: dict[Half, str] = {"neutral": "the neutral cost", "both": "both halves of the cost"}
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """One contender in a table.

    Attributes:
        input: what it was fitted on. tasks: how many of the table's it has.
        control: mean over its tasks. rank: among those of its input, where it has all tasks.
        ahead: what the reference is ahead by, paired. p: of that, Holm-corrected, where the
            comparison was named. effect: that gap in standard deviations over tasks.
        costs: mean of each, nats. said: share of sampled answers that say so; mass: what the two
            answers hold of all that could be said; both None where open.
        fit_seconds: of one fit; memory: bytes that it took; size: bytes of the result.
        speed: tokens per second over the plain model's.
        failed: tasks that it could not do, and why. unmet: those on which no strength is within the
            budget; it stands there as the plain model does, which strength 0 is. over: those on
            which a first strength cost too much on the test part, so that another was taken.
    """

    name: str
    input: str
    tasks: int
    control: Score | None = None
    rank: Score | None = None
    ahead: Score | None = None
    p: float | None = None
    effect: float | None = None
    costs: Mapping[str, float] | None = None
    said: Score | None = None
    mass: Score | None = None
    fit_seconds: float | None = None
    memory: float | None = None
    size: float | None = None
    speed: float | None = None
    failed: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Standings:
    """Contenders on tasks that one metric measures, at one budget.

    Attributes:
        metric: of control. half: which costs the budget binds. against: the reference.
        tasks, seeds: what is in it: tasks that the reference did, where it did any. rows: by
            control, the best first; behind them those that lack tasks.
        left_out: cells that were not measured, in words. conclusion: what may be concluded.
    """

    metric: str
    half: Half
    against: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[Standing, ...]
    left_out: tuple[str, ...]
    conclusion: str

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is not a number is null."""
        found = asdict(self)
        for row, own in zip(found["rows"], self.rows, strict=True):
            for name in ("control", "rank", "ahead", "said", "mass"):
                score = getattr(own, name)
                row[name] = None if score is None else score._asdict()
            if own.effect is not None and not math.isfinite(own.effect):
                row["effect"] = None
        return found

    @property
    def within(self) -> str:
        """The budget in words."""
        return HALVES[self.half]

    @property
    def title(self) -> str:
        """What the table is about.

        >>> Standings("alignment", "both", "x", ("a", "b"), (0,), (), (), "").title
        'alignment of 2 tasks, within both halves of the cost'
        """
        count = len(self.tasks)
        return f"{self.metric} of {count} task{'s' * (count != 1)}, within {self.within}"

    def grid(self) -> list[list[str]]:
        """Header and rows as text."""
        head = ["method", "fitted on", f"{self.metric} (95 %)", "rank", f"{self.against} ahead by"]
        head += ["p (Holm)", "effect", "neutral", "in-format", "said", "mass", "fit, s", "fit, MB"]
        head += ["KB", "speed"]
        return [head, *(_line(row, len(self.tasks)) for row in self.rows)]

    def text(self) -> str:
        """For the terminal: the conclusion, and the columns that matter most."""
        head, *rows = [[*row[:4], *row[7:9]] for row in self.grid()]
        widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        notes = [f"left out: {note}" for note in self.missing()] + self.notes()
        return "\n".join(
            [f"{self.title[0].upper()}{self.title[1:]}", *lines, self.conclusion, *notes, ""]
        )

    def markdown(self) -> str:
        """A GitHub table, the conclusion, and what was left out."""
        head, *rows = self.grid()
        lines = [f"### {self.title[0].upper()}{self.title[1:]}", "", self.conclusion, ""]
        lines += [_piped(head), _piped(["---"] * 2 + ["---:"] * (len(head) - 2))]
        lines += [_piped(row) for row in rows]
        if notes := self.missing():
            lines += ["", f"Left out: {'; '.join(notes)}."]
        lines += [part for note in self.notes() for part in ("", note)]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self) -> str:
        """A booktabs table."""
        head, *rows = self.grid()
        body = [" & ".join(map(_escaped, row)) + r" \\" for row in rows]
        return "\n".join(
            [
                rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}",
                r"\toprule",
                " & ".join(map(_escaped, head)) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
        )

    def missing(self) -> list[str]:
        """What the table lacks: cells that failed, and cells that were not run."""
        failed = [f"{row.name} failed on {why}" for row in self.rows for why in row.failed]
        return [*failed, *self.left_out]

    def notes(self) -> list[str]:
        """Cells that stand in the table otherwise than as they were first dosed."""
        told = []
        for lead, named in (
            (
                "No strength is within the budget; it stands as the plain model does",
                "unmet",
            ),
            ("Dosed again, because the test part cost more than the budget allows", "over"),
        ):
            cells = [
                f"{row.name} on {', '.join(found)}"
                for row in self.rows
                if (found := getattr(row, named))
            ]
            told += [f"{lead}: {'; '.join(cells)}."] if cells else []
        return told


def standings(
    records: Iterable[Record],
    *,
    against: str = "",
    named: Sequence[str] = (),
    left_out: Sequence[str] = (),
    seed: int = 0,
) -> list[Standings]:
    """A table for each metric of control, then each of benchmarks, and each half of the cost.

    Args:
        records: of a comparison's cells. against: the contender with which all others are compared;
            default: the first that has a dial. named: those with which it is compared by a
            hypothesis named beforehand, the family of Holm's correction; default: all others.
        left_out: cells that were not run, in words. seed: of the bootstrap.

    Raises:
        InputError: no record, or none of ``against``.
    """
    records = list(records)
    names = list(dict.fromkeys(record["contender"] for record in records))
    dialled = [name for name in names if name not in PLAIN]
    chosen = against or next(iter(dialled), "")
    if chosen not in names:
        raise InputError(
            f"a comparison against {chosen!r}", expected=f"one of {', '.join(names) or 'none'}"
        )
    kinds = dict.fromkeys(record["control"] for record in records)
    kinds |= dict.fromkeys(name for one in records for name in one.get("measures", ()))
    found = []
    for metric in kinds:
        own = [one for one in records if metric in (one["control"], *one.get("measures", ()))]
        # Where everything failed, a table says so.
        met = {half for one in own for half in (*one.get("tested", ()), *one.get("unmet", ()))}
        for half in [half for half in HALVES if half in (met or ["neutral"])]:
            found.append(_table(own, metric, half, chosen, named, left_out, seed))
    return found


def save(
    folder: str | Path,
    tables: Sequence[Standings],
    records: Sequence[Record],
    context: Mapping[str, Any],
) -> Path:
    """Write tables.json, tables.md, tables.tex and comparison.html into a folder.

    Where pyarrow is installed also cells.parquet: a row for each cell and half of the cost.
    """
    home = Path(folder)
    if find_spec("pyarrow"):
        from pyarrow import Table, parquet

        with fresh_file(home / "cells.parquet") as fresh:
            parquet.write_table(Table.from_pylist(list(flat(records))), fresh)
    data = [table.to_json() for table in tables]
    write_json(home / "tables.json", {"context": context, "tables": data})
    write_text(home / "tables.md", "\n".join(table.markdown() for table in tables))
    write_text(home / "tables.tex", "\n".join(table.latex() for table in tables))
    write_text(home / "comparison.html", page(tables, records, context))
    return home / "comparison.html"


def flat(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """A row for each cell and half of the cost: what it is, its figures, or why it has none."""
    for record in records:
        named = ("contender", "method", "input", "task", "seed", "layer")
        taken = ("fit_seconds", "record_seconds", "search_seconds", "seconds", "memory", "bytes")
        about = {name: record.get(name) for name in (*named, *taken)}
        about |= {"fields": json.dumps(record["fields"]), "metric": record["control"]}
        halves = [*record.get("tested", ()), *record.get("unmet", ())] or [None]
        for half in halves:
            tested = record.get("tested", {}).get(half)
            row = about | {"within": half, "failed": record.get("failed", "")}
            row["failed"] = row["failed"] or record.get("unmet", {}).get(half, "")
            known = ("answer_mass", "said_alignment", *record.get("measures", ()))
            for name in (record["control"], *known):
                column = "control" if name == record["control"] else name
                items = list(tested["items"].get(name, {}).values()) if tested else []
                row[column] = _figure(name, items) if items else None
            for name in ("neutral_cost", "neutral_p99", "in_format_cost"):
                row[name] = tested["costs"].get(name, [None])[0] if tested else None
            for name in ("strength", "tokens_per_second"):
                row[name] = tested.get(name) if tested else None
            yield row


def _figure(name: str, items: Sequence[Sequence[Sequence[Any]]]) -> float:
    """A metric of a cell's items."""
    measured = [[Measured(*values) for values in parts] for parts in items]
    return float(metrics.get(name).figures(measured, np.ones((1, len(items))))[0])


def page(tables: Sequence[Standings], records: Sequence[Record], context: Mapping[str, Any]) -> str:
    """One self-contained page: rankings with intervals, control against cost, answers."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    drawn = [_ranking(table, f"ranking-{n}") for n, table in enumerate(tables)]
    samples: dict[str, list[tuple[str, str, str]]] = {}
    for n, task in enumerate(tasks):
        own = [record for record in records if record["task"] == task and record.get("tested")]
        drawn.append(_costs_plot(own, f"task-{n}"))
        samples[task] = [
            (record["contender"], *pair)
            for record in own
            if record["seed"] == own[0]["seed"]
            for pair in record["tested"][_last(record)]["samples"]
        ]
    return pages.render(
        "standings.html.j2",
        drawn,
        filters={},
        title=f"{len(tables[0].rows)} ways to steer, {len(tasks)} tasks" if tables else "Nothing",
        tables=tables,
        legend=[(INPUTS[one], COLOURS[one], SIGNS[one]) for one in INPUTS],
        heights=[110 + 26 * len(table.rows) for table in tables],
        tasks=tasks,
        samples=samples,
        context=context,
    )


def _last(record: Record) -> Half:
    """The half of the cost that binds most, of those that a cell was tested at."""
    return "both" if "both" in record["tested"] else "neutral"


def _ranking(table: Standings, name: str) -> dict[str, Any]:
    """Contenders by control, with intervals, the best at the top."""
    rows = [row for row in table.rows if row.control]
    data = []
    for group, colour in COLOURS.items():
        own = [(row.name, row.control) for row in rows if row.input == group and row.control]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [score.value for _, score in own],
                "y": [label for label, _ in own],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [score.high - score.value for _, score in own],
                    "arrayminus": [score.value - score.low for _, score in own],
                    "color": colour,
                    "thickness": 1.5,
                },
                "marker": {"color": colour, "size": 9, "symbol": SYMBOLS[group]},
                "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
            }
        )
    names = [row.name for row in rows]
    return {
        "id": name,
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": table.metric}},
            "yaxis": {
                "title": {"text": ""},
                "type": "category",
                "categoryorder": "array",
                "categoryarray": names[::-1],
                "range": [-0.6, len(names) - 0.4],
                "nticks": 0,
                "dtick": 1,
            },
        },
    }


def _costs_plot(records: Sequence[Record], name: str) -> dict[str, Any]:
    """Control against neutral cost: tested at the budget, and what validation showed."""
    data: list[dict[str, Any]] = []
    for record in records:
        colour = COLOURS[record["input"]]
        half = _last(record)
        tested = record["tested"][half]
        items = tested["items"].get(record["control"], {})
        value = _figure(record["control"], list(items.values()))
        tried = sorted(
            (one["neutral"], one["control"])
            for one in record.get("evaluations", [])
            if one["layer"] == record["layer"] and one.get("chosen") == record.get("chosen")
        )
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [cost for cost, _ in tried],
                "y": [gain for _, gain in tried],
                "line": {"color": f"{colour}@0.35", "width": 1.5},
                "hoverinfo": "skip",
            }
        )
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [tested["costs"]["neutral_cost"][0]],
                "y": [value],
                "text": [record["contender"]],
                "marker": {"color": colour, "size": 10, "symbol": SYMBOLS[record["input"]]},
                "hovertemplate": "%{text}: %{y:.3f} at %{x:.3f} nats<extra></extra>",
            }
        )
    most = max((one["x"][0] for one in data if one["mode"] == "markers"), default=0.1)
    return {
        "id": name,
        "data": data,
        "layout": {
            "xaxis": {
                "title": {"text": "neutral cost, nats per token"},
                "range": [0, 1.3 * most or 1],
            },
            "yaxis": {"title": {"text": records[0]["control"] if records else ""}},
        },
    }


def _table(
    records: Sequence[Record],
    metric: str,
    half: Half,
    against: str,
    named: Sequence[str],
    left_out: Sequence[str],
    seed: int,
) -> Standings:
    group = _Group(metric, half, seed, records)
    done = {task for name in group.records for task in group.tasks(name)}
    done = group.tasks(against) if against in group.records and group.tasks(against) else done
    every = dict.fromkeys(record["task"] for record in records)
    tasks = tuple(task for task in every if task in done or not done)
    lost = [f"{task}, where {against} has no figure" for task in every if task not in tasks]
    group = _Group(metric, half, seed, [one for one in records if one["task"] in tasks])
    draws = group.drawn([name for name in group.records if group.tasks(name) == set(tasks)])
    compared = draws if draws is not None and against in draws.arms else None
    rivals = [name for name in named or group.records if name not in (against, *PLAIN)]
    p_values: dict[str, float] = {}
    if compared is not None:
        p_values = holm(
            {name: compared.p_value(against, name) for name in rivals if name in compared.arms}
        )
    ranks: dict[str, Score] = {}
    # No ranking mixes recorded and target-seeking rows; a fit through the model has the gradients
    # too, and ranks with those.
    for inputs in (("classes", ""), ("target", "model")):
        names = [
            name
            for name in (draws.arms if draws else ())
            if name not in PLAIN and group.records[name][0]["input"] in inputs
        ]
        if (own := group.drawn(names)) is not None:
            ranks |= own.ranks(metrics.get(metric).better)
    rows = []
    for name in group.records:
        row = group.standing(name)
        more: dict[str, Any] = {"rank": ranks.get(name), "p": p_values.get(name)}
        if compared is not None and name in compared.arms and name != against:
            more["control"] = compared.score(name)
            more["ahead"] = compared.difference(against, name)
            more["effect"] = compared.effect(against, name)
        rows.append(replace(row, **more))
    sign = 1 if metrics.get(metric).better == "lower" else -1
    rows.sort(
        key=lambda row: (
            row.tasks < len(tasks),
            sign * row.control.value if row.control else math.inf,
        )
    )
    return Standings(
        metric,
        half,
        against,
        tasks,
        tuple(sorted({record["seed"] for record in records})),
        tuple(rows),
        (*lost, *left_out),
        _concluded(against, rows, tasks, sign),
    )


class _Group:
    """Cells of one metric and half, by contender."""

    def __init__(self, metric: str, half: Half, seed: int, records: Sequence[Record]) -> None:
        self.metric, self.half, self.seed = metric, half, seed
        self.records: dict[str, list[Record]] = {}
        plain = {one["task"]: one for one in records if one["contender"] == UNSTEERED}
        for record in records:
            bare = plain.get(record["task"], {}).get("tested", {}).get(half)
            if half in record.get("unmet", {}) and bare:
                record = {**record, "tested": {**record["tested"], half: bare}}
            self.records.setdefault(record["contender"], []).append(record)

    def measured(self, name: str) -> list[Record]:
        """A contender's cells that did not fail."""
        return [one for one in self.records[name] if self.half in one.get("tested", {})]

    def tasks(self, name: str) -> set[str]:
        """Those that a contender was measured on."""
        return {record["task"] for record in self.measured(name)}

    def drawn(self, names: Sequence[str], metric: str = "") -> Draws | None:
        """The bootstrap of some contenders; None for none, or where nothing was so measured."""
        arms = {
            name: _items(self.measured(name), self.half, metric or self.metric) for name in names
        }
        if not arms or not all(items for found in arms.values() for items in found.values()):
            return None
        return resample(metrics.get(metric or self.metric), arms, seed=self.seed)

    def standing(self, name: str) -> Standing:
        """What a contender's own cells say."""
        own = self.measured(name)
        found = Standing(
            name,
            self.records[name][0]["input"],
            len(self.tasks(name)),
            failed=tuple(
                f"{one['task']}: {why}"
                for one in self.records[name]
                if self.half not in one.get("tested", {})
                and (why := one.get("failed") or one.get("unmet", {}).get(self.half))
            ),
            unmet=tuple(
                dict.fromkeys(one["task"] for one in own if self.half in one.get("unmet", {}))
            ),
            over=tuple(
                dict.fromkeys(one["task"] for one in own if one["tested"][self.half].get("over"))
            ),
        )
        if not own:
            return found
        draws = self.drawn([name])
        said, mass = (self.drawn([name], one) for one in ("said_alignment", "answer_mass"))
        plain = [one for one in self.records.get(UNSTEERED, []) if "tested" in one]
        speed, usual = (
            _mean(one["tested"][self.half]["tokens_per_second"] for one in part)
            for part in (own, plain)
        )
        return replace(
            found,
            control=draws.score(name) if draws else None,
            costs=_costs(own, self.half),
            said=said.score(name) if said else None,
            mass=mass.score(name) if mass else None,
            fit_seconds=_mean(one["fit_seconds"] / one["fits"] for one in own if "fits" in one),
            memory=_mean(one["memory"] for one in own if one.get("memory") is not None),
            size=_mean(one["bytes"] for one in own if "bytes" in one),
            speed=speed / usual if speed and usual else None,
        )


def _items(records: Sequence[Record], half: Half, metric: str) -> dict[str, Items]:
    """Task -> items, where an item's seeds share its weight."""
    tasks: dict[str, dict[str, list[Measured]]] = {}
    seeds = Counter(record["task"] for record in records)
    for record in records:
        own = tasks.setdefault(record["task"], {})
        for item, parts in record["tested"][half]["items"].get(metric, {}).items():
            share = [Measured(*values) for values in parts]
            share = [m._replace(weight=m.weight / seeds[record["task"]]) for m in share]
            own.setdefault(item, []).extend(share)
    return dict(tasks)


def _costs(records: Sequence[Record], half: Half) -> dict[str, float]:
    names = dict.fromkeys(name for r in records for name in r["tested"][half]["costs"])
    return {
        name: float(np.mean([r["tested"][half]["costs"][name][0] for r in records]))
        for name in names
    }


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None


def _concluded(against: str, rows: Sequence[Standing], tasks: Sequence[str], sign: int) -> str:
    """What may be concluded, and what not, in words; ``sign`` is 1 where less is better."""
    tested = [row for row in rows if row.p is not None and row.ahead is not None]
    if not tested:
        return f"Nothing may be concluded: no contender has all tasks beside {against}."
    sure = [row for row in tested if row.p is not None and row.p < LEVEL]
    ahead = [row.name for row in sure if row.ahead and sign * row.ahead.value < 0]
    behind = [row.name for row in sure if row.ahead and sign * row.ahead.value > 0]
    level = [row.name for row in tested if row not in sure]
    parts = [
        f"{verb} {_listed(names)}"
        for verb, names in (
            ("is ahead of", ahead),
            ("is behind", behind),
            ("cannot be told from", level),
        )
        if names
    ]
    count = len(tested)
    return (
        f"{against} {', '.join(parts)} (family-wise level {LEVEL:g} over {count} "
        f"comparison{'s' * (count != 1)}, Holm). This holds for tasks like these "
        f"{len(tasks)} on this model at this budget, and for no other model or kind of task"
        + ("; from so few tasks an interval says little about others." if len(tasks) < 6 else ".")
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _line(row: Standing, tasks: int) -> list[str]:
    def bracketed(score: Score | None, digits: int = 3) -> str:
        if score is None:
            return ""
        low, high = f"{score.low:.{digits}f}", f"{score.high:.{digits}f}"
        return f"{score.value:.{digits}f} [{low}, {high}]"

    costs = row.costs or {}
    rank = row.rank
    return [
        row.name if row.tasks in (0, tasks) else f"{row.name} ({row.tasks} of {tasks} tasks)",
        INPUTS[row.input] if row.input else "",
        bracketed(row.control) if row.control else "failed",
        f"{rank.value:g} [{rank.low:g}, {rank.high:g}]" if rank else "",
        bracketed(row.ahead),
        "" if row.p is None else f"{row.p:.2g}",
        f"{row.effect:.1f}" if row.effect is not None and math.isfinite(row.effect) else "",
        f"{costs['neutral_cost']:.3f}" if "neutral_cost" in costs else "",
        f"{costs['in_format_cost']:.3f}" if "in_format_cost" in costs else "",
        bracketed(row.said, 2),
        "" if row.mass is None else f"{row.mass.value:.2f}",
        "" if row.fit_seconds is None else f"{row.fit_seconds:.3g}",
        "" if row.memory is None else f"{row.memory / 2**20:.3g}",
        "" if row.size is None else f"{row.size / 1024:.3g}",
        "" if row.speed is None else f"{row.speed:.2f}",
    ]


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _escaped(text: str) -> str:
    """Text for LaTeX.

    >>> _escaped("a_b at 95 %")
    'a\\\\_b at 95 \\\\%'
    """
    for sign in "&%$#_{}":
        text = text.replace(sign, "\\" + sign)
    return text
