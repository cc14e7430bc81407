import hashlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from magi.errors import MagiError
from magi.model_files.load import load_transformer
from magi.planning.placement import MemoryOptions
from magi.sampling.prepare import generate_latents
from magi.transformer.float8 import Fp8Weight, StoredFp8
from magi.transformer.layers import Linear, mlp, output_projection, timestep_embedding
from magi.transformer.weights import tensors_in


@pytest.fixture
def file(tmp_path, tiny_config, random_weights):
    """(dtype) -> a checkpoint of three layers."""

    def make(dtype=torch.bfloat16):
        weights = random_weights(tiny_config(shape={"num_layers": 3}).model)
        path = tmp_path / f"magi_{dtype}_base.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, path)
        return path

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compute_type_is_the_files_unless_asked_for(dtype, file):
    assert load_transformer(file(dtype), device="cpu").dtype == dtype
    assert load_transformer(file(dtype), device="cpu", dtype=torch.float16).dtype == torch.float16


def test_what_is_float32_whatever_the_file_says(file):
    model = load_transformer(file(torch.bfloat16), device="cpu")
    outer, block = model.outer, next(iter(model.blocks))
    for part in (outer.patch, outer.time_in, outer.time_out, outer.caption, outer.caption_condition, outer.final):
        assert part.weight.dtype == torch.float32
    for norm in (outer.final_norm, block.q_norm, block.k_norm, block.attn_post_norm, block.mlp_post_norm):
        assert norm.weight.dtype == norm.bias.dtype == torch.float32
    for part in (
        block.q,
        block.kv_x,
        block.proj,
        block.fc1,
        block.gates,
        block.q_norm_x,
        block.qkv_norm,
        block.mlp_norm,
    ):
        assert part.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("one_p", [True, False])
def test_norms_that_hold_their_weight_less_one(one_p, tiny_config, tiny_model, random_weights):
    config = tiny_config(shape={"apply_layernorm_1p": one_p})
    weights, model = random_weights(config.model), tiny_model(config)
    at = "videodit_blocks.layers.1."
    block = list(model.blocks)[1]
    for norm, name in [
        (model.outer.final_norm, "videodit_blocks.final_layernorm"),
        (block.q_norm, at + "self_attention.q_layernorm"),
        (block.k_norm, at + "self_attention.k_layernorm"),
        (block.q_norm_x, at + "self_attention.q_layernorm_xattn"),
        (block.k_norm_x, at + "self_attention.k_layernorm_xattn"),
        (block.attn_post_norm, at + "self_attn_post_norm"),
        (block.mlp_post_norm, at + "mlp_post_norm"),
    ]:
        assert torch.equal(norm.weight, weights[name + ".weight"] + one_p)
        assert torch.equal(norm.bias, weights[name + ".bias"])
    for norm, name in [(block.qkv_norm, "self_attention.linear_qkv.layer_norm"), (block.mlp_norm, "mlp.layer_norm")]:
        assert torch.equal(norm.weight, weights[f"{at}{name}.weight"])


def test_time_is_rounded_before_its_float32_layers(tiny_config, tiny_model):
    model = tiny_model(tiny_config(), dtype=torch.bfloat16)
    embedding = timestep_embedding(0.37, 256, torch.device("cpu")).bfloat16().float()
    hidden = F.silu(F.linear(embedding, model.outer.time_in.weight, model.outer.time_in.bias))
    wanted = F.linear(hidden, model.outer.time_out.weight, model.outer.time_out.bias)
    torch.testing.assert_close(model._time(0.37), wanted, rtol=1e-6, atol=1e-6)


def test_time_embedding_formula():
    t = 0.37
    args = [t * 1000 * 10000 ** (-i / 128) for i in range(128)]
    wanted = torch.tensor([*args, *args], dtype=torch.float64)
    wanted = torch.cat([wanted[:128].cos(), wanted[128:].sin()])
    got = timestep_embedding(t, 256, torch.device("cpu"))
    torch.testing.assert_close(got[0].double(), wanted, rtol=0, atol=1e-4)


def test_time_embedding_has_the_same_bits_on_every_processor():
    """float32 `exp` and `cos` do not: a step size of 32 then differs by 0.001, and distilled models by 2e-5 and
    more."""
    bits = timestep_embedding(32.0, 256, torch.device("cpu")).numpy().tobytes()
    assert hashlib.sha256(bits).hexdigest()[:16] == "fd7d6b5dc64dea82"


def test_the_output_projection_has_fp32_output_unless_it_is_fp8(tiny_config, tiny_model, randn):
    x = randn(5, 128).bfloat16()
    dense = next(iter(tiny_model(tiny_config(), dtype=torch.bfloat16).blocks)).proj
    got = output_projection(x, dense)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x.float() @ dense.weight.float().T, rtol=1e-5, atol=1e-5)
    config = tiny_config(True, shape={"num_layers": 3})
    quantised = list(tiny_model(config, fp8=True, dtype=torch.bfloat16).blocks)[1].proj
    assert isinstance(quantised, Fp8Weight)
    assert output_projection(x, quantised).dtype == torch.bfloat16


def test_swiglu_is_rounded_once_and_gelu_where_it_is_computed(randn):
    x, fc1, fc2 = randn(5, 8).bfloat16(), randn(24, 8, seed=1).bfloat16(), randn(8, 24, seed=2).bfloat16()
    hidden = F.linear(x, fc1)
    gate, value = hidden.float().chunk(2, dim=-1)
    wanted = F.linear((F.silu(gate) * value).bfloat16(), fc2[:, :12])
    assert torch.equal(mlp(x, Linear(fc1), Linear(fc2[:, :12]), gated=True), wanted)
    assert torch.equal(mlp(x, Linear(fc1), Linear(fc2), gated=False), F.linear(F.gelu(hidden), fc2))


@pytest.mark.parametrize("distill", [False, True])
def test_sixteen_bits_stay_near_thirty_two(distill, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    config = tiny_config(distill, num_frames=24)
    options = {"caption": tiny_caption(), "special_tokens": tiny_tokens}
    low, full = (
        next(generate_latents(tiny_model(config, dtype=dtype), **options)).latents
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert low.dtype == torch.float32
    error = float((low - full).norm() / full.norm())
    assert 1e-4 < error < 5e-2


def test_loading_reports_and_can_be_cancelled(file):
    seen = []
    load_transformer(file(), device="cpu", progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def cancel(done, total):
        seen.append(done)
        raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        load_transformer(file(), device="cpu", progress=cancel)
    assert seen == [1]


def test_layers_that_stay_in_the_file_are_the_same(file):
    kept = load_transformer(file(), device="cpu", offload=False)
    fetched = load_transformer(file(), device="cpu", offload=True)
    assert len(kept.blocks) == len(fetched.blocks) == 3
    for a, b in zip(kept.blocks, fetched.blocks, strict=True):
        assert torch.equal(a.fc1.weight, b.fc1.weight)


def test_what_is_fixed_by_hand_holds(file):
    options = MemoryOptions(streaming=True, cache="host", token_block=7)
    model = load_transformer(file(), device="cpu", memory=options)
    assert (model.token_block, model.cache_device, set(model.blocks.on_device)) == (7, "host", set())
    model = load_transformer(file(), device="cpu", memory=options, offload=False)
    assert (model.token_block, model.cache_device, set(model.blocks.on_device)) == (7, "host", {0, 1, 2})


def test_weights_on_the_device_are_counted(file):
    kept, fetched = (load_transformer(file(), device="cpu", offload=offload) for offload in (False, True))
    layers = sum(t.nbytes for block in kept.blocks for t in tensors_in(block))
    assert kept.nbytes - fetched.nbytes == pytest.approx(layers, rel=0.05), "parts of a layer may lie a little apart"
    assert fetched.nbytes == sum(t.nbytes for t in tensors_in(fetched.outer))


def test_a_device_that_is_not_there(file):
    with pytest.raises(MagiError, match="no device 'gpu'"):
        load_transformer(file(), device="gpu")


# -- precision -------------------------------------------------------------------------------------------------------

MATRICES = ("q", "k", "v", "q_x", "proj", "fc1", "fc2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_precision_is_a_compute_type(dtype, file):
    path = file(dtype)
    for precision, wanted in (("auto", dtype), ("fp8", dtype), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model = load_transformer(path, device="cpu", precision=precision)
        assert model.dtype == list(model.blocks)[1].gates.weight.dtype == wanted
        assert isinstance(list(model.blocks)[1].fc1, StoredFp8) == (precision == "fp8")
    assert load_transformer(path, device="cpu", dtype=torch.float16, precision="fp8").dtype == torch.float16


def test_float8_storage_takes_the_matrices_of_all_layers_but_the_first_and_the_last(tiny_config, tiny_model):
    model = tiny_model(tiny_config(shape={"num_layers": 4}), precision="fp8")
    for i, block in enumerate(model.blocks):
        for name in MATRICES:
            assert isinstance(getattr(block, name), StoredFp8) == (0 < i < 3)
    plain = tiny_model(tiny_config(shape={"num_layers": 4}))
    assert torch.equal(list(model.blocks)[1].kv_x.weight, list(plain.blocks)[1].kv_x.weight), (
        "not even in the official ones"
    )
    assert torch.equal(list(model.blocks)[1].q_norm.weight, list(plain.blocks)[1].q_norm.weight)


@pytest.mark.parametrize("gated", [False, True])
def test_float8_storage_stays_near(gated, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    config = tiny_config(True, shape={"num_layers": 4, "gated_linear_unit": gated}, num_frames=24)
    options = {"caption": tiny_caption(), "special_tokens": tiny_tokens}
    stored, full = (
        next(generate_latents(tiny_model(config, precision=precision), **options)).latents
        for precision in ("fp8", "auto")
    )
    assert 1e-4 < float((stored - full).norm() / full.norm()) < 5e-2


def test_official_float8_is_what_it_is(tiny_config, tiny_model):
    config = tiny_config(True, shape={"num_layers": 3})
    for precision in ("auto", "fp8"):
        assert isinstance(list(tiny_model(config, fp8=True, precision=precision).blocks)[1].fc1, Fp8Weight)
    for precision in ("bf16", "fp32"):
        with pytest.raises(MagiError, match=f"precision {precision} is chosen, but .* are float8 .*Choose auto"):
            tiny_model(config, fp8=True, dtype=None, precision=precision)


def test_precisions_that_are_none(file):
    with pytest.raises(MagiError, match=r"no precision 'int4'\. Choose one of auto, bf16, fp32, fp8"):
        load_transformer(file(), device="cpu", precision="int4")
    with pytest.raises(MagiError, match=r"precision bf16 and the dtype torch\.float32 exclude each other"):
        load_transformer(file(), device="cpu", dtype=torch.float32, precision="bf16")
