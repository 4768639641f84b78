"""The grammar of a request's steering: what it reads, and what it refuses."""

import pytest

from innsteer.errors import InputError
from innsteer.mixes import LONGEST, Part, parse


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cheerful", [Part("cheerful")]),
        (
            "cheerful@0.8+formal@-0.3",
            [Part("cheerful", "0.8"), Part("formal", "-0.3")],
        ),
        (" a@+1 + b@.5 ", [Part("a", "+1"), Part("b", ".5")]),
        ("a@1e+2+b@1e-2", [Part("a", "1e+2"), Part("b", "1e-2")]),
        ("a@budget+b@-0.05nat", [Part("a", "budget"), Part("b", "-0.05nat")]),
        ("both.wealth@1+both.power-2", [Part("both.wealth", "1"), Part("both.power-2")]),
        ('a(to="x+y@2)",how="q\\"q")@1', [Part("a", "1", (("to", "x+y@2)"), ("how", 'q"q')))]),
    ],
)
def test_a_mix_is_read(text, parts):
    assert list(parse(text)) == parts


@pytest.mark.parametrize(
    "text",
    ["", "+", "a@", "@1", "a@1+", "+a@1", "a@1++b", "a b", "a@nan", "a@inf", "a@1,b@2", "a=1"]
    + ["a@0x1", "a@1 2", "a(x=1)@1", 'a(x="1"@1', "../a@1", ".a", "a" * (LONGEST + 1), "a@1\nb@1"],
)
def test_what_is_no_mix_is_refused(text):
    with pytest.raises(InputError, match="expected NAME@STRENGTH"):
        parse(text)


def test_a_name_stands_once():
    with pytest.raises(InputError, match="each name once"):
        parse("a@1+b@2+a@3")


@pytest.mark.parametrize("text", ["a", "a@-1e+2+b.c@budget", 'a(to="x\\"y",k="2")@0.05nat+b'])
def test_what_is_written_is_read_again(text):
    assert "+".join(map(str, parse(text))) == text
