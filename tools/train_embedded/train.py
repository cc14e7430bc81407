"""Trains the embedded base model: `python -m tools.train_embedded.train --out FOLDER`.

Transformer and text encoder are trained together, by flow matching on the windows that the sampler will run (`windows.py`).
Muon takes the matrices of the layers, AdamW all else; what is kept is an average of the weights over the last steps.

The same command resumes a run; with more steps, or other lengths of video, it goes on from there.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from magi.config import SPATIAL_DOWNSAMPLE, EngineConfig, MagiConfig, ModelConfig, RuntimeConfig

from . import hints, world
from .batches import Examples, Stream, examples
from .components import CHUNK_FRAMES, USED, components_of, noise_like
from .forward import TrainingTransformer
from .graphs import Graphs
from .hints import Hints
from .loop import Training, add_arguments, add_chunks, begin_with, lengths_of, start
from .neighbours import look_at_neighbours
from .text import CAPTION_TOKENS, PAD, WIDTH, TextEncoder
from .windows import Batch, Tensors, WindowDrawer

MODEL = ModelConfig(
    num_layers=6,
    hidden_size=128,
    ffn_hidden_size=512,
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
WEAR = 0.1  # largest standard deviation of the noise on the chunks that a window goes on from
PASSES = {"text": 0.75, "prev": 0.15, "independent": 0.1}


@dataclass(frozen=True)
class Step(Tensors):
    """A batch after noise was mixed in: the latents (B, n, 16, W, h, w) three times, and what else the loss needs."""

    windows: Batch
    noisy: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor
    lengths: torch.Tensor
    numbers: torch.Tensor
    labels: torch.Tensor


class Trained(nn.Module):
    """What is trained: transformer and text encoder."""

    def __init__(self, config: MagiConfig) -> None:
        super().__init__()
        self.transformer = TrainingTransformer(config.model)
        with torch.no_grad():  # the empty channels are neither seen nor made
            weight = self.transformer.x_embedder.weight
            weight[:, USED:] = 0
            weight *= (config.model.in_channels / USED) ** 0.5
        look_at_neighbours(self.transformer, world.SIZE // SPATIAL_DOWNSAMPLE // config.model.patch_size)
        self.text = TextEncoder()
        self.hints = Hints(config.model.hidden_size, config.model.patch_size, WIDTH)

    def captions(self, batch: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the captions of a batch: (B, n, L, WIDTH), and their lengths (B, n), 0 where the null caption belongs."""
        embeds, lengths = self.text(batch.tokens, batch.rows)
        captioned = batch.windows.captioned
        return embeds.unflatten(0, captioned.shape), lengths.view_as(captioned) * captioned

    def loss(self, batch: Examples) -> torch.Tensor:
        """Returns the loss of a batch: flow matching, and a little of `hints.py`."""
        windows, clean = batch.windows, batch.latents.float()
        noise = noise_like(clean)
        noisy = windows.latents(worn(clean, windows), noise)
        embeds, lengths = self.captions(batch)
        core = self.core(embeds, Step(windows, noisy, clean, noise, lengths, batch.numbers, batch.labels))
        return core + hints.WEIGHT * self.hints.text_loss(embeds.flatten(0, 1), caption_places(batch), batch.labels)

    def core(self, embeds: torch.Tensor, step: Step) -> torch.Tensor:
        """Returns the loss from encoded captions on: most of a step's work, without a random number."""
        windows = step.windows
        velocity, hidden = self.transformer(
            step.noisy, captions=embeds, lengths=step.lengths, **windows.inputs(), tap=hints.LAYER
        )
        hint = self.hints.loss(hidden, step.numbers, step.labels, windows.learned.any(-1).flatten())
        return windows.loss(velocity, step.clean, step.noise) + hints.WEIGHT * hint


def caption_places(batch: Examples) -> torch.Tensor:
    """Returns which of the encoded tokens of each chunk are of its caption, neither special nor padding: (B * n, L) bool."""
    before, words = (batch.rows >= 0).sum(1, keepdim=True), (batch.tokens != PAD).sum(1, keepdim=True)
    place = torch.arange(CAPTION_TOKENS, device=words.device)
    return (place >= before) & (place < before + words)


def worn(clean: torch.Tensor, windows: Batch) -> torch.Tensor:
    """Returns clean latents with a little noise on the clean chunks, (B, n, 16, W, h, w).

    Those that the sampler goes on from are its own, which are never quite clean.
    """
    strength = WEAR * torch.rand(len(clean), 1, 1, 1, 1, 1, device=clean.device)
    chunks = windows.clean_frames.all(-1)[..., None, None, None, None]
    return clean + strength * chunks * noise_like(clean)


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser(description="Trains the embedded base model.")
    add_arguments(parser)
    add_chunks(parser)
    parser.add_argument("--graphs", action="store_true", help="run a step's kernels as CUDA graphs: half the time")
    parser.set_defaults(steps=11000, batch=24, rate=3e-3, muon=0.02, chunks=["1=0.5", "2=0.2", "4=0.3"])
    args = parser.parse_args()
    start(args)
    model = Trained(BASE).to(args.device)
    begin_with(model, args.init)
    if args.graphs:
        model.core = Graphs(model, model.core)  # type: ignore[method-assign, assignment]
    training = Training(model, model.transformer.videodit_blocks["layers"], args)
    drawer = WindowDrawer(BASE, windows=(1, 2, 4), passes=PASSES)
    sources = [(drawer, examples)]
    stream = Stream(components_of(args.out), sources, lengths_of(args.chunks), args.batch, args.uses, *training.place)
    training.run(stream, lambda batch: (model.loss(batch), len(batch.latents)))


if __name__ == "__main__":
    main()
