"""The vllm backend: what it answers, scores and records is what the hf backend does."""

import pytest
import torch

from edits import edit, told, tracks
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast, Item
from innsteer.errors import NothingSteeredError
from innsteer.interventions import Edit
from innsteer.models import Encoded
from innsteer.site import Site, Where

TEXTS = ["Hello, you", "Is seven odd? " * 12, "No."]
PROMPTS = [Prompt(str(n), text, (" Yes", " No, never")) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def backends(model_folder, model):
    """Both engines on one model."""
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from innsteer.backends.vllm import VLLM

    limits = {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 128}
    return VLLM(model_folder, enforce_eager=True, num_gpu_blocks_override=32, **limits), HF(model)


def edits(model):
    return {
        "plain": [],
        "one": [edit(model, 0.3)],
        "each": [edit(model, [0.3, 0.0, -0.5], "all")],
        "two": [edit(model, 0.2, "assistant", Site(2)), edit(model, 0.1, "prompt", seed=1)],
        "mean": [Edit(told(model, Site(1)), torch.tensor([0.5]))],
    }


@pytest.mark.parametrize("name", ["plain", "one", "each", "two", "mean"])
def test_both_engines_score_and_answer_alike(backends, model, name):
    vllm, hf = backends
    which = edits(model)[name]
    ours, theirs = (backend.score(PROMPTS, which) for backend in (vllm, hf))
    for mine, other in zip(ours, theirs, strict=True):
        for one, two in zip(mine, other, strict=True):
            assert one == pytest.approx(two, abs=2e-4)
    # The plain model's own first words are its most probable ones, the other rows' are not.
    owned = [hf.model.encode(p.conversation, answer=a) for p in PROMPTS for a in p.answers]
    best = [hf.model.encode(p.conversation) for p in PROMPTS]
    first = hf._continued([row.ids for row in best], Sampling(3), lambda *_: None)
    owned += [
        Encoded((*row.ids, *new), row.prompt, ()) for row, new in zip(best, first, strict=True)
    ]
    owners = [0, 0, 1, 1, 2, 2, 0, 1, 2]
    ours, theirs = (b.score_encoded(owned, which, owners=owners) for b in (vllm, hf))
    assert [(x.greedy, x.steered) for x in ours] == [(x.greedy, x.steered) for x in theirs]
    assert name != "plain" or [x.greedy for x in ours] == [False] * 6 + [True] * 3
    sampling = Sampling(6)
    said, expected = (backend.generate(PROMPTS, which, sampling) for backend in (vllm, hf))
    for mine, other in zip(said, expected, strict=True):
        assert (mine.text, mine.tokens, mine.steered) == (other.text, other.tokens, other.steered)


def test_both_engines_carry_alike(backends, model):
    """Three edits, two of them across sites, at strengths of their own and over another's edits."""
    which = [
        edit(model, 0.2),
        Edit(tracks(model, Site(1), Site(3)), torch.tensor([[0.5], [0.0], [-0.3]])),
        Edit(tracks(model, Site(2), seed=7), torch.tensor([0.2]), Where("all")),
    ]
    ours, theirs = (backend.score(PROMPTS, which) for backend in backends)
    plain = backends[1].score(PROMPTS, which[:1])
    for mine, other, without in zip(ours, theirs, plain, strict=True):
        for one, two, three in zip(mine, other, without, strict=True):
            assert one == pytest.approx(two, abs=2e-4)
            assert one != pytest.approx(three, abs=2e-2)
    said, expected = (backend.generate(PROMPTS, which, Sampling(6)) for backend in backends)
    assert [(one.text, one.steered) for one in said] == [(c.text, c.steered) for c in expected]


@pytest.mark.parametrize("read", ["last", "mean", "all"])
def test_both_engines_record_the_same_rows(backends, read):
    items = tuple(
        Item(str(n), text, " So it is", " No", None, str(n)) for n, text in enumerate(TEXTS)
    )
    contrast = Contrast("odd", "open", items)
    ours, theirs = (b.record(contrast, [Site(1), Site(3)], read=read) for b in backends)
    assert ours.rows.records() == theirs.rows.records()
    for site in ours.sites:
        assert torch.allclose(ours.values[site], theirs.values[site], atol=1e-4)


def test_an_edit_that_touches_nothing_is_an_error_and_one_that_touches_some_is_not(backends, model):
    for backend in backends:
        with pytest.raises(NothingSteeredError):
            backend.generate(PROMPTS, [edit(model, 1.0, "range:400:")], Sampling(4))
    late = [b.generate(PROMPTS, [edit(model, 0.3, "range:100:")], Sampling(4)) for b in backends]
    assert [one.steered for one in late[0]] == [one.steered for one in late[1]]
    assert 0 in [one.steered for one in late[0]] and any(one.steered for one in late[0])
