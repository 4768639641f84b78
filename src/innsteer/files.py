"""Writing folders and files so that they appear whole or not at all, and reading JSON safely."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from innsteer.errors import FormatError, InputError

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON = 64 * 2**20


@contextmanager
def fresh_folder(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A staging folder beside ``folder`` that becomes it on success and vanishes on failure.

    Raises:
        InputError: the folder exists (and ``replace`` is off), is a symlink, or cannot be made.
    """
    target = Path(folder)
    if target.is_symlink() or not (replace and target.is_dir()):
        require_absent(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield staging
        for path in staging.rglob("*"):
            _sync(path)
        # mkdtemp makes 0700; people expect what their umask says.
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
        for path in staging.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / target.name)
            try:
                os.replace(staging, target)
            except BaseException:
                os.replace(old / target.name, target)
                raise
            finally:
                shutil.rmtree(old)
        else:
            os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


class Journal:
    """What of a long work is done: a line per part, each flushed to disk before the next begins.

    Attributes:
        folder: where the parts are written.
        done: the entries of an earlier run, those whose files are whole.
    """

    NAME = "journal.jsonl"

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.folder = folder
        self._file = (folder / self.NAME).open("a+", encoding="utf-8")
        self._lock()
        self._file.seek(0)
        lines = self._file.read().splitlines()
        self.head = head
        self.done: list[dict[str, Any]] = []
        if lines:
            self._resume(lines)
        else:
            self._write(head)

    def _lock(self) -> None:
        """One writer at a time, as long as it lives."""
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system
            pass
        except OSError as error:
            self._file.close()
            raise InputError(
                f"{self.folder} is being written by another process",
                remedy="wait for it, or choose another name",
            ) from error

    def _resume(self, lines: list[str]) -> None:
        found = [_entry(line) for line in lines]
        asked = {k: v for k, v in self.head.items() if k != "threads"}
        if found[0] is None or {k: v for k, v in found[0].items() if k != "threads"} != asked:
            self._file.close()
            raise InputError(
                f"{self.folder} holds an interrupted run of something else",
                expected="the same data, model and options, to go on where it stopped",
                remedy="finish that one with its own command, or remove the folder",
            )
        self.head = found[0]
        for entry in found[1:]:
            # A torn line, or a file that the disk lost: what follows is done again.
            if entry is None or not all(
                (path := self.folder / name).is_file() and sha256_file(path) == digest
                for name, digest in entry["files"].items()
            ):
                break
            self.done.append(entry)
        self._file.truncate(0)
        self._write(self.head)
        for entry in self.done:
            self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, *names: str) -> dict[str, str]:
        """Note a part's files, which are complete; returns their digests."""
        for name in names:
            _sync(self.folder / name)
        files = {name: sha256_file(self.folder / name) for name in names}
        self._write({"files": files})
        return files

    def close(self) -> None:
        """Let go of the journal."""
        self._file.close()


def _entry(line: str) -> dict[str, Any] | None:
    """A line of a journal, or None where it is torn."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def resumed_folder(folder: str | Path, head: dict[str, Any]) -> Iterator[Journal]:
    """A folder that becomes ``folder`` on success and stays, hidden beside it, when interrupted.

    The next run with the same ``head`` gets what is done; ``head["threads"]`` may differ, and is
    then the earlier run's.

    Raises:
        InputError: ``folder`` exists or cannot be made, another process is at it, or an interrupted
            run of something else is in the way.
    """
    target = Path(folder)
    require_absent(target)
    partial = target.parent / f".{target.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {target.parent}: {error.strerror}") from error
    journal = Journal(partial, head)
    try:
        yield journal
        for path in partial.iterdir():
            if path.name.startswith("."):  # what a killed writer of a file left
                path.unlink()
            else:
                _sync(path)
        # The journal goes last: whatever ends this before, the next run finds all that is done.
        os.replace(partial, target)
        (target / Journal.NAME).unlink()
        journal.close()
    except BaseException:
        journal.close()
        if (
            partial.exists()
            and not journal.done
            and not any(p.name != Journal.NAME for p in partial.iterdir())
        ):
            shutil.rmtree(partial)
        raise


def require_absent(folder: str | Path) -> None:
    """Refuse a folder to write that exists or cannot be made: now, not after minutes of work.

    Raises:
        InputError: it exists, or what is to hold it is no folder, or may not be written to.
    """
    target = Path(folder)
    if target.is_symlink() or target.exists():
        raise InputError(
            f"{target} exists already",
            remedy="choose another name, or remove it first",
        )
    home = next(parent for parent in target.absolute().parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {home}", expected=f"a folder that can hold {target}")


def _sync(path: Path) -> None:
    """Flush a file to disk, so that a crash after the rename finds it whole."""
    if path.is_file():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


@contextmanager
def fresh_file(path: str | Path) -> Iterator[Path]:
    """A file beside ``path`` that becomes it on success and vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        _sync(staging)
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o666 & ~umask)
        os.replace(staging, path)
    except BaseException as error:
        staging.unlink(missing_ok=True)
        if isinstance(error, OSError):  # say which file, not by which name it was staged
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file by temporary name and rename."""
    with fresh_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_tensors(
    path: str | Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors by temporary name and rename.

    Raises:
        OSError: the disk is full, or may not be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with fresh_file(path) as staging:
        try:
            whole = {name: one.contiguous() for name, one in tensors.items()}
            save_file(whole, staging, metadata)
        except SafetensorError as error:
            raise OSError(0, str(error)) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with sorted keys; numbers that JSON does not know are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: missing, too large, not UTF-8, not JSON or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist", expected=what)
    if path.stat().st_size > MAX_JSON:
        raise FormatError(f"{path} has {path.stat().st_size} bytes", expected=f"<= {MAX_JSON}")
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite
        )
    except (OSError, ValueError, RecursionError) as error:  # also bad UTF-8 and endless numbers
        raise FormatError(f"{path} is not JSON: {error}", expected=what) from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}", expected="a JSON object")
    return value


def _finite(text: str) -> float:
    """A number of a JSON file; NaN, Infinity and 1e999 are none."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def canonical(value: Any) -> bytes:
    """One byte string per JSON value, for hashing.

    >>> canonical({"b": 1, "a": [1.5, None]})
    b'{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
