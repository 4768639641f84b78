"""Sentiment: labelled sentences and paired reviews."""

import pytest

from innsteer import contrast as contrasts
from innsteer import suites
from innsteer.errors import DataError
from innsteer.suites import behaviour

PAIRED = (
    "Sentiment\tText\tbatch_id\n"
    'Negative\t"A ""great"" bore.<br /><br />Skip it."\t7\n'
    'Positive\t"A ""great"" joy.<br /><br />See it."\t7\n'
    "Positive\tAll fun\t9\nNegative\tNo fun\t9\n"
)


def put(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def read(tmp_path, name, text):
    return suites.read("sentiment", put(tmp_path, name, text))


def test_lines_of_two_labels_are_two_sides(tmp_path):
    found = read(tmp_path, "stsa.binary.dev", "0 one long bore .\n1 a joy 's joy\n0 dull\n")
    assert [(item.source, item.target) for item in found.items] == [
        ("one long bore .", None), (None, "a joy 's joy"), ("dull", None)
    ]  # fmt: skip
    assert found.notes == () and found.behaviour == "sentiment"


def test_of_five_labels_the_middle_one_is_left_out_and_counted(tmp_path):
    found = read(
        tmp_path, "stsa.fine.dev", "0 awful\n1 dull\n2 a film\n3 nice\n4 superb\n2 shown\n"
    )
    assert [item.source or item.target for item in found.items] == [
        "awful", "dull", "nice", "superb"
    ]  # fmt: skip
    assert [item.target is None for item in found.items] == [True, True, False, False]
    assert found.notes[-1] == "2 texts of the middle label left out"


def test_reviews_of_one_batch_are_a_pair_without_the_marks_of_table_and_page(tmp_path):
    found = read(tmp_path, "dev_paired.tsv", PAIRED)
    assert [(item.id, item.source, item.target) for item in found.items] == [
        ("batch-7", 'A "great" bore.\nSkip it.', 'A "great" joy.\nSee it.'),
        ("batch-9", "No fun", "All fun"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.dev", "1 fine\n7 odd\n", "line 2: the label '7'"),
        ("a.dev", "1 fine\n0  \n", "line 2: 'text' is empty"),
        ("a.dev", "1 fine\nwordy line\n", "line 2: the label 'wordy'"),
        ("a.tsv", PAIRED.replace("Positive\tAll", "Mixed\tAll"), "line 4: the review 'Mixed'"),
        (
            "a.tsv",
            PAIRED.replace("Positive\tAll", "Negative\tAll"),
            "line 5: the review 'Negative'",
        ),
        ("a.tsv", PAIRED + "Negative\tAlone\t11\n", "batch 11 has one review"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, name, text, said):
    with pytest.raises(DataError, match=said):
        read(tmp_path, name, text)
    with pytest.raises(DataError, match="byte 0xff is not UTF-8"):
        (tmp_path / "b.dev").write_bytes(b"1 fine\n0 \xff\n")
        suites.read("sentiment", tmp_path / "b.dev")


def test_the_open_questions_of_the_built_in_behaviour_are_asked(tmp_path):
    lines = "".join(f"{n % 2} text {n} of {n * n}\n" for n in range(40))
    found = read(tmp_path, "a.dev", lines)
    for part in ("validation", "test"):
        suite = behaviour.load(found, part=part)
        asked = [prompt.conversation for prompt in suite.prompts]
        assert asked == contrasts.prompts("critical", part) and suite.control == "sentiment"


def test_the_public_files_are_read(shared):
    home = shared / "data"
    found = suites.read("sentiment", home / "sst" / "stsa.binary.dev")
    assert len(found) == 872 and sum(item.target is None for item in found.items) == 428
    found = suites.read("sentiment", home / "cad-imdb" / "dev_paired.tsv.gz")
    assert len(found) == 245 and not any("<br />" in item.target for item in found.items)
