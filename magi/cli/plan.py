"""`python -m magi plan`: what of a run would lie where, how much memory it takes and what it costs; nothing is loaded."""

import argparse
import json
from pathlib import Path

from ..checkpoint.mapped_file import TensorInfo
from ..checkpoint.reader import Checkpoint
from ..config import PRESETS, MagiConfig
from ..errors import MagiError
from ..model_files.identify import resolve_config
from ..pipeline.request import Request, make_plan
from ..planning.cost import Machine
from ..planning.footprint import WeightSizes, kv_bytes, weight_sizes
from ..planning.placement import MemoryOptions, Placement, place
from ..system.device import free_memory, pick_device
from ..system.host_memory import free_host_memory
from ..transformer.float8 import Kernels
from ..transformer.random_weights import RandomTensors
from ..transformer.weights import check_tensors
from .arguments import parse_bytes, parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `plan` understands."""
    parser.epilog = (
        "Sizes are in units of 1000: 8GB is 8,000,000,000 bytes. A card of 8 GiB has 8.6GB, less what the screen takes."
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", choices=PRESETS, help="a released model")
    model.add_argument("--model", type=Path, metavar="PATH", help="a transformer's file or folder")
    parser.add_argument("--size", help="WIDTHxHEIGHT, 480p, 720p ... (default: the model's)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the video (default: %(default)g)")
    parser.add_argument("--window", type=int, help="chunks denoised at a time (default: the model's)")
    parser.add_argument(
        "--memory", metavar="SIZE", help="of the graphics card, e.g. 8GB (default: what is free on this one)"
    )
    parser.add_argument("--ram", metavar="SIZE", help="free host memory, e.g. 16GB (default: what is free here)")
    parser.add_argument("--fp8-storage", action="store_true", help="keep bf16 layers in float8")
    parser.add_argument(
        "--offload", choices=("auto", "on", "off"), default="auto", help="stream layers (default: as many as must)"
    )
    parser.add_argument(
        "--cache", choices=("auto", "device", "host"), default="auto", help="where finished chunks' K/V are kept"
    )
    parser.add_argument("--token-block", type=int, help="tokens that are taken through a layer at a time")
    machine = Machine()
    parser.add_argument(
        "--tflops",
        type=float,
        default=machine.tflops,
        help="speed that is reached, for the forecast (default: %(default)g; see `bench`)",
    )
    parser.add_argument(
        "--bus",
        type=float,
        default=machine.host_bandwidth / 1e9,
        metavar="GB/S",
        help="from host memory to the card (default: %(default)g)",
    )
    parser.add_argument(
        "--disk",
        type=float,
        default=machine.file_bandwidth / 1e9,
        metavar="GB/S",
        help="from a file to the card (default: %(default)g)",
    )
    parser.add_argument(
        "--no-fp8-units",
        action="store_true",
        help="the card given by --memory cannot multiply float8 (RTX 30 and older, AMD)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Runs `plan`."""
    config, tensors = _model(args)
    config = _run(config, args)
    device = pick_device()
    if args.memory is None:
        kernels, free = Kernels.of(device), free_memory(device)
        card = f"{device}, " + ("which has the host's own memory" if free is None else f"{free / 1e9:.1f} GB free")
    else:
        kernels, free = Kernels(float8=not args.no_fp8_units), parse_bytes(args.memory)
        card = f"{free / 1e9:.1f} GB" + ("" if kernels.float8 else ", without float8 units")
    ram = free_host_memory() if args.ram is None else parse_bytes(args.ram)
    streaming = {"auto": None, "on": True, "off": False}[args.offload]
    for option in ("tflops", "bus", "disk"):
        if not 1e-6 <= (speed := getattr(args, option)) <= 1e6:
            raise MagiError(f"--{option} is {speed:g}: no speed to forecast with. Give one from 0.000001 to 1000000.")
    machine = Machine(args.tflops, args.bus * 1e9, args.disk * 1e9)
    sizes = weight_sizes(tensors, config.model, device, "fp8" if args.fp8_storage else "auto", kernels=kernels)
    found = place(
        config,
        sizes,
        free,
        MemoryOptions(streaming=streaming, cache=args.cache, token_block=args.token_block),
        free_host=ram,
        allow_smaller_window=args.window is None,
        machine=machine,
    )
    if args.json:
        values = {name: value for name, value in vars(found).items() if name != "run"}
        print(json.dumps({**values, "device_bytes": found.device_bytes, "needed_bytes": found.needed_bytes}, indent=1))
        return 0
    print(_table(args.preset or str(args.model), card, ram, config, sizes, found, machine))
    return 0


def _model(args: argparse.Namespace) -> tuple[MagiConfig, dict[str, TensorInfo]]:
    """Returns the config and the headers, of a file or of what a released one holds."""
    if args.preset:
        config = PRESETS[args.preset]
        return config, dict(RandomTensors(config.model, config.engine.fp8_quant).tensors)
    with Checkpoint(args.model) as checkpoint:
        config = resolve_config(checkpoint, None)
        check_tensors(checkpoint, config.model, repr(str(args.model)))
        return config, checkpoint.tensors


def _run(config: MagiConfig, args: argparse.Namespace) -> MagiConfig:
    size = parse_size(args.size) if args.size else (None, None)
    area, (height, width) = (size, (None, None)) if isinstance(size, str) else (None, size)
    request = Request(
        "",
        seconds=args.seconds,
        height=height,
        width=width,
        area=area,
        window_size=args.window,
        style_tokens=(),
        duration_tokens=False,
    )
    return make_plan(request, config, None).config


def _table(
    name: str, card: str, ram: int | None, config: MagiConfig, sizes: WeightSizes, p: Placement, machine: Machine
) -> str:
    runtime, staying = config.runtime, len(p.on_device)
    fetched = p.layers - staying
    resident = sum(sizes.packed[i] for i in p.on_device)
    cache = p.layers * kv_bytes(config.with_runtime(window_size=p.window), 0, sizes.itemsize)
    in_file = fetched - len(p.on_host)
    rows = [
        ("model", f"{name}, {_gb(p.total_weight_bytes)} of weights in {p.layers} layers"),
        ("run", f"{runtime.video_size_w}x{runtime.video_size_h}, {runtime.num_frames} frames, window of {p.window}"),
        ("card", card),
        ("free RAM", "unknown" if ram is None else _gb(ram)),
        ("", ""),
        ("layers there", f"{staying} stay on the card, {_gb(resident)}"),
        ("streamed", f"{fetched} layers, {p.slots if fetched else 0} on the card at a time, {_gb(p.weight_bytes - resident - sizes.outer)}"),
        ("other weights", _gb(sizes.outer)),
        ("work", f"{_gb(p.working_bytes)}, {p.token_block} tokens at a time" + (", with the K/V cache" if p.cache == "device" else "")),
        ("peak", f"{_gb(p.device_bytes)} predicted, {_gb(p.needed_bytes)} with the reserve"),
        ("", ""),
        ("in RAM", f"{len(p.on_host)} layers and {'the' if p.cache == 'host' else 'no'} K/V cache, {_gb(p.host_bytes)}"),
        ("from the file", f"{in_file} layers" + (" at every step" if in_file else "")),
        ("K/V cache", f"{_gb(cache)} on the {p.cache}, whatever the length of the video"),
        ("slow-down", f"{p.slowdown - 1:.0%} over everything on the card, at {machine.tflops:g} TFLOP/s, and {machine.host_bandwidth / 1e9:g} GB/s from RAM, {machine.file_bandwidth / 1e9:g} GB/s from the file"),
    ]  # fmt: skip
    if p.window != runtime.window_size:
        rows.insert(2, ("", f"a window of {runtime.window_size} would not fit: the video differs from one with that"))
    return "\n".join(f"{title:<14} {text}".rstrip() for title, text in rows)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
