"""Maps across tokens on the Hugging Face engine: what they are told and what they keep."""

import copy
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from transformers import DynamicCache

import tiny
from edits import Recall, asked, edit, hooks_of, padded, positions, recall, seen, tracks
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.engine import edits_of
from innsteer.backends.hf import HF
from innsteer.backends.memo import of_edits
from innsteer.backends.menu import Dish, Menu, offered
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError, RefusedError
from innsteer.gating import Gate, Gated
from innsteer.hooks import Attachment, _Kept
from innsteer.interventions import Edit
from innsteer.site import Site, Where

ROWS = [[10, 11, 12, 13, 14, 15], [20, 21, 22], [30]]
LENGTHS = [len(row) for row in ROWS]
CONCEPTS = ("a pirate", "polite", "red foxes")
NEW = 4
NOT_CHUNKED = ("num_beams", "num_return_sequences", "do_sample")
SAME = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=tiny.KINDS)
def model(request):
    return tiny.tiny_language_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny.tiny_language_model()


def logits(model, edits, rows=ROWS, side="left", **how):
    """Logits of padded rows in one pass, and which of them are real."""
    ids, mask = padded(rows, side)
    with Attachment(model, edits, **how):
        found = model.model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    return found, mask.bool()


def in_parts(model, edits, parts, cache, rows=ROWS):
    """The same, fed part by part."""
    ids, mask = padded(rows)
    found = []
    with Attachment(model, edits):
        for part in parts:
            found.append(
                model.model(
                    ids[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=positions(mask)[:, part],
                    past_key_values=cache,
                ).logits
            )
    return torch.cat(found, 1)


def generated(model, edits, rows=ROWS, **how):
    ids, mask = padded(rows)
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | how
    with Attachment(model, edits):
        return model.model.generate(ids, attention_mask=mask, **how)


# --- one pass, many passes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [(slice(0, 4), slice(4, 6)), tuple(slice(n, n + 1) for n in range(6))],
    ids=["two", "token by token"],
)
@pytest.mark.parametrize("lazy", [True, False], ids=["layers as they come", "layers beforehand"])
def test_a_request_in_parts_is_steered_like_one(model, parts, lazy):
    steering = [asked(model, CONCEPTS)]
    want, real = logits(model, steering)
    cache = DynamicCache() if lazy else DynamicCache(config=model.model.config)
    got = in_parts(model, steering, parts, cache)
    torch.testing.assert_close(got[real], want[real], **SAME)


def test_what_came_before_counts(model):
    want, real = logits(model, [asked(model, CONCEPTS)])
    other, _ = logits(model, [asked(model, CONCEPTS, where="range:2:")])
    assert (want - other)[real].abs().max() > 1e-2


@pytest.mark.parametrize("where", ["generated", "range:1:3", "range:4:", "assistant"])
def test_columns_out_of_scope_are_seen_by_nobody(llama, where):
    steering = [asked(llama, CONCEPTS, where=where)]
    turns = [[(1, 3), (5, 6)], [(2, 3)], [(0, 1)]]
    know = {"prompt_lengths": [5, 2, 1], "turns": turns}
    want, real = logits(llama, steering, **know)
    ids, mask = padded(ROWS)
    cache, got = DynamicCache(), []
    with Attachment(llama, steering, **know):
        for n in range(6):
            got.append(
                llama.model(
                    ids[:, n : n + 1],
                    attention_mask=mask[:, : n + 1],
                    position_ids=positions(mask)[:, n : n + 1],
                    past_key_values=cache,
                ).logits
            )
    torch.testing.assert_close(torch.cat(got, 1)[real], want[real], **SAME)


@pytest.mark.parametrize("side", ["left", "right"])
def test_requests_of_a_batch_are_steered_as_if_alone(model, side):
    together, real = logits(model, [asked(model, CONCEPTS)], side=side)
    for n, row in enumerate(ROWS):
        alone, _ = logits(model, [asked(model, CONCEPTS[n])], [row])
        torch.testing.assert_close(together[n][real[n]], alone[0], **SAME)


def test_rows_of_strength_zero_are_those_of_the_plain_model(model):
    plain, real = logits(model, [edit(model, 0.0, "all")])
    mixed, _ = logits(model, [asked(model, CONCEPTS, [0.0, 1.0, 0.0])])
    none, _ = logits(model, [asked(model, CONCEPTS, 0.0)])
    for n in (0, 2):
        assert torch.equal(mixed[n][real[n]], plain[n][real[n]])
    assert torch.equal(none, plain)
    assert not torch.allclose(mixed[1][real[1]], plain[1][real[1]], atol=1e-2)


def test_two_steerings_and_two_sites_keep_columns_of_their_own(llama):
    steering = [
        asked(llama, CONCEPTS, 1.0, "all", Site(0), Site(2, "mlp")),
        asked(llama, "brave", -0.5, "range:1:", Site(2, "mlp")),
    ]
    want, real = logits(llama, steering)
    cache = DynamicCache()
    got = in_parts(llama, steering, [slice(n, n + 1) for n in range(6)], cache)
    torch.testing.assert_close(got[real], want[real], **SAME)
    names = {layer.name[:2] for layer in cache.layers if isinstance(layer, _Kept)}
    assert names == {(0, Site(0)), (0, Site(2, "mlp")), (1, Site(2, "mlp"))}


def test_the_model_is_left_as_it_was(llama):
    before = hooks_of(llama.model)
    plain = llama.model(torch.tensor([ROWS[0]])).logits
    logits(llama, [asked(llama, CONCEPTS)])
    assert hooks_of(llama.model) == before
    assert torch.equal(llama.model(torch.tensor([ROWS[0]])).logits, plain)


# --- what a cache goes through -------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prefill_chunk_size": 2},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=["greedy", "beams", "several beams", "chunked prefill", "several samples"],
)
def test_generation_with_a_cache_is_generation_without(model, how):
    steering = [asked(model, CONCEPTS)]
    answers = []
    for cached in (True, False):
        torch.manual_seed(0)
        used = {name: value for name, value in how.items() if cached or name in NOT_CHUNKED}
        answers.append(generated(model, steering, **used, use_cache=cached))
    assert torch.equal(*answers)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_two_attachments_are_one_with_both_edits(llama, how):
    one, other = asked(llama, CONCEPTS, 3.0), asked(llama, CONCEPTS[::-1], -2.0)
    how = how | {"output_logits": True, "return_dict_in_generate": True, "use_cache": True}
    want = generated(llama, [one, other], **how)
    with Attachment(llama, [one]):
        found = generated(llama, [other], **how)
    assert torch.equal(found.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(want.logits), **SAME)


def test_the_same_maps_attached_twice_are_refused_and_go_in_one_attachment(llama):
    one = asked(llama, CONCEPTS, 3.0)
    other = Edit(one.interventions, one.coef, one.where, _told("brave"))
    plain = generated(llama, [one, other], use_cache=False)
    assert torch.equal(generated(llama, [one, other]), plain)
    with (
        Attachment(llama, [one]),
        pytest.raises(RefusedError, match="give both edits to one Attachment"),
    ):
        generated(llama, [other])


def test_beams_take_their_columns_along(llama, monkeypatch):
    def beams(**how):
        found = generated(
            llama,
            [asked(llama, CONCEPTS, 3.0)],
            num_beams=4,
            max_new_tokens=8,
            output_scores=True,
            return_dict_in_generate=True,
            **how,
        )
        return found.sequences_scores

    want = beams(use_cache=False)
    torch.testing.assert_close(beams(), want, **SAME)
    monkeypatch.setattr(_Kept, "reorder_cache", lambda *_: None)
    try:
        lost = beams()
    except RefusedError:
        return  # a beam of another request's prompt was noticed
    assert not torch.allclose(lost, want, atol=1e-4)


def test_a_roll_back_takes_the_columns_back(model, monkeypatch):
    steering = [asked(model, CONCEPTS[:1])]
    first, second = ROWS[0], [*ROWS[0][:3], 40, 41, 42]
    want, _ = logits(model, steering, [second])

    def rolled_back():
        cache = DynamicCache()
        in_parts(model, steering, [slice(0, 6)], cache, [first])
        cache.crop(-3)
        with Attachment(model, steering):
            return model.model(torch.tensor([second[3:]]), past_key_values=cache).logits

    torch.testing.assert_close(rolled_back(), want[:, 3:], **SAME)
    monkeypatch.setattr(_Kept, "crop", lambda *_: None)
    with pytest.raises(RefusedError, match="went by without"):
        rolled_back()


def test_a_request_goes_on_from_its_cache_and_from_a_copy(model):
    steering = [asked(model, CONCEPTS)]
    want, real = logits(model, steering)
    cache = DynamicCache()
    in_parts(model, steering, [slice(0, 4)], cache)
    for past in (copy.deepcopy(cache), cache):
        got = in_parts(model, steering, [slice(4, 6)], past)
        torch.testing.assert_close(got[real[:, 4:]], want[:, 4:][real[:, 4:]], **SAME)


def test_a_lost_cache_is_rebuilt_by_running_the_request_again(model):
    steering = [asked(model, CONCEPTS)]
    want, real = logits(model, steering)
    cache = DynamicCache()
    in_parts(model, steering, [slice(0, 4)], cache)
    cache.crop(-4)  # preempted: nothing is left
    got = in_parts(model, steering, [slice(0, 6)], cache)
    torch.testing.assert_close(got[real], want[real], **SAME)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda m, e: None, "went by without"),
        (lambda m, e: edit(m, 1.0, "all"), "went by without"),
        (lambda m, e: asked(m, CONCEPTS), "went by without"),  # equal maps, but others
        (lambda m, e: Edit(e.interventions, e.coef, e.where, _told("rude")), "other parameters"),
        (lambda m, e: Edit(e.interventions, 2 * e.coef, e.where, e.told), "other parameters"),
        (lambda m, e: Edit(e.interventions, e.coef, Where.parse("range:1:"), e.told), "or scope"),
    ],
    ids=[
        "plain",
        "another steering",
        "other maps",
        "another concept",
        "another strength",
        "another scope",
    ],
)
def test_a_prefix_that_another_request_left_is_not_read(llama, other, reason):
    steering = asked(llama, CONCEPTS)
    cache, before = DynamicCache(), other(llama, steering)
    if before is None:
        llama.model(torch.tensor(3 * [[1, 2]]), past_key_values=cache)
    else:
        in_parts(llama, [before], [slice(0, 2)], cache)
    with pytest.raises(RefusedError, match=reason):
        in_parts(llama, [steering], [slice(2, 6)], cache)


def test_concepts_swapped_between_the_rows_of_a_batch_are_noticed(llama):
    steering, cache = asked(llama, CONCEPTS), DynamicCache()
    in_parts(llama, [steering], [slice(0, 4)], cache)
    cache.batch_select_indices(torch.tensor([1, 0, 2]))
    with pytest.raises(RefusedError, match="other parameters"):
        in_parts(llama, [steering], [slice(4, 6)], cache)


def test_a_cache_of_another_kind_is_refused(llama):
    with pytest.raises(RefusedError, match="StaticCache"):
        generated(
            llama,
            [asked(llama, CONCEPTS)],
            cache_implementation="static",
            disable_compile=True,
        )


# --- what maps are told --------------------------------------------------------------------------


class Spy(Recall):
    """Keeps what it is told, and how often it made a memory."""

    def __init__(self, width):
        super().__init__(width)
        self.heard, self.made = [], []

    def prepare(self, parameters, encode):
        self.made.append(parameters["concept"])
        return super().prepare(parameters, encode)

    def move(self, h, coef, tokens):
        self.heard.append(tokens)
        return super().move(h, coef, tokens)


def _told(*concepts):
    return tuple({"concept": concept} for concept in concepts)


def spying(model, told, where="all"):
    maps = recall(model)
    spy = Spy(maps[Site(1)].width)
    maps.maps["residual_1"] = spy
    return spy, Edit(maps, torch.ones(1), Where.parse(where), told)


def test_maps_are_told_requests_positions_phases_and_ids(llama):
    spy, steering = spying(llama, _told(*CONCEPTS))
    with Attachment(llama, [steering], prompt_lengths=[4, 3, 1]):
        ids, mask = padded(ROWS)
        llama.model(ids, attention_mask=mask, position_ids=positions(mask))
    (heard,) = spy.heard
    assert heard.ids.tolist() == sum(ROWS, [])
    assert heard.request.tolist() == [0] * 6 + [1] * 3 + [2]
    assert heard.offsets.tolist() == [0, 6, 9, 10]
    assert heard.position.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0]
    assert heard.generated.tolist() == [False] * 3 + [True] * 3 + [False] * 2 + [True, True]
    assert heard.column.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 5]
    assert heard.memory["mean"].shape == (3, 1, tiny.WIDTH)


def test_an_unknown_phase_is_not_made_up(llama):
    spy, steering = spying(llama, _told("brave"))
    logits(llama, [steering])
    assert spy.heard[0].generated is None


def test_embeddings_have_no_ids(llama):
    spy, steering = spying(llama, _told("brave"))
    embedded = llama.model.get_input_embeddings()(torch.tensor([ROWS[0]]))
    with Attachment(llama, [steering]):
        llama.model(inputs_embeds=embedded)
    assert spy.heard[0].ids.tolist() == [-1] * 6


def test_a_memory_is_made_once_per_set_of_parameters(llama):
    spy, steering = spying(llama, _told("brave", "shy", "brave"))
    generated(llama, [steering], num_beams=2)
    assert spy.made == ["brave", "shy"]
    assert len(spy.heard) == NEW
    last = spy.heard[-1].memory["mean"]  # beams follow their prompts
    assert torch.equal(last[0], last[1]) and torch.equal(last[0], last[4])
    assert not torch.equal(last[1], last[2])


@pytest.mark.parametrize("told_first", [True, False])
def test_a_text_is_read_by_the_plain_model_whatever_is_attached(llama, told_first):
    both = [edit(llama, 1.0, "all", Site(0)), asked(llama, CONCEPTS)]
    both += [Edit(tracks(llama), torch.ones(1), Where("all"))]
    ids, mask = padded(ROWS)
    want, real = logits(llama, both[::-1] if told_first else both)
    first, middle, last = (Attachment(llama, [one]) for one in (both[::-1] if told_first else both))
    with first, middle, last:
        traces = [one.trace.selected for one in (first, middle, last)]
        found = llama.model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    assert traces == [0, 0, 0]
    torch.testing.assert_close(found[real], want[real], **SAME)


def test_a_text_that_was_refused_leaves_the_model_steered(llama):
    want, real = logits(llama, [edit(llama, 1.0, "all")])
    ids, mask = padded(ROWS)
    with Attachment(llama, [edit(llama, 1.0, "all")]):
        with (
            pytest.raises(InputError, match="1 to 64"),
            Attachment(llama, [asked(llama, "x" * 99)]),
        ):
            pass
        found = llama.model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    assert torch.equal(found[real], want[real])


def test_rows_that_are_laid_out_come_back(llama):
    spy, steering = spying(llama, _told(*CONCEPTS))
    logits(llama, [steering])
    (heard,) = spy.heard
    rows = torch.randn(len(heard.ids), 5)
    laid = heard.lay(rows)
    assert laid.shape == (3, 6, 5) and torch.equal(heard.take(laid), rows)
    assert laid[2, :5].eq(0).all()


def test_the_encoder_is_the_first_blocks_of_the_plain_model(model):
    states = model.states("a pirate", 2)
    ids = torch.tensor([model._ids("a pirate", special=True)])
    with seen(model, Site(1)) as held:
        model.model(ids)
    base = model.model.base_model
    norm = getattr(base, {"llama": "norm", "gpt2": "ln_f"}.get(model.name[5:], "final_layer_norm"))
    torch.testing.assert_close(states, norm(held[0])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "blocks", "match"),
    [("x" * 200, 2, "1 to 64"), (" ", 2, "1 to 64"), ("x", 0, "blocks"), ("x", 99, "blocks")],
)
def test_a_text_that_cannot_be_encoded_is_refused(llama, text, blocks, match):
    with pytest.raises(InputError, match=match):
        llama.states(text, blocks)


# --- parameters of a request ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "told", [(), _told(" "), ({"concept": "x", "mood": "y"},), ({"mood": "y"},)]
)
def test_parameters_other_than_those_asked_for_are_refused(llama, told):
    with pytest.raises(InputError, match="concept, some text"):
        Edit(recall(llama), torch.ones(1), Where("all"), told)


def test_a_map_that_asks_for_nothing_is_told_nothing(llama):
    with pytest.raises(InputError, match="expected none"):
        Edit(edit(llama).interventions, torch.ones(1), told=_told("x"))


def test_parameters_for_another_number_of_sequences_are_refused(llama):
    with pytest.raises(InputError, match="one per prompt"):
        logits(llama, [asked(llama, CONCEPTS[:2])])


def test_a_bare_model_that_reads_no_text_is_refused(llama):
    with (
        pytest.raises(RefusedError, match="LanguageModel"),
        Attachment(llama.model, [asked(llama, "x")]),
    ):
        pass


def test_what_is_told_is_part_of_what_a_call_depends_on(llama):
    maps = recall(llama)
    keys = [
        of_edits([Edit(maps, torch.ones(1), Where("all"), _told(concept))])
        for concept in ("a", "b", "a")
    ]
    assert keys[0] == keys[2] != keys[1]


def test_a_part_of_a_batch_takes_its_own_parameters(llama):
    (found,) = edits_of([asked(llama, CONCEPTS, [1.0, 2.0, 3.0])], [2, 0])
    assert [one["concept"] for one in found.told] == ["red foxes", "a pirate"]
    assert found.coef.flatten().tolist() == [3.0, 1.0]
    (alike,) = edits_of([asked(llama, "brave")], [2, 0])
    assert alike.told == _told("brave")


# --- the engine's calls --------------------------------------------------------------------------


def test_generate_and_score_tell_each_prompt_its_own(llama):
    backend = HF(llama, batch=2)
    prompts = [Prompt(str(n), text, ("Yes", "No")) for n, text in enumerate(("Hi", "Well?", "O"))]
    together = asked(llama, CONCEPTS, 2.0)
    answers = backend.generate(prompts, [together], Sampling(6))
    scores = backend.score(prompts, [together])
    for n, prompt in enumerate(prompts):
        alone = Edit(together.interventions, together.coef, together.where, (together.told[n],))
        assert backend.generate([prompt], [alone], Sampling(6))[0].text == answers[n].text
        (one,) = backend.score([prompt], [alone])
        for own, other in zip(one, scores[n], strict=True):
            assert own == pytest.approx(other, abs=1e-5)


def test_a_meter_runs_whole_requests_and_agrees_with_the_score(llama):
    backend = HF(llama)
    prompts = [Prompt(str(n), text, ("Yes.",)) for n, text in enumerate(("Hi", "Well then?"))]
    steering = asked(llama, CONCEPTS[:2], 2.0, "all")
    meter = backend.meter(backend.forced(prompts), [Site(1)])
    scored = [answers[0] for answers in backend.score(prompts, [steering])]
    for one, want in zip(meter([steering]), scored, strict=True):
        assert one.values["log_prob"] == pytest.approx(want, abs=1e-4)
    plain = [one.values["log_prob"] for one in meter.unsteered()]
    assert max(abs(a - b) for a, b in zip(plain[0], scored[0], strict=True)) > 1e-2


# --- refused at admission ------------------------------------------------------------------------


def test_a_serving_engine_refuses_them(llama):
    dish = offered("flow", asked(llama, "x"), "0" * 64)
    assert isinstance(dish, Dish)
    with pytest.raises(RefusedError, match="across tokens"):
        Menu([dish])


def test_a_gate_around_them_is_refused():
    with pytest.raises(InputError, match="across tokens"):
        Gated(Recall(7), Gate(7))


def test_rows_alone_are_refused():
    with pytest.raises(InputError, match="TokenContext"):
        Recall(7)(torch.randn(2, 7), torch.ones(2, 1))


def test_kept_prefixes_refuse_them(llama):
    contrast = Contrast("b", "open", (Item("0", "Well?", "no", "yes", None, "0"),))
    run = Through(HF(llama), [contrast], [Site(1)])
    with pytest.raises(RefusedError, match="kept prefixes"):
        run.answers(recall(llama), [0], [1.0])


def test_a_block_that_is_run_again_for_its_gradient_counts_once(monkeypatch):
    """Checkpointing of a whole block, hooks included, as transformers had it."""
    model = tiny.tiny_language_model()
    spy, steering = spying(model, _told("brave"))
    spy.turn = torch.nn.Parameter(spy.turn)
    kind = type(model.layout.blocks[1].module)

    def again(block, *args, **kwargs):
        call = partial(torch.nn.Module.__call__, block, **kwargs)
        return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=False)

    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            monkeypatch.setattr(kind, "__call__", again)
        with Attachment(model, [steering]):
            found = model.model(torch.tensor([ROWS[0]]), use_cache=False).logits
            grads.append(torch.autograd.grad(found.square().sum(), spy.turn)[0])
    assert len(spy.heard) == 3
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].abs().max() > 0
