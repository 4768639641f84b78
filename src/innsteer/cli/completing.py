"""What the shell offers for a value that is being typed: names of the shelves, and paths that fit.

Nothing here imports torch: a key press must not cost seconds.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from innsteer import contrast, shelf
from innsteer.formats import is_readable


def methods(incomplete: str) -> list[tuple[str, str]]:
    """Methods, with what each does."""
    return [
        (row["name"], row["summary"])
        for row in shelf.describe()
        if row["name"].startswith(incomplete)
    ]


def methods_or_auto(incomplete: str) -> list[tuple[str, str]]:
    """Methods, and the word that leaves the choice to the data."""
    auto = [("auto", "the simplest that is as good")] if "auto".startswith(incomplete) else []
    return auto + methods(incomplete)


def fields(ctx: typer.Context, incomplete: str) -> list[str]:
    """Fields of the method that was named before, up to their ``=``."""
    method = ctx.params.get("method") or "innsteer"
    known: list[str] = next(
        (row["fields"] for row in shelf.describe() if row["name"] == method), []
    )
    return [f"{name}=" for name in known if f"{name}=".startswith(incomplete)]


def data(incomplete: str) -> list[str]:
    """Built-in behaviours, and files of a format that is read."""
    return _named(contrast.names(), incomplete) + _paths(
        incomplete, lambda path: is_readable(path) and path.is_file()
    )


def steerings(incomplete: str) -> list[str]:
    """Folders of steerings."""
    return _paths(incomplete, lambda path: (path / "steering.json").is_file())


def models(incomplete: str) -> list[str]:
    """The built-in model, those in the Hub's cache, and folders and files that hold one."""
    return _named(["smollm2", *_cached()], incomplete) + _paths(
        incomplete, lambda path: path.suffix == ".gguf" or (path / "config.json").is_file()
    )


def _named(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _cached() -> Iterator[str]:
    """Ids of the models in the Hub's cache, whose folders are models--OWNER--NAME."""
    from huggingface_hub import constants

    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        yield "/".join(folder.name.split("--")[1:])


def _paths(incomplete: str, fits: Callable[[Path], bool]) -> list[str]:
    """What fits in the folder that is being typed, and the folders to go on into."""
    home, _, start = incomplete.rpartition("/")
    folder = Path(f"{home}/" if home or incomplete.startswith("/") else ".").expanduser()
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # no such folder, or none that may be read: there is nothing to offer
        return []
    lead = incomplete[: len(incomplete) - len(start)]
    found = []
    for path in entries:
        if path.name.startswith(start) and (start or not path.name.startswith(".")):
            if fits(path):
                found.append(f"{lead}{path.name}")
            elif path.is_dir():
                found.append(f"{lead}{path.name}/")
    return found
