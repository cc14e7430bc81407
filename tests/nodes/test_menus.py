"""Where the loaders look for files, what their menus offer, and what they say of missing and wrong files."""

import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from magi.model_files.locate import ModelFiles
from magi.model_files.repeating import repeating_files
from tests.support.comfy_host import STAND_IN
from tests.support.graph import InvalidGraph, NodeError
from tests.support.magi_graphs import filled, node, text_to_video, widgets
from tests.support.paths import ROOT

HUB = "https://huggingface.co/sand-ai/MAGI-1/tree/main"
TOKENS = "special_tokens.npz"
MODEL, VAE, ENCODER = "Magi1ModelLoader", "Magi1VAELoader", "Magi1TextEncoderLoader"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> ModelFiles:
    """The repeating model's files, to be put where downloaded ones would be."""
    return repeating_files(tmp_path_factory.mktemp("demo"))


def put(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path((shutil.copytree if source.is_dir() else shutil.copy)(source, target))


def problem(comfy, class_type: str, **inputs) -> str:
    """What a loader says when it runs, "" where nothing. Validation says nothing: front ends show that too deep down."""
    graph = filled(comfy, {"loader": node(class_type, **inputs)})
    assert comfy.errors(graph) == {}
    try:
        comfy.run(graph)
    except NodeError as error:
        return error.message if error.kind == "MagiError" else f"{error.kind}: a bug"
    return ""


@pytest.mark.parametrize("name", ["4.5B_distill", "4.5B_distill_quant", "4.5B_base", "24B_distill", "24B_base"])
def test_a_released_model_that_is_not_there(comfy, name):
    said = problem(comfy, MODEL, model=name)
    assert str(comfy.base / "models" / "magi1" / "ckpt" / "magi" / name) in said
    assert "inference_weight" in said
    assert f"{HUB}/ckpt/magi/{name}" in said
    assert f"download {name}" in said


def test_the_command_of_a_missing_model_runs_as_it_stands(comfy, tmp_path):
    """From any folder, and in a Python that ignores the current one, as that of portable ComfyUI does."""
    command = shlex.split(problem(comfy, MODEL, model="4.5B_distill").splitlines()[-1])
    python, *rest = command
    assert (python, rest[1:3]) == (sys.executable, ["download", "4.5B_distill"])
    arguments = [python, "-I", *rest[:2], "--help"]
    shown = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--folder" in shown.stdout


@pytest.mark.parametrize(
    ("class_type", "widget", "name", "file"),
    [
        (VAE, "vae", "ckpt/vae", "diffusion_pytorch_model.safetensors"),
        (ENCODER, "encoder", "ckpt/t5/t5-v1_1-xxl", "pytorch_model-*.bin"),
    ],
)
def test_an_official_part_that_is_not_there(comfy, class_type, widget, name, file):
    said = problem(comfy, class_type, **{widget: name})
    assert str(comfy.base / "models" / "magi1" / Path(name)) in said
    assert file in said
    assert f"{HUB}/{name}" in said


@pytest.mark.parametrize("missing", ["model", "vae", "encoder"])
@pytest.mark.parametrize("ready", [(), ("encoder",), ("model", "vae", "encoder")])
def test_missing_files_are_told_by_the_first_node_that_runs(comfy, reads, missing, ready):
    """Whichever that is, and whatever of the graph came before: no prompt is encoded, no picture read for nothing."""
    names = {"model": "24B_base", "vae": "ckpt/vae", "encoder": "ckpt/t5/t5-v1_1-xxl"}
    graph = text_to_video(comfy)
    if ready:
        comfy.run({name: graph[name] for name in ready})
    graph[missing]["inputs"][missing] = names[missing]
    with pytest.raises(NodeError, match=re.escape(f"not in {comfy.base}")) as caught:
        comfy.run(graph)
    assert caught.value.kind == "MagiError"
    titles = {"model": "MAGI-1 Model Loader", "vae": "MAGI-1 VAE Loader", "encoder": "MAGI-1 Text Encoder Loader"}
    assert (caught.value.node == missing) or caught.value.message.startswith(f"{titles[missing]}: ")
    assert len(set(comfy.executed) - {"start"}) == 1, "but for the size, which is nothing"
    assert reads == []


def test_a_loader_that_is_not_needed_is_not_missed(comfy):
    """A second one, at hand for another time."""
    graph = text_to_video(comfy)
    graph["save"] = node("Sink", value=["decode", 1])
    spare = {"spare": node(MODEL, model="24B_base"), "other": node("Sink", value=["spare", 0])}
    beside = comfy.module("nodes.comfyui.graph").needed_beside
    assert set(beside(graph | spare, "model")) == {*graph} - {"model"}
    assert set(beside(graph | spare, "save")) == {*graph} - {"save"}
    assert set(beside(graph | spare, "spare")) == {"other"}
    del graph["save"]
    assert set(beside(graph, "model")) == set(), "nothing runs without an output"


def test_the_side_of_a_switch_that_is_not_chosen_is_not_missed(comfy, monkeypatch):
    classes = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    either = {"on_true": ("*", {"lazy": True}), "on_false": ("*", {"lazy": True}), "switch": ("BOOLEAN", {})}
    switch = type("Switch", (), {"INPUT_TYPES": classmethod(lambda cls: {"required": either})})
    monkeypatch.setitem(classes, "Switch", switch)
    graph = text_to_video(comfy)
    graph["spare"] = node(MODEL, model="24B_base")
    graph["switch"] = node("Switch", on_true=["model", 0], on_false=["spare", 0], switch=True)
    graph["sampler"]["inputs"]["model"] = ["switch", 0]
    graph["save"] = node("Sink", value=["decode", 1])
    beside = set(comfy.module("nodes.comfyui.graph").needed_beside(graph, "text"))
    assert {"switch", "vae", "encoder"} <= beside
    assert "spare" not in beside


@pytest.mark.parametrize("graph", [None, {}, {"other": {"class_type": "Gone", "inputs": {}}}])
def test_a_graph_that_is_not_known_is_not_checked(comfy, graph):
    assert list(comfy.module("nodes.comfyui.graph").needed_beside(graph, "me")) == []
    comfy.module("nodes.comfyui.preflight").check_loaders(graph, "me")


def test_paths_of_another_system(comfy, demo):
    put(demo.transformer / "model.safetensors", comfy.base / "models/diffusion_models/mine/magi_distill.safetensors")
    put(demo.special_tokens, comfy.base / "models/magi1" / TOKENS)
    assert problem(comfy, MODEL, model="mine\\magi_distill.safetensors", variant="distilled") == ""


def test_a_missing_file_belongs_in_the_folder_of_todays_name(comfy):
    """ComfyUI's first one for diffusion models is models/unet, of old."""
    assert "models/diffusion_models" in problem(comfy, MODEL, model="mine.safetensors").replace("\\", "/")


WISHES = {"high_quality": False, "duration_tokens": False, "motion": "any", "look": "any", "borders": False}


def without_tokens(comfy, demo, **wishes) -> dict:
    """A graph with a model that has no special tokens."""
    put(demo.transformer, comfy.base / "models/magi1/ckpt/magi/4.5B_distill/inference_weight.distill")
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["model"] = "4.5B_distill"
    graph["text"]["inputs"] |= WISHES | wishes
    return graph


@pytest.mark.parametrize(
    ("wishes", "negative"),
    [
        *(({name: value}, False) for name, value in (("high_quality", True), ("duration_tokens", True))),
        *(({name: value}, False) for name, value in (("motion", "static"), ("look", "2D anime"), ("borders", True))),
        ({}, True),
        ({"prompt": ""}, True),
    ],
    ids=str,
)
def test_missing_special_tokens(comfy, demo, wishes, negative, reads):
    graph = without_tokens(comfy, demo, **wishes)
    assert problem(comfy, MODEL, model="4.5B_distill") == ""
    graph["sampler"]["inputs"]["negative_tokens"] = negative
    with pytest.raises(NodeError) as caught:
        comfy.run(graph)
    said = caught.value.message
    assert caught.value.kind == "MagiError"
    assert TOKENS in said
    assert str(comfy.base / "models" / "magi1") in said
    assert "https://raw.githubusercontent.com/SandAI-org/MAGI-1/main/example/assets/special_tokens.npz" in said
    assert reads == [], "before anything is loaded"
    put(demo.special_tokens, comfy.base / "models/magi1" / TOKENS)
    comfy.run(graph)


@pytest.mark.parametrize("wishes", [{}, {"prompt": "", "high_quality": True, "duration_tokens": True}], ids=str)
def test_special_tokens_are_not_missed_where_none_is_used(comfy, demo, wishes):
    graph = without_tokens(comfy, demo, **wishes)
    frames = comfy.run(graph)["decode"][0]
    put(demo.special_tokens, comfy.base / "models/magi1" / TOKENS)
    graph["model"]["inputs"]["attention"] = "math"  # so that the loader runs again
    assert torch.allclose(comfy.run(graph)["decode"][0], frames, atol=1e-3)


def test_special_tokens_of_another_kind_are_told_before_anything_runs(comfy, demo):
    without_tokens(comfy, demo)
    (comfy.base / "models/magi1" / TOKENS).write_bytes(b"PK no tokens")
    assert "not the special-token file" in problem(comfy, MODEL, model="4.5B_distill")


def test_the_official_tree_is_used(comfy, demo):
    models = comfy.base / "models/magi1"
    put(demo.transformer, models / "ckpt/magi/4.5B_distill/inference_weight.distill")
    put(demo.vae, models / "ckpt/vae")
    put(demo.text_encoder, models / "ckpt/t5/t5-v1_1-xxl")
    put(demo.special_tokens, models / TOKENS)
    graph = text_to_video(comfy)
    demo_frames = comfy.run(graph)["decode"][0]
    for part, widget, name in (
        ("model", "model", "4.5B_distill"),
        ("vae", "vae", "ckpt/vae"),
        ("encoder", "encoder", "ckpt/t5/t5-v1_1-xxl"),
    ):
        graph[part]["inputs"][widget] = name
    graph["vae"]["inputs"]["precision"] = "fp32"  # as the embedded VAE is run
    assert torch.equal(comfy.run(graph)["decode"][0], demo_frames)


def test_files_in_comfyuis_own_folders(comfy, demo):
    models = comfy.base / "models"
    put(demo.transformer / "model.safetensors", models / "diffusion_models/video/magi_distill.safetensors")
    put(demo.vae / "diffusion_pytorch_model.safetensors", models / "vae/magi_vae.safetensors")
    put(demo.vae / "config.json", models / "vae/config.json")
    put(demo.text_encoder, models / "text_encoders/small_t5")
    put(demo.special_tokens, models / "magi1" / TOKENS)
    assert "video/magi_distill.safetensors" in widgets(comfy, MODEL)["model"]["options"]
    assert "magi_vae.safetensors" in widgets(comfy, VAE)["vae"]["options"]
    assert "small_t5/model.safetensors" in widgets(comfy, ENCODER)["encoder"]["options"]
    graph = text_to_video(comfy)
    graph["model"]["inputs"] |= {"model": "video/magi_distill.safetensors", "variant": "distilled"}
    graph["vae"]["inputs"]["vae"] = "magi_vae.safetensors"
    graph["encoder"]["inputs"]["encoder"] = "small_t5/model.safetensors"
    frames = comfy.run(graph)["decode"][0]
    assert frames.shape == (24, 48, 64, 3)


def test_a_text_encoder_without_its_tokenizer_takes_the_official_one(comfy, demo):
    put(demo.text_encoder / "model.safetensors", comfy.base / "models/text_encoders/t5.safetensors")
    official = comfy.base / "models/magi1/ckpt/t5/t5-v1_1-xxl"
    put(demo.text_encoder / "tokenizer_config.json", official / "tokenizer_config.json")
    graph = text_to_video(comfy)
    own = comfy.run(graph)["decode"][0]
    graph["encoder"]["inputs"]["encoder"] = "t5.safetensors"
    assert torch.equal(comfy.run(graph)["decode"][0], own)


def test_shards_in_a_folder_are_one_model(comfy, demo):
    folder = comfy.base / "models/magi1/mine"
    put(demo.transformer / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    put(demo.transformer / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    put(demo.transformer / "model.safetensors", comfy.base / "models/magi1/ckpt/magi/x/model.safetensors")
    put(demo.transformer / "config.json", comfy.base / "models/magi1/config.json")
    offered = widgets(comfy, MODEL)["model"]["options"]
    assert offered.count("mine") == 1
    assert not [name for name in offered if name.startswith(("mine/", "ckpt/")) or name.endswith(".json")]


def test_shards_without_a_folder_of_their_own_are_one_model(comfy, demo):
    tensors = load_file(demo.transformer / "model.safetensors")
    models = comfy.base / "models/diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        part = {name: tensors[name] for name in list(tensors)[i::2]}
        save_file(part, models / f"magi_distill-0000{i + 1}-of-00002.safetensors")
    put(demo.special_tokens, comfy.base / "models/magi1" / TOKENS)
    offered = [name for name in widgets(comfy, MODEL)["model"]["options"] if "magi_distill" in name]
    assert offered == ["magi_distill-00001-of-00002.safetensors"]
    assert problem(comfy, MODEL, model=offered[0], variant="distilled") == ""
    (models / "magi_distill-00002-of-00002.safetensors").unlink()
    assert "magi_distill-00002-of-00002.safetensors" in problem(comfy, MODEL, model=offered[0], variant="distilled")


def test_hidden_files_are_not_offered(comfy, demo):
    for name in ("._model.safetensors", ".cache/huggingface/model.safetensors", "mine/._a-00001-of-00002.safetensors"):
        for folder in ("magi1", "diffusion_models"):
            put(demo.transformer / "model.safetensors", comfy.base / "models" / folder / name)
    released = comfy.base / "models/magi1/ckpt/magi/4.5B_distill/inference_weight.distill"
    put(demo.transformer / "model.safetensors", released / "._model.safetensors")
    offered = widgets(comfy, MODEL)["model"]["options"]
    assert not [name for name in offered if "._" in name or "mine" in name or ".cache" in name]
    assert offered.index("4.5B_distill") > offered.index("-- not installed, to download: --")


def test_a_folder_that_may_not_be_read_breaks_no_menu(comfy, demo, monkeypatch):
    """The loader says so when it runs. As the tests may run as root, the system's refusal is played."""
    released = comfy.base / "models/magi1/ckpt/magi/4.5B_distill"
    put(demo.transformer, released / "inference_weight.distill")
    listed = Path.iterdir

    def refused(folder):
        if folder == released:
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    offered = widgets(comfy, MODEL)["model"]["options"]
    assert offered.index("4.5B_distill") < offered.index("-- not installed, to download: --")
    said = problem(comfy, MODEL, model="4.5B_distill", variant="distilled")
    assert "Permission denied" in said
    assert "4.5B_distill" in said


def test_further_folders_of_extra_model_paths(comfy, demo, tmp_path):
    import folder_paths

    other = tmp_path / "elsewhere"
    put(demo.transformer, other / "ckpt/magi/4.5B_distill/inference_weight.distill")
    put(demo.special_tokens, other / TOKENS)
    folder_paths.add_model_folder_path("magi1", str(other))
    assert problem(comfy, MODEL, model="4.5B_distill") == ""


def test_base_or_distilled_has_to_be_chosen_where_the_file_does_not_tell(comfy, demo):
    put(demo.transformer / "model.safetensors", comfy.base / "models/diffusion_models/some.safetensors")
    put(demo.special_tokens, comfy.base / "models/magi1" / TOKENS)
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["model"] = "some.safetensors"
    with pytest.raises((InvalidGraph, NodeError), match="variant") as caught:
        comfy.run(graph)
    assert "base" in str(caught.value)
    assert "distill" in str(caught.value)


def test_a_variant_that_the_file_contradicts(comfy):
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["variant"] = "base"
    with pytest.raises((InvalidGraph, NodeError), match="distilled weights"):
        comfy.run(graph)


FOLDER_OF = {MODEL: "diffusion_models", VAE: "vae", ENCODER: "text_encoders"}
WIDGET_OF = {MODEL: "model", VAE: "vae", ENCODER: "encoder"}


@pytest.mark.parametrize("class_type", FOLDER_OF)
@pytest.mark.parametrize("content", ["something else", "cut short", "empty", "no safetensors"])
def test_wrong_and_damaged_files(comfy, demo, class_type, content):
    parts = {
        MODEL: demo.transformer / "model.safetensors",
        VAE: demo.vae / "diffusion_pytorch_model.safetensors",
        ENCODER: demo.text_encoder / "model.safetensors",
    }
    file = comfy.base / "models" / FOLDER_OF[class_type] / "mine.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    if content == "something else":
        save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}, file)
    elif content == "cut short":
        file.write_bytes(parts[class_type].read_bytes()[:-1000])
    else:
        file.write_bytes(b"" if content == "empty" else b"<html>404 not found</html>" * 9)
    put(demo.special_tokens, comfy.base / "models/magi1" / TOKENS)
    said = problem(comfy, class_type, **{WIDGET_OF[class_type]: "mine.safetensors"})
    assert "mine.safetensors" in said
    assert "Traceback" not in said


def rewritten(file: Path, change) -> None:
    """Changes a file's header, given as a dict."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def first(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


HOSTILE = {
    "metadata": lambda h: h.update({"__metadata__": {"variant": True, "model": 3, "distill": {"a": [1]}}}),
    "infinite offset": lambda h: first(h).update(data_offsets=[0, float("inf")]),
    "negative shape": lambda h: first(h).update(shape=[-1, -1]),
    "huge shape": lambda h: first(h).update(shape=[10**30, 10**30]),
    "text for a shape": lambda h: first(h).update(shape="12"),
    "type without digits": lambda h: first(h).update(dtype="FLOAT"),
    "layer": lambda h: h.update({"videodit_blocks.layers.99999999999.x": EMPTY, "decoder.blocks.99999999.x": EMPTY}),
    "name": lambda h: h.update({"\x1b[2J" + "x" * 100_000: EMPTY}),
}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize("class_type", FOLDER_OF)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_header_that_may_say_anything(comfy, demo, class_type, kind):
    """It is read or refused, in a message that fits on a page; nothing hangs, and nothing else is raised."""
    parts = {
        MODEL: demo.transformer / "model.safetensors",
        VAE: demo.vae / "diffusion_pytorch_model.safetensors",
        ENCODER: demo.text_encoder / "model.safetensors",
    }
    file = put(parts[class_type], comfy.base / "models" / FOLDER_OF[class_type] / "mine.safetensors")
    put(demo.text_encoder / "tokenizer_config.json", file.with_name("tokenizer_config.json"))
    put(demo.special_tokens, comfy.base / "models/magi1" / TOKENS)
    rewritten(file, HOSTILE[kind])
    variant = {"variant": "distilled"} if class_type == MODEL else {}
    said = problem(comfy, class_type, **{WIDGET_OF[class_type]: "mine.safetensors"}, **variant)
    assert "a bug" not in said
    assert (said == "") == (kind == "metadata")
    assert said.isprintable()
    assert len(said) < 1500


@pytest.mark.parametrize("class_type", FOLDER_OF)
def test_a_name_longer_than_any_file_has(comfy, class_type):
    said = problem(comfy, class_type, **{WIDGET_OF[class_type]: "x" * 5000 + ".safetensors"})
    assert said
    assert "a bug" not in said


@pytest.mark.parametrize(
    ("class_type", "part", "said"),
    [
        (MODEL, "vae/diffusion_pytorch_model", "is a MAGI-1 VAE, not a MAGI-1 transformer"),
        (VAE, "transformer/model", "not a MAGI-1 VAE"),
        (ENCODER, "transformer/model", "not a T5 encoder"),
    ],
)
def test_one_part_in_the_place_of_another(comfy, demo, class_type, part, said):
    source = demo.transformer.parent / f"{part}.safetensors"
    put(source, comfy.base / "models" / FOLDER_OF[class_type] / "other.safetensors")
    found = problem(comfy, class_type, **{WIDGET_OF[class_type]: "other.safetensors"})
    assert "other.safetensors" in found
    assert said in found


@pytest.mark.parametrize("class_type", FOLDER_OF)
def test_a_file_that_is_gone(comfy, class_type):
    for folder in ("magi1", *FOLDER_OF.values()):
        (comfy.base / "models" / folder).mkdir()
    for name in ("gone.safetensors", r"sub\gone.safetensors"):
        said = problem(comfy, class_type, **{WIDGET_OF[class_type]: name})
        assert f"There is no {name.replace(chr(92), '/')!r}" in said
        assert str(comfy.base) in said, "the folder it belongs in"


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.safetensors",
        r"..\..\secret.safetensors",
        "a/../../../secret.safetensors",
        "/etc/secret.safetensors",
        r"\Users\x\secret.safetensors",
        r"\\host\share\secret.safetensors",
        "//host/share/secret.safetensors",
        r"\\?\C:\secret.safetensors",
        r"\\.\pipe\secret",
        "C:/secret.safetensors",
        "D:secret.safetensors",
        "d:..\\secret.safetensors",
        "a\0b.safetensors",
        "x" * 5000,
    ],
    ids=lambda name: repr(name[:30]),
)
@pytest.mark.parametrize("class_type", FOLDER_OF)
def test_names_of_other_peoples_workflows(comfy, class_type, name, monkeypatch):
    """Nothing is asked of the system about such a name, which Windows would ask the machine in it for."""
    looked_at = []
    for owner, function in ((os, "stat"), (os, "scandir"), (os, "listdir"), (io, "open")):
        known = getattr(owner, function)

        def recorded(path=".", *args, known=known, **options):
            looked_at.append(str(path))
            return known(path, *args, **options)

        monkeypatch.setattr(owner, function, recorded)
    cls, widget = comfy.nodes[class_type], WIDGET_OF[class_type]
    cls.fingerprint_inputs(**{widget: name})
    said = problem(comfy, class_type, **{widget: name})
    monkeypatch.undo()
    assert "is no file in ComfyUI's folders for models" in said
    assert len(said) < 600
    assert not [path for path in looked_at if "secret" in path or "xxxxx" in path or "\0" in path]


def test_a_replaced_file_is_another_model(comfy, demo):
    models = comfy.base / "models"
    file = put(demo.transformer / "model.safetensors", models / "diffusion_models/magi_distill.safetensors")
    put(demo.special_tokens, models / "magi1" / TOKENS)
    graph = text_to_video(comfy)
    graph["model"]["inputs"] |= {"model": file.name, "variant": "distilled"}
    comfy.run(graph)
    comfy.run(graph)
    assert comfy.executed == []
    os.utime(file, ns=(1, 1))
    comfy.run(graph)
    assert "model" in comfy.executed


@pytest.mark.parametrize(("class_type", "widget"), WIDGET_OF.items())
def test_what_tells_that_files_have_changed_names_no_folder(comfy, class_type, widget):
    """ComfyUI writes it into the metadata of what it saves."""
    told = [comfy.nodes[class_type].fingerprint_inputs(**{widget: name}) for name in ("auto", "embedded photo model")]
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in told)
    assert told[0] != told[1]


def test_the_embedded_model_makes_itself(comfy):
    """A first run, with nothing in any folder."""
    shutil.rmtree(comfy.base / "user" / "magi1")
    graph = text_to_video(comfy)
    assert comfy.errors(graph) == {}
    assert len(comfy.run(graph)["decode"][0]) == 24


def test_loading_the_pack_brings_in_nothing_heavy(tmp_path):
    """Nobody's ComfyUI starts slower for it: these packages take seconds, and wait until a node needs them."""
    code = """
        import asyncio, folder_paths, importlib.util, pathlib, sys
        folder_paths.use_base(pathlib.Path(sys.argv[2]))
        file = sys.argv[1] + "/__init__.py"
        spec = importlib.util.spec_from_file_location("custom_pack", file, submodule_search_locations=[sys.argv[1]])
        pack = sys.modules["custom_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        for node in asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list()):
            node.GET_SCHEMA()
        print(*{name.split(".")[0] for name in sys.modules})
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), ROOT, tmp_path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(STAND_IN)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    heavy = {"transformers", "sentencepiece", "huggingface_hub", "requests", "bs4", "ftfy", "torchvision", "triton"}
    assert heavy & set(found.stdout.split()) == set()


def test_the_demo_keeps_its_own_special_tokens_beside_those_of_the_released_models(comfy):
    folder = comfy.base / "models" / "magi1"
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"caption_token": 1, "logo_token": 1, "other_tokens": 100}
    np.savez(folder / TOKENS, **{name: np.zeros((n, 4096), np.float16) for name, n in rows.items()})
    made = comfy.run(filled(comfy, {"model": node(MODEL)}))
    assert made["model"][0].special_tokens.width == 64
