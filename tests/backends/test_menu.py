"""Menus and orders: names, strengths, scopes, what keeps caches apart, and receipts."""

from dataclasses import replace

import pytest
import torch

from innsteer.backends.menu import Choice, Dish, Menu, Order, offered
from innsteer.calibration import Calibration, Dose
from innsteer.errors import (
    BudgetError,
    InputError,
    MismatchError,
    NothingSteeredError,
    PositionError,
    RefusedError,
    UnknownName,
)
from innsteer.interventions import Edit, Shift
from innsteer.site import Site, Where
from innsteer.steerer import Interventions, get
from innsteer.steering import Steering

CURVE = Calibration(tuple(Dose(s, s * s / 100, 0, 1, s) for s in (0.0, 1.0, 2.0)), 0.04, 2.0, 300)


def dish(name="kind", where="generated", behaviours=("b",), identity=None, **calibration):
    steering = Steering(
        get("diffmean"),
        Interventions({Site(1): Shift(4, len(behaviours))}),
        behaviours,
        Where.parse(where),
        calibration=calibration,
    )
    mine = identity or name * 3
    return Dish(name, mine, steering.interventions, behaviours, steering.where, steering.resolve)


def ordered(menu, text, prompt=7, length=12, **more):
    return menu.order(text, prompt=prompt, length=length, **more)


def test_strengths_are_numbers_of_the_calibration():
    menu = Menu([dish("kind", b=CURVE), dish("calm")])
    assert ordered(menu, "kind+calm").choices[0].coef == (2.0,)
    assert ordered(menu, "kind@0.01nat").choices[0].coef == (1.0,)
    assert [c.coef for c in ordered(menu, "kind@-0.5+calm").choices] == [(-0.5,), (1.0,)]
    with pytest.raises(BudgetError):
        ordered(menu, "kind@9nat")
    with pytest.raises(InputError, match="was not tuned"):
        ordered(menu, "calm@budget")


def test_behaviours_of_one_map_are_columns_of_one_row():
    menu = Menu([dish("both", behaviours=("wealth", "power")), dish("calm")])
    assert menu.names == ["both.wealth", "both.power", "calm"]
    (one,) = ordered(menu, "both.power@0.5+both.wealth@-1").choices
    assert one.coef == (-1.0, 0.5)
    with pytest.raises(UnknownName, match="both.wealth"):
        ordered(menu, "both@1")


def test_strength_zero_orders_nothing():
    menu = Menu([dish("kind"), dish("calm")])
    order = ordered(menu, "kind@0+calm@0.0")
    assert order.choices == () and order.key(0, 100) is None
    assert [c.number for c in ordered(menu, "kind@0+calm@1").choices] == [1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nice@1", "unknown steering 'nice'"),
        ("calm@1+kind@1", "the order in which they are applied: kind, calm"),
        ('kind(to="you")@1', "it takes none"),
        ("kind@1e9", "a finite number"),
    ],
)
def test_what_cannot_be_ordered_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        ordered(Menu([dish("kind"), dish("calm")]), text)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a@1", "../up", "kind"])
def test_a_name_that_no_request_could_say_is_refused(name):
    with pytest.raises(InputError):
        Menu([dish("kind"), dish(name, identity="x")])


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "spans"),
    [
        ("generated", ((6, None),)),
        ("prompt", ((0, 6),)),
        ("all", ((0, None),)),
        ("range:3:5", ((3, 5),)),
    ],
)
def test_scopes_become_absolute_spans(where, spans):
    assert ordered(Menu([dish("kind", where)]), "kind@1").choices[0].spans == spans


def test_turns_are_given_or_the_scope_is_refused():
    menu = Menu([dish("kind", "assistant")])
    with pytest.raises(PositionError, match="without the conversation's turns"):
        ordered(menu, "kind@1")
    assert ordered(menu, "kind@1", turns=[(2, 4), (6, 7)]).choices[0].spans == ((2, 4), (6, None))


def test_a_scope_without_a_token_is_refused():
    menu = Menu([dish("kind", "range:12:20"), dish("calm", "prompt")])
    with pytest.raises(NothingSteeredError, match="at least one token in scope"):
        ordered(menu, "kind@1")
    assert ordered(menu, "kind@1", length=13)
    with pytest.raises(NothingSteeredError, match="a prompt of 1 tokens and at most 12 new ones"):
        ordered(menu, "calm@1", prompt=1)


def test_scoring_a_prompt_needs_to_know_where_the_answer_begins():
    menu = Menu([dish("kind"), dish("ever", "all")])
    with pytest.raises(PositionError, match="steering_prompt"):
        ordered(menu, "kind@1", scored=True)
    assert ordered(menu, "ever@1", scored=True)


def test_within_cuts_spans():
    choice = Choice(0, (1.0,), ((2, 4), (6, None)))
    assert choice.within(0, 3) == [(2, 3)]
    assert choice.within(3, 9) == [(3, 4), (6, 9)]
    assert choice.within(4, 6) == []


# --- the cache's keys ----------------------------------------------------------------------------


def test_blocks_are_apart_where_something_is_steered_and_only_there():
    order = ordered(Menu([dish("kind")]), "kind@1", prompt=200, length=300)
    assert order.key(0, 128) is None and order.key(0, 199) is None
    assert order.key(128, 256) == order.key(256, 384) == order.salt


def test_a_salt_covers_everything_that_changes_the_edit():
    menu = Menu([dish("kind"), dish("calm"), dish("all", "all")])

    def salt(text="kind@1+calm@1", menu=menu, **given):
        return ordered(menu, text, **given).salt

    other = Menu([dish("kind", identity="other"), dish("calm")])
    apart = [
        salt(),
        salt("kind@1"),
        salt("calm@1"),
        salt("kind@1+calm@1.0000001"),
        salt(menu=other),
        salt(prompt=8),
        salt("all@1"),
    ]
    assert len(set(apart)) == len(apart)
    assert salt("kind@1.00+calm@1") == salt() and salt("kind@1+calm@1+all@0") == salt()
    assert salt("all@1", prompt=9) == salt("all@1")  # its edit does not depend on the prompt's end


def test_an_order_travels_as_plain_data():
    order = ordered(Menu([dish("kind")]), "kind@1", receipt="r")
    data = order.to_json()
    data["choices"] = [
        one | {"coef": list(one["coef"]), "spans": list(map(list, one["spans"]))}
        for one in data["choices"]
    ]
    assert Order.from_json(data) == order


# --- contexts, receipts, folders -----------------------------------------------------------------


def contextual(name, where="generated"):
    one = dish(name, where)
    one.interventions[Site(1)].contextual = True
    return one


def test_a_map_that_reads_prompts_needs_one_and_edits_after_it():
    menu = Menu([contextual("wise"), dish("calm")])
    assert menu.contextual(ordered(menu, "wise@1")) and not menu.contextual(ordered(menu, "calm@1"))
    with pytest.raises(PositionError, match="at least 3 tokens"):
        ordered(menu, "wise@1", prompt=2)
    with pytest.raises(RefusedError, match="scope 'generated'"):
        Menu([contextual("wise", "all")])


def test_a_receipt_tells_identities_strengths_and_counts_or_fails():
    menu = Menu([dish("both", behaviours=("x", "y")), dish("calm")])
    tally = {"touched": 3, "cached": 0, "edited": 2, "displacement": 0.1, "nonfinite": 0}
    one, two = menu.told("both.y@2+calm@1", {0: tally, 1: tally | {"touched": 9}})
    whose = {"name": "both", "identity": "bothbothboth", "strengths": {"both.y": 2.0}}
    assert one == whose | tally
    assert two["touched"] == 9
    assert menu.told("calm@0", {}) == []
    for tallies in ({0: tally}, {0: tally, 1: tally | {"touched": 0}}):
        with pytest.raises(NothingSteeredError, match="'calm' touched no token"):
            menu.told("both.y@2+calm@1", tallies)


def test_a_folder_is_still_the_steering_that_was_meant(tmp_path):
    part = Shift(4)
    steering = Steering(get("diffmean"), Interventions({Site(1): part}), ("b",))
    entry = {"folder": str(steering.save(tmp_path / "s")), "identity": steering.identity}
    (loaded,) = Menu.load({"kind": entry}).dishes
    assert loaded.identity == steering.identity and loaded.asked_as == ("kind",)
    part.shifts += 1
    replace(steering).save(tmp_path / "s", replace=True)
    with pytest.raises(MismatchError, match="when the engine was started"):
        Menu.load({"kind": entry})


def test_an_edit_is_offered_by_its_columns():
    edit = Edit(Interventions({Site(1): Shift(4, 2)}), torch.ones(2))
    order = ordered(Menu([offered("e", edit, "id")]), "e.0@0.1+e.1@-0.30000000000000004")
    assert order.choices[0].coef == (0.1, -0.30000000000000004)
