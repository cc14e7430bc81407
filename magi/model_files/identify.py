"""Identifies a weight file by its tensors' names, shapes and dtypes, without loading them.

Only "distilled or base" does not show in the tensors. It is taken from a config beside the file, the file's metadata or the
official names; where none of them tells, the user has to choose.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..checkpoint.mapped_file import TensorInfo, first_few
from ..checkpoint.reader import Checkpoint
from ..config import MOST_LAYERS, PRESETS, MagiConfig, ModelConfig
from ..errors import MagiError
from ..system.folders import visible
from ..system.json_files import read_json
from ..system.printable import printable
from ..transformer.quantised import INSTEAD, check_types, quantised_by
from ..transformer.weights import has_fp8

Kind = Literal["transformer", "magi-1.1", "vae", "t5", "unknown"]
_NAMES = {
    "transformer": "a MAGI-1 transformer",
    "magi-1.1": "a MAGI-1.1 transformer",
    "vae": "a MAGI-1 VAE",
    "t5": "a T5 text encoder",
    "unknown": "no MAGI-1 file",
}
_LAYER = re.compile(r"videodit_blocks\.layers\.([0-9]{1,9})\.")
_ATTENTION = "videodit_blocks.layers.0.self_attention."
# Fields of ModelConfig that do not show in the tensors
_UNSEEN = (
    "layernorm_epsilon",
    "apply_layernorm_1p",
    "x_rescale_factor",
    "params_dtype",
    "xattn_cond_hidden_ratio",
    "cond_gating_ratio",
    "model_name",
)


@dataclass(frozen=True)
class Recognised:
    """What a weight file was identified as.

    Attributes:
        kind: the kind of file.
        model: sizes of a transformer, None for anything else.
        fp8: it holds official fp8 layers.
        distilled: None where nothing tells.
        evidence: what tells it.
        preset: name of the released model with these sizes ("4.5B", "24B"), None for another size.
        layers_fault: in what the number of layers disagrees with a config beside the file or the released models; "" where
            it does not. Without its last layers a file is a whole model of fewer, which runs, and makes a wrong video.
    """

    kind: Kind
    model: ModelConfig | None = None
    fp8: bool = False
    distilled: bool | None = None
    evidence: str = ""
    preset: str | None = None
    layers_fault: str = ""

    @property
    def name(self) -> str:
        """Returns a name for messages: "MAGI-1 4.5B distill fp8", or what it is instead."""
        if self.kind != "transformer":
            return _NAMES[self.kind]
        variant = {True: "distill", False: "base", None: "base or distill"}[self.distilled]
        return f"MAGI-1 {self.preset or 'of another size'} {variant}{' fp8' if self.fp8 else ''}"


def recognise(path: str | Path) -> Recognised:
    """Identifies a file or folder. Raises MagiError only where it cannot be read as safetensors at all."""
    with Checkpoint(path) as checkpoint:
        return recognise_tensors(checkpoint.tensors, checkpoint.metadata, checkpoint.path)


def recognise_tensors(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> Recognised:
    """Identifies a file by its header. `path` is used only for its names and the configs beside it."""
    kind = _kind(tensors)
    if kind != "transformer":
        return Recognised(kind)
    fp8 = has_fp8(tensors)
    model = _model_config(tensors)
    if model is None:
        return Recognised(kind, None, fp8, *_variant_by_names(metadata, path))
    preset = next((name.split("_")[0] for name, config in PRESETS.items() if config.model == model), None)
    configs = _configs_beside(path, model)
    distilled, evidence = (True, "the float8 layers") if fp8 and preset else _variant(metadata, path, configs)
    return Recognised(kind, model, fp8, distilled, evidence, preset, _layers_fault(model, metadata, configs))


def resolve_config(checkpoint: Checkpoint, config: MagiConfig | None, distilled: bool | None = None) -> MagiConfig:
    """Returns the config to load a transformer with: `config` if it fits the file, else one derived from the file.

    `distilled` is the user's choice of variant, for files that do not tell it.

    Raises:
        MagiError: the file is no MAGI-1 transformer, base and distilled are mixed up, or nothing tells which it is.
    """
    if config is not None and distilled is not None and config.engine.distill != distilled:
        chosen, settings = ("distilled", "base") if distilled else ("base", "distilled")
        raise MagiError(
            f"The variant {chosen} is chosen, but the settings are for {settings} weights. Leave out one of them."
        )
    found = recognise_tensors(checkpoint.tensors, checkpoint.metadata, checkpoint.path)
    label = repr(str(checkpoint.path))
    if found.kind == "transformer":
        check_types(checkpoint, label)
    if found.kind == "magi-1.1":
        raise MagiError(
            f"{label} is a MAGI-1.1 checkpoint, whose stacked tensors have another layout that is not supported. "
            "Use a MAGI-1 one: `python -m magi download --list` names them."
        )
    if found.kind != "transformer" or found.model is None:
        hints = {
            "vae": "Give it as the VAE.",
            "t5": "Give it as the text encoder.",
            "transformer": "The tensors that tell its sizes are missing or of impossible shapes. Download it again.",
        }
        holds = f"It holds {first_few(list(checkpoint.tensors)) or 'no tensors'}. Choose another file."
        hint = hints.get(found.kind, holds)
        known = f"{found.name}, " if found.kind in ("vae", "t5") else ""
        made = quantised_by(checkpoint.tensors)
        hint = f"It is {made}. {INSTEAD}" if made else hint
        raise MagiError(f"{label} is {known}not a MAGI-1 transformer. {hint}")
    if config is None and found.layers_fault:
        raise MagiError(f"{label} does not hold all layers that it should: {found.layers_fault}.")
    asked = config.engine.distill if config else distilled
    if asked is None and found.distilled is None:
        raise MagiError(
            f"{label} does not tell whether it holds base or distilled weights (their tensors look alike), and the wrong "
            "choice ruins the picture. Choose the variant: base or distilled."
        )
    if None not in (asked, found.distilled) and asked != found.distilled:
        holds, settings = ("distilled", "base") if found.distilled else ("base", "distilled")
        raise MagiError(
            f"{label} holds {holds} weights (so says {found.evidence}), but the settings are for {settings} ones. "
            f"Choose the variant {holds}."
        )
    if config is not None:
        return config
    variant = bool(found.distilled if asked is None else asked)
    beside = (c for _, c in _fitting(_configs_beside(checkpoint.path, found.model), found.model))
    beside = (c for c in beside if c.engine.distill == variant)
    return next(beside, None) or _made_config(found, found.model, variant)


def _made_config(found: Recognised, model: ModelConfig, distilled: bool) -> MagiConfig:
    name = f"{found.preset}_{'distill' if distilled else 'base'}{'_quant' if found.fp8 else ''}"
    if name in PRESETS:
        return PRESETS[name]
    return MagiConfig(model).as_variant(distilled, found.fp8)


def _kind(tensors: Mapping[str, TensorInfo]) -> Kind:
    if "videodit_blocks.layers.self_attention.linear_qkv.weight" in tensors:
        return "magi-1.1"
    if "x_embedder.weight" in tensors and any(_LAYER.match(name) for name in tensors):
        return "transformer"
    if "decoder.last_layer.weight" in tensors or "encoder.patch_embed.proj.weight" in tensors:
        return "vae"
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in tensors:
        return "t5"
    return "unknown"


def _model_config(tensors: Mapping[str, TensorInfo]) -> ModelConfig | None:
    """Derives the sizes from the shapes; returns None where the tensors needed for that are missing."""
    try:
        hidden, channels, t_patch, patch, _ = tensors["x_embedder.weight"].shape
        head = tensors[_ATTENTION + "q_layernorm.weight"].shape[0]
        caption_length, caption_channels = tensors["y_embedder.null_caption_embedding"].shape
        ffn = tensors["videodit_blocks.layers.0.mlp.linear_fc2.weight"].shape[-1]
        cond = tensors["t_embedder.mlp.2.weight"].shape[0]
        duplicated = channels == 32  # latents have 16 channels
        return ModelConfig(
            num_layers=min(MOST_LAYERS, 1 + max(int(m[1]) for m in map(_LAYER.match, tensors) if m)),
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=hidden // head,
            num_query_groups=tensors[_ATTENTION + "linear_qkv.k.weight"].shape[-2] // head,
            kv_channels=head,
            x_rescale_factor=0.1 if duplicated else 1,  # holds for the released models
            half_channel_vae=duplicated,
            patch_size=patch,
            t_patch_size=t_patch,
            in_channels=channels,
            out_channels=tensors["final_linear.linear.weight"].shape[0] // (patch * patch * t_patch),
            cond_hidden_ratio=cond / hidden,
            caption_channels=caption_channels,
            caption_max_length=caption_length,
            gated_linear_unit=tensors["videodit_blocks.layers.0.mlp.linear_fc1.weight"].shape[-2] == 2 * ffn,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError, MagiError):
        return None


_Configs = list[tuple[Path, MagiConfig]]


def _layers_fault(model: ModelConfig, metadata: Mapping[str, str], configs: _Configs) -> str:
    """Says in what the number of layers disagrees; files of random weights may have fewer, by their metadata."""
    layers = model.num_layers
    if metadata.get("layers") == str(layers) or _fitting(configs, model):
        return ""
    again = "Download the file again, with all its shards"
    for file, config in configs:
        return (
            f"it holds {layers}, and {printable(file.name)} near it says {config.model.num_layers}. {again}, or put the "
            "config.json that belongs to it beside it"
        )
    for name, config in PRESETS.items():
        if replace(config.model, num_layers=layers) == model and layers < config.model.num_layers:
            return (
                f"it holds {layers}, and the released model that has its sizes, {name.split('_')[0]}, {config.model.num_layers}. "
                f"{again}, or put a config.json with this number beside it if it is meant so"
            )
    return ""


def _configs_beside(path: Path, model: ModelConfig) -> _Configs:
    """Finds configs of a transformer of these sizes, in the folder of the weights or else in its parent.

    Those of another number of layers are left out where one has the right one.

    Raises:
        MagiError: the config.json in the folder of the weights cannot be read. Other files that cannot are left out with
            a warning.
    """
    path = path.absolute()
    folders = (path, path.parent) if path.is_dir() else (path.parent, path.parent.parent)
    others: _Configs = []
    for folder in folders:
        found = []
        try:
            files = visible(folder, "*config*.json")
        except MagiError:  # a folder may give its files to who knows their names
            continue
        for file in files:
            config = _transformer_config(file, needed=folder == folders[0] and file.name == "config.json")
            if config is not None and _same_sizes(config.model, model):
                found.append((file, config))
        if fitting := _fitting(found, model):
            return fitting
        others += found
    return others


def _fitting(configs: _Configs, model: ModelConfig) -> _Configs:
    return [(file, config) for file, config in configs if config.model.num_layers == model.num_layers]


def _transformer_config(file: Path, needed: bool) -> MagiConfig | None:
    """Reads the config of a transformer; returns None, with a warning, for one of no use, and for other JSON."""
    try:
        data = read_json(file)
        return MagiConfig.from_dict(data) if isinstance(data, dict) and "model_config" in data else None
    except MagiError as error:  # perhaps of another model
        warnings.warn(f"The config {str(file)!r} is left out. {error}", stacklevel=2)
    except (OSError, ValueError) as error:
        if needed:
            raise MagiError(
                f"The config {str(file)!r} beside the weights cannot be read: {error}. Download it again, or remove it."
            ) from error
        warnings.warn(f"The file {str(file)!r} is left out, as it cannot be read: {error}.", stacklevel=2)
    return None


def _same_sizes(config: ModelConfig, model: ModelConfig) -> bool:
    """Tells whether sizes are equal but for the number of layers, and for what no tensor shows."""
    unseen = ("num_layers", *_UNSEEN)
    return replace(config, **{name: getattr(model, name) for name in unseen}) == model


def _variant(metadata: Mapping[str, str], path: Path, configs: _Configs) -> tuple[bool | None, str]:
    """Returns whether the weights are distilled and what tells it, by configs beside them or names."""
    if len({config.engine.distill for _, config in configs}) == 1:
        file, config = configs[0]
        return config.engine.distill, f"the config {printable(file.name)}"
    return _variant_by_names(metadata, path)


def _variant_by_names(metadata: Mapping[str, str], path: Path) -> tuple[bool | None, str]:
    path = path.absolute()  # for the names of its parents
    for key in ("variant", "distill", "model"):
        if key in metadata and (variant := _variant_in(metadata[key], metadata=True)) is not None:
            return variant, f"the metadata of {printable(path.name)}"
    # Official names: 4.5B_base/inference_weight, 4.5B_distill/inference_weight.distill, ...
    for name in (path.name, path.parent.name, path.parent.parent.name):
        if re.search(r"magi|\d+b[_.-]|inference_weight", name.lower()) and (variant := _variant_in(name)) is not None:
            return variant, f"the name {printable(name)}"
    return None, ""


def _variant_in(text: str, metadata: bool = False) -> bool | None:
    words = set(re.split(r"[^a-z]+", text.lower()))
    if words & {"distill", "distilled"} or (metadata and "true" in words):
        return True
    if "base" in words or (metadata and "false" in words):
        return False
    return None
