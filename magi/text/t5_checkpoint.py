"""T5 v1.1 encoder weights in the layouts people have, mapped from disk under one set of names.

Read are a folder of `.bin` shards (the official one), a folder of safetensors, and a single `.safetensors` or `.bin`
file, in float32, bfloat16, float16 or float8 (plain, or scaled: a multiplier beside each linear weight). Names and
sizes are checked here, before transformers is imported or anything is moved.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.file_guard import FileGuard
from ..checkpoint.mapped_file import compare_shapes, first_few
from ..checkpoint.reader import Checkpoint, find_weight_files, indexed_files
from ..errors import MagiError
from ..system.folders import visible, what_is_at
from ..system.json_files import read_json
from ..system.paths import user_path
from ..system.printable import printable
from .torch_file import map_torch_file

_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_EMBEDDING = "shared.weight"
_EMBEDDING_ALIAS = "encoder.embed_tokens.weight"
_ATTENTION = "encoder.block.{}.layer.0.SelfAttention."
_MLP = "encoder.block.{}.layer.1.DenseReluDense."
_BLOCK_INDEX = re.compile(r"encoder\.block\.(\d+)\.")
_XXL_WIDTH, _XXL_LAYERS = 4096, 24
_SHARD_NUMBER = re.compile(r"-\d+(?=-of-\d+\.bin$)")
_LINEAR = re.compile(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i_0|i_1|o))\.weight$")
_SCALES = (".scale_weight", ".weight_scale")
# What scaled float8 files hold besides: the marker, and what only float8 products (rather than float8 storage) use.
_UNUSED = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$|^(decoder|lm_head)\.")


@dataclass(frozen=True)
class T5Shape:
    """Sizes of a T5 v1.1 encoder, in transformers' names. The last two are in no tensor: these are every T5 v1.1's."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of such an encoder, by name."""
        inner = self.num_heads * self.d_kv
        shapes: dict[str, tuple[int, ...]] = {
            _EMBEDDING: (self.vocab_size, self.d_model),
            "encoder.final_layer_norm.weight": (self.d_model,),
            _ATTENTION.format(0) + "relative_attention_bias.weight": (
                self.relative_attention_num_buckets,
                self.num_heads,
            ),
        }
        for i in range(self.num_layers):
            attention, mlp = _ATTENTION.format(i), _MLP.format(i)
            shapes |= {f"{attention}{part}.weight": (inner, self.d_model) for part in "qkv"}
            shapes[f"{attention}o.weight"] = (self.d_model, inner)
            shapes |= {f"{mlp}{part}.weight": (self.d_ff, self.d_model) for part in ("wi_0", "wi_1")}
            shapes[f"{mlp}wo.weight"] = (self.d_model, self.d_ff)
            shapes |= {f"encoder.block.{i}.layer.{part}.layer_norm.weight": (self.d_model,) for part in (0, 1)}
        return shapes


_ONLY_IN_CONFIG = ("layer_norm_epsilon", "relative_attention_max_distance")
_USUAL = {name: getattr(T5Shape, name) for name in _ONLY_IN_CONFIG}


@dataclass(frozen=True)
class T5Checkpoint:
    """An encoder's weights as stored: views of the mapped files, never to be written to.

    `scales` holds the multipliers of scaled float8 weights, float32, under the name of the weight they belong to.
    """

    shape: T5Shape
    tensors: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]
    path: Path
    guard: FileGuard


def find_t5_files(path: str | Path) -> list[Path]:
    """Returns the weight files of a folder or file, in a stable order; only an index is read. A shard stands for all.

    Raises:
        MagiError: nothing is there, a shard is missing, or the folder holds several checkpoints.
    """
    path = user_path(path)
    there = what_is_at(path)
    if there == "nothing":
        raise MagiError(
            f"The text encoder is not at {str(path)!r}. Give its path, or fetch it with `python -m magi download t5`."
        )
    if _SHARD_NUMBER.search(path.name) and there == "file":
        return [file for file in visible(path.parent, "*.bin") if _set_of(file) == _set_of(path)]
    if there == "file" or visible(path, "*.safetensors") or visible(path, "*.safetensors.index.json"):
        return find_weight_files(path)
    indices = visible(path, "*.bin.index.json")
    if indices:
        return indexed_files(*indices)
    files = visible(path, "pytorch_model*.bin")
    if not files:
        raise MagiError(
            f"The folder {str(path)!r} holds no text encoder: neither a .safetensors nor a pytorch_model*.bin file is in it. "
            "Give the t5-v1_1-xxl folder or a t5xxl file; `python -m magi download` fetches the official one."
        )
    encoders = {_set_of(file): file.name for file in reversed(files)}
    if len(encoders) > 1:
        raise MagiError(
            f"The folder {str(path)!r} holds several text encoders: {first_few(sorted(encoders.values()))}. Give one of these files, or "
            "remove what does not belong."
        )
    return files


def _set_of(file: Path) -> str:
    """Returns what the names of a checkpoint's shards share."""
    return _SHARD_NUMBER.sub("", file.name)


def _is_part(path: Path) -> bool:
    """Returns whether a path stands for the weights of its folder: an index or a shard."""
    return path.name.endswith(".index.json") or _SHARD_NUMBER.search(path.name) is not None


def t5_is_missing(path: str | Path) -> bool:
    """Returns whether all weight files of a folder, index or file are missing, not only some of them.

    Raises:
        MagiError: the system does not let one look.
    """
    path = user_path(path)
    folder = path.parent if path.name.endswith(".index.json") else path
    there = what_is_at(folder)
    if there != "folder":
        return there == "nothing"
    return not any(file.suffix in (".safetensors", *_TORCH_SUFFIXES) for file in visible(folder, "*"))


def read_t5(path: str | Path) -> T5Checkpoint:
    """Maps the encoder of a folder or file. A decoder in it is left out.

    Raises:
        MagiError: a file is missing, damaged or of another kind, the model is no T5 v1.1 encoder or not what its
            config.json says, or a tensor is missing, unexpected, of the wrong shape, of a type other than floating
            point, or nothing but zeros.
    """
    path = user_path(path)
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    files = find_t5_files(path)
    try:
        guard = FileGuard(files)
    except OSError as error:
        raise MagiError(f"The text encoder in {str(path)!r} cannot be read: {error}.") from error
    for name, tensor in _map_files(path, files).items():
        suffix = next((s for s in _SCALES if name.endswith(s)), None)
        if suffix:
            scales[name.removesuffix(suffix) + ".weight"] = tensor.float()
        elif not _UNUSED.search(name):
            tensors[name] = tensor
    alias = tensors.pop(_EMBEDDING_ALIAS, None)  # the same table by its second name: files hold either or both
    if alias is not None:
        tensors.setdefault(_EMBEDDING, alias)
    shape = _shape_of(tensors, path)
    shape = _with_config(shape, read_config(path), path)
    _check(tensors, scales, shape, path)
    if scales:
        _check_scales(tensors, scales, path)
    return T5Checkpoint(shape, tensors, scales, path, guard)


def _map_files(path: Path, files: Sequence[Path]) -> dict[str, torch.Tensor]:
    if files[0].suffix not in _TORCH_SUFFIXES:
        with Checkpoint(path) as checkpoint:
            checkpoint.check_whole()
            return {name: checkpoint.tensor(name) for name in checkpoint if not _UNUSED.search(name)}
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        found = map_torch_file(file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise MagiError(
                f"{first_few(twice)} is both in {str(file)!r} and in a shard before it. Remove the file that does not belong."
            )
        tensors |= found
    return tensors


def _shape_of(tensors: dict[str, torch.Tensor], path: Path) -> T5Shape:
    if _MLP.format(0) + "wi.weight" in tensors:
        raise MagiError(f"{str(path)!r} is a T5 of the first version; MAGI-1 was trained with T5 v1.1 (t5-v1_1-xxl).")
    if _ATTENTION.format(1) + "relative_attention_bias.weight" in tensors:
        raise MagiError(f"{str(path)!r} is a UMT5 encoder; MAGI-1 was trained with T5 v1.1 (t5-v1_1-xxl).")
    attention = _ATTENTION.format(0)
    telling = [_EMBEDDING, attention + "relative_attention_bias.weight", attention + "q.weight"]
    telling.append(_MLP.format(0) + "wi_0.weight")
    if not any(name.startswith("encoder.block.") for name in tensors):
        found = first_few(sorted(tensors)) or "no tensor"
        raise MagiError(
            f"{str(path)!r} is not a T5 encoder: it holds no encoder.block.* ({found}). Give the t5-v1_1-xxl folder or a t5xxl file."
        )
    absent = [name for name in telling if name not in tensors or tensors[name].dim() != 2]
    if absent:
        raise MagiError(f"The T5 in {str(path)!r} lacks {', '.join(absent)}. Download it again, with all its shards.")
    embedding, bias, query, gate = (tensors[name] for name in telling)
    heads = max(1, bias.shape[1])
    return T5Shape(
        vocab_size=embedding.shape[0],
        d_model=embedding.shape[1],
        d_kv=query.shape[0] // heads,
        d_ff=gate.shape[0],
        num_layers=len({match[1] for match in map(_BLOCK_INDEX.match, tensors) if match}),
        num_heads=heads,
        relative_attention_num_buckets=bias.shape[0],
    )


def read_config(path: Path) -> dict[str, Any]:
    """Returns the config.json of a folder, or of that of an index or a shard; an empty one where there is none.

    Raises:
        MagiError: it is unreadable, or describes another kind of model.
    """
    file = (path.parent if _is_part(path) else path) / "config.json"
    if what_is_at(file) == "nothing":
        return {}
    try:
        config = read_json(file)
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise MagiError(f"{str(file)!r} is not a readable T5 config: {error}. Download it again.") from error
    kind, act = config.get("model_type", "t5"), config.get("feed_forward_proj", "gated-gelu")
    if kind != "t5" or act != "gated-gelu":
        raise MagiError(
            f"{str(file)!r} describes a {printable(kind)} model with a {printable(act)} MLP; "
            "MAGI-1 was trained with T5 v1.1 (t5, gated-gelu)."
        )
    return config


def unusual_options(path: Path) -> dict[str, Any]:
    """Returns what the config.json of a path changes in the results, against every T5 v1.1. Raises as `read_config`."""
    config = read_config(path)
    return {name: config[name] for name in _ONLY_IN_CONFIG if config.get(name, _USUAL[name]) != _USUAL[name]}


def _with_config(shape: T5Shape, config: Mapping[str, Any], path: Path) -> T5Shape:
    """Returns `shape` with what only the config knows; all else that it says must be as the tensors are."""
    differs = {
        name: size
        for name, size in asdict(shape).items()
        if name not in _ONLY_IN_CONFIG and config.get(name, size) != size
    }
    if differs:
        name, size = next(iter(differs.items()))
        raise MagiError(
            f"The T5 in {str(path)!r} has {name} {size:,} by its tensors, and {printable(repr(config[name]))} by its config.json: "
            "they belong to different models, or part of the weights is missing. Download both again."
        )
    epsilon, distance = ({**_USUAL, **config}[name] for name in _ONLY_IN_CONFIG)
    is_number = type(epsilon) in (float, int) and 0 <= epsilon < 1
    # Half the buckets of each direction are for single distances, the others for all up to this one
    is_distance = type(distance) is int and shape.relative_attention_num_buckets // 4 < distance < 1 << 20
    for name, value, usable in (
        ("layer_norm_epsilon", epsilon, is_number),
        ("relative_attention_max_distance", distance, is_distance),
    ):
        if not usable:
            raise MagiError(
                f"The config.json of {str(path)!r} is not a readable T5 config: {name} cannot be {printable(repr(value))}. "
                "Download it again."
            )
    return replace(shape, layer_norm_epsilon=float(epsilon), relative_attention_max_distance=distance)


def _check(tensors: dict[str, torch.Tensor], scales: dict[str, torch.Tensor], shape: T5Shape, path: Path) -> None:
    expected = shape.tensors()
    found = compare_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    faults = {
        "missing": found.missing,
        "unexpected": found.unexpected,
        "of the wrong shape": found.misshapen,
        "of a type that cannot be used (float32, bfloat16, float16 and float8 can)": [
            f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
            for name, tensor in tensors.items()
            if not tensor.is_floating_point()
        ],
        "scaled in a way that cannot be used (one scale per linear layer, or one per output, can)": [
            name
            for name, scale in scales.items()
            if not _LINEAR.search(name) or name not in expected or scale.numel() not in (1, expected[name][0])
        ],
    }
    faults["nothing but zeros, as a download that broke off leaves them"] = [
        name for name, tensor in tensors.items() if tensor.dim() and tensor.numel() and _is_zero(tensor)
    ]
    for fault, names in faults.items():
        if names:
            raise MagiError(
                f"The T5 in {str(path)!r} has {len(names)} tensors {fault}: {first_few(names)}. "
                "Download it again, with all its shards, or choose another t5xxl file."
            )
    if shape.d_model == _XXL_WIDTH and shape.num_layers != _XXL_LAYERS:
        raise MagiError(
            f"The T5 in {str(path)!r} has {shape.num_layers} layers, and T5 v1.1 XXL, which is as wide, {_XXL_LAYERS}: "
            "part of it is missing, or it is another model. Download it again, with all its shards."
        )


def _is_zero(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is all zeros; reads a few values unless those are."""
    values = tensor.contiguous().view(torch.uint8)  # not every torch can compare float8
    return not bool(values[len(values) // 2].any()) and not bool(values.any())


def _check_scales(tensors: dict[str, torch.Tensor], scales: dict[str, torch.Tensor], path: Path) -> None:
    faults = {
        "no scale": [name for name, tensor in tensors.items() if _is_float8(name, tensor) and name not in scales],
        "a scale that is no number, or zero": [
            name for name, scale in scales.items() if not scale.isfinite().all() or not scale.any()
        ],
    }
    for fault, names in faults.items():
        if names:
            raise MagiError(
                f"The scaled float8 T5 in {str(path)!r} is damaged: {len(names)} of its linear layers have {fault}: "
                f"{first_few(names)}. Download it again, or choose another t5xxl file."
            )


def _is_float8(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dtype.itemsize == 1 and _LINEAR.search(name) is not None
