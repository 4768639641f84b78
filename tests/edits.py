"""Edits for tests: shifts at any site, and a hook that sees what a site holds."""

from contextlib import contextmanager

import torch

import tiny
from innsteer.interventions import Edit, Shift
from innsteer.models import LanguageModel
from innsteer.site import Site, Where
from innsteer.steerer import AcrossSites, AcrossTokens, Intervention, Interventions


def shift(model: LanguageModel, *sites: Site, k: int = 1, seed: int = 0) -> Interventions:
    """A random shift at each site, about as long as an activation."""
    draw = torch.Generator().manual_seed(seed)
    parts = {}
    for site in sites or (Site(1),):
        parts[site] = Shift(model.layout.width_of(site), k)
        parts[site].shifts.copy_(2 * torch.randn(parts[site].shifts.shape, generator=draw))
    return Interventions(parts)


def edit(model, coef=1.0, where="generated", *sites, seed=0):
    """An Edit of random shifts; coef is a number, or one number per sequence."""
    rows = (
        torch.tensor([float(coef)]) if not isinstance(coef, list) else torch.tensor(coef)[:, None]
    )
    return Edit(shift(model, *sites, seed=seed), rows.float(), Where.parse(where))


class Told(Intervention):
    """h' = h + coef * context: a contextual map whose edit shows what it was told."""

    contextual = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def displacement(self, h, coef, context=None):
        return coef * context


class Recall(AcrossTokens):
    """h' = h + coef * (mean of the edited rows so far, itself included, + a number for the text).

    It shows what it was told and what it remembers: a cache that lost, mixed up or made up a row
    gives other numbers.
    """

    asks = ("concept",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("turn", 0.1 * torch.randn(width, width, generator=_dice(3)))

    def prepare(self, parameters, encode):
        return {"mean": encode(parameters["concept"], 1).mean(0, keepdim=True)}

    def move(self, h, coef, tokens):
        keys, values = tokens.remember("rows", h @ self.turn.to(h.dtype), h)
        weight = torch.tanh(tokens.lay(h) @ keys.mT) * tokens.mask
        told = tokens.memory["mean"][tokens.request, 0].to(h.dtype)
        return coef * (0.3 * tokens.take(weight @ values) + told)


def recall(model, *sites):
    """Maps across tokens at sites."""
    return Interventions(
        {site: Recall(model.layout.width_of(site)) for site in sites or (Site(1),)}
    )


def asked(model, concepts, coef=1.0, where="all", *sites):
    """An Edit of maps across tokens; one concept, or one per sequence."""
    rows = torch.tensor([coef]) if not isinstance(coef, list) else torch.tensor(coef)[:, None]
    told = (concepts,) if isinstance(concepts, str) else concepts
    parameters = tuple({"concept": concept} for concept in told)
    return Edit(recall(model, *sites), rows.float(), Where.parse(where), parameters)


def _dice(seed):
    return torch.Generator().manual_seed(seed)


def told(model, *sites):
    """Contextual maps at sites."""
    return Interventions({site: Told(model.layout.width_of(site)) for site in sites or (Site(1),)})


@contextmanager
def seen(model: LanguageModel, site: Site):
    """A list of what a site holds in each pass; enter it after the steering to see its effect."""
    module, port = model.layout.at(site)
    held = []

    def before(_, args):
        held.append(args[0].clone())

    def after(_, args, output):
        held.append((output[0] if isinstance(output, tuple) else output).clone())

    register = module.register_forward_pre_hook if port == "input" else module.register_forward_hook
    with register(before if port == "input" else after):
        yield held


def padded(rows, side="left"):
    """Ids and mask of rows of ids."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), tiny.PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for n, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[n, place], mask[n, place] = torch.tensor(row), 1
    return ids, mask


def positions(mask):
    """Absolute positions of a padded batch."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def bits(tensor):
    """The integers behind floats."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def hooks_of(model):
    """Number of hooks on all modules."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(part, name)) for part in model.modules() for name in names)


class Tracks(AcrossSites):
    """Adds what the inputs were along a row, times the number of blocks; hands on both."""

    carry = 2

    def __init__(self, width: int, k: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.width = width
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("along", torch.randn(width, generator=draw))
        self.register_buffer("moves", torch.randn(k, width, generator=draw))

    def read(self, h_in, coef, carry):
        seen = torch.tanh(h_in @ self.along.to(h_in.dtype)).unsqueeze(-1)
        return torch.cat([0.5 * carry[:, :1] + seen, carry[:, 1:]], -1)

    def write(self, h_out, coef, carry):
        moved = coef @ self.moves.to(h_out.dtype) * carry[:, :1] * (1 + carry[:, 1:])
        return h_out + moved, carry + carry.new_tensor([0.0, 0.25])


def tracks(model, *sites, seed=0, k=1):
    """Maps across sites, by default at blocks 0 and 2: the one between is not steered."""
    width = model.layout.width
    places = sites or (Site(0), Site(2))
    return Interventions({site: Tracks(width, k, seed + site.layer) for site in places})
