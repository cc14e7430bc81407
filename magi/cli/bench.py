"""`python -m magi bench`: speed and memory of a model on this machine, with random weights or a file's."""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from ..config import PRESETS
from ..media.frames import size_for
from .arguments import parse_bytes, parse_size, preset_config
from .generate import DTYPES, add_device_arguments
from .measure import BenchResult, BenchSettings, run_bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `bench`."""
    parser.add_argument("--preset", choices=PRESETS, default="4.5B_distill", help="model (default: %(default)s)")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="measure with the weights of this file or folder, from which layers may also be streamed (default: random ones; see `synth`)",
    )
    parser.add_argument("--size", help="WIDTHxHEIGHT (default: the model's)")
    parser.add_argument("--steps", type=int, help="denoising steps per chunk (default: the model's)")
    parser.add_argument("--window", type=int, help="chunks denoised at a time (default: the model's)")
    parser.add_argument(
        "--chunks", type=int, help="active chunks in the timed iterations (default: the window; 1 on a CPU)"
    )
    parser.add_argument("--iterations", type=int, help="forward iterations to time (default: 3; 1 on a CPU)")
    parser.add_argument("--warmup", type=int, help="untimed iterations before them (default: 1; 0 on a CPU)")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick estimate")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="compute type (default: bf16)")
    parser.add_argument(
        "--offload", action="store_true", help="keep the weights on the host and fetch each layer when its turn comes"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="graphics memory that may be used, e.g. 8GB; more is refused (CUDA)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="show what share of the time is matrix products and attention"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_device_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs `bench`."""
    config = preset_config(args.preset, args.layers).with_runtime(num_steps=args.steps, window_size=args.window)
    if args.size:
        size = parse_size(args.size)
        height, width = size_for(size, 16 / 9) if isinstance(size, str) else size
        config = config.with_runtime(video_size_h=height, video_size_w=width)
    settings = BenchSettings(
        config,
        args.device,
        DTYPES[args.dtype],
        args.chunks,
        args.iterations,
        args.warmup,
        args.offload or None,
        None if args.memory is None else parse_bytes(args.memory),
        args.model,
        args.profile,
    )
    with tqdm(desc="loading", leave=False) as load, tqdm(desc="iterations", leave=False, bar_format=_BAR) as bar:

        def on_load(done: int, total: int) -> None:
            load.total, load.n = total, done
            load.refresh()

        def on_progress(done: int, total: int, fraction: float) -> None:
            bar.total, bar.n = total, done + fraction
            bar.update(0)

        result = run_bench(settings, on_load, on_progress)
    if args.json:
        print(json.dumps({"preset": args.preset, **result.to_dict()}, indent=1))
    else:
        print(_table(args.preset, result))
    return 0


_BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.2f}/{total_fmt} [{elapsed}]"


def _table(preset: str, r: BenchResult) -> str:
    rows = {
        "model": f"{preset}, {r.weights}, {r.weight_bytes / 1e9:.2f} GB",
        "machine": f"{r.device}, torch {r.torch_version}",
        "iteration": f"{r.size}, {r.active_chunks} active chunks, {r.tokens} tokens, {r.tflop:.2f} TFLOP",
        "time": f"{r.seconds_per_iteration:.3f} s per forward iteration (median of {len(r.seconds)})",
        "speed": f"{r.tokens_per_second:.0f} tokens/s, {r.tflops_per_second:.3f} TFLOP/s",
        "load": f"{r.load_seconds:.1f} s",
        "peak memory": "unknown" if r.peak_memory is None else f"{r.peak_memory / 1e9:.2f} GB",
    }
    if r.predicted_peak is not None:
        rows["predicted"] = f"{r.predicted_peak / 1e9:.2f} GB"
    if r.layers_on_device < r.layers:
        elsewhere = r.layers - r.layers_on_device - r.layers_on_host
        rows["layers"] = (
            f"{r.layers_on_device} on the device, {r.layers_on_host} in memory, {elsewhere} in the file; "
            f"{r.fetched_bytes / 1e9:.2f} GB fetched per step, {r.fetch_seconds:.3f} s alone"
        )
    if r.heavy_share is not None:
        rows["heavy share"] = f"{r.heavy_share:.1%} of the operators' time is matrix products and attention"
        rows |= {f"  {name}": f"{share:.1%}" for name, share in r.heavy_operators.items()}
    return "\n".join(f"{name:<13} {value}" for name, value in rows.items())
