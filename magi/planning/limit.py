"""How large the layout of a run may be at most."""

from dataclasses import dataclass

from ..transformer.inputs import CacheDevice


@dataclass(frozen=True)
class Limit:
    """The largest layout that may be chosen, where a larger one ran out of memory.

    Attributes:
        layers: that stay on the device.
        token_block: tokens that are taken through a layer at a time.
        cache: where keys and values are kept: "device" leaves it open, "host" does not.
        window: chunks denoised at a time, where a smaller window may be taken.
    """

    layers: int
    token_block: int
    cache: CacheDevice
    window: int
