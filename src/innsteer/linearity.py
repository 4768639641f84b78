"""How linear a model's blocks are about one token, and how far feedback can be from its plan.

Runs on any model whose blocks can be linearised. Three questions: by how much does a block miss its
linear prediction as the perturbation grows; do the Jacobians of different texts point alike; and,
for a fitted regulator, does the bound on its tracking error hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from innsteer import __version__
from innsteer.backends.base import Progress, silent
from innsteer.backends.engine import Engine
from innsteer.backends.hf import HF
from innsteer.backends.local import Local, Read, mean_jacobians, one_row, perturbed, products
from innsteer.contrast import Contrast, Conversation
from innsteer.control import error_bound
from innsteer.errors import InputError
from innsteer.files import fresh_folder, write_json, write_text
from innsteer.fitting import linearised
from innsteer.formats import is_plain, is_readable, plain_lines, read_file
from innsteer.models import LanguageModel
from innsteer.report import pages
from innsteer.steerers.alqr import ALQR, Feedback
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites
from innsteer.tuning import require_own

SCALES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Lengths of a perturbation, as shares of the row that is perturbed."""
DIRECTIONS = 4
RANK = 8
"""Dimensions of a leading subspace."""


@dataclass(frozen=True)
class Linearity:
    """What was measured on some prompts, a list entry per block.

    Attributes:
        model: its name. prompts: how many; each was read at its last token. width: d.
        scales: |delta| as shares of the row. own: by block and scale, the mean over prompts and
            random directions of |phi(x + delta) - phi(x) - A delta| / |phi(x + delta) - phi(x)|
            with A of that very prompt; 0 = linear. shared: the same with the mean A of all prompts;
            identity: with I, the residual stream alone, which any A should beat.
        alignment: mean over pairs of prompts of |U' V|^2 / r, for the leading r = ``RANK`` output
            directions U and V of their Jacobians; 1 = the same subspace. chance: r / d.
    """

    model: str
    prompts: int
    width: int
    scales: tuple[float, ...]
    own: list[list[float]]
    shared: list[list[float]]
    identity: list[list[float]]
    alignment: list[float]
    chance: float


@dataclass(frozen=True)
class Tracking:
    """A regulator's errors on texts that its bound was not estimated on, a list entry per block.

    Attributes:
        texts: how many, of the source side. layers: of the blocks' inputs.
        error: mean |set-point - v . x| of the steered rows, in activation units. plain: of the
            unsteered ones. predicted: what the linear model says of the steered ones.
        bound: mean upper bound on the error; with an estimate in it, itself an estimate.
        above: share of texts whose error exceeds theirs.
        lipschitz: by block, the estimate: the largest |x'_true - x'_linear| / |deviation| of the
            texts that were set aside for it. A larger one may exist.
    """

    texts: int
    layers: list[int]
    error: list[float]
    plain: list[float]
    predicted: list[float]
    bound: list[float]
    above: list[float]
    lipschitz: list[float]


def prompts(path: str | Path | None, most: int) -> list[str]:
    """Prompts of a table with a column ``prompt``, or a text's lines; None: the neutral ones.

    Raises:
        DataError: the file or one of its rows cannot be used.
    """
    if path is None:
        return [str(one.conversation) for one in suites.neutral("validation")[:most]]
    place = Path(path).expanduser()
    if is_readable(place) and not is_plain(place):
        return [row.text("prompt") for row in read_file(place)[:most]]
    return plain_lines(place)[:most]


def linearity(
    model: LanguageModel | HF,
    prompts: Sequence[Conversation],
    *,
    scales: Sequence[float] = SCALES,
    directions: int = DIRECTIONS,
    seed: int = 0,
    progress: Progress = silent,
) -> Linearity:
    """Local linearity of every block at the prompts' last tokens.

    Keys and values of all other tokens are held constant. Costs a Jacobian per block and prompt,
    about a text of d tokens each, and ``directions`` times ``scales`` passes of one token.

    Args:
        scales: shares of the row's length, > 0. directions: random ones, by the seed; the same for
            all prompts.

    Raises:
        InputError: fewer than two prompts, one of a single token, or numbers out of range.
        LayoutError: a block that cannot be linearised.
    """
    if len(prompts) < 2 or directions < 1 or not scales or min(scales) <= 0:
        raise InputError(
            f"{len(prompts)} prompts, {directions} directions, scales {list(scales)}",
            expected="two prompts to compare, a direction and lengths above 0",
        )
    engine = HF.of(model)
    encoded = [engine.model.encode(prompt) for prompt in prompts]
    texts = [Read(one.ids, one.prompt, {"weight": 1.0}) for one in encoded]
    if short := [text for text in texts if len(text.ids) < 2]:
        raise InputError(f"a prompt of {len(short[0].ids)} tokens", expected="at least two")
    width, layers = engine.model.layout.width, range(len(engine.model.layout.blocks))
    draw = torch.Generator().manual_seed(seed)
    looks = torch.randn(directions, width, generator=draw)
    looks = looks / looks.norm(dim=-1, keepdim=True)
    went: list[list[Tensor]] = []  # by prompt and block: what A makes of the directions
    moved: list[Tensor] = []  # [blocks, scales, directions, d] by prompt, and the rows' lengths
    sizes: list[Tensor] = []
    bases: list[list[Tensor]] = []
    for n, text in enumerate(texts):
        progress("linearity", n, len(texts))
        with one_row(engine, [text.ids], list(layers)) as seen:
            went.append([products(seen[k], looks, side="right")[0] for k in layers])
            inputs = [seen[k].given[0, 0].detach().float() for k in layers]
        sizes.append(torch.stack([x.norm() for x in inputs]))
        moved.append(_moved(engine, text, looks, scales))
        matrices = mean_jacobians(engine, [text], list(layers))
        bases.append([_leading(matrices[k], seed) for k in layers])
    progress("linearity", len(texts), len(texts))
    own: list[list[float]] = []
    shared: list[list[float]] = []
    identity: list[list[float]] = []
    for k in layers:
        mean = torch.stack([one[k] for one in went]).mean(0)
        ways = (own, [one[k] for one in went]), (shared, [mean] * len(texts))
        for found, maps in (*ways, (identity, [looks] * len(texts))):
            ratios = torch.stack(
                [
                    _missed(moved[n][k], sizes[n][k] * torch.tensor(scales), maps[n])
                    for n in range(len(texts))
                ]
            )
            found.append(ratios.mean((0, 2)).tolist())
    return Linearity(
        model=engine.model.name,
        prompts=len(texts),
        width=width,
        scales=tuple(scales),
        own=own,
        shared=shared,
        identity=identity,
        alignment=[_alignment([one[k] for one in bases]) for k in layers],
        chance=min(RANK, width) / width,
    )


def _moved(engine: Engine, text: Read, looks: Tensor, scales: Sequence[float]) -> Tensor:
    """phi(x + delta) - phi(x) of every block, ``[blocks, scales, directions, d]``.

    All stand side by side, as copies of the text's last token.
    """
    moves = torch.cat([torch.zeros_like(looks[:1]), *(scale * looks for scale in scales)])
    rows = perturbed(engine, text.ids, moves)
    apart = rows[:, 1:] - rows[:, :1]
    return apart.reshape(len(rows), len(scales), *looks.shape)


def _missed(moved: Tensor, lengths: Tensor, went: Tensor) -> Tensor:
    """|true - linear| / |true| ``[scales, directions]`` of one block and prompt."""
    linear = lengths[:, None, None] * went
    missed: Tensor = (moved - linear).norm(dim=-1) / moved.norm(dim=-1).clamp_min(1e-30)
    return missed


def _leading(matrix: Tensor, seed: int) -> Tensor:
    """The leading output directions of a Jacobian, orthonormal ``[d, r]``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rank = min(RANK, len(matrix))
        u, _, _ = torch.svd_lowrank(matrix, q=min(rank + 8, len(matrix)), niter=4)
    return u[:, :rank]


def _alignment(bases: Sequence[Tensor]) -> float:
    """Mean |U' V|^2 / r over pairs."""
    shared = [
        (one.mT @ other).square().sum() / one.shape[1]
        for n, one in enumerate(bases)
        for other in bases[:n]
    ]
    return float(torch.stack(shared).mean())


# --- a regulator against its bound ---------------------------------------------------------------


def require_loop(steering: Steering, contrast: Contrast) -> ALQR:
    """Refuse what has no tracking error, before anything runs."""
    method = steering.steerer
    if not isinstance(method, ALQR) or method.loop != "closed" or len(steering.behaviours) != 1:
        raise InputError(
            f"the tracking error of {method.name!r} with {len(steering.behaviours)} behaviours",
            expected="a closed loop of alqr for one behaviour",
        )
    require_own(steering, contrast)
    return method


def tracking(
    model: LanguageModel | HF,
    steering: Steering,
    contrast: Contrast,
    *,
    chain: Local | None = None,
    seed: int | None = None,
    progress: Progress = silent,
) -> Tracking:
    """Errors of a fitted A-LQR at strength 1 on training texts of the source side, and their bound.

    Half of the texts estimate how much the linear model leaves out, the other half is measured.
    What it leaves out is everything that is not A times the deviation: curvature, other texts'
    Jacobians, and the steered keys and values of earlier tokens.

    Args:
        steering: of one behaviour; it edits where it says. contrast: that it was fitted on.
        chain: of that fit and seed, whose Jacobians are not made again; default: a new one.
        seed: of the draws of texts; default: the fit's own, which its Jacobians are of.

    Raises:
        InputError: another method, an open loop, several behaviours, or data of another one.
        MismatchError: a steering of another model.
        PositionError: one of scope ``assistant``, which needs the turns of conversations.
    """
    method, maps = require_loop(steering, contrast), steering.interventions
    seed = int(steering.provenance.get("seed", 0)) if seed is None else seed
    backend = HF.of(model)
    steering.check(backend.model)
    chain = chain or linearised(backend, contrast, list(maps), progress=progress)
    parts = [part for _, part in maps.items() if isinstance(part, Feedback)]
    how: dict[str, Any] = {"side": "source", "most": method.texts, "seed": seed}
    how["where"] = steering.where
    plain, steered = (chain.inputs(one, **how) for one in (None, maps))
    before, after = (
        torch.stack([acts.values[site] for site in maps]).double() for acts in (plain, steered)
    )
    if before.shape[1] < 4:
        raise InputError(f"{before.shape[1]} source texts", expected="at least 4")
    matrices = [
        chain.jacobian(site.layer, prompts=method.prompts, rank=method.rank, seed=seed).double()
        for site in maps
    ]
    v = torch.stack([part.reads[0] for part in parts]).double()
    g = torch.stack([part.writes[0] for part in parts]).double()
    goal = torch.stack([part.levels[0] + part.origins[0] for part in parts]).double()
    aside = torch.arange(before.shape[1]) % 2 == 0
    apart, model_apart = after - before, torch.zeros_like(before[0])
    lipschitz, predicted, moves, closed = [], [], [], []
    for t in range(len(parts)):
        predicted.append((goal[t] - (before[t] + model_apart) @ v[t]).abs())
        if t + 1 == len(parts):
            break
        control = (goal[t] - after[t] @ v[t])[:, None] * g[t]
        left = (apart[t + 1] - apart[t] @ matrices[t].mT - control).norm(dim=-1)
        # Unperturbed rows say nothing, and what is left of them is rounding.
        size = apart[t].norm(dim=-1)
        known = aside & (size > 1e-6 * before[t].norm(dim=-1))
        lipschitz.append(float((left / size)[known].max()) if known.any() else 0.0)
        moves.append(model_apart.norm(dim=-1)[~aside].numpy())
        closed.append((matrices[t] - torch.outer(g[t], v[t])).numpy())
        pushed = (goal[t] - (before[t] + model_apart) @ v[t])[:, None] * g[t]
        model_apart = model_apart @ matrices[t].mT + pushed
    bound = error_bound(closed, lipschitz, np.stack(moves), v.numpy())
    held = ~aside
    error, unsteered = (
        (goal[:, None] - torch.einsum("tnd,td->tn", rows, v)).abs()[:, held]
        for rows in (after, before)
    )
    limit = torch.stack(predicted)[:, held] + torch.from_numpy(bound.read)
    return Tracking(
        texts=int(held.sum()),
        layers=[site.layer for site in maps],
        error=error.mean(1).tolist(),
        plain=unsteered.mean(1).tolist(),
        predicted=torch.stack(predicted)[:, held].mean(1).tolist(),
        bound=limit.mean(1).tolist(),
        # The loop and its linear model are at one where nothing is left out, but for rounding.
        above=(error > limit * (1 + 1e-6) + 1e-6).double().mean(1).tolist(),
        lipschitz=lipschitz,
    )


# --- the report ----------------------------------------------------------------------------------


def text(found: Linearity, tracked: Tracking | None = None) -> str:
    """A table for people, with the sentence that it comes to."""
    middle = min(found.scales, key=lambda scale: abs(scale - 0.1))
    place = found.scales.index(middle)
    lines = [
        finding(found),
        "",
        "block  own A at "
        + "  ".join(f"{scale:>6g}" for scale in found.scales)
        + f"  mean A at {middle:g}  I at {middle:g}  alignment",
    ]
    for k, own in enumerate(found.own):
        cells = "  ".join(f"{value:6.3f}" for value in own)
        lines.append(
            f"{k:>5}           {cells}  {found.shared[k][place]:>13.3f}"
            f"  {found.identity[k][place]:>8.3f}  {found.alignment[k]:9.2f}"
        )
    if tracked is not None:
        lines += ["", "block  error plain  steered  predicted  bound  above it"]
        columns = (tracked.plain, tracked.error, tracked.predicted, tracked.bound, tracked.above)
        for layer, row in zip(tracked.layers, zip(*columns, strict=True), strict=True):
            cells = "  ".join(f"{value:9.3g}" for value in row[:4])
            lines.append(f"{layer:>5}  {cells}  {row[4]:8.0%}")
    return "\n".join(lines)


def finding(found: Linearity) -> str:
    """The sentence on top."""
    middle = min(found.scales, key=lambda scale: abs(scale - 0.1))
    place = found.scales.index(middle)
    own, shared, identity = (
        float(np.median([row[place] for row in rows]))
        for rows in (found.own, found.shared, found.identity)
    )
    return (
        f"Moved by {middle:g} of its length, the median block of {found.model} misses its own "
        f"linear prediction by {own:.1%} of what it does, and that of the mean Jacobian by "
        f"{shared:.1%}, where the residual stream alone misses {identity:.1%}; "
        f"leading subspaces of two prompts align at {float(np.median(found.alignment)):.2f} "
        f"(chance {found.chance:.2f})."
    )


def save(
    folder: str | Path, found: Linearity, tracked: Tracking | None = None, **context: Any
) -> Path:
    """Write ``linearity.json`` and a page ``linearity.html``; the folder must not exist."""
    record: dict[str, Any] = {"innsteer": __version__, "linearity": asdict(found)}
    if tracked is not None:
        record["tracking"] = asdict(tracked)
    with fresh_folder(folder) as place:
        write_json(place / "linearity.json", record)
        write_text(place / "linearity.html", page(found, tracked, context))
    return Path(folder)


def page(found: Linearity, tracked: Tracking | None, context: Mapping[str, Any]) -> str:
    """One self-contained page with pictures."""
    blocks = list(range(len(found.own)))
    shades = [f"var(--arm-{n % 8})" for n in range(len(found.scales))]
    errors = [
        _line(f"{scale:g} of the row", blocks, [row[n] for row in found.own], shades[n])
        for n, scale in enumerate(found.scales)
    ]
    middle = found.scales.index(min(found.scales, key=lambda scale: abs(scale - 0.1)))
    at = f"{found.scales[middle]:g}"
    plain, shared = ([row[middle] for row in rows] for rows in (found.identity, found.shared))
    errors.append(_line(f"identity, {at}", blocks, plain, "var(--muted)", "dot"))
    errors.append(_line(f"mean Jacobian, {at}", blocks, shared, "var(--ink)", "dash"))
    aligned = [
        _line("pairs of prompts", blocks, found.alignment, "var(--arm-4)"),
        _line("chance", blocks, [found.chance] * len(blocks), "var(--muted)", "dash"),
    ]
    drawn = [
        _plot("errors", errors, "block", "share of the effect that is missed", log=True),
        _plot("alignment", aligned, "block", "alignment"),
    ]
    if tracked is not None:
        own = [
            _line("bound (estimate)", tracked.layers, tracked.bound, "var(--muted)", "dash"),
            _line("unsteered", tracked.layers, tracked.plain, "var(--arm-0)"),
            _line("linear model", tracked.layers, tracked.predicted, "var(--arm-3)"),
            _line("steered", tracked.layers, tracked.error, "var(--arm-4)"),
        ]
        drawn.append(_plot("tracking", own, "block", "distance from the set-point", log=True))
    return pages.render(
        "linearity.html.j2",
        drawn,
        filters={},
        legends={plot["id"]: [_told(line) for line in plot["data"]] for plot in drawn},
        title=f"How linear {found.model} is, block by block",
        finding=finding(found),
        tracked=tracked,
        above=max(tracked.above) if tracked else 0.0,
        context={"prompts": found.prompts, "innsteer": __version__, **context},
    )


def _line(name: str, x: Sequence[int], y: Sequence[float], colour: str, dash: str = "solid") -> Any:
    line = {"color": colour, "width": 2.5, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line}


def _told(line: Mapping[str, Any]) -> tuple[str, str, str]:
    """A line in the legend: its name, its colour, and how it is drawn."""
    how = line["line"]
    return line["name"], how["color"], {"solid": "—", "dash": "- -", "dot": "···"}[how["dash"]]


def _plot(name: str, data: list[Any], x: str, y: str, *, log: bool = False) -> Any:
    axis: dict[str, Any] = {"title": {"text": y}} | ({"type": "log"} if log else {})
    return {"id": name, "data": data, "layout": {"xaxis": {"title": {"text": x}}, "yaxis": axis}}
