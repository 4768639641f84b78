"""Plans against what then happens: the same passes, rows and bytes."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from innsteer import fitting, get, shelf
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast
from innsteer.errors import InputError
from innsteer.planning import Peak, _weigh, plan
from innsteer.site import Site
from words import register, rows, yes_or_no


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(scope="module")
def data():
    return Contrast.load(rows(), behaviour="mine")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells")
def test_a_peak_is_what_memory_grew_by_at_most():
    with Peak() as large:
        rows = torch.ones(30 << 20)  # 120 MiB, touched
        del rows
    with Peak() as small:
        torch.ones(1 << 10)
    assert 110 << 20 < large.bytes < 200 << 20
    assert 0 <= small.bytes < 20 << 20


def test_a_system_that_does_not_tell_has_no_peak(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    with Peak() as peak:
        pass
    assert peak.bytes is None


class Counted:
    """The passes of a model, as it really runs them."""

    def __init__(self, model):
        self.forward = self.backward = 0
        inner = model.model.base_model
        self._handles = [
            inner.register_forward_pre_hook(self._before),
            model.model.register_forward_hook(self._after),
        ]

    def _before(self, *_):
        self.forward += 1

    def _after(self, module, args, out):
        if out.logits.requires_grad:
            out.logits.register_hook(self._back)

    def _back(self, _):
        self.backward += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def both(model, data, name, sites=(), /, **fields):
    """A plan, and the passes and rows of the fit that it is about."""
    steerer = get(name, **fields)
    planned = plan(model, data, steerer, sites=sites, measure=False)
    with Counted(model) as counted:
        fitted = fitting.fit(model, data, steerer, sites=sites)
    return planned, counted, fitted


FEW = {"epochs": 2, "steps": 16, "polish": 16}


@pytest.mark.parametrize("method", shelf.names())
def test_a_plan_counts_the_passes_that_a_fit_then_runs(model, data, method):
    known = {field.name for field in dataclasses.fields(get(method))}
    fields = {name: value for name, value in FEW.items() if name in known}
    if method == "gated":  # by default on unmoved rows, which nobody recorded
        fields = {"method": "condgrad", "statements": "pairs"}
        data = Contrast.load(rows(yes_or_no), behaviour="mine")
    if "concepts" in get(method).needs:
        with pytest.raises(InputError, match="learns from concepts"):
            plan(model, data, get(method), sites=(), measure=False)
        return
    planned, counted, fitted = both(model, data, method, **fields)
    assert (planned.forward, planned.backward) == (counted.forward, counted.backward)
    assert planned.rows == fitted.provenance["rows"]


@pytest.mark.parametrize(
    ("answers", "names", "sites", "fields"),
    [
        (register, ("one",), (Site(1),), {"polish": 16}),
        (yes_or_no, ("one",), (), {"polish": 16}),
        (yes_or_no, ("one", "two"), (Site(0), Site(2)), {"polish": 1, "apart": True}),
        (yes_or_no, ("one",), (), {"polish": 0, "couplings": 2, "epochs": 3}),
    ],
)
def test_a_fit_through_the_model_is_rehearsed_whole(model, answers, names, sites, fields):
    contrasts = [Contrast.load(rows(answers), behaviour=name) for name in names]
    how = {"objective": "target", **fields}
    planned, counted, fitted = both(model, contrasts, "innsteer", sites, **how)
    assert (planned.forward, planned.backward) == (counted.forward, counted.backward)
    assert planned.rows == fitted.provenance["rows"]


@pytest.mark.parametrize("loss", ["said", "odds", "target"])
def test_no_loss_ends_a_rehearsal_early(model, data, loss):
    method = get("loreft", steps=95, patience=1, loss=loss)
    assert plan(model, data, method, measure=False).backward == 1 + 95  # the rows', and the steps'


def test_a_training_that_stops_early_takes_less_than_was_planned(model, data):
    """At a rate at which nothing gets better."""
    fields = {"steps": 95, "patience": 1, "learning_rate": 30.0}
    planned, counted, _ = both(model, data, "loreft", **fields)
    assert counted.backward < planned.backward and counted.forward < planned.forward


@pytest.mark.parametrize("read", ["last", "mean", "all"])
def test_rows_and_disk_are_those_of_the_recording(model, data, read, tmp_path):
    sites = (Site(0), Site(2, "mlp"))
    planned = plan(model, data, "diffmean", sites=sites, read=read, measure=False)
    acts = fitting.record_parts(model, data, sites, read=read, folder=tmp_path / "rows")
    assert planned.rows == len(acts)
    shards = [load_file(path) for path in (tmp_path / "rows").glob("*.safetensors")]
    held = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    assert planned.disk == planned.memory["rows"] == held


def test_what_the_model_says_first_decides_about_passes(data):
    """Answers that end at once: a plan that may ask the model knows, the other counts the most."""
    model = tiny.tiny_language_model()
    model.model.generation_config.eos_token_id = list(range(0, 259, 2))
    fields = {"objective": "target", "polish": 0}
    most, counted, _ = both(model, data, "innsteer", **fields)
    asked = plan(model, data, "innsteer", **fields)
    assert asked.forward == counted.forward < most.forward


def test_items_and_tokens_are_those_of_what_is_fitted(model, data):
    planned = plan(model, data, "diffmean", measure=False)
    parts = [item for item in data.items if item.split != "test"]
    texts = [(item.prompt, text) for item in parts for text in (item.source, item.target)]
    assert planned.items == len(parts)
    assert planned.tokens == sum(len(model.encode(p, answer=t).ids) for p, t in texts)


def test_memory_grows_with_what_it_is_made_of(model, data):
    one = plan(model, data, "diffmean", measure=False).memory
    three = plan(model, data, "diffmean", sites=[Site(0), Site(1), Site(2)], measure=False).memory
    assert one["model"] == sum(tensor.nbytes for tensor in model.model.state_dict().values()) + sum(
        buffer.nbytes for buffer in model.model.buffers()
    )
    assert three["rows"] == 3 * one["rows"]
    target = {"objective": "target", "measure": False, "polish": 0}
    high, low = (plan(model, data, sites=[Site(n)], **target).memory for n in (2, 0))
    assert high["kept"] < low["kept"], "more blocks above a lower site keep keys and values"


def test_a_token_is_weighed_by_the_shapes_of_the_model(model):
    config, layers = model.model.config, len(model.layout.blocks)
    high, low = _weigh(model, [Site(layers - 1)]), _weigh(model, [Site(0)])
    each_block = 2 * config.num_key_value_heads * config.head_dim * 4
    assert high.cache == low.cache == layers * each_block
    assert (high.upper, low.upper) == (0, (layers - 1) * each_block)
    assert high.logits == 4 * config.vocab_size and high.row == 4 * config.hidden_size
    assert high.graph < low.graph
    # Queries, keys and values; what goes out of attention, MLP and two norms; the MLP's inside.
    heads = config.num_attention_heads * config.head_dim
    made = heads + each_block // 4 + 4 * config.hidden_size + 3 * config.intermediate_size
    assert high.block == 4 * made


def test_seconds_are_measured_by_part_or_not_at_all(model, data):
    fields = {"objective": "target", "polish": 1}
    assert plan(model, data, "innsteer", measure=False, **fields).seconds == {}
    found = plan(model, data, "innsteer", **fields)
    parts = {"reference", "prefixes", "steered", "trained", "fit"}
    assert set(found.seconds) == parts and all(value >= 0 for value in found.seconds.values())
    assert found.to_json()["total_seconds"] == pytest.approx(sum(found.seconds.values()))
    assert set(plan(model, data, "diffmean").seconds) == {"record", "fit"}


def test_seconds_scale_with_the_passes_that_are_timed(model, data, monkeypatch):
    """A pass that takes 20 ms, as often as there are passes."""
    real = HF._pass

    def slow(*args):
        time.sleep(0.02)
        real(*args)

    monkeypatch.setattr(HF, "_pass", slow)
    monkeypatch.setitem(HF.__init__.__kwdefaults__, "batch_tokens", 64)
    found = plan(model, data, "diffmean")
    assert found.forward > 10
    assert 0.5 < found.seconds["record"] / (0.02 * found.forward) < 3


def test_the_epochs_of_a_fit_on_rows_count_whole(model, data, monkeypatch):
    """A fit that takes 10 ms and 10 ms an epoch."""

    def fit(self, acts, *, seed=0):
        time.sleep(0.01 + 0.01 * self.epochs)

    monkeypatch.setattr(type(get("innsteer")), "fit", fit)
    found = plan(model, data, "innsteer", epochs=500)
    assert 4 < found.seconds["fit"] < 8


def test_a_rehearsal_leaves_the_model_and_its_later_fit_as_they_were(model, data):
    before = fitting.fit(model, data, "innsteer", epochs=2).identity
    plan(model, data, "innsteer", objective="target", polish=1)
    assert fitting.fit(model, data, "innsteer", epochs=2).identity == before


def test_a_plan_refuses_what_the_fit_would_refuse(model, data):
    for act in (fitting.fit, plan):
        with pytest.raises(InputError, match="has no unmoved training rows"):
            act(model, data, "gated")
        with pytest.raises(InputError, match="layer 99 of a model with"):
            act(model, data, "diffmean", sites=[Site(99)])
        with pytest.raises(InputError, match="a read rule for 'condgrad'"):
            act(model, data, "condgrad", read="last")
        with pytest.raises(InputError, match="the behaviours mine, mine"):
            act(model, [data, data], "diffmean")


@pytest.mark.parametrize("fields", [{"prompts": 5}, {"rank": 3}, {"loop": "open"}])
def test_a_fit_on_jacobians_is_rehearsed_whole(model, data, fields):
    planned, counted, fitted = both(model, data, "alqr", **fields)
    assert planned.forward == counted.forward and planned.backward == 0
    assert planned.rows == fitted.provenance["rows"]


def test_a_plan_of_a_fit_on_jacobians_says_how_long_they_take(model, data):
    few, more = (plan(model, data, get("alqr", prompts=n)).seconds for n in (1, 9))
    assert {"record", "jacobians", "fit"} == set(few) and few["jacobians"] > 0
    assert more["jacobians"] > few["jacobians"]  # nine times as many
    assert "jacobians" not in plan(model, data, get("alqr", dynamics="identity")).seconds
