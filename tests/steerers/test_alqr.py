"""A-LQR: loop and set-points by hand, the authors' logits, its twin, fits of tiny models."""

import math
from dataclasses import replace

import pytest
import torch

import tiny
from backends.test_local import official
from innsteer import fitting, tuning
from innsteer.activations import Activations
from innsteer.control import Weights, horizon
from innsteer.errors import InputError, UnknownName
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.setpoints import feature
from innsteer.site import Site, Where
from innsteer.steerer import Interventions, get
from innsteer.steerers.alqr import ALQR, Feedback
from innsteer.steering import Steering
from words import contrast, yes_or_no

OPEN, CHOICE = contrast(), contrast(yes_or_no)
PRICES = {"q": 0.1, "r": 1.0, "q_f": 0.1}


def of_gaps(gaps, k=1):
    """Source rows of 0 and target rows of given gaps ``[layers, k, d]``, at blocks' inputs."""
    parts = []
    for row in range(k):
        source = torch.zeros(2, gaps.shape[-1])
        part = Activations.of_sides(source, source + 1, behaviour=f"b{row}")
        values = {Site(n): torch.cat([source, source + gap[row]]) for n, gap in enumerate(gaps)}
        parts.append(replace(part, values=values))
    return Activations.together(parts) if k > 1 else parts[0]


class Given:
    """A chain whose rows and Jacobians are given."""

    def __init__(self, acts, matrices):
        self.behaviours, self.sites = acts.behaviours, acts.sites
        self.acts, self.matrices = acts, matrices

    def inputs(self, interventions=None, **how):
        assert interventions is None
        return self.acts

    def jacobian(self, block, *, prompts=50, rank=0, seed=0):
        return self.matrices[block]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_language_model()


@pytest.fixture(scope="module")
def fitted(model):
    return fitting.fit(model, OPEN, "alqr", prompts=3)


# --- the loop ------------------------------------------------------------------------------------


def test_a_control_is_the_missing_part_of_the_level_along_the_gain():
    part = Feedback(3)
    part.reads[0], part.writes[0], part.levels[0] = (
        torch.tensor([1.0, 0, 0]),
        torch.tensor([0.5, 0.25, 0]),
        4.0,
    )
    x, h = torch.tensor([[1.0, 9, 9], [4, 0, 0]]), torch.zeros(2, 3)
    for strength, errors in ((1.0, (3.0, 0.0)), (0.5, (1.5, 0.0)), (-2.0, (-10.0, -16.0))):
        coef = torch.full((2, 1), strength)
        out, carry = part.leave(h, coef, part.enter(x, coef, part.start(x)))
        assert carry.tolist() == [[errors[0]], [errors[1]]]
        assert out.tolist() == [[error * 0.5, error * 0.25, 0] for error in errors]
    part.origins[0] = 1.0
    assert part.enter(x, torch.ones(2, 1), part.start(x)).tolist() == [[4.0], [1.0]]
    assert part.enter(x, -torch.ones(2, 1), part.start(x)).tolist() == [[-4.0], [-7.0]]


def test_two_concepts_add_their_controls():
    acts = of_gaps(torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)), k=2)
    chain = torch.eye(5) + 0.2 * torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1))
    both = ALQR(lowest=0).fit_through(Given(acts, chain))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    for site, part in both.items():
        moved = []
        for coef in ([1.0, 0.0], [0.0, 0.7], [1.0, 0.7]):
            rows = torch.tensor([coef] * 4)
            moved.append(part.leave(x, rows, part.enter(x, rows, part.start(x)))[0] - x)
        torch.testing.assert_close(moved[0] + moved[1], moved[2], rtol=0, atol=1e-5)
        for row, name in enumerate(acts.behaviours):
            alone = replace(acts.where(behaviour=name), behaviours=(name,))
            own = ALQR(lowest=0).fit_through(Given(alone, chain))[site]
            torch.testing.assert_close(own.writes[0], both[site].writes[row])


def test_a_clipped_control_keeps_its_direction_and_is_no_longer_than_its_share():
    free, tight = Feedback(4), Feedback(4, clip=0.1)
    draw = torch.Generator().manual_seed(0)
    for part in (free, tight):
        part.reads[0, 0], part.levels[0] = 1.0, 50.0
        part.writes[0] = torch.tensor([1.0, 2, 0, 0])
    x = torch.randn(6, 4, generator=draw)
    x[0, 0] = 50 - 1e-3  # nearly there: not clipped
    ones = torch.ones(6, 1)
    moves = [p.leave(x, ones, p.enter(x, ones, p.start(x)))[0] - x for p in (free, tight)]
    torch.testing.assert_close(moves[0][0], moves[1][0])
    share = moves[1].norm(dim=-1) / x.norm(dim=-1)
    torch.testing.assert_close(share[1:], torch.full((5,), 0.1))
    cosine = torch.nn.functional.cosine_similarity(*moves)
    torch.testing.assert_close(cosine, torch.ones(6), rtol=0, atol=1e-3)
    # As the engines apply it: bound to a pass's strengths.
    bound = tight.bound(ones)
    moved = bound.write(x, bound.read(x, tight.start(x)))[0] - x
    torch.testing.assert_close(moved, moves[1])


def test_diagnostics_say_how_much_of_an_error_a_block_takes_away_and_how_straight():
    part = Feedback(2, k=2)
    part.reads[:] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    part.writes[:] = torch.tensor([[0.3, 0.4], [0.0, 0.1]])
    told = ALQR().diagnose(of_gaps(torch.ones(1, 2, 2), k=2), Interventions({Site(0): part}))
    assert told == pytest.approx({"correction": (0.3 + 0.1) / 2, "straight": (0.6 + 1.0) / 2})


def test_the_open_loops_mean_error_is_weighed_and_of_as_many_texts_as_asked():
    acts = of_gaps(torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(5)))
    values = {
        site: h + torch.tensor([[0.0], [3.0], [0.0], [3.0]]) for site, h in acts.values.items()
    }
    acts = replace(acts, values=values)
    weights = acts.rows.weight.copy()
    weights[0] = 3.0  # of the two source rows
    asked = []

    class Watched(Given):
        def inputs(self, interventions=None, **how):
            asked.append(how)
            return self.acts if interventions is None else self.acts.where(side="source")

    found = []
    for weight in (acts.rows.weight, weights):
        run = Watched(replace(acts, rows=replace(acts.rows, weight=weight)), [torch.eye(4)] * 2)
        method = ALQR(lowest=0, loop="open", texts=7)
        # The closed loop in the open one's place: what its rows' errors are.
        closed = replace(method, loop="closed").fit_through(run)
        told = method._watched(run, closed, 0)
        for site, part in closed.items():
            level = part.levels[0] + part.origins[0]
            errors = level - run.acts.where(side="source").values[site] @ part.reads[0]
            share = torch.from_numpy(weight[:2] / weight[:2].sum()).float()
            torch.testing.assert_close(told[site].float()[0], share @ errors)
        found.append(torch.stack(list(told.values())))
    assert not torch.allclose(found[0], found[1])
    assert {how["most"] for how in asked} == {7}
    assert [how.get("steered") for how in asked] == [None, True] * 2, "features are of last tokens"


# --- set-points and gains ------------------------------------------------------------------------


def test_set_points_are_lambda_lengths_of_each_layers_own_contrast():
    gaps = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[0.0, -2.0]]])
    maps = ALQR(lowest=0, setpoint=3).fit_through(Given(of_gaps(gaps), [torch.eye(2)] * 3))
    first, second, last = (maps[Site(n)] for n in range(3))
    torch.testing.assert_close(first.reads, torch.tensor([[0.6, 0.8]]))
    assert first.levels.item() == 15.0 and last.levels.item() == 6.0
    assert last.reads.tolist() == [[0.0, -1.0]]
    assert not any(part.any() for part in (second.reads, second.writes, second.levels))


def test_set_points_lie_beyond_the_source_mean_or_zero():
    acts = of_gaps(torch.tensor([[[2.0, 0.0]]]))
    acts = replace(acts, values={Site(0): acts.values[Site(0)] + torch.tensor([5.0, 1.0])})
    for origin, at in (("source", 5.0), ("zero", 0.0)):
        maps = ALQR(lowest=0, setpoint=1, origin=origin).fit_through(Given(acts, [torch.eye(2)]))
        assert maps[Site(0)].origins.item() == at and maps[Site(0)].levels.item() == 2.0


def test_gains_are_the_regulators_along_each_layers_feature():
    draw = torch.Generator().manual_seed(3)
    gaps = torch.randn(4, 1, 6, generator=draw)
    chain = torch.eye(6) + 0.3 * torch.randn(4, 6, 6, generator=draw)
    steps = horizon(chain.numpy(), Weights(0.2, 7, 0.2))
    jacobian = ALQR(lowest=0, q=0.2, r=7, q_f=0.2).fit_through(Given(of_gaps(gaps), chain))
    identity = ALQR(lowest=0, q=0.2, r=7, q_f=0.2, dynamics="identity").fit_through(
        Given(of_gaps(gaps), None)
    )
    numbers = horizon([[[1.0]]] * 4, Weights(0.2, 7, 0.2))
    for n, step in enumerate(steps):
        v = jacobian[Site(n)].reads[0]
        wanted = torch.from_numpy(step.feedback).float() @ v
        torch.testing.assert_close(jacobian[Site(n)].writes[0], wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            identity[Site(n)].writes[0], numbers[n].feedback.item() * v, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("lam", [1, 2])
@pytest.mark.parametrize("scope", ["generated", "all"])
def test_steered_logits_are_the_authors(shared, lam, scope):
    """A-LQR on the last token, and A-LQR+ on all: fields, gains and hooks together."""
    own, known = official(shared)
    run = Given(of_gaps(known["E"][:, None]), known["A_mean"])
    maps = ALQR(lowest=0, setpoint=lam, origin="zero", **PRICES).fit_through(run)
    for n, part in maps.items():
        wanted = known["K"][n.layer] @ part.reads[0]
        torch.testing.assert_close(part.writes[0], wanted, rtol=0, atol=1e-4)
    edit = Edit(maps, torch.ones(1), Where.parse(scope))
    with torch.no_grad(), Attachment(own, [edit], prompt_lengths=[6] * 3):
        logits = own.model(known["ids"]).logits
    if scope == "all":
        torch.testing.assert_close(logits, known[f"logits_all_lam{lam}"], rtol=0, atol=1e-3)
    else:
        torch.testing.assert_close(logits[:, -1], known[f"logits_last_lam{lam}"], rtol=0, atol=1e-3)
        assert (logits[:, -1] - known["logits_base"]).abs().max() > 0.01


def test_the_controller_sees_upstream_edits_as_the_authors_does(shared):
    own, known = official(shared)
    maps = ALQR(lowest=0, setpoint=2, origin="zero", **PRICES).fit_through(
        Given(of_gaps(known["E"][:, None]), known["A_mean"])
    )
    blocks, seen = own.layout.blocks, []
    handles = [
        block.module.register_forward_pre_hook(lambda _, args: seen.append(args[0][-1, -1]))
        for block in blocks
    ]
    with torch.no_grad(), Attachment(own, [Edit(maps, torch.ones(1))], prompt_lengths=[6] * 3):
        own.model(known["ids"])
    for handle in handles:
        handle.remove()
    inputs = torch.stack(seen)
    torch.testing.assert_close(inputs, known["X_last_lam2"], rtol=0, atol=1e-3)
    controls = [
        part.writes[0] * (part.levels[0] - part.reads[0] @ inputs[site.layer])
        for site, part in maps.items()
    ]
    torch.testing.assert_close(torch.stack(controls), known["U_last_lam2"], rtol=0, atol=1e-3)


# --- the twin ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1.0, 0.2])
def test_the_open_twin_adds_at_each_layer_the_mean_control_of_the_closed_loop(model, at):
    data = OPEN
    closed, twin = (
        fitting.fit(model, data, "alqr", prompts=3, **how).interventions
        for how in ({"loop": "closed"}, {"loop": "open", "at": at})
    )
    chain = fitting.linearised(model, data)
    acts = chain.inputs(closed, coef=[at], side="source", steered=True).where(split="train")
    plain = chain.inputs(side="source").where(split="train")
    share = torch.from_numpy(acts.rows.weight / acts.rows.weight.sum()).float()
    for site, part in closed.items():
        errors = part.levels[0] + part.origins[0] - acts.values[site] @ part.reads[0]
        mean = (share @ errors) * part.writes[0]
        other = twin[site]
        assert not other.reads.any()
        torch.testing.assert_close(other.levels[0] * other.writes[0], mean, rtol=1e-4, atol=1e-5)
    # The rows held the controls of the blocks below.
    last = Site(3)
    assert (acts.values[last] - plain.values[last]).abs().max() > 1e-3


@pytest.mark.parametrize("at", [1.0, 0.2])
def test_the_twin_of_rows_alone_goes_where_the_closed_loop_goes_on_its_mean_row(at):
    draw = torch.Generator().manual_seed(4)
    source = torch.randn(30, 4, generator=draw)
    gap = torch.tensor([2.0, 0, 1.0, 0])
    acts = Activations.of_sides(source, source + gap)
    acts = replace(acts, values={Site(n): acts.values[acts.site] for n in range(4)})
    closed, twin = (method.fit(acts) for method in (ALQR(), ALQR(loop="open", at=at)))
    mean, others = source.mean(0, keepdim=True), source[:5]
    ends = []
    for maps in (closed, twin):
        for start in (mean, others):
            h, carry, coef = start, None, torch.full((len(start), 1), at)
            for _, part in maps.items():
                carry = part.enter(h, coef, part.start(h) if carry is None else carry)
                h, carry = part.leave(h, coef, carry)
            ends.append(h)
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-5)
    assert (ends[1] - ends[3]).abs().max() > 0.1, "feedback answers to the row"
    along = gap / gap.norm()
    spread = (ends[1] @ along).std() / (ends[3] @ along).std()
    assert spread < (0.5 if at == 1 else 0.9), "and evens it out"


# --- on models -----------------------------------------------------------------------------------


def test_a_fit_steers_all_blocks_and_comes_back_from_disk(model, fitted, tmp_path):
    assert list(fitted.interventions) == [Site(n) for n in range(1, 4)]
    every = fitting.fit(model, OPEN, "alqr", dynamics="identity", lowest=0).interventions
    assert list(every) == [Site(n) for n in range(4)]
    again = Steering.load(fitted.save(tmp_path / "steering"))
    assert again.identity == fitted.identity
    ids = torch.arange(5, 17)[None]
    logits = []
    for steering in (fitted, again):
        with torch.no_grad(), Attachment(model, [steering.edit(1.0)], prompt_lengths=[12]):
            logits.append(model.model(ids).logits)
    assert torch.equal(*logits)
    with torch.no_grad():
        plain = model.model(ids).logits
        with Attachment(model, [fitted.edit(0.0)], prompt_lengths=[12]):
            still = model.model(ids).logits
    assert torch.equal(still, plain) and not torch.equal(logits[0], plain)
    assert {"correction", "straight"} <= set(fitted.provenance["diagnostics"])


def test_another_seed_draws_other_texts_and_the_same_one_the_same(model, fitted):
    again = fitting.fit(model, OPEN, "alqr", prompts=3)
    other = fitting.fit(model, OPEN, "alqr", prompts=3, seed=1)
    assert again.identity == fitted.identity != other.identity


def test_the_feature_comes_closer_to_its_level_than_without_feedback_of_the_model(model, fitted):
    """On source texts, at the inputs of the blocks above the first."""
    chain = fitting.linearised(model, OPEN)
    plain = chain.inputs(side="source")
    steered = chain.inputs(fitted.interventions, side="source")
    gaps = []
    for site, part in list(fitted.interventions.items())[1:]:
        v, level = part.reads[0], part.levels[0] + part.origins[0]
        gaps.append([(level - a.values[site] @ v).abs().mean() for a in (plain, steered)])
    before, after = torch.tensor(gaps).mean(0)
    assert after < 0.8 * before


def test_tuning_finds_a_strength_and_measures_through_every_block(model, fitted):
    tuned = tuning.tune(model, fitted, OPEN, preview=True, fractions=(1.0,))
    assert tuned.resolve("budget") > 0


def test_choices_and_several_behaviours_are_fitted_with_gains_of_one_chain(model):
    data = [CHOICE, replace(CHOICE, behaviour="other")]
    steering = fitting.fit(model, data, "alqr", prompts=3)
    part = steering.interventions[Site(1)]
    assert part.reads.shape == (2, 32) and torch.equal(part.reads[0], part.reads[1])


def test_scope_all_is_taken_and_rows_of_the_fit_are_kept(model, tmp_path):
    steering = fitting.fit(
        model, OPEN, "alqr", prompts=3, where=Where("all"), folder=tmp_path / "rows"
    )
    assert steering.where == Where("all")
    acts = Activations.load(tmp_path / "rows")
    assert acts.hash == steering.provenance["recording"]
    direction, size, origin = feature(acts, Site(2), acts.behaviours[0])
    part = steering.interventions[Site(2)]
    source = acts.sides(Site(2))[0].double().mean(0)
    assert part.origins.item() == pytest.approx((direction @ source).item(), abs=1e-4)
    assert origin == pytest.approx(part.origins.item(), abs=1e-4)
    torch.testing.assert_close(part.reads[0], direction.float())
    assert part.levels.item() == pytest.approx(2 * size)


def test_a_few_neighbouring_blocks_will_do_and_a_low_rank_fit_is_near(model):
    exact = fitting.fit(model, OPEN, "alqr", prompts=3, sites=[Site(1), Site(2)])
    near = fitting.fit(model, OPEN, "alqr", prompts=3, sites=[Site(1), Site(2)], rank=28)
    far = fitting.fit(model, OPEN, "alqr", prompts=3, sites=[Site(1), Site(2)], rank=2)
    lost = [one.provenance["diagnostics"]["low_rank_error"] for one in (near, far)]
    chain = fitting.linearised(model, OPEN, [Site(1), Site(2)])
    assert lost[1] == max(chain.low_rank(n, 2, prompts=3).error for n in (1, 2)) > 5 * lost[0] > 0

    def off(other):
        return max(
            (part.writes - other.interventions[site].writes).norm() / part.writes.norm()
            for site, part in exact.interventions.items()
        )

    assert off(near) < 0.1 < off(far)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"r": 0}, InputError, "r=0"),
        ({"setpoint": math.nan}, InputError, "setpoint=nan"),
        ({"prompts": 0}, InputError, "prompts=0"),
        ({"texts": 0}, InputError, "texts=0"),
        ({"lowest": -1}, InputError, "lowest=-1"),
        ({"rank": -1}, InputError, "rank=-1"),
        ({"at": 0.0, "loop": "open"}, InputError, r"at=0\.0"),
        ({"at": 0.5}, InputError, r"at=0\.5 of a closed loop.*leave out at"),
        ({"clip": 0.0}, InputError, r"clip=0\.0"),
        ({"clip": 0.02, "loop": "open"}, InputError, r"clip=0\.02.*leave out clip"),
        ({"origin": "target"}, UnknownName, "origin 'target'"),
        ({"loop": "half"}, UnknownName, "loop 'half'"),
        ({"dynamics": "linear"}, UnknownName, "dynamics 'linear'"),
    ],
)
def test_fields_out_of_range_are_refused(fields, error, match):
    with pytest.raises(error, match=match):
        get("alqr", **fields)


def test_blocks_that_are_no_neighbours_and_one_alone_are_refused(model):
    with pytest.raises(InputError, match=r"0\.residual, 2\.residual.*neighbouring"):
        fitting.fit(model, OPEN, "alqr", sites=[Site(0), Site(2)], lowest=0)
    with pytest.raises(InputError, match=r"lowest=1 above all of the sites 0\.residual"):
        fitting.fit(model, OPEN, "alqr", sites=[Site(0)])
    acts = Activations.of_sides(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(InputError, match="no two of which are of neighbours"):
        ALQR().fit(acts)


def test_validation_chooses_set_points_from_the_authors_to_twice_theirs():
    (levels,) = ALQR.choices.values()
    assert {1.0, 3.5, 7.0, ALQR().setpoint} <= {*levels} and {*ALQR.choices} == {"setpoint"}
