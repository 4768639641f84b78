"""lm-eval's tasks under a steering: innsteer's own scores, and never quietly unsteered."""

import json
import pickle

import pytest
import torch

import tiny
from edits import edit, shift
from innsteer import cli, steerer
from innsteer.backends.base import Prompt
from innsteer.backends.hf import HF
from innsteer.errors import (
    FormatError,
    InputError,
    MismatchError,
    NothingSteeredError,
    PositionError,
)
from innsteer.hooks import Attachment
from innsteer.models import LanguageModel
from innsteer.steering import Steering

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'innsteer[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from innsteer.integrations import lm_eval as adapter
from innsteer.integrations.lm_eval import SteeredLM, run_tasks

PAIRS = [
    ("Is tea hot?", " yes"),
    ("Is tea hot?", " no, not at all"),
    ("Is tea hot? yes", "!"),
    ("A question that is much longer than the others are?", " maybe"),
    ("Hm", " x"),
]
ASKED = "Is {} hot?"


@pytest.fixture
def model():
    """A model without a chat template, whose prompts are then the texts themselves."""
    return LanguageModel.wrap(tiny.tiny_model(), tiny.tiny_tokenizer(template=None), name="tiny")


@pytest.fixture
def steering(model):
    return Steering(steerer.get("diffmean"), shift(model), ("mine",), base=model.fingerprint)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of each kind of request that lm-eval has."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    items = [
        {"asked": ASKED.format(word), "choices": [" yes", " no", " maybe so"], "label": n % 3}
        for n, word in enumerate(("tea", "rain", "iron"))
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
"""
    (folder / "choices.yaml").write_text(
        f"""{common}
task: choices
output_type: multiple_choice
doc_to_text: "{{{{asked}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    (folder / "open.yaml").write_text(
        f"""{common}
task: open
output_type: generate_until
doc_to_text: "{{{{asked}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    (folder / "whole.yaml").write_text(
        f"""{common}
task: whole
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{asked}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""
    )
    return folder


def asked(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, 0) for pair in pairs]


def scores(lm, pairs=PAIRS):
    return [score for score, _ in lm.loglikelihood(asked(pairs), disable_tqdm=True)]


def answers(lm, prompts, tokens=6):
    how = {"until": ["\n"], "max_gen_toks": tokens, "do_sample": False}
    requests = asked([(prompt, how) for prompt in prompts], "generate_until")
    return lm.generate_until(requests, disable_tqdm=True)


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["generated", "prompt", "all", "range:2:9"])
def test_steered_scores_are_those_of_innsteer(model, where):
    """A prompt of two tokens has one in scope at least: its first."""
    own = edit(model, 1.0, where)
    prompts = [Prompt(str(n), text, (answer,)) for n, (text, answer) in enumerate(PAIRS)]
    want = [sum(values[0]) for values in HF(model).score(prompts, [own])]
    assert scores(SteeredLM(model, [own])) == pytest.approx(want, abs=1e-5)
    assert scores(SteeredLM(model)) != pytest.approx(want, abs=1e-2)


def test_scores_and_answers_do_not_depend_on_the_batch(model):
    """Requests alike but for where the continuation begins are steered each from there."""
    own = [edit(model)]
    pairs = [*PAIRS, ("Is tea", " hot? yes"), ("Is tea hot? ye", "s")]
    one = SteeredLM(HF(model, batch=1, batch_tokens=1), own)
    eight = SteeredLM(HF(model, batch=8), own)
    assert scores(one, pairs) == pytest.approx(scores(eight, pairs), abs=1e-5)
    alike = scores(eight, [pairs[0], pairs[-2], pairs[-1]])
    assert len({round(score, 3) for score in alike}) == 3
    prompts = [text for text, _ in pairs]
    assert answers(one, prompts) == answers(eight, prompts)
    assert answers(eight, prompts) != answers(SteeredLM(model), prompts)


@pytest.mark.parametrize("edits", [[], [0.0]])
def test_without_effect_it_is_lm_evals_own_model(model, edits):
    ours = SteeredLM(model, [edit(model, coef) for coef in edits])
    theirs = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=16)
    got, want = (lm.loglikelihood(asked(PAIRS), disable_tqdm=True) for lm in (ours, theirs))
    # lm-eval adds up in float32: -100 has a last bit of 1e-5.
    want_scores = pytest.approx([score for score, _ in want], rel=1e-6, abs=1e-5)
    assert [score for score, _ in got] == want_scores
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    prompts = [text for text, _ in PAIRS]
    assert answers(ours, prompts) == answers(theirs, prompts)


def test_a_continuation_is_greedy_where_every_token_is_the_most_probable(model):
    own, ids = [edit(model)], model.tokenizer(PAIRS[0][0])["input_ids"]
    best = []
    for _ in range(2):
        with Attachment(model, own, prompt_lengths=[len(ids)]):
            best.append(int(model.model(torch.tensor([ids + best])).logits[0, -1].argmax()))
    other = [best[0], (best[1] + 1) % tiny.VOCAB]
    requests = [(("", ""), ids, tokens) for tokens in (best, best[:1], other, other[::-1])]
    found = SteeredLM(model, own)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found] == [True, True, False, False]


def test_a_request_longer_than_the_model_is_cut_from_the_left(model):
    lm = SteeredLM(model, [edit(model)])
    lm._max_length = 12
    long = ("x" * 30, " yes")
    want = scores(SteeredLM(model, [edit(model)]), [("x" * 9, " yes")])
    assert scores(lm, [long]) == pytest.approx(want, abs=1e-5)
    plain = SteeredLM(model, [edit(model, 0.0)])
    theirs = HFLM(pretrained=model.model, tokenizer=model.tokenizer, max_length=12)
    plain._max_length = 12
    assert scores(plain, [long]) == pytest.approx(scores(theirs, [long]), abs=1e-5)


# --- never quietly unsteered ---------------------------------------------------------------------


def test_steered_tokens_are_counted(model):
    """The context's last token and the continuation's, but for the last one, which is not run."""
    lm = SteeredLM(model, [edit(model)])
    scores(lm, [("Hm", " x"), ("Is it?", " yes")])
    assert lm.steered == (1 + 1) + (1 + 3)
    answers(lm, ["Hm"], tokens=5)
    assert 6 < lm.steered <= 6 + 5
    assert SteeredLM(model).steered == 0


def test_a_run_in_which_nothing_is_steered_is_refused(model):
    lm = SteeredLM(model, [edit(model, 1.0, "range:400:401")])
    with pytest.raises(NothingSteeredError, match="no token was steered"):
        scores(lm)
    with pytest.raises(NothingSteeredError, match="no token was steered"):
        answers(lm, ["Hm"])


def test_turns_that_lm_eval_does_not_mark_are_refused(model):
    with pytest.raises(PositionError, match="assistant"):
        SteeredLM(model, [edit(model, 1.0, "assistant")])


def test_a_strength_for_each_sequence_is_refused(model):
    with pytest.raises(InputError, match="for each sequence"):
        SteeredLM(model, [edit(model, [1.0, 2.0])])


def test_a_pickle_in_the_place_of_a_steering_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    folder = tmp_path / "steering"
    folder.mkdir()
    (folder / "steering.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FormatError):
        Steering.load(folder)
    assert not (tmp_path / "exploded").exists()


# --- tasks ---------------------------------------------------------------------------------------


def test_tasks_of_every_kind_run_on_both_arms(model, steering, tasks):
    names = ["choices", "open", "whole"]
    found = run_tasks(model, steering, names, strength=1.0, include_path=tasks, limit=2)
    assert [row["task"] for row in found["tasks"]] == names
    assert [row["n"] for row in found["tasks"]] == [2, 2, 2]
    assert [row["better"] for row in found["tasks"]] == ["higher", "higher", "lower"]
    whole = found["tasks"][2]
    assert whole["unsteered"]["value"] != pytest.approx(whole["steered"]["value"], abs=1e-3)
    assert found["steered_tokens"] > len(ASKED.format("tea")), "a whole text is steered throughout"
    assert found["strengths"] == {"mine": 1.0} and found["identity"] == steering.identity
    json.dumps(found, allow_nan=False)


def test_at_strength_0_both_arms_are_one(model, steering, tasks):
    found = run_tasks(model, steering, ["whole"], strength=0.0, include_path=tasks)
    (row,) = found["tasks"]
    assert row["steered"]["value"] == pytest.approx(row["unsteered"]["value"], abs=1e-6)
    assert found["steered_tokens"] == 0


def test_a_task_or_folder_that_does_not_exist_is_refused(model, steering, tasks, monkeypatch):
    own = adapter.TaskManager
    seen = []

    def index(**how):
        seen.append(how["include_defaults"])
        return own(include_path=how["include_path"], include_defaults=False)

    monkeypatch.setattr(adapter, "TaskManager", index)
    with pytest.raises(InputError, match="no task 'choicse'"):
        run_tasks(model, steering, ["choices", "choicse"], include_path=tasks)
    assert seen == [False, True], "lm-eval's own tasks are looked through last"
    with pytest.raises(InputError, match="no folder"):
        run_tasks(model, steering, ["choices"], include_path=tasks / "none")


def test_the_verb_writes_what_it_shows(model, steering, tasks, tmp_path, monkeypatch, capsys):
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    steering.save(tmp_path / "mine")
    words = ["bench", tmp_path / "mine", "choices", "-m", tmp_path / "model", "--strength", "1"]
    words += ["--include-path", tasks, "--limit", 2, "--out", tmp_path / "bench.json"]
    evaluate = adapter.simple_evaluate

    def chatty(*given, **how):
        print("what lm-eval prints is no JSON")
        return evaluate(*given, **how)

    monkeypatch.setattr(adapter, "simple_evaluate", chatty)

    def run(*more):
        monkeypatch.setattr("sys.argv", ["innsteer", *map(str, (*words, *more))])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    code, out, err = run()
    assert code == 0, err
    assert "choices" in out and "acc" in out and "strength 1, " in out
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["tasks"][0]["n"] == 2 and written["steered_tokens"] > 0
    code, _, err = run()
    assert code == 2 and "exists" in err
    (tmp_path / "bench.json").unlink()
    code, out, err = run("--json")
    assert code == 0, err
    assert json.loads(out) == written


def test_a_steering_of_another_model_is_refused(steering, tasks):
    other = LanguageModel.wrap(tiny.tiny_model(seed=1), tiny.tiny_tokenizer(template=None))
    with pytest.raises(MismatchError):
        run_tasks(other, steering, ["choices"], include_path=tasks)
