"""Told: log-probabilities of whole steered requests, the part below the site computed once."""

import pytest
import torch

import tiny
from edits import recall
from innsteer.backends.base import Prompt
from innsteer.backends.hf import HF
from innsteer.backends.told import Told
from innsteer.concepts import Concepts, Response
from innsteer.errors import InputError
from innsteer.interventions import Edit
from innsteer.site import Site, Where

TABLE = Concepts.of(
    [
        {"concept": c, "prompt": f"{c[:n]}?", "response": f"{c} {n}" * (n + 1), "split": split}
        for c in ("brave", "quite shy")
        for n, split in enumerate(("train", "train", "validation", "test"), 1)
    ]
)


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return tiny.tiny_language_model(request.param)


def by_score(backend, maps, items, strengths, concepts):
    """The same figures by the engine's score, which knows nothing of Told."""
    found = []
    for n, strength, concept in zip(items, strengths, concepts, strict=True):
        row = TABLE.rows[n]
        edit = Edit(maps, torch.tensor([strength]), Where("all"), ({"concept": concept},))
        (answers,) = backend.score([Prompt("0", row.prompt, (row.response,))], [edit])
        found.append(sum(answers[0]) / len(answers[0]))
    return found


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_told_is_what_the_engine_scores(model, layer):
    backend = HF(model, batch_tokens=120)
    run, maps = Told(backend, TABLE, Site(layer)), recall(model, Site(layer))
    items, strengths = [5, 0, 3, 1, 0], [1.0, -0.5, 2.0, 0.0, 1.0]
    others = ["brave", "brave", "a fox", "quite shy", "quite shy"]
    for concepts in ((), others):
        with torch.no_grad():
            found = run.told(maps, items, strengths, concepts)
        own = concepts or [TABLE.rows[n].concept for n in items]
        want = by_score(backend, maps, items, strengths, own)
        assert found.tolist() == pytest.approx(want, abs=2e-5)


def test_a_concept_is_encoded_once(model, monkeypatch):
    run, maps = Told(HF(model), TABLE, Site(1)), recall(model)
    asked, own = [], type(model).states
    monkeypatch.setattr(
        type(model), "states", lambda s, text, n: asked.append(text) or own(s, text, n)
    )
    for _ in range(2):
        run.told(maps, [0, 1, 5], [1.0, 1.0, 1.0])
    assert sorted(asked) == ["brave", "quite shy"]
    assert torch.equal(run.encode("brave", 1), own(model, "brave", 1))


def test_only_response_tokens_meet_the_vocabulary(model):
    run, rows = Told(HF(model), TABLE, Site(1)), []
    head = model.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, given, out: rows.append(out.shape[:-1].numel()))
    run.told(None, [0, 1, 5], [1.0] * 3)
    handle.remove()
    # Lengths differ, so that a padded batch would have more; what follows meets all its tokens.
    assert rows == [sum(len(run._rows[n].ids) - run._rows[n].prompt for n in (0, 1, 5))]
    ids = torch.tensor([[5, 6, 7]])
    assert model.model(ids).logits.shape[:2] == (1, 3)


def test_half_is_bfloat16_above_the_map_and_no_training_of_the_other(model):
    full, low = (Told(HF(model), TABLE, Site(0), half=half) for half in (False, True))
    assert full.digest != low.digest
    seen, passes, found, maps = [], [], [], recall(model, Site(0))
    handles = [
        block.module.register_forward_hook(
            lambda module, given, out: seen.append(torch.is_autocast_enabled("cpu"))
        )
        for block in model.layout.blocks
    ]
    for run in (full, low):
        with torch.no_grad():
            run.told(maps, [0, 1], [1.0, 1.0])  # what enters the site is kept from here on
            count = len(seen)
            found.append(run.told(maps, [0, 1], [1.0, 1.0]))
            passes.append(seen[count:])
            seen.clear()
    for handle in handles:
        handle.remove()
    above = len(model.layout.blocks) - 1
    # A hook that was there first runs first: the site's own is before the change.
    assert passes == [[False] * (above + 1), [False] + [True] * above]
    assert not torch.is_autocast_enabled("cpu")
    gap = (found[0] - found[1]).abs().max()
    assert 0 < gap < 0.05


def test_the_plain_model_is_told_nothing(model):
    backend = HF(model)
    run = Told(backend, TABLE, Site(1))
    want = by_score(backend, recall(model), [0, 4], [0.0, 0.0], ["x", "x"])
    assert run.told(None, [0, 4], [1.0, 1.0]).tolist() == pytest.approx(want, abs=2e-5)


def test_what_enters_the_site_is_made_once_or_again(model, monkeypatch):
    passes = []
    model.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    run, maps = Told(HF(model), TABLE, Site(1)), recall(model)
    with torch.no_grad():
        first = run.told(maps, [0, 1], [1.0, 1.0])
        before = len(passes)
        again = run.told(maps, [0, 1], [1.0, 1.0])
        assert torch.equal(first, again)
        once = len(passes) - before
        monkeypatch.setattr("innsteer.backends.told.KEEP", 0)
        fresh, before = Told(HF(model), TABLE, Site(1)), len(passes)
        for _ in range(2):
            assert torch.equal(fresh.told(maps, [0, 1], [1.0, 1.0]), first)
    assert once == 1
    assert len(passes) - before == 2 * (once + 1) + 1, "and the concept, encoded once"


def test_the_gradient_reaches_the_map_alone():
    model = tiny.tiny_language_model()
    run, maps = Told(HF(model), TABLE, Site(1)), recall(model)
    part = maps[Site(1)]
    part.turn = torch.nn.Parameter(part.turn)
    run.told(maps, [0, 5], [1.0, 1.0]).sum().backward()
    assert part.turn.grad.abs().max() > 0
    assert all(weight.grad is None for weight in model.model.parameters())


def test_items_parts_and_length(model):
    run = Told(HF(model), TABLE, Site(1), longest=4)
    assert run.items() == [0, 1, 4, 5] and run.items("validation") == [2, 6]
    assert run.items("test") == [3, 7]
    assert max(len(row.ids) - row.prompt for row in run._rows) == 4
    assert run.concept(5) == "quite shy" and run.unit > 0
    digests = {
        Told(HF(model), TABLE, Site(n), longest=k).digest for n, k in ((1, 4), (1, 5), (2, 4))
    }
    assert len(digests) == 3


def test_a_site_inside_a_block_and_a_table_without_training_rows_are_refused(model):
    with pytest.raises(InputError, match="a layer alone"):
        Told(HF(model), TABLE, Site(1, "mlp"))
    with pytest.raises(InputError, match="training rows"):
        Told(HF(model), TABLE.part("test"), Site(1))


@pytest.mark.parametrize(
    ("rows", "how", "match"),
    [
        ([("x" * 90, "validation")], {}, "1 to 64 tokens"),
        ([], {"longest": 0}, "responses of 0 tokens"),
    ],
)
def test_what_could_not_be_told_is_refused_before_anything_is_trained(model, rows, how, match):
    more = tuple(Response(concept, "Q?", "A.", part) for concept, part in rows)
    with pytest.raises(InputError, match=match):
        Told(HF(model), Concepts(TABLE.rows + more), Site(1), **how)


def test_half_is_for_a_gpu_unless_it_is_said(model, monkeypatch):
    assert Told(HF(model), TABLE, Site(1)).half is False
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert Told(HF(model), TABLE, Site(1)).half is True
    assert Told(HF(model), TABLE, Site(1), half=False).half is False
