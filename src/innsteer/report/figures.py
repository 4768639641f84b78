"""The records of an evaluation, and how their numbers are worded and rounded.

Knows no model and no metric's formula: a figure arrives with its interval, unit and direction.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator

UNSTEERED = "unsteered"
PROMPT_ONLY = "prompt-only"
RANDOM = "random-direction"
PLAIN = (UNSTEERED, PROMPT_ONLY)
"""The plain model's arms: they have no dial."""
COST = "neutral_cost"
# A cell more than 10 % over the budget is marked and not ranked.
TOLERANCE = 1.1

# JSON has no NaN: it is written as null and read back as NaN.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True)
class Figure:
    """One number of one arm with its interval.

    Attributes:
        against: "" for the arm's own figure; else the arm from which this is the paired difference.
        unit: for instance ``nats per token``; ``share of ...`` and ``probability`` read as percent.
        better: ``higher``, ``lower`` or ``neither``.
        level: coverage of the interval ``low`` to ``high``, 0 to 1. n: items behind it.
    """

    arm: str
    metric: str
    strength: Number
    value: Number
    low: Number
    high: Number
    n: int
    unit: str
    better: str
    level: float = 0.95
    against: str = ""


@dataclass(frozen=True)
class DosePoint:
    """One arm at one strength: cost in nats per token, control, and mean |h' - h| / |h|."""

    arm: str
    strength: Number
    nats: Number
    nats_low: Number
    nats_high: Number
    control: Number
    control_low: Number
    control_high: Number
    displacement: Number
    at_budget: bool = False


@dataclass(frozen=True)
class Cloud:
    """Points of one site in two dimensions, by group: ``source``, ``target``, ``steered``."""

    title: str
    axes: tuple[str, str]
    groups: Mapping[str, tuple[tuple[Number, Number], ...]]


@dataclass(frozen=True)
class TokenTrail:
    """|h' - h| / |h| at each token of one answer; 0 where nothing was edited."""

    arm: str
    item: str
    prompt: str
    tokens: tuple[str, ...]
    displacement: tuple[Number, ...]


ARMS = {
    UNSTEERED: "Unsteered",
    PROMPT_ONLY: "Prompt only",
    RANDOM: "Random direction",
    "diffmean": "DiffMean",
    "innsteer": "INNSteer",
}

MEASURES = {
    "negative_sentiment": ("share of negative answers", "answers that read as negative"),
    "sentiment": ("sentiment", "from most negative, -1, to most positive, 1"),
    "formality": ("formality", "how formal whole answers read"),
    "scored": ("score", "answers by a function of your own"),
    "language": ("language", "answers in that language"),
    "asking": ("share of answers that ask", "answers that ask the reader something back"),
    "hedging": ("share of hedged sentences", "sentences that express uncertainty"),
    "alignment": ("alignment", "probability of the matching answer, among the two offered"),
    "said_alignment": ("said alignment", "sampled answers that say the one steered for"),
    "answer_mass": ("answer mass", "both offered answers' share of the whole distribution"),
    "preference": ("preference", "probability of the target answer over the source answer"),
    "mc1": ("MC1", "questions whose best true answer is the likeliest"),
    "mc2": ("MC2", "true answers' share of the probability of all answers"),
    "interference": ("interference", "preference on other behaviours; 50 % = untouched"),
    "neutral_cost": ("neutral cost", "divergence from the unsteered model on neutral prompts"),
    "neutral_p99": ("neutral cost, 99th percentile", "the same at the worst 1 % of tokens"),
    "in_format_cost": ("in-format cost", "divergence where only the wording is the behaviour's"),
    "edited_share": ("edited share", "tokens that were edited on neutral prompts"),
    "perplexity": ("perplexity", "of the answers under the unsteered model"),
    "distinct": ("distinct bigrams", "variety of the wording; low means repetition"),
    "degeneration_256": ("degeneration at 256 tokens", "answers that fall into a loop"),
    "degeneration_1024": ("degeneration at 1,024 tokens", "answers that fall into a loop"),
    "bits_per_byte": ("bits per byte", "on held-out plain text, answers aside"),
    "agreement": ("agreement", "same as the unsteered answer where that was sure"),
    "over_refusal": ("over-refusal", "harmless requests that are declined"),
    "refusal": ("refusal", "answers that decline"),
}

DIAGNOSTICS = {
    "fisher": "separation of source and target along the shift in latent space; higher is wider",
    "fisher_input": "the same in the standardised input, before the flow",
    "consistency": "mean cosine of each pair's own shift with the one used; 1 is perfect",
    "round_trip": "worst relative error of mapping there and back, float32; 0 is exact",
    "round_trip_64": "the same in float64",
    "displacement": "mean |h' - h| / |h| at strength 1",
    "held_out": "1 = measured on validation rows, 0 = on the rows that were fitted",
}


def arm_key(arm: str) -> str:
    """One spelling per well-known arm.

    >>> arm_key("prompt_only"), arm_key("random direction")
    ('prompt-only', 'random-direction')
    """
    key = re.sub("[ _]+", "-", arm.lower())
    return "random-direction" if key == "random" else key


def arm_title(arm: str) -> str:
    """An arm's name for people.

    >>> arm_title("prompt_only"), arm_title("mine")
    ('Prompt only', 'mine')
    """
    return ARMS.get(arm_key(arm), arm)


def is_arm(arm: str, name: str) -> bool:
    """Whether ``arm`` is the well-known arm ``name``, however it is spelt."""
    return arm_key(arm) == name


def measure_title(metric: str) -> str:
    """A metric's name for people."""
    own, colon, argument = metric.partition(":")
    return MEASURES.get(own, (own.replace("_", " "), ""))[0] + colon + argument


def is_share(unit: str) -> bool:
    """Whether numbers of this unit are written in percent."""
    return unit.startswith(("share", "probability"))


class Written(NamedTuple):
    """A figure in words: ``41 %`` with ``33`` and ``49``, or ``+38 points``."""

    value: str
    low: str
    high: str

    @property
    def interval(self) -> str:
        """Both ends, as ``33 to 49``."""
        return f"{self.low} to {self.high}"


def write(figure: Figure) -> Written:
    """A figure rounded as far as its size asks, value and ends alike.

    >>> write(Figure("a", "m", 1, 0.41, 0.332, 0.49, 120, "share of answers", "higher"))
    Written(value='41 %', low='33', high='49')
    >>> write(Figure("a", "m", 1, 0.0912, 0.0871, 0.095, 9, "nats", "lower", against="unsteered"))
    Written(value='+0.0912', low='0.0871', high='0.0950')
    """
    scale = 100.0 if is_share(figure.unit) else 1.0
    ends = [scale * x for x in (figure.value, figure.low, figure.high)]
    sizes = [abs(x) for x in ends if math.isfinite(x)]
    largest = max(sizes, default=0.0)
    if scale == 100.0:
        places = 0 if largest >= 10 else 1
    else:
        places = min(4, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0
        if 0 < (width := ends[2] - ends[1]) < math.inf:  # the interval must not round away
            places = min(5, max(places, -math.floor(math.log10(width))))
    signs = ("+" if figure.against else "", "", "")
    words = [
        f"{x:{sign}.{places}f}" if math.isfinite(x) else "none"
        for x, sign in zip(ends, signs, strict=True)
    ]
    # "-0.0" and "+0.0" say nothing that "0.0" does not.
    words = [w.lstrip("+-") if not w.strip("+-0.") else w for w in words]
    points = " point" if words[0].strip("+-") == "1" else " points"
    unit = "" if scale == 1.0 else points if figure.against else " %"
    return Written(words[0] + unit, words[1], words[2])


def short(value: float) -> str:
    """A lone number, three digits.

    >>> short(1.4172), short(2.1e-7), short(float("nan"))
    ('1.42', '2.1e-07', 'none')
    """
    return f"{value:.3g}" if math.isfinite(value) else "none"
