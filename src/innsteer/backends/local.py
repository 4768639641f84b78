"""Local: the blocks of a model as linear maps of one token's row, and the rows these start from.

What a block does to the last token of a text depends on that token's row and on the keys and values
of the tokens before it. These are held constant: they run once, and only the one row is
differentiated, by all d cotangents in one batched backward pass. So a Jacobian costs about as much
as a text of d tokens, however long the text is.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from innsteer import __version__
from innsteer.activations import Activations, Rows
from innsteer.backends.base import Progress, silent
from innsteer.backends.engine import Engine, positions_of
from innsteer.backends.memo import Memo, digest
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError, LayoutError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.models import Encoded
from innsteer.models.layout import Layout
from innsteer.site import Site, Where
from innsteer.steerer import Interventions

COTANGENTS = 16
"""Rows of a Jacobian per backward pass; with more the processor's cache is too small."""
PROMPTS = 4
"""Texts per pass: their rows stand side by side in every matrix product."""
GROUP = 2**28
"""Bytes of the Jacobians that are summed at once; what is done lies on disk."""
OVERSAMPLING = 10
"""Directions beyond the rank that is asked for, and as many to measure the error by."""


class Read(NamedTuple):
    """A text up to the token that is read, its last.

    Attributes:
        ids: tokens. prompt: how many of them are the prompt's. record: what the table says of it.
        rest: tokens that follow the one that is read: a lone prompt's answer.
    """

    ids: tuple[int, ...]
    prompt: int
    record: dict[str, Any]
    rest: tuple[int, ...] = ()


class LowRank(NamedTuple):
    """A - I as a product of two thin matrices.

    Attributes:
        left: ``[d, r]``. right: ``[r, d]``. error: |(A - I) x - left right x| / |(A - I) x| of
            random x that had no part in it, root mean square.
    """

    left: Tensor
    right: Tensor
    error: float

    def dense(self) -> Tensor:
        """A ``[d, d]``."""
        return torch.eye(len(self.left), dtype=self.left.dtype) + self.left @ self.right


class Local:
    """A model as a chain of blocks about the last token of texts: rows going in, and Jacobians.

    What is read is each text's last token: of an item with both sides that of its answers, of a
    lone prompt (one side, as in requests that ought to be declined) that of the prompt, which comes
    before any answer.

    Args:
        backend: who runs the model. contrasts: one per behaviour, in the order of ``coef``'s
        columns. sites: outputs of blocks; a row at a site is what goes *into* its block.

    Attributes:
        errors: of the low-rank Jacobians that were asked for, by block; see ``LowRank``.

    Raises:
        InputError: no site, a site inside a block, behaviours of one name, or no item.
    """

    def __init__(
        self,
        backend: Engine,
        contrasts: Sequence[Contrast],
        sites: Sequence[Site],
        *,
        progress: Progress = silent,
    ) -> None:
        self.behaviours = tuple(contrast.behaviour for contrast in contrasts)
        if len(set(self.behaviours)) < max(len(self.behaviours), 1):
            raise InputError(
                f"the behaviours {', '.join(self.behaviours) or '(none)'}",
                expected="at least one, each of another name",
            )
        self.sites = tuple(sorted(set(sites)))
        if not self.sites or any(site.stream != "residual" for site in self.sites):
            raise InputError(
                f"the sites {', '.join(map(str, self.sites)) or '(none)'} as blocks",
                expected="outputs of blocks, such as 15 or 15.residual",
            )
        for site in self.sites:
            backend.model.layout.at(site)
        self._backend, self._model, self._progress = backend, backend.model, progress
        self._texts = [
            self._read(contrast.behaviour, item, side)
            for contrast in contrasts
            for side in ("source", "target")
            for item in contrast.items
            if getattr(item, side) is not None
        ]
        if not self._texts:
            raise InputError("a contrast without items", expected="texts of both sides")
        self._provenance = {
            "fingerprint": asdict(self._model.fingerprint),
            "contrast": contrasts[0].hash if len(contrasts) == 1 else None,
            "contrasts": {contrast.behaviour: contrast.hash for contrast in contrasts},
            "read": "last",
            "innsteer": __version__,
        }
        self.errors: dict[int, float] = {}
        self._memo = backend.memo
        if self._memo.folder is None:
            # Jacobians lie on disk, not in memory; these go when the run goes.
            scratch = tempfile.mkdtemp(prefix="innsteer-jacobians-")
            weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
            self._memo = Memo(scratch)
        self._rows: Activations | None = None

    # --- what a fit asks -------------------------------------------------------------------------

    def rows(self) -> Activations:
        """The latest unsteered ``inputs`` of both sides, or those of all texts."""
        return self.inputs() if self._rows is None else self._rows

    def inputs(
        self,
        interventions: Interventions | None = None,
        *,
        coef: Sequence[float] | None = None,
        side: str | None = None,
        most: int | None = None,
        seed: int = 0,
        steered: bool = False,
        where: Where = Where(),  # noqa: B008
    ) -> Activations:
        """Rows of all texts' last tokens at the *inputs* of the sites' blocks.

        Args:
            interventions: edits that are active meanwhile; a row holds those of the blocks before
                its own. coef: their strengths, one per behaviour; default: 1 each. side: only
                texts of this side. most: so many texts of a behaviour's side, drawn by the seed,
                both texts of an item or none; default: all. steered: the mean of all tokens that
                are edited in the place of the one that is read, a lone prompt's answer with them.
                where: these; default: from the last prompt token on.

        Raises:
            PositionError: scope ``assistant``, which needs the turns of conversations.
        """
        texts = [
            text
            for behaviour in self.behaviours
            for one in ("source", "target")
            if side in (None, one)
            for text in self._drawn(behaviour, one, most, seed)
        ]
        if steered:
            texts = [text._replace(ids=text.ids + text.rest, rest=()) for text in texts]
        found: dict[Site, dict[int, Tensor]] = {site: {} for site in self.sites}
        lengths = [len(text.ids) for text in texts]
        for part in self._backend._batches(lengths, self._progress, "rows"):
            some = [texts[n] for n in part]
            inputs = self._inputs(some, interventions, coef, where, steered=steered)
            for site in self.sites:
                found[site] |= dict(zip(part, inputs[str(site)], strict=True))
        values = {
            site: torch.stack([rows[n] for n in range(len(texts))]) for site, rows in found.items()
        }
        table = Rows.of([text.record for text in texts])
        acts = Activations(values, table, self.behaviours, "last", self._provenance)
        if interventions is None and side is None and not steered:
            self._rows = acts
        return acts

    def jacobian(self, block: int, *, prompts: int = 50, rank: int = 0, seed: int = 0) -> Tensor:
        """How a block's output moves with its input at the last token, meaned over target texts.

        d output / d input ``[d, d]`` (output, input), float32 (float64 in a model of float64), with
        the keys and values of all other tokens held constant: those of unsteered text. Several
        neighbouring blocks are done in one go and kept on disk; where the engine keeps its results
        (``--resume``), an interrupted fit finds them.

        Args:
            block: one of the sites' layers. prompts: of so many texts of the target sides, drawn by
                the seed. rank: 0 = every entry; else the best map I + (rank r), by a
                randomised SVD of A - I, in 2 (r + 10) products instead of d. See ``low_rank``.

        Raises:
            InputError: a block that is none of the sites', or numbers out of range.
        """
        if rank:
            found = self.low_rank(block, rank, prompts=prompts, seed=seed)
            self.errors[block] = found.error
            return found.dense()
        return self._kept(block, prompts, 0, seed)[f"{block}"]

    def low_rank(self, block: int, rank: int, *, prompts: int = 50, seed: int = 0) -> LowRank:
        """The Jacobian of ``jacobian`` as I + left right, with its error."""
        if not 0 < rank <= self._model.layout.width:
            raise InputError(f"rank={rank}", expected=f"1 to {self._model.layout.width}")
        kept = self._kept(block, prompts, rank, seed)
        parts = (kept[f"{block}.{name}"] for name in ("left", "right", "error"))
        left, right, error = parts
        return LowRank(left, right, error.item())

    # --- Jacobians -------------------------------------------------------------------------------

    def _kept(self, block: int, prompts: int, rank: int, seed: int) -> dict[str, Tensor]:
        """The tensors of a block and its neighbours, made at the first look."""
        layers = [site.layer for site in self.sites]
        if block not in layers or prompts < 1:
            raise InputError(
                f"a Jacobian of block {block} over {prompts} texts",
                expected=f"one of the blocks {layers[0]} to {layers[-1]}, over at least one text",
            )
        width = self._model.layout.width
        size = max(min(GROUP // (4 * width**2), 8), 1)
        start = layers.index(block) // size * size
        group, texts = layers[start : start + size], self._drawn(None, "target", prompts, seed)
        if not texts:
            raise InputError("no text of the target side", expected="at least one")
        asked = [[text.ids, text.record["weight"]] for text in texts]
        made = [str(self._model.model.dtype), asdict(self._model.fingerprint)]
        key = ["jacobians", group, rank, seed, asked, *made]

        return self._memo.tensors(key, lambda: self._made(texts, group, rank, seed))

    def _made(
        self, texts: Sequence[Read], blocks: Sequence[int], rank: int, seed: int
    ) -> dict[str, Tensor]:
        """The tensors of blocks, by name: Jacobians, or their low-rank maps."""
        if rank:
            return self._sketched(texts, blocks, rank, seed)
        found = mean_jacobians(self._backend, texts, blocks, progress=self._progress)
        return {str(n): matrix for n, matrix in found.items()}

    def _drawn(self, behaviour: str | None, side: str, most: int | None, seed: int) -> list[Read]:
        """Some texts of a behaviour's side, in their order; of equal sides the same items."""
        own = [
            text
            for text in self._texts
            if text.record["side"] == side and behaviour in (None, text.record["behaviour"])
        ]
        draw = torch.Generator().manual_seed(seed)
        return [own[n] for n in torch.randperm(len(own), generator=draw)[:most].sort().values]

    def _sketched(
        self, texts: Sequence[Read], blocks: Sequence[int], rank: int, seed: int
    ) -> dict[str, Tensor]:
        """``LowRank`` of blocks, tensor by tensor."""
        width = self._model.layout.width
        draw = torch.Generator().manual_seed(seed)
        kind = precision(self._backend)
        many = min(rank + OVERSAMPLING, width)
        looks, probes = (
            torch.randn(count, width, generator=draw, dtype=kind) for count in (many, OVERSAMPLING)
        )
        given = {block: looks for block in blocks}
        told = mean_products(self._backend, texts, given, side="left", progress=self._progress)
        # The rows that A - I has, as seen from random outputs; then what it makes of these.
        bases = {block: torch.linalg.qr((told[block] - looks).mT).Q for block in blocks}
        given = {block: torch.cat([bases[block].mT, probes]) for block in blocks}
        went = mean_products(self._backend, texts, given, side="right", progress=self._progress)
        found: dict[str, Tensor] = {}
        for block, base in bases.items():
            moved = went[block] - given[block]
            u, s, v = torch.linalg.svd(moved[:many].mT, full_matrices=False)
            left, right = u[:, :rank] * s[:rank], v[:rank] @ base.mT
            missing = moved[many:] - probes @ right.mT @ left.mT
            error = missing.square().sum().sqrt() / moved[many:].square().sum().sqrt()
            found |= {f"{block}.left": left, f"{block}.right": right, f"{block}.error": error}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    # --- texts -----------------------------------------------------------------------------------

    def _read(self, behaviour: str, item: Item, side: str) -> Read:
        """An item's text of a side, up to the token that is read."""
        encoded: Encoded = self._model.encode(item.prompt, answer=getattr(item, side))
        paired = item.source is not None and item.target is not None
        end = len(encoded.ids) if paired or not item.prompt else encoded.prompt
        if end < 2:
            raise InputError(
                f"item {item.id!r} with a text of one token",
                expected="at least two to read one",
                remedy=f"lengthen its {'prompt' if item.prompt else side}, or leave the item out",
            )
        record = {
            "behaviour": behaviour,
            "item": item.id,
            "side": side,
            "key": item.key or "",
            "pair": item.id if paired else "",
            "token": end - 1,
            "split": item.split,
            "weight": item.weight,
        }
        return Read(encoded.ids[:end], min(encoded.prompt, end), record, encoded.ids[end:])

    def _inputs(
        self,
        texts: Sequence[Read],
        interventions: Interventions | None,
        coef: Sequence[float] | None,
        where: Where = Where(),  # noqa: B008
        *,
        steered: bool = False,
    ) -> dict[str, Tensor]:
        """What goes into the sites' blocks at the last tokens of some texts, ``[texts, d]``."""
        blocks = [site.layer for site in self.sites]
        shown = [[text.ids, text.prompt] for text in texts]
        strengths = torch.tensor(coef if coef is not None else [1.0] * len(self.behaviours))
        asked = digest(interventions), strengths.tolist(), str(where)
        key = self._backend.key("inputs", shown, blocks, *asked, *([True] if steered else []))

        def row(given: Tensor, text: Read) -> Tensor:
            if not steered:
                return given[-1]
            own = given[len(given) - len(text.ids) :]  # padded on the left
            found = torch.cat([own[slice(*span)] for span in where.spans(prompt=text.prompt)])
            if not len(found):
                raise InputError(
                    f"no steered token among the {len(own)} of item {text.record['item']!r}",
                    expected=f"texts that {where} reaches",
                )
            return found.mean(0)

        def make() -> dict[str, Tensor]:
            ids, mask = self._backend._pad([text.ids for text in texts], side="left")
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                if interventions is not None:
                    lengths = [text.prompt for text in texts]
                    edits = [Edit(interventions, strengths, where)]
                    stack.enter_context(Attachment(self._model, edits, prompt_lengths=lengths))
                seen = stack.enter_context(opened(self._model.layout, blocks))
                self._model.model.base_model(
                    ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
                )
            return {
                str(Site(n)): torch.stack(list(map(row, seen[n].given, texts))).float().cpu()
                for n in blocks
            }

        return self._backend.memo.tensors(key, make)


# --- one row through one block -------------------------------------------------------------------


class Opened:
    """What a block was given and gave in the latest pass: tensors ``[batch, time, d]``."""

    def __init__(self) -> None:
        self.given = self.gave = torch.empty(0)


@contextmanager
def opened(
    layout: Layout, blocks: Sequence[int], *, leaves: bool = False, moves: Tensor | None = None
) -> Iterator[dict[int, Opened]]:
    """Inputs and outputs of blocks, by number; with ``leaves`` each input starts a graph anew.

    With ``moves`` ``[batch, d]`` of which the first is none, each block gets the first sequence's
    row in every sequence, moved by these shares of its length.
    """
    seen = {number: Opened() for number in blocks}
    with ExitStack() as stack:
        for number, one in seen.items():

            def before(
                _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], one: Opened = one
            ) -> Any:
                h = args[0] if args else kwargs["hidden_states"]
                if moves is not None:
                    h = h[:1] + h[:1].norm(dim=-1, keepdim=True) * moves.to(h)[:, None]
                one.given = h.detach().requires_grad_() if leaves else h
                if args:
                    return (one.given, *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": one.given}

            def after(_: Any, args: Any, output: Any, one: Opened = one) -> None:
                one.gave = output[0] if isinstance(output, tuple) else output

            module = layout.blocks[number].module
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield seen


def mean_jacobians(
    engine: Engine, texts: Sequence[Read], blocks: Sequence[int], *, progress: Progress = silent
) -> dict[int, Tensor]:
    """d output / d input ``[d, d]`` of blocks at the texts' last tokens, meaned by weight.

    Raises:
        LayoutError: a block whose row cannot be differentiated.
    """
    width, kind = engine.model.layout.width, precision(engine)
    every = {block: torch.eye(width, dtype=kind) for block in blocks}
    return mean_products(engine, texts, every, side="left", progress=progress)


def precision(engine: Engine) -> torch.dtype:
    """What Jacobians are summed in: float32, or float64 where the model is."""
    return torch.promote_types(engine.model.model.dtype, torch.float32)


def mean_products(
    engine: Engine,
    texts: Sequence[Read],
    given: dict[int, Tensor],
    *,
    side: str,
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """Rows ``[n, d]`` times the blocks' mean Jacobians: x' A from the left, (A x)' from the right.

    The mean runs on from batch to batch: memory holds one ``[n, d]`` per block.
    """
    found = {block: torch.zeros_like(rows) for block, rows in given.items()}
    total = sum(text.record["weight"] for text in texts)
    order = sorted(range(len(texts)), key=lambda n: len(texts[n].ids))
    for start in range(0, len(order), PROMPTS):
        progress("jacobians", start, len(order))
        part = [texts[n] for n in order[start : start + PROMPTS]]
        share = torch.tensor([text.record["weight"] / total for text in part])
        with one_row(engine, [text.ids for text in part], list(given)) as seen:
            for block, rows in given.items():
                each = products(seen[block], rows, side=side, block=block)
                found[block] += torch.einsum("bnd,b->nd", each, share.to(each))
    progress("jacobians", len(order), len(order))
    return found


@contextmanager
def one_row(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    blocks: Sequence[int],
    *,
    moves: Tensor | None = None,
) -> Iterator[dict[int, Opened]]:
    """The last token of texts through blocks, differentiable; what precedes it is constant.

    With ``moves`` as of ``opened`` there is one text, and a copy of it for each.
    """
    ids, mask = engine._pad(texts, side="left")
    places, cache = positions_of(mask), DynamicCache()
    base = engine.model.model.base_model
    with torch.no_grad():
        base(
            ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=places[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
    if moves is not None:
        count = len(moves)
        cache.batch_repeat_interleave(count)
        ids, mask, places = (part.expand(count, -1) for part in (ids, mask, places))
    with (
        torch.set_grad_enabled(moves is None),
        # The fused kernels have no second derivative, and none that is batched.
        sdpa_kernel(SDPBackend.MATH),
        opened(engine.model.layout, blocks, leaves=moves is None, moves=moves) as seen,
    ):
        base(
            ids[:, -1:],
            attention_mask=mask,
            position_ids=places[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        yield seen


def products(one: Opened, rows: Tensor, *, side: str, block: int = 0) -> Tensor:
    """Rows ``[n, d]`` times a block's Jacobian of each text of the batch: ``[batch, n, d]``.

    x' A from the ``left``, (A x)' from the ``right``.
    """
    x, y = one.given, one.gave
    try:
        if side == "right":
            # The backward pass is linear in its cotangent: differentiated by that, it goes forward.
            cotangent = torch.zeros_like(y, requires_grad=True)
            (y,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
            x = cotangent
        parts = []
        for part in torch.split(rows.to(x.device, x.dtype), COTANGENTS):
            each = part[:, None, None].expand(-1, *x.shape[:2], -1)
            (moved,) = torch.autograd.grad(y, x, each, retain_graph=True, is_grads_batched=True)
            parts.append(moved[:, :, 0].to(rows))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise LayoutError(
            f"block {block} cannot be linearised: {reason}",
            expected="a block whose output at a token can be differentiated by its input",
            remedy="load the model with attn_implementation='eager', or use another method",
        ) from error
    return torch.cat(parts).transpose(0, 1)


def perturbed(engine: Engine, ids: Sequence[int], moves: Tensor) -> Tensor:
    """Every block's output ``[blocks, n, d]`` at a text's last token, its input there moved.

    Args:
        moves: ``[n, d]``, in units of the row's length. Each block gets the unperturbed row and a
            move of its own, whatever the block below gave.
    """
    layers = list(range(len(engine.model.layout.blocks)))
    with one_row(engine, [ids], layers, moves=moves) as seen:
        return torch.stack([seen[k].gave[:, 0].float().cpu() for k in layers])
