"""From files to pairs of answers: one small reader per format, one checked row type for all.

Knows no model and no split. A new format is one function and one line in `_FORMATS`.
"""

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from innsteer.errors import DataError
from innsteer.groups import normalise, normalise_question


class Message(TypedDict):
    """One turn of a chat, as chat templates take it."""

    role: str
    content: str


Conversation = str | tuple[Message, ...]


def messages(prompt: Conversation) -> list[Message]:
    """The prompt as chat messages; text becomes one user turn.

    >>> messages("Hello?")
    [{'role': 'user', 'content': 'Hello?'}]
    """
    if isinstance(prompt, str):
        return [Message(role="user", content=prompt)]
    return [Message(role=turn["role"], content=turn["content"]) for turn in prompt]


class Row(NamedTuple):
    """Columns with the place they came from; its methods check one value each."""

    file: str
    place: str
    data: Mapping[str, Any]

    def wrong(self, what: str, *, expected: str = "", remedy: str = "") -> DataError:
        """An error that begins with the place."""
        return DataError(f"{self.file}, {self.place}: {what}", expected=expected, remedy=remedy)

    def check(self, value: object, name: str) -> str:
        """The value, if it is text that says something."""
        if not isinstance(value, str):
            raise self.wrong(f"{name} is {reprlib.repr(value)}", expected="text")
        if not value.strip():
            raise self.wrong(
                f"{name} is empty ({reprlib.repr(value)})",
                expected="text",
                remedy="fill it in or remove the row",
            )
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise self.wrong(
                f"{name} holds half a surrogate pair", expected="Unicode text", remedy="repair it"
            )
        return value

    def text(self, key: str) -> str:
        """The text of one column."""
        return self.check(self.data.get(key), repr(key))

    def optional(self, key: str) -> str | None:
        """The text, or None: tables that were joined fill absent cells with null."""
        return None if self.data.get(key) is None else self.text(key)

    def label(self, key: str) -> str | None:
        """An optional name; a whole number is taken as its digits."""
        value = self.data.get(key)
        return str(value) if type(value) is int else self.optional(key)

    def weight(self) -> float:
        """The weight of the row, 1 if none is given."""
        value = self.data.get("weight")
        if value is None:
            return 1.0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < 1e9):  # also refuses nan and integers beyond a float
            raise self.wrong(f"'weight' is {reprlib.repr(value)}", expected="a number above 0")
        return float(value)

    def conversation(self, key: str) -> Conversation:
        """Text, or messages with a role and a content each."""
        value = self.data.get(key)
        if not isinstance(value, list | tuple):
            return self.text(key)
        if not value:
            raise self.wrong(f"{key!r} is an empty list", expected="at least one message")
        return tuple(self.message(turn, f"{key!r}[{n}]") for n, turn in enumerate(value))

    def message(self, turn: object, name: str) -> Message:
        """One checked turn."""
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise self.wrong(
                f"{name} is {reprlib.repr(turn)}", expected='{"role": ..., "content": ...}'
            )
        # Refused, not dropped: a tool call would silently be missing from what the model reads.
        if more := [key for key in turn if key not in ("role", "content") and turn[key]]:
            raise self.wrong(f"{name} has {more}", expected="role and content only")
        role = self.check(turn["role"], f"the role of {name}")
        return Message(role=role, content=self.check(turn["content"], f"the content of {name}"))


def read_file(path: Path) -> list[Row]:
    """The rows of a file, at least one; how it is read is told by its suffix."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(f"{path} cannot be read ({why})", expected="a data file") from error
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is cut short or damaged ({error})", expected="gzip", remedy="fetch it again"
        ) from error
    inner = path.with_suffix("") if path.suffix == ".gz" else path
    if inner.suffix not in (".jsonl", ".json"):
        raise DataError(
            f"{path} has the suffix {inner.suffix!r}",
            expected=".jsonl, .json, .jsonl.gz or .json.gz",
            remedy="name it by what it holds",
        )
    read = read_lines if inner.suffix == ".jsonl" else _document
    return read(data, str(path))


def read_lines(data: bytes, file: str) -> list[Row]:
    """One JSON object per line; blank lines are skipped and counted."""
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    rows = [_row(_json(raw, file, n), file, f"line {n}") for n, raw in lines if raw.strip()]
    return _some(rows, file)


def _document(data: bytes, file: str) -> list[Row]:
    """One JSON list of objects, or one object that holds one such list."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    value = _json(data, file) if data.strip() else []
    lists = [value]
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise DataError(
            f"{file} holds {reprlib.repr(value)}",
            expected="a list of objects, or an object with one such list",
        )
    return read_rows(lists[0], file)


def read_rows(values: Sequence[object], file: str = "the list") -> list[Row]:
    """Rows of a list, numbered from 1."""
    return _some([_row(value, file, f"row {n}") for n, value in enumerate(values, 1)], file)


def _row(value: object, file: str, place: str) -> Row:
    if not isinstance(value, Mapping):
        raise DataError(f"{file}, {place}: {reprlib.repr(value)}", expected="an object of columns")
    return Row(file, place, value)


def _some(rows: list[Row], file: str) -> list[Row]:
    if not rows:
        raise DataError(f"{file} has no rows", expected="at least one", remedy="is it the file?")
    return rows


def _json(raw: bytes, file: str, line: int | None = None) -> Any:
    """The value of one line, or of a whole file where `line` is None."""
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        place = line or raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}, line {place}: byte 0x{raw[error.start]:02x} is not UTF-8",
            expected="UTF-8",
            remedy="convert the file",
        ) from error
    except (ValueError, RecursionError) as error:
        place = line or int(getattr(error, "lineno", 1))
        many = "Extra data" in str(error) and line is None
        raise DataError(
            f"{file}, line {place}: not JSON ({error})",
            expected="one JSON object per line" if line else "one JSON list",
            remedy="if each line is an object, name the file .jsonl" if many else "repair it",
        ) from error


class Pair(NamedTuple):
    """What a format finds in a row; `texts` are what makes two rows the same question."""

    prompt: Conversation
    source: str
    target: str
    key: str | None
    texts: tuple[str, ...]
    citation: str = ""


def _preference(row: Row) -> Pair:
    """TRL preference pairs, https://huggingface.co/docs/trl/dataset_formats."""
    target, source = row.conversation("chosen"), row.conversation("rejected")
    prompt = None if row.data.get("prompt") is None else row.conversation("prompt")
    if isinstance(target, str) != isinstance(source, str):
        raise row.wrong("one of 'chosen' and 'rejected' is text, the other messages")
    if isinstance(target, tuple) and isinstance(source, tuple):
        shared = 0
        while shared < min(len(target), len(source)) - 1 and target[shared] == source[shared]:
            shared += 1
        prefix = target[:shared]
        if prompt is None:
            prompt = prefix or None
        elif prefix and messages(prompt)[-1] == prefix[-1]:  # some sets repeat the prompt
            prompt = prefix
        elif prefix:
            raise row.wrong("'prompt' differs from the shared start of 'chosen' and 'rejected'")
        target, source = _reply(row, "chosen", shared), _reply(row, "rejected", shared)
    if prompt is None:
        raise row.wrong(
            "no 'prompt', and 'chosen' and 'rejected' share no first messages",
            expected="prompt, chosen, rejected",
            remedy="add the prompt, or name the columns source and target",
        )
    return _pair(prompt, str(source), str(target))


def _reply(row: Row, key: str, start: int) -> str:
    """The text of the one assistant turn after the shared messages."""
    rest = messages(row.conversation(key))[start:]
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        raise row.wrong(
            f"{key!r} has the turns {[turn['role'] for turn in rest]} after the prompt",
            expected="one assistant turn",
        )
    return rest[0]["content"]


def _plain(row: Row) -> Pair:
    """`source` and `target`, with a `prompt` or without."""
    prompt = "" if row.data.get("prompt") is None else row.conversation("prompt")
    return _pair(prompt, row.text("source"), row.text("target"))


def _evals(row: Row) -> Pair:
    """Model-written evals: a question with the matching and the other answer, Yes/No or (A)/(B)."""
    target = row.text("answer_matching_behavior").strip()
    source = row.text("answer_not_matching_behavior").strip()
    pair = _pair(row.conversation("question"), source, target)
    if statement := row.optional("statement"):
        pair = pair._replace(texts=(normalise(statement),))
    return pair._replace(
        key=pair.key or target.strip("()"),
        citation="Perez et al. 2022, Discovering Language Model Behaviors with Model-Written "
        "Evaluations, arXiv 2212.09251",
    )


_FORMATS: tuple[tuple[tuple[str, ...], Callable[[Row], Pair]], ...] = (
    (("chosen", "rejected"), _preference),
    (("source", "target"), _plain),
    (("question", "answer_matching_behavior", "answer_not_matching_behavior"), _evals),
)


def read_pair(row: Row) -> Pair:
    """The pair of a row by the first format whose columns are all there."""
    for columns, read in _FORMATS:
        if all(column in row.data for column in columns):
            pair = read(row)
            if pair.source.strip() == pair.target.strip():
                raise row.wrong(
                    f"both answers are {reprlib.repr(pair.target)}",
                    expected="an answer without the behaviour and another with it",
                    remedy="remove the row",
                )
            return pair
    found = ", ".join(map(str, list(row.data)[:12])) or "none"
    raise row.wrong(
        f"the columns {found} are of no known format",
        expected=" | ".join(" + ".join(columns) for columns, _ in _FORMATS),
        remedy="rename the columns",
    )


def _pair(prompt: Conversation, source: str, target: str) -> Pair:
    key, other = _choice(target), _choice(source)
    same_kind = key and other and (key in ("Yes", "No")) == (other in ("Yes", "No"))
    # Without a question either answer can tie two rows together, whichever side it stands on.
    texts = (_question(prompt),) if prompt else (normalise(source), normalise(target))
    return Pair(prompt, source, target, key if same_kind else None, texts)


def _question(prompt: Conversation) -> str:
    """What is asked: the user's turns, since a system prompt is often the same in all rows."""
    turns = messages(prompt)
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    return normalise_question("\n".join(asked or [turn["content"] for turn in turns]))


def _choice(answer: str) -> str | None:
    """The bare answer of Yes, No, (A), B ...; None for anything longer."""
    found = re.fullmatch(r"\(?([A-Z]|Yes|No)\)?\.?", answer.strip(), re.IGNORECASE)
    return found[1].capitalize() if found else None
