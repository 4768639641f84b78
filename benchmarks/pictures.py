"""The pictures of the docs, drawn from results/*.json: docs/images/<name>.png.

    python benchmarks/pictures.py [--only control,race] [--html]

Each is a plotly page, photographed by headless Chromium; --html leaves the pages beside them.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
INK, MUTED, LINE = "#1b2026", "#58626e", "#dde1e6"
BLUE, ORANGE, GREEN, GREY = "#0067b0", "#c4500a", "#00795a", "#9ba5b1"


def read(name: str) -> Any:
    """One file of results."""
    return json.loads((HERE / "results" / name).read_text(encoding="utf-8"))


def pretty(behaviour: str) -> str:
    """A behaviour's name as words."""
    return behaviour.removeprefix("desire-for-").removeprefix("desire-to-").replace("-", " ")


def styled(figure: go.Figure, title: str, height: int) -> go.Figure:
    """One look for all of them."""
    figure.update_layout(
        title={"text": title, "x": 0.01, "font": {"size": 19}},
        font={"family": "Liberation Sans, Arial, sans-serif", "size": 15, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        width=1100,
        height=height,
        margin={"l": 20, "r": 30, "t": 70, "b": 60},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(gridcolor=LINE, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=LINE, zeroline=False, automargin=True)
    return figure


def control() -> go.Figure:
    """Every behaviour of the second wording, both ways, where both halves of the cost bind."""
    cells = {}
    for path in sorted((HERE / "results" / "control").glob("*--second--0.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if {"cell", "innsteer", "condgrad_lda"} <= cell.keys():
            cells[pretty(path.name.partition("--")[0])] = cell
    order = sorted(cells, key=lambda name: cells[name]["innsteer"]["both_towards"]["alignment"])
    figure = go.Figure()
    for arm, title, colour, symbol, size in (
        ("condgrad_lda", "condgrad, same gate", ORANGE, "circle-open", 12),
        ("innsteer", "INNSteer", BLUE, "diamond", 12),
    ):
        for side in ("towards", "away"):
            figure.add_scatter(
                x=[cells[name][arm][f"both_{side}"]["alignment"] for name in order],
                y=order,
                mode="markers",
                name=title,
                legendgroup=arm,
                showlegend=side == "towards",
                marker={"color": colour, "symbol": symbol, "size": size, "line": {"width": 2}},
            )
    for sign in (1, -1):
        tops = [cells[name]["cell"]["row"]["ceiling"] for name in order]
        figure.add_scatter(
            x=[top if sign > 0 else 1 - top for top in tops],
            y=order,
            mode="markers",
            name="what a probe of the row knows",
            legendgroup="ceiling",
            showlegend=sign > 0,
            marker={"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": MUTED}},
        )
    figure.add_scatter(
        x=[cells[name]["cell"]["alignment"] for name in order],
        y=order,
        mode="markers",
        name="unsteered",
        marker={"color": GREY, "size": 9},
    )
    figure.update_xaxes(
        range=[-0.01, 1.01],
        tickformat=".0%",
        title="probability of the answer that matches the behaviour (away, then towards)",
    )
    title = f"Steering {len(order)} behaviours both ways, within 0.0953 nats of cost"
    return styled(figure, title, 180 + 34 * len(order))


def race() -> go.Figure:
    """Validation control against seconds."""
    figure = go.Figure()
    looks = {
        "innsteer": (BLUE, "solid"),
        "innsteer, no polish": (BLUE, "dot"),
        "loreft, loreft, rate 0.005": (ORANGE, "solid"),
        "loreft, loreft, rate 0.015": (ORANGE, "dot"),
        "loreft, tanh, rate 0.005": (GREEN, "solid"),
        "loreft, tanh, rate 0.015": (GREEN, "dot"),
    }
    for name, points in read("race.json")["curves"].items():
        colour, dash = looks.get(name, (GREY, "solid"))
        best, line = 0.0, []
        for seconds, value in points:
            best = max(best, value)
            line.append((seconds, best))
        figure.add_scatter(
            x=[seconds for seconds, _ in line],
            y=[value for _, value in line],
            mode="lines+markers",
            name=name.replace("loreft, loreft", "LoReFT").replace("loreft, tanh", "LoReFT, tanh")
            .replace("innsteer", "INNSteer"),
            line={"color": colour, "dash": dash, "width": 2.5},
        )  # fmt: skip
    figure.update_xaxes(title="seconds of fitting, two CPU threads", rangemode="tozero")
    figure.update_yaxes(title="best control so far, validation", tickformat=".0%", range=[0.48, 1])
    figure.add_hline(y=0.85, line={"color": MUTED, "dash": "dash", "width": 1})
    inside = {"orientation": "v", "x": 1, "xanchor": "right", "y": 0.02, "yanchor": "bottom"}
    return styled(figure, "What a second of fitting buys", 520).update_layout(legend=inside)


def ablations() -> go.Figure:
    """Each variant's control and what is said of it, towards; cost in words."""
    found = {r["figure"]: r for r in read("ablations.json")["figures"]}
    names = [name.removesuffix(": towards") for name in found if name.endswith(": towards")]
    figure = go.Figure()
    for part, title, colour, symbol in (
        ("", "of both answers", BLUE, "diamond"),
        (", said", "of everything (said)", GREEN, "circle"),
    ):
        figure.add_scatter(
            x=[found[f"{name}: towards{part}"]["value"] for name in names],
            y=names,
            mode="markers",
            name=title,
            marker={"color": colour, "symbol": symbol, "size": 11},
        )
    figure.add_scatter(
        x=[1.02] * len(names),
        y=names,
        mode="text",
        text=[f"{found[f'{name}: towards, in_format']['value']:.3f}" for name in names],
        textposition="middle right",
        showlegend=False,
        cliponaxis=False,
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(
        range=[0, 1.1], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1],
        title="probability of the answer that matches, towards; right: in-format cost, nats",
    )  # fmt: skip
    return styled(figure, "What each part of the fit buys (wealth)", 180 + 26 * len(names))


def interference() -> go.Figure:
    """Behaviours of one map on each other's items."""
    many = read("many.json")
    names = [pretty(name) for name in many["behaviours"][:8]]
    figure = go.Figure()
    for place, (label, table) in enumerate(many["interference"].items(), 1):
        figure.add_heatmap(
            z=table, x=names, y=names, zmin=0, zmax=1, colorscale="RdBu", zmid=0.5,
            text=[[f"{value:.2f}" for value in row] for row in table], texttemplate="%{text}",
            showscale=place == 1, xaxis=f"x{place}", yaxis=f"y{place}", name=label,
        )  # fmt: skip
    count = len(many["interference"])
    layout: dict[str, Any] = {"grid": {"rows": 1, "columns": count, "pattern": "independent"}}
    for place, label in enumerate(many["interference"], 1):
        layout[f"xaxis{place}"] = {"title": label, "tickangle": 50}
        layout[f"yaxis{place}"] = {"autorange": "reversed", "showticklabels": place == 1}
    figure.update_layout(layout)
    whole = styled(figure, "Alignment of the column's statements with the row steered", 620)
    return whole.update_layout(width=500 * count, font_size=13)


def flow() -> go.Figure:
    """The field in 1, 3 and 10 Euler steps: how far from ten, how curved, and at what cost."""
    found = {one["figure"]: one for one in read("flas.json")["figures"]}
    panels = (
        (" Euler steps, off 10, mean of responses", "off ten steps, nats per token"),
        (" Euler steps, path over chord", "length of the path over its chord"),
        ("CPU time per decoded token, ", "CPU time per token over plain"),
    )
    figure = go.Figure()
    steps = ["1", "3", "10"]
    layout: dict[str, Any] = {
        "grid": {"rows": 1, "columns": 3, "pattern": "independent", "xgap": 0.3}
    }
    for place, (words, title) in enumerate(panels, 1):
        own = [
            next(
                one
                for name, one in found.items()
                if words in name and (name.startswith(f"{n} ") or f" {n} Euler" in name)
            )
            for n in steps
        ]
        figure.add_scatter(
            x=steps, y=[one["value"] for one in own], xaxis=f"x{place}", yaxis=f"y{place}",
            mode="lines+markers", marker={"color": BLUE, "size": 11}, showlegend=False,
            error_y={
                "symmetric": False, "color": MUTED,
                "array": [one["high"] - one["value"] for one in own],
                "arrayminus": [one["value"] - one["low"] for one in own],
            },
        )  # fmt: skip
        layout[f"xaxis{place}"] = {"title": "Euler steps", "type": "category"}
        layout[f"yaxis{place}"] = {"title": title}
    figure.update_layout(layout)
    return styled(figure, "A learnt flow in 1, 3 and 10 steps", 460)


def learning() -> go.Figure:
    """What the field knows of concepts that it never saw: over updates, and over concepts."""
    kept = read("flas.json")
    found = {one["figure"]: one for one in kept["figures"] + kept.get("share_figures", [])}
    figure, top, least = go.Figure(), 0.0, 0.0
    for place, pattern in enumerate(
        (r"unseen: field after (\d+) updates", r"unseen: field of (\d+) concepts"), 1
    ):
        own = [(int(m[1]), one) for name, one in found.items() if (m := re.match(pattern, name))]
        own.sort(key=lambda pair: pair[0])
        top = max([top, *(one["high"] for _, one in own)])
        least = min([least, *(one["low"] for _, one in own)])
        figure.add_scatter(
            x=[count for count, _ in own], y=[one["value"] for _, one in own],
            xaxis=f"x{place}", yaxis=f"y{place}", mode="lines+markers", showlegend=False,
            marker={"color": BLUE, "size": 11},
            error_y={
                "symmetric": False, "color": MUTED,
                "array": [one["high"] - one["value"] for _, one in own],
                "arrayminus": [one["value"] - one["low"] for _, one in own],
            },
        )  # fmt: skip
    figure.update_layout(
        grid={"rows": 1, "columns": 2, "pattern": "independent"},
        xaxis={"title": "updates, of all concepts", "rangemode": "tozero"},
        xaxis2={
            "title": f"concepts, {kept['plan']['share_updates']} updates",
            "rangemode": "tozero",
        },
        yaxis={
            "title": "own less other concept, nats per token",
            "range": [1.1 * least, 1.1 * top],
        },
        yaxis2={"range": [1.1 * least, 1.1 * top]},
    )
    return styled(figure, "What a field knows of fifty unseen concepts", 460)


PICTURES = {one.__name__: one for one in (control, race, ablations, interference, flow, learning)}
LATE = {"flow": "figures", "learning": "share_figures"}
"""Pictures of figures that take hours, and what results/flas.json must have for them."""


def photograph(figure: go.Figure, name: str, html: bool) -> None:
    """Write the page, and its picture by headless Chromium."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / f"{name}.html"
        figure.write_html(page, include_plotlyjs=True, config={"staticPlot": True})
        width, height = figure.layout.width, figure.layout.height
        subprocess.run(
            [
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--window-size={width + 16},{height + 16}", f"--user-data-dir={folder}/profile",
                "--virtual-time-budget=8000", f"--screenshot={IMAGES / name}.png", f"file://{page}",
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
        if html:
            shutil.copy(page, IMAGES / page.name)


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flas = read("flas.json")
    ready = [name for name in PICTURES if LATE.get(name, "figures") in flas]
    parser.add_argument("--only", default=",".join(ready))
    parser.add_argument("--html", action="store_true")
    given = parser.parse_args()
    for name in given.only.split(","):
        photograph(PICTURES[name](), name, given.html)
        print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
