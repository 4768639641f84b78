"""The vLLM engine, offline: answers, scores and recordings at serving speed.

What vLLM does not give, whole distributions for a divergence and gradients for a fit, runs on the
same model in transformers beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from innsteer.backends.base import Completion, Progress, Prompt, Sampling, silent
from innsteer.backends.engine import as_text
from innsteer.backends.hf import HF, Scored
from innsteer.backends.memo import Memo
from innsteer.errors import MissingPackage
from innsteer.interventions import Edit
from innsteer.models import Encoded, load_model
from innsteer.models.smollm2 import smollm2_folder
from innsteer.site import Site


class VLLM(HF):
    """Runs a model through vLLM, under edits, and is an HF backend for all else.

    Args:
        source: as for ``load_model``: a folder, a Hub id or ``"smollm2"``.
        dtype: of both. untested: run vLLM where no test has.
        memo: see HF. engine: vLLM's own arguments, such as ``max_model_len``.

    Raises:
        MissingPackage: vllm is not installed. RefusedError: it would not steer right.
    """

    name = "vllm"

    def __init__(
        self,
        source: str | Path = "smollm2",
        *,
        dtype: str = "float32",
        untested: bool = False,
        memo: Memo | None = None,
        **engine: Any,
    ) -> None:
        super().__init__(load_model(source, dtype=dtype), memo=memo)
        try:
            from innsteer.backends.vllm_plugin.offline import Runner, uncompiled
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "vllm":
                raise
            raise MissingPackage("vllm", "the vllm backend", "vllm") from error
        home = smollm2_folder() if str(source) == "smollm2" else source
        layers = len(self.model.layout.blocks)
        self._engine = Runner(home, layers=layers, dtype=dtype, untested=untested, **engine)
        uncompiled(self.model.model)

    def key(self, call: str, *given: Any, edits: Sequence[Edit] = ()) -> list[Any]:
        """See ``Engine.key``; what one engine computed is not the other's."""
        found = super().key(call, *given, edits=edits)
        return [*found, self.name] if found else found

    # --- through the engine ----------------------------------------------------------------------

    def _generate(
        self,
        prompts: Sequence[Prompt],
        edits: Sequence[Edit],
        sampling: Sampling,
        progress: Progress,
    ) -> list[Completion]:
        encoded = [self.model.encode(prompt.conversation) for prompt in prompts]
        progress("generate", 0, len(prompts))
        said = self._run(encoded, range(len(prompts)), edits, sampling)
        progress("generate", len(prompts), len(prompts))
        return [
            Completion(
                item=prompt.item,
                kind="sample",
                prompt=as_text(prompt.conversation),
                text=self.model.decode(one.ids).strip(),
                seed=sampling.seed,
                tokens=len(one.ids),
                steered=one.steered,
            )
            for prompt, one in zip(prompts, said, strict=True)
        ]

    def score_encoded(
        self,
        rows: Sequence[Encoded],
        edits: Sequence[Edit] = (),
        *,
        owners: Sequence[int] | None = None,
        progress: Progress = silent,
    ) -> list[Scored]:
        """See ``HF.score_encoded``."""
        progress("score", 0, len(rows))
        said = self._run(rows, range(len(rows)) if owners is None else owners, edits, None)
        progress("score", len(rows), len(rows))
        return [Scored(one.scores, one.greedy, one.steered) for one in said]

    def _continued(
        self, ids: Sequence[Sequence[int]], sampling: Sampling, progress: Progress
    ) -> list[list[int]]:
        progress("reference", 0, len(ids))
        rows = [Encoded(tuple(row), len(row), ()) for row in ids]
        said = self._run(rows, range(len(rows)), (), sampling)
        progress("reference", len(ids), len(ids))
        return [one.ids for one in said]

    def _read(
        self,
        sequences: Sequence[Sequence[int]],
        picks: Sequence[tuple[int, Sequence[int]]],
        sites: Sequence[Site],
        seen: dict[Site, Tensor],
        padding_side: str,
    ) -> dict[str, Tensor]:
        if any(site.stream != "residual" for site in sites):
            return super()._read(sequences, picks, sites, seen, padding_side)
        rows = self._engine.read(sequences, [site.layer for site in sites])
        return {
            str(site): torch.stack(
                [rows[row][site.layer][list(tokens)].mean(0) for row, tokens in picks]
            )
            for site in sites
        }

    def _run(
        self,
        rows: Sequence[Encoded],
        owners: Sequence[int],
        edits: Sequence[Edit],
        sampling: Sampling | None,
    ) -> list[Any]:
        """Requests for rows, steered as the prompts that own them; no sampling: scored."""
        each = [edit.rows(max(owners, default=0) + 1).tolist() for edit in edits]
        coefs = [[coef[i] for coef in each] for i in owners]
        if sampling is None:
            how: list[dict[str, Any]] = [{"max_tokens": 1, "prompt_logprobs": 0}] * len(rows)
        else:
            how = [self._sampled(sampling, number) for number in range(len(rows))]
        return self._engine.run(rows, edits, coefs, how)

    def _sampled(self, sampling: Sampling, number: int) -> dict[str, Any]:
        """What vLLM is to do; a seed only where something is drawn."""
        seed = sampling.seed * 1_000_003 + number
        return {
            "max_tokens": sampling.new_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": sorted(self.model.stop_ids),
            **({"seed": seed} if sampling.temperature else {}),
        }
