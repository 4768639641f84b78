"""Every exception that innsteer raises on purpose, as one tree.

    InnsteerError                    exit code 1   something innsteer could not do
    ├── InputError (ValueError)      exit code 2   a value or file that you gave is not usable
    │   ├── UnknownName (KeyError)                 no such method, behaviour, scope, stream ...
    │   ├── DataError                              a contrast file or its rows
    │   │   └── LeakError                          one group of items on both sides of a split
    │   ├── LayoutError                            the model's blocks could not be found
    │   └── FormatError                            an artifact or recording is damaged or foreign
    ├── RefusedError                 exit code 3   it would run, but not do what you asked
    │   ├── MismatchError                          the artifact belongs to another model
    │   └── PositionError                          which tokens to steer cannot be known
    ├── NothingSteeredError          exit code 1   a steered run in which no token was touched
    ├── BudgetError                  exit code 1   no strength stays within the cost budget
    └── MissingPackage (ImportError) exit code 2   an optional package is needed

A message says what was wrong with which value, what was expected, and what to do.
"""


class InnsteerError(Exception):
    """What went wrong, what was expected and what to do, in one message.

    >>> print(InnsteerError("layer 40 of a model with 30", expected="0 to 29", remedy="pick one"))
    layer 40 of a model with 30; expected 0 to 29; pick one
    """

    exit_code = 1

    def __init__(self, what: str, *, expected: str = "", remedy: str = "") -> None:
        parts = [what, f"expected {expected}" if expected else "", remedy]
        self.message = "; ".join(part for part in parts if part)
        super().__init__(self.message)

    def __str__(self) -> str:
        """The message itself: KeyError, a base of one leaf, would print its repr."""
        return self.message


class InputError(InnsteerError, ValueError):
    """A value or file given by the user is not usable."""

    exit_code = 2


class UnknownName(InputError, KeyError):
    """A name that is not among the known ones; the message lists them and the nearest."""

    def __init__(self, kind: str, name: object, known: "list[str] | tuple[str, ...]") -> None:
        from difflib import get_close_matches

        nearest = get_close_matches(str(name), known, n=1)
        super().__init__(
            f"unknown {kind} {name!r}",
            expected="one of " + ", ".join(known),
            remedy=f"did you mean {nearest[0]!r}?" if nearest else "",
        )


class DataError(InputError):
    """A contrast file or its rows cannot be used."""


class LeakError(DataError):
    """The same group of items stands on both sides of a split."""


class LayoutError(InputError):
    """The parts of a model could not be found by structure."""


class FormatError(InputError):
    """An artifact or recording is damaged, incomplete or of a foreign format."""


class RefusedError(InnsteerError):
    """It would run, but would not do what was asked."""

    exit_code = 3


class MismatchError(RefusedError):
    """An artifact was made for another model, tokenizer or chat template."""


class PositionError(RefusedError):
    """Which tokens to steer cannot be known from what was given."""


class NothingSteeredError(InnsteerError):
    """A steered run ended without a single touched token."""


class BudgetError(InnsteerError):
    """No strength stays within the cost budget."""


class MissingPackage(InnsteerError, ImportError):
    """An optional package is needed; the message holds the exact install command."""

    exit_code = 2

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}",
            remedy=f"install it with: pip install 'innsteer[{extra}]'",
        )
