"""The T5 v1.1 text encoder: a prompt in, one vector per token out.

Weights stay as they are stored and mapped from disk; where that type is not the one computed in, each layer is
converted when it runs. So the 4.7 billion parameters are never in memory twice, and a float16 file, whose activations
T5 is known to overflow, is computed in float32 like every other. A device too small for all of them gets each layer in
its turn.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from warnings import warn

import torch
from torch import nn

from ..config import CAPTION_TOKENS
from ..errors import MagiError
from ..system.device import empty_cache, free_memory, retry_with_less
from ..system.finite import is_finite
from ..system.paths import user_path
from ..system.progress import OnProgress
from .embedding_cache import EmbeddingCache
from .t5_checkpoint import T5Checkpoint, find_t5_files, read_t5, t5_is_missing, unusual_options
from .t5_model import WORKING_BYTES, build_t5, resident_bytes
from .t5_tokenizer import Tokenizer, find_tokenizer, load_tokenizer, tokenizer_fingerprint

MAX_TOKENS = CAPTION_TOKENS
COMPUTE_DTYPES = (torch.float32, torch.bfloat16)

_SAMPLE_BYTES = 1 << 20
_T5_ROWS, _T5_ENTRIES = 32_128, 32_000  # of the embedding of every T5 v1.1, and of its spiece.model
_STREAMS = (
    "The text encoder does not fit into the memory of {}. Its weights stay on the host, and each layer's is copied over when it "
    "runs, which is slower. A float8 file, dtype bfloat16 or device 'cpu' avoid that."
)


def cut_notice(tokens: int, max_tokens: int) -> str:
    """Returns a line that says that a prompt is cut off."""
    return f"The prompt has {tokens} tokens; only the first {max_tokens} are used."


def check_embedding(embeds: torch.Tensor, encoder: str, remedy: str) -> None:
    """Raises MagiError if what an encoder gave can be no text: values that are no numbers, or nothing but zeros.

    Args:
        embeds: (tokens, width), at least one token.
        encoder: who gave it, as the message begins.
        remedy: what to do, as the message ends.
    """
    if not is_finite(embeds):
        what = "gave values that are no numbers (NaN or infinite)"
    elif not embeds.any():
        what = "gave nothing but zeros"
    else:
        return
    raise MagiError(f"{encoder} {what}, which no video can be made of: its weights are damaged. {remedy}")


class TextEncoder:
    """A loaded T5 encoder with its tokenizer. `with TextEncoder.load(...) as encoder:` frees it at the end."""

    def __init__(
        self,
        checkpoint: T5Checkpoint,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype,
        key: str,
        stream: bool,
        progress: OnProgress | None,
    ) -> None:
        """Builds the model; use `load`, which checks the arguments."""
        self.d_model = checkpoint.shape.d_model
        self.num_blocks = checkpoint.shape.num_layers
        self.device = device
        self.dtype = dtype
        self.fingerprint = key
        self.streaming = stream
        self._tokenizer = tokenizer
        self._checkpoint: T5Checkpoint | None = checkpoint
        self._model: Any = None
        retry_with_less(lambda: self._build(progress), self._stream)

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: OnProgress | None = None,
        *,
        stream: bool | None = None,
        make_room: Callable[[int], None] | None = None,
    ) -> "TextEncoder":
        """Loads a T5 v1.1 encoder.

        Args:
            path: the official folder (`.bin` shards), a folder of safetensors, or one file (`t5xxl_*.safetensors` in
                float32, bfloat16, float16, float8 or scaled float8).
            tokenizer: folder or file of the tokenizer, where it is not beside the weights.
            device: where it runs; the CPU by default, where the weights are only mapped.
            dtype: the type to compute in, torch.float32 (default, as the public implementation) or torch.bfloat16.
                Weights wider than this are narrowed, others stay as they are stored: bfloat16 halves what a float32
                file takes on a card.
            progress: counts the tensors placed.
            stream: the weights stay mapped on the host, and each layer's is brought to the device when it runs: slower,
                the same to the bit. None: where they do not fit into what is free on the device, or turn out not to. On
                the CPU it keeps no narrowed copies of wider weights.
            make_room: called with the bytes of device memory wanted for all weights and for running, before the
                free memory is read; not on the CPU, nor if `stream` is True.

        Raises:
            MagiError: files missing or damaged, not a T5 v1.1, no tokenizer or another model's, a device or dtype that
                cannot be used, or too little memory on the device.
        """
        dtype = _compute_dtype(dtype)
        target = _usable_device(device)
        find_t5_files(path)  # where all is missing, the error should be about the weights
        text_tokenizer = load_tokenizer(find_tokenizer(path, tokenizer))
        checkpoint = read_t5(path)
        entries, rows = text_tokenizer.vocab_size, checkpoint.shape.vocab_size
        if entries > rows or (rows == _T5_ROWS and entries < _T5_ENTRIES):
            raise MagiError(
                f"The tokenizer {str(text_tokenizer.file)!r} has {entries:,} entries, the text encoder {str(path)!r} "
                f"{'only ' * (rows < entries)}{rows:,}: they belong to different models, or the tokenizer is cut off. Give the tokenizer of t5-v1_1-xxl."
            )
        key = encoder_fingerprint(path, tokenizer, dtype)
        if stream is None:
            stream = not _fits(resident_bytes(checkpoint, target, dtype) + WORKING_BYTES, target, make_room)
        return cls(checkpoint, text_tokenizer, target, dtype, key, stream, progress)

    def encode(
        self,
        text: str,
        *,
        max_tokens: int = MAX_TOKENS,
        progress: OnProgress | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> torch.Tensor:
        """Returns the encoder's output for one text, which is taken as it is: clean it first.

        Only the text's own tokens are run. That equals a run padded to `max_tokens` and masked, as T5's positions are
        relative, and is a hundred times less work for a sentence.

        Args:
            text: any text; what goes beyond `max_tokens` is cut off, with a notice.
            max_tokens: the most tokens, the end token included.
            progress: counts the encoder blocks done.
            on_notice: called with a sentence where the text is cut off; None issues a warning.

        Returns:
            (tokens, d_model), float32, on the CPU. The last token is the end token.

        Raises:
            MagiError: the encoder is closed, memory ran out, or the weights give no usable values.
        """
        if self._checkpoint is None:
            raise MagiError("This text encoder is closed. Load it again.")
        ids = self._tokenizer.encode(text)
        if len(ids) > max_tokens:
            (on_notice or (lambda notice: warn(notice, stacklevel=3)))(cut_notice(len(ids), max_tokens))
            ids = [*ids[: max_tokens - 1], ids[-1]]
        embeds = retry_with_less(lambda: self._run(ids, progress), self._stream)
        check_embedding(embeds, f"The text encoder {str(self._checkpoint.path)!r}", "Download it again.")
        return embeds

    def close(self) -> None:
        """Frees the weights, on the device too. May be called twice."""
        self._checkpoint = None
        self._free()

    def _build(self, progress: OnProgress | None) -> None:
        assert self._checkpoint is not None  # noqa: S101 (not closed)
        self._model = build_t5(self._checkpoint, self.device, self.dtype, self.streaming, progress)

    def _free(self) -> None:
        self._model = None
        gc.collect()
        empty_cache(self.device)

    @torch.no_grad()
    def _run(self, ids: Sequence[int], progress: OnProgress | None) -> torch.Tensor:
        if self._model is None:
            self._build(None)
        with _block_progress(self._model.encoder.block, progress):
            hidden = self._model(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state
        return hidden[0].to("cpu", torch.float32)

    def _stream(self, error: BaseException) -> None:
        """Keeps the weights on the host from now on. Raises MagiError where they are there already."""
        if self.streaming:
            raise MagiError(
                f"The text encoder does not fit into the memory of {self.device}. "
                "Use device 'cpu', dtype bfloat16 or a float8 file."
            ) from error
        warn(_STREAMS.format(self.device), stacklevel=4)
        self.streaming = True
        self._free()

    def __enter__(self) -> "TextEncoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def encoder_fingerprint(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    cache: EmbeddingCache | None = None,
) -> str:
    """Returns what `TextEncoder.load(...).fingerprint` would be, 64 hexadecimal digits, without loading anything.

    It is the same for the same weights and tokenizer computed in the same dtype, wherever the files lie and whatever
    they are called. Only a few MB are read: sizes, headers and samples of the files.

    Args:
        path: as `TextEncoder.load` takes it, like `tokenizer` and `dtype`.
        tokenizer: likewise.
        dtype: likewise.
        cache: notes what is found in each place; where the files are missing (an unplugged drive, a cleaned-up disk),
            what was found there last is taken.

    Raises:
        MagiError: the weights or the tokenizer are neither there nor noted, or `dtype` cannot be computed in.
    """
    # A note stands for one place: the weights' path, the tokenizer's path, or "beside these weights". Only what is
    # wholly missing is taken from a note, the weights apart from the tokenizer; so all files that are there are hashed,
    # and changed ones never get the embeddings of the old ones.
    weights = user_path(path).resolve()
    tokenizer_place = user_path(tokenizer).resolve() if tokenizer else f"beside {weights}"
    fingerprints = [
        _noted(cache, f"weights {weights}", t5_is_missing(path), lambda: _hash_weights(path)),
        _noted(
            cache,
            f"tokenizer {tokenizer_place}",
            _tokenizer_is_missing(path, tokenizer),
            lambda: _hash_tokenizer(path, tokenizer),
        ),
    ]
    return hashlib.sha256(" ".join(["t5", str(_compute_dtype(dtype)), *fingerprints]).encode()).hexdigest()


def _noted(cache: EmbeddingCache | None, place: str, missing: bool, read: Callable[[], str]) -> str:
    """Returns the hash that `read` makes of a place's files, and notes it; the one noted before if they are missing."""
    noted = cache.recall(place) if cache and missing else None
    if noted:
        return noted
    try:
        found = read()
    except OSError as error:
        raise MagiError(f"The text encoder cannot be read: {error}. Check the disk that it is on.") from error
    if cache:
        cache.remember(place, found)
    return found


def _tokenizer_is_missing(path: str | Path, tokenizer: str | Path | None) -> bool:
    try:
        find_tokenizer(path, tokenizer)
    except MagiError:
        return True
    return False


def _hash_tokenizer(path: str | Path, tokenizer: str | Path | None) -> str:
    return tokenizer_fingerprint(find_tokenizer(path, tokenizer))


def _hash_weights(path: str | Path) -> str:
    digest = hashlib.sha256()
    for file in find_t5_files(path):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            for start in (0, size // 2, size - _SAMPLE_BYTES):
                stream.seek(max(0, start))
                digest.update(stream.read(_SAMPLE_BYTES))
    options = unusual_options(user_path(path))
    if (
        options
    ):  # usual ones leave no trace, so that the official folder and a single file without a config are the same
        digest.update(json.dumps(options, sort_keys=True).encode())
    return digest.hexdigest()


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


def _fits(nbytes: int, device: torch.device, make_room: Callable[[int], None] | None) -> bool:
    if make_room and device.type != "cpu":
        make_room(nbytes)
    empty_cache(device)
    free = free_memory(device)
    if free is None or nbytes <= free:
        return True
    warn(_STREAMS.format(device), stacklevel=3)
    return False


@contextmanager
def _block_progress(blocks: nn.ModuleList, progress: OnProgress | None) -> Iterator[None]:
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
