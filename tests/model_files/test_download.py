"""The downloader against a small Hub on this machine: whole, resumed, damaged, refused and cancelled downloads."""

import argparse
import errno
import hashlib
import json
import shutil
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from magi.cli import download as command_line
from magi.config import PRESETS
from magi.errors import MagiError
from magi.model_files import download, fetch
from magi.model_files.download import ITEMS, DownloadProgress, plan_download, run_download, verify_files

WEIGHTS = "ckpt/magi/4.5B_distill/inference_weight.distill/model-00001-of-00002.safetensors"
TOKENS = bytes(range(256)) * 30


def contents() -> dict[str, bytes]:
    files = {
        WEIGHTS: bytes(range(251)) * 8000,  # about 2 MB: several blocks
        WEIGHTS.replace("00001-of", "00002-of"): b"second" * 1000,
        WEIGHTS.rpartition("/")[0] + "/model.safetensors.index.json": b'{"weight_map": {}}',
        "ckpt/vae/config.json": b'{"ddconfig": {}}',
        "ckpt/vae/diffusion_pytorch_model.safetensors": b"vae" * 3000,
        "ckpt/t5/t5-v1_1-xxl/config.json": b"{}",
        "ckpt/t5/t5-v1_1-xxl/pytorch_model-00001-of-00002.bin": b"t5" * 4000,
        "README.md": b"not asked for",
    }
    return files | {
        f"ckpt/magi/{model}/w/model.safetensors": model.encode() for model in PRESETS if model != "4.5B_distill"
    }


class Hub(ThreadingHTTPServer):
    """Serves `files` as the Hub would; the other attributes make it misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = contents()
        self.listed = dict(self.files)  # what sizes and hashes are told of
        self.requests: list[tuple[str, str | None]] = []  # (path, Range)
        self.headers_seen: set[str] = set()
        self.cuts: list[int] = []  # send so many bytes of the next large answers, then hang up
        self.status: int | None = None
        self.ranges = True
        self.stalled = threading.Event()
        self.stall = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> list[str]:
        return [path for path, _ in self.requests if not path.startswith(("/api", "/sand-ai"))]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        byte_range = self.headers.get("Range")
        self.server.requests.append((path, byte_range))
        self.server.headers_seen |= {name.lower() for name in self.headers}
        if self.server.status:
            self.answer(self.server.status, b"no")
        elif path == "/api/models/sand-ai/MAGI-1":
            self.answer(200, json.dumps(self.listing()).encode(), {"Content-Type": "application/json"})
        elif path == "/special_tokens.npz":
            self.send_file(TOKENS, byte_range)
        elif path.startswith("/cdn/"):
            self.send_file(self.server.files[path.removeprefix("/cdn/")], byte_range)
        else:
            file = path.removeprefix("/sand-ai/MAGI-1/resolve/c0ffee/")
            self.answer(302, b"", {"Location": f"/cdn/{file}"})

    def listing(self) -> dict:
        siblings = []
        for name, data in self.server.listed.items():
            sibling = {"rfilename": name, "size": len(data), "blobId": "0"}
            if not name.endswith((".json", ".md")):
                sha256 = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 130}
            siblings.append(sibling)
        return {
            "id": "sand-ai/MAGI-1",
            "sha": "c0ffee",
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }

    def send_file(self, data: bytes, byte_range: str | None) -> None:
        if self.server.stall:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:1000])
            self.wfile.flush()
            self.server.stalled.wait(20)
            self.close_connection = True
            return
        start = int(byte_range.removeprefix("bytes=").rstrip("-")) if byte_range and self.server.ranges else 0
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        body = data[start:]
        cut = self.server.cuts.pop(0) if self.server.cuts and len(body) > 100_000 else len(body)
        self.answer(206 if start else 200, body, headers, cut)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = cut is not None and cut < len(body)


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(fetch, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(download, "SPECIAL_TOKENS_URL", f"{server.endpoint}/special_tokens.npz")
    monkeypatch.setattr("magi.sampling.special_tokens.SIZE", len(TOKENS))
    monkeypatch.setattr("magi.sampling.special_tokens.SHA256", hashlib.sha256(TOKENS).hexdigest())
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()


def below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_model_comes_whole_with_what_it_needs(hub, tmp_path):
    events: list[DownloadProgress] = []
    plan = plan_download(["4.5B_distill"], tmp_path, endpoint=hub.endpoint)
    assert hub.fetched() == []  # a plan fetches nothing
    run_download(plan, events.append)
    wanted = {n: d for n, d in hub.files.items() if n.startswith(("ckpt/magi/4.5B_distill/", "ckpt/vae/", "ckpt/t5/"))}
    assert below(tmp_path) == wanted | {"special_tokens.npz": TOKENS}
    assert {event.phase for event in events} == {"download", "verify"}
    assert {(e.path, e.total) for e in events if e.done == e.total} >= {(WEIGHTS, len(hub.files[WEIGHTS]))}
    assert all(0 <= e.done <= e.total and 1 <= e.index <= e.count == len(plan.files) for e in events)
    assert "user-agent" in hub.headers_seen
    assert "authorization" not in hub.headers_seen


def test_only_leaves_the_companions_out(hub, tmp_path):
    plan = plan_download(["24B_base"], tmp_path, only=True, endpoint=hub.endpoint)
    assert [file.item for file in plan.files] == ["24B_base"]
    assert {file.item for file in plan_download(ITEMS, tmp_path, endpoint=hub.endpoint).files} == set(ITEMS)
    # 4.5B_distill must not take 4.5B_distill_quant along.
    assert not any("quant" in f.path for f in plan_download(["4.5B_distill"], tmp_path, endpoint=hub.endpoint).files)


def test_special_tokens_need_no_hub(hub, tmp_path):
    run_download(plan_download(["special_tokens"], tmp_path, endpoint="http://127.0.0.1:9"))
    assert below(tmp_path) == {"special_tokens.npz": TOKENS}


def test_what_is_in_place_is_not_fetched_again(hub, tmp_path):
    for _ in range(2):
        run_download(plan_download(["vae"], tmp_path, endpoint=hub.endpoint))
    assert len(hub.fetched()) == 2
    (tmp_path / "ckpt/vae/config.json").write_bytes(b"of another length")
    plan = plan_download(["vae"], tmp_path, endpoint=hub.endpoint)
    assert [file.path for file in plan.missing] == ["ckpt/vae/config.json"]
    run_download(plan)
    assert (tmp_path / "ckpt/vae/config.json").read_bytes() == hub.files["ckpt/vae/config.json"]


def test_verify_finds_a_damaged_file_in_place(hub, tmp_path):
    plan = plan_download(["vae"], tmp_path, endpoint=hub.endpoint)
    run_download(plan)
    damaged = tmp_path / "ckpt/vae/diffusion_pytorch_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    plan = plan_download(["vae"], tmp_path, endpoint=hub.endpoint)
    assert not plan.missing
    checked = verify_files(plan)
    assert [file.target for file in checked.missing] == [damaged]
    run_download(checked)
    assert not verify_files(plan_download(["vae"], tmp_path, endpoint=hub.endpoint)).missing


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_cut_connection_is_resumed(hub, tmp_path, ranges):
    hub.ranges, hub.cuts = ranges, [900_000, 600_000]
    run_download(plan_download(["4.5B_distill"], tmp_path, only=True, endpoint=hub.endpoint))
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert not list(tmp_path.rglob("*.part"))
    asked = [start for path, start in hub.requests if path == f"/cdn/{WEIGHTS}"]
    assert asked[0] is None
    assert len(asked) == 3
    assert all(asked[1:])


def test_the_next_run_resumes_where_one_was_cancelled(hub, tmp_path):
    hub.cuts = [900_000] + [0] * 9

    with pytest.raises(MagiError, match=r"kept.*again to resume"):
        run_download(plan_download(["4.5B_distill"], tmp_path, only=True, endpoint=hub.endpoint))
    part = fetch.part_of(tmp_path / WEIGHTS)
    kept = part.stat().st_size
    assert 0 < kept <= 900_000
    assert not (tmp_path / WEIGHTS).exists()

    hub.cuts, hub.requests = [], []
    plan = plan_download(["4.5B_distill"], tmp_path, only=True, endpoint=hub.endpoint)
    assert plan.bytes_missing == sum(file.size for file in plan.missing) - kept
    run_download(plan)
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert [start for path, start in hub.requests if path == f"/cdn/{WEIGHTS}"] == [f"bytes={kept}-"]


def test_cancel_works_while_the_network_is_silent(hub, tmp_path):
    class Cancel(Exception):
        pass

    hub.stall = True
    begun = time.monotonic()

    def progress(event: DownloadProgress) -> None:
        if time.monotonic() - begun > 0.3:
            raise Cancel

    plan = plan_download(["4.5B_distill"], tmp_path, only=True, endpoint=hub.endpoint)
    with pytest.raises(Cancel):
        run_download(plan, progress)
    assert time.monotonic() - begun < 5
    assert not (tmp_path / WEIGHTS).exists()
    hub.stall = False
    hub.stalled.set()
    run_download(plan)
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_damage_on_the_way_is_found_and_nothing_kept(hub, tmp_path):
    hub.files[WEIGHTS] = hub.files[WEIGHTS][:-1] + b"!"
    with pytest.raises(MagiError, match=r"00001-of-00002\.safetensors is damaged .*Run this again"):
        run_download(plan_download(["4.5B_distill"], tmp_path, only=True, endpoint=hub.endpoint))
    assert WEIGHTS not in below(tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_longer_than_listed_is_refused(hub, tmp_path):
    hub.files[WEIGHTS] += b"more"
    with pytest.raises(MagiError, match="more than"):
        run_download(plan_download(["4.5B_distill"], tmp_path, only=True, endpoint=hub.endpoint))
    assert not (tmp_path / WEIGHTS).exists()


def test_a_left_over_part_of_another_version_is_dropped(hub, tmp_path):
    part = fetch.part_of(tmp_path / "ckpt/vae/config.json")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"longer than the file" * 100)
    run_download(plan_download(["vae"], tmp_path, endpoint=hub.endpoint))
    assert (tmp_path / "ckpt/vae/config.json").read_bytes() == hub.files["ckpt/vae/config.json"]


def test_too_small_a_disk_is_told_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    plan = plan_download(["vae"], tmp_path / "not" / "there", endpoint=hub.endpoint)
    with pytest.raises(MagiError, match=r"needs 0\.0 MB, and the disk .* has 0\.0 MB free"):
        run_download(plan)
    assert hub.fetched() == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_came(hub, tmp_path, monkeypatch):
    plan = plan_download(["special_tokens"], tmp_path)
    part = fetch.part_of(tmp_path / "special_tokens.npz")
    part.write_bytes(TOKENS[:100])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    receive = fetch._receive
    monkeypatch.setattr(fetch, "_receive", full)
    with pytest.raises(MagiError, match="full: free some space, then run this again"):
        run_download(plan)
    assert part.read_bytes() == TOKENS[:100]
    monkeypatch.setattr(fetch, "_receive", receive)
    run_download(plan)
    assert below(tmp_path) == {"special_tokens.npz": TOKENS}


def test_a_folder_that_is_a_file_is_told(hub, tmp_path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(MagiError, match="Choose a folder that can be written"):
        run_download(plan_download(["special_tokens"], tmp_path / "models"))


def test_large_downloads_ask(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ASK_ABOVE", 1000)
    plan = plan_download(["vae"], tmp_path, endpoint=hub.endpoint)
    questions: list[str] = []
    for ask in (None, lambda question: bool(questions.append(question))):
        with pytest.raises(MagiError, match="Nothing was downloaded"):
            run_download(plan, ask=ask)
    assert hub.fetched() == []
    assert len(questions) == 1
    assert str(tmp_path) in questions[0]
    run_download(plan, ask=lambda question: True)
    shutil.rmtree(tmp_path / "ckpt")
    run_download(plan, yes=True)
    assert len(hub.fetched()) == 4


def test_out_of_reach_names_mirrors_and_the_way_by_hand(tmp_path):
    with pytest.raises(MagiError) as caught:
        plan_download(["vae"], tmp_path, endpoint="http://127.0.0.1:9")
    for remedy in (
        "HF_ENDPOINT",
        "HTTPS_PROXY",
        "https://huggingface.co/sand-ai/MAGI-1/tree/main/ckpt/vae",
        str(tmp_path),
    ):
        assert remedy in str(caught.value)


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_refusing_hub_is_told(hub, tmp_path, status):
    plan = plan_download(["vae"], tmp_path, endpoint=hub.endpoint)
    hub.status = status
    with pytest.raises(MagiError, match=rf"answers {status}"):
        run_download(plan)
    with pytest.raises(MagiError, match=rf"answers {status}") as caught:
        plan_download(["vae"], tmp_path, endpoint=hub.endpoint)
    assert "hf_secret" not in str(caught.value)
    assert below(tmp_path).keys() <= {"ckpt/vae/config.json.part"}


def test_a_lost_server_is_tried_again_and_then_told(hub, tmp_path, monkeypatch):
    plan = plan_download(["vae"], tmp_path, endpoint=hub.endpoint)
    tries = []

    def offline(*args: object, **kwargs: object) -> None:
        tries.append(args)
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(MagiError, match=r"no route to host.*HF_ENDPOINT") as caught:
        run_download(plan)
    assert repr(str(tmp_path / "ckpt" / "vae" / "config.json")) in str(caught.value)
    assert len(tries) == 1 + len(fetch.WAITS)


def test_bad_names_and_listings_are_told(hub, tmp_path):
    with pytest.raises(MagiError, match=r"'7B'.*4\.5B_base"):
        plan_download(["vae", "7B"], tmp_path, endpoint=hub.endpoint)
    with pytest.raises(MagiError, match="Choose from"):
        plan_download([], tmp_path, endpoint=hub.endpoint)
    hub.listed = {"ckpt/vae/../../../evil.py": b"x"}
    with pytest.raises(MagiError, match="outside of its folder"):
        plan_download(["vae"], tmp_path, endpoint=hub.endpoint)
    with pytest.raises(MagiError, match="lists no ckpt/t5/"):
        plan_download(["t5"], tmp_path, endpoint=hub.endpoint)


def command(hub, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command_line.add_arguments(parser)
    return command_line.main(parser.parse_args([*arguments, "--endpoint", hub.endpoint]))


def test_command_line(hub, tmp_path, capsys, monkeypatch):
    folder = str(tmp_path / "models")
    for arguments in ((), ("--list",), ("vae", "--list")):
        assert command(hub, *arguments, "--folder", folder) == 0
    shown = capsys.readouterr().out
    assert all(item in shown for item in ITEMS)
    assert "0 of 2 files in place" in shown
    assert hub.fetched() == []

    assert command(hub, "vae", "--folder", folder, "--verify") == 0
    assert "All 2 files are in place" in capsys.readouterr().out
    assert command(hub, "vae", "--folder", folder, "--list", "--verify") == 0
    assert "in place" in capsys.readouterr().out

    monkeypatch.setattr(download, "ASK_ABOVE", 1000)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(MagiError, match="Nothing was downloaded"):
        command(hub, "t5", "--folder", folder)
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert command(hub, "t5", "--folder", folder) == 0


def test_a_file_that_another_process_is_downloading(hub, tmp_path):
    """Two of them would write into the same partial file."""
    plan = plan_download(["special_tokens"], tmp_path)
    (file,) = plan.files
    part = fetch.part_of(file.target)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(TOKENS[:100])
    other = fetch.OwnerLock(part.with_name(f"{part.name}.lock"))
    assert other.acquire()
    with pytest.raises(MagiError, match="is being downloaded at this moment"):
        run_download(plan)
    assert part.read_bytes() == TOKENS[:100]
    other.release()
    run_download(plan)
    assert file.target.read_bytes() == TOKENS
    assert [path.name for path in file.target.parent.iterdir()] == [file.target.name]
