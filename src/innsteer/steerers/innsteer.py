"""INNSteer: translate activations in the latent space of an invertible network."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.flows import Chain, Flow, Standardise, Subspace, coupling_stack
from innsteer.interventions import trainable
from innsteer.site import Site
from innsteer.steerer import Intervention, Interventions, Steerer, side_means, weights

Mixing = Literal["permute", "alternate", "householder", "lu"]
Activation = Literal["relu", "tanh", "gelu"]
Form = Literal["distance", "margin", "fisher", "cosine"]


class LatentShift(Intervention):
    """h' = h + g(f(h) + coef @ shifts) - g(f(h)), with f a flow and g its inverse.

    Args:
        flow: f, of width d. k: number of behaviours, all in the one latent space.

    ``shifts`` ``[k, d]`` is in latent units. Written as a difference, the round-trip error cancels
    and strength 0 is exactly nothing. Both inverses run as one stacked call.
    """

    shifts: Tensor

    def __init__(self, flow: Flow, k: int = 1) -> None:
        super().__init__()
        self.flow = flow
        self.width = flow.width
        self.register_buffer("shifts", torch.zeros(k, flow.width))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        """g(f(h) + coef @ shifts) - g(f(h))."""
        z = self.flow(h)
        moved, back = self.flow.inverse(torch.cat([z + coef @ self.shifts, z])).chunk(2)
        return moved - back

    @property
    def sizes(self) -> dict[str, int]:
        """The subspace's rank: the rows may have had fewer directions than were asked for."""
        return {"subspace": self.flow.inner.width} if isinstance(self.flow, Subspace) else {}


@dataclass(frozen=True)
class INNSteer(Steerer):
    """Translate in the latent space of an invertible network, trained per behaviour and layer.

    z = f(h);  h' = g(z + strength * v);  v = mean f(target) - mean f(source);  g = f^-1

    To first order h' - h = strength * J_f(h)^-1 v: the direction depends on the input. With an
    affine f it is DiffMean (the paper's Corollary F.2), and f starts as one. Trained on recorded
    rows, in seconds; about 4 * (d/2 * hidden + hidden * d) weights per site at the default depth.
    f runs in float32 whatever the model's dtype: bfloat16 is too rough for an inverse.

    The loss, per dimension so that its terms keep their balance at any width d:
        likelihood * E[|z|^2 / 2 - log_det] / d           both sides against one N(0, I)
        + separation * L_sep                              pushes the sides' latent means apart
        + log_det * ((mean l)^2 + var l),  l = log_det/d  keeps the inverse tame after the shift
    The standardisation's constant log-det is left out of l: it would swamp the rest.

    Not to be confused with a flow-matching velocity field (FLAS, TruthFlow): f is a bijection.
    Row weights count in the draw of batches, the start of f, the held-out loss and the means of v;
    the pairs' and rows' main directions of a ``subspace`` are taken unweighted.
    The paper gives the three terms and leaves widths and weights open; every choice is a field.
    Where two public re-implementations reward a cosine of the sides' *means*, the default here is
    their distance: standardised means are near +-m, so that cosine works against separation.

    Attributes:
        couplings: affine couplings, each after an ActNorm. Unitless, >= 1.
        hidden: width of each conditioner's hidden layers. depth: how many of them.
        s_max: bound on a coupling's log-scale; factors lie in [e^-s_max, e^s_max].
        mixing: how coordinates meet between couplings.
        actnorm: a learned, bounded scale and shift before every coupling.
        subspace: f acts on this many coordinates (the sides' difference, the main directions of
            the pairs' differences, and the main directions of all rows), the rest passes through
            untouched; 0 = the whole width.
        likelihood, separation, log_det: weights of the three terms, >= 0.
        separation_form: ``distance`` -|m+ - m-|/sqrt(d), ``margin`` max(0, margin - that),
            ``fisher`` -log of the Fisher ratio along the mean difference, ``cosine`` as in the
            re-implementations.
        margin: for ``margin``, in latent standard deviations per sqrt(dimension).
        epochs, batch, learning_rate, weight_decay, warmup, clip: AdamW with cosine decay after
            ``warmup`` (share of all steps); gradients are clipped to norm ``clip``.
        patience: stop after this many epochs without a better held-out loss, and keep the best;
            0 = run the full schedule and keep the last.
        holdout: share of the training pairs held out when no validation rows are given.

    Reference:
        Nguyen and Le, INNSteer (2026), https://arxiv.org/abs/2606.08454; couplings: Dinh et al.,
        Density estimation using Real NVP (2017), https://arxiv.org/abs/1605.08803; ActNorm:
        Kingma and Dhariwal, Glow (2018), https://arxiv.org/abs/1807.03039

    >>> generator = torch.Generator().manual_seed(0)
    >>> rows = torch.randn(64, 6, generator=generator)
    >>> acts = Activations.of_sides(rows, rows + 2)
    >>> maps = INNSteer(hidden=8, epochs=2).fit(acts)
    >>> bool((maps[acts.site](rows, torch.ones(64, 1)) - rows).mean() > 1.5)
    True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2606.08454"
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    sites: ClassVar[str] = "any"
    trained: ClassVar[bool] = True
    invertible: ClassVar[bool] = True

    couplings: int = 4
    hidden: int = 128
    depth: int = 1
    s_max: float = 1.0
    mixing: Mixing = "permute"
    activation: Activation = "relu"
    actnorm: bool = True
    subspace: int = 0
    likelihood: float = 1.0
    separation: float = 0.1
    log_det: float = 0.5
    separation_form: Form = "distance"
    margin: float = 3.0
    epochs: int = 300
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    warmup: float = 0.2
    clip: float = 1.0
    patience: int = 10
    holdout: float = 0.15

    def __post_init__(self) -> None:
        ranges = {
            1: ("couplings", "hidden", "depth", "epochs", "batch"),
            0: ("subspace", "patience", "likelihood", "separation", "log_det", "margin")
            + ("weight_decay", "warmup"),
        }
        for least, names in ranges.items():
            for name in names:
                # "not >=" so that NaN is refused too
                if not least <= getattr(self, name) < math.inf:
                    raise InputError(f"{name}={getattr(self, name)}", expected=f">= {least}")
        # An artifact names these too: a hostile one must not make us build a giant.
        for name, most in {"couplings": 64, "depth": 16, "hidden": 65_536}.items():
            if getattr(self, name) > most:
                raise InputError(f"{name}={getattr(self, name)}", expected=f"<= {most}")
        for name in ("s_max", "learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}", expected="a positive number")
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout={self.holdout}", expected="between 0 and 1")
        choices = {"mixing": Mixing, "activation": Activation, "separation_form": Form}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise UnknownName(name, getattr(self, name), get_args(kind))

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Flows of the right shapes, not fitted."""
        return Interventions(
            {
                site: LatentShift(self._flow(width, sizes.get(f"{site}.subspace")), k)
                for site, width in widths.items()
            }
        )

    def _flow(self, width: int, rank: int | None, seed: int = 0) -> Flow:
        """Standardise, then the couplings; inside a subspace where one is asked for."""
        inner = min(rank or self.subspace or width, width)
        stack = coupling_stack(
            inner,
            couplings=self.couplings,
            hidden=self.hidden,
            depth=self.depth,
            s_max=self.s_max,
            mixing=self.mixing,
            actnorm=self.actnorm,
            activation=self.activation,
            seed=seed,
        )
        flow: Flow = Chain([Standardise(inner), stack])
        return Subspace(flow, torch.eye(width, inner)) if self.subspace else flow

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Train one flow per site and set the latent shift of every behaviour."""
        return Interventions({site: self._fit_site(acts, site, seed) for site in acts.sites})

    def _fit_site(self, acts: Activations, site: Site, seed: int) -> LatentShift:
        data = _split(acts, site, self.holdout, seed)
        width = acts.widths[site]
        basis = _basis(acts, site, min(self.subspace, width)) if self.subspace else None
        flow = self._flow(width, None if basis is None else basis.shape[1], seed)
        if basis is not None:
            assert isinstance(flow, Subspace)
            flow.basis.copy_(basis)
        with torch.no_grad():
            sides = zip(data.source + data.target, data.weights, strict=True)
            flow.initialise(torch.cat([_spread(rows, weight) for rows, weight in sides]))
        self._train(flow, data, seed)
        fitted = LatentShift(flow, len(acts.behaviours))
        train = acts.where(split="train")
        with torch.no_grad():
            for row, behaviour in enumerate(acts.behaviours):
                source, target = side_means(train, site, behaviour, through=flow)
                fitted.shifts[row] = target - source
        return fitted.eval().requires_grad_(False)

    def _train(self, flow: Flow, data: "_Data", seed: int) -> None:
        """AdamW with warm-up and cosine decay; early stopping keeps the best held-out state."""
        rng = torch.Generator().manual_seed(seed)
        parameters = trainable(flow)
        optimiser = torch.optim.AdamW(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay
        )
        per_epoch = max(math.ceil(sum(len(part) for part in data.target) / self.batch), 1)
        schedule = _schedule(self.epochs * per_epoch, self.warmup)
        rate = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
        best, state, since = self._held_out(flow, data), _copy(flow), 0
        for _ in range(self.epochs):
            for _ in range(per_epoch):
                loss = self._loss(flow, *data.batch(self.batch, rng))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, self.clip)
                optimiser.step()
                rate.step()
            if not self.patience:
                continue
            held_out = self._held_out(flow, data)
            if not math.isfinite(held_out):
                raise _diverged()
            # A gain below 1e-4 nats per dimension is noise of the held-out rows.
            better = held_out < best - 1e-4
            since = 0 if better else since + 1
            if better:
                best, state = held_out, _copy(flow)
            if since >= self.patience:
                break
        if self.patience:
            flow.load_state_dict(state)
        if not all(torch.isfinite(p).all() for p in parameters):
            raise _diverged()

    def _held_out(self, flow: Flow, data: "_Data") -> float:
        with torch.no_grad():
            return float(self._loss(flow, data.held_source, data.held_target))

    def _loss(self, flow: Flow, source: list[Tensor], target: list[Tensor]) -> Tensor:
        """The three terms, meaned over behaviours."""
        rows = torch.cat([*source, *target])
        z, log_det = flow.forward_log_det(rows)
        d = flow.inner.width if isinstance(flow, Subspace) else flow.width
        per_dim = (log_det - flow.fixed_log_det) / d
        z_inner = z @ flow.basis if isinstance(flow, Subspace) else z
        nll = 0.5 * z_inner.square().mean() - per_dim.mean()
        tame = per_dim.mean().square() + per_dim.var(correction=0)
        split = torch.split(z_inner, [len(part) for part in (*source, *target)])
        apart = torch.stack(
            [self._apart(split[i], split[i + len(source)]) for i in range(len(source))]
        ).mean()
        return self.likelihood * nll + self.separation * apart + self.log_det * tame

    def _apart(self, source: Tensor, target: Tensor) -> Tensor:
        """The separation term of one behaviour; lower is further apart."""
        difference = target.mean(0) - source.mean(0)
        distance = difference.norm() / math.sqrt(len(difference))
        forms: dict[str, Callable[[], Tensor]] = {
            "distance": lambda: -distance,
            "margin": lambda: (self.margin - distance).clamp_min(0),
            "fisher": lambda: -_fisher(source, target).clamp_min(1e-6).log(),
            "cosine": lambda: (
                -nn.functional.cosine_similarity(target.mean(0), source.mean(0), dim=0)
            ),
        }
        return forms[self.separation_form]()

    def diagnose(self, acts: Activations, fitted: Interventions) -> dict[str, float]:
        """Health of the fitted flows: of all sites and behaviours the worst.

        Measured on the validation rows, or on the training rows where there are none.

        - ``fisher`` and ``fisher_input``: Fisher discriminability J = (v.v)^2 / (v' S_w v) of the
          sides along the mean difference of these rows, in latent space and in the standardised
          input. They say that the sides are apart, not that steering works.
        - ``consistency``: mean over pairs of cos(z_target - z_source, v); 0 where
          nothing is paired.
        - ``round_trip``: |g(f(h)) - h| / |h| in float32, the worst row; ``round_trip_64`` in
          float64.
        - ``displacement``: mean |h' - h| / |h| of source rows at strength 1.
        - ``held_out``: 1 = on validation rows, 0 = on the rows that were fitted.
        """
        held = acts.where(split="validation")
        seen = held if len(held) else acts.where(split="train")
        figures = [
            self._diagnose_one(seen, site, row, fitted)
            for site in acts.sites
            for row in range(len(acts.behaviours))
        ]
        worst = {"fisher": min, "fisher_input": min, "consistency": min}
        worst |= {"round_trip": max, "round_trip_64": max, "displacement": max}
        return {
            # What no behaviour has, a consistency where nothing is paired, is 0.
            name: float(pick([part[name] for part in figures if name in part] or [0.0]))
            for name, pick in worst.items()
        } | {"held_out": float(len(held) > 0)}

    def _diagnose_one(
        self, acts: Activations, site: Site, row: int, fitted: Interventions
    ) -> dict[str, float]:
        """The figures of one behaviour at one site."""
        part = fitted[site]
        assert isinstance(part, LatentShift)
        with torch.no_grad():
            source, target = acts.sides(site, acts.behaviours[row])
            rows = torch.cat([source, target])
            z_source, z_target = part.flow(source), part.flow(target)
            spread = rows.std(0).clamp_min(1e-6)
            pair_source, pair_target = acts.pairs(site, acts.behaviours[row])
            steps = part.flow(pair_target) - part.flow(pair_source)
            cosine = nn.functional.cosine_similarity(steps, part.shifts[row : row + 1], dim=-1)
            ones = torch.zeros(len(source), len(part.shifts))
            ones[:, row] = 1.0
            moved = (part(source, ones) - source).norm(dim=-1) / source.norm(dim=-1)
            back = part.flow.inverse(part.flow(rows))
            error = (back - rows).norm(dim=-1) / rows.norm(dim=-1)
            flow64 = copy.deepcopy(part.flow).double()
            rows64 = rows.double()
            error64 = (flow64.inverse(flow64(rows64)) - rows64).norm(dim=-1) / rows64.norm(dim=-1)
        figures = {
            "fisher": float(_fisher(z_source, z_target)),
            "fisher_input": float(_fisher(source / spread, target / spread)),
            "round_trip": float(error.max()),
            "round_trip_64": float(error64.max()),
            "displacement": float(moved.mean()),
        }
        return figures | ({"consistency": float(cosine.mean())} if len(cosine) else {})


class _Data(NamedTuple):
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


def _spread(rows: Tensor, weight: Tensor) -> Tensor:
    """As many rows, each about as often as its weight says; equal weights change nothing."""
    ends = weight.cumsum(0) / weight.sum()
    middles = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return rows[torch.searchsorted(ends, middles)]


def _split(acts: Activations, site: Site, holdout: float, seed: int) -> _Data:
    """Training rows and held-out rows: the validation part, else whole items of the training part.

    Items, not rows, are held out: two tokens of one answer are no independent evidence.
    """
    train, held = acts.where(split="train"), acts.where(split="validation")
    if len(train) == 0:
        raise InputError("no training rows", expected="rows with split 'train'")
    if len(held) == 0:
        kept_out = _drawn(train, holdout, seed)
        held = train.where(item=sorted(kept_out))
        train = train.where(item=sorted(set(train.rows.item.tolist()) - kept_out))
    sources, targets = zip(*(train.sides(site, name) for name in acts.behaviours), strict=True)
    weight = list(zip(*(weights(train, name) for name in acts.behaviours), strict=True))
    held_rows = [
        list(map(_spread, held.sides(site, name), weights(held, name))) for name in acts.behaviours
    ]
    return _Data(
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


def _diverged() -> InputError:
    return InputError(
        "INNSteer's training diverged",
        expected="a finite loss and finite weights",
        remedy="lower learning_rate or separation, or raise log_det",
    )


def _basis(acts: Activations, site: Site, rank: int) -> Tensor:
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


def _fisher(source: Tensor, target: Tensor) -> Tensor:
    """(v.v)^2 / (v' S_w v) with v the mean difference: squared gap over within variance along v."""
    v = target.mean(0) - source.mean(0)
    within = 0.5 * ((source @ v).var(correction=0) + (target @ v).var(correction=0))
    return (v @ v).square() / within.clamp_min(1e-12)


def _schedule(steps: int, warmup: float) -> Callable[[int], float]:
    """Linear warm-up over a share of the steps, then cosine to 0."""
    warm = max(round(steps * warmup), 1)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))

    return factor


def _copy(flow: Flow) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in flow.state_dict().items()}
