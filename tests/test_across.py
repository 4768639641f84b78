"""Across sites: a block's input is read, its output edited, and a carry goes up the blocks."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from transformers import DynamicCache

import tiny
from edits import Tracks, bits, hooks_of, padded, positions, seen, shift, tracks
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError, RefusedError
from innsteer.gating import Gate, Gated
from innsteer.hooks import Attachment
from innsteer.interventions import Edit, Shift
from innsteer.site import Site, Where
from innsteer.steerer import Interventions
from innsteer.steerers.alqr import Feedback
from innsteer.steerers.diffmean import DiffMean
from innsteer.steerers.gated import GatedMethod

ROWS = [[10, 11, 12, 13, 14, 15], [20, 21, 22], [30, 31, 32, 33]]
LENGTHS = [4, 2, 3]
PROMPTS = [Prompt("a", "Say something."), Prompt("b", "Is it late?")]


@pytest.fixture(scope="module", params=tiny.KINDS)
def model(request):
    return tiny.tiny_language_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny.tiny_language_model("llama")


def of(maps, coef=1.0, where="generated"):
    """An edit; coef is a number, or one per sequence."""
    rows = torch.tensor(coef)[:, None] if isinstance(coef, list) else torch.tensor([float(coef)])
    return Edit(maps, rows, Where.parse(where))


def logits(model, rows, edits, lengths=LENGTHS, **how):
    """Logits of padded rows in one pass under edits."""
    ids, mask = padded(rows)
    with torch.no_grad(), Attachment(model, edits, prompt_lengths=lengths, **how) as attached:
        out = model.model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    return out, attached.trace


@contextmanager
def by_hand(model, maps, strength, first):
    """The maps' own formulas in plain hooks, on the tokens of one sequence from ``first`` on."""
    state = {}

    def read(part, above):
        def before(_, args, kwargs):
            h = (args[0] if args else kwargs["hidden_states"])[0, first:].double()
            old = state["carry"] if above else torch.zeros(len(h), 2, dtype=torch.float64)
            seen = torch.tanh(h @ part.along.double())
            state["carry"] = torch.stack([0.5 * old[:, 0] + seen, old[:, 1]], -1)

        return before

    def write(part):
        def after(_, args, output):
            h = output[0] if isinstance(output, tuple) else output
            new, carry = h.clone(), state["carry"]
            size = (carry[:, :1] * (1 + carry[:, 1:])).to(h.dtype)
            new[0, first:] += strength * size * part.moves.to(h.dtype)
            state["carry"] = carry + torch.tensor([0.0, 0.25])
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return after

    with ExitStack() as stack:
        for number, (site, part) in enumerate(maps.items()):
            block = model.layout.blocks[site.layer].module
            hook = block.register_forward_pre_hook(read(part, number), with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(block.register_forward_hook(write(part)).remove)
        yield


# --- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(0, 2), (1,), (0, 1, 2)], ids=str)
def test_a_pass_is_the_formula_by_hand(model, layers):
    maps = tracks(model, *map(Site, layers))
    got, trace = logits(model, ROWS[:1], [of(maps, 0.7)], LENGTHS[:1])
    with torch.no_grad(), by_hand(model, maps, 0.7, first=3):
        want = model.model(torch.tensor(ROWS[:1])).logits
    plain = logits(model, ROWS[:1], [of(maps, 0.0)], LENGTHS[:1])[0]
    assert (want - plain).abs().max() > 0.1
    # float32 against float64 sums in the maps
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert trace.steered == [[3, 4, 5]] and trace.touched == 3


def test_a_read_sees_what_was_edited_below(llama):
    maps, lower = tracks(llama, Site(2)), shift(llama, Site(1))
    both = logits(llama, ROWS[:1], [of(lower), of(maps)], LENGTHS[:1])[0]
    heads = Interventions({Site(2, "heads"): shift(llama, Site(2, "heads"))[Site(2, "heads")]})
    above = logits(llama, ROWS[:1], [of(heads), of(maps)], LENGTHS[:1])[0]
    for first, got in ((lower, both), (heads, above)):
        ids = torch.tensor(ROWS[:1])
        with (
            torch.no_grad(),
            by_hand(llama, maps, 1.0, first=3),
            Attachment(llama, [of(first)], prompt_lengths=LENGTHS[:1]),
        ):
            want = llama.model(ids).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_every_edit_has_a_carry_of_its_own(llama):
    one, two = tracks(llama), tracks(llama, seed=5)
    got = logits(llama, ROWS[:1], [of(one), of(two)], LENGTHS[:1])[0]
    with torch.no_grad(), ExitStack() as stack:
        for maps in (one, two):  # the second writes after the first, and both read the same input
            stack.enter_context(by_hand(llama, maps, 1.0, first=3))
        want = llama.model(torch.tensor(ROWS[:1])).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_pass_starts_from_nothing(llama):
    ids = torch.tensor(ROWS[:1])
    with torch.no_grad(), Attachment(llama, [of(tracks(llama))], prompt_lengths=[4]):
        first, second = (llama.model(ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


# --- which rows, however the model is run --------------------------------------------------------


def test_rows_of_a_batch_are_steered_as_alone_and_those_at_strength_0_not_at_all(model):
    coef = [0.5, 0.0, -1.0]
    ids, mask = padded(ROWS)
    whole = tracks(model)
    with torch.no_grad():
        plain = model.model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    got, trace = logits(model, ROWS, [of(whole, coef)])
    assert torch.equal(bits(got[1]), bits(plain[1]))
    assert trace.steered == [[3, 4, 5], [], [2, 3]] and trace.touched == 5 and trace.selected == 7
    for row, length, strength, found in zip(ROWS, LENGTHS, coef, got, strict=True):
        alone = logits(model, [row], [of(whole, strength)], [length])[0][0]
        torch.testing.assert_close(found[-len(row) :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["generated", "prompt", "all", "range:2:4"])
def test_a_prompt_in_two_parts_and_a_cache_change_nothing(model, where):
    maps = tracks(model)
    want, whole = logits(model, ROWS[:1], [of(maps, 1, where)], LENGTHS[:1])
    cache, got = DynamicCache(config=model.model.config), []
    ids = torch.tensor(ROWS[:1])
    with (
        torch.no_grad(),
        Attachment(model, [of(maps, 1, where)], prompt_lengths=LENGTHS[:1]) as parts,
    ):
        for part in (slice(0, 3), slice(3, 4), slice(4, 6)):
            got.append(model.model(ids[:, part], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-5, atol=1e-5)
    assert parts.trace.steered == whole.steered and parts.trace.touched == whole.touched


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static cache"],
)
def test_generation_says_the_same_with_and_without_a_cache(model, how):
    ids, mask = padded(ROWS)
    given = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    said = []
    for more in ({"use_cache": False, **{k: v for k, v in how.items() if k == "num_beams"}}, how):
        with Attachment(model, [of(tracks(model), 0.5)]) as attached:
            said.append(model.model.generate(ids, **given, **more))
        if not how:
            assert attached.trace.steered == [list(range(len(r) - 1, len(r) + 3)) for r in ROWS]
    assert torch.equal(*said)


def test_one_attachment_follows_strengths_and_rows_from_pass_to_pass(llama):
    """Maps are bound to a pass's strengths; the next one may have others, or other rows."""
    maps = tracks(llama, Site(0), Site(1), Site(2))
    ids = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]])
    edit, calls = of(maps, [0.5, -1.0], "range:2:6"), []
    with torch.no_grad(), Attachment(llama, [edit], prompt_lengths=[4, 4]) as attached:
        for part in (slice(0, 3), slice(0, 4), slice(1, 5), slice(0, 4), slice(0, 6)):
            calls.append((part, llama.model(ids[:, part], use_cache=False).logits))
    assert attached.trace.nonfinite == 0
    for part, got in calls:
        rows = ids[:, part].tolist()
        want = logits(llama, rows, [of(maps, [0.5, -1.0], "range:2:6")], [4, 4])[0]
        assert torch.equal(got, want)
    swapped = logits(llama, ids.tolist(), [of(maps, [-1.0, 0.5], "range:2:6")], [4, 4])[0]
    assert not torch.allclose(swapped, calls[-1][1], atol=1e-3)


def test_trained_maps_are_not_bound_to_what_they_were(llama):
    maps = Interventions({Site(1): Feedback(tiny.WIDTH)})
    for tensor in (maps[Site(1)].reads, maps[Site(1)].writes):
        tensor.copy_(torch.linspace(-1, 1, tiny.WIDTH)).requires_grad_()
    ids = torch.tensor(ROWS[:1])
    with Attachment(llama, [of(maps)], prompt_lengths=[4]):
        for _ in range(2):  # a graph of its own each time
            llama.model(ids).logits.sum().backward()
    assert maps[Site(1)].reads.grad.abs().max() > 0


def test_leaving_restores_the_model(llama):
    before = hooks_of(llama.model)
    with Attachment(llama, [of(tracks(llama))], prompt_lengths=[4]):
        assert hooks_of(llama.model) > before
        llama.model(torch.tensor(ROWS[:1]))
    assert hooks_of(llama.model) == before


def test_a_token_that_is_not_finite_once_is_left_alone_from_there_on(llama):
    maps = tracks(llama, Site(0), Site(1), Site(2))
    ids = torch.tensor(ROWS[:1])

    def spoil(_, args, kwargs):  # the input of block 1 alone: its output is finite again
        h = args[0].clone()
        h[0, 4] = float("nan")
        return (h, *args[1:]), kwargs

    def mend(_, args, output):
        whole = output if isinstance(output, tuple) else (output,)
        return torch.nan_to_num(whole[0]) if whole is not output else (torch.nan_to_num(whole[0]),)

    block = llama.layout.blocks[1].module
    with torch.no_grad(), ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(spoil, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(mend).remove)
        attached = stack.enter_context(Attachment(llama, [of(maps)], prompt_lengths=[4]))
        with seen(llama, Site(1)) as after:
            llama.model(ids)
    assert torch.isfinite(after[0]).all()
    # Of three steered tokens one is left alone at two of three sites; block 0 has edited it.
    assert attached.trace.nonfinite == 2 and attached.trace.steered == [[3, 4, 5]]


def test_the_carry_is_of_the_compute_dtype_and_on_the_way_nothing_else_changes(llama):
    kinds = {torch.float32: torch.float32, torch.bfloat16: torch.float32}
    for dtype, wanted in kinds.items():
        own, given = tiny.tiny_language_model("llama"), []
        own.model.to(dtype)

        class Told(Tracks):
            def read(self, h_in, coef, carry, given=given):
                given.append((h_in.dtype, carry.dtype))
                return super().read(h_in, coef, carry)

        got, _ = logits(own, ROWS[:1], [of(Interventions({Site(1): Told(tiny.WIDTH)}))], [4])
        assert got.dtype == dtype and given == [(wanted, wanted)]
    double = tiny.tiny_language_model("llama")
    double.model.to(torch.float64)
    got, _ = logits(double, ROWS[:1], [of(tracks(double).double())], LENGTHS[:1])
    ids = torch.tensor(ROWS[:1])
    with torch.no_grad(), by_hand(double, tracks(double), 1.0, first=3):
        want = double.model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_block_that_runs_again_finds_the_same_carry(llama):
    """As checkpointing runs it in the backward pass, last block first."""
    calls = []

    def keep(block, args, kwargs, output):
        calls.append((block, args, kwargs, output))

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(Attachment(llama, [of(tracks(llama))], prompt_lengths=[4]))
        for layer in (0, 2):
            block = llama.layout.blocks[layer].module
            stack.callback(block.register_forward_hook(keep, with_kwargs=True).remove)
        llama.model(torch.tensor(ROWS[:1]), use_cache=False)
        for block, args, kwargs, output in reversed(calls[:2]):
            again = block(*args, **kwargs)
            assert torch.equal(again, output)


# --- kept prefixes -------------------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_a_meter_that_keeps_blocks_measures_what_a_whole_pass_does(model, lowest):
    maps = tracks(model, Site(lowest), Site(2)) if lowest < 2 else tracks(model, Site(2))
    backend = HF(model)
    reference = backend.reference(PROMPTS, Sampling(new_tokens=6))
    want = backend.meter(reference)([of(maps)])
    for sites in (list(maps), [Site(2)]):
        got = backend.meter(reference, sites)([of(maps)])
        for one, other in zip(want, got, strict=True):
            assert one.steered == other.steered
            for name in ("kl", "log_prob"):
                assert one.values[name] == pytest.approx(other.values[name], abs=2e-5), name
    assert max(max(one.values["kl"]) for one in want) > 1e-3


def test_a_run_refuses_to_read_a_block_that_it_does_not_run(llama):
    items = tuple(
        Item(f"{n}", f"Is {n} small?", source="No", target="Yes", key="Yes", group=f"{n}")
        for n in range(4)
    )
    maps, contrast = tracks(llama, Site(1), Site(2)), Contrast("small", "choice", items)
    with pytest.raises(RefusedError, match="input of block 1.*layer below"):
        Through(HF(llama), [contrast], [Site(1)]).answers(maps, [0], [1.0])
    run = Through(HF(llama), [contrast], [Site(0), Site(1)])
    got = run.answers(maps, run.items(), [1.0] * 4)
    prompts = [Prompt(item.id, item.prompt, (item.target, item.source)) for item in items]
    want = HF(llama).score(prompts, [of(maps)])
    for n in range(4):
        assert float(got.target[n]) == pytest.approx(sum(want[n][0]), abs=1e-4)
        assert float(got.source[n]) == pytest.approx(sum(want[n][1]), abs=1e-4)
    with pytest.raises(RefusedError, match="block 0"):
        run.answers(tracks(llama, Site(0)), [0], [1.0])


# --- what is refused -----------------------------------------------------------------------------


def test_maps_that_do_not_fit_together_are_refused():
    with pytest.raises(InputError, match=r"3.mlp.*output of a block"):
        Interventions({Site(3, "mlp"): Tracks(4)})
    wide = Tracks(4)
    wide.carry = 5
    with pytest.raises(InputError, match=r"2 at 1\S*, 5 at 2"):
        Interventions({Site(1): Tracks(4), Site(2): wide})
    mixed = Interventions({Site(1): Tracks(4), Site(2, "mlp"): Shift(4)})
    assert mixed.across and not Interventions({Site(2): Shift(4)}).across


def test_rows_alone_are_refused(llama):
    with pytest.raises(InputError, match="rows of one site for Tracks.*Steering.on"):
        Tracks(4)(torch.zeros(2, 4), torch.ones(2, 1))


def test_a_gate_refuses_them(monkeypatch):
    with pytest.raises(InputError, match="gate around a map that acts across sites"):
        Gated(Tracks(4), Gate(4))
    monkeypatch.setattr(DiffMean, "across_sites", True)
    with pytest.raises(InputError, match="each row"):
        GatedMethod()


def test_what_an_engine_needs_to_know_of_them():
    maps = Interventions({Site(0): Tracks(4), Site(2): Tracks(4), Site(3): Shift(4)})
    assert maps.carry == 2 and maps.read_sites == (Site(1),)
    assert Interventions({Site(3): Shift(4)}).carry == 0
