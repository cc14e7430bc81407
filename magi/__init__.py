"""MAGI-1 video generation in pure PyTorch.

Importing this package costs nothing: each public name is loaded from its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import MagiConfig as MagiConfig
    from .errors import MagiError as MagiError
    from .model_files.load import load_transformer as load_transformer
    from .pipeline.pipeline import MagiPipeline as MagiPipeline
    from .planning.placement import MemoryOptions as MemoryOptions
    from .sampling.captions import Caption as Caption
    from .sampling.prepare import generate_latents as generate_latents
    from .sampling.prepare import make_sampler as make_sampler
    from .sampling.special_tokens import SpecialTokens as SpecialTokens
    from .sampling.state import SamplerState as SamplerState
    from .text.clean import clean_caption as clean_caption
    from .text.embedding_cache import EmbeddingCache as EmbeddingCache
    from .text.encode import encode_prompts as encode_prompts
    from .text.encoder import TextEncoder as TextEncoder
    from .transformer.float8 import fp8_linear as fp8_linear
    from .vae.tiling import Tiling as Tiling
    from .vae.video_vae import load_vae as load_vae

__version__ = "0.1.0"  # as in pyproject.toml

_EXPORTS = {
    "Caption": "sampling.captions",
    "EmbeddingCache": "text.embedding_cache",
    "MagiConfig": "config",
    "MagiError": "errors",
    "MagiPipeline": "pipeline.pipeline",
    "MemoryOptions": "planning.placement",
    "SamplerState": "sampling.state",
    "SpecialTokens": "sampling.special_tokens",
    "TextEncoder": "text.encoder",
    "Tiling": "vae.tiling",
    "clean_caption": "text.clean",
    "encode_prompts": "text.encode",
    "fp8_linear": "transformer.float8",
    "generate_latents": "sampling.prepare",
    "load_transformer": "model_files.load",
    "load_vae": "vae.video_vae",
    "make_sampler": "sampling.prepare",
}

__all__ = sorted(_EXPORTS)


if not TYPE_CHECKING:  # a type checker would take every name for one that this finds

    def __getattr__(name: str) -> object:
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
