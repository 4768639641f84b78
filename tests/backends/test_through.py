"""Through: what a fit sees of the model, against the engine's figures and finite differences."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from edits import hooks_of, seen, shift, told
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.backends.through import Through
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError
from innsteer.hooks import Attachment
from innsteer.interventions import Edit, Shift
from innsteer.site import Site, Where
from innsteer.steerer import Intervention, Interventions

LOW, HIGH = Site(1), Site(2, "mlp")
BOTH = (LOW, HIGH)
NEUTRAL = [
    Prompt("a", "Is it so?"),
    Prompt("b", "What?"),
    Prompt("c", "A longer question than the others are?"),
]
QUESTIONS = (
    "Is tea hot?",
    "Is rain dry, as all people in this town say?",
    "Ice?",
    "Is iron soft?",
    "Do wolves sing at night?",
)


def choice(name="yes", answers=("Y", "N"), *, turned=False):
    """Questions of different lengths; the two answers match in turn."""
    items = []
    for n, question in enumerate(QUESTIONS):
        target, source = answers if (n % 2 == 0) != turned else answers[::-1]
        split = "validation" if n == 4 else "train"
        key = target.strip()
        items.append(Item(f"{n}", question, source, target, key, f"g{n}", split, weight=1.0 + n))
    return Contrast(name, "choice", tuple(items))


def free(name="formal"):
    """Open answers of several tokens; of the first items' both begin alike."""
    texts = ("tea", "rain", "a very long thing to ask", "wool")
    items = [
        Item(f"{n}", f"{w}: what is it?", f"{w} mate.", f"Sir, {w} it is.", None, w)
        for n, w in enumerate(texts)
    ]
    items[0] = replace(items[0], target="tea, Sir.")
    items.append(Item("half", "Who?", None, "Sir.", None, "half"))
    return Contrast(name, "open", tuple(items))


def bare(model):
    """The tiny model without a template: prompts share no first token."""
    model.tokenizer.chat_template = None
    model.tokenizer.add_bos_token = False
    return model


@pytest.fixture(scope="module", params=tiny.KINDS)
def model(request):
    return tiny.tiny_language_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny.tiny_language_model("llama")


def unmoved(model, sampling=None):
    return [HF(model).reference(NEUTRAL, sampling)]


def summed(model, contrast, maps, coef):
    """Sums of the engine's scores, target and source, of items with both sides."""
    items = [item for item in contrast.items if item.source is not None]
    prompts = [Prompt(item.id, item.prompt, (item.target, item.source)) for item in items]
    edits = [] if maps is None else [Edit(maps, coef, Where("generated"))]
    found = HF(model).score(prompts, edits)
    return torch.tensor([[sum(answer) for answer in row] for row in found]).unbind(1)


def close(got, want, atol=2e-4):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixed", [True, False], ids=["shared prefix", "no shared prefix"])
@pytest.mark.parametrize("sites", [(LOW,), BOTH, (Site(2),)], ids=["one", "two", "high"])
@pytest.mark.parametrize(
    "contrast",
    [choice(), choice(answers=(" Yes", " No")), free()],
    ids=["choice", "answers that begin alike", "open"],
)
def test_answers_are_the_sums_of_the_engines_scores(model, contrast, sites, prefixed):
    if not prefixed:
        model = bare(tiny.tiny_language_model(model.name.removeprefix("tiny-")))
    run = Through(HF(model, batch_tokens=90), [contrast], sites)
    assert (run._shared > 0) is prefixed
    numbers = run.items("train") + run.items("validation")
    maps = shift(model, *sites)
    for used, strength in ((None, 1.0), (maps, 0.0), (maps, 0.5), (maps, -1.0)):
        got = run.answers(used, numbers, [strength] * len(numbers))
        want = summed(model, contrast, used, torch.tensor([strength]))
        for side in (0, 1):
            close(got[side], want[side])


def test_the_last_block_can_be_steered_too(model):
    site = Site(len(model.layout.blocks) - 1)
    run = Through(HF(model), [choice()], [site], unmoved(model))
    maps = shift(model, site)
    got = run.answers(maps, [0, 1, 2, 3, 4], [0.5] * 5)
    close(got.target, summed(model, choice(), maps, torch.tensor([0.5]))[0])
    assert run.rows().widths == {site: tiny.WIDTH}


@pytest.mark.parametrize("prefixed", [True, False], ids=["shared prefix", "no shared prefix"])
@pytest.mark.parametrize("contrast", [choice(), free()], ids=["choice", "open"])
def test_maps_that_read_the_prompt_are_told_what_the_engine_tells_them(model, contrast, prefixed):
    if not prefixed:
        model = bare(tiny.tiny_language_model(model.name.removeprefix("tiny-")))
    run = Through(HF(model, batch_tokens=90), [contrast], BOTH)
    numbers, maps = run.items("train") + run.items("validation"), told(model, *BOTH)
    got = run.answers(maps, numbers, [0.5] * len(numbers))
    want = summed(model, contrast, maps, torch.tensor([0.5]))
    plain = run.answers(None, numbers, [0.5] * len(numbers))
    for side in (0, 1):
        close(got[side], want[side])
        assert (got[side] - plain[side]).abs().max() > 0.1


def test_a_run_takes_over_what_another_kept(llama, monkeypatch):
    first = Through(HF(llama), [choice()], [LOW], unmoved(llama))
    plain = Through(HF(llama), [free(), choice()], [LOW], unmoved(llama))
    ran = []
    real = Through._base_model
    monkeypatch.setattr(
        Through, "_base_model", lambda self, ids, *rest: (ran.append(ids), real(self, ids, *rest))
    )
    taken = Through(HF(llama), [free(), choice()], [LOW], unmoved(llama), like=first)
    own = len(taken._sequences) - sum(map(len, (QUESTIONS, NEUTRAL)))
    assert sum(map(len, ran[1:])) == own > 0  # the first is the shared prefix
    maps, numbers = shift(llama, LOW, k=2), plain.items()
    coef = torch.full((len(numbers), 2), 0.5)
    want, got = (one.answers(maps, numbers, coef) for one in (plain, taken))
    for side in (0, 1):
        close(got[side], want[side])
    close(taken.rows().context[LOW], plain.rows().context[LOW])
    # Nothing at all is left to run.
    whole = Through(HF(llama), [free(), choice()], [LOW], unmoved(llama), like=taken)
    close(whole.answers(maps, numbers, coef).target, want.target)
    elsewhere = Through(HF(llama), [choice()], [Site(2)], like=first)
    close(
        elsewhere.rows().values[Site(2)],
        Through(HF(llama), [choice()], [Site(2)]).rows().values[Site(2)],
    )


def test_a_continuation_that_ends_at_once_is_no_bare_prompt(llama):
    reference = HF(llama).reference(NEUTRAL, None)
    ids = tuple((*row, tiny.EOS) for row in reference.ids)
    run = Through(HF(llama), [choice()], [LOW], [replace(reference, ids=ids)])
    assert len(run.unmoved) == 3 and len(run.rows().unmoved(LOW)) == 0
    assert len(Through(HF(llama), [choice()], [LOW], [reference]).rows().unmoved(LOW)) == 3


def test_rows_bring_the_context_of_each_prompt(llama):
    run = Through(HF(llama), [choice()], BOTH, unmoved(llama))
    acts, count = run.rows(), len(QUESTIONS)
    prompts = [*QUESTIONS, *QUESTIONS, *(prompt.conversation for prompt in NEUTRAL)]
    for site in BOTH:
        for row, prompt in zip(acts.context[site], prompts, strict=True):
            ids = llama.encode(prompt).ids
            with seen(llama, site) as held:
                llama.model(torch.tensor([ids]))
            close(row, held[0][0, max(1, len(ids) - 65) : -1].mean(0), atol=2e-5)
        assert torch.equal(acts.context[site][:count], acts.context[site][count : 2 * count])


def test_the_strength_of_an_item_goes_into_the_column_of_its_behaviour(model):
    contrasts = [choice(), free(), choice("no", turned=True)]
    run = Through(HF(model), contrasts, BOTH)
    maps = shift(model, *BOTH, k=3)
    numbers = [n for name in run.behaviours for n in run.items("train", name)]
    got = run.answers(maps, numbers, [0.5] * len(numbers))
    start = 0
    for column, contrast in enumerate(contrasts):
        one = torch.zeros(3)
        one[column] = 0.5
        count = len(run.items("train", contrast.behaviour))
        want = summed(model, contrast, maps, one)
        for side in (0, 1):
            close(got[side][start : start + count], want[side][:count])
        start += count
    assert start == len(numbers) == 4 + 4 + 4


def test_whole_rows_of_coefficients_mix_behaviours(llama):
    run = Through(HF(llama), [choice(), free()], BOTH)
    maps, numbers = shift(llama, *BOTH, k=2), run.items("train", "yes")
    coef = torch.tensor([[0.5, -1.0], [0.0, 1.0], [0.7, 0.0], [-0.2, 0.3]])
    got = run.answers(maps, numbers, coef)
    want = summed(llama, choice(), maps, torch.cat([coef, coef[:1]]))
    for side in (0, 1):
        close(got[side], want[side][:4])


def test_a_side_that_is_not_wanted_takes_no_tokens(llama):
    run = Through(HF(llama), [free()], [LOW])
    maps, numbers = shift(llama, LOW), [1, 2, 3]
    both, sizes = run.answers(maps, numbers, [1.0] * 3), []
    block = llama.layout.blocks[2].module
    with block.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:2].numel())):
        part = run.answers(maps, numbers, [1.0] * 3, only=[0, 1, 0])
        once, sizes[:] = sum(sizes), []
        run.answers(maps, numbers, [1.0] * 3)
    close(part.target[[0, 2]], both.target[[0, 2]], atol=1e-5)
    close(part.source[1], both.source[1], atol=1e-5)
    assert part.source[[0, 2]].tolist() == [0, 0] and part.target[1] == 0
    assert once < 0.7 * sum(sizes)


def test_an_item_can_be_asked_at_several_strengths_at_once_in_any_order(llama):
    run = Through(HF(llama), [free()], [LOW])
    maps = shift(llama, LOW)
    asked = [(2, 0.5), (0, -1.0), (2, -0.5), (2, 0.5), (1, 0.0)]
    got = run.answers(maps, [n for n, _ in asked], [s for _, s in asked])
    for slot, (number, strength) in enumerate(asked):
        alone = run.answers(maps, [number], [strength])
        for side in (0, 1):
            close(got[side][slot], alone[side][0], atol=1e-5)
    assert got.target[0] != got.target[2]


def test_answers_do_not_depend_on_the_passes(llama, monkeypatch):
    run = Through(HF(llama), [free()], [LOW])
    maps, numbers = shift(llama, LOW), [0, 1, 2, 3]
    together = run.answers(maps, numbers, [1.0] * 4)
    monkeypatch.setattr("innsteer.backends.through.TOKENS", 1)
    apart = run.answers(maps, numbers, [1.0] * 4)
    close(torch.stack(apart), torch.stack(together), atol=1e-5)


def test_items_and_keys_go_by_part_and_behaviour(llama):
    run = Through(HF(llama), [free(), choice()], [LOW])
    assert run.items("train", "formal") == [0, 1, 2, 3]  # the item of one side is left out
    assert run.items("train", "yes") == [4, 5, 6, 7] and run.items("validation") == [8]
    assert run.keys([0, 4, 5, 8]) == ["", "Y", "N", "Y"]


def test_only_the_blocks_above_the_lowest_site_run_and_only_for_steered_tokens(llama):
    run, widths, below = Through(HF(llama), [choice()], [LOW]), [], []
    blocks = llama.layout.blocks
    above = blocks[2].module.register_forward_pre_hook(
        lambda _, args: widths.append(args[0].shape[1])
    )
    with above, blocks[0].mlp.register_forward_hook(lambda *_: below.append(1)):
        run.answers(None, [0, 1, 2], [1.0] * 3)
    assert set(widths) == {1} and below == []


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [choice(), free()], ids=["choice", "open"])
def test_the_gradient_of_answers_is_that_of_finite_differences(model, contrast):
    run = Through(HF(model), [contrast], BOTH)
    numbers, draw = run.items(), torch.Generator().manual_seed(0)
    coef = [1.0, -0.5, 1.0, 0.7]
    maps = shift(model, *BOTH)
    for site in BOTH:
        vector = maps[site].shifts
        vector.mul_(0.3).requires_grad_()
        total = run.answers(maps, numbers, coef).target.sum()
        (grad,) = torch.autograd.grad(total, vector)
        vector.requires_grad_(False)
        way = grad + grad.norm() * torch.randn(vector.shape, generator=draw) / 8
        way = way / way.norm()

        def at(step, own=vector, way=way):
            before = own.clone()
            own.add_(step * way)
            value = run.answers(maps, numbers, coef).target.double().sum()
            own.copy_(before)
            return float(value)

        eps = 3e-2
        slope = (8 * (at(eps) - at(-eps)) - (at(2 * eps) - at(-2 * eps))) / (12 * eps)
        assert slope == pytest.approx(float((grad * way).sum()), rel=2e-3)


# --- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [None, Sampling(new_tokens=5, temperature=1.0)], ids=["bare", "continued"]
)
@pytest.mark.parametrize("sites", [(LOW,), BOTH], ids=["one", "two"])
def test_divergence_is_what_the_meter_reads(model, sampling, sites):
    reference = unmoved(model, sampling)
    run = Through(HF(model), [choice()], sites, reference)
    maps = shift(model, *sites)
    strengths = [0.3, -0.5, 1.0]
    measured = HF(model).meter(*reference)([Edit(maps, torch.tensor(strengths)[:, None])])
    want = [list(one.values["kl"]) for one in measured]
    got = run.divergence(maps, [0, 1, 2], torch.tensor(strengths)[:, None])
    close(got, torch.tensor(sum(want, [])))
    # In the order asked for, and with one strength for all.
    turned = run.divergence(maps, [2, 0], torch.tensor(strengths)[[2, 0], None])
    close(turned, torch.tensor(want[2] + want[0]))
    same = HF(model).meter(*reference)([Edit(maps, torch.tensor([0.3]))])
    got = run.divergence(maps, [0, 1, 2], torch.tensor([0.3]))
    close(got, torch.tensor([nats for one in same for nats in one.values["kl"]]))
    assert run.divergence(maps, [0], torch.zeros(1)).abs().max() < 1e-6


def test_divergence_has_a_gradient_and_the_plain_model_is_kept_without_one(llama):
    run = Through(HF(llama), [choice()], [LOW], unmoved(llama))
    maps = shift(llama, LOW)
    maps[LOW].shifts.requires_grad_()
    loss = run.divergence(maps, [0, 1], torch.ones(1)).mean()
    assert torch.autograd.grad(loss, maps[LOW].shifts)[0].norm() > 0
    assert not any(base.requires_grad for base in run._base.values())


# --- rows ----------------------------------------------------------------------------------------


def middles(acts, site, behaviour=None):
    """Rows and moves of the pairs in the order of the items."""
    source, target = acts.sides(site, behaviour)
    return (source + target) / 2, target - source


@pytest.mark.parametrize("site", [*BOTH, Site(2), Site(1, "heads")], ids=str)
def test_source_and_target_stand_symmetrically_about_the_hidden_row(model, site):
    acts = Through(HF(model), [choice()], [site]).rows()
    recorded = HF(model).record(choice(), [site], read="span", span=(-1, 0))
    want = torch.stack([recorded.where(item=n).sides(site)[0][0] for n in "01234"])
    close(middles(acts, site)[0], want)
    assert acts.rows.item[:5].tolist() == list("01234") and acts.read == "last"
    assert acts.rows.key[:5].tolist() == ["Y", "N"] * 2 + ["Y"]
    assert acts.rows.weight[:5].tolist() == [1, 2, 3, 4, 5]
    prompts = [len(model.encode(question).ids) - 1 for question in QUESTIONS]
    assert acts.rows.token[:5].tolist() == acts.rows.token[5:].tolist() == prompts
    assert acts.rows.pair.tolist() == acts.rows.item.tolist()
    assert acts.rows.split[[3, 4, 9]].tolist() == ["train", "validation", "validation"]


@pytest.mark.parametrize("step", [0.3, 1.0])
def test_the_move_is_a_share_of_the_training_rows_spread(llama, step):
    acts = Through(HF(llama), [choice()], BOTH).rows(step=step)
    for site in BOTH:
        h, move = middles(acts, site)
        own = h[:4]  # the fifth is held out
        spread = (own - own.mean(0)).square().sum(-1).mean().sqrt()
        torch.testing.assert_close(
            move.norm(dim=-1), (2 * step * spread).expand(5), rtol=1e-4, atol=0
        )


def slopes(run, site, numbers, *, said=False):
    """Gradient of the log-odds ``[items, d]`` by a shift of all steered tokens, by differences."""
    width, eps, count = tiny.WIDTH, 2e-2, len(numbers)
    maps = Interventions({site: Shift(width)})
    found = []
    for n in range(width):
        maps[site].shifts.zero_()
        maps[site].shifts[0, n] = eps
        steps = [strength for strength in (1.0, -1.0, 2.0, -2.0) for _ in numbers]
        both = run.answers(maps, [*numbers] * 4, steps)
        value = both.target if said else both.target - both.source
        up, down, twice_up, twice_down = value.double().split(count)
        found.append((8 * (up - down) - (twice_up - twice_down)) / (12 * eps))
    return torch.stack(found, 1).float()


def aligned(one, other):
    return torch.cosine_similarity(one, other, dim=-1).min() > 0.999


@pytest.mark.parametrize("contrast", [choice(), free()], ids=["choice", "open"])
def test_the_move_goes_along_the_gradient_of_the_log_odds(model, contrast):
    run = Through(HF(model), [contrast], BOTH)
    acts, said = run.rows(), run.rows(said=True)
    numbers = run.items("train") + run.items("validation")
    for site in BOTH:
        assert aligned(middles(acts, site)[1], slopes(run, site, numbers))
        # With ``said`` the other answer does not count.
        assert aligned(middles(said, site)[1], slopes(run, site, numbers, said=True))
        assert not aligned(middles(said, site)[1], middles(acts, site)[1])


def test_the_row_of_an_open_item_is_the_mean_of_its_steered_tokens(llama):
    run = Through(HF(llama), [free()], [LOW])
    h, _ = middles(run.rows(), LOW)
    for n, item in enumerate(free().items[:4]):
        rows = []
        for answer in (item.target, item.source):
            row = llama.encode(item.prompt, answer=answer)
            with torch.no_grad(), seen(llama, LOW) as held:
                llama.model(torch.tensor([row.ids]))
            rows.append(held[0][0, row.prompt - 1 : -1])
        close(h[n], torch.cat(rows).mean(0))


def test_items_that_ask_the_same_have_gradients_of_their_own(llama):
    # One prompt, one pass: the turned behaviour's gradients must not cancel the other's.
    pair = [choice(), choice("no", turned=True)]
    together = Through(HF(llama), pair, BOTH).rows()
    for contrast in pair:
        alone = Through(HF(llama), [contrast], BOTH).rows()
        for site in BOTH:
            name = contrast.behaviour
            close(middles(together, site, name)[0], middles(alone, site, name)[0])
            assert aligned(middles(together, site, name)[1], middles(alone, site, name)[1])


def test_rows_do_not_depend_on_the_passes(llama, monkeypatch):
    together = Through(HF(llama), [free()], BOTH, unmoved(llama)).rows()
    monkeypatch.setattr("innsteer.backends.through.TOKENS", 1)
    apart = Through(HF(llama), [free()], BOTH, unmoved(llama)).rows()
    for site in BOTH:
        close(apart.values[site], together.values[site])


def test_unmoved_rows_are_the_last_tokens_of_bare_prompts(model):
    run = Through(HF(model), [choice()], BOTH, unmoved(model))
    acts = run.rows()
    for n, prompt in enumerate(NEUTRAL):
        ids = model.encode(prompt.conversation).ids
        for site in BOTH:
            with torch.no_grad(), seen(model, site) as held:
                model.model(torch.tensor([ids]))
            close(acts.unmoved(site, "yes")[n], held[0][0, -1])
    assert acts.rows.token[-3:].tolist() == [
        len(model.encode(prompt.conversation).ids) - 1 for prompt in NEUTRAL
    ]
    assert acts.rows.behaviour[-3:].tolist() == [""] * 3


def test_a_continuation_gives_no_unmoved_row(llama):
    (continued,) = unmoved(llama, Sampling(new_tokens=5, temperature=1.0))
    assert min(len(ids) - n for ids, n in zip(continued.ids, continued.lengths, strict=True)) > 1
    run = Through(HF(llama), [choice()], [LOW], [continued, *unmoved(llama)])
    assert len(run.unmoved) == 6 and len(run.rows().unmoved(LOW, "yes")) == 3


def test_a_part_of_the_unmoved_sequences_can_be_taken(llama):
    run = Through(HF(llama), [choice()], [LOW], unmoved(llama))
    run.rows()
    part, maps = run.among([2, 0]), shift(llama, LOW)
    whole = run.rows().unmoved(LOW, "yes")
    close(part.rows().unmoved(LOW, "yes"), whole[[2, 0]], atol=1e-6)
    got = part.divergence(maps, [0, 1], torch.ones(1))
    close(got, run.divergence(maps, [2, 0], torch.ones(1)), atol=1e-6)
    assert len(run.unmoved) == 3


def test_edits_upstream_change_the_rows_of_later_sites_alone(llama):
    run = Through(HF(llama), [choice()], BOTH, unmoved(llama))
    upstream = shift(llama, LOW)
    plain, edited = run.rows(), run.rows(upstream)
    count = len(choice().items)
    # A row is read before its own site's edit; the move there heeds it.
    close(middles(edited, LOW)[0], middles(plain, LOW)[0], atol=1e-6)
    assert torch.equal(edited.values[LOW][2 * count :], plain.values[LOW][2 * count :])
    for n, question in enumerate(QUESTIONS):
        ids = llama.encode(question).ids
        steered = Attachment(llama, [Edit(upstream, torch.ones(1))], prompt_lengths=[len(ids)])
        with torch.no_grad(), steered, seen(llama, HIGH) as held:
            llama.model(torch.tensor([ids]))
        row = middles(edited, HIGH)[0][n]
        close(row, held[0][0, -1])
        assert (row - middles(plain, HIGH)[0][n]).norm() > 0.1
    above = run.rows(shift(llama, HIGH))
    close(middles(above, LOW)[0], middles(plain, LOW)[0], atol=1e-6)


def test_the_recording_names_its_model_and_contrasts(llama):
    one, two = (Through(HF(llama), c, [LOW]).rows() for c in ([choice()], [choice(), free()]))
    assert one.provenance["contrast"] == choice().hash and two.provenance["contrast"] is None
    assert two.provenance["contrasts"] == {"yes": choice().hash, "formal": free().hash}
    assert two.behaviours == ("yes", "formal")


# --- refusals and restoring ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contrasts", "sites", "match"),
    [
        ([choice()], [], "no site"),
        ([], [LOW], "at least one"),
        ([choice(), free("yes")], [LOW], "yes, yes"),
        ([replace(free(), items=free().items[-1:])], [LOW], "both sides"),
        ([choice()], [Site(0, "mlp"), LOW], "inside block 0"),
        ([choice(answers=("Y", ""))], [LOW], "empty answer"),
    ],
)
def test_what_cannot_be_fitted_is_refused(llama, contrasts, sites, match):
    with pytest.raises(InputError, match=match):
        Through(HF(llama), contrasts, sites)


def test_the_output_of_block_0_is_not_inside_it(llama):
    assert Through(HF(llama), [choice()], [Site(0)]).rows().site == Site(0)


class Fails(Intervention):
    """Raises where it should steer."""

    def __init__(self):
        super().__init__()
        self.width, self.weight = tiny.WIDTH, nn.Parameter(torch.zeros(1))

    def displacement(self, h, coef):
        raise RuntimeError("no edit today")


@pytest.mark.parametrize("broken", [False, True], ids=["well", "after an error"])
def test_the_model_is_left_as_it_was(broken):
    model = tiny.tiny_language_model("llama")
    wanted = [n % 2 == 0 for n, _ in enumerate(model.model.parameters())]
    for parameter, flag in zip(model.model.parameters(), wanted, strict=True):
        parameter.requires_grad_(flag)
    hooks = hooks_of(model.model)
    run = Through(HF(model), [choice()], [LOW], unmoved(model))
    maps = Interventions({LOW: Fails()}) if broken else shift(model, LOW)
    for ask in (
        lambda: run.answers(maps, [0, 1], [1.0, -1.0]).target.sum(),
        lambda: run.divergence(maps, [0], torch.ones(1)).sum(),
        lambda: run.rows(maps),
    ):
        if broken:
            with pytest.raises(RuntimeError, match="no edit today"):
                ask()
        else:
            ask()
        assert [p.requires_grad for p in model.model.parameters()] == wanted
        assert hooks_of(model.model) == hooks
        assert not any("forward" in vars(block.module) for block in model.layout.blocks)
    assert all(p.grad is None for p in model.model.parameters())


def test_the_models_weights_get_no_gradient():
    model = tiny.tiny_language_model("llama")
    model.model.requires_grad_(True)
    run = Through(HF(model), [choice()], [LOW], unmoved(model))
    maps = shift(model, LOW)
    maps[LOW].shifts.requires_grad_()
    loss = run.answers(maps, [0, 1], [1.0, 1.0]).target.sum()
    (loss + run.divergence(maps, [0], torch.ones(1)).sum()).backward()
    run.rows(maps)
    assert maps[LOW].shifts.grad is not None
    assert all(p.grad is None for p in model.model.parameters())
    assert not any(t.requires_grad for t in [*run._hidden.values(), *run._past.values()])
