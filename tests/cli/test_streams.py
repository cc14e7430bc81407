"""The command line on terminals and pipes of all kinds, and for users without a home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from magi.cli.main import main
from magi.system.paths import user_path
from tests.support.paths import ROOT

SHAPES = "A small red circle moves to the right on a white background."
HOMELESS = """
import runpy, sys
try:
    import pwd
except ImportError:
    pass
else:
    def nobody(*_):
        raise KeyError("uid not found")
    pwd.getpwuid = pwd.getpwnam = nobody
sys.argv = ["magi", *sys.argv[1:]]
runpy.run_module("magi", run_name="__main__", alter_sys=True)
"""


def run(arguments, folder, code=None, **changes) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, *(["-c", code] if code else ["-m", "magi"]), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["remote", "--help"],
        ["generate", "--prompt", SHAPES, "--seconds", "1", "--steps", "4", "--device", "cpu", "--out", "~a.mp4"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_user_without_a_home(arguments, tmp_path):
    """As in containers that run any user: neither HOME nor an entry among the system's users."""
    nothing = dict.fromkeys(("HOME", "USERPROFILE", "HOMEDRIVE", "HOMEPATH"))
    result = run(arguments, tmp_path, HOMELESS, **nothing, TMPDIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    if "--out" in arguments:
        assert (tmp_path / "~a.mp4").is_file(), "a file's name may begin with ~"
        assert not (tmp_path / "~").exists()


def test_a_home_is_put_in_its_place(monkeypatch, tmp_path):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert user_path("~/a/b.mp4") == tmp_path / "a" / "b.mp4"
    assert user_path(Path("~") / "a") == tmp_path / "a"
    assert user_path("~nobody-of-that-name/a.mp4") == Path("~nobody-of-that-name/a.mp4")
    assert user_path("a~") == Path("a~")


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    for encoding in ("utf-8", "ascii"):
        result = run(["inspect", name], tmp_path, PYTHONIOENCODING=encoding)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
    made = f"{name}.mp4"
    result = run(["generate", "--prompt", SHAPES, "--seconds", "1", "--steps", "4", "--out", made], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / made).is_file()


def test_a_terminal_that_cannot_spell_what_is_printed(tmp_path, embedded_transformer):
    copy = tmp_path / "größe.safetensors"
    copy.write_bytes(embedded_transformer.read_bytes())
    result = run(["inspect", copy.name], tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert r"gr\xf6\xdfe.safetensors" in result.stdout


def test_a_reader_that_goes_away(tmp_path, embedded_transformer):
    """`magi inspect FILE --tensors | head -1`."""
    for arguments in (["inspect", str(embedded_transformer), "--tensors"], ["generate", "--help"]):
        command = [sys.executable, "-c", f"{SLOW}main({arguments!r})"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            process.stdout.close()
            process.stdin and process.stdin.close()
            stderr = process.stderr.read()
        assert stderr == ""
        assert process.returncode in (0, 141)


SLOW = """
import time
from magi.cli.main import main as command
def main(arguments):
    time.sleep(0.5)  # until the reader has gone
    raise SystemExit(command(arguments))
"""


@pytest.fixture
def embedded_transformer() -> Path:
    from magi.model_files.embedded import embedded_files

    path = Path(embedded_files().transformer)
    return path if path.is_file() else next(path.glob("*.safetensors"))


def test_a_note_does_not_stand_behind_a_bar(monkeypatch, capsys):
    import warnings

    from tqdm import tqdm

    from magi.cli import inspect

    def noted(_):
        with tqdm(total=2, desc="sampling", ascii=True) as bar:
            bar.update()
            warnings.warn("mind this", stacklevel=1)
        return 0

    monkeypatch.setattr(inspect, "main", noted)
    assert main(["inspect", "x"]) == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "note: mind this" in lines


def test_a_random_seed_is_said_and_resumed_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from magi.cli import write_video

    command = ["generate", "--prompt", SHAPES, "--seconds", "2", "--steps", "4", "--device", "cpu", "--seed", "-1"]
    seeds = set()
    for _ in range(2):
        assert main([*command, "--overwrite"]) == 0
        seeds.add(seed_in(capsys.readouterr().err))
    assert len(seeds) == 2
    with monkeypatch.context() as patch:
        show = write_video.Bars.__call__

        def interrupted(bars, phase):
            if phase.sampled and phase.sampled.iteration == 2:
                raise KeyboardInterrupt
            show(bars, phase)

        patch.setattr(write_video.Bars, "__call__", interrupted)
        assert main([*command, "--overwrite"]) == 130
    seed = seed_in(capsys.readouterr().err)
    assert main([*command, "--overwrite", "--resume"]) == 0
    assert seed_in(capsys.readouterr().err) == seed


def seed_in(stderr: str) -> str:
    return stderr.partition("seed ")[2].partition(",")[0]
