"""Grouped-query attention without repeating keys, on whatever kernel torch has for the device or on a chosen one."""

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
    """What may be chosen: torch's own choice, its kernels by name, and "sage" where the package sageattention is installed."""
    return ("auto", *_KERNELS, *(("sage",) if _has_sage() else ()))


def check_attention(
    choice: str, device: torch.device, dtype: torch.dtype, heads: int, groups: int, head_size: int
) -> None:
    """Tries a choice on a few numbers of a model's kind, so that what cannot work fails before anything is loaded.

    Raises:
        MagiError: there is no such choice, or it does not run on this device, in this dtype or with heads of this size.
    """
    choices = attention_choices()
    if choice not in choices:
        hint = " For sage install the package sageattention." if choice == "sage" else ""
        raise MagiError(f"There is no attention {choice!r}. Choose one of {', '.join(choices)}.{hint}")
    if choice == "auto":
        return
    tokens = 64
    q = torch.ones(heads, tokens, head_size, device=device, dtype=dtype)
    keys = torch.ones(groups, 2 * tokens, head_size, device=device, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every kernel that it passes over
            attend(q, keys, keys, choice).sum().item()
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise MagiError(
            f"The attention {choice!r} does not run on {device} in {str(dtype).removeprefix('torch.')} with heads of "
            f"{head_size} ({reason[0]}). Choose auto or another one of {', '.join(choices)}."
        ) from error


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, choice: str = "auto") -> torch.Tensor:
    """Every query attends to every key; consecutive query heads share a key head.

    Without a mask the rows of the score matrix are independent, so the query heads of a group can be laid end to end as one
    longer sequence: no key is repeated and every kernel (flash, memory-efficient, CPU) takes it.

    Args:
        q: (heads, tokens, d).
        k: (groups, keys, d); the first two strides are free.
        v: (groups, keys, d).
        choice: one of `attention_choices` that `check_attention` has let pass.

    Returns:
        (tokens, heads * d).
    """
    heads, tokens, d = q.shape
    dtype = q.dtype
    if q.device.type == "cpu" and choice != "sage":  # torch's kernel rounds the weights to 16 bits, others do not
        q, k, v = q.float(), k.float(), v.float()
    folded = q.reshape(1, k.shape[0], heads // k.shape[0] * tokens, d)
    if choice == "sage":
        sage = importlib.import_module(_SAGE).sageattn
        out = sage(folded, k[None], v[None], tensor_layout="HND", is_causal=False)
    else:
        with sdpa_kernel(_KERNELS[choice]) if choice in _KERNELS else nullcontext():
            out = F.scaled_dot_product_attention(folded, k[None], v[None])
    return rearrange(out, "1 g (r s) d -> s (g r d)", s=tokens).to(dtype)


def _has_sage() -> bool:
    return sys.modules.get(_SAGE) is not None or importlib.util.find_spec(_SAGE) is not None
