"""Jacobians of blocks at one token: against finite differences, autograd and the authors' own."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from innsteer.backends.hf import HF
from innsteer.backends.local import Local, Read, mean_jacobians, mean_products, opened
from innsteer.backends.memo import Memo
from innsteer.backends.through import Through
from innsteer.contrast import Contrast
from innsteer.errors import InputError, LayoutError
from innsteer.interventions import Shift
from innsteer.models import Encoded, LanguageModel
from innsteer.site import Site, Where
from innsteer.steerer import Interventions
from tiny import ARCHITECTURES, tiny_language_model, tiny_tokenizer

LAYERS = (Site(0), Site(1), Site(2))


def texts(*lengths: int, seed: int = 0) -> list[Read]:
    """Random ids above the special ones."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, 260, (n,), generator=draw).tolist() for n in lengths]
    return [Read(tuple(ids), len(ids), {"weight": 1.0}) for ids in rows]


def through_one_block(model: LanguageModel, ids: Tensor, block: int, x: Tensor) -> Tensor:
    """A block's output at the last token, where its input there is x: the whole text runs."""

    def put(_, args):
        return (torch.cat([args[0][:, :-1], x[None, None]], 1), *args[1:])

    handle = model.layout.blocks[block].module.register_forward_pre_hook(put)
    try:
        with opened(model.layout, [block]) as seen:
            model.model.base_model(ids[None], use_cache=False)
    finally:
        handle.remove()
    return seen[block].gave[0, -1]


def at_last(model: LanguageModel, ids: Tensor, block: int) -> Tensor:
    """A block's input at the last token."""
    with torch.no_grad(), opened(model.layout, [block]) as seen:
        model.model.base_model(ids[None], use_cache=False)
    return seen[block].given[0, -1].clone()


@pytest.fixture
def double(monkeypatch):
    """float64 in norms too, which models compute in float32 whatever their own type."""
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_a_jacobian_is_that_of_the_whole_text_by_structure(kind, double):
    """The whole text is run again for every column, so that no kept key or value can hide."""
    model = tiny_language_model(kind)
    model.model.double()
    if "moe" in kind:
        model.model.set_experts_implementation("eager")  # grouped products know no float64
    (text,) = texts(11)
    ids, blocks = torch.tensor(text.ids), (0, 1, 2)
    found = mean_jacobians(HF(model), [text], blocks)
    assert all(matrix.dtype == torch.float64 for matrix in found.values())
    for block in blocks:
        x = at_last(model, ids, block)
        for column in (0, 17):
            step = torch.zeros_like(x)
            step[column] = 1e-5 * x.norm()
            with torch.no_grad():
                far, near = (
                    through_one_block(model, ids, block, x + way * step) for way in (1, -1)
                )
            slope = (far - near) / (2 * step[column])
            torch.testing.assert_close(found[block][:, column], slope, rtol=1e-6, atol=1e-6)


def test_texts_of_all_lengths_are_meaned_by_their_weights():
    engine, rows = HF(tiny_language_model()), texts(3, 12, 7, 2, 9, 5, 4, 8, 6, 30, 11)
    for n, text in enumerate(rows):
        text.record["weight"] = 1.0 + n % 3
    together = mean_jacobians(engine, rows, [1])[1]
    total = sum(text.record["weight"] for text in rows)
    alone = sum(mean_jacobians(engine, [r], [1])[1] * (r.record["weight"] / total) for r in rows)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    plain = sum(mean_jacobians(engine, [r], [1])[1] for r in rows) / len(rows)
    assert (together - plain).norm() > 1e-3 * plain.norm()


def test_products_from_both_sides_are_those_of_the_jacobian():
    engine, rows = HF(tiny_language_model("gemma2")), texts(6, 9, 14)
    looks = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    matrix = mean_jacobians(engine, rows, [2])[2]
    left, right = (
        mean_products(engine, rows, {2: looks}, side=side)[2] for side in ("left", "right")
    )
    torch.testing.assert_close(left, looks @ matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, looks @ matrix.mT, rtol=1e-4, atol=1e-4)


def official(folder, **more) -> tuple[LanguageModel, dict[str, Tensor]]:
    """The tiny model of the authors' case and its tensors."""
    known = load_file(folder / "goldens" / "a-lqr" / "case-tiny-llama.safetensors")
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "intermediate_size": 32,
        "vocab_size": 50,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, **more))
    own = {name[3:]: part for name, part in known.items() if name.startswith("sd.")}
    model.load_state_dict(own, strict=True)
    model.eval().requires_grad_(False)
    return LanguageModel.wrap(model, tiny_tokenizer(), name="official"), known


def test_jacobians_and_their_mean_are_the_authors(shared):
    model, known = official(shared)
    rows = [Read(tuple(ids), len(ids), {"weight": 1.0}) for ids in known["ids_jac"].tolist()]
    for name, some in (("A_prompt0", rows[:1]), ("A_mean", rows)):
        found = mean_jacobians(HF(model), some, range(4))
        matrix = torch.stack([found[block] for block in range(4)])
        torch.testing.assert_close(matrix, known[name], rtol=0, atol=1e-4)
    # Their low-memory path sums over the positions; ours must not.
    assert (matrix - known["A_streamed_prompt0"]).abs().max() > 0.1


# --- what a fit asks -----------------------------------------------------------------------------


def contrast(count: int = 12) -> Contrast:
    """Choices, both sides under one prompt."""
    rows = [
        {"prompt": f"Is {n} even?", "chosen": "Yes", "rejected": "No", "weight": 1 + n % 2}
        for n in range(count)
    ]
    return Contrast.load(rows, behaviour="even", seed=0)


def test_rows_are_what_goes_into_the_blocks_and_hold_the_edits_below():
    engine, own = HF(tiny_language_model()), contrast()
    run = Local(engine, [own], LAYERS)
    acts, outputs = run.rows(), engine.record(own, LAYERS, read="last")
    assert acts.rows.records() and set(acts.sites) == set(LAYERS)
    for side in (0, 1):
        for below, site in ((Site(0), Site(1)), (Site(1), Site(2))):
            sides = [
                a.where(split="train").sides(at)[side] for a, at in ((acts, site), (outputs, below))
            ]
            torch.testing.assert_close(*sides, rtol=1e-5, atol=1e-5)
    shift = half(Site(0))
    moved = run.inputs(shift)
    torch.testing.assert_close(moved.values[Site(0)], acts.values[Site(0)], rtol=0, atol=0)
    gap = moved.values[Site(1)] - acts.values[Site(1)]
    torch.testing.assert_close(gap, torch.full_like(gap, 0.5), rtol=0, atol=1e-5)


def test_edits_act_where_they_are_asked_and_each_place_has_rows_of_its_own(tmp_path):
    """All tokens shift alike under ``all``, as by hand; the kept rows of one scope are not told
    for those of another."""
    model, own = tiny_language_model(), contrast()
    run = Local(HF(model, memo=Memo(tmp_path / "memo")), [own], LAYERS)
    few, every = (run.inputs(half(Site(0)), where=Where(scope)) for scope in ("generated", "all"))
    handle = model.layout.blocks[0].module.register_forward_hook(lambda _, args, out: out + 0.5)
    by_hand = Local(HF(model), [own], LAYERS).inputs()
    handle.remove()
    for site in LAYERS[1:]:
        torch.testing.assert_close(every.values[site], by_hand.values[site], rtol=1e-4, atol=1e-4)
    assert (few.values[Site(2)] - every.values[Site(2)]).abs().max() > 1e-3


def test_the_mean_of_what_is_steered_runs_from_the_prompts_last_token_to_the_end(tmp_path):
    memo = Memo(tmp_path / "memo")
    engine, own = HF(tiny_language_model(), memo=memo), contrast()
    run = Local(engine, [own], LAYERS)
    last, whole = run.inputs(), run.inputs(steered=True)
    assert run.rows() is last
    outputs = engine.record(own, LAYERS, read="span", span=(-1, None))
    for below, site in ((Site(0), Site(1)), (Site(1), Site(2))):
        for n, told in enumerate(whole.rows.records()):
            tokens = (outputs.rows.item == told["item"]) & (outputs.rows.side == told["side"])
            if told["split"] == "train":
                mean = outputs.values[below][tokens].mean(0)
                torch.testing.assert_close(whole.values[site][n], mean, rtol=1e-5, atol=1e-5)
    assert (whole.values[Site(1)] - last.values[Site(1)]).abs().max() > 1e-3
    moved = run.inputs(half(Site(0)), steered=True).values[Site(1)]
    by = moved - whole.values[Site(1)]
    torch.testing.assert_close(by, torch.full_like(by, 0.5), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"no steered token among the \d+ of item .*range:400:"):
        run.inputs(steered=True, where=Where("range", 400))


def half(site: Site) -> Interventions:
    """A shift by 0.5 in every dimension."""
    part = Shift(32)
    part.shifts.fill_(0.5)
    return Interventions({site: part})


def lone() -> Contrast:
    """Requests of two kinds, each with an answer of its own."""
    rows = [
        {
            "prompt": f"Do {n}.",
            "completion": f"No {n}!" if n % 2 else f"Yes, {n} it is.",
            "label": n % 2,
        }
        for n in range(12)
    ]
    return Contrast.load(rows, behaviour="refusal", seed=0)


def test_lone_prompts_are_read_before_any_answer():
    engine, own = HF(tiny_language_model()), lone()
    acts = Local(engine, [own], [Site(1)]).rows()
    before = engine.record(own, [Site(0)], read="span", span=(-1, 0))
    for one, other in zip(acts.sides(Site(1)), before.sides(Site(0)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_lone_prompts_steered_tokens_are_those_of_its_answer_too():
    own = lone()
    engine = HF(tiny_language_model())
    whole = Local(engine, [own], [Site(1)]).inputs(steered=True)
    outputs = engine.record(own, [Site(0)], read="span", span=(-1, None))
    for n, told in enumerate(whole.rows.records()):
        tokens = outputs.values[Site(0)][outputs.rows.item == told["item"]]
        assert told["split"] != "train" or len(tokens) > 3
        if len(tokens):
            torch.testing.assert_close(
                whole.values[Site(1)][n], tokens.mean(0), rtol=1e-5, atol=1e-5
            )


def test_a_low_rank_map_is_as_good_as_its_error_says_and_exact_at_full_rank():
    run = Local(HF(tiny_language_model()), [contrast()], LAYERS)
    exact = run.jacobian(1, prompts=4)
    whole = run.low_rank(1, 32, prompts=4)
    torch.testing.assert_close(whole.dense(), exact, rtol=1e-3, atol=1e-4)
    assert whole.error < 1e-3
    few = run.low_rank(1, 8, prompts=4)
    missing = (few.dense() - exact).norm() / (exact - torch.eye(32)).norm()
    assert 0.05 < few.error < 1 and abs(few.error - missing) < 0.3 * missing
    best = torch.linalg.svdvals(exact - torch.eye(32))
    assert missing <= 1.2 * best[8:].norm() / best.norm()
    assert few.left.shape == (32, 8) and few.right.shape == (8, 32)
    torch.testing.assert_close(run.jacobian(1, prompts=4, rank=8), few.dense())


def test_texts_are_drawn_by_the_seed_and_both_sides_of_an_item_together():
    run = Local(HF(tiny_language_model()), [contrast(30)], [Site(1)])
    acts = run.inputs(most=4)
    assert len(acts) == 8 and run.rows() is acts
    drawn = [set(acts.where(side=side).rows.item) for side in ("source", "target")]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4
    assert drawn[0] != set(run.inputs(most=4, seed=1).rows.item)
    every = run.inputs().where(side="target")
    own = acts.where(side="target")
    place = [list(every.rows.item).index(item) for item in own.rows.item]
    found = every.values[Site(1)][place]
    torch.testing.assert_close(own.values[Site(1)], found, rtol=1e-4, atol=1e-5)
    assert not torch.equal(run.jacobian(1, prompts=4), run.jacobian(1, prompts=4, seed=1))


def test_an_interrupted_fit_goes_on_from_the_blocks_that_are_done(tmp_path):
    memo = Memo(tmp_path / "memo")
    first = Local(HF(tiny_language_model(), memo=memo), [contrast()], LAYERS).jacobian(1)
    made = memo.made
    again = Memo(tmp_path / "memo")
    run = Local(HF(tiny_language_model(), memo=again), [contrast()], LAYERS)
    assert torch.equal(run.jacobian(1), first) and torch.equal(run.jacobian(2), run.jacobian(2))
    assert made > 0 and again.made == 0, "the neighbours were done with it"


def test_a_pass_leaves_model_and_gradients_as_they_were():
    model = tiny_language_model()
    ids = torch.tensor([texts(7)[0].ids])
    before = model.model(ids).logits
    mean_jacobians(HF(model), texts(5, 6), [0, 3])
    assert torch.equal(model.model(ids).logits, before)
    assert all(parameter.grad is None for parameter in model.model.parameters())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda run: run.jacobian(3), "block 3"),
        (lambda run: run.jacobian(1, prompts=0), "over 0 texts"),
        (lambda run: run.jacobian(1, rank=33), "rank=33"),
    ],
)
def test_what_cannot_be_asked_is_refused(call, match):
    with pytest.raises(InputError, match=match):
        call(Local(HF(tiny_language_model()), [contrast()], LAYERS))


@pytest.mark.parametrize(
    ("contrasts", "sites", "match"),
    [
        ([], LAYERS, "none"),
        ([contrast(), contrast()], LAYERS, "even, even"),
        ([contrast()], [], "none"),
        ([contrast()], [Site(1, "mlp")], "1.mlp"),
        ([contrast()], [Site(9)], "layer 9"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(contrasts, sites, match):
    with pytest.raises(InputError, match=match):
        Local(HF(tiny_language_model()), contrasts, sites)


def test_a_block_that_cannot_be_differentiated_is_refused_by_name(monkeypatch):
    model = tiny_language_model()
    mlp = model.layout.blocks[1].mlp
    whole = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda h: whole(h.detach()))
    attention = model.layout.blocks[1].module
    own = attention.forward
    monkeypatch.setattr(attention, "forward", lambda h, **how: own(h.detach(), **how))
    with pytest.raises(LayoutError, match="block 1 cannot be linearised"):
        mean_jacobians(HF(model), texts(5), [1])


def test_a_run_through_the_model_sees_the_same_chain():
    engine, own = HF(tiny_language_model()), contrast()
    told: list[str] = []
    run = Through(engine, [own], LAYERS, progress=lambda stage, *_: told.append(stage))
    alone = Local(engine, [own.train], LAYERS)
    for site in LAYERS:
        assert torch.equal(run.inputs().values[site], alone.inputs().values[site])
    assert torch.equal(run.jacobian(1, prompts=3), alone.jacobian(1, prompts=3))
    assert {"rows", "jacobians"} <= set(told), "minutes that are not silent"


def test_a_text_of_one_token_is_refused_with_its_field(monkeypatch):
    engine = HF(tiny_language_model())
    monkeypatch.setattr(LanguageModel, "encode", lambda *_, **how: Encoded((5,), 0, ()))
    with pytest.raises(InputError, match="one token.*lengthen its prompt, or leave"):
        Local(engine, [contrast()], LAYERS)
