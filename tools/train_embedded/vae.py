"""Trains the embedded model's VAE on the world: `python -m tools.train_embedded.vae --out FOLDER`.

It is the published VAE in small (`magi.vae.model`), trained on tiles of 12 frames, which is what it decodes at a time. The
latents are standardised while it trains, with noise on them so that near latents show near pictures; at the end both are
folded into the weights, so that the latents of the world have mean 0 and, as those of the published VAE, variance 1 after
scaling (`LATENT_SCALE`).

A run is resumed from its last state when the same command is given again.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from magi.config import LATENT_CHANNELS, LATENT_SCALE
from magi.media.frames import to_model
from magi.system.whole_files import put_in_place, write_whole
from magi.vae.model import Decoder, Encoder, VAEConfig

from . import world

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
NOISE = 0.1  # standard deviation of the noise on standardised latents
WARMUP = 200  # steps


class Trained(nn.Module):
    """Encoder and decoder with standardised latents in between."""

    def __init__(self) -> None:
        super().__init__()
        config = VAEConfig(**CONFIG)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.standard = nn.BatchNorm3d(LATENT_CHANNELS, affine=False, momentum=0.01)
        for trunk in (self.encoder, self.decoder):
            nn.init.normal_(trunk.cls_token, std=0.02)
            nn.init.normal_(trunk.pos_embed, std=0.02)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Returns the video, encoded and decoded: (B, 3, 12, 64, 64) in [-1, 1]."""
        latents = self.standard(self.encoder(video, _nothing))
        if self.training:
            latents = latents + NOISE * torch.randn_like(latents)
        return self.decoder(latents, _nothing)

    def state_for_inference(self) -> dict[str, torch.Tensor]:
        """Returns the weights by their official names, the standardising folded into them."""
        weights = {name: x.clone() for name, x in self.state_dict().items() if not name.startswith("standard.")}
        buffers = dict(self.standard.named_buffers())
        mean, std = buffers["running_mean"], (buffers["running_var"] + self.standard.eps).sqrt()
        # The encoder gives the standardised latents, divided by LATENT_SCALE; the decoder takes them so.
        means = slice(0, LATENT_CHANNELS)
        layer, gain = "encoder.last_layer.", 1 / (LATENT_SCALE * std)
        weights[layer + "weight"][means] *= gain[:, None]
        weights[layer + "bias"][means] = (weights[layer + "bias"][means] - mean) * gain
        weights["decoder.proj_in.weight"] *= LATENT_SCALE
        return {name: x.contiguous() for name, x in weights.items()}


def _nothing() -> None:
    pass


def batch(step: int, size: int) -> torch.Tensor:
    """Returns the training videos of a step: (B, 3, 12, 64, 64) in [-1, 1], each a tile out of two seconds of a scene."""
    videos = []
    for i in range(size):
        seed = step * size + i
        frames = world.frames(world.draw(seed, 2))
        first = (seed * 7919) % (len(frames) - TILE + 1) // 4 * 4
        videos.append(torch.from_numpy(frames[first : first + TILE]))
    return torch.cat([to_model(video) for video in videos])


def loss_of(model: Trained, video: torch.Tensor) -> torch.Tensor:
    """Returns the mean error: squares, and half as much of absolute values, which keeps edges crisp."""
    difference = model(video) - video
    return difference.square().mean() + 0.5 * difference.abs().mean()


def psnr(model: Trained, seeds: range) -> float:
    """Returns the peak signal-to-noise ratio in dB over held-out scenes."""
    model.eval()
    errors = []
    with torch.no_grad():
        for seed in seeds:
            frames = torch.from_numpy(np.ascontiguousarray(world.frames(world.draw(seed, 1, held_out=True))[:TILE]))
            video = to_model(frames)
            errors.append(float((model(video).clamp(-1, 1) - video).square().mean()))
    model.train()
    return 10 * math.log10(4 / (sum(errors) / len(errors)))


def rate(step: int, steps: int, peak: float) -> float:
    """Returns the learning rate: a linear rise, then half a cosine to zero."""
    return peak * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))


def main() -> None:
    """Trains, and writes weights and config after every thousand steps."""
    parser = argparse.ArgumentParser(description="Trains the embedded model's VAE.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, the state and the log")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (default: %(default)g)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Trained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    state, first = args.out / "state.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    count = sum(p.numel() for p in model.parameters())
    began, mean = time.monotonic(), 0.0
    with (args.out / "log.jsonl").open("a", encoding="utf-8") as log:
        for step in range(first, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, args.steps, args.rate)
            loss = loss_of(model, batch(step, args.batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            value = loss.item()
            mean = value if step == first else 0.98 * mean + 0.02 * value
            if (step + 1) % 250 == 0 or step + 1 == args.steps:
                row = {"step": step + 1, "loss": round(mean, 5), "seconds": round(time.monotonic() - began)}
                row |= {"psnr": round(psnr(model, range(64)), 2), "parameters": count}
                print(row, flush=True)
                log.write(json.dumps(row) + "\n")
                log.flush()
                save(
                    args.out,
                    model,
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                )


def save(folder: Path, model: Trained, state: dict) -> None:
    """Writes the weights as the pipeline reads them, and the state to resume from, each whole or not at all."""
    weights = folder / "vae"
    weights.mkdir(exist_ok=True)
    part = folder / "state.part"
    torch.save(state, part)
    put_in_place(part, folder / "state.pt")
    save_file(model.state_for_inference(), weights / "part.safetensors")
    put_in_place(weights / "part.safetensors", weights / "diffusion_pytorch_model.safetensors")
    config = {"model_type": "vit", "ddconfig": CONFIG}
    write_whole(weights / "config.json", json.dumps(config, indent=1).encode())


if __name__ == "__main__":
    main()
