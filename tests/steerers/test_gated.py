"""Gated methods: what the inner method does to statements, and nothing to the rest."""

from dataclasses import fields as fields_of

import pytest
import torch
from torch import Tensor

from innsteer import steerer
from innsteer.activations import Activations, Rows
from innsteer.errors import InputError, UnknownName
from innsteer.gating import fit_gate
from innsteer.site import Site
from innsteer.steerers.diffmean import DiffMean
from innsteer.steerers.gated import GatedMethod, _statements
from innsteer.steering import Steering

SITE, D = Site(2), 6
both_kinds = pytest.mark.parametrize("kind", ["lda", "logistic"])


def recording(k: int = 1, *, split: str = "train", seed: int = 0, n: int = 60) -> Activations:
    """Pairs whose statements stand apart from unmoved rows along another line than the edit."""
    draw = torch.Generator().manual_seed(seed)
    values, records = [], []
    for b in range(k):
        own = torch.randn(n, D, generator=draw)
        own[:, 4 + b] += 6
        unmoved = torch.randn(n, D, generator=draw)
        for side, part in (
            ("source", own),
            ("target", own + torch.tensor([0, 3.0, 0, 0, 0, 0])),
            ("unmoved", unmoved),
        ):
            values.append(part)
            records += [
                {
                    "behaviour": f"b{b}",
                    "item": f"{side == 'unmoved'}-{b}-{i}",
                    "side": side,
                    "pair": "" if side == "unmoved" else f"{b}-{i}",
                    "split": split,
                }
                for i in range(n)
            ]
    behaviours = tuple(f"b{b}" for b in range(k))
    return Activations({SITE: torch.cat(values)}, Rows.of(records), behaviours)


def joined(*parts: Activations) -> Activations:
    records = [record for part in parts for record in part.rows.records()]
    values = torch.cat([part.values[SITE] for part in parts])
    return Activations({SITE: values}, Rows.of(records), parts[0].behaviours)


def length(part: steerer.Intervention, h: Tensor, strength: float = 1.0) -> float:
    return float((part(h, torch.full((len(h), 1), strength)) - h).norm(dim=-1).mean())


@both_kinds
@pytest.mark.parametrize("method", ["diffmean", "innsteer"])
def test_statements_move_and_unmoved_rows_that_were_not_seen_do_not(kind, method):
    acts, new = recording(), recording(seed=7)
    config = {"epochs": 5, "hidden": 8} if method == "innsteer" else {}
    part = GatedMethod(method=method, config=config, gate=kind).fit(acts)[SITE]
    alone = steerer.get(method, **config).fit(acts)[SITE]
    statements, unmoved = new.sides(SITE)[0], new.unmoved(SITE)
    assert length(alone, unmoved) > 0.8 * length(alone, statements)  # it needs the gate
    assert length(part, unmoved) < 0.02 * length(part, statements)
    assert length(part, statements) > 0.9 * length(alone, statements)


def test_strength_0_and_rows_that_are_not_finite_come_back():
    part = GatedMethod().fit(recording())[SITE]
    h = torch.randn(5, D)
    assert torch.equal(part(h, torch.zeros(5, 1)), h)
    assert part(torch.full((1, D), float("nan")), torch.ones(1, 1)).isnan().all()


def test_behaviours_have_gates_of_their_own():
    acts = recording(2)
    part = GatedMethod().fit(acts)[SITE]
    openness = [part.gate(acts.sides(SITE, name)[0]).mean(0) for name in acts.behaviours]
    for k in range(2):
        assert openness[k][k] > 0.9 and openness[k][1 - k] < 0.1


@pytest.mark.parametrize("method", ["diffmean", "innsteer"])
def test_an_artifact_comes_back_with_gate_and_inner_fields(tmp_path, method):
    config = {"epochs": 2, "hidden": 8, "subspace": 3} if method == "innsteer" else {}
    acts = recording()
    wrapped = GatedMethod(method=method, config=config, slope=4)
    steering = Steering(wrapped, wrapped.fit(acts), acts.behaviours)
    loaded = Steering.load(steering.save(tmp_path / "steering"))
    assert loaded.steerer == wrapped and loaded.identity == steering.identity
    assert isinstance(loaded.steerer, GatedMethod)
    h = acts.values[SITE]
    edited = loaded.interventions[SITE](h, torch.ones(len(h), 1))
    assert torch.equal(edited, steering.interventions[SITE](h, torch.ones(len(h), 1)))


def test_inner_fields_are_filled_in_and_take_their_types():
    wrapped = GatedMethod(method="innsteer", config={"separation": 2})
    assert wrapped.config["separation"] == 2.0 and isinstance(wrapped.config["separation"], float)
    # Defaults of today are kept in the artifact.
    assert set(wrapped.config) == {f.name for f in fields_of(steerer.get("innsteer"))}
    assert wrapped == GatedMethod(method="innsteer", config={"separation": 2.0})
    assert GatedMethod() == GatedMethod(config={})


def test_the_given_fields_are_not_changed():
    given = {"epochs": 3}
    GatedMethod(method="innsteer", config=given)
    assert given == {"epochs": 3}


def test_unmoved_rows_are_asked_for():
    sides = recording().where(side=("source", "target"))
    with pytest.raises(InputError, match=r"no unmoved .*side='unmoved'"):
        GatedMethod().fit(sides)
    held = recording(split="validation")
    with pytest.raises(InputError, match="no unmoved"):  # those of another split are no help
        GatedMethod().fit(joined(sides, held))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"method": "gated"}, InputError),
        ({"method": "nothing"}, UnknownName),
        ({"config": {"nothing": 1}}, UnknownName),
        ({"method": "innsteer", "config": {"couplings": 0}}, InputError),
        ({"gate": "svm"}, UnknownName),
        ({"statements": "rows"}, UnknownName),
        ({"shrinkage": -1.0}, InputError),
    ],
    ids=str,
)
def test_fields_that_cannot_be_are_refused(fields, error):
    with pytest.raises(error):
        GatedMethod(**fields)


def test_a_method_across_tokens_is_refused(monkeypatch):
    monkeypatch.setattr(DiffMean, "across_tokens", True)
    with pytest.raises(InputError, match="each row"):
        GatedMethod()


# --- which rows are statements -------------------------------------------------------------------


def table(*rows: tuple[str, str, float, float]) -> Activations:
    """Rows (side, pair, value, weight)."""
    records = [
        {"behaviour": "b", "item": f"{i}", "side": side, "pair": pair, "weight": weight}
        for i, (side, pair, _, weight) in enumerate(rows)
    ]
    values = torch.tensor([[value] for *_, value, _ in rows])
    return Activations({SITE: values}, Rows.of(records), ("b",))


def test_sides_are_all_rows_and_pairs_their_middles():
    acts = table(
        ("source", "p", 0.0, 1.0),
        ("source", "p", 3.0, 2.0),  # weighted mean of the source side: 2
        ("target", "p", 6.0, 1.0),
        ("source", "alone", 50.0, 4.0),
        ("target", "", 70.0, 5.0),
        ("source", "", 90.0, 6.0),
        ("unmoved", "", -9.0, 1.0),
    )
    rows, weight = _statements(acts, SITE, "b", "sides")
    assert rows.flatten().tolist() == [0.0, 3.0, 50.0, 90.0, 6.0, 70.0]
    assert weight.tolist() == [1.0, 2.0, 4.0, 6.0, 1.0, 5.0]
    rows, weight = _statements(acts, SITE, "b", "pairs")
    assert rows.flatten().tolist() == [4.0, 50.0, 90.0, 70.0]
    assert weight.tolist() == [2.0, 4.0, 6.0, 5.0]
    none = acts.where(side="unmoved")
    assert _statements(none, SITE, "b", "pairs")[0].shape == (0, 1)


def test_pairs_set_the_gate_by_the_middles():
    acts = recording()
    sides, pairs = (
        GatedMethod(statements=which, slope=6.0, room=0.0, shrinkage=0.1).fit(acts)[SITE].gate
        for which in ("sides", "pairs")
    )
    middle = acts.pairs(SITE)
    logits = ((middle[0] + middle[1]) / 2) @ pairs.weight[0] + pairs.bias[0]
    assert logits.sort().values[29].item() == pytest.approx(6.0, abs=1e-3)
    # The sides' covariance has the edit's line in it, so the gate looks less along it.
    assert sides.weight[0, 1].abs() < 0.5 * pairs.weight[0, 1].abs() + 0.05


def test_validation_statements_set_the_threshold_and_test_rows_nothing():
    train, held = recording(), recording(split="validation", seed=1)
    gates = {
        name: GatedMethod(room=0.0, slope=6.0).fit(acts)[SITE].gate
        for name, acts in {
            "train": train,
            "held": joined(train, held),
            "test": joined(train, recording(split="test", seed=2)),
        }.items()
    }
    assert torch.equal(gates["test"].weight, gates["train"].weight)
    assert torch.equal(gates["test"].bias, gates["train"].bias)
    unit = {name: gate.weight / gate.weight.norm() for name, gate in gates.items()}
    torch.testing.assert_close(unit["held"], unit["train"])
    rows = torch.cat(held.sides(SITE))
    logits = (rows @ gates["held"].weight[0] + gates["held"].bias[0]).sort().values
    assert logits[2].item() == pytest.approx(0.0, abs=1e-4)  # 2 % of 120 rows
    assert logits[59].item() == pytest.approx(6.0, abs=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"shrinkage": 0.6},
        {"quantile": 0.2},
        {"room": 0.9},
        {"slope": 3.0},
        {"gate": "logistic"},
    ],
    ids=str,
)
def test_the_gate_is_fitted_with_the_fields(fields):
    acts = recording()
    gate = GatedMethod(**fields).fit(acts)[SITE].gate
    given = {"kind": fields.get("gate", "lda")} | {n: v for n, v in fields.items() if n != "gate"}
    weight, bias = fit_gate(torch.cat(acts.sides(SITE)), acts.unmoved(SITE), **given)
    torch.testing.assert_close(gate.weight[0], weight.float())
    torch.testing.assert_close(gate.bias[0], bias.float())


def test_health_figures_name_the_worst_gate():
    acts = recording(2)
    wrapped = GatedMethod(method="innsteer", config={"epochs": 2, "hidden": 8})
    fitted = wrapped.fit(acts)
    figures = wrapped.diagnose(acts, fitted)
    assert figures["gate_auroc"] > 0.99 and figures["gate_kept"] > 0.9
    assert figures["gate_leaked"] < 0.01 and "fisher" in figures
    fitted[SITE].gate.bias[1] = -1e3
    assert wrapped.diagnose(acts, fitted)["gate_kept"] < 0.01
    # Rows without unmoved ones have no gate to judge.
    bare = acts.where(side=("source", "target"))
    assert "gate_auroc" not in wrapped.diagnose(bare, fitted)


def test_an_inner_map_that_could_read_the_prompt_reads_the_row():
    method = GatedMethod(method="innsteer", config={"objective": "target"})
    assert method.config["reads"] == "row" and method.inner.reads == "row"
    with pytest.raises(InputError, match="a gate around a map that reads the prompt"):
        told = {"objective": "target", "reads": "prompt"}
        GatedMethod(method="innsteer", config=told).build({SITE: 4})
