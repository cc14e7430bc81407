"""Writes a training state as model files, in the official layout: `python -m tools.train_embedded.export --help`."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from magi.config import MagiConfig
from magi.sampling.special_tokens import FILE_NAME

from .distill import STUDENT
from .text import T5, tokenizer_json
from .train import BASE


def export(state: Path, folder: Path, config: MagiConfig) -> None:
    """Writes the transformer and the text encoder of a state, averaged over the last steps, below `folder`."""
    weights = torch.load(state, weights_only=True, map_location="cpu")["average"]
    transformer, encoder = folder / "transformer", folder / "text_encoder"
    for part in (transformer, encoder):
        part.mkdir(parents=True, exist_ok=True)

    def below(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): x.contiguous() for name, x in weights.items() if name.startswith(prefix)}

    save_file({name: _stored(name, x) for name, x in below("transformer.").items()}, transformer / "model.safetensors")
    _dump(transformer / "config.json", config.to_dict())
    text = {name: x for name, x in below("text.t5.").items() if name != "encoder.embed_tokens.weight"}
    save_file(text, encoder / "model.safetensors", {"format": "pt"})
    size = {"vocab_size": len(text["shared.weight"]), "tie_word_embeddings": False, "is_encoder_decoder": False}
    _dump(encoder / "config.json", {"architectures": ["T5EncoderModel"], "model_type": "t5", **T5, **size})
    (encoder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    rows = weights["text.special"].numpy()
    np.savez(folder / FILE_NAME, caption_token=rows[:1], logo_token=rows[:1], other_tokens=rows)


def _stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a weight as an official checkpoint stores it: matrices of the layers in bfloat16."""
    return tensor.to(torch.bfloat16) if ".layers." in name and tensor.ndim == 2 else tensor


def _dump(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def main() -> None:
    """Exports."""
    parser = argparse.ArgumentParser(description="Writes a training state as model files.")
    parser.add_argument("--state", type=Path, required=True, help="state.pt of a training run")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for transformer/, text_encoder/ and special tokens"
    )
    parser.add_argument("--distilled", action="store_true", help="the state is of the distilled model")
    args = parser.parse_args()
    export(args.state, args.out, STUDENT if args.distilled else BASE)


if __name__ == "__main__":
    main()
