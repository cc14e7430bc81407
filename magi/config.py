"""Configuration: frozen dataclasses that read and write the official three-part JSON, and the six released models.

Field names are the official ones, so that a config file and this code can be read side by side.
"""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from .errors import MagiError
from .system.json_files import read_json
from .system.printable import printable

LATENT_CHANNELS = 16
SPATIAL_DOWNSAMPLE = 8  # pixels per latent pixel along height and along width, by the VAE's patch
TEMPORAL_DOWNSAMPLE = 4  # video frames per latent frame, likewise
FPS = 24
CAPTION_TOKENS = 800  # of a prompt, at most
LATENT_SCALE = 0.18215  # latents outside the VAE = its means * this
SHORTCUT_MODES = ("8,16,16", "16,16,8")

# Every entry of the official JSON is read by name somewhere in this code, or stands in one of these two tables.
# What only one value is implemented for; another one is refused, since it would ruin the picture:
ONLY: Mapping[str, str | float] = {
    "model_name": "videodit_ardf",
    "xattn_cond_hidden_ratio": 1.0,
    "cond_gating_ratio": 1.0,
    "t_patch_size": 1,
    "scale_factor": LATENT_SCALE,
    "temporal_downsample_factor": TEMPORAL_DOWNSAMPLE,
}
# What is read and written again but changes no video here, and why:
WITHOUT_MEANING: Mapping[str, str] = {
    **dict.fromkeys(
        ("distributed_backend", "distributed_timeout_minutes", "pp_size", "cp_size", "cp_strategy"),
        "one process computes on one device",
    ),
    "ulysses_overlap_degree": "one process computes on one device",
    "kv_offload": "where keys lie is decided by the free memory",
    "enable_cuda_graph": "it is a matter of speed",
    "params_dtype": "the type of the weights in the file decides, or the `dtype` given",
    **dict.fromkeys(("seed", "t5_device"), "it is given for each run"),
    **dict.fromkeys(("load", "t5_pretrained", "vae_pretrained"), "paths on the machine that wrote the file"),
}

# Entries that count something, at least one
_MODEL_COUNTS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "patch_size"),
    *("in_channels", "out_channels", "caption_channels", "caption_max_length"),
)
_RUN_COUNTS = ("num_frames", "video_size_h", "video_size_w", "num_steps", "window_size", "fps", "chunk_width")
_LARGEST = 1 << 24  # of any number in a config: far beyond every model, so that none takes time or memory without end
_MOST_WARNINGS = 20
MOST_LAYERS = 1000  # of a transformer


@dataclass(frozen=True)
class ModelConfig:
    """The transformer's shape (arXiv 2505.13211, section 2.2; `model_config` of the official JSON)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int = 8
    kv_channels: int = 128  # size of one head
    layernorm_epsilon: float = 1e-6
    apply_layernorm_1p: bool = True
    x_rescale_factor: float = 1
    half_channel_vae: bool = False  # latents are fed twice: 16 channels become 32
    params_dtype: str = "torch.bfloat16"
    patch_size: int = 2
    t_patch_size: int = 1
    in_channels: int = LATENT_CHANNELS
    out_channels: int = LATENT_CHANNELS
    cond_hidden_ratio: float = 0.25
    caption_channels: int = 4096
    caption_max_length: int = CAPTION_TOKENS
    xattn_cond_hidden_ratio: float = 1.0
    cond_gating_ratio: float = 1.0
    gated_linear_unit: bool = False  # SwiGLU; GELU otherwise
    model_name: str = "videodit_ardf"

    @property
    def cond_size(self) -> int:
        """Returns the width of the condition vector (time and caption)."""
        return int(self.hidden_size * self.cond_hidden_ratio)

    @property
    def fc1_size(self) -> int:
        """Returns the rows of the first MLP matrix: value and gate together for SwiGLU."""
        return self.ffn_hidden_size * (2 if self.gated_linear_unit else 1)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Returns the number of query heads, of K/V heads, and the size of one."""
        return self.num_attention_heads, self.num_query_groups, self.kv_channels

    def __post_init__(self) -> None:
        _check_only(self)
        for name in _MODEL_COUNTS:
            value, most = getattr(self, name), MOST_LAYERS if name == "num_layers" else _LARGEST
            if not 1 <= value <= most:
                raise MagiError(
                    f"{name} is {value}; it must be from 1 to {most}. Use the JSON that came with the weights."
                )
        if self.hidden_size != self.num_attention_heads * self.kv_channels:
            raise MagiError(
                f"hidden_size {self.hidden_size} is not num_attention_heads {self.num_attention_heads} x kv_channels "
                f"{self.kv_channels}: the config does not describe a MAGI-1 transformer. Use the JSON that came with the weights."
            )
        if self.num_query_groups < 1 or self.num_attention_heads % self.num_query_groups:
            raise MagiError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}. Use the JSON that came with the weights."
            )


@dataclass(frozen=True)
class RuntimeConfig:
    """How a video is sampled (`runtime_config` of the official JSON)."""

    cfg_number: int = 3  # passes per step: 3 for base models, 1 for distilled ones
    cfg_t_range: tuple[float, ...] = (0.0, 0.0217, 0.1, 0.3, 0.999)
    prev_chunk_scales: tuple[float, ...] = (1.5, 1.5, 1.5, 1.0, 1.0)
    text_scales: tuple[float, ...] = (7.5, 7.5, 7.5, 0.0, 0.0)
    noise2clean_kvrange: tuple[int, ...] = (5, 4, 3, 2)  # chunks seen, noisiest stage first; empty: all
    clean_chunk_kvrange: int = 1  # the same for clean chunks; -1: the last of noise2clean_kvrange
    clean_t: float = 0.9999
    seed: int = 1234
    num_frames: int = 96
    video_size_h: int = 720
    video_size_w: int = 720
    num_steps: int = 64
    window_size: int = 4  # chunks denoised at a time
    fps: int = FPS
    chunk_width: int = 6  # latent frames a chunk
    t5_pretrained: str = ""
    t5_device: str = "cpu"
    vae_pretrained: str = ""
    scale_factor: float = LATENT_SCALE
    temporal_downsample_factor: int = TEMPORAL_DOWNSAMPLE
    load: str = ""

    def __post_init__(self) -> None:
        _check_only(self)
        if self.cfg_number not in (1, 3):
            raise MagiError(f"cfg_number is {self.cfg_number}; it must be 3 (base models) or 1 (distilled models).")
        if not len(self.cfg_t_range) == len(self.prev_chunk_scales) == len(self.text_scales):
            raise MagiError(
                f"cfg_t_range, prev_chunk_scales and text_scales have {len(self.cfg_t_range)}, {len(self.prev_chunk_scales)} "
                f"and {len(self.text_scales)} entries; give them equally many."
            )
        clean = self.clean_chunk_kvrange
        if any(r < 1 for r in self.noise2clean_kvrange) or (clean < 1 and clean != -1):
            raise MagiError(
                f"Key ranges count chunks, the chunk itself included, so they are at least 1: noise2clean_kvrange is "
                f"{list(self.noise2clean_kvrange)}, clean_chunk_kvrange {clean} (-1 stands for the last of those)."
            )


@dataclass(frozen=True)
class EngineConfig:
    """What the official engine needs to know; only the last four matter here (`WITHOUT_MEANING`; `engine_config` of the official JSON)."""

    distributed_backend: str = "nccl"
    distributed_timeout_minutes: int = 10
    pp_size: int = 1
    cp_size: int = 1
    cp_strategy: str = "none"
    ulysses_overlap_degree: int = 1
    kv_offload: bool = False
    enable_cuda_graph: bool = False
    fp8_quant: bool = False
    distill: bool = False
    distill_nearly_clean_chunk_threshold: float = 0.3
    shortcut_mode: str = SHORTCUT_MODES[0]

    def __post_init__(self) -> None:
        if self.shortcut_mode not in SHORTCUT_MODES:
            raise MagiError(
                f"shortcut_mode is {printable(repr(self.shortcut_mode))}; it must be one of {', '.join(map(repr, SHORTCUT_MODES))}."
            )


_Part = TypeVar("_Part", ModelConfig, RuntimeConfig, EngineConfig)


@dataclass(frozen=True)
class MagiConfig:
    """A model and how to sample from it, in the three parts of the official JSON."""

    model: ModelConfig
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.engine.distill and self.runtime.cfg_number != 1:
            raise MagiError(
                f"distill is true but cfg_number is {self.runtime.cfg_number}: distilled models take one pass. "
                "Set cfg_number to 1, or distill to false for base weights."
            )
        if not self.engine.distill and self.runtime.cfg_number != 3:
            raise MagiError(
                f"distill is false but cfg_number is {self.runtime.cfg_number}: base models take three passes. "
                "Set cfg_number to 3, or distill to true for distilled weights."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "MagiConfig":
        """Builds a config from the official JSON object. Missing entries take their defaults, unknown ones are ignored with a warning."""
        try:
            model, runtime, engine = (dict(data.get(f"{part}_config", {})) for part in ("model", "runtime", "engine"))
        except (AttributeError, TypeError, ValueError) as error:
            raise MagiError(
                "A MAGI-1 config is a JSON object with model_config, runtime_config and engine_config."
            ) from error
        return cls(_part(ModelConfig, model), _part(RuntimeConfig, runtime), _part(EngineConfig, engine))

    @classmethod
    def from_json(cls, path: str | Path) -> "MagiConfig":
        """Reads a config from an official JSON file."""
        try:
            data = read_json(Path(path))
        except (OSError, ValueError) as error:
            raise MagiError(
                f"The config {str(path)!r} is unreadable: {error}. Give the JSON that came with the weights."
            ) from error
        if not isinstance(data, dict) or "model_config" not in data:
            raise MagiError(
                f"{str(path)!r} is no MAGI-1 config: it has no model_config. Give the JSON that came with the weights."
            )
        return cls.from_dict(data)

    @classmethod
    def preset(cls, name: str) -> "MagiConfig":
        """Returns the config of the released model `name`, e.g. "4.5B_distill_quant", with the published defaults."""
        if name not in PRESETS:
            raise MagiError(f"There is no model {name!r}. The released ones: {', '.join(PRESETS)}.")
        return PRESETS[name]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the official JSON object."""
        parts: dict[str, ModelConfig | RuntimeConfig | EngineConfig] = {
            "model_config": self.model,
            "runtime_config": self.runtime,
            "engine_config": self.engine,
        }
        return {
            key: {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(part).items()}
            for key, part in parts.items()
        }

    def with_runtime(self, **changes: Any) -> "MagiConfig":
        """Returns a copy with some runtime settings changed; None leaves a setting as it is."""
        changes = {k: v for k, v in changes.items() if v is not None}
        return dataclasses.replace(self, runtime=dataclasses.replace(self.runtime, **changes))

    def with_engine(self, **changes: Any) -> "MagiConfig":
        """Returns a copy with some engine settings changed; None leaves a setting as it is."""
        changes = {k: v for k, v in changes.items() if v is not None}
        return dataclasses.replace(self, engine=dataclasses.replace(self.engine, **changes))

    def with_guidance(self, text: float | None = None, prev: float | None = None) -> "MagiConfig":
        """Returns a copy with guidance of another strength; None leaves the model's own.

        Args:
            text: in place of every text scale that is not 0, the value that switches it off.
            prev: in place of every previous-chunk scale that is not 1, likewise.

        Raises:
            MagiError: a scale is negative or no number, or the model is a distilled one.
        """
        for name, scale in (("text", text), ("previous-chunk", prev)):
            if scale is not None and not 0 <= scale < math.inf:
                raise MagiError(f"The {name} guidance is {scale}; it must be 0 or more.")
        if text is None and prev is None:
            return self
        if self.engine.distill:
            given = ", ".join(f"{scale:g}" for scale in (text, prev) if scale is not None)
            raise MagiError(
                f"Distilled models take no guidance ({given} is given). Leave it out: 0 in the sampler node."
            )
        runtime = self.runtime
        return self.with_runtime(
            text_scales=None if text is None else tuple(s and text for s in runtime.text_scales),
            prev_chunk_scales=None if prev is None else tuple(s if s == 1 else prev for s in runtime.prev_chunk_scales),
        )

    def with_layers(self, layers: int) -> "MagiConfig":
        """Returns a copy with another number of transformer layers. Raises MagiError for one that cannot be."""
        if not 1 <= layers <= MOST_LAYERS:
            raise MagiError(f"A model cannot have {layers} layers. Choose 1 to {self.model.num_layers}.")
        return dataclasses.replace(self, model=dataclasses.replace(self.model, num_layers=layers))

    def as_variant(self, distill: bool, fp8: bool | None = None) -> "MagiConfig":
        """Returns the same transformer with the settings of base (three passes) or distilled (one pass) weights."""
        runtime = dataclasses.replace(self.runtime, cfg_number=1 if distill else 3)
        fp8 = self.engine.fp8_quant if fp8 is None else fp8
        return MagiConfig(self.model, runtime, dataclasses.replace(self.engine, distill=distill, fp8_quant=fp8))


def _check_only(part: "ModelConfig | RuntimeConfig") -> None:
    """Raises MagiError for a value that the official code knows and this one does not."""
    for name, only in ONLY.items():
        value = getattr(part, name, only)
        if value != only:
            raise MagiError(
                f"The config's {name} is {printable(repr(value))}, and this code does {only!r} only, as all released models want. "
                "Use the JSON that came with the weights; other models cannot be run."
            )


def _part(kind: type[_Part], data: dict[str, Any]) -> _Part:
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name in [name for name in data if name not in known][:_MOST_WARNINGS]:
        close = difflib.get_close_matches(name[:100], known, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        warnings.warn(f"The config entry {printable(name)!r} is unknown and ignored.{hint}", stacklevel=3)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
    for name, value in values.items():
        if not _is_a(value, known[name].type):
            raise MagiError(
                f"The config entry {name!r} is {printable(repr(data[name]))}, of the wrong type. Use the JSON of the weights."
            )
        least = 1 if name in _RUN_COUNTS else -_LARGEST
        if name != "seed" and not all(least <= n <= _LARGEST for n in _numbers(value)):
            raise MagiError(
                f"The config entry {name!r} is {printable(repr(data[name]))}, which no model has. Use the JSON of the weights."
            )
    try:
        return kind(**values)
    except TypeError as error:
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]
        raise MagiError(
            f"The config lacks {', '.join(missing) or error} in {kind.__name__}. Use the JSON of the weights."
        ) from error


def _numbers(value: Any) -> list[int | float]:
    """Returns the numbers of an entry: it is one, or a tuple of them, or none."""
    return [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, int | float)]


def _is_a(value: Any, wanted: Any) -> bool:
    """Returns whether a value read from JSON may stand where a field of this type is; tuples are all of numbers."""
    if get_origin(wanted) is tuple:
        return isinstance(value, tuple) and all(_is_a(v, get_args(wanted)[0]) for v in value)
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


_SIZE_4_5B = ModelConfig(num_layers=34, hidden_size=3072, ffn_hidden_size=12288, num_attention_heads=24)
_SIZE_24B = ModelConfig(
    num_layers=48,
    hidden_size=6144,
    ffn_hidden_size=16384,
    num_attention_heads=48,
    x_rescale_factor=0.1,
    half_channel_vae=True,
    in_channels=32,
    out_channels=32,
    gated_linear_unit=True,
)


def _preset(model: ModelConfig, steps: int, width: int, distill: bool = False, fp8: bool = False) -> MagiConfig:
    runtime = RuntimeConfig(cfg_number=1 if distill else 3, num_steps=steps, video_size_h=720, video_size_w=width)
    return MagiConfig(model, runtime, EngineConfig(distill=distill, fp8_quant=fp8))


PRESETS: Mapping[str, MagiConfig] = {
    "4.5B_base": _preset(_SIZE_4_5B, 64, 720),
    "4.5B_distill": _preset(_SIZE_4_5B, 64, 720, distill=True),
    "4.5B_distill_quant": _preset(_SIZE_4_5B, 64, 720, distill=True, fp8=True),
    "24B_base": _preset(_SIZE_24B, 32, 1280),
    "24B_distill": _preset(_SIZE_24B, 16, 1280, distill=True),
    "24B_distill_quant": _preset(_SIZE_24B, 16, 1280, distill=True, fp8=True),
}
