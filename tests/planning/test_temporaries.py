"""What a layer allocates, counted on the meta device; tests/planning/test_footprint.py holds it against whole iterations."""

import pytest
import torch

from magi.config import MagiConfig
from magi.planning.temporaries import Numerics, PeakBytes, layer_bytes
from magi.transformer.float8 import CONVERSION_ELEMENTS, Kernels

SMALL, LARGE = (MagiConfig.preset(name).model for name in ("4.5B_base", "24B_base"))


def test_without_conversions_it_grows_with_the_tokens():
    for numerics in (Numerics(), Numerics(torch.float32), Numerics(fp8=True)):
        few, many = (layer_bytes(LARGE, numerics, tokens, 1) for tokens in (256, 4096))
        assert many == 16 * few > 0


def test_the_layer_of_the_small_model_by_hand():
    """Self and cross attention, the input, the norm and the new hidden states side by side with the MLP's two."""
    d, ffn = SMALL.hidden_size, SMALL.ffn_hidden_size
    assert layer_bytes(SMALL, Numerics(), 1024, 1) == 1024 * 2 * (4 * d + 2 * ffn)


def test_a_second_pass_adds_its_result():
    one, two = (layer_bytes(SMALL, Numerics(), 1024, passes) for passes in (1, 2))
    assert two - one == 1024 * 2 * SMALL.hidden_size


@pytest.mark.parametrize(("kernels", "converted"), [(Kernels(float8=False), 2), (Kernels(False, False), 4)])
def test_devices_without_kernels_for_float8_convert_a_part_of_a_matrix(kernels, converted):
    all_there, few = (layer_bytes(LARGE, Numerics(fp8=True, kernels=k), 64, 1) for k in (Kernels(), kernels))
    assert few - all_there == pytest.approx(converted * CONVERSION_ELEMENTS, rel=0.05)


@pytest.mark.parametrize(("kernels", "converted"), [(Kernels(), 2), (Kernels(False, False), 2 + 4)])
def test_stored_float8_is_dequantized_a_part_at_a_time(kernels, converted):
    """And the projection's part once more in float32, where a product needs that."""
    plain, stored = (
        layer_bytes(LARGE, Numerics(stored_fp8=s, kernels=k), 64, 1) for s, k in ((False, Kernels()), (True, kernels))
    )
    assert stored - plain == pytest.approx(converted * CONVERSION_ELEMENTS, rel=0.2)


def test_bytes_are_counted_while_they_are_alive():
    weight = torch.ones(10)
    with torch.inference_mode(), PeakBytes() as counted:
        a = torch.zeros(100)
        b = a[:50] + 1
        assert counted.peak == 400 + 200
        del a
        c = weight[2:] + torch.zeros(8)
        assert counted.peak == 600
        del b, c
        torch.zeros(1000)
    assert counted.peak == 4000
