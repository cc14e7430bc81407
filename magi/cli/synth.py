"""`python -m magi synth`: a checkpoint of random weights, of the size and layout of a released one."""

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..checkpoint.writer import write_checkpoint
from ..config import PRESETS
from ..errors import MagiError
from ..transformer.random_weights import RandomTensors
from .arguments import parse_bytes, preset_config

_OTHER_FILES = {".bin", ".ckpt", ".gguf", ".json", ".npz", ".pt", ".pth", ".sft", ".zip"}  # no folder is called so


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `synth`."""
    parser.epilog = (
        "The file is read, placed and computed with exactly as the real one is; only what comes out is noise. "
        "For trying out memory and speed before a download."
    )
    parser.add_argument("--preset", choices=PRESETS, required=True, help="the model to be like")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="PATH", help="a file that ends in .safetensors, or a folder"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--seed", type=int, default=0, help="another number, other weights (default: %(default)s)")
    parser.add_argument(
        "--shard-size", metavar="SIZE", help="cut the folder's weights into files of this size, e.g. 5GB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def main(args: argparse.Namespace) -> int:
    """Runs `synth`."""
    config = preset_config(args.preset, args.layers)
    if args.out == Path() or args.out.suffix.lower() in _OTHER_FILES:
        raise MagiError(
            f"The output {str(args.out)!r} is no place for a model. Give a name that ends in .safetensors, or a folder."
        )
    if not -(2**63) <= args.seed < 2**64:
        raise MagiError(f"The seed {args.seed} does not fit into 64 bits. Choose a smaller number.")
    started = time.monotonic()
    with tqdm(desc="writing", unit="B", unit_scale=True, leave=False) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        files = write_checkpoint(
            RandomTensors(config.model, config.engine.fp8_quant, seed=args.seed),
            args.out,
            # `recognise` reads the model's name, and that it is meant to have so few layers.
            metadata={
                "format": "pt",
                "model": args.preset,
                "layers": str(config.model.num_layers),
                "weights": f"random, seed {args.seed}",
            },
            beside={"config.json": json.dumps(config.to_dict(), indent=2).encode()},
            shard_bytes=None if args.shard_size is None else parse_bytes(args.shard_size),
            overwrite=args.overwrite,
            progress=on_progress,
        )
    size, seconds = sum(file.stat().st_size for file in files), time.monotonic() - started
    shards = f" in {len(files)} files" if len(files) > 1 else ""
    print(f"wrote {args.out}: {size / 1e9:.2f} GB{shards}, random weights ({seconds:.0f} s)", file=sys.stderr)
    return 0
