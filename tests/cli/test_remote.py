"""`python -m magi remote` as a user meets it; and what is left of a task when the process is killed."""

import getpass
import os
import signal
import subprocess
import sys
import time

import pytest

from magi.cli.main import main
from magi.media.video_reader import probe
from magi.remote import client
from magi.remote.download import fetch
from magi.remote.fake_server import Answer, FakeServer
from tests.support.paths import ROOT
from tests.support.processes import INTERRUPTIBLE
from tests.support.remote_service import KEY, QUICK, poll_answer, wait_for

PHOTO = ROOT / "magi" / "assets" / "cat.jpg"
TALL = ("--prompt", "A cat", "--resolution", "480p", "--aspect", "9:16")
SMALL = ["--resolution", "480p", "--prompt", "A cat"]


@pytest.fixture
def server(remote_videos, monkeypatch):
    monkeypatch.setenv("WAVESPEED_API_KEY", KEY)
    found = FakeServer(key=KEY, statuses=())
    found.videos = remote_videos
    with found:
        yield found


@pytest.fixture
def magi(server, tmp_path, monkeypatch, capsys):
    """(*arguments) -> (exit status, stderr) of `remote` in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, small: tuple = (*SMALL, "--aspect", "16:9")) -> tuple[int, str]:
        place = ["--base-url", server.url, "--cache", str(tmp_path / "cache")]
        status = main(["remote", *small, *map(str, arguments), *place])
        said = capsys.readouterr()
        assert KEY not in said.out + said.err
        return status, said.err

    return run


def process(server, tmp_path, *arguments: object, **options) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "magi", "remote", *SMALL, "--aspect", "16:9", "--base-url", server.url]
    command += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "clip.mp4"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes, **INTERRUPTIBLE, **options)


def test_a_video(magi, server, tmp_path):
    status, said = magi(
        "--out", "clip.mp4", "--frames", 120, "--fps", 30, "--seed", 4, "--no-safety-checker", small=TALL
    )
    assert status == 0
    info = probe(tmp_path / "clip.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (480, 832, 120, 30)
    (task,) = server.tasks.values()
    assert task.id in said
    assert "120 frames, 30 per second, 480x832" in said
    assert "reading the video" in said
    assert "100%|" in said, "the bar"
    assert task.body["seed"] == 4
    assert task.body["enable_safety_checker"] is False


def test_a_picture(magi, server, tmp_path):
    status, _ = magi("--image", PHOTO, "--seed", -1, small=tuple(SMALL))
    assert status == 0
    (task,) = server.tasks.values()
    assert "seed" not in task.body
    assert len(server.uploads) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "remote.mp4"]


def test_the_same_command_again_is_free(magi, server):
    magi("--out", "a.mp4")
    status, said = magi("--out", "b.mp4")
    assert status == 0
    assert "nothing is submitted again" in said
    assert server.count("submit") == 1
    assert magi("--out", "c.mp4", "--seed", "9", "--resume-id", next(iter(server.tasks)))[0] == 0
    assert magi("--out", "d.mp4", "--resume-id", next(iter(server.tasks)), small=())[0] == 0, "the id is enough"
    assert server.count("submit") == 1
    assert magi("--out", "c.mp4", "--overwrite", "--resume-id", next(iter(server.tasks)), "--api-version", "v3")[0] == 0
    assert any(request.target.startswith("/api/v3/") for request in server.requests)


def test_an_id_alone_that_is_unknown(magi, server, monkeypatch):
    monkeypatch.setattr(client, "Limits", lambda: QUICK)
    status, said = magi("--resume-id", "no-such-task", small=())
    assert status == 1
    assert "does not know task no-such-task" in said


def test_a_name_that_is_taken_meanwhile(magi, server, tmp_path, monkeypatch):
    """Here by a folder: the video is named, stays, and costs nothing again."""
    monkeypatch.setattr(client, "fetch", lambda *given: (tmp_path / "clip.mp4").mkdir(exist_ok=True) or fetch(*given))
    status, said = magi("--out", "clip.mp4", "--seed", "-1")
    assert status == 1
    (video,) = tmp_path.glob("magi1_*.mp4")
    assert str(video) in said
    assert probe(video).frames == 96
    assert magi("--out", "other.mp4", "--seed", "-1")[0] == 0
    assert server.count("submit") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--out", "clip.mov"], ".mp4"),
        (["--out", "."], "does not end in .mp4"),
        (["--out", "there.mp4"], "--overwrite"),
        (["--out", "folder.mp4"], "is a folder"),
        (["--frames", "64"], "96 to 192"),
        (["--image", "missing.png"], "missing.png"),
        (["--image", "http://example.org/cat.png"], "https://"),
        (["--resume-id", "no/id"], "not the id of a task"),
        (["--prompt", " "], "blank"),
        (["--image", f"https://example.org/{KEY}.png"], "in a field that is saved"),
        (["--prompt", f"A cat {KEY}"], "in a field that is saved"),
        (["--resume-id", KEY], "in a field that is saved"),
    ],
)
def test_mistakes_cost_nothing(magi, server, tmp_path, arguments, reason):
    (tmp_path / "there.mp4").write_bytes(b"mine")
    (tmp_path / "folder.mp4").mkdir()
    status, said = magi(*arguments)
    assert status == 1
    assert reason in said
    assert server.requests == []
    assert (tmp_path / "there.mp4").read_bytes() == b"mine"


def test_no_prompt(magi, server):
    status, said = magi(small=())
    assert (status, server.requests) == (1, [])
    assert "--prompt" in said


def test_no_key(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WAVESPEED_API_KEY", raising=False)
    assert main(["remote", *SMALL, "--cache", str(tmp_path)]) == 1
    assert str(tmp_path / "wavespeed_api_key.txt") in capsys.readouterr().err


def test_an_address_that_the_keys_owner_gives_is_trusted(server, tmp_path, capsys):
    place = ["--base-url", "https://gateway.example", "--cache", str(tmp_path), "--out", str(tmp_path / "clip.mp4")]
    assert main(["remote", *SMALL, *place, "--resume-id", "no/id"]) == 1
    assert "not the id of a task" in capsys.readouterr().err, "what is checked after the key"


def test_a_key_that_is_kept(tmp_path, server, monkeypatch, capsys, remote_videos):
    monkeypatch.delenv("WAVESPEED_API_KEY")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: f" {KEY} ")
    assert main(["remote", "--save-key", "--cache", str(tmp_path)]) == 0
    assert main(["remote", "--save-key", "--key-file", str(tmp_path / "mine.txt")]) == 0
    assert (tmp_path / "mine.txt").read_text() == f"{KEY}\n"
    assert main(["remote", *SMALL, "--base-url", server.url, "--cache", str(tmp_path), "--aspect", "16:9"]) == 0
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    assert all(KEY not in request.target for request in server.requests)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: "")
    assert main(["remote", "--save-key", "--cache", str(tmp_path)]) == 1
    assert (tmp_path / "wavespeed_api_key.txt").read_text() == f"{KEY}\n", "a good key is not given up for a bad one"


def test_killed_while_the_task_runs(server, tmp_path, magi):
    """kill -9 after the submission; then the same request again."""
    server.statuses = ("processing",) * 1000
    running = process(server, tmp_path)
    wait_for(lambda: server.count("poll"), 60)
    running.kill()
    output, _ = running.communicate()
    assert next(iter(server.tasks)) in output.decode(), "the id is in the log as soon as it is known"
    assert not list(tmp_path.glob("*.mp4*"))
    server.tasks[next(iter(server.tasks))].statuses.clear()
    status, said = magi("--out", "clip.mp4")
    assert status == 0
    assert "nothing is submitted again" in said
    assert server.count("submit") == 1
    assert probe(tmp_path / "clip.mp4").frames == 96


def test_killed_while_the_request_is_answered(server, tmp_path, magi):
    """Nobody can know what became of it; the user is told how to find out, and the id brings the video."""
    server.script["submit"].append(lambda usual: Answer(content=usual.content, wait=20))
    running = process(server, tmp_path)
    wait_for(lambda: server.tasks, 60)
    running.kill()
    running.communicate()
    status, said = magi("--out", "clip.mp4")
    assert status == 1
    assert "a task may have been made" in said
    assert magi("--out", "clip.mp4", "--resume-id", next(iter(server.tasks)))[0] == 0
    assert server.count("submit") == 1


def test_killed_while_the_video_comes(server, tmp_path, magi):
    server.script["download"].append(lambda usual: Answer(content=usual.content, headers=usual.headers, pause=0.5))
    running = process(server, tmp_path)
    wait_for(lambda: server.count("download"), 60)
    running.kill()
    running.communicate()
    assert not list(tmp_path.glob("*.mp4")), "no half video under a final name"
    assert magi("--out", "clip.mp4")[0] == 0
    assert server.count("submit") == 1


def interrupted(running) -> bytes:
    """What a process says that Ctrl-C ends, within two seconds and Python's own end."""
    began = time.monotonic()
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=20)
    assert time.monotonic() - began < 2.5
    assert running.returncode == 130
    assert b"Traceback" not in output
    return output


@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process on Windows")
def test_ctrl_c(server, tmp_path):
    server.statuses = ("processing",) * 1000
    running = process(server, tmp_path)
    wait_for(lambda: server.count("poll"), 60)
    output = interrupted(running)
    assert b"is cancelled" in output
    assert server.count("delete") == 1


@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process on Windows")
def test_ctrl_c_in_a_poll_that_hangs(server, tmp_path):
    """The process does not end before the deletion of the task is sent."""
    server.statuses = ("processing",) * 1000
    server.script["poll"].extend([lambda usual: usual] + [Answer(wait=20)] * 5)
    running = process(server, tmp_path)
    wait_for(lambda: server.count("poll") == 2, 60)
    interrupted(running)
    assert server.count("delete") == 1


@pytest.mark.parametrize("port", [-1, 65536, 10**30])
def test_a_port_that_cannot_be(port, capsys):
    assert main(["remote", "--fake-server", "--port", str(port)]) == 1
    assert f"There is no port {port}." in capsys.readouterr().err


def test_what_the_service_says_on_a_terminal(magi, server):
    """No code for a terminal, and no key: also in the bar and the log."""
    said = f"\x1b]0;title\x07\x1b[2J<b>no{KEY}\u202e"
    server.script["poll"].extend([poll_answer(said), poll_answer(said), poll_answer("failed", error=said)])
    status, text = magi()
    assert status == 1
    assert "‹b›no***" in text
    assert not [c for c in text if not c.isprintable() and c not in "\r\n"]


def test_the_fake_server_for_users(tmp_path, monkeypatch, capsys):
    """Started by the command, used without any key."""
    monkeypatch.delenv("WAVESPEED_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    with FakeServer() as other:  # a port that is free again afterwards
        port = other.url.rpartition(":")[2]
        assert main(["remote", "--fake-server", "--port", port]) == 1, "it is taken"
        assert f"--port {int(port) + 1}" in capsys.readouterr().err
    command = [sys.executable, "-m", "magi", "remote", "--fake-server", "--port", port]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    serving = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **INTERRUPTIBLE)
    try:
        url = f"http://127.0.0.1:{port}"
        assert url in serving.stderr.readline()
        assert main(["remote", *SMALL, "--base-url", url, "--cache", "cache", "--out", "clip.mp4"]) == 0
        assert "there is no picture" in capsys.readouterr().err
        assert probe("clip.mp4").frames == 96
    finally:
        serving.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
        serving.communicate(timeout=10)
