"""Grouped-query attention without repeated K/V, by the kernel torch picks for the device or by a chosen one."""

import importlib
import importlib.util
import sys
import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import MagiError

_SAGE = "sageattention"
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_choices() -> tuple[str, ...]:
    """Returns the valid choices: "auto", torch's kernels by name, and "sage" if sageattention is installed."""
    return ("auto", *_KERNELS, *(("sage",) if _has_sage() else ()))


def check_attention(
    choice: str, device: torch.device, dtype: torch.dtype, heads: int, groups: int, head_size: int
) -> None:
    """Runs a choice on a small input of the model's dtype and head size, so that it fails before anything is loaded.

    Raises:
        MagiError: the choice is unknown, or it does not run on this device, in this dtype or with this head size.
    """
    choices = attention_choices()
    if choice not in choices:
        hint = " For sage install the package sageattention." if choice == "sage" else ""
        raise MagiError(f"There is no attention {choice!r}. Choose one of {', '.join(choices)}.{hint}")
    if choice == "auto":
        return
    tokens = 64
    q = torch.ones(heads, tokens, head_size, device=device, dtype=dtype)  # (H, S, d)
    kv = torch.ones(groups, 2 * tokens, head_size, device=device, dtype=dtype)  # (G, T, d)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about every kernel it rejects
            attend(q, kv, kv, choice).sum().item()
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise MagiError(
            f"The attention {choice!r} does not run on {device} in {str(dtype).removeprefix('torch.')} with heads of "
            f"{head_size} ({reason[0]}). Choose auto or another one of {', '.join(choices)}."
        ) from error


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, choice: str = "auto") -> torch.Tensor:
    """Computes unmasked grouped-query attention; consecutive query heads share a K/V head.

    Without a mask the rows of the score matrix are independent, so the query heads of a group can be concatenated into
    one longer sequence: no K/V head is repeated, and every kernel (flash, memory-efficient, CPU) supports that shape.

    Args:
        q: (H, S, d).
        k: (G, T, d), with any strides along the first two axes.
        v: (G, T, d), likewise.
        choice: one of `attention_choices`, accepted by `check_attention`.

    Returns:
        (S, H * d) in q's dtype.
    """
    heads, tokens, d = q.shape
    dtype = q.dtype
    if q.device.type == "cpu" and choice != "sage":  # torch's CPU kernel rounds the softmax to 16 bits
        q, k, v = q.float(), k.float(), v.float()
    folded = q.reshape(1, k.shape[0], heads // k.shape[0] * tokens, d)  # (1, G, H/G * S, d)
    if choice == "sage":
        sage = importlib.import_module(_SAGE).sageattn
        out = sage(folded, k[None], v[None], tensor_layout="HND", is_causal=False)  # (1, G, H/G * S, d)
    elif q.device.type == "meta":  # a kernel that something has put in place of torch's may not take it
        out = torch.empty_like(folded)
    else:
        with sdpa_kernel(_KERNELS[choice]) if choice in _KERNELS else nullcontext():
            out = F.scaled_dot_product_attention(folded, k[None], v[None])  # (1, G, H/G * S, d)
    return rearrange(out, "1 g (r s) d -> s (g r d)", s=tokens).to(dtype)  # (S, H * d)


def _has_sage() -> bool:
    return sys.modules.get(_SAGE) is not None or importlib.util.find_spec(_SAGE) is not None
