"""Doctor: every architecture works in every way, and each way's fault is found by its check."""

import threading
from pathlib import Path

import peft
import pytest
import torch
from transformers import DynamicCache

import tiny
from innsteer import hooks
from innsteer.doctor import PROBES, checks
from innsteer.errors import InputError, RefusedError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit, Shift
from innsteer.models import LanguageModel
from innsteer.site import STREAMS, Site
from innsteer.steerer import Interventions
from innsteer.steering import Steering

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def failed(model, **how):
    return {check.name: check.note for check in checks(model, **how) if check.verdict != "works"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_every_architecture_works_in_every_way(kind, dtype):
    model = tiny.tiny_language_model(kind)
    model.model.to(DTYPES[dtype])
    assert failed(model) == {}


@pytest.mark.parametrize("stream", STREAMS)
def test_every_stream_works_in_every_way(stream):
    assert failed(tiny.tiny_language_model("llama"), site=Site(2, stream)) == {}


def test_a_check_leaves_the_model_as_it_was():
    model = tiny.tiny_language_model("qwen3")
    modes = [part.training for part in model.model.modules()]
    asked = [weight.requires_grad for weight in model.model.parameters()]
    checks(model)
    assert modes == [part.training for part in model.model.modules()]
    assert asked == [weight.requires_grad for weight in model.model.parameters()]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.model.modules())


def _unsteered(monkeypatch):
    monkeypatch.setattr(Attachment, "_apply", lambda self, site, part, h, index, coef: h)


def _late(monkeypatch):
    own = hooks._prompt_lengths
    monkeypatch.setattr(hooks, "_prompt_lengths", lambda *a: [n + 1 for n in own(*a)])


def _first_row_for_all(monkeypatch):
    monkeypatch.setattr(hooks, "_entry", lambda values, row, batch: values and values[0])
    own = Edit.rows
    monkeypatch.setattr(Edit, "rows", lambda self, n: own(self, n)[:1].expand(n, -1))


def _everything(monkeypatch):
    own = Attachment._apply

    def apply(self, site, part, h, index, coef):
        return own(self, site, part, h, index, coef) + 1e-6

    monkeypatch.setattr(Attachment, "_apply", apply)


def _beams_unordered(monkeypatch):
    for name in ("reorder_cache", "batch_select_indices"):
        monkeypatch.setattr(DynamicCache, name, lambda self, *_: None)


def _one_token_a_pass(monkeypatch):
    own = hooks._positions

    def positions(call):
        at, real, start = own(call)
        if start:
            real[:, 1:] = False
        return at, real, start

    monkeypatch.setattr(hooks, "_positions", positions)


def _other_tensors(monkeypatch):
    own = Steering.load

    def load(folder):
        found = own(folder)
        (part,) = (part for _, part in found.interventions.items())
        part.shifts.mul_(1.01)
        return found

    monkeypatch.setattr(Steering, "load", staticmethod(load))


FAULTS = {
    _unsteered: {"forward", "greedy", "no cache", "static cache", "samples", "beams", "assisted"},
    _late: {"greedy", "no cache", "static cache", "samples", "beams", "assisted", "pipeline"},
    _first_row_for_all: {"forward", "strength 0", "greedy", "samples", "beams"},
    _everything: {"strength 0"},
    _beams_unordered: {"beams"},
    _one_token_a_pass: {"assisted"},
    _other_tensors: {"save, load"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_by_the_checks_of_its_way(fault, monkeypatch):
    fault(monkeypatch)
    found = failed(tiny.tiny_language_model("llama"))
    assert FAULTS[fault] <= set(found), found


def test_the_page_shows_what_the_tests_hold():
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    body = page.partition("<!-- matrix:start -->")[2].partition("<!-- matrix:end -->")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in body.strip().splitlines()]
    assert head == list(PROBES)
    assert [row[0] for row in rows] == list(tiny.ARCHITECTURES)
    assert all(row[1:] == ["works"] * len(PROBES) for row in rows)


def test_a_model_that_breaks_is_reported_not_raised():
    model = tiny.tiny_language_model("llama")

    def broken(*_, **__):
        raise RuntimeError("no kernel image")

    model.model.generate = broken
    found = failed(model)
    assert "RuntimeError: no kernel image" in found["greedy"] and "forward" not in found


def test_progress_counts_every_check():
    told = []
    checks(tiny.tiny_language_model("gpt2"), progress=lambda *a: told.append(a))
    assert told[-1] == ("checks", len(PROBES), len(PROBES)) and len(told) == len(PROBES) + 1


# --- adapters, modes, a draft model --------------------------------------------------------------

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def adapted(kind="llama", config=None):
    """A tiny model under adapters of PEFT that change what it says."""
    how = config or peft.LoraConfig(
        r=4, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny.tiny_model(kind), how)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("kind", TARGETS)
def test_a_lora_works_in_every_way_active_and_merged(kind):
    active = adapted(kind)
    assert failed(LanguageModel.wrap(active, tiny.tiny_tokenizer())) == {}
    merged = LanguageModel.wrap(active.merge_and_unload(), tiny.tiny_tokenizer())
    assert failed(merged) == {}


def test_generate_of_the_adapted_model_itself_is_steered():
    active, ids = adapted(), torch.arange(4, 12)[None]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        plain = active.generate(input_ids=ids, **how)
        with Attachment(active, edited(active)) as attached:
            steered = active.generate(input_ids=ids, **how)
        again = active.generate(input_ids=ids, **how)
    inner = LanguageModel.wrap(active, tiny.tiny_tokenizer())
    with Attachment(inner, edited(inner)), torch.no_grad():
        expected = inner.model.generate(ids, **how)
    assert torch.equal(steered, expected) and not torch.equal(steered, plain)
    assert torch.equal(again, plain) and attached.trace.steered == [[*range(7, 13)]]


def test_learned_prompts_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(InputError, match="PROMPT_TUNING .*shift every position"):
        Attachment(adapted(config=config), edited(None))


def test_every_way_works_in_training_mode():
    model = tiny.tiny_language_model("llama")
    model.model.train()
    assert failed(model) == {} and model.model.training


def test_a_draft_model_changes_no_steered_token():
    model, ids = tiny.tiny_language_model("llama"), torch.arange(4, 12)[None]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    # One that often agrees, so that candidates are taken as well as rolled back.
    draft = tiny.tiny_model("llama")
    noise = torch.randn(draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    draft.lm_head.weight.mul_(1 + 0.3 * noise)
    with Attachment(model, edited(model)) as attached, torch.no_grad():
        alone = model.model.generate(ids, **how)
        drafted = model.model.generate(ids, assistant_model=draft, **how)
    assert torch.equal(alone, drafted)
    assert set(attached.trace.steered[0]) >= {*range(7, 15)}


# --- two models, two threads ----------------------------------------------------------------------


def edited(model):
    shift = Shift(tiny.WIDTH)
    shift.shifts.fill_(1.0)
    return [Edit(Interventions({Site(1): shift}), torch.ones(1))]


def answer(model, edits):
    ids = torch.arange(4, 12)[None]
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with Attachment(model, edits), torch.no_grad():
        return model.model.generate(ids, attention_mask=torch.ones_like(ids), **how).tolist()


def test_two_steered_models_answer_at_once_as_each_does_alone():
    models = [tiny.tiny_language_model("llama", seed=seed) for seed in (0, 1)]
    alone = [answer(model, edited(model)) for model in models]
    found = [None, None]

    def run(n):
        found[n] = [answer(models[n], edited(models[n])) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[one] * 5 for one in alone]


def test_a_second_thread_on_one_steered_model_is_refused():
    model = tiny.tiny_language_model("llama")
    ids = torch.arange(4, 12)[None]
    said, errors = [], []

    class Second:
        """Told each token as it comes: then another thread asks too."""

        def put(self, value):
            said.append(value)
            if len(said) == 2:
                thread = threading.Thread(target=ask)
                thread.start()
                thread.join()

        def end(self):
            pass

    def ask():
        for run in (model.model.generate, model.model):
            try:
                run(ids, attention_mask=torch.ones_like(ids))
            except RefusedError as error:
                errors.append(str(error))

    with Attachment(model, edited(model)), torch.no_grad():
        model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, streamer=Second()
        )
        # Another thread may well do the whole call, as streaming does.
        thread = threading.Thread(
            target=model.model.generate, args=(ids,), kwargs={"max_new_tokens": 2}
        )
        thread.start()
        thread.join()
    assert len(errors) == 2 and "one call at a time" in errors[0]


def test_a_second_thread_in_a_plain_pass_is_refused_and_frees_nothing():
    model = tiny.tiny_language_model("llama")
    ids, errors = torch.arange(4, 12)[None], []

    def ask():
        try:
            model.model(ids[:, :3])
        except RefusedError as error:
            errors.append(str(error))

    def between(*_):
        for _ in range(2):  # the first refusal must not let the second in
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()

    with Attachment(model, edited(model), prompt_lengths=[8]), torch.no_grad():
        alone = model.model(ids).logits
        with model.model.model.layers[0].register_forward_hook(between):
            disturbed = model.model(ids).logits
    assert len(errors) == 2 and torch.equal(alone, disturbed)


def test_a_pass_that_failed_leaves_the_model_free_for_other_threads():
    model = tiny.tiny_language_model("llama")
    ids, found = torch.arange(4, 12)[None], []

    def fail(*_):
        raise ValueError("broken block")

    with Attachment(model, edited(model), prompt_lengths=[8]), torch.no_grad():
        with model.model.model.layers[2].register_forward_hook(fail):
            with pytest.raises(ValueError, match="broken block"):
                model.model(ids)
        thread = threading.Thread(target=lambda: found.append(model.model(ids).logits))
        thread.start()
        thread.join()
    assert len(found) == 1
