"""The settings that shape a video, by readable names: a saved run is resumed only where all of them are the same."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..config import WITHOUT_MEANING, MagiConfig

UNKNOWN = "unknown"  # a value that cannot be known now, as when its file is missing; it agrees with every value

# Entries of the official config that do not change the result.
_WITHOUT_EFFECT = {*WITHOUT_MEANING, "model_name"} - {"seed"}  # a plan's config holds the seed of its run
_SHOWN_DIGITS = 24  # of a fingerprint: enough to compare by eye


def config_settings(config: MagiConfig) -> dict[str, Any]:
    """Returns all of a run's config that shapes the result: size, length, steps, window, guidance, K/V ranges ..."""
    return {k: v for part in config.to_dict().values() for k, v in part.items() if k not in _WITHOUT_EFFECT}


def run_key(settings: Mapping[str, Any]) -> str:
    """Returns 64 hexadecimal digits that identify the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differences(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Returns one phrase for each setting in which a run differs from a saved one, with both values."""
    found = []
    for name in sorted({**settings, **saved}):
        mine, theirs = settings.get(name), saved.get(name)
        if mine != theirs and UNKNOWN not in (mine, theirs):
            found.append(f"{name.replace('_', ' ')} is {_shown(mine)}, the saved run's is {_shown(theirs)}")
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, str):
        is_digest = len(value) == 64 and set(value) <= set("0123456789abcdef")
        return f"{value[:_SHOWN_DIGITS]}..." if is_digest else repr(value)
    return json.dumps(value, ensure_ascii=False)
