"""The entry point: errors become one message and an exit code."""

import os
import re
import sys
from typing import Any, NoReturn

import typer

from innsteer.cli.verbs import app
from innsteer.errors import InnsteerError

# From typer itself: some of its versions bring their own click, whose errors are not click's.
UsageError: Any = typer.BadParameter.__base__


def main() -> NoReturn:
    """Entry point: known errors are one message and an exit code, never a traceback."""
    # Threads that spin while they wait burn a core for nothing; read when torch is first loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = app(standalone_mode=False)
    except InnsteerError as error:
        _fail(error, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except UsageError as error:
        if not (message := error.format_message()):  # no argument at all: the help was printed
            sys.exit(2)
        if message.startswith("No such command"):
            verbs = ", ".join(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
            message += f" The verbs: {verbs}"
        _fail(message + _given(message), 2)
    except OSError as error:  # a full disk, a folder that may not be written to
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}; {_left()}", 1)
    if code == 130:
        _fail(f"interrupted; {_left()}", code)
    sys.exit(code if isinstance(code, int) else 0)


def _left() -> str:
    """What a verb that did not end leaves behind."""
    goes_on = {"record", "fit", "extend", "tune", "eval", "compare", "concepts", "axbench"}
    again = sys.argv[1:2] and sys.argv[1] in goes_on
    return "the same command goes on where it stopped" if again else "nothing was written"


def _given(message: str) -> str:
    """What stood behind the option that a message names: typer leaves the value out."""
    for option in re.findall(r"'(--?[a-z-]+)'", message):
        for place, word in enumerate(sys.argv[:-1]):
            if word == option:
                return f" (given: {sys.argv[place + 1]!r})"
    return ""


def _fail(error: object, code: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
