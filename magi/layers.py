"""The transformer's small parts: norms, linear layers, MLP, time embedding. Pure functions on weights."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .quant import Fp8Weight, apply_fp8, multiply_exact


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


AnyLinear = Linear | Fp8Weight


def layer_norm(x: torch.Tensor, norm: Norm, eps: float) -> torch.Tensor:
    """Layer norm over the last axis, in the dtype of the norm's weights, returned in it."""
    return F.layer_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.bias, eps)


def linear(x: torch.Tensor, layer: AnyLinear) -> torch.Tensor:
    """(..., in) -> (..., out) in x's dtype."""
    if isinstance(layer, Fp8Weight):
        return apply_fp8(x, layer)
    return F.linear(x, layer.weight, layer.bias)


def output_projection(x: torch.Tensor, layer: AnyLinear) -> torch.Tensor:
    """Attention's projection, (tokens, in) -> (tokens, out): float32 sums kept in float32, but fp8 layers round as ever."""
    if isinstance(layer, Fp8Weight):
        return apply_fp8(x, layer)
    return multiply_exact(x, layer.weight)


def mlp(x: torch.Tensor, fc1: AnyLinear, fc2: AnyLinear, gated: bool) -> torch.Tensor:
    """SwiGLU (float32 between the matrices, one rounding) or GELU MLP: (tokens, D) -> (tokens, D)."""
    hidden = linear(x, fc1)
    if gated:
        gate, value = hidden.float().chunk(2, dim=-1)
        hidden = (F.silu(gate) * value).to(x.dtype)
    else:
        hidden = F.gelu(hidden)
    return linear(hidden, fc2)


def gated_residual(
    residual: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, norm: Norm, eps: float
) -> torch.Tensor:
    """residual + norm(value * gate), in float32 without rounding between: (tokens, D) in residual's dtype."""
    return (residual.float() + layer_norm(value.float() * gate.float(), norm, eps)).to(residual.dtype)


def timestep_embedding(t: float, size: int, device: torch.device) -> torch.Tensor:
    """[cos, sin] of t * 1000 at `size`/2 geometric frequencies: (1, size) float32."""
    half = size // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)
    # The order of the two products decides the last bits of the argument.
    args = torch.tensor([[t]], dtype=torch.float32, device=device) * freqs * 1000
    return torch.cat([args.cos(), args.sin()], dim=-1)
