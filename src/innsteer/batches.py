"""Batches of recorded rows for the training of a flow, held-out rows, and where they spread."""

from typing import NamedTuple

import torch
from torch import Tensor

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerer import side_means, weights


class Batches(NamedTuple):
    """Training and held-out rows of one site, one tensor per behaviour and side.

    ``weights`` are those of the training rows: of every ``source``, then of every ``target``.
    """

    source: list[Tensor]
    target: list[Tensor]
    weights: list[Tensor]
    held_source: list[Tensor]
    held_target: list[Tensor]

    def batch(self, size: int, rng: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """``size`` random rows of each side of each behaviour, drawn by weight."""

        def draw(part: Tensor, weight: Tensor) -> Tensor:
            count = min(size, len(part))
            if (weight == weight[0]).all():
                return part[torch.randint(len(part), (count,), generator=rng)]
            return part[torch.multinomial(weight, count, replacement=True, generator=rng)]

        k = len(self.source)
        return (
            list(map(draw, self.source, self.weights[:k])),
            list(map(draw, self.target, self.weights[k:])),
        )


def spread_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """As many rows, each about as often as its weight says; equal weights change nothing."""
    ends = weight.cumsum(0) / weight.sum()
    middles = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return rows[torch.searchsorted(ends, middles)]


def rows_by_weight(acts: Activations, site: Site) -> Tensor:
    """Source and target rows of every behaviour's training part, each about as often as it weighs.

    Their mean and spread are what a map's standardisation takes.
    """
    train = acts.where(split="train")
    return torch.cat(
        [
            spread_rows(rows, weight)
            for name in acts.behaviours
            for rows, weight in zip(train.sides(site, name), weights(train, name), strict=True)
        ]
    )


def split_items(acts: Activations, holdout: float, seed: int) -> tuple[Activations, Activations]:
    """Training rows and held-out rows: the validation part, else whole items of the training part.

    Items, not rows, are held out: two tokens of one answer are no independent evidence.

    Raises:
        InputError: no training rows.
    """
    train, held = acts.where(split="train"), acts.where(split="validation")
    if len(train) == 0:
        raise InputError("no training rows", expected="rows with split 'train'")
    if len(held) == 0:
        kept_out = _drawn(train, holdout, seed)
        held = train.where(item=sorted(kept_out))
        train = train.where(item=sorted(set(train.rows.item.tolist()) - kept_out))
    return train, held


def split_rows(acts: Activations, site: Site, holdout: float, seed: int) -> Batches:
    """The rows of a site and their weights, as ``split_items`` parts them."""
    train, held = split_items(acts, holdout, seed)
    sources, targets = zip(*(train.sides(site, name) for name in acts.behaviours), strict=True)
    weight = list(zip(*(weights(train, name) for name in acts.behaviours), strict=True))
    held_rows = [
        list(map(spread_rows, held.sides(site, name), weights(held, name)))
        for name in acts.behaviours
    ]
    return Batches(
        list(sources),
        list(targets),
        [*weight[0], *weight[1]],
        [source for source, _ in held_rows],
        [target for _, target in held_rows],
    )


def _drawn(acts: Activations, share: float, seed: int) -> set[str]:
    """Items to hold out: a share, one at least, of each kind, so that no side is bare."""
    rows, rng = acts.rows, torch.Generator().manual_seed(seed)
    parts: dict[str, set[tuple[str, str]]] = {}
    for item, behaviour, side in zip(rows.item, rows.behaviour, rows.side, strict=True):
        parts.setdefault(str(item), set()).add((str(behaviour), str(side)))
    drawn: set[str] = set()
    for kind in sorted({tuple(sorted(part)) for part in parts.values()}):
        items = sorted(item for item, part in parts.items() if tuple(sorted(part)) == kind)
        order = torch.randperm(len(items), generator=rng).tolist()
        drawn |= {items[i] for i in order[: max(1, round(share * len(items)))]}
    return drawn


def main_basis(acts: Activations, site: Site, rank: int) -> Tensor:
    """Orthonormal ``[d, rank]``: mean differences, pair differences' PCs, then all rows' PCs.

    The write direction of a behaviour is seldom among the top PCs of the rows, so the differences
    come first.
    """
    train = acts.where(split="train")
    directions = []
    for name in acts.behaviours:
        source, target = side_means(train, site, name)
        directions.append((target - source).unsqueeze(0))
        pair_source, pair_target = (part.double() for part in train.pairs(site, name))
        if len(pair_source) > 1:
            directions.append(_main_directions(pair_target - pair_source)[: max(rank // 8, 1)])
    rows = train.values[site].double()
    stacked = torch.cat([*directions, _main_directions(rows - rows.mean(0))])
    stacked = stacked / stacked.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    basis: list[Tensor] = []
    for direction in stacked:
        for known in basis:
            direction = direction - (direction @ known) * known
        # Below this the direction is in the span already, up to the rounding of float32 rows.
        if direction.norm() > 1e-4:
            direction = direction / direction.norm()
            for known in basis:
                direction = direction - (direction @ known) * known
            basis.append(direction / direction.norm())
        if len(basis) == rank:
            break
    return torch.stack(basis, dim=1).float()


def _main_directions(rows: Tensor) -> Tensor:
    """Right singular vectors, main one first, without those along which the rows do not spread.

    Standardising such a one would blow a new row's coordinate up by the inverse of round-off.
    """
    _, spread, components = torch.linalg.svd(rows, full_matrices=False)
    main: Tensor = components[spread > 1e-6 * spread[0]]
    return main
