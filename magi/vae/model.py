"""Encoder and decoder of the MAGI-1 VAE (arXiv 2505.13211, section 2.1): vision transformers on one tile.

Shapes: B batch, N = t * h * w tokens (t latent frames, h x w latent pixels), D width, z latent channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import MagiError
from ..system.printable import printable
from .tiling import PATCH_FRAMES, PATCH_SIZE

_CPU_TOKENS = 2048  # whose attention a CPU computes in all heads at once
PATCH_VALUES = PATCH_FRAMES * PATCH_SIZE * PATCH_SIZE
# The same in every published version of the VAE; another value means another model.
_FIXED = {
    "patch_size": PATCH_SIZE,
    "patch_length": PATCH_FRAMES,
    "in_chans": 3,
    "double_z": True,
    "ln_in_attn": True,
    "conv_last_layer": True,
    "norm_code": False,
}
# Far beyond every VAE, so that none takes time or memory without end
MOST_BLOCKS = 1000
_LARGEST = 1 << 16  # of any other size
_REMEDY = "Use the config.json that belongs to the file."


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a MAGI-1 VAE; the defaults are the published one.

    Attributes:
        video_size: height and width in pixels of the learned positions.
        video_length: frames of the learned positions.
        z_chans: latent channels.
        embed_dim: width of the transformers.
        depth: blocks of each half.
        num_heads: attention heads.
        mlp_ratio: width of the MLP divided by `embed_dim`.
        qkv_bias: whether the q, k, v projection has a bias.
        use_final_proj: whether the decoder has a linear layer and a LayerNorm before its last convolution.

    Raises:
        MagiError: the sizes do not fit together.
    """

    video_size: int = 256
    video_length: int = 16
    z_chans: int = 16
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4
    qkv_bias: bool = True
    use_final_proj: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = (int, float) if field.name == "mlp_ratio" else (int,)
            most = MOST_BLOCKS if field.name == "depth" else _LARGEST
            if field.type is bool:
                good = isinstance(value, bool)
            else:
                good = isinstance(value, numbers) and not isinstance(value, bool) and 0 < value <= most
            if not good:
                raise MagiError(f"The VAE config says {field.name} = {printable(repr(value))}. {_REMEDY}")
        units = {"video_size": PATCH_SIZE, "video_length": PATCH_FRAMES, "embed_dim": self.num_heads}
        for name, unit in units.items():
            if getattr(self, name) % unit:
                raise MagiError(f"The VAE config says {name} = {getattr(self, name)}, no multiple of {unit}. {_REMEDY}")
        if not self.use_final_proj and self.embed_dim % PATCH_VALUES:
            raise MagiError(
                f"The VAE config says embed_dim = {self.embed_dim}, no multiple of {PATCH_VALUES}. {_REMEDY}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Reads the `ddconfig` object of the official config.json, with defaults for missing values.

        Raises:
            MagiError: there is no `ddconfig`, or it describes another kind of VAE.
        """
        ddconfig = config.get("ddconfig")
        if not isinstance(ddconfig, Mapping):
            raise MagiError("This config.json has no `ddconfig` object: it is not that of a MAGI-1 VAE.")
        for name, value in _FIXED.items():
            if ddconfig.get(name, value) != value:
                raise MagiError(
                    f"The VAE config says {name} = {printable(repr(ddconfig[name]))}; every MAGI-1 VAE has {value!r}. This is another model."
                )
        return cls(**{f.name: ddconfig[f.name] for f in fields(cls) if f.name in ddconfig})

    @property
    def grid(self) -> tuple[int, int, int]:
        """Returns frames, height and width of the learned positions, in tokens."""
        return self.video_length // PATCH_FRAMES, self.video_size // PATCH_SIZE, self.video_size // PATCH_SIZE


class Attention(nn.Module):
    """Full attention over the tokens of a tile, with q, k and v standardised per head."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: torch.Tensor, on_progress: Callable[[], None]) -> torch.Tensor:
        """Attends each token to all tokens: (B, N, D) -> (B, N, D)."""
        q, k, v = (
            _standardised(part.unflatten(-1, (self.num_heads, -1))).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )  # (B, heads, N, d) each
        on_progress()
        # All heads at once, but for a CPU on a large tile, which needs seconds for it: nothing may hold up a cancel.
        size = self.num_heads if x.device.type != "cpu" else max(1, self.num_heads * _CPU_TOKENS**2 // x.shape[1] ** 2)
        parts = []
        for heads in zip(*(part.split(size, dim=1) for part in (q, k, v)), strict=True):
            parts.append(F.scaled_dot_product_attention(*heads))  # (B, heads, N, d)
            on_progress()
        attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.proj(attended.transpose(1, 2).flatten(2))  # (B, N, D)


def _standardised(x: torch.Tensor) -> torch.Tensor:
    # Not a LayerNorm: the epsilon is added to the standard deviation, not to the variance.
    centred = x.float()
    centred = centred - centred.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    return (centred / (std + 1e-5)).to(x.dtype)


class MLP(nn.Module):
    """MLP with the erf form of GELU."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        hidden = round(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: torch.Tensor, on_progress: Callable[[], None]) -> torch.Tensor:
        """Applies the MLP: (B, N, D) -> (B, N, D)."""
        hidden = F.gelu(self.fc1(x))  # (B, N, D * mlp_ratio)
        on_progress()
        return self.fc2(hidden)


class Block(nn.Module):
    """Transformer block: attention without a norm, then an MLP with pre-LayerNorm, each with a residual."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, on_progress: Callable[[], None]) -> torch.Tensor:
        """Applies attention and MLP: (B, N, D) -> (B, N, D). `on_progress` is called after each part."""
        x = x + self.attn(x, on_progress)
        on_progress()
        return x + self.mlp(self.norm2(x), on_progress)


class _Trunk(nn.Module):
    """The part that encoder and decoder share: cls token, learned positions, blocks, LayerNorm."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1] * self.grid[2], config.embed_dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim)

    def transform(
        self, tokens: torch.Tensor, grid: tuple[int, int, int], on_progress: Callable[[], None]
    ) -> torch.Tensor:
        """Applies all blocks and the norm: (B, N, D) -> (B, N, D). `on_progress` is called after every part of a block."""
        # (B, 1 + N, D)
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.positions(grid)
        for block in self.blocks:
            x = block(x, on_progress)
            on_progress()
        return self.norm(x)[:, 1:]  # (B, N, D)

    def positions(self, grid: tuple[int, int, int]) -> torch.Tensor:
        """Resizes the learned positions to a (t, h, w) grid: (1, 1 + N, D), with that of the cls token first."""
        if grid == self.grid:
            return self.pos_embed
        learned = self.pos_embed[0, 1:].float().unflatten(0, self.grid)  # (T, H, W, D)
        # Trilinear in two steps: the three-dimensional resize is missing on some devices.
        planes = F.interpolate(learned.permute(0, 3, 1, 2), size=grid[1:], mode="bilinear")  # (T, D, h, w)
        lines = F.interpolate(planes.permute(1, 2, 3, 0).flatten(1, 2), size=grid[0], mode="linear")  # (D, h*w, t)
        resized = lines.permute(2, 1, 0).flatten(0, 1).to(self.pos_embed.dtype)  # (N, D)
        return torch.cat([self.pos_embed[:, :1], resized[None]], dim=1)  # (1, 1 + N, D)


class PatchEmbed(nn.Module):
    """Embedding of patches of 4 frames x 8 x 8 pixels as tokens."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        patch = (PATCH_FRAMES, PATCH_SIZE, PATCH_SIZE)
        self.proj = nn.Conv3d(3, config.embed_dim, kernel_size=patch, stride=patch)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Embeds the patches of a video: (B, 3, 4t, 8h, 8w) -> (B, N, D)."""
        # One matmul, as the patches of the convolution do not overlap: 3D convolutions in bf16 are slow or missing on
        # some devices.
        b, c, t, h, w = video.shape
        patches = video.reshape(
            b, c, t // PATCH_FRAMES, PATCH_FRAMES, h // PATCH_SIZE, PATCH_SIZE, w // PATCH_SIZE, PATCH_SIZE
        )  # (B, 3, t, 4, h, 8, w, 8)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # (B, N, 3 * 4 * 8 * 8)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class Encoder(_Trunk):
    """Encoder: pixels to latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.z_chans = config.z_chans
        self.patch_embed = PatchEmbed(config)
        self.last_layer = nn.Linear(config.embed_dim, 2 * config.z_chans)

    def forward(self, video: torch.Tensor, on_progress: Callable[[], None]) -> torch.Tensor:
        """Encodes a tile in [-1, 1] to the means of its latents: (B, 3, 4t, 8h, 8w) -> (B, z, t, h, w)."""
        grid = (video.shape[2] // PATCH_FRAMES, video.shape[3] // PATCH_SIZE, video.shape[4] // PATCH_SIZE)
        x = self.last_layer(self.transform(self.patch_embed(video), grid, on_progress))  # (B, N, 2z)
        return x[..., : self.z_chans].transpose(1, 2).unflatten(2, grid)  # (B, z, t, h, w)


class Decoder(_Trunk):
    """Decoder: latents to pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.proj_in = nn.Linear(config.z_chans, config.embed_dim)
        if config.use_final_proj:
            self.final_proj = nn.Linear(config.embed_dim, 4 * PATCH_VALUES)
            self.final_norm = nn.LayerNorm(4 * PATCH_VALUES)
        self.use_final_proj = config.use_final_proj
        channels = 4 if config.use_final_proj else config.embed_dim // PATCH_VALUES
        self.last_layer = nn.Conv3d(channels, 3, kernel_size=3, padding=1)

    def forward(self, latents: torch.Tensor, on_progress: Callable[[], None]) -> torch.Tensor:
        """Decodes a tile of unscaled latents to pixels of about [-1, 1]: (B, z, t, h, w) -> (B, 3, 4t, 8h, 8w)."""
        t, h, w = latents.shape[2:]
        x = self.transform(self.proj_in(latents.flatten(2).transpose(1, 2)), (t, h, w), on_progress)  # (B, N, D)
        if self.use_final_proj:
            x = self.final_norm(self.final_proj(x))  # (B, N, 4 * PATCH_VALUES)
        # (B, t, 4, C, h, 8, w, 8)
        x = x.reshape(x.shape[0], t, h, w, PATCH_FRAMES, PATCH_SIZE, PATCH_SIZE, -1).permute(0, 1, 4, 7, 2, 5, 3, 6)
        return self._last_conv(x.flatten(6).flatten(4, 5).flatten(1, 2))  # (B, 4t, C, 8h, 8w) -> (B, 3, 4t, 8h, 8w)

    def _last_conv(self, frames: torch.Tensor) -> torch.Tensor:
        """Applies the 3x3x3 convolution as a 2D one, see `PatchEmbed`: (B, T, C, H, W) -> (B, 3, T, H, W)."""
        b, t = frames.shape[:2]
        padded = F.pad(frames, (0, 0, 0, 0, 0, 0, 1, 1))  # (B, T + 2, C, H, W)
        # Each frame with its two neighbours as channels: (B * T, 3 * C, H, W)
        triples = torch.cat([padded[:, i : i + t] for i in range(3)], dim=2).flatten(0, 1)
        weight = self.last_layer.weight.transpose(1, 2).flatten(1, 2)  # (3, 3 * C, 3, 3)
        # (B, 3, T, H, W)
        return F.conv2d(triples, weight, self.last_layer.bias, padding=1).unflatten(0, (b, t)).transpose(1, 2)
