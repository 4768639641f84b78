"""Steering inside vLLM: the same edit as by transformers, per request, and nobody else's."""

from uuid import uuid4

import pytest
import torch

import tiny
from conftest import shift
from innsteer.backends.menu import Choice, Order
from innsteer.backends.ragged import Ragged, Seat
from innsteer.errors import NothingSteeredError, RefusedError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.site import Site

LONG = 300
"""Tokens of a prompt of several chunks and blocks of the cache (128 each on a CPU)."""
ROUNDING = 2e-4
"""Nats that sums in another order may make; what a steering does is a hundred times that."""
MIXES = [
    "",
    "both.wealth@0.5",
    "both.wealth@-1+both.power@0.7",
    "flow@1",
    "both.power@0.4+flow@-0.8",
    "ever@0.3",
    "early@0.5",
    "told@1",
    "flow@0.5+ever@-0.2",
    "held@1",
    "ever@0.3+held@-0.7",
]


def ids(length, seed=0):
    """Random token ids of text."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(8, tiny.VOCAB, (length,), generator=draw).tolist()


def ask(llm, prompts, mixes, tokens=8, answers=None, **more):
    """The engine's answers; of given ``answers`` the log-probabilities."""
    from vllm import SamplingParams

    answers = answers or [[] for _ in prompts]
    params = []
    for prompt, mix, answer in zip(prompts, mixes, answers, strict=True):
        extra = {"steering": mix, **more} if mix else {}
        if answer and mix:
            extra["steering_prompt"] = len(prompt)
        how = {"prompt_logprobs": 0} if answer else {}
        params.append(
            SamplingParams(
                max_tokens=1 if answer else tokens,
                temperature=0,
                ignore_eos=True,
                logprobs=0,
                extra_args=extra or None,
                **how,
            )
        )
    given = [
        {"prompt_token_ids": prompt + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return llm.generate(given, params, use_tqdm=False)


def new(output):
    """Token ids and their log-probabilities of one answer."""
    one = output.outputs[0]
    chosen = [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
    return list(one.token_ids), chosen


def scored(llm, prompts, mixes, answers):
    """Log-probabilities of given answers' tokens."""
    found = []
    for output, prompt, answer in zip(
        ask(llm, prompts, mixes, answers=answers), prompts, answers, strict=True
    ):
        steps = output.prompt_logprobs[len(prompt) :]
        found.append([step[token].logprob for step, token in zip(steps, answer, strict=True)])
    return torch.tensor(found)


def by_hand(model, served, prompt, mix, answer):
    """The same log-probabilities by transformers under hooks."""
    from innsteer.backends.vllm_plugin import settings

    menu = settings.menu({"steerings": served[0]})
    edits = [
        Edit(menu.dishes[n].interventions, torch.tensor(coef), menu.dishes[n].where)
        for n, coef in (menu.mixed(mix).items() if mix else ())
    ]
    row = torch.tensor([prompt + answer])
    with torch.inference_mode():
        if edits:
            with Attachment(model, edits, prompt_lengths=[len(prompt)]):
                logits = model.model(row).logits
        else:
            logits = model.model(row).logits
    picked = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return picked.gather(-1, torch.tensor(answer)[:, None])[:, 0]


# --- a layer's output ---


@pytest.mark.parametrize("form", ["rows", "a batch of one", "two summands"])
def test_steered_rows_of_every_form_of_output_change_and_no_others(form):
    from innsteer.backends.vllm_plugin import op

    table = Ragged(8, 2, torch.device("cpu"))
    table.add(shift(Site(0)), 1)
    table.admit("steered", Order((Choice(0, (0.5,), ((0, None),)),), 1, ""))
    table.plan([Seat("steered", 0, 1), Seat("plain", 0, 4)])
    op.PLACES[form], op.READS[form] = table.places[Site(0)], []
    h = torch.randn(5, tiny.WIDTH, generator=torch.Generator().manual_seed(0))

    class Layer(torch.nn.Module):
        def forward(self, h):
            if form == "two summands":
                return h / 2, h / 2
            return h[None].clone() if form == "a batch of one" else h.clone()

    layer = Layer()
    op.attach(layer, form)
    out = layer(h)
    out = sum(out) if form == "two summands" else out.reshape(h.shape)
    expected = h.clone()
    expected[0] += 0.5 * table.places[Site(0)][0].part.shifts[0]
    assert torch.equal(out[1:], h[1:]) and torch.allclose(out, expected, atol=1e-6)


# --- the same edit -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [12, LONG])
def test_steered_as_by_transformers_teacher_forced(llm, model, served, length):
    prompts = [ids(length + n, n) for n in range(len(MIXES))]
    answers = [ids(10, 50 + n) for n in range(len(MIXES))]
    ours = scored(llm, prompts, MIXES, answers)
    theirs = torch.stack(
        [by_hand(model, served, *row) for row in zip(prompts, MIXES, answers, strict=True)]
    )
    plain = scored(llm, prompts, [""] * len(MIXES), answers)
    assert (ours - theirs).abs().max() < ROUNDING
    assert ((ours - plain).abs().amax(-1)[1:] > 100 * ROUNDING).all()


def test_generated_as_transformers_would_token_by_token(llm, model, served):
    prompts = [ids(40, n) for n in range(len(MIXES))]
    for mix, prompt, output in zip(MIXES, prompts, ask(llm, prompts, MIXES), strict=True):
        tokens, chosen = new(output)
        assert torch.allclose(
            torch.tensor(chosen), by_hand(model, served, prompt, mix, tokens), atol=ROUNDING
        )


def test_a_mixed_batch_answers_as_each_alone(llm):
    prompts = [ids(20 + 40 * (n % 3), n) for n in range(2 * len(MIXES))]
    mixed = ask(llm, prompts, MIXES * 2)
    for prompt, mix, together in zip(prompts, MIXES * 2, mixed, strict=True):
        (alone,) = ask(llm, [prompt], [mix])
        assert new(alone)[0] == new(together)[0]
        assert new(alone)[1] == pytest.approx(new(together)[1], abs=ROUNDING)


def test_strength_zero_is_the_plain_model_to_the_bit(llm):
    prompt = ids(60)
    (plain,), (zero,) = ask(llm, [prompt], [""]), ask(llm, [prompt], ["flow@0+ever@0"])
    assert new(plain) == new(zero)


def test_plain_rows_beside_steered_ones_keep_their_bits(llm):
    """The op on a batch of which half is steered: the other half's summands are the same bits."""
    from innsteer.backends.menu import Choice, Order
    from innsteer.backends.ragged import Seat
    from innsteer.backends.vllm_plugin import op

    ragged = desk(llm).ragged
    hidden, residual = torch.randn(2, 6, tiny.WIDTH).unbind()
    before = hidden.clone(), residual.clone()
    ragged.admit("mine", Order((Choice(1, (1.0,), ((0, None),)),), 3, "salt"))
    ragged.plan([Seat("plain", 0, 3), Seat("mine", 0, 3)])
    key = desk(llm).keys[2]
    torch.ops.innsteer.steer_split(hidden, residual, key)
    ragged.leave("mine"), ragged.idle()
    assert torch.equal(hidden[:3], before[0][:3]) and torch.equal(residual[:3], before[1][:3])
    (place,) = [p for p in op.PLACES[key] if p.table is ragged.tables[1]]
    whole = place.part(sum(before)[3:], torch.ones(3, 1))
    assert torch.equal((hidden + residual)[3:], whole)


# --- caches, chunks, preemption ------------------------------------------------------------------


def desk(llm):
    """The worker's desk, and the scheduler beside it."""
    return core(llm).model_executor.driver_worker.worker.innsteer


def core(llm):
    return llm.llm_engine.engine_core.engine_core


def test_a_cached_prefix_is_reused_within_a_steering_and_never_across(llm):
    prompt = ids(LONG, 7)
    core(llm).reset_prefix_cache()
    for mix in ("", "ever@0.3", "ever@0.30001", "flow@1+ever@0.3", "both.power@1"):
        first = ask(llm, [prompt], [mix])[0]
        again = ask(llm, [prompt], [mix])[0]
        # Blocks that nothing steers are the plain model's, and shared with it.
        shared = 256 if mix == "both.power@1" else 0
        assert first.num_cached_tokens == shared and again.num_cached_tokens == 256
        assert new(again)[0] == new(first)[0]
        assert new(again)[1] == pytest.approx(new(first)[1], abs=ROUNDING)


def test_without_keys_of_their_own_steered_blocks_spoil_a_plain_answer(llm, monkeypatch):
    """The negative control: what the keys prevent is there, and is large."""
    from innsteer.backends.menu import Order

    prompt = ids(LONG, 8)
    fresh = torch.tensor(new(ask(llm, [prompt], [""])[0])[1])
    core(llm).reset_prefix_cache()
    ask(llm, [prompt], ["ever@0.3"])
    apart = torch.tensor(new(ask(llm, [prompt], [""])[0])[1])
    core(llm).reset_prefix_cache()
    monkeypatch.setattr(Order, "key", lambda *_: None)
    ask(llm, [prompt], ["ever@0.3"])
    spoilt = torch.tensor(new(ask(llm, [prompt], [""])[0])[1])
    core(llm).reset_prefix_cache()
    assert (apart - fresh).abs().max() < ROUNDING
    assert (spoilt - fresh).abs().max() > 20 * ROUNDING


def test_a_second_turn_is_steered_as_if_nothing_were_cached(llm):
    """Under ``generated`` the first answer's tokens are steered when made, and plain when given."""
    prompt = ids(120, 9)
    (first,) = ask(llm, [prompt], ["flow@1"], tokens=40)
    turn = prompt + new(first)[0] + ids(10, 1)
    cached = new(ask(llm, [turn], ["flow@1"])[0])[1]
    core(llm).reset_prefix_cache()
    assert new(ask(llm, [turn], ["flow@1"])[0])[1] == pytest.approx(cached, abs=ROUNDING)


@pytest.mark.parametrize("mix", ["flow@1", "ever@0.3", "told@1", "early@0.5", "held@1"])
def test_a_request_put_off_and_resumed_answers_as_before(llm, mix):
    from vllm import SamplingParams

    prompt = ids(200, 11)
    core(llm).reset_prefix_cache()
    expected = new(ask(llm, [prompt], [mix], tokens=12)[0])
    core(llm).reset_prefix_cache()
    name = uuid4().hex
    params = SamplingParams(
        max_tokens=12,
        temperature=0,
        ignore_eos=True,
        logprobs=0,
        extra_args={"steering": mix, "steering_receipt": name},
    )
    engine, done = llm.llm_engine, []
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
    for step in range(40):
        if step == 6:
            assert core(llm).scheduler.running
            core(llm).reset_prefix_cache(reset_running_requests=True)
        done += [output for output in engine.step() if output.finished]
    (output,) = done
    assert new(output)[0] == expected[0]
    assert new(output)[1] == pytest.approx(expected[1], abs=ROUNDING)
    number, tally = desk(llm).receipt(name)[0]
    assert (
        tally["touched"]
        == {"flow@1": 12, "told@1": 12, "ever@0.3": 211, "early@0.5": 199, "held@1": 12}[mix]
    )


# --- receipts, refusals --------------------------------------------------------------------------


def test_receipts_count_the_tokens_of_each_steering(llm):
    core(llm).reset_prefix_cache()
    prompt = ids(LONG, 12)
    for cached in (0, 256):
        ask(llm, [prompt], ["flow@1+ever@0.3"], steering_receipt="mine")
        found = dict(desk(llm).receipt("mine"))
        assert found[1]["touched"] == 8 and found[1]["cached"] == 0
        assert found[2]["touched"] == LONG + 7 and found[2]["cached"] == cached
        assert found[2]["edited"] == LONG + 7 - cached and 0 < found[2]["displacement"] < 10
    assert desk(llm).receipt("mine") is None


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"steering": "nobody@1"}, "unknown steering 'nobody'"),
        ({"steering": "flow@1+both.power@1"}, "the order in which they are applied"),
        ({"steering": "flow@much"}, "expected NAME@STRENGTH"),
        ({"steering": 1}, "expected a string"),
        ({"steering": "flow@1", "steering_prompt": 99}, "from 1 to 5"),
        ({"steering": "early@1", "steering_prompt": 1}, "at least one token in scope"),
        ({"innsteer": {"choices": []}}, "what is steered by as 'steering'"),
    ],
)
def test_a_request_that_cannot_be_steered_is_refused_on_entry(llm, extra, words):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError

    with pytest.raises(VLLMClientError, match=words):
        llm.generate(
            [{"prompt_token_ids": ids(5)}],
            SamplingParams(max_tokens=2, extra_args=extra),
            use_tqdm=False,
        )


def test_a_pass_whose_site_does_not_run_gives_out_nothing(llm, monkeypatch):
    from innsteer.backends.vllm_plugin import op

    monkeypatch.setitem(op.PLACES, desk(llm).keys[2], [])
    with pytest.raises(NothingSteeredError, match="1 of 1 sites"):
        ask(llm, [ids(12)], ["flow@1"])
    for request in list(core(llm).scheduler.requests):
        llm.llm_engine.abort_request([request], internal=True)
    runner = core(llm).model_executor.driver_worker.worker.model_runner
    runner.execute_model_state = None


def test_a_pass_in_which_a_blocks_input_is_not_read_gives_out_nothing(llm, monkeypatch):
    from innsteer.backends.vllm_plugin import op

    monkeypatch.setitem(op.READS, desk(llm).keys[1], [])
    with pytest.raises(NothingSteeredError, match="1 of 3 sites"):
        ask(llm, [ids(12)], ["held@1"])
    for request in list(core(llm).scheduler.requests):
        llm.llm_engine.abort_request([request], internal=True)
    runner = core(llm).model_executor.driver_worker.worker.model_runner
    runner.execute_model_state = None


def test_a_steering_whose_inputs_the_engine_does_not_see_is_refused(llm, served, monkeypatch):
    from innsteer.backends.vllm_plugin import server, settings

    config = server.configuration({"held": served[0]["held"]["folder"]})
    assert config["layers"] == [0, 1, 2, 3]
    own = desk(llm)
    (dish,) = [one for one in settings.menu({"steerings": served[0]}).dishes if one.name == "held"]
    with monkeypatch.context() as patch:
        patch.delitem(own.keys, 0)
        with pytest.raises(RefusedError, match="'held', which reads the output of block 0"):
            own.add(dish)
    monkeypatch.setattr(own, "_pipeline", True)
    with pytest.raises(RefusedError, match="'held', which acts across sites, under pipeline"):
        own.add(dish)


def test_a_vllm_that_moved_a_name_is_refused():
    from innsteer.backends.vllm_plugin import gate

    gate.check_names()
    gate.check_names(gate.V2)
    with pytest.raises(RefusedError, match="gone"):
        gate.check_names({"vllm.v1.worker.gpu_worker.Worker.load_everything": ("self",)})
    with pytest.raises(RefusedError, match="expected parameters colour"):
        gate.check_names({"vllm.v1.worker.gpu_worker.Worker.load_model": ("colour",)})


class Changed:
    """A configuration with one value changed."""

    def __init__(self, whole, path, value):
        self._whole, self._path, self._value = whole, path, value

    def __getattr__(self, name):
        first, _, rest = self._path.partition(".")
        own = getattr(self._whole, name)
        if name != first:
            return own
        return Changed(own, rest, self._value) if rest else self._value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("parallel_config.enable_dbo", True, "microbatches"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.enable_hc_sp", True, "sequence parallelism"),
        ("parallel_config.use_sequence_parallel_moe", True, "sequence parallelism"),
    ],
)
def test_a_configuration_that_would_not_steer_right_is_refused(llm, path, value, words):
    from innsteer.backends.vllm_plugin import gate

    gate.check_config(llm.llm_engine.vllm_config, untested=False)
    for untested in (False, True):
        with pytest.raises(RefusedError, match=words):
            gate.check_config(Changed(llm.llm_engine.vllm_config, path, value), untested)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("use_v2_model_runner", True, "the V2 model runner"),
        ("device_config.device_type", "cuda", "a GPU"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config.data_parallel_size", 2, "data parallelism"),
        ("speculative_config", object(), "speculative decoding"),
        ("model_config.quantization", "fp8", "a quantised model"),
        ("lora_config", object(), "LoRA"),
        ("kv_transfer_config", object(), "a KV connector"),
    ],
)
def test_what_no_test_has_run_starts_only_when_told(llm, path, value, words):
    from innsteer.backends.vllm_plugin import gate

    config = Changed(llm.llm_engine.vllm_config, path, value)
    with pytest.raises(RefusedError, match=f"{words}, which no test has run.*--steering-untested"):
        gate.check_config(config, untested=False)
    gate.check_config(config, untested=True)


def test_a_version_that_no_test_has_run_starts_only_when_told(llm, monkeypatch):
    import vllm

    from innsteer.backends.vllm_plugin import gate

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    config = llm.llm_engine.vllm_config
    with pytest.raises(RefusedError, match="vLLM 0.33.1, which no test has run"):
        gate.check_config(config, untested=False)
    gate.check_config(config, untested=True)
    monkeypatch.setattr(vllm, "__version__", "0.35.0")
    with pytest.raises(RefusedError, match="0.32 up to, but not, 0.35"):
        gate.check_names()


def test_steerings_of_one_identity_are_counted_apart():
    from innsteer.backends.vllm_plugin import monitoring

    tally = {"touched": 3, "cached": 0, "edited": 2, "displacement": 0.1, "nonfinite": 0}
    for name in ("one", "other", "other"):
        monitoring.count([{"name": name, "identity": "same", "strengths": {}} | tally])
    counts = [monitoring.RESPONSES.labels(name)._value.get() for name in ("one", "other")]
    assert counts == [1, 2]
    assert monitoring.TOKENS["touched"].labels("other")._value.get() == 6
