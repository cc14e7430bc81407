"""A download that broke off leaves zeros; weights that are zero for another reason are left in peace."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from magi.checkpoint.reader import Checkpoint
from magi.checkpoint.writer import write_checkpoint
from magi.config import ModelConfig
from magi.errors import MagiError
from magi.model_files.embedded import embedded_files
from magi.model_files.load import check_transformer
from magi.model_files.repeating import repeating_files
from magi.transformer.random_weights import RandomTensors
from magi.vae.video_vae import load_vae
from tests.support.paths import GOLDEN

SHAPE = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, kv_channels=8)


def data_start(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def zeroed(file: Path, start: float, end: float = 1) -> None:
    """Replaces a part of a file's numbers by zeros."""
    content, first = bytearray(file.read_bytes()), data_start(file)
    a, b = (first + int(share * (len(content) - first)) for share in (start, end))
    content[a:b] = bytes(b - a)
    file.write_bytes(content)


def check(file: Path) -> None:
    with Checkpoint(file) as checkpoint:
        checkpoint.check_whole()


@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp8"])
@pytest.mark.parametrize("start", [0.02, 0.25, 0.5, 0.75, 0.97])
def test_the_end_is_missing(kind, start, tmp_path):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    (file,) = write_checkpoint(RandomTensors(SHAPE, kind == "fp8", dtype), tmp_path / "magi_base.safetensors")
    check(file)
    zeroed(file, start)
    with pytest.raises(MagiError, match=r"not whole: .* zeros instead of numbers.*Download it again"):
        check(file)


@pytest.mark.parametrize("name", ["dit_a.safetensors", "dit_b_fp8.safetensors"])
def test_wherever_it_begins(name, tmp_path):
    file = tmp_path / name
    for seed in range(25):
        shutil.copy(GOLDEN / name, file)
        start = 0.02 + 0.9 * random.Random(seed).random()
        zeroed(file, start)
        with pytest.raises(MagiError, match="zeros instead of numbers"):
            check(file)


def test_a_part_is_missing_that_another_connection_was_to_bring(tmp_path):
    file = tmp_path / "dit_a.safetensors"
    shutil.copy(GOLDEN / "dit_a.safetensors", file)
    zeroed(file, 0.3, 0.5)
    with pytest.raises(MagiError, match="zeros instead of numbers"):
        check(file)


@pytest.mark.parametrize("read", [check_transformer, load_vae], ids=["transformer", "vae"])
def test_it_is_told_before_anything_is_loaded(read, tmp_path):
    part = embedded_files().transformer if read is check_transformer else embedded_files().vae
    folder = shutil.copytree(part, tmp_path / "part")
    read(folder)
    zeroed(next(folder.glob("*.safetensors")), 0.5)
    with pytest.raises(MagiError, match="zeros instead of numbers"):
        read(folder)


def test_only_one_of_the_shards(tmp_path):
    files = write_checkpoint(RandomTensors(SHAPE), tmp_path / "m", shard_bytes=100_000)
    zeroed(files[1], 0.4)
    with pytest.raises(MagiError, match=rf"{files[1].name}' is not whole"):
        check(tmp_path / "m")


def test_all_models_that_come_with_the_pack_are_whole(tmp_path):
    """They hold zeros in many ways: layers that shrank to nothing, matrices of patterns, silent blocks."""
    for files in (embedded_files(), embedded_files("base"), repeating_files(tmp_path)):
        for part in (files.transformer, files.vae, files.text_encoder):
            check(part)


ZERO_INITIALISED = {
    "biases": lambda name: name.endswith(".bias"),
    "output projections": lambda name: name.endswith(("linear_proj.weight", "linear_fc2.weight")),
    "gates": lambda name: "ada_modulate" in name,
    "the last layer of all": lambda name: name.startswith("final_linear"),
    "a layer": lambda name: ".layers.3." in name,
    "text": lambda name: name.startswith("y_embedder.y_proj"),
    "everything": lambda name: True,
    "all matrices": lambda name: name.endswith(".weight") and "norm" not in name,
}


@pytest.mark.parametrize("which", ZERO_INITIALISED)
def test_what_was_initialised_with_zeros_is_no_gap(which, tmp_path, random_weights):
    weights = random_weights(SHAPE)
    for name, tensor in weights.items():
        if ZERO_INITIALISED[which](name):
            tensor.zero_()
    save_file(weights, tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors")


@pytest.mark.parametrize("rows", [slice(32, 64), slice(0, 32), slice(63, 64)])
@pytest.mark.parametrize("columns", [slice(0, 64), slice(40, 64)])
def test_rows_and_columns_of_zeros_are_no_gap(rows, columns, tmp_path):
    weights = {f"{name}.weight": torch.randn(64, 64) for name in "abc"}
    for tensor in weights.values():
        tensor[rows, :] = 0
        tensor[:, columns] = 0
    save_file(weights, tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors")


def test_hundreds_of_megabytes_of_nothing_are_a_gap(tmp_path):
    """Where the first megabyte of a download came and nothing else, without reading all that is not there."""
    file = tmp_path / "x.safetensors"
    save_file({f"{i}.weight": torch.zeros(1, 1, dtype=torch.uint8) for i in range(5)}, file)
    header = file.read_bytes()[8 : data_start(file)].decode()
    size = 1 << 26
    for i in range(5):
        header = header.replace(
            f'"shape":[1,1],"data_offsets":[{i},{i + 1}]',
            f'"shape":[2,{size // 2}],"data_offsets":[{i * size},{(i + 1) * size}]',
        )
    text = header.encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(out.tell() + 5 * size)
    with pytest.raises(MagiError, match="zeros instead of numbers"):
        check(file)


def test_the_numbers_are_as_they_were(tmp_path):
    """A check reads, and changes nothing."""
    shutil.copy(GOLDEN / "dit_a.safetensors", tmp_path / "x.safetensors")
    before = load_file(tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(tmp_path / "x.safetensors").items())
