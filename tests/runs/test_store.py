"""A run's folder: written whole or not at all, refused where it does not belong, and never the end of a run."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from magi.errors import MagiError
from magi.runs.autosave import Autosave
from magi.runs.identity import UNKNOWN, config_settings
from magi.runs.store import RunInUseError, RunStore
from magi.sampling.prepare import make_sampler
from magi.sampling.state import Chunk, SamplerState
from magi.system.whole_files import pack, tensor_digest, unpack

SETTINGS = {"seed": 1, "num_steps": 8, "text_scales": (7.5, 0.0), "prompt": ["Kätzchen"], "model": "ab" * 32}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "clip.run"


@pytest.fixture(scope="module")
def model(tiny_config, tiny_model):
    return tiny_model(tiny_config(distill=True, num_frames=72, num_steps=4))


@pytest.fixture
def go(model, tiny_caption):
    """(store, seconds=0, stop=None) -> digests of the chunks of a run that is kept there; `stop(event)` may raise."""

    def run(store, seconds=0.0, stop=None, model=model):
        autosave = Autosave(store, model, seconds)

        def progress(event):
            autosave.save_if_due()
            if stop:
                stop(event)

        sampler = make_sampler(
            model,
            caption=tiny_caption(),
            style_tokens=(),
            duration_tokens=False,
            state=autosave.state,
            progress=progress,
            heartbeat=lambda _: autosave.save_if_due(),
        )
        return [tensor_digest(chunk.latents) for chunk in autosave.chunks(sampler)]

    return run


def opened(folder, settings=SETTINGS, **options) -> RunStore:
    store = RunStore(folder, **options)
    store.open(settings)
    return store


class Stop(Exception):
    pass


def stop_at(iteration):
    def stop(event):
        if event.iteration == iteration:
            raise Stop

    return stop


@pytest.fixture
def whole(go, tmp_path) -> list[str]:
    return go(opened(tmp_path / "whole.run"))


@pytest.fixture
def stopped(go, folder) -> Path:
    """A run that was stopped in its fifth iteration: the first chunk of three is done."""
    with pytest.raises(Stop):
        go(opened(folder), stop=stop_at(6))
    return folder


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def state(iteration=1, value=0.0) -> SamplerState:
    return SamplerState(iteration, {0: torch.full((1, 16, 6, 4, 4), value)})


# -- what is there ------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_there_again(folder):
    store = opened(folder)
    store.keep_inputs({"caption.0": torch.ones(0, 12), "prefix": torch.full((1, 16, 1, 4, 4), 0.1)})
    chunks = [torch.rand(1, 16, 6, 4, 4), torch.rand(1, 16, 6, 4, 4).to(torch.bfloat16)]
    for i, latents in enumerate(chunks):
        store.add(Chunk(i, latents))
    saved = SamplerState(9, {2: torch.rand(1, 16, 6, 4, 4), 3: torch.rand(1, 16, 6, 4, 4)}, {1: chunks[0]})
    store.save(saved, 2, {"device": "cpu"})
    assert names(folder) == [
        *("chunk-00000.safetensors", "chunk-00001.safetensors"),
        *("inputs.safetensors", "run.json", "state.safetensors"),
    ]
    store.close()
    again = opened(folder)
    assert again.saved.state.iteration == 9
    assert torch.equal(again.saved.state.window[3], saved.window[3])
    assert set(again.saved.state.window) == {2, 3}
    assert torch.equal(again.saved.state.clean[1], chunks[0])
    assert (again.saved.finished, again.saved.environment) == (2, {"device": "cpu"})
    for i, chunk in enumerate(again.chunks()):
        assert chunk.index == i
        assert chunk.latents.dtype == torch.float32
        assert torch.equal(chunk.latents, chunks[i].float())
    assert again.inputs()["caption.0"].shape == (0, 12)
    assert again.inputs()["prefix"][0, 0, 0, 0, 0] == torch.tensor(0.1)
    assert "Kätzchen" in (folder / "run.json").read_text(encoding="utf-8"), "for people to read"


def test_no_folder_before_there_is_something_to_keep(go, folder):
    store = opened(folder)
    store.keep_inputs({"caption.0": torch.ones(1, 12)})
    with pytest.raises(Stop):
        go(store, stop=stop_at(1))
    assert not folder.exists()
    assert not store.exists
    assert RunStore(folder).inputs() is None


def test_a_finished_run_can_be_discarded_without_a_trace(go, folder, whole):
    store = opened(folder)
    assert go(store) == whole
    assert store.exists
    store.discard()
    assert not folder.exists()


def test_other_files_in_the_folder_stay(stopped):
    (stopped / "notes.txt").write_text("mine")
    (stopped / "mine.safetensors").touch()
    RunStore(stopped).discard()
    assert names(stopped) == ["mine.safetensors", "notes.txt"]


def test_unfinished_videos_that_were_noted(stopped):
    store = RunStore(stopped)
    store.note_partial(stopped.parent / "clip.partial.mp4")
    store.note_partial(stopped.parent / "clip.partial-2.mp4")
    assert RunStore(stopped).partials() == [stopped.parent / f"clip.partial{n}.mp4" for n in ("-2", "")]
    (stopped / "partials.json").write_text('["../../etc/hosts"]')
    assert RunStore(stopped).partials() == []


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
@pytest.mark.parametrize("iteration", range(1, 7))
def test_a_stopped_run_goes_on_from_the_iteration_it_was_in(go, folder, whole, iteration, seconds):
    with pytest.raises(Stop):
        go(opened(folder), seconds, stop_at(iteration))
    again, done = opened(folder), []
    assert (again.saved.state.iteration if again.saved else 0) == iteration - 1
    assert go(again, stop=lambda event: done.append(event.iteration)) == whole
    assert done == list(range(iteration, 7)), "nothing is made twice"


def test_between_chunks_it_is_saved_when_time_is_up_and_not_before(go, folder, monkeypatch):
    """Killed: no exception is there to save anything."""
    saved = []
    monkeypatch.setattr(RunStore, "save", lambda self, state, *_: saved.append(state.iteration))
    clock = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: next(clock) * 1.0)
    go(opened(folder), seconds=10**6)
    assert saved == [4, 5, 6]
    saved.clear()
    go(opened(folder), seconds=5)
    assert {2, 3, 4, 5, 6} <= set(saved)


def test_an_interrupt_between_a_chunk_and_its_saving_loses_no_chunk(go, folder, whole, monkeypatch):
    monkeypatch.setattr(RunStore, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go(opened(folder))
    monkeypatch.undo()
    again = opened(folder)
    assert again.saved.state.iteration == 3
    assert go(again) == whole


def test_the_transformer_computes_in_the_blocks_it_did(go, model, folder, monkeypatch):
    monkeypatch.setattr(model, "token_block", 512, raising=False)
    with pytest.raises(Stop):
        go(opened(folder), stop=stop_at(3))
    model.token_block = 1024
    go(opened(folder))
    assert model.token_block == 512


def test_another_version_of_torch_is_a_note(go, stopped, whole, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.warns(UserWarning, match=r"on cpu with torch .* resumed on cpu with torch 1\.0.*last bits"):
        assert go(opened(stopped)) == whole


@pytest.mark.gpu
def test_on_a_card_it_goes_on_to_the_same_bits(go, tiny_config, tiny_model, tmp_path):
    config = tiny_config(distill=True, num_frames=72, num_steps=4)
    card = tiny_model(config, device="cuda", dtype=torch.bfloat16)
    whole = go(opened(tmp_path / "whole.run"), model=card)
    with pytest.raises(Stop):
        go(opened(tmp_path / "clip.run"), stop=stop_at(6), model=card)
    again = opened(tmp_path / "clip.run")
    assert {x.device.type for x in again.saved.state.window.values()} == {"cpu"}
    assert go(again, model=card) == whole


# -- what does not belong -------------------------------------------------------------------------------------------------


def test_every_setting_that_differs_is_named_with_both_values(stopped):
    other = SETTINGS | {"seed": 2, "text_scales": [7.5, 1.0], "prompt": ["A dog"], "model": "cd" * 32, "new": None}
    with pytest.raises(MagiError) as caught:
        opened(stopped, other)
    message = str(caught.value)
    assert "the seed is 2, the saved run's 1" in message
    assert "the config's text_scales is 7.5, 1.0, the saved run's 7.5, 0.0" in message
    assert 'the prompt is "A dog", the saved run\'s "Kätzchen"' in message
    assert "the transformer's file is not the same" in message
    assert "steps" not in message
    assert "--overwrite" in message
    assert str(stopped) in message


def test_what_cannot_be_told_now_is_not_held_against_it(go, stopped, whole):
    store = opened(stopped, SETTINGS | {"model": UNKNOWN})
    assert go(store) == whole


@pytest.mark.parametrize("name", ["chunk-00000.safetensors", "state.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "garbage", "foreign", "a folder"])
def test_damaged_files_are_found_before_anything_runs(stopped, tmp_path, name, damage):
    file = stopped / name
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    foreign = pack(
        {"latents": torch.zeros(1, 16, 6, 4, 4)}, {"run": "another", "iteration": 1, "finished": 0, "how": {}}
    )
    content = {
        "cut": bytes(data[:-9]),
        "empty": b"",
        "changed": bytes(data),
        "garbage": b"\xff" * 500,
        "foreign": foreign,
    }
    if damage == "a folder":
        if name.startswith("state"):
            return  # then there is no saved run
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(content[damage])
    with pytest.raises(MagiError, match=rf"cannot be resumed: {name}: .*start over"):
        opened(stopped)


@pytest.mark.parametrize("name", ["chunk-00000.safetensors", "run.json"])
def test_missing_files(stopped, name):
    (stopped / name).unlink()
    with pytest.raises(MagiError, match=f"{name}: it is missing"):
        opened(stopped)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99, "settings": {}}', "\x00"])
def test_a_run_json_that_is_none(stopped, text):
    (stopped / "run.json").write_text(text)
    with pytest.raises(MagiError, match=r"run\.json"):
        opened(stopped)


@pytest.mark.parametrize("shape", [(1, 16, 6, 4), (1, 8, 6, 4, 4), (1, 16, 6, 8, 8)])
def test_chunks_of_another_shape(stopped, shape):
    name = "chunk-00000.safetensors"
    content = json.loads(pack_content(stopped / name))
    (stopped / name).write_bytes(pack({"latents": torch.zeros(shape)}, content))
    with pytest.raises(MagiError, match="latents"):
        opened(stopped)


def pack_content(file: Path) -> str:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["content"]


def test_a_state_of_a_longer_run_is_refused(stopped, model, tiny_caption):
    longer = make_sampler(model, caption=tiny_caption(), style_tokens=(), duration_tokens=False, num_frames=240)
    for _ in longer:
        pass
    options = {"caption": tiny_caption(), "style_tokens": (), "duration_tokens": False}
    for given, message in (
        (longer.state, "after 13 iterations, but the run has 6"),
        (SamplerState(3, {0: torch.zeros(1, 16, 6, 4, 4)}), r"in the window are \[0, 1, 2\], but the state has \[0\]"),
        (SamplerState(0, {}, {0: torch.zeros(1, 16, 6, 4, 4)}), r"clean are \[\], but the state has \[0\]"),
        (
            SamplerState(1, {0: torch.zeros(1, 16, 6, 8, 8)}),
            r"chunk 0 .* \(1, 16, 6, 8, 8\), the run's \(1, 16, 6, 4, 4\)",
        ),
        (SamplerState(-1), "-1 iterations"),
    ):
        with pytest.raises(MagiError, match=message):
            make_sampler(model, state=given, **options)


def test_what_a_crash_left_before_the_first_state_is_no_run(folder, go, whole):
    folder.mkdir()
    for name in ("run.json", "inputs.safetensors", f"state.safetensors.{'0' * 32}.tmp"):
        (folder / name).write_text("half")
    assert not RunStore(folder).exists
    store = opened(folder)
    assert store.saved is None
    assert not folder.exists()
    assert go(store) == whole


def test_half_a_file_beside_the_state_changes_nothing(stopped, go, whole):
    for name in ("state", "chunk-00001", "chunk-00000"):
        (stopped / f"{name}.safetensors.{'0' * 32}.tmp").write_bytes(b"half")
    store = opened(stopped)
    assert go(store) == whole
    store.discard()
    assert not stopped.exists()


def test_a_prompt_that_is_no_unicode(folder):
    settings = SETTINGS | {"prompt": ["a caf\udce9"]}
    opened(folder, settings).save(state(), 0, {})
    assert opened(folder, settings).saved.state.iteration == 1


def test_bytes_are_on_the_disk_before_they_get_their_name(folder, monkeypatch):
    """What a power cut can reach; a killed process leaves its writes to the system."""
    done, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("sync") or sync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, to: done.append(to.name) or replace(self, to))
    opened(folder).save(state(), 0, {})
    folders = [] if os.name == "nt" else ["sync"]
    assert done == ["sync", "run.json", *folders, "sync", "state.safetensors", *folders]


def test_settings_of_a_config(tiny_config):
    config = tiny_config()
    found = config_settings(config)
    assert {"num_steps", "window_size", "text_scales", "noise2clean_kvrange", "hidden_size", "distill"} <= set(found)
    assert config_settings(config.with_runtime(t5_device="cuda", load="/x").with_engine(pp_size=2)) == found
    assert config_settings(config.with_runtime(clean_t=0.5)) != found


# -- saving that fails ------------------------------------------------------------------------------------------------------


def test_a_full_disk_lets_the_run_go_on_and_the_last_state_stays(go, folder, whole, file_size_limit):
    notices = []
    store = opened(folder, on_notice=notices.append)
    with pytest.raises(Stop):
        go(store, stop=stop_at(5))
    good = (folder / "state.safetensors").read_bytes()
    store.close()
    again = opened(folder, on_notice=notices.append)
    with file_size_limit(3_000):
        assert go(again) == whole
    assert len(notices) == 1
    assert "The run continues" in notices[0]
    assert str(folder) in notices[0]
    assert (folder / "state.safetensors").read_bytes() == good
    assert not [name for name in names(folder) if name.endswith(".tmp")]
    again.close()
    assert go(opened(folder)) == whole


@pytest.mark.parametrize("function", ["replace", "open", "mkdir"])
def test_when_there_is_room_again_nothing_is_missing(go, folder, whole, monkeypatch, function):
    """Chunks that could not be written wait for the next try."""
    notices, store = [], opened(folder, on_notice=lambda text: notices.append(text))
    working, full = getattr(Path, function), [True]

    def fails(self, *args, **options):
        if full[0] and (function == "mkdir" or ".tmp" in self.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return working(self, *args, **options)

    def stop(event):
        full[0] = event.iteration <= 5
        if event.iteration == 6:
            raise Stop

    monkeypatch.setattr(Path, function, fails)
    with pytest.raises(Stop):
        go(store, stop=stop)
    assert len(notices) == 1
    assert "No space left" in notices[0]
    store.close()
    again = opened(folder)
    assert (again.saved.state.iteration, again.saved.finished) == (5, 2)
    assert go(again) == whole


def test_a_file_in_the_place_of_the_folder(go, folder, whole):
    folder.write_text("mine")
    with pytest.warns(UserWarning, match="cannot be saved in .*clip.run.*The run continues") as caught:
        assert go(opened(folder)) == whole
    assert len(caught) == 1, "said once"
    assert folder.read_text() == "mine"


def test_a_folder_that_vanishes_midway(go, folder, whole):
    def vanish(event):
        if event.iteration == 5:
            shutil.rmtree(folder)

    with pytest.warns(UserWarning, match=r"chunk-00000.*has been removed"):
        assert go(opened(folder), stop=vanish) == whole
    assert not folder.exists(), "a state without the chunks it speaks of would be worse than none"


def test_what_waits_to_be_written_does_not_grow_without_end(folder):
    folder.write_text("in the way")
    store = opened(folder, on_notice=lambda _: None)
    for i in range(200):
        store.add(Chunk(i, torch.zeros(1, 16, 1, 2, 2)))
        store.save(state(i + 1), i + 1, {})
    assert len(store._unwritten) < 100
    folder.unlink()
    store.save(state(300), 200, {})
    assert not store.exists, "a state that speaks of chunks that are lost would be worse than none"


# -- one owner, and files that are not trusted ------------------------------------------------------------------------------


def test_a_run_has_one_owner(stopped, go, whole):
    owner = opened(stopped)
    before = {file.name: file.read_bytes() for file in stopped.iterdir()}
    for attempt in (lambda: opened(stopped), RunStore(stopped).lock, RunStore(stopped).discard):
        with pytest.raises(RunInUseError, match=r"clip\.run' is being made at this moment.*Wait until"):
            attempt()
    assert {file.name: file.read_bytes() for file in stopped.iterdir()} == before
    owner.close()
    store = opened(stopped)
    assert go(store) == whole
    store.discard()
    assert list(stopped.parent.glob("clip*")) == []


@pytest.mark.parametrize("pair", [("chunk-00000", "chunk-00001"), ("state", "inputs"), ("inputs", "chunk-00000")])
def test_files_of_the_run_that_were_swapped(go, folder, pair):
    store = opened(folder)
    store.keep_inputs({"caption.0": torch.ones(1, 12)})
    with pytest.raises(Stop):
        go(store, stop=stop_at(6))
    store.close()
    store.add(Chunk(1, torch.ones(1, 16, 6, 4, 4)))
    store.save(state(99), 2, {})
    one, other = (folder / f"{name}.safetensors" for name in pair)
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    with pytest.raises(MagiError, match=r"it is another one of the run's files\. To start over"):
        opened(folder).inputs()


@pytest.mark.parametrize(
    "change",
    [
        {"iteration": "5"},
        {"iteration": 5.0},
        {"iteration": True},
        {"iteration": None},
        {"window_size": "2"},
        {"window_size": [2]},
        {"done": {}},
        {"finished": "many"},
        {"finished": float("inf")},
        {"finished": 10**12},
        {"how": 7},
        {"how": None},
    ],
    ids=str,
)
def test_a_state_of_other_types_is_damaged(stopped, change):
    """Whoever can write a file can also give it the right checksum."""
    file = stopped / "state.safetensors"
    tensors, content = unpack(file.read_bytes())
    file.write_bytes(pack(tensors, {**content, **change}))
    with pytest.raises(MagiError, match="cannot be resumed"):
        opened(stopped)


@pytest.mark.parametrize("block", [0, -5, "64", None, 1e9, [1]])
def test_a_token_block_that_is_none_is_not_taken(stopped, block, go, whole, model):
    file = stopped / "state.safetensors"
    tensors, content = unpack(file.read_bytes())
    file.write_bytes(pack(tensors, {**content, "how": {**content["how"], "token_block": block}}))
    before = model.token_block
    assert go(opened(stopped)) == whole
    assert model.token_block == before


@pytest.mark.parametrize("name", ["run.json", "finished.json", "partials.json", "result.json"])
def test_json_that_is_nested_without_end(stopped, name):
    (stopped / name).write_text("[" * 100_000)
    store = RunStore(stopped)
    assert (store.finished_by, store.partials(), store.made(stopped / "run.json")) == (None, [], False)
    if name == "run.json":
        with pytest.raises(MagiError, match=r"run\.json"):
            store.open(SETTINGS)


def test_the_result_is_known_by_its_bytes(stopped, tmp_path):
    store, video = RunStore(stopped), tmp_path / "clip.mp4"
    assert not store.made(video)
    video.write_bytes(b"video")
    store.note_result(video)
    assert store.made(video)
    video.write_bytes(b"other")
    assert not store.made(video)
