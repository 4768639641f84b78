"""LoRA as an arm: nothing at 0, W + strength * scale * BA else, trained by the one trainer."""

import sys

import pytest
import torch

import tiny
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.backends.lora import Adapted, LoRA
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import MissingPackage
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


def test_without_peft_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackage, match=r"innsteer\[peft\]"):
        LoRA(model)
