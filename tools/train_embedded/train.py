"""Trains the embedded base model: `python -m tools.train_embedded.train --out FOLDER`.

Transformer and text encoder are trained together, by flow matching on the windows that the sampler will run (`windows.py`).
Muon takes the matrices of the layers, AdamW all else; what is kept is an average of the weights over the last steps.

The same command resumes a run; with more steps, or other lengths of video, it goes on from there.
"""

import argparse
import json
import random
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from magi.config import EngineConfig, MagiConfig, ModelConfig, RuntimeConfig
from magi.system.whole_files import put_in_place

from . import world
from .components import components_of
from .forward import TrainingTransformer
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
POOL = 4096  # videos
USES = 4  # how often a video is drawn, on average
WARMUP = 300  # steps
AVERAGE = 0.999  # of the weights, per step
MUON_RATE = 0.02
PASSES = {"text": 0.75, "prev": 0.15, "independent": 0.1}


class Trained(nn.Module):
    """What is trained: transformer and text encoder."""

    def __init__(self, config: MagiConfig) -> None:
        super().__init__()
        self.transformer = TrainingTransformer(config.model)
        self.text = TextEncoder()

    def loss(self, videos: list[Video], chosen: list[Window], rng: random.Random) -> torch.Tensor:
        """Returns the flow-matching loss of a batch of windows of equal length."""
        device = next(self.parameters()).device
        batch = collate(chosen, CHUNK_FRAMES).to(device)
        shape = batch.chunks.shape
        clean = torch.stack([v.latents[[c.chunk for c in w]] for v, w in zip(videos, chosen, strict=True)])
        clean = clean.to(device, torch.float32)  # (B, n, 16, W, h, w)
        noise = torch.randn(clean.shape, device=device)
        tokens = [v.tokens[c.chunk] for v, w in zip(videos, chosen, strict=True) for c in w]
        rows = [row for w in chosen for row in prefix_rows(w, rng)]
        captions, lengths = self.text(padded(tokens).to(device), padded(rows, -1).to(device))
        velocity = self.transformer(
            batch.latents(clean, noise),
            captions=captions.unflatten(0, shape),
            lengths=lengths.unflatten(0, shape) * batch.captioned,
            **batch.inputs(),
        )
        return batch.loss(velocity, clean, noise)


def optimizers(model: Trained, rate: float) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the transformer's layers and AdamW for all other weights."""
    layers = {id(p) for p in model.transformer.videodit_blocks["layers"].parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in layers]
    others = [p for p in model.parameters() if id(p) not in layers]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def rate_at(step: int, steps: int) -> float:
    """Returns the share of the highest learning rate: a short rise, then flat, and down to zero over the last quarter."""
    return min(1, (step + 1) / WARMUP, 4 * max(0, steps - step) / steps)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Trains the embedded base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the log")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument(
        "--chunks", nargs="+", default=["1=1"], metavar="LENGTH=WEIGHT", help="lengths of the videos and how often each"
    )
    parser.add_argument("--batch", type=int, default=96, help="chunks of a batch (default: %(default)d)")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest rate of AdamW (default: %(default)g)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers: a minute more, then a seventh faster"
    )
    parser.add_argument("--every", type=int, default=100, help="steps between lines of the log")
    return parser.parse_args()


def main() -> None:
    """Trains."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    model = Trained(BASE).to(args.device)
    average = {name: x.detach().clone() for name, x in model.state_dict().items()}
    optimizing = optimizers(model, args.rate)
    state, first, samples, seconds, seed = args.out / "state.pt", 0, 0, 0.0, 0
    if state.is_file():
        saved = torch.load(state, weights_only=True, map_location=args.device)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        for optimizer, content in zip(optimizing, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        first, samples, seconds, seed = (saved[name] for name in ("step", "samples", "seconds", "seed"))
        torch.manual_seed(first)
    if args.compile:
        for block in model.transformer.videodit_blocks["layers"]:
            block.compile(dynamic=False)
    peaks = [group["lr"] for optimizer in optimizing for group in optimizer.param_groups]
    chunks = {int(length): float(weight) for length, weight in (item.split("=") for item in args.chunks)}
    components = components_of(args.out)
    pool = Pool(components, max(chunks), POOL, seed)
    rng = random.Random(first)  # noqa: S311
    drawn = windows(pool, WindowDrawer(BASE, windows=(1, 2, 4), passes=PASSES), chunks, args.batch, rng)
    names = list(average)

    def save(step: int) -> None:
        content = {
            "model": model.state_dict(),
            "average": average,
            "optimizers": [optimizer.state_dict() for optimizer in optimizing],
            "step": step,
            "samples": samples,
            "seconds": seconds,
            "seed": pool.next_seed,
            "config": asdict(MODEL),
        }
        part = args.out / "state.part"
        torch.save(content, part)
        put_in_place(part, state)

    recent: deque[float] = deque(maxlen=args.every)
    began = saved_at = time.monotonic()
    replaced = 0.0
    with (args.out / "log.jsonl").open("a", encoding="utf-8") as log:
        for step in range(first, args.steps):
            share = rate_at(step, args.steps)
            groups = [group for optimizer in optimizing for group in optimizer.param_groups]
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * share
            videos, chosen = next(drawn)
            loss = model.loss(videos, chosen, rng)
            model.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizing:
                optimizer.step()
            keep = min(AVERAGE, (1 + step) / (10 + step))
            current = model.state_dict()
            torch._foreach_lerp_([average[n] for n in names], [current[n] for n in names], 1 - keep)
            recent.append(loss.item())
            samples += len(videos)
            replaced += len(videos) / USES
            pool.replace(int(replaced))
            replaced %= 1
            now = time.monotonic()
            seconds, began = seconds + now - began, now
            if (step + 1) % args.every == 0 or step + 1 == args.steps:
                row = {"step": step + 1, "samples": samples, "loss": round(sum(recent) / len(recent), 4)}
                row |= {"seconds": round(seconds), "rate": round(share, 3), "chunks": chunks}
                log.write(json.dumps(row) + "\n")
                log.flush()
            if now - saved_at > 120 or step + 1 == args.steps:
                save(step + 1)
                saved_at = now


if __name__ == "__main__":
    main()
