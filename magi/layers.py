"""The transformer's small parts: norms, linear layers, MLP, time embedding. Pure functions on weights."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .quant import ROWS, Fp8Weight, StoredFp8, apply_fp8, multiply_exact


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


AnyLinear = Linear | Fp8Weight | StoredFp8


def layer_norm(x: torch.Tensor, norm: Norm, eps: float) -> torch.Tensor:
    """Layer norm over the last axis, in the dtype of the norm's weights, returned in it."""
    return F.layer_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.bias, eps)


def linear(x: torch.Tensor, layer: AnyLinear) -> torch.Tensor:
    """(..., in) -> (..., out) in x's dtype."""
    if isinstance(layer, Fp8Weight):
        return apply_fp8(x, layer)
    if isinstance(layer, StoredFp8):
        return F.linear(x, layer.dense(x.dtype))
    return F.linear(x, layer.weight, layer.bias)


def output_projection(x: torch.Tensor, layer: AnyLinear) -> torch.Tensor:
    """Attention's projection, (tokens, in) -> (tokens, out): float32 sums kept in float32, but fp8 layers round as ever."""
    if isinstance(layer, Fp8Weight):
        return apply_fp8(x, layer)
    return multiply_exact(x, layer.dense(x.dtype) if isinstance(layer, StoredFp8) else layer.weight)


def mlp(x: torch.Tensor, fc1: AnyLinear, fc2: AnyLinear, gated: bool) -> torch.Tensor:
    """SwiGLU (float32 between the matrices, one rounding) or GELU MLP: (tokens, D) -> (tokens, D)."""
    return linear(_activated(linear(x, fc1), gated), fc2)


def _activated(hidden: torch.Tensor, gated: bool) -> torch.Tensor:
    """What stands between the matrices, a few rows at a time: whole float32 copies would be the peak of a forward call."""
    out = hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2) if gated else hidden
    for rows, target in zip(hidden.split(ROWS), out.split(ROWS), strict=True):
        target.copy_(_swiglu(rows) if gated else F.gelu(rows))
    return out


def _swiglu(rows: torch.Tensor) -> torch.Tensor:
    gate, value = rows.float().chunk(2, dim=-1)
    return F.silu(gate).mul_(value)


def gated_residual(
    residual: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, norm: Norm, eps: float
) -> torch.Tensor:
    """residual + norm(value * gate), in float32 without rounding between: (tokens, D) in residual's dtype."""
    return layer_norm(value.float() * gate.float(), norm, eps).add_(residual).to(residual.dtype)


def timestep_embedding(t: float, size: int, device: torch.device) -> torch.Tensor:
    """[cos, sin] of t * 1000 at `size`/2 geometric frequencies: (1, size) float32."""
    half = size // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)
    # The order of the two products decides the last bits of the argument.
    args = torch.tensor([[t]], dtype=torch.float32, device=device) * freqs * 1000
    return torch.cat([args.cos(), args.sin()], dim=-1)
