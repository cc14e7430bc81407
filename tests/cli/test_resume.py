"""A run that was killed anywhere is resumed in another process and ends in the same bytes; so does one that was interrupted."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from magi.cli import write_video
from magi.cli.main import main
from magi.errors import MagiError
from magi.media import video_writer
from magi.media.video_reader import read_video
from magi.pipeline import pipeline, resident_models
from magi.pipeline.pipeline import MagiPipeline
from magi.runs.store import RunStore
from tests.support.kill_points import CAN_FORK
from tests.support.paths import ROOT

PHOTO = ROOT / "magi" / "assets" / "cat.jpg"
PHOTO_MODEL = ["--model", "embedded-photo"]
ARGUMENTS = [*PHOTO_MODEL, "--prompt", "A cat", "--seconds", "3", "--size", "48x32", "--steps", "4", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def disturbed(kind: str, folder: Path, trials: int, seed: int) -> tuple[dict, list[dict]]:
    """The undisturbed run, and those that were killed; see `kill_points`."""
    command = [sys.executable, ROOT / "tests" / "support" / "kill_points.py", kind, folder, trials, seed]
    result = subprocess.run(
        [str(part) for part in command], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=500
    )
    assert result.returncode == 0, result.stderr
    whole, *others = json.loads(result.stdout)
    return whole, others


def test_killed_at_any_line_it_goes_on_to_the_same_latents(tmp_path):
    # Where processes cannot be forked each one starts anew, which takes seconds: there are fewer.
    trials, least = (36, 50) if CAN_FORK else (2, 2)
    whole, others = disturbed("tiny", tmp_path, trials, seed=20)
    assert sum(run["kills"] for run in others) >= least
    assert len(whole["result"]) == 3
    for run in others:
        assert run["result"] == whole["result"], f"killed at lines {run['at']}"
        assert run["steps"] == run["total"] - run["begun"], "nothing is made twice"
    if CAN_FORK:
        assert len({run["begun"] for run in others}) > 8, "they were killed all over the run"


def test_killed_at_any_line_it_goes_on_to_the_same_video(tmp_path):
    whole, others = disturbed("cli", tmp_path, 4 if CAN_FORK else 1, seed=3)
    assert sum(run["kills"] for run in others) >= len(others)
    for run in others:
        assert run["result"] == whole["result"], f"killed at lines {run['at']}"


def test_killed_from_outside(magi, cache, whole, tmp_path):
    command = [sys.executable, "-m", "magi", "generate", *ARGUMENTS, "--cache", str(cache)]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "magi.run" / "state.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
    left = {path.name for path in tmp_path.iterdir()}
    if "magi.mp4" in left:
        pytest.skip("it was faster than the one that was to kill it")
    assert "magi.run" in left
    status, stderr = magi("--resume")
    assert status == 0, stderr
    assert re.search(r"[123] of 3 chunks are finished", stderr)
    assert (tmp_path / "magi.mp4").read_bytes() == whole


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def magi(cache, tmp_path, monkeypatch, capsys):
    """(*arguments) -> (exit status, stderr) of a `generate` that runs in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["generate", *ARGUMENTS, *map(str, arguments), "--cache", str(cache)])
        return status, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> bytes:
    """The video of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "magi.mp4"
    assert main(["generate", *ARGUMENTS, "--cache", str(cache), "--out", str(out), "--no-state"]) == 0
    assert [file.name for file in out.parent.iterdir()] == ["magi.mp4"]
    return out.read_bytes()


@pytest.fixture
def interrupt(monkeypatch):
    """(iteration) -> the next run is interrupted in that one, as by Ctrl-C."""
    show = write_video.Bars.__call__

    def at(iteration: int) -> None:
        def called(bars, phase):
            if phase.sampled and phase.sampled.iteration == iteration:
                monkeypatch.setattr(write_video.Bars, "__call__", show)
                raise KeyboardInterrupt
            show(bars, phase)

        monkeypatch.setattr(write_video.Bars, "__call__", called)

    return at


def error_of(stderr: str) -> str:
    (line,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    return line


def test_an_interrupted_run_says_how_to_go_on_and_does(magi, interrupt, whole, tmp_path):
    interrupt(6)
    status, stderr = magi()
    assert status == 130
    assert f"The run is kept in {tmp_path / 'magi.run'}: the same command with --resume continues it." in stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["magi.partial.mp4", "magi.run"]
    status, stderr = magi("--resume")
    assert status == 0
    assert "2 of 3 chunks are finished, chunk 3 is in progress" in stderr
    assert (tmp_path / "magi.mp4").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["magi.mp4"], "also the unfinished video of before is gone"


def test_interrupted_again_and_again(magi, interrupt, whole, tmp_path):
    for iteration in (2, 4, 6):
        interrupt(iteration)
        assert magi("--resume")[0] == 130
        assert RunStore("magi.run").exists
    assert magi("--resume")[0] == 0
    assert (tmp_path / "magi.mp4").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["magi.mp4"]


def test_going_on_needs_no_text_encoder_and_no_picture(magi, interrupt, tmp_path, monkeypatch):
    picture, clip = tmp_path / "cat.png", tmp_path / "clip.mp4"
    Image.open(PHOTO).resize((120, 90)).save(picture)
    assert magi("--out", clip, "--no-state")[0] == 0
    for start in (["--image", picture], ["--video", clip]):
        given = [*start, "--prompt", "Then a dog"]
        assert magi(*given, "--no-state", "--out", "whole.mp4", "--overwrite")[0] == 0
        interrupt(3)
        assert magi(*given)[0] == 130
        start[1].rename(tmp_path / "elsewhere")
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "encode_prompts", lambda *_, **__: pytest.fail("the text encoder is needed"))
            patch.setattr(pipeline, "to_model", lambda *_: pytest.fail("the picture is needed"))
            status, stderr = magi(*given, "--resume")
        assert status == 0, stderr
        assert (tmp_path / "magi.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
        (tmp_path / "magi.mp4").unlink()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", 2], "the seed is 2, the saved run's 0"),
        (["--steps", 8], "the number of steps is 8, the saved run's 4"),
        (["--prompt", "A dog"], 'the prompt is "A cat", "A dog", the saved run\'s "A cat"'),
        (["--seconds", 4], "the number of frames is 9., the saved run's 6."),
        (["--size", "64x32"], "the width is 64, the saved run's 48"),
        (["--window", 2], "the window is 2, the saved run's 4"),
        (["--style"], 'the style is nothing, the saved run\'s "hq"'),
        (["--no-duration"], "the use of duration tokens is off"),
        (["--raw-prompt"], "the cleaning of prompts is off, the saved run's on"),
        (["--fp8-storage"], 'the precision is "fp8", the saved run\'s "auto"'),
        (["--dtype", "bf16"], 'the compute type is "torch.bfloat16", the saved run\'s "torch.float32"'),
        (["--attention", "math"], 'the attention kernel is "math", the saved run\'s "auto"'),
        (["--text-dtype", "bf16"], "the text encoder is not the same"),
        (["--fit", "pad"], 'is fitted is "pad", the saved run\'s "crop"'),
        (["--image", "{other}"], 'the picture is "other.png", the saved run\'s "cat.png"'),
        (["--image", "{changed}"], "the content of the picture is not the same"),
    ],
)
def test_another_request_is_refused_with_what_differs(magi, kept, changed, message, tmp_path, monkeypatch):
    monkeypatch.setattr(resident_models, "load_transformer", lambda *_, **__: pytest.fail("a model is loaded"))
    Image.new("RGB", (48, 32)).save(tmp_path / "other.png")
    (tmp_path / "changed").mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "changed" / "cat.png")
    values = {"other": tmp_path / "other.png", "changed": tmp_path / "changed" / "cat.png"}
    before = {file: file.read_bytes() for file in kept.iterdir()}
    status, stderr = magi("--image", "cat.png", *(str(part).format(**values) for part in changed), "--resume")
    assert status == 1
    assert re.search(message, error_of(stderr)), stderr
    assert "--overwrite" in stderr
    assert {file: file.read_bytes() for file in kept.iterdir()} == before
    assert not list(tmp_path.glob("*.mp4"))


@pytest.fixture(scope="module")
def kept_run(cache, tmp_path_factory) -> Path:
    """A folder with a picture and the run that began with it."""
    folder = tmp_path_factory.mktemp("kept")
    Image.open(PHOTO).resize((96, 64)).save(folder / "cat.png")

    def stop(phase):
        if phase.sampled and phase.sampled.iteration == 2:
            raise KeyboardInterrupt

    pipe = MagiPipeline.embedded(cache, "repeating", device="cpu")
    request = {"prompt": "A cat", "seconds": 3.0, "height": 32, "width": 48, "num_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        list(pipe.generate(image=folder / "cat.png", progress=stop, state=folder / "magi.run", **request))
    return folder


@pytest.fixture
def kept(kept_run, tmp_path) -> Path:
    """A copy of that run where the command line looks for it."""
    shutil.copytree(kept_run, tmp_path, dirs_exist_ok=True)
    return tmp_path / "magi.run"


def test_the_run_json_is_for_people(kept):
    settings = json.loads((kept / "run.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["prompt"], settings["seed"], settings["num_steps"]) == (["A cat"], 0, 4)
    assert settings["image"] == "cat.png"
    assert str(kept.parent) not in (kept / "run.json").read_text(encoding="utf-8"), "folders are nobody's business"


def test_python_goes_on_with_what_the_command_line_began_and_back(magi, kept, tmp_path, cache):
    pipe = MagiPipeline.embedded(cache, "repeating", device="cpu")
    request = {"prompt": "A cat", "seconds": 3.0, "height": 32, "width": 48, "num_steps": 4, "image": "cat.png"}
    with pytest.raises(MagiError, match=r"unfinished run in .*magi\.run.*resume=True"):
        pipe.generate(**request, state=kept)
    whole = torch.cat([clip.frames for clip in pipe.generate(**request)])
    phases = []
    clips = list(pipe.generate(**request, state=kept, resume=True, progress=phases.append))
    sampled = [(phase.done, phase.total) for phase in phases if phase.name == "sample"]
    assert min(sampled) >= (1, 6), "the bar begins where the run does"
    assert clips[0].first_frame == 0
    assert torch.equal(torch.cat([clip.frames for clip in clips]), whole)
    assert not kept.exists()
    again = list(pipe.generate(**request, state=kept, resume=True))
    assert torch.equal(torch.cat([clip.frames for clip in again]), whole), "there was nothing to resume"


def test_a_new_run_does_not_destroy_an_unfinished_one_unless_it_is_told_to(magi, kept, whole, tmp_path):
    before = {file: file.read_bytes() for file in kept.iterdir()}
    status, stderr = magi("--seed", 5)
    assert status == 1
    assert re.search(r"unfinished run in '.*magi.run'.*--resume.*--overwrite", error_of(stderr))
    assert {file: file.read_bytes() for file in kept.iterdir()} == before
    assert magi("--seed", 5, "--no-state", "--out", "other.mp4")[0] == 0
    assert kept.exists()
    status, stderr = magi("--overwrite")
    assert status == 0
    assert (tmp_path / "magi.mp4").read_bytes() == whole
    assert not kept.exists()


def test_a_mistake_in_a_new_run_leaves_the_unfinished_one(magi, kept):
    assert magi("--overwrite", "--crf", 99)[0] == 1
    assert RunStore(kept).exists


def test_nothing_to_go_on_with_is_a_note(magi, whole, tmp_path):
    status, stderr = magi("--resume")
    assert status == 0
    assert "note: No state of this run is saved, so it starts with the first chunk." in stderr
    assert (tmp_path / "magi.mp4").read_bytes() == whole


def test_a_damaged_run_is_refused_with_the_remedy(magi, kept, tmp_path):
    (kept / "inputs.safetensors").write_bytes(b"")
    status, stderr = magi("--image", "cat.png", "--resume")
    assert status == 1
    assert re.search(r"inputs\.safetensors: it is cut short.*--overwrite", error_of(stderr))
    assert magi("--overwrite")[0] == 0


def test_all_chunks_are_there_and_no_transformer_is_needed(magi, whole, tmp_path, monkeypatch):
    """Ended just before the video got its name."""
    with monkeypatch.context() as patch:
        patch.setattr(video_writer, "put_in_place", ended)
        assert magi()[0] == 130
    monkeypatch.setattr(resident_models, "load_transformer", lambda *_, **__: pytest.fail("a model is loaded"))
    status, stderr = magi("--resume")
    assert status == 0
    assert "3 of 3 chunks are finished\n" in stderr
    assert (tmp_path / "magi.mp4").read_bytes() == whole
    assert names(tmp_path) == ["magi.mp4"]


def ended(*_, **__):
    raise KeyboardInterrupt


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def not_tidied(magi, whole, tmp_path, monkeypatch) -> bytes:
    """Ended just after the video got its name: the run and the partial video are still there."""
    put = video_writer.put_in_place
    with monkeypatch.context() as patch:
        patch.setattr(video_writer, "put_in_place", lambda *args, **options: ended(put(*args, **options)))
        assert magi()[0] == 130
    assert names(tmp_path) == ["magi.mp4", "magi.partial.mp4", "magi.run"]
    assert (tmp_path / "magi.mp4").read_bytes() == whole
    return whole


def test_a_finished_video_whose_run_is_left_is_told_to_be_finished(magi, not_tidied, tmp_path, monkeypatch):
    monkeypatch.setattr(resident_models, "load_transformer", lambda *_, **__: pytest.fail("a model is loaded"))
    status, stderr = magi("--resume")
    assert status == 0
    assert "magi.mp4 was finished by this run before: nothing is left to do." in stderr
    assert names(tmp_path) == ["magi.mp4"]
    assert (tmp_path / "magi.mp4").read_bytes() == not_tidied


def test_without_resume_a_finished_video_is_in_the_way_as_always(magi, not_tidied, tmp_path):
    status, stderr = magi()
    assert status == 1
    assert "magi.mp4' exists" in error_of(stderr)
    assert names(tmp_path) == ["magi.mp4"]


def test_another_video_of_that_name_is_not_taken_for_the_runs(magi, not_tidied, tmp_path):
    (tmp_path / "magi.mp4").write_bytes(b"mine")
    status, stderr = magi("--resume")
    assert status == 1
    assert "exists" in error_of(stderr)
    assert (tmp_path / "magi.mp4").read_bytes() == b"mine"
    assert (tmp_path / "magi.run").is_dir()


# -- one owner --------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from magi.runs.store import RunStore
store = RunStore(sys.argv[1])
store.lock()
print("locked", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("extra", [[], ["--no-state"], ["--overwrite"], ["--resume"]], ids=str)
def test_two_runs_with_one_output(magi, whole, extra, tmp_path):
    """The second one is refused before anything is loaded; the system takes the lock back when the first is killed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "magi.run")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        status, stderr = magi(*extra)
        other.kill()
    assert status == 1
    assert re.search(r"magi\.run.* is being made at this moment.*another output", error_of(stderr))
    assert names(tmp_path) == ["magi.run.lock"]
    assert magi(*extra)[0] == 0
    assert names(tmp_path) == ["magi.mp4"]
    assert (tmp_path / "magi.mp4").read_bytes() == whole


@pytest.mark.parametrize("extra", [[], ["--no-state"]], ids=str)
def test_a_file_that_appears_meanwhile_is_not_replaced(magi, interrupt, whole, extra, tmp_path, monkeypatch):
    show = write_video.Bars.__call__

    def called(bars, phase):
        (tmp_path / "magi.mp4").write_bytes(b"mine")
        show(bars, phase)

    monkeypatch.setattr(write_video.Bars, "__call__", called)
    status, stderr = magi(*extra)
    assert status == 1
    assert "made by something else" in error_of(stderr)
    assert "magi.partial.mp4" in error_of(stderr)
    assert (tmp_path / "magi.mp4").read_bytes() == b"mine"
    assert len(read_video(tmp_path / "magi.partial.mp4")) == 72, "nothing is lost"
    monkeypatch.setattr(write_video.Bars, "__call__", show)
    if not extra:
        assert magi("--resume", "--overwrite")[0] == 0
        assert (tmp_path / "magi.mp4").read_bytes() == whole
        assert names(tmp_path) == ["magi.mp4"]


def test_a_partial_video_that_cannot_be_removed_is_no_error(magi, whole, tmp_path, monkeypatch):
    """On Windows a player may have it open. The video is finished all the same."""
    unlink = Path.unlink

    def refused(path, **options):
        if ".partial" in path.name:
            raise PermissionError(13, "in use")
        unlink(path, **options)

    (tmp_path / "magi.run").mkdir()
    monkeypatch.setattr(Path, "unlink", refused)
    status, stderr = magi()
    monkeypatch.undo()
    assert status == 0, stderr
    assert (tmp_path / "magi.mp4").read_bytes() == whole
    assert not (tmp_path / "magi.run").exists()


@pytest.mark.parametrize(
    "noted", [["magi.mp4", "magi.run"], ["../magi.partial.mp4", "", ".", "a" * 5000], [5, None, []]]
)
def test_a_note_of_partial_videos_cannot_remove_other_files(magi, kept, noted, tmp_path):
    """partials.json is a file like any other: somebody may have written anything into it."""
    mine = ["other.mp4", "magi.partial.mp4.txt", "magi.png", "xmagi.partial.mp4", "magi.partial-a.mp4"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (kept / "partials.json").write_text(json.dumps([*mine, *noted]))
    assert magi("--image", "cat.png", "--resume")[0] == 0
    assert {*mine, "magi.mp4"} < set(names(tmp_path))


def test_a_state_that_cannot_be_saved_is_a_note(magi, whole, tmp_path):
    (tmp_path / "magi.run").write_text("mine")
    status, stderr = magi()
    assert status == 0
    assert stderr.count("note: The state of the run cannot be saved") == 1
    assert (tmp_path / "magi.mp4").read_bytes() == whole
    assert (tmp_path / "magi.run").read_text() == "mine"


def test_the_state_is_not_kept_on_request(magi, interrupt, tmp_path):
    interrupt(6)
    status, stderr = magi("--no-state")
    assert status == 130
    assert "--resume" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["magi.partial.mp4"]


@pytest.mark.parametrize("minutes", ["-1", "nan", "inf"])
def test_minutes_that_are_none(magi, minutes, tmp_path):
    status, stderr = magi("--state-minutes", minutes)
    assert status == 1
    assert f"--state-minutes is {minutes}" in error_of(stderr)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_goes_on_too(cache, tmp_path, monkeypatch, interrupt, capsys):
    monkeypatch.chdir(tmp_path)
    demo = [
        "demo",
        *PHOTO_MODEL,
        "--seconds",
        "2",
        "--size",
        "48x32",
        "--steps",
        "4",
        "--device",
        "cpu",
        "--cache",
        str(cache),
    ]
    interrupt(3)
    assert main(demo) == 130
    assert main([*demo, "--resume"]) == 0
    assert "0 of 2 chunks are finished, chunk 1 is in progress" in capsys.readouterr().err
    assert names(tmp_path) == ["demo.mp4"]


def test_of_the_three_demos_the_one_that_was_interrupted_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo = ["demo", "--seconds", "1", "--steps", "8", "--device", "cpu"]
    show, names = write_video.Bars.__call__, []

    def interrupted(bars, phase):
        names.append(phase.name)
        if "prefix" in names and phase.sampled and phase.sampled.iteration == 2:
            raise KeyboardInterrupt
        show(bars, phase)

    with monkeypatch.context() as patch:
        patch.setattr(write_video.Bars, "__call__", interrupted)
        assert main(demo) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.mp4", "demo_picture.run"]
    assert main([*demo, "--resume"]) == 0
    assert "demo_picture.run: 0 of 1 chunks are finished, chunk 1 is in progress" in capsys.readouterr().err
    names = ["demo.mp4", "demo_continued.mp4", "demo_picture.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
