"""Guards for every built-in behaviour and for the prompt suites beside them."""

import json
from collections import defaultdict
from importlib.resources import files

import numpy as np
import pytest

from innsteer.contrast import Contrast, names, near_groups, normalise, prompts

SHELF = files("innsteer") / "behaviours"


def load(name):
    return Contrast.load(name)


def grams(text, n=6):
    words = normalise(text).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def shared_grams(items):
    """6-grams of an answer that stand in any other answer, or in another item's question."""
    places = defaultdict(set)
    for n, item in enumerate(items):
        for side in ("source", "target"):
            for gram in grams(getattr(item, side)) - grams(item.prompt):
                places[gram].add((n, side))
    asked = defaultdict(set)
    for n, item in enumerate(items):
        for gram in grams(item.prompt):
            asked[gram].add(n)
    found = {gram for gram, where in places.items() if len(where) > 1}
    found |= {g for g, where in places.items() if asked.get(g, set()) - {n for n, _ in where}}
    return found


def surface_accuracy(contrast):
    """Cross-validated accuracy of telling the sides by words counted and the first three.

    Length is counted in words: long words are part of what makes a text formal.
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels, groups = [], [], []
    for item in contrast.items:
        for label, answer in enumerate((item.source, item.target)):
            first = answer.lower().split()[:3]
            row = {"words": float(len(answer.split()))}
            row |= {f"{n} {word}": 1.0 for n, word in enumerate(first)}
            features.append(row | {f"any {word}": 1.0 for word in first})
            labels.append(label)
            groups.append(item.group)
    model = make_pipeline(
        DictVectorizer(), StandardScaler(with_mean=False), LogisticRegression(C=0.1, max_iter=2000)
    )
    folds = GroupKFold(n_splits=5)
    return float(np.mean(cross_val_score(model, features, labels, groups=groups, cv=folds)))


def near_pairs(left, right):
    """The texts of `right` that nearly repeat one of `left`."""
    leads = near_groups([*left, *right])
    seen = set(leads[: len(left)])
    return [text for text, lead in zip(right, leads[len(left) :], strict=True) if lead in seen]


def neutral():
    lines = (files("innsteer") / "suites" / "neutral.jsonl").read_text(encoding="utf-8")
    found = defaultdict(list)
    for line in lines.splitlines():
        row = json.loads(line)
        found[row["part"]].append(row["prompt"])
    return found


def test_there_are_built_in_behaviours():
    assert len(names()) >= 2


@pytest.mark.parametrize("name", names())
def test_a_behaviour_has_two_hundred_items_that_split(name):
    contrast = load(name)
    assert contrast.kind == "open"
    assert len(contrast) >= 200
    assert not any("near-duplicate" in note for note in contrast.notes), contrast.notes
    assert min(len(part) for part in (contrast.train, contrast.validation, contrast.test)) >= 20


@pytest.mark.parametrize("name", names())
def test_answers_share_no_six_words_outside_their_own_question(name):
    assert not shared_grams(load(name).items)


@pytest.mark.parametrize("name", names())
def test_length_and_first_words_do_not_tell_the_sides_apart(name):
    assert surface_accuracy(load(name)) <= 0.60


@pytest.mark.parametrize("name", names())
def test_a_card_says_how_the_texts_were_made_and_what_they_leave_out(name):
    card = (SHELF / f"{name}.md").read_text(encoding="utf-8")
    assert card.startswith("# ")
    assert sum(line.startswith("## ") for line in card.splitlines()) >= 3
    for word in ("source", "target", "written", "leave", "scorer", "licen"):
        assert word in card.lower(), word


@pytest.mark.parametrize("name", names())
def test_held_out_prompts_are_many_and_ask_nothing_that_an_item_asks(name):
    test = prompts(name, "test")
    assert len(test) >= 100
    assert len(set(near_groups(test))) == len(test)
    assert near_pairs([item.prompt for item in load(name).items], test) == []


def test_neutral_prompts_are_enough_and_their_parts_share_nothing():
    found = neutral()
    assert set(found) == {"fit", "validation", "test"}
    # A cost is measured on the last two; the first only teaches a gate.
    assert all(len(found[part]) >= 100 for part in ("validation", "test"))
    assert len(found["fit"]) >= 64
    everything = [text for texts in found.values() for text in texts]
    assert len(everything) == sum(len(set(near_groups(texts))) for texts in found.values())
    assert near_pairs(found["validation"], found["test"]) == []


def test_the_guards_catch_what_they_are_for():
    first = "Rooms here were always bright and very clean"
    data = [
        {
            "prompt": f"topic{n} word{n}",
            "source": f"Well {n} it is a fine day",
            "target": f"Sir {n}",
        }
        for n in range(40)
    ]
    planted = Contrast.load([{"prompt": "a", "source": first, "target": first + " indeed"}])
    assert shared_grams(planted.items)
    assert not shared_grams(Contrast.load(data).items)
    assert surface_accuracy(Contrast.load(data)) > 0.9
    assert near_pairs(["a b c d e"], ["A, b c d e!", "x"]) == ["A, b c d e!"]
