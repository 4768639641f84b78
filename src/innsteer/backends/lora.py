"""LoRA, the arm that changes weights: adapters by peft, their scale is the strength.

No intervention: it moves every token of the prompt as well, so nothing computed below it can be
kept. It stands in comparisons beside the steerers, trained by the same trainer or by anyone.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from innsteer.backends.through import Through
from innsteer.errors import InputError, MissingPackage, UnknownName
from innsteer.models import LanguageModel
from innsteer.steerer import tensor_bytes
from innsteer.training import LOSSES, settings, train_through

WHOLE = 4096
"""Tokens per pass; all of a prompt's are computed."""


class LoRA(nn.Module):
    """Low-rank adapters in a model's linear maps: W' = W + strength * (alpha / r) * B A.

    They are placed in the model itself and are off but inside ``at``; ``remove`` takes them out.
    B starts at 0, so an untrained LoRA changes nothing at any strength. Its parameters are those of
    the adapters alone.

    Args:
        model: of ``load_model``; its own weights are frozen.
        rank: r of A ``[r, d_in]`` and B ``[d_out, r]``.
        alpha: the scale at strength 1 is alpha / r.
        targets: names of the linear maps, in every block.
        seed: of A.
        config: a ``peft.LoraConfig`` in place of rank, alpha and targets.

    Raises:
        MissingPackage: peft is not installed.
        InputError: the model has none of the targets, or adapters already.

    Source: LoRA: Low-Rank Adaptation of Large Language Models, eq. 3,
    https://arxiv.org/abs/2106.09685
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        rank: int = 8,
        alpha: int = 16,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        seed: int = 0,
        config: Any = None,
    ) -> None:
        super().__init__()
        peft = _peft()
        config = config or peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
        kind = peft.tuners.lora.LoraLayer
        if any(isinstance(part, kind) for part in model.model.modules()):
            raise InputError(
                f"a LoRA for {model.name!r}, which has adapters already",
                expected="the plain model",
                remedy="remove() the first, or merge_and_unload() it",
            )
        _ = model.fingerprint  # that of the model, taken before there is more in it
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                placed = peft.get_peft_model(model.model, config)
            except ValueError as error:
                raise InputError(
                    f"adapters for {config.target_modules}: {error}",
                    expected="names of linear maps of the model",
                ) from error
        # In a tuple: as a submodule it would bring the whole model's parameters along.
        self._peft: tuple[Any] = (placed.eval(),)
        self._layers = [part for part in placed.modules() if isinstance(part, kind)]
        self.weights = nn.ParameterList(p for p in placed.parameters() if p.requires_grad)
        self._units = [layer.scaling["default"] for layer in self._layers]
        self._set(0.0)

    @classmethod
    def load(cls, model: LanguageModel, folder: str | Path) -> Self:
        """Adapters as PEFT saves them: ``adapter_config.json`` and ``adapter_model.safetensors``.

        Raises:
            MissingPackage: peft is not installed.
            InputError: the folder holds no LoRA in safetensors, one that changes more than linear
                maps, or one of another model.
        """
        path, peft = Path(folder), _peft()
        weights = path / "adapter_model.safetensors"
        if not (path / "adapter_config.json").is_file() or not weights.is_file():
            raise InputError(
                f"no LoRA in safetensors in {path}",
                expected="a folder with adapter_config.json and adapter_model.safetensors",
                remedy="peft_model.save_pretrained(folder) makes both; no pickle (.bin) is read",
            )
        try:
            config = peft.PeftConfig.from_pretrained(str(path))
            tensors = load_file(weights)
        except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
            raise InputError(f"adapters in {path} cannot be read: {error}") from error
        if config.peft_type != "LORA":
            raise InputError(f"adapters of {config.peft_type.value} in {path}", expected="a LoRA")
        more = [
            name
            for name in ("modules_to_save", "trainable_token_indices")
            if getattr(config, name, None)
        ]
        if more or config.bias != "none":
            raise InputError(
                f"a LoRA with {', '.join(more) or 'biases'} in {path}",
                expected="low-rank adapters alone: nothing else has a strength",
            )
        config.inference_mode = False  # else its weights are no parameters that can be told
        trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None
        lora = cls(model, config=config)
        own = peft.get_peft_model_state_dict(lora._peft[0], save_embedding_layers=False)
        apart = sorted(own.keys() ^ tensors.keys())
        apart += [name for name in own if own[name].shape != tensors.get(name, own[name]).shape]
        if apart:
            lora.remove()
            raise InputError(
                f"the LoRA in {path} does not fit {model.name!r}: {len(apart)} of its tensors are "
                f"missing, unknown or of another shape, {apart[0]} among them",
                expected=f"the model that it was trained on, {trained_on!r}",
            )
        peft.set_peft_model_state_dict(lora._peft[0], tensors)
        return lora

    @property
    def identity(self) -> str:
        """SHA-256 of scales and weights."""
        found = hashlib.sha256(repr(self._units).encode())
        for content in tensor_bytes(self.weights):
            found.update(content)
        return found.hexdigest()

    def _set(self, strength: float) -> None:
        for layer, unit in zip(self._layers, self._units, strict=True):
            layer.enable_adapters(strength != 0)
            layer.scaling["default"] = strength * unit
        # Off, peft also takes their gradients away.
        self.weights.requires_grad_(True)

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """The model with its adapters at a strength; 0 = as it was, bit for bit."""
        self._set(strength)
        try:
            yield
        finally:
            self._set(0.0)

    def remove(self) -> None:
        """Take the adapters out of the model."""
        self._peft[0].unload()


def _peft() -> Any:
    """The package peft."""
    try:
        import peft
    except ImportError as error:
        raise MissingPackage("peft", "LoRA", "peft") from error
    return peft


class Adapted(Through):
    """A run whose edits are a LoRA's: whole prompts, each row at its own strength of one behaviour.

    Args:
        run: what is asked; its kept prefixes serve the unsteered model.
        held: so many validation items at most, 0 = all: whole prompts take long.
    """

    def __init__(self, run: Through, held: int = 0) -> None:
        vars(self).update(vars(run))
        self._held = held

    def items(self, split: str = "train", behaviour: str | None = None) -> list[int]:
        """Numbers of the items of a part; of validation only every n-th where ``held`` says so."""
        found = super().items(split, behaviour)
        every = -(-len(found) // self._held) if split == "validation" and self._held else 1
        return found[::every]

    def _parts(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Places in ``numbers``, in passes of sequences of near-equal length."""
        lengths = [len(self._sequences[number].ids) for number in numbers]
        part: list[int] = []
        for place in sorted(range(len(numbers)), key=lambda place: lengths[place]):
            if part and (len(part) + 1) * lengths[place] > WHOLE:
                yield part
                part = []
            part.append(place)
        if part:
            yield part

    def _run(
        self, numbers: Sequence[int], interventions: Any, coef: Tensor, *, leaf: bool = False
    ) -> Tensor:
        """Logits ``[batch, steered tokens, vocabulary]``, every token under the adapters."""
        if interventions is None:
            return super()._run(numbers, None, coef, leaf=leaf)
        assert isinstance(interventions, LoRA) and coef.shape[-1] == 1
        found: dict[int, Tensor] = {}
        for strength in sorted(set(coef[:, 0].tolist())):
            rows = [row for row, value in enumerate(coef[:, 0].tolist()) if value == strength]
            with interventions.at(strength):
                logits = self._whole([numbers[row] for row in rows])
            found |= dict(zip(rows, logits, strict=True))
        return nn.utils.rnn.pad_sequence([found[row] for row in range(len(numbers))], True)

    def _whole(self, numbers: Sequence[int]) -> list[Tensor]:
        """Logits of each sequence's steered tokens; what all sequences share runs once."""
        sequences = [self._sequences[number] for number in numbers]
        base, head = self._model.model.base_model, self._model.model.get_output_embeddings()
        cache = DynamicCache()
        ids, mask = self._backend._pad([s.ids[self._shared :] for s in sequences], side="right")
        if self._shared:
            first = torch.tensor([sequences[0].ids[: self._shared]], device=ids.device)
            base(first, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(sequences))
            mask = torch.cat([mask.new_ones(len(sequences), self._shared), mask], 1)
        hidden = base(
            ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1)[:, self._shared :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        own = [
            hidden[row, s.start - self._shared : len(s.ids) - self._shared]
            for row, s in enumerate(sequences)
        ]
        return list(torch.split(head(torch.cat(own)), [len(part) for part in own]))


@dataclass(frozen=True)
class LoRATraining:
    """How a LoRA is trained: by the trainer of all methods, stopped by validation.

    Attributes:
        rank: r. alpha: the scale at strength 1 is alpha / r; default: 2 r.
        loss: ``target``, ``said`` or ``odds``, see ``training``.
        learning_rate, steps: AdamW, cosine decay; the best validation state is kept.
        batch, unmoved_batch: smaller than those of maps, because every token of a prompt runs.
        held: so many validation items at most.
        unmoved: weight of the divergence on unmoved sequences.

    Raises:
        UnknownName: of a loss. InputError: a number out of range.
    """

    rank: int = 8
    alpha: int | None = None
    loss: str = "said"
    learning_rate: float = 1e-3
    steps: int = 90
    batch: int = 8
    unmoved_batch: int = 4
    held: int = 48
    unmoved: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UnknownName("loss", self.loss, list(LOSSES))
        for name in ("rank", "alpha", "steps", "batch"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 100_000:
                raise InputError(f"{name}={value}", expected="1 to 100000")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"learning_rate={self.learning_rate}", expected="above 0, below 1")
        if min(self.unmoved, self.unmoved_batch, self.held) < 0:
            raise InputError("unmoved, unmoved_batch or held below 0", expected="at least 0")

    def fit(
        self,
        model: LanguageModel,
        run: Through,
        *,
        seed: int = 0,
        watch: Callable[[LoRA], None] | None = None,
    ) -> LoRA:
        """Place adapters in the model and train them on a run's items; ``remove`` takes them out.

        Args:
            watch: called with the adapters before every validation.

        Raises:
            MissingPackage: peft is not installed. InputError: a loss that is not finite.
        """
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        lora = LoRA(model, rank=self.rank, alpha=alpha, seed=seed)
        try:
            train_through(
                Adapted(run, held=self.held),
                lora,  # type: ignore[arg-type]
                loss=LOSSES[self.loss],
                seed=seed,
                watch=None if watch is None else lambda _: watch(lora),
                **settings(self),
            )
        except BaseException:
            lora.remove()
            raise
        return lora
