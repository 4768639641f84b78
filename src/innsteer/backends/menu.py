"""What a serving engine has on offer, and what one request orders of it: checked once, on entry.

A menu turns the string of a request into an order of plain numbers. What runs later, the cache's
keys, the rows of a batch and the receipt, reads the order alone. Knows no engine.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from innsteer import __version__, mixes
from innsteer.errors import (
    InputError,
    MismatchError,
    NothingSteeredError,
    PositionError,
    RefusedError,
    UnknownName,
)
from innsteer.files import canonical
from innsteer.interventions import Edit
from innsteer.site import Span, Where
from innsteer.steerer import Interventions
from innsteer.steering import Steering

MARK = "innsteer"


@dataclass(frozen=True)
class Dish:
    """One steering on offer.

    Attributes:
        name: as requests call it. identity: of the artifact, for salts and receipts.
        resolve: a strength as a number, of a strength as written (None: calibrated) and a
            behaviour.
    """

    name: str
    identity: str
    interventions: Interventions
    behaviours: tuple[str, ...]
    where: Where
    resolve: Callable[[str | None, str], float]

    @property
    def asked_as(self) -> tuple[str, ...]:
        """What requests call its behaviours: NAME, or NAME.BEHAVIOUR where it has several."""
        if len(self.behaviours) == 1:
            return (self.name,)
        return tuple(f"{self.name}.{behaviour}" for behaviour in self.behaviours)


@dataclass(frozen=True)
class Choice:
    """One steering of an order.

    Attributes:
        number: its place on the menu. coef: one strength per behaviour.
        spans: half-open spans of steered positions; None: no end.
    """

    number: int
    coef: tuple[float, ...]
    spans: tuple[Span, ...]

    def within(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The steered positions in ``[start, stop)``, as half-open spans.

        >>> Choice(0, (1.0,), ((6, None),)).within(4, 9)
        [(6, 9)]
        """
        cut = [(max(a, start), stop if b is None else min(b, stop)) for a, b in self.spans]
        return [(a, b) for a, b in cut if a < b]


@dataclass(frozen=True)
class Order:
    """What one request is steered by, in the order in which it is applied.

    Attributes:
        prompt: number of prompt tokens. salt: digest of everything that changes the edit.
        receipt: under which its receipt is kept; "" = none is.
    """

    choices: tuple[Choice, ...]
    prompt: int
    salt: str
    receipt: str = ""

    def key(self, start: int, stop: int) -> str | None:
        """What keeps the cached block of tokens ``[start, stop)`` apart from others', if anything.

        Blocks in which nothing is steered are those of the plain model, and are shared with it;
        what follows a steered block is apart by the chain of hashes that an engine keeps.
        """
        if any(choice.within(start, stop) for choice in self.choices):
            return self.salt
        return None

    def tokens(self, length: int) -> int:
        """How many of the first ``length`` positions are steered, each counted once.

        >>> Order((Choice(0, (1.0,), ((2, 5),)), Choice(1, (1.0,), ((4, None),))), 5, "").tokens(8)
        6
        """
        spans = [span for choice in self.choices for span in choice.within(0, length)]
        return len({position for start, stop in spans for position in range(start, stop)})

    def to_json(self) -> dict[str, Any]:
        """Plain data, to go with a request through the engine's processes."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Order":
        """What ``to_json`` made; a message between processes makes lists of tuples."""
        choices = tuple(
            Choice(one["number"], tuple(one["coef"]), tuple((a, b) for a, b in one["spans"]))
            for one in data["choices"]
        )
        return cls(choices, data["prompt"], data["salt"], data["receipt"])


class Menu:
    """Steerings by name, in the order in which they are applied.

    Raises:
        InputError: a name that no request could say, or one that is given twice.
        RefusedError: a steering that reads prompts and would steer them, or one across tokens.
    """

    def __init__(self, dishes: Sequence[Dish] = ()) -> None:
        self.dishes: list[Dish] = []
        for dish in dishes:
            self.add(dish)

    @classmethod
    def load(cls, folders: Mapping[str, Mapping[str, str]]) -> "Menu":
        """The steerings of folders: name -> ``{"folder": ..., "identity": ...}``.

        Raises:
            FormatError: a folder is damaged. MismatchError: it holds another steering by now.
        """
        return cls(
            [_dish(name, Path(one["folder"]), one["identity"]) for name, one in folders.items()]
        )

    def add(self, dish: Dish) -> int:
        """Put one more on offer, applied after those before; returns its number."""
        if dish.interventions.contextual and dish.where != Where():
            raise RefusedError(
                f"scope {dish.where} for a steering that reads the prompt",
                expected="scope 'generated': what is read must stand before what is steered",
            )
        if dish.interventions.across_tokens:
            raise RefusedError(
                f"steering {dish.name!r}, which acts across tokens",
                expected="maps of rows alone: this engine keeps nothing of a request's earlier "
                "tokens for a map",
                remedy="run it by the hf backend",
            )
        for name in dish.asked_as:
            if [part.name for part in mixes.parse(name)] != [name] or name in self.names:
                raise InputError(
                    f"steering named {name!r}",
                    expected="letters, digits, dots, dashes and underscores, and each name once",
                )
        self.dishes.append(dish)
        return len(self.dishes) - 1

    @property
    def names(self) -> list[str]:
        """Everything that a request can name."""
        return [name for dish in self.dishes for name in dish.asked_as]

    def order(
        self,
        text: str,
        *,
        prompt: int,
        length: int,
        scored: bool = False,
        turns: Sequence[Span] | None = None,
        receipt: str = "",
    ) -> Order:
        """What a request's string asks for, in numbers.

        Args:
            text: see ``mixes``. Behaviours of one steering add; different ones stand in the menu's
                order, in which they are applied.
            prompt: number of prompt tokens.
            length: tokens that may go through the model: prompt and new ones, less the last.
            scored: log-probabilities of the prompt are asked for, and nothing says where in it an
                answer begins.
            turns: assistant turns, for scope ``assistant``.
            receipt: where the receipt is kept.

        Raises:
            InputError: not of the grammar, an unknown name, another order, or parameters.
            PositionError: which tokens lie in scope cannot be known.
            NothingSteeredError: none does.
        """
        choices = tuple(
            Choice(number, row, self._spans(number, prompt, scored, turns))
            for number, row in self.mixed(text).items()
        )
        for choice in choices:
            if not choice.within(0, length):
                raise NothingSteeredError(
                    f"steering {self.dishes[choice.number].name!r} of scope "
                    f"{self.dishes[choice.number].where} for a prompt of {prompt} tokens and at "
                    f"most {length - prompt + 1} new ones",
                    expected="at least one token in scope",
                )
        return Order(choices, prompt, self._salt(choices), receipt)

    def mixed(self, text: str) -> dict[int, tuple[float, ...]]:
        """The coefficients that a request's string asks for, by number; those of 0 are left out.

        Raises:
            InputError: not of the grammar, an unknown name, another order, or parameters.
        """
        rows: dict[int, list[float]] = {}
        for part in mixes.parse(text):
            number, column = self._find(part.name)
            dish = self.dishes[number]
            if part.parameters:
                told = ", ".join(key for key, _ in part.parameters)
                raise InputError(
                    f"parameters {told} of steering {part.name!r}", expected="none: it takes none"
                )
            if rows and number < max(rows):
                raise InputError(
                    f"steering {text!r}",
                    expected="the order in which they are applied: " + ", ".join(self.names),
                    remedy="say them in that order",
                )
            value = dish.resolve(part.strength or None, dish.behaviours[column])
            rows.setdefault(number, [0.0] * len(dish.behaviours))[column] = value
        return {number: tuple(row) for number, row in rows.items() if any(row)}

    def contextual(self, order: Order) -> bool:
        """Whether it reads prompts: all their tokens must then go by, none come from a cache."""
        return any(self.dishes[one.number].interventions.contextual for one in order.choices)

    def told(self, text: str, tallies: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A receipt: per steering its name, its identity, its strengths, and what it did.

        Args:
            text: what was asked. tallies: by number, see ``ragged.Tally``.

        Raises:
            NothingSteeredError: one of them touched no token.
        """
        found = []
        for number, coef in self.mixed(text).items():
            dish = self.dishes[number]
            tally = tallies.get(number)
            if tally is None or not tally["touched"]:
                raise NothingSteeredError(
                    f"steering {dish.name!r} touched no token of this response",
                    expected="at least one",
                )
            strengths = dict(zip(dish.asked_as, coef, strict=True))
            acting = {name: value for name, value in strengths.items() if value}
            whose = {"name": dish.name, "identity": dish.identity, "strengths": acting}
            found.append(whose | dict(tally))
        return found

    def _find(self, name: str) -> tuple[int, int]:
        """The steering and the column that a name means."""
        for number, dish in enumerate(self.dishes):
            if name in dish.asked_as:
                return number, dish.asked_as.index(name)
        raise UnknownName("steering", name, self.names)

    def _spans(
        self, number: int, prompt: int, scored: bool, turns: Sequence[Span] | None
    ) -> tuple[Span, ...]:
        """The spans of a steering's scope in one request."""
        dish = self.dishes[number]
        if scored and dish.where.scope in ("generated", "prompt"):
            raise PositionError(
                f"log-probabilities of a prompt under scope {dish.where}",
                expected="to know where in it the answer begins",
                remedy="say it as steering_prompt=TOKENS beside steering, or serve a steering of "
                "scope 'all'",
            )
        if dish.interventions.contextual and prompt < 3:
            raise PositionError(
                f"a prompt of {prompt} tokens for a steering that reads the prompt",
                expected="at least 3 tokens",
            )
        return dish.where.spans(prompt=prompt, turns=turns)

    def _salt(self, choices: Sequence[Choice]) -> str:
        """Digest of everything that changes the edit; the identity covers the tensors' dtype."""
        told = [[self.dishes[c.number].identity, c.coef, c.spans] for c in choices]
        return hashlib.sha256(canonical([MARK, __version__, told])).hexdigest()


def offered(name: str, edit: Edit, identity: str) -> Dish:
    """An edit on offer whose strengths are numbers, one per column: ``NAME.0``, ``NAME.1``."""
    columns = tuple(map(str, range(edit.coef.shape[-1])))
    return Dish(
        name, identity, edit.interventions, columns, edit.where, lambda value, _: float(value or 1)
    )


def _dish(name: str, folder: Path, identity: str) -> Dish:
    """A folder's steering, still the one that was meant."""
    steering = Steering.load(folder)
    if steering.identity != identity:
        raise MismatchError(
            f"{folder} holds the steering {steering.identity[:12]}",
            expected=f"{identity[:12]}, which stood there when the engine was started",
            remedy="start the engine again",
        )
    return Dish(
        name,
        identity,
        steering.interventions,
        steering.behaviours,
        steering.where,
        steering.resolve,
    )
