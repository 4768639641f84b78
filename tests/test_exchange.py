"""Exchange: vectors of other tools steer as they do there, and what goes out is measured."""

import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from innsteer import exchange, fitting, tuning
from innsteer.backends.hf import HF
from innsteer.errors import FormatError, InputError, NothingSteeredError, RefusedError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.site import Site, Where
from innsteer.steerer import Intervention, Interventions, get
from innsteer.steering import Steering
from innsteer.suites.behaviour import neutral
from words import contrast, yes_or_no

OPEN = contrast()
IDS = torch.tensor([[0, 40, 41, 90, 17, 200, 33]])


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model("llama")


@pytest.fixture(autouse=True)
def few_neutral_prompts(monkeypatch):
    monkeypatch.setattr(exchange.suites, "neutral", lambda part: neutral(part)[:6])


def vectors(seed=0, layers=(1, 3)):
    draw = torch.Generator().manual_seed(seed)
    return {Site(layer): torch.randn(tiny.WIDTH, generator=draw) for layer in layers}


def by_hand(model, added):
    """Logits with vectors added to the outputs of blocks, at every token."""
    handles = [
        model.model.model.layers[site.layer].register_forward_hook(lambda _, __, out, v=v: out + v)
        for site, v in added.items()
    ]
    with torch.no_grad():
        logits = model.model(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


def steered(model, steering, strength=1.0):
    with torch.no_grad(), steering.on(model, strength, prompt_lengths=[IDS.shape[1]]):
        return model.model(IDS).logits


# --- in ------------------------------------------------------------------------------------------


def test_a_gguf_control_vector_steers_every_token_of_the_blocks_it_names(model, tmp_path):
    file = exchange.export_vector(model, vectors(), tmp_path / "mood.gguf")
    found = exchange.import_vector(model, file)
    assert found.behaviours == ("mood",) and found.where == Where("all")
    assert list(found.interventions) == [Site(1), Site(3)]
    torch.testing.assert_close(steered(model, found), by_hand(model, vectors()))
    half = {site: -0.5 * v for site, v in vectors().items()}
    torch.testing.assert_close(steered(model, found, -0.5), by_hand(model, half))
    loaded = Steering.load(found.save(tmp_path / "saved"))
    assert loaded.identity == found.identity
    norms = loaded.provenance["imported"]["norms"]
    assert norms["1.residual"] == pytest.approx(float(vectors()[Site(1)].norm()), rel=1e-5)


def test_a_gguf_file_is_what_llama_cpp_reads(model, tmp_path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(str(exchange.export_vector(model, vectors(), tmp_path / "a.gguf")))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert [(t.name, t.shape.tolist()) for t in reader.tensors] == [
        ("direction.1", [tiny.WIDTH]),
        ("direction.3", [tiny.WIDTH]),
    ]


def test_safetensors_give_vectors_by_name_by_layer_and_by_row(model, tmp_path):
    own, file = vectors(), tmp_path / "caa.safetensors"
    save_file({"layer.1": own[Site(1)], "layer.3": own[Site(3)], "scale": torch.ones(())}, file)
    every = exchange.import_vector(model, file)
    assert list(every.interventions) == [Site(1), Site(3)] and every.where == Where()
    one = exchange.import_vector(model, file, layers=[3], behaviour="kind", where=Where("all"))
    assert list(one.interventions) == [Site(3)] and one.behaviours == ("kind",)
    torch.testing.assert_close(steered(model, one), by_hand(model, {Site(3): own[Site(3)]}))
    save_file({"v": own[Site(1)]}, free := tmp_path / "free.safetensors")
    both = exchange.import_vector(model, free, layers=[2, 3])
    assert torch.equal(both.interventions[Site(3)].shifts[0], own[Site(1)])
    sae = tmp_path / "sae.safetensors"
    save_file({"W_dec": torch.stack([own[Site(3)], own[Site(1)]]), "b": torch.ones(2)}, sae)
    feature = exchange.import_vector(model, sae, tensor="W_dec", row=1, layers=[2])
    assert torch.equal(feature.interventions[Site(2)].shifts[0], own[Site(1)])


@pytest.mark.parametrize(
    "make, how, error, match",
    [
        ("missing.gguf", {}, InputError, "no file"),
        ("v.pt", {}, RefusedError, "pickle, which may run any code .*save_file"),
        ("v.npy", {}, InputError, r"expected a \.gguf or \.safetensors"),
        ("cut.gguf", {}, FormatError, "no whole GGUF"),
        ("cut.safetensors", {}, FormatError, "no whole safetensors"),
        ("model.gguf", {}, FormatError, "expected direction.1"),
        ("wide.safetensors", {}, InputError, r"expected \[32\] finite ones"),
        ("nan.safetensors", {}, InputError, "not finite"),
        ("deep.safetensors", {}, InputError, "layer 9 of a model with 4"),
        ("plain.safetensors", {}, InputError, "no layer for the tensor 'v'"),
        ("plain.safetensors", {"tensor": "w"}, InputError, "no vector 'w'; expected one of v"),
        ("both.safetensors", {"layers": [2]}, InputError, "no vector for the layers 2"),
        ("both.safetensors", {"layers": [1, 2]}, InputError, "no vector for the layers 2"),
        ("wide.safetensors", {"layers": [3]}, InputError, "no vector for the layers 3"),
        ("twice.safetensors", {}, InputError, "several vectors for layer 2"),
        ("matrix.safetensors", {"layers": [1]}, InputError, "row None of 'm', a matrix of 3"),
        ("matrix.safetensors", {"layers": [1], "row": 3}, InputError, "a row from 0 to 2"),
    ],
)
def test_what_cannot_be_a_vector_is_refused(model, tmp_path, make, how, error, match):
    wide, good = torch.ones(40), torch.ones(tiny.WIDTH)
    tensors = {
        "wide.safetensors": {"layer.1": wide},
        "nan.safetensors": {"layer.1": good * float("nan")},
        "deep.safetensors": {"layer.9": good},
        "plain.safetensors": {"v": good},
        "both.safetensors": {"layer.1": good, "layer.3": good},
        "twice.safetensors": {"mean.2": good, "std.2": good},
        "matrix.safetensors": {"m": torch.ones(3, tiny.WIDTH)},
    }
    if make in tensors:
        save_file({k: v.clone() for k, v in tensors[make].items()}, tmp_path / make)
    elif make == "model.gguf":
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(str(tmp_path / make), "llama")
        writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    elif not make.startswith("missing"):
        (tmp_path / make).write_bytes(b"GGUF" + struct.pack("<I", 3) + b"\0\1\2")
    with pytest.raises(error, match=match):
        exchange.import_vector(model, tmp_path / make, **how)


class Tanh(Intervention):
    """h' = h + coef * tanh(h): what it adds depends on the row."""

    width = tiny.WIDTH

    def displacement(self, h, coef):
        return coef * h.tanh()


# --- out -----------------------------------------------------------------------------------------


def test_the_vector_of_a_constant_map_is_that_map(model):
    fitted = fitting.fit(model, OPEN, "diffmean", sites=[Site(1), Site(2)])
    found = exchange.as_vector(model, fitted, OPEN, 0.7)
    for site, part in fitted.interventions.items():
        torch.testing.assert_close(found[site], 0.7 * part.shifts[0], rtol=1e-4, atol=1e-5)


def test_the_vector_of_another_map_is_the_mean_of_what_it_adds(model):
    maps = Interventions({Site(2): Tanh()})
    fitted = Steering(get("diffmean"), maps, (OPEN.behaviour,))
    found = exchange.as_vector(model, fitted, OPEN)
    rows = []
    for item in OPEN.train.items:
        for text in (item.source, item.target):
            encoded = model.encode(item.prompt, answer=text)
            with torch.no_grad():
                out = model.model(torch.tensor([encoded.ids]), output_hidden_states=True)
            rows.append(out.hidden_states[3][0, encoded.prompt - 1 :])
    h = torch.cat(rows)
    torch.testing.assert_close(found[Site(2)], h.tanh().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data", [OPEN, contrast(yes_or_no)], ids=["open", "choice"])
def test_a_constant_map_at_every_token_loses_nothing_and_another_is_measured(model, data):
    fitted = fitting.fit(model, data, "diffmean", sites=[Site(1)], where=Where("all"))
    backend = HF(model)
    found = exchange.as_vector(backend, fitted, data, 2.0)
    lost = exchange.loss(backend, fitted, found, data, 2.0)
    assert lost.kept == pytest.approx(1, abs=1e-3) and abs(lost.gap) < 1e-5
    assert lost.exported_cost == pytest.approx(lost.cost, rel=1e-3) and lost.cost > 0
    half = {site: v / 2 for site, v in found.items()}
    less = exchange.loss(backend, fitted, half, data, 2.0)
    edit = Edit(exchange.shifts(half), torch.ones(1), Where("all"))
    items = data.validation
    meter = tuning.control_meter(backend, items, [])
    score = exchange.metric(tuning.control_metric(items)).score(
        tuning.control(meter([edit]), items)
    )
    assert less.exported == pytest.approx(score.value, abs=1e-6)
    assert less.exported_cost < lost.cost and less.kept != pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("stream", ["residual", "attention"])
def test_biases_in_the_checkpoint_steer_every_token(tmp_path, kind, stream):
    model = tiny.tiny_language_model(kind)
    own = {Site(s.layer, stream): v for s, v in vectors().items() if s.layer in (1, 2)}
    own |= {Site(2, stream): torch.ones(tiny.WIDTH)}
    edit = Edit(exchange.shifts(own), torch.ones(1), Where("all"))
    with torch.no_grad(), Attachment(model, [edit], prompt_lengths=[IDS.shape[1]]):
        asked = model.model(IDS).logits
    file = exchange.export_vector(model, own, tmp_path / "bias.safetensors", note="of a test")
    for name, bias in load_file(file).items():
        part = model.model.get_submodule(name.removesuffix(".bias"))
        part.bias = torch.nn.Parameter(bias)
    with torch.no_grad():
        torch.testing.assert_close(model.model(IDS).logits, asked, rtol=1e-4, atol=1e-4)


def test_sites_that_share_a_bias_add_up_and_experts_take_none(tmp_path):
    model, ones = tiny.tiny_language_model("llama"), torch.ones(tiny.WIDTH)
    own = {Site(1): ones, Site(1, "mlp"): 5 * ones}
    (bias,) = load_file(exchange.export_vector(model, own, tmp_path / "a.safetensors")).values()
    assert torch.equal(bias, 6 * ones)
    experts = tiny.tiny_language_model("qwen3_moe")
    with pytest.raises((RefusedError, InputError)):
        exchange.export_vector(experts, {Site(1): ones}, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_vector_of_nothing_or_of_other_data_is_refused(model, tmp_path):
    fitted = fitting.fit(model, OPEN, "diffmean", sites=[Site(1)])
    with pytest.raises(NothingSteeredError):
        exchange.as_vector(model, fitted, OPEN, 0.0)
    other = replace(OPEN, behaviour="other")
    with pytest.raises(InputError, match="a contrast of 'other' for a steering of 'formal-ish'"):
        exchange.as_vector(model, fitted, other)
    broken = {Site(1): torch.full((tiny.WIDTH,), float("nan"))}
    with pytest.raises(InputError, match=r"not finite at 1\.residual"):
        exchange.export_vector(model, broken, tmp_path / "a.gguf")


def test_a_block_that_changes_its_mlps_output_takes_no_bias(tmp_path):
    model = tiny.tiny_language_model("gemma2")
    with pytest.raises(RefusedError, match="changes it before adding it"):
        exchange.export_vector(model, vectors(), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, sites, match",
    [
        ("a.gguf", [Site(0)], r"the sites 0\.residual in a\.gguf"),
        ("a.gguf", [Site(1, "mlp")], r"the sites 1\.mlp in a\.gguf"),
        ("a.safetensors", [Site(1, "heads")], r"the sites 1\.heads in a\.safetensors"),
        ("a.bin", [Site(1)], r"ends in \.gguf or \.safetensors"),
        ("no/a.gguf", [Site(1)], "no folder"),
    ],
)
def test_what_a_file_has_no_place_for_is_refused(model, tmp_path, name, sites, match):
    own = {site: torch.ones(tiny.WIDTH) for site in sites}
    with pytest.raises(InputError, match=match):
        exchange.export_vector(model, own, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.gguf").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        exchange.export_vector(model, vectors(), tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_text() == "mine"


def test_shifts_are_the_vectors():
    maps = exchange.shifts(vectors())
    assert isinstance(maps, Interventions)
    h = torch.zeros(1, tiny.WIDTH)
    assert torch.equal(maps[Site(3)](h, torch.ones(1, 1))[0], vectors()[Site(3)])
