"""The VAE that is trained is the VAE that runs: the same pictures, and latents of mean 0 and variance 1."""

import pytest
import torch

from magi.vae.tiling import Tiling
from magi.vae.video_vae import load_vae
from tools.train_embedded import vae


@pytest.fixture(scope="module")
def trained():
    """Returns a model after a few steps on one batch, and their losses."""
    torch.manual_seed(0)
    model = vae.Trained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    videos = vae.batch(0, 2)
    for _ in range(20):
        loss = vae.loss_of(model, videos)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def test_it_learns(trained):
    _, losses = trained
    assert losses[-1] < 0.4 * losses[0]


def test_what_is_saved_is_what_was_trained(trained, tmp_path):
    model, _ = trained
    vae.save(tmp_path, model, {})
    loaded = load_vae(tmp_path / "vae", "cpu", torch.float32)
    video = vae.batch(99, 1)
    with torch.no_grad():
        latents, pictures = model.standard(model.encoder(video, lambda: None)), model(video)
    tiling = Tiling(frames=vae.TILE, size=vae.world.SIZE, overlap=0)
    assert torch.allclose(loaded.encode(video, tiling), latents, atol=1e-4)
    assert torch.allclose(loaded.decode(latents, tiling), pictures, atol=1e-4)


def test_a_step_has_the_same_videos_on_every_machine():
    assert torch.equal(vae.batch(3, 2), vae.batch(3, 2))
    assert not torch.equal(vae.batch(3, 2), vae.batch(4, 2))
    assert vae.batch(3, 2).shape == (2, 3, 12, 64, 64)


def test_the_rate_rises_then_falls_to_nothing():
    rates = [vae.rate(step, 1000, 2.0) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) > 1.7
    assert rates[vae.WARMUP :] == sorted(rates[vae.WARMUP :], reverse=True)
    assert rates[-1] == pytest.approx(0)
