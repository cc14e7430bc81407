"""The transformer's building blocks: norms, linear layers, MLP, time embedding. Pure functions on weights."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .float8 import Fp8Weight, StoredFp8, apply_fp8, by_rows, matmul_fp32


@dataclass(frozen=True)
class Norm:
    """Scale and shift of a layer norm, (size,) each. "1p" norms already contain weight + 1."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Linear:
    """An ordinary linear layer: weight (out, in), bias (out,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


_RECORDED_FREQUENCIES = 128  # the count for which outputs of the public implementation are recorded
_ROUNDED_UP = [12, 106]  # indices that it rounds up, see `timestep_frequencies`

AnyLinear = Linear | Fp8Weight | StoredFp8


def layer_norm(x: torch.Tensor, norm: Norm, eps: float) -> torch.Tensor:
    """Normalizes the last axis; computes and returns in the dtype of the norm's weights: (..., size) -> (..., size)."""
    return F.layer_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.bias, eps)


def linear(x: torch.Tensor, layer: AnyLinear) -> torch.Tensor:
    """Applies a linear layer: (..., in) -> (..., out) in x's dtype."""
    if isinstance(layer, Fp8Weight):
        return apply_fp8(x, layer)
    if isinstance(layer, StoredFp8):
        return by_rows(layer.weight, lambda rows: F.linear(x, layer.dequantize(x.dtype, rows)))
    return F.linear(x, layer.weight, layer.bias)


def output_projection(x: torch.Tensor, layer: AnyLinear) -> torch.Tensor:
    """Applies the output projection, (S, in) -> (S, out), with float32 output; official fp8 layers return x's dtype."""
    if isinstance(layer, Fp8Weight):
        return apply_fp8(x, layer)
    if isinstance(layer, StoredFp8):
        return by_rows(layer.weight, lambda rows: matmul_fp32(x, layer.dequantize(x.dtype, rows)))
    return matmul_fp32(x, layer.weight)


def mlp(x: torch.Tensor, fc1: AnyLinear, fc2: AnyLinear, gated: bool) -> torch.Tensor:
    """Applies the SwiGLU MLP (float32 between the matrices, one rounding) or the GELU MLP: (S, D) -> (S, D)."""
    return linear(_swiglu(linear(x, fc1)) if gated else F.gelu(linear(x, fc1)), fc2)  # (S, ffn) -> (S, D)


def _swiglu(hidden: torch.Tensor) -> torch.Tensor:
    gate, value = hidden.chunk(2, dim=-1)  # (S, ffn) each
    return F.silu(gate.float(), inplace=hidden.dtype != torch.float32).mul_(value).to(hidden.dtype)


def gated_residual(
    residual: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, norm: Norm, eps: float
) -> torch.Tensor:
    """Computes residual + norm(value * gate) in float32, rounded once to the dtype of `residual`: (S, D)."""
    return layer_norm(value.float() * gate.float(), norm, eps).add_(residual).to(residual.dtype)


def timestep_embedding(t: float, size: int, device: torch.device) -> torch.Tensor:
    """Embeds t as [cos, sin] of t * 1000 at size / 2 frequencies: (1, size) float32, the same bits everywhere."""
    # The order of the two products decides the last bits of the argument.
    args = torch.tensor([[t]], dtype=torch.float32) * timestep_frequencies(size // 2) * 1000  # (1, size / 2)
    args = args.double()
    return torch.cat([args.cos(), args.sin()], dim=-1).to(device, torch.float32)


def timestep_frequencies(count: int) -> torch.Tensor:
    """Returns 10000^(-i / count) for i in 0 .. count: (count,) float32.

    A step size of 32 turns the last bit of a frequency into 0.001 rad, and float32 `exp` differs in that bit between
    processors (MKL has five kernels) and GPUs. So the values are rounded from float64. Two of them are the next float32
    above instead, 0.52 rather than 0.48 units away, as recorded outputs of the public implementation show.
    """
    exponents = -math.log(10000) * torch.arange(count, dtype=torch.float32) / count
    frequencies = exponents.double().exp().float()
    if count == _RECORDED_FREQUENCIES:
        frequencies[_ROUNDED_UP] = torch.nextafter(frequencies[_ROUNDED_UP], torch.tensor(math.inf))
    return frequencies
