"""The repeating model: its files are made whole or not at all, and pictures and videos survive the whole pipeline."""

import zipfile
from pathlib import Path

import pytest
import torch

from magi.errors import MagiError
from magi.media.frames import fit, from_model, to_model
from magi.media.video_reader import read_image
from magi.model_files import repeating
from magi.model_files.embedded import DEMO_IMAGE
from magi.model_files.identify import recognise
from magi.model_files.repeating import REPEATING_CONFIG, repeating_files
from magi.pipeline.pipeline import MagiPipeline, Request
from magi.sampling.special_tokens import SpecialTokens
from magi.text.t5_checkpoint import read_t5
from magi.text.t5_tokenizer import find_tokenizer, load_tokenizer
from magi.vae.video_vae import load_vae

PHOTO = DEMO_IMAGE


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / "repeating"  # shared with the other test files


@pytest.fixture(scope="session")
def pipeline(folder) -> MagiPipeline:
    return MagiPipeline.embedded(folder, "repeating", device="cpu")


@pytest.fixture(scope="session")
def photo() -> torch.Tensor:
    """uint8 (1, 160, 256, 3)."""
    return fit(read_image(PHOTO), 160, 256)


def everything(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * ((a.float() - b.float()) / 255).square().mean().log10())


# Its files


def test_all_parts_are_there(folder):
    files = repeating_files(folder)
    found = recognise(files.transformer)
    assert (found.kind, found.distilled, found.model) == ("transformer", True, REPEATING_CONFIG.model)
    assert recognise(files.vae).kind == "vae"
    assert read_t5(files.text_encoder).shape.d_model == REPEATING_CONFIG.model.caption_channels
    assert load_tokenizer(find_tokenizer(files.text_encoder, None)).encode("cat")
    assert SpecialTokens.load(files.special_tokens).width == REPEATING_CONFIG.model.caption_channels


def test_the_files_are_the_same_each_time_and_made_once(folder, tmp_path, monkeypatch):
    tokens = repeating_files(tmp_path).special_tokens
    assert everything(tokens.parent) == everything(repeating_files(folder).special_tokens.parent)
    with zipfile.ZipFile(tokens) as archive:  # which would hold the time at which it was made
        assert {info.date_time[0] for info in archive.infolist()} == {1980}
    monkeypatch.setattr(repeating, "_write", lambda folder: pytest.fail("the files are there"))
    repeating_files(tmp_path)


def test_a_folder_of_which_a_part_was_deleted_is_made_anew(tmp_path):
    files = repeating_files(tmp_path)
    whole = everything(tmp_path)
    (files.vae / "diffusion_pytorch_model.safetensors").unlink()
    repeating_files(tmp_path)
    assert everything(tmp_path) == whole


@pytest.mark.parametrize(
    "name",
    ["transformer/model.safetensors", "vae/config.json", "text_encoder/tokenizer_config.json", "special_tokens.npz"],
)
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_folder_of_which_a_part_is_damaged_is_made_anew(name, kept, tmp_path):
    """As a full disk or a loss of power leaves it."""
    home = repeating_files(tmp_path).special_tokens.parent
    whole = everything(tmp_path)
    content = (home / name).read_bytes()
    (home / name).write_bytes(content[: int(kept * len(content))])
    repeating_files(tmp_path)
    assert everything(tmp_path) == whole


def test_another_version_of_the_recipe_does_not_take_up_files_of_this_one(tmp_path, monkeypatch):
    before = repeating_files(tmp_path)
    changed = tmp_path / "repeating.py"
    changed.write_text(Path(repeating.__file__).read_text(encoding="utf-8") + "# changed", encoding="utf-8")
    monkeypatch.setattr(repeating, "__file__", str(changed))
    assert repeating_files(tmp_path).vae != before.vae


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_start_leaves_nothing(error, tmp_path, monkeypatch):
    def interrupted():
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(repeating, "_vae_weights", interrupted)
        with pytest.raises(error):
            repeating_files(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert repeating_files(tmp_path).vae.is_dir()


def test_two_starts_at_the_same_time(tmp_path, monkeypatch):
    write, results = repeating._write, []

    def write_while_another_start_finishes(part):
        monkeypatch.setattr(repeating, "_write", write)
        results.append(repeating_files(tmp_path))
        write(part)

    monkeypatch.setattr(repeating, "_write", write_while_another_start_finishes)
    results.append(repeating_files(tmp_path))
    assert results[0] == results[1]
    assert len(list(tmp_path.iterdir())) == 1
    assert recognise(results[0].transformer).kind == "transformer"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MagiError, match=r"magi1-repeating.*Choose a folder"):
        repeating_files(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_full_disk(tmp_path, file_size_limit):
    with file_size_limit(100_000), pytest.raises(MagiError, match=r"magi1-repeating.*room"):
        repeating_files(tmp_path)
    assert list(tmp_path.iterdir()) == []


# What it does


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 31), (torch.bfloat16, 28)])
def test_the_vae_keeps_a_photo(folder, photo, dtype, least):
    vae = load_vae(repeating_files(folder).vae, "cpu", dtype)
    latents = vae.encode(to_model(photo))
    assert latents.shape == (1, 16, 1, 20, 32)
    assert 0.3 < latents.std() < 1.7, "the transformer expects latents that vary about as noise does"
    assert psnr(from_model(vae.decode(latents))[0], photo[0]) > least


def test_a_picture_stays(pipeline, photo):
    """It is there at once, and three chunks later it is still the best match among the photo's eight ways to lie."""
    clips = list(pipeline.generate(prompt="A cat", image=PHOTO, seconds=3, height=160, width=256))
    frames = torch.cat([clip.frames for clip in clips])
    assert len(frames) == 72
    scores = [psnr(frame, photo[0]) for frame in frames]
    assert scores[0] > 26
    assert min(scores) > 16, "each chunk is tinted a little more, no more than that"
    others = [photo.flip(1), photo.flip(2), photo.flip(1, 2), photo.roll(24, 2), photo.roll(24, 1)]
    assert min(scores) > max(psnr(frame, other[0]) for frame in frames for other in others) + 2


def scenes() -> torch.Tensor:
    """Two seconds, a different part of the photo in every latent (four frames): uint8 (48, 96, 96, 3)."""
    photo = fit(read_image(PHOTO), 288, 384)
    places = [(96 * (i % 3), 96 * (i // 3)) for i in range(12)]
    return torch.cat([photo[:, y : y + 96, x : x + 96].repeat(4, 1, 1, 1) for y, x in places])


@pytest.mark.parametrize("given", [24, 36, 48])
def test_a_video_goes_on_with_its_last_second(pipeline, given):
    """Each new latent shows the scene of the latent one chunk before: whole and partly filled chunks alike."""
    video = scenes()[-given:]
    request = Request("A cat", video=video, continue_seconds=given / 24, seconds=1, height=96, width=96)
    frames = torch.cat([clip.frames for clip in pipeline.run(pipeline.plan(request))])
    known = torch.cat([video, frames])[::4]  # one frame a latent
    shown = range(given // 4, given // 4 + 6)
    for latent in shown:
        candidates = [psnr(known[latent], known[other]) for other in range(given // 4)]
        assert max(range(len(candidates)), key=candidates.__getitem__) == latent - 6, candidates


def test_the_prompt_shows(pipeline):
    def made(prompt):
        return next(pipeline.generate(prompt=prompt, image=PHOTO, seconds=1, height=96, width=96)).frames

    assert psnr(made("A ginger cat"), made("Deep blue water")) < 45
