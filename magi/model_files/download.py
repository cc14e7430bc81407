"""The official MAGI-1 files: which there are, what is missing in a folder, and fetching it. Behind `python -m magi download`.

Names, sizes and hashes come from the Hub through huggingface_hub. The bytes are streamed by `fetch`, since not every version of
huggingface_hub resumes a download or lets itself be stopped. All files are public: no token is read or sent.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import PRESETS
from ..errors import MagiError
from ..sampling import special_tokens
from .fetch import fetch, file_sha256, part_of
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
    """One official file. `size` in bytes, `present`: it is in place with the right size."""

    item: str
    path: str  # below the folder, with "/"
    target: Path
    url: str
    size: int
    sha256: str | None
    present: bool


@dataclass(frozen=True)
class DownloadPlan:
    """The files that were asked for, those in place included."""

    folder: Path
    files: tuple[PlannedFile, ...]

    @property
    def missing(self) -> tuple[PlannedFile, ...]:
        """The files to be fetched."""
        return tuple(file for file in self.files if not file.present)

    @property
    def bytes_missing(self) -> int:
        """Bytes to be fetched; what an interrupted download left counts as there."""
        return sum(file.size - min(file.size, max(0, _length(part_of(file.target)))) for file in self.missing)

    def __str__(self) -> str:
        """A table: item, size, how much of it is in place, folder."""
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
    """Where the work stands: file `index` of `count` (from 1), its `path`, `phase` "download" or "verify", bytes `done` of `total`."""

    index: int
    count: int
    path: str
    phase: str
    done: int
    total: int


Progress = Callable[[DownloadProgress], None]


def plan_download(
    items: Sequence[str], folder: str | Path, *, only: bool = False, endpoint: str | None = None
) -> DownloadPlan:
    """Finds out what the items consist of and what of it is missing below `folder`. Fetches no file.

    Args:
        items: names from `ITEMS`. A model brings the VAE, the text encoder and the special tokens with it.
        folder: where the official tree (ckpt/magi/..., ckpt/vae, ckpt/t5, special_tokens.npz) is or shall be.
        only: exactly the items, nothing that goes with them.
        endpoint: a mirror of the Hub; None leaves the choice to huggingface_hub (HF_ENDPOINT, else huggingface.co).

    Raises:
        MagiError: an unknown name, or the Hub is out of reach or holds other files than it should.
    """
    unknown = [item for item in items if item not in ITEMS]
    if unknown or not items:
        named = ", ".join(map(repr, unknown)) or "without a name"
        raise MagiError(f"There is no official download {named}. Choose from: {', '.join(ITEMS)}.")
    wanted = {*items, *(COMPANIONS if not only and set(items) & set(PRESETS) else ())}
    folder = Path(folder).expanduser()
    on_hub = [item for item in FOLDERS if item in wanted]
    files = _hub_files(on_hub, folder, endpoint) if on_hub else []
    if "special_tokens" in wanted:
        name, size, sha256 = special_tokens.FILE_NAME, special_tokens.SIZE, special_tokens.SHA256
        files.append(_planned("special_tokens", name, folder, SPECIAL_TOKENS_URL, size, sha256))
    return DownloadPlan(folder, tuple(files))


def verify_files(plan: DownloadPlan, progress: Progress | None = None) -> DownloadPlan:
    """The plan after hashing the files in place: those that differ from their sha256 count as missing.

    Without this a file in place is trusted by its size: a download gives no file its name before it is verified.
    """
    in_place = [file for file in plan.files if file.present and file.sha256]
    damaged = set()
    for index, file in enumerate(in_place, 1):
        try:
            if file_sha256(file.target, _reporter(progress, file, index, len(in_place))) != file.sha256:
                damaged.add(file.path)
        except OSError as error:
            raise MagiError(f"{str(file.target)!r} cannot be read ({error}). Delete it and run this again.") from error
    return replace(
        plan, files=tuple(replace(file, present=False) if file.path in damaged else file for file in plan.files)
    )


def run_download(
    plan: DownloadPlan,
    progress: Progress | None = None,
    *,
    yes: bool = False,
    ask: Callable[[str], bool] | None = None,
) -> None:
    """Fetches and verifies what the plan misses. A file gets its name when it is whole; an unfinished one is taken up next time.

    Args:
        plan: from `plan_download` or `verify_files`.
        progress: called several times per second; whatever it raises stops the download.
        yes: more than 1 GB may be fetched without a question.
        ask: is given the question otherwise, and answers it.

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
        report = _reporter(progress, file, index, len(missing))
        fetch(file.url, file.target, size=file.size, sha256=file.sha256, progress=report)


def _hub_files(items: Sequence[str], folder: Path, endpoint: str | None) -> list[PlannedFile]:
    """The files of the items as the Hub lists them now, pinned to its present revision."""
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
                f"The Hub lists no {FOLDERS[item]} in {REPOSITORY}: a mirror that is not whole, or a new layout. "
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


def _reporter(
    progress: Progress | None, file: PlannedFile, index: int, count: int
) -> Callable[[str, int], None] | None:
    if progress is None:
        return None
    return lambda phase, done: progress(DownloadProgress(index, count, file.path, phase, done, file.size))


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def gigabytes(size: int) -> str:
    """Returns a file size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
