"""The training loop that base model, distilled model and VAE share: optimizers, rates, averaged weights, log, and a state to resume from.

Several processes started by torchrun train on batches of their own with the mean of their gradients.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset

from magi.system.whole_files import put_in_place

from .batches import T, loader
from .muon import Muon

WARMUP = 200  # steps
AVERAGE = 0.999  # of the weights, per step
SAVE_SECONDS = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a training run; `steps`, `batch` and `rate` need a default."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the log")
    parser.add_argument("--steps", type=int, help="of training (default: %(default)d)")
    parser.add_argument("--seconds", type=float, help="of training, instead of steps")
    parser.add_argument("--batch", type=int, help="chunks, or tiles, of a batch (default: %(default)d)")
    parser.add_argument("--rate", type=float, help="highest rate of AdamW (default: %(default)g)")
    parser.add_argument("--muon", type=float, help="highest rate of Muon (default: %(default)g)")
    parser.add_argument("--init", type=Path, help="state.pt of another run, whose weights a new run begins with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that make batches (default: none but this one)"
    )
    parser.add_argument("--uses", type=int, default=24, help="windows drawn for each new video (default: %(default)d)")
    parser.add_argument("--every", type=int, default=100, help="steps between lines of the log (default: %(default)d)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers: a minute more, then a seventh faster"
    )


def add_chunks(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the lengths of the videos."""
    parser.add_argument(
        "--chunks",
        nargs="+",
        metavar="LENGTH=WEIGHT",
        help="lengths of the videos, in chunks, and how often each is drawn (default: %(default)s)",
    )


def lengths_of(items: list[str]) -> dict[int, float]:
    """Returns the lengths of videos and their weights, as the command line has them."""
    return {int(length): float(weight) for length, weight in (item.split("=") for item in items)}


def start(args: argparse.Namespace) -> None:
    """Sets threads and numbers as training wants them, and joins the other processes, if torchrun started this one."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if "RANK" in os.environ:
        if args.seconds:
            raise SystemExit("--seconds is for one process: several would not end at the same step. Give --steps.")
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")


def rank_and_count() -> tuple[int, int]:
    """Returns the number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rate_at(step: int, done: float) -> float:
    """Returns the share of the highest learning rate: a short rise, then straight down to zero as `done` goes from 0 to 1."""
    return min((step + 1) / WARMUP, max(0.0, 1 - done))


def begin_with(model: nn.Module, state: Path | None) -> None:
    """Takes the averaged weights of a state, if there is one; what it lacks stays."""
    if state:
        known = torch.load(state, weights_only=True, map_location="cpu")["average"]
        model.load_state_dict(model.state_dict() | known)


def compile_layers(layers: nn.ModuleList, args: argparse.Namespace) -> None:
    """Compiles the layers of a model, if the options say so. All share the code for each shape of a batch."""
    if not args.compile:
        return
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(dynamic=False)


class Training:
    """A run: the model, its optimizers, the average of its weights over the last steps, and how far it is."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, args: argparse.Namespace) -> None:
        """Takes up the run in the folder `args.out`, if there is one.

        Args:
            model: what is trained: those of its parameters that need a gradient.
            layers: a part of it, whose matrices Muon takes; AdamW takes all else.
            args: the options of `add_arguments`.
        """
        self.args, self.model = args, model
        args.out.mkdir(parents=True, exist_ok=True)
        self.state, self.log = args.out / "state.pt", args.out / "log.jsonl"
        chosen = {id(p) for p in layers.parameters() if p.ndim == 2}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon([p for p in trained if id(p) in chosen], lr=args.muon, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(
                [p for p in trained if id(p) not in chosen], lr=args.rate, betas=(0.9, 0.99), weight_decay=0.0
            ),
        ]
        self.average = {name: x.detach().clone() for name, x in model.state_dict().items()}
        self.step, self.samples, self.seconds = 0, 0, 0.0
        if self.state.is_file():
            device = next(model.parameters()).device
            saved = torch.load(self.state, weights_only=True, map_location=device)
            model.load_state_dict(saved["model"])
            self.average = saved["average"]
            for optimizer, content in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(content)
            self.step, self.samples, self.seconds = (saved[name] for name in ("step", "samples", "seconds"))
        current = model.state_dict()
        self._averaged = [self.average[name] for name in current], list(current.values())
        # Every process draws other noise, and other one after each start.
        rank, count = rank_and_count()
        torch.manual_seed(self.step * count + rank)
        compile_layers(layers, args)

    @property
    def place(self) -> tuple[tuple[int, int], int]:
        """Returns where a `Stream` begins: this process of how many, and after more videos than have been drawn."""
        return rank_and_count(), self.samples

    @property
    def done(self) -> float:
        """Returns the share of the run that is behind."""
        return self.seconds / self.args.seconds if self.args.seconds else self.step / self.args.steps

    def run(
        self,
        stream: IterableDataset[T],
        loss_of: Callable[[T], tuple[torch.Tensor, int]],
        measure: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Trains to the end, with a line in the log every so often and the state every two minutes.

        Args:
            stream: of batches.
            loss_of: returns the loss of a batch and its number of samples.
            measure: returns what else goes into a line of the log.
        """
        rank, count = rank_and_count()
        device = torch.device(self.args.device).type
        batches = loader(stream, self.args.workers, self.args.device)
        losses: list[torch.Tensor] = []  # since the last line, on the device: to ask for them would be to wait for them
        last = saved_at = time.monotonic()
        with self.log.open("a", encoding="utf-8") as log:
            while self.done < 1:
                share = rate_at(self.step, self.done)
                for optimizer, peak in zip(self.optimizers, (self.args.muon, self.args.rate), strict=True):
                    optimizer.param_groups[0]["lr"] = peak * share
                # Without its cache, which does not go with CUDA graphs.
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
                    loss, samples = loss_of(next(batches))
                self.model.zero_grad(set_to_none=True)
                loss.backward()
                self._share_gradients(count)
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                self._average()
                losses.append(loss.detach())
                self.step, self.samples = self.step + 1, self.samples + samples * count
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                ended = self.done >= 1
                if self.step % self.args.every and not ended:
                    continue
                mean = float(torch.stack(losses).mean())
                losses.clear()
                if rank:
                    continue
                row = {"step": self.step, "samples": self.samples, "loss": round(mean, 4)}
                row |= {"seconds": round(self.seconds), "rate": round(share, 3), **measure()}
                log.write(json.dumps(row) + "\n")
                log.flush()
                if now - saved_at > SAVE_SECONDS or ended:
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
            **{name: getattr(self, name) for name in ("step", "samples", "seconds")},
        }
        part = self.state.with_suffix(".part")
        torch.save(content, part)
        put_in_place(part, self.state)

    def _average(self) -> None:
        keep = min(AVERAGE, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(*self._averaged, 1 - keep)
