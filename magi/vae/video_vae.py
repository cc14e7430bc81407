"""The MAGI-1 VAE (arXiv 2505.13211, section 2.1): video <-> latents, tile by tile, in whole or incrementally.

Shapes: videos (B, 3, T, H, W), latents (B, z, t, h, w) with t = ceil(T / 4), h = H / 8, w = W / 8 and z = 16.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.mapped_file import compare_shapes, first_few
from ..checkpoint.reader import Checkpoint
from ..config import LATENT_SCALE as SCALE
from ..errors import MagiError
from ..system.device import empty_cache, free_memory, pick_device
from ..system.finite import is_finite
from ..system.json_files import read_json
from ..system.printable import printable
from ..system.progress import OnProgress
from .footprint import fitting, makes_scores
from .model import MOST_BLOCKS, Decoder, Encoder, VAEConfig
from .tiled_run import TileRun, check_tensor, check_video
from .tiling import PATCH_FRAMES, PATCH_SIZE, Tiling, map_tiles, recut

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_STORED = ("BF16", "F16", "F32", "F64")  # types of tensors in a file


class VideoVAE(nn.Module):
    """Encoder and decoder with their weights; `load_vae` makes one.

    Every method processes one tile at a time, takes tensors of any device and floating dtype, computes on `device` in
    `dtype`, and blends and returns float32 on `output_device`. `progress(tiles done, tiles known so far)` is called
    after every tile, and about twice per second inside long ones; what it raises ends the call.

    Without a `tiling`, tiles are the published ones, or smaller if the device has too little free memory for those.
    Tiles that run out of memory are repeated with smaller ones, with one warning; MagiError is raised if the smallest
    do not fit.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self._on_host: dict[str, torch.Tensor] = {}  # the weights as views of the mapped file
        self._parked: tuple[torch.device, torch.dtype] | None = None
        self._check_file: Callable[[], None] = lambda: None  # that views of the mapped file may still be used

    @property
    def device(self) -> torch.device:
        """Returns the device that the VAE computes on."""
        return self._parked[0] if self._parked else self.decoder.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the compute dtype."""
        return self._parked[1] if self._parked else self.decoder.cls_token.dtype

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the weights in the compute dtype."""
        return sum(p.numel() for p in self.parameters()) * self.dtype.itemsize

    @property
    def device_bytes(self) -> int:
        """Returns the bytes of the weights that are on the device now."""
        return 0 if self._parked else self.nbytes

    @torch.inference_mode(False)
    def park(self) -> None:
        """Removes the weights from the device until `unpark` or the next encoding or decoding. On a CPU they stay.

        Weights that were read from a file are not copied back, as they stay mapped there.
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
        """Moves the weights back to the device; does nothing if they are not parked."""
        if not self._parked:
            return
        device, dtype = self._parked
        self.load_state_dict({name: t.to(device, dtype) for name, t in self._on_host.items()}, assign=True)
        self._parked = None

    def encode(
        self,
        video: torch.Tensor,
        tiling: Tiling | None = None,
        progress: OnProgress | None = None,
        output_device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Encodes a video in [-1, 1] to scaled latents: (B, 3, T, H, W) -> (B, 16, ceil(T/4), H/8, W/8).

        If T is no multiple of 4, the last frame is repeated; a single frame gives one latent frame.

        Raises:
            MagiError: the video is empty, has another shape, is not floating point, or H or W is no multiple of 8.
        """
        return torch.cat(list(self.encode_stream((video,), tiling, progress, output_device)), dim=2)

    def encode_stream(
        self,
        blocks: Iterable[torch.Tensor],
        tiling: Tiling | None = None,
        progress: OnProgress | None = None,
        output_device: torch.device | str = "cpu",
    ) -> Iterator[torch.Tensor]:
        """Encodes a video that arrives in blocks (B, 3, t, H, W), and yields the latents of each temporal tile.

        Blocks may have any number of frames; at most one tile and the current block are kept.

        Raises:
            MagiError: as for `encode`, or a block has another size than the first one.
        """
        run = self._run(tiling, progress)
        for frames in recut(run.checked(blocks, check_video, PATCH_FRAMES, PATCH_SIZE), run.tiling.frames):
            yield self._encode_frames(frames, run, output_device)  # (B, 16, t, h, w)

    def decode(
        self,
        latents: torch.Tensor,
        tiling: Tiling | None = None,
        progress: OnProgress | None = None,
        output_device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Decodes scaled latents to a video of about [-1, 1], not clamped: (B, 16, T, h, w) -> (B, 3, 4T, 8h, 8w).

        Raises:
            MagiError: the latents are empty, have another shape or are not floating point.
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
        progress: OnProgress | None = None,
        output_device: torch.device | str = "cpu",
    ) -> Iterator[torch.Tensor]:
        """Decodes one temporal tile after the other, so that peak memory does not grow with the number of latents.

        Yields frames (B, 3, t, H, W), each tile decoded on demand. The arguments are checked at once.

        Raises:
            MagiError: as for `decode`.
        """
        self._check_latents(latents)
        return self.decode_chunks((latents,), tiling, progress, output_device)

    def decode_chunks(
        self,
        chunks: Iterable[torch.Tensor],
        tiling: Tiling | None = None,
        progress: OnProgress | None = None,
        output_device: torch.device | str = "cpu",
    ) -> Iterator[torch.Tensor]:
        """Decodes latents that arrive in chunks (B, 16, t, h, w) of any t, as a sampler yields them.

        The frames are the same as from decoding the concatenated chunks. Each temporal tile is yielded as soon as its
        latents are complete; fewer latents than two tiles are kept besides the current chunk.

        Raises:
            MagiError: as for `decode`, or a chunk has another size than the first one.
        """
        run = self._run(tiling, progress)
        before = None
        for latents in recut(run.checked(chunks, self._check_latents, 1, 1), run.tiling.latent_frames):
            if latents.shape[2] == 1 < run.tiling.latent_frames and before is not None:
                # A single last latent decodes better together with the ones before it, whose frames are already
                # yielded.
                latents = torch.cat([before[:, :, 1:], latents], dim=2)  # (B, 16, tile, h, w)
                yield self._decode_latents(latents, run, output_device)[:, :, -PATCH_FRAMES:].clone()  # (B, 3, 4, H, W)
            else:
                yield self._decode_latents(latents, run, output_device)
            before = latents

    def _run(self, tiling: Tiling | None, progress: OnProgress | None) -> TileRun:
        return TileRun(tiling or Tiling(), progress, self.device, None if tiling else self._fitting)

    def _fitting(self, tiling: Tiling) -> Tiling:
        empty_cache(self.device)  # memory that torch caches is free too
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
        latents = torch.empty(b, self.config.z_chans, *size, device=output_device)  # (B, z, t, h, w)

        def encode(tile: torch.Tensor) -> torch.Tensor:
            tile = tile.to(self.device, self.dtype)
            if missing:
                # (B, 3, 4t, tile, tile)
                tile = torch.cat([tile, tile[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
            means = self.encoder(tile, run.counter.on_progress)  # (B, z, t, tile / 8, tile / 8)
            run.counter.finish_tile()
            return means

        def work(tiling: Tiling) -> torch.Tensor:
            self._check_file()
            self.unpark()
            map_tiles(encode, frames, latents, tiling, scale_in=PATCH_SIZE, scale_out=1, chained=True)
            return latents.mul_(SCALE)

        return self._checked(run.attempt(work))

    @torch.no_grad()
    def _decode_latents(self, latents: torch.Tensor, run: TileRun, output_device: torch.device | str) -> torch.Tensor:
        b, _, t, h, w = latents.shape
        size = (PATCH_FRAMES * t, PATCH_SIZE * h, PATCH_SIZE * w)
        video = torch.empty(b, 3, *size, device=output_device)  # (B, 3, 4t, 8h, 8w)

        def decode(tile: torch.Tensor) -> torch.Tensor:
            unscaled = tile.to(self.device, torch.float32) / SCALE
            pixels = self.decoder(unscaled.to(self.dtype), run.counter.on_progress)  # (B, 3, 4t, 8 * tile, 8 * tile)
            run.counter.finish_tile()
            return pixels

        def work(tiling: Tiling) -> torch.Tensor:
            self._check_file()
            self.unpark()
            map_tiles(decode, latents, video, tiling, scale_in=1, scale_out=PATCH_SIZE, chained=False)
            return video

        return self._checked(run.attempt(work))

    def _checked(self, made: torch.Tensor) -> torch.Tensor:
        """Returns what was made of finite input. Raises MagiError where that is not finite."""
        if is_finite(made):
            return made
        damaged = next((name for name, weight in self.named_parameters() if not is_finite(weight)), None)
        if damaged is not None:
            why = f"Its weights hold such numbers ({damaged}): the file is damaged. Download it again."
        elif self.dtype == torch.float16:
            why = "float16 was exceeded, which ends at 65504. Choose bf16 or fp32 for the VAE."
        else:
            why = "Its file may be damaged or another model's: download it again, or choose another one."
        raise MagiError(f"The VAE gave numbers that are none (NaN or infinity). {why}")

    def _check_latents(self, latents: torch.Tensor) -> None:
        check_tensor(
            latents, "latents", f"(batch, {self.config.z_chans}, frames, height / 8, width / 8)", self.config.z_chans
        )


# Weights created in inference mode, in which ComfyUI runs its nodes, could not be moved outside it.
@torch.inference_mode(False)
def load_vae(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: OnProgress | None = None,
) -> VideoVAE:
    """Loads a MAGI-1 VAE from its folder (config.json and one .safetensors) or from the bare .safetensors file.

    A config.json beside the file is used; without one the sizes are inferred from the tensors. On a CPU, weights that
    already have `dtype` stay views of the mapped file.

    Args:
        path: folder or file.
        device: device for the weights; None picks the best one.
        dtype: compute dtype: bfloat16, float16 or float32.
        progress: called with (tensors loaded, tensors); what it raises ends the loading.

    Raises:
        MagiError: the path is not readable, or is not a MAGI-1 VAE.
    """
    if dtype not in DTYPES:
        raise MagiError(f"The VAE cannot compute in {dtype}. Choose bfloat16 (the official one), float16 or float32.")
    device = pick_device(device)
    with Checkpoint(path) as checkpoint:
        config = _beside(checkpoint.files[0]) or _config_of(checkpoint)
        _check_types(checkpoint)
        with torch.device("meta"):
            vae = VideoVAE(config)
        _compare(checkpoint, vae)
        checkpoint.check_whole()
        # One tensor at a time, so that another dtype or device does not need a second copy of all weights.
        weights: dict[str, torch.Tensor] = {}
        for name in checkpoint:
            vae._on_host[name] = checkpoint.tensor(name)
            weights[name] = vae._on_host[name].to(device, dtype)
            if progress:
                progress(len(weights), len(checkpoint.tensors))
    vae.load_state_dict(weights, assign=True)
    vae._check_file = checkpoint.check_unchanged
    return vae.requires_grad_(False).eval()


def _beside(file: Path) -> VAEConfig | None:
    """Reads the config.json in the folder of `file`; returns None unless it is that of a VAE."""
    path = file.with_name("config.json")
    if not path.is_file():
        return None
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise MagiError(
            f"{str(path)!r} cannot be read ({error}). Download it again, or remove it to use the sizes in the weights."
        ) from error
    # A folder of several models may hold the config.json of another one.
    return VAEConfig.from_dict(config) if isinstance(config, dict) and "ddconfig" in config else None


def _config_of(checkpoint: Checkpoint) -> VAEConfig:
    """Infers the sizes from the tensors, with the published ones as defaults."""
    for name in ("decoder.blocks.0.mlp.fc1.weight", "decoder.proj_in.weight"):
        shape = checkpoint.tensors[name].shape if name in checkpoint else ()
        if len(shape) != 2 or 0 in shape:
            raise MagiError(_no_vae(checkpoint, f"It has no matrix {name}"))
    hidden, _ = checkpoint.tensors["decoder.blocks.0.mlp.fc1.weight"].shape
    embed_dim, z_chans = checkpoint.tensors["decoder.proj_in.weight"].shape
    blocks = [re.match(r"decoder\.blocks\.([0-9]{1,9})\.", name) for name in checkpoint]
    config = VAEConfig(
        z_chans=z_chans,
        embed_dim=embed_dim,
        depth=min(MOST_BLOCKS, 1 + max(int(match[1]) for match in blocks if match)),
        num_heads=max(1, embed_dim // 64),
        mlp_ratio=hidden / embed_dim,
        qkv_bias="decoder.blocks.0.attn.qkv.bias" in checkpoint,
        use_final_proj="decoder.final_proj.weight" in checkpoint,
    )
    published = VAEConfig()
    if config.depth < published.depth and replace(config, depth=published.depth) == published:
        raise MagiError(
            f"{str(checkpoint.path)!r} holds {config.depth} blocks, and the published VAE, whose sizes it has, {published.depth}. "
            "Download it again; or put its config.json beside it, if it is meant so."
        )
    return config


def _check_types(checkpoint: Checkpoint) -> None:
    """Raises MagiError for weights that are no floating-point numbers."""
    wrong = [f"{printable(name)} {t.dtype}" for name, t in checkpoint.tensors.items() if t.dtype not in _STORED]
    if wrong:
        raise MagiError(
            f"{str(checkpoint.path)!r} holds {len(wrong)} tensors of a type that cannot be run as weights "
            f"({first_few(wrong)}): they must be BF16, F16 or F32. Take the official VAE: `python -m magi download vae`."
        )


def _compare(checkpoint: Checkpoint, vae: VideoVAE) -> None:
    """Raises MagiError if names or shapes of the file differ from those of the config."""
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
