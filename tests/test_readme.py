"""README and docs say what is so: code runs, commands parse, tables and links match the house."""

import dataclasses
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import typer

import innsteer
import tiny
from innsteer import cli, errors, shelf, steerer, tuning
from innsteer.site import Where

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "src" / "innsteer"
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^( *)```([\w{}-]*)[^`\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NO_ROOMS = {"__init__.py", "py.typed", "templates"}
NOT_RUN = "<!-- not run -->"


class Fence(NamedTuple):
    """A block of code: its language, text, line in the page, and what stands right before it."""

    language: str
    text: str
    line: int
    before: str


def fences(page: Path, language: str = "") -> list[Fence]:
    """The blocks of a page, without the indentation that a list gives them."""
    return fences_of(page.read_text(encoding="utf-8"), language)


def fences_of(text: str, language: str = "") -> list[Fence]:
    found = []
    for match in FENCE.finditer(text):
        indent, kind, body = match.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines(keepends=True)]
        before = text[: match.start()].rstrip().rpartition("\n")[2].strip()
        found.append(Fence(kind, "".join(lines), text.count("\n", 0, match.start()) + 2, before))
    return [fence for fence in found if language in ("", fence.language)]


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text)


def block(text: str, name: str) -> str:
    """What stands between the markers of a name."""
    match = re.search(rf"<!-- {name}:start -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
    assert match, f"no <!-- {name}:start --> ... <!-- {name}:end -->"
    return match[1]


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# --- python --------------------------------------------------------------------------------------


@every_page
def test_python_in_a_page_compiles(page):
    for fence in fences(page, "python"):
        compile("\n" * (fence.line - 1) + fence.text, page.name, "exec")


def run(page: Path, monkeypatch) -> None:
    """Run a page's python from top to bottom; a file of the house becomes that module."""
    names = {"__name__": "page"}
    for fence in fences(page, "python"):
        if fence.before == NOT_RUN:
            continue
        code = compile("\n" * (fence.line - 1) + fence.text, page.name, "exec")
        path = re.match(r"# src/(\S+)\.py\n", fence.text)
        if path:
            module = ModuleType(path[1].replace("/", "."))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(code, vars(module))
            continue
        exec(code, names)
        for name in [name for name in names if name.startswith("test_")]:
            names.pop(name)()


@every_page
def test_python_in_a_page_runs_on_a_tiny_model(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = tiny.tiny_language_model()
    monkeypatch.setattr(innsteer, "load_model", lambda *_, **__: model)
    small = partial(tuning.tune, preview=True, control_items=4, fractions=(0.5, 1.0))
    monkeypatch.setattr(innsteer, "tune", small)
    run(page, monkeypatch)


@every_page
def test_a_file_of_the_house_is_shown_as_it_is(page):
    for fence in fences(page, "python"):
        path = re.match(r"# (src/\S+)\n", fence.text)
        if path:
            shown = fence.text.removeprefix(path[0])
            assert shown == (ROOT / path[1]).read_text(encoding="utf-8"), path[1]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nimport innsteer\ninnsteer.steer()\n```\n", AttributeError),
        ("```python\ndef test_it():\n    assert False\n```\n", AssertionError),
        ("```python\nif:\n```\n", SyntaxError),
    ],
)
def test_broken_python_in_a_page_is_found(text, error, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(error):
        run(page, monkeypatch)
    page.write_text(f"{NOT_RUN}\n" + text, encoding="utf-8")
    run(page, monkeypatch)


# --- commands ------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The words of every innsteer command in a page's shell blocks."""
    lines = "".join(fence.text for fence in fences_of(text, "sh")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in lines.splitlines()]
    return [line[1:] for line in words if line[:1] == ["innsteer"]]


def parse(words: list[str]) -> None:
    """Parse a command without running it."""
    verbs = typer.main.get_command(cli.app).commands
    assert words[0] in verbs, f"no verb {words[0]!r}"
    verbs[words[0]].make_context(words[0], words[1:])


@every_page
def test_every_command_in_a_page_parses(page):
    for words in commands(page.read_text(encoding="utf-8")):
        parse(words)


@pytest.mark.parametrize("line", ["steer x", "fit critical --layer 3 --out x", "tune", "eval x"])
def test_a_command_that_does_not_exist_is_found(line):
    (words,) = commands(f"```sh\ninnsteer {line}  # why\n```\n")
    with pytest.raises((AssertionError, Exception), match=r"(?i)no verb|no such option|missing"):
        parse(words)


# --- tables --------------------------------------------------------------------------------------


def methods_table() -> str:
    """The table of methods, from the shelf."""
    lines = ["| name | what | needs | trained | paper |", "|---|---|---|---|---|"]
    for method in shelf.describe():
        trained = "yes" if method["trained"] else "closed form"
        paper = method["paper"]
        link = f"[{paper.partition('://')[2].removeprefix('arxiv.org/abs/')}]({paper})"
        cells = [
            f"`{method['name']}`",
            method["summary"],
            ", ".join(method["needs"]),
            trained,
            link,
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def test_the_table_of_methods_is_that_of_the_shelf():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = methods_table()
    assert block(text, "methods").strip() == expected.strip(), (
        f"paste between the markers of README.md:\n\n{expected}"
    )


def rooms_of(text: str) -> set[str]:
    """The rooms that the README's table names, in its first column."""
    table = text.partition("| room of `src/innsteer`")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def rooms() -> set[str]:
    """Files and folders directly in the house."""
    names = {path.name for path in HOUSE.iterdir() if not path.name.startswith((".", "__pycache"))}
    return names - NO_ROOMS


def test_the_table_of_rooms_names_every_room_and_no_other():
    named = rooms_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert named == rooms(), f"differing: {sorted(named ^ rooms())}"


def test_a_room_that_is_not_in_the_table_is_found():
    text = "| room of `src/innsteer` | what |\n|---|---|\n| `site.py`, `flows/` | `no` |\n\n`x.py`"
    assert rooms_of(text) == {"site.py", "flows"}


def test_the_fields_of_innsteer_are_those_of_the_class():
    text = (ROOT / "docs" / "innsteer.md").read_text(encoding="utf-8")
    table = text.partition("## Fields\n")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `?([\w. ]+)`? \|", table, re.MULTILINE))
    fields = dataclasses.fields(steerer.get("innsteer"))
    spoken = {"True": "true", "False": "false", "None": "by objective"}
    assert told == {f.name: spoken.get(str(f.default), str(f.default)) for f in fields}


def test_the_tree_of_errors_is_that_of_the_module():
    (tree,) = fences(ROOT / "docs" / "errors.md", "text")
    drawn = [line[4:] for line in errors.__doc__.splitlines() if "exit code" in line or "├" in line]
    drawn += [line[4:] for line in errors.__doc__.splitlines() if line[4:].startswith("│")]
    assert sorted(set(drawn)) == sorted(tree.text.splitlines())
    for name in re.findall(r"\w+(?=[ (])", "\n".join(drawn)):
        kind = getattr(errors, name, None)
        code = re.search(rf"\b{name}\b.*exit code (\d)", tree.text)
        assert not (kind and code) or kind.exit_code == int(code[1]), name


def test_the_picture_of_scopes_shows_the_steered_tokens():
    (picture,) = [
        fence.text
        for fence in fences(ROOT / "docs" / "concepts.md", "text")
        if fence.text.startswith("tokens")
    ]
    rows = {line.split()[0]: "".join(line.split()[1:]) for line in picture.splitlines()}
    tokens = rows.pop("tokens")
    prompt, tokens = tokens.index("|"), tokens.replace("|", "")
    turns = [(tokens.index("a") - 1, tokens.index("e") + 1), (prompt - 1, prompt)]
    assert set(rows) >= {"all", "prompt", "generated", "assistant"}
    for name, drawn in rows.items():
        spans = Where.parse(name).spans(prompt=prompt, turns=turns)
        steered = [
            any(start <= at and (stop is None or at < stop) for start, stop in spans)
            for at in range(len(tokens))
        ]
        assert drawn.replace("|", "") == "".join(".x"[s] for s in steered), name


# --- links ---------------------------------------------------------------------------------------


def broken_links(page: Path) -> list[str]:
    """Relative links to pages and source files that lead nowhere, anchors included."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_relative_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](no.md) [b](#one) [c](#two) [d](https://x.org) ![](x.png)\n")
    assert broken_links(page) == ["no.md", "#two", "x.png"]


def reached(page: Path) -> set[Path]:
    """The pages that links lead to from a page, itself included."""
    found, left = set(), {page.resolve()}
    while left:
        found.add(page := left.pop())
        links = re.findall(r"\]\(([^)\s#:]+\.md)", prose(page.read_text(encoding="utf-8")))
        left |= {(page.parent / link).resolve() for link in links} - found
    return found


def test_every_page_can_be_reached_from_the_readme():
    assert sorted({*PAGES} - reached(PAGES[0])) == []


def test_a_page_that_no_link_leads_to_is_found(tmp_path):
    pages = {"a": "[b](b.md#c)", "b": "[a](a.md) [d](https://x.org/d.md)", "d": ""}
    for name, text in pages.items():
        (tmp_path / f"{name}.md").write_text(text, encoding="utf-8")
    assert {path.stem for path in reached(tmp_path / "a.md")} == {"a", "b"}
