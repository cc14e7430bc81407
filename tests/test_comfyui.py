"""The pack in a real ComfyUI: set COMFYUI_PATH to a checkout whose requirements are installed beside the project's."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = os.environ.get("COMFYUI_PATH")

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(not COMFYUI, reason="needs a real ComfyUI: set COMFYUI_PATH"),
]

# What ComfyUI's own loader does with a custom node folder, and what its executor does with a node.
LOAD = """
    import asyncio, importlib.util, json, sys, time
    sys.argv = ["main.py", "--cpu", "--base-directory", BASE]
    sys.path.insert(0, COMFYUI)
    import comfy.options
    comfy.options.enable_args_parsing()
    import nodes as comfy_nodes, torch
    before = time.perf_counter()
    spec = importlib.util.spec_from_file_location("custom_nodes_magi", ROOT + "/__init__.py", submodule_search_locations=[ROOT])
    pack = sys.modules["custom_nodes_magi"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    classes = {c.GET_SCHEMA().node_id: c for c in asyncio.run(extension.get_node_list())}
    seconds = time.perf_counter() - before
"""


def in_comfyui(tmp_path: Path, code: str) -> dict:
    head = f"COMFYUI, ROOT, BASE = {COMFYUI!r}, {str(ROOT)!r}, {str(tmp_path)!r}\n"
    script = head + textwrap.dedent(LOAD) + textwrap.dedent(code)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_the_pack_loads_without_taking_comfyuis_modules(tmp_path):
    found = in_comfyui(
        tmp_path,
        """
        print(json.dumps({
            "ids": list(classes), "seconds": seconds, "nodes": sys.modules["nodes"].__file__,
            "heavy": [m for m in sys.modules if m.startswith("custom_nodes_magi.magi")],
        }))
        """,
    )
    assert found["ids"] == ["Magi1Generate"]
    assert Path(found["nodes"]).parent == Path(COMFYUI)
    assert found["heavy"] == [], "nothing of the pipeline is imported before a node runs"


def test_picture_in_video_out(tmp_path):
    found = in_comfyui(
        tmp_path,
        """
        node = classes["Magi1Generate"].PREPARE_CLASS_CLONE(None)
        picture = torch.linspace(0, 1, 64)[None, None, :, None].expand(1, 48, 64, 3).contiguous()
        with torch.inference_mode():
            out = node.execute(model="embedded demo model", prompt="a ramp", seconds=1.0, seed=3, width=64, height=48,
                               steps=0, image=picture)
        frames, video = out.result
        print(json.dumps({
            "shape": list(frames.shape), "range": [frames.min().item(), frames.max().item()],
            "error": (frames - picture).abs().mean().item(), "fps": float(video.get_components().frame_rate),
        }))
        """,
    )
    assert found["shape"] == [24, 48, 64, 3]
    assert found["range"][0] >= 0
    assert found["range"][1] <= 1
    assert found["error"] < 0.1, "the embedded model holds the picture still"
    assert found["fps"] == 24
