import pytest
import torch
import torch.nn.functional as F

from magi.errors import MagiError
from magi.sampling.prepare import generate_latents
from magi.transformer import float8
from magi.transformer.float8 import (
    Fp8Weight,
    StoredFp8,
    apply_fp8,
    decode_e4m3,
    fp8_linear,
    matmul_fp32,
    round_to_e4m3,
)
from magi.transformer.layers import linear, output_projection


def all_bf16() -> torch.Tensor:
    """Every finite bf16 number within the range of e4m3."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return every[every.isfinite() & (every.float().abs() <= 448)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))  # tells 0 from -0


@pytest.fixture
def layer(randn):
    """(smoothed) -> an official layer's tensors, and inputs that reach beyond the range of e4m3."""

    def make(smoothed: bool) -> dict[str, torch.Tensor]:
        made = {
            "x": randn(3, 5, 48) * 4,
            "weight": (randn(1, 32, 48, seed=1) * 100).clamp(-448, 448).to(torch.float8_e4m3fn),
            "weight_scale": torch.tensor([0.003]),
        }
        if smoothed:
            smooth = randn(1, 48, seed=2).abs() * 0.02 + 0.01
            return made | {"input_scale": torch.tensor([0.7]), "smooth_scale": smooth}
        return made | {"input_scale": torch.full((48,), 0.02)}

    return make


def test_rounding_equals_torchs_for_every_number():
    x = all_bf16()
    assert len(x) > 30_000
    assert same_bits(round_to_e4m3(x), x.to(torch.float8_e4m3fn).to(torch.bfloat16))


def test_decoding_equals_torchs_for_every_code():
    codes = torch.arange(256).to(torch.uint8)
    wanted = codes.view(torch.float8_e4m3fn).to(torch.bfloat16)
    got = decode_e4m3(codes)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert same_bits(got.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(smoothed, dtype, layer):
    parts = layer(smoothed)
    x = parts["x"].to(dtype)
    divisor = parts["smooth_scale"][0] if smoothed else parts["input_scale"][0]
    quantised = (x.float() / divisor).clamp(-448, 448).bfloat16().to(torch.float8_e4m3fn).double()
    wanted = quantised @ parts["weight"][0].double().T * parts["input_scale"][0] * parts["weight_scale"][0]
    got = fp8_linear(x, **{k: v for k, v in parts.items() if k != "x"})
    assert got.dtype == dtype
    assert got.shape == (3, 5, 32)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-4)
    assert (quantised.abs() == 448).any(), "the range was left"


@pytest.mark.parametrize("smoothed", [False, True])
def test_bytes_give_the_very_same_result(smoothed, layer, monkeypatch):
    parts = layer(smoothed)
    x = parts.pop("x").bfloat16()
    wanted = fp8_linear(x, **parts)
    monkeypatch.setattr(float8, "supports_float8", lambda kind: False)
    kept = Fp8Weight.from_official(**parts)
    assert kept.weight.dtype == torch.uint8
    assert torch.equal(apply_fp8(x, kept), wanted)


def test_a_whole_run_without_float8_on_the_device_is_the_same(
    tiny_config, tiny_model, tiny_caption, tiny_tokens, monkeypatch
):
    config = tiny_config(True, shape={"num_layers": 3}, num_steps=4, num_frames=24)

    def run():
        model = tiny_model(config, fp8=True)
        return model, next(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)).latents

    _, wanted = run()
    monkeypatch.setattr(float8, "supports_float8", lambda kind: False)
    model, got = run()
    assert list(model.blocks)[1].fc1.weight.dtype == torch.uint8
    assert torch.equal(got, wanted)


def test_a_torch_without_float8_is_told(tiny_config, tiny_model, monkeypatch):
    monkeypatch.setattr(float8, "FLOAT8", None)
    float8.supports_float8.cache_clear()
    try:
        with pytest.raises(MagiError, match=r"has no float8: update torch.*bf16"):
            tiny_model(tiny_config(True, shape={"num_layers": 3}), fp8=True)
        assert not float8.supports_float8("cpu")
    finally:
        float8.supports_float8.cache_clear()


def test_matmul_fp32_has_fp32_output(randn):
    x, weight = randn(4, 64).bfloat16(), randn(8, 64, seed=1).bfloat16()
    got = matmul_fp32(x, weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bf16", "official", "bytes", "stored", "stored, low"])
def test_a_large_matrix_is_converted_part_by_part(kind, randn, monkeypatch):
    x, weight = randn(5, 16).bfloat16(), randn(100, 16, seed=1)
    largest = []

    def product():
        if kind == "bf16":
            return matmul_fp32(x, weight.bfloat16())
        if kind == "stored":
            return output_projection(x, StoredFp8.quantise(weight, "cpu"))
        if kind == "stored, low":
            return linear(x, StoredFp8.quantise(weight, "cpu"))
        kept = weight.to(torch.float8_e4m3fn)
        return matmul_fp32(x, kept.view(torch.uint8) if kind == "bytes" else kept)

    whole = product()
    multiply = F.linear
    monkeypatch.setattr(F, "linear", lambda x, part: largest.append(part.numel()) or multiply(x, part))
    monkeypatch.setattr(float8, "CONVERSION_ELEMENTS", 33 * 16)  # the last part is smaller
    made = product()
    assert made.dtype == whole.dtype
    torch.testing.assert_close(made, whole, rtol=1e-6, atol=1e-6)
    assert largest == [528, 528, 528, 16]


def test_a_matrix_is_taken_whole_if_it_is_small_or_needs_no_conversion(randn, monkeypatch):
    x, weight = randn(5, 16), randn(100, 16, seed=1)
    taken = []
    multiply = F.linear
    monkeypatch.setattr(F, "linear", lambda x, part, *bias: taken.append(len(part)) or multiply(x, part, *bias))
    linear(x, StoredFp8.quantise(weight, "cpu"))
    monkeypatch.setattr(float8, "CONVERSION_ELEMENTS", 1)
    matmul_fp32(x, weight)
    assert taken == [100, 100]


@pytest.mark.parametrize("step", [1, 15, 16, 1599])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16)])
def test_any_part_and_any_shape(shape, step, randn, monkeypatch):
    """Even a row that is longer than what may be converted at a time."""
    x, stored = randn(*shape), StoredFp8.quantise(randn(100, 16, seed=1), "cpu")
    whole = F.linear(x, stored.dequantize(torch.float32))
    monkeypatch.setattr(float8, "CONVERSION_ELEMENTS", step)
    torch.testing.assert_close(linear(x, stored), whole, rtol=1e-5, atol=1e-5)


# -- weight-only float8 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantized_matrices_stay_near_the_original(dtype, randn):
    weight = (randn(32, 48) * torch.logspace(-4, 1, 32)[:, None]).to(dtype)
    stored = StoredFp8.quantise(weight, "cpu")
    dequantized = stored.dequantize(dtype)
    assert dequantized.dtype == dtype
    assert dequantized.shape == weight.shape
    error = (dequantized.double() - weight.double()).norm(dim=1) / weight.double().norm(dim=1)
    assert (error < 0.04).all(), "each row has a scale of its own"
    assert (error > 0.005).all(), "it is quantised"
    assert stored.weight.nbytes == 32 * 48
    assert stored.scale.shape == (32, 1)


def test_stored_numbers_are_float8_times_their_rows_scale_exactly(randn):
    stored = StoredFp8.quantise(randn(16, 64) * 0.02, "cpu")
    exact = stored.weight.double() * stored.scale.double()
    assert torch.equal(stored.dequantize(torch.float32).double(), exact)
    assert torch.equal(stored.dequantize(torch.bfloat16).double(), exact), "nothing is rounded once more"
    assert stored.weight.float().abs().amax(dim=1).min() >= 224
    assert stored.weight.float().abs().max() <= 448


def test_rows_of_nothing_and_of_the_smallest_numbers(randn):
    weight = torch.zeros(4, 16)
    weight[1] = randn(16) * 1e-30
    weight[2] = 1e-40
    weight[3, 5] = 3e38
    dense = StoredFp8.quantise(weight, "cpu").dequantize(torch.float32)
    assert dense.isfinite().all()
    assert not dense[0].any()
    torch.testing.assert_close(dense[1], weight[1], rtol=0.07, atol=1e-33)
    assert dense[3, 5] == pytest.approx(3e38, rel=0.07)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_bytes_give_the_very_same_numbers(dtype, randn, monkeypatch):
    weight = randn(32, 48).to(dtype)
    wanted = StoredFp8.quantise(weight, "cpu")
    monkeypatch.setattr(float8, "supports_float8", lambda kind: False)
    got = StoredFp8.quantise(weight, "cpu")
    assert got.weight.dtype == torch.uint8
    assert torch.equal(got.dequantize(dtype), wanted.dequantize(dtype))


def test_products_with_stored_matrices(randn):
    x, stored = randn(5, 48).bfloat16(), StoredFp8.quantise(randn(32, 48, seed=1), "cpu")
    wanted = x.double() @ stored.dequantize(torch.float32).double().T
    assert linear(x, stored).dtype == torch.bfloat16
    torch.testing.assert_close(linear(x, stored).double(), wanted, rtol=1e-2, atol=5e-2)
    assert output_projection(x, stored).dtype == torch.float32
    torch.testing.assert_close(output_projection(x, stored).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_stored_matrices_on_the_gpu(randn):
    weight = randn(32, 48).bfloat16()
    here, there = (StoredFp8.quantise(weight, device).dequantize(torch.bfloat16).cpu() for device in ("cpu", "cuda"))
    assert torch.equal(here, there)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matmul_fp32_on_the_gpu(dtype, randn):
    x, weight = randn(4, 64).to(dtype), randn(16, 64, seed=1).to(dtype)
    got = matmul_fp32(x.cuda(), weight.cuda())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), F.linear(x.float(), weight.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 50])
def test_the_gpus_float8_product(tokens, smoothed, layer, randn):
    if not float8.has_float8_matmul(torch.device("cuda")):
        pytest.skip("this GPU has no float8 units")
    parts = layer(smoothed)
    del parts["x"]
    x = randn(tokens, 48) * 4
    wanted = fp8_linear(x, **parts)
    got = fp8_linear(x.cuda(), **{k: v.cuda() for k, v in parts.items()})
    # The float8 units accumulate with fewer bits than float32.
    assert float((got.cpu() - wanted).norm() / wanted.norm()) < 1e-3
