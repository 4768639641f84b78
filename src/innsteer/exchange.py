"""Vectors from other tools, and a steering as a vector for them, with what that loses, measured.

A map of any kind can be handed to a tool that only adds vectors: as the mean of what it adds. What
is lost is what made it more than a vector, and no file can say so; the measure here does.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from innsteer import __version__, steerer
from innsteer.backends.base import Progress, Sampling, silent
from innsteer.backends.engine import watch
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast
from innsteer.errors import (
    FormatError,
    InputError,
    MissingPackage,
    NothingSteeredError,
    RefusedError,
)
from innsteer.files import fresh_file, require_absent, sha256_file, write_tensors
from innsteer.hooks import Attachment
from innsteer.interventions import Edit, Shift
from innsteer.metrics import get as metric
from innsteer.models import LanguageModel
from innsteer.site import Site, Where
from innsteer.steerer import Interventions
from innsteer.steering import Steering, Strength
from innsteer.suites import behaviour as suites
from innsteer.tuning import control, control_meter, control_metric, require_own

PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
ITEMS = 48
"""Items whose rows make the mean vector, and validation items that measure it."""


# --- from other tools ----------------------------------------------------------------------------


def import_vector(
    model: LanguageModel,
    file: str | Path,
    *,
    layers: Sequence[int] = (),
    tensor: str | None = None,
    row: int | None = None,
    behaviour: str | None = None,
    where: Where | None = None,
) -> Steering:
    """A vector of another tool as a Steering: h' = h + strength * vector at each of its layers.

    A GGUF control vector (llama.cpp, repeng) names its layers itself: ``direction.N`` is added to
    the output of block N, counted from 0, at every token. In a safetensors file a tensor ``[d]``
    belongs to the layer that its name ends with, one without a number to ``layers``; a matrix
    ``[n, d]`` (an SAE's decoder, AxBench's or a probe's weights) gives one ``row``, at ``layers``.

    Args:
        model: that it shall steer; its width must be the vector's.
        layers: blocks from 0, where the file does not say; where it does, those that are meant.
        tensor: name of the tensor, where there are several and not all are meant.
        row: of a matrix.
        behaviour: name; default: the file's.
        where: default: every token for GGUF, as llama.cpp has it; else ``generated``.

    Returns:
        A Steering of the method ``diffmean``, whose map is such a shift; not tuned. Strength 1 is
        the vector as it is stored, whatever its length.

    Raises:
        RefusedError: a pickle. FormatError: a damaged file. InputError: another width, no layer, or
            a matrix without a row.

    Source: llama.cpp's control vectors, https://github.com/ggml-org/llama.cpp/pull/5970; repeng,
    https://github.com/vgel/repeng
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}", expected="a .gguf or .safetensors file")
    if path.suffix in PICKLES:
        raise RefusedError(
            f"{path.name} is a pickle, which may run any code when it is read",
            expected="a .safetensors or .gguf file",
            remedy="where you trust it: v = torch.load(FILE, weights_only=True), then "
            "safetensors.torch.save_file({'layer.13': v}, 'vector.safetensors')",
        )
    readers = {".gguf": _read_gguf, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise InputError(f"{path.name}", expected="a .gguf or .safetensors file")
    found = readers[path.suffix](path, tensor)
    vectors = _placed(found, path, layers, row)
    sites = {Site(layer): vector for layer, vector in vectors.items()}
    for site, vector in sites.items():
        model.layout.at(site)
        width = model.layout.width_of(site)
        if vector.shape != (width,) or not bool(torch.isfinite(vector).all()):
            raise InputError(
                f"{path.name} holds {tuple(vector.shape)} numbers for layer {site.layer}, or some "
                "that are not finite",
                expected=f"[{width}] finite ones, the width of {model.name!r}",
                remedy="is it another model's?",
            )
    method = steerer.get("diffmean")
    maps = method.build({site: len(vector) for site, vector in sites.items()})
    for site, vector in sites.items():
        part = maps[site]
        assert isinstance(part, Shift)
        part.shifts[0] = vector
    scope = where or Where("all" if path.suffix == ".gguf" else "generated")
    origin = {
        "file": path.name,
        "sha256": sha256_file(path),
        "norms": {str(site): round(float(vector.norm()), 6) for site, vector in sites.items()},
    }
    provenance = {"imported": origin, "innsteer": __version__}
    name = behaviour or path.stem
    return Steering(method, maps, (name,), scope, model.fingerprint, {}, provenance)


def _read_gguf(path: Path, tensor: str | None) -> dict[str, Tensor]:
    """The directions of a control vector."""
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise MissingPackage("gguf", path.name, "demo") from error
    try:
        reader = GGUFReader(str(path))
        names = [t.name for t in reader.tensors]
        # Named first: a whole model, given by mistake, must not be unpacked into memory.
        every = {
            t.name: dequantize(t.data, t.tensor_type)
            for t in reader.tensors
            if re.fullmatch(r"direction\.\d+", t.name) and tensor in (None, t.name)
        }
    # Whatever numpy and the reader say of a damaged file.
    except Exception as error:
        raise FormatError(f"{path.name} is no whole GGUF file ({error})") from error
    found = {
        name: torch.from_numpy(np.array(values, dtype=np.float32)).flatten()
        for name, values in every.items()
    }
    if not found:
        raise FormatError(
            f"{path.name} has the tensors {', '.join(names[:6]) or 'none'}",
            expected="direction.1, direction.2 ...: a control vector",
        )
    return found


def _read_safetensors(path: Path, tensor: str | None) -> dict[str, Tensor]:
    """Tensors of one or two axes."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if tensor in (None, name)]  # noqa: SIM118
            found = {name: file.get_tensor(name) for name in names}
            every = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} is no whole safetensors file ({error})") from error
    kept = {
        name: value.float()
        for name, value in found.items()
        if value.is_floating_point() and value.ndim in (1, 2)
    }
    if not kept:
        raise InputError(
            f"{path.name} has no vector {tensor!r}" if tensor else f"{path.name} has no vector",
            expected="one of " + ", ".join(every[:12]),
        )
    return kept


def _placed(
    found: dict[str, Tensor], path: Path, layers: Sequence[int], row: int | None
) -> dict[int, Tensor]:
    """Layer -> vector."""
    placed: dict[int, Tensor] = {}
    for name, value in found.items():
        vector = value
        if value.ndim == 2:
            rows = len(value)
            chosen = 0 if row is None and rows == 1 else row
            if chosen is None or not 0 <= chosen < rows:
                raise InputError(
                    f"row {row} of {name!r}, a matrix of {rows} rows",
                    expected=f"a row from 0 to {rows - 1}",
                )
            vector = value[chosen]
        own = re.search(r"(\d+)$", name)
        if own and value.ndim == 1:
            places = [int(own[1])] if not layers or int(own[1]) in layers else []
        elif len(found) == 1 and layers:
            places = list(layers)
        else:
            raise InputError(
                f"{path.name}: no layer for the tensor {name!r} of {len(found)}",
                expected="a name that ends with its layer, or one tensor and --layers",
                remedy="say which tensor is meant, and at which layers",
            )
        if twice := sorted(set(places) & set(placed)):
            raise InputError(
                f"{path.name} has several vectors for layer {twice[0]}, {name!r} among them",
                expected="one for each layer",
                remedy="say which tensor is meant",
            )
        placed |= dict.fromkeys(places, vector)
    if absent := [str(layer) for layer in layers if layer not in placed]:
        raise InputError(
            f"{path.name} has no vector for the layers {', '.join(absent)}",
            expected="some of " + ", ".join(sorted(found)),
        )
    return placed


# --- to other tools ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What a steering's effect becomes as a constant vector, on validation items.

    Attributes:
        control: of the real map. exported: of the vector, added at every token. unsteered: of none.
        kept: (exported - unsteered) / (control - unsteered).
        gap, low, high: exported - control, paired by item, with its 95 % interval.
        cost, exported_cost: mean nats per token on neutral prompts.
        n: items.
    """

    control: float
    exported: float
    unsteered: float
    kept: float
    gap: float
    low: float
    high: float
    cost: float
    exported_cost: float
    n: int

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)


def as_vector(
    model: LanguageModel | HF,
    steering: Steering,
    contrast: Contrast,
    strength: Strength = None,
    *,
    progress: Progress = silent,
) -> dict[Site, Tensor]:
    """The mean of what a steering adds at each site, over answers of the training part."""
    backend = HF.of(model)
    edit = _edit(steering, contrast, strength)
    items = contrast.train.subset(min(ITEMS, len(contrast.train)))
    sums: dict[Site, Tensor] = {}
    count = 0
    jobs = [
        backend.model.encode(item.prompt, answer=text)
        for item in items.items
        for text in (item.source, item.target)
        if text is not None
    ]
    sites = list(edit.interventions)
    layout = backend.model.layout
    for number, encoded in enumerate(jobs):
        progress("vector", number, len(jobs))
        ids = torch.tensor([encoded.ids], device=backend.model.device)
        attached = Attachment(
            backend.model, [edit], prompt_lengths=[encoded.prompt], turns=[encoded.turns]
        )
        with torch.no_grad(), watch(layout, sites) as before, attached, watch(layout, sites) as now:
            # Kept before the hooks of the edit: what they return is another tensor.
            backend.model.model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
            places = attached.trace.steered[0]
        for site in sites:
            moved = (now[site][0, places].float() - before[site][0, places].float()).sum(0).cpu()
            sums[site] = sums[site] + moved if site in sums else moved
        count += len(places)
    progress("vector", len(jobs), len(jobs))
    if not count:
        raise NothingSteeredError(
            "no token was steered, so there is no mean to export",
            expected="a strength other than 0, and answers in the steering's scope",
        )
    return {site: total / count for site, total in sums.items()}


def loss(
    model: LanguageModel | HF,
    steering: Steering,
    vectors: dict[Site, Tensor],
    contrast: Contrast,
    strength: Strength = None,
    *,
    progress: Progress = silent,
) -> Loss:
    """Control and cost of a steering and of vectors that stand for it, side by side."""
    backend = HF.of(model)
    items = contrast.validation.subset(min(ITEMS, len(contrast.validation)))
    real = _edit(steering, contrast, strength)
    constant = Edit(shifts(vectors), torch.ones(1), Where("all"))
    sites = list(real.interventions)
    score = metric(control_metric(items))
    found = {}
    for number, (name, edit) in enumerate(
        {"control": real, "exported": constant, "unsteered": steering.edit(0.0)}.items()
    ):
        progress("loss", number, 5)
        # Prompts are steered too by a vector at every token, so nothing below it may be kept.
        meter = control_meter(backend, items, sites if edit is not constant else [])
        found[name] = control(meter([edit]), items)
    values = {}
    for name, answers in found.items():
        own = score.score(answers)
        assert own is not None
        values[name] = own.value
    gap = score.difference(found["exported"], found["control"])
    assert gap is not None
    reference = backend.reference(suites.neutral("validation")[:24], Sampling(24, 1.0))
    costs = []
    for number, edit in enumerate((real, constant)):
        progress("loss", 3 + number, 5)
        kept = backend.meter(reference, sites if edit is not constant else [])
        costs.append(float(np.mean([v for c in kept([edit]) for v in c.values["kl"]])))
    effect = values["control"] - values["unsteered"]
    kept_share = (values["exported"] - values["unsteered"]) / effect if effect else 0.0
    progress("loss", 5, 5)
    return Loss(
        **values, kept=kept_share, gap=gap.value, low=gap.low, high=gap.high,
        cost=costs[0], exported_cost=costs[1], n=gap.n,
    )  # fmt: skip


def _edit(steering: Steering, contrast: Contrast, strength: Strength) -> Edit:
    """The edit of the contrast's own behaviour, or a mix."""
    require_own(steering, contrast)
    if isinstance(strength, Mapping):
        return steering.edit(strength)
    return steering.edit(strength, behaviour=contrast.behaviour)


def shifts(vectors: dict[Site, Tensor]) -> Interventions:
    """Vectors as constant shifts."""
    parts: dict[Site, Any] = {}
    for site, vector in vectors.items():
        parts[site] = Shift(len(vector))
        parts[site].shifts[0] = vector
    return Interventions(parts)


def export_vector(
    model: LanguageModel, vectors: dict[Site, Tensor], file: str | Path, *, note: str = ""
) -> Path:
    """Write vectors for other tools: a .gguf control vector, or a .safetensors of biases.

    The biases are those of the linear map that ends each block's MLP (or its attention, for a site
    there), by the model's own names: adding them to the checkpoint steers every token.

    Raises:
        InputError: the file exists, has another suffix, or a site has no place in it.
        RefusedError: biases for a model that changes its MLP's output before it is added.
    """
    path = require_place(file, vectors)
    broken = [str(site) for site, vector in vectors.items() if not torch.isfinite(vector).all()]
    if broken:
        raise InputError(f"vectors that are not finite at {', '.join(broken)}", expected="numbers")
    if path.suffix == ".gguf":
        with fresh_file(path) as staged:
            _write_gguf(model, vectors, staged)
    else:
        write_tensors(path, _biases(model, vectors), {"format": "pt", "note": note})
    return path


def require_place(file: str | Path, sites: Iterable[Site]) -> Path:
    """Refuse a file that cannot be written, or sites without a place in it: before any work."""
    path = Path(file).expanduser()
    require_absent(path)
    if path.suffix not in (".gguf", ".safetensors"):
        raise InputError(f"{path.name}", expected="a name that ends in .gguf or .safetensors")
    if not path.absolute().parent.is_dir():
        raise InputError(f"no folder {str(path.parent)!r}", expected="one that exists")
    if path.suffix == ".gguf":
        odd = [str(site) for site in sites if site.stream != "residual" or site.layer < 1]
        what = "outputs of blocks from 1 on: llama.cpp knows no others"
    else:
        known = ("residual", "attention", "mlp")
        odd = [str(site) for site in sites if site.stream not in known]
        what = "a block's output, its attention or its MLP, which a bias can stand for"
    if odd:
        raise InputError(f"the sites {', '.join(odd)} in {path.name}", expected=what)
    return path


def _write_gguf(model: LanguageModel, vectors: dict[Site, Tensor], path: Path) -> None:
    """A control vector as llama.cpp reads it."""
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise MissingPackage("gguf", path.name, "demo") from error
    writer = GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", str(model.model.config.model_type))
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for site, vector in sorted(vectors.items()):
        writer.add_tensor(f"direction.{site.layer}", vector.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # It writes tensors past Python, so that a full disk goes by unnoticed.
    try:
        _read_gguf(path, None)
    except FormatError as error:
        raise OSError(0, f"what was written is not whole ({error})") from error


def _biases(model: LanguageModel, vectors: dict[Site, Tensor]) -> dict[str, Tensor]:
    """The vectors as biases of linear maps, added to those that are there."""
    names = {module: name for name, module in model.model.named_modules()}
    found = {}
    for site, vector in vectors.items():
        block = model.layout.blocks[site.layer]
        part: Any = block.attention_out if site.stream == "attention" else _last_linear(block.mlp)
        _require_added(model, block.module, part, vector, site)
        key, old = f"{names[part]}.bias", getattr(part, "bias", None)
        if key not in found and old is not None:
            found[key] = old.detach().float().cpu()
        # A block's output and its MLP end in one bias.
        found[key] = (found[key] + vector if key in found else vector).contiguous()
    return found


def _last_linear(mlp: torch.nn.Module) -> torch.nn.Module:
    """The map whose output is the MLP's: its last leaf with a weight matrix."""
    leaves = [
        part
        for part in mlp.modules()
        if getattr(part, "weight", None) is not None
        and part.weight.ndim == 2
        and not any(part.children())
    ]
    if not leaves:
        raise InputError("an MLP of stacked experts as a place for a bias", expected="one map")
    return leaves[-1]


def _require_added(model: LanguageModel, block: Any, part: Any, vector: Tensor, site: Site) -> None:
    """Refuse a bias that would not arrive at the block's output as it is (a norm behind it)."""
    ids = torch.arange(5, device=model.device)[None]
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().float().cpu())

    def add(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + vector.to(output[0]), *output[1:])
        return output + vector.to(output)

    with torch.no_grad(), block.register_forward_hook(keep):
        model.model(ids, use_cache=False)
        with part.register_forward_hook(add):
            try:
                model.model(ids, use_cache=False)
            except RuntimeError:  # another width: the router of experts, say
                seen.append(seen[0] * float("nan"))
    arrived = (seen[-1] - seen[0])[0]
    # A bias of attention also moves what the MLP then reads, so only its own share is asked.
    gap = float((arrived - vector).norm(dim=-1).max())
    if site.stream != "attention" and not gap <= 1e-2 * float(vector.norm()):
        raise RefusedError(
            f"a bias at {site} of {model.name!r}, whose block changes it before adding it",
            expected="a block that adds its MLP's output as it is",
            remedy="export a .gguf control vector",
        )
