"""The T5 v1.1 text encoder: a prompt in, one vector per token out.

Weights stay as they are stored and mapped from disk; where that type is not the one computed in, each layer is converted
when it runs. So the 4.7 billion parameters never stand in memory twice, and a float16 file, whose activations T5 is known
to overflow, is computed in float32 like every other.
"""

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any
from warnings import warn

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import MagiError
from .t5_checkpoint import T5Checkpoint, T5Shape, find_t5_files, read_t5
from .t5_tokenizer import Tokenizer, find_tokenizer, load_tokenizer

MAX_TOKENS = 800
COMPUTE_DTYPES = (torch.float32, torch.bfloat16)

Progress = Callable[[int, int], None]
"""Called with (done, total). An exception it raises stops the work."""

_SAMPLE_BYTES = 1 << 20


class TextEncoder:
    """A loaded T5 encoder with its tokenizer. `with TextEncoder.load(...) as encoder:` frees it at the end."""

    def __init__(
        self, model: nn.Module, shape: T5Shape, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype, key: str
    ) -> None:
        """Use `load`."""
        self.d_model = shape.d_model
        self.num_blocks = shape.num_layers
        self.device = device
        self.dtype = dtype
        self.fingerprint = key
        self._tokenizer = tokenizer
        self._model: Any = model

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> "TextEncoder":
        """Loads a T5 v1.1 encoder.

        Args:
            path: the official folder (`.bin` shards), a folder of safetensors, or one file (`t5xxl_*.safetensors` in
                float32, bfloat16, float16, float8 or scaled float8).
            tokenizer: folder or file of the tokenizer, where it is not beside the weights.
            device: where it runs; the CPU by default, where the weights are only mapped.
            dtype: what is computed in, torch.float32 (default, as the reference) or torch.bfloat16. Weights wider than
                this are narrowed, others stay as they are stored: bfloat16 halves what a float32 file takes on a card.
            progress: counts the tensors placed.

        Raises:
            MagiError: files missing or damaged, not a T5 v1.1, no tokenizer or another model's, a device or dtype that
                cannot be used, or too little memory on the device.
        """
        dtype = _compute_dtype(dtype)
        target = _usable_device(device)
        words = load_tokenizer(find_tokenizer(path, tokenizer))
        checkpoint = read_t5(path)
        if words.vocab_size > checkpoint.shape.vocab_size:
            raise MagiError(
                f"The tokenizer {str(words.file)!r} has {words.vocab_size:,} entries, the text encoder {str(path)!r} only "
                f"{checkpoint.shape.vocab_size:,}: they belong to different models. Give the tokenizer of t5-v1_1-xxl."
            )
        with _clear_memory_errors(target):
            model = _build(checkpoint, target, dtype, progress)
        return cls(model, checkpoint.shape, words, target, dtype, encoder_fingerprint(path, tokenizer, dtype))

    def encode(self, text: str, *, max_tokens: int = MAX_TOKENS, progress: Progress | None = None) -> torch.Tensor:
        """The encoder's output for one text, as is: clean it first.

        Only the text's own tokens are run. That equals a run padded to `max_tokens` and masked, as T5's positions are
        relative, and is a hundred times less work for a sentence.

        Args:
            text: any text; what goes beyond `max_tokens` is cut off, with a warning.
            max_tokens: the most tokens, the end token included.
            progress: counts the encoder blocks done.

        Returns:
            (tokens, d_model), float32, on the CPU. The last token is the end token.

        Raises:
            MagiError: the encoder is closed, memory ran out, or the weights give values that are not finite.
        """
        if self._model is None:
            raise MagiError("This text encoder is closed. Load it again.")
        ids = self._tokenizer.encode(text)
        if len(ids) > max_tokens:
            warn(f"The prompt has {len(ids)} tokens; only the first {max_tokens} are used.", stacklevel=2)
            ids = [*ids[: max_tokens - 1], ids[-1]]
        with torch.no_grad(), _block_progress(self._model.encoder.block, progress), _clear_memory_errors(self.device):
            hidden = self._model(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state
            embeds = hidden[0].to("cpu", torch.float32)
        if not embeds.isfinite().all():
            raise MagiError(
                "The text encoder gave values that are not finite: its weights are damaged. Download it again."
            )
        return embeds

    def close(self) -> None:
        """Frees the weights, on the device too. May be called twice."""
        self._model = None
        gc.collect()
        backend: Any = getattr(torch, self.device.type, None)
        if hasattr(backend, "empty_cache"):
            backend.empty_cache()

    def __enter__(self) -> "TextEncoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def encoder_fingerprint(path: str | Path, tokenizer: str | Path | None = None, dtype: torch.dtype | None = None) -> str:
    """What `TextEncoder.load(...).fingerprint` would be, without loading anything.

    It is the same for the same weights and tokenizer computed in the same dtype, wherever the files lie and whatever they
    are called. Only a few MB are read: sizes, headers and samples of the files.

    Raises:
        MagiError: the weights or the tokenizer are not there, or `dtype` cannot be computed in.
    """
    digest = hashlib.sha256(f"t5 {_compute_dtype(dtype)} ".encode())
    digest.update(load_tokenizer(find_tokenizer(path, tokenizer)).fingerprint().encode())
    for file in find_t5_files(path):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            for start in (0, size // 2, size - _SAMPLE_BYTES):
                stream.seek(max(0, start))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class _StoredLinear(nn.Module):
    """A linear layer without bias whose weight (out, in) is converted to the input's dtype when it runs.

    `scale` multiplies the output: one number, or one an output.
    """

    # T5's MLP converts its input to `wo.weight`'s dtype where that is a tensor, which would be float8 here.
    weight = None
    stored: torch.Tensor
    scale: torch.Tensor | None

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("stored", stored)
        self.register_buffer("scale", None if scale is None else scale.flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.stored.to(x.dtype))
        return y if self.scale is None else (y * self.scale).to(x.dtype)


class _StoredEmbedding(nn.Module):
    """A lookup table (entries, width) of which only the rows looked up are converted to `dtype`."""

    stored: torch.Tensor

    def __init__(self, stored: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("stored", stored)
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.stored.dtype.itemsize == 1:  # not every torch can index float8
            return self.stored.view(torch.uint8)[ids].view(self.stored.dtype).to(self.dtype)
        return self.stored[ids].to(self.dtype)


def _build(checkpoint: T5Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress | None) -> nn.Module:
    import transformers  # here: it takes seconds

    config = transformers.T5Config(**asdict(checkpoint.shape), feed_forward_proj="gated-gelu")
    try:
        with torch.device("meta"):
            model: Any = transformers.T5EncoderModel(config)
    except ImportError as error:  # it hides its models from a torch that is too old for it
        raise MagiError(
            f"transformers {transformers.__version__} does not work with torch {torch.__version__}. "
            'Update torch, or install an older one: pip install "transformers<5".'
        ) from error
    plain: dict[str, torch.Tensor] = {}
    for done, (name, tensor) in enumerate(checkpoint.tensors.items(), 1):
        stored = _place(tensor, device, dtype)
        module_name = name.removesuffix(".weight")
        scale = checkpoint.scales.get(name)
        if name == "shared.weight":
            if stored.dtype == dtype:
                model.shared.weight = nn.Parameter(stored, requires_grad=False)
            else:
                model.shared = _StoredEmbedding(stored, dtype)
        elif isinstance(model.get_submodule(module_name), nn.Linear) and (stored.dtype != dtype or scale is not None):
            parent, _, child = module_name.rpartition(".")
            layer = _StoredLinear(stored, None if scale is None else scale.to(device))
            setattr(model.get_submodule(parent), child, layer)
        else:
            plain[name] = stored.to(dtype)
        if progress:
            progress(done, len(checkpoint.tensors))
    model.encoder.embed_tokens = model.shared
    model.load_state_dict(plain, strict=False, assign=True)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise MagiError(
            f"transformers {transformers.__version__} names the layers of T5 differently ({empty[0]}). Install 4.44 to 5."
        )
    return model.eval().requires_grad_(False)


def _place(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The tensor on the device, in its own dtype if that is no wider than `dtype`: on the CPU then the mapped one itself."""
    kept = tensor.dtype if tensor.dtype.itemsize <= dtype.itemsize else dtype
    if kept.itemsize == 1 and not _holds(device, kept):
        kept = torch.bfloat16  # holds every float8 value exactly
    return tensor.to(kept).to(device)


def _holds(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        torch.zeros(1).to(dtype).to(device).to(torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def _compute_dtype(dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in COMPUTE_DTYPES:
        raise MagiError(
            f"The text encoder cannot compute in {dtype} (T5 overflows float16). Use torch.float32 or torch.bfloat16; "
            "weights stored in other types are used as they are."
        )
    return dtype


def _usable_device(device: str | torch.device | None) -> torch.device:
    try:
        target = torch.device("cpu" if device is None else device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch without CUDA asserts
        raise MagiError(f"The device {str(device)!r} cannot be used ({error}). Use 'cpu'.") from error
    return target


@contextmanager
def _clear_memory_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MagiError(
            f"The text encoder does not fit into the memory of {device}. Use device 'cpu', dtype bfloat16 or a float8 file."
        ) from error


@contextmanager
def _block_progress(blocks: nn.ModuleList, progress: Progress | None) -> Iterator[None]:
    """Calls `progress` after every block; what it raises comes out of the model's forward."""
    handles = []
    if progress:
        for done, block in enumerate(blocks, 1):
            handles.append(block.register_forward_hook(lambda *_, done=done: progress(done, len(blocks))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
