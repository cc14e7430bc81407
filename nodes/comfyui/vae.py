"""The MAGI-1 VAE behind the interface of ComfyUI's own VAE objects, so that native VAE nodes take it too."""

from collections.abc import Iterator
from typing import Any

import torch

from ...magi.errors import MagiError
from ...magi.system.progress import OnProgress
from ...magi.vae.footprint import makes_scores, tile_bytes
from ...magi.vae.model import VAEConfig
from ...magi.vae.tiling import Tiling
from ...magi.vae.video_vae import VideoVAE
from . import host, memory
from .memory import Managed
from .models import MagiVideoVAE

_SMALLER = "Use smaller tiles."


class NativeVAE:
    """Images are (T, H, W, 3) in 0..1, latents (1, 16, T / 4, H / 8, W / 8) as the sampler makes them."""

    latent_channels = 16
    latent_dim = 3
    downscale_ratio = 8
    upscale_ratio = 8

    def __init__(self, patcher: Managed) -> None:
        """`patcher` manages a `MagiVideoVAE`."""
        self.patcher = patcher
        self.device = patcher.load_device
        self.output_device = torch.device("cpu")

    def __repr__(self) -> str:
        return "MAGI-1 VAE"

    # -- for this pack's nodes -----------------------------------------------------------------------------------------

    def loaded(self, tiling: Tiling | None = None, progress: OnProgress | None = None) -> VideoVAE:
        """The VAE on the device, with room for a tile, the published one by default; so far as other models can make it."""
        (vae,) = memory.load(self.patcher, working=working_memory(tiling or Tiling()), progress=progress)
        return vae

    # -- as ComfyUI's nodes call it ------------------------------------------------------------------------------------

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None) -> torch.Tensor:
        """Latents -> (1, T, H, W, 3) in 0..1."""
        return self._decode(samples_in, None)

    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """`decode` with tiles of `tile_x` latent pixels and `tile_t` latent frames; in time they do not overlap."""
        return self._decode(samples, _tiling(8 * (tile_x or 32), tile_t))

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """(T, H, W, 3) in 0..1 -> latents; sides are cut to multiples of 8."""
        return self._encode(pixel_samples, None)

    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """`encode` with tiles of `tile_x` pixels and `tile_t` frames."""
        return self._encode(pixel_samples, _tiling(tile_x or 256, tile_t and max(1, tile_t // 4)))

    def spacial_compression_decode(self) -> int:
        """Pixels a latent."""
        return 8

    def spacial_compression_encode(self) -> int:
        """Pixels a latent."""
        return 8

    def temporal_compression_decode(self) -> int:
        """Frames a latent."""
        return 4

    def throw_exception_if_invalid(self) -> None:
        """It was checked when it was chosen."""

    def get_sd(self) -> dict[str, torch.Tensor]:
        """The weights by their names."""
        return self.loaded().state_dict()

    def _decode(self, latents: torch.Tensor, tiling: Tiling | None) -> torch.Tensor:
        with host.device_work("decoding", _SMALLER):
            return torch.cat(list(decoded(self.loaded(tiling), latents, tiling, _interruptible)))[None]

    def _encode(self, pixels: torch.Tensor, tiling: Tiling | None) -> torch.Tensor:
        height, width = (side // 8 * 8 for side in pixels.shape[1:3])
        video = pixels[:, :height, :width, :3].permute(3, 0, 1, 2)[None].float() * 2 - 1
        with host.device_work("encoding", _SMALLER):
            return self.loaded(tiling).encode(video, tiling, _interruptible)


def magi_vae(vae: object) -> NativeVAE:
    """The VAE if it is MAGI-1's. Raises MagiError for any other."""
    if isinstance(vae, NativeVAE):
        return vae

    raise MagiError(f"This VAE ({type(vae).__name__}) is not MAGI-1's. Connect a MAGI-1 VAE Loader.")


def manage_vae(path: Any, dtype: torch.dtype) -> NativeVAE:
    """A VAE that is loaded when it is used. Raises MagiError for a wrong or damaged file."""
    return NativeVAE(Managed(MagiVideoVAE(path, dtype), host.vae_device()))


def decoded(
    vae: VideoVAE, latents: torch.Tensor, tiling: Tiling | None, progress: OnProgress
) -> Iterator[torch.Tensor]:
    """Frames (t, H, W, 3) float32 in 0..1, a tile of time after the other; without a tiling by tiles for what is free."""
    for video in vae.decode_stream(latents, tiling, progress):
        yield video[0].permute(1, 2, 3, 0).add(1).div(2).clamp(0, 1)


def working_memory(tiling: Tiling) -> int:
    """Bytes a tile takes on its way through the published VAE, in the precision that takes more."""
    config, device = VAEConfig(), host.vae_device()
    dtypes = (torch.bfloat16, torch.float32)
    return max(tile_bytes(config, tiling, dtype, makes_scores(device, dtype, config)) for dtype in dtypes)


def _tiling(size: int, latent_frames: int | None) -> Tiling:

    return Tiling(frames=4 * (latent_frames or 3), size=max(64, size // 32 * 32))


def _interruptible(done: int, total: int) -> None:
    host.check_interrupt()
