"""What the behaviours of one steering do to each other, before a mix of them ships."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from innsteer.backends.base import Progress, Sampling, silent
from innsteer.backends.hf import HF, Meter
from innsteer.contrast import Contrast
from innsteer.errors import InputError
from innsteer.fitting import check_unseen
from innsteer.interventions import Edit
from innsteer.metrics import get as metric
from innsteer.models import LanguageModel
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites
from innsteer.tuning import control, control_meter, control_metric


@dataclass(frozen=True)
class Interference:
    """Control of every behaviour's items, by what is steered.

    Attributes:
        behaviours: in the order of all that follows. strengths: of each, as a number.
        metric: of each, what control is: ``alignment`` of choices, ``preference`` of open answers.
        unsteered: control of the plain model.
        alone: ``alone[i][j]``, control of behaviour j's items with i steered alone.
        together: with all of them steered at once.
        kept: share of what j moves alone that is left in the mix; None where it moves nothing.
        cost: nats per token of the mix on neutral prompts; in_format: on prompts that only look
            like the behaviours', None where there are none.
    """

    behaviours: tuple[str, ...]
    strengths: tuple[float, ...]
    metric: tuple[str, ...]
    unsteered: tuple[float, ...]
    alone: tuple[tuple[float, ...], ...]
    together: tuple[float, ...]
    cost: float
    in_format: float | None

    @property
    def mix(self) -> dict[str, float]:
        """Strength by behaviour."""
        return dict(zip(self.behaviours, self.strengths, strict=True))

    @property
    def kept(self) -> tuple[float | None, ...]:
        """Per behaviour (together - unsteered) / (alone - unsteered)."""
        found: list[float | None] = []
        for j, base in enumerate(self.unsteered):
            effect = self.alone[j][j] - base
            found.append((self.together[j] - base) / effect if abs(effect) > 1e-6 else None)
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"kept": list(self.kept)}

    def text(self) -> str:
        """A table: a row for what is steered, a column for whose items."""
        width = max(map(len, (*self.behaviours, "all together")))
        heads = [str(n + 1) for n in range(len(self.behaviours))]
        label = f"{'steered':{width + 4}} strength"
        lines = [f"{label}  " + " ".join(f"{head:>6}" for head in heads)]

        def row(name: str, strength: str, values: Sequence[float | None], form: str) -> str:
            cells = (f"{'-' if value is None else format(value, form):>6}" for value in values)
            return f"{name:{width + 4}} {strength:>8}  {' '.join(cells)}"

        lines.append(row("nothing", "", self.unsteered, ".3f"))
        for n, name in enumerate(self.behaviours):
            strength = f"{self.strengths[n]:.4g}"
            lines.append(row(f"{n + 1:2}. {name}", strength, self.alone[n], ".3f"))
        lines.append(row("all together", "", self.together, ".3f"))
        lines.append(row("effect kept", "", self.kept, ".0%"))
        costs = f"all together cost {self.cost:.4f} nats per token on neutral prompts"
        if self.in_format is not None:
            costs += f", {self.in_format:.4f} on prompts that look like the behaviours'"
        return "\n".join([*lines, costs])


def interference(
    model: LanguageModel | HF,
    steering: Steering,
    contrasts: Sequence[Contrast],
    *,
    strengths: Mapping[str, float | str] | None = None,
    part: str = "validation",
    items: int = 48,
    tokens: int = 300,
    seed: int = 0,
    progress: Progress = silent,
) -> Interference:
    """Steer each behaviour alone and all together, and measure each on every behaviour's items.

    Args:
        contrasts: at least two, of the behaviours that shall be mixed.
        strengths: by behaviour; default: each one's budget if tuned, else 1.
        part: whose items and prompts; items: at most so many of each behaviour.
        tokens: response tokens that the neutral cost is taken on, at least.

    Raises:
        InputError: fewer than two behaviours, or one that the steering does not have.
        LeakError: the steering was fitted on the items.
        MismatchError: a steering of another model.
    """
    backend = HF.of(model)
    steering.check(backend.model)
    names = [contrast.behaviour for contrast in contrasts]
    given = dict(strengths or {})
    odd = [name for name in (*names, *given) if name not in steering.behaviours]
    if odd or len(set(names)) < 2 or len(set(names)) < len(names) or not given.keys() <= set(names):
        raise InputError(
            f"the interference of {', '.join(odd or [*names, *given]) or 'nothing'}",
            expected="data of two or more, each once, of " + ", ".join(steering.behaviours),
        )
    parts = [contrast.part(part) for contrast in contrasts]
    for one in parts:
        check_unseen(steering, one)
    parts = [one.subset(min(len(one), items), seed) for one in parts]
    sites = list(steering.interventions)
    settled = {name: steering.resolve(given.get(name), name) for name in names}
    edits = [steering.edit({name: strength}) for name, strength in settled.items()]
    mix = steering.edit(settled)
    meters = [control_meter(backend, one, sites) for one in parts]
    looks = suites.in_format_of(contrasts, part)
    plain = suites.neutral(part)[: max(tokens // 16, 8)]
    neutral = backend.reference(plain, Sampling(24, 1.0, seed), progress=progress)
    cost = backend.meter(neutral.part(tokens), sites)
    rows = []
    for n, edit in enumerate([*edits, mix]):
        progress("interference", n, len(edits) + 1)
        rows.append(tuple(_control(*pair, edit) for pair in zip(meters, parts, strict=True)))
    progress("interference", len(rows), len(rows))
    return Interference(
        tuple(names),
        tuple(settled.values()),
        tuple(control_metric(one) for one in parts),
        tuple(_control(*pair, None) for pair in zip(meters, parts, strict=True)),
        tuple(rows[:-1]),
        rows[-1],
        _nats(cost, mix),
        _nats(backend.meter(backend.reference(looks, None), sites), mix) if looks else None,
    )


def _control(meter: Meter, items: Contrast, edit: Edit | None) -> float:
    scored = meter.unsteered() if edit is None else meter([edit])
    score = metric(control_metric(items)).score(control(scored, items))
    assert score is not None
    return score.value


def _nats(meter: Meter, edit: Edit) -> float:
    score = metric("neutral_cost").score(meter([edit]))
    assert score is not None
    return score.value
