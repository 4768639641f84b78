"""Loading, grouping, splitting and refusing contrast data."""

import csv
import gzip
import json
import random
import sys
from dataclasses import replace
from hashlib import sha256
from itertools import combinations

import numpy
import pytest

from innsteer.contrast import Contrast, messages, names, near_groups, normalise, prompts
from innsteer.errors import DataError, LeakError, MissingPackage, UnknownName

WORDS = "tea rain salt dusk iron wool jazz rope clay moss fern coal silk mint bark sand".split()

PINNED = ("raeaerre", "3976b3c80f86d961")


def row(n, **more):
    """Row n: no two ask nearly the same."""
    question = f"{WORDS[n % 16]} number{n} please{n}?"
    return {"prompt": question, "chosen": f"Yes sir, {n}.", "rejected": f"Nah, {n}."} | more


def rows(n):
    return [row(i, id=f"r{i}") for i in range(n)]


def write(path, data):
    path.write_bytes("\n".join(map(json.dumps, data)).encode())
    return path


def parts(contrast):
    return {item.id: item.split for item in contrast.items}


def ask(role="user", content="How are you?"):
    return {"role": role, "content": content}


# --- formats


def test_preference_rows_give_target_from_chosen_and_source_from_rejected():
    item = Contrast.load([row(3, weight=2)]).items[0]
    assert (item.prompt, item.target, item.source) == (row(3)["prompt"], "Yes sir, 3.", "Nah, 3.")
    assert (item.key, item.weight) == (None, 2.0)


def test_messages_are_read_with_explicit_implicit_and_repeated_prompt():
    asked = [ask("system", "Be brief."), ask()]
    yes, no = ask("assistant", "Well."), ask("assistant", "Badly.")
    explicit = {"prompt": asked, "chosen": [yes], "rejected": [no]}
    implicit = {"chosen": [*asked, yes], "rejected": [*asked, no]}
    repeated = {"prompt": "How are you?", **implicit}
    for given in (explicit, implicit, repeated):
        item = Contrast.load([given]).items[0]
        assert messages(item.prompt) == asked
        assert (item.target, item.source) == ("Well.", "Badly.")
        assert hash(item) == hash(Contrast.load([given]).items[0])


def test_a_prompt_that_contradicts_the_shared_messages_is_refused():
    given = {"chosen": [ask(), ask("assistant", "A")], "rejected": [ask(), ask("assistant", "B")]}
    with pytest.raises(DataError, match="differs from the shared start"):
        Contrast.load([given | {"prompt": "Something else"}])


def test_source_and_target_need_no_prompt():
    data = [
        {"source": "he go", "target": "he goes"},
        {"prompt": "Q?", "source": "a", "target": "c"},
    ]
    first, second = Contrast.load(data).items
    assert (first.prompt, second.prompt) == ("", "Q?")


def test_evals_become_choice_items_with_bare_keys():
    yes = {"question": 'Say?\n"I like it"', "statement": "I like it"}
    yes |= {"answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
    ab = {"question": "Which?\n (A) Tea\n (B) Rope"}
    ab |= {"answer_matching_behavior": " (B)", "answer_not_matching_behavior": " (A)"}
    contrast = Contrast.load([yes, ab])
    assert contrast.kind == "choice"
    assert [(i.key, i.target, i.source) for i in contrast.items] == [
        ("Yes", "Yes", "No"),
        ("B", "(B)", "(A)"),
    ]
    assert contrast.items[1].prompt == ab["question"]
    assert "2212.09251" in contrast.citation


def test_a_stray_yes_among_open_rows_leaves_the_contrast_open():
    contrast = Contrast.load([row(1), row(2, chosen="Yes", rejected="No")])
    assert contrast.kind == "open"
    assert {item.key for item in contrast.items} == {None}
    assert any("look like choices" in note for note in contrast.notes)


def test_every_file_kind_gives_the_same_items(tmp_path):
    data = rows(9)
    text = "\n\n".join(map(json.dumps, data)).encode()
    files = {
        "a.jsonl": text,
        "b.jsonl": b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"),
        "c.jsonl.gz": gzip.compress(text),
        "d.json": json.dumps(data).encode(),
        "e.json": json.dumps({"version": 1, "pairs": data}, indent=1).encode(),
    }
    found = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found.append(Contrast.load(tmp_path / name, behaviour="x"))
    assert {c.hash for c in found} == {Contrast.load(data, behaviour="x").hash}
    assert Contrast.load(str(tmp_path / "c.jsonl.gz")).behaviour == "c"


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(row(1, chosen="one\u2028two" + "x" * 2_000_000), ensure_ascii=False)
    path.write_text(line + "\n", encoding="utf-8")
    assert len(Contrast.load(path)) == 1


# --- groups


def test_normalising_folds_case_width_punctuation_and_space():
    assert normalise("  Ｗhat's  UP?!\n") == normalise("what s up") == "what s up"
    assert normalise("20 ℃") == "20 c"  # the compatibility form holds a capital
    assert normalise("???") == "???"
    assert len(normalise("今日は雨です").split()) == 6


def test_near_groups_agree_with_all_pairs():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS[:7], k=rng.randint(1, 9))) for _ in range(200)]
    texts += ["a b c d", "a b c d e", "a b c e f"]  # Jaccard exactly 4/5, then 3/6
    expected = list(range(len(texts)))
    for i, j in combinations(range(len(texts)), 2):
        a, b = set(texts[i].split()), set(texts[j].split())
        if 5 * len(a & b) >= 4 * len(a | b):
            low, high = sorted((expected[i], expected[j]))
            expected = [low if lead == high else lead for lead in expected]
    assert near_groups(texts) == expected
    assert len(set(expected)) > 20


def test_near_duplicates_join_one_group_and_are_counted():
    base = "one two three four five six seven eight nine ten"
    data = [row(0, prompt=base), row(1, prompt=base + " eleven"), row(2), row(3, prompt=base + "!")]
    contrast = Contrast.load(data)
    groups = [item.group for item in contrast.items]
    assert groups[0] == groups[1] == groups[3] != groups[2]
    assert contrast.notes == ("1 near-duplicate (token Jaccard >= 0.8) joined into 1 group",)


def test_both_option_orders_are_one_group_without_counting_as_near_duplicates():
    data = [row(0, prompt="Which?\n (A) Tea\n (B) Red rope\n\nAnswer:")]
    data += [row(1, prompt="Which?\n (A) Red rope\n (B) Tea\n\nAnswer:"), row(2)]
    contrast = Contrast.load(data)
    assert len({item.group for item in contrast.items}) == 2
    assert contrast.notes == ()


def test_own_groups_and_paraphrases_stay_together_whatever_their_order():
    data = rows(6)
    data[0]["group"] = data[3]["group"] = "mine"
    data[1]["paraphrase_of"] = "r4"
    data[4]["paraphrase_of"] = "r3"
    data[2]["paraphrase_of"] = data[5]["paraphrase_of"] = "elsewhere"
    forward, backward = Contrast.load(data), Contrast.load(data[::-1])
    group = {item.id: item.group for item in forward.items}
    assert {name: g for name, g in group.items() if g == "mine"}.keys() == {"r0", "r1", "r3", "r4"}
    assert group["r2"] == group["r5"] == "elsewhere"
    assert group == {item.id: item.group for item in backward.items}


def test_a_group_is_named_by_its_first_label_or_first_text():
    base = "one two three four five six seven eight nine"
    data = [
        row(n, prompt=f"{base} {tail}") for n, tail in enumerate(("p", "c", "k", "a", "z", "m"))
    ]
    first = sha256(f"{base} a".encode()).hexdigest()[:16]
    assert {item.group for item in Contrast.load(data).items} == {first}
    labelled = [r | {"group": label} for r, label in zip(data, "tfwbxq")]
    assert {item.group for item in Contrast.load(labelled).items} == {"b"}


def test_rows_without_prompt_are_tied_by_either_side():
    data = [{"source": "he go", "target": "he goes"}, {"source": "she went", "target": "he goes"}]
    data += [{"source": "he goes", "target": "they walk"}, {"source": "stop", "target": "halt now"}]
    groups = [item.group for item in Contrast.load(data).items]
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_a_shared_system_prompt_ties_nothing():
    system = ask("system", " ".join(f"rule{n}" for n in range(60)))
    data = [row(n, prompt=[system, ask(content=row(n)["prompt"])]) for n in range(4)]
    assert len({item.group for item in Contrast.load(data).items}) == 4


# --- split


def test_the_split_depends_on_group_and_seed_alone():
    data = rows(60)
    shuffled = random.Random(1).sample(data, 60)
    assert parts(Contrast.load(data)) == parts(Contrast.load(shuffled))
    assert parts(Contrast.load(data[:30])).items() <= parts(Contrast.load(data)).items()
    assert parts(Contrast.load(data)) != parts(Contrast.load(data, seed=1))


def test_the_hash_split_is_sixty_twenty_twenty():
    contrast = Contrast.load(rows(3000))
    sizes = [len(contrast.train), len(contrast.validation), len(contrast.test)]
    assert sum(sizes) == 3000
    assert all(abs(n / 3000 - share) < 0.03 for n, share in zip(sizes, (0.6, 0.2, 0.2)))


def test_a_pinned_split_and_hash_do_not_change_between_releases():
    contrast = Contrast.load(rows(8), behaviour="pinned")
    assert "".join(item.split[1] for item in contrast.items) == PINNED[0]
    assert contrast.hash[:16] == PINNED[1]


def test_the_hash_is_sensitive_to_order_and_to_every_field():
    data = rows(5)
    base = Contrast.load(data).hash
    assert base == Contrast.load(data).hash
    assert base != Contrast.load(data[::-1]).hash
    for change in ({"chosen": "Other."}, {"weight": 2.0}, {"id": "q"}, {"group": "g"}):
        assert base != Contrast.load([data[0] | change, *data[1:]]).hash


def test_own_splits_are_kept_from_column_or_mapping():
    sides = ["train", "validation", "test"] * 4
    data = [r | {"split": s} for r, s in zip(rows(12), sides)]
    assert [item.split for item in Contrast.load(data).items] == sides
    own = {f"r{n}": "train" if n < 8 else "test" for n in range(12)}
    assert parts(Contrast.load(data, split=own)) == own


@pytest.mark.parametrize("second", ["Same  as before, TRULY?", "same as before truly is it"])
def test_a_split_that_leaks_is_refused_with_the_lines_named(tmp_path, second):
    data = [r | {"split": "train"} for r in rows(3)]
    data[1]["prompt"] = "Same as before, truly?" if "TRULY" in second else "same as before truly is"
    data.append(row(9, id="r9", prompt=second, split="test"))
    with pytest.raises(LeakError, match=r"leak.jsonl: 2 rows in 1 groups .* line 2 \(train\) and "):
        Contrast.load(write(tmp_path / "leak.jsonl", data))
    data[-1]["split"] = "train"
    assert len(Contrast.load(data)) == 4


def test_a_leak_through_groups_paraphrases_and_mappings_is_refused_too():
    data = rows(4)
    data[0]["group"] = data[1]["group"] = "g"
    data[2]["paraphrase_of"] = "r3"
    clean = dict(r0="train", r1="train", r2="test", r3="test")
    assert parts(Contrast.load(data, split=clean)) == clean
    for moved in ({"r0": "test"}, {"r2": "validation"}):
        with pytest.raises(LeakError):
            Contrast.load(data, split=clean | moved)


def test_only_five_leaks_are_named_and_all_are_counted():
    data = [row(n % 7, split="train" if n < 7 else "test") for n in range(14)]
    with pytest.raises(LeakError, match="14 rows in 7 groups") as caught:
        Contrast.load(data)
    assert str(caught.value).count("(test)") == 5
    assert "and 2 more" in str(caught.value)


def test_a_part_of_fewer_than_two_items_is_refused_when_asked_for():
    contrast = Contrast.load([r | {"split": "train"} for r in rows(4)])
    assert len(contrast.train) == 4
    with pytest.raises(DataError, match="test part .* has 0 of 4 .*train 4, validation 0"):
        _ = contrast.test
    with pytest.raises(UnknownName, match="did you mean 'train'"):
        contrast.part("trian")


def test_rows_that_all_ask_the_same_are_noted():
    contrast = Contrast.load([row(1, chosen=f"a{n}") for n in range(5)])
    assert contrast.notes == ("all 5 rows are one group and cannot be split",)


def test_subsets_are_drawn_in_order_nested_and_seeded():
    contrast = Contrast.load(rows(40))
    small, large = ([i.id for i in contrast.subset(n, 3).items] for n in (5, 20))
    assert set(small) < set(large)
    assert large == [item.id for item in contrast.items if item.id in set(large)]
    assert small != [i.id for i in contrast.subset(5, 4).items]
    with pytest.raises(DataError, match="expected 1 to 40"):
        contrast.subset(41)


# --- refusals


BAD = {
    "no rows": b"\n \n",
    "line 2: not JSON": b'{"source": "a", "target": "b"}\n{"source": \n',
    "line 2: byte 0xff is not UTF-8": b'{"source": "a", "target": "b"}\n{"source": "\xff"}\n',
    "expected an object of columns": b"[1, 2]\n",
}


@pytest.mark.parametrize("match", BAD)
def test_a_damaged_file_is_refused_with_its_line(tmp_path, match):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(BAD[match])
    with pytest.raises(DataError, match=match) as caught:
        Contrast.load(path)
    assert "bad.jsonl" in str(caught.value)


ROWS = {
    "columns prompt, chosen are of no known format; expected chosen": {"prompt": 1, "chosen": 1},
    "'prompt' is empty": row(1, prompt=" \n"),
    "'chosen' is empty": row(1, chosen=""),
    "'chosen' is 7": row(1, chosen=7),
    "'rejected' is None": row(1, rejected=None),
    "both answers are 'same'": row(1, chosen="same", rejected=" same"),
    "'weight' is 0": row(1, weight=0),
    "'weight' is True": row(1, weight=True),
    "'weight' is nan": row(1, weight=float("nan")),
    "the id 'r0' is also that of row 1": row(1, id="r0"),
    "the split of 'x-0002' is 'dev'; expected train": row(1, split="dev"),
    "half a surrogate": row(1, chosen="\ud800"),
    "'prompt' is an empty list": row(1, prompt=[]),
    'expected {"role"': row(1, prompt=[{"role": "user"}]),
    "role and content only": row(1, prompt=[ask() | {"tool_calls": [1]}]),
    "is text, the other": row(1, chosen=[ask("assistant")]),
    "share no first messages": {"chosen": "a", "rejected": "b"},
    "expected one assistant turn": row(1, chosen=[ask()], rejected=[ask(content="b")]),
}


@pytest.mark.parametrize("match", ROWS)
def test_a_bad_row_is_refused_with_place_and_value(match):
    side = {"split": "train"} if "dev" in match else {}
    with pytest.raises(DataError, match=match) as caught:
        Contrast.load([row(0, id="r0", **side), ROWS[match]], behaviour="x")
    assert str(caught.value).startswith("the list, row 2: ")


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path):
    packed = gzip.compress(b'{"source": "a", "target": "b"}')
    cases = {
        "a.jsonl.gz": (b"plain", "cannot be read"),
        "b.jsonl.gz": (packed[:-9], "cut short"),
        "c.xlsx": (b"a,b", "suffix '.xlsx'"),
        "d.json": (b'{"a": 1}\n{"a": 2}', "name the file .jsonl"),
        "e.json": (b'{"a": [], "b": []}', "the lists a, b; expected source and target"),
        "e2.json": (b'{"a": [], "b": [], "c": []}', "or two lists of texts"),
        "f.json": (b"", "no rows"),
        "g.json": (b'[\n"\xff"]', "line 2: byte 0xff"),
        "h.json": (b"[" * 200_000, "not JSON"),
    }
    for name, (content, match) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=match):
            Contrast.load(tmp_path / name)
    for source in (tmp_path, tmp_path / "none.jsonl", 7, b"x", {"a": 1}, []):
        with pytest.raises(DataError):
            Contrast.load(source)


def test_an_unknown_behaviour_or_use_is_named_with_the_known_ones():
    with pytest.raises(UnknownName, match="unknown behaviour 'formall'"):
        Contrast.load("formall")
    with pytest.raises(UnknownName):
        prompts("../suites/neutral", "test")


def test_only_what_comes_from_the_shelf_under_its_own_name_is_built_in(tmp_path):
    whole = Contrast.load("formal")
    assert whole.builtin and whole.train.builtin and whole.subset(4).builtin
    own = Contrast.load(write(tmp_path / "formal.jsonl", rows(8)))
    assert own.behaviour == "formal" and not own.builtin and not own.subset(4).builtin
    assert not Contrast.load("formal", behaviour="mine").builtin
    assert not Contrast.load(rows(8), behaviour="formal").builtin
    assert replace(whole, builtin=False).hash == whole.hash


def test_missing_prompts_and_uses_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("innsteer.contrast._shelf", lambda: tmp_path)
    write(tmp_path / "calm.jsonl", rows(3))
    assert names() == ["calm"]
    assert len(Contrast.load("calm")) == 3
    with pytest.raises(DataError, match="'calm' has no prompts"):
        prompts("calm", "test")
    write(tmp_path / "calm.prompts.jsonl", [{"prompt": "Q?", "use": "test"}])
    assert names() == ["calm"]
    assert prompts("calm", "test") == ["Q?"]
    with pytest.raises(UnknownName, match="expected one of test"):
        prompts("calm", "demo")


# --- real data


def test_real_evals_load_without_leaks_and_with_balanced_keys(shared):
    files = sorted((shared / "data/anthropic-evals/persona").glob("*.jsonl.gz"))
    assert len(files) >= 10
    for file in files:
        contrast = Contrast.load(file)
        assert (contrast.kind, len(contrast)) == ("choice", 1000)
        sides = [{i.group for i in part.items} for part in (contrast.train, contrast.test)]
        assert not sides[0] & sides[1]
        assert {item.key for item in contrast.items} == {"Yes", "No"}
        statements = [normalise(str(item.prompt).partition("\n")[2]) for item in contrast.items]
        lead = dict(zip(statements, near_groups(statements)))
        side = {}
        for text, item in zip(statements, contrast.items):
            assert side.setdefault(lead[text], item.split) == item.split


def test_twenty_thousand_real_rows_load_in_one_go(shared):
    files = sorted((shared / "data/anthropic-evals/persona").glob("*.jsonl.gz"))
    lines = [line for file in files for line in gzip.open(file)]
    data = [json.loads(line) for line in (lines * 2)[:20_000]]
    contrast = Contrast.load(data)
    assert len(contrast) == 20_000
    assert len({item.group for item in contrast.items}) < 16_000


# --- what people bring ---------------------------------------------------------------------------

SIDES = [(f"{word} is bad", f"{word} is good") for word in ("tea", "rain", "wool", "jazz")]


def sides(contrast):
    return [(item.source, item.target) for item in contrast.items]


def test_tables_of_text_and_of_parquet_give_the_same_items(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"source": s, "target": t, "weight": n + 1.0} for n, (s, t) in enumerate(SIDES)]
    quoted = [f'"{r["source"]}","{r["target"]}",{r["weight"]}' for r in rows]
    files = {
        "a.csv": "source,target,weight\n" + "\n".join(quoted) + "\n",
        "a.tsv": "source\ttarget\tweight\r\n"
        + "\n".join(f"{r['source']}\t{r['target']}\t{r['weight']}" for r in rows),
        "a.jsonl": "\n".join(json.dumps(row) for row in rows),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [Contrast.load(tmp_path / name) for name in [*files, "a.parquet"]]
    assert len({contrast.hash for contrast in found}) == 1
    assert [item.weight for item in found[0].items] == [1, 2, 3, 4]
    assert found[0].format == "4 rows of source and target"


def test_text_pairs_are_split_at_their_tab(tmp_path):
    (tmp_path / "mood.txt").write_text("\n".join("\t".join(pair) for pair in SIDES) + "\n\n")
    assert sides(Contrast.load(tmp_path / "mood.txt")) == SIDES


def test_a_cell_may_hold_line_ends_separators_quotes_and_megabytes(tmp_path):
    long = "word " * 400_000
    cells = [f'a, "b"\nc {long}', "other"]
    quoted = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    (tmp_path / "a.csv").write_text("source,target\n" + quoted)
    assert sides(Contrast.load(tmp_path / "a.csv")) == [tuple(cells)]
    assert csv.field_size_limit() < 1_000_000


@pytest.mark.parametrize(
    "name, text, match",
    [
        ("a.csv", "source,target\na,b,c\n", "line 2: 3 cells under 2 columns"),
        ("a.csv", 'source,target\n"a,b\n', "not a table"),
        ("a.csv", "source,source\na,b\n", "no two alike"),
        ("a.csv", "source,target\n\na,\n", "line 3: 'target' is None"),
        ("a.tsv", "source\ttarget\n", "no rows"),
        ("a.txt", "a b c\n", "line 1: 'a b c' has 0 tabs"),
        ("a.csv", "text,label\nfine,toxic\n", r"label 'toxic' does not say.*label=\.\.\."),
        ("a.json", '{"source": ["a"], "goal": ["b"]}', "the lists source, goal"),
    ],
)
def test_a_damaged_table_is_refused_with_its_line(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=match):
        Contrast.load(tmp_path / name)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    with pytest.raises(DataError, match=r"a\.parquet is cut short or damaged"):
        Contrast.load(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "row",
    [
        {"negative": "no", "positive": "yes, sir"},
        {"question": "Tea?", "negative": "no", "positive": "yes, sir"},
        {"prompt": "Tea?", "negative_response": "no", "positive_response": "yes, sir"},
        {
            "instruction": "Tea?",
            "negative_response": {"model_response": "no"},
            "positive_response": {"model_response": "yes, sir"},
        },
    ],
)
def test_positive_is_the_target_by_whatever_name(row):
    (item,) = Contrast.load([row], behaviour="polite").items
    assert (item.source, item.target) == ("no", "yes, sir")
    assert item.prompt == ("" if len(row) == 2 else "Tea?")


@pytest.mark.parametrize("labels", [(0, 1), ("0", "1.0"), (False, True), ("neg", "Positive")])
def test_labelled_texts_stand_on_the_side_of_their_label(labels):
    rows = [{"text": pair[n], "label": labels[n]} for pair in SIDES for n in (0, 1)]
    found = Contrast.load(rows, behaviour="mood")
    assert found.kind == "open"
    assert sides(found) == [side for s, t in SIDES for side in ((s, None), (None, t))]
    assert found.hash != Contrast.load(rows[:-1], behaviour="mood").hash


def test_a_label_of_ones_own_is_named():
    rows = [{"prompt": "Hm?", "completion": text, "label": text[:3]} for text in ("bad a", "goo b")]
    assert sides(Contrast.load(rows, label="goo")) == [("bad a", None), (None, "goo b")]
    with pytest.raises(DataError, match="no row has the label 'gou'; expected one of bad, goo"):
        Contrast.load(rows, label="gou")


def test_a_row_without_its_label_is_refused():
    rows = [{"text": "a b", "label": "toxic"}, {"text": "c d", "label": None}]
    with pytest.raises(DataError, match="row 2: no label"):
        Contrast.load(rows, label="toxic")
    found = Contrast.load([{"text": "a", "label": 2.0}, {"text": "b", "label": 3.0}], label="2.0")
    assert sides(found) == [(None, "a"), ("b", None)]


def test_columns_that_are_named_decide_the_format():
    row = {"prompt": "P", "chosen": "C", "rejected": "R", "good": "G", "bad": "B"}
    found = Contrast.load([row], columns={"source": "bad", "target": "good"})
    assert sides(found) == [("B", "G")]
    with pytest.raises(DataError, match="the label 'zzz' for rows of TRL preference"):
        Contrast.load([row], label="zzz")


def test_a_single_row_is_no_pair_of_lists():
    for value in ("bad", None, 3):
        with pytest.raises(DataError, match="expected two lists of texts"):
            Contrast.load({"source": value, "target": value})


def test_columns_of_other_names_are_told(tmp_path):
    rows = [{"toxic": s, "neutral": t, "target": "left alone"} for s, t in SIDES]
    columns = {"source": "toxic", "target": "neutral"}
    assert sides(Contrast.load(rows, columns=columns)) == SIDES
    with pytest.raises(DataError, match="no column 'nuetral' to read as 'target'; .*neutral"):
        Contrast.load(rows, columns={"source": "toxic", "target": "nuetral"})


def test_two_lists_are_pairs_where_they_are_of_one_length(tmp_path):
    lists = {"negative": [s for s, _ in SIDES], "positive": [t for _, t in SIDES]}
    assert sides(Contrast.load(lists)) == SIDES
    (tmp_path / "two.json").write_text(json.dumps(lists))
    assert sides(Contrast.load(tmp_path / "two.json")) == SIDES
    short = {**lists, "positive": lists["positive"][:1]}
    assert sides(Contrast.load(short)) == [(s, None) for s, _ in SIDES] + [(None, SIDES[0][1])]


def test_a_data_frame_and_a_dataset_are_read_like_their_rows():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    rows = [{"source": s, "target": t, "group": None} for s, t in SIDES]
    rows[1]["group"] = "g"
    plain = Contrast.load(rows)
    assert Contrast.load(pandas.DataFrame(rows)).hash == plain.hash
    assert Contrast.load(datasets.Dataset.from_list(rows)).hash == plain.hash
    chats = [{"prompt": [ask()], "source": s, "target": t} for s, t in SIDES]
    frame = pandas.DataFrame(chats)
    frame["prompt"] = [numpy.array(row["prompt"]) for row in chats]
    assert Contrast.load(frame).hash == Contrast.load(chats).hash
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    assert Contrast.load(parts).hash == plain.hash


def test_a_hub_dataset_keeps_its_own_parts_and_a_missing_one_is_told(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def stand_in(name):
        if name != "org/mood":
            raise ConnectionError("the Hub was not reached")
        rows = [{"source": s, "target": t} for s, t in SIDES]
        parts = {"train": rows[:2], "validation": rows[2:3], "test": rows[3:]}
        return datasets.DatasetDict(
            {part: datasets.Dataset.from_list(some) for part, some in parts.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    found = Contrast.load("org/mood")
    assert found.behaviour == "mood" and sides(found) == SIDES
    assert [item.split for item in found.items] == ["train", "train", "validation", "test"]
    with pytest.raises(DataError, match="'org/mud': the Hub was not reached"):
        Contrast.load("org/mud")


@pytest.mark.parametrize("package, source", [("pyarrow", "a.parquet"), ("datasets", "org/mood")])
def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch, package, source):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"{package}.*pip install 'innsteer\[data\]'"):
        Contrast.load(source)
