"""Text embeddings kept on disk, so that a prompt that was encoded before needs no text encoder."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from warnings import warn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..system.finite import is_finite
from ..system.paths import user_path
from ..system.whole_files import write_whole

_TENSOR, _CHECKSUM = "embeds", "sha256"
_ABANDONED_SECONDS = 3600.0  # a temporary file older than this belongs to a process that died


def embedding_key(text: str, fingerprint: str, **options: str | int | float | bool) -> str:
    """Returns the key of a text's embedding: 64 hexadecimal digits from which the text cannot be read back.

    Args:
        text: as the encoder gets it (after cleaning).
        fingerprint: of the encoder, its tokenizer and dtype.
        options: whatever else changes the result.
    """
    return hashlib.sha256(json.dumps([text, fingerprint, options], sort_keys=True).encode()).hexdigest()


class EmbeddingCache:
    """A folder of embeddings, one safetensors file each, the longest unused removed when it grows too big.

    It only ever saves time: a damaged file counts as absent, and a folder that cannot be written gives one warning.
    Several processes may share a folder.
    """

    def __init__(self, folder: str | Path, limit_bytes: int = 1 << 30, *, remedy: str = "") -> None:
        """Makes and reads nothing yet.

        Args:
            folder: where the files are; made when the first is written.
            limit_bytes: the most that the embeddings may take in all.
            remedy: a sentence that ends the warning about a folder that cannot be used: how to choose another.
        """
        self.folder = user_path(folder)
        self.limit_bytes = limit_bytes
        self._remedy = remedy
        self._warned = False

    def get(self, key: str) -> torch.Tensor | None:
        """Returns the embedding under `key`, float32 (tokens, width) on the CPU, or None.

        A damaged file is removed, and one of values that are no numbers, whoever kept it.
        """
        file = self._file(key)
        try:
            # Read rather than mapped: a mapped file cannot be replaced or removed on Windows.
            tensors = load(file.read_bytes())
            embeds, checksum = tensors[_TENSOR], tensors[_CHECKSUM]
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"cannot be read ({error})")
            return None
        except (SafetensorError, KeyError, ValueError):
            self._remove(file)
            return None
        if not torch.equal(checksum, _checksum(embeds)) or not is_finite(embeds):
            self._remove(file)
            return None
        with suppress(OSError):  # a folder that can only be read is still a good cache
            os.utime(file)  # the time of last use is what `put` removes by
        return embeds

    def put(self, key: str, embeds: torch.Tensor) -> None:
        """Keeps `embeds` under `key`, as float32. A folder that cannot be written is one warning, not an error."""
        embeds = embeds.detach().to("cpu", torch.float32).contiguous()
        self._write(self._file(key), save({_TENSOR: embeds, _CHECKSUM: _checksum(embeds)}))
        self._trim()

    def remember(self, source: str, fingerprint: str) -> None:
        """Notes the fingerprint of the encoder's files at `source`, for `recall` when they are missing."""
        if self.recall(source) != fingerprint:
            self._write(self._note(source), fingerprint.encode())

    def recall(self, source: str) -> str | None:
        """Returns the fingerprint last noted for `source`, or None."""
        try:
            return self._note(source).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _note(self, source: str) -> Path:
        return self.folder / f"{hashlib.sha256(source.encode()).hexdigest()}.encoder"

    def _write(self, file: Path, data: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, data)
        except OSError as error:
            self._warn(f"cannot be written ({error})")

    def _trim(self) -> None:
        kept: list[tuple[float, int, Path]] = []
        try:
            for file in self.folder.glob("*.tmp"):
                if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                    self._remove(file)
            for file in self.folder.glob("*.safetensors"):
                status = file.stat()
                kept.append((status.st_mtime, status.st_size, file))
        except OSError:  # another process removed one meanwhile: the next `put` trims
            return
        excess = sum(size for _, size, _ in kept) - self.limit_bytes
        for _, size, file in sorted(kept):
            if excess <= 0:
                break
            self._remove(file)
            excess -= size

    def _remove(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"cannot be written ({error})")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"The folder of cached text embeddings {str(self.folder)!r} {what}. Work continues; prompts may be encoded "
                f"again. {self._remedy or 'Make the folder writable for this user to avoid that.'}",
                stacklevel=4,
            )


def _checksum(embeds: torch.Tensor) -> torch.Tensor:
    """Returns a SHA-256 as uint8 (32,); safetensors itself finds a truncated file, but no changed bytes."""
    return torch.tensor(list(hashlib.sha256(embeds.numpy().tobytes()).digest()), dtype=torch.uint8)
