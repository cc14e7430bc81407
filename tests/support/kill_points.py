"""Runs that kill themselves, SIGKILL and all, at the n-th line of the code under test. A script, for it must be another process.

`python kill_points.py tiny|cli FOLDER TRIALS SEED` makes one undisturbed run and `TRIALS` disturbed ones, each killed once to three
times and then resumed to its end, every time in a new process; prints a JSON list of what became of each.
On Linux processes are forked off one that has imported torch; elsewhere each starts anew, which takes seconds.
"""

import contextlib
import functools
import gc
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from magi.cli.main import main as magi_main
from magi.config import EngineConfig, MagiConfig, ModelConfig, RuntimeConfig
from magi.model_files.load import load_transformer
from magi.model_files.repeating import repeating_files
from magi.runs import store
from magi.runs.autosave import Autosave
from magi.runs.store import RunStore
from magi.sampling.captions import Caption
from magi.sampling.prepare import make_sampler
from magi.system.whole_files import tensor_digest
from magi.transformer.random_weights import RandomTensors

MAGI = Path(store.__file__).parent.parent
CAN_FORK = sys.platform == "linux"
TRACED = {
    str(MAGI / name)
    for name in (
        "runs/store.py",
        "system/whole_files.py",
        "runs/autosave.py",
        "sampling/sampler.py",
        "media/video_writer.py",
    )
}
SHAPE = ModelConfig(2, 64, 96, 8, num_query_groups=4, kv_channels=8, caption_channels=12, caption_max_length=60)
CONFIG = MagiConfig(
    SHAPE,
    RuntimeConfig(cfg_number=1, num_steps=8, video_size_h=32, video_size_w=32, num_frames=72),
    EngineConfig(distill=True),
)


class Killer:
    """Counts the lines that are run in the traced files; at line number `at` the process is no more."""

    def __init__(self, at: int | None) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame, event, argument):
        return self._line if frame.f_code.co_filename in TRACED else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows: TerminateProcess
        return self._line


@functools.cache
def model():
    return load_transformer(RandomTensors(SHAPE, dtype=torch.float32, seed=1), CONFIG, "cpu", torch.float32)


def tiny(folder: Path) -> dict:
    """One run of a small random model, saved after every step: digests of all its chunks."""
    store, steps = RunStore(folder / "clip.run"), []
    store.open({"seed": 1})
    autosave = Autosave(store, model(), seconds=0)
    begun = store.saved.state.iteration if store.saved else 0
    sampler = make_sampler(
        model(),
        caption=Caption(torch.ones(5, 12)),
        style_tokens=(),
        duration_tokens=False,
        seed=1,
        state=autosave.state,
        progress=lambda event: (autosave.save_if_due(), steps.append(event.iteration)),
    )
    made = [tensor_digest(chunk.latents) for chunk in autosave.chunks(sampler)]
    return {"result": made, "begun": begun, "steps": len(steps), "total": sampler.total}


def cli(folder: Path) -> dict:
    """One `generate` with the embedded photo model: the video's digest."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = magi_main(
            [
                *(
                    "generate",
                    "--model",
                    "embedded-photo",
                    "--prompt",
                    "A cat",
                    "--seconds",
                    "2",
                    "--size",
                    "48x32",
                    "--steps",
                    "4",
                    "--device",
                    "cpu",
                ),
                *("--cache", str(folder.parent / "cache"), "--out", str(folder / "clip.mp4")),
                *("--resume", "--overwrite", "--state-minutes", "0"),
            ]
        )
    if status:
        return {"result": said.getvalue()}
    left = sorted(file.name for file in folder.iterdir() if ".partial" not in file.name)
    return {"result": [hashlib.sha256((folder / "clip.mp4").read_bytes()).hexdigest(), left]}


def child(kind: str, folder: Path, at: int | None) -> None:
    """What one process does: a run, and a note of its result and of how many lines it took."""
    torch.set_num_threads(1)
    killer = Killer(at)
    sys.settrace(killer)
    found = {"tiny": tiny, "cli": cli}[kind](folder)
    sys.settrace(None)
    (folder.parent / "found.json").write_text(json.dumps({**found, "lines": killer.lines}))


def run(kind: str, folder: Path, at: int | None = None) -> dict | None:
    """The result of a run in a process of its own; None if it was killed, as it was to be."""
    note = folder.parent / "found.json"
    note.unlink(missing_ok=True)
    if CAN_FORK:
        pid = os.fork()
        if not pid:
            try:
                child(kind, folder, at)
            finally:
                os._exit(0 if note.exists() else 3)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    else:
        code = subprocess.run(
            [sys.executable, __file__, "child", kind, str(folder), str(at or 0)], check=False
        ).returncode
    killed = code != 0 if os.name == "nt" else code == -signal.SIGKILL
    if not killed and code:
        raise RuntimeError(f"a run ended with {code}")
    return None if killed else json.loads(note.read_text())


def trial(kind: str, home: Path, lines: int, chance: random.Random) -> dict:
    folder = home / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kills = [chance.randint(1, lines) for _ in range(chance.choice((1, 2, 3)))]
    done, killed = None, 0
    for at in kills:
        done = run(kind, folder, at)
        if done:
            break
        killed += 1
    return {**(done or run(kind, folder) or {}), "kills": killed, "at": kills}


def get_ready(kind: str, home: Path) -> None:
    """Does in this process what its children need not do again: imports, mostly."""
    if kind == "tiny":
        tiny(home)
        shutil.rmtree(home / "clip.run", ignore_errors=True)
    else:
        import av  # noqa: F401
        from transformers import T5EncoderModel  # noqa: F401

        from magi.media import mp4_fragments, video_reader  # noqa: F401
        from magi.text import encoder  # noqa: F401

        repeating_files(home / "cache")
    gc.collect()
    gc.freeze()


def main(kind: str, home: Path, trials: int, seed: int) -> list[dict]:
    (home / "run").mkdir(parents=True)
    if CAN_FORK:
        get_ready(kind, home)
    whole = run(kind, home / "run")
    chance = random.Random(seed)
    return [whole, *(trial(kind, home, whole["lines"], chance) for _ in range(trials))]


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]) or None)
    else:
        torch.set_num_threads(1)
        print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
