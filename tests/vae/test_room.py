"""The VAE on a device that is too small, as far as a CPU can play one, and out of the way of others."""

import json
import warnings
from collections import deque
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from magi.checkpoint.reader import Checkpoint
from magi.errors import MagiError
from magi.vae import video_vae as vae_module
from magi.vae.footprint import tile_bytes
from magi.vae.tiling import Tiling
from magi.vae.video_vae import VAEConfig, VideoVAE, load_vae

SIZES = {"video_size": 32, "video_length": 8, "embed_dim": 256, "depth": 1, "num_heads": 2, "mlp_ratio": 1}
LATENTS = torch.randn(1, 16, 5, 12, 40, generator=torch.Generator().manual_seed(1))  # 96 x 320 pixels
VIDEO = torch.randn(1, 3, 17, 96, 320, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small VAE's files."""
    folder = tmp_path_factory.mktemp("vae")
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in VideoVAE(VAEConfig(**SIZES)).state_dict().items()}
    weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    save_file(weights, folder / "vae.safetensors")
    (folder / "config.json").write_text(json.dumps({"ddconfig": SIZES}))
    return folder


@pytest.fixture
def vae(folder) -> VideoVAE:
    return load_vae(folder, "cpu", torch.float32)


class Card:
    """Memory for tiles of so many latents: the first of `sides` for the first tile, the last for all that follow."""

    def __init__(self, monkeypatch, vae: VideoVAE, *sides: int):
        self.sides = deque(sides)
        self.sizes: list[int] = []  # of what went through
        for half, scale in ((vae.encoder, 8), (vae.decoder, 1)):
            monkeypatch.setattr(half, "forward", self._limited(half.forward, scale))

    def _limited(self, forward, scale):
        def run(tile, on_progress):
            side = max(tile.shape[3:]) // scale
            limit = self.sides.popleft() if len(self.sides) > 1 else self.sides[0]
            if side > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            self.sizes.append(side)
            return forward(tile, on_progress)

        return run


def work(vae: VideoVAE, kind: str, **options) -> torch.Tensor:
    return vae.decode(LATENTS, **options) if kind == "decode" else vae.encode(VIDEO, **options)


KINDS = pytest.mark.parametrize("kind", ["decode", "encode"])


@KINDS
@pytest.mark.parametrize(("side", "size"), [(31, 192), (16, 128), (12, 96), (8, 64)])
def test_tiles_that_run_out_of_memory_are_done_in_smaller_ones(vae, monkeypatch, kind, side, size):
    expected = work(vae, kind, tiling=Tiling(size=size))
    card = Card(monkeypatch, vae, side)
    with pytest.warns(UserWarning, match=f"of {size} pixels|Smaller ones.*seams may show") as said:
        made = work(vae, kind)
    assert torch.equal(made, expected)
    assert max(card.sizes) == size // 8
    assert len(said) == 1


@KINDS
def test_what_is_done_stays_and_what_follows_keeps_the_smaller_tiles(vae, monkeypatch, kind):
    large, small = (work(vae, kind, tiling=Tiling(size=size)) for size in (256, 96))
    tiles = Tiling().tile_count(3, 12, 40)
    Card(monkeypatch, vae, *[40] * (tiles + 1), 12)
    with pytest.warns(UserWarning, match="seams may show"):
        made = work(vae, kind)
    first = 12 if kind == "decode" else 3  # of a temporal tile
    assert torch.equal(made[:, :, :first], large[:, :, :first]), "finished before memory ran out"
    assert torch.equal(made[:, :, first:], small[:, :, first:])


def test_a_tiling_that_was_asked_for_gives_way_too(vae, monkeypatch):
    expected = vae.decode(LATENTS, Tiling(frames=8, size=96))
    card = Card(monkeypatch, vae, 12)
    with pytest.warns(UserWarning, match="seams may show"):
        assert torch.equal(vae.decode(LATENTS, Tiling(frames=8, size=320, overlap=0.5)), expected)
    card.sides = deque([40])
    card.sizes.clear()
    vae.decode(LATENTS, Tiling(size=320))
    assert max(card.sizes) == 40, "where there is room it is kept"


@pytest.mark.parametrize(("tiling", "remedy"), [(None, "fewer frames per tile"), (Tiling(frames=4), "Close")])
def test_where_the_smallest_tiles_do_not_fit_an_error_says_so(vae, monkeypatch, tiling, remedy):
    Card(monkeypatch, vae, *[40] * 2, 7)
    stream = vae.decode_chunks(LATENTS.split(3, 2), tiling)
    frames = [next(stream)]
    with (
        pytest.warns(UserWarning, match="seams"),
        pytest.raises(MagiError, match=f"even for tiles of 64 pixels.*{remedy}"),
    ):
        frames += list(stream)
    assert len(frames) >= 1


def test_other_errors_are_not_taken_for_it(vae, monkeypatch):
    def broken(tile, on_progress):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(vae.decoder, "forward", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        vae.decode(LATENTS)


def test_progress_continues_when_tiles_shrink(vae, monkeypatch):
    Card(monkeypatch, vae, *[40] * 3, 8)
    calls = []
    with pytest.warns(UserWarning, match="seams"):
        vae.decode(LATENTS, progress=lambda *at: calls.append(at))
    total = Tiling(size=64).tile_count(5, 12, 40)
    assert calls[-1] == (total, total)
    shares = [done / known for done, known in calls]
    assert all(b >= a - 0.5 for a, b in pairwise(shares)), "at most one temporal tile is repeated"
    assert max(shares) == 1


# -- by what is free ---------------------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """free(bytes): so much is free on the device."""
    return lambda nbytes: monkeypatch.setattr(vae_module, "free_memory", lambda device: nbytes)


@KINDS
def test_tiles_are_chosen_by_what_is_free(vae, free, monkeypatch, kind):
    monkeypatch.setattr(vae_module, "makes_scores", lambda *_: True)
    room = int(tile_bytes(vae.config, Tiling(size=128), torch.float32, scores=True) / 0.85)
    expected = [work(vae, kind, tiling=Tiling(size=size)) for size in (256, 128)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for enough in (None, 1 << 40):
            free(enough)
            assert torch.equal(work(vae, kind), expected[0])
        free(room)
        assert torch.equal(work(vae, kind, tiling=Tiling()), expected[0]), "asked for"
    with pytest.warns(UserWarning, match="of 128 pixels") as said:
        assert torch.equal(work(vae, kind), expected[1])
    assert len(said) == 1


def test_what_is_free_is_looked_at_when_there_is_something_to_decode(vae, monkeypatch):
    """Not while a sampler that needs the memory still makes the first chunk."""
    events = []
    monkeypatch.setattr(vae_module, "free_memory", lambda device: events.append("looked"))

    def chunks():
        events.append("sampled")
        yield LATENTS[:, :, :3, :4, :4]

    list(vae.decode_chunks(chunks()))
    assert events == ["sampled", "looked"]


# -- out of the way ----------------------------------------------------------------------------------------------------


def test_parked_weights_are_the_mapped_file(folder, monkeypatch):
    mapped = {}
    read = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: mapped.setdefault(name, read(self, name)))
    vae = load_vae(folder, "meta", torch.bfloat16)
    size = vae.nbytes
    assert vae.device_bytes == size == sum(t.numel() * 2 for t in mapped.values())
    for _ in range(2):
        vae.park()
        vae.park()
        assert all(p.data_ptr() == mapped[name].data_ptr() for name, p in vae.named_parameters())
        assert (vae.device_bytes, vae.nbytes, vae.device, vae.dtype) == (0, size, torch.device("meta"), torch.bfloat16)
        vae.unpark()
        vae.unpark()
        assert all((p.device.type, p.dtype) == ("meta", torch.bfloat16) for p in vae.parameters())
        assert vae.device_bytes == size


@KINDS
def test_parked_weights_come_back_when_they_are_needed(folder, kind):
    expected = work(load_vae(folder, "cpu", torch.bfloat16), kind)
    vae = load_vae(folder, "meta", torch.bfloat16)
    vae.park()
    vae._parked = (torch.device("cpu"), torch.bfloat16)  # as if it came from there
    with torch.inference_mode():
        assert torch.equal(work(vae, kind), expected)
    assert vae.device_bytes == vae.nbytes
    assert not any(p.requires_grad or p.is_inference() for p in vae.parameters())
    assert torch.equal(work(vae, kind), expected), "outside of inference mode too"


def test_a_parked_vae_waits_for_the_first_chunk(folder):
    vae = load_vae(folder, "meta", torch.float32)
    vae.park()
    vae._parked = (torch.device("cpu"), torch.float32)

    def chunks():
        assert vae.device_bytes == 0
        yield LATENTS[:, :, :3, :4, :4]

    (frames,) = vae.decode_chunks(chunks())
    assert frames.isfinite().all()
    assert vae.device_bytes > 0


def test_on_the_cpu_there_is_nothing_to_park(vae):
    before = {name: p.data_ptr() for name, p in vae.named_parameters()}
    vae.park()
    assert {name: p.data_ptr() for name, p in vae.named_parameters()} == before
    assert vae.device_bytes == vae.nbytes


def test_weights_that_came_from_no_file_are_kept_too():
    with torch.device("meta"):
        vae = VideoVAE(VAEConfig(video_size=32, video_length=8, embed_dim=256, depth=1, num_heads=4))
    for name, p in vae.named_parameters():
        vae._on_host[name] = torch.full(p.shape, 0.5)
    vae.park()
    assert all((p == 0.5).all() for p in vae.parameters())


def test_room_is_left_for_weights_that_are_to_come_back(folder, free, monkeypatch):
    monkeypatch.setattr(vae_module, "makes_scores", lambda *_: True)
    vae = load_vae(folder, "meta", torch.float32)
    room = int(tile_bytes(vae.config, Tiling(), torch.float32, scores=True) / 0.9) + 1
    free(room)
    assert vae._fitting(Tiling()) == Tiling()
    vae.park()
    assert vae._fitting(Tiling()).size < 256
    free(room + vae.nbytes)
    assert vae._fitting(Tiling()) == Tiling()
