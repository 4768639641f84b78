"""Memo: an interrupted run, begun again, replays what had ended and gives what it would have."""

import json
from dataclasses import replace

import pytest
import torch

import tiny
import words
from innsteer import choosing, evaluation, fitting, tuning
from innsteer.backends.base import Completion, Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.backends.memo import Memo, digest, of_edits
from innsteer.errors import BudgetError, InnsteerError
from innsteer.interventions import Affine, Edit, Shift
from innsteer.site import Site, Where
from innsteer.steerer import Interventions
from innsteer.suites import behaviour as suites


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(autouse=True)
def few_neutral_prompts(monkeypatch):
    few = {part: suites.neutral(part)[:6] for part in ("validation", "test")}
    monkeypatch.setattr(suites, "neutral", few.get)
    monkeypatch.setattr(suites.Suite, "neutral_tokens", 4)


def passes(model):
    """Counts the passes through the model's first block, in a list of one."""
    count = [0]

    def note(*_):
        count[0] += 1

    return count, model.layout.blocks[0].module.register_forward_pre_hook(note)


def engine(model, memo=None):
    """A backend of small batches."""
    return HF(model, memo=memo, batch=2, batch_tokens=256)


class Stopped(Memo):
    """A memo whose run is interrupted after so many results, as by Ctrl-C."""

    def __init__(self, folder, after):
        super().__init__(folder)
        self.after = after

    def _path(self, key, suffix):
        if self.made == self.after:
            raise KeyboardInterrupt
        return super()._path(key, suffix)


contrast = words.contrast()
questions = words.contrast(words.yes_or_no)
quick = {"hidden": 8, "epochs": 3, "subspace": 4}


def recorded(backend):
    return fitting.fit(backend, contrast, "innsteer", sites=[Site(1)], **quick)


def through(backend):
    aim = {"objective": "target", "polish": 2}
    return fitting.fit(backend, questions, "innsteer", sites=[Site(1)], **aim)


def tuned(backend):
    steering = fitting.fit(backend.model, contrast, "diffmean", sites=[Site(1)])
    return tuning.tune(backend, steering, contrast, preview=True, both_ways=True)


def chosen(backend):
    sites = [Site(1), Site(2)]
    return choosing.choose_layer(backend, contrast, "diffmean", sites)


def compared(backend):
    steering = tuned(HF(backend.model))
    suite = suites.load(contrast, instruction="Be formal.")
    suite = replace(suite, prompts=PROMPTS, others=(), plain=suite.plain[:2])
    sizes = evaluation.Sizes(6, 2, 4, ((8, 2),), 1, 8)
    return evaluation.compare(backend, {"mine": steering}, suite, sizes=sizes)


PROMPTS = tuple(Prompt(str(n), f"What is thing {n}?") for n in range(5))


def facts(made):
    """What a run gave, but for times."""
    if isinstance(made, evaluation.Report):
        found = made.to_json()
        found["context"].pop("seconds")
        return json.dumps([found, [one.to_json() for one in made.completions]], sort_keys=True)
    curves = {name: curve.to_json() for name, curve in made.calibration.items()}
    return json.dumps([made.identity, curves, made.provenance.get("layers")], sort_keys=True)


@pytest.mark.parametrize("run", [recorded, through, tuned, chosen, compared])
def test_an_interrupted_run_goes_on_to_the_same_end(model, tmp_path, run):
    count, hook = passes(model)
    with hook:
        whole = facts(run(engine(model)))
        undisturbed = count[0]
        with Memo(tmp_path / "all") as memo:
            assert facts(run(engine(model, memo))) == whole
        half = memo.made // 2
        assert half > 0
        with pytest.raises(KeyboardInterrupt), Stopped(tmp_path / "half", half) as memo:
            run(engine(model, memo))
        count[0] = 0
        with Memo(tmp_path / "half") as memo:
            assert facts(run(engine(model, memo))) == whole
        assert memo.replayed >= half and 0 < count[0] < undisturbed
    assert list(tmp_path.iterdir()) == []


def test_what_ended_is_replayed_without_the_model(model, tmp_path):
    memo = Memo(tmp_path / "kept")
    first = tuned(HF(model, memo=memo))
    count, hook = passes(model)
    with hook:
        steering = fitting.fit(model, contrast, "diffmean", sites=[Site(1)])
        count[0] = 0
        again = tuning.tune(HF(model, memo=memo), steering, contrast, preview=True, both_ways=True)
    assert count[0] == 0 and facts(first) == facts(again)


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (None, False),
        (BudgetError("no"), False),
        (InnsteerError("the judge does not answer"), True),
        (KeyboardInterrupt(), True),
        (OSError(28, "x"), True),
    ],
)
def test_a_refusal_leaves_nothing_and_an_interruption_what_was_done(tmp_path, error, left):
    folder = tmp_path / "kept"
    try:
        with Memo(folder) as memo:
            memo.value(["a"], lambda: 1)
            if error:
                raise error
    except BaseException as caught:
        assert caught is error
    assert folder.exists() is left


def test_a_refusal_keeps_what_an_earlier_run_had_done(tmp_path):
    folder = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt), Memo(folder) as memo:
        memo.value(["a"], lambda: 1)
        raise KeyboardInterrupt
    with pytest.raises(BudgetError), Memo(folder):
        raise BudgetError("no")
    with Memo(folder) as memo:
        assert memo.value(["a"], lambda: 2) == 1
    assert not folder.exists()


def test_a_run_that_computes_nothing_writes_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Memo(tmp_path / "a" / "kept"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_torn_result_is_made_again(tmp_path):
    one = Memo(tmp_path / "kept")
    assert one.value(["a"], lambda: [1.5]) == [1.5]
    assert torch.equal(one.tensors(["b"], lambda: {"x": torch.ones(3)})["x"], torch.ones(3))
    for path in one.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-2])
    assert one.value(["a"], lambda: [2.5]) == [2.5]
    assert torch.equal(one.tensors(["b"], lambda: {"x": torch.zeros(3)})["x"], torch.zeros(3))
    assert one.value(["a"], lambda: [9.0]) == [2.5]


def test_the_threads_of_the_first_run_are_those_of_the_next(tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), Memo(tmp_path / "kept") as memo:
        torch.set_num_threads(before + 1)
        memo.value(["a"], lambda: 1)
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before
    with Memo(tmp_path / "kept"):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_completions_come_back_as_they_were(tmp_path):
    memo = Memo(tmp_path / "kept")
    one = Completion("a", "neutral", "p", "t", {"kl": (0.1, float("inf"))}, steered=2)
    for _ in range(2):
        assert memo.completions(["c"], lambda: [one]) == [one]
    assert memo.made == memo.replayed == 1


def edited(shift=1.0, coef=1.0, where="generated", kind=Shift):
    part = kind(4)
    with torch.no_grad():
        for tensor in part.state_dict().values():
            tensor += shift
    return Edit(Interventions({Site(1): part}), torch.tensor([coef]), Where.parse(where))


def test_a_digest_tells_all_that_decides_what_an_edit_does():
    same, other = of_edits([edited()]), edited()
    assert same == of_edits([other])
    changed = [edited(2.0), edited(coef=0.5), edited(where="all"), edited(kind=Affine)]
    gated = edited()
    gated.interventions[Site(1)].slope = 3.0  # a setting that is no tensor
    for one in [*changed, gated]:
        assert of_edits([one]) != same
    for odd in (lambda h: h, torch.zeros(3)):  # an address, and a tensor that is no buffer
        two = edited()
        two.interventions[Site(1)].how = odd
        assert digest(two.interventions) != digest(two.interventions)


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: backend.generate(PROMPTS[:2], [], Sampling(4, 0.0)),
        lambda backend: backend.generate(PROMPTS[:3], [], Sampling(4, 1.0)),
        lambda backend: backend.generate(PROMPTS[:3], [], Sampling(4, 1.0, 1)),
        lambda backend: HF(backend.model, memo=backend.memo, batch=2).generate(
            PROMPTS[:3], [], Sampling(4, 0.0)
        ),
        lambda backend: HF(tiny.tiny_language_model(seed=3), memo=backend.memo).generate(
            PROMPTS[:3], [], Sampling(4, 0.0)
        ),
    ],
)
def test_another_call_is_made_and_not_replayed(model, tmp_path, change):
    backend = HF(model, memo=Memo(tmp_path / "kept"))
    backend.generate(PROMPTS[:3], [], Sampling(4, 0.0))
    change(backend)
    assert backend.memo.made == 2 and backend.memo.replayed == 0
    backend.generate(PROMPTS[:3], [], Sampling(4, 0.0))
    assert backend.memo.replayed == 1
