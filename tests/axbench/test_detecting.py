"""Steerings per concept: what they are fitted on, and how well they tell texts apart."""

from dataclasses import dataclass, replace

import pytest
import torch

import tiny
from innsteer import get
from innsteer.axbench.detecting import contrast_of, detection, fit_each
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.concepts import Concepts
from innsteer.errors import InputError
from innsteer.gating import auroc
from innsteer.interventions import Shift, shifts
from innsteer.site import Site
from innsteer.steerer import Interventions
from innsteer.steerers.diffmean import DiffMean

WORDS = {"full of a": "a", "full of z": "z"}
TABLE = Concepts.of(
    [
        {"concept": c, "prompt": f"Q{n}?", "response": text * (6 + n), "split": part}
        for c, text in WORDS.items()
        for n, part in enumerate(("train",) * 3 + ("validation",) * 3)
    ]
)
FEW = Sampling(8, 1.0)


@pytest.fixture(scope="module")
def backend():
    return HF(tiny.tiny_language_model())


@pytest.fixture(scope="module")
def fitted(backend):
    return fit_each(backend, TABLE, list(WORDS), "diffmean", site=Site(1), sampling=FEW)


def test_a_contrast_is_training_responses_against_the_plain_models_own(backend):
    found = contrast_of(backend, TABLE.rows, "full of z", sampling=FEW)
    assert [item.target for item in found.items] == ["z" * (6 + n) for n in range(3)]
    assert [item.prompt for item in found.items] == ["Q0?", "Q1?", "Q2?"]
    (first, *_) = found.items
    plain = backend.generate([Prompt(str(n), f"Q{n}?") for n in range(3)], (), FEW)
    assert [item.source for item in found.items] == [one.text for one in plain]
    assert {item.split for item in found.items} == {"train"} and first.key is None
    with pytest.raises(InputError, match="0 training responses of 'polite'"):
        contrast_of(backend, TABLE.rows, "polite")


def test_each_concept_gets_a_steering_of_its_own(fitted):
    one, other = (shifts(fitted[c].interventions)[Site(1)] for c in WORDS)
    assert list(fitted) == list(WORDS) and not torch.equal(one, other)
    assert fitted["full of a"].behaviours == ("full of a",)


def pulled(fitted, way):
    """Steerings whose directions go from one concept's mean to the other's: the plain cancels."""
    one, other = (shifts(fitted[c].interventions)[Site(1)] for c in WORDS)
    found = {}
    for concept, sign in zip(WORDS, (way, -way), strict=True):
        shift = Shift(one.shape[1])
        shift.shifts.copy_(sign * (one - other))
        found[concept] = replace(fitted[concept], interventions=Interventions({Site(1): shift}))
    return found


def test_texts_full_of_a_letter_are_told_apart(backend, fitted):
    figures, by = detection(backend, TABLE, list(WORDS), {"diffmean": pulled(fitted, 1)})
    assert set(by["diffmean"]) == set(WORDS) and all(v > 0.8 for v in by["diffmean"].values())
    (one,) = figures
    assert (one.arm, one.metric, one.n) == ("diffmean", "auroc", 2)
    assert one.low <= one.value <= one.high <= 1
    _, wrong = detection(backend, TABLE, list(WORDS), {"diffmean": pulled(fitted, -1)})
    assert all(v < 0.2 for v in wrong["diffmean"].values())


def test_the_auroc_is_that_of_the_largest_product_of_each_text(backend, fitted):
    _, by = detection(backend, TABLE, list(WORDS), {"diffmean": fitted})
    model, concept = backend.model, "full of a"
    (direction,) = shifts(fitted[concept].interventions)[Site(1)]
    scores = {c: [] for c in WORDS}
    for row in TABLE.part("validation").rows:
        encoded, held = model.encode(row.prompt, answer=row.response), []
        block = model.layout.blocks[1].module
        handle = block.register_forward_hook(lambda *given, held=held: held.append(given[2]))
        model.model(torch.tensor([encoded.ids]))
        handle.remove()
        h = held[0][0] if isinstance(held[0], tuple) else held[0]
        scores[row.concept].append((h[0, encoded.prompt :] @ direction).max())
    want = auroc(torch.stack(scores[concept]), torch.stack(scores["full of z"]))
    assert by["diffmean"][concept] == pytest.approx(want, abs=1e-9)


@dataclass(frozen=True)
class Deaf(DiffMean):
    """A method without a read-out."""

    def detectors(self, fitted):
        return {}


def test_so_many_responses_of_a_concept_are_scored(backend, fitted):
    """The validation part's later ones are of the other concept's letter: they do not count."""
    rows = [
        {**vars(r), "response": "a" * 6 if n == 3 else "z" * 9}
        for n, r in enumerate(TABLE.rows[:6])
    ]
    table = Concepts.of(rows + [vars(r) for r in TABLE.rows[6:]])
    found = {}
    for most in (1, 36):
        how = {"most": most}
        found[most] = detection(backend, table, list(WORDS), {"d": pulled(fitted, 1)}, **how)[1][
            "d"
        ]
    assert found[1]["full of a"] == 1.0 > found[36]["full of a"]


def test_methods_say_themselves_what_they_read_by(backend):
    deaf = fit_each(backend, TABLE, list(WORDS), "diffmean", site=Site(1), sampling=FEW)
    deaf = {c: replace(one, steerer=Deaf()) for c, one in deaf.items()}
    assert detection(backend, TABLE, list(WORDS), {"deaf": deaf}) == ([], {})
    shift = Shift(3)
    shift.shifts.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    maps = Interventions({Site(1): shift})
    for name in ("diffmean", "reft_r1"):
        assert torch.equal(get(name).detectors(maps)[Site(1)], shift.shifts)
    assert get("pca").detectors(maps) == {}


def test_one_concept_alone_is_told_from_nothing(backend, fitted):
    alone = {"full of a": fitted["full of a"]}
    assert detection(backend, TABLE, ["full of a"], {"diffmean": alone}) == ([], {})


def test_reft_r1_is_fitted_through_the_model(backend):
    quick = {"steps": 1, "batch": 2}
    found = fit_each(backend, TABLE, ["full of z"], "reft_r1", site=Site(1), sampling=FEW, **quick)
    assert shifts(found["full of z"].interventions)[Site(1)].abs().max() > 0
