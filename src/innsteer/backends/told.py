"""Told: a model as a fit on concepts sees it. Whole requests, each told its concept, no prefixes.

Every token is steered, so nothing of a steered pass can be kept but what comes before the site: the
plain hidden states that enter it, which are computed once per response.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from innsteer.backends.base import Progress, silent
from innsteer.backends.blocks import copy_block
from innsteer.backends.engine import Engine, cut_of, positions_of, replay, tap
from innsteer.concepts import Concepts
from innsteer.errors import InputError
from innsteer.files import canonical
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.models import Encoded, until
from innsteer.site import Site, Where
from innsteer.steerer import BlockCopy, Interventions

KEEP = 2**30
"""Bytes of plain hidden states that are kept at most; those of later responses are made again."""


class Told:
    """Responses that show concepts, and what a map makes of their probability.

    Args:
        backend: who runs the model.
        concepts: the table; items go by number, in its order.
        site: the block's output that is steered.
        longest: tokens of a response that count, at most; prompts are kept whole.
        half: multiply by the frozen blocks above the site in bfloat16; the map stays in float32.
            Default: where the model runs on a GPU.
        checkpoint: a file in which a training may keep its state; None: nowhere.

    Attributes:
        course: what the training did, by step; it says so itself. half: as given, or chosen.

    Raises:
        InputError: a site inside a block, a response without tokens, a concept that is too long to
            be told, or no training row.
    """

    behaviours = ("concept",)
    unmoved: tuple[int, ...] = ()

    def __init__(
        self,
        backend: Engine,
        concepts: Concepts,
        site: Site,
        *,
        longest: int = 128,
        half: bool | None = None,
        checkpoint: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        if site.stream != "residual":
            raise InputError(f"site {site} of a field", expected="a block's output: a layer alone")
        if longest < 1:
            raise InputError(f"responses of {longest} tokens", expected="at least 1")
        self.sites: tuple[Site, ...] = (site,)
        self.checkpoint, self.progress = checkpoint, progress
        self.table, self._backend, self._model = concepts, backend, backend.model
        self._cut, self._longest = cut_of([site]), longest
        self._rows = [self._encode(row.prompt, row.response, longest) for row in concepts.rows]
        for concept in dict.fromkeys(row.concept for row in concepts.rows):
            self._model.short(concept)
        if not self.items():
            raise InputError("a table without training rows", expected="at least one")
        self._encoded: dict[tuple[str, int], Tensor] = {}
        self.half = self._model.device.type == "cuda" if half is None else half
        self._entering: dict[int, Tensor] = {}
        self._kept = 0
        self._tuple = False

        self.course: dict[str, Any] = {}

    # --- what a fit asks -------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """All that a loss depends on but the map: table, model, site and what is cut off."""
        model, site = asdict(self._model.fingerprint), str(self.sites[0])
        told: list[Any] = [self.table.hash, model, site]
        told += [self._longest, *(["bfloat16"] if self.half else [])]
        return hashlib.sha256(canonical(told)).hexdigest()

    @property
    def width(self) -> int:
        """d, of the site's rows."""
        return self._model.layout.width

    def items(self, split: str = "train") -> list[int]:
        """Numbers of the rows of a part."""
        return [n for n, row in enumerate(self.table.rows) if row.split == split]

    def concept(self, item: int) -> str:
        """The concept of an item."""
        return self.table.rows[item].concept

    def encode(self, text: str, blocks: int) -> Tensor:
        """Hidden states ``[n, d]`` of a text after so many of the plain model's first blocks.

        Each is made once: a training asks for the same few hundred texts thousands of times.
        """
        if (text, blocks) not in self._encoded:
            with torch.no_grad():
                self._encoded[text, blocks] = self._model.states(text, blocks)
        return self._encoded[text, blocks]

    def block(self, layer: int) -> BlockCopy:
        """A copy of a block's weights and numbers."""
        return copy_block(self._model, layer)

    @cached_property
    def unit(self) -> float:
        """The spread of a coordinate at the site, over tokens of training responses' requests."""
        rows = [self._plain([n])[0] for n in self.items()[:16]]
        # Position 0 is the attention's sink: its norm is hundreds of times that of the others.
        found = torch.cat([h[1:] for h in rows]).float()
        return float(found.var(0, correction=0).mean().sqrt())

    def told(
        self,
        interventions: Interventions | None,
        items: Sequence[int],
        strengths: Sequence[float],
        concepts: Sequence[str] = (),
    ) -> Tensor:
        """Mean log-probability per response token ``[items]``, nats, differentiable.

        Args:
            interventions: every token steered; None = the plain model.
            strengths: of each item. concepts: what each is told; default: its own.
        """
        given = list(concepts) or [self.concept(n) for n in items]
        found: dict[int, Tensor] = {}
        for part in self._parts(items):
            rows = [items[place] for place in part]
            edit = None
            if interventions is not None:
                coef = torch.tensor([[float(strengths[place])] for place in part])
                texts = tuple({"concept": given[place]} for place in part)
                edit = Edit(interventions, coef, Where("all"), texts)
            found |= zip(part, self._run(rows, edit).unbind(), strict=True)
        return torch.stack([found[place] for place in range(len(items))])

    # --- one pass --------------------------------------------------------------------------------

    def _encode(self, prompt: str, response: str, longest: int) -> Encoded:
        encoded = self._model.encode(prompt, answer=response)
        ids = encoded.ids[: encoded.prompt + longest]
        if len(ids) == encoded.prompt:
            raise InputError(f"an empty response to {prompt!r:.60}", expected="some text")
        return Encoded(ids, encoded.prompt, encoded.turns)

    def _parts(self, items: Sequence[int]) -> Iterator[list[int]]:
        """Places in passes of near-equal length."""
        lengths = [len(self._rows[n].ids) for n in items]
        return self._backend._batches(lengths, silent, "told")

    def _run(self, items: Sequence[int], edit: Edit | None) -> Tensor:
        """Mean log-probabilities ``[items]`` of responses, in one pass above the site."""
        rows = [self._rows[n] for n in items]
        ids, mask = self._backend._pad([row.ids[:-1] for row in rows], side="left")
        entering = self._plain(items)
        hidden = entering[0].new_zeros(*ids.shape, self.width)
        for row, h in enumerate(entering):
            hidden[row, ids.shape[1] - len(h) :] = h
        blocks = self._model.layout.blocks[: self._cut + 1]
        counts = [len(row.ids) - row.prompt for row in rows]
        longest = max(counts)
        said = torch.arange(longest) >= longest - torch.tensor(counts).unsqueeze(-1)
        answers = torch.tensor([t for row in rows for t in row.ids[row.prompt :]])
        with ExitStack() as stack:
            # Attached first: what a request says is encoded by blocks that still run.
            if edit is not None:
                stack.enter_context(Attachment(self._model, [edit], encode=self.encode))
            stack.enter_context(replay(blocks, (hidden,) if self._tuple else hidden))
            stack.enter_context(self._only(said.to(ids.device)))
            if self.half:
                # From the site on, for the map itself is float32: its hook comes before this one.
                low = torch.autocast(ids.device.type, torch.bfloat16)
                site = blocks[-1].module
                enter = site.register_forward_hook(lambda *_: stack.enter_context(low) and None)
                stack.callback(enter.remove)
            logits = self._backend._logits(ids, mask, longest).float()
        nats = nn.functional.cross_entropy(
            logits.squeeze(0), answers.to(logits.device), reduction="none"
        )
        return torch.stack([-part.mean() for part in torch.split(nats, counts)])

    @contextmanager
    def _only(self, said: Tensor) -> Iterator[None]:
        """Logits of the marked places of ``[items, columns]`` alone, as one sequence of them all.

        No row of padding is multiplied with the vocabulary, and the others in one product: of a
        slice of a batch it would be one for each item, which takes half as long again.
        """
        head = self._model.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, given: (given[0][said].unsqueeze(0),))
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _plain(self, items: Sequence[int]) -> list[Tensor]:
        """What the plain model hands on at the site, ``[tokens, d]`` of each item."""
        missing = [n for n in dict.fromkeys(items) if n not in self._entering]
        made = dict(self._entering)
        for part in self._parts(missing):
            rows = [self._rows[missing[place]].ids[:-1] for place in part]
            ids, mask = self._backend._pad(rows, side="left")
            deepest = self._model.layout.blocks[self._cut]
            with tap(deepest) as held, until(deepest.module):
                self._model.model.base_model(
                    ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
                )
            self._tuple = isinstance(held[0], tuple)
            whole = held[0][0] if self._tuple else held[0]
            for place, row, h in zip(part, rows, whole, strict=True):
                own = h[len(h) - len(row) :].clone()
                made[missing[place]] = own
                if self._kept + own.nbytes <= KEEP:
                    self._kept += own.nbytes
                    self._entering[missing[place]] = own
        return [made[n] for n in items]
