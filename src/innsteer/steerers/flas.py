"""FLAS: one velocity field for all concepts; the concept comes in words, with the request."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerer import (
    ACTIVATIONS,
    AcrossTokens,
    BlockCopy,
    ConceptRun,
    Interventions,
    Steerer,
)
from innsteer.tokens import Encode, Parameters, TokenContext
from innsteer.training import Loss, check, train_through

WAVES = 128
"""Sines and cosines of a time."""
GATE = 0.1
"""What every branch's gate starts at."""


class Shape(NamedTuple):
    """What the base model decides of a field; ``build`` makes empty modules of it."""

    heads: int = 1
    kv_heads: int = 1
    head: int = 2
    inner: int = 4
    rope: int = 1
    activation: int = 1
    """1 silu, 2 gelu, 3 gelu by tanh."""
    normed: int = 1
    """2: heads of the self-attention are normalised."""
    biased: int = 1
    """2: its queries, keys and values have biases."""
    capped: int = 1
    """2: attention logits have a soft limit."""


class Norm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        """Rows, normalised along the last axis."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self.weight


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    """A linear layer of zeros: the usual start would use torch's global generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)  # type: ignore[no-untyped-call]
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


def _split(x: Tensor, head: int) -> Tensor:
    """``[..., heads * head]`` as ``[..., heads, head]``."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // head, head)


class Attention(nn.Module):
    """Grouped-query attention with rotated queries and keys, its norms and its projections."""

    def __init__(self, width: int, shape: Shape, *, biased: bool, normed: bool) -> None:
        super().__init__()
        own, shared = shape.heads * shape.head, shape.kv_heads * shape.head
        self.head, self.capped = shape.head, shape.capped == 2
        self.q = linear(width, own, bias=biased)
        self.k = linear(width, shared, bias=biased)
        self.v = linear(width, shared, bias=biased)
        self.o = linear(own, width)
        self.q_norm = Norm(shape.head) if normed else None
        self.k_norm = Norm(shape.head) if normed else None

    def queries(self, x: Tensor, turn: "Turn") -> Tensor:
        """Rows ``[n, heads * head]``."""
        return self._heads(self.q(x), self.q_norm, turn)

    def keys(self, x: Tensor, turn: "Turn") -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, kv heads * head]``."""
        values: Tensor = self.v(x)
        return self._heads(self.k(x), self.k_norm, turn), values

    def _heads(self, x: Tensor, norm: Norm | None, turn: "Turn") -> Tensor:
        heads = _split(x, self.head)
        if norm is not None:
            heads = norm(heads, turn.eps)
        return turn(heads).flatten(-2)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, numbers: "Numbers"
    ) -> Tensor:
        """What places ``[requests, columns, .]`` draw from what they see; not projected yet."""
        q, k, v = (_split(x, self.head).transpose(1, 2) for x in (queries, keys, values))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        q, shown = q * numbers.scale, mask.unsqueeze(1)
        if self.capped:
            logits = numbers.cap * torch.tanh(q @ k.mT / numbers.cap)
            drawn = logits.masked_fill(~shown, -torch.inf).softmax(-1) @ v
        else:
            drawn = nn.functional.scaled_dot_product_attention(q, k, v, shown, scale=1.0)
        return drawn.transpose(1, 2).flatten(-2)


class Numbers(NamedTuple):
    """Scalars of the base model's block, as tensors."""

    eps: Tensor
    scale: Tensor
    cap: Tensor
    rope_scale: Tensor


class Turn(NamedTuple):
    """Rotations of heads by their rows' positions."""

    cos: Tensor
    sin: Tensor
    eps: Tensor

    def __call__(self, heads: Tensor) -> Tensor:
        """Heads ``[n, heads, head]``, the first dimensions of each rotated."""
        half = self.cos.shape[-1]
        one, other, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)
        return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], -1)


class FlowBlock(nn.Module):
    """x + gated branches: attention to the concept, then to earlier tokens, then an MLP."""

    def __init__(self, width: int, shape: Shape) -> None:
        super().__init__()
        self.concept = Attention(width, shape, biased=False, normed=True)
        self.past = Attention(width, shape, biased=shape.biased == 2, normed=shape.normed == 2)
        self.gate = linear(width, shape.inner)
        self.up = linear(width, shape.inner)
        self.down = linear(shape.inner, width)
        self.activation = list(ACTIVATIONS)[shape.activation - 1]
        branches = ("concept", "past", "mlp")
        self.before = nn.ModuleDict({name: Norm(width) for name in branches})
        self.after = nn.ModuleDict({name: Norm(width) for name in branches})
        self.gates = nn.ParameterDict(
            {name: nn.Parameter(torch.full((width,), GATE)) for name in branches}
        )

    def forward(
        self, x: Tensor, name: str, turn: Turn, tokens: TokenContext, numbers: Numbers
    ) -> Tensor:
        """Rows ``[tokens, d]``; ``name`` is that under which keys and values are kept."""
        block = name.partition(".")[0]
        keys, values = (tokens.memory[f"{kind}.{block}"] for kind in ("keys", "values"))
        told = tokens.memory["told"][..., 0].unsqueeze(1) > 0

        def concept(h: Tensor) -> Tensor:
            queries = tokens.lay(self.concept.queries(h, turn))
            mask = told.expand(-1, tokens.columns, -1)
            drawn = self.concept(queries, keys.to(h.dtype), values.to(h.dtype), mask, numbers)
            back: Tensor = self.concept.o(tokens.take(drawn))
            return back

        def past(h: Tensor) -> Tensor:
            assert tokens.mask is not None
            queries = tokens.lay(self.past.queries(h, turn))
            every = tokens.remember(name, *self.past.keys(h, turn))
            drawn = self.past(queries, *every, tokens.mask, numbers)
            back: Tensor = self.past.o(tokens.take(drawn))
            return back

        def mlp(h: Tensor) -> Tensor:
            back: Tensor = self.down(ACTIVATIONS[self.activation](self.gate(h)) * self.up(h))
            return back

        for kind, branch in (("concept", concept), ("past", past), ("mlp", mlp)):
            added = self.after[kind](branch(self.before[kind](x, numbers.eps)), numbers.eps)
            x = x + self.gates[kind] * added
        return x


class Field(AcrossTokens):
    """h' = h + the integral of v(h_t, t, concept) from 0 to the strength, by Euler's steps.

    v = blocks(h, time(t)) - h, each block starting from x + time(t): see ``FlowBlock``. A request's
    keys and values are kept apart for each step and block. The memory of a concept are the keys and
    values that the blocks make of its encoding, so that decoding computes nothing of it again.

    Args:
        width: d. shape: of the base model's block. blocks: how many. steps: N. encoder: blocks of
            the base model that encode the concept.
    """

    asks = ("concept",)
    numbers: Tensor
    rope: Tensor

    def __init__(
        self, width: int, shape: Shape, *, blocks: int = 1, steps: int = 3, encoder: int = 2
    ) -> None:
        super().__init__()
        self.width, self.shape, self.steps, self.encoder = width, shape, steps, encoder
        self.time = nn.Sequential(
            linear(WAVES, width, bias=True), nn.SiLU(), linear(width, width, bias=True)
        )
        self.blocks = nn.ModuleList(FlowBlock(width, shape) for _ in range(blocks))
        # eps, scale of logits, their soft limit, scale of rotations.
        self.register_buffer("numbers", torch.tensor([1e-6, 1.0, 1.0, 1.0]))
        self.register_buffer("rope", torch.ones(shape.rope))

    @property
    def sizes(self) -> dict[str, int]:
        """What the base model decided."""
        return self.shape._asdict()

    def prepare(self, parameters: Parameters, encode: Encode) -> dict[str, Tensor]:
        """Keys and values ``[n, .]`` of the concept's tokens, per block."""
        states = encode(parameters["concept"], self.encoder).to(self.rope.device)
        turn = self._turn(torch.arange(len(states), device=states.device))
        found = {"told": torch.ones(len(states), 1, device=states.device)}
        for number, block in enumerate(self._own()):
            both = block.concept.keys(states.to(self.rope.dtype), turn)
            found[f"keys.{number}"], found[f"values.{number}"] = both
        return found

    def move(self, h: Tensor, coef: Tensor, tokens: TokenContext) -> Tensor:
        """N Euler steps from 0 to each row's strength."""
        return self.flow(h, coef, tokens)[0]

    def flow(self, h: Tensor, coef: Tensor, tokens: TokenContext) -> tuple[Tensor, Tensor]:
        """The whole move ``[tokens, d]`` of rows, and the velocity at its last step."""
        moved, step = torch.zeros_like(h), coef / self.steps
        velocity = moved
        for k in range(self.steps):
            velocity = self.velocity(h + moved, k * step, tokens, k)
            moved = moved + step * velocity
        return moved, velocity

    def velocity(self, h: Tensor, time: Tensor, tokens: TokenContext, step: int = 0) -> Tensor:
        """v of rows ``[tokens, d]`` at times ``[tokens, 1]``; ``step`` is whose cache is meant."""
        x, turn, numbers = h, self._turn(tokens.position), self._numbers()
        waves = self.embed(time)
        for number, block in enumerate(self._own()):
            x = block(x + waves, f"{number}.{step}", turn, tokens, numbers)
        return x - h

    def embed(self, time: Tensor) -> Tensor:
        """Times ``[n, 1]`` as rows ``[n, d]``."""
        half = WAVES // 2
        place = torch.arange(half, device=time.device, dtype=time.dtype)
        angles = time * torch.exp(-math.log(10_000) * place / half)
        found: Tensor = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        return found

    def _own(self) -> list[FlowBlock]:
        return [cast(FlowBlock, block) for block in self.blocks]

    def _numbers(self) -> Numbers:
        return Numbers(*self.numbers.unbind())

    def _turn(self, positions: Tensor) -> Turn:
        """Rotations by absolute positions ``[n]``, the angles in float32 or above."""
        numbers = self._numbers()
        angles = positions.unsqueeze(-1).to(self.rope.dtype) * self.rope
        return Turn(
            angles.cos() * numbers.rope_scale, angles.sin() * numbers.rope_scale, numbers.eps
        )

    @torch.no_grad()
    def start(self, block: BlockCopy, unit: float, generator: torch.Generator) -> None:
        """Start from a base model's block: self-attention, MLP and norms are its own.

        Attention to the concept and the time's first layer are drawn at random, the time's last
        layer is 0. Where the base does not normalise what a part adds, that starts as long as
        ``unit``, the spread of a coordinate at the site, so that a gate means the same in every
        model.
        """
        self.rope.copy_(block.rope)
        told = (block.eps, block.scale, block.cap or 1.0, block.rope_scale)
        self.numbers.copy_(torch.tensor(told))
        first, last = cast(nn.Linear, self.time[0]), cast(nn.Linear, self.time[2])
        _draw(first, generator)
        last.weight.zero_()
        last.bias.zero_()
        w = block.weights
        for own in self._own():
            for name in ("q", "k", "v", "o"):
                _draw(getattr(own.concept, name), generator)
                _copy(getattr(own.past, name), w, name)
            for name in ("q_norm", "k_norm"):
                if name in w:
                    getattr(own.past, name).weight.copy_(w[name])
            for name in ("gate", "up", "down"):
                _copy(getattr(own, name), w, name)
            for kind, of in (("concept", "attention"), ("past", "attention"), ("mlp", "mlp")):
                cast(Norm, own.before[kind]).weight.copy_(w[f"{of}_norm"])
                after = w.get(f"{of}_after", torch.tensor(unit))
                cast(Norm, own.after[kind]).weight.copy_(after)


class Learner(Field):
    """A field while it is trained: it shows the velocities of its last steps, for the loss.

    ``seen`` holds, per pass, the mean velocity ``[requests, d]`` over each request's tokens, and a
    number ``[requests]`` that stands for its concept.
    """

    seen: list[tuple[Tensor, Tensor]]

    def prepare(self, parameters: Parameters, encode: Encode) -> dict[str, Tensor]:
        """As ever, and which concept it is."""
        digest = sha256(parameters["concept"].encode()).digest()
        who = torch.tensor([[float(int.from_bytes(digest[:3]))]], device=self.rope.device)
        return {**super().prepare(parameters, encode), "who": who}

    def move(self, h: Tensor, coef: Tensor, tokens: TokenContext) -> Tensor:
        """As ever."""
        moved, velocity = self.flow(h, coef, tokens)
        kept = (coef != 0).to(h.dtype)
        total, count = tokens.lay(velocity * kept).sum(1), tokens.lay(kept).sum(1)
        self.seen.append((total / count.clamp_min(1), tokens.memory["who"][:, 0, 0]))
        return moved


def diversity(velocities: Tensor, concepts: Tensor) -> Tensor:
    """Mean cosine between velocities ``[n, d]`` of different concepts, -1 to 1; 0 if there is one.

    Args:
        concepts: ``[n]``, a number for each concept.

    >>> ways = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    >>> diversity(ways, torch.tensor([0, 1, 1])), diversity(ways, torch.tensor([0, 0, 1]))
    (tensor(0.5000), tensor(0.5000))
    """
    ways = nn.functional.normalize(velocities, dim=-1)
    apart = (concepts.unsqueeze(1) != concepts).to(ways.dtype)
    return (ways @ ways.mT * apart).sum() / apart.sum().clamp_min(1)


def settled(field: Field) -> Field:
    """A trained field, for use."""
    how = {"blocks": len(field.blocks), "steps": field.steps, "encoder": field.encoder}
    found = Field(field.width, field.shape, **how)
    found.load_state_dict(field.state_dict())
    return found.eval().requires_grad_(False)


def _draw(layer: nn.Linear, generator: torch.Generator) -> None:
    """The usual start of a linear layer, U(-1, 1) / sqrt(inputs), from a generator of our own."""
    reach = layer.in_features**-0.5
    for weight in layer.parameters():
        weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * reach)


def _copy(layer: nn.Linear, weights: Mapping[str, Tensor], name: str) -> None:
    layer.weight.copy_(weights[name])
    if layer.bias is not None:
        layer.bias.copy_(weights.get(f"{name}.bias", torch.zeros(())))


def shape_of(block: BlockCopy) -> Shape:
    """The shape of a field that starts from a block."""
    return Shape(
        block.heads,
        block.kv_heads,
        block.head,
        len(block.weights["up"]),
        len(block.rope),
        list(ACTIVATIONS).index(block.activation) + 1,
        1 + ("q_norm" in block.weights),
        1 + any(name.endswith(".bias") for name in block.weights),
        1 + bool(block.cap),
    )


@dataclass(frozen=True)
class FLAS(Steerer):
    """One velocity field for all concepts, conditioned on the concept's text.

    h' = h + integral from 0 to T of v(h_t, t, concept) dt,  v = blocks(h, t, concept) - h,

    by ``steps`` Euler steps, with T the strength: 1 is what the field is validated at, the paper
    uses 2. Trained once on responses that show many concepts, it takes concepts that it never saw,
    as a request's parameter: ``steering.told(concept="speaks like a sea captain")``. Each block
    adds a time embedding, then attends from the tokens to the concept (encoded by the model's own
    first blocks), then to the edited tokens before it, then an MLP; each branch behind a gate per
    channel. Self-attention, MLP and norms start as those of the steered block. It steers every
    token, prompts too, and is the first method across tokens: the Hugging Face engine alone runs
    it. About 1.6 times the weights of one block of the model per field block.

    Trained on strengths between ``least`` and ``most``; the paper calls 0.5 to 4 usable. Negative
    strengths integrate backwards in time, where nothing was trained. Strengths do not add.

    Differences from the authors' code: self-attention sees all earlier tokens (theirs may keep the
    base's sliding window); where the base has no norm behind a part, the field's starts as long as
    a coordinate's spread, not at 1; the best validation state is kept, not the best three.

    Attributes:
        steps: N, Euler steps; inference must match training. blocks: field blocks, one after the
            other. encoder: blocks of the model that encode a concept.
        least, most: strengths of training, uniform, one per part of a batch.
        diversity: weight of the mean cosine between velocities of different concepts. 0 lets
            concepts collapse into one.
        updates: optimiser steps. batch: responses in each. parts: of a batch, whose gradients add
            up. learning_rate, weight_decay: of AdamW. warmup: steps of a rising rate.
        every, patience: validate so often (log-probability at strength 1, on other responses of the
            same concepts), and stop after so many validations without a better one; 0 = never.

    Raises:
        InputError: a number out of range, several sites or behaviours, or rows instead of concepts.

    Reference:
        Jin et al., FLAS: flow-based activation steering (2026), https://arxiv.org/abs/2605.05892

    >>> field = FLAS().build({Site(3): 8})[Site(3)]
    >>> field.asks, field.steps
    (('concept',), 3)
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2605.05892"
    needs: ClassVar[tuple[str, ...]] = ("concepts", "model")
    sites: ClassVar[str] = "one"
    trained: ClassVar[bool] = True
    across_tokens: ClassVar[bool] = True

    steps: int = 3
    blocks: int = 1
    encoder: int = 2
    least: float = 0.5
    most: float = 2.0
    diversity: float = 0.1
    updates: int = 80_000
    batch: int = 32
    parts: int = 4
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: int = 2000
    every: int = 200
    patience: int = 30

    def __post_init__(self) -> None:
        check(
            self,
            ("steps", "blocks", "encoder", "updates", "batch", "parts", "every"),
            ("diversity", "learning_rate", "weight_decay", "warmup"),
        )
        if not 0 < self.least <= self.most < math.inf:
            raise InputError(
                f"strengths from {self.least} to {self.most}", expected="0 < least <= most"
            )

    def build(
        self, widths: Mapping[Site, int], k: int = 1, sizes: Mapping[str, int] = {}
    ) -> Interventions:
        """An empty field; its shape is the base model's, by ``sizes``."""
        if len(widths) != 1 or k != 1:
            raise InputError(
                f"a field at {len(widths)} sites for {k} behaviours",
                expected="one of each: the concept is a request's parameter",
            )
        ((site, width),) = widths.items()
        given = {
            name: sizes.get(f"{site}.{name}", value) for name, value in Shape()._asdict().items()
        }
        shape = Shape(**given)
        if max(shape.normed, shape.biased, shape.capped) > 2 or shape.activation > len(ACTIVATIONS):
            raise InputError(f"the shape {given}", expected="1 or 2, and a known activation")
        if shape.heads % shape.kv_heads or 2 * shape.rope > shape.head:
            raise InputError(f"the shape {given}", expected="heads that fit each other")
        how = {"blocks": self.blocks, "steps": self.steps, "encoder": self.encoder}
        return Interventions({site: Field(width, shape, **how)})

    def fit(self, acts: Activations, *, seed: int = 0) -> Interventions:
        """Refused: rows do not say what a concept means.

        Raises:
            InputError: always.
        """
        raise InputError(
            "recorded rows for a field over concepts",
            expected="a table of concepts, prompts and responses, through the model",
            remedy="innsteer fit TABLE --method flas",
        )

    def fit_told(self, run: ConceptRun, *, seed: int = 0) -> Interventions:
        """Train through the frozen model, from the steered block's own weights."""
        (site,) = run.sites
        block = run.block(site.layer)
        how = {"blocks": self.blocks, "steps": self.steps, "encoder": self.encoder}
        field = Learner(run.width, shape_of(block), **how)
        field.start(block, run.unit, torch.Generator().manual_seed(seed))
        # There before an optimiser is: it puts what a checkpoint kept where the parameters are.
        field.to(block.rope.device)
        maps = Interventions({site: field})
        course = train_through(
            run,
            maps,
            loss=self._loss(field, seed),
            steps=self.updates,
            batch=self.batch,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            unmoved=0.0,
            every=self.every,
            patience=self.patience,
            accumulate=self.parts,
            warmup=self.warmup,
            checkpoint=run.checkpoint,
            progress=run.progress,
            about={name: value for name, value in asdict(self).items() if name != "patience"},
            seed=seed,
        )
        run.course = vars(course)
        return Interventions({site: settled(field)})

    def _loss(self, field: Learner, seed: int) -> Loss:
        """Language modelling at a random strength, and diversity; validated at strength 1."""

        def loss(run: ConceptRun, maps: Interventions, items: Sequence[int]) -> Tensor:
            field.seen = []
            if not torch.is_grad_enabled():
                return -run.told(maps, items, [1.0] * len(items)).mean()
            # By the items alone, so that a training that goes on draws what it would have drawn.
            dice = torch.Generator().manual_seed(hash((seed, *items)) % 2**63)
            strength = self.least + (self.most - self.least) * float(torch.rand((), generator=dice))
            nats = run.told(maps, items, [strength] * len(items))
            velocities, concepts = (torch.cat(part) for part in zip(*field.seen, strict=True))
            return -nats.mean() + self.diversity * diversity(velocities, concepts)

        return loss
