"""A run on disk: all it needs to be resumed bit for bit by another process, whenever this one ends.

A folder holds run.json (the settings, readable by people too), inputs.safetensors (captions and prefix latents, so that
resuming needs neither text encoder nor picture), chunk-00000.safetensors and so on (finished latents) and
state.safetensors (the sampler's state). Every file is written whole or not at all, the state last: whatever it refers
to is there. A finished run may stay, with finished.json and without its inputs: the same run then takes its latents
from here.

A run has one owner at a time, who holds a lock beside the folder. What is read is not trusted: each file must say that it is
this one of this run.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from ..config import LATENT_CHANNELS
from ..errors import MagiError
from ..sampling.state import Chunk, SamplerState
from ..system.json_files import read_json
from ..system.owner_lock import OwnerLock
from ..system.paths import user_path
from ..system.whole_files import DamagedFileError, file_fingerprint, pack, unpack, write_whole
from .identity import differences, run_key

_FORMAT = 2
_SETTINGS, _INPUTS, _STATE, _PARTIALS = "run.json", "inputs.safetensors", "state.safetensors", "partials.json"
_FINISHED, _RESULT = "finished.json", "result.json"
_CHUNKS = "chunk-?????.safetensors"
_ENVIRONMENT = "how"  # its name in a state's header
_MOST_UNWRITTEN = 64  # files that are kept in memory for another try: memory must not grow with the video
# What a JSON file of somebody else's making may raise, and what is then looked for in it.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)
_START_OVER = "To start over, give --overwrite instead of --resume, or remove that folder."


class RunInUseError(MagiError):
    """Another process, or another run of this one, is at work on the same run."""


@dataclass(frozen=True)
class Saved:
    """How far a saved run is.

    Attributes:
        state: the sampler's, on the CPU.
        finished: number of chunks that are finished and on disk.
        environment: what decides the last bits beside the settings, as it was given to `RunStore.save`.
    """

    state: SamplerState
    finished: int
    environment: dict[str, Any]


class RunStore:
    """One run's folder; it is made with the first state that is saved.

    A folder that cannot be written never ends the run: the user is told once, the last good state stays, and every
    later `save` tries again.

    Attributes:
        folder: where it is.
        saved: what `open` found to resume; None for a new run.
        on_notice: called with a sentence that the user should read.
    """

    def __init__(self, folder: str | Path, on_notice: Callable[[str], None] | None = None) -> None:
        """Touches no file; without `on_notice` a notice is a UserWarning."""
        self.folder = user_path(folder).absolute()
        self.saved: Saved | None = None
        self.on_notice = on_notice or (lambda text: warn(text, stacklevel=4))
        self._noticed = False  # that the folder cannot be written
        self._behind = False  # whether the last state could not be saved
        self._lock = OwnerLock(self.folder.with_name(f"{self.folder.name}.lock"))
        self._key = ""
        self._unwritten: dict[str, bytes] = {}  # files by name, in the order in which they are to be written
        self._written: set[str] = set()
        self._saved_at = _position(SamplerState())

    @property
    def exists(self) -> bool:
        """Returns whether a state is saved here."""
        try:
            return self._path(_STATE).is_file()
        except OSError:  # a folder that cannot be looked into
            return False

    @property
    def finished_by(self) -> str | None:
        """Returns the version that `finish` was given; None for an unfinished run."""
        try:
            return str(read_json(self._path(_FINISHED))["version"])
        except _UNREADABLE:
            return None

    def lock(self) -> None:
        """Makes this the run's only owner, until `close` or `discard`; `open` does so if it was not done.

        Raises:
            RunInUseError: somebody else is.
        """
        if not self._lock.acquire():
            raise RunInUseError(
                f"The run in {str(self.folder)!r} is being made at this moment, by another process or window. "
                "Wait until it has ended, or choose another output."
            )

    def close(self) -> None:
        """Lets others own the run. What is saved stays."""
        self._lock.release()

    def open(self, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Starts a run of these settings, or reads the one that is saved here to be resumed; `saved` tells which.

        Args:
            settings: JSON values by readable names; `identity.UNKNOWN` agrees with every value.
            overwrite: removes a run that is saved here.

        Raises:
            RunInUseError: somebody else is at work on it.
            MagiError: the saved run has other settings, each named with both values; or its files are damaged.
        """
        with suppress(OSError):  # what cannot be written is told when the first state is to be saved
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.lock()
        if overwrite:
            self._clear()
        self.saved, self._unwritten, self._written, self._saved_at = None, {}, set(), _position(SamplerState())
        if self.exists:
            found = self.saved_settings()
            if different := differences(json.loads(json.dumps(settings)), found):
                raise MagiError(
                    f"The run saved in {str(self.folder)!r} has other settings: {'; '.join(different)}. "
                    f"Give the saved run's settings. {_START_OVER}"
                )
            self._key = run_key(found)
            self.saved = self._read_state()
            self._saved_at = _position(self.saved.state)
            self._written = {_SETTINGS, *map(_chunk_name, range(self.saved.finished))}
        else:
            self._clear()  # files of a run that ended before its first state was saved
            self._key = run_key(settings)
            text = json.dumps({"format": _FORMAT, "settings": settings}, indent=1, ensure_ascii=False)
            self._unwritten[_SETTINGS] = text.encode(errors="backslashreplace")  # lone surrogates, as JSON escapes

    # -- saving --------------------------------------------------------------------------------------------------------

    def keep_inputs(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps the run's input tensors, captions and prefix; they are written with the first state."""
        if self.saved is None:
            self._unwritten[_INPUTS] = self._pack(_INPUTS, tensors)

    def add(self, chunk: Chunk) -> None:
        """Keeps a finished chunk; it is written with the next state."""
        if self._key:
            name = _chunk_name(chunk.index)
            self._unwritten[name] = self._pack(name, {"latents": chunk.latents.float()})
        if len(self._unwritten) > _MOST_UNWRITTEN:  # later states would refer to lost chunks: nothing more is saved
            self._key, self._unwritten = "", {}

    def save(self, state: SamplerState, finished: int, environment: Mapping[str, Any]) -> None:
        """Saves the state, after all chunks that were added. A full disk or missing rights never raise.

        Args:
            state: the sampler's.
            finished: number of chunks that were finished, and added, by then.
            environment: JSON values that decide the last bits, to be compared when the run is resumed.
        """
        if not self._key or _position(state) == self._saved_at:
            return
        try:
            if lost := sorted(name for name in self._written if not self._path(name).is_file()):
                raise FileNotFoundError(f"{lost[0]} has been removed")
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in list(self._unwritten):
                write_whole(self._path(name), self._unwritten[name])
                self._written.add(name)
                del self._unwritten[name]
            tensors = {f"window.{c}": x for c, x in state.window.items()}
            tensors |= {f"clean.{c}": x for c, x in state.clean.items()}
            content = {**_position(state), "finished": finished, _ENVIRONMENT: dict(environment)}
            write_whole(self._path(_STATE), self._pack(_STATE, tensors, content))
            self._behind = False
        except (OSError, RuntimeError) as error:  # RuntimeError: the device failed, and with it the copy from there
            self._behind = True
            if not self._noticed:
                self._noticed = True
                self.on_notice(
                    f"The state of the run cannot be saved in {str(self.folder)!r} ({error}). The run continues; "
                    f"saving is tried again, and what was saved before stays."
                )
        else:
            self._saved_at = _position(state)

    def finish(self, version: str) -> None:
        """Keeps the finished run for the same one to be taken from here, without what only an unfinished one needs.

        Where the last chunk could not be saved, the run stays as it is, and its end will be made again.

        Args:
            version: of the code that made it.
        """
        if not self.exists or not self._key or self._unwritten or self._behind:
            return
        with suppress(OSError):  # what cannot be written or removed costs a little disk
            write_whole(self._path(_FINISHED), json.dumps({"version": version}).encode())
            self._path(_INPUTS).unlink(missing_ok=True)

    def note_partial(self, partial: Path) -> None:
        """Notes the name of an unfinished video beside the folder, to be removed once the run is finished."""
        with suppress(OSError):  # without the note that file stays, which does no harm
            names = sorted({*self._partial_names(), partial.name})
            write_whole(self._path(_PARTIALS), json.dumps(names).encode())

    def partials(self) -> list[Path]:
        """Returns the paths of the unfinished videos that were noted. They are names from a file: check them before use."""
        return [self.folder.with_name(name) for name in self._partial_names()]

    def note_result(self, written: Path) -> None:
        """Notes the whole video that is about to get its final name, for `made` to know it by."""
        with suppress(OSError):  # without the note it is made again
            write_whole(self._path(_RESULT), json.dumps({"fingerprint": file_fingerprint(written)}).encode())

    def made(self, video: Path) -> bool:
        """Returns whether a file is the video that this run noted as its result: only the tidying up is left."""
        try:
            note = read_json(self._path(_RESULT))
            return bool(note["fingerprint"] == file_fingerprint(video))
        except _UNREADABLE:
            return False

    def discard(self) -> None:
        """Removes what is saved, the state first; other files in the folder stay.

        Raises:
            RunInUseError: somebody else is at work on it.
        """
        self.lock()
        self._clear()
        self.close()

    def _clear(self) -> None:
        self.saved = None
        try:
            for name in (_STATE, _SETTINGS, _INPUTS, _PARTIALS, _FINISHED, _RESULT, _CHUNKS):
                for file in [*self.folder.glob(name), *self.folder.glob(f"{name}.{'?' * 32}.tmp")]:
                    file.unlink(missing_ok=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError as error:
            self.on_notice(f"The saved run in {str(self.folder)!r} could not be removed ({error}). Remove it by hand.")

    # -- reading -------------------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, torch.Tensor] | None:
        """Returns the tensors that `keep_inputs` was given for the saved run; None where none is saved.

        Raises:
            MagiError: its files are damaged.
        """
        if not self.exists:
            return None
        self._key = run_key(self.saved_settings())
        return self._read(_INPUTS)[0]

    def chunks(self) -> Iterator[Chunk]:
        """Yields the saved run's finished chunks in order, each read when its turn comes.

        Raises:
            MagiError: a file is damaged or missing.
        """
        for index in range(self.saved.finished if self.saved else 0):
            yield Chunk(index, self._chunk(index))

    def _read_state(self) -> Saved:
        tensors, content = self._read(_STATE)
        latents: dict[str, dict[int, torch.Tensor]] = {"window": {}, "clean": {}}
        try:
            for name, x in sorted(tensors.items()):
                kind, _, chunk = name.partition(".")
                latents[kind][int(chunk)] = x
            position = {k: content[k] for k in _position(SamplerState())}
            if any(type(n) is not int for k, n in position.items() if (k, n) != ("window_size", None)):
                raise ValueError(f"whole numbers: {position}")
            state = SamplerState(window=latents["window"], clean=latents["clean"], **position)
            saved = Saved(state, int(content["finished"]), dict(content[_ENVIRONMENT]))
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise self._damaged(_STATE, f"it lacks {error}") from error
        sizes = {tuple(x.shape[3:]) for x in tensors.values()}
        for index in range(saved.finished):  # every file is checked now, before anything expensive
            sizes.add(tuple(self._chunk(index).shape[3:]))
        if len(sizes) > 1:
            raise self._damaged(_STATE, "its latents and those of the chunks are of different sizes")
        return saved

    def _chunk(self, index: int) -> torch.Tensor:
        name = _chunk_name(index)
        latents = self._read(name)[0].get("latents")
        if latents is None or latents.ndim != 5 or latents.shape[:2] != (1, LATENT_CHANNELS):
            raise self._damaged(name, "it holds no latents")
        return latents

    def saved_settings(self) -> dict[str, Any]:
        """Returns the saved run's settings. Raises MagiError where they cannot be read."""
        try:
            found = read_json(self._path(_SETTINGS))
            version, settings = found["format"], dict(found["settings"])
        except FileNotFoundError as error:
            raise self._damaged(_SETTINGS, "it is missing") from error
        except _UNREADABLE as error:
            raise self._damaged(_SETTINGS, str(error)) from error
        if version != _FORMAT:
            raise self._damaged(_SETTINGS, f"its format is {version!r}, this version reads {_FORMAT}")
        return settings

    def _read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        try:
            tensors, content = unpack(self._path(name).read_bytes())
        except FileNotFoundError as error:
            raise self._damaged(name, "it is missing") from error
        except (OSError, DamagedFileError) as error:
            raise self._damaged(name, str(error)) from error
        if content.get("run") != self._key:
            raise self._damaged(name, "it belongs to another run")
        if content.get("file") != name:
            raise self._damaged(name, "it is another one of the run's files")
        return tensors, content

    def _pack(self, name: str, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any] | None = None) -> bytes:
        return pack(tensors, {"run": self._key, "file": name, **(content or {})})

    def _partial_names(self) -> list[str]:
        try:
            names = read_json(self._path(_PARTIALS))
            return [name for name in names if name and name == Path(name).name]
        except _UNREADABLE:
            return []

    def _damaged(self, name: str, why: str) -> MagiError:
        return MagiError(f"The saved run in {str(self.folder)!r} cannot be resumed: {name}: {why}. {_START_OVER}")

    def _path(self, name: str) -> Path:
        return self.folder / name


def _position(state: SamplerState) -> dict[str, int | None]:
    """Returns where in its schedule a state is."""
    return {"iteration": state.iteration, "window_size": state.window_size, "done": state.done}


def _chunk_name(index: int) -> str:
    return f"chunk-{index:05d}.safetensors"
