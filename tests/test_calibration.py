"""Calibration: strengths in units of cost."""

import math

import pytest
from pydantic import ValidationError

from innsteer.calibration import Calibration, Dose, parse_number
from innsteer.errors import BudgetError, InputError


def curve(*points, budget=0.0953, strength=2.0):
    doses = tuple(Dose(s, n, n, n, abs(s) / 10) for s, n in sorted(points))
    return Calibration(doses, budget, strength, 2000)


QUADRATIC = curve((0, 0), (1, 0.01), (2, 0.04), (4, 0.16), (-1, 0.02), (-2, 0.08))


@pytest.mark.parametrize(
    ("asked", "strength"),
    [
        (1.25, 1.25),
        (-3, -3.0),
        ("1.25", 1.25),
        ("budget", 2.0),
        ("0.01nat", 1.0),
        ("0.04 nats", 2.0),
        ("0.09nat", 3.0),
        (".0025nat", 0.5),
        ("1e-2nat", 1.0),
        ("+0.01nat", 1.0),
        ("-0.02nat", -1.0),
        ("-0.08nat", -2.0),
        ("0nat", 0.0),
    ],
)
def test_a_strength_is_found_on_the_curve(asked, strength):
    assert QUADRATIC.resolve(asked) == pytest.approx(strength)


def test_below_the_least_dose_the_cost_grows_as_the_two_least_show():
    """Feedback costs by the first power: a tenth of a cost is a tenth of a strength."""
    feedback = curve((0, 0), (1, 0.02), (2, 0.04), (-1, 0.01), (-2, 0.08))
    assert feedback.resolve("0.002nat") == pytest.approx(0.1)
    assert feedback.resolve("-0.00125nat") == pytest.approx(-0.5)
    assert curve((0, 0), (2, 0.08)).resolve("0.02nat") == pytest.approx(1.0), "one dose: the square"
    flat = curve((0, 0), (1, 0.02), (2, 0.021))
    assert flat.resolve("0.005nat") == pytest.approx(0.5), "and where hardly any power shows"


@pytest.mark.parametrize("asked", ["0.2nat", "-0.09nat"])
def test_a_cost_beyond_the_curve_is_refused(asked):
    with pytest.raises(BudgetError, match="tune with a larger budget"):
        QUADRATIC.resolve(asked)


def test_a_direction_without_doses_is_refused():
    with pytest.raises(BudgetError, match=r"measured in one direction;.*--both-ways"):
        curve((0, 0), (1, 0.1)).resolve("-0.05nat")


@pytest.mark.parametrize("asked", ["budget", "0.0953nat", "+9.53e-2 nats"])
def test_the_budget_in_nats_is_the_budget(asked):
    # The checked strength costs less than the budget on average: its interval lies within.
    assert curve((0, 0), (2, 0.09), (3, 0.2)).resolve(asked) == 2.0
    assert curve((0, 0), (2, 0.09)).resolve(asked) == 2.0


def test_strengths_in_nats_rise_where_the_tuned_one_lies_far_below_the_budget():
    gated = curve((0, 0), (1, 0.002), (7.2, 0.0953), strength=1.0)
    assert gated.resolve("budget") == 1.0
    found = [gated.resolve(f"{nats}nat") for nats in (0.002, 0.03, 0.09, 0.0953)]
    assert found == sorted(found) and found[-1] == pytest.approx(7.2)


def test_the_budget_the_other_way_is_found_on_the_curve():
    both = curve((0, 0), (2, 0.09), (-2, 0.0953), (-3, 0.2))
    assert both.resolve("-0.0953nat") == pytest.approx(-2.0)
    back = curve((0, 0), (1, 0.0953), (2, 0.2), (-3, 0.09), strength=-3.0)
    assert (back.resolve("0.0953nat"), back.resolve("-0.0953nat")) == (pytest.approx(1.0), -3.0)


def test_noise_that_makes_the_curve_fall_does_not_confuse_it():
    noisy = curve((0, 0), (1, 0.05), (2, 0.04), (3, 0.09))
    found = [noisy.resolve(f"{n}nat") for n in (0.01, 0.03, 0.06, 0.09)]
    assert found == sorted(found) and found[-1] == 3.0 and 2 <= found[2] <= 3
    falling = curve((0, 0), (1, 0.05), (2, 0.04))
    assert falling.resolve("0.045nat") == pytest.approx((0.045 / 0.05) ** 0.5)


@pytest.mark.parametrize("asked", ["", "nat", "much", "0.05nats per token", "--1nat", "1,5"])
def test_what_is_no_strength_is_refused(asked):
    with pytest.raises(InputError, match="budget"):
        QUADRATIC.resolve(asked)


@pytest.mark.parametrize("asked", [math.nan, math.inf, "nan", "-inf", "1e999"])
def test_a_strength_is_finite(asked):
    with pytest.raises(InputError, match="finite"):
        QUADRATIC.resolve(asked)
    with pytest.raises(InputError, match="finite"):
        parse_number(str(asked))


def test_a_calibration_survives_json():
    assert Calibration.from_json(QUADRATIC.to_json()) == QUADRATIC


@pytest.mark.parametrize(
    "change",
    [
        {"doses": [{"strength": 1.0}]},
        {"doses": "none"},
        {"strength": "much"},
        {"more": 1},
        {"doses": [QUADRATIC.to_json()["doses"][0] | {"more": 1}]},
    ],
)
def test_a_foreign_calibration_is_refused(change):
    with pytest.raises(ValidationError):
        Calibration.from_json(QUADRATIC.to_json() | change)


def test_a_curve_that_costs_nothing_has_no_cost_but_0():
    free = curve((0, 0), (1, 0.0), (1.5, 0.0), strength=1.0)
    assert free.resolve("0nat") == 0.0 and free.resolve("budget") == 1.0
    with pytest.raises(BudgetError, match="give a number"):
        free.resolve("0.05nat")
