"""The three tokenizers a T5 may come with, read straight from their files.

Without transformers in between, the same text gives the same tokens whatever version of it is installed, special tokens
spelled out in a prompt are plain text, and nothing can be looked up on the network.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import punctuation

from ..errors import MagiError
from ..system.file_kinds import file_kind
from ..system.folders import what_is_at
from ..system.json_files import read_json
from ..system.paths import user_path
from ..system.printable import printable

_BYT5_OFFSET = 3  # ids 0, 1, 2: padding, end, unknown
_BYT5_VOCABULARY = _BYT5_OFFSET + 256
_END, _END_ID = "</s>", 1  # of every T5
_UNKNOWN = "<unk>"
_MOST_BYTES = 64 << 20  # T5's take 0.8 MB, or 2.4 MB as JSON


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids.

    `file` is what it was read from; `vocab_size` one more than its largest id; `pieces` gives the ids without the end;
    `unknown_id` stands for all that has no piece, None where everything has one.
    """

    file: Path
    vocab_size: int
    end_id: int
    pieces: Callable[[str], list[int]]
    unknown_id: int | None

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, the end token last."""
        return [*self.pieces(_spelled(text)), self.end_id]

    def unknown_words(self, text: str) -> list[str]:
        """Returns the words of `text` that are unknown, wholly or in part: in order, once each, without punctuation."""
        words = dict.fromkeys(word.strip(punctuation) for word in _spelled(text).split())
        return [word for word in words if word and self.unknown_id in self.pieces(word)]

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the file: two tokenizers with the same one give the same tokens."""
        return tokenizer_fingerprint(self.file)


def tokenizer_fingerprint(file: Path) -> str:
    """Returns the SHA-256 of a tokenizer file, 64 hexadecimal digits.

    Raises:
        MagiError: it cannot be read, or is plainly something else.
    """
    return hashlib.sha256(_content(file)).hexdigest()


def find_tokenizer(weights: str | Path, tokenizer: str | Path | None = None) -> Path:
    """Returns the tokenizer file to use: `tokenizer` (file or folder) if given, else the one beside the weights.

    Beside means in the folder of the weights, in `tokenizer/` below it, or in `tokenizer/` next to it.

    Raises:
        MagiError: there is none.
    """
    if tokenizer is not None:
        tokenizer = user_path(tokenizer)
        there = what_is_at(tokenizer)
        if there == "file":
            return tokenizer
        if there == "nothing":
            raise MagiError(f"There is no tokenizer file or folder {str(tokenizer)!r}. Check the path.")
        folders = [tokenizer]
    else:
        weights = user_path(weights)
        folder = weights if weights.is_dir() else weights.parent
        folders = [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    for folder in folders:
        for name in ("spiece.model", "tokenizer.json"):
            if what_is_at(folder / name) == "file":
                return folder / name
        if _is_byt5(folder / "tokenizer_config.json"):
            return folder / "tokenizer_config.json"
    raise MagiError(
        f"No tokenizer in {str(folders[0])!r}: spiece.model (or tokenizer.json) of t5-v1_1-xxl is needed. "
        "Put it into that folder, or give its folder as the tokenizer; `python -m magi download` fetches it (0.8 MB)."
    )


def load_tokenizer(file: Path) -> Tokenizer:
    """Reads spiece.model, tokenizer.json, or the tokenizer_config.json of a ByT5Tokenizer, which has no vocabulary.

    Raises:
        MagiError: the file is unreadable or no T5 tokenizer.
    """
    try:
        if _is_byt5(file):
            return Tokenizer(
                file, _BYT5_VOCABULARY, 1, lambda text: [b + _BYT5_OFFSET for b in text.encode("utf-8")], None
            )
        found = _load_json(file) if file.suffix == ".json" else _load_sentencepiece(file)
        found.encode("\ue000")  # some load, and fail over the first character that they do not know
        return found
    except MagiError:
        raise
    except ImportError as error:
        raise MagiError(f"Reading {str(file)!r} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # tokenizers raises bare Exceptions, sentencepiece RuntimeErrors
        raise _unreadable(file, printable(error)) from error


def _content(file: Path) -> bytes:
    """Returns the bytes of a tokenizer file. Raises MagiError where these are plainly something else."""
    try:
        size = file.stat().st_size
        if not size:
            raise _unreadable(file, "it is empty, as after a download that failed")
        kind = file_kind(file)
        if kind and not (kind.name.startswith("JSON") and file.suffix == ".json"):
            raise _unreadable(file, f"it is {kind.name}")
        if size > _MOST_BYTES:
            raise _unreadable(file, f"it has {size:,} bytes, too many for one")
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, str(error)) from error


def _unreadable(file: Path, why: str) -> MagiError:
    return MagiError(f"{str(file)!r} is not a readable tokenizer: {why}. Download spiece.model of t5-v1_1-xxl again.")


def _check_end(file: Path, end_id: int | None) -> int:
    """Returns the id of the end token. Raises MagiError unless it is T5's."""
    if end_id != _END_ID:
        what = "it has no" if end_id is None or end_id < 0 else f"it numbers with {end_id}, not {_END_ID}, its"
        raise MagiError(f"{str(file)!r} is the tokenizer of another model: {what} {_END}. Give that of t5-v1_1-xxl.")
    return end_id


def _spelled(text: str) -> str:
    """Returns the text with a question mark for what UTF-8 cannot spell."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_byt5(file: Path) -> bool:
    if file.name != "tokenizer_config.json" or what_is_at(file) != "file":
        return False
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise MagiError(f"{str(file)!r} is unreadable: {error}. Download it again.") from error
    return isinstance(config, dict) and config.get("tokenizer_class") == "ByT5Tokenizer"


def _load_json(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer as JsonTokenizer

    model = JsonTokenizer.from_str(_content(file).decode("utf-8-sig"))
    model.no_padding()
    model.no_truncation()
    return Tokenizer(
        file,
        max(model.get_vocab().values()) + 1,
        _check_end(file, model.token_to_id(_END)),
        lambda text: model.encode(text, add_special_tokens=False).ids,
        model.token_to_id(_UNKNOWN),
    )


def _load_sentencepiece(file: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    # The bytes rather than the path: its own reader takes no path outside ASCII on Windows.
    model = SentencePieceProcessor(model_proto=_content(file))
    return Tokenizer(file, model.get_piece_size(), _check_end(file, model.eos_id()), model.encode, model.unk_id())
