"""The VAE that is trained is the VAE that runs: the same pictures, and latents of mean 0 and variance 1."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from magi.media.frames import from_model, to_model
from magi.vae.tiling import Tiling
from magi.vae.video_vae import load_vae
from tools.train_embedded import components, loop, vae, world
from tools.train_embedded.export import write_vae

TILING = Tiling(frames=vae.TILE, size=world.SIZE, overlap=0)


@pytest.fixture(scope="module")
def few_components():
    """Of a few scenes: as good as those of many for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "SCENES", 40)
        return components.Components.of_world()


@pytest.fixture(scope="module")
def trained(few_components):
    """Returns encoder and decoder after a few steps on one batch, and their losses."""
    torch.manual_seed(0)
    encoder, decoder = vae.linear_vae(few_components)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-4)
    losses = []
    batch = vae.tiles(few_components, random.Random(0), 2)
    for _ in range(25):
        loss = vae.loss_of(decoder, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return encoder, decoder, losses


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean()))


def test_the_components_keep_a_scene(few_components):
    frames = world.frames(world.draw(5, 1, held_out=True))
    latents = few_components.latents(frames)
    assert latents.shape == (16, 6, 8, 8)
    patches = latents.permute(1, 2, 3, 0) @ few_components.synthesis + few_components.mean
    assert psnr(patches.numpy() * 127.5, components.pixels(frames).numpy() * 127.5) > 22


def test_latents_vary_as_noise_does(few_components):
    latents = torch.stack([few_components.latents(world.frames(world.draw(seed, 1))) for seed in range(1000, 1040)])
    assert (latents.mean(dim=(0, 2, 3, 4)) / latents.std(dim=(0, 2, 3, 4)).clamp_min(1e-6)).abs().max() < 0.3
    deviations = latents.std(dim=(0, 2, 3, 4))
    assert deviations[components.USED :].max() == 0
    deviations = deviations[: components.USED]
    assert deviations.square().mean() == pytest.approx(1, abs=0.3)
    assert deviations.max() < 4
    assert deviations.min() > 0.25


def test_it_begins_as_the_components(few_components, tmp_path):
    vae.save(tmp_path / "vae", vae.state_for_inference(*vae.linear_vae(few_components)))
    loaded = load_vae(tmp_path / "vae", "cpu", torch.float32)
    frames = world.frames(world.draw(5, 1, held_out=True))
    latents = loaded.encode(to_model(torch.from_numpy(frames)), TILING)
    torch.testing.assert_close(latents[0], few_components.latents(frames), atol=0.01, rtol=0.01)
    assert psnr(from_model(loaded.decode(latents, TILING)).numpy(), frames) > 22


def test_it_does_not_see_what_is_in_the_empty_channels(trained, few_components):
    """A sampler leaves its noise there."""
    _, decoder, _ = trained
    latents = vae.tiles(few_components, random.Random(9), 1).latents
    with torch.no_grad():
        plain = decoder(latents, lambda: None)
        latents[:, components.USED :] = torch.randn_like(latents[:, components.USED :])
        assert torch.equal(decoder(latents, lambda: None), plain)


def test_it_learns(trained):
    *_, losses = trained
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_what_is_saved_is_what_was_trained(trained, few_components, tmp_path):
    encoder, decoder, _ = trained
    vae.save(tmp_path / "vae", vae.state_for_inference(encoder, decoder))
    loaded = load_vae(tmp_path / "vae", "cpu", torch.float32)
    latents = vae.tiles(few_components, random.Random(9), 1).latents
    with torch.no_grad():
        pictures = decoder(latents, lambda: None)
    assert torch.allclose(loaded.decode(latents, TILING), pictures, atol=1e-4)


def test_half_as_large_it_is_as_good(trained, few_components, tmp_path):
    encoder, decoder, _ = trained
    vae.save(tmp_path / "whole", vae.state_for_inference(encoder, decoder))
    write_vae(tmp_path / "whole", tmp_path / "half")
    whole, half = (tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("whole", "half"))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    latents = vae.tiles(few_components, random.Random(9), 1).latents
    pictures = [load_vae(tmp_path / name, "cpu", torch.float32).decode(latents, TILING) for name in ("whole", "half")]
    assert psnr(*(127.5 * p.numpy() for p in pictures)) > 50


def test_the_rate_rises_then_falls_to_nothing():
    rates = [2.0 * loop.rate_at(step, step / 10_000) for step in range(10_001)]
    assert rates[0] == pytest.approx(2.0 / loop.WARMUP)
    assert max(rates) > 1.7
    assert rates[loop.WARMUP :] == sorted(rates[loop.WARMUP :], reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_a_run_is_resumed_and_written(few_components, tmp_path, monkeypatch):
    torch.save({name: x.clone() for name, x in vars(few_components).items()}, tmp_path / "components.pt")
    for steps in (1, 2):
        options = ["--out", tmp_path, "--steps", steps, "--batch", 2, "--every", 1, "--threads", 1, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["vae", *map(str, options)])
        vae.main()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["psnr"] > 22
    average = torch.load(tmp_path / "state.pt", weights_only=True)["average"]
    written = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(written["decoder.final_proj.weight"], average["final_proj.weight"])
