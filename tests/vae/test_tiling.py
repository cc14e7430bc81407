import pytest
import torch

from magi.errors import MagiError
from magi.vae.tiling import TileProgress, Tiling, map_tiles, recut


def test_the_default_is_the_official_tile():
    tiling = Tiling()
    assert (tiling.latent_frames, tiling.latent_size, tiling.latent_overlap) == (3, 32, 8)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"frames": 0}, "nearest is 4"),
        ({"frames": 10}, "nearest is 8"),
        ({"frames": -4}, "multiple of 4"),
        ({"frames": 12.0}, "multiple of 4"),
        ({"size": 250}, "nearest is 248"),
        ({"size": 0}, "nearest is 8"),
        ({"overlap": 1.0}, "0.25"),
        ({"overlap": -0.1}, "0.25"),
        ({"overlap": float("nan")}, "0.25"),
        ({"size": 64, "overlap": 0.3}, "Choose overlap 0.25"),
        ({"size": 48}, "Choose overlap 0.333333|Choose overlap 0.166667"),
        ({"size": 64, "overlap": 0.99}, "Choose overlap 0.875"),
    ],
)
def test_a_wrong_tiling_is_refused_with_a_remedy(kwargs, said):
    with pytest.raises(MagiError, match=said):
        Tiling(**kwargs)


def test_the_overlap_that_a_refusal_proposes_is_accepted():
    assert Tiling(size=48, overlap=0.333333).latent_overlap == 2
    assert Tiling(size=64, overlap=0.875).latent_overlap == 7


def test_tiles_start_at_every_stride_below_the_size():
    tiling = Tiling(size=64)
    assert list(tiling.starts(8)) == [0, 6]  # also when the picture fits one tile
    assert list(tiling.starts(6)) == [0]
    assert list(tiling.starts(13)) == [0, 6, 12]
    assert tiling.tile_count(frames=7, height=8, width=13) == 3 * 2 * 3


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 7], [3, 3, 6], [2, 10], [11, 1]])
def test_recut_makes_equal_pieces_of_any_blocks(cuts):
    whole = torch.arange(12.0).view(1, 1, 12, 1, 1)
    pieces = list(recut(whole.split(cuts, dim=2), 5))
    assert [p.shape[2] for p in pieces] == [5, 5, 2]
    assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_recut_gives_a_piece_before_it_asks_for_more():
    asked = []

    def blocks():
        for i in range(3):
            asked.append(i)
            yield torch.zeros(1, 1, 4, 1, 1)

    pieces = recut(blocks(), 4)
    next(pieces)
    assert asked == [0]


def plain_join(tiles: dict, extent: int, keep: int, chained: bool) -> torch.Tensor:
    """Blends tiles pixel by pixel by the rule; `tiles` maps (row, column) to (H, W)."""
    rows, columns = (max(key[i] for key in tiles) + 1 for i in (0, 1))
    source = {key: tile.clone() for key, tile in tiles.items()}
    lines = []
    for r in range(rows):
        line = []
        for c in range(columns):
            tile = source[r, c] if chained else source[r, c].clone()
            if r:
                before = source[r - 1, c]
                n = min(extent, before.shape[0], tile.shape[0])
                for k in range(n):
                    tile[k] = before[before.shape[0] - n + k] * (1 - k / n) + tile[k] * (k / n)
            if c:
                before = source[r, c - 1]
                n = min(extent, before.shape[1], tile.shape[1])
                for k in range(n):
                    tile[:, k] = before[:, before.shape[1] - n + k] * (1 - k / n) + tile[:, k] * (k / n)
            line.append(tile[:keep, :keep])
        lines.append(torch.cat(line, dim=1))
    return torch.cat(lines, dim=0)


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("overlap", [0.0, 0.125, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("grid", [(8, 8), (6, 6), (1, 1), (7, 13), (21, 9), (3, 20)])
def test_tiles_are_joined_by_the_rule(chained, overlap, grid):
    tiling = Tiling(size=64, overlap=overlap)
    scale_in, scale_out = (8, 1) if chained else (1, 8)
    generator = torch.Generator().manual_seed(0)
    made = []

    def run(tile):  # unrelated values, so that every wrong neighbour, weight or order shows
        size = [s // scale_in * scale_out for s in tile.shape[-2:]]
        made.append(torch.rand(1, 1, 1, *size, generator=generator))
        return made[-1].clone()

    source = torch.zeros(1, 1, 1, *(s * scale_in for s in grid))
    result = torch.full((1, 1, 1, *(s * scale_out for s in grid)), torch.nan)
    map_tiles(run, source, result, tiling, scale_in=scale_in, scale_out=scale_out, chained=chained)

    columns = len(tiling.starts(grid[1]))
    tiles = {divmod(i, columns): tile[0, 0, 0] for i, tile in enumerate(made)}
    stride = tiling.latent_size - tiling.latent_overlap
    expected = plain_join(tiles, tiling.latent_overlap * scale_out, stride * scale_out, chained)
    torch.testing.assert_close(result[0, 0, 0], expected)


def test_each_tile_is_cut_where_it_belongs():
    source = torch.arange(13.0 * 9).view(1, 1, 1, 13, 9)
    result = torch.zeros(1, 1, 1, 13 * 8, 9 * 8)
    map_tiles(
        lambda tile: tile.repeat_interleave(8, -1).repeat_interleave(8, -2),
        source,
        result,
        Tiling(size=64),
        scale_in=1,
        scale_out=8,
        chained=False,
    )
    torch.testing.assert_close(result, source.repeat_interleave(8, -1).repeat_interleave(8, -2))


def test_progress_asks_inside_a_long_tile_but_not_all_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("magi.vae.tiling.time.monotonic", lambda: now[0])
    calls = []
    counter = TileProgress(lambda done, total: calls.append((done, total)))
    counter.total = 2
    for _ in range(100):
        now[0] += 0.01
        counter.on_progress()
    assert calls in ([(0, 2)], [(0, 2), (0, 2)])
    calls.clear()
    counter.finish_tile()
    assert calls == [(1, 2)]
