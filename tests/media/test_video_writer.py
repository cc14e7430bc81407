# ruff: noqa: PT012, PT031 (the subject is how a with-block ends)
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from magi.errors import MagiError
from magi.media import mp4_fragments
from magi.media.mp4_fragments import boxes
from magi.media.video_reader import probe, read_video
from magi.media.video_writer import VideoWriter, read_metadata

H, W = 48, 64


def clip(count: int, first: int = 0) -> torch.Tensor:
    """Frames with a colour gradient on the left and, on the right, a grey that tells their number."""
    frames = torch.zeros(count, H, W, 3, dtype=torch.uint8)
    frames[..., 0] = torch.linspace(0, 255, W).round().to(torch.uint8)
    frames[..., 1] = torch.linspace(255, 0, H).round().to(torch.uint8)[:, None]
    frames[:, :, W // 2 :] = (20 + 3 * torch.arange(first, first + count)).to(torch.uint8)[:, None, None, None]
    return frames


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual.float() - expected.float()).square().mean((1, 2, 3))
    psnr = 10 * torch.log10(255**2 / error)
    assert psnr.min() > 35, psnr
    greys = [frames[:, 8:-8, W // 2 + 8 : -8].float().mean((1, 2, 3)) for frames in (actual, expected)]
    assert (greys[0] - greys[1]).abs().max() < 1.5, greys  # no frame stands in its neighbour's place


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# A clean end


def test_chunks_become_one_ordinary_mp4(tmp_path: Path):
    frames = clip(60)
    with VideoWriter(tmp_path / "new folder" / "a.mp4", H, W) as writer:
        for chunk in (frames[:24], frames[24:48], frames[48:49], frames[49:]):
            writer.write(chunk)
    assert writer.frames_written == 60
    assert names(tmp_path / "new folder") == ["a.mp4"]
    assert_same(read_video(writer.path), frames)
    info = probe(writer.path)
    assert (info.fps, info.frames, info.seconds) == (24, 60, 2.5)
    with av.open(str(writer.path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.start_time == 0
        packets = [packet for packet in file.demux(stream) if packet.pts is not None]
        times = [packet.pts * packet.time_base for packet in packets]
        assert times == [Fraction(n, 24) for n in range(60)]
        assert [n for n, packet in enumerate(packets) if packet.is_keyframe] == [0, 24, 48, 49]
    with av.open(str(writer.path)) as file:
        assert int(next(file.decode(video=0)).colorspace) == 1  # BT.709
    with writer.path.open("rb") as data:
        kinds = [kind for kind, _, _ in boxes(data)]
    assert kinds.index(b"moov") < kinds.index(b"mdat")
    assert b"moof" not in kinds


def test_one_long_write_is_cut_into_pieces_and_reports_progress(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    with VideoWriter(tmp_path / "a.mp4", H, W) as writer:
        writer.write(clip(0))
        writer.write(clip(70), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 70) for n in range(1, 71)]
    assert_same(read_video(writer.path), clip(70))


@pytest.mark.parametrize("fps", [8, Fraction(30000, 1001), 60])
def test_other_rates(tmp_path: Path, fps: Fraction):
    with VideoWriter(tmp_path / "a.mp4", H, W, fps=fps) as writer:
        writer.write(clip(20))
        writer.write(clip(20, 20))
    info = probe(writer.path)
    assert (info.fps, info.frames) == (fps, 40)
    assert_same(read_video(writer.path, fps=fps), clip(40))


def test_quality_follows_crf(tmp_path: Path):
    sizes = []
    for crf in (1, 18, 40):
        with VideoWriter(tmp_path / f"{crf}.mp4", H, W, crf=crf) as writer:
            writer.write(torch.randint(0, 256, (4, H, W, 3), generator=torch.manual_seed(0)).to(torch.uint8))
        sizes.append(writer.path.stat().st_size)
    assert sizes[0] > sizes[1] * 1.3 > sizes[2] * 1.3


def test_the_same_frames_give_the_same_bytes(tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        with VideoWriter(tmp_path / name, H, W) as writer:
            writer.write(clip(10))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("extra", [{}, {"workflow": '{"nodes": []}'}])
def test_metadata_survives(tmp_path: Path, extra: dict[str, str]):
    settings = json.dumps({"prompt": "a cat; = \\ 'quoted'\nünïcode 猫", "seed": 7}, ensure_ascii=False)
    tags = {"title": "A cat", "comment": settings, **extra}
    with VideoWriter(tmp_path / "a.mp4", H, W, metadata=tags) as writer:
        writer.write(clip(3))
        assert read_metadata(writer.partial_path) == tags
    assert read_metadata(tmp_path / "a.mp4") == tags


def test_overwriting_must_be_asked_for_and_happens_at_the_end(tmp_path: Path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(MagiError, match=r"a\.mp4' exists"):
        VideoWriter(path, H, W)
    with VideoWriter(path, H, W, overwrite=True) as writer:
        writer.write(clip(3))
        assert path.read_bytes() == b"precious"
    assert names(tmp_path) == ["a.mp4"]
    assert len(read_video(path)) == 3


# Other ends


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_an_exception_keeps_what_was_written(tmp_path: Path, end: type[BaseException]):
    with pytest.raises(end), VideoWriter(tmp_path / "a.mp4", H, W) as writer:
        writer.write(clip(24))
        writer.write(clip(6, 24))
        assert len(read_video(writer.partial_path)) == 30  # at once, while it is still open
        raise end
    assert writer.frames_written == 30
    assert names(tmp_path) == ["a.partial.mp4"] == [writer.partial_path.name]
    assert_same(read_video(writer.partial_path), clip(30))


def test_cancelling_within_a_write_keeps_the_chunks_before(tmp_path: Path):
    def progress(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", H, W) as writer:
        writer.write(clip(24))
        writer.write(clip(24, 24), progress=progress)
    assert writer.frames_written == 24
    assert_same(read_video(writer.partial_path), clip(24))


def test_without_a_frame_nothing_is_left(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", H, W):
        raise KeyboardInterrupt
    with pytest.raises(MagiError, match="No frame was written"), VideoWriter(tmp_path / "a.mp4", H, W) as writer:
        writer.write(clip(0))
    VideoWriter(tmp_path / "a.mp4", H, W)  # made and never used, as when loading a model fails
    assert names(tmp_path) == []


def test_chunks_of_an_earlier_run_are_not_overwritten(tmp_path: Path):
    for length in (5, 7):
        with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", H, W) as writer:
            writer.write(clip(length))
            raise RuntimeError
    assert names(tmp_path) == ["a.partial-2.mp4", "a.partial.mp4"]
    assert [len(read_video(tmp_path / name)) for name in names(tmp_path)] == [7, 5]


KILLED = """
import sys, torch
from magi.media.video_writer import VideoWriter
def stop(done, total):
    if done == 10:
        print("mid-write", flush=True)
        sys.stdin.read()
with VideoWriter(sys.argv[1], 48, 64) as writer:
    for level in (50, 150):
        writer.write(torch.full((24, 48, 64, 3), level, dtype=torch.uint8))
    writer.write(torch.zeros(24, 48, 64, 3, dtype=torch.uint8), progress=stop)
"""


def test_a_killed_process_leaves_a_playable_file(tmp_path: Path):
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "a.mp4")], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"mid-write"
        process.kill()
    assert names(tmp_path) == ["a.partial.mp4"]
    levels = read_video(tmp_path / "a.partial.mp4").float().mean((1, 2, 3))
    assert levels.shape == (48,)
    assert (levels - torch.tensor([50.0, 150.0]).repeat_interleave(24)).abs().max() < 2


def test_a_crash_at_any_byte_spoils_no_chunk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The machine dies while a chunk is on its way to the disk: any part of what was written until then may be there."""
    states: list[bytes] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        fsync(descriptor)
        states.append(writer.partial_path.read_bytes())

    with VideoWriter(tmp_path / "a.mp4", H, W) as writer:
        monkeypatch.setattr("os.fsync", spy)
        writer.write(clip(24))
        writer.write(clip(24, 24))
        monkeypatch.undo()
    before, on_the_way, after = states[1], states[2], states[3]
    for size in (len(before) + 1, len(before) + 8, len(before) + 40, len(before) + 500, len(after) - 1, len(after)):
        (tmp_path / "torn.mp4").write_bytes(on_the_way[:size])
        assert_same(read_video(tmp_path / "torn.mp4"), clip(24))
    (tmp_path / "torn.mp4").write_bytes(after)
    assert_same(read_video(tmp_path / "torn.mp4"), clip(48))


# A full disk


def noise(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, H, W, 3), generator=torch.manual_seed(0)).to(torch.uint8)


def test_a_full_disk_while_writing_keeps_the_chunks_before(tmp_path: Path, file_size_limit):
    with (
        pytest.raises(MagiError, match=r"cannot be written: .*room in .*first 24 frames are kept.*a\.partial\.mp4"),
        VideoWriter(tmp_path / "a.mp4", H, W) as writer,
    ):
        writer.write(noise(24))
        with file_size_limit(writer.partial_path.stat().st_size + 5000):
            writer.write(noise(24))
    assert names(tmp_path) == ["a.partial.mp4"]
    assert len(read_video(writer.partial_path)) == 24
    with writer.partial_path.open("rb") as data:
        assert sum(list(boxes(data))[-1][1:]) == writer.partial_path.stat().st_size  # no torn chunk behind


@pytest.mark.parametrize("missing", [1, 300, 20_000])
def test_a_full_disk_while_finishing_keeps_everything(tmp_path: Path, missing: int, file_size_limit):
    with VideoWriter(tmp_path / "whole.mp4", H, W) as writer:
        writer.write(noise(24))
    size = writer.path.stat().st_size
    with (
        pytest.raises(MagiError, match=r"cannot be finished: .*first 24 frames are kept"),
        file_size_limit(size - missing),
        _written(tmp_path / "a.mp4", noise(24), file_size_limit(size * 2)),
    ):
        pass
    assert names(tmp_path) == ["a.partial.mp4", "whole.mp4"]
    assert len(read_video(tmp_path / "a.partial.mp4")) == 24


@contextmanager
def _written(path: Path, frames: torch.Tensor, limit: AbstractContextManager[None]) -> Iterator[None]:
    """A writer that has its frames; the limit outside counts from here on."""
    with VideoWriter(path, H, W) as writer:
        with limit:
            writer.write(frames)
        yield


def test_a_full_disk_at_the_first_chunk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with (
        pytest.raises(MagiError, match=r"No space left on device.*Nothing had been written"),
        VideoWriter(tmp_path / "a.mp4", H, W) as writer,
    ):
        writer.write(clip(24))
    assert names(tmp_path) == []


# Encoders


def test_without_an_h264_encoder_mpeg4_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mp4_fragments, "ENCODERS", ("absent", "mpeg4"))
    with pytest.warns(UserWarning, match="MPEG-4 Part 2"), VideoWriter(tmp_path / "a.mp4", H, W) as writer:
        writer.write(clip(24))
        writer.write(clip(24, 24))
    frames = read_video(writer.path)
    assert frames.shape == (48, H, W, 3)
    assert (frames.float() - clip(48).float()).abs().mean() < 6
    assert probe(writer.path).fps == 24


def test_without_any_encoder_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mp4_fragments, "ENCODERS", ("absent",))
    with pytest.raises(MagiError, match="No encoder of this PyAV can write 64x48"):
        VideoWriter(tmp_path / "a.mp4", H, W)


# Bad input


def test_names_that_cannot_be_written_are_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for name, message in (
        ("a.avi", "does not end in .mp4"),
        ("noending", "does not end in .mp4"),
        ("folder.mp4", "is a folder"),
        ("file/a.mp4", "cannot be made"),
        ("x" * 300 + ".mp4", "cannot be"),
    ):
        with pytest.raises(MagiError, match=message):
            VideoWriter(tmp_path / name, H, W)

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("magi.media.video_writer.FileIO", read_only)
    with pytest.raises(MagiError, match=r"cannot be written: Permission denied.*choose a folder that can be written"):
        VideoWriter(tmp_path / "a.mp4", H, W)
    assert names(tmp_path) == ["file", "folder.mp4"]


def test_bad_arguments_name_the_value(tmp_path: Path):
    for arguments, message in (
        ((49, W), "Height 49 is not a multiple of 2; the nearest are 48 and 50"),
        ((H, 0), "Width 0"),
        ((H, W, 0), "fps is 0"),
        ((H, W, 24, 99), "crf is 99"),
    ):
        with pytest.raises(MagiError, match=message):
            VideoWriter(tmp_path / "a.mp4", *arguments)
    assert names(tmp_path) == []


def test_frames_of_another_kind_are_refused(tmp_path: Path):
    with pytest.raises(MagiError, match=r"torch\.float32"), VideoWriter(tmp_path / "a.mp4", H, W) as writer:
        writer.write(clip(2).float())
    with pytest.raises(MagiError, match=r"\(2, 64, 48, 3\)"), VideoWriter(tmp_path / "a.mp4", H, W) as writer:
        writer.write(clip(2).transpose(1, 2))
    assert names(tmp_path) == []


def test_metadata_of_something_else(tmp_path: Path):
    (tmp_path / "a.mp4").write_text("text")
    with pytest.raises(MagiError, match="is not a video"):
        read_metadata(tmp_path / "a.mp4")
    with pytest.raises(MagiError, match="There is no file"):
        read_metadata(tmp_path / "absent.mp4")


@pytest.mark.parametrize("key", ["comment", "workflow"])
def test_texts_that_no_encoding_holds(tmp_path: Path, key: str):
    text = "half \ud83d, whole \ud83d\ude00 and \udce9 with\0more"
    with VideoWriter(tmp_path / "a.mp4", H, W, metadata={key: text, "ti\udc80tle": "x"}) as writer:
        writer.write(clip(2))
    tags = read_metadata(tmp_path / "a.mp4")
    assert tags[key] == "half \ufffd, whole \U0001f600 and \ufffd with\ufffdmore"


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_a_name_in_another_encoding(tmp_path: Path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    with VideoWriter(path, H, W, metadata={"title": str(path)}) as writer:
        writer.write(clip(2))
    assert len(read_video(path)) == 2
    assert read_metadata(path)["title"].endswith("caf\ufffd.mp4")


def test_a_name_that_no_system_can_have(tmp_path: Path):
    for name in ("a\ud800.mp4", "a\0.mp4", "\ud800/a.mp4"):
        with pytest.raises(MagiError, match="a name that no file can have"):
            VideoWriter(tmp_path / name, H, W)
        with pytest.raises(MagiError, match="There is no file"):
            read_metadata(tmp_path / name)
