"""Prompts through the nodes: what they change, schedules, the cache on disk, and ComfyUI's own CLIP."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from magi.model_files.locate import ModelFiles
from magi.model_files.repeating import repeating_files
from tests.support.graph import NodeError
from tests.support.magi_graphs import filled, node, random_model, text_to_video

LINES = "one line a second"


def frames_for(comfy, seconds: float = 1.0, **text) -> torch.Tensor:
    graph = text_to_video(comfy, seconds=seconds)
    graph["text"]["inputs"] |= text
    return comfy.run(graph)["decode"][0]


def conditioning(comfy, **text) -> list:
    graph = filled(comfy, {name: text_to_video(comfy)[name] for name in ("encoder", "text")})
    graph["text"]["inputs"] |= text
    return comfy.run(graph)["text"][0]


def test_a_conditioning_as_other_nodes_know_it(comfy):
    ((embeds, options),) = conditioning(comfy, prompt="A cat.")
    assert embeds.shape[0] == 1
    assert embeds.shape[2] == 64
    assert embeds.dtype == torch.float32
    assert isinstance(options, dict)


def test_the_prompt_shows(comfy):
    assert not torch.equal(frames_for(comfy, prompt="a cat"), frames_for(comfy, prompt="a dog"))


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"high_quality": False},
            {"motion": "static"},
            {"motion": "dynamic"},
            {"look": "3D model"},
            {"look": "2D anime"},
        ),
        *({"borders": True}, {"duration_tokens": False}),
    ],
    ids=lambda change: str(*change.items()),
)
def test_every_wish_counts(comfy, change):
    assert not torch.equal(frames_for(comfy, **change), frames_for(comfy))


def test_cleaning(comfy):
    messy = "  a&nbsp;cat  "
    assert torch.equal(frames_for(comfy, prompt=messy), frames_for(comfy, prompt="a cat"))
    assert not torch.equal(frames_for(comfy, prompt=messy, clean_prompt=False), frames_for(comfy, prompt="a cat"))


def test_an_empty_prompt_is_no_wish(comfy):
    empty, blank = (frames_for(comfy, prompt=prompt) for prompt in ("", " \n"))
    shown = [text for name, text in comfy.events.texts if name == "text"]
    assert shown[-1] == "1 prompt encoded\nNothing of the prompt ' \\n' is left to encode: it runs as unconditional."
    assert torch.equal(empty, blank)
    assert not torch.equal(empty, frames_for(comfy, prompt="a cat"))


def test_a_prompt_that_is_too_long_is_told(comfy):
    conditioning(comfy, prompt="A cat. " * 200)
    (shown,) = (text for name, text in comfy.events.texts if name == "text" and "encoded" in text)
    assert re.search(r"^The prompt has \d{4} tokens; only the first 800 are used\.$", shown, re.MULTILINE)


def test_a_prompt_for_every_second(comfy):
    both = frames_for(comfy, 2.0, prompt="a cat\n\na dog\n", schedule=LINES)
    cat, dog = (frames_for(comfy, 2.0, prompt=prompt) for prompt in ("a cat", "a dog"))
    assert torch.allclose(both[:20], cat[:20], atol=1e-3)
    assert not torch.allclose(both[24:], cat[24:], atol=1e-3)
    assert torch.equal(frames_for(comfy, 2.0, prompt="a cat", schedule=LINES), cat), "the last holds to the end"
    assert not torch.equal(frames_for(comfy, 2.0, prompt="a cat\na dog"), both), "one prompt of two lines"
    assert not torch.allclose(both[24:], dog[24:], atol=1e-3), "it goes on from the cat"


def test_more_prompts_than_seconds(comfy):
    with pytest.raises(NodeError) as caught:
        frames_for(comfy, 2.0, prompt="one\ntwo\nthree", schedule=LINES)
    assert "3" in caught.value.message
    assert "2" in caught.value.message
    assert comfy.management.loaded_models() == []


def test_a_prompt_is_encoded_once(comfy, monkeypatch):
    encoder = comfy.module("magi.text.encoder").TextEncoder
    encoded = []
    encode = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda self, text, **rest: encoded.append(text) or encode(self, text, **rest)
    )
    frames_for(comfy, prompt="a cat")
    first = list(encoded)
    assert len(first) == 1
    frames_for(comfy, prompt="a cat", motion="static", schedule=LINES)
    assert encoded == first, "wishes are added later"
    frames_for(comfy, 2.0, prompt="a cat\na dog", schedule=LINES)
    assert len(encoded) == 2
    assert len(list((comfy.base / "user/magi1/text").rglob("*.safetensors"))) == 2


def own_files(comfy) -> ModelFiles:
    return repeating_files(comfy.base / "user" / "magi1")


def own_encoder(comfy, place: str) -> Path:
    """A copy of the photo model's text encoder in a folder of ComfyUI's models, the name of the file in the menu."""
    return Path(shutil.copytree(own_files(comfy).text_encoder, comfy.base / "models" / place))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("magi1/ckpt/t5/t5-v1_1-xxl", "ckpt/t5/t5-v1_1-xxl"),
        ("text_encoders/own", "own/model.safetensors"),
    ],
)
@pytest.mark.parametrize("left", ["nothing", "the tokenizer"])
def test_a_prompt_met_before_needs_no_text_encoder(comfy, place, name, left):
    folder = own_encoder(comfy, place)
    graph = filled(comfy, {part: text_to_video(comfy)[part] for part in ("encoder", "text")})
    graph["encoder"]["inputs"]["encoder"] = name
    graph["text"]["inputs"]["prompt"] = "a cat"
    ((embeds, _),) = comfy.run(graph)["text"][0]
    if left == "nothing":
        shutil.rmtree(folder)
    else:
        (folder / "model.safetensors").unlink()
    graph["text"]["inputs"]["motion"] = "static"  # so that the node runs again
    ((again, _),) = comfy.run(graph)["text"][0]
    assert torch.equal(again, embeds)
    graph["text"]["inputs"]["prompt"] = "a dog"
    with pytest.raises(NodeError, match=r"text encoder") as caught:
        comfy.run(graph)
    assert caught.value.kind == "MagiError"


def test_an_encoder_that_was_never_there_is_told_before_anything_runs(comfy):
    graph = filled(comfy, {part: text_to_video(comfy)[part] for part in ("encoder", "text")})
    graph["encoder"]["inputs"]["encoder"] = "ckpt/t5/t5-v1_1-xxl"
    with pytest.raises(NodeError, match=r"\" download t5 --folder"):
        comfy.run(graph)
    assert comfy.executed == ["encoder"]


def test_weights_are_not_even_mapped_for_a_prompt_met_before(comfy, monkeypatch):
    conditioning(comfy, prompt="a cat")
    for module in ("magi.text.encoder", "magi.text.t5_checkpoint"):
        monkeypatch.setattr(comfy.module(module), "read_t5", lambda *_: pytest.fail("T5 is mapped"))
    conditioning(comfy, prompt="a cat", motion="static")


# -- ComfyUI's own CLIP -------------------------------------------------------------------------------------------------


class Clip:
    """Stands in for ComfyUI's CLIP: words are tokens, an embedding tells its token and place."""

    def __init__(self, names: tuple[str, ...] = ("t5xxl",), width: int = 4096, seed: int = 0) -> None:
        self.names, self.width = names, width
        self.encoded: list[int] = []
        self.cond_stage_model = torch.nn.ModuleDict({"t5xxl": torch.nn.Linear(2, 2, bias=False)})
        torch.nn.init.constant_(self.cond_stage_model["t5xxl"].weight, seed)

    def tokenize(self, text, return_word_ids=False, **options):
        words = [(len(word), 1.0) for word in text.split()]
        least = (options.get("tokenizer_options") or {}).get("t5xxl_min_length", 77)
        row = [*words, (1, 1.0)]
        row += [(0, 1.0)] * max(0, least - len(row))
        return {name: [list(row)] for name in self.names}

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        (row,) = tokens["t5xxl"]
        self.encoded.append(len(row))
        embeds = (
            torch.tensor([[number, place] for place, (number, _) in enumerate(row)]).float().repeat(1, self.width // 2)
        )
        return {"cond": embeds[None], "pooled_output": None, "attention_mask": torch.ones(1, len(row))}


def encode_natively(comfy, clip, prompt="a large cat", **text) -> list:
    graph = {"clip": node(comfy.constant("CLIP", clip)), "text": node("Magi1TextEncode", encoder=["clip", 0])}
    graph["text"]["inputs"] |= {"prompt": prompt} | text
    return comfy.run(filled(comfy, graph))["text"][0]


@pytest.mark.parametrize("names", [("t5xxl",), ("l", "t5xxl")])
def test_a_native_clip(comfy, names):
    clip = Clip(names)
    ((embeds, _),) = encode_natively(comfy, clip)
    assert embeds.shape == (1, 4, 4096), "three words and the end, no padding"
    assert embeds[0, :, 0].tolist() == [1, 5, 3, 1]
    assert embeds[0, :, 1].tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*is not the published special-token file")
def test_a_video_of_a_native_clips_text(comfy):
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["model"] = random_model(comfy, "wide", caption_channels=4096)
    shutil.copytree(own_files(comfy).vae, comfy.base / "models/magi1/vae")
    graph["vae"]["inputs"]["vae"] = (
        "vae/diffusion_pytorch_model.safetensors"  # the photo model's by its name fits that only
    )
    graph["clip"] = node(comfy.constant("CLIP", Clip()))
    graph["text"]["inputs"]["encoder"] = ["clip", 0]
    del graph["encoder"]
    cat = comfy.run(graph)["sampler"][0]["samples"]
    graph["text"]["inputs"]["prompt"] = "a horse"
    assert not torch.equal(comfy.run(graph)["sampler"][0]["samples"], cat)


def test_a_native_clip_is_asked_once_for_a_prompt(comfy):
    clip = Clip()
    encode_natively(comfy, clip)
    encode_natively(comfy, clip, motion="static")
    assert len(clip.encoded) == 1
    encode_natively(comfy, Clip(seed=1))
    ((embeds, _),) = encode_natively(comfy, Clip(seed=1), prompt="a cat\na dog", schedule=LINES)[:1]
    assert embeds.shape[1] == 3
    other = Clip(seed=1)
    encode_natively(comfy, other)
    assert other.encoded == [], "the same weights in another object"


@pytest.mark.parametrize(("value", "told"), [(float("nan"), "no numbers"), (0.0, "nothing but zeros")])
def test_a_native_clip_that_overflows(comfy, value, told):
    class Overflowing(Clip):
        def encode_from_tokens(self, tokens, **options):
            found = super().encode_from_tokens(tokens, **options)
            return found | {"cond": torch.full_like(found["cond"], value)}

    for _ in range(2):  # nothing of the first is kept
        with pytest.raises(NodeError) as caught:
            encode_natively(comfy, Overflowing())
        assert caught.value.kind == "MagiError"
        assert re.search(rf"Load CLIP gave .*{told}.*--fp32-text-enc", caught.value.message)


@pytest.mark.parametrize("clean", [True, False])
def test_any_prompt_for_a_native_clip(comfy, clean):
    ((embeds, _),) = encode_natively(comfy, Clip(), prompt="a \udcff\0 cat", clean_prompt=clean)
    assert embeds.shape[2] == 4096
    ((embeds, _),) = encode_natively(comfy, Clip(), prompt="word " * 200_000, clean_prompt=clean)
    assert embeds.shape[1] == 800
    shown = [text for name, text in comfy.events.texts if name == "text"][-1]
    assert "has 1,000,000 characters; all after the first 8,000 is left out" in shown
    assert "only the first 800 are used" in shown


def test_more_lines_than_any_video_has_seconds(comfy):
    clip = Clip()
    with pytest.raises(NodeError) as caught:
        encode_natively(comfy, clip, prompt="a line\n" * 5000, schedule=LINES)
    assert "5,000 lines" in caught.value.message
    assert "one prompt" in caught.value.message
    assert clip.encoded == []


def test_other_weights_are_another_encoder(comfy):
    encode_natively(comfy, Clip())
    other = Clip(seed=1)
    encode_natively(comfy, other)
    assert len(other.encoded) == 1


def test_long_prompts_keep_their_end(comfy):
    ((embeds, _),) = encode_natively(comfy, Clip(), prompt="word " * 900)
    assert embeds.shape[1] == 800
    assert embeds[0, -1, 0] == 1, "the end token"


@pytest.mark.parametrize("clip", [Clip(("l", "g")), Clip(width=2048)], ids=["other encoders", "a smaller T5"])
def test_clips_that_are_no_t5_xxl(comfy, clip):
    with pytest.raises(NodeError) as caught:
        encode_natively(comfy, clip)
    assert caught.value.kind == "MagiError"
    assert re.search(r"t5xxl.*mochi", caught.value.message, re.DOTALL)


def test_text_of_another_width_than_the_models(comfy):
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["model"] = random_model(comfy, "narrow")
    graph["clip"] = node(comfy.constant("CLIP", Clip()))
    graph["text"]["inputs"]["encoder"] = ["clip", 0]
    with pytest.raises(NodeError) as caught:
        comfy.run(graph)
    assert caught.value.kind == "MagiError"
    assert "4096" in caught.value.message
    assert "64" in caught.value.message
    assert comfy.management.loaded_models() == []


def test_a_conditioning_of_native_nodes(comfy):
    """Padding that its mask leaves out does not count."""
    embeds = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([embeds, torch.full((1, 3, 64), 9.0)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    graph = text_to_video(comfy)
    made = []
    for text in ([[embeds, {}]], [[padded, {"attention_mask": mask, "pooled_output": None}]]):
        graph["text"] = node(comfy.constant("CONDITIONING", text))
        made.append(comfy.run(graph)["decode"][0])
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ([[torch.full((1, 5, 64), torch.nan), {}]], "none .NaN or infinity. in the prompt's embeddings"),
        ([[torch.zeros(5, 64), {}]], r"shape \(5, 64\)"),
        ([[torch.zeros(0, 5, 64), {}]], r"shape \(0, 5, 64\)"),
        ([[torch.zeros(1, 5, 64), {"attention_mask": torch.ones(1, 8)}]], r"its mask \(1, 8\)"),
    ],
    ids=["NaN", "no batch", "empty", "mask"],
)
def test_a_conditioning_that_cannot_be_one(comfy, text, told):
    graph = text_to_video(comfy)
    graph["text"] = node(comfy.constant("CONDITIONING", text))
    with pytest.raises(NodeError) as caught:
        comfy.run(graph)
    assert caught.value.kind == "MagiError"
    assert re.search(told, caught.value.message)
