"""get(), Intervention and Interventions."""

import math

import numpy as np
import pytest
import torch

from innsteer import shelf
from innsteer.errors import InputError, UnknownName
from innsteer.interventions import Edit, Shift, trainable
from innsteer.site import Site
from innsteer.steerer import Interventions, get


def test_get_sets_fields():
    assert get("innsteer", epochs=3, mixing="lu").epochs == 3
    assert get("diffmean") == get("diffmean")


def test_an_unknown_method_is_an_error_that_lists_methods_and_the_nearest():
    with pytest.raises(UnknownName) as caught:
        get("difmean")
    message = str(caught.value)
    assert "unknown method 'difmean'" in message
    assert ", ".join(shelf.names()) in message and "did you mean 'diffmean'?" in message
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, ValueError)


def test_an_unknown_field_is_an_error_that_lists_fields_and_the_nearest():
    with pytest.raises(UnknownName) as caught:
        get("innsteer", epoch=3)
    message = str(caught.value)
    assert "field of method 'innsteer': 'epoch'" in message
    assert "couplings" in message and "did you mean 'epochs'?" in message


def test_a_class_variable_is_no_field():
    with pytest.raises(UnknownName, match="trained"):
        get("innsteer", trained=False)


def test_interventions_go_from_the_lowest_layer_up():
    sites = [Site(3), Site(0, "mlp"), Site(0)]
    maps = Interventions({site: Shift(2 + i) for i, site in enumerate(sites)})
    assert list(maps) == sorted(sites) and len(maps) == 3
    assert [part.shifts.shape[-1] for _, part in maps.items()] == [3, 4, 2]
    assert maps[Site(3)].shifts.shape[-1] == 2
    assert maps.sizes == {}


def test_sizes_say_which_site_they_belong_to():
    maps = {Site(0): Shift(2), Site(1, "heads"): Shift(2)}
    maps[Site(0)].sizes = {"rank": 3}
    maps[Site(1, "heads")].sizes = {"rank": 5}
    assert Interventions(maps).sizes == {"0.residual.rank": 3, "1.heads.rank": 5}


def test_interventions_of_no_site_are_refused():
    with pytest.raises(InputError, match="no site"):
        Interventions({})


@pytest.mark.parametrize(
    ("module", "rows", "computed"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
    ],
)
def test_it_computes_in_float64_only_when_module_and_rows_are_float64(module, rows, computed):
    part = Shift(2).to(module)
    assert part.compute_dtype(torch.zeros(1, 2, dtype=rows)) == computed
    out = part(torch.ones(1, 2, dtype=rows), torch.ones(1, 1))
    assert out.dtype == rows


def test_touched_rows_are_finite_ones_with_a_strength():
    h = torch.zeros(4, 2)
    h[3, 0] = torch.inf
    coef = torch.tensor([[0.0, 0.0], [0.0, 1e-30], [-1.0, 1.0], [1.0, 0.0]])
    assert Shift.touched(h, coef).tolist() == [False, True, True, False]


def test_an_edit_gives_every_sequence_its_row_and_expanded_ones_their_prompts():
    maps = Interventions({Site(0): Shift(2, 2)})
    one = Edit(maps, torch.tensor([1.0, 2.0]))
    assert one.rows(2).tolist() == [[1.0, 2.0]] * 2
    two = Edit(maps, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert two.rows(4).tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    with pytest.raises(InputError, match="2 rows of coefficients for a batch of 3"):
        two.rows(3)


@pytest.mark.parametrize(
    "coef", [torch.tensor(1.0), torch.tensor([torch.nan]), torch.ones(1, 1, 1)]
)
def test_an_edit_refuses_strengths_that_are_no_finite_rows(coef):
    with pytest.raises(InputError, match="coefficients"):
        Edit(Interventions({Site(0): Shift(2)}), coef)


def test_a_shift_has_nothing_to_train():
    assert trainable(Shift(3)) == []


@pytest.mark.parametrize(
    ("method", "fields", "said"),
    [
        ("alqr", {"prompts": math.nan}, "prompts=nan of method 'alqr'"),
        ("alqr", {"q": "a"}, "q=a of method 'alqr'"),
        ("innsteer", {"epochs": 1.5}, "epochs=1.5 of method 'innsteer'"),
        ("flas", {"batch": "eight"}, "batch=eight of method 'flas'"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_name(method, fields, said):
    with pytest.raises(InputError, match=said):
        get(method, **fields)


def test_values_come_in_the_types_that_fields_declare():
    assert get("ridge", grid=[1, 10]).grid == (1.0, 10.0)
    assert get("innsteer", epochs=np.int64(3)).epochs == 3
