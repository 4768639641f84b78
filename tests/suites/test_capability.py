"""The capability suite: its questions and their answers."""

import re

import pytest

from innsteer.errors import UnknownName
from innsteer.suites import capability


def test_questions_are_distinct_and_have_two_different_answers():
    items = capability.contrast().items
    assert len(items) == 100
    assert len({item.prompt for item in items}) == len({item.id for item in items}) == 100
    assert all(item.prompt.endswith("?") and item.split == "test" for item in items)
    assert all(item.target and item.source and item.target != item.source for item in items)
    by_kind = [len(capability.contrast(kind)) for kind in capability.KINDS]
    assert sum(by_kind) == 100 and min(by_kind) >= 10


def test_sums_are_right_and_their_wrong_answers_wrong():
    for item in capability.contrast("sum").items:
        total = sum(map(int, re.findall(r"\d+", item.prompt)))
        assert int(item.target) == total != int(item.source)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'capital'"):
        capability.contrast("capitals")
