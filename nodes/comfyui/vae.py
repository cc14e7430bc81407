"""The MAGI-1 VAE behind the interface of ComfyUI's own VAE objects, so that native VAE nodes take it too."""

from collections.abc import Iterator
from typing import Any

import torch

from ...magi.config import LATENT_CHANNELS, SPATIAL_DOWNSAMPLE, TEMPORAL_DOWNSAMPLE
from ...magi.errors import MagiError
from ...magi.system.progress import OnProgress
from ...magi.vae.footprint import makes_scores, tile_bytes
from ...magi.vae.model import VAEConfig
from ...magi.vae.tiling import Tiling
from ...magi.vae.video_vae import VideoVAE
from . import host, memory
from .families import Family
from .memory import WholeModelPatcher
from .models import MagiVideoVAE

_SMALLER = "Use smaller tiles."


class NativeVAE:
    """The interface of ComfyUI's VAE objects: images (T, H, W, 3) in 0..1, scaled latents (1, 16, T/4, H/8, W/8)."""

    latent_channels = LATENT_CHANNELS
    latent_dim = 3
    downscale_ratio = SPATIAL_DOWNSAMPLE
    upscale_ratio = SPATIAL_DOWNSAMPLE

    def __init__(self, patcher: WholeModelPatcher, family: Family | None = None) -> None:
        """Takes the patcher of a `MagiVideoVAE`, and the family whose latents it understands; nothing is loaded."""
        self.patcher, self.family = patcher, family
        self.device = patcher.load_device
        self.output_device = torch.device("cpu")

    def __repr__(self) -> str:
        return "MAGI-1 VAE"

    # -- for this pack's nodes -----------------------------------------------------------------------------------------

    def loaded(self, tiling: Tiling | None = None, progress: OnProgress | None = None) -> VideoVAE:
        """Returns the VAE on the device; ComfyUI evicts others for it and for a tile, by default the published one."""
        (vae,) = memory.load(self.patcher, working=working_memory(tiling or Tiling()), progress=progress)
        return vae

    # -- as ComfyUI's nodes call it ------------------------------------------------------------------------------------

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None) -> torch.Tensor:
        """Decodes latents to images, float32 (1, T, H, W, 3) in 0..1."""
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
        """Decodes with tiles of `tile_x` latent pixels and `tile_t` latent frames; ignores the other arguments."""
        return self._decode(samples, _tiling(SPATIAL_DOWNSAMPLE * (tile_x or 32), tile_t))

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """Encodes images, (T, H, W, 3) in 0..1, to latents; their sides are cut to multiples of 8."""
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
        """Encodes with tiles of `tile_x` pixels and `tile_t` frames; ignores the other arguments."""
        return self._encode(pixel_samples, _tiling(tile_x or 256, tile_t and max(1, tile_t // TEMPORAL_DOWNSAMPLE)))

    def spacial_compression_decode(self) -> int:
        """Returns the pixels per latent pixel, along height and along width."""
        return SPATIAL_DOWNSAMPLE

    def spacial_compression_encode(self) -> int:
        """Returns the pixels per latent pixel, along height and along width."""
        return SPATIAL_DOWNSAMPLE

    def temporal_compression_decode(self) -> int:
        """Returns the frames per latent frame."""
        return TEMPORAL_DOWNSAMPLE

    def throw_exception_if_invalid(self) -> None:
        """Does nothing: the file was checked when it was chosen."""

    def get_sd(self) -> dict[str, torch.Tensor]:
        """Returns the weights by name."""
        return self.loaded().state_dict()

    def _decode(self, latents: torch.Tensor, tiling: Tiling | None) -> torch.Tensor:
        with host.device_work("decoding", _SMALLER):
            return torch.cat(list(decoded(self.loaded(tiling), latents, tiling, _interruptible)))[None]

    def _encode(self, pixels: torch.Tensor, tiling: Tiling | None) -> torch.Tensor:
        height, width = (side // SPATIAL_DOWNSAMPLE * SPATIAL_DOWNSAMPLE for side in pixels.shape[1:3])
        video = pixels[:, :height, :width, :3].permute(3, 0, 1, 2)[None].float() * 2 - 1
        with host.device_work("encoding", _SMALLER):
            return self.loaded(tiling).encode(video, tiling, _interruptible)


def magi_vae(vae: object) -> NativeVAE:
    """Returns the VAE if it is MAGI-1's. Raises MagiError for any other."""
    if isinstance(vae, NativeVAE):
        return vae
    raise MagiError(f"This VAE ({type(vae).__name__}) is not MAGI-1's. Connect a MAGI-1 VAE Loader.")


def manage_vae(path: Any, dtype: torch.dtype, family: Family | None = None) -> NativeVAE:
    """Returns a VAE that is loaded when it is used. Raises MagiError for a wrong or damaged file.

    Where the family is not given, its size tells whether it is that of the released models.
    """
    vae = MagiVideoVAE(path, dtype)
    if family is None and vae.config.embed_dim == VAEConfig().embed_dim:
        family = "released"
    return NativeVAE(WholeModelPatcher(vae, host.vae_device()), family)


def decoded(
    vae: VideoVAE, latents: torch.Tensor, tiling: Tiling | None, progress: OnProgress
) -> Iterator[torch.Tensor]:
    """Yields images, float32 (t, H, W, 3) in 0..1, per temporal tile; without a tiling, tiles fit the free memory."""
    for video in vae.decode_stream(latents, tiling, progress):
        yield video[0].permute(1, 2, 3, 0).add(1).div(2).clamp(0, 1)


def working_memory(tiling: Tiling) -> int:
    """Returns the bytes that a tile takes on its way through the published VAE, in the dtype that takes more."""
    config, device = VAEConfig(), host.vae_device()
    dtypes = (torch.bfloat16, torch.float32)
    return max(tile_bytes(config, tiling, dtype, makes_scores(device, dtype, config)) for dtype in dtypes)


def _tiling(size: int, latent_frames: int | None) -> Tiling:
    return Tiling(frames=TEMPORAL_DOWNSAMPLE * (latent_frames or 3), size=max(64, size // 32 * 32))


def _interruptible(done: int, total: int) -> None:
    host.check_interrupt()
