"""Compiled by inductor, one method per family: slow, so apart from the fast tests."""

import pytest
import torch

from innsteer.activations import Activations
from innsteer.steerer import get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fields"), [("diffmean", {}), ("innsteer", {"hidden": 8, "epochs": 2})]
)
def test_inductor_gives_the_eager_result(method, fields):
    rows = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    acts = Activations.of_sides(rows, rows + 1)
    part = get(method, **fields).fit(acts)[acts.site]
    coef = torch.linspace(-1, 2, 32).unsqueeze(-1)
    with torch.inference_mode():
        compiled = torch.compile(part, fullgraph=True)(rows, coef)
        # Inductor fuses and reorders float32 sums.
        assert torch.allclose(compiled, part(rows, coef), atol=1e-5)
        zero = torch.zeros(32, 1)
        assert torch.equal(torch.compile(part, fullgraph=True)(rows, zero), rows)
