"""The training loop that base and distilled model share: optimizers, rates, averaged weights, log, and a state to resume from.

Several processes started by torchrun train on batches of their own with the mean of their gradients.
"""

import argparse
import json
import os
import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from magi.system.whole_files import put_in_place

from .videos import Pool

WARMUP = 300  # steps
AVERAGE = 0.999  # of the weights, per step
SAVE_SECONDS = 120.0
_SEEDS = 10**8  # of the videos of one process
USES = 4  # how often a video of the pool is drawn, on average


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a training run."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--every", type=int, default=100, help="steps between lines of the log (default: %(default)d)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers: a minute more, then a seventh faster"
    )
    parser.add_argument(
        "--chunks",
        nargs="+",
        metavar="LENGTH=WEIGHT",
        help="lengths of the videos, in chunks, and how often each is drawn",
    )


def lengths_of(items: list[str]) -> dict[int, float]:
    """Returns the lengths of videos and their weights, as the command line has them."""
    return {int(length): float(weight) for length, weight in (item.split("=") for item in items)}


def start(args: argparse.Namespace) -> None:
    """Sets threads and numbers as training wants them, and joins the other processes, if torchrun started this one."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")


def rank_and_count() -> tuple[int, int]:
    """Returns the number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rate_at(step: int, steps: int) -> float:
    """Returns the share of the highest learning rate: a short rise, then straight down to zero."""
    return min((step + 1) / WARMUP, max(0, steps - step) / steps)


class Training:
    """A run: the model, its optimizers, the average of its weights over the last steps, and how far it is."""

    def __init__(self, model: nn.Module, layers: nn.Module, folder: Path, rate: float, muon_rate: float) -> None:
        """Takes up the run in `folder`, if there is one.

        Args:
            model: what is trained: those of its parameters that need a gradient.
            layers: a part of it, whose matrices Muon takes; AdamW takes all else.
            folder: of the state and the log.
            rate: the highest learning rate of AdamW.
            muon_rate: that of Muon.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.state, self.log = model, folder / "state.pt", folder / "log.jsonl"
        chosen = {id(p) for p in layers.parameters() if p.ndim == 2}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon([p for p in trained if id(p) in chosen], lr=muon_rate, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(
                [p for p in trained if id(p) not in chosen], lr=rate, betas=(0.9, 0.99), weight_decay=0.0
            ),
        ]
        self.average = {name: x.detach().clone() for name, x in model.state_dict().items()}
        self.step, self.samples, self.seconds, self.seed = 0, 0, 0.0, 0
        if self.state.is_file():
            device = next(model.parameters()).device
            saved = torch.load(self.state, weights_only=True, map_location=device)
            model.load_state_dict(saved["model"])
            self.average = saved["average"]
            for optimizer, content in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(content)
            self.step, self.samples, self.seconds, self.seed = (
                saved[name] for name in ("step", "samples", "seconds", "seed")
            )
        # Every process draws other videos, windows and noise, and other ones after each start.
        rank, count = rank_and_count()
        self.rng = random.Random(self.step * count + rank)  # noqa: S311
        torch.manual_seed(self.step * count + rank)
        self.first_seed = self.seed + rank * _SEEDS
        self.peaks = [
            rate if group is not self.optimizers[0].param_groups[0] else muon_rate for group in self._groups()
        ]

    def run(self, loss_of: Callable[[], tuple[torch.Tensor, int]], pool: Pool, steps: int, every: int) -> None:
        """Trains up to so many steps, with a line in the log every so often and the state every two minutes.

        Args:
            loss_of: draws a batch and returns its loss and its number of samples.
            pool: whose videos are replaced once they have been drawn `USES` times, on average.
            steps: to end at.
            every: steps between lines of the log.
        """
        rank, count = rank_and_count()
        recent: deque[float] = deque(maxlen=every)
        last = saved_at = time.monotonic()
        replaced = 0.0
        with self.log.open("a", encoding="utf-8") as log:
            while self.step < steps:
                share = rate_at(self.step, steps)
                for group, peak in zip(self._groups(), self.peaks, strict=True):
                    group["lr"] = peak * share
                loss, samples = loss_of()
                self.model.zero_grad(set_to_none=True)
                loss.backward()
                self._share_gradients(count)
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                self._average()
                recent.append(loss.item())
                self.step, self.samples, self.seed = self.step + 1, self.samples + samples * count, pool.next_seed
                replaced += samples / USES
                pool.replace(int(replaced))
                replaced %= 1
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                if rank:
                    continue
                if self.step % every == 0 or self.step == steps:
                    row = {"step": self.step, "samples": self.samples, "loss": round(sum(recent) / len(recent), 4)}
                    row |= {"seconds": round(self.seconds), "rate": round(share, 3), "chunks": pool.chunks}
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                if now - saved_at > SAVE_SECONDS or self.step == steps:
                    self.save()
                    saved_at = now

    def _share_gradients(self, count: int) -> None:
        """Puts the mean of all processes' gradients in place of this one's."""
        if count == 1:
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        every = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
        dist.all_reduce(every)
        for parameter, mean in zip(trained, (every / count).split([p.numel() for p in trained]), strict=True):
            parameter.grad = mean.view_as(parameter)

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        content = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            **{name: getattr(self, name) for name in ("step", "samples", "seconds", "seed")},
        }
        part = self.state.with_suffix(".part")
        torch.save(content, part)
        put_in_place(part, self.state)

    def _groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _average(self) -> None:
        keep = min(AVERAGE, (1 + self.step) / (10 + self.step))
        current, names = self.model.state_dict(), list(self.average)
        torch._foreach_lerp_([self.average[n] for n in names], [current[n] for n in names], 1 - keep)
