"""MAGI-1 video generation in pure PyTorch.

Importing this package costs nothing: each public name is loaded from its module when it is first used.
"""

from importlib import import_module

_EXPORTS = {
    "Caption": "prompt",
    "EmbeddingCache": "text.embedding_cache",
    "MagiConfig": "config",
    "MagiError": "errors",
    "MagiPipeline": "pipeline",
    "MemoryOptions": "placement",
    "SamplerState": "sampler_state",
    "SpecialTokens": "special_tokens",
    "TextEncoder": "text.text_encoder",
    "Tiling": "tiling",
    "clean_caption": "text.caption",
    "encode_prompts": "text.prompt_encoding",
    "fp8_linear": "quant",
    "generate_latents": "generate",
    "load_transformer": "load",
    "load_vae": "vae",
    "make_sampler": "generate",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
