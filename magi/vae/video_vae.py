"""The MAGI-1 VAE: video <-> latents, tile by tile, in whole or as a stream."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.mapped_file import compare_shapes, first_few
from ..checkpoint.reader import Checkpoint
from ..config import LATENT_SCALE as SCALE
from ..errors import MagiError
from ..system.device import empty_cache, free_memory, pick_device
from .footprint import fitting, makes_scores
from .model import Decoder, Encoder, VAEConfig
from .tiled_run import TileRun, check_tensor, check_video
from .tiling import PATCH_FRAMES, PATCH_SIZE, ProgressCallback, Tiling, map_tiles, recut

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class VideoVAE(nn.Module):
    """Encoder and decoder with their weights. Made by `load_vae`.

    Every method works on one tile at a time, takes tensors of any device and floating dtype, computes on `device` in
    `dtype`, and blends and returns float32 on `output_device`. `progress(tiles done, tiles known so far)` is called after
    every tile, and about twice a second inside long ones; whatever it raises stops the work.

    Without a `tiling` tiles are the published ones, or smaller where the device has too little free memory for these. Tiles
    that run out of memory are done anew in smaller ones, with one warning; MagiError only if the smallest do not fit.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self._on_host: dict[str, torch.Tensor] = {}  # the weights as they lie in the mapped file
        self._parked: tuple[torch.device, torch.dtype] | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._parked[0] if self._parked else self.decoder.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """What the tiles are computed in."""
        return self._parked[1] if self._parked else self.decoder.cls_token.dtype

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes, on the device they compute on."""
        return sum(p.numel() for p in self.parameters()) * self.dtype.itemsize

    @property
    def device_bytes(self) -> int:
        """Bytes of the weights that are on the device now."""
        return 0 if self._parked else self.nbytes

    @torch.inference_mode(False)
    def park(self) -> None:
        """Takes the weights off the device until `unpark`, or until something is encoded or decoded. On the CPU they stay.

        Nothing is copied back: what was read from a file stays mapped there.
        """
        if self._parked or self.device.type == "cpu":
            return
        self._on_host = self._on_host or {name: t.to("cpu") for name, t in self.state_dict().items()}
        parked = (self.device, self.dtype)
        self.load_state_dict(self._on_host, assign=True)
        self._parked = parked
        empty_cache(self.device)

    @torch.inference_mode(False)
    def unpark(self) -> None:
        """Brings the weights back to the device; without `park` before it there is nothing to do."""
        if not self._parked:
            return
        device, dtype = self._parked
        self.load_state_dict({name: t.to(device, dtype) for name, t in self._on_host.items()}, assign=True)
        self._parked = None

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
        run = self._run(tiling, progress)
        for frames in recut(run.checked(blocks, check_video, PATCH_FRAMES, PATCH_SIZE), run.tiling.frames):
            yield self._encode_frames(frames, run, output_device)

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
        run = self._run(tiling, progress)
        before = None
        for latents in recut(run.checked(chunks, self._check_latents, 1, 1), run.tiling.latent_frames):
            if latents.shape[2] == 1 < run.tiling.latent_frames and before is not None:
                # A lone last latent is decoded better with the ones before it, whose frames are already out.
                latents = torch.cat([before[:, :, 1:], latents], dim=2)
                yield self._decode_latents(latents, run, output_device)[:, :, -PATCH_FRAMES:].clone()
            else:
                yield self._decode_latents(latents, run, output_device)
            before = latents

    def _run(self, tiling: Tiling | None, progress: ProgressCallback | None) -> TileRun:
        return TileRun(tiling or Tiling(), progress, self.device, None if tiling else self._fitting)

    def _fitting(self, tiling: Tiling) -> Tiling:
        empty_cache(self.device)  # what torch holds unused is free too
        free = free_memory(self.device)
        if free is None:
            return tiling
        scores = makes_scores(self.device, self.dtype, self.config)
        return fitting(tiling, self.config, self.dtype, scores, free - (self.nbytes - self.device_bytes))

    @torch.no_grad()
    def _encode_frames(self, frames: torch.Tensor, run: TileRun, output_device: torch.device | str) -> torch.Tensor:
        b, _, t, height, width = frames.shape
        missing = -t % PATCH_FRAMES
        size = ((t + missing) // PATCH_FRAMES, height // PATCH_SIZE, width // PATCH_SIZE)
        latents = torch.empty(b, self.config.z_chans, *size, device=output_device)

        def encode(tile: torch.Tensor) -> torch.Tensor:
            tile = tile.to(self.device, self.dtype)
            if missing:
                tile = torch.cat([tile, tile[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
            means = self.encoder(tile, run.counter.alive)
            run.counter.finished()
            return means

        def work(tiling: Tiling) -> torch.Tensor:
            self.unpark()
            map_tiles(encode, frames, latents, tiling, scale_in=PATCH_SIZE, scale_out=1, chained=True)
            return latents.mul_(SCALE)

        return run.attempt(work)

    @torch.no_grad()
    def _decode_latents(self, latents: torch.Tensor, run: TileRun, output_device: torch.device | str) -> torch.Tensor:
        b, _, t, h, w = latents.shape
        video = torch.empty(b, 3, PATCH_FRAMES * t, PATCH_SIZE * h, PATCH_SIZE * w, device=output_device)

        def decode(tile: torch.Tensor) -> torch.Tensor:
            unscaled = tile.to(self.device, torch.float32) / SCALE
            pixels = self.decoder(unscaled.to(self.dtype), run.counter.alive)
            run.counter.finished()
            return pixels

        def work(tiling: Tiling) -> torch.Tensor:
            self.unpark()
            map_tiles(decode, latents, video, tiling, scale_in=1, scale_out=PATCH_SIZE, chained=False)
            return video

        return run.attempt(work)

    def _check_latents(self, latents: torch.Tensor) -> None:
        check_tensor(
            latents, "latents", f"(batch, {self.config.z_chans}, frames, height / 8, width / 8)", self.config.z_chans
        )


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
            vae._on_host[name] = checkpoint.tensor(name)
            weights[name] = vae._on_host[name].to(device, dtype)
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
