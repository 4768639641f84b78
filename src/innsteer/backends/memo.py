"""Memo: what the calls of a long run gave, on disk, so that an interrupted run goes on."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from innsteer import __version__
from innsteer.backends.base import Completion
from innsteer.errors import InnsteerError
from innsteer.files import write_tensors, write_text
from innsteer.interventions import Edit
from innsteer.steerer import Interventions, tensor_bytes

THREADS = "threads"
MODULE = set(vars(nn.Module()))
"""Attributes that every module has, and that say nothing about what it does."""


class Memo:
    """Results by a digest of all that they depend on; a context in which a run may be interrupted.

    The run is started again from its beginning: a call that had ended gives back what it gave, to
    the bit; the first that had not is made. Without a folder every call is made.

    The folder vanishes when the run ends. An interruption, a full disk or a kill leaves it, and the
    next run finds it. That one gets as many threads as the first had, because another number would
    change the last bits. So does what innsteer could not do, as where a judge's endpoint failed: it
    may go well the next time. A refusal takes away what its own run began, and leaves what it
    found: a slip in the command that should go on does not cost what was computed before it.

    Attributes:
        folder: of the results. made, replayed: how many calls were.

    Raises:
        OSError: a result cannot be written.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.made = self.replayed = 0
        self._threads = torch.get_num_threads()
        self._found = False

    def __enter__(self) -> Self:
        if self.folder is not None:
            self._found = self.folder.exists()
            with suppress(OSError, ValueError):  # nothing was interrupted
                text = (self.folder / THREADS).read_text(encoding="utf-8")
                torch.set_num_threads(max(int(text), 1))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        torch.set_num_threads(self._threads)
        refused = kind not in (None, InnsteerError) and issubclass(kind, InnsteerError)
        if self.folder is not None and (kind is None or (refused and not self._found)):
            shutil.rmtree(self.folder, ignore_errors=True)

    def value(self, key: object, make: Callable[[], Any]) -> Any:
        """A JSON value by its key; tuples come back as lists.

        Args:
            key: all that it depends on, as JSON; what is not is told apart by its ``repr``.
        """
        if self.folder is None:
            return make()
        path = self._path(key, ".json")
        with suppress(OSError, ValueError):  # none yet, or torn: it is made again
            found = json.loads(path.read_text(encoding="utf-8"))
            self.replayed += 1
            return found
        value = make()
        self._begin()
        write_text(path, json.dumps(value))
        self.made += 1
        return value

    def completions(
        self, key: object, make: Callable[[], Sequence[Completion]]
    ) -> list[Completion]:
        """Completions by their key."""
        if self.folder is None:
            return list(make())
        rows = self.value(key, lambda: [one.to_json() for one in make()])
        return [Completion.from_json(row) for row in rows]

    def tensors(self, key: object, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors by name, by their key."""
        if self.folder is None:
            return make()
        path = self._path(key, ".safetensors")
        with suppress(OSError, SafetensorError):
            found = load_file(path)
            self.replayed += 1
            return found
        tensors = make()
        self._begin()
        write_tensors(path, tensors)
        self.made += 1
        return tensors

    def _begin(self) -> None:
        """Note the threads beside the first result."""
        assert self.folder is not None
        if not (self.folder / THREADS).exists():
            write_text(self.folder / THREADS, str(torch.get_num_threads()))

    def _path(self, key: object, suffix: str) -> Path:
        assert self.folder is not None
        versions = [__version__, torch.__version__, transformers.__version__]
        text = json.dumps([versions, key], sort_keys=True, default=repr)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}{suffix}"


def digest(maps: Interventions | None) -> str:
    """SHA-256 of everything that decides what maps do: their classes, settings and tensors."""
    if maps is None:
        return ""
    found = hashlib.sha256()
    for site, part in maps.items():
        for name, module in part.named_modules():
            own = {k: v for k, v in vars(module).items() if k not in MODULE}
            text = repr([str(site), name, type(module).__qualname__, sorted(own.items())])
            # An address says nothing, and a tensor that is no buffer is shown in part: such a map
            # is like no other, and is never replayed.
            told = not any(sign in text for sign in (" at 0x", "tensor(", "array("))
            found.update((text if told else secrets.token_hex()).encode())
        for content in tensor_bytes(part):
            found.update(content)
    return found.hexdigest()


def of_edits(edits: Iterable[Edit]) -> list[Any]:
    """All that decides what edits do, as JSON."""
    return [
        [digest(e.interventions), e.coef.tolist(), str(e.where), *map(dict, e.told)] for e in edits
    ]
