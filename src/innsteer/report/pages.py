"""What the report's page shows, as plain data: plots for plotly.js and rows for its tables.

Colours are names of the page's style variables (``var(--arm-4)``, with ``@0.2`` for opacity), which
the page resolves, so that one plot serves light and dark.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from innsteer.backends.base import Completion
from innsteer.report.figures import (
    COST,
    PROMPT_ONLY,
    UNSTEERED,
    Cloud,
    DosePoint,
    Figure,
    arm_key,
    arm_title,
    is_arm,
    is_share,
    measure_title,
    short,
)

Json = dict[str, Any]

_HOME = {"unsteered": 0, "prompt-only": 1, "random-direction": 2, "diffmean": 3, "innsteer": 4}
SYMBOLS = ("circle", "square", "triangle-down", "diamond", "circle", "triangle-up", "cross", "x")
DASHES = ("dot", "dot", "dash", "longdash", "solid", "dashdot", "dash", "longdash")
GROUPS = {
    "source": ("var(--source)", "circle-open"),
    "target": ("var(--target)", "diamond"),
    "steered": ("var(--steered)", "x"),
}


def render(
    template: str,
    drawn: Sequence[Json],
    *,
    filters: Mapping[str, Callable[..., Any]],
    **context: Any,
) -> str:
    """One self-contained page: no request leaves it, and text of a model in it is only text.

    Args:
        template: of the package. drawn: plots for the elements of their ids. filters: more of them.
    """
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), _part("report.js")] if drawn else [_part("report.js")]
    page = Environment(
        loader=PackageLoader("innsteer", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"short": short, **filters}
    return page.get_template(template).render(
        plots=plain(drawn),
        policy=" ".join(f"'sha256-{_hash(script)}'" for script in scripts),
        style=Markup(_part("report.css")),
        scripts=[Markup(script) for script in scripts],
        **context,
    )


def _part(name: str) -> str:
    return files("innsteer").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def styles(arms: Sequence[str]) -> dict[str, int]:
    """Arm -> its place in the palette: well-known arms look the same in every report.

    >>> styles(["unsteered", "mine", "innsteer"])
    {'unsteered': 0, 'mine': 5, 'innsteer': 4}
    """
    spare = (5 + i % 3 for i in range(len(arms)))
    keys = {arm: arm_key(arm) for arm in arms}
    return {arm: _HOME[k] if k in _HOME else next(spare) for arm, k in keys.items()}


def _colour(place: int, opacity: float = 1.0) -> str:
    return f"var(--arm-{place})" + (f"@{opacity}" if opacity < 1 else "")


def _axis(title: str, **more: Any) -> Json:
    return {"title": {"text": title, "standoff": 10}, **more}


def _value_axis(title: str, unit: str) -> Json:
    if is_share(unit):
        return _axis(title, tickformat=".0%")
    return _axis(f"{title} ({unit})" if unit else title)


def _rule(axis: str, at: float, label: str, **where: Any) -> Json:
    """A dashed line across the plot with its label, as parts of a layout."""
    other = "y" if axis == "x" else "x"
    line = {"color": "var(--muted)", "width": 1.5, "dash": "dash"}
    shape = {"type": "line", f"{axis}0": at, f"{axis}1": at, f"{axis}ref": axis, "line": line}
    shape |= {f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1, "layer": "below"}
    note = {
        "text": label,
        "showarrow": False,
        axis: at,
        f"{axis}ref": axis,
    }
    note |= {
        f"{other}ref": "paper",
        other: 1,
        "font": {"size": 12, "color": "var(--muted)"},
        **where,
    }
    return {"shapes": [shape], "annotations": [note]}


def _by_arm(doses: Iterable[DosePoint], arms: Sequence[str]) -> list[tuple[str, list[DosePoint]]]:
    order = {arm: place for place, arm in enumerate(arms)}
    ranked = sorted(doses, key=lambda d: (order.get(d.arm, len(order)), d.arm, d.strength))
    return [(arm, list(points)) for arm, points in groupby(ranked, key=lambda d: d.arm)]


def _markers(place: int, points: Sequence[DosePoint]) -> Json:
    """Markers of one arm; the strength chosen at the budget is larger and ringed."""
    return {
        "color": _colour(place),
        "symbol": SYMBOLS[place],
        "opacity": 1,
        "size": [14 if p.at_budget else 8 for p in points],
        "line": {"color": "var(--ink)", "width": [2 if p.at_budget else 0 for p in points]},
    }


def relative(doses: Sequence[DosePoint]) -> dict[str, float]:
    """Arm -> its strength at the budget, the unit in which all arms share one axis.

    Empty unless every arm has one: then strengths are drawn as they are.
    """
    units = {d.arm: d.strength for d in doses if d.at_budget and d.strength > 0}
    return units if {d.arm for d in doses} == units.keys() else {}


def _dose(
    name: str, value: str, doses: Sequence[DosePoint], arms: Sequence[str], axis: Json
) -> Json:
    """One quantity against strength: a line and a band for every arm."""
    places, units = styles(arms), relative(doses)
    data: list[Json] = []
    for arm, points in _by_arm(doses, arms):
        place = places.get(arm, 5)
        x = [p.strength / units.get(arm, 1.0) for p in points]
        low = [getattr(p, f"{value}_low") for p in points]
        high = [getattr(p, f"{value}_high") for p in points]
        band: Json = {
            "x": x + x[::-1],
            "y": high + low[::-1],
            "fill": "toself",
            "hoverinfo": "skip",
        }
        band |= {"mode": "lines", "line": {"width": 0}, "fillcolor": _colour(place, 0.16)}
        data.append({"type": "scatter", "meta": arm, **band})
        line: Json = {"color": _colour(place), "width": 2.5, "dash": DASHES[place]}
        data.append(
            {
                "type": "scatter",
                "meta": arm,
                "name": arm_title(arm),
                "x": x,
                "y": [getattr(p, value) for p in points],
                "mode": "lines+markers",
                "line": line,
                "marker": _markers(place, points),
                "customdata": [
                    [p.strength, *ends] for p, *ends in zip(points, low, high, strict=True)
                ],
                "hovertemplate": "strength %{customdata[0]:.3g}: %{y:.3g}<br>"
                "interval %{customdata[1]:.3g} to %{customdata[2]:.3g}",
            }
        )
    title = "strength (1 = each arm's own at the budget)" if units else "strength (0 = unsteered)"
    layout = {"xaxis": _axis(title, rangemode="tozero"), "yaxis": axis}
    return {"id": name, "data": data, "layout": layout}


def _own(figures: Iterable[Figure], arm: str, metric: str) -> Figure | None:
    found = (
        f
        for f in figures
        if arm_key(f.arm) == arm_key(arm) and f.metric == metric and not f.against
    )
    return next(found, None)


def _bars(value: float, low: float, high: float, place: int) -> Json:
    """An asymmetric error bar as plotly wants it."""
    bar = {"type": "data", "symmetric": False, "array": [high - value], "thickness": 1.2}
    return bar | {"arrayminus": [value - low], "color": _colour(place, 0.6), "width": 3}


def _joined(points: Sequence[DosePoint], value: str, place: int) -> Json:
    bars = [
        _bars(getattr(p, value), getattr(p, f"{value}_low"), getattr(p, f"{value}_high"), place)
        for p in points
    ]
    ends = {key: [bar[key][0] for bar in bars] for key in ("array", "arrayminus")}
    return bars[0] | ends


def plots(
    doses: Sequence[DosePoint],
    figures: Sequence[Figure],
    arms: Sequence[str],
    *,
    control: str,
    budget: float,
) -> list[Json]:
    """Control and cost against strength, and control against cost; none without doses."""
    if not doses:
        return []
    unit = next((f.unit for f in figures if f.metric == control), "")
    axis = _value_axis(measure_title(control), unit)
    first = _dose("dose-control", "control", doses, arms, axis)
    plain = _own(figures, UNSTEERED, control)
    if plain:
        first["layout"] |= _rule("y", plain.value, "unsteered", xanchor="right", yanchor="bottom")
    cost = _axis("cost (nats per token)", rangemode="tozero")
    second = _dose("dose-cost", "nats", doses, arms, cost)
    second["layout"] |= _rule("y", budget, "budget", xanchor="right", yanchor="bottom")
    return [first, second, _pareto(doses, figures, arms, control, budget, axis)]


def _pareto(
    doses: Sequence[DosePoint],
    figures: Sequence[Figure],
    arms: Sequence[str],
    control: str,
    budget: float,
    axis: Json,
) -> Json:
    places = styles(arms)
    hover = "cost %{x:.3g} nats per token<br>control %{y:.3g}"
    data: list[Json] = []
    for arm, points in _by_arm(doses, arms):
        place = places.get(arm, 5)
        data.append(
            {
                "type": "scatter",
                "meta": arm,
                "name": arm_title(arm),
                "x": [p.nats for p in points],
                "y": [p.control for p in points],
                "error_x": _joined(points, "nats", place),
                "error_y": _joined(points, "control", place),
                "mode": "lines+markers",
                "line": {"color": _colour(place), "width": 2, "dash": DASHES[place]},
                "marker": _markers(place, points),
                "customdata": [p.strength for p in points],
                "hovertemplate": "strength %{customdata:.3g}<br>" + hover,
            }
        )
    curves = {d.arm for d in doses}
    edge = 4 * budget
    for arm in arms:
        own, price = _own(figures, arm, control), _own(figures, arm, COST)
        still = is_arm(arm, UNSTEERED)
        if own is None or arm in curves or not (still or price):
            continue
        place, x = places[arm], 0.0 if still or price is None else price.value
        point: Json = {"type": "scatter", "meta": arm, "name": arm_title(arm), "mode": "markers"}
        point |= {"x": [x], "y": [own.value], "hovertemplate": hover, "cliponaxis": False}
        point["marker"] = {"color": _colour(place), "symbol": SYMBOLS[place], "size": 13}
        point["error_y"] = _bars(own.value, own.low, own.high, place)
        if price is not None and not still:
            point["error_x"] = _bars(price.value, price.low, price.high, place)
            # One expensive prompt must not squeeze what happens near the budget.
            edge = max(edge, min(1.15 * price.high, 8 * budget))
        data.append(point)
    costs = [x for d in doses for x in (d.nats, d.nats_high) if math.isfinite(x)]
    edge = min(edge, 1.05 * max([*costs, budget, *(t["x"][0] for t in data if len(t["x"]) == 1)]))
    xaxis = _axis("cost on neutral prompts (nats per token)", range=[-0.03 * edge, edge])
    layout = {"xaxis": xaxis, "yaxis": axis}
    layout |= _rule("x", budget, "budget", xanchor="left", yanchor="top", xshift=4)
    return {"id": "pareto", "data": data, "layout": layout}


def cloud_plots(clouds: Sequence[Cloud]) -> list[Json]:
    """Two plots per cloud on the same axes: before (source, target) and after (steered too)."""
    return [
        _scatter(cloud, f"cloud-{place}-{when}", when)
        for place, cloud in enumerate(clouds)
        for when in ("before", "after")
        if cloud.groups
    ]


def _scatter(cloud: Cloud, name: str, when: str) -> Json:
    data = []
    for group, points in cloud.groups.items():
        if group == "steered" and when == "before":
            continue
        colour, symbol = GROUPS.get(group, ("var(--muted)", "square"))
        faint = when == "after" and group != "steered"
        marker = {"color": colour, "symbol": symbol, "size": 7, "opacity": 0.35 if faint else 0.85}
        axes = {"x": [p[0] for p in points], "y": [p[1] for p in points]}
        data.append({"type": "scatter", "mode": "markers", "name": group, "marker": marker, **axes})
    layout = {
        axis: _axis(cloud.axes[place], range=_range(cloud, place), zeroline=False)
        for place, axis in enumerate(("xaxis", "yaxis"))
    }
    return {"id": name, "data": data, "layout": layout}


def _range(cloud: Cloud, place: int) -> list[float]:
    """The same limits before and after, so that movement shows."""
    values = [p[place] for points in cloud.groups.values() for p in points]
    values = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 1.0
    return [low - room, high + room]


def samples(completions: Sequence[Completion], arms: Sequence[str]) -> list[Json]:
    """One row per prompt and seed with a cell for every answer; nothing is left out."""
    order = {arm: place for place, arm in enumerate(arms)}
    rows: dict[tuple[str, int], list[Completion]] = {}
    for completion in completions:
        if completion.kind == "sample":
            rows.setdefault((completion.item, completion.seed), []).append(completion)
    shown = []
    for (item, seed), found in rows.items():
        found.sort(key=lambda c: (order.get(c.arm, len(order)), c.arm, c.strength))
        plain = {c.text for c in found if is_arm(c.arm, UNSTEERED)}
        # The prompt-only arm's prompt holds its instruction: the plain one names the row.
        asked = next((c.prompt for c in found if not is_arm(c.arm, PROMPT_ONLY)), found[0].prompt)
        cells = [{"answer": c, "same": c.text in plain} for c in found]
        shown.append({"item": item, "seed": seed, "prompt": asked, "cells": cells})
    return shown


def plain(value: Any) -> Any:
    """Plain JSON data of records, mappings and numbers; what JSON does not know becomes null.

    >>> plain({"a": (1, float("nan"))})
    {'a': [1, None]}
    """
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Iterable):
        return [plain(part) for part in value]
    return plain(value.item()) if hasattr(value, "item") else str(value)
