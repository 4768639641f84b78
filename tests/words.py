"""A small made-up contrast: open pairs or choices, in given parts."""

from innsteer.contrast import Contrast

WORDS = "tea rain salt dusk iron wool jazz rope moss clay fern lamp reed coal tide".split()
PARTS = ("train", "train", "train", "validation", "test")


def register(word):
    """An open pair: target, source."""
    return f"Sir, {word}.", f"{word}, mate."


def yes_or_no(word):
    """A choice: the matching answer, the other; both keys occur in every part."""
    return ("Yes", "No") if WORDS.index(word) % 2 else ("No", "Yes")


def rows(answers=register, parts=PARTS):
    """Rows in the preference format."""
    return [
        {
            "prompt": f"What is {word}?",
            "chosen": answers(word)[0],
            "rejected": answers(word)[1],
            "split": parts[n % len(parts)],
        }
        for n, word in enumerate(WORDS)
    ]


def contrast(answers=register, parts=PARTS):
    """The contrast "formal-ish" of these rows."""
    return Contrast.load(rows(answers, parts), behaviour="formal-ish")
