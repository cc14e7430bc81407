"""Checkpoints of random weights: what readers make of them, and what is left where writing ends early."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from magi.checkpoint.mapped_file import MappedFile, TensorInfo
from magi.checkpoint.reader import Checkpoint
from magi.checkpoint.writer import write_checkpoint
from magi.cli.main import main
from magi.config import PRESETS, MagiConfig, ModelConfig
from magi.errors import MagiError
from magi.model_files.identify import recognise, resolve_config
from magi.model_files.load import load_transformer
from magi.system.owner_lock import OwnerLock
from magi.transformer.random_weights import RandomTensors
from magi.transformer.weights import tensor_shapes

TINY = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, kv_channels=8)


class Cancelled(BaseException):
    """As Ctrl-C is none of the ordinary exceptions."""


@pytest.fixture
def source():
    return RandomTensors(TINY, fp8=True)


@pytest.fixture
def presets(monkeypatch):
    """The released models, each with a tiny transformer."""
    tiny = {name: replace(config, model=TINY) for name, config in PRESETS.items()}
    for name, config in tiny.items():
        monkeypatch.setitem(PRESETS, name, config)
    return tiny


@pytest.fixture
def synth(tmp_path, monkeypatch, capsys):
    """(*arguments) -> (exit status, stderr without progress bars)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        status = main(["synth", *map(str, arguments)])
        return status, capsys.readouterr().err.split("\r")[-1].strip()

    return run


def contents(path: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(path) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [None, 20_000, 10**9, 1])
def test_what_is_read_is_what_was_to_be_written(source, tmp_path, shard_bytes):
    files = write_checkpoint(source, tmp_path / "new" / "folder", shard_bytes=shard_bytes)
    found = contents(tmp_path / "new" / "folder")
    assert found.keys() == tensor_shapes(TINY, fp8=True).keys()
    assert all(same(found[name], source.tensor(name)) for name in found)
    assert len(files) == {None: 1, 20_000: len(files), 10**9: 1, 1: len(found)}[shard_bytes]
    if shard_bytes == 20_000:
        assert len(files) > 3
        for file in files:
            sizes = [info.nbytes for info in MappedFile(file).tensors.values()]
            assert sum(sizes) <= shard_bytes or len(sizes) == 1


def test_the_safetensors_library_reads_them_too(source, tmp_path):
    (file,) = write_checkpoint(source, tmp_path / "model.safetensors", metadata={"model": "ä"})
    with safe_open(file, "pt") as theirs:
        assert theirs.metadata() == {"model": "ä"}
        assert set(theirs.keys()) == set(source.tensors)
        assert all(same(theirs.get_tensor(name), source.tensor(name)) for name in source.tensors)


def test_tensors_are_aligned(tmp_path):
    class Odd:
        tensors = {  # noqa: RUF012
            name: TensorInfo((3,), dtype, Path()) for name, dtype in (("a", "F8_E4M3"), ("b", "BF16"), ("c", "F32"))
        }

        def tensor(self, name):
            return torch.zeros(3 * {"a": 1, "b": 2, "c": 4}[name], dtype=torch.uint8)

    (file,) = write_checkpoint(Odd(), tmp_path / "model.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    widths = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    assert all((8 + length + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0 for entry in header.values())


def test_one_tensor_is_held_at_a_time(tmp_path):
    """A file of a terabyte would do; its tensors come, are written and go."""
    alive = 0

    class Counted(RandomTensors):
        def tensor(self, name):
            nonlocal alive
            import weakref

            tensor = super().tensor(name)
            alive += 1
            assert alive <= 2, "the next one is made while the last one is let go of"

            def gone():
                nonlocal alive
                alive -= 1

            weakref.finalize(tensor, gone)
            return tensor

    write_checkpoint(Counted(TINY), tmp_path / "model.safetensors")
    assert alive == 0


def test_progress_counts_the_bytes_of_the_files(source, tmp_path):
    steps = []
    files = write_checkpoint(source, tmp_path / "m", shard_bytes=50_000, progress=lambda *at: steps.append(at))
    size = sum(file.stat().st_size for file in files)
    assert steps[-1] == (size, size)
    assert steps == sorted(steps)


def test_large_tensors_are_written_in_parts(tmp_path):
    class Large:
        tensors = {"large": TensorInfo((3 << 24,), "U8", Path())}  # noqa: RUF012

        def tensor(self, name):
            return torch.arange(3 << 24, dtype=torch.int32).to(torch.uint8)

    steps = []
    write_checkpoint(Large(), tmp_path / "m.safetensors", progress=lambda *at: steps.append(at))
    assert len(steps) >= 3, "Ctrl-C and the bar do not wait for a whole tensor"
    assert torch.equal(contents(tmp_path / "m.safetensors")["large"], Large().tensor("large"))


# -- work that ends early ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["m.safetensors", "new/folder"])
def test_a_cancel_leaves_nothing(source, tmp_path, target):
    def cancel(done, total):
        if done > total / 2:
            assert list(tmp_path.rglob("*.partial")), "it is under way"
            raise Cancelled

    with pytest.raises(Cancelled):
        write_checkpoint(source, tmp_path / target, shard_bytes=None, progress=cancel)
    assert list(tmp_path.rglob("*")) == []


def test_a_cancel_leaves_what_was_there(source, tmp_path):
    write_checkpoint(source, tmp_path, shard_bytes=50_000)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def cancel(done, total):
        if done == total:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_checkpoint(RandomTensors(TINY, seed=1), tmp_path, shard_bytes=60_000, overwrite=True, progress=cancel)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_full_disk_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(source, "tensor", lambda name: pytest.fail("made for nothing"))
    with pytest.raises(MagiError, match=r"takes 0\.01 GB.*has 0\.00 GB free"):
        write_checkpoint(source, tmp_path / "new" / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(source, tmp_path, file_size_limit):
    with file_size_limit(50_000), pytest.raises(MagiError, match=r"m\.safetensors' cannot be written.*GB free"):
        write_checkpoint(source, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


# -- what is there already ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["m.safetensors", "folder"])
def test_what_is_there_is_replaced_only_on_request(source, tmp_path, target):
    write_checkpoint(source, tmp_path / target)
    before = contents(tmp_path / target)
    with pytest.raises(MagiError, match=r"is there already.*--overwrite"):
        write_checkpoint(RandomTensors(TINY, seed=1), tmp_path / target)
    assert all(same(before[name], tensor) for name, tensor in contents(tmp_path / target).items())
    write_checkpoint(RandomTensors(TINY, seed=1), tmp_path / target, overwrite=True)
    assert not same(contents(tmp_path / target)["x_embedder.weight"], source.tensor("x_embedder.weight"))


@pytest.mark.parametrize(("first", "second"), [(None, 50_000), (50_000, None), (30_000, 60_000)])
def test_what_replaces_shards_leaves_none_of_them(source, tmp_path, first, second):
    write_checkpoint(source, tmp_path, shard_bytes=first)
    files = write_checkpoint(RandomTensors(TINY, seed=1), tmp_path, shard_bytes=second, overwrite=True)
    index = [] if second is None else [tmp_path / "model.safetensors.index.json"]
    assert sorted(tmp_path.iterdir()) == sorted([*files, *index])
    assert contents(tmp_path).keys() == tensor_shapes(TINY).keys()


def test_another_models_folder_is_left_alone(source, tmp_path):
    (tmp_path / "t5xxl.safetensors").write_bytes(b"precious")
    with pytest.raises(MagiError, match=r"another model \(t5xxl\.safetensors\)"):
        write_checkpoint(source, tmp_path, overwrite=True)
    (tmp_path / "config.json").write_text("precious")
    with pytest.raises(MagiError, match=r"another model"):
        write_checkpoint(source, tmp_path, beside={"config.json": b"{}"})
    assert (tmp_path / "config.json").read_text() == "precious"


def test_files_where_folders_should_be_and_the_other_way_round(source, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    for target in ("folder.safetensors", "file"):
        with pytest.raises(MagiError, match="Give a folder, or the name of a file"):
            write_checkpoint(source, tmp_path / target, overwrite=True)
    with pytest.raises(MagiError, match="leave out the shard size"):
        write_checkpoint(source, tmp_path / "m.safetensors", shard_bytes=1000)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("place", ["weights.safetensors", "weights"])
def test_loaders_know_what_it_is_without_being_told(synth, presets, tmp_path, name, place):
    status, said = synth("--preset", name, "--out", place)
    assert status == 0, said
    assert re.fullmatch(rf"wrote {place}: 0\.01 GB, random weights \(\d+ s\)", said)
    with Checkpoint(place) as checkpoint:
        config = resolve_config(checkpoint, None)
        assert checkpoint.metadata["model"] == name
    assert config.model == TINY
    assert config.engine.distill == ("distill" in name)
    assert config.engine.fp8_quant == ("quant" in name) == recognise(place).fp8
    if place == "weights":
        assert config == presets[name], "its steps and size too"
    model = load_transformer(place, device="cpu")
    assert model.shape == TINY


def test_the_same_seed_gives_the_same_bytes(synth, presets, tmp_path):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        synth("--preset", "4.5B_distill_quant", "--out", f"{out}.safetensors", "--seed", seed)
    a, b = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert a == b
    x, y = (contents(tmp_path / f"{name}.safetensors")["x_embedder.weight"] for name in "bc")
    assert not same(x, y)


def test_a_file_of_fewer_layers_says_that_it_is_meant_so(synth, monkeypatch, tmp_path):
    """Without a config.json beside it, a released model's sizes with fewer layers are one that was cut off."""
    monkeypatch.setitem(PRESETS, "4.5B_base", replace(PRESETS["4.5B_base"], model=TINY))
    status, _ = synth("--preset", "4.5B_base", "--out", "few.safetensors", "--layers", 3)
    assert status == 0
    found = recognise(tmp_path / "few.safetensors")
    assert (found.model.num_layers, found.layers_fault) == (3, "")
    checkpoint = Checkpoint(tmp_path / "few.safetensors")
    assert resolve_config(checkpoint, None).model.num_layers == 3
    del checkpoint.metadata["layers"]
    with pytest.raises(MagiError, match=r"it holds 3, and the released model that has its sizes, 4\.5B, 4"):
        resolve_config(checkpoint, None)


def test_hidden_files_of_a_folder_are_no_other_model(synth, presets, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "._model.safetensors").write_bytes(b"x")
    assert synth("--preset", "4.5B_base", "--out", "m")[0] == 0


def test_shards_and_layers(synth, presets, tmp_path):
    status, said = synth("--preset", "24B_base", "--out", "m", "--layers", 2, "--shard-size", "0.5 mb")
    assert status == 0
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 1
    assert "in " in said
    config = MagiConfig.from_json(tmp_path / "m" / "config.json")
    assert (config.model.num_layers, config.engine.distill) == (2, False)
    with Checkpoint("m") as checkpoint:
        assert resolve_config(checkpoint, None) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "4.5B_base cannot have 0 layers. Choose 1 to 4."),
        (["--layers", "5"], "Choose 1 to 4."),
        (["--preset", "24B_distill_quant", "--layers", "2"], "Choose 3 to 4."),
        (["--shard-size", "big"], "'big'.*5GB"),
        (["--shard-size", "0GB"], "'0GB'.*5GB"),
        (["--seed", str(2**70)], "seed 1180591620717411303424 .*smaller"),
        (["--out", "m.safetensors", "--shard-size", "5GB"], "shard size"),
    ],
)
def test_what_cannot_be_is_said(synth, presets, tmp_path, arguments, message):
    status, said = synth("--preset", "4.5B_base", "--out", "m", *arguments)
    assert status == 1
    assert re.match(f"error: .*{message}", said)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_with_one_target(source, tmp_path):
    path = tmp_path / "a.safetensors"
    other = OwnerLock(tmp_path / "a.safetensors.lock")
    assert other.acquire()
    with pytest.raises(MagiError, match=r"a\.safetensors' is being written at this moment"):
        write_checkpoint(source, path)
    other.release()
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(source, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_appears_meanwhile_stays(source, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(MagiError, match="cannot be written"):
        write_checkpoint(source, path, progress=lambda *_: path.write_bytes(b"mine"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"mine"
