"""MAGI-1 video generation in pure PyTorch.

Importing this package costs nothing: each public name is loaded from its module when it is first used.
"""

from importlib import import_module

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


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
