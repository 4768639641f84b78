"""Contenders: the rows of a comparison, and on what each can be fitted."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal

from innsteer import shelf
from innsteer.backends.lora import LoRATraining
from innsteer.contrast import Contrast
from innsteer.errors import InputError, UnknownName
from innsteer.fitting import require_contrasts
from innsteer.report.figures import PLAIN, RANDOM
from innsteer.steerer import Steerer, get

SHUFFLED, LORA = "shuffled-labels", "lora"
Input = Literal["classes", "target", "model", ""]


@dataclass(frozen=True)
class Contender:
    """One row of the table: a method with its fields, and what it is fitted on.

    Attributes:
        method: of the shelf; or one of ``unsteered``, ``prompt-only``, ``random-direction``,
            ``shuffled-labels`` (DiffMean whose pairs are swapped at random) and ``lora``.
        input: ``classes`` (recorded rows, as published), ``target`` (rows that seek the target),
            ``model`` (a fit through it); columns that no ranking mixes.
        fields: of the method; of ``LoRATraining``.
        alone: at one layer, where the method has a rule of its own among all of them.
    """

    method: str
    input: Input = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False

    @classmethod
    def of(
        cls,
        method: str,
        /,  # a field may have this name: that of the method behind a gate
        input: str = "",  # noqa: A002
        *,
        alone: bool = False,
        **fields: Any,
    ) -> "Contender":
        """A contender whose fields are valid and whose input suits it; default: as published.

        Raises:
            UnknownName: no such method or field. InputError: an input that it cannot take.
        """
        if method in (*PLAIN, RANDOM, SHUFFLED):
            if input or fields or alone:
                raise InputError(f"{method!r} with an input or fields", expected="neither")
            return cls(method)
        if method == LORA:
            known = [one.name for one in dataclasses.fields(LoRATraining)]
            for name in fields:
                if name not in known:
                    raise UnknownName("field of a LoRA:", name, known)
            if input not in ("", "model") or alone:
                raise InputError("a LoRA on rows or at one layer", expected="input 'model'")
            LoRATraining(**fields)
            return cls(method, "model", fields)
        steerer = get(method, **fields)
        if alone and steerer.sites == "any":
            raise InputError(
                f"{method!r} at one layer", expected="a method with a rule of its own among layers"
            )
        usual = inputs(steerer)
        chosen = input or usual[0]
        if chosen not in usual:
            raise InputError(
                f"input {chosen!r} for {method!r}", expected=" or ".join(map(repr, usual))
            )
        return cls(method, chosen, fields, alone)

    @property
    def name(self) -> str:
        """What tables call it.

        >>> Contender.of("ridge", "target", grid=[1.0]).name
        'ridge grid=[1.0] on target'
        """
        own = [f"{key}={value}" for key, value in self.fields.items()]
        name = " ".join([self.method, *own]) + (" on target" if self.input == "target" else "")
        return name + (" at one layer" if self.alone else "")

    @property
    def dialled(self) -> bool:
        """Whether it has a strength."""
        return self.method not in PLAIN

    @cached_property
    def steerer(self) -> Steerer:
        """The method; DiffMean for shuffled labels and (never fitted) the random direction.

        A LoRA and the plain arms have none.
        """
        controls = (RANDOM, SHUFFLED)
        return get("diffmean" if self.method in controls else self.method, **self.fields)

    @property
    def choices(self) -> dict[str, Sequence[Any]]:
        """What validation chooses from: the method's choices, but for what this row names."""
        if not self.dialled or self.method == LORA:
            return {}
        known = self.steerer.choices
        return {name: values for name, values in known.items() if name not in self.fields}

    @property
    def settings(self) -> dict[str, Any]:
        """Every field of what is fitted, defaults too."""
        if not self.dialled:
            return {}
        return vars(LoRATraining(**self.fields) if self.method == LORA else self.steerer)


def inputs(steerer: Steerer) -> tuple[Input, ...]:
    """What a method can be fitted on, as published first.

    Raises:
        InputError: it learns from concepts in words, which no task of a comparison has.
    """
    require_contrasts(
        steerer, "a contender", "compare its responses with innsteer generate --concept"
    )
    if steerer.through:
        return ("model",)
    if steerer.sites == "heads":
        return ("classes",)  # what seeks the target is made at the outputs of blocks
    return ("target",) if "unmoved" in steerer.needs else ("classes", "target")


def always() -> list[Contender]:
    """The arms that stand in every table; prompt-only where an instruction is known."""
    return [Contender(name) for name in (*PLAIN, RANDOM, SHUFFLED)]


def contenders(tasks: Sequence[Contrast]) -> list[Contender]:
    """Every method of the shelf on every input that it takes; one with a rule among layers twice.

    Methods that learn from concepts in words are left out: a task has none. Rows that seek the
    target are taken where all tasks are choices, a LoRA where peft is installed.
    """
    found: list[Contender] = []
    choices = all(task.kind == "choice" for task in tasks)
    for name in shelf.names():
        if "concepts" in get(name).needs:
            continue  # it learns from another kind of table
        found += [
            Contender.of(name, one) for one in inputs(get(name)) if choices or one != "target"
        ]
        if get(name).sites != "any":
            found.append(Contender.of(name, alone=True))
    if choices:
        found.append(Contender.of("innsteer", objective="target"))
    if find_spec("peft"):
        found.append(Contender.of(LORA))
    return found
