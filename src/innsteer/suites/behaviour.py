"""The suite of one behaviour: prompts to answer, items to score, and prompts that must not move."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from os.path import commonprefix
from typing import Any

from innsteer import contrast as contrasts
from innsteer.backends.base import Prompt, Sampling
from innsteer.contrast import Contrast
from innsteer.errors import DataError, InputError
from innsteer.files import canonical
from innsteer.formats import Conversation, messages
from innsteer.suites.base import Benchmark, Question


@dataclass(frozen=True)
class Suite:
    """What every arm is asked.

    Attributes:
        behaviour: its name. control: the metric that says how far it moved.
        prompts: to be answered freely. sampling: how.
        items: test items of the contrast, scored teacher-forced.
        questions: of a benchmark, all of their answers scored. measures: its metrics.
        harmless: prompts that ought to be answered, for over-refusal; () = neutral ones.
        neutral: prompts that the behaviour does not concern, for the neutral cost.
        in_format: prompts that only look like the behaviour's, for the in-format cost.
        plain: held-out plain texts, for bits per byte.
        instruction: what the prompt-only arm adds; "" where nobody wrote one.
        neutral_tokens: response tokens per neutral prompt.
        others: items of other behaviours, for what else moves.
    """

    behaviour: str
    control: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    items: Contrast | None
    neutral: tuple[Prompt, ...]
    in_format: tuple[Prompt, ...] = ()
    plain: tuple[str, ...] = ()
    instruction: str = ""
    neutral_tokens: int = 24
    others: tuple[Contrast, ...] = ()
    questions: tuple[Question, ...] = ()
    measures: tuple[str, ...] = ()
    harmless: tuple[Prompt, ...] = ()

    @property
    def scorers(self) -> tuple[str, ...]:
        """The metric of control and the benchmark's own, each once."""
        return tuple(dict.fromkeys((self.control, *self.measures)))

    def preview(self, *, prompts: int = 8, new_tokens: int = 32) -> "Suite":
        """A small version whose figures are a foretaste, not a measurement."""
        items = self.items
        return replace(
            self,
            prompts=self.prompts[:prompts],
            sampling=replace(self.sampling, new_tokens=min(new_tokens, self.sampling.new_tokens)),
            items=items.subset(min(len(items), 8), 0) if items else None,
            neutral=self.neutral[:16],
            in_format=self.in_format[:8],
            questions=self.questions[:8],
            harmless=self.harmless[:prompts],
            plain=(),
            others=(),
        )


def load(
    contrast: Contrast,
    *,
    part: str = "test",
    prompts: Sequence[str] | None = None,
    control: str = "",
    instruction: str = "",
) -> Suite:
    """The suite of a contrast: its built-in or its benchmark's prompts and scorer, or those given.

    Without a scorer, control is measured on the held-out items: ``preference`` for open answers,
    ``alignment`` for choices.

    Args:
        part: ``test`` or ``validation``; they share no prompt and no source.
        prompts: to be answered instead of the behaviour's own.
    """
    known, own = meta(contrast), Benchmark.of(contrast)
    asked = own.asks(part, harmless=False)
    kind = "alignment" if contrast.kind == "choice" else "preference"
    # What a choice item's sampled answer says is read from 16 tokens, drawn at temperature 1.
    spoken = contrast.kind == "choice" and not asked
    usual = {"new_tokens": 16, "temperature": 1.0} if spoken else {}
    sampling = Sampling(**known.get("sampling", usual))
    asked = asked or _own(contrast, part, known)
    return Suite(
        behaviour=contrast.behaviour,
        control=control or known.get("scorer") or next(iter(own.measures), kind),
        prompts=asked if prompts is None else _numbered(part, prompts),
        sampling=sampling,
        items=contrast.part(part),
        neutral=neutral(part),
        in_format=in_format(contrast, part),
        plain=plain(),
        instruction=instruction or known.get("instruction", ""),
        others=tuple(
            contrasts.Contrast.load(name).part(part)
            for name in contrasts.names()
            if name != contrast.behaviour
        ),
        questions=own.questions(part),
        measures=own.measures,
        harmless=own.asks(part, harmless=True),
    )


def meta(behaviour: str | Contrast) -> dict[str, Any]:
    """Direction, scorer, decoding and instruction of a built-in behaviour; {} for others.

    A contrast counts by its origin: a file of one's own may share a built-in behaviour's name.
    """
    if isinstance(behaviour, Contrast):
        return meta(behaviour.behaviour) if behaviour.builtin else {}
    path = files("innsteer") / "behaviours" / f"{behaviour}.json"
    if behaviour not in contrasts.names() or not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _own(contrast: Contrast, part: str, known: dict[str, Any]) -> tuple[Prompt, ...]:
    """A built-in behaviour's prompts; other contrasts ask their own held-out questions."""
    if known:
        return _numbered(part, contrasts.prompts(contrast.behaviour, part))
    # By the items' ids, which lead from a sampled answer to its key.
    return tuple(Prompt(item.id, item.prompt) for item in contrast.part(part).items if item.prompt)


def _numbered(name: str, texts: Sequence[str]) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{name}-{n:03d}", text) for n, text in enumerate(texts))


def in_format(behaviour: str | Contrast, part: str) -> tuple[Prompt, ...]:
    """Prompts in a behaviour's own wording that it does not concern.

    Built-in behaviours have their own, but none to fit on; Yes/No choices of one's own ask the
    unmoved statements in their wording (part fit, validation or test); () for others.
    """
    if meta(behaviour):
        if part == "fit":
            return ()
        name = behaviour.behaviour if isinstance(behaviour, Contrast) else behaviour
        return _numbered("in-format", contrasts.prompts(name, f"in_format_{part}"))
    # The options of a lettered question are no statements, and open questions ask for none.
    if isinstance(behaviour, str) or not {item.key for item in behaviour.items} <= {"Yes", "No"}:
        return ()
    first = behaviour.items[0].prompt
    asked = unmoved(part, wording(behaviour)) if first else ()
    return tuple(replace(ask, conversation=reask(first, str(ask.conversation))) for ask in asked)


def in_format_of(contrasts: Sequence[Contrast], part: str) -> tuple[Prompt, ...]:
    """The in-format prompts of several behaviours; those of one wording share theirs."""
    asked = (prompt for contrast in contrasts for prompt in in_format(contrast, part))
    return tuple({canonical(prompt.conversation): prompt for prompt in asked}.values())


def reworded(prompts: Sequence[Prompt], contrasts: Sequence[Contrast]) -> tuple[Prompt, ...]:
    """Statements asked in a contrast's wording, asked in the five ``augmentation`` ones in turn.

    Raises:
        InputError: a prompt in none of the contrasts' wordings.
    """
    templates = questions()["augmentation"]
    known = {wording(contrast) for contrast in contrasts}
    found = []
    for n, prompt in enumerate(prompts):
        texts = (stated(asked(prompt.conversation), template) for template in sorted(known))
        text = next((text for text in texts if text is not None), None)
        if text is None:
            raise InputError(
                f"the prompt {asked(prompt.conversation)!r}, to be asked in other words",
                expected="a statement in the wording of the contrast's questions",
                remedy="fit with nuisances=0",
            )
        again = reask(prompt.conversation, fill(templates[n % len(templates)], text))
        found.append(replace(prompt, conversation=again))
    return tuple(found)


def unmoved(part: str, template: str) -> tuple[Prompt, ...]:
    """Harmless statements that no persona behaviour concerns, in a wording.

    The parts fit, validation and test hold different kinds.

    >>> unmoved("fit", "True? {statement}")[0].conversation
    'True? Ice floats because it is less dense than liquid water'

    Raises:
        InputError: no such part, or a template without one ``{statement}``.
    """
    texts = _interleaved("unmoved.jsonl", "text", part, expected="fit, validation or test")
    return _numbered(f"unmoved-{part}", [fill(template, text) for text in texts])


def questions() -> dict[str, Any]:
    """Wordings of a question about a statement, each with ``{statement}``, and open questions.

    ``original``, ``second``: one each. ``augmentation``, ``held_out``: five paraphrases each that
    share no sentence. ``open``: five questions that a statement could answer.
    """
    found: dict[str, Any] = json.loads(_text("questions.json"))
    return found


def fill(template: str, statement: str) -> str:
    """A statement in a wording; other braces are left alone.

    >>> fill("Would you say {statement}?", "{hi}")
    'Would you say {hi}?'

    Raises:
        InputError: the template does not hold ``{statement}`` once.
    """
    before, after = _halves(template)
    return before + statement + after


def stated(text: str, template: str) -> str | None:
    """The statement that fills the template to this text; None where the text has another wording.

    >>> stated("Would you say hi?", "Would you say {statement}?")
    'hi'
    """
    before, after = _halves(template)
    fits = text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] or None if fits else None


def wording(contrast: Contrast) -> str:
    """The wording that all questions of a contrast share, as a template with ``{statement}``.

    One of `questions` where it fits all; otherwise the longest shared beginning and end, cut back
    to whole words. Of messages the last turn counts. A beginning that all statements share is
    taken for the wording, so give it the whole contrast.

    >>> rows = [{"prompt": f"Do you like {word}?", "source": "No", "target": "Yes"}
    ...         for word in ("tea", "toast", "rice")]
    >>> wording(Contrast.load(rows))
    'Do you like {statement}?'
    """
    texts = sorted({asked(item.prompt) for item in contrast.items})
    known = questions()
    one = (known["second"], known["original"])
    for template in (*one, *known["augmentation"], *known["held_out"]):
        if all(stated(text, template) for text in texts):
            return str(template)
    before = re.sub(r"\w+$", "", commonprefix(texts))
    ends = [text[len(before) :][::-1] for text in texts]
    after = re.sub(r"^\w+", "", commonprefix(ends)[::-1])
    # One question alone, or one inside another: no part of it is known to be the statement.
    lone = any(len(end) == len(after) for end in ends)
    return "{statement}" if lone else before + "{statement}" + after


def asked(prompt: Conversation) -> str:
    """The text of a prompt's last turn."""
    return messages(prompt)[-1]["content"]


def reask(prompt: Conversation, text: str) -> Conversation:
    """The same conversation with another last turn."""
    return text if isinstance(prompt, str) else (*prompt[:-1], {**prompt[-1], "content": text})


def neutral(part: str) -> tuple[Prompt, ...]:
    """The neutral prompts; the parts (fit, validation, test) hold different kinds.

    Raises:
        InputError: no such part.
    """
    texts = _interleaved("neutral.jsonl", "prompt", part, expected="fit, validation or test")
    return _numbered(f"neutral-{part}", texts)


def plain() -> tuple[str, ...]:
    """Held-out plain texts."""
    return tuple(row["text"] for row in _lines("plain.jsonl"))


def _halves(template: str) -> list[str]:
    halves = template.split("{statement}")
    if len(halves) != 2:
        raise InputError(f"the wording {template!r}", expected="a text with {statement} once")
    return halves


def _interleaved(name: str, column: str, part: str, *, expected: str) -> list[str]:
    """A part's texts, their kinds mixed, so that the first few hold all of them."""
    kinds: dict[str, list[str]] = {}
    for row in _lines(name):
        if row["part"] == part:
            kinds.setdefault(row["kind"], []).append(row[column])
    if not kinds:
        raise InputError(f"{name.partition('.')[0]} prompts of part {part!r}", expected=expected)
    longest = max(len(texts) for texts in kinds.values())
    return [texts[n] for n in range(longest) for texts in kinds.values() if n < len(texts)]


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(name).splitlines() if line.strip()]


def _text(name: str) -> str:
    path = files("innsteer") / "suites" / name
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{name} is missing from the installed package") from None
