import pytest
import torch

from magi.errors import MagiError
from magi.system.finite import check_finite, is_finite

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_single_number_that_is_none_is_found(dtype):
    x = torch.ones(3, 5, 7).to(dtype)
    assert is_finite(x)
    for bad in (float("nan"), float("inf"), -float("inf")):
        if dtype == torch.float8_e4m3fn and bad == bad:
            continue  # the type has no infinity
        raw = x.float()
        raw[2, 4, 6] = bad
        assert not is_finite(raw.to(dtype)), bad


def test_opposite_infinities_do_not_cancel():
    assert not is_finite(torch.tensor([float("inf"), -float("inf"), 1.0]))


def test_large_sums_of_small_types_are_fine():
    assert is_finite(torch.full((1000,), 60000.0, dtype=torch.float16))
    assert is_finite(torch.empty(0))


def test_the_message_names_the_tensor_and_the_remedy():
    check_finite(torch.zeros(2), "the noise", "Mend it.")
    with pytest.raises(MagiError, match=r"none \(NaN or infinity\) in the noise\. Mend it\."):
        check_finite(torch.tensor([1.0, float("nan")]), "the noise", "Mend it.")
