"""HF: what it generates, scores, records and measures, against the same done by hand."""

import subprocess
import sys
import time
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from os.path import commonprefix
from pathlib import Path

import pytest
import torch

import tiny
from edits import asked as told_of
from edits import bits, edit, hooks_of, seen, shift, told
from innsteer import files, metrics
from innsteer.activations import READS, Activations, Rows, ShardWriter
from innsteer.backends import hf
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.engine import watch
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast
from innsteer.errors import InputError, NothingSteeredError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.site import STREAMS, Site, Where

CHAT = (
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"},
)
PROMPTS = [
    Prompt("a", "Is it so?", ("Yes", "No")),
    Prompt("b", "What?", (" of course", "")),
    Prompt("c", "A longer question than the others are?", ("Sure.",)),
    Prompt("d", CHAT, ("Well", "No")),
    Prompt("e", "Hm", ("x",)),
]
STRENGTHS = [0.0, 1.0, -1.0, 2.0, 0.5]
SCOPES = ("generated", "assistant", "prompt", "all", "range:5:9", "range:40:70")
SITES = [Site(0), Site(1, "mlp"), Site(1, "heads"), Site(2)]


@pytest.fixture(scope="module", params=tiny.KINDS)
def model(request):
    return tiny.tiny_language_model(request.param)


@pytest.fixture(scope="module")
def contrast():
    rows = [
        {"prompt": f"What is {w}?", "source": f"{w} mate.", "target": f"Sir, {w} it is."}
        for w in ("tea", "rain", "a very long thing to ask", "iron", "wool")
    ]
    return Contrast.load(rows, behaviour="formal")


def close(got, want):
    return all(
        torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-4)
        for row, other in zip(got, want, strict=True)
        for a, b in zip(row, other, strict=True)
    )


def reorder(steering, index):
    return Edit(steering.interventions, steering.coef[index], steering.where)


# --- generate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["generated", "assistant", "all", "range:5:9"])
def test_greedy_answers_do_not_depend_on_order_or_batch(model, where):
    steering = edit(model, STRENGTHS, where)
    how = Sampling(new_tokens=6)
    want = HF(model, batch=16).generate(PROMPTS, [steering], how)
    assert [one.item for one in want] == ["a", "b", "c", "d", "e"]
    index = [3, 0, 4, 2, 1]
    for batch in (1, 2, 5):
        got = HF(model, batch=batch).generate(
            [PROMPTS[i] for i in index], [reorder(steering, index)], how
        )
        assert got == [want[i] for i in index]


def test_a_generated_answer_is_what_generate_gives_under_the_attachment(model):
    row = model.encode(CHAT)
    steering = edit(model, 1.0, "assistant")
    with Attachment(model, [steering], turns=[row.turns]) as attached:
        out = model.model.generate(
            torch.tensor([row.ids]), max_new_tokens=6, do_sample=False, top_k=None
        )
    (got,) = HF(model).generate([PROMPTS[3]], [steering], Sampling(new_tokens=6))
    assert got.text == model.decode(out[0, len(row.ids) :].tolist()).strip()
    assert got.steered == len(attached.trace.steered[0])
    past, opened = row.turns
    assert past[1] < opened[0] and got.steered == past[1] - past[0] + got.tokens


def test_an_answer_that_ends_early_counts_its_own_tokens_alone(model):
    steering = edit(model, STRENGTHS)
    free = HF(model).generate(PROMPTS, [steering], Sampling(new_tokens=12))
    assert all(one.tokens == one.steered for one in free if one.item != "a")
    # Make the second token of one answer end the turn.
    row = model.encode(PROMPTS[2].conversation)
    with Attachment(model, [reorder(steering, [2])], prompt_lengths=[row.prompt]):
        out = model.model.generate(torch.tensor([row.ids]), max_new_tokens=4, do_sample=False)
    stop = int(out[0, len(row.ids) + 1])
    short = tiny.tiny_language_model(kind(model), seed=0)
    short.model.generation_config.eos_token_id = [tiny.EOS, stop]
    ended = HF(short).generate(PROMPTS, [steering], Sampling(new_tokens=12))
    assert ended[2].tokens <= 2 and ended[2].steered == ended[2].tokens
    assert [one.steered for one in ended[1:]] == [one.tokens for one in ended[1:]]
    assert ended[0].steered == 0


def kind(model):
    return model.name.removeprefix("tiny-")


def test_samples_repeat_with_their_seed_and_leave_the_global_generator_alone(model):
    hf, warm = HF(model), Sampling(new_tokens=6, temperature=1.0, seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = hf.generate(PROMPTS, (), warm)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert hf.generate(PROMPTS, (), warm) == one
    other = hf.generate(PROMPTS, (), Sampling(new_tokens=6, temperature=1.0, seed=4))
    assert [c.text for c in other] != [c.text for c in one]
    # At strength 0 the draws are the unsteered ones.
    zero = hf.generate(PROMPTS, [edit(model, 0.0)], warm)
    assert [c.text for c in zero] == [c.text for c in one]


def test_decoding_is_neutral_whatever_the_models_own_config_says(model):
    plain = HF(model).generate(PROMPTS, (), Sampling(new_tokens=8))
    strange = tiny.tiny_language_model(kind(model))
    config = strange.model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size = 5.0, 1
    config.num_beams, config.num_return_sequences = 2, 2
    assert HF(strange).generate(PROMPTS, (), Sampling(new_tokens=8)) == plain


# --- score ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["generated", "assistant", "prompt", "all"])
def test_scores_are_the_log_softmax_by_hand(model, where):
    steering = edit(model, STRENGTHS, where)
    got = HF(model).score(PROMPTS, [steering])
    for n, prompt in enumerate(PROMPTS):
        for answer, values in zip(prompt.answers, got[n], strict=True):
            row = model.encode(prompt.conversation, answer=answer)
            with (
                torch.no_grad(),
                Attachment(
                    model,
                    [reorder(steering, [n])],
                    prompt_lengths=[row.prompt],
                    turns=[row.turns],
                ),
            ):
                logits = model.model(torch.tensor([row.ids])).logits[0]
            log_probs = logits.log_softmax(-1)
            want = [float(log_probs[t - 1, row.ids[t]]) for t in range(row.prompt, len(row.ids))]
            assert values == pytest.approx(want, abs=1e-4)


def test_scores_do_not_depend_on_order_or_batch(model):
    steering = edit(model, STRENGTHS, "assistant")
    want = HF(model).score(PROMPTS, [steering])
    index = [4, 2, 0, 3, 1]
    for budget in (1, 90):
        got = HF(model, batch_tokens=budget).score(
            [PROMPTS[i] for i in index], [reorder(steering, index)]
        )
        assert close(got, [want[i] for i in index])


def test_text_is_scored_token_by_token_with_its_own_strength(model):
    texts = ["A text to read.", "x", "", "Another one, longer than that."]
    steering = edit(model, [0.0, 1.0, 1.0, -1.0], "range:3:5")
    for budget in (1, 2048):
        got = HF(model, batch_tokens=budget).score_text(texts, [steering])
        for n, text in enumerate(texts):
            ids = model.tokenizer(text)["input_ids"]
            if len(ids) < 2:
                assert got[n] == 0.0
                continue
            one = Edit(steering.interventions, steering.coef[n], Where("all"))
            with torch.no_grad(), Attachment(model, [one]):
                log_probs = model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            want = sum(float(log_probs[t - 1, ids[t]]) for t in range(1, len(ids)))
            assert got[n] == pytest.approx(want, abs=1e-3)


def test_a_scope_may_miss_some_batches_but_not_all(model):
    long = edit(model, 1.0, "range:45:46")
    got = HF(model, batch=1, batch_tokens=1).score(PROMPTS, [long])
    plain = HF(model, batch_tokens=1).score(PROMPTS)
    assert got[4] == plain[4] and got[2] != plain[2]
    with pytest.raises(NothingSteeredError, match="range:900:901"):
        HF(model).score(PROMPTS, [edit(model, 1.0, "range:900:901")])
    with pytest.raises(NothingSteeredError):
        HF(model).generate(PROMPTS, [edit(model, 1.0, "range:900:901")], Sampling(new_tokens=2))


# --- record --------------------------------------------------------------------------------------


def read_by_hand(encoded, read, span):
    first, end = encoded.prompt, len(encoded.ids)
    tokens = {
        "last": [[end - 1]],
        "mean": [list(range(first, end))],
        "all": [[t] for t in range(first, end)],
        "span": [[t] for t in range(first + span[0], min(first + span[1], end))],
    }
    return tokens[read]


@pytest.mark.parametrize("read", READS)
def test_recorded_rows_are_the_hidden_states_by_hand(model, contrast, read):
    span = (-1, 3)
    got = HF(model, batch_tokens=150).record(contrast, SITES, read=read, span=span)
    assert got.sites == tuple(sorted(SITES)) and got.read == read
    records, n = got.rows.records(), 0
    found = {(r["item"], r["side"], r["token"]): i for i, r in enumerate(records)}
    for item in contrast.items:
        for side in ("source", "target"):
            encoded = model.encode(item.prompt, answer=getattr(item, side))
            for site in SITES:
                with torch.no_grad(), seen(model, site) as held:
                    model.model(torch.tensor([encoded.ids]))
                for tokens in read_by_hand(encoded, read, span):
                    row = got.values[site][found[item.id, side, tokens[-1]]]
                    assert torch.allclose(row, held[0][0, tokens].mean(0), atol=1e-4)
                    n += 1
    assert n == len(got) * len(SITES) and (got.rows.token > 0).all()


@pytest.mark.parametrize("read", READS)
def test_rows_do_not_depend_on_the_side_of_padding(model, contrast, read):
    left, right = (
        HF(model).record(contrast, SITES, read=read, span=(0, 2), padding_side=side)
        for side in ("left", "right")
    )
    assert left.rows.records() == right.rows.records()
    for site in SITES:
        assert torch.allclose(left.values[site], right.values[site], atol=1e-4)


@contextmanager
def counted(model, layer=0):
    """Tokens that go through a block, pass by pass, padding included."""
    seen = []
    block = model.layout.blocks[layer].module
    with block.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0].numel())):
        yield seen


def test_every_stream_is_recorded_in_one_pass_per_batch(model, contrast):
    sites = [Site(1, stream) for stream in STREAMS]
    with counted(model) as one:
        HF(model).record(contrast, sites[:1])
    with counted(model) as every:
        got = HF(model).record(contrast, sites)
    assert every == one and len(one) == 2, "what all begin with, and the rest"
    assert got.widths == {site: model.layout.width_of(site) for site in sites}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("read", ["last", "mean"])
def test_a_prompt_runs_once_for_answers_of_one_token(model, read, padding):
    rows = [{"prompt": ask, "source": "n", "target": "y"} for ask in ("Is it?", "Is it so?", "Hm")]
    asked = Contrast.load(rows, behaviour="so")
    with counted(model) as ran:
        got = HF(model).record(asked, [Site(1), Site(2)], read=read, padding_side=padding)
    texts = [model.encode(item.prompt, answer=text).ids for item, text in pairs(asked)]
    lead = len(commonprefix(texts))
    longest = max(map(len, texts)) - 1
    assert lead > 3 and ran == [lead, 3 * (longest - lead), 6]
    for n, ids in enumerate(texts):
        with torch.no_grad(), watch(model.layout, [Site(1), Site(2)]) as seen:
            model.model(torch.tensor([ids]))
        for site, h in seen.items():
            torch.testing.assert_close(got.values[site][n], h[0, -1], atol=2e-5, rtol=1e-4)


def pairs(contrast):
    """Items and answers in the order in which a recording takes texts of one length."""
    texts = [(item, text) for item in contrast.items for text in (item.source, item.target)]
    return sorted(texts, key=lambda pair: len(pair[0].prompt))


@pytest.mark.parametrize("stream", ["residual", "attention"])
def test_recording_stops_at_the_deepest_block(model, contrast, stream):
    count, calls = hooks_of(model.model), []
    above = [block.module for block in model.layout.blocks[2:]]
    handles = [
        part.register_forward_hook(lambda *_: calls.append(1))
        for part in (*above, model.model.get_output_embeddings())
    ]
    HF(model).record(contrast, [Site(1, stream), Site(0)])
    for handle in handles:
        handle.remove()
    assert calls == [] and hooks_of(model.model) == count


def test_position_0_is_never_read():
    model = tiny.tiny_language_model("llama")
    model.tokenizer.chat_template = None
    pairs = [{"prompt": "a", "source": "b", "target": "cd"}, {"prompt": "e", "source": "f", "target": "gh"}]  # fmt: skip # noqa: E501
    contrast = Contrast.load(pairs, behaviour="x")
    got = HF(model).record(contrast, [Site(1)], read="span", span=(-1, None))
    assert (got.rows.token > 0).all() and len(got) == 6
    with pytest.raises(InputError, match="no token to read"):
        HF(model).record(contrast, [Site(1)], read="span", span=(-1, 0))


def test_shards_on_disk_hold_the_same_rows(model, contrast, tmp_path):
    hf = HF(model, batch_tokens=150)
    got = hf.record(contrast, SITES, read="all", folder=tmp_path / "rows")
    assert len(list((tmp_path / "rows").glob("*.safetensors"))) > 1
    back = Activations.load(tmp_path / "rows")
    assert back.hash == got.hash and back.provenance == got.provenance
    assert back.rows.records() == got.rows.records()
    with pytest.raises(InputError, match="exists"):
        hf.record(contrast, SITES, folder=tmp_path / "rows")


def test_a_recording_to_disk_holds_one_batch_at_a_time(model, contrast, tmp_path, monkeypatch):
    held, alive, write = [], [], ShardWriter.write

    def watched(self, values, rows):
        alive.append(sum(ref() is not None for ref in held))
        held.extend(weakref.ref(v) for v in values.values())
        write(self, values, rows)

    monkeypatch.setattr(ShardWriter, "write", watched)
    HF(model, batch_tokens=150).record(contrast, SITES, folder=tmp_path / "rows")
    assert len(alive) > 2 and set(alive) == {0}


def test_rows_that_are_not_finite_do_not_reach_the_disk(contrast, tmp_path):
    model = tiny.tiny_language_model("llama")
    model.layout.blocks[1].module.mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="site 1.residual: .* are not finite"):
        HF(model).record(contrast, [Site(1)], folder=tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def interrupted(model, contrast, folder, after=2, **how):
    """A recording that ends by Ctrl-C after some batches."""

    def interrupt(stage, done, total):
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        HF(model, batch_tokens=1).record(contrast, SITES, folder=folder, progress=interrupt, **how)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_interrupted_recording_goes_on_where_it_stopped(model, contrast, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    HF(model, batch_tokens=1).record(contrast, SITES, folder=whole)
    count = hooks_of(model.model)
    interrupted(model, contrast, tmp_path / "rows", after=3)
    assert not (tmp_path / "rows").exists() and hooks_of(model.model) == count
    written, write = [], ShardWriter.write
    monkeypatch.setattr(
        ShardWriter, "write", lambda self, *args: (written.append(1), write(self, *args))[1]
    )
    HF(model, batch_tokens=1).record(contrast, SITES, folder=tmp_path / "rows")
    assert len(written) == 10 - 3
    assert contents(tmp_path / "rows") == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "whole"]


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import tiny
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast
from innsteer.site import Site
rows = [{{"prompt": "p%d" % n, "source": "a", "target": "b " * n}} for n in range(1, 9)]
HF(tiny.tiny_language_model("llama"), batch_tokens=1).record(
    Contrast.load(rows), [Site(1)], folder={folder!r}, progress=lambda *_: time.sleep({pause})
)
"""


def test_a_killed_recording_goes_on_to_the_same_bytes(tmp_path):
    def start(name, pause):
        tests = str(Path(__file__).parents[1])
        script = KILLED.format(tests=tests, folder=str(tmp_path / name), pause=pause)
        return subprocess.Popen([sys.executable, "-c", script])

    assert start("whole", 0).wait() == 0
    killed = start("rows", 0.2)
    partial = tmp_path / ".rows.partial"
    while len(list(partial.glob("*.safetensors"))) < 3:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "rows").exists()
    assert start("rows", 0).wait() == 0
    assert contents(tmp_path / "rows") == contents(tmp_path / "whole")


def test_an_end_before_the_last_step_loses_nothing(model, contrast, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    HF(model, batch_tokens=1).record(contrast, SITES, folder=whole)

    def full(source, target):
        if "rows" == Path(target).name:
            raise OSError("no space left on device")
        replace_file(source, target)

    replace_file = files.os.replace
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            HF(model, batch_tokens=1).record(contrast, SITES, folder=tmp_path / "rows")
    (tmp_path / ".rows.partial" / ".00001.rows.json.x").write_text("left by a killed writer")
    written, write = [], ShardWriter.write
    monkeypatch.setattr(
        ShardWriter, "write", lambda self, *args: (written.append(1), write(self, *args))[1]
    )
    HF(model, batch_tokens=1).record(contrast, SITES, folder=tmp_path / "rows")
    assert not written and contents(tmp_path / "rows") == contents(whole)


@pytest.mark.parametrize("harm", ["torn line", "lost shard", "altered shard", "lost journal"])
def test_what_an_interruption_spoiled_is_recorded_again(model, contrast, tmp_path, harm):
    whole, partial = tmp_path / "whole", tmp_path / ".rows.partial"
    HF(model, batch_tokens=1).record(contrast, SITES, folder=whole)
    interrupted(model, contrast, tmp_path / "rows", after=3)
    journal = partial / "journal.jsonl"
    if harm == "torn line":
        journal.write_text(journal.read_text()[:-7])
    elif harm == "lost shard":
        (partial / "00001.safetensors").unlink()
    elif harm == "altered shard":
        (partial / "00001.rows.json").write_text("[]")
    else:
        journal.unlink()
    HF(model, batch_tokens=1).record(contrast, SITES, folder=tmp_path / "rows")
    assert contents(tmp_path / "rows") == contents(whole)


def test_an_interrupted_recording_of_something_else_is_not_mixed_in(model, contrast, tmp_path):
    interrupted(model, contrast, tmp_path / "rows")
    for how in ({"read": "mean"}, {"padding_side": "left"}):
        with pytest.raises(InputError, match="an interrupted run of something else"):
            HF(model, batch_tokens=1).record(contrast, SITES, folder=tmp_path / "rows", **how)
    with pytest.raises(InputError, match="something else"):
        HF(model, batch_tokens=1).record(contrast, SITES[:1], folder=tmp_path / "rows")
    assert HF(model, batch_tokens=1).record(contrast, SITES, folder=tmp_path / "rows")


def test_a_resumed_recording_uses_the_threads_that_it_began_with(model, contrast, tmp_path):
    threads = torch.get_num_threads()
    interrupted(model, contrast, tmp_path / "rows")
    used = []
    try:
        torch.set_num_threads(threads + 1)
        HF(model, batch_tokens=1).record(
            contrast, SITES, folder=tmp_path / "rows",
            progress=lambda *_: used.append(torch.get_num_threads()),
        )  # fmt: skip
        assert set(used) == {threads} and torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_recording_to_disk_holds_one_batch_and_encodes_one_window(
    model, contrast, tmp_path, monkeypatch
):
    monkeypatch.setattr(hf, "WINDOW", 4)
    rows, encoded, written = [], [], []
    encode, write = HF._encode_side, ShardWriter.write

    def counted(self, item, side):
        encoded.append(item)
        return encode(self, item, side)

    def watched(self, values, table):
        rows.append(weakref.ref(table))
        assert sum(one() is not None for one in rows) == 1
        assert len(encoded) - len(written) <= 4
        written.extend(table.item)
        write(self, values, table)

    monkeypatch.setattr(HF, "_encode_side", counted)
    monkeypatch.setattr(ShardWriter, "write", watched)
    told = []
    folder = HF(model, batch_tokens=1).record_to(
        tmp_path / "rows", contrast, SITES, progress=lambda *a: told.append(a)
    )
    assert len(written) == len(rows) == 10 and told[-1] == ("record", 10, 10)
    loaded = Activations.load(folder)
    assert loaded.hash == HF(model, batch_tokens=1).record(contrast, SITES).hash


def test_two_recordings_into_one_folder_are_refused(model, contrast, tmp_path):
    with ShardWriter(tmp_path / "rows", ("b",), "last", {}, resume="x") as shards:
        with pytest.raises(InputError, match="written by another process"):
            with ShardWriter(tmp_path / "rows", ("b",), "last", {}, resume="x"):
                pass
        shards.write({Site(1): torch.zeros(1, 2)}, Rows.of([{"side": "source"}]))
    assert (tmp_path / "rows" / "activations.json").is_file()


# --- cost ----------------------------------------------------------------------------------------


def test_a_reference_holds_prompt_and_answer(model):
    got = HF(model).reference(PROMPTS, Sampling(new_tokens=5, temperature=1.0))
    for prompt, ids, length in zip(PROMPTS, got.ids, got.lengths, strict=True):
        assert ids[:length] == model.encode(prompt.conversation).ids
        assert 1 <= len(ids) - length <= 5
    assert got.tokens == sum(len(ids) for ids in got.ids) - sum(got.lengths)
    part = got.part(6)
    assert part.tokens >= 6 and part.ids == got.ids[: len(part.ids)]
    bare = HF(model).reference(PROMPTS, None)
    assert bare.tokens == len(PROMPTS) and bare.part(2).tokens == 2


@pytest.mark.parametrize("sampling", [Sampling(new_tokens=5, temperature=1.0), None])
def test_cost_is_the_divergence_by_hand(model, sampling):
    hf = HF(model, batch_tokens=120)
    reference = hf.reference(PROMPTS, sampling)
    steering = edit(model, [0.0, 0.3, -0.3, 0.5, 0.1])
    got = hf.meter(reference)([steering])
    assert [one.item for one in got] == ["a", "b", "c", "d", "e"]
    for n, one in enumerate(got):
        ids, length = torch.tensor([reference.ids[n]]), reference.lengths[n]
        with torch.no_grad():
            base = model.model(ids).logits[0].log_softmax(-1)
            with Attachment(model, [reorder(steering, [n])], prompt_lengths=[length]):
                steered = model.model(ids).logits[0].log_softmax(-1)
        kl = (base.exp() * (base - steered)).sum(-1)
        want = kl[length - 1 :] if sampling is None else kl[length - 1 : -1]
        assert one.values["kl"] == pytest.approx(want.tolist(), abs=1e-4)
        assert one.tokens == len(want)
    assert set(got[0].values["kl"]) == {0.0} and got[0].steered == 0


@pytest.mark.parametrize("where", SCOPES)
@pytest.mark.parametrize("sites", [[], [Site(1)]], ids=["whole", "replayed"])
def test_a_meter_reads_the_scores_under_every_scope(model, where, sites):
    hf = HF(model, batch_tokens=240)
    prompts = [replace(p, answers=tuple(filter(None, p.answers))) for p in PROMPTS]
    owners = [n for n, p in enumerate(prompts) for _ in p.answers]
    steering = edit(model, STRENGTHS, where)
    want = [row for rows in hf.score(prompts, [steering]) for row in rows]
    got = hf.meter(hf.forced(prompts), sites)([reorder(steering, owners)])
    assert close([[one.values["log_prob"] for one in got]], [want])
    plain = [one.values["base_log_prob"] for one in got]
    assert not close([plain], [want])


@pytest.mark.parametrize(
    ("where", "prompts", "kept"),
    [
        ("assistant", PROMPTS[:3], True),
        ("assistant", PROMPTS[3:4], False),
        ("generated", PROMPTS[3:4], True),
        ("range:5:9", PROMPTS[3:4], False),
    ],
)
def test_a_prefix_is_kept_where_nothing_in_it_is_edited(model, where, prompts, kept):
    hf, widths = HF(model), []
    reference = hf.forced(prompts)
    meter = hf.meter(reference, [Site(1)])
    block = model.layout.blocks[2].module
    with block.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1])):
        meter([edit(model, 1.0, where)])
    # The last pass is the measured one, after those of the plain model.
    assert (widths[-1] < max(map(len, reference.ids))) is kept


@pytest.mark.parametrize("where", SCOPES)
def test_the_edited_share_is_a_share_under_every_scope(model, where):
    hf = HF(model)
    reference = hf.reference(PROMPTS, Sampling(new_tokens=5, temperature=1.0))
    got = hf.meter(reference)([edit(model, 1.0, where)])
    share = metrics.get("edited_share").score(got).value
    known = {"generated": 1, "assistant": 1, "all": 1, "prompt": 0}
    assert share == known.get(where, share) and all(0 <= c.steered <= c.tokens for c in got)
    # What is edited further up costs all the same.
    assert where != "prompt" or all(c.values["kl"][0] > 0 for c in got)


@pytest.mark.parametrize("stream", STREAMS)
def test_replaying_the_lower_blocks_changes_no_figure(model, stream):
    hf, site = HF(model, batch_tokens=120), Site(1, stream)
    reference = hf.reference(PROMPTS, Sampling(new_tokens=5, temperature=1.0))
    steering = edit(model, [0.0, 0.5, -0.5, 1.0, 0.1], "generated", site)
    count = hooks_of(model.model)
    whole, replayed = hf.meter(reference), hf.meter(reference, [site])
    replayed.unsteered()  # the passes that keep what an edit cannot change
    ran = []
    with model.layout.blocks[0].mlp.register_forward_hook(lambda *_: ran.append(1)):
        got = replayed([steering])
    assert ran == []
    for one, other in zip(whole([steering]), got, strict=True):
        assert one.values["kl"] == pytest.approx(other.values["kl"], abs=1e-5)
        assert one.steered == other.steered
    for meter in (whole, replayed):
        for one in meter([edit(model, 0.0, "generated", site)]):
            assert set(one.values["kl"]) == {0.0}
    assert hooks_of(model.model) == count
    assert not any("forward" in vars(block.module) for block in model.layout.blocks)


def test_answers_of_one_token_share_a_run_unless_edits_part_them(model):
    hf, prompts = HF(model), [replace(p, answers=("y", "n")) for p in PROMPTS]
    reference = hf.forced(prompts)
    meter = hf.meter(reference, [Site(1)], divergence=False)
    with counted(model, 2) as ran:
        alike = meter([edit(model, 0.7)])
    assert ran[-1] == len(prompts), "the last token of each prompt, once"
    apart = edit(model, [0.7, -0.7] * len(prompts))
    for given, got in ((edit(model, [0.7] * 10), alike), (apart, meter([apart]))):
        for n, one in enumerate(got):
            row = reorder(given, [n])
            want = hf.score([replace(prompts[n // 2], answers=(one.text,))], [row])[0][0]
            assert one.values["log_prob"] == pytest.approx(want, abs=1e-4)
            assert one.steered == one.tokens == 1


def test_what_all_rows_begin_with_runs_once(model):
    hf = HF(model)
    reference = hf.reference(PROMPTS[:3], None)
    lead = len(commonprefix([list(ids[:-1]) for ids in reference.ids]))
    rest = 3 * (max(map(len, reference.ids)) - lead)
    meter = hf.meter(reference)
    with counted(model, 1) as ran:
        plain = meter.unsteered()
        late = meter([edit(model, 0.7)])
        everywhere = meter([edit(model, 0.7, "all")])
    assert lead > 3 and ran == [lead, rest, rest, rest + 3 * lead]
    for where, got in (("generated", late), ("all", everywhere)):
        for one, ids, length in zip(got, reference.ids, reference.lengths, strict=True):
            given = [edit(model, 0.7, where)]
            with torch.no_grad(), Attachment(model, given, prompt_lengths=[length]):
                steered = model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            best = max(steered.argmax().item(), 0)
            assert one.values["same"] == (float(best == best_of(model, ids)),)
            said = steered[best_of(model, ids)].item()
            assert one.values["log_prob"] == pytest.approx((said,), abs=1e-4)
    assert [one.values["kl"] for one in plain] == [(0.0,)] * 3


def best_of(model, ids):
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0, -1].argmax().item()


def test_one_meter_serves_edits_at_several_layers(model):
    hf, sites = HF(model), [Site(0), Site(1, "mlp"), Site(2)]
    reference = hf.reference(PROMPTS, Sampling(new_tokens=5, temperature=1.0))
    meter = hf.meter(reference, sites)
    meter.unsteered()
    for site, lowest in zip(sites, (1, 1, 3), strict=True):
        given, ran = [edit(model, 0.5, "generated", site)], []
        with ExitStack() as stack:
            for layer, block in enumerate(model.layout.blocks):
                hook = lambda *_, layer=layer: ran.append(layer)  # noqa: E731
                stack.enter_context(block.mlp.register_forward_hook(hook))
            got = meter(given)
        assert min(ran, default=lowest) == lowest
        for one, other in zip(got, hf.meter(reference)(given), strict=True):
            assert one.values["kl"] == pytest.approx(other.values["kl"], abs=1e-5)


def test_an_edit_below_the_cut_is_not_replayed_away(model):
    hf = HF(model)
    reference = hf.reference(PROMPTS, None)
    steering = edit(model, 1.0, "generated", Site(0))
    want, got = hf.meter(reference)([steering]), hf.meter(reference, [Site(2)])([steering])
    for one, other in zip(want, got, strict=True):
        assert one.values["kl"] == pytest.approx(other.values["kl"], abs=1e-5)
        assert one.values["kl"][0] > 0


def test_a_replaced_forward_comes_back_after_a_failed_measurement(model):
    hf, block = HF(model), model.layout.blocks[0].module
    own = block.forward
    block.forward = own
    try:
        meter = hf.meter(hf.reference(PROMPTS, None), [Site(1)])
        broken = Edit(shift(model), torch.ones(5, 2))
        with pytest.raises(RuntimeError):
            meter([broken])
        meter([edit(model)])
        assert vars(block)["forward"] is own
    finally:
        del block.forward
    assert "forward" not in vars(model.layout.blocks[1].module)


def test_the_models_bits_are_the_same_after_all_of_this(model):
    fresh = tiny.tiny_language_model(kind(model))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(bits(model.model(ids).logits), bits(fresh.model(ids).logits))


def test_texts_without_a_prompt_lend_their_first_quarter_to_a_map_that_reads_one():
    model = tiny.tiny_language_model()
    backend, edit = HF(model), Edit(told(model), torch.ones(1))
    text = "a text of some forty bytes, or a little more"
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    attached = Attachment(model, [edit], prompt_lengths=[ids.shape[1] // 4])
    with torch.no_grad(), attached:
        log_probs = model.model(ids).logits[0, :-1].log_softmax(-1)
    assert attached.trace.touched == ids.shape[1] - ids.shape[1] // 4 + 1
    want = float(log_probs.gather(-1, ids[0, 1:, None]).sum())
    assert backend.score_text([text], [edit])[0] == pytest.approx(want, rel=1e-5)
    with pytest.raises(InputError, match="a text of . tokens"):
        backend.score_text([text, "a"], [edit])


def test_rows_of_strengths_or_parameters_that_no_prompt_has_are_refused(model):
    backend = HF(model, batch=2)
    prompts = [Prompt(str(n), "What is tea?", (" Hot.",)) for n in range(4)]
    maps = shift(model)
    texts = ["It is hot, and wet.", "It is not.", "Tea.", "No tea here."]
    meter = backend.meter(backend.reference(prompts, Sampling(3, 1.0)))
    calls = [
        lambda edit: backend.generate(prompts, [edit], Sampling(2)),
        lambda edit: backend.score(prompts, [edit]),
        lambda edit: backend.score_text(texts, [edit]),
        lambda edit: meter([edit]),
    ]
    for call in calls:
        for rows in (1, 3, 5):
            with pytest.raises(InputError, match=f"{rows} rows of strengths for 4 sequences"):
                call(Edit(maps, torch.ones(rows, 1)))
        call(Edit(maps, torch.ones(4, 1)))
    with pytest.raises(InputError, match="3 sets of parameters for 4 sequences"):
        backend.generate(prompts, [told_of(model, ("a", "b", "c"))], Sampling(2))
    with pytest.raises(InputError, match="the parameters {'concept': 5}"):
        told_of(model, (5,))
