"""FLAS: the authors' numbers, Euler's, and that a field is what its cache makes of it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache

import tiny
from edits import seen
from innsteer.activations import Activations
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.blocks import copy_block
from innsteer.backends.hf import HF
from innsteer.backends.told import Told
from innsteer.concepts import Concepts
from innsteer.contrast import Contrast, Item
from innsteer.errors import FormatError, InputError, LayoutError
from innsteer.evaluation import _by_rows
from innsteer.exchange import as_vector
from innsteer.fitting import fit, fit_concepts
from innsteer.hooks import Attachment
from innsteer.site import Site, Where
from innsteer.steerer import USABLE, Interventions
from innsteer.steerers.flas import FLAS, GATE, Field, Learner, Shape, diversity, shape_of
from innsteer.steering import Steering
from innsteer.tokens import TokenContext

FAR = {"rtol": 0, "atol": 1e-4}


def rows_of(h, mask=None, *, start=0, keep=None, memory=None, position=None):
    """The context of a batch ``[requests, time, d]``, and its rows."""
    batch, time = h.shape[:2]
    real = torch.ones(batch, time, dtype=torch.bool) if mask is None else mask.bool()
    request, column = real.nonzero().unbind(1)
    at = (torch.arange(start, start + time).expand(batch, -1) if position is None else position)[
        real
    ]
    kept = {} if keep is None else {"keep": keep}
    context = TokenContext(request, column, at, at >= 0, at, batch, time, memory or {}, **kept)
    return context, h[real], real


class Kept(dict):
    """What an engine keeps between passes."""

    def __call__(self, name, keys, values):
        old = self.get(name, (keys[:, :0], values[:, :0]))
        self[name] = tuple(torch.cat(both, 1) for both in zip(old, (keys, values), strict=True))
        return self[name]


# --- the authors' field --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(shared):
    """Their tensors, and the field with their weights."""
    folder = shared / "goldens" / "flas"
    (case,) = json.loads((folder / "case.json").read_text())["cases"]
    told, tensors = case["params"], load_file(folder / case["file"])
    shape = Shape(told["heads"], told["kv_heads"], told["head_dim"], told["intermediate"])
    shape = shape._replace(rope=told["head_dim"] // 2)
    field = Field(told["hidden"], shape, blocks=told["blocks"])
    field.load_state_dict(ours({n[3:]: t for n, t in tensors.items() if n[:3] == "sd."}, told))
    return tensors, field.requires_grad_(False)


def ours(theirs, told):
    """Their names as ours."""
    half = torch.arange(0, told["head_dim"], 2) / told["head_dim"]
    scale = told["head_dim"] ** -0.5
    found = {
        "numbers": torch.tensor([told["rms_eps"], scale, 1.0, 1.0]),
        "rope": told["rope_theta"] ** -half,
    }
    kinds = {"cross": "concept", "sa": "past", "mlp": "mlp"}
    for name, tensor in theirs.items():
        *head, last = name.split(".")
        if head[0] == "time_embed":
            found[f"time.{head[2]}.{last}"] = tensor
        elif head[-1] == "rotary_emb":
            continue
        elif name.endswith("_gate"):
            kind = {"cross": "concept", "self_attn": "past", "mlp": "mlp"}[last[:-5]]
            found[f"blocks.{head[1]}.gates.{kind}"] = tensor
        else:
            block, *path = head[1:]
            where = ".".join(path)
            for place in ("pre", "post"):
                for theirs_, kind in kinds.items():
                    side = {"pre": "before", "post": "after"}[place]
                    where = where.replace(f"{place}_{theirs_}_norm", f"{side}.{kind}")
            where = where.replace("cross_attn", "concept").replace("self_attn", "past")
            found[f"blocks.{block}.{where.replace('_proj', '')}.{last}"] = tensor
    return found


def encoded(field, golden):
    """The memory of their two concepts."""
    parts = []
    for states, mask in zip(golden["concept"], golden["concept_mask"], strict=True):
        n = int(mask.sum())
        parts.append(field.prepare({"concept": "x"}, lambda *_, s=states, n=n: s[:n]))
    return {
        name: nn.utils.rnn.pad_sequence([part[name] for part in parts], batch_first=True)
        for name in parts[0]
    }


def steered(field, golden, mask=None, position=None, span=slice(None), keep=None):
    h = golden["h"][:, span]
    start = span.start or 0
    memory = encoded(field, golden)
    tokens, rows, real = rows_of(h, mask, start=start, keep=keep, memory=memory, position=position)
    out = h.clone()
    out[real] = field.steer(rows, golden["flowtimes"][tokens.request, None], tokens)
    return out


def test_the_golden_time_embedding(golden):
    tensors, field = golden
    torch.testing.assert_close(field.embed(torch.tensor([[0.7]])), tensors["time_emb"], **FAR)


@pytest.mark.parametrize("time", ["0", "0.7"])
def test_the_golden_velocity(golden, time):
    tensors, field = golden
    tokens, rows, _ = rows_of(tensors["h"], memory=encoded(field, tensors))
    tokens = tokens.seeing(torch.ones(len(rows), dtype=torch.bool))
    found = field.velocity(rows, torch.full((len(rows), 1), float(time)), tokens)
    torch.testing.assert_close(found.reshape(tensors["h"].shape), tensors[f"v_t{time}"], **FAR)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_golden_flow(golden, steps):
    tensors, field = golden
    field.steps = steps
    try:
        found = steered(field, tensors)
    finally:
        field.steps = 3
    torch.testing.assert_close(found, tensors[f"h_flow_N{steps}"], **FAR)


def test_the_golden_flow_of_padded_rows(golden):
    tensors, field = golden
    mask = tensors["padding_mask"]
    found = steered(field, tensors, mask, tensors["position_ids"])
    real = mask.bool()
    torch.testing.assert_close(found[real], tensors["h_flow_padded_N3"][real], **FAR)


def test_the_golden_decoding(golden):
    tensors, field = golden
    keep = Kept()
    spans = [slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)]
    parts = [steered(field, tensors, span=span, keep=keep) for span in spans]
    torch.testing.assert_close(torch.cat(parts, 1), tensors["h_decode_N3"], **FAR)


# --- numbers by hand -----------------------------------------------------------------------------


class Given(Field):
    """A field whose velocity is written down."""

    def __init__(self, velocity, steps):
        super().__init__(4, Shape(), steps=steps)
        self.given = velocity

    def velocity(self, h, time, tokens, step=0):
        return self.given(h, time)


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("strength", [-1.0, 0.5, 2.0])
def test_a_constant_velocity_carries_as_far_as_the_strength(steps, strength):
    push = torch.tensor([1.0, -2.0, 0.0, 4.0])
    tokens, rows, _ = rows_of(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)))
    part = Given(lambda h, time: push.expand_as(h), steps)
    moved = part.steer(rows, torch.full((6, 1), strength), tokens)
    torch.testing.assert_close(moved, rows + strength * push)


@pytest.mark.parametrize(("steps", "left"), [(1, 0.0), (3, 0.2963), (10, 0.3487)])
def test_a_decaying_velocity_leaves_what_euler_leaves(steps, left):
    tokens, rows, _ = rows_of(torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)))
    part = Given(lambda h, time: -h, steps)
    moved = part.steer(rows, torch.ones(5, 1), tokens)
    torch.testing.assert_close(moved, left * rows, rtol=0, atol=1e-4 * float(rows.abs().max()))


def test_time_runs_from_0_in_equal_steps_to_below_the_strength():
    seen = []
    tokens, rows, _ = rows_of(torch.ones(1, 2, 4))

    def velocity(h, time):
        seen.append(time.flatten().tolist())
        return torch.zeros_like(h)

    Given(velocity, 3).steer(rows, torch.tensor([[3.0], [1.5]]), tokens)
    assert seen == [[0.0, 0.0], [1.0, 0.5], [2.0, 1.0]]


@pytest.mark.parametrize(
    ("ways", "value"),
    [([[1.0, 2.0], [2.0, 4.0]], 1.0), ([[1.0, 0.0], [0.0, 3.0]], 0.0), ([[1, 1.0], [-2, -2]], -1)],
)
def test_diversity_of_two_concepts(ways, value):
    found = diversity(torch.tensor(ways), torch.tensor([4.0, 7.0]))
    assert float(found) == pytest.approx(value, abs=1e-6)


def test_diversity_looks_at_different_concepts_alone():
    ways = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert float(diversity(ways, torch.tensor([1.0, 1.0, 2.0]))) == 0.0
    assert float(diversity(ways[:2], torch.tensor([1.0, 1.0]))) == 0.0


# --- from the base model's block -----------------------------------------------------------------

LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite")


@pytest.fixture(scope="module")
def llama():
    return tiny.tiny_language_model()


def started(model, layer=1, **fields):
    """A steering whose field starts from a model's block, and is then made to do something."""
    block = copy_block(model, layer)
    method = FLAS(**fields)
    field = Field(
        model.layout.width,
        shape_of(block),
        blocks=method.blocks,
        steps=method.steps,
        encoder=method.encoder,
    )
    field.start(block, 1.0, torch.Generator().manual_seed(0))
    maps = Interventions({Site(layer): field.requires_grad_(False)})
    return Steering(method, maps, ("concept",), Where("all"), model.fingerprint)


@pytest.mark.parametrize("kind", LLAMAS)
def test_a_field_without_concept_whose_gates_are_open_is_the_base_models_block(kind):
    """Weights, norms, rotation, scale and limit of logits, activation: all of the block's own."""
    model = tiny.tiny_language_model(kind)
    for layer in (0, 1):
        field = started(model, layer).interventions[Site(layer)]
        (own,) = field.blocks
        names = {"past": "attention_after", "mlp": "mlp_after"}
        there = copy_block(model, layer).weights
        for part, name in names.items():
            if name not in there:
                own.after[part] = Same()
            own.gates[part].fill_(0.7 if kind == "granite" else 1.0)  # its residual multiplier
        own.gates["concept"].zero_()
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        block = model.layout.blocks[layer].module
        with torch.no_grad(), seen(model, Site(layer)) as after:
            given = []
            handle = block.register_forward_pre_hook(lambda _, args: given.append(args[0]))
            model.model(ids, use_cache=False)
            handle.remove()
        memory = field.prepare({"concept": "x"}, model.states)
        memory = {name: value.unsqueeze(0) for name, value in memory.items()}
        tokens, rows, _ = rows_of(given[0], memory=memory)
        tokens = tokens.seeing(torch.ones(5, dtype=torch.bool))
        found = rows + field.velocity(rows, torch.zeros(5, 1), tokens)
        torch.testing.assert_close(found, after[0][0], rtol=0, atol=2e-5)


class Same(nn.Module):
    """A norm that is none."""

    def forward(self, x, eps):
        return x


@pytest.mark.parametrize(
    ("kind", "match"),
    [("gpt2", "q_proj"), ("neox", "q_proj"), ("phi3", "q_proj"), ("olmo2", "before attention")]
    + [("qwen3_moe", "gate_proj")],
)
def test_a_block_of_another_build_is_refused(kind, match):
    with pytest.raises(LayoutError, match=match):
        copy_block(tiny.tiny_language_model(kind), 1)


def test_a_layer_that_is_not_there_is_refused(llama):
    with pytest.raises(InputError, match="0 to 3"):
        copy_block(llama, 4)


def test_a_fresh_field_is_small_but_not_nothing(llama):
    field = started(llama).interventions[Site(1)]
    ids = torch.tensor([[5, 6, 7, 8]])
    with seen(llama, Site(1)) as plain:
        llama.model(ids)
    with started(llama).told(concept="brave").on(llama, 1.0), seen(llama, Site(1)) as moved:
        llama.model(ids)
    share = (moved[0] - plain[0]).norm() / plain[0].norm()
    assert 1e-3 < share < 0.5
    assert field.blocks[0].gates["mlp"].eq(GATE).all()


def test_closed_gates_and_a_silent_clock_are_no_edit(llama):
    steering = started(llama)
    for gate in steering.interventions[Site(1)].blocks[0].gates.values():
        gate.zero_()
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = llama.model(ids).logits
    with steering.told(concept="brave").on(llama, 2.0):
        found = llama.model(ids).logits
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


# --- on the engine -------------------------------------------------------------------------------


def awake(model, **fields):
    """A field with open gates and a clock that runs, so that every part of it shows."""
    steering = started(model, **fields)
    draw = torch.Generator().manual_seed(1)
    for name, weight in steering.interventions[Site(1)].named_parameters():
        if ".gates." in name:
            weight.fill_(0.5)
        elif name.startswith("time.2"):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=draw))
    return steering


@pytest.mark.parametrize("kind", LLAMAS)
@pytest.mark.parametrize("blocks", [1, 2])
def test_decoding_token_by_token_is_one_pass(kind, blocks):
    model = tiny.tiny_language_model(kind)
    edit = awake(model, blocks=blocks).told(concept="a pirate").edit(2.0)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [9, 8, 7, 6, 5, 4, 3]])
    with Attachment(model, [edit]):
        want = model.model(ids, use_cache=False).logits
    cache, parts = DynamicCache(config=model.model.config), []
    with Attachment(model, [edit]):
        for part in (slice(0, 3), *(slice(n, n + 1) for n in range(3, 7))):
            parts.append(model.model(ids[:, part], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, **FAR)
    assert (want - model.model(ids).logits).abs().max() > 0.1


def test_steps_that_share_a_cache_are_noticed(llama, monkeypatch):
    steering = awake(llama).told(concept="a pirate")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])

    def cached():
        cache, parts = DynamicCache(), []
        with steering.on(llama, 2.0):
            for n in range(6):
                parts.append(llama.model(ids[:, n : n + 1], past_key_values=cache).logits)
        return torch.cat(parts, 1)

    with steering.on(llama, 2.0):
        want = llama.model(ids, use_cache=False).logits
    torch.testing.assert_close(cached(), want, **FAR)
    own = Field.velocity
    monkeypatch.setattr(Field, "velocity", lambda s, h, t, tokens, step=0: own(s, h, t, tokens, 0))
    assert (cached() - want).abs().max() > 0.01


def test_a_concept_and_a_strength_say_what_happens(llama):
    steering, ids = awake(llama), torch.tensor([[5, 6, 7, 8]])
    found = {}
    for concept, strength in (("brave", 1.0), ("shy", 1.0), ("brave", 2.0)):
        with steering.told(concept=concept).on(llama, strength):
            found[concept, strength] = llama.model(ids).logits
    values = list(found.values())
    for one in range(3):
        for other in range(one):
            assert (values[one] - values[other]).abs().max() > 1e-3


def test_requests_with_concepts_of_their_own_share_a_batch(llama):
    edit = awake(llama).edit(
        [1.0, 2.0], parameters=[{"concept": "brave"}, {"concept": "quite shy"}]
    )
    prompts = [Prompt("0", "Hello"), Prompt("1", "A longer question?")]
    both = HF(llama).generate(prompts, [edit], Sampling(6))
    for n, prompt in enumerate(prompts):
        (alone,) = HF(llama).generate([prompt], [edit.of([n])], Sampling(6))
        assert alone.text == both[n].text


def test_saving_keeps_the_field(llama, tmp_path):
    steering = awake(llama, blocks=2, steps=2, encoder=1)
    loaded = Steering.load(steering.save(tmp_path / "it"))
    assert loaded.identity == steering.identity and loaded.steerer == steering.steerer
    ids = torch.tensor([[5, 6, 7, 8]])
    outs = []
    for one in (steering, loaded):
        with one.told(concept="brave").on(llama, 2.0):
            outs.append(llama.model(ids).logits)
    assert torch.equal(*outs)


def test_a_field_that_was_told_no_concept_is_refused(llama):
    with pytest.raises(InputError, match="concept, some text"):
        awake(llama).edit(1.0)


def test_a_field_that_was_told_no_concept_is_not_exported(llama):
    contrast = Contrast("concept", "open", (Item("0", "Well?", "no", "yes", None, "0"),))
    with pytest.raises(InputError, match="concept, some text"):
        as_vector(llama, awake(llama), contrast)


def test_no_figure_is_drawn_from_rows_alone(llama):
    assert not _by_rows(awake(llama).told(concept="brave"))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"steps": 0}, "steps=0"),
        ({"updates": 1_000_001}, "updates=1000001; expected 1 to 1,000,000"),
        ({"least": 2.0, "most": 1.0}, "least"),
        ({"least": 0.0}, "least"),
        ({"diversity": -1.0}, "diversity"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, match):
    with pytest.raises(InputError, match=match):
        FLAS(**fields)


@pytest.mark.parametrize(
    ("widths", "k", "sizes"),
    [
        ({Site(1): 4, Site(2): 4}, 1, {}),
        ({Site(1): 4}, 2, {}),
        ({Site(1): 4}, 1, {"1.residual.heads": 3, "1.residual.kv_heads": 2}),
        ({Site(1): 4}, 1, {"1.residual.rope": 9}),
        ({Site(1): 4}, 1, {"1.residual.activation": 9}),
    ],
)
def test_a_field_of_another_form_is_refused(widths, k, sizes):
    with pytest.raises(InputError):
        FLAS().build(widths, k, sizes)


def test_rows_alone_do_not_say_what_a_concept_means():
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="innsteer fit TABLE"):
        FLAS().fit(Activations.of_sides(rows, rows + 1))


# --- learning ------------------------------------------------------------------------------------

SAID = {"AAAA": "aaaaaaaaaaaa", "zoo": "zzzzzzzzzzzz"}


def taught(llama, split=("train", "train", "train", "validation"), **how):
    """A table of two concepts whose responses have nothing in common, and a run on it."""
    table = Concepts.of(
        [
            {"concept": c, "prompt": f"Q{n}?", "response": text[: 8 + n], "split": part}
            for c, text in SAID.items()
            for n, part in enumerate(split)
        ]
    )
    return table, Told(HF(llama), table, Site(1), **how)


QUICK = {"updates": 60, "batch": 4, "parts": 2, "warmup": 4, "learning_rate": 3e-2, "every": 10}
QUICK |= {"patience": 0}


@pytest.fixture(scope="module")
def learnt(llama):
    table, _ = taught(llama)
    return fit_concepts(llama, table, site=Site(1), **QUICK)


def test_a_field_learns_what_its_concepts_say(learnt, llama):
    told = learnt.provenance["diagnostics"]
    assert told["concept"] > told["plain"] + 2, "the loss has not fallen"
    assert told["concept"] > told["other"] + 1, "the concept's text does not matter"
    table, run = taught(llama)
    held, maps = run.items("validation"), learnt.interventions
    plain = run.told(None, held, [1.0] * len(held)).mean()
    above = [bool(run.told(maps, held, [s] * len(held)).mean() > plain) for s in USABLE]
    ones = list(USABLE).index(1.0)
    low = max((n for n in range(ones) if not above[n]), default=-1) + 1
    high = min((n for n in range(ones, len(USABLE)) if not above[n]), default=len(USABLE)) - 1
    assert (told["usable_from"], told["usable_to"]) == (USABLE[low], USABLE[high])
    course = learnt.provenance["course"]
    assert course["steps"] == [0, 10, 20, 30, 40, 50, 60] and course["gradients"] == 240
    best = min(course["held_out"])
    assert course["held_out"][course["kept"] // 10] == best < course["held_out"][0] - 2
    prompts = [Prompt(c, "Q9?") for c in SAID]
    edit = learnt.edit(1.0, parameters=[{"concept": c} for c in SAID])
    for (_, text), answer in zip(SAID.items(), HF(llama).generate(prompts, [edit]), strict=True):
        assert answer.text.count(text[0]) > 0.8 * len(answer.text) > 0


def test_the_same_table_and_seed_give_one_field(learnt, llama):
    table, _ = taught(llama)
    dice = torch.get_rng_state()
    again = fit_concepts(llama, table, site=Site(1), **QUICK)
    other = fit_concepts(llama, table, site=Site(1), seed=1, **QUICK | {"updates": 2})
    assert torch.equal(torch.get_rng_state(), dice)
    assert again.identity == learnt.identity != other.identity


def test_an_interrupted_training_goes_on_to_the_same_field(learnt, llama, tmp_path):
    table, _ = taught(llama)
    path = tmp_path / "training.safetensors"
    seen = []

    def stop(stage, done, total):
        seen.append((stage, done))
        if done == 25 and len(seen) < 60:
            raise KeyboardInterrupt

    for _ in range(2):
        try:
            found = fit_concepts(
                llama, table, site=Site(1), checkpoint=path, progress=stop, **QUICK
            )
        except KeyboardInterrupt:
            seen += [("interrupted", 0)] * 60
    assert seen.count(("train", 20)) == 2 and seen.count(("train", 5)) == 1
    assert found.identity == learnt.identity
    with pytest.raises(InputError, match="another training"):
        fit_concepts(llama, table, site=Site(1), checkpoint=path, seed=1, **QUICK)
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="no checkpoint"):
        fit_concepts(llama, table, site=Site(1), checkpoint=path, **QUICK)


@pytest.mark.parametrize(
    "other",
    [{"diversity": 0.2}, {"least": 0.6}, {"most": 1.9}, {"steps": 2}, {"encoder": 1}],
    ids=lambda other: next(iter(other)),
)
def test_a_training_does_not_go_on_under_other_settings(llama, tmp_path, other):
    brief = QUICK | {"updates": 1, "warmup": 0}
    _, run = taught(llama, checkpoint=tmp_path / "training.safetensors")
    FLAS(**brief).fit_told(run)
    FLAS(**brief | {"patience": 3}).fit_told(run)  # when to stop may be thought over
    with pytest.raises(InputError, match="another training"):
        FLAS(**brief | other).fit_told(run)


def test_training_draws_strengths_between_its_ends_and_validates_at_one(llama):
    table, run = taught(llama)
    asked = {True: set(), False: set()}
    own = run.told

    def told(maps, items, strengths, concepts=()):
        asked[torch.is_grad_enabled()].update(strengths)
        return own(maps, items, strengths, concepts)

    run.told = told
    FLAS(**QUICK | {"least": 0.7, "most": 1.4}).fit_told(run)
    drawn = sorted(asked[True])
    assert len(drawn) > 10 and 0.7 <= drawn[0] < 0.8 and 1.3 < drawn[-1] <= 1.4
    assert asked[False] == {1.0}


def test_the_term_of_diversity_drives_concepts_apart(llama):
    """Mean cosine between the two concepts' velocities after a training with it, and without."""

    def cosine(weight):
        _, run = taught(llama)
        field = FLAS(**QUICK | {"updates": 10, "diversity": weight}).fit_told(run)[Site(1)]
        learner = Learner(field.width, field.shape)
        learner.load_state_dict(field.state_dict())
        learner.seen = []
        with torch.no_grad():
            run.told(Interventions({Site(1): learner}), [0, 4], [1.0, 1.0])
        return float(diversity(*(torch.cat(part) for part in zip(*learner.seen, strict=True))))

    assert cosine(5.0) < cosine(0.0) - 0.1


def test_a_contrast_is_no_table_of_concepts(llama):
    with pytest.raises(InputError, match="innsteer fit TABLE"):
        fit(llama, Contrast.load("critical"), "flas")
    with pytest.raises(InputError, match="such as flas"):
        fit_concepts(llama, taught(llama)[0], "diffmean")


def test_one_concept_alone_has_no_other_to_be_told(llama):
    rows = [{"concept": "zoo", "prompt": f"Q{n}?", "response": "zzzz"} for n in range(3)]
    table = Concepts.of([row | {"split": "train"} for row in rows])
    found = fit_concepts(llama, table, site=Site(1), **QUICK | {"updates": 1})
    assert {"concept", "plain"} <= set(found.provenance["diagnostics"])
    assert "other" not in found.provenance["diagnostics"]
