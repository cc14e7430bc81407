import json
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from magi.checkpoint.mapped_file import TensorInfo
from magi.config import PRESETS, MagiConfig
from magi.errors import MagiError
from magi.model_files.identify import recognise, recognise_tensors, resolve_config
from magi.model_files.load import check_transformer, load_transformer
from magi.transformer.weights import tensor_shapes

OFFICIAL_FOLDERS = {
    "4.5B_base": "4.5B_base/inference_weight",
    "4.5B_distill": "4.5B_distill/inference_weight.distill",
    "4.5B_distill_quant": "4.5B_distill_quant/inference_weight.fp8.distill",
    "24B_base": "24B_base/inference_weight",
    "24B_distill": "24B_distill/inference_weight.distill",
    "24B_distill_quant": "24B_distill_quant/inference_weight.fp8.distill",
}


def header(name: str) -> dict[str, TensorInfo]:
    """What the files of a released model say of their tensors."""
    fp8 = name.endswith("quant")
    made = {}
    for tensor, shape in tensor_shapes(PRESETS[name].model, fp8).items():
        scale = tensor.endswith("_scale")
        kind = "F32" if scale else "F8_E4M3" if fp8 and len(shape) == 3 else "BF16"
        made[tensor] = TensorInfo(shape, kind, Path("model.safetensors"))
    return made


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, "F32", Path("x")) for name, shape in shapes.items()}


def opened(name: str, path: Path, metadata: dict | None = None) -> SimpleNamespace:
    return SimpleNamespace(tensors=header(name), metadata=metadata or {}, path=path)


# -- what it is ------------------------------------------------------------------------------------------------------


def test_the_released_4_5b_model_has_its_published_size():
    assert sum(prod(info.shape) for info in header("4.5B_base").values()) == 4_459_898_128


@pytest.mark.parametrize("name", PRESETS)
def test_the_released_models(name):
    found = recognise_tensors(header(name), {}, Path("ckpt/magi") / OFFICIAL_FOLDERS[name])
    assert found.kind == "transformer"
    assert found.model == PRESETS[name].model
    assert found.preset == name.split("_")[0]
    assert found.distilled == ("distill" in name)
    assert found.fp8 == name.endswith("quant")
    variant = "distill" if "distill" in name else "base"
    assert found.name == f"MAGI-1 {found.preset} {variant}" + (" fp8" if found.fp8 else "")
    checkpoint = opened(name, Path("ckpt/magi") / OFFICIAL_FOLDERS[name])
    assert resolve_config(checkpoint, None) == PRESETS[name]
    assert resolve_config(checkpoint, PRESETS[name]) == PRESETS[name]


def test_another_size(tmp_path, tiny_config, random_weights):
    config = tiny_config(True)
    save_file(random_weights(config.model), tmp_path / "magi_tiny_distill.safetensors")
    found = recognise(tmp_path / "magi_tiny_distill.safetensors")
    assert found.model == config.model
    assert found.name == "MAGI-1 of another size distill"
    made = resolve_config(SimpleNamespace(tensors=_read(tmp_path), metadata={}, path=tmp_path / "magi_distill"), None)
    assert made.model == config.model
    assert (made.engine.distill, made.runtime.cfg_number) == (True, 1)


def _read(folder: Path) -> dict[str, TensorInfo]:
    from magi.checkpoint.reader import Checkpoint

    with Checkpoint(folder) as checkpoint:
        return checkpoint.tensors


def test_swiglu_and_duplicated_latents_show(tiny_config, random_weights):
    shape = {"gated_linear_unit": True, "half_channel_vae": True, "in_channels": 32, "out_channels": 32}
    model = tiny_config(shape=shape | {"x_rescale_factor": 0.1}).model
    made = {k: TensorInfo(v, "BF16", Path()) for k, v in tensor_shapes(model).items()}
    assert recognise_tensors(made, {}, Path("x")).model == model


OTHERS = {
    "vae": (infos(**{"decoder.last_layer.weight": (3, 4, 3, 3, 3)}), "vae", "a MAGI-1 VAE"),
    "vae encoder": (infos(**{"encoder.patch_embed.proj.weight": (8, 3, 4, 8, 8)}), "vae", "a MAGI-1 VAE"),
    "t5": (
        infos(**{"encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64)}),
        "t5",
        "a T5 text encoder, not a MAGI-1 transformer",
    ),
    "1.1": (
        infos(
            **{"x_embedder.weight": (8, 16, 1, 2, 2), "videodit_blocks.layers.self_attention.linear_qkv.weight": (2, 8)}
        ),
        "magi-1.1",
        r"MAGI-1\.1 checkpoint.*stacked.*not supported",
    ),
    "random": (infos(weight=(3, 3), bias=(3,)), "unknown", "not a MAGI-1 transformer.*Choose another file"),
    "nothing": ({}, "unknown", "not a MAGI-1 transformer"),
}


@pytest.mark.parametrize(("tensors", "kind", "message"), OTHERS.values(), ids=OTHERS)
def test_other_files(tensors, kind, message, tmp_path):
    assert recognise_tensors(tensors, {}, Path("x")).kind == kind
    save_file({name: torch.zeros(info.shape) for name, info in tensors.items()}, tmp_path / "other.safetensors")
    assert recognise(tmp_path).kind == kind
    with pytest.raises(MagiError, match=message):
        load_transformer(tmp_path / "other.safetensors", device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"videodit_blocks.layers.0.self_attention.q_layernorm.weight": (0,)},
        {"videodit_blocks.layers.0.self_attention.q_layernorm.weight": (7,)},
        {"x_embedder.weight": (64,)},
        {"y_embedder.null_caption_embedding": ()},
        {"y_embedder.null_caption_embedding": (1 << 40, 0)},
        {"videodit_blocks.layers.0.mlp.linear_fc2.weight": (64, 0)},
    ],
)
def test_a_transformer_of_impossible_shapes(change, tiny_config):
    tensors = {k: TensorInfo(v, "F32", Path()) for k, v in (tensor_shapes(tiny_config().model) | change).items()}
    found = recognise_tensors(tensors, {}, Path("x"))
    assert found.kind == "transformer"
    assert found.model is None
    with pytest.raises(MagiError, match="not a MAGI-1 transformer"):
        resolve_config(SimpleNamespace(tensors=tensors, metadata={}, path=Path("x")), None)


# -- distilled or not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "distilled"),
    [
        ("ckpt/magi/4.5B_base/inference_weight/model.safetensors", False),
        ("ckpt/magi/4.5B_distill/inference_weight.distill/model.safetensors", True),
        ("models/magi1_4.5B_distill_bf16.safetensors", True),
        ("models/MAGI-1-24B-base.safetensors", False),
        ("models/base/whatever.safetensors", None),
        ("models/magi/database_distillery.safetensors", None),
        ("models/magi.safetensors", None),
    ],
)
def test_names(path, distilled):
    assert recognise_tensors(header("4.5B_base"), {}, Path(path)).distilled is distilled


@pytest.mark.parametrize("path", [".", "model.safetensors"])
def test_names_of_the_folder_one_is_in(path, tmp_path, monkeypatch):
    folder = tmp_path / "4.5B_distill" / "inference_weight.distill"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert recognise_tensors(header("4.5B_distill"), {}, Path(path)).distilled is True


@pytest.mark.parametrize(
    ("metadata", "distilled"),
    [
        ({"variant": "distill"}, True),
        ({"distill": "false"}, False),
        ({"model": "4.5B base"}, False),
        ({"format": "pt"}, None),
    ],
)
def test_metadata(metadata, distilled):
    found = recognise_tensors(header("4.5B_base"), metadata, Path("some/file.safetensors"))
    assert found.distilled is distilled
    assert ("metadata" in found.evidence) == (distilled is not None)


def write_config(folder: Path, preset: str, name: str = "config.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(MagiConfig.preset(preset).to_dict()), encoding="utf-8")


@pytest.mark.parametrize("preset", ["4.5B_base", "4.5B_distill"])
@pytest.mark.parametrize("where", ["beside the file", "in the folder", "above the folder"])
def test_a_config_nearby(where, preset, tmp_path):
    folder = tmp_path / "model"
    write_config(tmp_path if where == "above the folder" else folder, preset, f"{preset}_config.json")
    (folder / "notes_config.json").parent.mkdir(exist_ok=True)
    (folder / "notes_config.json").write_text("[]", encoding="utf-8")
    path = folder / "model.safetensors" if where == "beside the file" else folder
    found = recognise_tensors(header(preset), {}, path)
    assert found.distilled is (preset == "4.5B_distill")
    assert f"{preset}_config.json" in found.evidence


def test_configs_of_both_variants_say_nothing(tmp_path):
    write_config(tmp_path, "4.5B_base", "base_config.json")
    write_config(tmp_path, "4.5B_distill", "distill_config.json")
    assert recognise_tensors(header("4.5B_base"), {}, tmp_path / "model.safetensors").distilled is None
    assert recognise_tensors(header("4.5B_base"), {}, tmp_path / "magi_4.5b_distill.safetensors").distilled is True


def test_the_config_of_another_model_says_nothing(tmp_path):
    write_config(tmp_path, "24B_base", "24B_base_config.json")
    assert recognise_tensors(header("4.5B_base"), {}, tmp_path / "model.safetensors").distilled is None


def test_the_config_nearby_is_the_one_to_load_with(tmp_path):
    settings = MagiConfig.preset("4.5B_distill").with_runtime(num_steps=8)
    settings = replace(settings, model=replace(settings.model, x_rescale_factor=0.1, params_dtype="torch.float32"))
    (tmp_path / "config.json").write_text(json.dumps(settings.to_dict()), encoding="utf-8")
    assert resolve_config(opened("4.5B_distill", tmp_path / "model.safetensors"), None) == settings


def test_a_config_nearby_that_asks_for_what_is_not_implemented_is_not_passed_over_in_silence(tmp_path):
    settings = PRESETS["4.5B_distill"].to_dict()
    settings["runtime_config"]["scale_factor"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"config\.json' is left out\..*scale_factor is 0\.5") as caught:
        found = recognise_tensors(header("4.5B_distill"), {}, tmp_path / "magi_4.5b_base.safetensors")
    assert found.distilled is False
    assert not [warning for warning in caught if "tokenizer" in str(warning.message)]


def test_a_config_nearby_of_the_other_variant_is_left_aside(tmp_path):
    write_config(tmp_path, "4.5B_base")
    quant = opened("4.5B_distill_quant", tmp_path / "model.safetensors")
    assert resolve_config(quant, None) == PRESETS["4.5B_distill_quant"]
    write_config(tmp_path, "4.5B_distill", "other_config.json")
    for variant in ("4.5B_base", "4.5B_distill"):
        named = opened("4.5B_base", tmp_path / f"magi_{variant}.safetensors")
        assert resolve_config(named, None) == PRESETS[variant]


def test_unknown_variants_are_asked_for():
    with pytest.raises(MagiError, match=r"base or distilled weights.*Choose the variant"):
        resolve_config(opened("4.5B_base", Path("some/model.safetensors")), None)
    for name in ("4.5B_base", "4.5B_distill"):
        assert resolve_config(opened(name, Path("some/model.safetensors")), PRESETS[name]) == PRESETS[name]


@pytest.mark.parametrize("distilled", [False, True])
def test_the_chosen_variant_makes_the_config(distilled):
    wanted = PRESETS["24B_distill" if distilled else "24B_base"]
    assert resolve_config(opened("24B_base", Path("some/model.safetensors")), None, distilled) == wanted


@pytest.mark.parametrize(
    ("name", "path", "asked", "message"),
    [
        ("4.5B_base", "4.5B_base/model.safetensors", "4.5B_distill", "holds base weights.*variant base"),
        ("4.5B_distill", "magi_4.5b_distill.safetensors", "4.5B_base", "holds distilled weights.*variant distilled"),
        ("24B_distill_quant", "some/model.safetensors", "24B_base", "distilled weights.*float8 layers"),
    ],
)
def test_base_and_distilled_are_not_mixed_up(name, path, asked, message):
    with pytest.raises(MagiError, match=message):
        resolve_config(opened(name, Path(path)), PRESETS[asked])
    with pytest.raises(MagiError, match=message):
        resolve_config(opened(name, Path(path)), None, PRESETS[asked].engine.distill)


# -- how many layers -------------------------------------------------------------------------------------------------


def cut(tensors: dict, layers: int) -> dict:
    """Without the last layers."""
    gone = [n for n in tensors if n.startswith("videodit_blocks.layers.") and int(n.split(".")[2]) >= layers]
    return {n: t for n, t in tensors.items() if n not in gone}


@pytest.mark.parametrize("name", PRESETS)
def test_a_released_model_without_its_last_layer(name):
    layers = PRESETS[name].model.num_layers
    checkpoint = opened(name, Path("ckpt/magi") / OFFICIAL_FOLDERS[name])
    checkpoint.tensors = cut(checkpoint.tensors, layers - 1)
    found = recognise_tensors(checkpoint.tensors, {}, checkpoint.path)
    assert f"it holds {layers - 1}, and the released model" in found.layers_fault
    with pytest.raises(
        MagiError, match=rf"not hold all layers .* {layers - 1}, .*, {layers}\. Download the file again"
    ):
        resolve_config(checkpoint, None, "distill" in name)


@pytest.mark.parametrize("where", ["beside the file", "above the folder"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_config_nearby_tells_how_many(where, layers, tmp_path, tiny_config, random_weights):
    config = tiny_config(True, {"num_layers": 3})
    folder = tmp_path / "inference_weight.distill"
    folder.mkdir()
    save_file(cut(random_weights(config.model), layers), folder / "model.safetensors")
    place = folder if where == "beside the file" else tmp_path
    (place / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    with pytest.raises(MagiError, match=rf"it holds {layers}, and config\.json near it says 3\. Download"):
        load_transformer(folder, device="cpu")
    found = recognise(folder)
    assert (found.model.num_layers, found.distilled) == (layers, True)


def test_fewer_layers_that_are_meant(tmp_path):
    """A config beside it says so, or its own metadata, as of files of random weights."""
    few = PRESETS["4.5B_base"].with_layers(2)
    tensors = {n: TensorInfo(s, "BF16", Path()) for n, s in tensor_shapes(few.model).items()}
    checkpoint = SimpleNamespace(tensors=tensors, metadata={"layers": "2"}, path=tmp_path / "model.safetensors")
    assert resolve_config(checkpoint, None, False).model == few.model
    checkpoint.metadata = {"layers": "3"}
    with pytest.raises(MagiError, match="not hold all layers"):
        resolve_config(checkpoint, None, False)
    write_config(tmp_path, "4.5B_base", "official_config.json")
    (tmp_path / "few_config.json").write_text(json.dumps(few.to_dict()), encoding="utf-8")
    assert resolve_config(checkpoint, None).model == few.model


@pytest.mark.parametrize("number", ["99999999", "99999999999", "9" * 400, "\u0663", "-1"])
def test_a_layer_of_an_impossible_number(number, tmp_path, tiny_config, random_weights):
    """It is named, and nothing counts up to it."""
    weights = random_weights(tiny_config().model)
    weights[f"videodit_blocks.layers.{number}.mlp.layer_norm.weight"] = torch.ones(64)
    save_file(weights, tmp_path / "magi_base.safetensors")
    with pytest.raises(MagiError, match=r"1 unexpected \(videodit_blocks\.layers\.") as caught:
        check_transformer(tmp_path / "magi_base.safetensors", device="cpu")
    assert len(str(caught.value)) < 1500


def test_a_config_of_a_billion_layers(tmp_path, tiny_config, random_weights):
    save_file(random_weights(tiny_config().model), tmp_path / "magi_base.safetensors")
    config = tiny_config().to_dict()
    config["model_config"]["num_layers"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.warns(
        UserWarning, match=r"config\.json' is left out\..*'num_layers' is 1000000000, which no model has"
    ):
        assert recognise(tmp_path).model == tiny_config().model
    with pytest.raises(MagiError, match="num_layers is 1001; it must be from 1 to 1000"):
        tiny_config(shape={"num_layers": 1001})


# -- a config nearby that cannot be read -----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_config_nearby_in_another_encoding_counts(encoding, tmp_path):
    config = json.dumps(PRESETS["4.5B_distill"].to_dict())
    (tmp_path / "config.json").write_text(config, encoding=encoding)
    assert recognise_tensors(header("4.5B_distill"), {}, tmp_path / "model.safetensors").distilled is True


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"model_config": {"num_lay', "it is cut off"),
        (b"", "it is empty"),
        ('{"model_config": "\u00fc"}'.encode("latin-1"), "another encoding than UTF-8"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    ],
)
def test_a_config_nearby_that_cannot_be_read_is_not_passed_over(content, said, tmp_path):
    tensors, folder = header("4.5B_base"), tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(MagiError, match=rf"config\.json' beside the weights cannot be read: .*{said}"):
        recognise_tensors(tensors, {}, folder)
    (folder / "config.json").rename(tmp_path / "4.5B_config.json")  # who knows whose
    with pytest.warns(UserWarning, match=rf"4\.5B_config\.json' is left out, as it cannot be read: .*{said}"):
        assert recognise_tensors(tensors, {}, folder).kind == "transformer"


def test_a_hidden_config_is_none(tmp_path):
    (tmp_path / "._config.json").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    write_config(tmp_path, "4.5B_distill")
    assert recognise_tensors(header("4.5B_distill"), {}, tmp_path / "model.safetensors").distilled is True


@pytest.mark.parametrize("value", [True, 3, {"a": 1}, [1], "x" * 10**6])
def test_metadata_of_any_type(value, tmp_path, tiny_config, random_weights):
    """What the format does not allow, but files have."""
    file = tmp_path / "magi.safetensors"
    save_file(random_weights(tiny_config().model), file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    said = {"__metadata__": {"variant": value, "distill": value, "layers": value}}
    text = json.dumps(said | json.loads(content[8 : 8 + length])).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert recognise(file).distilled is (True if value is True else None)
