"""Grouped-query attention without repeating keys, on whatever kernel torch has for the device."""

import torch
import torch.nn.functional as F
from einops import rearrange


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every query attends to every key; consecutive query heads share a key head.

    Without a mask the rows of the score matrix are independent, so the query heads of a group can be laid end to end as one
    longer sequence: no key is repeated and every kernel (flash, memory-efficient, CPU) takes it.

    Args:
        q: (heads, tokens, d).
        k: (groups, keys, d); the first two strides are free.
        v: (groups, keys, d).

    Returns:
        (tokens, heads * d).
    """
    heads, tokens, d = q.shape
    dtype = q.dtype
    if q.device.type == "cpu":  # its kernel rounds the weights to 16 bits, the others keep their sums in float32
        q, k, v = q.float(), k.float(), v.float()
    folded = q.reshape(1, k.shape[0], heads // k.shape[0] * tokens, d)
    out = F.scaled_dot_product_attention(folded, k[None], v[None])
    return rearrange(out, "1 g (r s) d -> s (g r d)", s=tokens).to(dtype)
