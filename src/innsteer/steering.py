"""Steering: the artifact. What is fitted, calibrated, saved as a folder, loaded and applied."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jinja2 import Environment, PackageLoader
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from innsteer import steerer as contract
from innsteer.calibration import Calibration, parse_number
from innsteer.errors import FormatError, InputError, MismatchError
from innsteer.files import (
    canonical,
    fresh_folder,
    read_json,
    sha256_file,
    write_json,
    write_tensors,
    write_text,
)
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.models import LanguageModel, hub_id
from innsteer.models.fingerprint import Fingerprint, fingerprint
from innsteer.site import Site, Span, Where
from innsteer.steerer import Interventions, Steerer, tensor_bytes
from innsteer.tokens import Parameters

FORMAT = 1
MAX_SIZE = 1_000_000
UNCHECKED = 1 << 24
HEADER, TENSORS, CARD, SEAL = (
    "steering.json",
    "steering.safetensors",
    "README.md",
    "steering.seal.json",
)


Strength = float | str | None | Sequence[float] | Mapping[str, float | str] | Tensor
"""One for all sequences, one number or row per sequence, or one of each behaviour in a mix."""


@dataclass(frozen=True)
class Steering:
    """A fitted steering, ready to be applied, composed, saved and served.

    Attributes:
        steerer: the method with its fields.
        interventions: the fitted map of each site.
        behaviours: in the column order of ``coef``.
        where: which tokens are steered.
        base: fingerprint of the model, tokenizer and chat template that it was fitted on.
        calibration: behaviour -> its dose-response curve; empty until tuned.
        provenance: contrast hash, seed, versions, what fitting found.
        card: behaviour -> evaluation figures, for the model card.
        leading: the behaviour that is meant where none is named; "" = the first. Not saved.
        parameters: what requests tell the maps where they say nothing else; see ``told``. Part of
            the identity. Not saved.
    """

    steerer: Steerer
    interventions: Interventions
    behaviours: tuple[str, ...]
    where: Where = field(default_factory=Where)
    base: Fingerprint | None = None
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    leading: str = ""
    parameters: Parameters = field(default_factory=dict)

    # --- applying --------------------------------------------------------------------------------

    def resolve(self, strength: float | str | None = None, behaviour: str | None = None) -> float:
        """A strength as a number: a number, "budget", "0.05nat"; None = budget if tuned, else 1.

        Raises:
            InputError: a calibrated strength of a steering that was not tuned.
        """
        curve = self.calibration.get(self._behaviour(behaviour))
        if strength is None:
            return curve.strength if curve else 1.0
        if curve:
            return curve.resolve(strength)
        if isinstance(strength, str) and (strength == "budget" or "nat" in strength):
            raise InputError(
                f"strength {strength!r} of {self._behaviour(behaviour)!r}, which was not tuned",
                expected="a number",
                remedy="tune it first: innsteer tune, or innsteer.tune(...)",
            )
        return parse_number(str(strength))

    @property
    def curve(self) -> Calibration | None:
        """The dose-response of the leading behaviour, once it is tuned."""
        return self.calibration.get(self._behaviour(None))

    def of(self, behaviour: str) -> "Steering":
        """The same steering, with this behaviour meant where none is named.

        Raises:
            InputError: it has no such behaviour.
        """
        return replace(self, leading=self._behaviour(behaviour))

    def told(self, **parameters: str) -> "Steering":
        """The same steering with its parameters given: ``told(concept="speaks like a pirate")``.

        Raises:
            InputError: it asks for no such parameter.
        """
        asks = self.interventions.asks
        if odd := sorted(set(parameters) - set(asks)):
            raise InputError(
                f"parameter {odd[0]!r} of a steering by {self.steerer.name!r}",
                expected=", ".join(asks) or "none: it takes none",
            )
        return replace(self, parameters={**self.parameters, **parameters})

    def edit(
        self,
        strength: Strength = None,
        *,
        behaviour: str | None = None,
        parameters: Sequence[Parameters] = (),
    ) -> Edit:
        """The edit at a strength: one for all sequences, or one number (or row) per sequence.

        Args:
            strength: a single strength moves ``behaviour`` (the leading one by default); a mapping
                mixes behaviours, ``{"wealth": "budget", "power": 0.5}``; a sequence gives one
                number per sequence of the batch; a tensor ``[rows, k]`` a mix per sequence.
            parameters: what each sequence tells the maps, beside or instead of the steering's own.

        Raises:
            InputError: an unknown behaviour, a calibrated strength of one that was not tuned,
                coefficients of another width, or parameters that the maps do not ask for, or miss.
        """
        given = [{**self.parameters, **one} for one in parameters or ({},)]
        coef = self._coefficients(strength, behaviour)
        return Edit(self.interventions, coef, self.where, tuple(given) if any(given) else ())

    def _coefficients(self, strength: Strength, behaviour: str | None) -> Tensor:
        """A strength as coefficients, ``[k]`` or one row per sequence."""
        k = len(self.behaviours)
        if isinstance(strength, Mapping):
            if not strength or not all(strength) or behaviour is not None:
                beside = f" beside behaviour {behaviour!r}" if behaviour else ""
                raise InputError(
                    f"the mix {dict(strength)}{beside}",
                    expected="a strength for each behaviour, and no other behaviour beside",
                )
            mix = torch.zeros(k)
            for name, value in strength.items():
                mix[self.behaviours.index(self._behaviour(name))] = self.resolve(value, name)
            return mix
        column = self.behaviours.index(self._behaviour(behaviour))
        if isinstance(strength, Tensor):
            if not strength.ndim or strength.shape[-1] != k:
                raise InputError(
                    f"coefficients of shape {tuple(strength.shape)}",
                    expected=f"[rows, {k}], a column for each of {', '.join(self.behaviours)}",
                )
            return strength.float()
        if isinstance(strength, Sequence) and not isinstance(strength, str):
            values = [self.resolve(value, behaviour) for value in strength]
            coef = torch.zeros(len(values), k)
            coef[:, column] = torch.tensor(values)
            return coef
        coef = torch.zeros(k)
        coef[column] = self.resolve(strength, behaviour)
        return coef

    def on(
        self,
        model: LanguageModel | nn.Module,
        strength: Strength = None,
        *,
        behaviour: str | None = None,
        parameters: Sequence[Parameters] = (),
        prompt_lengths: Sequence[int] | None = None,
        turns: Sequence[Sequence[Span]] | None = None,
        allow_mismatch: bool = False,
    ) -> Attachment:
        """Steer your own code: ``with steering.on(model): model.generate(...)``.

        Args:
            model: a LanguageModel, or a Hugging Face model. Only the first can be checked against
                the tokenizer and template that the steering was fitted with; structure and weights
                are checked either way.
            strength: a number, one per sequence, "budget", "0.05nat", or a mix of behaviours;
                default: the budget if tuned, else 1. parameters: see ``edit``, of both.
            prompt_lengths, turns: see ``Attachment``.
            allow_mismatch: apply to a model that it was not fitted on.

        Raises:
            MismatchError: another model. NothingSteeredError: on leaving, when nothing was steered.
        """
        if not allow_mismatch:
            self.check(model)
        edits = [self.edit(strength, behaviour=behaviour, parameters=parameters)]
        return Attachment(model, edits, prompt_lengths=prompt_lengths, turns=turns)

    def check(self, model: LanguageModel | nn.Module) -> None:
        """Refuse a model other than the one that the steering was fitted on.

        Without a tokenizer, structure and weights are what is compared.

        Raises:
            MismatchError: it names what differs.
        """
        if self.base is None:
            return
        if isinstance(model, LanguageModel):
            name, differing = model.name, self.base.differs(model.fingerprint)
        else:
            name, own = type(model).__name__, _of_model(model)
            differing = [part for part in self.base.differs(own) if part in ("base", "weights")]
        if differing:
            raise MismatchError(
                f"this steering was fitted on {self.base.name!r}, and {name!r} has another "
                + ", ".join(differing),
                expected="the same base model, tokenizer and chat template",
                remedy="fit it on this model; or pass allow_mismatch=True and measure again",
            )

    def _behaviour(self, behaviour: str | None) -> str:
        name = behaviour or self.leading or self.behaviours[0]
        if name not in self.behaviours:
            raise InputError(f"behaviour {name!r}", expected="one of " + ", ".join(self.behaviours))
        return name

    # --- identity --------------------------------------------------------------------------------

    @property
    def recipe(self) -> dict[str, Any]:
        """What the applied map depends on, but for its tensors."""
        return {
            "format": FORMAT,
            "method": self.steerer.name,
            "config": _config(self.steerer),
            "sites": [str(site) for site in self.interventions],
            "widths": [part.width for _, part in self.interventions.items()],
            "sizes": self.interventions.sizes,
            "where": str(self.where),
            "behaviours": list(self.behaviours),
            "base": asdict(self.base) if self.base else None,
            **({"parameters": dict(self.parameters)} if self.parameters else {}),
        }

    @property
    def identity(self) -> str:
        """SHA-256 of recipe and tensors: salts caches and stands on receipts.

        Times, machine, calibration, evaluation and the path that the base model came from are not
        part of it, so the same fit has the same identity; the seal covers those.
        """
        recipe = self.recipe
        if recipe["base"]:
            recipe["base"].pop("name")
        digest = hashlib.sha256(canonical(recipe))
        for part in tensor_bytes(self.interventions):
            digest.update(part)
        return digest.hexdigest()

    # --- the folder ------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, replace: bool = False) -> Path:
        """Write the artifact folder, whole or not at all.

        Raises:
            InputError: the folder exists and ``replace`` is off; or the steering was told its
                parameters, which are a request's.
        """
        if self.parameters:
            raise InputError(
                f"a steering that was told {dict(self.parameters)}, to be saved",
                expected="one that leaves its parameters to each request",
                remedy="save the steering that told(...) was called on",
            )
        header = self.recipe | {
            "identity": self.identity,
            "calibration": {name: c.to_json() for name, c in self.calibration.items()},
            "provenance": dict(self.provenance),
            "card": dict(self.card),
        }
        with fresh_folder(folder, replace=replace) as staging:
            tensors = {
                name: tensor.detach().cpu().clone()
                for name, tensor in self.interventions.state_dict().items()
            }
            write_tensors(staging / TENSORS, tensors)
            write_json(staging / HEADER, header)
            write_text(staging / CARD, self.model_card())
            files = {name: sha256_file(staging / name) for name in (HEADER, TENSORS, CARD)}
            write_json(staging / SEAL, {"files": files})
        return Path(folder)

    def model_card(self) -> str:
        """The artifact's README.md."""
        pages = Environment(
            loader=PackageLoader("innsteer", "templates"),
            autoescape=False,  # Markdown, not HTML
            trim_blocks=True,
            lstrip_blocks=True,
        )
        # The Hub refuses a card whose base model is no id of its own.
        base_id = hub_id(self.base.name) if self.base else None
        card = pages.get_template("card.md.j2")
        return card.render(steering=self, identity=self.identity, base_id=base_id)

    @classmethod
    def load(cls, folder: str | Path) -> "Steering":
        """Read an artifact folder; nothing in it is executed.

        Raises:
            FormatError: a file is missing, altered, damaged, of another format, or out of bounds.
        """
        folder = Path(folder)
        _check_seal(folder)
        header = _parse(folder / HEADER)
        try:
            steering = cls._read(header, _tensors(folder / TENSORS))
        except FormatError:
            raise
        # Whatever a hostile header makes the method's own checks and torch say.
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise FormatError(f"{folder / HEADER}: method {header.method!r}: {error}") from error
        if steering.identity != header.identity:
            raise FormatError(
                f"{folder}: its identity is {steering.identity[:12]}, not the stated "
                f"{header.identity[:12]}",
                remedy="fetch the artifact again",
            )
        return steering

    @classmethod
    def _read(cls, header: "_Header", tensors: dict[str, Tensor]) -> "Steering":
        """What header and tensors describe."""
        kind = type(contract.get(header.method, **header.config))
        steerer: Steerer = TypeAdapter(kind).validate_python(header.config)
        widths = dict(zip(map(Site.parse, header.sites), header.widths, strict=True))
        k = len(header.behaviours)
        _bounded(header, tensors)
        interventions = steerer.build(widths, k, header.sizes)
        _match(interventions, tensors)
        interventions.load_state_dict(tensors)
        return cls(
            steerer,
            interventions.eval().requires_grad_(False),
            tuple(header.behaviours),
            Where.parse(header.where),
            Fingerprint(**header.base) if header.base else None,
            {name: Calibration.from_json(data) for name, data in header.calibration.items()},
            header.provenance,
            header.card,
        )

    def with_card(self, card: Mapping[str, Any]) -> "Steering":
        """The same steering with an evaluation on its card; those of other behaviours stay."""
        return replace(self, card={**self.card, **card})

    def tuned(self, calibration: Mapping[str, Calibration], **provenance: Any) -> "Steering":
        """The same steering with calibration."""
        notes = dict(self.provenance) | provenance
        return replace(
            self, calibration=dict(self.calibration) | dict(calibration), provenance=notes
        )


_OWN: WeakKeyDictionary[nn.Module, Fingerprint] = WeakKeyDictionary()
_NO_TOKENIZER = SimpleNamespace(get_vocab=dict, special_tokens_map={})


def _of_model(model: nn.Module) -> Fingerprint:
    """Structure and weights of a model without a tokenizer, read once: it takes all the weights."""
    if model not in _OWN:
        _OWN[model] = fingerprint(model, _NO_TOKENIZER)
    return _OWN[model]


def _config(steerer: Steerer) -> dict[str, Any]:
    """The fields in their declared types: separation=2 and 2.0 are one steering, saved or not."""
    typed = TypeAdapter(type(steerer)).validate_python(
        asdict(steerer)  # type: ignore[call-overload]
    )
    return asdict(typed)  # type: ignore[call-overload,no-any-return]


class _Header(BaseModel):
    """steering.json, with bounds: a hostile file must not make us allocate or run anything."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int = Field(ge=FORMAT, le=FORMAT)
    method: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    config: dict[str, Any]
    sites: list[str] = Field(min_length=1, max_length=4096)
    widths: list[int] = Field(min_length=1, max_length=4096)
    sizes: dict[str, int]
    where: str
    behaviours: list[str] = Field(min_length=1, max_length=4096)
    base: dict[str, str] | None
    identity: str = Field(pattern=r"^[0-9a-f]{64}$")
    calibration: dict[str, dict[str, Any]]
    provenance: dict[str, Any]
    card: dict[str, Any]


def _parse(path: Path) -> _Header:
    """The header, checked."""
    try:
        header = _Header.model_validate(read_json(path, "a steering's header"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FormatError(f"{path}: {place}: {first['msg']}") from error
    numbers = [*header.widths, *header.sizes.values()]
    if len(header.sites) != len(header.widths) or not all(0 < n <= MAX_SIZE for n in numbers):
        raise FormatError(
            f"{path}: sizes {numbers}", expected=f"one width per site, each in 1..{MAX_SIZE}"
        )
    return header


def _check_seal(folder: Path) -> None:
    """Every byte of every file is the one that was saved."""
    files = read_json(folder / SEAL, "a steering folder's seal").get("files")
    if not isinstance(files, dict) or set(files) != {HEADER, TENSORS, CARD}:
        raise FormatError(f"{folder / SEAL} lists {files!r:.200}", expected="the folder's files")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink() or sha256_file(path) != digest:
            raise FormatError(
                f"{path} is missing or not the file that was saved (its SHA-256 differs)",
                remedy="fetch the artifact again; edits by hand are refused",
            )


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, all finite."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FormatError(f"{path}: {name} holds numbers that are not finite")
    return tensors


def _bounded(header: "_Header", tensors: Mapping[str, Tensor]) -> None:
    """A small file must not make us build something huge."""
    stored = max(sum(t.numel() for t in tensors.values()), UNCHECKED)
    longest = max((max(t.shape, default=0) for t in tensors.values()), default=0)
    fields = [v for v in header.config.values() if isinstance(v, int)]
    if (
        sum(header.widths) * len(header.behaviours) > stored
        or max(header.sizes.values(), default=0) > longest
        or max(fields, default=0) > MAX_SIZE
    ):
        raise FormatError(
            f"sizes {header.sizes or header.widths} of {len(header.behaviours)} behaviours beside "
            f"tensors of {stored} numbers",
            expected="those of the stored tensors",
        )


def _match(interventions: Interventions, tensors: Mapping[str, Tensor]) -> None:
    """The tensors are those of the built modules: same names, shapes and dtypes."""
    own = interventions.state_dict()
    if set(own) != set(tensors):
        odd = sorted(set(own) ^ set(tensors))[:3]
        raise FormatError(f"{TENSORS}: tensors differ from the method's: {', '.join(odd)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise FormatError(
                f"{TENSORS}: {name} is {tensor.dtype} {tuple(tensor.shape)}",
                expected=f"{own[name].dtype} {tuple(own[name].shape)}",
            )
