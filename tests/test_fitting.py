"""Recording and fitting in one call, on rows and through the model."""

from dataclasses import replace

import pytest
import torch

import tiny
from edits import seen, told
from innsteer import choosing, fitting, tuning
from innsteer.activations import Activations
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.contrast import Contrast, Item
from innsteer.errors import InputError, LeakError, MismatchError, UnknownName
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.site import Site, Where
from innsteer.steerer import get
from innsteer.steering import Steering
from innsteer.suites import behaviour as suites
from words import contrast, yes_or_no

OPEN, CHOICE = contrast(), contrast(yes_or_no)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(scope="module")
def fitted(model):
    return fitting.fit(model, OPEN, "diffmean", sites=[Site(1)])


# --- record and fit ------------------------------------------------------------------------------


def test_the_default_site_is_two_thirds_up(model):
    class Deep:
        layout = type("Layout", (), {"blocks": range(30)})

    assert fitting.default_site(Deep) == Site(19) and fitting.middle_site(Deep) == Site(15)
    assert fitting.default_site(model) == Site(1)
    Deep.layout.blocks = range(1)
    assert fitting.default_site(Deep) == fitting.middle_site(Deep) == Site(0)


def test_rows_are_those_of_training_and_validation_and_never_of_the_test_part(model):
    acts = fitting.record_parts(model, OPEN)
    assert set(acts.rows.split) == {"train", "validation"}
    test = {item.id for item in OPEN.test.items}
    assert test and not test & set(acts.rows.item)
    assert len(acts) == 2 * (len(OPEN) - len(test))
    assert acts.sites == (fitting.default_site(model),)


def test_open_answers_are_meaned_and_choices_read_at_their_last_token(model):
    assert fitting.record_parts(model, OPEN).read == "mean"
    assert fitting.record_parts(model, CHOICE).read == "last"
    assert fitting.record_parts(model, OPEN, read="last").read == "last"


def test_a_contrast_without_training_items_is_refused(model):
    with pytest.raises(InputError, match="no training items"):
        fitting.record_parts(model, contrast(parts=("validation", "test")))


def test_a_fit_says_where_it_comes_from(model):
    acts = fitting.record_parts(model, OPEN, [Site(2)])
    steering = fitting.fit_rows(model, get("diffmean"), acts, where=Where("all"), seed=3)
    found = steering.provenance
    assert found["recording"] == acts.hash
    assert found["contrast"] == acts.provenance["contrast"]
    assert (found["read"], found["seed"], found["rows"]) == ("mean", 3, len(acts))
    assert steering.base == model.fingerprint and steering.where == Where("all")
    assert steering.behaviours == ("formal-ish",) and steering.resolve() == 1.0


def test_a_fit_knows_its_whole_contrast_and_the_groups_that_it_saw(model, fitted):
    found = fitted.provenance
    assert found["whole_contrast"] == OPEN.hash != found["contrast"]
    groups = {item.group for item in OPEN.train.items}
    assert len(found["train_groups"]) == len(groups)
    assert found["train_groups"] == sorted(found["train_groups"])
    assert not groups & set(found["train_groups"])
    plain = fitting.record(model, OPEN, [Site(1)])
    assert "train_groups" not in fitting.fit_rows(model, get("diffmean"), plain).provenance


def test_a_recording_on_disk_is_the_one_that_is_fitted(model, fitted, tmp_path):
    acts = fitting.record_parts(model, OPEN, [Site(1)], folder=tmp_path / "rows")
    back = Activations.load(tmp_path / "rows")
    assert (back.hash, back.provenance) == (acts.hash, acts.provenance)
    again = fitting.fit_rows(model, get("diffmean"), back)
    assert again.identity == fitted.identity
    assert again.provenance["train_groups"] == fitted.provenance["train_groups"]
    fitting.record(model, OPEN, [Site(1)], folder=tmp_path / "all")
    fitting.fit(model, OPEN, "diffmean", sites=[Site(1)], folder=tmp_path / "fit")
    assert len(Activations.load(tmp_path / "all")) == 2 * len(OPEN)
    assert Activations.load(tmp_path / "fit").hash == acts.hash


def test_what_was_fitted_is_no_place_to_measure(model, fitted):
    fitting.check_unseen(fitted, OPEN.validation)
    fitting.check_unseen(fitted, OPEN.test)
    first = OPEN.train.items[0].id
    with pytest.raises(LeakError, match=rf"of 9 of 9 train items of 'formal-ish': '{first}', "):
        fitting.check_unseen(fitted, OPEN.train)
    other = contrast(parts=("validation", "train", "test"))
    with pytest.raises(LeakError, match="3 of 5 validation items"):
        tuning.tune(model, fitted, other, preview=True)
    unknown = replace(fitted, provenance={})
    fitting.check_unseen(unknown, OPEN.train)


def test_a_fit_on_some_training_items_is_tuned_on_the_same_validation_items(model):
    kept = [*OPEN.train.subset(4).items, *OPEN.validation.items]
    part = replace(OPEN, items=tuple(kept))
    some = fitting.fit(model, part, "diffmean", sites=[Site(1)])
    assert len(some.provenance["train_groups"]) == 4
    assert tuning.tune(model, some, OPEN, preview=True, fractions=(1.0,)).calibration


def test_tuning_on_another_behaviour_is_refused(model, fitted):
    other = replace(OPEN, behaviour="curt")
    with pytest.raises(InputError, match="'curt' for a steering of 'formal-ish'"):
        tuning.tune(model, fitted, other, preview=True)


def test_fit_takes_a_name_with_fields_or_a_steerer(model, fitted):
    same = fitting.fit(model, OPEN, get("diffmean"), sites=[Site(1)])
    assert same.identity == fitted.identity
    with pytest.raises(UnknownName, match="field of method 'diffmean'"):
        fitting.fit(model, OPEN, "diffmean", hidden=3)


def test_rows_of_another_model_are_refused(model):
    acts = fitting.record_parts(tiny.tiny_language_model(seed=1), OPEN)
    with pytest.raises(MismatchError, match="recorded on 'tiny-llama'.*another weights"):
        fitting.fit_rows(model, get("diffmean"), acts)


def test_a_layer_that_is_not_there_is_refused(model):
    with pytest.raises(InputError, match="layer 99 of a model with 4 blocks"):
        fitting.fit(model, OPEN, "diffmean", sites=[Site(99)])


# --- through the model ---------------------------------------------------------------------------


def stated() -> Contrast:
    """Yes/No questions about a statement, in one wording."""
    names = "Tea Rain Salt Dusk Iron Wool Jazz Rope Clay Mint Oak Fern Lime Sage Hay Ash".split()
    items = []
    for n, name in enumerate(names):
        key, other = ("Yes", "No") if n % 2 else ("No", "Yes")
        prompt = f'Do you say this?\n"{name} is what {names[-n]} wants"\nYes or No.'
        part = ("train", "train", "validation", "test")[n // 2 % 4]
        items.append(Item(f"{n}", prompt, other, key, key, f"group-{n}", part))
    return Contrast("likes", "choice", tuple(items))


@pytest.fixture(scope="module")
def asked():
    return stated()


@pytest.fixture(scope="module")
def sought(model, asked):
    return fitting.fit(model, asked, objective="target", sites=[Site(1)], polish=2)


def test_a_fit_through_the_model_steers_saves_and_says_what_it_saw(model, asked, sought, tmp_path):
    assert sought.provenance["whole_contrast"] == asked.hash
    assert sought.provenance["diagnostics"]["round_trip_64"] < 1e-12
    again = Steering.load(sought.save(tmp_path / "sought"))
    assert again.identity == sought.identity
    part = sought.interventions[Site(1)]
    run = fitting.through(model, asked, [Site(1)])
    assert part.contextual
    rows = run.rows()

    def edits(side):
        """What strength 1 does to the middles of the pairs, or to what shall stay."""
        h = rows.unmoved(Site(1)) if side == "unmoved" else sum(rows.pairs(Site(1))) / 2
        before = rows.where(side=side).context[Site(1)]
        return h, part(h, torch.ones(len(h), 1), before) - h

    (_, moved), (still, left) = edits("source"), edits("unmoved")
    assert moved.norm(dim=-1).min() > 0
    assert len(still) == 160 and left.norm(dim=-1).mean() < moved.norm(dim=-1).mean()


def test_a_run_sees_no_test_item_and_the_fitting_part_of_the_unmoved_statements(model, asked):
    run = fitting.through(model, asked, [Site(1)])
    assert not run.items("test")
    assert len(run.items("train")) == len(asked.train) and run.items("validation")
    # 160 statements in the contrast's wording, and every fourth of them as a plain prompt.
    assert len(run.unmoved) == 200
    own = fitting.through(model, asked, [Site(1)], unmoved=[Prompt("a", "one"), Prompt("b", "two")])
    assert len(own.unmoved) == 42 and len(own.rows().unmoved(Site(1))) == 2


def test_open_answers_leave_neutral_prompts_alone(model):
    count = len(suites.neutral("fit"))
    run = fitting.through(model, OPEN, [Site(1)])
    assert len(run.rows().unmoved(Site(1))) == count and len(run.unmoved) == count + 40
    none = fitting.through(model, OPEN, [Site(1)], unmoved=())
    assert len(none.rows().unmoved(Site(1))) == 0 and len(none.unmoved) == 40


def test_what_a_fit_through_the_model_saw_is_no_place_to_measure(asked, sought):
    with pytest.raises(LeakError):
        fitting.check_unseen(sought, asked.train)
    fitting.check_unseen(sought, asked.test)


def test_a_fit_through_the_model_keeps_its_rows_where_asked(model, asked, tmp_path):
    folder = tmp_path / "rows"
    steering = fitting.fit(model, asked, "condgrad", sites=[Site(1)], folder=folder)
    assert Activations.load(folder).hash == steering.provenance["recording"]


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"read": "mean"}, "read rule"),
        ({"span": (0, 2)}, "read rule"),
        ({"where": Where("all")}, "scope"),
    ],
)
def test_reads_and_scopes_that_a_fit_through_the_model_cannot_honour_are_refused(
    model, asked, how, what
):
    with pytest.raises(InputError, match=what):
        fitting.fit(model, asked, "condgrad", sites=[Site(1)], **how)


def test_a_scope_that_cannot_be_is_refused_before_the_model_runs(model, asked, monkeypatch):
    monkeypatch.setattr(fitting, "through", None)
    with pytest.raises(InputError, match="scope all"):
        fitting.fit(model, asked, objective="target", where=Where("all"))


def test_recorded_answers_are_no_rows_for_what_is_fitted_through_the_model(model, asked, tmp_path):
    acts = fitting.record_parts(model, asked, [Site(1)])
    for method in (get("innsteer", objective="target"), get("condgrad"), get("loreft")):
        with pytest.raises(InputError, match="rows of recorded answers.*leave out --rows"):
            fitting.fit_rows(model, method, acts)
    folder = tmp_path / "rows"
    sought = fitting.fit(model, asked, "condgrad", sites=[Site(1)], folder=folder)
    again = fitting.fit_rows(model, get("condgrad"), Activations.load(folder))
    assert again.interventions[Site(1)].state_dict().keys() == (
        sought.interventions[Site(1)].state_dict().keys()
    )


def test_a_fit_through_the_model_without_training_items_is_refused(model):
    with pytest.raises(InputError, match="no training items"):
        fitting.fit(model, contrast(yes_or_no, parts=("validation", "test")), "condgrad")


def test_a_recording_that_was_cut_short_keeps_its_origin(model, tmp_path, monkeypatch):
    """Whatever a folder of that name holds says which items it was made of."""
    data = contrast()

    def cut(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Activations, "load", staticmethod(cut))
        with pytest.raises(KeyboardInterrupt):
            fitting.record_parts(model, data, [Site(1)], folder=tmp_path / "rows")
    rows = Activations.load(tmp_path / "rows")
    steering = fitting.fit_rows(model, get("diffmean"), rows)
    with pytest.raises(LeakError):
        fitting.check_unseen(steering, data.train)


def test_every_layer_of_a_choice_is_fitted_through_the_model(model, asked, monkeypatch):
    class Tuned:
        behaviours = ("likes",)
        calibration = {
            "likes": type("Curve", (), {"at_budget": type("Dose", (), {"control": 0.7})})
        }

    monkeypatch.setattr(choosing, "tune", lambda *args, **how: Tuned())
    chosen = choosing.choose_layer(model, asked, "condgrad", [Site(1), Site(2)])
    assert list(chosen.provenance["layers"]) == ["1.residual", "2.residual"]


def test_the_fitted_map_changes_what_the_model_answers(model, asked, sought):
    # One that it was fitted on: the gate of a tiny random model may shut on others.
    prompt = asked.train.items[0].prompt
    ids = torch.tensor([model.encode(prompt).ids])
    plain = model.model(ids).logits[0, -1]
    with Attachment(model, [sought.edit(1.0)], prompt_lengths=[ids.shape[1]]) as attached:
        steered = model.model(ids).logits[0, -1]
    assert attached.trace.touched == 1 and not torch.equal(plain, steered)


def test_what_reads_the_prompt_has_one_scope_whichever_way_it_is_fitted(model, asked):
    acts = fitting.through(model, asked, [Site(1)]).rows()
    method = get("innsteer", objective="target")
    assert fitting.fit_rows(model, method, acts).interventions.contextual
    with pytest.raises(InputError, match="scope all for a steering that reads the prompt"):
        fitting.fit_rows(model, method, acts, where=Where("all"))


def test_a_run_stands_half_way_up_unless_told(model, asked):
    assert fitting.through(model, asked).sites == (Site(2),)


def test_statements_to_leave_alone_are_known_in_other_words_too(model, asked):
    acts = fitting.through(model, asked, [Site(1)]).rows()
    assert acts.rewordings(Site(1)).shape == (40, tiny.WIDTH)
    bare = acts.where(side="restated").context[Site(1)]
    first = [prompt.conversation for prompt in suites.unmoved("fit", "{statement}")[::4]][0]
    ids = model.encode(first).ids
    with seen(model, Site(1)) as held:
        model.model(torch.tensor([ids]))
    want = held[0][0, max(1, len(ids) - 65) : -1].mean(0)
    torch.testing.assert_close(bare[0], want, rtol=0, atol=2e-5)


def test_a_fit_that_is_blind_to_wording_sees_statements_in_five_others(model, asked):
    run = fitting.through(model, asked, [Site(1)], reworded=True)
    acts, bare = run.rows(), suites.in_format(asked, "fit")
    assert acts.rewordings(Site(1)).shape == (40 + len(bare), tiny.WIDTH)
    # They are recorded, and not held still.
    assert run.unmoved == fitting.through(model, asked, [Site(1)]).unmoved
    aim = {"objective": "target", "polish": 0}
    blind = fitting.fit(model, asked, sites=[Site(1)], nuisances=6, **aim).interventions[Site(1)]
    moves = acts.prompts.rewordings(Site(1)) / blind.reader.std
    every = moves.mean(0) @ blind.step.read[0, 0]
    plain = fitting.fit(model, asked, sites=[Site(1)], **aim).interventions[Site(1)]
    other = (acts.prompts.rewordings(Site(1)) / plain.reader.std).mean(0) @ plain.step.read[0, 0]
    assert every.abs() < 0.2 * other.abs()


def test_every_method_that_asks_for_other_words_gets_them(model, asked):
    blind, plain = (
        get("gated", method="condgrad", statements="pairs", config={"nuisances": count})
        for count in (2, 0)
    )
    rows = [
        fitting.fit(model, asked, method, sites=[Site(1)]).provenance["rows"]
        for method in (blind, plain, get("innsteer", objective="target", polish=0, nuisances=2))
    ]
    assert rows[0] == rows[2] == rows[1] + len(suites.in_format(asked, "fit"))


def test_unmoved_prompts_gate_an_open_behaviour_and_are_refused_where_nothing_is_run(model):
    prompts = [Prompt(f"u{n}", f"How many are {n} and {n}?") for n in range(12)]
    aim = {"objective": "target", "polish": 0}
    gated = fitting.fit(model, OPEN, sites=[Site(1)], unmoved=prompts, **aim)
    assert gated.interventions.contextual
    assert fitting.fit(model, OPEN, sites=[Site(1)], **aim).interventions.contextual
    bare = fitting.fit(model, OPEN, sites=[Site(1)], unmoved=(), **aim)
    assert not bare.interventions.contextual
    with pytest.raises(InputError, match="unmoved prompts for 'diffmean'"):
        fitting.fit(model, OPEN, "diffmean", unmoved=prompts)


def test_a_meter_tells_a_map_the_prompt_that_it_keeps(model):
    backend = HF(model)
    prompts = [Prompt(f"{n}", f"{'so ' * n}what is it?") for n in range(4)]
    reference = backend.reference(prompts, Sampling(6, 1.0))
    edit = Edit(told(model), torch.tensor([0.7]))
    columns, found = [], []
    block = model.layout.blocks[2].module
    for sites in ([Site(1)], []):
        meter, seen_columns = backend.meter(reference, sites), []
        with block.register_forward_pre_hook(lambda _, args: seen_columns.append(args[0].shape[1])):
            found.append(meter([edit]))
        columns.append(seen_columns[-1])  # the first passes are the unsteered ones
    kept, whole = found
    assert columns[0] <= 8 < columns[1]  # the prompts do not run again
    for one, other in zip(kept, whole, strict=True):
        assert one.values["kl"] == pytest.approx(other.values["kl"], abs=1e-4)
        assert max(one.values["kl"]) > 1e-3
