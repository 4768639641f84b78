"""Ablation: a projector, the same as orthogonal weights, and one direction for all sites."""

import pytest
import torch
from torch import Tensor

import tiny
from innsteer.activations import Activations
from innsteer.errors import InputError, UnknownName
from innsteer.hooks import Attachment
from innsteer.interventions import Edit
from innsteer.site import Site, Where
from innsteer.steerers.ablation import Ablation


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def several(*sites: str, width: int = 5) -> Activations:
    """A recording of several sites, each with a direction of its own."""
    base = Activations.of_sides(torch.zeros(20, 1), torch.zeros(20, 1))
    values = {
        Site.parse(site): torch.cat([draw(20, width, 2 * n), draw(20, width, 2 * n + 1) + 2])
        for n, site in enumerate(sites)
    }
    return Activations(values, base.rows, base.behaviours)


def test_no_row_keeps_anything_along_the_direction_and_the_rest_stays():
    source, target = draw(30, 6), draw(30, 6, 1) + torch.arange(6.0)
    part = Ablation().fit(acts := Activations.of_sides(source, target))[acts.site]
    r = torch.nn.functional.normalize(target.mean(0) - source.mean(0), dim=0)
    h, ones = 5 * draw(9, 6, 2), torch.ones(9, 1)
    moved = part(h, ones)
    torch.testing.assert_close(moved, h - (h @ r).unsqueeze(1) * r, rtol=0, atol=1e-5)
    assert (moved @ r).abs().max() < 1e-5
    torch.testing.assert_close(part(moved, ones), moved, rtol=0, atol=1e-5)


def test_strength_is_the_share_removed_and_minus_one_doubles():
    part = Ablation().fit(acts := Activations.of_sides(torch.zeros(2, 2), torch.eye(2)))[acts.site]
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).repeat(2, 1)
    coef = torch.tensor([[0.25], [0.25], [-1.0], [-1.0]])
    expected = torch.tensor([[0.75, 0.75], [1.0, -1.0], [2.0, 2.0], [1.0, -1.0]])
    torch.testing.assert_close(part(h, coef), expected)


def plain_projector(r: Tensor) -> Tensor:
    return torch.eye(len(r)) - torch.outer(r, r)


def test_ablated_at_every_write_it_equals_weights_orthogonal_to_the_direction():
    sites = [f"{layer}.{part}" for layer in range(tiny.LAYERS) for part in ("attention", "mlp")]
    acts = several("2", *sites, width=tiny.WIDTH)
    maps = Ablation(direction="2").fit(acts)
    r = maps[Site(0, "mlp")].reads[0]
    hooked, turned = tiny.tiny_language_model(), tiny.tiny_language_model()
    with torch.no_grad():
        for model in (hooked.model.model, turned.model.model):
            # What the first block reads is no site: orthogonal in both.
            model.embed_tokens.weight.copy_(model.embed_tokens.weight @ plain_projector(r))
        for block in turned.model.model.layers:
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight.copy_(plain_projector(r) @ weight)
    ids = torch.arange(3, 15).unsqueeze(0)
    written: list[Tensor] = []
    with torch.no_grad(), Attachment(hooked, [Edit(maps, torch.ones(1), Where("all"))]):
        for block in hooked.model.model.layers:
            block.register_forward_hook(lambda _, __, out: written.append(out))
        got = hooked.model(ids).logits
    assert len(written) == tiny.LAYERS
    assert all((out @ r).abs().max() < 1e-4 for out in written)
    assert (got - turned.model(ids).logits).abs().max() < 1e-4
    assert (got - hooked.model(ids).logits).abs().max() > 0.1


def test_sites_have_their_own_directions_or_one_of_them():
    acts = several("1", "2", "2.mlp")
    own, one = Ablation().fit(acts), Ablation(direction="2").fit(acts)
    assert not torch.equal(own[Site(1)].reads, own[Site(2)].reads)
    assert all(torch.equal(one[site].reads, own[Site(2)].reads) for site in one)
    assert Ablation(direction="2") == Ablation(direction="2.residual")


def test_sides_with_equal_means_stay_as_they_are():
    rows = draw(20, 3)
    part = Ablation().fit(acts := Activations.of_sides(rows, rows))[acts.site]
    assert torch.equal(part(rows, torch.ones(20, 1)), rows)


def test_a_direction_that_is_not_there_or_of_another_width_is_refused():
    with pytest.raises(InputError, match="site"):
        Ablation(direction="somewhere")
    with pytest.raises(UnknownName, match=r"3\.residual"):
        Ablation(direction="3").fit(several("1", "2"))
    acts = several("1", "2")
    acts.values[Site(2)] = acts.values[Site(2)][:, :3]
    with pytest.raises(InputError, match="widths"):
        Ablation(direction="1").fit(acts)
