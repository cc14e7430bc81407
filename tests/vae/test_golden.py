"""The VAE against recorded outputs of the public implementation, on small random weights."""

import pytest
import torch
from safetensors.torch import load_file

from magi.vae.tiling import Tiling
from magi.vae.video_vae import SCALE, load_vae

TILING = Tiling(frames=12, size=64, overlap=0.25)
LIMIT = 2e-5


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def vae(golden):
    return load_vae(golden / "vae", device="cpu", dtype=torch.float32)


def decode(vae, latents):
    """Frames (T, 3, H, W) of unscaled latents."""
    return vae.decode(latents * SCALE, tiling=TILING)[0].permute(1, 0, 2, 3)


@pytest.mark.parametrize("name", ["vae_enc_small", "vae_enc_image"])
def test_encoding_equals_the_public_one(name, vae, golden):
    case = load_file(golden / f"{name}.safetensors")
    latents = vae.encode(case["video"].float() / 127.5 - 1, tiling=TILING)
    assert error(latents / SCALE, case["latent_unscaled"]) < LIMIT


def test_decoding_equals_the_public_one(vae, golden):
    case = load_file(golden / "vae_dec_small.safetensors")
    assert error(decode(vae, case["latent_unscaled"]), case["frames_tchw"]) < LIMIT


def test_a_pictures_first_frame_equals_the_public_one(vae, golden):
    case = load_file(golden / "vae_dec_one.safetensors")
    assert error(decode(vae, case["latent_unscaled"])[:1], case["frames_tchw"]) < LIMIT


def test_a_lone_last_latent_gives_four_frames_and_the_others_are_the_public_ones(vae, golden):
    case = load_file(golden / "vae_dec_four.safetensors")
    latents = case["latent_unscaled"]
    frames = decode(vae, latents)
    assert len(case["frames_tchw"]) == 13, "the public decoder loses three frames"
    assert len(frames) == 16
    assert error(frames[:12], case["frames_tchw"][:12]) < LIMIT
    assert error(frames[12:], decode(vae, latents[:, :, 1:])[-4:]) < LIMIT
