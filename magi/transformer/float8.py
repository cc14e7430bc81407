"""float8 (e4m3fn) weights of the official quantised checkpoints, on any device.

Hardware with float8 matrix units multiplies float8 directly; elsewhere the same rounded numbers are upcast first, to a
dtype that represents every e4m3 product exactly. Where torch has no float8 dtype for the device, the weights are stored
as bytes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..errors import MagiError

E4M3_MAX = 448.0
CONVERSION_ELEMENTS = 1 << 25  # numbers of a matrix that are dequantized or upcast at a time
_EXPONENT = 0x7F800000  # exponent bits of a float32: alone, they are the power of two at or below it
_SMALLEST_STEP = 2.0**-9  # spacing of the subnormal numbers
_SIGN_AND_E4M3 = 0xBF80 - 0x10000  # bits of an int16: the sign, four of a float16's exponent, three of its mantissa
FLOAT8 = getattr(torch, "float8_e4m3fn", None)


@dataclass(frozen=True)
class Kernels:
    """The matrix products that a device computes without copies of their factors in another dtype.

    Attributes:
        has_fp32_output: of 16-bit factors with float32 output.
        float8: of float8 factors.
    """

    has_fp32_output: bool = True
    float8: bool = True

    @classmethod
    def of(cls, device: torch.device) -> "Kernels":
        """Returns the kernels of a device."""
        return cls(has_fp32_output(device), has_float8_matmul(device))


_NO_KERNELS = Kernels(False, False)
_meta_kernels = ContextVar("meta_kernels", default=_NO_KERNELS)


@contextmanager
def kernels_on_meta(kernels: Kernels) -> Iterator[None]:
    """Makes tensors on the meta device go the way they would on a device with these kernels: for counting memory."""
    token = _meta_kernels.set(kernels)
    try:
        yield
    finally:
        _meta_kernels.reset(token)


def require_float8() -> torch.dtype:
    """Returns torch's e4m3fn dtype. Raises MagiError on a build without it."""
    if FLOAT8 is None:
        raise MagiError(
            f"torch {torch.__version__} has no float8: update torch to 2.5 or newer, or use a bf16 checkpoint."
        )
    return FLOAT8


@dataclass(frozen=True)
class Fp8Weight:
    """An official quantised linear layer.

    Attributes:
        weight: (out, in) e4m3fn, or its bytes as uint8 on devices without float8.
        weight_scale: () float32.
        input_scale: () float32.
        smooth_scale: (in,) float32 per channel where the layer was smoothed, None if `input_scale` divides the input.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    smooth_scale: torch.Tensor | None = None

    @classmethod
    def from_official(
        cls,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor,
        smooth_scale: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "Fp8Weight":
        """Builds a layer from a weight (1, out, in) or (out, in), and scales of any shape with equal entries."""
        device = torch.device(device or weight.device)
        weight = weight.reshape(weight.shape[-2:])
        if not supports_float8(device):
            weight = weight.view(torch.uint8)

        def scale(s: torch.Tensor) -> torch.Tensor:
            return s.reshape(-1)[0].float().to(device)

        smooth = None if smooth_scale is None else smooth_scale.reshape(-1).float().to(device)
        return cls(weight.to(device), scale(weight_scale), scale(input_scale), smooth)


@dataclass(frozen=True)
class StoredFp8:
    """A weight-only float8 matrix: it is dequantized where it is used, and multiplied in the compute dtype.

    Attributes:
        weight: (out, in) e4m3fn, or its bytes as uint8 on devices without float8.
        scale: (out, 1) float32, exact powers of two; the largest entry of a row is within 224 .. 448.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def quantise(cls, weight: torch.Tensor, device: torch.device | str) -> "StoredFp8":
        """Quantises a matrix (out, in) of any floating dtype. Raises MagiError where torch has no float8."""
        float8 = require_float8()
        device = torch.device(device)
        native = supports_float8(device)
        weight = weight.to(device if native else "cpu")
        ratio = weight.abs().amax(dim=1, keepdim=True).float() / E4M3_MAX
        power = (ratio.view(torch.int32) & _EXPONENT).view(torch.float32) * 2
        scale = torch.where(power > 0, power, 1.0)  # 1 for a row of zeros
        kept = (weight / scale).to(float8)
        return cls((kept if native else kept.view(torch.uint8)).to(device), scale.to(device))

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Returns rows of the matrix, (rows, in), as a new tensor of `dtype`."""
        return _plain(self.weight[rows]).to(dtype).mul_(self.scale[rows].to(dtype))


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    smooth_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies one official fp8 layer to (..., in): (..., out) in x's dtype. Weights have their checkpoint shapes."""
    return apply_fp8(x, Fp8Weight.from_official(weight, weight_scale, input_scale, smooth_scale, x.device))


def apply_fp8(x: torch.Tensor, layer: Fp8Weight) -> torch.Tensor:
    """Quantises x, multiplies and rescales: (..., in) -> (..., out) in x's dtype."""
    divisor = layer.input_scale.reshape(1) if layer.smooth_scale is None else layer.smooth_scale
    # float32, as torch promotes a 16-bit tensor and a float32 one of at least one axis.
    scaled = (x / divisor).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.bfloat16)
    flat = scaled.reshape(-1, scaled.shape[-1])
    if layer.weight.dtype == torch.uint8:
        product = matmul_fp32(round_to_e4m3(flat), layer.weight)
    elif has_float8_matmul(layer.weight.device):
        product = _matmul_float8(flat.to(layer.weight.dtype), layer.weight)
    else:
        product = matmul_fp32(flat.to(layer.weight.dtype).to(torch.bfloat16), layer.weight)
    y = product.mul_(layer.input_scale).mul_(layer.weight_scale)
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def matmul_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Computes x @ weight.T with fp32 accumulation and float32 output: (S, in), (out, in) -> (S, out).

    `x` has a 16-bit dtype or float32; `weight` has the same, or is e4m3fn, or its bytes as uint8.
    """
    if not has_fp32_output(x.device):
        return _convert_and_matmul(x.float(), weight, F.linear)
    return _convert_and_matmul(x, weight, _mm_fp32)


def _mm_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.device.type == "meta":  # older builds have no `out_dtype`, but may plan for a device of another machine
        return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def _convert_and_matmul(
    x: torch.Tensor, weight: torch.Tensor, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Calls `product` on x and the weight, converted to x's dtype part by part."""
    if weight.dtype == x.dtype:
        return product(x, weight)
    return by_rows(weight, lambda rows: product(x, _plain(weight[rows]).to(x.dtype)))


def by_rows(weight: torch.Tensor, product: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """Computes a product with a matrix (out, in) that must be converted first, for a part of its rows at a time.

    `product(rows)` returns (..., rows). A matrix of at most CONVERSION_ELEMENTS numbers is converted whole.

    Returns:
        (..., out).
    """
    outputs, width = weight.shape
    step = max(1, CONVERSION_ELEMENTS // width)
    if step >= outputs:
        return product(slice(0, outputs))
    out = None
    for start in range(0, outputs, step):
        part = product(slice(start, start + step))
        out = part.new_empty(*part.shape[:-1], outputs) if out is None else out
        out[..., start : start + step] = part
    assert out is not None  # noqa: S101 (the loop runs at least once)
    return out


def _plain(weight: torch.Tensor) -> torch.Tensor:
    """Decodes e4m3 numbers to a dtype that the device can compute with, and returns other dtypes unchanged."""
    if weight.dtype == FLOAT8 and weight.device.type == "cpu":
        return _unpack_e4m3(weight)
    return decode_e4m3(weight) if weight.dtype == torch.uint8 else weight


def has_fp32_output(device: torch.device) -> bool:
    """Tells whether a matmul of 16-bit factors can have float32 output on `device` without upcasting them."""
    if device.type == "meta":
        return _meta_kernels.get().has_fp32_output
    return device.type == "cuda" and torch.version.hip is None and _has_out_dtype(device)


@lru_cache(8)
def _has_out_dtype(device: torch.device) -> bool:
    """Tells whether torch.mm takes `out_dtype` for 16-bit factors (newer builds): tried once per device."""
    try:
        probe = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
        return torch.mm(probe, probe, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def _matmul_float8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiplies float8 in hardware, with float32 output. The kernel needs tokens in multiples of 16, so pads."""
    tokens = x.shape[0]
    if tokens % 16:
        x = F.pad(x.view(torch.uint8), (0, 0, 0, -tokens % 16)).view(weight.dtype)
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)[:tokens]


def has_float8_matmul(device: torch.device) -> bool:
    """Tells whether `device` has float8 matrix units that torch can use (NVIDIA Ada, Hopper, Blackwell)."""
    if device.type == "meta":
        return _meta_kernels.get().float8
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@lru_cache(8)
def supports_float8(device: torch.device | str) -> bool:
    """Tells whether e4m3fn tensors can be allocated and cast on this device."""
    if FLOAT8 is None:
        return False
    try:
        torch.zeros(1, device=device).to(FLOAT8).float()
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def decode_e4m3(raw: torch.Tensor) -> torch.Tensor:
    """Decodes e4m3fn numbers stored as bytes (uint8) to bf16. Exact."""
    return _e4m3_values().to(raw.device)[raw.int()]


@lru_cache(1)
def _e4m3_values() -> torch.Tensor:
    code = torch.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7).double()
    magnitude = torch.where(
        exponent == 0, mantissa * _SMALLEST_STEP, (1 + mantissa / 8) * 2.0 ** (exponent.double() - 7)
    )
    magnitude[(code & 127) == 127] = torch.nan
    return torch.where(code < 128, magnitude, -magnitude).to(torch.bfloat16)


def _unpack_e4m3(weight: torch.Tensor) -> torch.Tensor:
    """Decodes e4m3fn numbers on the CPU to float32, twice as fast as torch. Exact; NaN, which no weight is, gives 480.

    Sign, exponent and mantissa are shifted to their bits of a float16, and the product corrects the exponent bias.
    """
    bits = weight.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(_SIGN_AND_E4M3)
    return bits.view(torch.float16).float().mul_(2.0**8)


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Rounds x (bf16, |x| <= 448) to the nearest e4m3fn value, ties to even, in bf16. For devices without float8."""
    upcast = x.float()
    exponent = torch.floor(torch.log2(upcast.abs().clamp(min=2.0**-6)))
    step = torch.exp2(exponent - 3)
    return (torch.round(upcast / step) * step).to(x.dtype)
