"""Weights that other programs quantised: float8 is read exactly, and all else is named and refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from magi.cli.main import main
from magi.errors import MagiError
from magi.model_files.identify import recognise
from magi.model_files.load import check_transformer, load_transformer
from magi.planning.footprint import weight_sizes
from magi.transformer.float8 import StoredFp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Q = "videodit_blocks.layers.1.self_attention.linear_qkv.q"


@pytest.fixture
def config(tiny_config):
    return tiny_config(True, {"num_layers": 3})


@pytest.fixture
def weights(config, random_weights):
    return random_weights(config.model)


def matrices(weights) -> list[str]:
    return [name for name in weights if name.startswith("videodit_blocks.layers") and weights[name].dim() == 2]


def bytes_of(content: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def scaled(weights, maker: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A file's tensors as a program leaves them, and the numbers that they stand for."""
    stored, meant = dict(weights), dict(weights)
    for name in matrices(weights):
        layer, weight = name.removesuffix(".weight"), weights[name]
        rows = maker == "comfy_quant by rows"
        scale = (weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()).float() / 300
        stored[name] = (weight / scale).to(E4M3)
        meant[name] = (stored[name].float() * scale).bfloat16()
        if maker == "scaled_fp8":
            stored |= {layer + ".scale_weight": scale.reshape(()), layer + ".scale_input": torch.ones(())}
        else:
            stored |= {layer + ".weight_scale": scale, layer + ".input_scale": torch.ones(1)}
            stored |= {layer + ".comfy_quant": bytes_of({"format": "float8_e4m3fn"})}
    if maker == "scaled_fp8":
        stored["scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    return stored, meant


MAKERS = ["scaled_fp8", "comfy_quant", "comfy_quant by rows"]


def same(a, b) -> bool:
    """Whether two transformers have the same weights."""
    from magi.transformer.weights import tensors_in

    pairs = [(a.outer, b.outer), *zip(a.blocks, b.blocks, strict=True)]
    return all(
        torch.equal(x.float(), y.float())
        for first, second in pairs
        for x, y in zip(tensors_in(first), tensors_in(second), strict=True)
    )


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_float8_is_what_it_stands_for(maker, prefix, weights, config, tmp_path):
    stored, meant = scaled(weights, maker)
    stored = {prefix * (name != "scaled_fp8") + name: tensor for name, tensor in stored.items()}
    save_file(stored, tmp_path / "magi_distill.safetensors")
    save_file(meant, tmp_path / "meant_magi_distill.safetensors")
    found = recognise(tmp_path / "magi_distill.safetensors")
    assert (found.model, found.fp8, found.distilled) == (config.model, False, True)
    options = {"device": "cpu", "dtype": torch.bfloat16}
    loaded, plain = (load_transformer(tmp_path / f"{n}magi_distill.safetensors", **options) for n in ("", "meant_"))
    assert same(loaded, plain)
    assert next(iter(loaded.blocks)).q.weight.dtype == torch.bfloat16


def test_the_product_with_the_scale_is_rounded_once(weights, config, tmp_path):
    stored, _ = scaled(weights, "scaled_fp8")
    save_file(stored, tmp_path / "magi_distill.safetensors")
    loaded = load_transformer(tmp_path / "magi_distill.safetensors", device="cpu", precision="fp32")
    exact = stored[Q + ".weight"].double() * stored[Q + ".scale_weight"].double()
    torch.testing.assert_close(list(loaded.blocks)[1].q.weight.double(), exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float16, torch.float64])
def test_plain_numbers_of_any_floating_type_are_read(dtype, weights, config, tmp_path):
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(stored, tmp_path / "a_magi_distill.safetensors")
    save_file({n: t.float().bfloat16() for n, t in stored.items()}, tmp_path / "b_magi_distill.safetensors")
    a, b = (load_transformer(tmp_path / f"{n}_magi_distill.safetensors", config, "cpu", torch.bfloat16) for n in "ab")
    for x, y in zip(a.blocks, b.blocks, strict=True):
        assert torch.equal(x.fc1.weight, y.fc1.weight)


@pytest.mark.parametrize("maker", [*MAKERS, "plain"])
def test_stored_as_float8_again_and_planned_for(maker, weights, config, tmp_path):
    stored = {n: t.to(E4M3) for n, t in weights.items()} if maker == "plain" else scaled(weights, maker)[0]
    save_file(stored, tmp_path / "magi_distill.safetensors")
    loaded = load_transformer(tmp_path / "magi_distill.safetensors", device="cpu", precision="fp8")
    layer = list(loaded.blocks)[1]
    assert isinstance(layer.q, StoredFp8)
    meant = stored[Q + ".weight"].float() if maker == "plain" else scaled(weights, maker)[1][Q + ".weight"].float()
    torch.testing.assert_close(layer.q.dequantize(torch.float32), meant, rtol=2**-4, atol=1e-3)
    from magi.checkpoint.reader import Checkpoint

    with Checkpoint(tmp_path) as checkpoint:
        assert weight_sizes(checkpoint.tensors, config.model, "cpu", "fp8").blocks[1] > 0


def int8(weights):
    return weights | {name: (weights[name] * 100).to(torch.int8) for name in matrices(weights)}


def nvfp4(weights):
    made = dict(weights)
    for name in matrices(weights):
        layer, (rows, columns) = name.removesuffix(".weight"), weights[name].shape
        made |= {name: torch.zeros(rows, columns // 2, dtype=torch.uint8), layer + ".weight_scale_2": torch.ones(1)}
        made |= {layer + ".weight_scale": torch.ones(rows, columns // 16).to(E4M3)}
        made |= {layer + ".comfy_quant": bytes_of({"format": "nvfp4\x1b[31m"})}
    return made


def blocks_of(weights, suffix):
    made = scaled(weights, "scaled_fp8")[0]
    scales = [name for name in made if name.endswith(".scale_weight")]
    for name in scales:
        del made[name]
        made[name.removesuffix(".scale_weight") + suffix] = torch.ones(2, 2)
    return made


def bitsandbytes(weights):
    made = dict(weights)
    for name in matrices(weights):
        made[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
        made |= {name + ".absmax": torch.ones(3), name + ".quant_map": torch.ones(16)}
    return made


def official_as(weights, config, random_weights, dtype):
    made = random_weights(config.model, True)
    return {name: t.view(dtype) if t.dtype == E4M3 else t for name, t in made.items()}


REFUSED = {
    "int8": (int8, r"27 tensors of a type that cannot be run.* I8"),
    "bool": (lambda w: w | {Q + ".weight": w[Q + ".weight"] > 0}, r"1 tensors of a type .*linear_qkv\.q\.weight BOOL"),
    "int64 norm": (
        lambda w: w | {"videodit_blocks.final_layernorm.weight": torch.ones(64, dtype=torch.int64)},
        r"final_layernorm\.weight I64",
    ),
    "nvfp4": (nvfp4, r"U8.*quantised by ComfyUI in the format nvfp4\\x1b"),
    "bitsandbytes": (bitsandbytes, "quantised by bitsandbytes"),
    "scaled by blocks": (lambda w: blocks_of(w, ".weight_scale"), r"scaled in a way that cannot be read .*\(2, 2\)"),
    "scaled by inverse blocks": (lambda w: blocks_of(w, ".weight_scale_inv"), "scaled block by block"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_exactly_is_named(kind, weights, config, tmp_path, capsys):
    make, said = REFUSED[kind]
    file = tmp_path / "magi_distill.safetensors"
    save_file(make(weights), file)
    for given in (None, config):
        with pytest.raises(MagiError, match=said) as caught:
            check_transformer(file, given, device="cpu")
        assert "magi download --list" in str(caught.value)
        assert str(caught.value).isprintable()
    assert main(["inspect", str(file)]) == 0
    assert "complete        no" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, E5M2])
def test_official_layers_are_of_one_type(dtype, weights, config, random_weights, tmp_path):
    save_file(official_as(weights, config, random_weights, dtype), tmp_path / "magi_distill.safetensors")
    with pytest.raises(MagiError, match="of a type that cannot be run"):
        load_transformer(tmp_path / "magi_distill.safetensors", config, "cpu")


def test_a_lora_is_named(tmp_path):
    save_file({f"{Q}.lora_A.weight": torch.ones(4, 64)}, tmp_path / "x.safetensors")
    with pytest.raises(MagiError, match="a LoRA, which belongs on top of a model"):
        check_transformer(tmp_path / "x.safetensors")
