"""INNSteer: translate activations in the latent space of an invertible network."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.batches import main_basis, split_rows, spread_rows
from innsteer.errors import InputError, UnknownName
from innsteer.flows import (
    Chain,
    Flow,
    Householder,
    Shear,
    Standardise,
    Subspace,
    Translation,
    coupling_stack,
)
from innsteer.interventions import Latent, trainable
from innsteer.shears import Reads, ShearFit, freeze_gates, joined, plain, sharpen
from innsteer.site import Site
from innsteer.steerer import Interventions, Runner, Steerer, side_means
from innsteer.training import best_scale, lessons, teach, train_through

Objective = Literal["classes", "target"]
Family = Literal["translation", "shear"]
Mixing = Literal["permute", "alternate", "householder", "lu"]
Activation = Literal["relu", "tanh", "gelu"]
Form = Literal["distance", "margin", "fisher", "cosine"]

# What a field that is left open means, by objective.
RECIPES: dict[str, dict[str, Any]] = {
    "classes": {
        "family": "translation",
        "couplings": 4,
        "hidden": 128,
        "subspace": 0,
        "likelihood": 1.0,
        "separation": 0.1,
        "log_det": 0.5,
        "transport": 0.0,
        "direction": 0.0,
    },
    "target": {
        "family": "shear",
        "couplings": 0,
        "hidden": 64,
        "subspace": 64,
        "likelihood": 0.1,
        "separation": 0.0,
        "log_det": 0.01,
        "transport": 1.0,
        "direction": 0.3,
    },
}


@dataclass(frozen=True)
class INNSteer(Steerer):
    """Steer in the latent space of an invertible network: translate there, or shear.

    z = f(h);  h' = g(step(z, strength));  g = f^-1
    translation:  step(z) = z + strength * v
    shear:        z = (b, a), step(z) = (b + strength * gate(a) * tanh(read . a + bias) * w, a)
    shear that reads the prompt: a stands for the mean of what precedes the steered tokens

    ``objective="classes"`` is the paper's fit: f is trained on recorded rows of both classes, and
    v = mean f(target) - mean f(source). To first order h' - h = strength * J_f(h)^-1 v: the
    direction depends on the input. With an affine f it is DiffMean (the paper's Corollary F.2), and
    f starts as one. Trained in seconds; about 4 * (d/2 * hidden + hidden * d) weights per site at
    the default depth. f runs in float32 whatever the model's dtype: bfloat16 is too rough for an
    inverse. Its loss, per dimension so that its terms keep their balance at any width d::

        likelihood * E[|z|^2 / 2 - log_det] / d           both sides against one N(0, I)
        + separation * L_sep                              pushes the sides' latent means apart
        + log_det * ((mean l)^2 + var l),  l = log_det/d  keeps the inverse tame after the shift

    The standardisation's constant log-det is left out of l: it would swamp the rest.

    ``objective="target"`` aims at what the model then says: rows are moved along the gradient of
    the answers' log-odds (``Runner.rows``), a shear is set in closed form from them (write
    direction: the mean gradient; readout: a logistic probe of the matching answer; gate: a shrunken
    LDA of the items' rows against rows that must not move), and ``polish`` steps through the frozen
    model follow. The readouts see only what the edit leaves alone, the row's other coordinates or
    the prompt before it (``reads``), so strengths add and -s undoes s. With ``couplings`` a deeper
    flow is taught the same field, both ways along each pair, unmoved rows staying, by::

        transport * |h' - h+|^2 / mean |gap|^2 + direction * (1 - cos(h' - h, gap))

    plus the likelihood and log-det terms; a share of the training pairs is held out to stop it. A
    translation has no fixed point and can only imitate one; the shear has them.

    Not to be confused with a flow-matching velocity field (FLAS, TruthFlow): f is a bijection.
    Row weights count in the draw of batches, the start of f, the held-out loss and the means of v;
    the pairs' and rows' main directions of a ``subspace`` are taken unweighted.
    The paper gives the three terms and leaves widths and weights open; every choice is a field, and
    None takes the objective's own (``RECIPES``).
    Where two public re-implementations reward a cosine of the sides' *means*, the default here is
    their distance: standardised means are near +-m, so that cosine works against separation.

    Attributes:
        objective: ``classes`` (recorded rows) or ``target`` (through the model).
        family: the latent step. A shear is fitted by ``target`` alone.
        couplings: affine couplings, each after an ActNorm. Unitless; 0 for a shear alone: then f
            only standardises and rotates the write directions onto coordinates of their own.
        hidden: width of each conditioner's hidden layers. depth: how many of them.
        s_max: bound on a coupling's log-scale; factors lie in [e^-s_max, e^s_max].
        mixing: how coordinates meet between couplings.
        actnorm: a learned, bounded scale and shift before every coupling.
        subspace: a translation's f acts on this many coordinates (the sides' difference, the main
            directions of the pairs' differences, and the main directions of all rows), the rest
            passes through untouched; 0 = the whole width.
        likelihood, separation, log_det, transport, direction: weights of the terms, >= 0.
        separation_form: ``distance`` -|m+ - m-|/sqrt(d), ``margin`` max(0, margin - that),
            ``fisher`` -log of the Fisher ratio along the mean difference, ``cosine`` as in the
            re-implementations.
        margin: for ``margin``, in latent standard deviations per sqrt(dimension).
        epochs, batch, learning_rate, weight_decay, warmup, clip: AdamW with cosine decay after
            ``warmup`` (share of all steps); gradients are clipped to norm ``clip``.
        patience: stop after this many epochs without a better held-out loss, and keep the best;
            0 = run the full schedule and keep the last.
        holdout: share of the training pairs held out when no validation rows are given.
        units: readouts of a shear per behaviour. write: coordinates that a shear writes, shared by
            all behaviours; 0 = as many as there are behaviours, at most 4.
        kappa: how sharply a shear's first readout decides, in standard deviations of the probe; a
            fit through the model also tries half and twice as much, and keeps what validation says.
        gate: close the shear on rows (prompts) unlike the items', where unmoved ones are given; for
            open items only where it reads the prompt.
        apart: the items of the behaviours that are fitted together count as unmoved for each other,
            so that a behaviour's gate opens on its own items alone.
        nuisances: directions of wording that a shear's readouts do not see, from unmoved prompts in
            other words (``fit`` asks them in five paraphrases where this is not 0). Another wording
            shifts what is read by more than the answer does; without these it decides the same.
        reads: what a shear's readouts and gate see: the ``row``'s other coordinates, or the
            ``prompt``: the mean of the rows before the steered tokens (``site.before``), the same
            for every token of an answer. The prompt says more, and says it alike in other wordings;
            an engine must then see the whole prompt go by, under scope ``generated``. None: the
            prompt where a fit through the model brings it, items are choices or unmoved prompts are
            given, and there are no couplings.
        shrinkage, quantile, room, slope: of the gate, see ``gating.fit_gate``.
        denoised: teach couplings the closed form's field rather than the raw gradients.
        polish: steps through the frozen model, the best validation state is kept; 0 = none.
        polish_reads: let them move the readouts too.
        polish_rate: their learning rate. polish_batch: items per step; of open answers an eighth.
        polish_unmoved: weight of the divergence on unmoved sequences meanwhile.

    Reference:
        Nguyen and Le, INNSteer (2026), https://arxiv.org/abs/2606.08454; couplings: Dinh et al.,
        Density estimation using Real NVP (2017), https://arxiv.org/abs/1605.08803; ActNorm:
        Kingma and Dhariwal, Glow (2018), https://arxiv.org/abs/1807.03039; the shear is an additive
        coupling: Dinh et al., NICE (2014), https://arxiv.org/abs/1410.8516

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

    objective: Objective = "classes"
    family: Family | None = None
    couplings: int | None = None
    hidden: int | None = None
    depth: int = 1
    s_max: float = 1.0
    mixing: Mixing = "permute"
    activation: Activation = "relu"
    actnorm: bool = True
    subspace: int | None = None
    likelihood: float | None = None
    separation: float | None = None
    log_det: float | None = None
    transport: float | None = None
    direction: float | None = None
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
    units: int = 1
    write: int = 0
    kappa: float = 2.0
    gate: bool = True
    apart: bool = False
    nuisances: int = 0
    reads: Reads | None = None
    shrinkage: float = 0.5
    quantile: float = 0.02
    room: float = 0.2
    slope: float = 12.0
    denoised: bool = True
    polish: int = 40
    polish_reads: bool = False
    polish_rate: float = 3e-3
    polish_batch: int = 32
    polish_unmoved: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            1: ("hidden", "depth", "epochs", "batch", "units", "polish_batch"),
            0: ("couplings", "subspace", "patience", "likelihood", "separation", "log_det")
            + ("transport", "direction", "margin", "weight_decay", "warmup", "write", "polish")
            + ("nuisances",)
            + ("polish_unmoved",),
        }
        for name, kind in {"objective": Objective, "family": Family, "reads": Reads}.items():
            if getattr(self, name) is not None and getattr(self, name) not in get_args(kind):
                raise UnknownName(name, getattr(self, name), get_args(kind))
        # Settled here, so that an artifact outlives a change of the recipes.
        recipe = RECIPES[self.objective] | (
            {"couplings": 4} if self.family == "translation" else {}
        )
        for name, value in recipe.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for least, names in ranges.items():
            for name in names:
                # "not >=" so that NaN is refused too
                if not least <= self._of(name) < math.inf:
                    raise InputError(f"{name}={getattr(self, name)}", expected=f">= {least}")
        # An artifact names these too: a hostile one must not make us build a giant.
        largest = {"couplings": 64, "depth": 16, "hidden": 65_536, "units": 1024, "write": 1024}
        largest |= {"nuisances": 1024}
        for name, most in largest.items():
            if self._of(name) > most:
                raise InputError(f"{name}={getattr(self, name)}", expected=f"<= {most}")
        for name in ("s_max", "learning_rate", "clip", "kappa", "polish_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}", expected="a positive number")
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout={self.holdout}", expected="between 0 and 1")
        if self.reads == "prompt" and not (self._shears and not self._of("couplings")):
            raise InputError(
                'reads="prompt" of a translation, or with couplings',
                expected='family="shear" and couplings=0',
            )
        choices = {"mixing": Mixing, "activation": Activation, "separation_form": Form}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise UnknownName(name, getattr(self, name), get_args(kind))
        if self._shears and self.objective == "classes":
            raise InputError(
                "a shear fitted on recorded classes",
                expected='objective="target": its readouts need rows that seek the target',
            )
        if not self._shears and self._of("couplings") < 1:
            raise InputError(
                f"couplings={self.couplings} of a translation",
                expected="at least 1: without, it would be a constant shift",
                remedy="use the method diffmean",
            )

    def _of(self, name: str) -> Any:
        """A field that was left open or given: ``__post_init__`` has settled it."""
        return getattr(self, name)

    @property
    def _shear(self) -> ShearFit:
        """The part of the fields that sets a shear."""
        found = ShearFit(**{field.name: getattr(self, field.name) for field in fields(ShearFit)})
        # Couplings are taught a field of the row.
        return replace(found, reads="row") if self._of("couplings") else found

    @property
    def rewords(self) -> bool:
        """Where there is something to be blind to."""
        return self.nuisances > 0

    def extend(self, fitted: Interventions, acts: Activations, *, seed: int = 0) -> Interventions:
        """Add the behaviours of target-seeking rows to fitted shears, without scaling them.

        Raises:
            InputError: a map that is no plain shear, or rows of other sites.
        """
        return joined(fitted, self._shear.beside(fitted, acts, seed=seed))

    def check_extends(self, fitted: Interventions) -> None:
        """Only shears without couplings can grow."""
        for site, part in fitted.items():
            plain(site, part)

    def extend_through(self, fitted: Interventions, run: Runner, *, seed: int = 0) -> Interventions:
        """Add a run's behaviours to fitted shears; how sharp and how far, its validation says.

        The others' tensors stay, and the new ones are not polished: that would move what all share.

        Raises:
            InputError: a map that is no plain shear, or a run at other sites.
        """
        new = self._shear.beside(fitted, run.rows(), seed=seed)
        self._dial(run, new)
        return joined(fitted, new)

    @property
    def _shears(self) -> bool:
        return bool(self._of("family") == "shear")

    @property
    def through(self) -> bool:
        """A fit that aims at the target needs the model."""
        return self.objective == "target"

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """Flows of the right shapes, not fitted."""
        return Interventions(
            {
                site: self._empty(
                    width,
                    k,
                    sizes.get(f"{site}.subspace"),
                    sizes.get(f"{site}.write"),
                    reader=self.reads == "prompt" or f"{site}.reader" in sizes,
                )
                for site, width in widths.items()
            }
        )

    def _empty(
        self,
        width: int,
        k: int,
        rank: int | None = None,
        write: int | None = None,
        seed: int = 0,
        *,
        reader: bool = False,
    ) -> Latent:
        """A map of the right shapes: the shear's rotation and step, or the translation's."""
        if not self._shears:
            return Latent(self._flow(width, rank, seed), Translation(width, k))
        r = write or self.write or min(k, 4)
        parts: list[Flow] = [Standardise(width)]
        if self._of("couplings"):
            parts.append(self._stack(width, seed))
        flow = Chain([*parts, Householder(width, reflections=r)])
        if reader:
            return Latent(flow, Shear(r + width, r, k, self.units), Standardise(width))
        return Latent(flow, Shear(width, r, k, self.units))

    def _flow(self, width: int, rank: int | None, seed: int = 0) -> Flow:
        """Standardise, then the couplings; inside a subspace where one is asked for."""
        inner = min(rank or self._of("subspace") or width, width)
        flow: Flow = Chain([Standardise(inner), self._stack(inner, seed)])
        return Subspace(flow, torch.eye(width, inner)) if self._of("subspace") else flow

    def _stack(self, width: int, seed: int) -> Flow:
        """The couplings."""
        return coupling_stack(
            width,
            couplings=self._of("couplings"),
            hidden=self._of("hidden"),
            depth=self.depth,
            s_max=self.s_max,
            mixing=self.mixing,
            actnorm=self.actnorm,
            activation=self.activation,
            seed=seed,
        )

    # --- fitting ---------------------------------------------------------------------------------

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Fit one map per site on rows; for ``target`` the rows seek it, and nothing is polished.

        Raises:
            InputError: a side is missing, or training diverged.
        """
        one = self._fit_target if self.objective == "target" else self._fit_classes
        fitted = Interventions({site: one(acts, site, seed) for site in acts.sites})
        return fitted.eval().requires_grad_(False)

    def fit_through(self, run: Runner, *, seed: int = 0) -> Interventions:
        """Fit on target-seeking rows, choose how sharp and how far strength 1 is, and polish."""
        maps = self.fit(run.rows(), seed=seed)
        choices = "" not in run.keys(run.items())
        self._dial(run, maps)
        if self.polish:
            for _, part in maps.items():
                part.requires_grad_(True)
                freeze_gates(part)
                if isinstance(part, Latent) and isinstance(part.step, Shear):
                    part.step.read.requires_grad_(self.polish_reads)
                    part.step.read_bias.requires_grad_(self.polish_reads)
                assert isinstance(part, Latent) and isinstance(part.flow, Chain | Subspace)
                if self._shears and isinstance(part.flow, Chain):
                    # Couplings that move would move what the gate reads.
                    for flow in part.flow.parts[:-1]:
                        flow.requires_grad_(False)
            train_through(
                run,
                maps,
                steps=self.polish,
                # An open answer takes as many tokens as a batch of choices.
                batch=self.polish_batch if choices else max(self.polish_batch // 8, 1),
                learning_rate=self.polish_rate,
                unmoved=self.polish_unmoved,
                seed=seed,
            )
        return maps.eval().requires_grad_(False)

    @torch.no_grad()
    def _dial(self, run: Runner, maps: Interventions) -> None:
        """Make the map that of strength 1: how sharp it reads and how far it goes, in place."""
        steps = [part.step for _, part in maps.items() if isinstance(part, Latent)]
        tried: list[tuple[float, float, float]] = []
        choices = "" not in run.keys(run.items())
        reads = self._shears and not self._of("couplings") and choices
        for factor in (0.5, 1.0, 2.0) if reads else (1.0,):
            sharpen(steps, factor)
            scale, gain = best_scale(run, maps)
            sharpen(steps, 1 / factor)
            tried.append((gain, factor, scale))
        _, factor, scale = max(tried)
        sharpen(steps, factor)
        for step in steps:
            assert isinstance(step, Shear | Translation)
            (step.write if isinstance(step, Shear) else step.shifts).mul_(scale)

    def _fit_classes(self, acts: Activations, site: Site, seed: int) -> Latent:
        """The paper's fit."""
        data = split_rows(acts, site, self.holdout, seed)
        flow = self._based_flow(acts, site, seed)
        with torch.no_grad():
            sides = zip(data.source + data.target, data.weights, strict=True)
            flow.initialise(torch.cat([spread_rows(rows, weight) for rows, weight in sides]))
        rng = torch.Generator().manual_seed(seed)
        self._descend(
            flow,
            lambda: self._loss(flow, *data.batch(self.batch, rng)),
            lambda: self._loss(flow, data.held_source, data.held_target),
            sum(len(part) for part in data.target),
        )
        return _translated(acts, site, flow)

    def _based_flow(self, acts: Activations, site: Site, seed: int) -> Flow:
        """A translation's flow, inside the rows' main directions where a subspace is asked for."""
        width = acts.widths[site]
        rank = min(self._of("subspace"), width)
        basis = main_basis(acts, site, rank) if rank else None
        flow = self._flow(width, None if basis is None else basis.shape[1], seed)
        if basis is not None:
            assert isinstance(flow, Subspace)
            flow.basis.copy_(basis)
        return flow

    def _fit_target(self, acts: Activations, site: Site, seed: int) -> Latent:
        """A shear in closed form; couplings, where asked for, learn its field."""
        shear = self._shear.closed_form(acts, site, seed=seed)
        if not self._of("couplings"):
            return shear
        return self._teach(acts, site, shear, seed)

    def _teach(self, acts: Activations, site: Site, shear: Latent, seed: int) -> Latent:
        """Train a deeper flow to move each pair's ends onto each other and to leave the rest."""

        def ends(middle: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
            half = 0.5 * one.expand(len(middle), -1)
            with torch.no_grad():
                return shear(middle, -half), shear(middle, half)

        given = lessons(acts, site, ends if self.denoised else None)
        fitted = self._started(acts, site, shear, given.start, seed)
        transport, along = self._of("transport"), self._of("direction")

        def also(h: Tensor, moved: Tensor, wanted: Tensor) -> Tensor:
            value, _ = self._tame(fitted.flow, h)
            moving = wanted.square().sum(-1) > 0
            if along and moving.any():
                cosine = nn.functional.cosine_similarity(moved[moving], wanted[moving], dim=-1)
                value = value + along * (1 - cosine).mean()
            return value

        teach(
            fitted,
            given,
            transport=transport,
            also=also,
            epochs=self.epochs,
            batch=self.batch,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            holdout=self.holdout,
            patience=self.patience,
            seed=seed,
        )
        return fitted

    def _started(
        self, acts: Activations, site: Site, shear: Latent, rows: Tensor, seed: int
    ) -> Latent:
        """The deeper map before its training: the closed form for a shear, DiffMean otherwise."""
        width, k = acts.widths[site], len(acts.behaviours)
        if self._shears:
            assert isinstance(shear.step, Shear)
            fitted = self._empty(width, k, write=shear.step.write.shape[-1], seed=seed)
            fitted.step.load_state_dict(shear.step.state_dict())
            assert isinstance(fitted.flow, Chain) and isinstance(shear.flow, Chain)
            for end in (0, -1):
                fitted.flow.parts[end].load_state_dict(shear.flow.parts[end].state_dict())
            freeze_gates(fitted)
            return fitted
        flow = self._based_flow(acts, site, seed)
        flow.initialise(rows)
        return _translated(acts, site, flow)

    def _tame(self, flow: Flow, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The likelihood and log-det terms alone, and the latent rows that they are taken of."""
        z, log_det = flow.forward_log_det(rows)
        d = flow.inner.width if isinstance(flow, Subspace) else flow.width
        per_dim = (log_det - flow.fixed_log_det) / d
        z_inner = z @ flow.basis if isinstance(flow, Subspace) else z
        nll = 0.5 * z_inner.square().mean() - per_dim.mean()
        tame = per_dim.mean().square() + per_dim.var(correction=0)
        return self._of("likelihood") * nll + self._of("log_det") * tame, z_inner

    def _descend(
        self,
        module: nn.Module,
        loss: Callable[[], Tensor],
        held: Callable[[], Tensor],
        rows: int,
    ) -> None:
        """AdamW with warm-up and cosine decay; early stopping keeps the best held-out state."""
        parameters = trainable(module)
        optimiser = torch.optim.AdamW(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay
        )
        per_epoch = max(math.ceil(rows / self.batch), 1)
        schedule = _schedule(self.epochs * per_epoch, self.warmup)
        rate = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)

        def held_out() -> float:
            with torch.no_grad():
                return float(held())

        best, state, since = held_out(), _copy(module), 0
        for _ in range(self.epochs):
            for _ in range(per_epoch):
                value = loss()
                optimiser.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, self.clip)
                optimiser.step()
                rate.step()
            if not self.patience:
                continue
            now = held_out()
            if not math.isfinite(now):
                raise _diverged()
            # A gain below 1e-4 nats per dimension is noise of the held-out rows.
            better = now < best - 1e-4
            since = 0 if better else since + 1
            if better:
                best, state = now, _copy(module)
            if since >= self.patience:
                break
        if self.patience:
            module.load_state_dict(state)
        if not all(torch.isfinite(p).all() for p in parameters):
            raise _diverged()

    def _loss(self, flow: Flow, source: list[Tensor], target: list[Tensor]) -> Tensor:
        """The paper's three terms, meaned over behaviours."""
        rows = torch.cat([*source, *target])
        value, z_inner = self._tame(flow, rows)
        split = torch.split(z_inner, [len(part) for part in (*source, *target)])
        apart = torch.stack(
            [self._apart(split[i], split[i + len(source)]) for i in range(len(source))]
        ).mean()
        whole: Tensor = value + self._of("separation") * apart
        return whole

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
        assert isinstance(part, Latent)
        with torch.no_grad():
            source, target = acts.sides(site, acts.behaviours[row])
            rows = torch.cat([source, target])
            z_source, z_target = part.flow(source), part.flow(target)
            spread = rows.std(0).clamp_min(1e-6)
            pair_source, pair_target = acts.pairs(site, acts.behaviours[row])
            steps = part.flow(pair_target) - part.flow(pair_source)
            along = getattr(part.step, "shifts", torch.zeros(0))[row : row + 1]
            cosine = nn.functional.cosine_similarity(steps, along, dim=-1) if len(along) else along
            ones = torch.zeros(len(source), len(acts.behaviours))
            ones[:, row] = 1.0
            before = acts.prompts.sides(site, acts.behaviours[row])[0] if part.contextual else None
            moved = (part(source, ones, before) - source).norm(dim=-1) / source.norm(dim=-1)
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


def _diverged() -> InputError:
    return InputError(
        "INNSteer's training diverged",
        expected="a finite loss and finite weights",
        remedy="lower learning_rate or separation, or raise log_det",
    )


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


def _translated(acts: Activations, site: Site, flow: Flow) -> Latent:
    """A flow with the shift of every behaviour: the difference of its sides' latent means."""
    step, train = Translation(acts.widths[site], len(acts.behaviours)), acts.where(split="train")
    with torch.no_grad():
        for row, behaviour in enumerate(acts.behaviours):
            source, target = side_means(train, site, behaviour, through=flow)
            step.shifts[row] = target - source
    return Latent(flow, step)


def _copy(flow: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in flow.state_dict().items()}
