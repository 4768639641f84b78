"""Concepts: tables of concepts in words, read, checked and dealt into parts."""

import json

import pytest

from innsteer.concepts import Concepts
from innsteer.errors import DataError, InputError

WORDS = ("polite", "rude", "about ships", "in verse")
ROWS = [
    {"concept": concept, "prompt": f"Question {n}?", "response": f"{concept}: {n}."}
    for concept in WORDS
    for n in range(20)
]


def test_whole_concepts_are_unseen_and_some_prompts_of_the_others_held_out():
    table = Concepts.of(ROWS, unseen=0.25, held=0.2)
    assert len(table.named("test")) == 1 and len(table) == 80
    assert not set(table.named("test")) & set(table.named("train"))
    held = {row.prompt for row in table.part("validation").rows}
    assert held and not held & {row.prompt for row in table.part("train").rows}
    assert table == Concepts.of(ROWS, unseen=0.25, held=0.2)


def test_a_split_that_is_given_stays():
    table = Concepts.of([row | {"split": "train"} for row in ROWS], unseen=0.5, held=0.5)
    assert {row.split for row in table.rows} == {"train"}


def test_a_hash_tells_tables_and_parts_apart():
    hashes = {
        Concepts.of(rows, unseen=unseen).hash
        for rows, unseen in ((ROWS, 0.0), (ROWS, 0.25), (ROWS[1:], 0.0), (ROWS[::-1], 0.0))
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_a_table_is_read_from_a_file(tmp_path, name):
    path = tmp_path / name
    if name == "t.csv":
        lines = ["concept,prompt,response", *(",".join(row.values()) for row in ROWS)]
        path.write_text("\n".join(lines))
    else:
        text = json.dumps(ROWS) if name == "t.json" else "\n".join(map(json.dumps, ROWS))
        path.write_text(text)
    assert Concepts.load(path) == Concepts.of(ROWS)


def test_axbenchs_columns_are_known_and_rows_without_the_concept_left_out(tmp_path):
    rows = [
        {"input": "a?", "output": "b", "output_concept": "ships", "category": "positive"},
        {"input": "a?", "output": "c", "output_concept": "EEEEE", "category": "negative"},
        {
            "input": "a?",
            "output": "d",
            "output_concept": "ship//to send",
            "category": "hard negative",
        },
    ]
    for place, kept in (("generate/train_data", rows), ("inference/latent_eval_data", rows[:1])):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        changed = [row | {"input": place} for row in kept]
        (tmp_path / f"{place}.jsonl").write_text("\n".join(map(json.dumps, changed)))
    table = Concepts.load(tmp_path, unseen=0.0, held=0.99)
    assert [(row.concept, row.response, row.split) for row in table.rows] == [
        ("ships", "b", "train"),
        ("ships", "b", "validation"),
    ]


def test_axbenchs_own_folder_is_read(shared):
    folder = shared / "data" / "axbench" / "concept10" / "prod_2b_l10_v1"
    table = Concepts.load(folder, unseen=0.2)
    assert table == Concepts.load(folder, unseen=0.2, held=0.0)
    assert len(table.named()) == 10 and len(table.named("test")) == 2
    for part in ("train", "validation"):
        assert len(table.named(part)) == 8 and len(table.part(part)) >= 8 * 36


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"concept": "x", "prompt": "y"}], "response is None"),
        ([{"concept": " ", "prompt": "y", "response": "z"}], "concept is ' '"),
        ([{"concept": "x", "prompt": 3, "response": "z"}], "prompt is 3"),
        ([ROWS[0] | {"split": "dev"}], "split 'dev'"),
        ([{"input": "a", "output": "b", "output_concept": "EEEEE"}], "without responses"),
    ],
)
def test_bad_rows_are_refused_with_their_place(rows, match):
    with pytest.raises(DataError, match=match):
        Concepts.of(rows)


def test_bad_shares_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="unseen=1.5"):
        Concepts.of(ROWS, unseen=1.5)
    with pytest.raises(DataError, match="generate/train_data"):
        Concepts.load(tmp_path)
