"""The laws of the contract, for every method on the shelf, and for each law a copy that breaks it.

Laws are functions that take an intervention, a steerer, a steering or a flow and assert. A method
is tested by standing on the shelf: nothing here names one.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import innsteer
from edits import Recall
from innsteer import shelf, steerer
from innsteer.activations import Activations, Rows
from innsteer.errors import InputError
from innsteer.flows import Flow, coupling_stack
from innsteer.interventions import SetPoint, Shift
from innsteer.site import Site
from innsteer.steerer import AcrossSites, AcrossTokens, Intervention, Interventions, Steerer
from innsteer.steering import Steering
from innsteer.tokens import TokenContext

WIDTHS = {Site(1): 7, Site(3, "mlp"): 8}  # odd and even, two sites
BLOCKS = {Site(0): 7, Site(1): 7, Site(2): 7}  # for methods across sites: outputs of neighbours
COUNT = 24
SIDES = ("source", "target", "unmoved")
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}
METHODS = {method["name"]: method for method in shelf.describe()}
# Methods that push the way an item's key says: the means of their two sides are alike.
CONDITIONAL = {
    name
    for name, method in METHODS.items()
    if "gradients" in method["needs"] and "pairs" not in method["needs"]
}
ACROSS = {name for name, method in METHODS.items() if method["across_sites"]}

ON_ROWS = [name for name, method in METHODS.items() if not method["across_tokens"]]
ACROSS_TOKENS = [name for name, method in METHODS.items() if method["across_tokens"]]

every_method = pytest.mark.parametrize("name", ON_ROWS)
across_tokens = pytest.mark.parametrize("name", ACROSS_TOKENS)
both_counts = pytest.mark.parametrize("k", [1, 2])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# --- material ------------------------------------------------------------------------------------


def recording(
    k: int = 1,
    *,
    seed: int = 0,
    split: str = "train",
    widths: Mapping[Site, int] = WIDTHS,
) -> Activations:
    """Keyed pairs of each behaviour at every site, and rows that must not move.

    Dimensions differ in spread as a residual's do.
    """
    draw = torch.Generator().manual_seed(seed)
    values = {site: [] for site in widths}
    for behaviour in range(k):
        for side in range(len(SIDES)):
            for site, width in widths.items():
                spread = torch.linspace(0.5, 4, width)
                gap = spread * torch.cos(torch.arange(width) + 1.0 + behaviour) * 1.5
                rows = torch.randn(COUNT, width, generator=draw) * spread
                values[site].append(rows + (side % 2) * gap + 3 - 9 * (side // 2) * spread)
    return of_parts(values, k, split)


def seeking(k: int = 1, *, seed: int = 0) -> Activations:
    """Target-seeking rows: pairs about rows that tell the key, apart the way the key says."""
    draw = torch.Generator().manual_seed(seed)
    values = {site: [] for site in WIDTHS}
    key = torch.tensor([1.0, -1.0] * (COUNT // 2)).unsqueeze(1)
    for behaviour in range(k):
        for site, width in WIDTHS.items():
            spread = torch.linspace(0.5, 4, width)
            told = torch.eye(width)[-1 - behaviour]
            lift = spread * torch.cos(torch.arange(width) + 1.0 + behaviour) * 0.75 * (1 - told)
            rows = torch.randn(COUNT, width, generator=draw) * spread * (1 - told)
            rows = rows + 3 + 3 * spread * told * key
            still = torch.randn(COUNT, width, generator=draw) * spread + 3 - 9 * spread
            values[site] += [rows - key * lift, rows + key * lift, still]
    return of_parts(values, k)


def of_parts(values: Mapping[Site, list[Tensor]], k: int, split: str = "train") -> Activations:
    """A recording of parts of ``COUNT`` rows: the sides of each behaviour, one after the other."""
    records = [
        {
            "behaviour": f"b{b}",
            "item": f"{side}-{b}-{i}" if side == "unmoved" else f"{b}-{i}",
            "side": side,
            "key": "" if side == "unmoved" else ("Yes", "No")[i % 2],
            "pair": "" if side == "unmoved" else f"{b}-{i}",
            "split": split,
        }
        for b in range(k)
        for side in SIDES
        for i in range(COUNT)
    ]
    joined = {site: torch.cat(parts) for site, parts in values.items()}
    return Activations(joined, Rows.of(records), tuple(f"b{b}" for b in range(k)))


def given(name: str, k: int = 1) -> Activations:
    """The recording that suits a method."""
    return seeking(k) if name in CONDITIONAL else recording(k, widths=widths_of(name))


def widths_of(name: str) -> Mapping[Site, int]:
    """The sites at which a method is recorded."""
    return BLOCKS if name in ACROSS else WIDTHS


def alone(name: str, **how) -> Activations:
    """A recording at one site, or of all blocks for a method that acts across them."""
    if name in ACROSS:
        return recording(widths=BLOCKS, **how)
    return recording(**how).at(Site(1))


def brief(name: str) -> Steerer:
    """The method with its defaults, but for a short training where it has one."""
    return steerer.get(name, **({"epochs": 40} if "epochs" in METHODS[name]["fields"] else {}))


@cache
def fitted(name: str, k: int) -> Steering:
    """The method fitted on its recording of k behaviours."""
    acts = given(name, k)
    return Steering(brief(name), brief(name).fit(acts), acts.behaviours)


class Chain(nn.Module):
    """Maps across sites as one map of rows, with blocks between them that add nothing."""

    def __init__(self, maps: Interventions) -> None:
        super().__init__()
        self.maps, self.width = maps, next(part.width for _, part in maps.items())

    def forward(self, h: Tensor, coef: Tensor) -> Tensor:
        carry = None
        for _, part in self.maps.items():
            carry = part.enter(h, coef, part.start(h) if carry is None else carry)
            h, carry = part.leave(h, coef, carry)
        return h


def maps_of(interventions: Interventions) -> dict[Site, nn.Module]:
    """Maps of rows by their site; those that act across sites make one, from the lowest on."""
    if interventions.across:
        return {interventions.sites[0]: Chain(interventions)}
    return dict(interventions.items())


def parts(name: str, k: int) -> Iterator[nn.Module]:
    """The fitted map of every site."""
    return iter(maps_of(fitted(name, k).interventions).values())


def width_of(part: Intervention) -> int:
    """The width of a part."""
    return part.width


def rows(width: int, *, count: int = 9, seed: int = 5) -> Tensor:
    """Rows near the recorded ones."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 2 + 3


def strengths(k: int, count: int = 9, *, seed: int = 6) -> Tensor:
    """Coefficients, none of them 0."""
    return torch.rand(count, k, generator=torch.Generator().manual_seed(seed)) + 0.25


def bits(rows: Tensor) -> Tensor:
    """The integers behind the floats: NaN payloads and the sign of 0 count."""
    return rows.contiguous().view(INTEGERS[rows.dtype])


def non_finite(dtype: torch.dtype, width: int) -> Tensor:
    """Rows with one bad entry each: infinities, NaNs with payloads, a signalling one too."""
    patterns = {
        torch.float32: [0x7F800000, -0x800000, 0x7FC12345, -0x3EDCBB, 0x7F812345],
        torch.bfloat16: [0x7F80, -0x80, 0x7FC5, -0x3B, 0x7F91],
    }[dtype]
    bad = rows(width, count=len(patterns)).to(dtype)
    integers = bad.view(INTEGERS[dtype])
    for row, pattern in enumerate(patterns):
        integers[row, row % width] = pattern
    assert not torch.isfinite(bad).all(-1).any()
    return bad


# --- the laws ------------------------------------------------------------------------------------


def law_untouched_rows_come_back_bit_for_bit(part: Intervention, k: int, dtype: torch.dtype):
    """Law 1, each kind of row standing between rows that are steered."""
    d = width_of(part)
    still, bad, moved = rows(d).to(dtype), non_finite(dtype, d), rows(d, seed=7).to(dtype)
    still[0, 0], still[1] = -0.0, 0.0
    h = torch.cat([still, bad, moved])
    coef = torch.cat([torch.zeros(len(still), k), strengths(k, len(bad)), strengths(k, len(moved))])
    coef[1, 0] = -0.0
    out = part(h, coef)
    n = len(still) + len(bad)
    assert torch.equal(bits(out[:n]), bits(h[:n])), "an untouched row has changed"
    assert (out[n:] != moved).any(-1).all(), "a steered row has not changed"
    assert torch.isfinite(out[n:]).all(), "a bad row has spread"


def law_form_is_kept_and_nothing_happens_in_place(part: Intervention, k: int, dtype: torch.dtype):
    """Law 2, for no rows, one row, many, and rows that are a strided view."""
    d = width_of(part)
    views = [rows(d, count=n).to(dtype) for n in (0, 1, 9)] + [rows(d).to(dtype).mT.clone().mT]
    for h in views:
        coef = strengths(k, len(h))
        state = [t.clone() for t in part.state_dict().values()]
        h_before, coef_before = h.clone(), coef.clone()
        out = part(h, coef)
        assert out.shape == h.shape and out.dtype == h.dtype and out.device == h.device
        assert torch.equal(bits(h), bits(h_before)) and torch.equal(coef, coef_before), "in place"
        after = part.state_dict().values()
        assert all(map(torch.equal, state, after)), "the map itself changed"


def law_neighbours_do_not_matter(part: Intervention, k: int):
    """Law 3: alone, in another order, and beside a bad row, a row gets the same edit."""
    d = width_of(part)
    bounds = {torch.float64: lambda edit: 1e-12, torch.float32: lambda edit: 1e-5 * edit.norm()}
    for dtype, bound in bounds.items():
        own = copy.deepcopy(part).to(dtype)
        h, coef = rows(d).to(dtype), strengths(k).to(dtype)
        together = own(h, coef)
        turned = own(h.flip(0), coef.flip(0)).flip(0)
        bad = torch.full((1, d), float("nan"), dtype=dtype)
        beside = own(torch.cat([h, bad]), torch.cat([coef, coef[:1]]))[:-1]
        for i in range(len(h)):
            alone = own(h[i : i + 1], coef[i : i + 1])[0]
            limit = bound(alone - h[i])
            for other in (together[i], turned[i], beside[i]):
                assert (other - alone).norm() <= limit, "a neighbour changed the edit"


def carries(part: AcrossSites, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What blocks below may have handed on."""
    draw = torch.Generator().manual_seed(8)
    return torch.randn(count, part.carry, generator=draw, dtype=dtype)


def law_untouched_rows_keep_their_carry(part: AcrossSites, k: int, dtype: torch.dtype):
    """Law 1 across sites: row and carry, at a block's input and at its output.

    A row without strength keeps both; one that is not finite, or was not at a block below, comes
    back and hands on NaN; neither spreads.
    """
    d = width_of(part)
    still, bad, moved = rows(d).to(dtype), non_finite(dtype, d), rows(d, seed=7).to(dtype)
    h = torch.cat([still, bad, moved])
    zero, lost, n = len(still), len(still) + len(bad), len(h)
    coef = torch.cat([torch.zeros(zero, k), strengths(k, n - zero)])
    before = carries(part, n)
    before[0], before[-1] = torch.nan, torch.nan
    out, left = part.leave(h, coef, before)
    for after in (part.enter(h, coef, before), left):
        assert torch.equal(bits(after[:zero]), bits(before[:zero])), "an untouched row's carry"
        assert torch.isnan(after[zero:lost]).all(), "a bad row hands on a number"
        assert torch.isfinite(after[lost:-1]).all(), "a bad row has spread"
        assert torch.isnan(after[-1:]).all(), "a lost row was found again"
    assert torch.equal(bits(out[:lost]), bits(h[:lost])), "an untouched row has changed"
    assert torch.equal(bits(out[-1:]), bits(h[-1:])), "a lost row has changed"
    assert torch.isfinite(out[lost:]).all(), "a bad row has spread"


def law_a_carry_keeps_its_form_and_nothing_happens_in_place(
    part: AcrossSites, k: int, dtype: torch.dtype
):
    """Law 2 across sites: the carry is of the compute dtype, and starts at zeros."""
    d = width_of(part)
    own = {torch.float32: part, torch.bfloat16: part, torch.float64: copy.deepcopy(part).double()}
    for kind, wanted in {dtype: torch.float32, torch.float64: torch.float64}.items():
        h, coef = rows(d).to(kind), strengths(k)
        start = own[kind].start(h)
        assert not start.any() and start.shape == (len(h), part.carry) and start.dtype == wanted
        before = carries(part, len(h), wanted)
        kept = h.clone(), coef.clone(), before.clone()
        entered = own[kind].enter(h, coef, before)
        out, left = own[kind].leave(h, coef, before)
        assert out.shape == h.shape and out.dtype == h.dtype
        for after in (entered, left):
            assert after.shape == before.shape and after.dtype == wanted, "another carry"
        assert all(map(torch.equal, kept, (h, coef, before))), "in place"


def law_neighbours_do_not_matter_to_a_carry(part: AcrossSites, k: int):
    """Law 3 across sites: alone and beside others a row hands on the same."""
    own = copy.deepcopy(part).double()
    h, coef, before = (
        rows(width_of(part)).double(),
        strengths(k).double(),
        carries(part, 9).double(),
    )
    together = torch.stack([own.enter(h, coef, before), own.leave(h, coef, before)[1]])
    for i in range(len(h)):
        given = h[i : i + 1], coef[i : i + 1], before[i : i + 1]
        alone = torch.stack([own.enter(*given), own.leave(*given)[1]])[:, 0]
        assert (together[:, i] - alone).norm() <= 1e-12, "a neighbour changed the carry"


def law_a_bound_map_is_the_map(part: AcrossSites, k: int):
    """Law 3 across sites: at strengths that are fixed, alike or not, the same comes out.

    And what is not finite is not mended: an engine looks at the outcome alone.
    """
    own, d = copy.deepcopy(part).double(), width_of(part)
    h, before = rows(d).double(), carries(part, 9).double()
    for coef in (strengths(k), strengths(k)[:1].expand(9, -1), -strengths(k)[-1:].expand(9, -1)):
        coef, alike = coef.double(), own.bound(coef.double())
        read, (out, left) = alike.read(h, before), alike.write(h, before)
        wanted = own.enter(h, coef, before), *own.leave(h, coef, before)
        for got, want in zip((read, out, left), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11, msg="another map")
        bad = torch.cat([non_finite(torch.float32, d).double(), h[:1]])
        lost = torch.cat([before[: len(bad) - 1], torch.full_like(before[:1], torch.inf)])
        out = own.bound(coef[: len(bad)]).write(bad, lost)[0]
        assert not torch.isfinite(out).all(-1).any(), "a bad row was mended"


def law_rows_alone_are_refused(part: AcrossSites, k: int):
    """Rows of one site do not say what the block's input was."""
    with pytest.raises(InputError, match="across sites.*Steering.on"):
        part(rows(width_of(part)), strengths(k))


def law_it_compiles_whole_and_runs_in_inference_mode(part: Intervention, k: int):
    """Law 4: one graph, the same numbers."""
    d = width_of(part)
    h, coef = rows(d), strengths(k)
    with torch.inference_mode():
        plain = part(h, coef)
        torch._dynamo.reset()
        compiled = torch.compile(part, fullgraph=True, backend="eager")(h, coef)
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)


def law_saving_keeps_outputs_and_identity(steering: Steering, folder: Path):
    """Law 5: what is loaded is what was saved, bit for bit."""
    loaded = Steering.load(steering.save(folder))
    assert loaded.identity == steering.identity, "another identity"
    assert loaded.steerer == steering.steerer and loaded.behaviours == steering.behaviours
    k = len(steering.behaviours)
    assert list(loaded.interventions) == list(steering.interventions)
    for site, part in maps_of(steering.interventions).items():
        h = rows(width_of(part))
        again = maps_of(loaded.interventions)[site](h, strengths(k))
        assert torch.equal(again, part(h, strengths(k))), "another output"


def law_inverse_and_log_det_are_true(flow: Flow):
    """Law 6, in float64 on rows near the fitted ones."""
    flow, x = copy.deepcopy(flow).double(), rows(flow.width, count=4).double()
    z, log_det = flow.forward_log_det(x)
    torch.testing.assert_close(flow(x), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-9)
    for row in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda r: flow(r[None])[0], x[row])
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_det[row], expected, rtol=0, atol=1e-9)


def law_fit_follows_from_rows_and_seed(method: Steerer, acts: Activations):
    """The same rows and seed give one identity; rows and the global generator stay as they are."""
    before, dice = acts.hash, torch.get_rng_state()
    first = Steering(method, method.fit(acts, seed=3), acts.behaviours).identity
    assert torch.equal(torch.get_rng_state(), dice), "the global generator was used"
    torch.rand(1)
    second = Steering(method, method.fit(acts, seed=3), acts.behaviours).identity
    assert first == second, "another fit of the same rows and seed"
    assert acts.hash == before, "the rows were changed"


def law_choices_are_valid_and_the_default_is_one(method: Steerer):
    for name, values in method.choices.items():
        for value in values:
            replace(method, **{name: value})
        assert getattr(method, name) in values, f"the default of {name} is none of its choices"


def law_test_rows_stay_unseen(method: Steerer, acts: Activations):
    """Rows of the test part beside the training rows change nothing."""
    other = recording(len(acts.behaviours), seed=9, split="test", widths=acts.widths)
    both = Activations(
        {site: torch.cat([acts.values[site], other.values[site] + 5]) for site in acts.sites},
        Rows.of(acts.rows.records() + other.rows.records()),
        acts.behaviours,
    )
    identities = [
        Steering(method, method.fit(seen), acts.behaviours).identity for seen in (acts, both)
    ]
    assert identities[0] == identities[1], "test rows entered the fit"


def law_strength_points_from_source_to_target(part: Intervention, source: Tensor, target: Tensor):
    """Strength 1 closes most of the gap of the means, a negative strength widens it."""
    ones = torch.ones(len(source), 1)
    gap = target.mean(0) - source.mean(0)

    def left(strength: float) -> float:
        """The share of the gap that is left, along it."""
        return float((target.mean(0) - part(source, strength * ones).mean(0)) @ gap / (gap @ gap))

    assert abs(left(1)) < 0.4, "strength 1 does not reach the target"
    assert left(-1) > 1.2, "strength -1 does not lead away"


def law_strength_points_from_each_source_to_its_target(
    part: Intervention, source: Tensor, target: Tensor
):
    """The same pair by pair: strength 1 closes most of a pair's own gap, on the mean of pairs."""
    ones = torch.ones(len(source), 1)
    gap = target - source

    def left(strength: float) -> float:
        """The mean share of a pair's gap that is left, along it."""
        apart = target - part(source, strength * ones)
        return float(((apart * gap).sum(-1) / gap.square().sum(-1)).mean())

    assert abs(left(1)) < 0.4, "strength 1 does not reach the targets"
    assert left(-1) > 1.2, "strength -1 does not lead away"


def law_strength_one_makes_the_sides_alike(part: Intervention, source: Tensor, target: Tensor):
    """What erases, on both sides: strength 1 closes most of their means' gap, -1 widens it."""
    ones = torch.ones(len(source), 1)
    gap = target.mean(0) - source.mean(0)

    def left(strength: float) -> float:
        """The share of the gap that is left, along it."""
        apart = part(target, strength * ones).mean(0) - part(source, strength * ones).mean(0)
        return float(apart @ gap / (gap @ gap))

    assert abs(left(1)) < 0.4, "strength 1 leaves the sides apart"
    assert left(-1) > 1.2, "strength -1 does not drive them apart"


def law_row_weights_count(method: Steerer, acts: Activations):
    """Far rows turn the edit less the less they weigh; in closed form 2 is as good as twice."""

    def edit(records: list[dict], values: Tensor) -> Tensor:
        """The edit at strength 1 of a fit on these rows."""
        values = dict(zip(acts.sites, values.unbind(1), strict=True))
        (part,) = maps_of(
            method.fit(Activations(values, Rows.of(records), acts.behaviours))
        ).values()
        h = rows(width_of(part))
        return part(h, torch.ones(len(h), 1)) - h

    def off(edited: Tensor) -> float:
        return float((edited - without).norm() / without.norm())

    own, few = acts.rows.records(), COUNT // 4
    values = torch.stack([acts.values[site] for site in acts.sites], 1)
    # The first items again, with target and source far on the wrong sides.
    sides = [row for row in own if row["split"] == "train" and row["side"] != "unmoved"]
    far = [row for row in sides if int(row["item"][2:]) < few]
    signs = torch.tensor([-20.0 if row["side"] == "target" else 20.0 for row in far])
    other = torch.cat([values, signs[:, None, None].expand(-1, *values.shape[1:])])
    without = edit(own, values)
    light, heavy = (
        edit(
            own + [_renamed(row, "far") | {"weight": w} for row in far],
            other,
        )
        for w in (1e-6, 1.0)
    )
    assert off(light) <= 0.5 * off(heavy), "the weights are ignored"
    if type(method).trained:
        return
    assert off(light) < 1e-3, "a row of weight 1e-6 moves the fit"
    twice = [n for n, row in enumerate(own) if row in far]
    doubled = [row | {"weight": 1.0 + (n in twice)} for n, row in enumerate(own)]
    again = [_renamed(own[n], "again") for n in twice]
    without = edit(own + again, torch.cat([values, values[twice]]))
    assert off(edit(doubled, values)) < 1e-5, "weight 2 is not twice the row"


def _renamed(row: dict, name: str) -> dict:
    """The row as one of another item, and of another pair."""
    return row | {"item": name + row["item"], "pair": name + row["pair"]}


# --- the laws of maps across tokens, in place of 1 to 4 ------------------------------------------

SPLIT = (4, 5, 0)  # rows of three requests


class Kept(dict):
    """What an engine keeps between passes, in the plainest way."""

    def __call__(self, name, keys, values):
        old = self.get(name)
        self[name] = (
            (keys, values)
            if old is None
            else tuple(torch.cat(pair, 1) for pair in zip(old, (keys, values), strict=True))
        )
        return self[name]


def text_states(width: int):
    """An encoder of texts: their letters decide."""

    def encode(text, blocks):
        draw = torch.Generator().manual_seed(sum(map(ord, text)) + blocks)
        return torch.randn(len(text), width, generator=draw)

    return encode


def context(part, *, texts=("brave", "shy", "a fox"), span=(0, 9), keep=None):
    """The context of the requests' rows with positions in a span, and which rows these are."""
    rows = [(r, n) for r, count in enumerate(SPLIT) for n in range(count) if span[0] <= n < span[1]]
    request, place = torch.tensor(rows, dtype=torch.long).reshape(-1, 2).unbind(1)
    told = [part.prepare(dict.fromkeys(part.asks, text), text_states(part.width)) for text in texts]
    memory = {
        name: nn.utils.rnn.pad_sequence([one[name] for one in told], batch_first=True)
        for name in told[0]
    }
    found = TokenContext(
        request,
        place - span[0],
        place,
        place > 2,
        place + 10,
        len(SPLIT),
        max(min(span[1], max(SPLIT)) - span[0], 1),
        memory,
        **({} if keep is None else {"keep": keep}),
    )
    starts = torch.tensor([0, *SPLIT]).cumsum(0)
    return found, starts[request] + place


def law_untouched_rows_stay_and_are_seen_by_nobody(part: AcrossTokens, dtype: torch.dtype):
    """Law 1: rows without strength and bad rows come back bit for bit, and change no other row."""
    tokens, _ = context(part)
    h, coef = rows(part.width).to(dtype), strengths(1)
    coef[[1, 6]] = 0.0
    bad = non_finite(dtype, part.width)
    first, other = h.clone(), h.clone()
    first[2], first[5], other[[1, 6]] = bad[0], bad[3], other[[1, 6]] * -2
    other[[2, 5]] = bad[[2, 1]]
    outs = [part.steer(each, coef, tokens) for each in (first, other)]
    still, moved = [1, 2, 5, 6], [0, 3, 4, 7, 8]
    for given, out in zip((first, other), outs, strict=True):
        assert torch.equal(bits(out[still]), bits(given[still])), "an untouched row has changed"
    assert torch.isfinite(outs[0][moved]).all(), "a bad row has spread"
    assert torch.equal(outs[0][moved], outs[1][moved]), "an untouched row was seen"
    assert (outs[0][moved] != h[moved]).any(-1).all(), "a steered row has not changed"


def law_form_is_kept_across_tokens(part: AcrossTokens, dtype: torch.dtype):
    """Law 2: shape, dtype and device; nothing in place; the map itself stays, no rows are fine."""
    for span in ((0, 9), (8, 9)):
        tokens, which = context(part, span=span)
        h, coef = rows(part.width).to(dtype)[which], strengths(1)[which]
        state = [t.clone() for t in part.state_dict().values()]
        memory = {name: value.clone() for name, value in tokens.memory.items()}
        before = h.clone()
        out = part.steer(h, coef, tokens)
        assert out.shape == h.shape and out.dtype == h.dtype and out.device == h.device
        assert torch.equal(bits(h), bits(before)), "in place"
        assert all(map(torch.equal, state, part.state_dict().values())), "the map itself changed"
        assert all(torch.equal(memory[name], tokens.memory[name]) for name in memory), "the memory"


def law_nothing_comes_from_later_rows_or_other_requests(part: AcrossTokens):
    """Law 3: another later row, another request's rows and text leave a row's edit as it was."""
    h, coef = rows(part.width), strengths(1)
    own = part.steer(h, coef, context(part)[0])
    later, others = h.clone(), h.clone()
    later[[3, 8]] += 5
    others[4:] -= 3
    kept = [0, 1, 2, 4, 5, 6, 7]
    limit = 1e-5 * (own - h).norm()
    moved = part.steer(later, coef, context(part)[0])
    assert (moved[kept] - own[kept]).norm() <= limit, "a later row was seen"
    texts = ("brave", "quite another text", "x")
    beside = part.steer(others, coef, context(part, texts=texts)[0])
    assert (beside[:4] - own[:4]).norm() <= limit, "another request was seen"
    if part.asks:
        again = part.steer(h, coef, context(part, texts=texts)[0])
        assert (again[4:] - own[4:]).norm() > 10 * limit, "what a request says changes nothing"


def law_parts_make_the_whole(part: AcrossTokens):
    """Law 3 as well: what is kept of earlier passes is what one pass would have seen."""
    h, coef = rows(part.width), strengths(1)
    want = part.steer(h, coef, context(part)[0])
    kept, got = Kept(), torch.full_like(h, torch.nan)
    for span in ((0, 2), (2, 3), (3, 5)):
        tokens, which = context(part, span=span, keep=kept)
        got[which] = part.steer(h[which], coef[which], tokens)
    assert (got - want).norm() <= 1e-5 * (want - h).norm(), "a pass forgot, or made up"
    alone = torch.cat(
        [
            part.steer(h[which], coef[which], tokens)
            for tokens, which in (context(part, span=(n, n + 1)) for n in range(5))
        ]
    )
    order = torch.cat([context(part, span=(n, n + 1))[1] for n in range(5)])
    apart = (alone - want[order]).norm()
    assert apart > 1e-3 * (want - h).norm(), "what came before changes nothing"


def law_it_compiles_whole_across_tokens(part: AcrossTokens):
    """Law 4: one graph, the same numbers, in inference mode."""
    h, coef, (tokens, _) = rows(part.width), strengths(1), context(part)
    with torch.inference_mode():
        plain = part.steer(h, coef, tokens)
        torch._dynamo.reset()
        compiled = torch.compile(part.steer, fullgraph=True, backend="eager")(h, coef, tokens)
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)


# --- every method keeps them ---------------------------------------------------------------------


@every_method
@both_counts
@both_dtypes
def test_rows_without_strength_and_bad_rows_come_back_bit_for_bit(name, k, dtype):
    for part in parts(name, k):
        law_untouched_rows_come_back_bit_for_bit(part, k, dtype)


@every_method
@both_counts
@both_dtypes
def test_shape_dtype_and_device_are_kept_and_nothing_happens_in_place(name, k, dtype):
    for part in parts(name, k):
        law_form_is_kept_and_nothing_happens_in_place(part, k, dtype)


@pytest.mark.parametrize("name", sorted(ACROSS))
@both_counts
@both_dtypes
def test_what_is_carried_keeps_the_laws_of_rows(name, k, dtype):
    for _, part in fitted(name, k).interventions.items():
        law_untouched_rows_keep_their_carry(part, k, dtype)
        law_a_carry_keeps_its_form_and_nothing_happens_in_place(part, k, dtype)
        law_neighbours_do_not_matter_to_a_carry(part, k)
        law_a_bound_map_is_the_map(part, k)
        law_rows_alone_are_refused(part, k)


@every_method
def test_a_method_that_acts_across_sites_says_so(name):
    assert fitted(name, 1).interventions.across == METHODS[name]["across_sites"]


@every_method
@both_counts
def test_a_row_does_not_depend_on_its_neighbours(name, k):
    for part in parts(name, k):
        law_neighbours_do_not_matter(part, k)


@every_method
@both_counts
def test_it_compiles_without_a_graph_break_and_runs_in_inference_mode(name, k):
    for part in parts(name, k):
        law_it_compiles_whole_and_runs_in_inference_mode(part, k)


@every_method
@both_counts
def test_save_and_load_give_equal_outputs_and_one_identity(name, k, tmp_path):
    law_saving_keeps_outputs_and_identity(fitted(name, k), tmp_path / "steering")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method["invertible"]])
def test_an_invertible_method_has_a_true_inverse_and_log_det(name):
    for part in parts(name, 2):
        law_inverse_and_log_det_are_true(part.flow)


@every_method
def test_a_fit_follows_from_rows_and_seed(name):
    law_fit_follows_from_rows_and_seed(brief(name), alone(name))


@every_method
def test_test_rows_do_not_enter_a_fit(name):
    law_test_rows_stay_unseen(brief(name), recording(widths=widths_of(name)))


@every_method
def test_row_weights_count_in_a_fit(name):
    train, held = alone(name), alone(name, seed=1, split="validation")
    acts = Activations(
        {site: torch.cat([train.values[site], held.values[site]]) for site in train.sites},
        Rows.of(train.rows.records() + held.rows.records()),
        train.behaviours,
    )
    law_row_weights_count(brief(name), acts)


@pytest.mark.parametrize("name", [name for name in ON_ROWS if METHODS[name]["trained"]])
def test_another_seed_trains_another_map(name):
    acts = alone(name)
    maps = [brief(name).fit(acts, seed=seed) for seed in (0, 1)]
    first, second = (Steering(brief(name), each, acts.behaviours).identity for each in maps)
    assert first != second


@every_method
def test_strength_points_from_source_to_target(name):
    acts, law = given(name), law_strength_points_from_source_to_target
    if name in CONDITIONAL:
        law = law_strength_points_from_each_source_to_its_target
    elif METHODS[name]["erases"]:
        law = law_strength_one_makes_the_sides_alike
    for site, part in maps_of(fitted(name, 1).interventions).items():
        law(part, *acts.sides(site))


@every_method
def test_build_makes_what_fit_returns(name):
    steering = fitted(name, 2)
    widths = widths_of(name)
    if name in ACROSS:  # what is recorded below is read, not steered
        widths = {site: part.width for site, part in steering.interventions.items()}
    empty = steering.steerer.build(widths, 2, steering.interventions.sizes)
    shapes = [
        {n: (t.shape, t.dtype) for n, t in maps.state_dict().items()}
        for maps in (empty, steering.interventions)
    ]
    assert shapes[0] == shapes[1]


@every_method
def test_a_fitted_map_asks_for_no_gradient(name):
    assert not any(p.requires_grad for p in fitted(name, 1).interventions.parameters())


@every_method
def test_a_recording_with_one_side_only_is_refused(name):
    with pytest.raises(InputError):
        brief(name).fit(recording(widths=widths_of(name)).where(side="target"))


@pytest.mark.parametrize("name", METHODS)
def test_validation_may_choose_any_of_a_method_s_choices(name):
    law_choices_are_valid_and_the_default_is_one(steerer.get(name))


@every_method
def test_health_figures_are_finite_numbers(name):
    figures = brief(name).diagnose(given(name), fitted(name, 1).interventions)
    assert all(isinstance(value, float) and abs(value) < float("inf") for value in figures.values())


# --- and every method across tokens its own ------------------------------------------------------


@cache
def made(name: str) -> Steering:
    """The method's map at one site, with parameters drawn at random: its fit needs a model."""
    method = steerer.get(name)
    maps = method.build({Site(1): 7})
    draw = torch.Generator().manual_seed(2)
    for weight in maps.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[-1] ** 0.5)
    return Steering(method, maps.eval().requires_grad_(False), ("concept",))


def across(name: str) -> AcrossTokens:
    """That map."""
    part = made(name).interventions[Site(1)]
    assert isinstance(part, AcrossTokens)
    return part


@across_tokens
@both_dtypes
def test_untouched_rows_stay_and_are_seen_by_nobody(name, dtype):
    law_untouched_rows_stay_and_are_seen_by_nobody(across(name), dtype)


@across_tokens
@both_dtypes
def test_form_is_kept_across_tokens(name, dtype):
    law_form_is_kept_across_tokens(across(name), dtype)


@across_tokens
def test_nothing_comes_from_later_rows_or_other_requests(name):
    law_nothing_comes_from_later_rows_or_other_requests(across(name))


@across_tokens
def test_parts_make_the_whole(name):
    law_parts_make_the_whole(across(name))


@across_tokens
def test_it_compiles_whole_across_tokens(name):
    law_it_compiles_whole_across_tokens(across(name))


@across_tokens
def test_save_and_load_keep_what_a_map_across_tokens_does(name, tmp_path):
    loaded = Steering.load(made(name).save(tmp_path / "steering"))
    assert loaded.identity == made(name).identity, "another identity"
    own, other = across(name), loaded.interventions[Site(1)]
    h, coef = rows(7), strengths(1)
    want = own.steer(h, coef, context(own)[0])
    assert torch.equal(other.steer(h, coef, context(other)[0]), want), "another output"


@across_tokens
def test_rows_alone_are_refused_across_tokens(name):
    with pytest.raises(InputError, match="TokenContext"):
        across(name)(rows(7), strengths(1))


# --- every law catches the copy that breaks it ---------------------------------------------------


class Broken(Intervention):
    """Adds a constant row and leaves all care to its copies."""

    def __init__(self, width: int = 7, k: int = 1) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("shifts", torch.ones(k, width))

    def displacement(self, h: Tensor, coef: Tensor) -> Tensor:
        return coef @ self.shifts.to(h.dtype)


class MasksByProduct(Broken):
    def forward(self, h, coef):
        edited = h.float() + self.displacement(h.float(), coef) * (coef != 0).any(-1, keepdim=True)
        return edited.to(h.dtype)


class RoundsZeroRows(Broken):
    def forward(self, h, coef):
        return torch.where(torch.isfinite(h).all(-1, keepdim=True), h + coef @ self.shifts, h)


class EditsInPlace(Broken):
    def forward(self, h, coef):
        return h.add_((coef @ self.shifts).to(h.dtype))


class ReturnsFloat32(Broken):
    def forward(self, h, coef):
        return super().forward(h.float(), coef)


class LooksAtNeighbours(Broken):
    def displacement(self, h, coef):
        return super().displacement(h, coef) + 1e-4 * torch.nan_to_num(h).mean(0)


class BranchesOnData(Broken):
    def displacement(self, h, coef):
        return super().displacement(h, coef) * (2 if h.abs().max() > 1 else 1)


class FollowsAutograd(Broken):
    def displacement(self, h, coef):
        h = h.detach().requires_grad_()
        return coef * torch.autograd.grad(h.square().sum(), h)[0]


class Forgets(Broken):
    """Keeps what it fitted where no artifact looks."""

    factor = 1.0

    def displacement(self, h, coef):
        return super().displacement(h, coef) * self.factor


class Follows(AcrossSites):
    """Across sites: hands on what the inputs were along a direction, and moves along it."""

    carry = 2

    def __init__(self, width: int = 7, k: int = 1) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("directions", torch.linspace(-1, 1, k * width).reshape(k, width))

    def read(self, h_in, coef, carry):
        along = (h_in @ self.directions.to(h_in.dtype).mT).sum(-1)
        return torch.stack([carry[:, 0] + 0.1 * along, carry[:, 1] + 1], -1)

    def write(self, h_out, coef, carry):
        moved = coef @ self.directions.to(h_out.dtype) * (1 + carry[:, :1].square())
        return h_out + moved, carry * 0.5


class CarriesZeroRows(Follows):
    def enter(self, h_in, coef, carry):
        return self.read(h_in.float(), coef, carry)


class WritesZeroRows(Follows):
    def leave(self, h_out, coef, carry):
        return super().leave(h_out, coef + 1, carry)[0], super().leave(h_out, coef, carry)[1]


class WritesLostRows(Follows):
    def leave(self, h_out, coef, carry):
        found = super().leave(h_out, coef, torch.zeros_like(carry))[0]
        return found, super().leave(h_out, coef, carry)[1]


class FindsLostRows(Follows):
    def enter(self, h_in, coef, carry):
        asked = (coef != 0).any(-1, keepdim=True)
        return super().enter(h_in, coef, torch.where(asked, torch.nan_to_num(carry), carry))


class CarriesInPlace(Follows):
    def read(self, h_in, coef, carry):
        return carry.add_(1)


class CarriesHalf(Follows):
    def enter(self, h_in, coef, carry):
        return super().enter(h_in, coef, carry).bfloat16()


class StartsAtOne(Follows):
    def start(self, h):
        return super().start(h) + 1


class CarriesNeighbours(Follows):
    def read(self, h_in, coef, carry):
        return super().read(h_in, coef, carry) + 1e-4 * torch.nan_to_num(h_in).mean()


class BoundToOne(Follows):
    """Forgets the strengths that it is bound to."""

    def bound(self, coef):
        return super().bound(torch.ones_like(coef))


class Mends(Follows):
    def write(self, h_out, coef, carry):
        new, carry = super().write(h_out, coef, carry)
        return torch.nan_to_num(new), carry


class AnswersRowsAlone(Follows):
    def displacement(self, h, coef):
        return coef @ self.directions


@dataclass(frozen=True)
class ForgetfulMethod(Steerer):
    paper: ClassVar[str] = "none"

    def build(self, widths, k=1, sizes: Mapping[str, int] = {}):
        return Interventions({site: Forgets(width, k) for site, width in widths.items()})

    def fit(self, acts, *, seed=0):
        maps = self.build(acts.widths)
        for _, part in maps.items():
            part.factor = 2.0
        return maps


class Dropped(nn.Module):
    """A flow's wrapper whose log-determinant or inverse is off by a factor."""

    def __init__(self, flow: Flow, *, log_det: float = 1.0, inverse: float = 1.0) -> None:
        super().__init__()
        self.flow, self.width, self.factors = flow, flow.width, (log_det, inverse)

    def forward(self, x):
        return self.flow(x)

    def inverse(self, z):
        return self.flow.inverse(z) * self.factors[1]

    def forward_log_det(self, x):
        z, log_det = self.flow.forward_log_det(x)
        return z, log_det * self.factors[0]


@dataclass(frozen=True)
class RollsDice(Steerer):
    paper: ClassVar[str] = "none"

    def build(self, widths, k=1, sizes: Mapping[str, int] = {}):
        return Interventions({site: Shift(width, k) for site, width in widths.items()})

    def fit(self, acts, *, seed=0):
        maps = self.build(acts.widths)
        for _, part in maps.items():
            part.shifts.copy_(torch.rand_like(part.shifts))
        return maps


class SeesAllRows(RollsDice):
    def fit(self, acts, *, seed=0):
        maps = self.build(acts.widths)
        for site, part in maps.items():
            part.shifts[0] = acts.values[site].mean(0)
        return maps


class IgnoresWeights(RollsDice):
    def fit(self, acts, *, seed=0):
        maps = self.build(acts.widths)
        for site, part in maps.items():
            source, target = acts.where(split="train").sides(site)
            part.shifts[0] = target.mean(0) - source.mean(0)
        return maps


class CountsByRoot(RollsDice):
    def fit(self, acts, *, seed=0):
        root = replace(acts.rows, weight=acts.rows.weight**0.5)
        return steerer.get("diffmean").fit(replace(acts, rows=root), seed=seed)


class PushesByKey(Broken):
    """Moves seeking rows the way their key says, but for a factor per key."""

    def __init__(self, gap: Tensor, yes: float, no: float) -> None:
        super().__init__(len(gap))
        self.gap, self.factors = gap, (no, yes)

    def displacement(self, h, coef):
        told = (h[:, -1:] > 3).long()
        return coef * torch.tensor(self.factors)[told] * self.gap


both_ways = pytest.mark.parametrize(
    "broken", [MasksByProduct(), RoundsZeroRows()], ids=["bad rows", "rows without strength"]
)


@both_ways
def test_law_1_catches_an_edit_of_rows_that_must_stay(broken):
    with pytest.raises(AssertionError, match="untouched row"):
        law_untouched_rows_come_back_bit_for_bit(broken, 1, torch.float32)


@pytest.mark.parametrize("broken", [EditsInPlace(), ReturnsFloat32()], ids=["in place", "dtype"])
def test_law_2_catches_an_edit_in_place_and_another_dtype(broken):
    with pytest.raises(AssertionError):
        law_form_is_kept_and_nothing_happens_in_place(broken, 1, torch.bfloat16)


def test_law_3_catches_a_look_at_the_neighbours():
    with pytest.raises(AssertionError, match="neighbour"):
        law_neighbours_do_not_matter(LooksAtNeighbours(), 1)


def test_law_4_catches_a_branch_on_data():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        law_it_compiles_whole_and_runs_in_inference_mode(BranchesOnData(), 1)


def test_law_4_catches_autograd():
    with pytest.raises(RuntimeError, match="grad"):
        law_it_compiles_whole_and_runs_in_inference_mode(FollowsAutograd(), 1)


def test_a_map_across_sites_keeps_every_law():
    maps = Interventions({Site(0): Follows(7, 2), Site(2): Follows(7, 2)})
    chain = Chain(maps)
    for dtype in (torch.float32, torch.bfloat16):
        law_untouched_rows_come_back_bit_for_bit(chain, 2, dtype)
        law_form_is_kept_and_nothing_happens_in_place(chain, 2, dtype)
        law_untouched_rows_keep_their_carry(maps[Site(2)], 2, dtype)
        law_a_carry_keeps_its_form_and_nothing_happens_in_place(maps[Site(2)], 2, dtype)
    law_neighbours_do_not_matter(chain, 2)
    law_neighbours_do_not_matter_to_a_carry(maps[Site(2)], 2)
    law_it_compiles_whole_and_runs_in_inference_mode(chain, 2)
    law_a_bound_map_is_the_map(maps[Site(2)], 2)
    law_rows_alone_are_refused(maps[Site(2)], 2)


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (CarriesZeroRows(), "untouched row's carry"),
        (WritesZeroRows(), "untouched row has changed"),
        (WritesLostRows(), "lost row has changed"),
        (FindsLostRows(), "lost row was found"),
    ],
)
def test_law_1_catches_a_carry_that_must_stay(broken, match):
    with pytest.raises(AssertionError, match=match):
        law_untouched_rows_keep_their_carry(broken, 1, torch.float32)


@pytest.mark.parametrize("broken", [CarriesInPlace(), CarriesHalf(), StartsAtOne()])
def test_law_2_catches_a_carry_in_place_of_another_dtype_and_another_start(broken):
    with pytest.raises(AssertionError):
        law_a_carry_keeps_its_form_and_nothing_happens_in_place(broken, 1, torch.bfloat16)


def test_law_3_catches_a_carry_that_looks_at_the_neighbours():
    with pytest.raises(AssertionError, match="neighbour"):
        law_neighbours_do_not_matter_to_a_carry(CarriesNeighbours(), 1)


@pytest.mark.parametrize(
    ("broken", "match"), [(BoundToOne(), "another map"), (Mends(), "was mended")]
)
def test_law_3_catches_a_bound_map_that_is_another_and_one_that_mends(broken, match):
    with pytest.raises(AssertionError, match=match):
        law_a_bound_map_is_the_map(broken, 1)


def test_rows_alone_that_are_answered_are_caught():
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        law_rows_alone_are_refused(AnswersRowsAlone(), 1)


def test_law_5_catches_a_tensor_that_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(steerer, "get", lambda name: ForgetfulMethod())
    acts = recording()
    steering = Steering(ForgetfulMethod(), ForgetfulMethod().fit(acts), acts.behaviours)
    with pytest.raises(AssertionError, match="another output"):
        law_saving_keeps_outputs_and_identity(steering, tmp_path / "steering")


@pytest.mark.parametrize("broken", [{"log_det": 0.5}, {"inverse": 1.001}], ids=lambda b: [*b][0])
def test_law_6_catches_a_wrong_inverse_and_a_wrong_log_det(broken):
    flow = coupling_stack(5, hidden=4)
    flow.initialise(rows(5))
    law_inverse_and_log_det_are_true(flow)
    with pytest.raises(AssertionError):
        law_inverse_and_log_det_are_true(Dropped(flow, **broken))


def test_the_law_of_the_seed_catches_global_dice():
    with pytest.raises(AssertionError, match="generator"):
        law_fit_follows_from_rows_and_seed(RollsDice(), recording())


def test_the_law_of_choices_catches_one_without_the_default_and_one_of_no_field():
    class Odd(type(steerer.get("pid"))):
        choices: ClassVar = {"setpoint": (2.0, 3.0)}

    class Nothing(type(steerer.get("pid"))):
        choices: ClassVar = {"setpiont": (1.0, 2.0)}

    with pytest.raises(AssertionError, match="default"):
        law_choices_are_valid_and_the_default_is_one(Odd())
    with pytest.raises(TypeError, match="setpiont"):
        law_choices_are_valid_and_the_default_is_one(Nothing())


def test_the_law_of_test_rows_catches_a_mean_of_all_rows():
    with pytest.raises(AssertionError, match="test rows"):
        law_test_rows_stay_unseen(SeesAllRows(), recording())


@pytest.mark.parametrize(
    ("broken", "match"), [(IgnoresWeights(), "ignored"), (CountsByRoot(), "1e-6|twice")]
)
def test_the_law_of_weights_catches_a_plain_mean_and_a_wrong_power(broken, match):
    with pytest.raises(AssertionError, match=match):
        law_row_weights_count(broken, recording().at(Site(1)))


def test_the_law_of_the_arrow_catches_a_turned_sign():
    acts = recording().at(Site(1))
    source, target = acts.sides(acts.site)
    part = Shift(7)
    part.shifts[0] = source.mean(0) - target.mean(0)
    with pytest.raises(AssertionError, match="reach"):
        law_strength_points_from_source_to_target(part, source, target)


def test_the_law_of_erasing_catches_a_shift_of_both_sides_and_a_turned_sign():
    acts = recording().at(Site(1))
    source, target = acts.sides(acts.site)
    part, shift = SetPoint(7), Shift(7)
    shift.shifts[0] = target.mean(0) - source.mean(0)
    part.reads[0] = part.writes[0] = torch.nn.functional.normalize(shift.shifts[0], dim=0)
    law_strength_one_makes_the_sides_alike(part, source, target)
    part.writes.neg_()
    for broken in (part, shift):
        with pytest.raises(AssertionError, match="leaves the sides"):
            law_strength_one_makes_the_sides_alike(broken, source, target)


@pytest.mark.parametrize(
    ("yes", "no", "match"),
    [(1, -1, None), (-1, 1, "reach"), (1, 1, "reach"), (1, 0, "reach"), (0, 0, "reach")],
    ids=["as told", "turned sign", "constant vector", "one key alone", "nothing"],
)
def test_the_law_of_the_arrow_per_pair_catches_what_pushes_the_wrong_way(yes, no, match):
    source, target = seeking().at(Site(1)).sides(Site(1))
    part = PushesByKey((target - source)[0], yes, no)
    if match is None:
        law_strength_points_from_each_source_to_its_target(part, source, target)
        return
    with pytest.raises(AssertionError, match=match):
        law_strength_points_from_each_source_to_its_target(part, source, target)


def test_every_method_on_the_shelf_is_tested():
    assert list(METHODS) == innsteer.names() == sorted(ON_ROWS + ACROSS_TOKENS)


class SeesLater(Recall):
    def move(self, h, coef, tokens):
        keys, values = tokens.remember("rows", h, h)
        return coef * (h + tokens.take(keys.mean(1, keepdim=True).expand(-1, tokens.columns, -1)))


class SeesOthers(Recall):
    def move(self, h, coef, tokens):
        return super().move(h, coef, tokens) + 1e-2 * coef * h.mean(0)


class HearsOthers(Recall):
    def move(self, h, coef, tokens):
        return super().move(h, coef, tokens) + coef * tokens.memory["mean"].sum(0)


class ForgetsRows(Recall):
    """Looks at the rows of the pass alone."""

    def move(self, h, coef, tokens):
        laid = tokens.lay(h)
        seen = tokens.mask[..., -tokens.columns :]
        return coef * tokens.take((laid @ laid.mT * seen) @ laid)


class KeepsInside(Recall):
    """Keeps what it saw in itself."""

    def move(self, h, coef, tokens):
        self.turn.add_(1e-3 * h.mean())
        return super().move(h, coef, tokens)


class Deaf(Recall):
    def move(self, h, coef, tokens):
        return coef * h


class SeesUntouched(Recall):
    def steer(self, h, coef, tokens):
        finite = torch.isfinite(h).all(-1)
        out = super().steer(h, torch.where(finite[:, None], coef + 1e-6, coef), tokens)
        return torch.where((coef != 0).any(-1, keepdim=True), out, h)


class SpreadsBadRows(Recall):
    def steer(self, h, coef, tokens):
        seeing = tokens.seeing(torch.ones(len(h), dtype=torch.bool))
        return torch.where(self.touched(h, coef)[:, None], h + self.move(h, coef, seeing), h)


class BranchesAcross(Recall):
    def move(self, h, coef, tokens):
        return super().move(h, coef, tokens) * (2 if h.abs().max() > 1 else 1)


def test_a_plain_map_across_tokens_keeps_their_laws():
    law_untouched_rows_stay_and_are_seen_by_nobody(Recall(7), torch.float32)
    law_form_is_kept_across_tokens(Recall(7), torch.bfloat16)
    law_nothing_comes_from_later_rows_or_other_requests(Recall(7))
    law_parts_make_the_whole(Recall(7))
    law_it_compiles_whole_across_tokens(Recall(7))


@pytest.mark.parametrize(
    ("broken", "match"), [(SeesUntouched, "was seen"), (SpreadsBadRows, "has spread")]
)
def test_law_1_across_tokens_catches_a_look_at_rows_that_must_stay(broken, match):
    with pytest.raises(AssertionError, match=match):
        law_untouched_rows_stay_and_are_seen_by_nobody(broken(7), torch.float32)


def test_law_2_across_tokens_catches_a_map_that_changes_itself():
    with pytest.raises(AssertionError, match="the map itself"):
        law_form_is_kept_across_tokens(KeepsInside(7), torch.float32)


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (SeesLater, "later row"),
        (SeesOthers, "later row|another request"),
        (HearsOthers, "another request"),
        (Deaf, "changes nothing"),
    ],
)
def test_law_3_across_tokens_catches_what_comes_from_elsewhere(broken, match):
    with pytest.raises(AssertionError, match=match):
        law_nothing_comes_from_later_rows_or_other_requests(broken(7))


@pytest.mark.parametrize(
    ("broken", "match"), [(ForgetsRows, "forgot"), (SeesLater, "made up"), (Deaf, "came before")]
)
def test_law_3_across_tokens_catches_a_pass_that_forgets(broken, match):
    with pytest.raises(AssertionError, match=match):
        law_parts_make_the_whole(broken(7))


def test_law_4_across_tokens_catches_a_branch_on_data():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        law_it_compiles_whole_across_tokens(BranchesAcross(7))
