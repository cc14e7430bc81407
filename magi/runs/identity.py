"""What decides how a video becomes, by readable names: a saved run is only resumed where all of it is the same."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..config import WITHOUT_MEANING, MagiConfig

UNKNOWN = "unknown"  # a value that cannot be told now, say because the file is away; it differs from nothing

# Entries of the official config that leave the result as it is.
_IDLE = {*WITHOUT_MEANING, "model_name"} - {"seed"}  # a plan's config holds the seed of its run
_LONG = 24  # a fingerprint's digits beyond these tell a reader nothing


def config_settings(config: MagiConfig) -> dict[str, Any]:
    """Everything of a run's config that shapes the result: size, length, steps, window, guidance, key ranges and so on."""
    return {k: v for part in config.to_dict().values() for k, v in part.items() if k not in _IDLE}


def run_key(settings: Mapping[str, Any]) -> str:
    """64 hexadecimal digits that stand for the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differences(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting in which a run differs from a saved one, with both values."""
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
        return f"{value[:_LONG]}..." if is_digest else repr(value)
    return json.dumps(value, ensure_ascii=False)
