"""Activations: rows and their table, in memory and on disk."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from innsteer.activations import Activations, Rows, ShardWriter
from innsteer.errors import FormatError, InputError, UnknownName
from innsteer.files import sha256_file, write_json
from innsteer.site import Site

SITES = (Site(3), Site(1, "heads"), Site(12))


@pytest.fixture
def acts():
    draw = torch.Generator().manual_seed(0)
    records = [
        {"behaviour": b, "item": f"{b}{i}", "side": side, "pair": f"{i}" if i < 3 else "",
         "token": 5 + i, "split": "validation" if i == 2 else "train", "weight": 1 + i / 2}
        for b in ("x", "y") for i in range(4) for side in ("source", "target")
    ]  # fmt: skip
    values = {s: torch.randn(16, 4 + s.layer, generator=draw) for s in SITES}
    return Activations(values, Rows.of(records), ("x", "y"), "all", {"model": "m"})


def test_sites_come_in_order_with_their_widths(acts):
    assert acts.sites == (Site(1, "heads"), Site(3), Site(12))
    assert acts.widths == {Site(1, "heads"): 5, Site(3): 7, Site(12): 16}
    with pytest.raises(InputError, match="3 sites"):
        _ = acts.site
    assert acts.at(Site(3)).site == Site(3)
    with pytest.raises(UnknownName, match="heads"):
        acts.at(Site(2))


def test_rows_are_chosen_by_their_columns(acts):
    some = acts.where(behaviour="y", split=["train"], side=["source", "target"])
    assert len(some) == 6 and set(some.rows.behaviour) == {"y"}
    assert torch.equal(some.values[Site(3)], acts.values[Site(3)][[8, 9, 10, 11, 14, 15]])


def test_sides_are_the_rows_of_each_side(acts):
    source, target = acts.sides(Site(3), "y")
    assert torch.equal(source, acts.values[Site(3)][8::2])
    assert torch.equal(target, acts.values[Site(3)][9::2])
    assert torch.equal(acts.sides(Site(3))[0], acts.values[Site(3)][0:8:2])
    with pytest.raises(InputError, match="no source"):
        acts.where(side="target").sides(Site(3))


def test_pairs_are_aligned_and_several_tokens_meaned():
    records = [
        {"behaviour": "b", "item": item, "side": side, "pair": item}
        for item, side in [
            ("q", "target"), ("p", "source"), ("q", "source"), ("p", "target"),
            ("p", "target"), ("alone", "source"),
        ]
    ]  # fmt: skip
    values = {Site(0): torch.arange(6.0)[:, None]}
    source, target = Activations(values, Rows.of(records), ("b",)).pairs(Site(0))
    assert source.flatten().tolist() == [1.0, 2.0] and target.flatten().tolist() == [3.5, 0.0]
    plain = Activations.of_sides(torch.zeros(3, 2), torch.ones(2, 2), paired=False)
    assert [len(part) for part in plain.pairs(plain.site)] == [0, 0]
    with pytest.raises(InputError, match="paired=False"):
        Activations.of_sides(torch.zeros(3, 2), torch.ones(2, 2))


def test_what_is_no_table_of_rows_is_refused(acts):
    good = acts.values[Site(3)]
    for values, message in (
        ({}, "no site"),
        ({Site(3): good[:5]}, r"\[16, d\]"),
        ({Site(3): good[:, 0]}, r"\[16, d\]"),
        ({Site(3): good.clone().index_fill_(0, torch.tensor([2]), torch.nan)}, "1 of 16"),
    ):
        with pytest.raises(InputError, match=message):
            Activations(values, acts.rows, ("x",))
    with pytest.raises(UnknownName, match="last"):
        Activations({Site(3): good}, acts.rows, ("x",), "first")  # type: ignore[arg-type]


def test_a_recording_comes_back_from_disk(acts, tmp_path):
    back = Activations.load(acts.save(tmp_path / "a"))
    assert back.hash == acts.hash and back.provenance == {"model": "m"}
    assert (back.behaviours, back.read, back.sites) == (acts.behaviours, acts.read, acts.sites)
    assert back.rows.records() == acts.rows.records()
    assert back.rows.token.dtype == np.int64 and back.rows.weight.dtype == np.float64
    with pytest.raises(InputError, match="exists"):
        acts.save(tmp_path / "a")


def test_shards_join_to_the_whole(acts, tmp_path):
    with ShardWriter(tmp_path / "a", acts.behaviours, acts.read, {}) as shards:
        for part in (slice(0, 5), slice(5, 6), slice(6, 16)):
            index = np.arange(16)[part]
            shards.write({s: v[part] for s, v in acts.values.items()}, acts.rows[index])
    assert Activations.load(tmp_path / "a").hash == acts.hash


def test_the_hash_tells_values_table_and_nothing_else(acts):
    values = {s: v.clone() for s, v in acts.values.items()}
    same = Activations(values, acts.rows, acts.behaviours, acts.read, {"other": 1})
    assert same.hash == acts.hash
    values[Site(3)][7, 2] += 1e-6
    other = Activations(values, acts.rows, acts.behaviours)
    assert other.hash != acts.hash
    assert acts.where(side="source").hash != acts.hash


@pytest.mark.parametrize("provenance", [{}, {"bad": object()}])
def test_an_unfinished_recording_leaves_nothing(acts, tmp_path, provenance):
    error = TypeError if provenance else KeyboardInterrupt
    with pytest.raises(error):
        with ShardWriter(tmp_path / "a", ("x",), "last", provenance) as shards:
            shards.write(acts.values, acts.rows)
            if not provenance:
                raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def damage(folder, what):
    head = json.loads((folder / "activations.json").read_text())
    shard = folder / "00000.safetensors"
    if what == "byte":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        return
    if what == "missing":
        shard.unlink()
        return
    if what == "no head":
        (folder / "activations.json").unlink()
        return
    if what == "path":
        (folder.parent / "out.safetensors").write_bytes(shard.read_bytes())
        head["files"]["../out.safetensors"] = sha256_file(shard)
    elif what == "not tensors":
        shard.write_bytes(b"\x00" * 40)
        head["files"][shard.name] = sha256_file(shard)
    elif what == "a strange site":
        save_file({"nonsense": torch.zeros(16, 2)}, shard)
        head["files"][shard.name] = sha256_file(shard)
    elif what == "fewer rows":
        save_file({"3.residual": torch.zeros(2, 2)}, shard)
        head["files"][shard.name] = sha256_file(shard)
    elif what == "no table":
        (folder / "00000.rows.json").write_text("5")
        head["files"]["00000.rows.json"] = sha256_file(folder / "00000.rows.json")
    else:
        head |= {
            "format": {"format": 99},
            "files": {"files": 7},
            "read": {"read": "backwards"},
            "behaviours": {"behaviours": None},
        }[what]
    write_json(folder / "activations.json", head)


@pytest.mark.parametrize(
    "what",
    ["byte", "missing", "no head", "path", "not tensors", "a strange site", "fewer rows",
     "no table", "format", "files", "read", "behaviours"],
)  # fmt: skip
def test_a_damaged_recording_is_refused(acts, tmp_path, what):
    folder = acts.save(tmp_path / "a")
    damage(folder, what)
    with pytest.raises(FormatError, match="is missing" if what == "path" else None):
        Activations.load(folder)


def test_a_head_without_an_entry_is_refused(acts, tmp_path):
    folder = acts.save(tmp_path / "a")
    head = json.loads((folder / "activations.json").read_text())
    for name in ("format", "files", "read", "behaviours", "provenance"):
        write_json(folder / "activations.json", {k: v for k, v in head.items() if k != name})
        with pytest.raises(FormatError):
            Activations.load(folder)


def test_contexts_go_with_their_rows_through_choosing_saving_and_hashing(tmp_path):
    plain = Activations.of_sides(torch.zeros(3, 2), torch.ones(3, 2))
    before = torch.arange(12.0).view(6, 2)
    acts = replace(plain, context={plain.site: before})
    assert acts.hash != plain.hash
    target = acts.where(side="target")
    assert torch.equal(target.context[acts.site], before[3:])
    assert torch.equal(acts.prompts.values[acts.site], before)
    assert torch.equal(acts.at(acts.site).context[acts.site], before)
    loaded = Activations.load(acts.save(tmp_path / "a"))
    assert torch.equal(loaded.context[acts.site], before) and loaded.hash == acts.hash
    assert torch.equal(loaded.values[acts.site], acts.values[acts.site])
    assert Activations.load(plain.save(tmp_path / "b")).context == {}
    with pytest.raises(InputError, match="without what stood before them"):
        _ = plain.prompts
    with pytest.raises(InputError, match="contexts at 7"):
        replace(plain, context={Site(7): before})
    with pytest.raises(InputError, match="values of shape"):
        replace(plain, context={plain.site: before[:2]})


def test_rewordings_are_unmoved_rows_less_the_same_in_other_words():
    records = [
        {"behaviour": "", "item": name, "side": side, "pair": pair}
        for name, side, pair in (
            ("a", "unmoved", "a"),
            ("b", "unmoved", "b"),
            ("c", "unmoved", ""),
            ("b", "restated", "b"),
            ("d", "restated", "d"),
            ("b", "restated", "b"),
        )
    ]
    site = Site(0)
    rows = torch.tensor([[1.0], [2.0], [3.0], [10.0], [20.0], [30.0]])
    acts = Activations({site: rows}, Rows.of(records), ("x",), context={site: 2 * rows})
    assert acts.rewordings(site).tolist() == [[-8.0], [-28.0]]
    assert acts.prompts.rewordings(site).tolist() == [[-16.0], [-56.0]]
    assert acts.where(side="unmoved").rewordings(site).shape == (0, 1)
