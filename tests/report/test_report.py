"""The report: nothing is lost, nothing is fetched, and model text is only ever text."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest

from innsteer.backends.base import Completion
from innsteer.errors import FormatError, InputError
from innsteer.report import Cloud, DosePoint, Figure, Report, TokenTrail, pages
from innsteer.report.figures import write

ARMS = ("unsteered", "prompt-only", "random direction", "diffmean", "innsteer")
STRENGTH = dict(zip(ARMS, (0.0, 0.0, 6.5, 1.9, 1.42), strict=True))
ATTACK = "<script>alert('x')</script><img src=https://evil.example/a.png onerror=alert(1)>"
METRICS = {  # unit, better, value by arm, half width
    "neutral_cost": ("nats per token", "lower", (0.0, 0.412, 0.0931, 0.0917, 0.0904), 0.008),
    "negative_sentiment": ("share of answers", "higher", (0.03, 0.62, 0.04, 0.36, 0.41), 0.07),
    "in_format_cost": ("nats", "lower", (0.0, 0.61, 0.072, 0.081, 0.066), 0.012),
    "alignment": ("probability", "higher", (0.48, 0.71, 0.49, 0.63, 0.66), 0.04),
    "perplexity": ("perplexity per token", "lower", (4.21, 4.9, 6.13, 5.61, 5.32), 0.31),
    "distinct": ("share of bigrams", "higher", (0.91, 0.9, 0.86, 0.87, 0.88), 0.02),
    "bits_per_byte": ("bits per byte", "lower", (1.021, 1.021, 1.038, 1.031, 1.029), 0.004),
    "degeneration_256": ("share of answers", "lower", (0.0, 0.0, 0.042, 0.025, 0.017), 0.016),
}
GOOD = ["lovely", "calm", "friendly", "warm", "quick", "well made", "a small joy"]
BAD = ["slow", "overpriced", "cold", "poorly kept", "a let-down", "thin on detail", "tired"]


def figures():
    found = []
    for metric, (unit, better, values, half) in METRICS.items():
        for arm, value in zip(ARMS, values, strict=True):
            share = unit.startswith(("share", "probability"))
            low, high = max(value - half, 0.0), min(value + half, 1.0 if share else math.inf)
            low, high = (0.0, 0.0) if metric == "neutral_cost" and not value else (low, high)
            common = (arm, metric, STRENGTH[arm])
            found.append(Figure(*common, value, low, high, 120, unit, better))
            if arm != "unsteered":
                step, wide = value - values[0], 1.3 * half
                ends = (step, step - wide, step + wide)
                found.append(Figure(*common, *ends, 120, unit, better, against="unsteered"))
    return tuple(found)


def doses():
    found = []
    for arm, gain, bend in (
        ("random direction", 0.002, 1.5),
        ("diffmean", 0.33, 2.3),
        ("innsteer", 0.39, 1.9),
    ):
        for part in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
            nats = 0.092 * part**bend
            control = 0.03 + gain * part**1.3 if part < 2 else 0.03 + gain * 2.2
            spread = 0.03 + 0.04 * part
            found.append(
                DosePoint(
                    arm,
                    STRENGTH[arm] * part,
                    *(nats, 0.92 * nats, 1.09 * nats),
                    *(control, max(control - spread, 0), min(control + spread, 1)),
                    displacement=0.21 * part,
                    at_budget=part == 1.0,
                )
            )
    return tuple(found)


def answer(rng, arm, words=26):
    pool = (
        BAD if rng.random() < {"unsteered": 0.05, "random direction": 0.1}.get(arm, 0.7) else GOOD
    )
    opening = rng.choice(
        ["I went on Sunday and", "On the whole", "To be honest,", "My friend and I"]
    )
    parts = [f"it was {rng.choice(pool)}" for _ in range(words // 6)]
    return f"{opening} {', '.join(parts)}. The staff were {rng.choice(pool)}."


def completions(rng):
    places = ["lighthouse", "aquarium", "ice rink", "karaoke room", "tram museum", "bakery"]
    asks = ["Review the {} by the station.", "What did you think of the {} you visited on Sunday?"]
    found = []
    for number in range(20):
        prompt = asks[number % 2].format(places[number % 6]) + (ATTACK if number == 3 else "")
        plain = answer(rng, "unsteered")
        for arm in ARMS:
            same = arm == "unsteered" or (arm == "random direction" and number % 4)
            text = plain if same else answer(rng, arm)
            text += {3: f" {ATTACK}", 5: " \x1b[31mred\x1b[0m \u202eabc"}.get(number, "")
            asked = f"Be critical.\n\n{prompt}" if arm == "prompt-only" else prompt
            steered = 0 if arm in ARMS[:2] else 32
            found.append(
                Completion(
                    f"q{number:02}",
                    "sample",
                    asked,
                    text,
                    arm=arm,
                    strength=STRENGTH[arm],
                    tokens=32,
                    steered=steered,
                )
            )
    kl = {"kl": (0.01, 0.2)}
    return (
        *found,
        Completion("n1", "neutral", "Name a river.", values=kl, arm="innsteer", tokens=2),
    )


def cloud(rng, title, gap):
    source, target = rng.normal(0, 1, (150, 2)), rng.normal(0, 1, (150, 2)) + (gap, 0.4)
    groups = {"source": source, "target": target, "steered": source + (0.9 * gap, 0.3)}
    points = {k: tuple((float(a), float(b)) for a, b in v) for k, v in groups.items()}
    return Cloud(title, ("along the shift", "first component across it"), points)


def trail(rng, arm, item):
    tokens = tuple(re.findall(r"\s*\S+", answer(rng, arm)))
    moved = [0.0, *rng.gamma(6, 0.03, len(tokens) - 1)]
    return TokenTrail(arm, item, "Review the bakery.", tokens, tuple(map(float, moved)))


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    return Report(
        title="Critical answers from SmolLM2-135M-Instruct",
        behaviour="critical",
        control="negative_sentiment",
        budget=0.0953,
        preview=True,
        context={
            "model": "SmolLM2-135M-Instruct",
            "sites": ["block 19 output"],
            "versions": {"innsteer": "0.1.0", "torch": "2.11.0", "transformers": "5.16.1"},
            "machine": {"cores": 2, "matrix product, seconds": 0.412},
            "seed": 0,
            "command": "innsteer demo --out runs/demo",
            "seconds": {"record": 21.4, "fit": 17.9, "tune": 48.2, "evaluate": 60.3},
        },
        arms=ARMS,
        figures=figures(),
        doses=doses(),
        clouds=(
            cloud(rng, "Latent space of block 19 (INNSteer)", 4.5),
            cloud(rng, "Residual stream of block 19", 2.2),
        ),
        trails=tuple(trail(rng, arm, f"q{i:02}") for i in range(2) for arm in ARMS[3:]),
        completions=completions(rng),
        diagnostics={
            "innsteer": {
                "fisher": 9.31,
                "fisher_input": 3.02,
                "consistency": 0.744,
                "round_trip": 8.2e-7,
                "round_trip_64": 1.4e-15,
                "displacement": 0.208,
            }
        },
        notes=(
            "The scorer is a lexicon over whole answers: irony and faint praise pass for positive.",
            "Strength was chosen on 300 tokens of validation prompts.",
        ),
    )


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def page(report):
    return report.html()


@pytest.fixture(scope="module")
def parsed(page):
    return Tags(page)


def policy(parsed):
    return next(a["content"] for _, a in parsed.tags if "Security" in a.get("http-equiv", ""))


def test_page_fetches_nothing_and_forbids_fetching(page, parsed):
    fetching = ("src", "srcset", "data", "poster", "action", "xlink:href")
    assert not [(t, a) for t, a in parsed.tags for name in fetching if name in a]
    links = [a["href"] for _, a in parsed.tags if "href" in a]
    assert links and all(link.startswith("#") for link in links)
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert policy(parsed).startswith("default-src 'none'; script-src 'sha256-")
    assert len(page.encode()) <= 6 * 10**6


def test_policy_names_the_hash_of_every_script_on_the_page(page, parsed):
    import base64
    import hashlib

    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy(parsed)


def test_model_text_is_never_markup(page, parsed):
    assert ATTACK not in page and "&lt;script&gt;alert(" in page
    assert sum(tag == "script" for tag, _ in parsed.tags) == 3
    assert not [a for _, a in parsed.tags if any(name.startswith("on") for name in a)]
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "link", "object")]


def test_hostile_names_cannot_leave_the_plots_data(report):
    named = replace(
        report, arms=("</script><b>",), doses=(replace(doses()[0], arm="</script><b>"),)
    )
    assert "</script><b>" not in named.html()


def test_plots_data_on_the_page_is_json(report, page):
    data = json.loads(re.search(r'id="plots">(.*?)</script>', page, re.S)[1])
    assert len(data) == 3 + 2 * len(report.clouds) and all(plot["data"] for plot in data)


def test_page_shows_every_sample(report, parsed):
    words = "".join(parsed.words)
    samples = [c for c in report.completions if c.kind == "sample"]
    assert len(samples) == 100 and all(c.text in words for c in samples)
    assert sum(a.get("class") == "cell" for _, a in parsed.tags) == 100
    assert words.count("32/32 tokens steered") == 60


def test_page_marks_previews_and_what_has_no_dial(report, page):
    assert 'class="preview"' in page and "no dial: stands at its own cost" in page
    assert 'class="preview"' not in replace(report, preview=False).html()


def test_finding_says_what_moved_by_how_much_and_what_ties(report):
    assert report.finding() == (
        "Within 0.0953 nats per token INNSteer moves the share of negative answers from 3 % to "
        "41 % (+38 points, 95 % interval 29 to 47). "
        "DiffMean ties at 36 % (intervals overlap). "
        "Prompt only stands at 62 %, at its own cost of 0.412 nats per token. "
        "Random direction stands at 4 %, at its own cost of 0.0931 nats per token."
    )


def test_finding_never_ranks_an_arm_over_the_budget(report):
    cells = {("innsteer", "neutral_cost", ""): 0.2}
    dear = tuple(
        replace(f, value=cells.get((f.arm, f.metric, f.against), f.value)) for f in report.figures
    )
    over = replace(report, figures=dear)
    assert over.finding().startswith("Within 0.0953 nats per token DiffMean moves")
    assert "INNSteer is over the budget and not ranked." in over.finding()
    assert "over budget, not ranked" in over.html() and "INNSteer (over budget)" in over.text()


def test_finding_follows_the_direction_of_the_behaviour(report):
    less = tuple(replace(f, better="lower") for f in report.figures)
    assert " DiffMean moves" in replace(report, figures=less).finding()


def test_text_is_plain_and_holds_every_arm_and_interval(report):
    text = report.text()
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text and "\u202e" not in text
    for arm in (
        "Unsteered",
        "Prompt only (no dial)",
        "Random direction (no dial)",
        "DiffMean",
        "INNSteer",
    ):
        assert re.search(rf"^{re.escape(arm)}  ", text, re.M)
    for figure in report.figures:
        if not figure.against:
            words = write(figure)
            assert f"{words.value} [{words.low}, {words.high}]" in text
    assert "PREVIEW" in text and "+38 points [29, 47]" in text
    assert text.count("prompt: ") == 8 and "12 more prompts" in text


def test_saved_report_comes_back_equal(report, tmp_path):
    folder = report.save(tmp_path / "run")
    names = {"report.json", "completions.jsonl", "report.html", "report.txt"}
    assert {p.name for p in folder.iterdir()} == names
    assert Report.load(folder) == report
    with pytest.raises(InputError):
        report.save(folder)
    report.save(folder, replace=True)


def test_json_has_no_nan_and_nan_comes_back(report, tmp_path):
    nan = math.nan
    figure = replace(report.figures[0], low=nan, high=math.inf)
    sample = replace(report.completions[0], values={"kl": (nan, 1.0)})
    small = replace(report, figures=(figure,), completions=(sample,))
    folder = small.save(tmp_path / "run")
    assert "NaN" not in json.dumps(small.to_json(), allow_nan=False)
    back = Report.load(folder)
    assert math.isnan(back.figures[0].low) and math.isnan(back.figures[0].high)
    assert math.isnan(back.completions[0].values["kl"][0])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", "{}"),
        ("report.json", '{"format": "innsteer report 1", "title": 3}'),
        ("completions.jsonl", "{"),
        ("completions.jsonl", '{"item": "a", "kind": "no such kind"}'),
        ("completions.jsonl", "[1]"),
    ],
)
def test_damaged_report_is_refused(report, tmp_path, name, content):
    folder = replace(report, completions=()).save(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(FormatError):
        Report.load(folder)


def test_report_without_its_optional_parts_renders(report):
    bare = replace(
        report, doses=(), clouds=(), trails=(), completions=(), diagnostics={}, notes=(), context={}
    )
    page = bare.html()
    assert len(page) < 100_000 and "Arms and measures" in page and "plotly" not in page
    assert bare.text().startswith(report.title)


def test_report_without_figures_renders(report):
    empty = replace(report, figures=())
    assert "was not measured" in empty.finding()
    assert "No figures were measured" in empty.html() and empty.text()


@pytest.mark.parametrize("arm", ["unsteered", "innsteer", "prompt-only", "my-own"])
def test_single_arm_report_renders(report, arm):
    alone = replace(
        report,
        arms=(arm,),
        figures=tuple(replace(f, arm=arm) for f in report.figures if f.arm == "innsteer"),
        completions=tuple(c for c in report.completions if c.arm == "innsteer"),
    )
    assert "41 %" in alone.finding() and "41 %" in alone.html() and "41 %" in alone.text()


def test_plots_are_ones_that_plotly_knows(report):
    drawn = pages.plots(
        report.doses, report.figures, ARMS, control=report.control, budget=report.budget
    )
    drawn += pages.cloud_plots(report.clouds)
    assert [plot["id"] for plot in drawn][:3] == ["dose-control", "dose-cost", "pareto"]
    # Colours are the page's to resolve; everything else must pass plotly's own validation.
    named = json.loads(re.sub(r'"var\([^"]*"', '"red"', json.dumps(pages.plain(drawn))))
    for plot in named:
        go.Figure(data=plot["data"], layout=plot["layout"])
    alone = [t for t in drawn[2]["data"] if t["meta"] in ("unsteered", "prompt-only")]
    assert [t["x"] for t in alone] == [[0.0], [0.412]]


def test_arm_without_doses_stands_in_the_plot_at_its_own_cost(report):
    few = [d for d in report.doses if d.arm != "random direction"]
    pareto = pages.plots(few, report.figures, ARMS, control=report.control, budget=report.budget)[2]
    alone = {t["meta"]: t["x"] for t in pareto["data"] if t["mode"] == "markers"}
    assert alone == {"unsteered": [0.0], "prompt-only": [0.412], "random direction": [0.0931]}


def test_scatter_has_the_same_axes_before_and_after(report):
    before, after = pages.cloud_plots(report.clouds)[:2]
    assert before["layout"] == after["layout"]
    assert [t["name"] for t in before["data"]] == ["source", "target"]
    assert [t["name"] for t in after["data"]] == ["source", "target", "steered"]
