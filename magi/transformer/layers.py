"""The transformer's small parts: norms, linear layers, MLP, time embedding. Pure functions on weights."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .float8 import Fp8Weight, StoredFp8, apply_fp8, by_rows, multiply_exact


@dataclass(frozen=True)
class Norm:
    """Scale and shift of a layer norm, (size,) each. "1p" norms already hold weight + 1."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Linear:
    """An ordinary linear layer: weight (out, in), bias (out,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


_RECORDED_FREQUENCIES = 128
_ROUNDED_UP = [12, 106]

AnyLinear = Linear | Fp8Weight | StoredFp8


def layer_norm(x: torch.Tensor, norm: Norm, eps: float) -> torch.Tensor:
    """Layer norm over the last axis, in the dtype of the norm's weights, returned in it."""
    return F.layer_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.bias, eps)


def linear(x: torch.Tensor, layer: AnyLinear) -> torch.Tensor:
    """(..., in) -> (..., out) in x's dtype."""
    if isinstance(layer, Fp8Weight):
        return apply_fp8(x, layer)
    if isinstance(layer, StoredFp8):
        return by_rows(layer.weight, lambda rows: F.linear(x, layer.dense(x.dtype, rows)))
    return F.linear(x, layer.weight, layer.bias)


def output_projection(x: torch.Tensor, layer: AnyLinear) -> torch.Tensor:
    """Attention's projection, (tokens, in) -> (tokens, out): float32 sums kept in float32, but fp8 layers round as ever."""
    if isinstance(layer, Fp8Weight):
        return apply_fp8(x, layer)
    if isinstance(layer, StoredFp8):
        return by_rows(layer.weight, lambda rows: multiply_exact(x, layer.dense(x.dtype, rows)))
    return multiply_exact(x, layer.weight)


def mlp(x: torch.Tensor, fc1: AnyLinear, fc2: AnyLinear, gated: bool) -> torch.Tensor:
    """SwiGLU (float32 between the matrices, one rounding) or GELU MLP: (tokens, D) -> (tokens, D)."""
    return linear(_swiglu(linear(x, fc1)) if gated else F.gelu(linear(x, fc1)), fc2)


def _swiglu(hidden: torch.Tensor) -> torch.Tensor:
    gate, value = hidden.chunk(2, dim=-1)
    return F.silu(gate.float(), inplace=hidden.dtype != torch.float32).mul_(value).to(hidden.dtype)


def gated_residual(
    residual: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, norm: Norm, eps: float
) -> torch.Tensor:
    """residual + norm(value * gate), in float32 without rounding between: (tokens, D) in residual's dtype."""
    return layer_norm(value.float() * gate.float(), norm, eps).add_(residual).to(residual.dtype)


def timestep_embedding(t: float, size: int, device: torch.device) -> torch.Tensor:
    """[cos, sin] of t * 1000 at `size`/2 geometric frequencies: (1, size) float32, the same on every device and processor."""
    # The order of the two products decides the last bits of the argument.
    args = torch.tensor([[t]], dtype=torch.float32) * _frequencies(size // 2) * 1000
    args = args.double()
    return torch.cat([args.cos(), args.sin()], dim=-1).to(device, torch.float32)


def _frequencies(count: int) -> torch.Tensor:
    """10000^(-i / count), (count,) float32.

    A step size of 32 turns the last bit of a frequency into 0.001 of a radian, and float32 `exp` differs in that bit between
    processors (MKL has five kernels) and cards. So it is rounded from float64 here, and where the public implementation's
    recorded outputs show the float32 number above instead, 0.52 instead of 0.48 units away, that one is taken.
    """
    exponents = -math.log(10000) * torch.arange(count, dtype=torch.float32) / count
    frequencies = exponents.double().exp().float()
    if count == _RECORDED_FREQUENCIES:
        frequencies[_ROUNDED_UP] = torch.nextafter(frequencies[_ROUNDED_UP], torch.tensor(math.inf))
    return frequencies
