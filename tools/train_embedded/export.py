"""Writes training states as the embedded model's files, in the official layout: `python -m tools.train_embedded.export --help`."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from magi.config import MagiConfig
from magi.sampling.special_tokens import FILE_NAME

from .distill import STUDENT
from .text import T5, tokenizer_json
from .train import BASE

BASE_FOLDER, STUDENT_FOLDER = "transformer_base", "transformer"
_VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


def averaged(state: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a training state, averaged over its last steps."""
    return torch.load(state, weights_only=True, map_location="cpu")["average"]


def write_transformer(weights: dict[str, torch.Tensor], folder: Path, config: MagiConfig) -> None:
    """Writes weights and config; the matrices of the layers in bfloat16, as an official checkpoint has them."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = _below(weights, "transformer.")
    kept = {k: x.to(torch.bfloat16) if ".layers." in k and x.ndim == 2 else x for k, x in kept.items()}
    save_file(kept, folder / "model.safetensors")
    _dump(folder / "config.json", config.to_dict())


def write_text(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes the text encoder with its tokenizer to text_encoder/, and the special tokens."""
    encoder = folder / "text_encoder"
    encoder.mkdir(parents=True, exist_ok=True)
    text = {name: x for name, x in _below(weights, "text.t5.").items() if name != "encoder.embed_tokens.weight"}
    save_file(text, encoder / "model.safetensors", {"format": "pt"})
    size = {"vocab_size": len(text["shared.weight"]), "tie_word_embeddings": False, "is_encoder_decoder": False}
    _dump(encoder / "config.json", {"architectures": ["T5EncoderModel"], "model_type": "t5", **T5, **size})
    (encoder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    rows = weights["text.special"].numpy()
    np.savez(folder / FILE_NAME, caption_token=rows[:1], logo_token=rows[:1], other_tokens=rows)


def write_vae(source: Path, folder: Path) -> None:
    """Writes a VAE that `vae.py` made with its matrices in float16, half as large."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(source / _VAE_WEIGHTS)
    # Not the vectors: a constant of 64 stands in them, beside which float16 has no room for what they add.
    matrices = {k: x.half() if x.ndim > 1 and "pos_embed" not in k else x for k, x in weights.items()}
    save_file(matrices, folder / _VAE_WEIGHTS)
    shutil.copyfile(source / "config.json", folder / "config.json")


def _below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x.contiguous() for name, x in weights.items() if name.startswith(prefix)}


def _dump(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def main() -> None:
    """Exports what is given."""
    parser = argparse.ArgumentParser(description="Writes training states as the embedded model's files.")
    parser.add_argument("--base", type=Path, help="state.pt of the base model's training")
    parser.add_argument("--student", type=Path, help="state.pt of the distilled model's")
    parser.add_argument("--vae", type=Path, help="folder that the VAE's training wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    args = parser.parse_args()
    for state, name, config in ((args.base, BASE_FOLDER, BASE), (args.student, STUDENT_FOLDER, STUDENT)):
        if state:
            weights = averaged(state)
            write_transformer(weights, args.out / name, config)
            write_text(weights, args.out)  # the same in both
    if args.vae:
        write_vae(args.vae, args.out / "vae")


if __name__ == "__main__":
    main()
