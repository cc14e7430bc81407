"""The settings that shape a video, by readable names: a saved run is resumed only where all of them are the same."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ..config import WITHOUT_MEANING, MagiConfig

_DIGEST = re.compile("[0-9a-f]{64}")
_MOST_SHOWN = 200  # characters of a value
UNKNOWN = "unknown"  # a value that cannot be known now, as when its file is missing; it agrees with every value

# Entries of the official config that do not change the result.
_WITHOUT_EFFECT = {*WITHOUT_MEANING, "model_name"} - {"seed"}  # a plan's config holds the seed of its run
# Names in a saved run -> words of the user's. What is not here is an entry of the model's config.
_WORDS = {
    "attention": "the attention kernel",
    "captions": "the prompts' embeddings",
    "clean_prompt": "the cleaning of prompts",
    "compiled": "compiling",
    "continue_seconds": "how much of the clip is looked at",
    "dtype": "the compute type",
    "duration_tokens": "the use of duration tokens",
    "fit": "how the picture or clip is fitted",
    "image": "the picture",
    "image_content": "the content of the picture",
    "latents": "the latents to start from",
    "model": "the transformer's file",
    "negative_tokens": "the use of negative tokens",
    "num_frames": "the number of frames",
    "num_steps": "the number of steps",
    "precision": "the precision",
    "prompt": "the prompt",
    "seed": "the seed",
    "size_asked_for": "the size asked for",
    "special_tokens": "the special tokens' file",
    "style_tokens": "the style",
    "text_encoder": "the text encoder",
    "vae": "the VAE's file",
    "vae_dtype": "the VAE's compute type",
    "video": "the clip",
    "video_content": "the content of the clip",
    "video_size_h": "the height",
    "video_size_w": "the width",
    "window_size": "the window",
}


def config_settings(config: MagiConfig) -> dict[str, Any]:
    """Returns all of a run's config that shapes the result: size, length, steps, window, guidance, K/V ranges ..."""
    return {k: v for part in config.to_dict().values() for k, v in part.items() if k not in _WITHOUT_EFFECT}


def run_key(settings: Mapping[str, Any]) -> str:
    """Returns 64 hexadecimal digits that identify the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differences(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Returns one phrase for each setting in which a run differs from a saved one, with both values where people can read them."""
    found = []
    for name in sorted({**settings, **saved}):
        mine, theirs = settings.get(name), saved.get(name)
        if mine != theirs and UNKNOWN not in (mine, theirs):
            word = _WORDS.get(name, f"the config's {name}")
            digests = any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (mine, theirs))
            values = "not the same" if digests else f"{_shown(mine)}, the saved run's {_shown(theirs)}"
            found.append(f"{word} is {values}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        text = ", ".join(_shown(item) for item in value if item is not None) or "nothing"
    elif isinstance(value, bool):
        text = "on" if value else "off"
    else:
        text = "not given" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
