"""An open-ended behaviour: INNSteer that opens on its own prompts alone, against DiffMean.

    python benchmarks/open_ended.py [--behaviour critical] [--prompts 130]

Answers to held-out prompts are sampled and scored by the behaviour's offline scorer. The strength
of every arm is chosen on validation prompts: of four shares of the largest that stays within the
budget (8 at most) the one of the highest score; once for neutral prompts alone, and once for
prompts that only look like the behaviour's too. INNSteer sees ordinary prompts of kinds that
validation and test do not hold, and learns to leave them alone; DiffMean behind the same gate
stands beside it.
"""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import control
import numpy as np
import torch

from innsteer import fitting, load_model
from innsteer.backends.base import Completion, Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.backends.meter import Meter
from innsteer.contrast import Contrast, prompts
from innsteer.files import write_json
from innsteer.flows import Shear
from innsteer.interventions import Edit, Latent
from innsteer.metrics import get as metric
from innsteer.steerer import Intervention, Interventions
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites

RESULTS = control.HERE / "results" / "open_ended.json"
SHARES = (0.25, 0.5, 0.75, 1.0)
METERS = ("neutral_cost", "in_format_cost")


class Behind(Intervention):
    """A map behind the gate of a fitted shear that reads the prompt."""

    contextual = True

    def __init__(self, inner: Intervention, gate: Latent) -> None:
        super().__init__()
        self.inner, self.gate, self.width = inner, gate, inner.width

    def displacement(
        self, h: torch.Tensor, coef: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The inner map's, at strengths that the gate lets through."""
        assert self.gate.reader is not None and isinstance(self.gate.step, Shear)
        return self.inner.displacement(h, coef * self.gate.step.openness(self.gate.reader(context)))


def behind(gated: Interventions, inner: Interventions) -> Interventions:
    """Another method's maps behind the gates of fitted ones."""
    parts = {}
    for site, part in gated.items():
        assert isinstance(part, Latent)
        parts[site] = Behind(inner[site], part)
    return Interventions(parts).eval()


def scored(
    backend: HF, asked: Sequence[Prompt], maps: Interventions | None, strength: float, how: Sampling
) -> list[Completion]:
    edits = [] if maps is None else [Edit(maps, torch.tensor([strength]))]
    return backend.generate(asked, edits, how)


def values(name: str, answers: Sequence[Completion]) -> list[float]:
    """The scorer's verdict on each answer."""
    found = []
    for answer in answers:
        score = metric(name).score([answer])
        assert score is not None
        found.append(score.value)
    return found


def cost(meter: Meter, name: str, maps: Interventions, strength: float) -> float:
    score = metric(name).score(
        meter([Edit(maps, torch.tensor([strength]))], kind=metric(name).kind)
    )
    assert score is not None
    return score.value


def interval(parts: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    draws = np.random.default_rng(seed).choice(parts, (4000, len(parts))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.mean(parts)), float(low), float(high)


def main() -> None:
    """Fit, choose strengths, sample, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--behaviour", default="critical")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32)
    asked = parser.parse_args()
    model = load_model("smollm2")
    backend = HF(model)
    contrast = Contrast.load(asked.behaviour)
    scorer = suites.meta(contrast)["scorer"]
    sites = [fitting.default_site(model)]
    started = time.perf_counter()
    diffmean = fitting.fit(model, contrast, "diffmean", sites=sites)
    aim: dict[str, Any] = {"objective": "target", "sites": sites}
    kept = control.HERE.parent / "runs" / f"open-ended-{asked.behaviour}"
    if not kept.exists():
        fitting.fit(model, contrast, **aim).save(kept)
    ours = Steering.load(kept)
    say(f"fitted in {time.perf_counter() - started:.0f} s")
    arms: dict[str, Interventions] = {
        "diffmean": diffmean.interventions,
        "innsteer": ours.interventions,
        "diffmean behind the gate": behind(ours.interventions, diffmean.interventions),
    }
    how = Sampling(asked.tokens, 0.7)
    validation = [Prompt(f"v{n}", p) for n, p in enumerate(prompts(asked.behaviour, "validation"))]
    test = [
        Prompt(f"t{n}", p) for n, p in enumerate(prompts(asked.behaviour, "test")[: asked.prompts])
    ]
    meters = {
        (name, part): backend.meter(
            backend.reference(
                suites.neutral(part)
                if name == "neutral_cost"
                else suites.in_format(contrast, part),
                Sampling(16, 1.0) if name == "neutral_cost" else None,
            ),
            sites,
        )
        for name, asking in (
            ("neutral_cost", suites.neutral),
            ("in_format_cost", partial(suites.in_format, contrast)),
        )
        for part in ("validation", "test")
    }
    records: list[dict[str, Any]] = []

    def note(name: str, parts: Sequence[float], bar: str, unit: str) -> None:
        value, low, high = interval(parts)
        found = {"figure": name, "value": value, "low": low, "high": high}
        records.append(found | {"asked": bar, "unit": unit, "n": len(parts)})
        say(f"{name}: {value:.3f} [{low:.3f}, {high:.3f}] {bar}")

    base = scored(backend, test, None, 0.0, how)
    note(f"unsteered, {scorer}", values(scorer, base), "", "share")
    found: dict[tuple[str, str], list[float]] = {}
    done: dict[tuple[str, float], tuple[str, str]] = {}
    for arm, maps in arms.items():
        gains: dict[float, float] = {}
        for budget, names in (
            ("neutral budget", ("neutral_cost",)),
            ("both halves", ("neutral_cost", "in_format_cost")),
        ):

            def spends(
                strength: float, maps: Interventions = maps, names: tuple[str, ...] = names
            ) -> float:
                """The worse half on validation prompts."""
                return max(cost(meters[n, "validation"], n, maps, strength) for n in names)

            limit = control.largest(spends, 1.0, 8.0)
            for share in SHARES:
                s = round(share * limit, 3)
                if s not in gains:
                    answers = scored(backend, validation[:32], maps, s, how)
                    gains[s] = float(np.mean(values(scorer, answers)))
                    say(f"  {arm} {s}: {gains[s]:.2f}")
            strength = max((s for s in gains if s <= limit), key=lambda s: (gains[s], -s))
            if (arm, strength) in done:
                found[arm, budget] = found[done[arm, strength]]
                note(f"{arm}, {budget}: as above", found[arm, budget], "", "share")
                continue
            done[arm, strength] = arm, budget
            answers = scored(backend, test, maps, strength, how)
            found[arm, budget] = values(scorer, answers)
            note(f"{arm}, {budget}, {scorer}", found[arm, budget], "", "share")
            note(f"{arm}, {budget}, strength", [strength], "", "unitless")
            for name in METERS:
                spent = cost(meters[name, "test"], name, maps, strength)
                bar = f"<= {1.1 * control.BUDGET:.4f}" if name in names else ""
                note(f"{arm}, {budget}, {name}", [spent], bar, "nats")
            fluent = [
                backend.score([Prompt(a.item, t.conversation, (a.text,))])[0][0]
                for a, t in zip(answers, test, strict=True)
                if a.text
            ]
            note(
                f"{arm}, {budget}, unsteered nats per token of the answers",
                [-float(np.mean(row)) for row in fluent],
                "",
                "nats",
            )
            distinct = metric("distinct").score(answers)
            assert distinct is not None
            note(f"{arm}, {budget}, distinct", [distinct.value], "", "share")
            for answer in answers[:2]:
                say(f"    {answer.text[:160]!r}")
    for budget in ("neutral budget", "both halves"):
        for rival in arms:
            if rival != "innsteer":
                pairs = zip(found["innsteer", budget], found[rival, budget], strict=True)
                bar = "> 0" if rival == "diffmean" else ""
                note(f"{budget}: innsteer less {rival}", [a - b for a, b in pairs], bar, "share")
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/open_ended.py",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "machine": "2 cores, CPU",
            "behaviour": asked.behaviour,
            "figures": records,
        },
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
