"""`python -m magi inspect FILE`: which model a file is, its tensors, types and size, and what else it needs."""

import argparse
import json
from collections import Counter
from fnmatch import fnmatch
from math import prod
from pathlib import Path

from ..checkpoint.reader import Checkpoint
from ..errors import MagiError
from ..model_files.identify import Recognised, recognise_tensors
from ..system.folders import visible, what_is_at
from ..system.paths import user_path
from ..system.printable import printable
from ..text.t5_checkpoint import find_t5_files, read_t5
from ..transformer.weights import check_tensors
from ..vae.video_vae import load_vae

_NEEDS = {
    "transformer": "a MAGI-1 VAE, a T5 v1.1 XXL text encoder with its tokenizer, and special_tokens.npz",
    "vae": "a MAGI-1 transformer",
    "t5": "its tokenizer (spiece.model or tokenizer.json), beside it or given with --tokenizer",
    "magi-1.1": "other code: MAGI-1.1 files have another layout that is not supported",
    "unknown": "nothing that is known here",
}
_TORCH_T5 = "pytorch_model*.bin"  # as the official text encoder's files are named


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
    """Opens the checkpoint; says where a torch file that is named as the official text encoder's are can be looked at."""
    try:
        return Checkpoint(path)
    except MagiError as error:
        if fnmatch(path.name, _TORCH_T5) and what_is_at(user_path(path)) == "file":
            raise MagiError(
                f"{error} Or, as it is named like the official T5 text encoder's files, inspect the folder that it is in: "
                f"`python -m magi inspect {path.parent}`."
            ) from error
        raise


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
    if found.kind in ("transformer", "vae", "t5"):
        facts["complete"] = _complete(checkpoint, found)
    if checkpoint.prefix:
        facts["names begin"] = f"with {checkpoint.prefix} (left out here)"
    parameters = sum(prod(t.shape) for t in tensors)
    return facts | {
        "parameters": f"{parameters:,}",
        "types": ", ".join(f"{n} {dtype}" for dtype, n in Counter(t.dtype for t in tensors).most_common()),
        "size": _size(checkpoint.files),
        "metadata": checkpoint.metadata or "none",
        "needs": _NEEDS[found.kind],
    }


def _complete(checkpoint: Checkpoint, found: Recognised) -> str:
    try:
        if found.kind == "vae":
            load_vae(checkpoint.path, "meta")
        elif found.kind == "t5":
            read_t5(checkpoint.path)
        elif found.model is None:
            return "no. Tensors that tell its sizes are missing, or of shapes that cannot be."
        else:
            check_tensors(checkpoint, found.model, "This file")
            checkpoint.check_whole()
    except MagiError as error:
        return f"no. {error}"
    return f"no: {found.layers_fault}." if found.layers_fault else "yes"


def _is_t5_folder(path: Path) -> bool:
    """Tells whether a folder holds the official text encoder: torch files, or their index."""
    if what_is_at(user_path(path)) != "folder":
        return False
    return not visible(user_path(path), "*.safetensors*") and bool(visible(user_path(path), f"{_TORCH_T5}*"))


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
                print(f"  {printable(tensor, 300)}  {dtype} {tuple(shape)}")
        elif name == "metadata" and isinstance(value, dict):
            texts = (f"{printable(key)}: {printable(text)}" for key, text in value.items())
            print(f"{name:<16}{printable('; '.join(texts), 2000)}")
        else:
            print(f"{name:<16}{value}")
