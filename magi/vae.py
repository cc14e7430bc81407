"""The MAGI-1 VAE: video <-> latents, tile by tile, in whole or as a stream."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from .checkpoint import Checkpoint
from .device import pick_device
from .errors import MagiError
from .mapped_file import compare_shapes, first_few
from .tiling import PATCH_FRAMES, PATCH_SIZE, ProgressCallback, TileProgress, Tiling, map_tiles, recut
from .vae_model import Decoder, Encoder, VAEConfig

SCALE = 0.18215  # latents outside the VAE = its means * SCALE
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class VideoVAE(nn.Module):
    """Encoder and decoder with their weights. Made by `load_vae`.

    Every method works on one tile at a time, takes tensors of any device and floating dtype, computes on `device` in
    `dtype`, and blends and returns float32 on `output_device`. `progress(tiles done, tiles known so far)` is called after
    every tile, and about twice a second inside long ones; whatever it raises stops the work.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """What the tiles are computed in."""
        return self.decoder.cls_token.dtype

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def encode(
        self,
        video: torch.Tensor,
        tiling: Tiling | None = None,
        progress: ProgressCallback | None = None,
        output_device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> scaled latents (B, 16, ceil(T/4), H/8, W/8).

        The last frame is repeated where T does not fill four; a single frame gives one latent frame.

        Raises:
            MagiError: the video is empty, not of this shape, not floating point, or H or W is no multiple of 8.
        """
        return torch.cat(list(self.encode_stream((video,), tiling, progress, output_device)), dim=2)

    def encode_stream(
        self,
        blocks: Iterable[torch.Tensor],
        tiling: Tiling | None = None,
        progress: ProgressCallback | None = None,
        output_device: torch.device | str = "cpu",
    ) -> Iterator[torch.Tensor]:
        """`encode` for a video that comes in blocks of frames (B, 3, t, H, W): yields the latents of each temporal tile at once.

        Blocks may have any number of frames; at most one tile and the current block are kept.
        """
        tiling = tiling or Tiling()
        counter = TileProgress(progress)
        for frames in recut(_counted(blocks, _check_video, tiling, counter, PATCH_FRAMES, PATCH_SIZE), tiling.frames):
            yield self._encode_frames(frames, tiling, counter, output_device)

    def decode(
        self,
        latents: torch.Tensor,
        tiling: Tiling | None = None,
        progress: ProgressCallback | None = None,
        output_device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Scaled latents (B, 16, T, h, w) -> video (B, 3, 4T, 8h, 8w), about [-1, 1] and not clamped.

        Raises:
            MagiError: the latents are empty, not of this shape or not floating point.
        """
        stream = self.decode_stream(latents, tiling, progress, output_device)
        b, _, t, h, w = latents.shape
        video = torch.empty(b, 3, PATCH_FRAMES * t, PATCH_SIZE * h, PATCH_SIZE * w, device=output_device)
        start = 0
        for frames in stream:
            video[:, :, start : start + frames.shape[2]] = frames
            start += frames.shape[2]
        return video

    def decode_stream(
        self,
        latents: torch.Tensor,
        tiling: Tiling | None = None,
        progress: ProgressCallback | None = None,
        output_device: torch.device | str = "cpu",
    ) -> Iterator[torch.Tensor]:
        """`decode`, one temporal tile after the other: peak memory does not grow with the number of latents.

        Yields (B, 3, t, H, W), each decoded when it is asked for. Arguments are checked at once.
        """
        self._check_latents(latents)
        return self.decode_chunks((latents,), tiling, progress, output_device)

    def decode_chunks(
        self,
        chunks: Iterable[torch.Tensor],
        tiling: Tiling | None = None,
        progress: ProgressCallback | None = None,
        output_device: torch.device | str = "cpu",
    ) -> Iterator[torch.Tensor]:
        """`decode_stream` for latents that come in chunks (B, 16, t, h, w) of any t, as a sampler makes them.

        The frames are those of decoding all chunks joined, wherever the chunks are cut. Each temporal tile is yielded as
        soon as its latents are there; fewer latents than two tiles are kept besides the current chunk.
        """
        tiling = tiling or Tiling()
        counter = TileProgress(progress)
        before = None
        for latents in recut(_counted(chunks, self._check_latents, tiling, counter, 1, 1), tiling.latent_frames):
            if latents.shape[2] == 1 < tiling.latent_frames and before is not None:
                # A lone last latent is decoded better with the ones before it, whose frames are already out.
                latents = torch.cat([before[:, :, 1:], latents], dim=2)
                yield self._decode_latents(latents, tiling, counter, output_device)[:, :, -PATCH_FRAMES:].clone()
            else:
                yield self._decode_latents(latents, tiling, counter, output_device)
            before = latents

    @torch.no_grad()
    def _encode_frames(
        self, frames: torch.Tensor, tiling: Tiling, counter: TileProgress, output_device: torch.device | str
    ) -> torch.Tensor:
        b, _, t, height, width = frames.shape
        missing = -t % PATCH_FRAMES
        size = ((t + missing) // PATCH_FRAMES, height // PATCH_SIZE, width // PATCH_SIZE)
        latents = torch.empty(b, self.config.z_chans, *size, device=output_device)

        def run(tile: torch.Tensor) -> torch.Tensor:
            tile = tile.to(self.device, self.dtype)
            if missing:
                tile = torch.cat([tile, tile[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
            means = self.encoder(tile, counter.alive)
            counter.finished()
            return means

        map_tiles(run, frames, latents, tiling, scale_in=PATCH_SIZE, scale_out=1, chained=True)
        return latents.mul_(SCALE)

    @torch.no_grad()
    def _decode_latents(
        self, latents: torch.Tensor, tiling: Tiling, counter: TileProgress, output_device: torch.device | str
    ) -> torch.Tensor:
        b, _, t, h, w = latents.shape
        video = torch.empty(b, 3, PATCH_FRAMES * t, PATCH_SIZE * h, PATCH_SIZE * w, device=output_device)

        def run(tile: torch.Tensor) -> torch.Tensor:
            unscaled = tile.to(self.device, torch.float32) / SCALE
            pixels = self.decoder(unscaled.to(self.dtype), counter.alive)
            counter.finished()
            return pixels

        map_tiles(run, latents, video, tiling, scale_in=1, scale_out=PATCH_SIZE, chained=False)
        return video

    def _check_latents(self, latents: torch.Tensor) -> None:
        _check_tensor(
            latents, "latents", f"(batch, {self.config.z_chans}, frames, height / 8, width / 8)", self.config.z_chans
        )


def _check_video(video: torch.Tensor) -> None:
    _check_tensor(video, "video", "(batch, 3, frames, height, width)", 3)
    for name, value in (("height", video.shape[3]), ("width", video.shape[4])):
        if value % PATCH_SIZE:
            nearest = max(1, round(value / PATCH_SIZE)) * PATCH_SIZE
            raise MagiError(
                f"The video's {name}, {value} pixels, is not a multiple of {PATCH_SIZE}. Resize or crop it to {nearest}."
            )


def _check_tensor(tensor: torch.Tensor, name: str, layout: str, channels: int) -> None:
    shape = tuple(tensor.shape)
    if len(shape) != 5 or shape[1] != channels:
        raise MagiError(f"Shape {shape} is not that of {name} for the VAE. Give {layout}.")
    if 0 in shape:
        raise MagiError(f"There is nothing in {name} of shape {shape}. Give at least one frame.")
    if not tensor.is_floating_point():
        raise MagiError(
            f"Values of type {tensor.dtype} are not {name} for the VAE. Give floating point; pixels as uint8 / 127.5 - 1."
        )


def _counted(
    blocks: Iterable[torch.Tensor],
    check: Callable[[torch.Tensor], None],
    tiling: Tiling,
    counter: TileProgress,
    frames: int,
    size: int,
) -> Iterator[torch.Tensor]:
    """Passes `blocks` on, checked, and keeps `counter.total` at the tiles they make; one latent is `frames` x `size` x `size` of their values."""
    first: torch.Size | None = None
    length = 0
    for block in blocks:
        check(block)
        first = first or block.shape
        if block.shape[3:] != first[3:] or block.shape[0] != first[0]:
            raise MagiError(
                f"A block of shape {tuple(block.shape)} follows one of {tuple(first)}. Only the number of frames may change."
            )
        length += block.shape[2]
        counter.total = tiling.tile_count(-(-length // frames), first[3] // size, first[4] // size)
        yield block


@torch.inference_mode(False)  # weights made in inference mode, as ComfyUI runs its nodes, could not be moved outside it
def load_vae(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: ProgressCallback | None = None,
) -> VideoVAE:
    """Loads a MAGI-1 VAE from its folder (config.json and one .safetensors) or from the bare .safetensors file.

    A config.json beside the file is used; without one the sizes are read off the tensors. On the CPU, weights that are
    already of `dtype` stay views of the mapped file.

    Args:
        path: folder or file.
        device: where the weights go; None is the best there is.
        dtype: what to compute in: bfloat16, float16 or float32.
        progress: called with (tensors placed, tensors); what it raises ends the loading.

    Raises:
        MagiError: nothing readable is there, or it is no MAGI-1 VAE.
    """
    if dtype not in DTYPES:
        raise MagiError(f"The VAE cannot compute in {dtype}. Choose bfloat16 (the official one), float16 or float32.")
    device = pick_device(device)
    with Checkpoint(path) as checkpoint:
        config = _beside(checkpoint.files[0]) or _config_of(checkpoint)
        with torch.device("meta"):
            vae = VideoVAE(config)
        _compare(checkpoint, vae)
        # One tensor at a time: another dtype or device never costs a second copy of the whole.
        weights: dict[str, torch.Tensor] = {}
        for name in checkpoint:
            weights[name] = checkpoint.tensor(name).to(device, dtype)
            if progress:
                progress(len(weights), len(checkpoint.tensors))
    vae.load_state_dict(weights, assign=True)
    return vae.requires_grad_(False).eval()


def _beside(file: Path) -> VAEConfig | None:
    """The config.json in the folder of `file`, if it is a VAE's."""
    path = file.with_name("config.json")
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MagiError(
            f"{str(path)!r} cannot be read ({error}). Download it again, or remove it to use the sizes in the weights."
        ) from error
    # A folder of several models may hold the config.json of another one.
    return VAEConfig.from_dict(config) if isinstance(config, dict) and "ddconfig" in config else None


def _config_of(checkpoint: Checkpoint) -> VAEConfig:
    """The sizes that the tensors tell; the published ones for the rest."""
    for name in ("decoder.blocks.0.mlp.fc1.weight", "decoder.proj_in.weight"):
        if name not in checkpoint or len(checkpoint.tensors[name].shape) != 2:
            raise MagiError(_no_vae(checkpoint, f"It has no matrix {name}"))
    hidden, _ = checkpoint.tensors["decoder.blocks.0.mlp.fc1.weight"].shape
    embed_dim, z_chans = checkpoint.tensors["decoder.proj_in.weight"].shape
    blocks = [re.match(r"decoder\.blocks\.(\d+)\.", name) for name in checkpoint]
    return VAEConfig(
        z_chans=z_chans,
        embed_dim=embed_dim,
        depth=1 + max(int(match[1]) for match in blocks if match),
        num_heads=max(1, embed_dim // 64),
        mlp_ratio=hidden / embed_dim,
        qkv_bias="decoder.blocks.0.attn.qkv.bias" in checkpoint,
        use_final_proj="decoder.final_proj.weight" in checkpoint,
    )


def _compare(checkpoint: Checkpoint, vae: VideoVAE) -> None:
    """Names and shapes of the file against those of the config."""
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    faults = compare_shapes({name: info.shape for name, info in checkpoint.tensors.items()}, expected)
    if faults.missing or faults.unexpected:
        differences = [
            f"{len(names)} {kind}: {first_few(names)}"
            for kind, names in (("missing", faults.missing), ("unexpected", faults.unexpected))
            if names
        ]
        raise MagiError(_no_vae(checkpoint, f"Tensors {'; '.join(differences)}"))
    if faults.misshapen:
        name = faults.misshapen[0]
        raise MagiError(
            f"{len(faults.misshapen)} tensors of {str(checkpoint.path)!r} differ in shape from the VAE's config: {name} is "
            f"{checkpoint.tensors[name].shape}, expected {expected[name]}. Put the config.json that belongs to the file beside it."
        )


def _no_vae(checkpoint: Checkpoint, why: str) -> str:
    return (
        f"{str(checkpoint.path)!r} is not a MAGI-1 VAE. {why}. Choose the VAE file "
        "(official: ckpt/vae/diffusion_pytorch_model.safetensors), with its own config.json beside it or none."
    )
