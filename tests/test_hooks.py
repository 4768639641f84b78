"""Attachment: which positions are steered, by what, and that nothing else changes or stays."""

import copy

import pytest
import torch
from transformers import DynamicCache

import tiny
from edits import Told, bits, edit, hooks_of, padded, positions, seen, shift, told
from innsteer.errors import InputError, NothingSteeredError, PositionError, RefusedError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.site import STREAMS, Site, Where
from innsteer.steerer import Intervention, Interventions

ROWS = [[10, 11, 12, 13, 14, 15], [20, 21, 22], [30]]
NEW = 4
TURNS = [[(1, 3), (5, 6)], [(2, 3)], [(0, 1)]]
SCOPES = ("generated", "prompt", "assistant", "all", "range:2:7", "range:1:2")


@pytest.fixture(scope="module", params=tiny.KINDS)
def model(request):
    return tiny.tiny_language_model(request.param)


def expected(where, lengths, ends):
    """Steered positions by hand, of rows with a prompt length and an end each."""
    found = []
    for length, end, turns in zip(lengths, ends, TURNS, strict=True):
        inside = {
            "generated": lambda t, n=length: t >= n - 1,
            "prompt": lambda t, n=length: t < n - 1,
            "all": lambda t: True,
            "range:2:7": lambda t: 2 <= t < 7,
            "range:1:2": lambda t: t == 1,
            "assistant": lambda t, n=length, spans=turns: (
                t >= n - 1 or any(a <= t < b for a, b in spans)
            ),
        }[where]
        found.append([t for t in range(end) if inside(t)])
    return found


def generate(model, ids, mask, **how):
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | how
    return model.model.generate(ids, attention_mask=mask, **how)


LENGTHS = [len(row) for row in ROWS]
# The last generated token is never fed back.
ENDS = [n + NEW - 1 for n in LENGTHS]


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", SCOPES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"do_sample": True},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 2},
    ],
    ids=["cache", "no cache", "sampling", "static cache", "chunked prefill"],
)
def test_generation_steers_the_scope_whatever_the_way(model, where, how):
    ids, mask = padded(ROWS)
    with Attachment(model, [edit(model, 1, where)], turns=TURNS) as attached:
        generate(model, ids, mask, **how)
    assert attached.trace.steered == expected(where, LENGTHS, ENDS)


@pytest.mark.parametrize("where", SCOPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_pass_steers_the_scope_on_either_side_of_padding(model, where, side):
    ids, mask = padded(ROWS, side)
    with Attachment(
        model, [edit(model, 1, where)], prompt_lengths=LENGTHS, turns=TURNS
    ) as attached:
        model.model(ids, attention_mask=mask, position_ids=positions(mask))
    assert attached.trace.steered == expected(where, LENGTHS, LENGTHS)


@pytest.mark.parametrize("where", SCOPES)
def test_a_prompt_fed_in_two_parts_is_steered_like_one(model, where):
    ids, mask = padded(ROWS)
    places = positions(mask)
    know = {"prompt_lengths": LENGTHS, "turns": TURNS}
    with Attachment(model, [edit(model, 1, where)], **know) as whole:
        want = model.model(ids, attention_mask=mask, position_ids=places).logits
    cache = DynamicCache(config=model.model.config)
    with Attachment(model, [edit(model, 1, where)], **know) as parts:
        for part in (slice(0, 4), slice(4, None)):
            got = model.model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=places[:, part],
                past_key_values=cache,
            ).logits
    assert parts.trace.steered == whole.trace.steered
    assert (parts.trace.selected, parts.trace.touched) == (
        whole.trace.selected,
        whole.trace.touched,
    )
    assert torch.allclose(got, want[:, 4:], atol=1e-5)


def test_without_a_mask_positions_come_from_the_cache(model):
    cache = DynamicCache(config=model.model.config)
    with Attachment(model, [edit(model)], prompt_lengths=[4]) as attached:
        for part in ([5, 6, 7], [8], [9]):
            model.model(torch.tensor([part]), past_key_values=cache)
    assert attached.trace.steered == [[3, 4]]


@pytest.mark.parametrize("how", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}])
def test_expanded_rows_keep_their_prompts_coefficients(model, how):
    ids, mask = padded(ROWS)
    with Attachment(model, [edit(model, [1.0, 0.0, -1.0])]) as attached:
        generate(model, ids, mask, **how)
    first, _, last = expected("generated", LENGTHS, ENDS)
    assert attached.trace.steered == [first, first, [], [], last, last]


def test_prompt_lengths_come_from_pads_where_no_mask_is_given(model):
    ids, _ = padded(ROWS)
    with Attachment(model, [edit(model)]) as attached:
        model.model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert attached.trace.steered == expected("generated", LENGTHS, ENDS)


def test_embeddings_are_steered_like_their_tokens(model):
    ids, mask = padded(ROWS[:1])
    embedded = model.model.get_input_embeddings()(ids)
    with Attachment(model, [edit(model)]) as attached:
        model.model.generate(
            inputs_embeds=embedded,
            attention_mask=mask,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
    assert attached.trace.steered == [[5, 6, 7, 8]]


@pytest.mark.parametrize("where", ["generated", "prompt", "assistant"])
def test_a_bare_pass_whose_phase_is_unknown_is_refused_with_the_remedy(model, where):
    remedy = "turns=" if where == "assistant" else "prompt_lengths="
    with pytest.raises(PositionError, match=remedy), Attachment(model, [edit(model, 1, where)]):
        model.model(torch.tensor([[1, 2, 3]]))


def test_prompt_lengths_of_another_batch_are_refused(model):
    for lengths in ([2, 3], []):
        with (
            pytest.raises(PositionError, match="one per prompt"),
            Attachment(model, [edit(model)], prompt_lengths=lengths),
        ):
            model.model(torch.tensor([[1, 2, 3]]))


def test_a_mask_that_hides_its_padding_needs_position_ids(model):
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with (
        pytest.raises(PositionError, match="position_ids"),
        Attachment(model, [edit(model, 1, "all")]),
    ):
        model.model(torch.tensor([[1, 2, 3]]), attention_mask=mask)


# --- caches and turns ----------------------------------------------------------------------------


def chat(model):
    """A chat's first prompt, and what makes the second out of the first answer's ids."""
    first = model.encode([{"role": "user", "content": "Hi"}])
    after = model._ids("\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n")
    return first, lambda answer: ([*first.ids, *answer, *after], len(first.ids) + len(answer))


def test_a_second_turn_is_steered_alike_from_a_cache_and_from_scratch(model):
    first, second = chat(model)
    cache = DynamicCache(config=model.model.config)
    steering = [edit(model, 1, "assistant")]
    with Attachment(model, steering, turns=[first.turns]) as one:
        out = generate(model, *padded([first.ids]), past_key_values=cache)
    length = len(first.ids)
    assert one.trace.steered == [list(range(length - 1, length + NEW - 1))]
    ids, end = second(out[0, length:].tolist())
    turns = [((length - 1, end), (len(ids) - 1, len(ids)))]
    answers, traces, states = [], [], []
    for past in (copy.deepcopy(cache), DynamicCache(config=model.model.config)):
        with (
            Attachment(model, steering, turns=turns) as attached,
            seen(model, Site(2)) as held,
        ):
            found = generate(
                model,
                *padded([ids]),
                past_key_values=past,
                output_logits=True,
                return_dict_in_generate=True,
            )
        answers.append(torch.stack(found.logits))
        states.append(torch.cat(held, 1)[:, -(NEW + 5) :])
        traces.append(attached.trace.steered[0])
    cached, whole = traces
    assert [*one.trace.steered[0], *cached] == whole
    assert whole == [*range(length - 1, end), *range(len(ids) - 1, len(ids) + NEW - 1)]
    assert torch.allclose(*answers, atol=1e-5)
    assert torch.allclose(*states, atol=1e-5)


@pytest.mark.parametrize("where", ["generated", "prompt"])
@pytest.mark.parametrize("keep", [lambda cache: cache, copy.deepcopy], ids=["itself", "a copy"])
def test_a_cache_that_holds_steered_tokens_is_refused_for_a_new_turn(model, where, keep):
    first, second = chat(model)
    cache = DynamicCache(config=model.model.config)
    with Attachment(model, [edit(model, 1, where)]):
        out = generate(model, *padded([first.ids]), past_key_values=cache)
    ids, _ = second(out[0, len(first.ids) :].tolist())
    with (
        pytest.raises(RefusedError, match="assistant"),
        Attachment(model, [edit(model, 1, where)]),
    ):
        generate(model, *padded([ids]), past_key_values=keep(cache))


def test_a_cache_made_by_a_bare_pass_is_refused_for_another_prompt(model):
    with Attachment(model, [edit(model)], prompt_lengths=[3]):
        cache = model.model(torch.tensor([[5, 6, 7, 8]]), use_cache=True).past_key_values
    with (
        pytest.raises(RefusedError, match="assistant"),
        Attachment(model, [edit(model)], prompt_lengths=[6]),
    ):
        model.model(torch.tensor([[9, 10]]), past_key_values=cache)


def test_a_cache_without_steered_tokens_is_welcome(model):
    first, second = chat(model)
    cache = DynamicCache(config=model.model.config)
    out = generate(model, *padded([first.ids]), past_key_values=cache)
    with Attachment(model, [edit(model, 0.0)]):  # strength 0 steers nothing
        ids, _ = second(out[0, len(first.ids) :].tolist())
        out = generate(model, *padded([ids]), past_key_values=cache)
    with Attachment(model, [edit(model)]) as attached:
        more = [*out[0].tolist(), 9, 8, 7]
        generate(model, *padded([more]), past_key_values=cache)
    assert attached.trace.steered == [list(range(len(more) - 1, len(more) + NEW - 1))]


def test_a_cache_cropped_before_its_steered_tokens_is_welcome(model):
    cache = DynamicCache(config=model.model.config)
    with Attachment(model, [edit(model)]):
        generate(model, *padded(ROWS[:1]), past_key_values=cache)
    cache.crop(-(cache.get_seq_length() - 5))
    assert cache.get_seq_length() == 5
    with Attachment(model, [edit(model)]) as attached:
        generate(model, *padded([[*ROWS[0][:5], 50, 51, 52]]), past_key_values=cache)
    assert attached.trace.steered == [[7, 8, 9, 10]]


# --- what is edited ------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("where", ["generated", "all", "range:1:2"])
def test_a_sites_rows_become_the_intervention_of_them_and_no_others(model, stream, where):
    site, lengths = Site(1, stream), [4, 2, 1]
    ids, mask = padded(ROWS)
    how = {"attention_mask": mask, "position_ids": positions(mask)}
    with torch.no_grad(), seen(model, site) as plain:
        model.model(ids, **how)
    steering = edit(model, [1.0, -2.0, 0.5], where, site)
    with (
        torch.no_grad(),
        Attachment(model, [steering], prompt_lengths=lengths) as attached,
        seen(model, site) as steered,
    ):
        model.model(ids, **how)
    want, touched = plain[0].clone(), torch.zeros_like(mask, dtype=torch.bool)
    assert [len(steps) for steps in attached.trace.steered] == {
        "generated": [3, 2, 1],
        "all": [6, 3, 1],
        "range:1:2": [1, 1, 0],
    }[where]
    for row, steps in enumerate(attached.trace.steered):
        for step in steps:
            column = ids.shape[1] - len(ROWS[row]) + step
            touched[row, column] = True
            coef = steering.coef[row : row + 1]
            want[row, column] = steering.interventions[site](want[row, column][None], coef)[0]
    assert torch.equal(bits(steered[0]), bits(want))
    assert not torch.equal(steered[0][touched], plain[0][touched])


def test_a_block_that_returns_a_tuple_is_steered_and_keeps_the_rest(model):
    ids, site = torch.tensor([ROWS[0]]), Site(1)
    steering = [edit(model, 1, "all", site)]
    block = model.layout.blocks[1].module
    with torch.no_grad(), Attachment(model, steering):
        want = model.model(ids).logits
    forward, outputs = block.forward, []

    def unpack(_, args, output):
        outputs.append(output)
        return output[0]

    block.forward = lambda *args, **kwargs: (forward(*args, **kwargs), "more")
    try:
        with torch.no_grad(), Attachment(model, steering), block.register_forward_hook(unpack):
            got = model.model(ids).logits
    finally:
        del block.forward
    assert outputs[0][1] == "more" and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_strength_0_are_the_plain_models_bits(model, dtype):
    model = copy.deepcopy(model)
    model.model.to(dtype)
    ids, mask = padded([ROWS[0]] * 4)
    with torch.no_grad(), seen(model, Site(2)) as plain:
        before = model.model(ids, attention_mask=mask).logits
    with (
        torch.no_grad(),
        Attachment(model, [edit(model, [0.0, 3.0, 0.0, -1.0], "all")]) as attached,
        seen(model, Site(2)) as steered,
    ):
        after = model.model(ids, attention_mask=mask).logits
    for row in (0, 2):
        assert torch.equal(bits(after[row]), bits(before[row]))
        assert torch.equal(bits(steered[0][row]), bits(plain[0][row]))
    assert not torch.equal(after[1], before[1])
    assert [len(row) for row in attached.trace.steered] == [0, 6, 0, 6]
    assert (attached.trace.selected, attached.trace.touched) == (24, 12)


def test_strengths_mixed_in_a_batch_equal_strengths_alone(model):
    strengths = [0.0, 1.0, 2.0, -3.0]
    ids, mask = padded([[*ROWS[0][: 3 + n]] for n in range(4)])
    how = {"attention_mask": mask, "position_ids": positions(mask)}
    with torch.no_grad(), Attachment(model, [edit(model, strengths, "all")]):
        mixed = model.model(ids, **how).logits
    for row, strength in enumerate(strengths):
        own = ids[row][mask[row].bool()][None]
        with torch.no_grad(), Attachment(model, [edit(model, strength, "all")]):
            alone = model.model(own).logits[0]
        assert torch.allclose(mixed[row, -own.shape[1] :], alone, atol=1e-5)


def test_edits_at_one_site_apply_in_the_order_given(model):
    class Double(Intervention):
        width = tiny.WIDTH

        def displacement(self, h, coef):
            return h * coef

    site, ids = Site(1), torch.tensor([ROWS[0]])
    double = Edit(Interventions({site: Double()}), torch.ones(1), Where("all"))
    add = edit(model, 1, "all", site)
    with torch.no_grad(), seen(model, site) as plain:
        model.model(ids)
    vector = add.interventions[site].shifts[0]
    for edits, want in (
        ([double, add], plain[0] * 2 + vector),
        ([add, double], (plain[0] + vector) * 2),
    ):
        with torch.no_grad(), Attachment(model, edits) as attached, seen(model, site) as steered:
            model.model(ids)
        assert torch.allclose(steered[0], want, atol=1e-6)
        assert attached.trace.touched == len(ROWS[0])


def test_edits_with_scopes_of_their_own_touch_their_own_tokens(model):
    ids = torch.tensor([ROWS[0]])
    both = [edit(model, 1, "range:0:2"), edit(model, 1, "range:1:4", Site(2), seed=1)]
    with torch.no_grad(), Attachment(model, both) as attached:
        model.model(ids)
    assert attached.trace.steered == [[0, 1, 2, 3]]
    assert attached.trace.touched == attached.trace.selected == 4


def spoil(_, args, output):
    state = (output[0] if isinstance(output, tuple) else output).clone()
    state[0, 2, 0], state[0, 4, 1] = float("inf"), float("nan")
    return (state, *output[1:]) if isinstance(output, tuple) else state


def test_rows_that_are_not_finite_stay_and_are_counted(model):
    ids = torch.tensor([ROWS[0]])
    with (
        torch.no_grad(),
        model.layout.blocks[1].module.register_forward_hook(spoil),
        seen(model, Site(1)) as before,
    ):
        model.model(ids)
    with (
        torch.no_grad(),
        model.layout.blocks[1].module.register_forward_hook(spoil),
        Attachment(model, [edit(model, 1, "all")]) as attached,
        seen(model, Site(1)) as after,
    ):
        model.model(ids)
    assert attached.trace.nonfinite == 2
    assert attached.trace.steered == [[0, 1, 3, 5]] and attached.trace.touched == 4
    assert torch.equal(bits(after[0][0, [2, 4]]), bits(before[0][0, [2, 4]]))
    assert not torch.equal(after[0][0, 0], before[0][0, 0])


@pytest.mark.parametrize("site", [Site(1), Site(1, "mlp_norm")])
def test_a_run_without_a_finite_row_to_edit_steers_nothing(model, site):
    # Block 1's weights are whole; what block 0 hands it is not, at positions 2 and 4.
    with (
        torch.no_grad(),
        model.layout.blocks[0].module.register_forward_hook(spoil),
        pytest.raises(NothingSteeredError, match="infinite or NaN"),
        Attachment(model, [edit(model, 1, "range:2:3", site)]) as attached,
    ):
        model.model(torch.tensor([ROWS[0]]))
    assert attached.trace.steered == [[]] and attached.trace.touched == 0
    assert attached.trace.selected == attached.trace.nonfinite == 1


def test_a_token_that_one_site_could_edit_was_steered(model):
    with (
        torch.no_grad(),
        model.layout.blocks[1].module.register_forward_hook(spoil),
        Attachment(
            model,
            [edit(model, 1, "range:2:3", Site(0), Site(1)), edit(model, 1, "range:4:5", Site(1))],
        ) as attached,
    ):
        model.model(torch.tensor([ROWS[0]]))
    assert attached.trace.nonfinite == 2
    assert attached.trace.steered == [[2]] and attached.trace.touched == 1


def test_displacements_of_edited_rows_are_told(model):
    moved, ids = [], torch.tensor([ROWS[0]])
    steering = edit(model, 2, "range:1:4")
    with torch.no_grad(), seen(model, Site(1)) as plain:
        model.model(ids)
    with torch.no_grad(), Attachment(model, [steering], displacement=moved):
        model.model(ids)
    length = 2 * steering.interventions[Site(1)].shifts[0].norm()
    want = length / plain[0][0, 1:4].norm(dim=-1)
    assert torch.allclose(torch.tensor(moved), want, rtol=1e-4)


# --- nothing stays -------------------------------------------------------------------------------


def test_leaving_restores_the_model_exactly(model):
    ids, mask = padded(ROWS)
    before, count = generate(model, ids, mask), hooks_of(model.model)
    attributes = set(vars(model.model))
    plain = model.model(ids, attention_mask=mask).logits
    with Attachment(model, [edit(model)]):
        generate(model, ids, mask)
        assert hooks_of(model.model) > count and "generate" in vars(model.model)
    assert hooks_of(model.model) == count
    assert set(vars(model.model)) == attributes
    assert torch.equal(bits(model.model(ids, attention_mask=mask).logits), bits(plain))
    assert torch.equal(generate(model, ids, mask), before)


def test_an_exception_inside_restores_the_model_and_is_not_replaced(model):
    count = hooks_of(model.model)
    with pytest.raises(ZeroDivisionError), Attachment(model, [edit(model)]):
        1 / 0  # noqa: B018
    assert hooks_of(model.model) == count and "generate" not in vars(model.model)


def test_a_failed_generation_forgets_its_prompts(model):
    ids, mask = padded(ROWS)
    with Attachment(model, [edit(model)]):
        with pytest.raises((TypeError, ValueError)):
            generate(model, ids, mask, no_such_argument=1)
        with pytest.raises(PositionError):
            model.model(ids, attention_mask=mask)
        generate(model, ids, mask)


def test_a_failure_half_way_into_attaching_leaves_nothing(model, monkeypatch):
    count = hooks_of(model.model)

    def fail(*_):
        raise RuntimeError("half way")

    steering = edit(model, 1, "all", Site(0), Site(1))
    monkeypatch.setattr(Attachment, "_wrap_generate", fail)
    with pytest.raises(RuntimeError, match="half way"), Attachment(model, [steering]):
        pass
    assert hooks_of(model.model) == count and "generate" not in vars(model.model)


def test_an_own_generate_comes_back(model):
    calls = []
    original = model.model.generate

    def own(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.model.generate = own
    try:
        with Attachment(model, [edit(model)]):
            generate(model, *padded(ROWS))
        assert model.model.generate is own and calls == [1]
    finally:
        del model.model.generate


def test_nested_steerings_both_work_and_both_go(model):
    ids, mask = padded(ROWS)
    count = hooks_of(model.model)
    one, two = edit(model), edit(model, 1, "generated", Site(2), seed=1)
    with Attachment(model, [one, two]):
        want = model.model.generate(
            ids, attention_mask=mask, max_new_tokens=2, output_logits=True,
            return_dict_in_generate=True, do_sample=False,
        ).logits  # fmt: skip
    with Attachment(model, [one]) as outer:
        with Attachment(model, [two]) as inner:
            got = model.model.generate(
                ids, attention_mask=mask, max_new_tokens=2, output_logits=True,
                return_dict_in_generate=True, do_sample=False,
            ).logits  # fmt: skip
        assert outer.trace.steered == inner.trace.steered != []
        generate(model, ids, mask)
    assert torch.equal(torch.stack(got), torch.stack(want))
    assert hooks_of(model.model) == count and "generate" not in vars(model.model)


# --- refusals ------------------------------------------------------------------------------------


def test_a_run_without_a_forward_pass_steered_nothing(model):
    with pytest.raises(NothingSteeredError, match="scope generated"):
        with Attachment(model, [edit(model)]):
            pass
    assert "generate" not in vars(model.model)


def test_a_scope_that_selects_nothing_is_an_error(model):
    with pytest.raises(NothingSteeredError, match="range:50:60"):
        with Attachment(model, [edit(model, 1, "range:50:60")]):
            model.model(torch.tensor([ROWS[0]]))


def test_strength_0_alone_is_no_error_and_changes_no_bit(model):
    ids, mask = padded(ROWS)
    plain = model.model(ids, attention_mask=mask).logits
    with Attachment(model, [edit(model, 0, "all")]) as attached:
        steered = model.model(ids, attention_mask=mask).logits
    assert torch.equal(bits(steered), bits(plain))
    assert attached.trace.touched == 0 and attached.trace.selected == sum(LENGTHS)


def test_what_does_not_fit_the_model_is_refused_before_anything_runs(model):
    other = shift(tiny.tiny_language_model("gpt2", n_embd=16), Site(1))
    cases = {
        "width 16": Edit(other, torch.ones(1)),
        "layer 9": Edit(Interventions({Site(9): other[Site(1)]}), torch.ones(1)),
    }
    for message, steering in cases.items():
        with pytest.raises(InputError, match=message):
            Attachment(model, [steering])
    with pytest.raises(InputError, match="no edit"):
        Attachment(model, [])


@pytest.mark.parametrize("coef", [[float("nan")], [float("inf")], [], 1.0, [[[1.0]]]])
def test_coefficients_that_are_none_are_refused(model, coef):
    with pytest.raises(InputError, match="coefficients"):
        Edit(shift(model), torch.tensor(coef))


def test_coefficients_of_another_batch_are_refused(model):
    with (
        pytest.raises(InputError, match="one per prompt"),
        Attachment(model, [edit(model, [1.0, 2.0], "all")]),
    ):
        model.model(torch.tensor([[1, 2], [3, 4], [5, 6]]))


# --- contexts ------------------------------------------------------------------------------------

LONG = [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23], list(range(30, 130))]


def contexts(model, site):
    """By hand, from a pass per prompt: the mean of what stands before the last token, but for 0."""
    found = []
    for row in LONG:
        with seen(model, site) as held:
            model.model(torch.tensor([row]))
        found.append(held[0][0, max(1, len(row) - 65) : -1].mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("site", [Site(1), Site(2, "mlp"), Site(1, "attention_norm")], ids=str)
@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"num_beams": 2}],
    ids=["cache", "no cache", "chunked prefill", "beams"],
)
def test_every_generated_token_is_told_the_mean_of_its_prompt(model, site, how):
    want, (ids, mask) = contexts(model, site), padded(LONG)
    given = []

    class Kept(Told):
        def displacement(self, h, coef, context=None):
            given.append(context)
            return 0.01 * context

    maps = Interventions({site: Kept(model.layout.width_of(site))})
    with Attachment(model, [Edit(maps, torch.ones(1))]) as attached:
        generate(model, ids, mask, **how)
    assert attached.trace.touched == len(torch.cat(given))
    beams = how.get("num_beams", 1)
    for rows in given:
        each = want.repeat_interleave(beams, 0)
        if len(rows) != len(each):  # without a cache all steered tokens come again
            each = each.repeat_interleave(len(rows) // len(each), 0)
        torch.testing.assert_close(rows, each, rtol=0, atol=2e-5)


def test_contexts_are_those_of_the_call_at_hand(model):
    ids, mask = padded(LONG)
    with Attachment(model, [Edit(told(model), torch.ones(1))]) as attached:
        first = generate(model, ids, mask)
        generate(model, ids.flip(0), mask.flip(0))
        again = generate(model, ids, mask)
    assert torch.equal(first, again) and attached.trace.touched == 3 * 3 * NEW


def test_contexts_that_are_given_are_used(model):
    ids, mask = padded(LONG)
    own = {Site(1): torch.randn(3, tiny.WIDTH, generator=torch.Generator().manual_seed(0))}
    lengths = [len(row) for row in LONG]
    edits = [Edit(told(model), torch.ones(1))]
    with Attachment(model, edits, prompt_lengths=lengths, contexts=own), seen(model, Site(1)) as h:
        model.model(ids, attention_mask=mask, position_ids=positions(mask))
    with seen(model, Site(1)) as base:
        model.model(ids, attention_mask=mask, position_ids=positions(mask))
    torch.testing.assert_close((h[0] - base[0])[:, -1], own[Site(1)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["all", "prompt", "assistant", "range:2:7"])
def test_what_is_read_must_stand_before_what_is_steered(model, where):
    with pytest.raises(RefusedError, match="reads the prompt"):
        Attachment(model, [Edit(told(model), torch.ones(1), Where.parse(where))])


def test_a_prompt_that_did_not_go_by_is_refused(model):
    edits = [Edit(told(model), torch.ones(1))]
    cache = DynamicCache(config=model.model.config)
    model.model(torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)
    with pytest.raises(RefusedError, match="without its prompt"):  # noqa: SIM117
        with Attachment(model, edits, prompt_lengths=[6]):
            model.model(torch.tensor([[9, 10]]), past_key_values=cache)


@pytest.mark.parametrize("way", ["generate", "forward"])
def test_a_cached_prefix_under_an_attachment_in_use_is_refused_too(model, way):
    """The contexts of one call must not serve the next, which brings most of its prompt along."""
    # In generate() the second prompt is longer than all that the first call saw.
    more = 90 if way == "generate" else 30
    rows = torch.arange(10, 40).view(1, -1), torch.arange(60, 60 + more).view(1, -1)
    edits = [Edit(told(model), torch.ones(1))]
    cache = DynamicCache(config=model.model.config)
    model.model(rows[1][:, :-1], past_key_values=cache)
    known = {} if way == "generate" else {"prompt_lengths": [30]}
    attached = Attachment(model, edits, **known)
    with pytest.raises(RefusedError, match="without its prompt"), attached:
        for ids, past in zip(rows, (None, cache), strict=True):
            if way == "generate":
                generate(model, ids, torch.ones_like(ids), past_key_values=past)
            else:
                ids = ids if past is None else ids[:, -1:]
                model.model(ids, past_key_values=past)


def test_short_and_long_prompts_fed_in_parts_are_told_apart(model):
    ids, mask = padded(LONG[:2], "right")
    lengths, given = [len(row) for row in LONG[:2]], []

    class Kept(Told):
        def displacement(self, h, coef, context=None):
            given.append(context)
            return 0.01 * context

    maps = Interventions({Site(1): Kept(model.layout.width_of(Site(1)))})
    cache = DynamicCache(config=model.model.config)
    with Attachment(model, [Edit(maps, torch.ones(1))], prompt_lengths=lengths):
        for part in (slice(0, 4), slice(4, None)):
            model.model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions(mask)[:, part],
                past_key_values=cache,
            )
    want = contexts(model, Site(1))
    torch.testing.assert_close(torch.cat(given), want[[1, 0]], rtol=0, atol=2e-5)


def test_a_short_prompt_that_nothing_steers_stands_beside_others(model):
    ids, mask = padded([[30, 31], LONG[0]])
    edits = [Edit(told(model), torch.tensor([[0.0], [1.0]]))]
    with Attachment(model, edits) as attached:
        generate(model, ids, mask)
    assert attached.trace.touched == NEW


def test_a_prompt_without_a_token_to_read_is_refused(model):
    with pytest.raises(PositionError, match="a prompt of 1 or 2 tokens"):  # noqa: SIM117
        with Attachment(model, [Edit(told(model), torch.ones(1))], prompt_lengths=[2]):
            model.model(torch.tensor([[9, 10]]))
