"""Checks for what ComfyUI or its Python lacks, before anything is imported that needs it; each problem is one line."""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

COMFYUI = "0.3.64"
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
_MODULES = {"beautifulsoup4": "bs4", "pillow": "PIL"}  # packages whose module has another name
_LINE = re.compile(r"(?P<name>[\w.-]+)\s*(?:>=\s*(?P<version>[\d.]+))?\s*(?:#.*)?")


def check_comfyui() -> None:
    """Raises ImportError, with the remedy, where ComfyUI is too old for these nodes."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        version = None  # a very old one, or another program that offers the same interface
    if (version and _numbers(version) < _numbers(COMFYUI)) or not _is_there("comfy_api.latest"):
        raise ImportError(f"MAGI-1 needs ComfyUI {COMFYUI} or newer, this is {version or 'older'}: update ComfyUI.")


def check_packages(requirements: Path = REQUIREMENTS) -> None:
    """Raises ImportError, with the remedy, for `requirements` that are missing or too old; imports none of them."""
    problems = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        match = _LINE.fullmatch(line.strip())
        if match and (problem := _problem(match["name"], match["version"])):
            problems[match["name"]] = problem
    if not problems:
        return
    remedies = []
    if problems.keys() - {"torch"}:
        remedies.append(f'run "{sys.executable}" -m pip install -r "{requirements}" and restart ComfyUI')
    if "torch" in problems:  # pip would take the build for another device
        remedies.append("update PyTorch as ComfyUI was installed (https://pytorch.org/get-started/locally/)")
    raise ImportError(f"MAGI-1 needs Python packages: {', '.join(problems.values())}. Remedy: {'; '.join(remedies)}.")


def _problem(name: str, least: str | None) -> str | None:
    if not _is_there(_MODULES.get(name, name)):
        return f"{name} is missing"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None  # installed by other means than pip: present, in an unknown version
    if least and _numbers(version) < _numbers(least):
        return f"{name} is {version}, needs {least} or newer"
    return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is missing; or something put it into sys.modules by hand
        return module in sys.modules


def _numbers(version: str) -> list[int]:
    """Returns the release numbers of a version: [2, 5, 1] of `2.5.1+cu124`, [0, 8, 0] of `0.8.0rc1`."""
    release = re.match(r"[\d.]*", version)
    return [int(number) for number in release[0].split(".") if number] if release else []
