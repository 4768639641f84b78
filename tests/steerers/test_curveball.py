"""Curveball: its reductions, the kernel PCA against scikit-learn, and the way back."""

import math

import pytest
import torch
from sklearn.decomposition import KernelPCA

from innsteer.activations import Activations
from innsteer.errors import InputError
from innsteer.site import Site
from innsteer.steerers.curveball import Curveball


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def ones(h, strength=1.0):
    return torch.full((len(h), 1), strength, dtype=h.dtype)


def classes(n=40, d=5):
    """Two clouds of unequal sizes, spreads and places."""
    spread = torch.linspace(0.5, 4, d)
    source = draw(n, d) * spread + 10
    return Activations.of_sides(source, draw(n + 7, d, 1) * spread.flip(0) + 12, paired=False)


def arc(n=400, d=4):
    """Sides at either end of a half circle in two dimensions, and noise in the others."""
    rows = 0.1 * draw(n, d)
    angle = torch.linspace(0, math.pi, n)
    rows[:, 0] += 5 * angle.cos()
    rows[:, 1] += 5 * angle.sin()
    return Activations.of_sides(rows[n // 2 :], rows[: n // 2])


# --- reductions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, -2.5])
def test_a_linear_kernel_with_all_components_and_no_ridge_adds_the_mean_difference(strength):
    acts = classes()
    source, target = acts.sides(acts.site)
    part = Curveball(degree=1, components=5, ridge=1e-10).fit(acts)[acts.site]
    want = strength * (target.double().mean(0) - source.double().mean(0)).float()
    for h in (source, 30 * draw(9, 5, 2)):
        torch.testing.assert_close(
            part(h, ones(h, strength)) - h, want.expand_as(h), atol=1e-3, rtol=0
        )


def test_fewer_linear_components_keep_their_share_of_it():
    acts = classes()
    source, target = acts.sides(acts.site)
    rows = torch.cat([source, target]).double()
    spread = rows.std(0, correction=0)
    main = torch.linalg.svd((rows - rows.mean(0)) / spread, full_matrices=False).Vh[:2]
    gap = (target.double().mean(0) - source.double().mean(0)) / spread
    part = Curveball(degree=1, components=2, ridge=1e-10).fit(acts)[acts.site]
    want = ((gap @ main.mT @ main) * spread).float().expand_as(source)
    torch.testing.assert_close(part(source, ones(source)) - source, want, atol=1e-3, rtol=0)


# --- the kernel PCA and the way back -------------------------------------------------------------


@pytest.mark.parametrize("degree", [2, 3])
def test_coordinates_are_those_of_scikit_learns_kernel_pca(degree):
    acts = classes()
    part = Curveball(components=4, degree=degree, gamma=0.7, coef0=1.5).fit(acts)[acts.site]
    rows = torch.cat(acts.sides(acts.site)).double()
    x = (rows - rows.mean(0)) / rows.std(0, correction=0) / math.sqrt(5)
    length = x.norm(dim=-1, keepdim=True)
    x = x * (length.quantile(0.99) / length).clamp_max(1)
    theirs = KernelPCA(4, kernel="poly", degree=degree, gamma=0.7, coef0=1.5)
    want = torch.from_numpy(theirs.fit_transform(x.numpy()))
    want = want / want.square().sum(1).mean().sqrt()
    want = want * (want * part.latent(rows)).sum(0).sign()
    torch.testing.assert_close(part.latent(rows), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("degree", "components"), [(1, 3), (2, 3), (3, 2)])
def test_products_of_monomials_are_the_kernel(degree, components):
    fields = {"degree": degree, "components": components, "gamma": 0.7, "coef0": 1.5}
    part = Curveball(**fields).build({Site(0): 4})[Site(0)]
    z, other = draw(6, components), draw(5, components, 1)
    want = (0.7 * z @ other.mT + 1.5) ** degree
    torch.testing.assert_close(part.monomials(z) @ part.monomials(other).mT, want)


def test_the_way_back_restores_rows_on_a_curve_and_ridge_shrinks_it():
    acts = arc()
    rows = acts.values[acts.site]
    spread = float((rows - rows.mean(0)).norm())
    for ridge, least, most in ((1e-3, 0.0, 0.1), (1e4, 0.8, 1.0)):
        part = Curveball(components=8, ridge=ridge).fit(acts)[acts.site]
        back = part.mean + part.monomials(part.latent(rows)) @ part.decoder
        assert least <= float((rows - back).norm()) / spread <= most


# --- the edit ------------------------------------------------------------------------------------


def test_the_edit_by_its_formula():
    acts = classes()
    part = Curveball().fit(acts)[acts.site]
    h = acts.sides(acts.site)[0]
    z = part.latent(h)
    there, here = (part.monomials(at) @ part.decoder for at in (z + 0.6 * part.shifts, z))
    torch.testing.assert_close(part(h, ones(h, 0.6)), h + there - here)


def test_strength_1_is_the_step_of_the_means_in_latent_space():
    acts = classes()
    part = Curveball().fit(acts)[acts.site]
    source, target = (part.latent(rows) for rows in acts.sides(acts.site))
    torch.testing.assert_close(part.shifts[0], target.mean(0) - source.mean(0), atol=1e-5, rtol=0)


def test_on_a_curve_the_edit_bends_and_linear_steps_do_not():
    acts = arc()
    source = acts.sides(acts.site)[0]
    bent, straight = (Curveball(degree=degree).fit(acts)[acts.site] for degree in (2, 1))
    for part, least, most in ((bent, 0.15, 9.0), (straight, 0.0, 1e-3)):
        edits = part(source, ones(source)) - source
        assert least <= float((edits - edits.mean(0)).norm() / edits.norm()) <= most


def test_a_row_far_out_is_read_at_the_edge_of_the_support():
    acts = classes()
    part = Curveball().fit(acts)[acts.site]
    rows = torch.cat(acts.sides(acts.site))
    mean, std = rows.mean(0), rows.std(0, correction=0)
    edge = ((rows - mean) / std).norm(dim=-1).quantile(0.99)
    ray = torch.nn.functional.normalize(draw(8, 5, 5), dim=-1)
    at, beyond = (mean + std * ray * edge * far for far in (1.001, 9.0))
    want = part(at, ones(at)) - at
    torch.testing.assert_close(part(beyond, ones(beyond)) - beyond, want, rtol=0, atol=1e-2)
    assert (want - want.mean(0)).norm() > 0.5


def test_a_dimension_that_does_not_vary_stays_and_does_not_blow_up():
    source, target = draw(30, 3), draw(30, 3, 1) + 2
    source[:, 1] = target[:, 1] = 7.0
    part = Curveball().fit(Activations.of_sides(source, target))[Site(0)]
    other = source + torch.tensor([0.0, 1.0, 0.0])
    edit = part(other, ones(other)) - other
    torch.testing.assert_close(edit, part(source, ones(source)) - source, rtol=0, atol=1e-5)
    assert not edit[:, 1].any()


def test_of_many_rows_so_many_are_drawn_by_the_seed():
    acts = classes(200)
    few = [Curveball(points=50).fit(acts, seed=seed)[acts.site] for seed in (0, 0, 1)]
    assert few[0].support.shape == (50, 5) and few[0].sizes == {"points": 50}
    assert torch.equal(few[0].support, few[1].support)
    assert not torch.equal(few[0].support, few[2].support)
    assert Curveball().fit(acts)[acts.site].sizes == {"points": 407}


def test_the_figure_says_how_much_of_the_gap_is_reached():
    acts = classes()
    for fields, least, most in (
        ({"degree": 1, "components": 5, "ridge": 1e-9}, 0.999, 1.001),
        ({"ridge": 1e6}, 0.0, 0.05),
    ):
        method = Curveball(**fields)
        assert least <= method.diagnose(acts, method.fit(acts))["reached"] <= most


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"components": 0}, {"components": 5000}, {"degree": 0}, {"degree": 5}, {"points": 1}]
    + [{"gamma": 0.0}, {"gamma": math.nan}, {"ridge": 0.0}, {"coef0": -1.0}, {"coef0": math.inf}],
)
def test_a_field_out_of_range_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        Curveball(**fields)


def test_rows_that_are_all_alike_giants_and_a_foreign_support_are_refused():
    rows = torch.ones(4, 3)
    with pytest.raises(InputError, match="do not vary"):
        Curveball().fit(Activations.of_sides(rows, rows))
    with pytest.raises(InputError, match="monomials"):
        Curveball(components=2000, degree=4).build({Site(0): 4096})
    with pytest.raises(InputError, match="support of 9999 rows"):
        Curveball().build({Site(0): 4}, 1, {"0.residual.points": 9999})
