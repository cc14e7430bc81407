"""`python -m magi inspect FILE`: which model a file is, its tensors, types and size, and what else it needs."""

import argparse
import json
import re
from collections import Counter
from math import prod
from pathlib import Path

from ..checkpoint.reader import Checkpoint
from ..errors import MagiError
from ..model_files.identify import Recognised, recognise_tensors
from ..text.t5_checkpoint import find_t5_files, read_t5
from ..transformer.weights import check_tensors

_NEEDS = {
    "transformer": "a MAGI-1 VAE, a T5 v1.1 XXL text encoder with its tokenizer, and special_tokens.npz",
    "vae": "a MAGI-1 transformer",
    "t5": "its tokenizer (spiece.model or tokenizer.json), beside it or given with --tokenizer",
    "magi-1.1": "other code: MAGI-1.1 files have another layout that is not supported",
    "unknown": "nothing that is known here",
}
# Formats that models also come in, by the end of the name
_OTHER_FORMATS = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), "a torch file"),
    ".gguf": "a GGUF file, which no part of MAGI-1 can be read from,",
}
_T5_FILE = re.compile(r"pytorch_model.*\.bin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `inspect`."""
    parser.add_argument("file", type=Path, help="safetensors file, index or folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Runs `inspect`."""
    if _is_t5_folder(args.file):
        return _show_t5(args)
    with _open(args.file) as checkpoint:
        found = recognise_tensors(checkpoint.tensors, checkpoint.metadata, checkpoint.path)
        facts = _facts(checkpoint, found)
        if args.tensors:
            facts["tensors"] = {n: [t.dtype, *t.shape] for n, t in sorted(checkpoint.tensors.items())}
    _print(facts, args.json)
    return 0


def _open(path: Path) -> Checkpoint:
    """Opens the checkpoint.

    Raises:
        MagiError: it cannot be read; a file in another format is named as such instead of as a damaged one.
    """
    try:
        return Checkpoint(path)
    except MagiError as error:
        file, suffix = path.expanduser(), path.suffix.lower()
        if suffix not in _OTHER_FORMATS or not file.is_file() or not file.stat().st_size:
            raise
        found = error
    name = f"{str(path)!r} ({_size([file])})"
    if _T5_FILE.fullmatch(path.name):
        raise MagiError(
            f"{name} is a torch file, named as the official T5 text encoder's files are. "
            f"Inspect the folder that it is in: `python -m magi inspect {path.parent}`."
        ) from found
    raise MagiError(
        f"{name} is {_OTHER_FORMATS[suffix]} by its name, not a safetensors file. "
        "Inspect the model's .safetensors file or folder, or for a text encoder the folder of its pytorch_model*.bin files."
    ) from found


def _facts(checkpoint: Checkpoint, found: Recognised) -> dict[str, object]:
    tensors = checkpoint.tensors.values()
    facts: dict[str, object] = {"file": str(checkpoint.path), "is": found.name}
    if found.evidence:
        facts["variant said by"] = found.evidence
    if found.model:
        facts["transformer"] = (
            f"{found.model.num_layers} layers of {found.model.hidden_size}, {found.model.num_attention_heads} heads, "
            f"{'SwiGLU' if found.model.gated_linear_unit else 'GELU'} of {found.model.ffn_hidden_size}"
        )
        facts["complete"] = _complete(checkpoint, found)
    parameters = sum(prod(t.shape) for t in tensors)
    return facts | {
        "parameters": f"{parameters:,}",
        "types": ", ".join(f"{n} {dtype}" for dtype, n in Counter(t.dtype for t in tensors).most_common()),
        "size": _size(checkpoint.files),
        "metadata": checkpoint.metadata or "none",
        "needs": _NEEDS[found.kind],
    }


def _complete(checkpoint: Checkpoint, found: Recognised) -> str:
    assert found.model is not None  # noqa: S101 (checked by the caller)
    try:
        check_tensors(checkpoint, found.model, "This file")
    except MagiError as error:
        return f"no. {error}"
    return "yes"


def _is_t5_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.glob("*.safetensors*")) and any(path.glob("pytorch_model*.bin*"))


def _show_t5(args: argparse.Namespace) -> int:
    files = find_t5_files(args.file)
    shape = read_t5(args.file).shape
    facts: dict[str, object] = {
        "file": str(args.file),
        "is": "a T5 text encoder",
        "encoder": str(shape),
        "size": _size(files),
        "needs": _NEEDS["t5"],
    }
    _print(facts, args.json)
    return 0


def _size(files: list[Path]) -> str:
    size = sum(file.stat().st_size for file in files)
    text = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
    return f"{text} in {len(files)} file{'s' * (len(files) > 1)}"


def _print(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=1, default=str))
        return
    for name, value in facts.items():
        if name == "tensors" and isinstance(value, dict):
            for tensor, (dtype, *shape) in value.items():
                print(f"  {tensor}  {dtype} {tuple(shape)}")
        else:
            print(f"{name:<16}{value}")
