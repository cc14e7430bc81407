"""float8 (e4m3fn) weights of the official quantised checkpoints, on any device.

Where the hardware multiplies float8 the products are done there; elsewhere the very same rounded numbers are multiplied in
a wider type, which holds every e4m3 product exactly. Devices whose torch has no float8 at all keep the weights as bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..errors import MagiError

E4M3_MAX = 448.0
CONVERTED = 1 << 25  # numbers of a matrix that stand in another form at a time
_EXPONENT = 0x7F800000  # of a float32: alone, it is the power of two below
_SMALLEST_STEP = 2.0**-9  # spacing of the subnormal numbers
_SIGN_AND_E4M3 = 0xBF80 - 0x10000  # bits of an int16: the sign, four of a float16's exponent, three of its mantissa
FLOAT8 = getattr(torch, "float8_e4m3fn", None)


def require_float8() -> torch.dtype:
    """torch's e4m3fn type. Raises MagiError on a build without it."""
    if FLOAT8 is None:
        raise MagiError(
            f"torch {torch.__version__} has no float8: update torch to 2.5 or newer, or use a bf16 checkpoint."
        )
    return FLOAT8


@dataclass(frozen=True)
class Fp8Weight:
    """One quantised linear layer.

    Attributes:
        weight: (out, in) e4m3fn, or its bytes as uint8 on devices without float8.
        weight_scale: () float32.
        input_scale: () float32.
        smooth_scale: (in,) float32 per channel where the layer was smoothed, None where input_scale quantises its input.
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
        """From a checkpoint's tensors: weight (1, out, in) or (out, in), scales of any shape with equal entries."""
        device = torch.device(device or weight.device)
        weight = weight.reshape(weight.shape[-2:])
        if not holds_float8(device):
            weight = weight.view(torch.uint8)

        def scale(s: torch.Tensor) -> torch.Tensor:
            return s.reshape(-1)[0].float().to(device)

        smooth = None if smooth_scale is None else smooth_scale.reshape(-1).float().to(device)
        return cls(weight.to(device), scale(weight_scale), scale(input_scale), smooth)


@dataclass(frozen=True)
class StoredFp8:
    """A matrix kept in float8 for its size alone: it is made dense where it is used, and multiplied in the compute dtype.

    Attributes:
        weight: (out, in) e4m3fn, or its bytes as uint8 on devices without float8.
        scale: (out, 1) float32 powers of two, which no product rounds: the largest of a row lies within 224 .. 448.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def quantise(cls, weight: torch.Tensor, device: torch.device | str) -> "StoredFp8":
        """From (out, in) numbers of any floating type. Raises MagiError where torch has no float8."""
        float8 = require_float8()
        device = torch.device(device)
        native = holds_float8(device)
        weight = weight.to(device if native else "cpu")
        ratio = weight.abs().amax(dim=1, keepdim=True).float() / E4M3_MAX
        power = (ratio.view(torch.int32) & _EXPONENT).view(torch.float32) * 2
        scale = torch.where(power > 0, power, 1.0)  # of a row of zeros: 1
        kept = (weight / scale).to(float8)
        return cls((kept if native else kept.view(torch.uint8)).to(device), scale.to(device))

    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of the matrix as (rows, in) of `dtype`, a new tensor."""
        return _plain(self.weight[rows]).to(dtype).mul_(self.scale[rows].to(dtype))


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    smooth_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """One official fp8 layer: (..., in) -> (..., out) in x's dtype. Shapes of the weights as in the checkpoint."""
    return apply_fp8(x, Fp8Weight.from_official(weight, weight_scale, input_scale, smooth_scale, x.device))


def apply_fp8(x: torch.Tensor, layer: Fp8Weight) -> torch.Tensor:
    """Quantise x, multiply, rescale: (..., in) -> (..., out) in x's dtype."""
    divisor = layer.input_scale.reshape(1) if layer.smooth_scale is None else layer.smooth_scale
    # Of a 16-bit number and a float32 one of at least one axis: float32.
    scaled = (x / divisor).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.bfloat16)
    flat = scaled.reshape(-1, scaled.shape[-1])
    if layer.weight.dtype == torch.uint8:
        product = multiply_exact(round_to_e4m3(flat), layer.weight)
    elif multiplies_float8(layer.weight.device):
        product = _multiply_float8(flat.to(layer.weight.dtype), layer.weight)
    else:
        product = multiply_exact(flat.to(layer.weight.dtype).to(torch.bfloat16), layer.weight)
    y = product.mul_(layer.input_scale).mul_(layer.weight_scale)
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def multiply_exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T with float32 products, sums and result: (n, in), (out, in) -> (n, out).

    `x` is of 16 bits, `weight` too, or e4m3fn, or its bytes as uint8.
    """
    if not keeps_sums(x.device):
        return _convert_and_multiply(x.float(), weight, F.linear)
    return _convert_and_multiply(x, weight, lambda x, part: torch.mm(x, part.t(), out_dtype=torch.float32))


def _convert_and_multiply(
    x: torch.Tensor, weight: torch.Tensor, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`product` of x and the weight in x's type."""
    if weight.dtype == x.dtype:
        return product(x, weight)
    return by_rows(weight, lambda rows: product(x, _plain(weight[rows]).to(x.dtype)))


def by_rows(weight: torch.Tensor, product: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """A product with a matrix (out, in) that needs it in another form than it is kept in, a part of its rows at a time.

    `product(rows)` gives (..., rows); a matrix that is small, or need not be converted, is taken whole.
    """
    outputs, width = weight.shape
    step = max(1, CONVERTED // width)
    if step >= outputs:
        return product(slice(0, outputs))
    out = None
    for start in range(0, outputs, step):
        part = product(slice(start, start + step))
        out = part.new_empty(*part.shape[:-1], outputs) if out is None else out
        out[..., start : start + step] = part
    assert out is not None  # noqa: S101 (there is a first part)
    return out


def _plain(weight: torch.Tensor) -> torch.Tensor:
    """e4m3 numbers in a type that can be computed with; others as they are."""
    if weight.dtype == FLOAT8 and weight.device.type == "cpu":
        return _unpack_e4m3(weight)
    return decode_e4m3(weight) if weight.dtype == torch.uint8 else weight


def keeps_sums(device: torch.device) -> bool:
    """Whether a product of 16-bit numbers can have float32 results on `device`, without float32 copies of its factors."""
    return device.type == "cuda" and torch.version.hip is None and _has_out_dtype(device)


@lru_cache(8)
def _has_out_dtype(device: torch.device) -> bool:
    """Whether torch.mm can keep the float32 sums of 16-bit factors (newer builds): tried once."""
    try:
        probe = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
        return torch.mm(probe, probe, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def _multiply_float8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The hardware's float8 product, float32. The row count is padded to what the kernel takes."""
    rows = x.shape[0]
    if rows % 16:
        x = F.pad(x.view(torch.uint8), (0, 0, 0, -rows % 16)).view(weight.dtype)
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)[:rows]


def multiplies_float8(device: torch.device) -> bool:
    """Whether `device` has float8 matrix units that torch can use (NVIDIA Ada, Hopper, Blackwell)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@lru_cache(8)
def holds_float8(device: torch.device | str) -> bool:
    """Whether tensors of e4m3fn can live on this device and be cast there."""
    if FLOAT8 is None:
        return False
    try:
        torch.zeros(1, device=device).to(FLOAT8).float()
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def decode_e4m3(raw: torch.Tensor) -> torch.Tensor:
    """The bf16 values of e4m3fn numbers kept as bytes (uint8). Exact."""
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
    """float32 values of e4m3fn numbers on the CPU, twice as fast as by its own conversion. Exact; NaN, which no weight is, gives 480.

    Sign, exponent and mantissa are moved to their places in a float16, whose exponents count from another number.
    """
    bits = weight.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(_SIGN_AND_E4M3)
    return bits.view(torch.float16).float().mul_(2.0**8)


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x (bf16, |x| <= 448) rounded to the nearest e4m3fn value, ties to even, still in bf16. For devices without float8."""
    wide = x.float()
    exponent = torch.floor(torch.log2(wide.abs().clamp(min=2.0**-6)))
    step = torch.exp2(exponent - 3)
    return (torch.round(wide / step) * step).to(x.dtype)
