"""Activations: float32 rows per site with a table that says what each row is; in memory or on disk.

Backends record them, steerers read them; nothing here runs a model. On disk a recording is a folder
of shards (``00000.safetensors`` with one tensor per site, ``00000.rows.json`` with the table) and
``activations.json``, written last, which names every file with its SHA-256.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from innsteer.errors import FormatError, InputError, UnknownName
from innsteer.files import (
    Journal,
    fresh_folder,
    read_json,
    resumed_folder,
    sha256_file,
    write_json,
    write_tensors,
)
from innsteer.site import Site

Read = Literal["last", "mean", "all", "span"]
READS: tuple[str, ...] = get_args(Read)
SIDES = ("source", "target", "unmoved", "restated")
FORMAT = 1
BEFORE = "before."
"""In a shard, what stood before the rows of a site is kept under its name with this in front."""
_FIRST = Site(0)


@dataclass(frozen=True)
class Rows:
    """What each row is: equal-long columns.

    ``side`` is source, target, unmoved or restated (an unmoved prompt in other words); ``pair``
    joins the two sides of one item, or the last two ("" = unpaired); ``token`` is the absolute
    position that was read (the last one of a mean); ``weight`` is unitless, 1 by default.
    """

    behaviour: np.ndarray
    item: np.ndarray
    side: np.ndarray
    key: np.ndarray
    pair: np.ndarray
    token: np.ndarray
    split: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> "Rows":
        """Columns from records; missing entries get the columns' defaults."""
        defaults = {"key": "", "pair": "", "token": 0, "split": "train", "weight": 1.0}
        columns = {}
        for one in fields(cls):
            column = [record.get(one.name, defaults.get(one.name)) for record in records]
            kind = {"token": np.int64, "weight": np.float64}.get(one.name, np.str_)
            columns[one.name] = np.asarray(column, dtype=kind)
        return cls(**columns)

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per row."""
        columns = {one.name: getattr(self, one.name).tolist() for one in fields(self)}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def __getitem__(self, index: np.ndarray) -> "Rows":
        return Rows(**{one.name: getattr(self, one.name)[index] for one in fields(self)})

    def __len__(self) -> int:
        return len(self.item)


@dataclass(frozen=True)
class Activations:
    """Rows of one or many sites, with their table and where they came from.

    Attributes:
        values: Site -> float32 ``[rows, d]``; every site has the same rows.
        rows: the table.
        behaviours: in the column order of ``coef``.
        read: which tokens became rows: ``last | mean | all | span``.
        provenance: model, tokenizer and template fingerprint, contrast hash, software.
        context: Site -> float32 ``[rows, d]``, the mean of what stood before each row in its
            prompt; empty where that was not recorded.

    >>> acts = Activations.of_sides(torch.zeros(4, 3), torch.ones(4, 3))
    >>> source, target = acts.sides(acts.site)
    >>> target.mean().item() - source.mean().item()
    1.0
    """

    values: Mapping[Site, Tensor]
    rows: Rows
    behaviours: tuple[str, ...]
    read: Read = "last"
    provenance: Mapping[str, Any] = None  # type: ignore[assignment]
    context: Mapping[Site, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", dict(self.provenance or {}))
        if not self.values:
            raise InputError("activations of no site", expected="at least one site")
        if self.read not in READS:
            raise UnknownName("read rule", self.read, READS)
        # float32 whatever came in: a fit must not depend on the caller's dtype.
        for name in ("values", "context"):
            whole = {site: rows.float() for site, rows in getattr(self, name).items()}
            object.__setattr__(self, name, whole)
        if self.context and self.context.keys() != self.values.keys():
            raise InputError(
                f"contexts at {', '.join(map(str, sorted(self.context)))}",
                expected="the sites of the rows: " + ", ".join(map(str, self.sites)),
            )
        for site, rows in (*self.values.items(), *self.context.items()):
            if rows.ndim != 2 or len(rows) != len(self.rows):
                raise InputError(
                    f"site {site}: values of shape {tuple(rows.shape)}",
                    expected=f"[{len(self.rows)}, d], one row per line of the table",
                )
            if not torch.isfinite(rows).all():
                bad = int((~torch.isfinite(rows).all(-1)).sum())
                raise InputError(
                    f"site {site}: {bad} of {len(rows)} rows are not finite",
                    remedy="record in float32, and look for the item that overflows",
                )

    @classmethod
    def of_sides(
        cls,
        source: Tensor,
        target: Tensor,
        *,
        site: Site = _FIRST,
        behaviour: str = "behaviour",
        paired: bool = True,
    ) -> "Activations":
        """Activations from two plain tensors ``[n, d]`` and ``[m, d]``, paired by row if asked."""
        if paired and len(source) != len(target):
            raise InputError(
                f"{len(source)} source and {len(target)} target rows as pairs",
                expected="equally many",
                remedy="pass paired=False",
            )
        records = [
            {
                "behaviour": behaviour,
                "item": f"{i}" if paired else f"{side}-{i}",
                "side": side,
                "pair": f"{i}" if paired else "",
            }
            for side, part in (("source", source), ("target", target))
            for i in range(len(part))
        ]
        return cls({site: torch.cat([source, target])}, Rows.of(records), (behaviour,))

    @classmethod
    def together(cls, parts: Sequence["Activations"]) -> "Activations":
        """The rows of several recordings, of other behaviours at the same sites, as one.

        Raises:
            InputError: a behaviour twice, other sites, read rules or models.
        """
        first, behaviours = parts[0], [name for part in parts for name in part.behaviours]
        if len(set(behaviours)) < len(behaviours):
            raise InputError(f"the behaviours {', '.join(behaviours)}", expected="each once")
        kinds = {
            (part.sites, part.read, json.dumps(part.provenance.get("fingerprint"), sort_keys=True))
            for part in parts
        }
        if len(kinds) > 1:
            reads = ", ".join(f"{part.behaviours[0]} by {part.read}" for part in parts)
            raise InputError(
                f"recordings of other sites, read rules ({reads}) or models as one",
                expected="all recorded alike",
                remedy="give one read rule for all: read=..., or --read",
            )
        values, context = (
            {
                site: torch.cat([getattr(part, name)[site] for part in parts])
                for site in first.sites
                if all(getattr(part, name) for part in parts)
            }
            for name in ("values", "context")
        )
        table = Rows.of([record for part in parts for record in part.rows.records()])
        hashes = dict(zip(behaviours, (p.provenance.get("contrast") for p in parts), strict=False))
        known = {**first.provenance, "contrast": None, "contrasts": hashes}
        return cls(values, table, tuple(behaviours), first.read, known, context)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The recorded sites, lowest layer first."""
        return tuple(sorted(self.values))

    @property
    def site(self) -> Site:
        """The only site of a one-site recording."""
        if len(self.values) != 1:
            raise InputError(f"{len(self.values)} sites where one is meant")
        return self.sites[0]

    @property
    def widths(self) -> dict[Site, int]:
        """Site -> width d."""
        return {site: self.values[site].shape[1] for site in self.sites}

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, **columns: str | Sequence[str]) -> "Activations":
        """The rows whose columns have the given value, or one of the given values."""
        keep = np.ones(len(self), dtype=bool)
        for name, wanted in columns.items():
            values = [wanted] if isinstance(wanted, str) else list(wanted)
            keep &= np.isin(getattr(self.rows, name), values)
        index = np.flatnonzero(keep)
        chosen = torch.from_numpy(index)
        picked, before = (
            {site: rows[chosen] for site, rows in part.items()}
            for part in (self.values, self.context)
        )
        return replace(self, values=picked, rows=self.rows[index], context=before)

    def at(self, *sites: Site) -> "Activations":
        """Only the given sites."""
        missing = [site for site in sites if site not in self.values]
        if missing:
            raise UnknownName("recorded site", str(missing[0]), [str(s) for s in self.sites])
        context = {site: self.context[site] for site in sites if self.context}
        return replace(self, values={site: self.values[site] for site in sites}, context=context)

    @property
    def prompts(self) -> "Activations":
        """The same table over what stood before each row, in place of the rows.

        Raises:
            InputError: that was not recorded.
        """
        if not self.context:
            raise InputError(
                "rows without what stood before them in their prompts",
                expected="target-seeking rows, which a fit through the model makes",
                remedy='fit through the model (innsteer.fit), or read the row itself (reads="row")',
            )
        return replace(self, values=self.context, context={})

    def sides(self, site: Site, behaviour: str | None = None) -> tuple[Tensor, Tensor]:
        """Source and target rows of a behaviour (the first by default), ``[n, d]``, ``[m, d]``.

        Raises:
            InputError: one side is empty.
        """
        name = behaviour or self.behaviours[0]
        parts = []
        for side in ("source", "target"):
            index = (self.rows.side == side) & (self.rows.behaviour == name)
            if not index.any():
                raise InputError(
                    f"behaviour {name!r} has no {side} rows",
                    expected="rows of both sides",
                    remedy="record the whole training part",
                )
            parts.append(self.values[site][torch.from_numpy(np.flatnonzero(index))])
        return parts[0], parts[1]

    def pairs(self, site: Site, behaviour: str | None = None) -> tuple[Tensor, Tensor]:
        """Source and target rows ``[n, d]`` aligned by pair; several tokens of a side are meaned.

        Pairs with only one side are left out; both empty means unpaired data.
        """
        name = behaviour or self.behaviours[0]
        mine = (self.rows.behaviour == name) & (self.rows.pair != "")
        in_source = set(self.rows.pair[mine & (self.rows.side == "source")])
        in_target = set(self.rows.pair[mine & (self.rows.side == "target")])
        order = sorted(in_source & in_target)
        place = {pair: i for i, pair in enumerate(order)}
        values, means = self.values[site], []
        for side in ("source", "target"):
            index = np.flatnonzero(mine & (self.rows.side == side) & np.isin(self.rows.pair, order))
            slot = torch.tensor([place[pair] for pair in self.rows.pair[index]], dtype=torch.long)
            total = torch.zeros(len(order), values.shape[1], dtype=values.dtype)
            count = torch.zeros(len(order), 1, dtype=values.dtype)
            total.index_add_(0, slot, values[torch.from_numpy(index)])
            count.index_add_(0, slot, torch.ones(len(index), 1, dtype=values.dtype))
            means.append(total / count)
        return means[0], means[1]

    def unmoved(self, site: Site, behaviour: str | None = None) -> Tensor:
        """Rows ``[n, d]`` that an edit of a behaviour (the first by default) must leave alone.

        Rows of behaviour "" are every behaviour's.
        """
        names = [behaviour or self.behaviours[0], ""]
        index = (self.rows.side == "unmoved") & np.isin(self.rows.behaviour, names)
        return self.values[site][torch.from_numpy(np.flatnonzero(index))]

    def rewordings(self, site: Site) -> Tensor:
        """What other words change ``[n, d]``: unmoved rows less the same ones ``restated``.

        Of either there may be several wordings.
        """
        table, values = self.rows, self.values[site]
        here, other = (
            np.flatnonzero((table.side == side) & (table.pair != ""))
            for side in ("unmoved", "restated")
        )
        again: dict[str, list[int]] = {}
        for m in other:
            again.setdefault(str(table.pair[m]), []).append(int(m))
        both = [(int(n), m) for n in here for m in again.get(str(table.pair[n]), ())]
        return values[[n for n, _ in both]] - values[[n for _, n in both]]

    # --- on disk ---------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write as a one-shard recording; the folder must not exist."""
        with ShardWriter(folder, self.behaviours, self.read, self.provenance) as shards:
            shards.write(self.values, self.rows, self.context)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Activations":
        """Read a recording back, checking every file.

        Raises:
            FormatError: not a finished recording, or a file is missing or altered.
        """
        folder = Path(folder)
        head = read_json(folder / "activations.json", "a finished recording")
        if head.get("format") != FORMAT:
            raise FormatError(f"{folder}: format {head.get('format')!r}", expected=str(FORMAT))
        try:
            return cls._read(folder, head)
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise FormatError(f"{folder}: {error!r}", expected="a recording of innsteer") from error

    @classmethod
    def _read(cls, folder: Path, head: Mapping[str, Any]) -> "Activations":
        """The files that a recording's head names, joined."""
        values: dict[Site, list[Tensor]] = {}
        context: dict[Site, list[Tensor]] = {}
        records: list[dict[str, Any]] = []
        for name, digest in head["files"].items():
            if Path(name).name != name or not (folder / name).is_file():
                raise FormatError(f"{folder}: file {name!r} is missing")
            if sha256_file(folder / name) != digest:
                raise FormatError(
                    f"{folder / name} is not the file that was recorded (its SHA-256 differs)",
                    remedy="record again",
                )
            if name.endswith(".json"):
                records += json.loads((folder / name).read_text(encoding="utf-8"))
            else:
                for key, rows in load_file(folder / name).items():
                    part = context if key.startswith(BEFORE) else values
                    part.setdefault(Site.parse(key.removeprefix(BEFORE)), []).append(rows)
        joined, before = (
            {site: torch.cat(parts) for site, parts in sorted(part.items())}
            for part in (values, context)
        )
        table, behaviours = Rows.of(records), tuple(head["behaviours"])
        return cls(joined, table, behaviours, head["read"], head["provenance"], before)

    @property
    def hash(self) -> str:
        """SHA-256 over table and values, independent of shards."""
        digest = hashlib.sha256(json.dumps(self.rows.records(), sort_keys=True).encode())
        for site in self.sites:
            digest.update(str(site).encode())
            for part in (self.values, self.context):
                if site in part:
                    digest.update(part[site].contiguous().numpy().tobytes())
        return digest.hexdigest()


class ShardWriter:
    """Writes a recording shard by shard; the folder appears whole at the end, or not at all.

    Args:
        resume: what is recorded, as a digest. An interrupted recording then stays, hidden beside
            the folder, and the next writer with the same digest goes on after its ``done`` shards,
            with as many threads as it had: another number would change the last bits.
    """

    def __init__(
        self,
        folder: str | Path,
        behaviours: Sequence[str],
        read: str,
        provenance: Mapping[str, Any],
        *,
        resume: str = "",
    ) -> None:
        self._head = {
            "format": FORMAT,
            "behaviours": list(behaviours),
            "read": read,
            "provenance": dict(provenance),
        }
        self._files: dict[str, str] = {}
        self._target = folder
        self._resume = resume
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._journal: Journal | None = None
        self.done = 0

    def __enter__(self) -> "ShardWriter":
        if self._resume:
            threads = torch.get_num_threads()
            head: dict[str, Any] = {"recording": self._resume, "threads": threads}
            self._journal = self._stack.enter_context(resumed_folder(self._target, head))
            self._folder = self._journal.folder
            for entry in self._journal.done:
                self._files |= entry["files"]
            self.done = len(self._journal.done)
            if (before := self._journal.head["threads"]) != threads:
                self._stack.callback(torch.set_num_threads, threads)
                torch.set_num_threads(before)
        else:
            self._folder = self._stack.enter_context(fresh_folder(self._target))
        self._stack.push(self._finish)
        return self

    def write(
        self,
        values: Mapping[Site, Tensor],
        rows: Rows,
        context: Mapping[Site, Tensor] = {},
    ) -> None:
        """Add one shard: values ``[n, d]`` per site, their table, and what stood before them."""
        assert self._folder is not None, "use as a context manager"
        stem = f"{len(self._files) // 2:05d}"
        named = {str(site): v for site, v in values.items()}
        named |= {f"{BEFORE}{site}": v for site, v in context.items()}
        tensors = {name: v.float() for name, v in named.items()}
        names = [f"{stem}.safetensors", f"{stem}.rows.json"]
        write_tensors(self._folder / names[0], tensors)
        write_json(self._folder / names[1], rows.records())
        if self._journal is not None:
            self._files |= self._journal.add(*names)
        else:
            self._files |= {name: sha256_file(self._folder / name) for name in names}

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the head, inside the staging folder's context: if that fails, nothing stays."""
        if kind is None and self._folder is not None:
            write_json(self._folder / "activations.json", self._head | {"files": self._files})

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
