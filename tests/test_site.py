"""Site and Where: names of places, and the arithmetic of positions."""

import pytest

from innsteer.errors import InputError, PositionError, UnknownName
from innsteer.site import STREAMS, Site, Where


@pytest.mark.parametrize(
    ("text", "site"),
    [
        (7, Site(7)),
        ("7", Site(7)),
        ("7.mlp", Site(7, "mlp")),
        ("model.layers.7", Site(7)),
        ("transformer.h.7.attention_norm", Site(7, "attention_norm")),
        ("blocks.7.hook_resid_post", Site(7)),
        (Site(7, "heads"), Site(7, "heads")),
    ],
)
def test_a_site_is_read_from_its_spellings(text, site):
    assert Site.parse(text) == site


@pytest.mark.parametrize("stream", STREAMS)
def test_a_site_survives_being_written_and_read(stream):
    assert Site.parse(str(Site(12, stream))) == Site(12, stream)


@pytest.mark.parametrize("text", ["", "mlp", "1.2", "-1", "7.nonsense", "7.mlp.strange", "1.5"])
def test_a_site_that_is_none_is_refused(text):
    with pytest.raises(InputError):
        Site.parse(text)


def test_a_negative_layer_and_an_unknown_stream_are_refused():
    with pytest.raises(InputError, match="layer -1"):
        Site(-1)
    with pytest.raises(UnknownName, match="mlp"):
        Site(1, "mpl")


def test_sites_stand_in_order_of_their_layers():
    assert sorted([Site(10), Site(2, "mlp"), Site(2)]) == [Site(2, "mlp"), Site(2), Site(10)]


@pytest.mark.parametrize(
    ("where", "spans"),
    [
        ("generated", ((6, None),)),
        ("prompt", ((0, 6),)),
        ("all", ((0, None),)),
        ("range:2:5", ((2, 5),)),
        ("range:2:", ((2, None),)),
        ("assistant", ((1, 4), (6, None))),
    ],
)
def test_a_scope_is_these_spans(where, spans):
    assert Where.parse(where).spans(prompt=7, turns=[(1, 4), (6, 7)]) == spans
    assert str(Where.parse(where)) == where


def test_only_a_turn_that_reaches_the_prompts_end_is_open():
    where = Where("assistant")
    assert where.spans(prompt=9, turns=[(1, 4), (6, 8)]) == ((1, 4), (6, 8))
    assert where.spans(prompt=9, turns=[(8, 12)]) == ((8, None),)
    assert where.spans(turns=[(1, 4)]) == ((1, 4),)
    assert where.spans(prompt=9, turns=[]) == ()


def test_a_one_token_prompt_has_no_earlier_token():
    assert Where().spans(prompt=1) == ((0, None),)
    assert Where("prompt").spans(prompt=1) == ((0, 0),)


@pytest.mark.parametrize("scope", ["generated", "prompt"])
def test_an_unknown_prompt_is_an_error_with_a_remedy(scope):
    with pytest.raises(PositionError, match="prompt_lengths"):
        Where(scope).spans()


def test_unknown_turns_are_an_error_with_a_remedy():
    with pytest.raises(PositionError, match="turns="):
        Where("assistant").spans(prompt=3)


@pytest.mark.parametrize(
    "text", ["everything", "range", "range:5:2", "range:a:b", "range:-1:2", "range:1:2:3", "all:1"]
)
def test_a_where_that_is_none_is_refused(text):
    with pytest.raises(InputError):
        Where.parse(text)


def test_ends_belong_to_ranges_alone():
    with pytest.raises(InputError, match="scope 'range'"):
        Where("all", 2, 5)
