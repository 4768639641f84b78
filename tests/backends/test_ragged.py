"""Rows of a flat batch: which are steered and how, under chunks, caches and requests put off."""

import pytest
import torch

from edits import Told, Tracks
from innsteer.backends.menu import Choice, Order
from innsteer.backends.ragged import Ragged, Seat
from innsteer.errors import NothingSteeredError, RefusedError
from innsteer.interventions import Shift
from innsteer.site import Site, before
from innsteer.steerer import Interventions

WIDTH = 4


def shifts(k=1, *sites):
    parts = {site: Shift(WIDTH, k) for site in sites or (Site(1),)}
    for part in parts.values():
        part.shifts.copy_(torch.arange(1.0, k * WIDTH + 1).reshape(k, WIDTH))
    return Interventions(parts)


def ragged(*interventions, capacity=512, requests=4):
    found = Ragged(capacity, requests, torch.device("cpu"))
    for one in interventions or (shifts(),):
        found.add(one, 1)
    return found


def order(*choices, prompt=4, receipt=""):
    return Order(tuple(choices), prompt, "salt", receipt)


def steered(start=3, coef=1.0, number=0, stop=None):
    return Choice(number, (coef,), ((start, stop),))


def run(desk, h, number=0, site=Site(1)):
    """What an engine does with one table at one site."""
    place = desk.places[site][number]
    rows = place.table.index
    if len(rows):
        h = h.clone()
        place.gather(h[place.table.window])
        h[rows], _ = place.steer(h[rows], rows)
    return h


def coefs(desk, rows, number=0):
    return desk.tables[number].coef[:rows, 0].tolist()


def test_a_batch_becomes_rows_in_its_order():
    desk = ragged()
    desk.admit("a", order(steered(3, 0.5)))
    desk.admit("b", order(steered(0, -2.0)))
    desk.plan([Seat("plain", 0, 2), Seat("a", 0, 5), Seat("b", 9, 1), Seat("other", 0, 1)])
    assert coefs(desk, 9) == [0, 0, 0, 0, 0, 0.5, 0.5, -2.0, 0]
    assert desk.tables[0].index.tolist() == [5, 6, 7]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 20])
def test_chunks_steer_the_same_positions_as_one_pass(chunk):
    """A request of 20 tokens beside a plain one, in chunks of any size."""
    h, desk = torch.randn(20, WIDTH), ragged()
    desk.admit("a", order(Choice(0, (0.7,), ((2, 5), (11, None)))))
    found = []
    for start in range(0, 20, chunk):
        part = h[start : start + chunk]
        desk.plan([Seat("plain", start, 1), Seat("a", start, len(part))])
        found.append(run(desk, torch.cat([torch.zeros(1, WIDTH), part]))[1:])
    expected = h.clone()
    inside = [*range(2, 5), *range(11, 20)]
    expected[inside] += 0.7 * torch.arange(1.0, WIDTH + 1)
    assert torch.equal(torch.cat(found), expected)


def test_buffers_keep_their_place_and_forget_the_pass_before():
    desk = ragged()
    where = desk.tables[0].coef.data_ptr()
    desk.admit("a", order(steered(0)))
    desk.plan([Seat("a", 0, 6)])
    desk.plan([Seat("plain", 0, 3), Seat("a", 6, 1)])
    assert coefs(desk, 8) == [0, 0, 0, 1, 0, 0, 0, 0]
    desk.idle()
    assert desk.tables[0].rows is None
    desk.plan([Seat("plain", 3, 1)])
    assert coefs(desk, 8) == [0] * 8 and not len(desk.tables[0].index)
    assert desk.tables[0].coef.data_ptr() == where and desk.tables[0].rows is None


def test_steerings_have_rows_of_their_own():
    desk = ragged(shifts(), shifts())
    desk.admit("a", order(steered(0, 1.0), steered(2, 2.0, number=1)))
    desk.admit("b", order(steered(0, 3.0, number=1)))
    desk.plan([Seat("a", 0, 3), Seat("b", 0, 1)])
    assert coefs(desk, 4) == [1, 1, 1, 0] and coefs(desk, 4, 1) == [0, 0, 2, 3]
    assert len(desk.places[Site(1)]) == 2


def test_a_request_that_ended_is_steered_no_more():
    desk = ragged()
    desk.admit("a", order(steered(0)))
    desk.leave("a")
    desk.plan([Seat("a", 0, 2)])
    assert coefs(desk, 2) == [0, 0]


# --- receipts ------------------------------------------------------------------------------------


def test_a_receipt_counts_tokens_once_over_all_sites():
    desk = ragged(shifts(1, Site(1), Site(2)))
    desk.admit("a", order(steered(3), receipt="r"))
    desk.admit("b", order(steered(0)))
    for seats in ([Seat("b", 0, 2), Seat("a", 0, 5)], [Seat("a", 5, 1), Seat("b", 2, 1)]):
        desk.plan(seats)
        h = torch.ones(sum(seat.tokens for seat in seats), WIDTH)
        run(desk, h), run(desk, h, site=Site(2))
    tally = desk.take("r")[0]
    assert (tally.touched, tally.edited, tally.cached, tally.nonfinite) == (3, 3, 0, 0)
    relative = torch.arange(1.0, WIDTH + 1).norm() / torch.ones(WIDTH).norm()
    assert tally.displacement == pytest.approx(float(relative))
    assert desk.take("r") is None and desk.take("nobody") is None


def test_a_row_that_is_not_finite_is_touched_counted_and_left_alone():
    desk = ragged()
    desk.admit("a", order(steered(0), receipt="r"))
    desk.plan([Seat("a", 0, 2)])
    h = torch.tensor([[1.0, 2.0, 3.0, float("inf")], [1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(run(desk, h)[0], h[0])
    tally = desk.take("r")[0]
    assert (tally.touched, tally.edited, tally.nonfinite) == (2, 1, 1)
    assert tally.displacement > 0


def test_tokens_from_the_cache_count_as_touched():
    desk = ragged()
    desk.admit("a", order(Choice(0, (1.0,), ((2, None),)), receipt="r"))
    desk.plan([Seat("a", 8, 3)])
    run(desk, torch.ones(3, WIDTH))
    tally = desk.take("r")[0]
    assert (tally.touched, tally.cached, tally.edited) == (9, 6, 3)


def test_tokens_that_come_again_are_steered_again_and_counted_once():
    desk = ragged()
    desk.admit("a", order(steered(3), receipt="r"))
    desk.plan([Seat("a", 0, 5)])
    run(desk, torch.ones(5, WIDTH))
    desk.put_off("a")
    desk.admit("a", order(steered(3), receipt="r"))
    desk.plan([Seat("a", 0, 6)])
    again = run(desk, torch.ones(6, WIDTH))
    assert (again[3:] != 1).all() and (again[:3] == 1).all()
    tally = desk.take("r")[0]
    assert (tally.touched, tally.edited, tally.cached) == (3, 3, 0)


def test_receipts_share_slots_only_when_nobody_took_them():
    desk = Ragged(8, 1, torch.device("cpu"), slots=6)
    desk.add(shifts(), 1)
    for n in range(desk.slots + 3):
        desk.admit(f"q{n}", order(steered(0), receipt=f"r{n}"))
        desk.plan([Seat(f"q{n}", 0, 2)])
        run(desk, torch.ones(2, WIDTH))
        desk.leave(f"q{n}")
    assert desk.take("r0") is None
    assert desk.take(f"r{desk.slots}")[0].touched == 2


def test_a_site_that_did_not_run_is_noticed():
    desk = ragged(shifts(1, Site(1), Site(2)))
    desk.admit("a", order(steered(0)))
    desk.plan([Seat("a", 0, 2)])
    run(desk, torch.ones(2, WIDTH))
    with pytest.raises(NothingSteeredError, match="1 of 2 sites"):
        desk.check()
    run(desk, torch.ones(2, WIDTH), site=Site(2))
    desk.check()
    desk.plan([Seat("plain", 0, 2)])
    desk.check()


# --- contexts ------------------------------------------------------------------------------------


def told():
    return ragged(Interventions({Site(1): Told(WIDTH)}))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_a_map_that_reads_the_prompt_gets_its_mean_in_chunks_too(chunk):
    h, desk = torch.randn(100, WIDTH), told()
    for name, prompt in (("gone", 80), ("x", 3)):
        desk.admit(name, order(steered(prompt - 1), prompt=prompt))
        desk.plan([Seat(name, 0, prompt)])
        run(desk, torch.randn(prompt, WIDTH))
    desk.leave("gone")  # its place is taken by the next, whose context begins later
    prompt = 90
    desk.admit("a", order(steered(prompt - 1), prompt=prompt))
    found = []
    for start in range(0, 100, chunk):
        part = h[start : start + chunk]
        desk.plan([Seat("x", 3 + start, 1), Seat("a", start, len(part))])
        found.append(run(desk, torch.cat([torch.zeros(1, WIDTH), part]))[1:])
    first, last = before(prompt)
    expected = h.clone()
    expected[prompt - 1 :] += h[first:last].mean(0)
    assert torch.allclose(torch.cat(found), expected, atol=1e-5)


def test_a_request_put_off_reads_its_prompt_anew():
    h, desk = torch.randn(8, WIDTH), told()
    desk.admit("a", order(steered(5), prompt=6))
    desk.plan([Seat("a", 0, 6)])
    run(desk, h[:6])
    desk.put_off("a")
    desk.admit("b", order(steered(5), prompt=6))
    desk.plan([Seat("b", 0, 6)])
    run(desk, torch.randn(6, WIDTH))
    desk.plan([Seat("b", 6, 1), Seat("a", 0, 8)])
    again = run(desk, torch.cat([torch.zeros(1, WIDTH), h]))[1:]
    assert torch.allclose(again[5:], h[5:] + h[1:5].mean(0), atol=1e-5)


def test_a_cached_prompt_is_no_context():
    desk = told()
    desk.admit("a", order(steered(5), prompt=6))
    with pytest.raises(RefusedError, match="whose prompt did not go by"):
        desk.plan([Seat("a", 4, 2)])


# --- across sites --------------------------------------------------------------------------------


def climb(desk, h, blocks=4, *, each=False):
    """What an engine does with blocks that add a row: edits of a site, then reads of the next.

    ``each``: every row by itself, as where a graph may be.
    """
    for layer in range(blocks):
        h = h + torch.linspace(-1, 1, WIDTH) * (layer + 1)
        for place in desk.places.get(Site(layer), []):
            rows = place.table.index
            new = None if each else place.alike(h[rows])
            h = h.index_copy(0, rows, place.steer(h[rows], rows)[0] if new is None else new)
        for place in desk.reads.get(Site(layer), []):
            rows = place.table.index
            place.enter(h[rows], rows)
    return h


def by_hand(maps, h, coef, blocks=4):
    """The same for rows that are all steered alike."""
    carry, coef = torch.zeros(len(h), 2), torch.full((len(h), 1), coef)
    for layer in range(blocks):
        before, h = h, h + torch.linspace(-1, 1, WIDTH) * (layer + 1)
        if Site(layer) in maps.sites:
            part = maps[Site(layer)]
            h, carry = part.leave(h, coef, part.enter(before, coef, carry))
    return h


def tracks(*layers):
    return Interventions({Site(layer): Tracks(WIDTH, 1, layer) for layer in layers})


@pytest.mark.parametrize("layers", [(1, 3), (2,), (1, 2, 3)])
def test_a_carry_goes_up_the_blocks_and_starts_anew_in_every_pass(layers):
    maps = tracks(*layers)
    h, desk = torch.randn(8, WIDTH), ragged(maps)
    desk.admit("a", order(steered(0, 0.7)))
    desk.admit("b", order(steered(1, -2.0)))
    for start, seats in ((0, [Seat("a", 0, 3), Seat("b", 0, 2)]), (5, [Seat("b", 2, 3)])):
        desk.plan(seats)
        part = h[start : start + sum(seat.tokens for seat in seats)]
        got = climb(desk, part)
        desk.check()
        if not start:
            torch.testing.assert_close(got[:3], by_hand(maps, part[:3], 0.7), rtol=0, atol=0)
            assert torch.equal(got[3], by_hand(maps, part[3:4], 0.0)[0])
            part, got = part[4:], got[4:]
        torch.testing.assert_close(got, by_hand(maps, part, -2.0), rtol=0, atol=0)


def test_steerings_carry_apart():
    one, two = tracks(1, 2), tracks(2, 3)
    desk = ragged(one, two)
    desk.admit("a", order(steered(0, 0.5)))
    desk.admit("b", order(steered(0, 0.5, number=1)))
    desk.plan([Seat("a", 0, 2), Seat("b", 0, 2)])
    h = torch.randn(4, WIDTH)
    got = climb(desk, h)
    torch.testing.assert_close(got[:2], by_hand(one, h[:2], 0.5), rtol=0, atol=0)
    torch.testing.assert_close(got[2:], by_hand(two, h[2:], 0.5), rtol=0, atol=0)


def test_a_block_whose_input_was_not_read_is_noticed():
    desk = ragged(tracks(1, 2))
    desk.admit("a", order(steered(0)))
    desk.plan([Seat("a", 0, 2)])
    desk.reads[Site(1)].clear()
    climb(desk, torch.randn(2, WIDTH))
    with pytest.raises(NothingSteeredError, match="1 of 2 sites"):
        desk.check()


def test_a_row_lost_below_is_counted_and_left_alone():
    desk = ragged(tracks(1, 2))
    desk.admit("a", order(steered(0), receipt="r"))
    desk.plan([Seat("a", 0, 2)])
    rows, h = desk.tables[0].index, torch.randn(2, WIDTH)
    first, second = (desk.places[Site(layer)][0] for layer in (1, 2))
    first.enter(torch.tensor([[1.0, float("inf"), 0, 0], [1.0, 0, 0, 0]]), rows)
    assert torch.equal(first.steer(h, rows)[0][0], h[0])
    second.enter(h, rows)
    assert torch.equal(second.steer(h, rows)[0][0], h[0])
    tally = desk.take("r")[0]
    assert (tally.touched, tally.edited, tally.nonfinite) == (2, 1, 2)


@pytest.mark.parametrize("held", [1, 4, 1000])
@pytest.mark.parametrize("spoilt", [None, 0, 2])
def test_rows_taken_all_alike_are_steered_and_counted_as_each_by_itself(held, spoilt, monkeypatch):
    """Two requests of two strengths through maps across sites; one row is lost at a block."""
    monkeypatch.setattr("innsteer.backends.ragged.HELD", held)
    h, found = torch.randn(4, WIDTH), []
    wild = torch.zeros(4, WIDTH)
    for each in (False, True):
        desk = ragged(tracks(1, 2, 3))
        desk.admit("a", order(steered(0, 0.5), receipt="a"))
        desk.admit("b", order(steered(1, -2.0), receipt="b"))
        for start in (0, 2, 3):
            tokens = 2 if not start else 1
            desk.plan([Seat("a", start, tokens), Seat("b", start, tokens)])
            part = h[: 2 * tokens] + start
            if spoilt == start:
                part = part.index_fill(0, torch.tensor([0]), float("inf"))
            wild = climb(desk, part, each=each)
            desk.check()
            desk.idle()
        found.append((wild, desk.take("a"), desk.take("b")))
    (got, *alike), (want, *by_itself) = found
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for one, other in zip(alike, by_itself, strict=True):
        assert one[0].touched == other[0].touched > 0 and one[0].edited == other[0].edited > 0
        assert one[0].nonfinite == other[0].nonfinite
        # float32 sums in another order
        assert one[0].displacement == pytest.approx(other[0].displacement, rel=1e-5)
    assert (alike[0][0].nonfinite > 0) == (spoilt is not None)


def test_a_row_that_is_lost_on_the_way_makes_all_of_its_pass_be_asked():
    desk = ragged(tracks(1, 2, 3))
    desk.admit("a", order(steered(0), receipt="r"))
    desk.plan([Seat("a", 0, 2)])
    places, h = [desk.places[Site(layer)][0] for layer in (1, 2, 3)], torch.randn(2, WIDTH)
    rows = desk.tables[0].rows
    places[0].enter(h, rows)
    up = places[0].alike(h)
    assert up is not None and not torch.equal(up, h)
    places[1].enter(up, rows, sound=True)
    lost = h.clone()
    lost[0, 1] = float("nan")  # what the block gives
    assert places[1].alike(lost) is None
    out, touched = places[1].steer(lost, rows)
    assert touched.tolist() == [False, True] and torch.equal(out[0, 2:], lost[0, 2:])
    places[2].enter(h, rows)
    assert places[2].alike(h) is None  # finite again, but its carry is lost
    assert places[2].steer(h, rows)[1].tolist() == [False, True]
    tally = desk.take("r")[0]
    assert (tally.touched, tally.edited, tally.nonfinite) == (2, 2, 2)


def test_a_pass_like_the_one_before_fills_nothing_and_another_strength_does():
    desk = ragged(tracks(1, 2))
    for name, coef in (("a", 1.0), ("b", -1.0)):
        desk.admit(name, order(steered(0, coef), prompt=1, receipt=name))
    h, found = torch.randn(1, WIDTH), []
    for name, start in (("a", 0), ("a", 1), ("b", 0), ("a", 2)):
        desk.plan([Seat(name, start, 1)])
        found.append(climb(desk, h))
        desk.idle()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[2])
    assert desk.take("a")[0].touched == 3 and desk.take("b")[0].touched == 1


def test_rows_that_lie_elsewhere_at_the_same_strength_are_steered_alike():
    desk = ragged(tracks(1, 2))
    desk.admit("a", order(steered(2, 0.7)))
    h, found = torch.randn(1, WIDTH), []
    for start, tokens in ((0, 3), (3, 1)):  # the one row to steer is the third, then the first
        desk.plan([Seat("a", start, tokens)])
        found.append(climb(desk, h.expand(tokens, -1))[-1])
        desk.idle()
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[1][None], by_hand(tracks(1, 2), h, 0.7), rtol=0, atol=0)


def test_embeddings_are_not_read_and_cleared_maps_read_nothing():
    desk = ragged(tracks(1, 2))
    with pytest.raises(RefusedError, match="input of block 0"):
        desk.add(tracks(0, 1), 1)
    desk.clear()
    assert not any(desk.reads.values()) and not any(desk.places.values())
