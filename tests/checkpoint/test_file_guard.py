"""A file that another program changes while its tensors are in use: an error with its name, where it was the end of the process."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from magi.checkpoint.file_guard import FileGuard
from magi.checkpoint.reader import Checkpoint
from magi.errors import MagiError
from magi.model_files.load import load_transformer
from magi.sampling.prepare import make_sampler
from magi.text.t5_checkpoint import read_t5
from magi.vae.video_vae import load_vae

CHANGED = "was written to while it was in use"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.rand(1000), "b": torch.rand(1000)}, path)
    return path


def cut(path) -> None:
    if os.name == "nt":
        pytest.skip("Windows lets nobody cut a file that is mapped")
    os.truncate(path, path.stat().st_size // 2)


def test_a_file_that_is_cut_off(file):
    with Checkpoint(file) as checkpoint:
        checkpoint.tensor("a")
        size = file.stat().st_size
        cut(file)
        with pytest.raises(
            MagiError, match=rf"a\.safetensors' {CHANGED}, and has {size // 2:,} bytes instead of {size:,}"
        ):
            checkpoint.tensor("b")
    with pytest.raises(MagiError, match=CHANGED):
        checkpoint.check_unchanged()  # its tensors outlive it


def test_a_file_of_the_same_size_with_other_numbers(file):
    with Checkpoint(file) as checkpoint:
        with file.open("r+b") as stream:
            stream.seek(-100, os.SEEK_END)
            stream.write(b"x" * 100)
        os.utime(file, ns=(1, 1))  # clocks of file systems may be coarse
        with pytest.raises(MagiError, match=CHANGED):
            checkpoint.tensor("a")


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody replace a file that is mapped")
def test_a_file_that_is_replaced_or_removed_is_no_harm(file, tmp_path):
    with Checkpoint(file) as checkpoint:
        before = checkpoint.tensor("a").clone()
        shutil.copy(file, tmp_path / "new")
        (tmp_path / "new").replace(file)
        assert torch.equal(checkpoint.tensor("a"), before)
        file.unlink()
        assert torch.equal(checkpoint.tensor("a"), before)


def test_what_is_not_touched_is_sound(file):
    guard = FileGuard([file])
    file.read_bytes()
    guard.check()


def test_a_transformer_in_the_middle_of_a_run(tmp_path, tiny_config, random_weights, tiny_caption, tiny_tokens):
    """On a CPU its layers are used from where they are mapped, in every step."""
    config, path = tiny_config(), tmp_path / "magi_base.safetensors"
    save_file(random_weights(config.model), path)
    model = load_transformer(path, config, device="cpu")
    seen = []

    def progress(event):
        seen.append(event.iteration)
        if event.iteration == 3:
            cut(path)

    sampler = make_sampler(model, caption=tiny_caption(), special_tokens=tiny_tokens, progress=progress)
    with pytest.raises(MagiError, match=CHANGED):
        list(sampler)
    assert seen == [1, 2, 3]


def test_a_vae_and_a_text_encoder(tmp_path, embedded_home):
    home = next(embedded_home.glob("magi1-repeating-*"))
    for part in ("vae", "text_encoder"):
        shutil.copytree(home / part, tmp_path / part)
    vae = load_vae(tmp_path / "vae", "cpu", torch.float32)
    latents = torch.zeros(1, 16, 3, 4, 4)
    vae.decode(latents)
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    cut(weights)
    with pytest.raises(MagiError, match=CHANGED):
        vae.decode(latents)
    checkpoint = read_t5(tmp_path / "text_encoder")
    checkpoint.guard.check()
    cut(next(file for file in (tmp_path / "text_encoder").iterdir() if file.suffix in (".safetensors", ".bin")))
    with pytest.raises(MagiError, match=CHANGED):
        checkpoint.guard.check()
