"""Report: everything an evaluation found, as text, as JSON and as one self-contained page."""

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from innsteer.backends.base import Completion
from innsteer.errors import FormatError
from innsteer.files import fresh_folder, read_json, write_json, write_text
from innsteer.report import pages
from innsteer.report.figures import (
    COST,
    DIAGNOSTICS,
    MEASURES,
    PROMPT_ONLY,
    RANDOM,
    TOLERANCE,
    UNSTEERED,
    Cloud,
    DosePoint,
    Figure,
    Number,
    TokenTrail,
    arm_title,
    is_arm,
    measure_title,
    short,
    write,
)

__all__ = ["Cloud", "DosePoint", "Figure", "Report", "TokenTrail"]

FORMAT = "innsteer report 1"
WIDTH = 100
# Model text may hold escape sequences and marks that reorder a line: a terminal must not see them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        control: name of the control metric. Its figures' ``better`` says which way the behaviour
            points; ``neither`` is read as higher.
        budget: cost budget, nats per token. preview: demo size, said visibly.
        context: model, sites, versions, machine, seed, command, sizes, seconds per stage.
        dose_control: the metric in ``doses``, where that is not ``control``.
        arms: in the order to show them. diagnostics: arm -> name -> figure.
        notes: caveats to print.
    """

    title: str
    behaviour: str
    control: str
    budget: float
    preview: bool
    context: Mapping[str, Any]
    arms: tuple[str, ...]
    figures: tuple[Figure, ...]
    doses: tuple[DosePoint, ...] = ()
    clouds: tuple[Cloud, ...] = ()
    trails: tuple[TokenTrail, ...] = ()
    completions: tuple[Completion, ...] = ()
    diagnostics: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dose_control: str = ""

    def figure(self, arm: str, metric: str, against: str = "") -> Figure | None:
        """An arm's figure, or its difference from the arm ``against``."""
        wanted = (arm, metric, against)
        return next((f for f in self.figures if (f.arm, f.metric, f.against) == wanted), None)

    def metrics(self) -> list[str]:
        """Metrics in the order to show them: control first, then cost."""
        found = list(dict.fromkeys(f.metric for f in self.figures))
        return sorted(found, key=lambda m: (m != self.control, m != COST))

    def over_budget(self, arm: str) -> bool:
        """Whether an arm with a dial costs over 10 % more than the budget: it is not ranked."""
        cost = self.figure(arm, COST)
        dial = bool(self.budget) and not self._without_dial(arm)
        return dial and cost is not None and cost.value > TOLERANCE * self.budget

    def finding(self) -> str:
        """The result in plain words, from the figures alone."""
        what = measure_title(self.control)
        own = {a: f for a in self.arms if (f := self.figure(a, self.control)) is not None}
        plain = next((f for arm, f in own.items() if is_arm(arm, UNSTEERED)), None)
        dialled = {a: f for a, f in own.items() if not self._without_dial(a)}
        ranked = {a: f for a, f in dialled.items() if not self.over_budget(a)}
        if not ranked:
            within = f"No arm stays within {short(self.budget)} nats per token. " if dialled else ""
            said = [f"{arm_title(a)}: {what} {_bracketed(f)}." for a, f in own.items()]
            return within + (" ".join(said) or f"The {what} was not measured.")
        best = max(ranked.values(), key=_goodness)
        words = [self._headline(best, plain, what)]
        words += [self._rival(f, best) for a, f in dialled.items() if a != best.arm]
        for arm, figure in own.items():
            if is_arm(arm, PROMPT_ONLY) or is_arm(arm, RANDOM):
                cost = self.figure(arm, COST)
                price = f" of {short(cost.value)} nats per token" if cost else ""
                words.append(
                    f"{arm_title(arm)} stands at {write(figure).value}, at its own cost{price}."
                )
        return " ".join(words)

    def _without_dial(self, arm: str) -> bool:
        return any(is_arm(arm, name) for name in (UNSTEERED, PROMPT_ONLY, RANDOM))

    def _headline(self, best: Figure, plain: Figure | None, what: str) -> str:
        step = self.figure(best.arm, self.control, plain.arm) if plain else None
        move = f"{write(plain).value} to {write(best).value}" if plain else write(best).value
        at = f"Within {short(self.budget)} nats per token " if self.budget else ""
        words = f"{at}{arm_title(best.arm)} "
        words += f"moves the {what} from {move}" if plain else f"brings the {what} to {move}"
        if step is None:
            return words + "."
        level = f"{100 * step.level:.0f} % interval"
        words += f" ({write(step).value}, {level} {write(step).interval})"
        return words + ("; the interval includes no change." if _includes_zero(step) else ".")

    def _rival(self, rival: Figure, best: Figure) -> str:
        name, value = arm_title(rival.arm), write(rival).value
        if self.over_budget(rival.arm):
            return f"{name} is over the budget and not ranked."
        paired = self.figure(best.arm, self.control, rival.arm)
        if paired is not None:
            tie, why = _includes_zero(paired), "paired difference includes none"
        else:
            tie = rival.low <= best.high and best.low <= rival.high
            why = "intervals overlap"
        return f"{name} ties at {value} ({why})." if tie else f"{name} reaches {value}."

    def text(self, *, samples: int = 8) -> str:
        """For the terminal: plain, at most 100 columns, with the answers to some prompts."""
        head = f"{self.title} [PREVIEW: too small to conclude from]" if self.preview else self.title
        parts = [_wrap(head), _wrap(self.finding()), *self._tables()]
        parts += [self._block(row) for row in self._rows()[:samples]]
        left = len(self._rows()) - samples
        parts += [f"({left} more prompts in the page)"] if left > 0 else []
        parts += ["Notes\n" + "\n".join(_wrap(n, "- ") for n in self.notes)] if self.notes else []
        return "\n\n".join(parts) + "\n"

    def _tables(self) -> Iterator[str]:
        """Arms by measures, as many measures side by side as the width holds."""
        names = [self._name(arm) for arm in self.arms]
        first = ["", "", *names]
        block: list[list[str]] = [first]
        for column in self._columns():
            width = sum(_width(c) + 2 for c in [*block, column])
            if width > WIDTH + 2 and len(block) > 1:
                yield _grid(block)
                block = [first]
            block.append(column)
        if len(block) > 1:
            yield _grid(block)

    def _name(self, arm: str) -> str:
        if is_arm(arm, PROMPT_ONLY) or is_arm(arm, RANDOM):
            return f"{arm_title(arm)} (no dial)"
        return arm_title(arm) + (" (over budget)" if self.over_budget(arm) else "")

    def _columns(self) -> Iterator[list[str]]:
        for metric in self.metrics():
            for against in ("", UNSTEERED) if metric == self.control else ("",):
                found = [self.figure(arm, metric, against) for arm in self.arms]
                if any(found):
                    arrow = {"higher": " ↑", "lower": " ↓"}
                    title = "vs unsteered" if against else measure_title(metric)
                    one = next(f for f in found if f)
                    unit = "paired" if against else one.unit + arrow.get(one.better, "")
                    cells = [
                        f"{w.value} [{w.low}, {w.high}]" if w else "" for w in map(_maybe, found)
                    ]
                    yield [title, f"{unit}, n {_count(found)}", *cells]

    def _rows(self) -> list[pages.Json]:
        return pages.samples(self.completions, self.arms)

    def _block(self, row: pages.Json) -> str:
        """One prompt with every arm's answer under it."""
        answers = [cell["answer"] for cell in row["cells"]]
        pad = 2 + max(len(arm_title(a.arm)) for a in answers)
        lines = [_wrap(_clean(row["prompt"]), "prompt: ")]
        for a in answers:
            label = arm_title(a.arm).ljust(pad)
            lines.append(_wrap(_clean(a.text) or "(empty)", f"  {label}"))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data of everything but the completions; NaN becomes null."""
        data: dict[str, Any] = pages.plain(vars(self))
        del data["completions"]
        return {"format": FORMAT} | data

    def html(self) -> str:
        """One self-contained page: no request leaves it, and model text in it is only text."""
        drawn = pages.plots(
            self.doses,
            self.figures,
            self.arms,
            control=self.dose_control or self.control,
            budget=self.budget,
        )
        drawn += pages.cloud_plots(self.clouds)
        return pages.render(
            "report.html.j2",
            drawn,
            filters={"arm": arm_title, "measure": measure_title, "write": _typeset},
            report=self,
            rows=self._rows(),
            places=pages.styles(self.arms),
            symbols=pages.SYMBOLS,
            groups=pages.GROUPS,
            largest=max((x for t in self.trails for x in t.displacement if x == x), default=0.0),
            measures=MEASURES,
            diagnostics=DIAGNOSTICS,
            names={
                "cost": COST,
                "unsteered": UNSTEERED,
                "prompt_only": PROMPT_ONLY,
                "random": RANDOM,
            },
            is_arm=is_arm,
            count=_count,
        )

    def save(self, folder: str | Path, *, replace: bool = False) -> Path:
        """Write report.json, completions.jsonl, report.html and report.txt into a folder.

        Raises:
            InputError: the folder exists and ``replace`` is off, or it cannot be written.
        """
        with fresh_folder(folder, replace=replace) as staging:
            write_json(staging / "report.json", self.to_json())
            lines = (json.dumps(pages.plain(c), allow_nan=False) for c in self.completions)
            write_text(staging / "completions.jsonl", "".join(f"{line}\n" for line in lines))
            write_text(staging / "report.html", self.html())
            write_text(staging / "report.txt", self.text())
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Read a saved report; the page and the text are made anew from it.

        Raises:
            FormatError: a file is missing, damaged or of another format.
        """
        path = Path(folder) / "report.json"
        data = read_json(path, "the report.json of a saved report")
        if data.get("format") != FORMAT:
            raise FormatError(f"{path} has format {data.get('format')!r}", expected=repr(FORMAT))
        data |= {"completions": list(_read_completions(Path(folder) / "completions.jsonl"))}
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise FormatError(f"{path} is damaged: {error}") from error


def _read_completions(path: Path) -> Iterator[Completion]:
    if not path.is_file():
        raise FormatError(f"{path} does not exist", expected="one completion per line")
    reader = TypeAdapter(Completion)
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line:
            try:
                data = json.loads(line)
                values = {
                    name: tuple(math.nan if x is None else x for x in part)
                    for name, part in data.pop("values", {}).items()
                }
                read = reader.validate_python(data)
            except (ValueError, AttributeError, TypeError) as error:
                raise FormatError(f"{path} line {number} is damaged: {error}") from error
            yield replace(read, values=values)


def _goodness(figure: Figure) -> float:
    value = figure.value if math.isfinite(figure.value) else -math.inf
    return -value if figure.better == "lower" else value


def _includes_zero(figure: Figure) -> bool:
    return figure.low <= 0 <= figure.high


def _bracketed(figure: Figure) -> str:
    words = write(figure)
    return f"{words.value} ({100 * figure.level:.0f} % interval {words.interval})"


def _maybe(figure: Figure | None) -> Any:
    return write(figure) if figure else None


def _typeset(figure: Figure) -> Any:
    """As ``write``, with real minus signs."""
    words = write(figure)
    return words._replace(**{k: v.replace("-", "\u2212") for k, v in words._asdict().items()})


def _count(figures: "list[Figure | None]") -> str:
    """How many items stand behind some figures: one number, or from least to most."""
    counts = sorted({f.n for f in figures if f})
    return "" if not counts else str(counts[0]) + (f"-{counts[-1]}" if len(counts) > 1 else "")


def _clean(text: str) -> str:
    return " ".join(_UNSAFE.sub("\ufffd", text).split())


def _wrap(text: str, lead: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False
    )


def _width(column: list[str]) -> int:
    return max(map(len, column))


def _grid(columns: list[list[str]]) -> str:
    """Columns side by side, left-aligned, a rule under the two head lines."""
    widths = [_width(column) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
    return "\n".join([*lines[:2], "  ".join("-" * width for width in widths), *lines[2:]])
