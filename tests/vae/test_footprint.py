"""A tile's memory by calculation, held against what torch really allocates, and the tiles chosen by it."""

import pytest
import torch

from magi.planning.temporaries import PeakBytes
from magi.vae.footprint import SIZES, fitting, makes_scores, next_smaller, tile_bytes
from magi.vae.model import Decoder, Encoder, VAEConfig
from magi.vae.tiling import Tiling

PUBLISHED = VAEConfig(depth=2)  # more blocks take no more memory
BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def counted(tiling: Tiling, dtype: torch.dtype, device: str) -> int:
    """The most that a tile takes, made and decoded or encoded."""
    t, s = tiling.latent_frames, tiling.latent_size
    peaks = []
    for half, shape in ((Decoder, (1, 16, t, s, s)), (Encoder, (1, 3, 4 * t, 8 * s, 8 * s))):
        with torch.device(device):
            model = half(PUBLISHED).to(dtype)
        with torch.no_grad(), PeakBytes() as count:
            model(torch.zeros(shape, dtype=dtype, device=device), lambda: None)
        peaks.append(count.peak)
    return max(peaks)


@BOTH
@pytest.mark.parametrize("frames", [4, 12, 16])
@pytest.mark.parametrize("size", SIZES)
def test_a_tile_with_scores_takes_what_is_calculated(frames, size, dtype):
    """On the meta device torch takes its plain attention apart."""
    tiling = Tiling(frames, size)
    assert makes_scores(torch.device("meta"), dtype, PUBLISHED)
    assert 0.95 < tile_bytes(PUBLISHED, tiling, dtype, scores=True) / counted(tiling, dtype, "meta") < 1.1


@BOTH
@pytest.mark.parametrize(("frames", "size"), [(12, 64), (12, 96), (4, 192)])
def test_a_tile_without_scores_takes_what_is_calculated(frames, size, dtype):
    if makes_scores(torch.device("cpu"), dtype, PUBLISHED):
        pytest.skip("this torch has no other attention on the CPU")
    tiling = Tiling(frames, size)
    assert 0.95 < tile_bytes(PUBLISHED, tiling, dtype, scores=False) / counted(tiling, dtype, "cpu") < 1.1


# -- the choice --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("scores", [False, True])
def test_the_largest_tile_that_fits_with_a_tenth_to_spare(dtype, scores):
    needs = [tile_bytes(PUBLISHED, Tiling(size=size), dtype, scores) for size in SIZES]
    assert needs == sorted(needs, reverse=True)
    for size, need in zip(SIZES, needs, strict=True):
        enough = int(need / 0.9) + 1
        assert fitting(Tiling(), PUBLISHED, dtype, scores, enough) == Tiling(size=size)
        assert fitting(Tiling(), PUBLISHED, dtype, scores, enough - 2).size < size or size == SIZES[-1]
    assert fitting(Tiling(), PUBLISHED, dtype, scores, 1 << 50) == Tiling(), "never above the published one"
    assert fitting(Tiling(), PUBLISHED, dtype, scores, -1).size == SIZES[-1], "it may do all the same"


def test_tiles_get_smaller_by_size_alone():
    sizes, tiling = [], Tiling(frames=24, size=320, overlap=0.5)
    while tiling := next_smaller(tiling):
        sizes.append((tiling.frames, tiling.size, tiling.overlap))
    assert sizes == [(24, size, 0.25) for size in SIZES]
