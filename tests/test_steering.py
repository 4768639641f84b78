"""Steering: strengths, edits, and the artifact: sealed, refused when altered, never executed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from edits import recall
from innsteer import steerer as contract
from innsteer import steering as steering_room
from innsteer.activations import Activations
from innsteer.calibration import Calibration, Dose
from innsteer.errors import BudgetError, FormatError, InputError, MismatchError
from innsteer.files import sha256_file, write_json
from innsteer.models.fingerprint import Fingerprint
from innsteer.site import Site, Where
from innsteer.steering import CARD, HEADER, SEAL, TENSORS, Steering

BASE = Fingerprint("b" * 64, "w" * 64, "t" * 64, "c" * 64, "tiny")
CURVE = Calibration(tuple(Dose(s, s * s / 100, 0, 1, s) for s in (0.0, 1.0, 2.0)), 0.04, 2.0, 300)
METHODS = ("diffmean", "innsteer")


def fitted(method="diffmean", *, seed=0, sites=(Site(1), Site(2, "mlp")), **fields):
    draw = torch.Generator().manual_seed(seed)
    parts = [
        Activations.of_sides(
            torch.randn(12, 32, generator=draw), torch.randn(12, 32, generator=draw) + 1, site=site
        )
        for site in sites
    ]
    acts = replace(
        parts[0], values={s: part.values[s] for s, part in zip(sites, parts, strict=True)}
    )
    if method == "innsteer":
        fields = {"hidden": 4, "epochs": 1, "couplings": 2} | fields
    chosen = contract.get(method, **fields)
    return Steering(chosen, chosen.fit(acts), ("behaviour",), base=BASE)


@pytest.fixture(params=METHODS)
def steering(request):
    return fitted(request.param)


@pytest.fixture
def folder(tmp_path):
    return replace(fitted(), calibration={"behaviour": CURVE}).save(tmp_path / "it")


def reseal(folder, **header):
    """What a hostile author does: change the header, and seal it again."""
    data = json.loads((folder / HEADER).read_text()) | header
    write_json(folder / HEADER, data)
    seal(folder)


def seal(folder):
    files = {name: sha256_file(folder / name) for name in (HEADER, TENSORS, CARD)}
    write_json(folder / SEAL, {"files": files})


# --- strengths -----------------------------------------------------------------------------------


def test_an_untuned_steering_takes_numbers_alone(steering):
    assert steering.resolve() == 1.0
    assert [steering.resolve(s) for s in (0, -2, "1.5", 0.25)] == [0.0, -2.0, 1.5, 0.25]
    for asked in ("budget", "0.05nat"):
        with pytest.raises(InputError, match="tune"):
            steering.resolve(asked)
    for asked in ("much", "", float("nan"), "inf"):
        with pytest.raises(InputError, match="strength"):
            steering.resolve(asked)


def test_a_tuned_steering_takes_costs(steering):
    tuned = steering.tuned({"behaviour": CURVE}, by="me")
    assert tuned.provenance["by"] == "me"
    assert (tuned.resolve(), tuned.resolve("budget"), tuned.resolve("0.01nat")) == (2.0, 2.0, 1.0)
    with pytest.raises(BudgetError):
        tuned.resolve("9nat")
    with pytest.raises(InputError, match="one of behaviour"):
        tuned.resolve("budget", "another")


def test_an_edit_has_a_column_per_behaviour():
    both = replace(fitted(), behaviours=("one", "two"))
    assert both.edit(3).coef.tolist() == [3.0, 0.0]
    assert both.edit(3, behaviour="two").coef.tolist() == [0.0, 3.0]
    assert both.edit([1, "2"], behaviour="two").coef.tolist() == [[0.0, 1.0], [0.0, 2.0]]
    assert both.of("two").edit(3).coef.tolist() == [0.0, 3.0]
    tuned = both.tuned({"two": CURVE})
    assert tuned.edit({"two": "budget", "one": -1}).coef.tolist() == [-1.0, 2.0]
    assert tuned.edit({"one": 0.5}).coef.tolist() == [0.5, 0.0]
    assert tuned.curve is None and tuned.of("two").curve is CURVE
    for wrong in ({}, {"three": 1}, {"one": "budget"}):
        with pytest.raises(InputError):
            tuned.edit(wrong)
    with pytest.raises(InputError, match="no other behaviour beside"):
        tuned.edit({"one": 1}, behaviour="two")
    mix = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert torch.equal(both.edit(mix).coef, mix.float())
    for wrong in (torch.ones(2, 3), torch.tensor(1.0), [], [float("nan")], object()):
        with pytest.raises(InputError):
            both.edit(wrong)


def test_on_steers_a_model_of_ones_own_and_leaves_it_alone():
    language = tiny.tiny_language_model("llama")
    own = replace(fitted(), base=language.fingerprint)
    ids = torch.tensor([[5, 6, 7]])
    plain = language.model(ids).logits
    for model in (language, language.model):
        with own.on(model, prompt_lengths=[3]) as attached:
            assert not torch.equal(language.model(ids).logits, plain)
        assert attached.trace.steered == [[2]]
    assert torch.equal(language.model(ids).logits, plain)


@pytest.mark.parametrize("part", ["base", "weights", "tokenizer", "template"])
def test_another_model_is_refused_and_the_difference_named(part):
    language = tiny.tiny_language_model("llama")
    own = replace(fitted(), base=replace(language.fingerprint, **{part: "0" * 64}))
    with pytest.raises(MismatchError, match=f"another {part};"):
        own.on(language)
    own.on(language, allow_mismatch=True)
    replace(fitted(), base=replace(language.fingerprint, name="a copy")).on(language)


@pytest.mark.parametrize("part", ["base", "weights", "tokenizer", "template"])
def test_a_model_without_tokenizer_is_told_by_structure_and_weights(part):
    language = tiny.tiny_language_model("llama")
    own = replace(fitted(), base=replace(language.fingerprint, **{part: "0" * 64}))
    if part in ("tokenizer", "template"):
        own.on(language.model)
        return
    with pytest.raises(MismatchError, match=f"LlamaForCausalLM' has another {part};"):
        own.on(language.model)
    own.on(language.model, allow_mismatch=True)
    replace(own, base=None).on(language.model)


def test_the_weights_of_a_model_without_tokenizer_are_read_once(monkeypatch):
    language, read = tiny.tiny_language_model("llama"), []
    own = replace(fitted(), base=language.fingerprint)
    taken = steering_room.fingerprint
    monkeypatch.setattr(steering_room, "fingerprint", lambda *args: read.append(1) or taken(*args))
    for _ in range(3):
        own.on(language.model)
    assert len(read) == 1


# --- identity ------------------------------------------------------------------------------------


def test_the_identity_is_of_what_is_applied(steering):
    same = replace(
        steering,
        calibration={"behaviour": CURVE},
        provenance={"time": "now"},
        card={"figures": []},
        base=replace(BASE, name="elsewhere"),
    )
    # The base's name is for people; everything else of the recipe counts.
    assert replace(same, base=BASE).identity == steering.identity
    changed = [
        replace(steering, where=Where("all")),
        replace(steering, behaviours=("other",)),
        replace(steering, base=None),
        replace(steering, base=replace(BASE, weights="0" * 64)),
        fitted(steering.steerer.name, sites=(Site(1), Site(3, "mlp"))),
    ]
    assert len({steering.identity, *(one.identity for one in changed)}) == 6


def test_one_bit_of_one_tensor_changes_the_identity(steering):
    before = steering.identity
    name, tensor = sorted(steering.interventions.state_dict().items())[-1]
    kind = torch.int32 if tensor.element_size() == 4 else torch.int64
    tensor.flatten().view(kind)[0] ^= 1
    assert steering.identity != before, name
    tensor.flatten().view(kind)[0] ^= 1
    assert steering.identity == before


def test_a_field_changes_the_identity():
    one = fitted("innsteer")
    assert replace(one, steerer=replace(one.steerer, margin=4.0)).identity != one.identity
    assert fitted("innsteer").identity == one.identity


def test_tensors_of_any_dtype_have_an_identity():
    one = fitted()
    half = replace(one, interventions=fitted().interventions.bfloat16())
    assert half.identity != one.identity


# --- the folder ----------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(steering, tmp_path):
    whole = replace(
        steering,
        where=Where("range", 2, 9),
        calibration={"behaviour": CURVE},
        provenance={"seed": 3},
        card={"note": "x"},
    )
    back = Steering.load(whole.save(tmp_path / "it"))
    assert back.identity == whole.identity == steering.__class__.load(tmp_path / "it").identity
    for name in ("steerer", "behaviours", "where", "base", "calibration", "provenance", "card"):
        assert getattr(back, name) == getattr(whole, name), name
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for site, part in whole.interventions.items():
        coef = torch.ones(5, 1)
        assert torch.equal(back.interventions[site](h, coef), part(h, coef))
    assert not any(p.requires_grad for p in back.interventions.parameters())


def test_the_same_steering_makes_the_same_bytes(steering, tmp_path):
    one, two = steering.save(tmp_path / "one"), steering.save(tmp_path / "two")
    assert (one / SEAL).read_bytes() == (two / SEAL).read_bytes()


def test_the_card_tells_what_it_is(folder):
    card = (folder / CARD).read_text()
    for text in ("diffmean", "tiny", "1.residual", "2.mlp", "generated", "0.04 nats", "budget"):
        assert text in card
    assert Steering.load(folder).identity in card


def test_an_existing_folder_is_replaced_only_when_asked(folder):
    other = fitted(seed=1)
    with pytest.raises(InputError, match="exists"):
        other.save(folder)
    assert Steering.load(folder).identity == fitted().identity
    other.save(folder, replace=True)
    assert Steering.load(folder).identity == other.identity


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises((ValueError, TypeError)):
        replace(fitted(), provenance={"loss": float("nan")}).save(tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [HEADER, TENSORS, CARD, SEAL])
def test_any_altered_byte_is_refused(folder, name):
    data = (folder / name).read_bytes()
    for place in range(0, len(data), max(len(data) // 40, 1)):
        altered = bytearray(data)
        altered[place] ^= 1
        (folder / name).write_bytes(altered)
        if name == SEAL and json_equal(altered, data):
            continue
        with pytest.raises(FormatError):
            Steering.load(folder)
    (folder / name).write_bytes(data)
    Steering.load(folder)


def json_equal(one, other):
    try:
        return json.loads(bytes(one)) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("name", [HEADER, TENSORS, CARD, SEAL])
def test_a_missing_or_linked_file_is_refused(folder, name, tmp_path):
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    with pytest.raises(FormatError, match=name):
        Steering.load(folder)
    if name != SEAL:
        (tmp_path / "elsewhere").write_bytes(data)
        (folder / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(FormatError, match=name):
            Steering.load(folder)


@pytest.mark.parametrize(
    "files", [None, [], 5, {}, [HEADER, TENSORS, CARD], {"../x": "0"}, "more", "less", "none"]
)
def test_a_seal_lists_the_three_files(folder, files):
    own = json.loads((folder / SEAL).read_text())["files"]
    if files == "more":
        (folder / "more.json").write_text("{}")
        files = own | {"more.json": sha256_file(folder / "more.json")}
    elif files == "less":
        files = {name: own[name] for name in (HEADER, TENSORS)}
    elif files == "none":
        files = dict.fromkeys(own, None)
    write_json(folder / SEAL, {"files": files})
    with pytest.raises(FormatError):
        Steering.load(folder)


def test_a_resealed_edit_by_hand_does_not_match_its_identity(folder):
    reseal(folder, where="all")
    with pytest.raises(FormatError, match="identity"):
        Steering.load(folder)


HOSTILE = {
    "a newer format": {"format": 2},
    "no integer": {"format": "1"},
    "an unknown method": {"method": "nonsense"},
    "a method that is a path": {"method": "../steerers/diffmean"},
    "a method that is a module": {"method": "os.path"},
    "an extra key": {"run": "me"},
    "an unknown field": {"config": {"run": "me"}},
    "huge widths": {"widths": [10**9, 10**9]},
    "many huge widths": {"widths": [999_999, 999_999]},
    "no width": {"widths": [0, 32]},
    "another width": {"widths": [32, 31]},
    "a width less": {"widths": [32]},
    "a width too few": {"sites": ["1.residual"], "widths": [32, 32]},
    "many behaviours": {"behaviours": [f"b{n}" for n in range(4096)], "widths": [99_999, 99_999]},
    "too many behaviours": {"behaviours": ["b"] * 5000},
    "no behaviour": {"behaviours": []},
    "another number of behaviours": {"behaviours": ["a", "b"]},
    "no site": {"sites": [], "widths": []},
    "a strange site": {"sites": ["1.residual", "nonsense"]},
    "a site twice": {"sites": ["1.residual", "1.residual"]},
    "an endless site": {"sites": ["1.residual", "9" * 5000]},
    "a strange scope": {"where": "everywhere"},
    "an endless range": {"where": "range:" + "9" * 5000 + ":"},
    "huge sizes": {"sizes": {"1.residual.rank": 900_000}},
    "a strange base": {"base": {"path": "/etc"}},
    "half a base": {"base": {"base": "x"}},
    "a strange calibration": {"calibration": {"behaviour": {"doses": 5}}},
    "a calibration with more": {"calibration": {"behaviour": CURVE.to_json() | {"x": 1}}},
    "no identity": {"identity": "0"},
    "another identity": {"identity": "0" * 64},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(folder, change):
    reseal(folder, **change)
    with pytest.raises(FormatError):
        Steering.load(folder)


@pytest.mark.parametrize(
    "fields",
    [{"couplings": -1}, {"hidden": 0}, {"hidden": 10**12}, {"mixing": "x"}, {"s_max": "wide"},
     {"subspace": 10**9}, {"hidden": 5}, {"couplings": 4}],
)  # fmt: skip
def test_hostile_fields_of_a_method_are_refused(tmp_path, fields):
    folder = fitted("innsteer").save(tmp_path / "it")
    config = json.loads((folder / HEADER).read_text())["config"]
    reseal(folder, config=config | fields)
    with pytest.raises(FormatError):
        Steering.load(folder)


@pytest.mark.parametrize("missing", ["format", "method", "config", "sites", "where", "identity"])
def test_a_header_without_an_entry_is_refused(folder, missing):
    data = json.loads((folder / HEADER).read_text())
    del data[missing]
    write_json(folder / HEADER, data)
    seal(folder)
    with pytest.raises(FormatError, match=missing):
        Steering.load(folder)


@pytest.mark.parametrize(
    "text",
    ["[" * 50_000, '{"format": NaN}', "[]", '{"a": 1e999}'],
    ids=["deep", "nan", "list", "inf"],
)
def test_a_header_that_is_no_json_object_is_refused(folder, text):
    (folder / HEADER).write_text(text)
    seal(folder)
    with pytest.raises(FormatError):
        Steering.load(folder)


@pytest.mark.parametrize(
    "what", ["nan", "shape", "dtype", "more", "less", "garbage", "empty", "huge header"]
)
def test_hostile_tensors_are_refused(folder, what):
    path = folder / TENSORS
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if what in ("garbage", "empty", "huge header"):
        path.write_bytes({"garbage": b"x" * 99, "empty": b"", "huge header": b"\xff" * 99}[what])
    else:
        tensors |= {
            "nan": {name: tensors[name] * torch.nan},
            "shape": {name: torch.zeros(2, 32)},
            "dtype": {name: tensors[name].half()},
            "more": {"more": torch.zeros(1)},
            "less": {},
        }[what]
        if what == "less":
            del tensors[name]
        save_file(tensors, path)
    seal(folder)
    with pytest.raises(FormatError, match="steering"):
        Steering.load(folder)


# --- parameters of a request ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    return tiny.tiny_language_model()


def flowing(llama):
    """A steering whose maps ask for a concept."""
    return Steering(contract.get("diffmean"), recall(llama), ("concept",), Where("all"))


def test_a_steering_is_told_what_its_maps_ask_for(llama):
    steering = flowing(llama)
    (one,) = steering.told(concept="brave").edit(2.0).told
    assert one == {"concept": "brave"}
    each = steering.told(concept="brave").edit(1.0, parameters=[{}, {"concept": "shy"}]).told
    assert [told["concept"] for told in each] == ["brave", "shy"]
    with pytest.raises(InputError, match="concept, some text"):
        steering.edit(1.0)
    with pytest.raises(InputError, match="'mood'.*expected concept"):
        steering.told(mood="glad")
    with pytest.raises(InputError, match="none: it takes none"):
        fitted().told(concept="x")


def test_what_a_steering_is_told_is_part_of_its_identity(llama):
    steering = flowing(llama)
    brave, shy = (steering.told(concept=text).identity for text in ("brave", "shy"))
    assert len({brave, shy, steering.identity}) == 3
    assert steering.told(concept="shy").told(concept="brave").identity == brave


def test_a_steering_that_was_told_something_is_not_saved(llama, tmp_path):
    with pytest.raises(InputError, match="leaves its parameters to each request"):
        flowing(llama).told(concept="brave").save(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_sequences_attached_by_hand_are_told_their_own(llama):
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    told = [{"concept": "brave"}, {"concept": "shy"}]
    with flowing(llama).on(llama, 1.0, parameters=told):
        both = llama.model(ids).logits
    for row, one in enumerate(told):
        with flowing(llama).told(**one).on(llama, 1.0):
            alone = llama.model(ids[:1]).logits
        torch.testing.assert_close(both[row], alone[0], rtol=0, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
