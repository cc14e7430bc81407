"""Makes the embedded model's VAE: `python -m tools.train_embedded.vae --out FOLDER`.

It is the published VAE in small (`magi.vae.model`). The encoder is written down: its latents are the principal components of
the world's patches (`components.py`), mean 0 and, as those of the published VAE, variance 1 after scaling (`LATENT_SCALE`). So
the transformer can be trained meanwhile. The decoder begins as the components' way back, 26 dB, and is trained for crisp
frames, on tiles of 12 frames, which is what it decodes at a time, with noise on the latents, as a transformer's are not exact.

The same command resumes a run.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from magi.config import LATENT_CHANNELS, LATENT_SCALE
from magi.media.frames import to_model
from magi.system.whole_files import put_in_place, write_whole
from magi.vae.model import PATCH_VALUES, Decoder, Encoder, VAEConfig

from . import world
from .components import PATCH, USED, Components, components_of, noise_like
from .loop import Training, add_arguments, begin_with, start
from .windows import Tensors

CONFIG = {
    "video_size": world.SIZE,
    "video_length": 12,
    "z_chans": LATENT_CHANNELS,
    "embed_dim": 128,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 3,
    "qkv_bias": True,
    "use_final_proj": True,
}
TILE = 12  # frames that are encoded and decoded at a time, as published
NOISE = 0.25  # largest standard deviation of the noise on latents
_Z, _WIDTH = LATENT_CHANNELS, 128
# A constant beside which a signal hardly moves a layer norm's deviation: the norm becomes linear. The decoder's is small, as the
# learned part of its attention sees it too, and every change of a weight is felt that much.
_STEADY, _DECODER_STEADY = 64.0, 16.0
_CHANNELS = 4  # of the decoder before its last convolution: RGB and one that holds the constant


def linear_vae(components: Components) -> tuple[Encoder, Decoder]:
    """Returns the VAE that encodes to the components and decodes from them linearly; its blocks add nothing yet.

    Tokens hold the latents in their first 16 features, the negative in the next, so that the mean is zero, and a constant of
    either sign in all others. Latents are in units of their deviation here; `state_for_inference` scales them.
    """
    config = VAEConfig(**CONFIG)
    encoder, decoder = Encoder(config), Decoder(config)
    both = torch.cat([torch.eye(_Z), -torch.eye(_Z), torch.zeros(_WIDTH - 2 * _Z, _Z)])  # (D, 16)
    with torch.no_grad():
        for trunk, steady in ((encoder, _STEADY), (decoder, _DECODER_STEADY)):
            constant = torch.tensor([steady, -steady]).repeat(_WIDTH // 2)
            constant[: 2 * _Z] = 0
            trunk.cls_token.zero_()
            trunk.pos_embed.copy_(constant.expand_as(trunk.pos_embed))
            deviation = float(constant.square().mean().sqrt())
            trunk.norm.weight.fill_(deviation)
            trunk.norm.bias.copy_(-constant)
            for block in trunk.blocks:
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.zero_()
                    layer.bias.zero_()
                # So that the blocks see what tokens hold beside the constant.
                block.norm2.weight.fill_(deviation)
                block.norm2.bias.copy_(-constant)
                block.attn.qkv.bias.copy_(-block.attn.qkv.weight @ constant)
        decoder.pos_embed[..., _Z : 2 * _Z] += 0.5 * torch.randn(decoder.pos_embed[..., _Z : 2 * _Z].shape)
        for parameter in encoder.blocks.parameters():
            parameter.zero_()
        analysis = components.analysis.T  # (16, 768)
        encoder.patch_embed.proj.weight.copy_((both @ analysis).view_as(encoder.patch_embed.proj.weight))
        encoder.patch_embed.proj.bias.copy_(-both @ analysis @ components.mean)
        encoder.last_layer.weight.zero_()[:_Z, :_Z] = torch.eye(_Z)
        encoder.last_layer.bias.zero_()

        decoder.proj_in.weight.copy_(both)[:, USED:] = 0
        decoder.proj_in.bias.zero_()
        pixels = torch.zeros(PATCH_VALUES, _CHANNELS, _WIDTH)  # the decoder has a patch's channels last
        # What the blocks find out about the components that latents lack goes into the features that are still free.
        for features, patterns in ((slice(_Z), components.synthesis), (slice(2 * _Z, _WIDTH), components.details)):
            pixels[:, :3, features] = patterns.T.view(3, PATCH_VALUES, -1).transpose(0, 1)
        bias = torch.zeros(PATCH_VALUES, _CHANNELS)
        bias[:, :3] = components.mean.view(3, PATCH_VALUES).T
        for values in (pixels, bias):  # the norm takes the mean away: keep it at zero
            values[:, 3] = -values.sum(dim=(0, 1)) / PATCH_VALUES
        bias[0::2, 3] += _DECODER_STEADY
        bias[1::2, 3] -= _DECODER_STEADY
        decoder.final_proj.weight.copy_(pixels.flatten(0, 1))
        decoder.final_proj.bias.copy_(bias.flatten())
        decoder.final_norm.weight.fill_(_DECODER_STEADY / math.sqrt(_CHANNELS))
        nn.init.dirac_(decoder.last_layer.weight)
        decoder.last_layer.bias.zero_()
    return encoder.requires_grad_(False), decoder


def state_for_inference(encoder: Encoder, decoder: Decoder) -> dict[str, torch.Tensor]:
    """Returns the weights by their official names; the encoder gives latents divided by LATENT_SCALE, the decoder takes them so."""
    weights = {f"encoder.{name}": x.detach().clone() for name, x in encoder.state_dict().items()}
    weights |= {f"decoder.{name}": x.detach().clone() for name, x in decoder.state_dict().items()}
    weights["encoder.last_layer.weight"] /= LATENT_SCALE
    weights["decoder.proj_in.weight"] *= LATENT_SCALE
    return weights


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Tiles(Tensors):
    """A batch of tiles.

    Attributes:
        latents: (B, 16, 3, 8, 8).
        video: their pixels in [-1, 1], (B, 3, 12, 64, 64).
    """

    latents: torch.Tensor
    video: torch.Tensor


def tiles(components: Components, rng: random.Random, size: int) -> Tiles:
    """Returns random tiles, each of a training scene of its own."""
    latents, videos = [], []
    for _ in range(size):
        frames = world.frames(world.draw(rng.randrange(10**6), 2))
        first = rng.randrange(0, len(frames) - TILE + 1, PATCH[0])
        tile = frames[first : first + TILE]
        latents.append(components.latents(tile))
        videos.append(to_model(torch.from_numpy(tile)))
    return Tiles(torch.stack(latents), torch.cat(videos))


class TileStream(IterableDataset[Tiles]):
    """Batches of tiles without end."""

    def __init__(self, components: Components, size: int, part: tuple[int, int], first: int) -> None:
        """Takes the tiles of a batch, and where to begin, as `Stream` does."""
        self.components, self.size, self.part, self.first = components, size, part, first

    def __iter__(self) -> Iterator[Tiles]:
        """Yields batches."""
        info = get_worker_info()
        rng = random.Random(f"{self.part} {info and info.id} {self.first}")  # noqa: S311
        while True:
            yield tiles(self.components, rng, self.size)


def loss_of(decoder: Decoder, batch: Tiles) -> torch.Tensor:
    """Returns the mean error: squares, and half as much of absolute values, which keeps edges crisp."""
    latents = batch.latents
    noise = NOISE * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device) * noise_like(latents)
    difference = decoder(latents + noise, _nothing).float() - batch.video
    return difference.square().mean() + 0.5 * difference.abs().mean()


def psnr(components: Components, decoder: Decoder, seeds: range) -> float:
    """Returns the peak signal-to-noise ratio in dB over held-out scenes."""
    errors = []
    with torch.no_grad():
        for seed in seeds:
            frames = np.ascontiguousarray(world.frames(world.draw(seed, 1, held_out=True))[:TILE])
            latents = components.latents(frames)[None].to(decoder.cls_token.device)
            decoded = decoder(latents, _nothing).cpu()
            errors.append(float((decoded.clamp(-1, 1) - to_model(torch.from_numpy(frames))).square().mean()))
    return 10 * math.log10(4 / (sum(errors) / len(errors)))


def main() -> None:
    """Trains, and writes weights and config at the end."""
    parser = argparse.ArgumentParser(description="Makes the embedded model's VAE.")
    add_arguments(parser)
    parser.set_defaults(steps=14000, batch=12, rate=2e-4, muon=0.01)
    args = parser.parse_args()
    start(args)
    components = components_of(args.out)
    encoder, decoder = linear_vae(components)
    begin_with(decoder, args.init)
    training = Training(decoder.to(args.device), decoder.blocks, args)
    stream = TileStream(components, args.batch, *training.place)
    training.run(
        stream,
        lambda batch: (loss_of(decoder, batch), len(batch.video)),
        lambda: {"psnr": round(psnr(components, decoder, range(16)), 2)},
    )
    decoder.load_state_dict(training.average)
    save(args.out / "vae", state_for_inference(encoder, decoder.cpu()))


def save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Writes the weights and the config as the pipeline reads them, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "part.safetensors"
    save_file(weights, part)
    put_in_place(part, folder / "diffusion_pytorch_model.safetensors")
    config = {"model_type": "vit", "ddconfig": CONFIG}
    write_whole(folder / "config.json", json.dumps(config, indent=1).encode())


if __name__ == "__main__":
    main()
