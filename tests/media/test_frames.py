import numpy as np
import pytest
import torch
from PIL import Image

from magi.errors import MagiError
from magi.media.frames import AREAS, check_size, fit, from_model, nearest_size, over_white, size_for, to_model


def picture(height: int, width: int) -> torch.Tensor:
    """One frame with smooth structure: red grows downwards, green to the right, blue is a soft wave."""
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width)[None].expand(height, width)
    wave = 0.5 + 0.5 * torch.sin(6 * x + 4 * y)
    return (torch.stack([y, x, wave], -1) * 255).round().to(torch.uint8)[None]


def test_every_level_survives_the_way_to_the_model_and_back():
    frames = torch.arange(256).to(torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    video = to_model(frames)
    assert video.shape == (1, 3, 2, 16, 16)
    assert video.dtype == torch.float32
    assert (video.min(), video.max()) == (-1, 1)
    assert torch.equal(video[0, 0, 0].flatten(), torch.arange(256) / 127.5 - 1)
    assert torch.equal(from_model(video), frames)


def test_from_model_clamps_and_rounds_any_dtype():
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 1.7]).view(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5)
    expected = [0, 0, 128, 255, 255]
    assert from_model(values)[0, 0, :, 0].tolist() == expected
    assert from_model(values.bfloat16())[0, 0, :, 2].tolist() == expected


def test_channels_keep_their_order():
    video = to_model(torch.tensor([10, 20, 30], dtype=torch.uint8).expand(1, 2, 2, 3))
    assert from_model(video)[0, 0, 0].tolist() == [10, 20, 30]


def test_frames_that_fit_are_not_touched():
    frames = picture(32, 48)
    assert fit(frames, 32, 48, "crop") is frames


def test_crop_keeps_the_centre_and_the_aspect_ratio():
    frames = torch.zeros(1, 40, 120, 3, dtype=torch.uint8)
    frames[:, :, 40:80] = 200
    assert (fit(frames, 40, 40, "crop") == 200).all()
    assert (fit(frames, 20, 20, "crop") == 200).all()
    assert (fit(frames.transpose(1, 2).contiguous(), 80, 80, "crop") == 200).all()


def test_pad_keeps_everything_between_black_bars():
    frames = torch.full((1, 40, 80, 3), 200, dtype=torch.uint8)
    out = fit(frames, 64, 64, "pad")
    assert (out[:, 16:48] == 200).all()
    assert (out[:, :16] == 0).all()
    assert (out[:, 48:] == 0).all()


def test_stretch_fills_the_size():
    assert (fit(torch.full((1, 40, 80, 3), 200, dtype=torch.uint8), 64, 48, "stretch") == 200).all()


@pytest.mark.parametrize(("height", "width"), [(100, 150), (37, 41), (400, 600)])
def test_resizing_is_as_good_as_pil(height: int, width: int):
    frames = torch.cat([picture(200, 300)] * 20)  # several blocks
    out = fit(frames, height, width, "stretch")
    reference = Image.fromarray(frames[0].numpy()).resize((width, height), Image.Resampling.LANCZOS)
    assert out.shape == (20, height, width, 3)
    difference = out.float() - torch.from_numpy(np.array(reference)).float()
    assert difference.abs().mean() < 1
    assert torch.equal(out[0], out[-1])


def test_shrinking_does_not_alias():
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    out = fit(stripes, 16, 16, "stretch").float()
    assert (out - 127.5).abs().max() < 20


def test_transparency_is_laid_over_white():
    rgba = torch.tensor([[0, 0, 0, 0], [100, 0, 200, 255], [0, 0, 0, 51]], dtype=torch.uint8)
    assert over_white(rgba).tolist() == [[255, 255, 255], [100, 0, 200], [204, 204, 204]]


def test_check_size_names_the_nearest():
    check_size(720, 1280)
    with pytest.raises(MagiError, match="Height 730 is not a multiple of 16; the nearest are 720 and 736"):
        check_size(730, 1280)
    with pytest.raises(MagiError, match="Width 1279 is not a multiple of 16; the nearest are 1264 and 1280"):
        check_size(720, 1279)
    with pytest.raises(MagiError, match="Width 16 is too small; the smallest is 32"):
        check_size(720, 16)
    with pytest.raises(MagiError, match="Height -16 is too small"):
        check_size(-16, 720)


def test_nearest_size_is_valid():
    assert nearest_size(730, 1279) == (736, 1280)
    assert nearest_size(1, 7) == (32, 32)
    assert nearest_size(719, 721, multiple=2) == (720, 722)


@pytest.mark.parametrize("name", AREAS)
@pytest.mark.parametrize("aspect", [16 / 9, 9 / 16, 1, 4 / 3, 2.35])
def test_size_for_keeps_area_and_aspect(name: str, aspect: float):
    height, width = size_for(name, aspect)
    check_size(height, width)
    assert 0.85 < height * width / AREAS[name] < 1.15
    assert 0.93 < width / height / aspect < 1.07


def test_size_for_known_sizes():
    assert size_for("720p", 16 / 9) == (720, 1280)
    assert size_for(720 * 720, 1.0) == (720, 720)
    assert size_for(256 * 256, 1.0) == (256, 256)


def test_bad_requests_name_the_value():
    frames = picture(8, 8)
    with pytest.raises(MagiError, match=r"'zoom' is unknown\. Use one of: crop, pad, stretch"):
        fit(frames, 8, 8, "zoom")
    with pytest.raises(MagiError, match="0x8"):
        fit(frames, 8, 0, "crop")
    with pytest.raises(MagiError, match="'8K' is unknown"):
        size_for("8K", 1.0)
    with pytest.raises(MagiError, match="aspect ratio 0"):
        size_for("720p", 0)
