"""LoRA as an arm: nothing at 0, W + strength * scale * BA else, trained by the one trainer."""

import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF, Memo
from innsteer.backends.lora import Adapted, LoRA
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError, MissingPackage
from innsteer.site import Site
from innsteer.training import said, train_through

STRENGTHS = [0.7, -1.0, 0.0, 0.7, 2.0]


@pytest.fixture
def model():
    return tiny.tiny_language_model("llama")


@pytest.fixture
def run(model):
    backend = HF(model)
    items = [
        Item(f"{n}", f"Is {'very ' * n}tea hot?", "N", "Yes", "Yes", f"g{n}", split)
        for n, split in enumerate(["train"] * 4 + ["validation"] * 3)
    ]
    neutral = [Prompt("a", "Is it so?"), Prompt("b", "A longer question than that?")]
    still = [backend.reference(neutral, None), backend.reference(neutral, Sampling(4, 1.0))]
    return Through(backend, [Contrast("yes", "choice", tuple(items))], [Site(1)], still)


def drawn(model, **fields):
    """A LoRA whose B is not 0."""
    lora = LoRA(model, **fields)
    torch.manual_seed(3)
    for weight in lora.weights:
        weight.data += 0.2 * torch.randn_like(weight)
    return lora


def by_hand(model, run, lora, number, side, strength):
    """Log-probability of an answer with the product added to the weights themselves."""
    item, plain = run.item(number), tiny.tiny_language_model("llama").model
    pairs = iter(zip(lora.weights[::2], lora.weights[1::2], strict=True))
    with torch.no_grad():
        for block in plain.model.layers:
            for part in (block.self_attn.q_proj, block.self_attn.v_proj):
                low, high = next(pairs)
                part.weight += strength * 16.0 / len(low) * high @ low
        encoded = model.encode(item.prompt, answer=getattr(item, side))
        found = plain(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
    places = range(encoded.prompt, len(encoded.ids))
    return sum(float(found[place - 1, encoded.ids[place]]) for place in places)


def test_answers_are_those_of_changed_weights_each_row_at_its_strength(model, run):
    lora = drawn(model, rank=4)
    adapted, items = Adapted(run), list(range(5))
    with torch.no_grad():
        found = adapted.answers(lora, items, STRENGTHS)
    for number, strength in enumerate(STRENGTHS):
        for side in ("target", "source"):
            asked = by_hand(model, run, lora, number, side, strength)
            # float32, two orders of summation
            assert float(getattr(found, side)[number]) == pytest.approx(asked, abs=2e-4)


def test_it_is_nothing_outside_and_at_zero_and_gone_when_removed(model, run):
    ids = torch.tensor([[5, 9, 40, 77]])
    plain = model.model(ids).logits
    lora = drawn(model)
    assert torch.equal(model.model(ids).logits, plain)
    with lora.at(0.0):
        assert torch.equal(model.model(ids).logits, plain)
    with lora.at(0.5):
        assert not torch.allclose(model.model(ids).logits, plain, atol=1e-2)
    assert torch.equal(model.model(ids).logits, plain)
    lora.remove()
    assert torch.equal(model.model(ids).logits, plain)
    assert not any("lora" in name for name, _ in model.model.named_modules())


def test_an_untrained_lora_changes_nothing(model, run):
    lora, places = LoRA(model), list(range(len(run.unmoved)))
    with torch.no_grad():
        nats = Adapted(run).divergence(lora, places, torch.ones(1))
    assert float(nats.abs().max()) < 1e-5


def test_the_trainer_teaches_it_both_signs(model, run):
    lora, adapted = LoRA(model), Adapted(run)
    items = adapted.items("train")
    with torch.no_grad():
        before = float(said(adapted, lora, items))
    course = train_through(adapted, lora, steps=30, batch=4, learning_rate=3e-3, unmoved=0.1)
    with torch.no_grad():
        after = float(said(adapted, lora, items))
    assert after < before - 0.5 and course.kept > 0
    assert all(weight.requires_grad for weight in lora.weights)


def test_validation_may_be_thinned(run):
    whole = Adapted(run).items("validation")
    thin = Adapted(run, held=2)
    assert len(whole) == 3 and thin.items("validation") == whole[::2]
    assert thin.items("train") == run.items("train")


# --- adapters of others --------------------------------------------------------------------------


def saved(folder, *, safe=True, config=None, **fields):
    """Adapters with weights that are not 0, made and saved by PEFT alone; and its model."""
    fields = {"r": 3, "lora_alpha": 12, "lora_dropout": 0.5, "target_modules": ["v_proj"]} | fields
    torch.manual_seed(5)
    own = peft.get_peft_model(
        tiny.tiny_language_model("llama").model, config or peft.LoraConfig(**fields)
    )
    for weight in own.parameters():
        weight.data += 0.2 * torch.randn_like(weight) * weight.requires_grad
    own.save_pretrained(str(folder), safe_serialization=safe)
    return own.eval()


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"1.self_attn.v_proj": 5}}]
)
def test_adapters_saved_by_peft_answer_as_they_do_there(model, tmp_path, fields):
    own = saved(tmp_path, **fields)
    lora, ids = LoRA.load(model, tmp_path), torch.tensor([[5, 9, 40, 77]])
    plain = tiny.tiny_language_model("llama").model(ids).logits
    assert torch.equal(model.model(ids).logits, plain)
    with torch.no_grad(), lora.at(1.0):
        assert torch.equal(model.model(ids).logits, own(ids).logits)
        assert not torch.allclose(own(ids).logits, plain, atol=1e-2)
    with torch.no_grad(), lora.at(-1.0):
        away = model.model(ids).logits
    assert not torch.allclose(away, plain, atol=1e-2)


def test_other_adapters_and_other_strengths_have_another_identity(model, tmp_path):
    saved(tmp_path / "a")
    found = []
    for folder, alpha in (("a", None), ("b", 12), ("c", 13)):
        if alpha:
            saved(tmp_path / folder, lora_alpha=alpha)
        lora = LoRA.load(model, tmp_path / folder)
        found.append(lora.identity)
        lora.remove()
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"safe": False}, r"no LoRA in safetensors .* no pickle \(.bin\) is read"),
        ({"bias": "all"}, "with biases"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save"),
        (
            {"config": peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])},
            "adapters of IA3",
        ),
    ],
)
def test_what_is_more_or_less_than_a_lora_is_refused(model, tmp_path, fields, said):
    saved(tmp_path, **fields)
    with pytest.raises(InputError, match=said):
        LoRA.load(model, tmp_path)
    assert not any("lora" in name for name, _ in model.model.named_modules())


def test_adapters_of_another_model_are_refused_and_leave_nothing(tmp_path):
    saved(tmp_path)
    other = tiny.tiny_language_model("qwen2")
    with pytest.raises(InputError, match="does not fit .* of its tensors are"):
        LoRA.load(other, tmp_path)
    assert not any("lora" in name for name, _ in other.model.named_modules())
    gpt2 = tiny.tiny_language_model("gpt2")
    with pytest.raises(InputError, match="names of linear maps of the model"):
        LoRA.load(gpt2, tmp_path)


def test_a_tensor_that_is_missing_is_no_adapter_left_at_its_start(model, tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = sorted(tensors)[1]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file)
    with pytest.raises(InputError, match=f"1 of its tensors .*{gone} among them"):
        LoRA.load(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", "{"),
        ("adapter_config.json", '{"peft_type": "NONE"}'),
        ("adapter_config.json", "[]"),
        ("adapter_model.safetensors", "not tensors"),
    ],
)
def test_damaged_adapters_are_refused(model, tmp_path, name, content):
    saved(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="cannot be read"):
        LoRA.load(model, tmp_path)


def test_a_model_with_adapters_takes_no_others(model):
    LoRA(model)
    with pytest.raises(InputError, match="has adapters already"):
        LoRA(model)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_meter_finds_the_divergence_of_changed_weights(model, strength):
    backend = HF(model)
    reference = backend.reference([Prompt("a", "Is it so?"), Prompt("b", "Why?")], Sampling(4, 1.0))
    meter = backend.meter(reference, [Site(1)])
    lora = drawn(model)
    for n, one in enumerate(meter.adapted(lora, strength)):
        ids, start = torch.tensor([reference.ids[n]]), reference.lengths[n] - 1
        with torch.no_grad():
            base = model.model(ids).logits[0, start:-1].log_softmax(-1)
            with lora.at(strength):
                changed = model.model(ids).logits[0, start:-1].log_softmax(-1)
        # float32, padded rows beside alone ones
        kl = (base.exp() * (base - changed)).sum(-1)
        assert one.values["kl"] == pytest.approx(kl.tolist(), abs=1e-5)
        assert max(one.values["kl"]) > 1e-3


def test_what_a_memo_keeps_under_adapters_is_kept_apart(model, tmp_path):
    backend, lora = HF(model, memo=Memo(tmp_path / "memo")), drawn(model)
    asked = [Prompt("a", "Is it so?")]
    plain = backend.generate(asked, (), Sampling(6))
    with backend.adapted(lora, 4.0):
        steered = backend.generate(asked, (), Sampling(6))
    with backend.adapted(lora, 3.0):
        backend.generate(asked, (), Sampling(6))
    assert (backend.memo.made, backend.memo.replayed) == (3, 0)
    assert steered[0].text != plain[0].text
    assert backend.generate(asked, (), Sampling(6)) == plain and backend.memo.replayed == 1


def test_without_peft_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackage, match=r"innsteer\[peft\]"):
        LoRA(model)
