"""Weights that other programs quantised: float8 with a scale is read exactly, anything else is named and refused.

Read are matrices of plain float8, which is a number like any other, and of float8 with one multiplier for all of it or
for each row (`scale_weight` in older files of ComfyUI, `weight_scale` with `comfy_quant` in newer ones). The official
float8 layers are another matter (`float8.py`): their weights have three axes.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from ..checkpoint.mapped_file import TensorInfo, TensorSource, first_few
from ..errors import MagiError
from ..system.json_files import parse_json
from ..system.printable import printable

_FLOATS = ("F64", "F32", "F16", "BF16")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (".scale_weight", ".weight_scale")
# What is beside a scaled weight and changes no weight: markers, and what only float8 activations need.
_BESIDE = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|scale_input|input_scale)$")
_FORMAT = ".comfy_quant"  # JSON as bytes: {"format": "float8_e4m3fn"}
# Signs of formats that cannot be read, by the ends of names
_OTHERS = {
    "a LoRA, which belongs on top of a model": (".lora_A.weight", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "quantised by bitsandbytes": (".absmax", ".quant_map", ".SCB", ".weight.quant_state.bitsandbytes__nf4"),
    "quantised by GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "scaled block by block": (".weight_scale_inv", ".weight_scale_2", ".weight_scales"),
}
INSTEAD = "Take a bf16 or fp16 file, or an official fp8 one: `python -m magi download --list` names the official files."
_CONVERSION_ROWS = 256  # of a matrix, converted at a time


def is_official_float8(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Tells whether `name` + ".weight" is a float8 layer of the official layout."""
    weight = tensors.get(name + ".weight")
    return weight is not None and len(weight.shape) == 3 and name + ".weight_scale" in tensors


def scale_of(weight: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Returns the name of the scale that another program put beside a weight; None for a weight without one."""
    name = weight.removesuffix(".weight")
    if name == weight or is_official_float8(name, tensors):
        return None
    return next((name + suffix for suffix in _SCALES if name + suffix in tensors), None)


def is_plain(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Tells whether a tensor is stored in a type to compute with, and without a scale."""
    return tensors[name].dtype not in _FLOAT8 and scale_of(name, tensors) is None


def beside_weights(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Returns the names of what is in a file because other programs quantised it: scales and markers."""
    scales = {scale_of(name, tensors) for name in tensors}
    markers = {
        name for name in tensors if _BESIDE.search(name) and not is_official_float8(name.rpartition(".")[0], tensors)
    }
    return markers | {name for name in scales if name is not None}


def read_weight(source: TensorSource, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Reads a tensor as numbers: one that is scaled is multiplied out, in float32, and rounded once.

    Args:
        source: its tensors.
        name: of the tensor.
        dtype: None leaves the type of the file, but bfloat16 for float8.
    """
    stored, scale = source.tensor(name), scale_of(name, source.tensors)
    if scale is None:
        is_float8 = source.tensors[name].dtype in _FLOAT8
        return stored.to(dtype or torch.bfloat16) if is_float8 or dtype else stored
    factor = source.tensor(scale).float().reshape(-1, 1)  # (1 or out, 1)
    out = torch.empty(stored.shape, dtype=dtype or torch.bfloat16, device=stored.device)
    for start in range(0, len(stored), _CONVERSION_ROWS):
        rows = slice(start, start + _CONVERSION_ROWS)
        out[rows] = stored[rows].float() * (factor if len(factor) == 1 else factor[rows])
    return out


def check_types(source: TensorSource, label: str) -> None:
    """Refuses weights that are no floating-point numbers, or scaled in a way that is not known here.

    Raises:
        MagiError: such tensors are there; it says what they are as far as can be told, and what to take instead.
    """
    tensors = source.tensors
    beside = beside_weights(tensors)
    made = _made_by(source)
    made = f" It is {made}." if made else ""
    wrong = [f"{printable(name)} {info.dtype}" for name, info in tensors.items() if _wrong_type(name, tensors, beside)]
    if wrong:
        raise MagiError(
            f"{label} holds {len(wrong)} tensors of a type that cannot be run as weights ({first_few(wrong)}): they must be "
            f"BF16, F16, F32 or float8.{made} {INSTEAD}"
        )
    wrong = [
        f"{printable(name)} with a scale {tensors[scale].shape}"
        for name in tensors
        if (scale := scale_of(name, tensors)) and not _fits(tensors[name], tensors[scale])
    ]
    if wrong:
        raise MagiError(
            f"{label} holds {len(wrong)} weights that are scaled in a way that cannot be read ({first_few(wrong)}): one scale "
            f"for a matrix or for each of its rows can.{made} {INSTEAD}"
        )


def quantised_by(names: Iterable[str]) -> str:
    """Says what made a file that has such names, where that is nothing that can be read; "" where nothing tells."""
    names = list(names)
    return next((what for what, ends in _OTHERS.items() if any(name.endswith(ends) for name in names)), "")


def _made_by(source: TensorSource) -> str:
    marker = next((name for name in source.tensors if name.endswith(_FORMAT)), None)
    if marker is None:
        return quantised_by(source.tensors)
    try:
        found = parse_json(bytes(source.tensor(marker).flatten()[:1000].tolist()))["format"]
    except (ValueError, KeyError, TypeError, MagiError):
        return "quantised by ComfyUI"
    return f"quantised by ComfyUI in the format {printable(found, 40)}"


def _wrong_type(name: str, tensors: Mapping[str, TensorInfo], beside: set[str]) -> bool:
    dtype, base = tensors[name].dtype, name.rpartition(".")[0]
    if name in beside:
        return False
    if is_official_float8(base, tensors):
        return dtype != "F8_E4M3" if name.endswith(".weight") else dtype not in _FLOATS
    return dtype not in (*_FLOATS, *_FLOAT8)


def _fits(weight: TensorInfo, scale: TensorInfo) -> bool:
    """Tells whether a scale is one for a matrix, or one for each of its rows."""
    rows = weight.shape[0] if len(weight.shape) == 2 else 0
    ways = ((), (1,), (1, 1), (rows,), (rows, 1))
    return rows > 0 and scale.dtype in _FLOATS and scale.shape in ways
