"""What only a real ComfyUI can tell: set COMFYUI_PATH to a checkout whose requirements are installed beside the project's.

With it the tests of the nodes (test_nodes_*.py) run in that ComfyUI too, instead of in its stand-in.
"""

import ast
import importlib.util
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.support.comfy_host import COMFYUI, FOLDERS, ROOT, STAND_IN
from tests.support.magi_graphs import filled, node

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(not COMFYUI, reason="needs a real ComfyUI: set COMFYUI_PATH"),
]


def test_comfyui_starts_with_the_pack_and_keeps_its_own_modules(tmp_path):
    """As a user starts it; it ends by itself once all nodes are loaded."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    pack = tmp_path / "custom_nodes" / "magi1-local"
    pack.symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, "main.py", "--cpu", "--quick-test-for-ci", "--disable-api-nodes"]
    command += ["--base-directory", str(tmp_path), "--database-url", f"sqlite:///{tmp_path / 'comfyui.db'}"]
    run = subprocess.run(command, cwd=COMFYUI, capture_output=True, text=True, timeout=300)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-3000:]
    (line,) = [line for line in log.splitlines() if line.rstrip().endswith(str(pack))]
    assert "IMPORT FAILED" not in line
    assert float(line.split("seconds")[0].split()[-1]) < 1.5
    assert "magi1" not in "".join(line for line in log.splitlines() if "rror" in line)


def test_the_module_called_nodes_stays_comfyuis(comfy):
    assert Path(sys.modules["nodes"].__file__ or "").parent == Path(COMFYUI or "").resolve()


def test_help_pages_are_served(comfy):
    import nodes

    folders = [Path(folder) for folder in nodes.EXTENSION_WEB_DIRS.values()]
    assert any((folder / "docs" / "Magi1Sampler.md").is_file() for folder in folders)


def stand_in(name: str) -> ModuleType:
    """A file of the stand-in, beside the real module of the same name."""
    spec = importlib.util.spec_from_file_location(f"stand_in_{name}", STAND_IN / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)


# What the stand-in has of dynamic VRAM and the account of page-locked memory; older ComfyUIs are not asked for it.
NEWER = {"ensure_pin_budget", "ensure_pin_registerable", "pin_memory", "unpin_memory", "for_dynamic", "pins_required"}
NEWER |= {"is_dynamic", "loaded_ram_size", "pinned_memory_size", "partially_unload_ram"}


@pytest.mark.parametrize("name", ["comfy/model_management", "comfy/utils", "folder_paths"])
def test_the_stand_in_has_no_function_that_comfyui_lacks(comfy, name):
    real, own = importlib.import_module(name.replace("/", ".")), stand_in(name)
    functions = inspect.getmembers(own, inspect.isfunction)
    for function, body in functions:
        if (
            not function.startswith("_")
            and function != "use_base"
            and (hasattr(real, function) or function not in NEWER)
        ):
            newer = NEWER - parameters(real.free_memory) if name == "comfy/model_management" else set()
            assert parameters(body) - newer <= parameters(getattr(real, function)), function
    assert len(functions) > 1 or name == "comfy/utils"


def test_the_stand_in_has_no_option_of_a_schema_that_comfyui_lacks(comfy):
    from comfy_api.latest import io

    own = stand_in("comfy_api/latest/_io")
    assert {f.name for f in fields(own.Schema)} <= {f.name for f in fields(io.Schema)}
    for kind in ("Boolean", "Int", "Float", "String", "Combo"):
        real = parameters(getattr(io, kind).Input)
        assert set(getattr(own, kind).Input.keywords.split()) <= real, kind
    assert set(own.Input.keywords.split()) <= parameters(io.Input)


def test_the_stand_ins_patcher_has_no_method_that_comfyuis_lacks(comfy):
    from comfy.model_patcher import ModelPatcher

    tree = ast.parse((STAND_IN / "comfy" / "model_patcher.py").read_text(encoding="utf-8"))
    (own,) = [part for part in tree.body if isinstance(part, ast.ClassDef)]
    for method in own.body:
        known = hasattr(ModelPatcher, getattr(method, "name", "")) or getattr(method, "name", "") not in NEWER
        if isinstance(method, ast.FunctionDef) and method.name != "_move" and known:
            names = {argument.arg for argument in method.args.args}
            assert names <= parameters(getattr(ModelPatcher, method.name)), method.name


SMALL = {"d_ff": 128, "d_kv": 16, "d_model": 64, "num_heads": 4, "num_layers": 2, "vocab_size": 32128}


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """A small T5 v1.1 encoder of random numbers, by the names that all its files use."""
    generator = torch.Generator().manual_seed(4)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    found = {
        "shared.weight": matrix(32128, 64) * 8,
        "encoder.final_layer_norm.weight": torch.rand(64, generator=generator),
    }
    for i in range(2):
        attention, mlp = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        found |= {f"{attention}SelfAttention.{part}.weight": matrix(64, 64) for part in "qkvo"}
        found |= {f"{mlp}DenseReluDense.{part}.weight": matrix(128, 64) for part in ("wi_0", "wi_1")}
        found[f"{mlp}DenseReluDense.wo.weight"] = matrix(64, 128)
        found |= {f"{layer}layer_norm.weight": torch.rand(64, generator=generator) for layer in (attention, mlp)}
    found["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = matrix(32, 4)
    return found


@pytest.mark.parametrize(
    "prompt",
    [
        "A cat looks around, then at the camera",
        "weights mean nothing here: (a cat:1.5), [a dog], {one|two}, embedding:nothing",
        "Ein Mädchen läuft über die Brücke — 女の子が橋を渡る 🎬",
        "a very long prompt. " * 300,
    ],
    ids=["plain", "syntax", "languages", "long"],
)
def test_comfyuis_t5_and_ours_agree(comfy, weights, tmp_path, monkeypatch, prompt):
    """The same weights through Load CLIP's classes and through our loader: prompts mean the same to the model."""
    from comfy.sd import CLIP
    from comfy.text_encoders import genmo as mochi

    target = SimpleNamespace(params={}, clip=mochi.mochi_te(dtype_t5=torch.float32), tokenizer=mochi.MochiT5Tokenizer)
    clip = CLIP(target, model_options={"t5xxl_model_config": SMALL, "dtype": torch.float32})
    clip.load_sd(dict(weights))
    monkeypatch.setattr(comfy.module("nodes.comfyui.clip"), "_WIDTH", 64)
    (comfy.base / "models" / "text_encoders").mkdir(parents=True)
    save_file(weights, comfy.base / "models" / "text_encoders" / "t5xxl.safetensors")
    text = {"prompt": prompt, "clean_prompt": False}
    graph = {
        "clip": node(comfy.constant("CLIP", clip)),
        "ours": node("Magi1TextEncoderLoader", encoder="t5xxl.safetensors"),
        "by clip": node("Magi1TextEncode", encoder=["clip", 0], **text),
        "by ours": node("Magi1TextEncode", encoder=["ours", 0], **text),
    }
    made = comfy.run(filled(comfy, graph))
    native, own = (made[name][0][0][0] for name in ("by clip", "by ours"))
    assert native.shape == own.shape
    assert (native - own).abs().max() < 1e-4
