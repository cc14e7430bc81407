import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from magi.checkpoint.reader import Checkpoint
from magi.errors import MagiError
from magi.vae.tiling import TileProgress, Tiling
from magi.vae.video_vae import VAEConfig, VideoVAE, load_vae

SCALE = 0.18215
DDCONFIG = {"video_size": 32, "video_length": 8, "embed_dim": 256, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
SMALL = Tiling(frames=12, size=32, overlap=0.25)


def weights(**changes) -> dict:
    """Random weights of a small VAE, of a size at which every part shows in the result."""
    generator = torch.Generator().manual_seed(3)
    vae = VideoVAE(VAEConfig.from_dict({"ddconfig": DDCONFIG | changes}))
    state = {}
    for name, tensor in vae.state_dict().items():
        fan_in = tensor[0].numel() if tensor.dim() > 1 and "embed" not in name and "token" not in name else 10
        state[name] = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
    return state


def write(folder, state, config=None):
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("vae"), weights(), {"_class_name": "ViTVAE", "ddconfig": DDCONFIG})


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(folder, dtype=torch.float32)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- a second, plain implementation in float64 that the fast code must match -----------------------------------------


class PlainVAE:
    def __init__(self, state, ddconfig):
        self.w = {name: tensor.double() for name, tensor in state.items()}
        self.c = ddconfig

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def transform(self, x, half, grid):
        size = (self.c["video_length"] // 4, self.c["video_size"] // 8, self.c["video_size"] // 8)
        position = self.w[f"{half}.pos_embed"]
        learned = position[:, 1:].transpose(1, 2).unflatten(2, size)
        resized = F.interpolate(learned, size=grid, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)
        x = torch.cat([self.w[f"{half}.cls_token"], x], 1) + torch.cat([position[:, :1], resized], 1)
        for i in range(self.c["depth"]):
            b = f"{half}.blocks.{i}"
            heads = self.linear(x, f"{b}.attn.qkv").view(x.shape[1], 3, self.c["num_heads"], -1)
            heads = (heads - heads.mean(-1, keepdim=True)) / (heads.std(-1, correction=0, keepdim=True) + 1e-5)
            q, k, v = heads.permute(1, 2, 0, 3)
            attended = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v
            x = x + self.linear(attended.transpose(0, 1).reshape(x.shape), f"{b}.attn.proj")
            x = x + self.linear(F.gelu(self.linear(self.norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        return self.norm(x, f"{half}.norm")[:, 1:]

    def encode_tile(self, video):
        x = F.conv3d(
            video, self.w["encoder.patch_embed.proj.weight"], self.w["encoder.patch_embed.proj.bias"], (4, 8, 8)
        )
        grid = x.shape[2:]
        x = self.linear(self.transform(x.flatten(2).transpose(1, 2), "encoder", grid), "encoder.last_layer")
        return x.transpose(1, 2)[:, :16].unflatten(2, grid)

    def decode_tile(self, latents):
        t, h, w = latents.shape[2:]
        x = self.linear(latents.flatten(2).transpose(1, 2), "decoder.proj_in")
        x = self.transform(x, "decoder", (t, h, w))
        if self.c.get("use_final_proj"):
            x = self.norm(self.linear(x, "decoder.final_proj"), "decoder.final_norm")
        x = torch.einsum("thwabcd->dtahbwc", x.view(t, h, w, 4, 8, 8, -1)).reshape(1, -1, 4 * t, 8 * h, 8 * w)
        return F.conv3d(x, self.w["decoder.last_layer.weight"], self.w["decoder.last_layer.bias"], padding=1)

    def encode(self, video, tiling):
        missing = -video.shape[2] % 4
        video = torch.cat([video, video[:, :, -1:].repeat(1, 1, missing, 1, 1)], 2).double()
        parts = video.split(tiling.frames, 2)
        return SCALE * torch.cat([self.tiled(self.encode_tile, p, tiling, 8, 1, True) for p in parts], 2)

    def decode(self, latents, tiling):
        parts = list((latents.double() / SCALE).split(tiling.latent_frames, 2))
        frames = [self.tiled(self.decode_tile, p, tiling, 1, 8, False) for p in parts]
        if parts[-1].shape[2] == 1 and len(parts) > 1 and tiling.latent_frames > 1:
            last = latents[:, :, -tiling.latent_frames :].double() / SCALE
            frames[-1] = self.tiled(self.decode_tile, last, tiling, 1, 8, False)[:, :, -4:]
        return torch.cat(frames, 2)

    def tiled(self, run, x, tiling, scale_in, scale_out, chained):
        tile, extent = tiling.size * scale_in // 8, round(tiling.size * tiling.overlap) * scale_out // 8
        stride, keep = tile - round(tile * tiling.overlap), tiling.size * scale_out // 8 - extent
        raw = [
            [run(x[..., i : i + tile, j : j + tile]) for j in range(0, x.shape[-1], stride)]
            for i in range(0, x.shape[-2], stride)
        ]
        blended = [[cell.clone() for cell in row] for row in raw]
        neighbours = blended if chained else raw
        for i, row in enumerate(blended):
            for j, cell in enumerate(row):
                if i:
                    self.fade(neighbours[i - 1][j].transpose(-1, -2), cell.transpose(-1, -2), extent)
                if j:
                    self.fade(neighbours[i][j - 1], cell, extent)
        return torch.cat([torch.cat([c[..., :keep, :keep] for c in row], -1) for row in blended], -2)

    @staticmethod
    def fade(before, cell, extent):
        n = min(extent, cell.shape[-1], before.shape[-1])
        for k in range(n):
            cell[..., k] = before[..., before.shape[-1] - n + k] * (1 - k / n) + cell[..., k] * (k / n)


@pytest.fixture(scope="module")
def plain():
    return PlainVAE(weights(), DDCONFIG)


def assert_same(ours, expected, limit=3e-6):
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32
    assert float((ours.double() - expected).norm() / expected.norm()) < limit


CASES = [  # frames, height, width, tiling
    (12, 32, 32, SMALL),  # fits one tile, and yet has slivers
    (9, 24, 24, Tiling(12, 24, 0.0)),  # exactly one tile in space, a patch not filled
    (1, 32, 40, SMALL),
    (13, 56, 40, SMALL),  # slivers, a last patch of one frame, a lone last latent
    (26, 40, 72, Tiling(8, 32, 0.5)),
    (6, 104, 16, Tiling(4, 64, 0.375)),
    (20, 8, 8, Tiling(16, 256, 0.25)),  # smaller than the tile
]


@pytest.mark.parametrize(("frames", "height", "width", "tiling"), CASES)
def test_encode_equals_the_definition(vae, plain, frames, height, width, tiling):
    video = noise(1, 3, frames, height, width).clamp(-1, 1)
    latents = vae.encode(video, tiling)
    assert latents.shape == (1, 16, -(-frames // 4), height // 8, width // 8)
    assert_same(latents, plain.encode(video, tiling))


@pytest.mark.parametrize(("frames", "height", "width", "tiling"), CASES)
def test_decode_equals_the_definition(vae, plain, frames, height, width, tiling):
    latents = noise(1, 16, -(-frames // 4), height // 8, width // 8) * SCALE
    video = vae.decode(latents, tiling)
    assert video.shape == (1, 3, 4 * latents.shape[2], height, width)
    assert_same(video, plain.decode(latents, tiling))


def test_the_final_projection_equals_the_definition(tmp_path):
    changes = {"use_final_proj": True, "embed_dim": 128}  # need not be a multiple of 256 then
    state = weights(**changes)
    vae = load_vae(write(tmp_path / "v", state, {"ddconfig": DDCONFIG | changes}), dtype=torch.float32)
    latents = noise(1, 16, 4, 3, 5) * SCALE
    assert_same(vae.decode(latents, SMALL), PlainVAE(state, DDCONFIG | changes).decode(latents, SMALL))


def test_bfloat16_is_close_to_the_definition(folder, plain):
    vae = load_vae(folder)
    assert vae.dtype == torch.bfloat16
    video, latents = noise(1, 3, 5, 40, 32), noise(1, 16, 4, 5, 4) * SCALE
    assert_same(vae.encode(video, SMALL), plain.encode(video, SMALL), 2e-2)
    assert_same(vae.decode(latents, SMALL), plain.decode(latents, SMALL), 2e-2)


def test_a_batch_is_its_items(vae):
    latents = noise(2, 16, 2, 3, 5)
    both = vae.decode(latents, SMALL)
    torch.testing.assert_close(both[1:], vae.decode(latents[1:], SMALL), rtol=1e-4, atol=1e-4)


def test_any_floating_type_and_layout_is_taken(vae):
    video = noise(1, 5, 32, 24, 3).half()
    expected = vae.encode(video.permute(0, 4, 1, 2, 3).float().contiguous(), SMALL)
    assert torch.equal(vae.encode(video.permute(0, 4, 1, 2, 3), SMALL), expected)


# --- time -------------------------------------------------------------------------------------------------------------


def test_an_image_gives_one_latent_and_four_frames(vae):
    image = noise(1, 3, 1, 16, 16)
    latents = vae.encode(image)
    assert torch.equal(latents, vae.encode(image.repeat(1, 1, 4, 1, 1)))
    assert vae.decode(latents).shape == (1, 3, 4, 16, 16)


def test_a_lone_last_latent_is_decoded_with_those_before_it(vae):
    latents = noise(1, 16, 7, 2, 2)
    video = vae.decode(latents)
    assert video.shape[2] == 28
    assert torch.equal(video[:, :, :24], vae.decode(latents[:, :, :6]))
    assert torch.equal(video[:, :, 24:], vae.decode(latents[:, :, 4:])[:, :, -4:])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_the_stream_is_the_whole(vae, count):
    latents = noise(1, 16, count, 2, 3)
    assert torch.equal(torch.cat(list(vae.decode_stream(latents)), 2), vae.decode(latents))


@pytest.mark.parametrize("cuts", [[6, 6], [1, 6, 6], [2, 6], [5, 6], [4], [1, 3], [3, 1], [1], [1, 1, 1, 1], [4, 6, 3]])
def test_decoding_chunk_by_chunk_is_decoding_the_whole(vae, cuts):
    latents = noise(1, 16, sum(cuts), 2, 2)
    parts = list(vae.decode_chunks(latents.split(cuts, 2)))
    assert torch.equal(torch.cat(parts, 2), vae.decode(latents))


def test_frames_come_as_soon_as_their_latents_do(vae):
    seen = []

    def chunks():
        for i in range(3):
            seen.append(i)
            yield noise(1, 16, 6 if i else 4, 2, 2, seed=i)

    log = [(len(seen), frames.shape[2]) for frames in vae.decode_chunks(chunks())]
    # (chunks taken, frames): of 4 latents three are decoded at once, the fourth waits for the next chunk.
    assert log == [(1, 12), (2, 12), (2, 12), (3, 12), (3, 12), (3, 4)]


@pytest.mark.parametrize("cuts", [[24], [1] * 9, [5, 12, 7, 2], [13]])
def test_encoding_block_by_block_is_encoding_the_whole(vae, cuts):
    video = noise(1, 3, sum(cuts), 16, 16)
    parts = list(vae.encode_stream(video.split(cuts, 2)))
    assert torch.equal(torch.cat(parts, 2), vae.encode(video))


def test_the_stream_decodes_nothing_before_it_is_asked(vae):
    done = []
    stream = vae.decode_stream(noise(1, 16, 9, 4, 4), SMALL, progress=lambda *at: done.append(at))
    assert not done
    next(stream)
    assert done == [(1, 12), (2, 12), (3, 12), (4, 12)]  # the first temporal tile only


class LargestTensor(TorchDispatchMode):
    """The most values of any one tensor made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_memory_is_set_by_the_tile_not_by_the_length(vae):
    def largest(work):
        with LargestTensor() as mode:
            work()
        return mode.numel

    def decode(count):
        chunks = (noise(1, 16, 6, 4, 4, seed=i) for i in range(count))
        for _ in vae.decode_chunks(chunks, SMALL):
            pass

    def encode(count):
        blocks = (noise(1, 3, 24, 32, 32, seed=i) for i in range(count))
        for _ in vae.encode_stream(blocks, SMALL):
            pass

    assert largest(lambda: decode(1)) == largest(lambda: decode(8))
    assert largest(lambda: encode(1)) == largest(lambda: encode(8))


# --- progress and cancel ----------------------------------------------------------------------------------------------


class CancelledError(Exception):
    pass


def test_progress_counts_every_tile(vae):
    calls = []
    vae.encode(noise(1, 3, 13, 40, 24), SMALL, progress=lambda *at: calls.append(at))
    assert calls == [(i, 4) for i in range(1, 5)]  # 2 in time x 2 in height x 1 in width
    calls.clear()
    vae.decode(noise(1, 16, 4, 5, 3), SMALL, progress=lambda *at: calls.append(at))
    assert calls == [(i, 4) for i in range(1, 5)]


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_a_cancel_stops_after_the_tile_it_came_in(vae, kind):
    calls = []

    def cancel(done, total):
        calls.append(done)
        if done == 2:
            raise CancelledError

    data = noise(1, 3, 12, 64, 64) if kind == "encode" else noise(1, 16, 3, 8, 8)
    with pytest.raises(CancelledError):
        getattr(vae, kind)(data, SMALL, progress=cancel)
    assert calls == [1, 2]


def test_a_cancel_stops_inside_a_long_tile(vae, monkeypatch):
    monkeypatch.setattr(TileProgress, "interval", 0.0)
    blocks = []
    hooks = [b.register_forward_pre_hook(lambda *_: blocks.append(1)) for b in vae.decoder.blocks]

    def cancel(done, total):
        raise CancelledError

    try:
        with pytest.raises(CancelledError):
            vae.decode(noise(1, 16, 3, 2, 2), SMALL, progress=cancel)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(blocks) == 1, "no block begins after the first part of the first one"


def test_a_large_tile_is_attended_head_by_head_to_the_same_bits(vae, monkeypatch):
    latents, asked = noise(1, 16, 3, 8, 8), []
    monkeypatch.setattr(TileProgress, "interval", 0.0)
    whole = vae.decode(latents, Tiling(frames=12, size=64), progress=lambda *_: asked.append(1))
    few = len(asked)
    monkeypatch.setattr("magi.vae.model._CPU_TOKENS", 16)
    parts = vae.decode(latents, Tiling(frames=12, size=64), progress=lambda *_: asked.append(1))
    assert torch.equal(parts, whole)
    assert len(asked) - few > few, "asked more often"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("video", "said"),
    [
        (torch.zeros(3, 4, 16, 16), r"\(3, 4, 16, 16\)"),
        (torch.zeros(1, 4, 3, 16, 16), r"\(batch, 3, frames"),
        (torch.zeros(1, 3, 0, 16, 16), "at least one frame"),
        (torch.zeros(1, 3, 4, 16, 0), "nothing in video"),
        (torch.zeros(1, 3, 4, 20, 16), "height, 20 pixels.* to 16"),
        (torch.zeros(1, 3, 4, 16, 30), "width, 30 pixels.* to 32"),
        (torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8), "127.5"),
    ],
)
def test_a_wrong_video_is_refused(vae, video, said):
    with pytest.raises(MagiError, match=said):
        vae.encode(video)


@pytest.mark.parametrize(
    ("latents", "said"),
    [
        (torch.zeros(16, 3, 4, 4), r"\(16, 3, 4, 4\)"),
        (torch.zeros(1, 4, 3, 4, 4), r"\(batch, 16, frames"),
        (torch.zeros(1, 16, 0, 4, 4), "at least one frame"),
        (torch.zeros(1, 16, 3, 4, 4, dtype=torch.int64), "floating point"),
    ],
)
def test_wrong_latents_are_refused_at_once(vae, latents, said):
    with pytest.raises(MagiError, match=said):
        vae.decode(latents)
    with pytest.raises(MagiError, match=said):
        vae.decode_stream(latents)  # before the first frame is asked for


def test_blocks_of_another_size_are_refused(vae):
    with pytest.raises(MagiError, match="Only the number of frames may change"):
        list(vae.decode_chunks([torch.zeros(1, 16, 1, 4, 4), torch.zeros(1, 16, 2, 4, 5)]))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_and_its_folder_are_the_same_vae(folder, vae):
    other = load_vae(folder / "diffusion_pytorch_model.safetensors", dtype=torch.float32)
    latents = noise(1, 16, 1, 2, 2)
    assert torch.equal(other.decode(latents), vae.decode(latents))
    assert other.config == vae.config == VAEConfig.from_dict({"ddconfig": DDCONFIG})


@pytest.mark.parametrize("beside", [None, {"model_config": {"num_layers": 34}}])
def test_sizes_of_a_bare_file_are_read_off_its_tensors(tmp_path, beside):
    sizes = {"video_size": 256, "video_length": 16, "depth": 1, "use_final_proj": True}
    folder = write(tmp_path / "v", weights(**sizes), beside)
    assert load_vae(folder).config == VAEConfig.from_dict({"ddconfig": DDCONFIG | sizes})


def test_a_bare_file_that_needs_its_config_says_so(tmp_path):
    with pytest.raises(MagiError, match=r"(?s)pos_embed is \(1, 33, 256\), expected \(1, 4097, 256\).*config.json"):
        load_vae(write(tmp_path / "v", weights()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("decoder.norm.bias"), "1 missing: decoder.norm.bias"),
        (lambda s: s.update({"a.b": torch.zeros(1)}), "1 unexpected: a.b"),
        (lambda s: s.update({"decoder.norm.bias": torch.zeros(7)}), r"decoder.norm.bias is \(7,\), expected \(256,\)"),
    ],
)
def test_a_file_that_differs_is_refused_by_name(tmp_path, change, said):
    state = weights()
    change(state)
    with pytest.raises(MagiError, match=said):
        load_vae(write(tmp_path / "v", state, {"ddconfig": DDCONFIG}))


@pytest.mark.parametrize("config", [None, {"ddconfig": DDCONFIG}])
def test_another_model_is_refused(tmp_path, config):
    other = write(tmp_path / "t5", {"shared.weight": torch.zeros(4, 4)}, config)
    with pytest.raises(MagiError, match="not a MAGI-1 VAE"):
        load_vae(other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": 16}, "patch_size = 16"),
        ({"norm_code": True}, "norm_code"),
        ({"depth": 0}, "depth = 0"),
        ({"depth": "2"}, "depth = '2'"),
        ({"num_heads": 3}, "embed_dim = 256, no multiple of 3"),
        ({"embed_dim": 384}, "384, no multiple of 256"),
        ({"qkv_bias": 1}, "qkv_bias = 1"),
        ({"depth": 1001}, "depth = 1001"),
        ({"depth": 10**9}, "depth = 1000000000"),
        ({"video_size": 8 * 10**9}, "video_size = 8000000000"),
        ({"mlp_ratio": 1e300}, "mlp_ratio = 1e"),
    ],
)
def test_a_config_of_another_vae_is_refused(change, said):
    with pytest.raises(MagiError, match=said):
        VAEConfig.from_dict({"ddconfig": DDCONFIG | change})


def test_a_config_without_ddconfig_is_refused():
    with pytest.raises(MagiError, match="ddconfig"):
        VAEConfig.from_dict({"model_config": {}})


def test_a_damaged_config_is_refused(tmp_path):
    folder = write(tmp_path / "v", weights())
    (folder / "config.json").write_text("{")
    with pytest.raises(MagiError, match=r"config\.json"):
        load_vae(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_in_another_encoding_is_read(encoding, tmp_path):
    folder = write(tmp_path / "v", weights())
    (folder / "config.json").write_text(json.dumps({"ddconfig": DDCONFIG}), encoding=encoding)
    assert load_vae(folder, "meta").config == VAEConfig.from_dict({"ddconfig": DDCONFIG})


@pytest.mark.parametrize("number", ["7", "99999999", "99999999999"])
def test_a_block_of_an_impossible_number(number, tmp_path):
    state = weights(video_size=256, video_length=16) | {f"decoder.blocks.{number}.norm2.bias": torch.zeros(256)}
    with pytest.raises(MagiError, match="not a MAGI-1 VAE"):
        load_vae(write(tmp_path / "v", state), "meta")


def test_the_published_vae_without_its_last_block(tmp_path):
    """All halves lack it, so that the rest is a whole VAE of fewer blocks."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VideoVAE(VAEConfig(depth=23)).state_dict().items()}
    file, header, end = tmp_path / "vae.safetensors", {}, 0
    for name, shape in shapes.items():
        entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end := end + 2 * shape.numel()]}
        header[name] = entry
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(out.tell() + end)
    with pytest.raises(MagiError, match=r"holds 23 blocks, and the published VAE, .*, 24\. Download it again"):
        load_vae(file, "meta")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_numbers_that_are_no_weights_are_refused(dtype, tmp_path):
    state = weights()
    state["decoder.proj_in.weight"] = state["decoder.proj_in.weight"].to(dtype)
    with pytest.raises(MagiError, match=r"1 tensors of a type that cannot be run .*decoder\.proj_in\.weight"):
        load_vae(write(tmp_path / "v", state, {"ddconfig": DDCONFIG}), "meta")


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model.", "module."])
def test_what_stands_in_front_of_all_names_is_left_out(prefix, tmp_path, folder, vae):
    state = {prefix + name: tensor for name, tensor in vae.state_dict().items()}
    other = load_vae(write(tmp_path / "v", state, {"ddconfig": DDCONFIG}), dtype=torch.float32)
    latents = noise(1, 16, 1, 2, 2)
    assert torch.equal(other.decode(latents), vae.decode(latents))


def test_an_impossible_type_is_refused(folder):
    with pytest.raises(MagiError, match="int8"):
        load_vae(folder, dtype=torch.int8)


def test_weights_of_the_files_type_are_not_copied(folder, monkeypatch):
    mapped = {}
    read = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: mapped.setdefault(name, read(self, name)))
    vae = load_vae(folder, dtype=torch.float32)
    assert all(p.data_ptr() == mapped[name].data_ptr() for name, p in vae.named_parameters())
    assert vae.nbytes == sum(t.numel() * 4 for t in mapped.values())


def test_weights_loaded_in_inference_mode_can_be_used_outside_it(folder, vae):
    with torch.inference_mode():
        loaded = load_vae(folder, dtype=torch.float32)
    loaded.to(torch.float64).to(torch.float32)
    assert loaded.device == torch.device("cpu")
    latents = noise(1, 16, 1, 2, 2)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))


def test_results_are_plain_tensors(vae):
    frames = next(vae.decode_stream(noise(1, 16, 1, 2, 2)))
    latents = next(vae.encode_stream([noise(1, 3, 1, 16, 16)]))
    for result in (frames, latents):
        assert not result.requires_grad
        result.clamp_(-1, 1)  # forbidden for tensors made in inference mode


# Numbers that are none


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_input_that_is_none_is_refused(bad, vae):
    video, latents = noise(1, 3, 8, 32, 32), noise(1, 16, 3, 4, 4)
    video[0, 1, 4, 8, 8] = latents[0, 3, 1, 2, 2] = bad
    with pytest.raises(MagiError, match=r"none \(NaN or infinity\) in the video"):
        vae.encode(video)
    with pytest.raises(MagiError, match=r"none \(NaN or infinity\) in the latents"):
        list(vae.decode_chunks((noise(1, 16, 3, 4, 4), latents)))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_damaged_weight_is_named(part, tmp_path):
    state = weights()
    name = f"{part}.blocks.1.mlp.fc1.weight"
    state[name][3, 7] = float("nan")
    damaged = load_vae(write(tmp_path / "vae", state, {"ddconfig": DDCONFIG}), dtype=torch.float32)
    with pytest.raises(MagiError, match=f"The VAE gave numbers that are none .*{name}.*Download it again"):
        damaged.encode(noise(1, 3, 8, 32, 32)) if part == "encoder" else damaged.decode(noise(1, 16, 3, 4, 4))


def test_float16_that_is_exceeded_is_named(folder):
    vae = load_vae(folder, dtype=torch.float16)
    with pytest.raises(MagiError, match=r"float16 was exceeded.*Choose bf16 or fp32"):
        vae.decode(3e4 * noise(1, 16, 3, 4, 4))
