"""Choosing: the layer with the most control, and the simplest method within noise of the best."""

import warnings
from dataclasses import replace

import pytest
import torch

import innsteer
import tiny
from innsteer import choosing, fitting, tuning
from innsteer.backends import local
from innsteer.backends.base import Completion
from innsteer.errors import BudgetError, InputError
from innsteer.site import Site
from innsteer.steerer import get
from innsteer.suites.behaviour import neutral
from words import contrast, yes_or_no

OPEN, CHOICE = contrast(), contrast(yes_or_no)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(autouse=True)
def few_neutral_prompts(monkeypatch):
    monkeypatch.setattr(tuning.suites, "neutral", lambda part: neutral(part)[:12])


# --- layers --------------------------------------------------------------------------------------


def test_the_layer_with_the_most_control_is_kept_and_the_table_recorded(model, monkeypatch):
    chosen = choosing.choose_layer(model, OPEN, "diffmean", [Site(2), Site(0), Site(2)])
    table = chosen.provenance["layers"]
    assert list(table) == ["0.residual", "2.residual"]
    assert str(next(iter(chosen.interventions))) == max(table, key=table.get)
    own = fitting.fit(model, OPEN, "diffmean", sites=list(chosen.interventions))
    assert torch.equal(
        chosen.interventions.state_dict()[key := next(iter(own.interventions.state_dict()))],
        own.interventions.state_dict()[key],
    )


@pytest.mark.parametrize("best", [0, 2])
def test_the_choice_of_a_layer_follows_control_alone(model, monkeypatch, best):
    def control(*args, **how):
        site = next(iter(args[1].interventions))
        return 0.9 if site.layer == best else 0.6

    class Tuned:
        def __init__(self, value):
            self.behaviours = (OPEN.behaviour,)
            dose = type("Dose", (), {"control": value})
            self.calibration = {OPEN.behaviour: type("Curve", (), {"at_budget": dose})}

    monkeypatch.setattr(choosing, "tune", lambda *args, **how: Tuned(control(*args, **how)))
    chosen = choosing.choose_layer(model, OPEN, "diffmean", [Site(0), Site(2)])
    assert tuple(chosen.interventions) == (Site(best),)
    assert sorted(chosen.provenance["layers"].values()) == [0.6, 0.9]


def test_no_layer_to_choose_from_is_refused(model):
    with pytest.raises(InputError, match="no site to choose from"):
        choosing.choose_layer(model, OPEN, "diffmean", [])


def test_a_layer_that_cannot_spend_the_budget_is_left_out_and_the_table_says_why(
    model, monkeypatch
):
    real = choosing.tune

    def tune(backend, fitted, *rest, **how):
        if Site(0) in fitted.interventions:
            raise BudgetError("no strength of this steering")
        return real(backend, fitted, *rest, **how)

    monkeypatch.setattr(choosing, "tune", tune)
    chosen = choosing.choose_layer(model, OPEN, "diffmean", [Site(0), Site(2)])
    table = chosen.provenance["layers"]
    assert tuple(chosen.interventions) == (Site(2),)
    assert table["0.residual"] is None and table["2.residual"] > 0
    assert chosen.provenance["layers_failed"] == {"0.residual": "no strength of this steering"}
    whole = choosing.choose_layer(model, OPEN, "diffmean", [Site(2)])
    assert "layers_failed" not in whole.provenance


def test_no_layer_that_spends_the_budget_is_an_error_that_names_each(model, monkeypatch):
    def tune(backend, fitted, *rest, **how):
        raise BudgetError(f"nothing at {next(iter(fitted.interventions)).layer}")

    monkeypatch.setattr(choosing, "tune", tune)
    with pytest.raises(BudgetError, match=r"0\.residual: nothing at 0; 2\.residual: nothing at 2"):
        choosing.choose_layer(model, OPEN, "diffmean", [Site(0), Site(2)])


# --- values --------------------------------------------------------------------------------------


def test_of_the_values_that_no_data_decides_the_one_with_the_most_control_is_kept(
    model, monkeypatch
):
    made = []
    real = local.mean_jacobians
    monkeypatch.setattr(
        local, "mean_jacobians", lambda *a, **how: made.append(1) or real(*a, **how)
    )
    chosen = choosing.choose_value(model, OPEN, "alqr", prompts=2, texts=4)
    once = len(made)
    table = chosen.provenance["values"]
    levels = get("alqr").choices["setpoint"]
    assert list(table) == [f"setpoint={level}" for level in levels]
    assert f"setpoint={chosen.steerer.setpoint}" == max(table, key=lambda name: table[name] or 0)
    made.clear()
    own = fitting.fit(model, OPEN, "alqr", prompts=2, texts=4, setpoint=chosen.steerer.setpoint)
    assert once == len(made) > 0, "Jacobians are made once for all values"
    assert chosen.interventions.state_dict().keys() == own.interventions.state_dict().keys()
    for name, value in own.interventions.state_dict().items():
        torch.testing.assert_close(chosen.interventions.state_dict()[name], value)


def test_a_value_follows_control_and_one_that_cannot_spend_the_budget_says_why(model, monkeypatch):
    real = choosing.tune

    def tune(backend, fitted, *rest, **how):
        if fitted.steerer.setpoint < 3:
            raise BudgetError("too dear")
        tuned = real(backend, fitted, *rest, **how)
        curve = tuned.calibration[OPEN.behaviour]
        gain = 0.9 if fitted.steerer.setpoint == 3.5 else 0.6
        doses = tuple(replace(dose, control=gain) for dose in curve.doses)
        return replace(tuned, calibration={OPEN.behaviour: replace(curve, doses=doses)})

    monkeypatch.setattr(choosing, "tune", tune)
    chosen = choosing.choose_value(model, OPEN, "pid")
    assert chosen.steerer.setpoint == 3.5
    assert [*chosen.provenance["values"].values()] == [None, None, 0.9, 0.6]
    assert set(chosen.provenance["values_failed"].values()) == {"too dear"}


def test_nothing_to_choose_is_refused_before_any_work(model):
    with pytest.raises(InputError, match="nothing to choose for 'diffmean'.*name its fields"):
        choosing.choose_value(model, OPEN, "diffmean")
    with pytest.raises(InputError, match="nothing to choose for 'pid'.*leave out the value"):
        choosing.choose_value(model, OPEN, "pid", setpoint=2.0)


# --- methods -------------------------------------------------------------------------------------

THREE = {"a": get("diffmean"), "b": get("linear_act"), "c": get("mimic")}


def shifts(monkeypatch, of):
    """Stand-in control: per method the nats by which each of 40 items moves."""
    names = {id(steerer): name for name, steerer in THREE.items()}

    class Tuned:
        def __init__(self, name):
            self.name = name

        def resolve(self, _):
            return 1.0

        def edit(self, strength):
            return (self.name, strength)

    def tune(backend, fitted, *rest, **how):
        return Tuned(names[id(fitted.steerer)])

    def control(edits, items):
        ((name, strength),) = edits
        values = of[name] if strength else [0.0] * 40
        return [Completion(f"{n}", "pair", values={"shift": (v,)}) for n, v in enumerate(values)]

    monkeypatch.setattr(choosing, "tune", tune)
    monkeypatch.setattr(choosing, "control_meter", lambda *_: lambda edits: edits)
    monkeypatch.setattr(choosing, "control", control)


UP = [1.0 + 0.1 * (n % 5) for n in range(40)]
NOISY = [value + (1.5 if n % 2 else -1.4) for n, value in enumerate(UP)]
MORE = [value + 1.0 for value in UP]
SURE = [6.0 + value for value in UP]
NONE = [0.3 * (-1) ** n for n in range(40)]


@pytest.mark.parametrize(
    "of, kept",
    [
        ({"a": UP, "b": NOISY, "c": UP}, "a"),  # all within noise: the simplest
        ({"a": UP, "b": MORE, "c": MORE}, "b"),  # the simplest of the best
        ({"a": UP, "b": UP, "c": MORE}, "c"),  # only the last
        ({"a": MORE, "b": UP, "c": UP}, "a"),
        ({"a": NONE, "b": UP, "c": NOISY}, "b"),
        ({"a": SURE, "b": [v + 0.1 for v in SURE], "c": [v + 1 for v in SURE]}, "a"),
    ],
)
def test_the_simplest_method_within_noise_of_the_best_is_kept(model, monkeypatch, of, kept):
    shifts(monkeypatch, of)
    chosen = choosing.choose_method(model, OPEN, THREE)
    assert chosen.steerer is THREE[kept]
    table = chosen.provenance["methods"]
    assert list(table) == ["a", "b", "c"]
    best = max(table, key=lambda name: table[name]["control"])
    assert table[best]["behind"] == 0
    assert chosen.provenance["why"].startswith(f"{kept} has control")
    assert ("within noise, so" in chosen.provenance["why"]) == (kept != best)
    assert "caution" not in chosen.provenance


def test_data_that_cannot_tell_says_so(model, monkeypatch):
    shifts(monkeypatch, {"a": NONE, "b": NONE, "c": NONE})
    with pytest.warns(UserWarning, match="cannot tell it from no steering"):
        chosen = choosing.choose_method(model, OPEN, THREE)
    assert chosen.steerer is THREE["a"] and "40 validation items" in chosen.provenance["caution"]


def test_too_few_items_keep_the_simplest_and_say_so(model, monkeypatch):
    shifts(monkeypatch, {"a": UP[:3], "b": [9.0] * 3, "c": MORE[:3]})
    monkeypatch.setattr(choosing, "control", few(choosing.control))
    with pytest.warns(UserWarning, match="3 validation items cannot tell methods apart"):
        chosen = choosing.choose_method(model, OPEN, THREE)
    assert chosen.steerer is THREE["a"] and "too few" in chosen.provenance["why"]


def few(control):
    """Of the stand-in's 40 items the first three."""
    return lambda edits, items: control(edits, items)[:3]


def test_a_method_that_cannot_spend_the_budget_is_left_out(model, monkeypatch):
    real = choosing.tune

    def tune(backend, fitted, *rest, **how):
        if fitted.steerer is THREE["a"]:
            raise BudgetError("no strength of this steering")
        return real(backend, fitted, *rest, **how)

    monkeypatch.setattr(choosing, "tune", tune)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        chosen = choosing.choose_method(model, OPEN, {n: THREE[n] for n in ("a", "b")})
    assert chosen.provenance["methods"]["a"] == {"failed": "no strength of this steering"}
    assert chosen.steerer is THREE["b"]
    with pytest.raises(BudgetError, match="no method spends .*a: no strength"):
        choosing.choose_method(model, OPEN, {"a": THREE["a"]})


def test_what_is_tried_depends_on_what_the_data_has():
    lone = replace(OPEN, items=tuple(replace(i, source=None) for i in OPEN.items))
    assert list(choosing.candidates(CHOICE)) == ["diffmean", "gated condgrad", "innsteer, target"]
    assert list(choosing.candidates(OPEN))[-1] == "innsteer, target"
    assert list(choosing.candidates(lone)) == ["diffmean", "innsteer, classes"]


@pytest.mark.parametrize("data", [OPEN, CHOICE], ids=["open", "choice"])
def test_auto_runs_every_candidate_on_a_model(model, data, monkeypatch):
    quick = {"polish": 1, "epochs": 2}
    own = choosing.candidates

    def candidates(contrast):
        found = own(contrast)
        return {
            name: replace(one, **quick) if one.name == "innsteer" else one
            for name, one in found.items()
        }

    monkeypatch.setattr(choosing, "candidates", candidates)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        chosen = innsteer.fit(model, data, "auto")
    table = chosen.provenance["methods"]
    assert list(table) == list(own(data)) and chosen.steerer in candidates(data).values()
    assert all("control" in found or "failed" in found for found in table.values())


@pytest.mark.parametrize("how", [{"hidden": 8}, {"read": "mean"}])
def test_auto_takes_no_fields(model, how):
    with pytest.raises(InputError, match="beside method 'auto'"):
        innsteer.fit(model, OPEN, "auto", **how)
    with pytest.raises(InputError, match="2 contrasts beside method 'auto'"):
        innsteer.fit(model, [OPEN, CHOICE], "auto")
