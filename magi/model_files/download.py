"""Plans and runs downloads of the official MAGI-1 files, for `python -m magi download`.

Names, sizes and hashes come from the Hub through huggingface_hub. The bytes are streamed by `fetch`, because `hf_hub_download`
does less for files of this size: since 1.18 it starts over after its process was killed (and leaves the partial file behind),
it does not compare the sha256, and while the network is silent only Ctrl-C ends it within a minute. Tried with 0.25, 0.36, 1.0
and 2.4. All files are public: no token is read or sent.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import PRESETS
from ..errors import MagiError
from ..sampling import special_tokens
from ..system.paths import user_path
from .fetch import OnPhase, fetch, file_sha256, part_of
from .locate import MODELS, TEXT_ENCODER, VAE

REPOSITORY = "sand-ai/MAGI-1"
HUB = "https://huggingface.co"
COMPANIONS = ("vae", "t5", "special_tokens")  # what every model needs beside it
ITEMS = (*PRESETS, *COMPANIONS)
_FOLDERS = {name: MODELS / name for name in PRESETS} | {"vae": VAE, "t5": TEXT_ENCODER.parent}
FOLDERS = {item: f"{folder.as_posix()}/" for item, folder in _FOLDERS.items()}  # in the repository and on disk

SPECIAL_TOKENS_URL = "https://raw.githubusercontent.com/SandAI-org/MAGI-1/main/example/assets/special_tokens.npz"

ASK_ABOVE = 10**9  # bytes that are fetched without a question


@dataclass(frozen=True)
class PlannedFile:
    """One official file.

    Attributes:
        item: of `ITEMS`, to which it belongs.
        path: below the folder, with "/".
        target: where it goes on disk.
        url: where it is downloaded from.
        size: bytes.
        sha256: in hexadecimal, None where the Hub does not tell it.
        present: it is in place with the right size.
    """

    item: str
    path: str
    target: Path
    url: str
    size: int
    sha256: str | None
    present: bool


@dataclass(frozen=True)
class DownloadPlan:
    """The requested files, those in place included."""

    folder: Path
    files: tuple[PlannedFile, ...]

    @property
    def missing(self) -> tuple[PlannedFile, ...]:
        """Returns the files to be downloaded."""
        return tuple(file for file in self.files if not file.present)

    @property
    def bytes_missing(self) -> int:
        """Returns the bytes to be downloaded; those of an interrupted download count as there."""
        return sum(file.size - min(file.size, max(0, _length(part_of(file.target)))) for file in self.missing)

    def __str__(self) -> str:
        """Returns a table: item, size, how much of it is in place, folder."""
        rows = []
        for item in dict.fromkeys(file.item for file in self.files):
            files = [file for file in self.files if file.item == item]
            there = sum(file.present for file in files)
            state = "in place" if there == len(files) else f"{there} of {len(files)} files in place"
            place = self.folder / FOLDERS.get(item, files[0].path)
            rows.append(f"{item:20}{gigabytes(sum(file.size for file in files)):>10}  {state:26}{place}")
        return "\n".join(rows)


@dataclass(frozen=True)
class DownloadProgress:
    """Progress of a download.

    Attributes:
        index: of the file, from 1.
        count: of files.
        path: of the file below the folder.
        phase: "download" or "verify".
        done: bytes of the file so far.
        total: bytes of the file.
    """

    index: int
    count: int
    path: str
    phase: str
    done: int
    total: int


OnDownload = Callable[[DownloadProgress], None]
"""Called several times per second; what it raises ends the work."""


def plan_download(
    items: Sequence[str], folder: str | Path, *, only: bool = False, endpoint: str | None = None
) -> DownloadPlan:
    """Lists the items' files and which of them are missing below `folder`. Downloads no file.

    Args:
        items: names from `ITEMS`. A model includes the VAE, the text encoder and the special tokens.
        folder: root of the official tree (ckpt/magi/..., ckpt/vae, ckpt/t5, special_tokens.npz); it need not exist.
        only: exactly the items, without what a model includes.
        endpoint: a mirror of the Hub; None leaves the choice to huggingface_hub (HF_ENDPOINT, else huggingface.co).

    Raises:
        MagiError: an unknown name, or the Hub is out of reach or holds other files than it should.
    """
    unknown = [item for item in items if item not in ITEMS]
    if unknown or not items:
        named = ", ".join(map(repr, unknown)) or "without a name"
        raise MagiError(f"There is no official download {named}. Choose from: {', '.join(ITEMS)}.")
    wanted = {*items, *(COMPANIONS if not only and set(items) & set(PRESETS) else ())}
    folder = user_path(folder)
    on_hub = [item for item in FOLDERS if item in wanted]
    files = _hub_files(on_hub, folder, endpoint) if on_hub else []
    if "special_tokens" in wanted:
        name, size, sha256 = special_tokens.FILE_NAME, special_tokens.SIZE, special_tokens.SHA256
        files.append(_planned("special_tokens", name, folder, SPECIAL_TOKENS_URL, size, sha256))
    return DownloadPlan(folder, tuple(files))


def verify_files(plan: DownloadPlan, on_progress: OnDownload | None = None) -> DownloadPlan:
    """Hashes the files in place and returns the plan with those missing that differ from their sha256.

    Without this a file in place is trusted by its size: a download gives no file its name before it is verified.

    Raises:
        MagiError: a file cannot be read.
    """
    in_place = [file for file in plan.files if file.present and file.sha256]
    damaged = set()
    for index, file in enumerate(in_place, 1):
        try:
            if file_sha256(file.target, _per_file(on_progress, file, index, len(in_place))) != file.sha256:
                damaged.add(file.path)
        except OSError as error:
            raise MagiError(f"{str(file.target)!r} cannot be read ({error}). Delete it and run this again.") from error
    return replace(
        plan, files=tuple(replace(file, present=False) if file.path in damaged else file for file in plan.files)
    )


def run_download(
    plan: DownloadPlan,
    on_progress: OnDownload | None = None,
    *,
    yes: bool = False,
    ask: Callable[[str], bool] | None = None,
) -> None:
    """Downloads and verifies what the plan misses. A file gets its name when it is whole; an unfinished one is resumed.

    Args:
        plan: from `plan_download` or `verify_files`.
        on_progress: see `OnDownload`.
        yes: download more than 1 GB without a question.
        ask: called with the question otherwise; returns the answer.

    Raises:
        MagiError: not enough room on the disk, the answer was no, or see `fetch`.
    """
    missing = plan.missing
    if not missing:
        return
    _check_room(plan)
    size = gigabytes(plan.bytes_missing)
    if plan.bytes_missing > ASK_ABOVE and not (yes or (ask and ask(f"Download {size} to {plan.folder}?"))):
        raise MagiError(
            f"Nothing was downloaded: {size} are fetched only after a yes. Answer y, or give --yes (yes=True)."
        )
    for index, file in enumerate(missing, 1):
        on_phase = _per_file(on_progress, file, index, len(missing))
        fetch(file.url, file.target, size=file.size, sha256=file.sha256, on_progress=on_phase)


def _hub_files(items: Sequence[str], folder: Path, endpoint: str | None) -> list[PlannedFile]:
    """Asks the Hub for the items' files and pins them to its current revision."""
    try:
        from huggingface_hub import HfApi, hf_hub_url
    except ImportError as error:
        raise MagiError(
            f"The package huggingface_hub is missing ({error}). Install it: pip install huggingface_hub"
        ) from error
    try:
        info = HfApi(endpoint=endpoint, token=False).model_info(REPOSITORY, files_metadata=True, timeout=30)
    except Exception as error:  # of requests, httpx or httpx2, as the version of huggingface_hub has it
        raise MagiError(_unreachable(error, items, folder)) from error
    files = []
    for item in items:
        found = [sibling for sibling in info.siblings or [] if sibling.rfilename.startswith(FOLDERS[item])]
        for sibling in found:
            url = hf_hub_url(REPOSITORY, sibling.rfilename, revision=info.sha, endpoint=endpoint)
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            files.append(_planned(item, sibling.rfilename, folder, url, sibling.size, sha256))
        if not found:
            raise MagiError(
                f"The Hub lists no {FOLDERS[item]} in {REPOSITORY}: an incomplete mirror, or a new layout. "
                "Use another --endpoint, or update this program."
            )
    return files


def _planned(item: str, path: str, folder: Path, url: str, size: int | None, sha256: str | None) -> PlannedFile:
    if size is None or ".." in path.split("/") or set(path) & set("\\:"):
        raise MagiError(f"The Hub lists {path!r} without a size or outside of its folder. Use another --endpoint.")
    target = folder / path
    return PlannedFile(item, path, target, url, size, sha256, _length(target) == size)


def _unreachable(error: Exception, items: Sequence[str], folder: Path) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    problem = f"answers {status} for {REPOSITORY}" if status else f"is out of reach ({type(error).__name__}: {error})"
    pages = ", ".join(f"{HUB}/{REPOSITORY}/tree/main/{FOLDERS[item].rstrip('/')}" for item in items)
    return (
        f"The Hub {problem}. Check the network (a proxy goes in HTTPS_PROXY) or name a mirror with --endpoint or HF_ENDPOINT. "
        f"By hand: fetch the files from {pages} and put them in the same folders below {str(folder)!r}."
    )


def _check_room(plan: DownloadPlan) -> None:
    existing = next(path for path in (plan.folder.absolute(), *plan.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if plan.bytes_missing > free:
        raise MagiError(
            f"The download needs {gigabytes(plan.bytes_missing)}, and the disk of {str(plan.folder)!r} has {gigabytes(free)} free. "
            "Free some space, choose another --folder, or ask for less."
        )


def _per_file(on_progress: OnDownload | None, file: PlannedFile, index: int, count: int) -> OnPhase | None:
    if on_progress is None:
        return None
    return lambda phase, done: on_progress(DownloadProgress(index, count, file.path, phase, done, file.size))


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def gigabytes(size: int) -> str:
    """Formats a file size of `size` bytes in GB, or in MB below 0.1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
