"""Trains the embedded base model: `python -m tools.train_embedded.train --out FOLDER`.

Transformer and text encoder are trained together, by flow matching on the windows that the sampler will run (`windows.py`).
Muon takes the matrices of the layers, AdamW all else; what is kept is an average of the weights over the last steps.

The same command resumes a run; with more steps, or other lengths of video, it goes on from there.
"""

import argparse
import random
from pathlib import Path

import torch
from torch import nn

from magi.config import EngineConfig, MagiConfig, ModelConfig, RuntimeConfig

from . import hints, videos, world
from .components import components_of
from .forward import TrainingTransformer
from .hints import Hints
from .loop import Training, add_arguments, add_chunks, lengths_of, start
from .text import CAPTION_TOKENS, WIDTH, TextEncoder
from .videos import CHUNK_FRAMES, Pool, Video, padded, prefix_rows, windows
from .windows import Window, WindowDrawer, collate

MODEL = ModelConfig(
    num_layers=5,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=32,
    cond_hidden_ratio=1.0,
    caption_channels=WIDTH,
    caption_max_length=CAPTION_TOKENS,
)
BASE = MagiConfig(
    MODEL,
    RuntimeConfig(
        num_steps=16,
        num_frames=4 * world.CHUNK,
        video_size_h=world.SIZE,
        video_size_w=world.SIZE,
        text_scales=(3.0, 3.0, 3.0, 3.0, 1.0),
        prev_chunk_scales=(1.5, 1.5, 1.5, 1.0, 1.0),
        chunk_width=CHUNK_FRAMES,
    ),
    EngineConfig(),
)
MUON_RATE = 0.01
PASSES = {"text": 0.75, "prev": 0.15, "independent": 0.1}


class Trained(nn.Module):
    """What is trained: transformer and text encoder."""

    def __init__(self, config: MagiConfig) -> None:
        super().__init__()
        self.transformer = TrainingTransformer(config.model)
        self.text = TextEncoder()
        self.hints = Hints(config.model.hidden_size, config.model.patch_size)

    def captions(
        self, clips: list[Video], chosen: list[Window], rng: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the captions of a batch of windows of equal length: (B, n, L, WIDTH), and the lengths (B, n)."""
        device = self.text.special.device
        tokens = padded([v.tokens[c.chunk] for v, w in zip(clips, chosen, strict=True) for c in w])
        rows = padded([row for w in chosen for row in prefix_rows(w, rng)], -1)
        embeds, lengths = self.text(tokens.to(device), rows.to(device))
        shape = len(chosen), len(chosen[0])
        return embeds.unflatten(0, shape), lengths.unflatten(0, shape)

    def loss(self, clips: list[Video], chosen: list[Window], rng: random.Random) -> torch.Tensor:
        """Returns the loss of a batch of windows of equal length: flow matching, and a little of `hints.py`."""
        device = self.text.special.device
        batch = collate(chosen, CHUNK_FRAMES).to(device)
        clean = clean_latents(clips, chosen).to(device)
        noise = torch.randn(clean.shape, device=device)
        embeds, lengths = self.captions(clips, chosen, rng)
        velocity, hidden = self.transformer(
            batch.latents(clean, noise),
            captions=embeds,
            lengths=lengths * batch.captioned,
            **batch.inputs(),
            tap=hints.LAYER,
        )
        numbers = torch.cat([v.numbers[[c.chunk for c in w]] for v, w in zip(clips, chosen, strict=True)]).to(device)
        shapes = torch.tensor([v.shape for v in clips], device=device).repeat_interleave(len(chosen[0]))
        hint = self.hints.loss(hidden, numbers, shapes, batch.learned.any(-1).flatten())
        return batch.loss(velocity, clean, noise) + hints.WEIGHT * hint


def clean_latents(clips: list[Video], chosen: list[Window]) -> torch.Tensor:
    """Returns the latents of the chunks of a batch of windows: (B, n, 16, W, h, w) float32."""
    return torch.stack([v.latents[[c.chunk for c in w]] for v, w in zip(clips, chosen, strict=True)]).float()


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser(description="Trains the embedded base model.")
    add_arguments(parser)
    add_chunks(parser)
    parser.add_argument("--init", type=Path, help="state.pt of another run, whose weights a new run begins with")
    parser.set_defaults(steps=20000, batch=32, rate=1.5e-3, chunks=["1=1"])
    args = parser.parse_args()
    start(args)
    model = Trained(BASE).to(args.device)
    if args.init:
        known = torch.load(args.init, weights_only=True, map_location=args.device)["average"]
        model.load_state_dict(model.state_dict() | known)
    training = Training(model, model.transformer.videodit_blocks["layers"], args, MUON_RATE)
    chunks, rng = lengths_of(args.chunks), training.rng
    pool = Pool(components_of(args.out), max(chunks), training.first_seed, videos.POOL)
    drawn = windows(pool, WindowDrawer(BASE, windows=(1, 2, 4), passes=PASSES), chunks, args.batch, rng)

    def loss() -> tuple[torch.Tensor, int]:
        clips, chosen = next(drawn)
        training.seed = pool.next_seed
        return model.loss(clips, chosen, rng), len(clips)

    training.run(loss)


if __name__ == "__main__":
    main()
