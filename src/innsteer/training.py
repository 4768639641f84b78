"""One trainer for every method: through the model, or on rows; the loss is a function."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.errors import FormatError, InputError
from innsteer.files import canonical, write_tensors
from innsteer.interventions import trainable
from innsteer.readouts import aims
from innsteer.site import Site
from innsteer.steerer import ConceptRun, Intervention, Interventions, Runner, Steerer, tensor_bytes

Loss = Callable[[Any, Interventions, Sequence[int]], Tensor]
"""Mean loss of some items of a run, differentiable."""


def said(run: Runner, maps: Interventions, items: Sequence[int]) -> Tensor:
    """Mean of -log P(target) at strength 1 and -log P(source) at -1, nats.

    Each against everything that could be said, not against the other answer: a pair's odds may be
    right while neither answer is ever said.
    """
    n = len(items)
    both = run.answers(maps, [*items, *items], [1.0] * n + [-1.0] * n, only=[0] * n + [1] * n)
    return -0.5 * (both.target[: len(items)].mean() + both.source[len(items) :].mean())


def odds(run: Runner, maps: Interventions, items: Sequence[int]) -> Tensor:
    """Mean of -log of the steered-for answer's share of both, at strengths 1 and -1, nats."""
    towards, away = _margins(run, maps, items)
    return nn.functional.softplus(torch.cat([-towards, away])).mean()


def target(run: Runner, maps: Interventions, items: Sequence[int]) -> Tensor:
    """Mean of -log P(target) at strength 1, nats: the loss of ReFT and of language modelling."""
    n = len(items)
    return -run.answers(maps, items, [1.0] * n, only=[0] * n).target.mean()


def preference(beta: float = 0.1) -> Loss:
    """The loss of BiPO for one training: preference optimisation at strengths 1 and -1, nats.

    Mean of -log sigmoid(s * beta * raised) over both signs s, with raised how much strength s has
    raised log P(target) - log P(source) over the plain model, which is asked once per item: ln 2
    for an edit that does nothing.

    Args:
        beta: how soon a pair that is told apart counts no more, per nat.
    """
    plain: dict[int, float] = {}

    def loss(run: Runner, maps: Interventions, items: Sequence[int]) -> Tensor:
        if new := [item for item in dict.fromkeys(items) if item not in plain]:
            with torch.no_grad():
                both = run.answers(None, new, [0.0] * len(new))
            plain.update(zip(new, (both.target - both.source).tolist(), strict=True))
        towards, away = _margins(run, maps, items)
        before = towards.new_tensor([plain[item] for item in items])
        raised = torch.cat([-(towards - before), away - before])
        return nn.functional.softplus(beta * raised).mean()

    return loss


def _margins(run: Runner, maps: Interventions, items: Sequence[int]) -> tuple[Tensor, Tensor]:
    """log P(target) - log P(source) of items at strength 1, and at -1, nats."""
    n = len(items)
    both = run.answers(maps, [*items, *items], [1.0] * n + [-1.0] * n)
    margin = both.target - both.source
    return margin[:n], margin[n:]


SETTINGS = (
    "steps",
    "batch",
    "learning_rate",
    "weight_decay",
    "unmoved",
    "unmoved_batch",
    "patience",
)


MOST = 1_000_000
"""Steps, items and the like of a training, at most."""


def check(method: Steerer, counts: Sequence[str], amounts: Sequence[str]) -> None:
    """Refuse fields of a training that are out of range: counts from 1, amounts and patience 0.

    Raises:
        InputError: it names the field and its range; counts and patience go up to ``MOST``.
    """
    for name in (*counts, "patience"):
        least = int(name != "patience")
        if not least <= getattr(method, name) <= MOST:
            raise InputError(f"{name}={getattr(method, name)}", expected=f"{least} to {MOST:,}")
    for name in amounts:
        if not 0 <= getattr(method, name) < math.inf:
            raise InputError(f"{name}={getattr(method, name)}", expected="finite, >= 0")


def settings(method: object) -> dict[str, Any]:
    """Those fields of a method that are settings of ``train_through``, under their names."""
    return {name: getattr(method, name) for name in SETTINGS if hasattr(method, name)}


LOSSES: dict[str, Loss] = {"said": said, "odds": odds, "target": target}


@dataclass
class Course:
    """What a training did: validation losses by step, the step that was kept, and what it took."""

    steps: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kept: int = 0
    gradients: int = 0


def train_through(
    run: Runner | ConceptRun,
    maps: Interventions,
    *,
    loss: Loss = said,
    steps: int = 150,
    batch: int = 32,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.0,
    unmoved: float = 1.0,
    unmoved_batch: int = 8,
    every: int = 15,
    patience: int = 3,
    clip: float = 1.0,
    seed: int = 0,
    watch: Callable[[int], None] | None = None,
    accumulate: int = 1,
    warmup: int = 0,
    checkpoint: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    about: object = None,
) -> Course:
    """AdamW on a map's parameters through the frozen model, both signs, in place.

    Each step adds ``unmoved`` times the mean KL(base || steered) of some unmoved sequences, each at
    strength 1 or -1. Every ``every`` steps the same loss is taken on the validation items and on
    the unmoved sequences set aside (a fifth of them); the best state is kept, the start included.

    Args:
        loss: of items at both strengths.
        batch, unmoved_batch: items and unmoved sequences per step.
        learning_rate: cosine decay to 0. weight_decay: of AdamW. clip: of the gradient's norm.
        every, patience: validate so often, stop after so many validations without a better one;
            patience 0 = run all steps and keep the best.
        watch: called with the step at every validation, before it.
        accumulate: parts of a batch whose gradients are added up, one part in memory at a time.
        warmup: steps over which the rate rises to its full height.
        checkpoint: a file that holds the whole state of the training after every validation, and
            from which the same training goes on, to the same numbers.
        about: what else makes it this training, as JSON: settings of the loss and of the map.

    Raises:
        InputError: nothing to train, a loss that is not finite, or another training's checkpoint.
    """
    parameters = _trained(maps)
    draw = torch.Generator().manual_seed(seed)
    items, held = run.items("train"), run.items("validation")
    still = torch.randperm(len(run.unmoved), generator=draw).tolist()
    aside, shown = still[: len(still) // 5], still[len(still) // 5 :]
    kept = _Checkpoint(
        checkpoint,
        [steps, batch, learning_rate, weight_decay, unmoved, unmoved_batch, every, clip, seed]
        + [accumulate, warmup, items, held, getattr(run, "digest", ""), about],
        maps,
    )

    def moved(places: Sequence[int], dice: torch.Generator) -> Tensor:
        """Mean KL of unmoved sequences, each at strength 1 or -1 of a random behaviour."""
        seen = cast(Runner, run)  # a run on concepts has nothing that must not move
        k = len(seen.behaviours)
        column = torch.randint(k, (len(places),), generator=dice)
        sign = 2.0 * torch.randint(2, (len(places), 1), generator=dice) - 1
        coef = sign * nn.functional.one_hot(column, k)
        return seen.divergence(maps, places, coef).mean()

    def whole(chosen: Sequence[int], places: Sequence[int], dice: torch.Generator) -> Tensor:
        value = loss(run, maps, chosen)
        return value + unmoved * moved(places, dice) if unmoved and places else value

    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    rate = _rate(optimiser, steps, warmup)
    course, best, since, started = Course(), math.inf, 0, time.perf_counter()
    state = {name: value.clone() for name, value in maps.state_dict().items()}
    queue: list[int] = []
    first = -1
    if told := kept.load(maps, state, optimiser, draw):
        first, best, since, queue = (told[name] for name in ("step", "best", "since", "queue"))
        course, rate_state = Course(**told["course"]), told["rate"]
        rate.load_state_dict(rate_state)
        started -= course.seconds[-1]
    for step in range(max(first, 0), steps + 1):
        if progress is not None:
            progress("train", step, steps)
        if step == first:  # validated before it was kept
            if patience and since >= patience:
                break
        elif step % every == 0 or step == steps:
            if watch is not None:
                watch(step)
            with torch.no_grad():
                # The same signs every time: a lucky draw must not look like a better state.
                value = float(whole(held or items, aside, torch.Generator().manual_seed(seed)))
            if not math.isfinite(value):
                raise InputError(
                    f"a loss of {value} after {step} steps",
                    expected="a finite one",
                    remedy="lower the learning rate",
                )
            course.steps.append(step)
            course.held_out.append(value)
            course.seconds.append(time.perf_counter() - started)
            since = 0 if value < best else since + 1
            if value < best:
                best, course.kept = value, step
                state = {name: tensor.clone() for name, tensor in maps.state_dict().items()}
            now = {"step": step, "best": best, "since": since, "queue": queue}
            now |= {"course": vars(course), "rate": rate.state_dict()}
            kept.save(maps, state, optimiser, draw, now)
            if patience and since >= patience:
                break
        if step == steps:
            break
        while len(queue) < min(batch, len(items)):
            queue += [items[n] for n in torch.randperm(len(items), generator=draw).tolist()]
        chosen, queue = queue[:batch], queue[batch:]
        few = torch.randperm(len(shown), generator=draw)[:unmoved_batch].tolist()
        optimiser.zero_grad(set_to_none=True)
        size = math.ceil(len(chosen) / accumulate)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            asked = whole(part, [shown[n] for n in few], draw)
            (asked * (len(part) / len(chosen))).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        rate.step()
        course.gradients += len(chosen)
    maps.load_state_dict(state)
    return course


def _rate(optimiser: torch.optim.Optimizer, steps: int, warmup: int) -> Any:
    """Cosine decay to 0 after a linear rise."""
    if not warmup:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))

    def height(step: int) -> float:
        done = max(step - warmup, 0) / max(steps - warmup, 1)
        return min((step + 1) / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, height)


class _Checkpoint:
    """A training's whole state in one safetensors file; without a path, nothing.

    Args:
        about: what makes it this training and no other, beside what the map started from.
    """

    def __init__(self, path: Path | None, about: Any, maps: Interventions) -> None:
        self._path = path
        if path is not None:
            digest = hashlib.sha256(canonical(about))
            for content in tensor_bytes(maps):
                digest.update(content)
            self._about = digest.hexdigest()

    def save(
        self,
        maps: Interventions,
        best: dict[str, Tensor],
        optimiser: torch.optim.Optimizer,
        draw: torch.Generator,
        told: dict[str, Any],
    ) -> None:
        """Write everything, whole or not at all."""
        if self._path is None:
            return
        tensors = {f"map.{name}": tensor for name, tensor in maps.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
        for number, own in optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": tensor for name, tensor in own.items()}
        tensors["draw"] = draw.get_state()
        rates = [group["lr"] for group in optimiser.param_groups]
        state = {**told, "about": self._about, "rates": rates}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        cpu = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        write_tensors(self._path, cpu, {"state": json.dumps(state)})

    def load(
        self,
        maps: Interventions,
        best: dict[str, Tensor],
        optimiser: torch.optim.Optimizer,
        draw: torch.Generator,
    ) -> dict[str, Any] | None:
        """Put back what was kept; None: nothing was."""
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(self._path, "pt") as file:
                state: dict[str, Any] = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise FormatError(f"{self._path} is no checkpoint: {error}") from error
        if state["about"] != self._about:
            raise InputError(
                f"{self._path}, the checkpoint of another training",
                expected="the same table, model, site, settings and seed",
                remedy="finish that one with its own command, or remove the file",
            )

        def under(lead: str) -> dict[str, Tensor]:
            return {n.removeprefix(lead): t for n, t in tensors.items() if n.startswith(lead)}

        maps.load_state_dict(under("map."))
        best |= under("best.")
        draw.set_state(tensors["draw"])
        adam: dict[int, dict[str, Tensor]] = {}
        for name, tensor in under("adam.").items():
            number, _, kind = name.partition(".")
            adam.setdefault(int(number), {})[kind] = tensor
        own = optimiser.state_dict()
        optimiser.load_state_dict({**own, "state": adam})
        for group, rate in zip(optimiser.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        return state


def best_scale(
    run: Runner,
    maps: Interventions,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.5),
) -> tuple[float, float]:
    """A line search along the map's path: the best strength of a grid, and its gain.

    The gain is the mean probability of the answer steered for, of both signs, on the validation
    items; for open answers, of next to no probability, the mean log-probability, and of the first
    twelve items, dealt to the behaviours, because each takes all the tokens of both answers.
    """
    held = run.items("validation") or run.items("train")
    open_ended = "" in run.keys(held)
    if open_ended:
        part = "validation" if run.items("validation") else "train"
        each = max(12 // len(run.behaviours), 1)
        held = [n for name in run.behaviours for n in run.items(part, name)[:each]]
    found = {}
    with torch.no_grad():
        for scale in scales:
            n = len(held)
            both = run.answers(
                maps, [*held, *held], [scale] * n + [-scale] * n, only=[0] * n + [1] * n
            )
            right = torch.cat([both.target[:n], both.source[n:]])
            found[scale] = float((right if open_ended else right.exp()).mean())
    best = max(found, key=lambda scale: found[scale])
    return best, found[best]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a fit moves, at least one."""
    parameters = trainable(module)
    if not parameters:
        raise InputError("a map without parameters to train", expected="requires_grad somewhere")
    return parameters


class Lessons(NamedTuple):
    """What a map shall do to rows: from ``start`` to ``end`` under ``coef``; still rows stay.

    ``weight`` is each row's, with mean 1. ``pair`` numbers what is held out together.
    """

    start: Tensor
    end: Tensor
    coef: Tensor
    weight: Tensor
    pair: Tensor


Ends = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Where a pair's ends lie, from its middle ``[n, d]`` and its behaviour's row ``[1, k]``."""


def lessons(acts: Activations, site: Site, ends: Ends | None = None) -> Lessons:
    """The training pairs of every behaviour, there at strength 1 and back at -1, and unmoved rows.

    Args:
        ends: other ends of the pairs than the rows' own.

    Raises:
        InputError: a behaviour without pairs.
    """
    k = len(acts.behaviours)
    parts, count = [], 0
    for column, behaviour in enumerate(acts.behaviours):
        own = aims(acts.where(split="train"), site, behaviour)
        still = acts.where(split="train").unmoved(site, behaviour)
        one = torch.zeros(1, k)
        one[0, column] = 1.0
        low, high = (own.rows - own.lifts / 2).float(), (own.rows + own.lifts / 2).float()
        if ends is not None:
            low, high = ends(own.rows.float(), one)
        weight, pair = own.weight.float(), count + torch.arange(len(low))
        count += len(low) + len(still)
        stays = torch.ones(len(still)), count - len(still) + torch.arange(len(still))
        # A still row is held under either sign, in turn.
        either = one * (1 - 2 * (torch.arange(len(still)) % 2)).unsqueeze(-1)
        parts += [
            Lessons(low, high, one.expand(len(low), -1), weight, pair),
            Lessons(high, low, -one.expand(len(low), -1), weight, pair),
            Lessons(still, still, either, *stays),
        ]
    found = Lessons(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return found._replace(weight=found.weight / found.weight.mean())


Also = Callable[[Tensor, Tensor, Tensor], Tensor]


def teach(
    part: Intervention,
    given: Lessons,
    *,
    epochs: int = 100,
    batch: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-4,
    holdout: float = 0.15,
    patience: int = 15,
    transport: float = 1.0,
    also: Also | None = None,
    seed: int = 0,
) -> None:
    """AdamW on a map's parameters in place: least |h' - end|^2 over the mean |end - start|^2.

    A share of the pairs is held out; the epoch that is best on it is kept. Few rows go in smaller
    batches, or an epoch would be a single step.

    Args:
        transport: weight of the distance.
        also: a further term, of a batch's rows, its moves ``h' - h`` and the wanted ones.

    Raises:
        InputError: nothing to train, or a loss that is not finite.
    """
    draw = torch.Generator().manual_seed(seed)
    gap = (given.end - given.start).square().sum(-1)
    scale = gap[gap > 0].mean() if (gap > 0).any() else torch.ones(())
    count = int(given.pair.max()) + 1
    aside = torch.randperm(count, generator=draw)[: max(round(holdout * count), 1)]
    out = torch.isin(given.pair, aside)
    held, kept = out.nonzero().squeeze(-1), (~out).nonzero().squeeze(-1)
    batch = min(batch, max(len(kept) // 8, 8))
    parameters = _trained(part)

    def loss(index: Tensor) -> Tensor:
        h = given.start[index]
        moved, wanted = part.displacement(h, given.coef[index]), given.end[index] - h
        left = (moved - wanted).square().sum(-1)
        value = transport * (given.weight[index] * left).mean() / scale
        return value if also is None else value + also(h, moved, wanted)

    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    best, since = math.inf, 0
    state = {name: value.clone() for name, value in part.state_dict().items()}
    for _ in range(epochs):
        for index in torch.split(kept[torch.randperm(len(kept), generator=draw)], batch):
            optimiser.zero_grad(set_to_none=True)
            loss(index).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        rate.step()
        with torch.no_grad():
            value = float(loss(held))
        if not math.isfinite(value):
            raise InputError(f"a loss of {value}", remedy="lower the learning rate")
        since = 0 if value < best else since + 1
        if value < best:
            best = value
            state = {name: tensor.clone() for name, tensor in part.state_dict().items()}
        if since >= patience:
            break
    part.load_state_dict(state)
