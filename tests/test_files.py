"""Files: folders and files appear whole or not at all; JSON is read safely."""

import json
import os
import stat

import pytest

from innsteer import files
from innsteer.errors import FormatError, InputError
from innsteer.files import canonical, fresh_folder, read_json, sha256_file, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with fresh_folder(target) as staging:
        (staging / "one").write_text("1")
        (staging / "sub").mkdir()
        assert not target.exists()
    assert names(target) == ["one", "sub"] and names(target.parent) == ["b"]


def test_a_folder_has_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with fresh_folder(tmp_path / "x") as staging:
            (staging / "one").write_text("1")
        write_text(tmp_path / "y", "1")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x", "x/one", "y")]
    assert modes == [0o750, 0o640, 0o640]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_folder_leaves_nothing(tmp_path, error):
    with pytest.raises(error), fresh_folder(tmp_path / "x") as staging:
        (staging / "one").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_an_existing_folder_stays_unless_it_may_be_replaced(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")
    with pytest.raises(InputError, match="exists"), fresh_folder(tmp_path / "x"):
        pass
    with pytest.raises(ValueError), fresh_folder(tmp_path / "x", replace=True):
        raise ValueError
    assert names(tmp_path / "x") == ["old"] and names(tmp_path) == ["x"]
    with fresh_folder(tmp_path / "x", replace=True) as staging:
        (staging / "new").write_text("new")
    assert names(tmp_path / "x") == ["new"] and names(tmp_path) == ["x"]


def test_an_old_folder_comes_back_when_the_last_step_fails(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")
    move, moves = os.replace, []

    def fail_second(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise OSError("no space")
        move(source, target)

    monkeypatch.setattr(files.os, "replace", fail_second)
    with pytest.raises(OSError, match="no space"):
        with fresh_folder(tmp_path / "x", replace=True):
            pass
    assert names(tmp_path / "x") == ["old"] and names(tmp_path) == ["x"]


def test_files_and_links_are_never_replaced(tmp_path):
    (tmp_path / "file").write_text("1")
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(InputError), fresh_folder(tmp_path / name, replace=True):
            pass
    with pytest.raises(InputError, match="cannot write"), fresh_folder(tmp_path / "file" / "x"):
        pass
    assert names(tmp_path) == ["dangling", "file", "home", "link"]


def test_a_failed_write_keeps_the_old_text(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x", "\ud800")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_json_survives_and_its_bytes_are_the_same_in_any_order(tmp_path):
    write_json(tmp_path / "x", {"b": [1, 2.5, None], "a": "ü"})
    write_json(tmp_path / "y", {"a": "ü", "b": [1, 2.5, None]})
    assert read_json(tmp_path / "x", "") == {"a": "ü", "b": [1, 2.5, None]}
    assert sha256_file(tmp_path / "x") == sha256_file(tmp_path / "y")
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "z", {"a": float("nan")})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '"x"',
        "nothing",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        b'{"a": "\xff"}',
    ],
    ids=range(11),
)
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "x").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match="x"):
        read_json(tmp_path / "x", "an object")


def test_missing_and_endless_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FormatError, match="does not exist; expected a thing"):
        read_json(tmp_path / "x", "a thing")
    with pytest.raises(FormatError, match="does not exist"):
        read_json(tmp_path, "a thing")
    (tmp_path / "x").write_text(json.dumps({"a": "b" * 100}))
    monkeypatch.setattr(files, "MAX_JSON", 50)
    with pytest.raises(FormatError, match="bytes"):
        read_json(tmp_path / "x", "a thing")
