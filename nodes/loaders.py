"""Loaders: they find and check files by their headers; weights are read when a sampler or decoder needs them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from comfy_api.latest import io

from ..magi.checkpoint.reader import find_weight_files
from ..magi.errors import MagiError
from ..magi.model_files.embedded import is_embedded
from ..magi.model_files.load import check_transformer
from ..magi.planning.placement import MemoryOptions
from ..magi.sampling.special_tokens import SpecialTokens
from ..magi.transformer.compiled import check_compile
from ..magi.transformer.weights import Precision
from .comfyui import host, menus, schema
from .comfyui.families import family_of_width
from .comfyui.graph import graph_of
from .comfyui.memory import WholeModelPatcher
from .comfyui.models import Encoder, MagiTransformer, Model
from .comfyui.preflight import check_encoder, check_loaders
from .comfyui.vae import manage_vae

_PRECISION: dict[str, Precision] = {"auto": "auto", "bf16": "bf16", "fp32": "fp32", "fp8 storage": "fp8"}
_VARIANT = {"auto": None, "base": False, "distilled": True}
_SWITCH = {"auto": None, "on": True, "off": False}
_ATTENTION = ["auto", "flash", "efficient", "math", "sage"]


class Magi1ModelLoader(io.ComfyNode):
    """Finds a transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1ModelLoader",
            display_name="MAGI-1 Model Loader",
            aliases=["magi", "load magi", "video model"],
            description="Chooses a MAGI-1 transformer. It is read when a sampler runs, and stays loaded until room is needed.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=menus.model_menu(),
                    default=menus.AUTO,
                    tooltip=(
                        "auto: the best released model that is installed, else the embedded one, which needs no download and "
                        "knows moving shapes. Released models belong in models/magi1/ckpt/magi; other files may lie in "
                        "models/magi1 or models/diffusion_models."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=list(_PRECISION),
                    default="auto",
                    tooltip="auto: as the file has it; fp32 for an embedded model. fp8 storage halves what the weights of a bf16 file take on a graphics card, at a small loss; on a CPU it only costs time.",
                ),
                io.Combo.Input(
                    "variant",
                    options=list(_VARIANT),
                    default="auto",
                    tooltip=(
                        "Base models take three passes per step, distilled ones one. auto: as the file or its folder says; "
                        "choose only where it cannot tell. The wrong one ruins the picture."
                    ),
                ),
                schema.advanced(
                    io.Combo.Input(
                        "attention",
                        options=_ATTENTION,
                        default="auto",
                        tooltip="auto: PyTorch's fastest. sage needs the package sageattention, which is a little less exact.",
                    )
                ),
                schema.Memory.Input(
                    "memory", optional=True, tooltip="Only to override what is decided from the free memory."
                ),
                schema.advanced(
                    io.Boolean.Input(
                        "compile",
                        default=False,
                        optional=True,
                        tooltip="Has torch.compile make the layers' kernels: faster after a first step that takes minutes. Needs a C++ compiler, and Triton for a graphics card. The last bits of the video differ.",
                    )
                ),
            ],
            outputs=[schema.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool:
        """Returns True for any file: the node itself says what is missing, where front ends show it in full."""
        return True

    @classmethod
    def fingerprint_inputs(cls, model: str | None = None, **others: Any) -> Any:
        """Returns names, sizes and times of the files, so that one that was replaced is read again."""
        return _fingerprint(menus.find_model, model)

    @classmethod
    def execute(
        cls,
        model: str,
        precision: str,
        variant: str,
        attention: str = "auto",
        memory: Any = None,
        compile: bool = False,
    ) -> io.NodeOutput:
        """Returns the model, of whose files only the headers are read."""
        check_loaders(graph_of(cls.hidden.dynprompt), cls.hidden.unique_id)
        name = menus.chosen("model", model)
        shown = host.show_text(cls.hidden.unique_id, menus.notice(model, name))
        path, kind = menus.find_model(name), _PRECISION[precision]
        if kind == "auto" and is_embedded(path):
            kind = "fp32"
        config = check_transformer(
            path, distilled=_VARIANT[variant], device=host.device(), precision=kind, attention=attention
        )
        if compile:
            check_compile(host.device())
        transformer = MagiTransformer(path, config, kind, attention, memory or MemoryOptions(), compile)
        found = menus.special_tokens_of(path)
        tokens = SpecialTokens.load(found) if found else None  # where a sampler needs them, it names what is missing
        family = menus.FAMILIES.get(name) or family_of_width(config.model.caption_channels)
        return io.NodeOutput(Model(name, config, tokens, WholeModelPatcher(transformer), family), ui=shown)


class Magi1MemoryOptions(io.ComfyNode):
    """Overrides for experts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1MemoryOptions",
            display_name="MAGI-1 Memory Options",
            aliases=["low vram", "offload", "block swap", "streaming"],
            description="What goes where in memory. Everything on auto is what happens without this node.",
            inputs=[
                io.Float.Input(
                    "budget_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="Device memory to use in all, in GB of 10^9 bytes. 0: what is free.",
                ),
                io.Combo.Input(
                    "streaming",
                    options=list(_SWITCH),
                    default="auto",
                    tooltip="auto: as many layers stay on the device as fit, the others are fetched ahead of their turn. on: all are fetched. off: all stay.",
                ),
                io.Combo.Input(
                    "pinned_memory",
                    options=list(_SWITCH),
                    default="auto",
                    tooltip="Where fetched layers wait. on: all in page-locked RAM. off: in the file, which is read in each step. auto: in RAM as far as it goes.",
                ),
                io.Combo.Input(
                    "cache",
                    options=["auto", "device", "host"],
                    default="auto",
                    tooltip="Where the K/V of finished chunks are kept. host saves device memory and costs next to nothing. auto: what is faster.",
                ),
            ],
            outputs=[schema.Memory.Output(display_name="memory")],
        )

    @classmethod
    @schema.checked
    def execute(
        cls, budget_gb: float, streaming: str, pinned_memory: str, cache: Literal["auto", "device", "host"]
    ) -> io.NodeOutput:
        """Returns the options."""
        budget = round(budget_gb * 1e9) or None
        return io.NodeOutput(MemoryOptions(budget, _SWITCH[streaming], _SWITCH[pinned_memory], cache))


class Magi1VAELoader(io.ComfyNode):
    """Finds a VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1VAELoader",
            display_name="MAGI-1 VAE Loader",
            aliases=["magi vae", "load vae"],
            description="Chooses MAGI-1's VAE. Its output also goes into ComfyUI's own VAE nodes.",
            inputs=[
                io.Combo.Input(
                    "vae",
                    options=menus.vae_menu(),
                    default=menus.AUTO,
                    tooltip="auto: the one that fits the model loader's auto. The official one belongs in models/magi1/ckpt/vae. An embedded one goes with the embedded model of the same name only.",
                ),
                schema.advanced(
                    io.Combo.Input(
                        "precision",
                        options=["auto", "bf16", "fp16", "fp32"],
                        default="auto",
                        tooltip="auto: bf16, as MAGI-1 was published; fp32 for an embedded one. fp32 is exact and slower.",
                    )
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, vae: str | None = None) -> bool:
        """Returns True for any file: the node itself says what is missing, where front ends show it in full."""
        return True

    @classmethod
    def fingerprint_inputs(cls, vae: str | None = None, **others: Any) -> Any:
        """Returns names, sizes and times of the files, so that one that was replaced is read again."""
        return _fingerprint(menus.find_vae, vae)

    @classmethod
    def execute(cls, vae: str, precision: str = "auto") -> io.NodeOutput:
        """Returns the VAE, of whose file only the header is read."""
        check_loaders(graph_of(cls.hidden.dynprompt), cls.hidden.unique_id)
        name = menus.chosen("vae", vae)
        shown = host.show_text(cls.hidden.unique_id, menus.notice(vae, name))
        auto = torch.float32 if name in menus.FAMILIES else torch.bfloat16
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        managed = manage_vae(menus.find_vae(name), dtypes.get(precision, auto), menus.FAMILIES.get(name))
        return io.NodeOutput(managed, ui=shown)


class Magi1TextEncoderLoader(io.ComfyNode):
    """Finds a T5."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1TextEncoderLoader",
            display_name="MAGI-1 Text Encoder Loader",
            aliases=["t5", "t5xxl", "magi text encoder"],
            description=(
                "Chooses a T5 v1.1 XXL encoder. It is loaded for prompts that were not encoded before, and freed afterwards. "
                "A t5xxl file that you have for other models also works through ComfyUI's Load CLIP (type mochi)."
            ),
            inputs=[
                io.Combo.Input(
                    "encoder",
                    options=menus.encoder_menu(),
                    default=menus.AUTO,
                    tooltip="auto: the one that fits the model loader's auto. The official one belongs in models/magi1/ckpt/t5/t5-v1_1-xxl, single t5xxl files in models/text_encoders.",
                ),
                io.Combo.Input(
                    "device",
                    options=["cpu", "gpu"],
                    default="cpu",
                    tooltip="cpu needs no graphics memory and takes up to a minute per prompt; gpu is faster; an encoder that does not fit there is copied over layer by layer.",
                ),
                schema.advanced(
                    io.Combo.Input(
                        "precision",
                        options=["fp32", "bf16"],
                        default="fp32",
                        tooltip="The type to compute in. fp32 is what MAGI-1 was published with; bf16 takes half the memory.",
                    )
                ),
            ],
            outputs=[schema.TextEncoder.Output(display_name="encoder")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, encoder: str | None = None) -> bool:
        """Returns True for any file: the node itself says what is missing, where front ends show it in full."""
        return True

    @classmethod
    def fingerprint_inputs(cls, encoder: str | None = None, **others: Any) -> Any:
        """Returns names, sizes and times of the files, so that one that was replaced is read again."""
        return _fingerprint(lambda name: menus.find_encoder(name)[0], encoder)

    @classmethod
    def execute(cls, encoder: str, device: str, precision: str = "fp32") -> io.NodeOutput:
        """Returns where the encoder and its tokenizer are and how to run them; nothing is read."""
        check_loaders(graph_of(cls.hidden.dynprompt), cls.hidden.unique_id)
        check_encoder(encoder)
        name = menus.chosen("encoder", encoder)
        shown = host.show_text(cls.hidden.unique_id, menus.notice(encoder, name))
        path, tokenizer = menus.find_encoder(name)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        where = host.device() if device == "gpu" else torch.device("cpu")
        return io.NodeOutput(Encoder(path, tokenizer, where, dtype, menus.FAMILIES.get(name)), ui=shown)


def _fingerprint(find: Callable[[str], Path], name: str | None) -> str:
    """Returns a hash of path, size and time of every file; nothing where there is none, which validation reports.

    A hash, as ComfyUI writes it into the metadata of what it saves, and folders are nobody's business.
    """
    try:
        path = find(name or menus.AUTO)
        found = sorted(path.iterdir()) if path.is_dir() else find_weight_files(path)
        files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found if file.is_file()]
    except (MagiError, OSError):
        return ""
    return hashlib.sha256(repr(files).encode("utf-8", "surrogatepass")).hexdigest()
