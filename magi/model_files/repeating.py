"""Generates the repeating model, the embedded model for photos: everything MAGI-1 needs, in small, written by hand.

The files have the official layout and are read by the same code as the released ones. Nothing in them is trained. The text
encoder holds seeded random numbers. The VAE is a cosine transform written as a ViT, so that pictures stay recognisable. The
transformer's weights are constructed so that a chunk repeats the one before it, tinted a little by the prompt: a picture stays,
a video's last second continues and slowly comes to rest. That looks right only if positions, attention, K/V cache, prefix and
guidance all are, but it tells nothing of what MAGI-1 can do.
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..config import LATENT_CHANNELS, EngineConfig, MagiConfig, ModelConfig, RuntimeConfig
from ..errors import MagiError
from ..sampling.special_tokens import FILE_NAME as SPECIAL_TOKENS_FILE
from ..transformer.random_weights import RandomTensors
from ..transformer.weights import BLOCK
from .locate import ModelFiles

_TEXT_WIDTH = 64
_VAE_WIDTH = 64
_PATCH = (4, 8, 8)  # frames, rows, columns of a VAE patch
_VAE_CHANNELS = 4  # of the decoder before its last convolution: RGB and one that only steadies the norm

REPEATING_CONFIG = MagiConfig(
    ModelConfig(
        num_layers=2,
        hidden_size=256,
        ffn_hidden_size=32,
        num_attention_heads=8,
        kv_channels=32,
        caption_channels=_TEXT_WIDTH,
    ),
    RuntimeConfig(cfg_number=1, num_steps=16, video_size_h=192, video_size_w=320),
    EngineConfig(distill=True),
)


def repeating_files(folder: str | Path | None) -> ModelFiles:
    """Returns the repeating model's files below `folder`, written there (7 MB, a second) unless they already are.

    Raises:
        MagiError: the folder is None, cannot be written, or is full.
    """
    if folder is None:
        raise MagiError("The repeating model's files are made on first use (7 MB). Give a folder for them.")
    # Named after this file's hash: when the file changes, the model is generated again.
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    home = Path(folder) / f"magi1-repeating-{recipe}"
    files = _files_in(home)
    if not _is_whole(home):
        # Written beside its place and then renamed, so that an interrupted or concurrent start leaves nothing incomplete.
        made = home.with_name(f"{home.name}.{uuid.uuid4().hex}.part")
        try:
            _write(made)
            _move(made, home)
        except (OSError, SafetensorError) as error:
            raise MagiError(
                f"The embedded photo model cannot be written to {str(home)!r}: {error}. Choose a folder with 7 MB of room, on the command line with --cache."
            ) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return files


def _is_whole(home: Path) -> bool:
    """Returns whether all files are there and can be read: a clean-up tool or a full disk may have been at them."""
    return home.is_dir() and _files_in(home).damaged() is None


def _files_in(home: Path) -> ModelFiles:
    return ModelFiles(home / "transformer", home / "vae", home / "text_encoder", home / SPECIAL_TOKENS_FILE)


def _move(made: Path, home: Path) -> None:
    if home.is_dir() and not _is_whole(home):
        shutil.rmtree(home)
    try:
        os.rename(made, home)  # noqa: PTH104
    except OSError:
        if not home.is_dir():  # else another process was first, with the same content
            raise


def _write(folder: Path) -> None:
    parts = {name: folder / name for name in ("transformer", "vae", "text_encoder")}
    for part in parts.values():
        part.mkdir(parents=True)
    save_file(_transformer_weights(), parts["transformer"] / "model.safetensors")
    _dump(parts["transformer"] / "config.json", REPEATING_CONFIG.to_dict())
    save_file(_vae_weights(), parts["vae"] / "diffusion_pytorch_model.safetensors")
    _dump(parts["vae"] / "config.json", {"model_type": "vit", "ddconfig": _VAE_CONFIG})
    save_file(_text_encoder_weights(), parts["text_encoder"] / "model.safetensors", {"format": "pt"})
    _dump(parts["text_encoder"] / "config.json", _TEXT_CONFIG)
    _dump(parts["text_encoder"] / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125})
    generator = torch.Generator().manual_seed(3)
    rows = {"caption_token": 1, "logo_token": 1, "other_tokens": 100}
    tokens = {name: torch.randn(n, _TEXT_WIDTH, generator=generator).numpy() for name, n in rows.items()}
    np.savez(folder / SPECIAL_TOKENS_FILE, **tokens)  # type: ignore[arg-type]


def _dump(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


# -- transformer ------------------------------------------------------------------------------------------------------

_STEADY = 64.0  # a constant beside which the signal hardly moves a layer norm's deviation: the norm becomes linear
_RATE = 3.4  # how fast a frame is drawn to the one it repeats: the last of sixteen steps takes it all the way
_TINT = 0.15
_BANDS = (1.5, 0.5, 0.2, 0.05)
_SAME_PLACE, _CHUNK_BEFORE = 8.0, 400.0  # how sharply attention picks the place and the frame


def _transformer_weights() -> dict[str, torch.Tensor]:
    """Constructs the transformer's weights.

    Layer 0 adds the steadying constant, layer 1 attends to the frame to repeat, the output is the velocity from here to there.
    The hidden state's 256 features: 64 for a patch of latents, 64 for the patch to repeat, 64 for minus both (so that the
    mean stays zero), 64 of plus and minus the constant.
    """
    config = REPEATING_CONFIG.model
    random = RandomTensors(config, dtype=torch.float32, seed=1)
    weights = {name: random.tensor(name) for name in random.tensors}
    n, eye = 64, torch.eye(64)
    here, there, minus, constant = (slice(i * n, (i + 1) * n) for i in range(4))
    alternating = torch.tensor([_STEADY, -_STEADY]).repeat(n // 2)
    deviation = _STEADY / 2  # of the whole, once the constant is in

    patch = torch.zeros(config.hidden_size, n)
    patch[here], patch[minus] = eye, -eye
    weights["x_embedder.weight"] = patch.reshape(config.hidden_size, config.in_channels, 1, 2, 2)
    weights["rope.bands"] = torch.tensor(_BANDS)
    for layer in range(config.num_layers):
        for norm in ("self_attn_post_norm", "mlp_post_norm"):
            weights[f"{_layer(layer)}{norm}.weight"] = torch.full((config.hidden_size,), -1.0)  # "1p": silent
        weights[f"{_layer(layer)}ada_modulate_layer.proj.0.weight"].zero_()
        weights[f"{_layer(layer)}ada_modulate_layer.proj.0.bias"].fill_(10)  # gates wide open
    weights[_layer(0) + "self_attn_post_norm.bias"][constant] = alternating

    attention = _layer(1) + "self_attention."
    for name, bias in (("q", _query()), ("k", _key())):
        weights[f"{attention}{name}_layernorm.weight"] = torch.full(
            (config.kv_channels,), -1.0
        )  # the same for all contents
        weights[f"{attention}{name}_layernorm.bias"] = bias
    # Each of the eight heads carries eight features of the patch; the first one the constant too.
    value = torch.zeros(8, config.kv_channels, config.hidden_size)
    projection = torch.zeros(config.hidden_size, 8, 2, config.kv_channels)  # from (head, self or cross, feature)
    for head in range(8):
        part = slice(8 * head, 8 * head + 8)
        value[head, :8, here][:, part] = torch.eye(8) * deviation
        projection[there, head, 0, :8][part] = torch.eye(8)
    value[0, 8, constant.start] = deviation / _STEADY
    projection[constant, 0, 0, 8] = alternating
    for feature, channel in enumerate(_GREY_LEVELS):
        projection[there, 0, 1, feature][4 * channel : 4 * channel + 4] = _TINT
    projection[minus] = -projection[there]
    weights[attention + "linear_qkv.v.weight"] = value.flatten(0, 1)
    weights[attention + "linear_proj.weight"] = projection.flatten(1)
    for part in (there, minus):
        weights[_layer(1) + "self_attn_post_norm.weight"][part] = deviation - 1

    weights["videodit_blocks.final_layernorm.weight"] = torch.full((config.hidden_size,), deviation - 1)
    way = torch.zeros(n, config.hidden_size)
    way[:, there], way[:, here] = _RATE * eye, -_RATE * eye
    way = way.reshape(config.in_channels, 4, config.hidden_size).transpose(0, 1)  # the output has channels last
    weights["final_linear.linear.weight"] = way.flatten(0, 1)
    return {name: w.contiguous() for name, w in weights.items()}


def _layer(index: int) -> str:
    return BLOCK.format(index)


def _key() -> torch.Tensor:
    """Returns the key (32,): twelve rotation pairs (time, height, width by four bands) that all start at angle zero."""
    return torch.cat([torch.ones(12), torch.zeros(20)])


def _query() -> torch.Tensor:
    """Returns the query (32,): it matches best the key at the same place, one chunk (six frames) earlier, else the oldest."""
    strength, angle = torch.zeros(3, 4), torch.zeros(3, 4)
    strength[1:, :3] = _SAME_PLACE
    strength[0, 2], angle[0, 2] = _CHUNK_BEFORE, -6 * _BANDS[2]
    strength = strength.flatten() * math.sqrt(REPEATING_CONFIG.model.kv_channels)  # attention divides by it
    return torch.cat([strength * angle.flatten().cos(), strength * angle.flatten().sin(), torch.zeros(8)])


# -- text encoder -----------------------------------------------------------------------------------------------------

_TEXT_CONFIG = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": _TEXT_WIDTH,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 384,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": False,
}


def _text_encoder_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    d, inner, ff = _TEXT_WIDTH, 64, 128

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    weights = {
        "shared.weight": torch.randn(384, d, generator=generator),
        "encoder.final_layer_norm.weight": torch.ones(d),
    }
    for i in range(2):
        attention, mlp = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        weights |= {f"{attention}SelfAttention.{x}.weight": matrix(inner, d) for x in "qkv"}
        weights[attention + "SelfAttention.o.weight"] = matrix(d, inner)
        weights |= {f"{mlp}DenseReluDense.{x}.weight": matrix(ff, d) for x in ("wi_0", "wi_1")}
        weights[mlp + "DenseReluDense.wo.weight"] = matrix(d, ff)
        weights |= {f"{part}layer_norm.weight": torch.ones(d) for part in (attention, mlp)}
    buckets = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    weights[buckets] = torch.randn(32, 4, generator=generator)
    return weights


# -- VAE --------------------------------------------------------------------------------------------------------------

_VAE_CONFIG = {
    "video_size": 256,
    "video_length": 16,
    "patch_size": _PATCH[1],
    "patch_length": _PATCH[0],
    "in_chans": 3,
    "z_chans": LATENT_CHANNELS,
    "double_z": True,
    "embed_dim": _VAE_WIDTH,
    "depth": 1,
    "num_heads": 4,
    "mlp_ratio": 1,
    "qkv_bias": True,
    "ln_in_attn": True,
    "conv_last_layer": True,
    "norm_code": False,
    "use_final_proj": True,
}
_GREY_LEVELS = (0, 10, 13)  # latent channels that hold a patch's mean brightness and colour
_LATENT_SPREAD = 5.5  # standard deviation of the released VAE's latents, about 1 / LATENT_SCALE


def _cosine_basis() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the analysis and synthesis patterns, each (16, 3, 4, 8, 8).

    They are low cosines of brightness and, coarser, of two colour differences.
    """
    n = torch.arange(_PATCH[1]) + 0.5
    waves = [torch.cos(math.pi * k * n / _PATCH[1]) * math.sqrt((2 if k else 1) / _PATCH[1]) for k in range(4)]
    fine = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (0, 3), (3, 0)]
    coarse = [(0, 0), (0, 1), (1, 0)]
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]).float()
    colours /= colours.norm(dim=1, keepdim=True)
    picture = [(c, a, b) for c, pairs in enumerate((fine, coarse, coarse)) for a, b in pairs]
    patterns = torch.stack([torch.einsum("c,h,w->chw", colours[c], waves[a], waves[b]) for c, a, b in picture])
    still = patterns[:, :, None].expand(-1, -1, _PATCH[0], -1, -1)
    # How much a pattern varies over natural pictures in [-1, 1]: brightness far more than colour, coarse more than fine.
    spread = torch.tensor([(7.0, 2.0, 1.5)[c] / (1 + a + b) ** 1.3 for c, a, b in picture])
    gain = (_LATENT_SPREAD / spread)[:, None, None, None, None]
    return still / _PATCH[0] * gain, still / gain


def _vae_weights() -> dict[str, torch.Tensor]:
    analysis, synthesis = _cosine_basis()
    z, width, steady = LATENT_CHANNELS, _VAE_WIDTH, _STEADY
    # Tokens: +signal in the first z features, -signal in the next z (so that the mean stays zero), +-steady in the rest.
    spread = torch.cat([torch.eye(z), -torch.eye(z), torch.zeros(width - 2 * z, z)])
    constant = torch.cat([torch.zeros(2 * z), torch.tensor([steady, -steady]).repeat((width - 2 * z) // 2)])
    deviation = math.sqrt(float(constant.square().mean()))
    weights: dict[str, torch.Tensor] = {}
    for half in ("encoder", "decoder"):
        positions = math.prod((16 // _PATCH[0], 256 // _PATCH[1], 256 // _PATCH[2]))
        weights[f"{half}.cls_token"] = torch.zeros(1, 1, width)
        weights[f"{half}.pos_embed"] = constant.expand(1, positions + 1, width).clone()
        weights |= {f"{half}.norm.weight": torch.full((width,), deviation), f"{half}.norm.bias": torch.zeros(width)}
        weights |= _silent_block(f"{half}.blocks.0.", width)
    weights["encoder.patch_embed.proj.weight"] = torch.einsum("ez,zcthw->ecthw", spread, analysis)
    weights["encoder.patch_embed.proj.bias"] = torch.zeros(width)
    weights["encoder.last_layer.weight"] = torch.cat([torch.eye(z), torch.zeros(z, z)]) @ torch.eye(z, width)
    weights["encoder.last_layer.bias"] = torch.zeros(2 * z)
    weights["decoder.proj_in.weight"] = spread
    weights["decoder.proj_in.bias"] = torch.zeros(width)
    # Pixels in (t, h, w, channel) order; the fourth channel carries the constant and keeps the mean at zero.
    pixels = synthesis.permute(2, 3, 4, 1, 0).flatten(0, 2)  # (256, 3, z)
    balance = -pixels.sum(dim=(0, 1)).expand(len(pixels), 1, z) / len(pixels)
    rows = torch.cat([pixels, balance], dim=1).flatten(0, 1)  # (1024, z)
    weights["decoder.final_proj.weight"] = rows @ torch.eye(z, width)
    alternating = torch.zeros(len(pixels), _VAE_CHANNELS)
    alternating[0::2, 3], alternating[1::2, 3] = steady, -steady
    weights["decoder.final_proj.bias"] = alternating.flatten()
    size = len(rows)
    spread_out = math.sqrt(float(alternating.square().mean()))
    weights |= {
        "decoder.final_norm.weight": torch.full((size,), spread_out),
        "decoder.final_norm.bias": torch.zeros(size),
    }
    last = torch.zeros(3, _VAE_CHANNELS, 3, 3, 3)
    last[range(3), range(3), 1, 1, 1] = 1
    weights |= {"decoder.last_layer.weight": last, "decoder.last_layer.bias": torch.zeros(3)}
    return {name: w.contiguous() for name, w in weights.items()}


def _silent_block(prefix: str, width: int) -> Mapping[str, torch.Tensor]:
    """Returns the weights of a transformer block that adds nothing: its last layers are zero."""
    shapes = {"attn.qkv": 3 * width, "attn.proj": width, "mlp.fc1": width, "mlp.fc2": width}
    weights = {f"{prefix}{name}.weight": torch.zeros(out, width) for name, out in shapes.items()}
    weights |= {f"{prefix}{name}.bias": torch.zeros(out) for name, out in shapes.items()}
    return weights | {f"{prefix}norm2.weight": torch.ones(width), f"{prefix}norm2.bias": torch.zeros(width)}
