"""The example workflows as files: what the front end would show as missing, red or wrong is found here, without a browser."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from magi.model_files.download import HUB, REPOSITORY, SPECIAL_TOKENS_URL
from magi.remote.address import DEFAULT as SERVICE
from magi.remote.answers import TASKS_PAGE
from magi.remote.key import PAGE as KEY_PAGE
from magi.remote.request import MODEL
from tests.support.magi_graphs import WIDGETS as WIDGET_TYPES
from tests.support.magi_graphs import widgets
from tests.support.paths import API_WORKFLOWS as API
from tests.support.paths import ROOT
from tools.train_embedded.captions import vocabulary, words

TREE = f"{HUB}/{REPOSITORY}/tree/main"

UI = ROOT / "workflows"
FIRST = "magi1_first_run"
NAMES = {FIRST, *(f"magi1_{name}" for name in ("text_to_video", "image_to_video", "continue_video"))}
REMOTE = "magi1_remote"
CLIP = "magi1_native_clip"
BASE, LARGER = "magi1_base_guidance", "magi1_upscale"
NAMES |= {"magi1_low_memory_24B", CLIP, REMOTE, BASE, LARGER}
MODELS = {
    "magi1_low_memory_24B": "24B_distill_quant",
    BASE: "4.5B_base",
}  # what a note has one download; of the others 4.5B_distill
T5XXL = "https://huggingface.co/comfyanonymous/flux_text_encoders"
LARGER_NODES = {"UpscaleModelLoader", "ImageUpscaleWithModel", "FrameInterpolationModelLoader", "FrameInterpolate"}
OFF = {2, 4}  # a node's mode: muted, bypassed
SILENT = {"MarkdownNote"}  # lives in the front end only
TITLE = 30  # a node's bar, above its position
# Native nodes: inputs, outputs and how many widget values they have. LoadImage and LoadVideo also have an upload button.
NATIVE = {
    "LoadImage": ({}, ["IMAGE", "MASK"], 2),
    "LoadVideo": ({}, ["VIDEO"], 2),
    "SaveVideo": ({"video": "VIDEO"}, [], 3),
    "CLIPLoader": ({}, ["CLIP"], 3),
    "PrimitiveStringMultiline": ({}, ["STRING"], 1),
    "PreviewAny": ({"source": "*"}, [], 0),
    "CreateVideo": ({"images": "IMAGE", "audio": "AUDIO"}, ["VIDEO"], 1),
    "UpscaleModelLoader": ({}, ["UPSCALE_MODEL"], 1),
    "ImageUpscaleWithModel": ({"upscale_model": "UPSCALE_MODEL", "image": "IMAGE"}, ["IMAGE"], 0),
    "FrameInterpolationModelLoader": ({}, ["INTERP_MODEL"], 1),
    "FrameInterpolate": ({"interp_model": "INTERP_MODEL", "images": "IMAGE"}, ["IMAGE"], 1),
    "MarkdownNote": ({}, [], 1),
}

every_workflow = pytest.mark.parametrize("name", sorted(NAMES))


def load(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def note(workflow: dict) -> str:
    (found,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    return found["widgets_values"][0]


def of_type(workflow: dict, kind: str) -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] == kind]


def sockets(comfy, kind: str) -> tuple[dict[str, str], list[str]]:
    """({input: type} without widgets, types of the outputs)"""
    if kind in NATIVE:
        return NATIVE[kind][:2]
    info = comfy.info(kind)
    inputs = info["input"]["required"] | info["input"].get("optional", {})
    return {id: given[0] for id, given in inputs.items() if given[0] not in WIDGET_TYPES}, list(info["output"])


def values(comfy, node: dict) -> dict:
    """{widget: value} of one of our nodes, as the front end reads them: by position."""
    names = []
    for id, options in widgets(comfy, node["type"]).items():
        names += [id, "control_after_generate"] if options.get("control_after_generate") else [id]
    return dict(zip(names, node["widgets_values"], strict=True))


def is_ours(node: dict) -> bool:
    return node["type"].startswith("Magi1")


def test_the_workflows_that_the_documentation_names():
    assert {file.stem for file in UI.glob("*.json")} == NAMES == {file.stem for file in API.glob("*.json")}


@every_workflow
def test_it_has_the_form_that_every_front_end_reads(name):
    workflow = load(UI, name)
    assert workflow["version"] == 0.4
    ids = [node["id"] for node in workflow["nodes"]]
    assert len(set(ids)) == len(ids)
    assert max(ids) <= workflow["last_node_id"]
    assert max(link[0] for link in workflow["links"]) <= workflow["last_link_id"]
    assert workflow["id"] not in {load(UI, other)["id"] for other in NAMES - {name}}
    assert not workflow.get("definitions"), "front ends from before subgraphs show them as missing nodes"


@every_workflow
def test_nodes_are_those_that_exist(comfy, name):
    for node in load(UI, name)["nodes"]:
        assert node["type"] in comfy.nodes or node["type"] in NATIVE
        assert node["mode"] == 0 or node["type"] in ("LoadVideo", *LARGER_NODES)
        inputs, outputs = sockets(comfy, node["type"])
        assert {i["name"]: i["type"] for i in node["inputs"] if "widget" not in i} == inputs
        assert [o["type"] for o in node["outputs"]] == outputs
        if is_ours(node):
            assert node["properties"]["cnr_id"] == "magi1-local", "by which the Manager finds the pack"
            assert [i["widget"]["name"] for i in node["inputs"] if "widget" in i] == list(widgets(comfy, node["type"]))


@every_workflow
def test_links_are_the_same_at_both_ends(name):
    workflow = load(UI, name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for id, origin, slot, target, at, kind in workflow["links"]:
        made, taken = nodes[origin]["outputs"][slot], nodes[target]["inputs"][at]
        assert id in made["links"]
        assert taken["link"] == id
        assert made["type"] == kind
        assert kind in taken["type"].split(",") or taken["type"] == "*"
    ids = sorted(link[0] for link in workflow["links"])
    assert len(set(ids)) == len(ids)
    assert sorted(i["link"] for n in nodes.values() for i in n["inputs"] if i["link"] is not None) == ids
    assert sorted(id for n in nodes.values() for o in n["outputs"] for id in o["links"] or []) == ids
    routed = {id for point in workflow["extra"].get("reroutes", []) for id in point["linkIds"]}
    assert {extension["id"] for extension in workflow["extra"].get("linkExtensions", [])} == routed <= set(ids)


@every_workflow
def test_values_are_in_their_places_and_allowed(comfy, name):
    for node in load(UI, name)["nodes"]:
        if not is_ours(node):
            assert len(node["widgets_values"]) == NATIVE[node["type"]][2]
            continue
        options = widgets(comfy, node["type"])
        for id, value in values(comfy, node).items():
            if id == "control_after_generate":
                assert value in ("fixed", "randomize")
            elif "options" in options[id]:
                assert value in options[id]["options"], f"{id} is shown in red"
            elif isinstance(options[id]["default"], str | bool):
                assert type(value) is type(options[id]["default"]), id
            else:
                assert options[id]["min"] <= value <= options[id]["max"], id


@every_workflow
def test_the_copy_for_the_server_says_the_same(comfy, name):
    workflow, graph = load(UI, name), load(API, name)
    active = {n["id"]: n for n in workflow["nodes"] if n["mode"] not in OFF and n["type"] not in SILENT}
    assert {id: part["class_type"] for id, part in graph.items()} == {str(id): n["type"] for id, n in active.items()}
    nodes = {n["id"]: n for n in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}

    def source(link: int) -> list:
        """Where a link really comes from: a bypassed node hands on its input of the same type."""
        _, id, slot, *_, kind = links[link]
        if nodes[id]["mode"] in OFF:
            return source(next(i["link"] for i in nodes[id]["inputs"] if i["type"] == kind))
        return [str(id), slot]

    for id, node in active.items():
        given = dict(graph[str(id)]["inputs"])
        linked = {i["name"]: source(i["link"]) for i in node["inputs"] if i["link"] is not None}
        assert {key: given.pop(key) for key in linked} == linked
        if is_ours(node):
            typed = {key: value for key, value in values(comfy, node).items() if key not in linked}
            typed.pop("control_after_generate", None)
            assert given == typed
        else:
            assert list(given.values()) == node["widgets_values"][: len(given)]


@every_workflow
def test_it_can_be_read(name):
    """Nothing lies on anything else, every node is in one of the groups, and a window shows all of it legibly."""
    workflow = load(UI, name)
    boxes = {
        n["id"]: (n["pos"][0], n["pos"][1] - TITLE, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1])
        for n in workflow["nodes"]
    }
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in workflow["groups"])]
    for node in workflow["nodes"]:
        box = boxes[node["id"]]
        others = [other for id, other in boxes.items() if id != node["id"]]
        assert not [other for other in others if overlap(box, other)], node["type"]
        around = [group for group in groups if overlap(box, group)]
        assert len(around) == (0 if node["type"] == "MarkdownNote" else 1), node["type"]
        assert all(g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3] for g in around), node[
            "type"
        ]
    assert not [(a, b) for a in groups for b in groups if a is not b and overlap(a, b)]
    every = [*boxes.values(), *groups]
    width, height = (max(box[i + 2] for box in every) - min(box[i] for box in every) for i in (0, 1))
    # Front ends fit it into three quarters of the window, here of 1600x1000 and 1920x970, and draw no text below 57 %.
    assert min(0.75 * 1600 / width, 0.73 * 970 / height) >= 0.57, (width, height)
    if name not in ("magi1_continue_video", LARGER, REMOTE):
        assert width <= 1500
        assert height <= 1200


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@every_workflow
def test_it_has_a_picture_for_the_list_of_templates(name):
    with Image.open(UI / f"{name}.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (480, 320))
    assert (UI / f"{name}.jpg").stat().st_size < 100_000


@every_workflow
def test_the_note_links_to_all_that_has_to_be_fetched(comfy, name):
    menus = comfy.module("nodes.comfyui.menus")
    workflow = load(UI, name)
    links = set(re.findall(r"\]\((.*?)\)", note(workflow)))
    wanted = set()
    for loader in workflow["nodes"]:
        wanted |= {model["url"] for model in loader["properties"].get("models", [])}
    if name != FIRST:
        wanted |= {f"{TREE}/ckpt/magi/{MODELS.get(name, '4.5B_distill')}", SPECIAL_TOKENS_URL, f"{TREE}/{menus.VAE}"}
        wanted |= {f"{TREE}/{menus.TEXT_ENCODER}"} if of_type(workflow, "Magi1TextEncoderLoader") else set()
    if of_type(workflow, "Magi1Remote"):
        wanted |= {KEY_PAGE, TASKS_PAGE, f"https://wavespeed.ai/docs/docs-api/{MODEL}"}
    assert wanted <= links
    assert all(link in wanted or link.startswith(f"{T5XXL}/") for link in links), "nothing that is not used"


@pytest.mark.parametrize("name", sorted(NAMES - {CLIP, BASE}))
def test_it_takes_what_is_installed_and_needs_no_file(comfy, name):
    workflow = load(UI, name)
    loaders = [node for node in workflow["nodes"] if is_ours(node) and node["type"].endswith("Loader")]
    assert [node["widgets_values"][0] for node in loaders] == ["auto"] * 3
    active = {node["type"] for node in workflow["nodes"] if node["mode"] not in OFF}
    assert not active & {"LoadImage", "LoadVideo", "CLIPLoader", *LARGER_NODES}


def test_a_native_text_encoder_goes_with_a_released_model(comfy):
    """Which auto would not take where none is installed; so the message of the missing file says how to get it."""
    menus, workflow = comfy.module("nodes.comfyui.menus"), load(UI, CLIP)
    (model,), (vae,) = of_type(workflow, "Magi1ModelLoader"), of_type(workflow, "Magi1VAELoader")
    assert values(comfy, model)["model"] in menus.RELEASED
    assert values(comfy, vae)["vae"] == menus.VAE


def test_the_base_model_is_chosen_and_guided(comfy):
    workflow = load(UI, BASE)
    (model,), (sampler,) = of_type(workflow, "Magi1ModelLoader"), of_type(workflow, "Magi1Sampler")
    assert values(comfy, model)["model"] == "4.5B_base"
    assert values(comfy, sampler)["guidance"] == 7.5
    assert values(comfy, sampler)["previous_guidance"] == 1.5


@pytest.mark.parametrize(
    "name", [FIRST, LARGER, *(f"magi1_{n}" for n in ("text_to_video", "image_to_video", "continue_video"))]
)
def test_the_embedded_model_understands_every_word(comfy, name):
    for node in of_type(load(UI, name), "Magi1TextEncode"):
        for prompt in values(comfy, node)["prompt"].splitlines():
            assert set(words(prompt)) <= set(vocabulary()), prompt


def test_the_first_run_changes_the_motion_on_its_way(comfy):
    workflow = load(UI, FIRST)
    (text,), (sampler,) = of_type(workflow, "Magi1TextEncode"), of_type(workflow, "Magi1Sampler")
    lines = values(comfy, text)["prompt"].splitlines()
    assert values(comfy, text)["schedule"] == "one line a second"
    assert len(lines) == values(comfy, sampler)["seconds"] == 4
    assert lines[0] == lines[1] != lines[2] == lines[3]


def test_the_native_text_encoder_is_offered_for_download():
    (loader,) = of_type(load(UI, CLIP), "CLIPLoader")
    file, kind = loader["widgets_values"][:2]
    assert kind in ("mochi", "ltxv"), "the kinds whose T5 is the one that MAGI-1 takes"
    url = f"{T5XXL}/resolve/main/{file}"
    assert loader["properties"]["models"] == [{"name": file, "url": url, "directory": "text_encoders"}]


def test_a_clip_of_ones_own_is_off_until_it_is_chosen():
    workflow = load(UI, "magi1_continue_video")
    (loader,) = of_type(workflow, "LoadVideo")
    assert loader["mode"] in OFF
    assert loader["id"] not in {link[1] for link in workflow["links"]}
    assert "Load Video" in note(workflow)


def test_the_remote_and_the_local_half_share_the_prompt_and_the_picture(comfy):
    """One link decides who makes the video: nothing else has to be changed."""
    workflow = load(UI, REMOTE)
    (remote,), (text,) = of_type(workflow, "Magi1Remote"), of_type(workflow, "Magi1TextEncode")
    (start,), (save,) = of_type(workflow, "Magi1ImageToVideo"), of_type(workflow, "SaveVideo")
    assert origin(workflow, remote, "prompt") == origin(workflow, text, "prompt")
    assert origin(workflow, remote, "image") == origin(workflow, start, "image")
    assert origin(workflow, save, "video") == (remote["id"], "video")
    (decode,) = of_type(workflow, "Magi1VAEDecode")
    assert not [output["links"] for output in decode["outputs"] if output["links"]]


def origin(workflow: dict, node: dict, name: str) -> tuple[int, str]:
    """Where an input comes from: the node's id and its output."""
    (given,) = (i["link"] for i in node["inputs"] if i["name"] == name)
    _, id, slot, *_ = next(link for link in workflow["links"] if link[0] == given)
    (source,) = (n for n in workflow["nodes"] if n["id"] == id)
    return id, source["outputs"][slot]["name"]


def test_a_remote_run_is_the_cheap_one_and_is_billed_once(comfy):
    """480p, the fewest frames, a seed that stays, at the service itself; and it goes on with no one's task."""
    (node,) = of_type(load(UI, REMOTE), "Magi1Remote")
    set_to = values(comfy, node)
    assert (set_to["resolution"], set_to["frames"], set_to["seed"]) == ("480p", 96, 0)
    assert (set_to["base_url"], set_to["resume_id"]) == (SERVICE, "")


@every_workflow
def test_nothing_private_is_in_it(name):
    text = (UI / f"{name}.json").read_text(encoding="utf-8") + (API / f"{name}.json").read_text(encoding="utf-8")
    text = re.sub(r"\bWAVESPEED_API_KEY\b(?!=)|\bwavespeed_api_key\.txt\b", "", text)  # where a key goes, not a key
    assert not re.search(r"(?<![\w:/.-])(/\w|~/|[A-Za-z]:\\)", text), "absolute paths"
    assert not re.search(
        r"(?i)api[_-]?key|token[\"=:]|secret|\bhf_\w{8}|\bsk-\w{8}|file://|localhost|127\.0\.0\.1", text
    )
