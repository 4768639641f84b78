"""Gated: another method behind a gate that opens on the behaviour's own statements."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from innsteer import steerer as contract
from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.gating import Gate, Gated, Kind, auroc, check_numbers, fit_gate
from innsteer.site import Site
from innsteer.steerer import Interventions, Runner, Steerer, weights

Statements = Literal["sides", "pairs"]


@dataclass(frozen=True)
class GatedMethod(Steerer):
    """Steer by another method, and only rows that belong to the behaviour.

    h' = h + displacement(h, strength * gate(h));  gate(h) = sigmoid(weight.h + bias)

    The inner method is fitted on the same rows as if alone. The gate tells the behaviour's
    statements from the rows marked ``unmoved``: prompts of the same form that the behaviour does
    not concern. Training rows fit it;
    validation statements set the threshold of ``lda``. Strength 1 is the inner method's fitted map
    where the gate is open. Given up are "strengths add", "-s undoes s" and a closed inverse, also
    where the inner method has them: the gate sees the edited row; see ``innsteer.gating.Gated``.
    Adds d + 1 floats per site and behaviour. What class variables say of needs and training holds
    for the gate; see those of the inner method beside them.

    Attributes:
        method: name of the inner method; one that acts row by row, and not this one.
        config: its fields by name; the others are filled in with its defaults.
        statements: ``sides``: all source and target rows; their difference widens the covariance,
            so that the gate looks least along the edit. ``pairs``: of each pair the mean of its
            sides, for rows made by a step to either side of a recorded one; where the sides are
            rows of two texts, their mean is no row that the gate will meet, and spreads less. Rows
            without a partner stand for themselves.
        gate: ``lda`` or ``logistic``, see ``innsteer.gating.fit_gate``.
        shrinkage, quantile, room, slope: of ``lda``, unitless.

    Reference:
        Lee et al., Programming Refusal with Conditional Activation Steering (2024),
        https://arxiv.org/abs/2409.05907, gates by a similarity to condition vectors; this gate is
        a shrunk discriminant.

    >>> rows = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    >>> rows = rows + torch.tensor([[0.0, 0, 0], [0, 2, 0], [9, 0, 0]]).repeat_interleave(40, 0)
    >>> from innsteer.activations import Rows
    >>> sides = np.repeat(["source", "target", "unmoved"], 40)
    >>> table = [{"behaviour": "b", "item": f"{i}", "side": s} for i, s in enumerate(sides)]
    >>> acts = Activations({Site(0): rows}, Rows.of(table), ("b",))
    >>> moved = GatedMethod(method="diffmean").fit(acts)[acts.site](rows, torch.ones(120, 1)) - rows
    >>> [round(float(part.norm(dim=-1).mean())) for part in moved.chunk(3)]
    [2, 2, 0]
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2409.05907"
    needs: ClassVar[tuple[str, ...]] = ("classes", "unmoved")
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = False

    method: str = "diffmean"
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    statements: Statements = "sides"
    gate: Kind = "lda"
    shrinkage: float = 0.5
    quantile: float = 0.02
    room: float = 0.2
    slope: float = 12.0

    def __post_init__(self) -> None:
        for name, kind in {"statements": Statements, "gate": Kind}.items():
            if getattr(self, name) not in get_args(kind):
                raise UnknownName(name, getattr(self, name), get_args(kind))
        check_numbers(self.shrinkage, self.quantile, self.room, self.slope)
        inner = self.inner
        if isinstance(inner, GatedMethod) or inner.across_tokens or inner.across_sites:
            raise InputError(
                f"method={self.method!r} behind a gate",
                expected="a method that acts on each row by itself and has no gate yet",
            )
        # All fields in their types: an artifact then outlives a change of the inner defaults, and
        # 2 and 2.0 are one steering.
        config = dataclasses.asdict(inner)  # type: ignore[call-overload]
        # This gate sees rows; an inner map that could read the prompt shall do so too.
        if config.get("reads", "row") is None:
            config["reads"] = "row"
        object.__setattr__(self, "config", config)

    @property
    def inner(self) -> Steerer:
        """The method behind the gate."""
        kind = type(contract.get(self.method, **self.config))
        inner: Steerer = TypeAdapter(kind).validate_python(self.config)
        return inner

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """The inner method's empty maps behind gates that are half open."""
        return _behind(self.inner.build(widths, k, sizes), k)

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Fit the inner method, then each behaviour's gate at each site.

        Raises:
            InputError: a behaviour has no unmoved training rows.
        """
        return self._close(acts, self.inner.fit(acts, seed=seed), seed)

    @property
    def through(self) -> bool:
        """As the inner method."""
        return self.inner.through

    @property
    def rewords(self) -> bool:
        """As the inner method."""
        return self.inner.rewords

    def fit_through(self, run: Runner, *, seed: int = 0) -> Interventions:
        """The inner method's fit through the model, then the gates on the run's rows."""
        return self._close(run.rows(), self.inner.fit_through(run, seed=seed), seed)

    def _close(self, acts: Activations, inner: Interventions, seed: int) -> Interventions:
        """Fitted maps behind fitted gates."""
        fitted = _behind(inner, len(acts.behaviours))
        train, held = acts.where(split="train"), acts.where(split="validation")
        for site in fitted:
            part = fitted[site]
            assert isinstance(part, Gated)
            for row, behaviour in enumerate(acts.behaviours):
                unrelated, unrelated_weights = _unmoved(train, site, behaviour)
                statements, weight = _statements(train, site, behaviour, self.statements)
                kept, kept_weight = _statements(held, site, behaviour, self.statements)
                part.gate.weight[row], part.gate.bias[row] = fit_gate(
                    statements,
                    unrelated,
                    kind=self.gate,
                    held=kept if len(kept) else None,
                    shrinkage=self.shrinkage,
                    quantile=self.quantile,
                    room=self.room,
                    slope=self.slope,
                    seed=seed,
                    weights=weight,
                    unrelated_weights=unrelated_weights,
                    held_weights=kept_weight if len(kept) else None,
                    rewordings=acts.rewordings(site),
                )
        return fitted

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """The inner method's figures, and of all sites and behaviours the worst gate's.

        On training rows: ``gate_auroc`` of statements against unmoved rows, ``gate_kept`` and
        ``gate_leaked``, the mean openness on statements and on unmoved rows.
        """
        parts = {site: part for site, part in fitted.items() if isinstance(part, Gated)}
        inner = Interventions({site: part.inner for site, part in parts.items()})
        train, seen = acts.where(split="train"), []
        for site, part in parts.items():
            for row, behaviour in enumerate(acts.behaviours):
                rows = (
                    _statements(train, site, behaviour, self.statements)[0],
                    train.unmoved(site, behaviour),
                )
                if all(map(len, rows)):
                    kept, leaked = (part.gate(each.float())[:, row] for each in rows)
                    seen.append((auroc(kept, leaked), float(kept.mean()), float(leaked.mean())))
        worst = zip(
            ("gate_auroc", "gate_kept", "gate_leaked"), zip(*seen, strict=True), strict=False
        )
        picks = {"gate_leaked": max}
        own = {name: picks.get(name, min)(values) for name, values in worst}
        return self.inner.diagnose(acts, inner) | own


def _behind(inner: Interventions, k: int) -> Interventions:
    """Every map behind a gate of its own."""
    return Interventions({site: Gated(part, Gate(part.width, k)) for site, part in inner.items()})


def _unmoved(acts: Activations, site: Site, behaviour: str) -> tuple[Tensor, Tensor]:
    """A behaviour's unmoved rows and their weights."""
    rows = acts.unmoved(site, behaviour)
    if not len(rows):
        raise InputError(
            f"behaviour {behaviour!r} has no unmoved training rows, and a gate is fitted on them",
            expected="rows of prompts in the same form that the behaviour does not concern",
            remedy="record such prompts at the same sites and add their rows with side='unmoved', "
            f"behaviour={behaviour!r} and split='train'; or use the method without a gate",
        )
    mine = (acts.rows.side == "unmoved") & np.isin(acts.rows.behaviour, [behaviour, ""])
    return rows, torch.from_numpy(acts.rows.weight[mine])


def _statements(
    acts: Activations, site: Site, behaviour: str, which: Statements
) -> tuple[Tensor, Tensor]:
    """What a gate must let through: ``[n, d]`` in float64, and weights ``[n]``.

    Of ``pairs`` one row each, the mean of its sides' weighted means; it weighs as much as a side
    does on average.
    """
    if not len(acts.where(side=("source", "target"), behaviour=behaviour)):
        return torch.empty(0, acts.widths[site], dtype=torch.float64), torch.empty(0)
    sides, weight = acts.sides(site, behaviour), weights(acts, behaviour)
    if which == "sides":
        return torch.cat(sides).double(), torch.cat(weight)
    table = acts.rows
    names = [
        table.pair[(table.side == side) & (table.behaviour == behaviour)]
        for side in ("source", "target")
    ]
    whole = np.array(sorted(set(names[0]) & set(names[1]) - {""}), dtype=np.str_)
    paired = [np.isin(own, whole) for own in names]
    means, totals = [], []
    for rows, share, own, mask in zip(sides, weight, names, paired, strict=True):
        slot = torch.from_numpy(np.searchsorted(whole, own[mask]))
        inside = torch.from_numpy(mask)
        total = torch.zeros(len(whole), dtype=torch.float64).index_add_(0, slot, share[inside])
        summed = torch.zeros(len(whole), rows.shape[1], dtype=torch.float64)
        summed.index_add_(0, slot, share[inside].unsqueeze(-1) * rows[inside].double())
        means.append(summed / total.unsqueeze(-1))
        totals.append(total)
    alone = [torch.from_numpy(~mask) for mask in paired]
    lone = [rows[keep].double() for rows, keep in zip(sides, alone, strict=True)]
    lone_weight = [share[keep] for share, keep in zip(weight, alone, strict=True)]
    return (
        torch.cat([(means[0] + means[1]) / 2, *lone]),
        torch.cat([(totals[0] + totals[1]) / 2, *lone_weight]),
    )
