"""Steering a flat batch of many requests' tokens: which rows, how strongly, and what came of it.

An engine hands over the batch before each pass, in its order; one pass over the requests fills a
buffer of coefficients per steering. The maps then run on rows, without a look at requests, and add
what they did to counters on the same device, which receipts are read from.

The buffers keep their addresses, so that a captured graph finds new values in them. Where no graph
can be, on the CPU, what the laws ask is asked once for all rows (is any not finite?), and counters
are written once at the end of a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from innsteer.backends.menu import Order
from innsteer.errors import NothingSteeredError, RefusedError
from innsteer.site import Site, before
from innsteer.steerer import AcrossSites, Bound, Intervention, Interventions, finite

SLOTS = 16384
"""Receipts that wait to be taken at most, 16 bytes each per site; the oldest then gives way."""
HELD = 128
"""Rows whose counters wait to be written together: of more, old and new values leave the caches."""


class Seat(NamedTuple):
    """A request's tokens in a pass: positions ``[start, start + tokens)``."""

    request: str
    start: int
    tokens: int


@dataclass(frozen=True)
class Tally:
    """What one steering did in one response.

    Attributes:
        touched: tokens that reached every site of it with a coefficient that is not 0, those whose
            keys and values came from the salted cache included. cached: how many of them did.
        edited: tokens whose activation it changed, at the site with the most of them.
        displacement: mean |h' - h| / |h| of the rows that reached it.
        nonfinite: how often a site left a row alone because it was not finite.
    """

    touched: int
    cached: int
    edited: int
    displacement: float
    nonfinite: int


@dataclass
class Table:
    """The rows of one steering in the coming pass.

    Attributes:
        coef: ``[capacity, k]``, 0 where nothing is steered. slot: ``[capacity]``, the receipt of
            each row; 0 = none. index: the steered rows.
        source: ``[capacity]``, whose context a row reads. share: ``[capacity]``, 1 / its tokens.
        window: rows that belong to contexts. reader: whose context each of those belongs to.
        carry: ``[capacity, c]``, what maps across sites hand from block to block.
        counts: ``[sites, slots, 4]``: rows that reached a site, rows edited, their summed relative
            displacement, rows that were not finite. Slot 0 is nobody's.
        rows: ``index``, as a slice where its rows are neighbours; None: nothing is steered now.
        sound: whether rows may be taken all alike, as far as this pass has come.
        climbing: the carries of ``rows`` while they are. made: what ``settle`` has to count: the
            number of a site, rows before and after.
        holds: what the buffers were filled with. strengths: of ``rows``, to which maps are bound.
    """

    coef: Tensor
    slot: Tensor
    source: Tensor
    share: Tensor
    index: Tensor
    window: Tensor
    reader: Tensor
    carry: Tensor
    counts: Tensor
    rows: Tensor | slice | None = None
    sound: bool = False
    climbing: Tensor | None = None
    made: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    holds: object = None
    strengths: object = None
    filled: int = 0

    def doubt(self) -> None:
        """From here on row by row: one of them may not be finite."""
        if self.climbing is not None and self.rows is not None:
            self.carry[self.rows] = self.climbing
        self.sound = False

    def settle(self) -> None:
        """Count what was done to rows taken all alike."""
        if not self.made:
            return
        numbers, olds, news = zip(*self.made, strict=True)
        self.made = []
        before, after = torch.stack(olds).float(), torch.stack(news).float()
        move = after - before
        moved = move.norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-30)
        edited = (move.amax(-1) != 0) | (move.amin(-1) != 0)
        told = torch.stack([torch.ones_like(moved), edited, moved, torch.zeros_like(moved)], -1)
        slots = self.counts.shape[1]
        at = slots * torch.tensor(numbers, device=told.device)[:, None] + self.slot[self.rows]
        self.counts.view(-1, 4).index_add_(0, at.flatten(), told.flatten(0, 1))


@dataclass
class Place:
    """One site of one steering: its map, its rows and its counters.

    Attributes:
        number: among the steering's sites. counts: its own of the table's.
        sums: ``[readers, d]``, contexts as they are gathered; None: the map reads none.
        first: whether it is the lowest of maps across sites, whose carry starts at zeros.
        passes: how often it ran. entered: how often it read its block's input.
    """

    part: Intervention
    table: Table
    number: int
    sums: Tensor | None = None
    first: bool = False
    passes: int = 0
    entered: int = 0
    bound: Bound | None = None

    @property
    def counts(self) -> Tensor:
        """``[slots, 4]``, see ``Table``."""
        return self.table.counts[self.number]

    def gather(self, h: Tensor) -> None:
        """Add rows of contexts, ``h`` being those of ``table.window``, before they are edited."""
        if self.sums is not None:
            self.sums.index_add_(0, self.table.reader, h.float())

    def _bound(self) -> Bound:
        """The map across sites at the strengths of the rows."""
        assert isinstance(self.part, AcrossSites)
        if self.bound is None:
            # A copy: it outlives the pass, and the buffer is filled anew when rows lie elsewhere.
            self.bound = self.part.bound(self.table.coef[self.table.rows].clone())
        return self.bound

    def alike(self, h: Tensor) -> Tensor | None:
        """``steer`` of the table's rows, all finite and to be steered; None: ask each of them."""
        table = self.table
        if not table.sound or self.sums is not None or h.dtype == torch.float64:
            return None
        new: Tensor
        if isinstance(self.part, AcrossSites):
            if table.climbing is None:
                return None
            new, left = self._bound().write(h.float(), table.climbing)
            new = new.to(h.dtype)
            if not finite(new):
                table.doubt()
                return None
            table.climbing = left
        elif finite(h):
            new = self.part(h, table.coef[table.rows])
        else:
            return None
        table.made.append((self.number, h, new))
        if len(h) * len(table.made) >= HELD:
            table.settle()
        self.passes += 1
        return new

    def enter(self, h: Tensor, rows: Tensor | slice, *, sound: bool = False) -> None:
        """Read rows ``[n, d]`` of the block's input, which is the block below's edited output.

        ``sound``: they are known to be finite.
        """
        assert isinstance(self.part, AcrossSites)
        table = self.table
        if table.sound and h.dtype != torch.float64:
            if sound or finite(h):
                old = self.part.start(h) if self.first else table.climbing
                assert old is not None
                table.climbing = self._bound().read(h.float(), old)
                self.entered += 1
                return
            table.doubt()
        carry = self.part.start(h) if self.first else self.table.carry[rows]
        self.table.carry[rows] = self.part.enter(h, self.table.coef[rows], carry).float()
        self.entered += 1

    def steer(self, h: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """New values of rows ``[n, d]``, and which of them may differ from the old ones ``[n]``.

        Each row by itself, and those of the table from here on.
        """
        if self.table.sound and isinstance(self.part, AcrossSites):
            self.table.doubt()
        coef, finite, context = self.table.coef[rows], torch.isfinite(h).all(-1), None
        if self.sums is not None:
            context = self.sums[self.table.source[rows]] * self.table.share[rows].unsqueeze(-1)
            finite = finite & torch.isfinite(context).all(-1)
        new: Tensor
        if isinstance(self.part, AcrossSites):
            carry = self.table.carry[rows]
            finite = finite & torch.isfinite(carry).all(-1)
            new, left = self.part.leave(h, coef, carry)
            self.table.carry[rows] = left.float()
        else:
            new = self.part(h, coef, context)
        asked = (coef != 0).any(-1)
        touched = asked & finite
        before, after = h.float(), new.float()
        relative = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-30)
        edited = touched & (after != before).any(-1)
        moved = torch.where(touched, relative, 0.0)
        told = torch.stack([asked, edited, moved, asked & ~finite], dim=-1).float()
        self.counts.index_add_(0, self.table.slot[rows], told)
        self.passes += 1
        return new, touched


@dataclass
class _Guest:
    """A request that is being answered: how far its tokens were counted, and its context."""

    order: Order
    counted: int = 0
    reader: int = 0
    gathered: int = 0


@dataclass
class _Receipt:
    """Where counters of a response are kept, and how many tokens of it a cache held."""

    slot: int
    cached: dict[int, int] = field(default_factory=dict)


class _Run(NamedTuple):
    """Neighbouring rows of one request that are steered alike."""

    row: int
    rows: int
    coef: tuple[float, ...]
    slot: int
    source: int
    share: float


class Ragged:
    """The steerings of an engine, and the state of its steered requests.

    Args:
        capacity: rows of the largest pass. requests: how many run at once.
        device: of the model's activations. slots: receipts that are kept at once.

    Attributes:
        places: the maps of each site, in the order of application. batch: of the latest pass.
        reads: the maps across sites that read each site, their block's input, once it is edited.
    """

    def __init__(
        self, capacity: int, requests: int, device: torch.device, slots: int = SLOTS
    ) -> None:
        self.capacity, self.device, self.slots = capacity, device, slots
        self.readers = 2 * requests + 1
        self.tables: list[Table] = []
        self.places: dict[Site, list[Place]] = {}
        self.reads: dict[Site, list[Place]] = {}
        self._places: list[list[Place]] = []
        self._guests: dict[str, _Guest] = {}
        self._receipts: dict[str, _Receipt] = {}
        self._free = list(range(1, slots))
        self._due: list[tuple[Place, int, int]] = []
        self.batch: Sequence[Seat] = ()

    # --- steerings -------------------------------------------------------------------------------

    def add(self, interventions: Interventions, k: int) -> None:
        """One more steering of k behaviours, applied after those before; it goes to the device.

        Raises:
            RefusedError: a map across sites at block 0.
        """
        across = [site for site, p in interventions.items() if isinstance(p, AcrossSites)]
        if across and not across[0].layer:
            raise RefusedError(
                "a map that reads the input of block 0",
                expected="one that reads outputs of blocks: here the embeddings are not seen",
                remedy="fit it without block 0, or steer by it with the hf backend",
            )
        long = torch.zeros(self.capacity, dtype=torch.long, device=self.device)
        share = torch.zeros(self.capacity, device=self.device)
        coef = torch.zeros(self.capacity, k, device=self.device)
        none = long[:0]
        carry = torch.zeros(self.capacity, interventions.carry, device=self.device)
        counts = torch.zeros(len(interventions), self.slots, 4, device=self.device)
        table = Table(coef, long.clone(), long.clone(), share, none, none, none, carry, counts)
        places = []
        for number, (site, part) in enumerate(interventions.to(self.device).items()):
            sums = torch.zeros(self.readers, part.width, device=self.device)
            place = Place(part, table, number, sums if part.contextual else None)
            self.places.setdefault(site, []).append(place)
            places.append(place)
            if site in across:
                place.first = site == across[0]
                self.reads.setdefault(Site(site.layer - 1), []).append(place)
        self.tables.append(table)
        self._places.append(places)

    def clear(self) -> None:
        """Forget all steerings and requests."""
        self.tables, self._places, self._due = [], [], []
        self._guests, self._receipts = {}, {}
        self._free = list(range(1, self.slots))
        for places in (*self.places.values(), *self.reads.values()):
            places.clear()

    # --- a pass ----------------------------------------------------------------------------------

    def admit(self, request: str, order: Order) -> None:
        """A request whose tokens will come, or come again after it was put off."""
        if order.choices and request not in self._guests:
            self._guests[request] = _Guest(order)

    def leave(self, request: str) -> None:
        """A request that ended."""
        self._guests.pop(request, None)

    def put_off(self, request: str) -> None:
        """A request whose tokens will come again from the first: its context makes room."""
        if request in self._guests:
            self._guests[request].reader = 0

    def plan(self, batch: Sequence[Seat]) -> None:
        """Fill the buffers for the coming pass over a batch, in its order.

        Raises:
            RefusedError: a map that reads prompts would steer a token whose prompt did not go by.
        """
        runs: list[list[_Run]] = [[] for _ in self.tables]
        windows: list[list[tuple[int, int, int]]] = [[] for _ in self.tables]
        self.batch, row = batch, 0
        for seat in batch:
            guest = self._guests.get(seat.request)
            if guest is not None:
                self._seat(seat, guest, row, runs, windows)
            row += seat.tokens
        for number, table in enumerate(self.tables):
            if self._fill(table, runs[number], windows[number], row):
                for place in self._places[number]:
                    place.bound = None
        acting = [places for places, mine in zip(self._places, runs, strict=True) if mine]
        self._due = [(one, one.passes, one.entered) for places in acting for one in places]

    def idle(self) -> None:
        """What runs next is no request's: nothing is steered."""
        for table in self.tables:
            table.settle()
            if self.device.type == "cpu" and not len(table.window):
                table.rows = None  # the next pass mostly finds the buffers as they shall be
            else:
                self._fill(table, [], [], 0)
        self._due = []

    def check(self) -> None:
        """After a pass, before any text of it is given out: every site that was due has run.

        Raises:
            NothingSteeredError: one has not, or has not read its block's input.
        """
        missed = sum(
            place.passes == passes
            or (isinstance(place.part, AcrossSites) and place.entered == entered)
            for place, passes, entered in self._due
        )
        if missed:
            raise NothingSteeredError(
                f"a pass in which {missed} of {len(self._due)} sites to be steered did not run",
                expected="all of them",
                remedy="nothing of it is given out; start the engine again",
            )

    # --- receipts --------------------------------------------------------------------------------

    def take(self, receipt: str) -> dict[int, Tally] | None:
        """What each steering of a response did; None: no token of it was to be steered."""
        kept = self._receipts.pop(receipt, None)
        if kept is None:
            return None
        self._free.append(kept.slot)
        found = {}
        for number, table in enumerate(self.tables):
            table.settle()
            counts = table.counts[:, kept.slot].tolist()
            reached = min(round(one[0]) for one in counts)
            cached = kept.cached.get(number, 0)
            if reached or cached:
                every = sum(one[0] for one in counts)
                found[number] = Tally(
                    touched=reached + cached,
                    cached=cached,
                    edited=max(round(one[1]) for one in counts),
                    displacement=sum(one[2] for one in counts) / every if every else 0.0,
                    nonfinite=round(sum(one[3] for one in counts)),
                )
        return found

    def _receipt(self, name: str) -> _Receipt:
        """The receipt of a name; the oldest that nobody took gives way when there is no room."""
        if name not in self._receipts:
            if not self._free:
                self._free.append(self._receipts.pop(next(iter(self._receipts))).slot)
            slot = self._free.pop()
            for table in self.tables:
                table.counts[:, slot] = 0.0
            self._receipts[name] = _Receipt(slot)
        return self._receipts[name]

    # --- one request -----------------------------------------------------------------------------

    def _seat(
        self,
        seat: Seat,
        guest: _Guest,
        row: int,
        runs: list[list[_Run]],
        windows: list[list[tuple[int, int, int]]],
    ) -> None:
        """A request's rows: what is steered, what belongs to its context, what is counted."""
        order, stop = guest.order, seat.start + seat.tokens
        share = self._gather(seat, guest, row, windows)
        for choice in order.choices:
            slot = 0
            if order.receipt:
                kept = self._receipt(order.receipt)
                slot = kept.slot
                held = choice.within(guest.counted, seat.start)
                cached = sum(b - a for a, b in held)
                kept.cached[choice.number] = kept.cached.get(choice.number, 0) + cached
            for a, b in choice.within(seat.start, stop):
                # Tokens that come again after the request was put off were counted before.
                again = min(max(guest.counted, a), b)
                for first, last, where in ((a, again, 0), (again, b, slot)):
                    if first < last:
                        at = row + first - seat.start
                        how = (choice.coef, where, guest.reader, share)
                        runs[choice.number].append(_Run(at, last - first, *how))
        guest.counted = max(guest.counted, stop)

    def _gather(
        self,
        seat: Seat,
        guest: _Guest,
        row: int,
        windows: list[list[tuple[int, int, int]]],
    ) -> float:
        """Rows of a request's context; 1 / its tokens once all went by."""
        order, stop = guest.order, seat.start + seat.tokens
        reading = [c for c in order.choices if self._places[c.number][0].sums is not None]
        if not reading:
            return 0.0
        first, last = before(order.prompt)
        if seat.start == 0:
            guest.gathered = 0
            if not guest.reader:
                used = {other.reader for other in self._guests.values()}
                guest.reader = next(n for n in range(1, self.readers) if n not in used)
            for choice in reading:
                for place in self._places[choice.number]:
                    assert place.sums is not None
                    place.sums[guest.reader] = 0.0
        a, b = max(first, seat.start), min(last, stop)
        if a < b:
            guest.gathered += b - a
            for choice in reading:
                windows[choice.number].append((row + a - seat.start, b - a, guest.reader))
        if reading[0].within(seat.start, stop) and guest.gathered != last - first:
            raise RefusedError(
                f"a pass over position {seat.start} of a request whose prompt did not go by",
                expected="no cached prompt under a steering that reads it",
            )
        return 1.0 / (last - first)

    def _fill(
        self,
        table: Table,
        runs: Sequence[_Run],
        windows: Sequence[tuple[int, int, int]],
        rows: int,
    ) -> bool:
        """Write one table; rows of the pass before that are not steered any more become 0.

        A pass of decoding mostly is like the one before. Returns whether the strengths are others.
        """
        if not (runs or windows or table.filled):
            table.rows = None
            return False  # nothing was steered, and nothing is: a plain pass pays nothing
        table.settle()
        table.climbing, table.sound = None, self.device.type == "cpu"
        holds = runs, windows, rows
        if table.holds == holds and not windows:
            table.rows = self._span(table.index, runs)
            return False
        table.holds = holds
        table.coef[: table.filled] = 0.0
        table.slot[: table.filled] = 0
        table.filled = rows if runs or windows else 0
        counts = [run.rows for run in runs]
        table.index = self._rows([run.row for run in runs], counts)
        if runs:
            each = torch.tensor(counts)
            coef = torch.tensor([run.coef for run in runs])
            slot = torch.tensor([run.slot for run in runs])
            table.coef[table.index] = coef.repeat_interleave(each, 0).to(self.device)
            table.slot[table.index] = slot.repeat_interleave(each).to(self.device)
        table.rows = self._span(table.index, runs)
        window = [count for _, count, _ in windows]
        table.window = self._rows([at for at, _, _ in windows], window)
        table.reader = self._spread([reader for *_, reader in windows], window)
        if runs and runs[0].source:
            table.source[table.index] = self._spread([run.source for run in runs], counts)
            share = torch.tensor([run.share for run in runs])
            table.share[table.index] = share.repeat_interleave(torch.tensor(counts)).to(self.device)
        strengths = [(run.rows, run.coef) for run in runs]
        changed, table.strengths = strengths != table.strengths, strengths
        return changed

    def _span(self, index: Tensor, runs: Sequence[_Run]) -> Tensor | slice | None:
        """The rows of runs, as a slice where they are neighbours."""
        if not runs:
            return None
        first, last = runs[0].row, runs[-1].row + runs[-1].rows
        return slice(first, last) if last - first == len(index) else index

    def _rows(self, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Row numbers of runs, one after the other.

        >>> Ragged(8, 1, torch.device("cpu"))._rows([0, 5], [2, 3]).tolist()
        [0, 1, 5, 6, 7]
        """
        each = torch.tensor(counts, dtype=torch.long)
        begins = torch.tensor(starts, dtype=torch.long) - (each.cumsum(0) - each)
        return (begins.repeat_interleave(each) + torch.arange(int(each.sum()))).to(self.device)

    def _spread(self, values: Sequence[int], counts: Sequence[int]) -> Tensor:
        """One value per row of runs."""
        each = torch.tensor(counts, dtype=torch.long)
        return torch.tensor(values, dtype=torch.long).repeat_interleave(each).to(self.device)
