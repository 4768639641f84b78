"""Local linearity by hand on tiny models, and a regulator against the bound of its error."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tiny
from backends.test_local import at_last, through_one_block
from innsteer import fitting, linearity
from innsteer.backends.hf import HF
from innsteer.backends.local import Read, mean_jacobians, perturbed
from innsteer.errors import InputError
from innsteer.site import Site, Where
from words import contrast, yes_or_no

CHOICE = contrast(yes_or_no)
PROMPTS = ["What is tea?", "Is rain dry, as all people say?", "Name a moss."]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(scope="module")
def found(model):
    return linearity.linearity(model, PROMPTS, scales=(1e-3, 0.1, 1.0))


@pytest.fixture(scope="module")
def fitted(model):
    return fitting.fit(model, CHOICE, "alqr", prompts=9)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_perturbed_row_gives_what_the_whole_text_gives(kind):
    model = tiny.tiny_language_model(kind)
    ids = torch.arange(5, 14)
    move = torch.zeros(2, 32)
    move[1, 3] = 0.2
    rows = perturbed(HF(model), ids.tolist(), move)
    for block in range(len(model.layout.blocks)):
        x = at_last(model, ids, block)
        for n in (0, 1):
            with torch.no_grad():
                whole = through_one_block(model, ids, block, x + x.norm() * move[n])
            torch.testing.assert_close(rows[block, n], whole, rtol=1e-4, atol=1e-4)


def test_small_steps_are_linear_and_large_ones_are_not(found):
    small, middle, large = (torch.tensor([row[n] for row in found.own]) for n in range(3))
    assert (small < 0.05).all() and (large > 0.1).all()
    assert (small < middle).all() and (middle < large).all()
    assert len(found.own) == len(found.shared) == len(found.alignment) == 4


def test_the_shared_map_misses_more_and_one_prompt_alone_nothing_more(model, found):
    own, shared = torch.tensor(found.own)[:, 0], torch.tensor(found.shared)[:, 0]
    identity = torch.tensor(found.identity)[:, 0]
    assert (shared > 2 * own).all() and (identity > 1.1 * shared).all()
    twice = linearity.linearity(model, PROMPTS[:1] * 2, scales=(0.1,))
    torch.testing.assert_close(torch.tensor(twice.own), torch.tensor(twice.shared))
    assert twice.alignment == pytest.approx([1.0] * 4, abs=1e-4)


def test_the_shared_map_is_the_mean_of_the_prompts_own(model):
    """By the whole Jacobians, and the same whichever prompt comes first."""
    found, turned = (linearity.linearity(model, p, scales=(0.1,)) for p in (PROMPTS, PROMPTS[::-1]))
    for one, other in zip(found.shared, turned.shared, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    backend = HF(model)
    texts = [Read(e.ids, e.prompt, {"weight": 1.0}) for e in map(model.encode, PROMPTS)]
    looks = torch.randn(linearity.DIRECTIONS, 32, generator=torch.Generator().manual_seed(0))
    looks = looks / looks.norm(dim=-1, keepdim=True)
    for block in range(4):
        mean = mean_jacobians(backend, texts, [block])[block]
        ratios = []
        for text in texts:
            x = at_last(model, torch.tensor(text.ids), block)
            rows = perturbed(backend, text.ids, torch.cat([looks[:1] * 0, 0.1 * looks]))[block]
            moved = rows[1:] - rows[:1]
            left = moved - 0.1 * x.norm() * looks @ mean.mT
            ratios.append((left.norm(dim=-1) / moved.norm(dim=-1)).mean())
        assert found.shared[block][0] == pytest.approx(torch.stack(ratios).mean().item(), rel=1e-3)


def test_prompts_align_more_than_chance_and_less_than_wholly(found):
    assert found.chance == 8 / 32
    assert all(found.chance < each < 0.999 for each in found.alignment)


def test_blocks_that_are_linear_have_no_error_at_any_scale(monkeypatch):
    """Attention that adds nothing and MLPs that are matrices behind no norm."""
    model = tiny.tiny_language_model("gpt2")
    for block in model.layout.blocks:
        matrix = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(block.attention_out, "forward", torch.zeros_like)
        monkeypatch.setattr(block.mlp, "forward", lambda h, matrix=matrix: h @ matrix)
        monkeypatch.setattr(block.mlp_norm, "forward", lambda h: h)
    found = linearity.linearity(model, PROMPTS, scales=(0.01, 1.0))
    page = linearity.page(found, None, {})
    assert "identity, 0.01" in page and "mean Jacobian, 0.01" in page
    assert torch.tensor(found.own).max() < 1e-3 and torch.tensor(found.shared).max() < 1e-3


# --- tracking ------------------------------------------------------------------------------------


def test_feedback_brings_the_feature_nearer_and_the_bound_holds_where_it_was_estimated(
    model, fitted, monkeypatch
):
    tracked = linearity.tracking(model, fitted, CHOICE)
    assert tracked.layers == [1, 2, 3] and len(tracked.lipschitz) == 2
    assert tracked.error[0] == pytest.approx(tracked.plain[0])  # nothing was edited below
    assert sum(tracked.error[1:]) < sum(tracked.plain[1:])
    # Measured on the texts that it was estimated on, it is one.
    twice = Twice(fitting.linearised(model, CHOICE))
    own = linearity.tracking(model, fitted, CHOICE, chain=twice)
    assert own.above == [0.0] * 3
    # Without what is left out the bound is the prediction, and texts lie above it.
    monkeypatch.setattr(linearity, "error_bound", _nothing)
    bare = linearity.tracking(model, fitted, CHOICE, chain=twice)
    assert bare.bound == pytest.approx(bare.predicted)
    assert max(bare.above) > 0.3


def test_the_bound_takes_the_largest_ratio_that_half_of_the_texts_show(model, fitted, monkeypatch):
    asked = []
    real = linearity.error_bound
    monkeypatch.setattr(
        linearity, "error_bound", lambda *given: asked.append(real(*given)) or asked[-1]
    )
    tracked = linearity.tracking(model, fitted, CHOICE)
    chain, maps = fitting.linearised(model, CHOICE), fitted.interventions
    plain, steered = (chain.inputs(one, side="source") for one in (None, maps))
    for site, above, told in zip(maps, list(maps)[1:], tracked.lipschitz, strict=False):
        part = maps[site]
        x = steered.values[site]
        moved, after = (steered.values[s] - plain.values[s] for s in (site, above))
        u = (part.levels + part.origins - x @ part.reads[0])[:, None] * part.writes[0]
        left = after - moved @ chain.jacobian(site.layer, prompts=9).mT - u
        ratios = (left.norm(dim=1) / moved.norm(dim=1))[::2]
        wanted = ratios.max().item() if moved.any() else 0.0
        assert told == pytest.approx(wanted, rel=1e-3)
    assert tracked.lipschitz[-1] > 0
    for n, bound in enumerate(tracked.bound):
        assert bound == pytest.approx(tracked.predicted[n] + asked[0].read[n].mean())


class Twice:
    """A chain whose texts come twice, one after the other: set aside for the bound, and held."""

    def __init__(self, chain):
        self.chain, self.jacobian = chain, chain.jacobian

    def inputs(self, *args, **how):
        acts = self.chain.inputs(*args, **how)
        values = {site: rows.repeat_interleave(2, 0) for site, rows in acts.values.items()}
        return SimpleNamespace(values=values)


def _nothing(closed, lipschitz, moves, reads):
    from innsteer.control import error_bound

    return error_bound(closed, [0.0] * len(lipschitz), moves, reads)


def test_a_loop_is_tracked_where_it_steers(model, fitted):
    chain = fitting.linearised(model, CHOICE)
    part = fitted.interventions[Site(3)]
    told = {}
    for where in (Where(), Where("all")):
        tracked = linearity.tracking(model, replace(fitted, where=where), CHOICE, chain=chain)
        x = chain.inputs(fitted.interventions, side="source", where=where).values[Site(3)][1::2]
        error = (part.levels + part.origins - x @ part.reads[0]).abs().mean()
        assert tracked.error[-1] == pytest.approx(error.item(), rel=1e-4)
        told[where] = tracked.error[-1]
    assert told[Where()] != pytest.approx(told[Where("all")], rel=1e-3)


def test_a_chain_that_is_given_is_not_made_again(model, fitted, monkeypatch):
    chain = fitting.linearised(model, CHOICE)
    monkeypatch.setattr(linearity, "linearised", None)
    tracked = linearity.tracking(model, fitted, CHOICE, chain=chain)
    monkeypatch.undo()
    again = linearity.tracking(model, fitted, CHOICE)
    assert tracked.bound == pytest.approx(again.bound, rel=1e-4)


def test_on_a_linear_chain_the_linear_model_is_the_truth(monkeypatch):
    model = tiny.tiny_language_model("gpt2")
    for block in model.layout.blocks:
        monkeypatch.setattr(block.attention_out, "forward", torch.zeros_like)
        monkeypatch.setattr(block.mlp, "forward", lambda h: 0.3 * h.roll(1, -1))
        monkeypatch.setattr(block.mlp_norm, "forward", lambda h: h)
    steering = fitting.fit(model, contrast(), "alqr", prompts=9)
    tracked = linearity.tracking(model, steering, contrast())
    assert tracked.error == pytest.approx(tracked.predicted, rel=1e-3, abs=1e-3)
    assert max(tracked.lipschitz) < 1e-3


def test_tracking_draws_as_the_fit_did(model):
    steering = fitting.fit(model, CHOICE, "alqr", prompts=3, seed=3)
    own, asked, other = (
        linearity.tracking(model, steering, CHOICE, **how) for how in ({}, {"seed": 3}, {"seed": 0})
    )
    assert own == asked and own.predicted != other.predicted


def test_what_has_no_tracking_error_is_refused(model, fitted):
    for other in ("diffmean", "pid"):
        steering = fitting.fit(model, contrast(), other)
        with pytest.raises(InputError, match=f"'{other}'"):
            linearity.tracking(model, steering, contrast())
    with pytest.raises(InputError, match="contrast of 'other'"):
        linearity.tracking(model, fitted, replace(CHOICE, behaviour="other"))
    twin = replace(fitted, steerer=replace(fitted.steerer, loop="open"))
    with pytest.raises(InputError, match="closed loop"):
        linearity.tracking(model, twin, contrast())


@pytest.mark.parametrize(
    ("prompts", "how", "match"),
    [
        (PROMPTS[:1], {}, "1 prompts"),
        (PROMPTS, {"scales": (0.0,)}, r"scales \[0\.0\]"),
        (PROMPTS, {"directions": 0}, "0 directions"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, prompts, how, match):
    with pytest.raises(InputError, match=match):
        linearity.linearity(model, prompts, **how)


# --- the report ----------------------------------------------------------------------------------


def test_a_report_says_what_was_measured_in_text_json_and_pictures(model, found, fitted, tmp_path):
    tracked = linearity.tracking(model, fitted, CHOICE)
    folder = linearity.save(tmp_path / "report", found, tracked, machine="mine")
    record = json.loads((folder / "linearity.json").read_text(encoding="utf-8"))
    assert record["linearity"]["own"] == found.own
    assert record["tracking"]["above"] == tracked.above
    page = (folder / "linearity.html").read_text(encoding="utf-8")
    for part in (
        'id="errors"',
        'id="alignment"',
        'id="tracking"',
        "mine",
        "estimate",
        "— steered<",
        "- - chance<",
    ):
        assert part in page
    assert "http://" not in page.split("<script>")[0]
    told = linearity.text(found, tracked)
    assert told.startswith("Moved by 0.1 of its length") and "above it" in told
    assert linearity.text(found).count("\n") == 2 + 4
    with pytest.raises(InputError):
        linearity.save(tmp_path / "report", found)
