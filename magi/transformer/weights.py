"""The transformer's weights: their names in a checkpoint, their precision, and the interface of block sources.

A model reads its blocks by iterating over a `BlockSource` once per forward iteration. Where the weights are between two
uses (on the device, in host memory, in a mapped file) is up to the source.
"""

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch

from ..checkpoint.mapped_file import TensorInfo, TensorSource, compare_shapes, first_few
from ..config import ModelConfig
from ..errors import MagiError
from .float8 import Fp8Weight, StoredFp8
from .layers import AnyLinear, Linear, Norm
from .quantised import INSTEAD, beside_weights, check_types, is_official_float8, is_plain, quantised_by, read_weight

Precision = Literal["auto", "bf16", "fp32", "fp8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
_COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}
_Weights = TypeVar("_Weights")
_REMEDY = "Download the file again, or give the config that belongs to it."
_TYPICAL = "videodit_blocks.layers.0.mlp.linear_fc2.weight"  # never float8, so its dtype is the file's

BLOCK = "videodit_blocks.layers.{}."
_FP8_PER_TENSOR = (*(f"self_attention.linear_qkv.{name}" for name in ("q", "qx", "k", "v")), "mlp.linear_fc1")
_FP8_SMOOTHED = ("self_attention.linear_proj", "mlp.linear_fc2")


@dataclass(frozen=True)
class BlockWeights:
    """Weights of one transformer layer, ready for use. `*_x` belong to cross attention."""

    gates: Linear
    qkv_norm: Norm
    q: AnyLinear
    k: AnyLinear
    v: AnyLinear
    q_x: AnyLinear
    kv_x: Linear
    q_norm: Norm
    k_norm: Norm
    q_norm_x: Norm
    k_norm_x: Norm
    proj: AnyLinear
    attn_post_norm: Norm
    mlp_norm: Norm
    fc1: AnyLinear
    fc2: AnyLinear
    mlp_post_norm: Norm


@dataclass(frozen=True)
class OuterWeights:
    """Weights outside the layers: small, float32, always on the device."""

    patch: Linear  # the 1x2x2 patch convolution as a matrix
    time_in: Linear
    time_out: Linear
    caption: Linear
    caption_condition: Linear
    null_caption: torch.Tensor  # (caption_max_length, caption_channels)
    rope_bands: torch.Tensor
    final_norm: Norm
    final: Linear


def map_tensors(weights: _Weights, change: Callable[[torch.Tensor], torch.Tensor]) -> _Weights:
    """Applies `change` to every tensor of a dataclass of tensors and such dataclasses, in the order of fields."""

    def changed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        return map_tensors(value, change) if dataclasses.is_dataclass(value) else value

    parts = {f.name: changed(getattr(weights, f.name)) for f in dataclasses.fields(weights)}  # type: ignore[arg-type]
    return dataclasses.replace(weights, **parts)  # type: ignore[type-var]


def tensors_in(weights: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of a dataclass in the order of `map_tensors`."""
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from tensors_in(value)


class BlockSource(Protocol):
    """The layers' weights in order. A block is valid until the next one is requested."""

    @property
    def on_device(self) -> Collection[int]:
        """Returns the layers that stay on the device."""
        ...

    @property
    def nbytes(self) -> int:
        """Returns the bytes of device memory in use."""
        ...

    @property
    def host_bytes(self) -> int:
        """Returns the bytes of host memory in use."""
        ...

    @property
    def pinned_bytes(self) -> int:
        """Returns the bytes of host memory that are page-locked."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Generator[BlockWeights, None, None]:
        """Yields all layers; the caller closes the generator if it stops early."""
        ...

    def keep_on_device(self, layers: Collection[int]) -> None:
        """Moves all layers but `layers` off the device."""
        ...

    def pin(self) -> None:
        """Page-locks again what `unpin` unlocked."""
        ...

    def unpin(self) -> None:
        """Makes page-locked host memory pageable between two runs."""
        ...


@dataclass(frozen=True)
class WeightReader:
    """Reads a transformer's tensors by their checkpoint names, in the precision they are used in.

    Attributes:
        source: origin of the tensors.
        config: the transformer's shape.
        device: device the tensors are moved to.
        dtype: of every tensor that is not always float32 (q, k and post norms, embeddings, final layer) or float8.
        store_fp8: store the matrices that official fp8 checkpoints quantise as weight-only float8.
    """

    source: TensorSource
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    store_fp8: bool = False

    def outer(self) -> OuterWeights:
        """Reads the weights outside the layers, float32."""

        def dense(name: str, bias: bool = True) -> Linear:
            return self._dense(name, torch.float32, bias)

        patch = self._get("x_embedder.weight", torch.float32)
        weights = OuterWeights(
            patch=Linear(patch.flatten(1)),
            time_in=dense("t_embedder.mlp.0"),
            time_out=dense("t_embedder.mlp.2"),
            caption=dense("y_embedder.y_proj_xattn.0"),
            caption_condition=dense("y_embedder.y_proj_adaln.0"),
            null_caption=self._get("y_embedder.null_caption_embedding", torch.float32),
            rope_bands=self._get("rope.bands", torch.float32),
            final_norm=self._norm("videodit_blocks.final_layernorm", torch.float32, one_p=True),
            final=dense("final_linear.linear", bias=False),
        )
        # On a CPU they may be views of a mapped file. Copies are small, and nothing that happens to the file reaches them.
        return map_tensors(weights, torch.clone) if self.device.type == "cpu" else weights

    def block(self, layer: int) -> BlockWeights:
        """Reads the weights of one layer."""
        store = self.store_fp8 and _may_be_fp8(layer, self.config)
        p, a = BLOCK.format(layer), BLOCK.format(layer) + "self_attention."
        f32, low = torch.float32, self.dtype
        return BlockWeights(
            gates=self._dense(p + "ada_modulate_layer.proj.0", low),
            qkv_norm=self._norm(a + "linear_qkv.layer_norm", low),
            q=self._linear(a + "linear_qkv.q", store),
            k=self._linear(a + "linear_qkv.k", store),
            v=self._linear(a + "linear_qkv.v", store),
            q_x=self._linear(a + "linear_qkv.qx", store),
            kv_x=self._dense(a + "linear_kv_xattn", low, bias=False),
            q_norm=self._norm(a + "q_layernorm", f32, one_p=True),
            k_norm=self._norm(a + "k_layernorm", f32, one_p=True),
            q_norm_x=self._norm(a + "q_layernorm_xattn", low, one_p=True),
            k_norm_x=self._norm(a + "k_layernorm_xattn", low, one_p=True),
            proj=self._linear(a + "linear_proj", store),
            attn_post_norm=self._norm(p + "self_attn_post_norm", f32, one_p=True),
            mlp_norm=self._norm(p + "mlp.layer_norm", low),
            fc1=self._linear(p + "mlp.linear_fc1", store),
            fc2=self._linear(p + "mlp.linear_fc2", store),
            mlp_post_norm=self._norm(p + "mlp_post_norm", f32, one_p=True),
        )

    def check_unchanged(self) -> None:
        """Raises MagiError where the source is a file that was written to since: its tensors may still be in use."""
        check = getattr(self.source, "check_unchanged", None)  # other sources have no file
        if check is not None:
            check()

    def _get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        plain = is_plain(name, self.source.tensors)
        tensor = self.source.tensor(name) if plain else read_weight(self.source, name, dtype)
        return tensor.to(self.device, dtype)

    def _dense(self, name: str, dtype: torch.dtype, bias: bool = True) -> Linear:
        return Linear(self._get(name + ".weight", dtype), self._get(name + ".bias", dtype) if bias else None)

    def _norm(self, name: str, dtype: torch.dtype, one_p: bool = False) -> Norm:
        weight, bias = self._get(name + ".weight", dtype), self._get(name + ".bias", dtype)
        return Norm(weight + 1 if one_p and self.config.apply_layernorm_1p else weight, bias)

    def _linear(self, name: str, store: bool) -> AnyLinear:
        if not is_official_float8(name, self.source.tensors):
            if store:
                return StoredFp8.quantise(read_weight(self.source, name + ".weight"), self.device)
            return self._dense(name, self.dtype, bias=False)
        smooth = name + ".smooth_scale"
        return Fp8Weight.from_official(
            self.source.tensor(name + ".weight"),
            self.source.tensor(name + ".weight_scale"),
            self.source.tensor(name + ".input_scale"),
            self.source.tensor(smooth) if smooth in self.source.tensors else None,
            self.device,
        )


def tensor_shapes(config: ModelConfig, fp8: bool = False) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor of a checkpoint; `fp8` selects the layout of the official fp8 ones."""
    d, cond, head = config.hidden_size, config.cond_size, config.kv_channels
    kv = config.num_query_groups * head
    text, patch = config.caption_channels, config.patch_size**2 * config.t_patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (d, config.in_channels, config.t_patch_size, config.patch_size, config.patch_size),
        "t_embedder.mlp.0.weight": (cond, 256),
        "t_embedder.mlp.0.bias": (cond,),
        "t_embedder.mlp.2.weight": (cond, cond),
        "t_embedder.mlp.2.bias": (cond,),
        "y_embedder.y_proj_xattn.0.weight": (d, text),
        "y_embedder.y_proj_xattn.0.bias": (d,),
        "y_embedder.y_proj_adaln.0.weight": (cond, text),
        "y_embedder.y_proj_adaln.0.bias": (cond,),
        "y_embedder.null_caption_embedding": (config.caption_max_length, text),
        "rope.bands": (head // 8,),
        "videodit_blocks.final_layernorm.weight": (d,),
        "videodit_blocks.final_layernorm.bias": (d,),
        "final_linear.linear.weight": (patch * config.out_channels, d),
    }
    block: dict[str, tuple[int, ...]] = {
        "ada_modulate_layer.proj.0.weight": (2 * d, cond),
        "ada_modulate_layer.proj.0.bias": (2 * d,),
        "self_attention.linear_qkv.q.weight": (d, d),
        "self_attention.linear_qkv.qx.weight": (d, d),
        "self_attention.linear_qkv.k.weight": (kv, d),
        "self_attention.linear_qkv.v.weight": (kv, d),
        "self_attention.linear_kv_xattn.weight": (2 * kv, d),
        "self_attention.linear_proj.weight": (d, 2 * d),
        "mlp.linear_fc1.weight": (config.fc1_size, d),
        "mlp.linear_fc2.weight": (d, config.ffn_hidden_size),
    }
    sizes = {
        "self_attention.linear_qkv.layer_norm": d,
        "mlp.layer_norm": d,
        "self_attn_post_norm": d,
        "mlp_post_norm": d,
    }
    sizes |= {f"self_attention.{x}_layernorm{kind}": head for x in "qk" for kind in ("", "_xattn")}
    block |= {f"{name}.{part}": (size,) for name, size in sizes.items() for part in ("weight", "bias")}
    for i in range(config.num_layers):
        quantised = fp8 and _may_be_fp8(i, config)
        shapes |= {BLOCK.format(i) + k: v for k, v in (_quantised(block) if quantised else block).items()}
    return shapes


def _quantised(block: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes = dict(block)
    for name in (*_FP8_PER_TENSOR, *_FP8_SMOOTHED):
        out, size = block[name + ".weight"]
        smoothed = name in _FP8_SMOOTHED
        shapes |= {f"{name}.weight": (1, out, size), f"{name}.weight_scale": (1,)}
        shapes |= {f"{name}.input_scale": (1,) if smoothed else (size,)}
        shapes |= {f"{name}.smooth_scale": (1, size)} if smoothed else {}
    return shapes


def _may_be_fp8(layer: int, config: ModelConfig) -> bool:
    return 0 < layer < config.num_layers - 1


def has_fp8(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tells whether these tensors include official fp8 layers."""
    return any(is_official_float8(name.rpartition(".")[0], tensors) for name in tensors)


def compute_dtype(
    tensors: Mapping[str, TensorInfo], precision: str = "auto", dtype: torch.dtype | None = None
) -> torch.dtype:
    """Returns the dtype in which all weights but the always-float32 and the float8 ones are stored and computed.

    Args:
        tensors: headers of a transformer's tensors.
        precision: "bf16" and "fp32" name the dtype; "auto" and "fp8" leave it to `dtype`.
        dtype: None takes the file's own: float32 for a float32 file, else bfloat16.

    Raises:
        MagiError: the precision is unknown, it contradicts `dtype`, or the layers of the file are float8.
    """
    if precision not in PRECISIONS:
        raise MagiError(f"There is no precision {precision!r}. Choose one of {', '.join(PRECISIONS)}.")
    if precision in _COMPUTE:
        if has_fp8(tensors):
            raise MagiError(
                f"The precision {precision} is chosen, but this checkpoint's layers are float8 and are computed as such. "
                "Choose auto, or the bf16 checkpoint."
            )
        if dtype not in (None, _COMPUTE[precision]):
            raise MagiError(
                f"The precision {precision} and the dtype {dtype} exclude each other. Leave out one of them."
            )
        return _COMPUTE[precision]
    return dtype or (torch.float32 if tensors[_TYPICAL].dtype == "F32" else torch.bfloat16)


def check_tensors(source: TensorSource, config: ModelConfig, label: str) -> None:
    """Compares the tensors of a checkpoint with those `config` needs, from its header alone.

    Raises:
        MagiError: tensors are missing, unexpected, of another shape or of a type that cannot be run; it names the first
            ones and the remedy.
    """
    check_types(source, label)
    beside = beside_weights(source.tensors)
    found = {name: info.shape for name, info in source.tensors.items() if name not in beside}
    wanted = tensor_shapes(config, has_fp8(source.tensors))
    faults = compare_shapes(found, wanted)
    misshapen = [f"{name} {found[name]} instead of {wanted[name]}" for name in faults.misshapen]
    problems = [
        f"{len(names)} {kind} ({first_few(names)})"
        for kind, names in (
            ("missing", faults.missing),
            ("unexpected", faults.unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        made = quantised_by(faults.unexpected)
        remedy = f"It is {made}. {INSTEAD}" if made else _REMEDY
        raise MagiError(
            f"{label} does not hold the transformer its config describes. Tensors: {'; '.join(problems)}. {remedy}"
        )
