"""The example workflows, and the blueprints that are taken from them."""

from dataclasses import replace

from magi.model_files.download import HUB, REPOSITORY, SPECIAL_TOKENS_URL
from magi.remote.answers import TASKS_PAGE
from magi.remote.key import PAGE as KEY_PAGE
from magi.remote.request import MODEL as SERVICE

from .graph import HINT, Blueprint, Group, Node, Workflow

_TREE = f"{HUB}/{REPOSITORY}/tree/main/ckpt"
_FILES = "https://huggingface.co"
_T5 = f"{_FILES}/comfyanonymous/flux_text_encoders"
_ESRGAN = {
    "name": "RealESRGAN_x4plus.safetensors",
    "url": f"{_FILES}/Comfy-Org/Real-ESRGAN_repackaged/resolve/main/RealESRGAN_x4plus.safetensors",
    "directory": "upscale_models",
}
_FILM = {
    "name": "film_net_fp16.safetensors",
    "url": f"{_FILES}/Comfy-Org/frame_interpolation/resolve/main/frame_interpolation/film_net_fp16.safetensors",
    "directory": "frame_interpolation",
}
_T5XXL = {
    "name": "t5xxl_fp8_e4m3fn_scaled.safetensors",
    "url": f"{_T5}/resolve/main/t5xxl_fp8_e4m3fn_scaled.safetensors",
    "directory": "text_encoders",
}
_NOTHING_YET = "**Nothing downloaded?** Press *Run* all the same: *auto* then takes the tiny embedded model, which knows moving shapes at 64x64."
_STAR = "A large yellow star moves to the left on a dark blue background."
_BALL = "A large orange ball moves left on a dark blue background."


# -- parts that all of them have ---------------------------------------------------------------------------------------


def _download(model: str, size: str, encoder: bool = True) -> str:
    """Returns a note's paragraph on the files."""
    t5 = f", [text encoder]({_TREE}/t5/t5-v1_1-xxl) 19 GB" if encoder else ""
    return (
        f"**Download**, once: choose *{model}* in the Model Loader and press *Run*: the message has the command that fetches all. "
        f"By hand: [transformer]({_TREE}/magi/{model}) {size}, [VAE]({_TREE}/vae) 1 to 2.5 GB{t5}, "
        f"[special tokens]({SPECIAL_TOKENS_URL}) 3 MB, in the same folders below *ComfyUI/models/magi1*."
    )


def _note(title: str, *paragraphs: str, width: int, height: int) -> Node:
    text = "\n\n".join((f"## {title}", *paragraphs)) + "\n"
    return Node("MarkdownNote", {"": text}, title="About this workflow", size=(width, height))


def _loaders(model: str = "auto") -> dict[str, Node]:
    return {
        "model": Node("Magi1ModelLoader", {"model": model}),
        "encoder": Node("Magi1TextEncoderLoader"),
        "vae": Node("Magi1VAELoader"),
    }


def _sampler(start: str | None = None, **values: object) -> Node:
    links = {"model": "model", "text": "text", "vae": "vae"} | ({"start": start} if start else {})
    return Node("Magi1Sampler", values, links)


def _video(name: str) -> dict[str, Node]:
    """Returns the nodes from the sampler to the file."""
    return {
        "info": _info("sampler"),
        "decode": Node("Magi1VAEDecode", links={"samples": "sampler", "vae": "vae"}),
        "save": _save(name, "decode.video"),
    }


def _info(sampler: str) -> Node:
    return Node("PreviewAny", links={"source": f"{sampler}.info"}, title="What was made")


def _save(name: str, video: str) -> Node:
    return Node("SaveVideo", {"filename_prefix": f"video/{name}"}, {"video": video})


_TOP = [[Group(None, [["note"]])]]
_MODELS = [Group("1. Models", [["model", "encoder", "vae"]])]


def _columns(*stacks: list[Group]) -> list[list[list[Group]]]:
    """Returns the note across the top, and the stacks below."""
    return [_TOP, list(stacks)]


def _standard(*start: str, models: list[Group] = _MODELS) -> list[list[list[Group]]]:
    """Returns the arrangement of most: what a video starts from, by the names of the nodes, lies below the prompt."""
    return _columns(
        models,
        [Group("2. What to show", [["text"]]), Group("3. Start from", [start])],
        [Group("4. Sample", [["sampler", "info"]])],
        [Group("5. Video", [["decode", "save"]])],
    )


# -- the workflows -----------------------------------------------------------------------------------------------------


def _first_run() -> Workflow:
    right, down = ("A small red circle moves to the right on", "The small red circle now moves down on")
    prompt = "\n".join(f"{motion} a white background." for motion in (right, right, down, down))
    nodes = {
        "note": _note(
            "First run",
            "Text to video with **nothing to download**: a tiny model that knows flat shapes that move. Press *Run*: it takes a few "
            "seconds, and makes four at 64x64. A red circle moves to the right, then down: each line of the prompt is one second.",
            "**Change first** the prompt: circles, squares, triangles, rings, crosses and stars, in 8 colours, that move, stand still, "
            "grow, shrink or turn. Another *seed* is another place and speed. **Then** open *magi1_image_to_video* and "
            "*magi1_continue_video*. **A real model**: choose *4.5B_distill* in the Model Loader, and it says how to get it.",
            width=1480,
            height=114,
        ),
        **_loaders(),
        "text": Node("Magi1TextEncode", {"prompt": prompt, "schedule": "one line a second"}, {"encoder": "encoder"}),
        "sampler": _sampler(seconds=4, seed=1),
        **_video("magi1_first_run"),
    }
    rows = _columns(
        _MODELS,
        [Group("2. What to show", [["text"]])],
        [Group("3. Sample", [["sampler", "info"]])],
        [Group("4. Video", [["decode", "save"]])],
    )
    return Workflow("magi1_first_run", nodes, rows)


def _text_to_video() -> Workflow:
    nodes = {
        "note": _note(
            "Text to video",
            "Four seconds at 960x544 from a prompt alone. " + _NOTHING_YET,
            _download("4.5B_distill", "9 GB"),
            "**Change first** the prompt: subject, movement, camera (*schedule* on *one line a second*: a prompt for every second); "
            "*size*, *shape*, *seconds*; *steps*: 8 is quick, 16 good. **Expect** the prompt to be encoded on the CPU first, which "
            "takes a while (the same one never again), then a preview of every second, in about 12 GB of graphics memory or less.",
            width=1480,
            height=130,
        ),
        **_loaders(),
        "text": Node("Magi1TextEncode", {"prompt": _BALL}, {"encoder": "encoder"}),
        "start": Node("Magi1TextToVideo"),
        "sampler": _sampler("start", seconds=4, seed=1, steps=16, control="randomize"),
        **_video("magi1_text_to_video"),
    }
    return Workflow("magi1_text_to_video", nodes, _standard("start"))


def _image_to_video() -> Workflow:
    nodes = {
        "note": _note(
            "Image to video",
            "The picture is the first frame, and four seconds come of it. It keeps its shape; *size* sets the number of pixels. "
            + _NOTHING_YET,
            _download("4.5B_distill", "9 GB"),
            "**Change first** the picture: Load Image in the place of Demo Image (*embedded photo model* in all three loaders repeats any "
            "picture, with nothing downloaded); the prompt: say what *happens* in it, *motion dynamic* asks for more; *seconds*, *seed*.",
            width=1480,
            height=130,
        ),
        **_loaders(),
        "text": Node("Magi1TextEncode", {"prompt": _STAR, "motion": "dynamic"}, {"encoder": "encoder"}),
        "image": Node("Magi1DemoImage"),
        "start": Node("Magi1ImageToVideo", links={"vae": "vae", "image": "image"}),
        "sampler": _sampler("start", seconds=4, seed=1, steps=16, control="randomize"),
        **_video("magi1_image_to_video"),
    }
    return Workflow("magi1_image_to_video", nodes, _standard("image", "start"))


def _continue_video() -> Workflow:
    after = _STAR.replace("A large", "The large").replace("moves to the left", "now moves down")
    nodes = {
        "note": _note(
            "Continue a video",
            "A clip from a picture, then more from its end with another prompt. The first sampler's latents go straight into Video to Video; "
            "the last VAE Decode puts the first clip in front: one video. " + _NOTHING_YET,
            "**Your own clip:** choose it in Load Video, enable it (Ctrl+B), drag its output to *video* of Video to Video **and** *before* of "
            "*VAE Decode (all)*: its sound is kept. **Change first** both prompts, *continue_seconds*, *seconds*. **Longer still:** copy "
            "groups 5 to 7.",
            _download("4.5B_distill", "9 GB"),
            width=300,
            height=340,
        ),
        **_loaders(),
        "text": Node("Magi1TextEncode", {"prompt": _STAR}, {"encoder": "encoder"}, size=(300, 392)),
        "image": Node("Magi1DemoImage", size=(300, 88)),
        "start": Node("Magi1ImageToVideo", links={"vae": "vae", "image": "image"}, size=(300, 230)),
        "sampler": replace(_sampler("start", seconds=3, seed=7, steps=16), size=(300, 592)),
        "clip": Node("LoadVideo", {"file": "your_clip.mp4"}, title="Load Video (your clip)", size=(300, 140), off=True),
        "next": Node("Magi1VideoToVideo", links={"video": "sampler", "vae": "vae"}, size=(300, 282)),
        "then": Node("Magi1TextEncode", {"prompt": after}, {"encoder": "encoder"}, size=(300, 392)),
        "first": Node("Magi1VAEDecode", links={"samples": "sampler", "vae": "vae"}, size=(300, 394)),
        "again": Node(
            "Magi1Sampler",
            {"seconds": 3, "seed": 7, "steps": 16, "control": "randomize"},
            {"model": "model", "text": "then", "start": "next", "vae": "vae"},
            size=(300, 592),
        ),
        "info": replace(_info("again"), size=(300, 140)),
        "decode": Node(
            "Magi1VAEDecode",
            links={"samples": "again", "vae": "vae", "before": "first.video"},
            title="MAGI-1 VAE Decode (all)",
            size=(300, 394),
        ),
        "save": replace(_save("magi1_continue_video", "decode.video"), size=(300, 420)),
    }
    stacks = [
        [*_MODELS, *_TOP[0]],
        [Group("2. What to show first", [["text"]]), Group("3. Start from", [["image", "start"]])],
        [Group("4. Sample the first clip", [["sampler"]]), Group("Decode it", [["first"]])],
        [Group("5. What comes next", [["next", "then"]]), Group("Your own clip instead", [["clip"]], HINT)],
        [Group("6. Sample again", [["again", "info"]])],
        [Group("7. Video", [["decode", "save"]])],
    ]
    return Workflow("magi1_continue_video", nodes, [stacks])


def _low_memory() -> Workflow:
    prompt = "A steam train crosses a stone viaduct in the mountains on a clear autumn morning, the camera follows it from the side."
    nodes = {
        "note": _note(
            "24B on a small card",
            "Two seconds at 720p with the large distilled fp8 model, in at most 8 GB of graphics memory: a few of its 48 layers stay on the "
            "card, the others are fetched ahead of their turn. With 32 GB of RAM or more most of them wait there; with less they are read "
            "from the disk in every step: use an SSD. It needs about 5 GB of graphics memory (calculated, not measured).",
            "The loaders are on *auto*, so that *Run* shows something at once: **choose *24B_distill_quant*** to have this model. "
            + _download("24B_distill_quant", "26 GB"),
            "**Change first** *budget_gb*, to leave room for something else on the card; 0, or no Memory Options at all, takes what is free. "
            "Still too much: 480p. **Stopped it?** Queue it again: it goes on where it was.",
            width=1480,
            height=150,
        ),
        **_loaders(),
        "memory": Node("Magi1MemoryOptions", {"budget_gb": 8.0}),
        "text": Node("Magi1TextEncode", {"prompt": prompt}, {"encoder": "encoder"}),
        "start": Node("Magi1TextToVideo", {"size": "720p"}),
        "sampler": _sampler("start", seconds=2, seed=1, control="randomize"),
        **_video("magi1_low_memory_24B"),
    }
    nodes["model"] = Node("Magi1ModelLoader", links={"memory": "memory"})
    models = [Group("Memory", [["memory"]]), *_MODELS]
    return Workflow("magi1_low_memory_24B", nodes, _standard("start", models=models))


def _base_guidance() -> Workflow:
    prompt = "A lighthouse on a rocky coast in a storm at dusk, waves break against the cliff, the beam of light turns slowly, wide shot."
    nodes = {
        "note": _note(
            "The base model, with guidance",
            "Four seconds at 960x544 with the 4.5B base model: three passes a step and 64 steps, about ten times the work of the distilled "
            "one. *guidance* says how closely the prompt is followed, *previous_guidance* how closely a second follows the one before.",
            _download("4.5B_base", "9 GB"),
            "**Change first** *guidance*: 5 is calmer, 10 more literal; *steps*: 32 is twice as fast; *negative_tokens* steers away from "
            "burnt-in captions, logos and borders. **To see it with nothing downloaded**, choose *embedded demo model (base)* in the Model "
            "Loader, and *embedded demo model* in the other two.",
            width=1480,
            height=130,
        ),
        **_loaders("4.5B_base"),
        "text": Node("Magi1TextEncode", {"prompt": prompt}, {"encoder": "encoder"}),
        "start": Node("Magi1TextToVideo"),
        "sampler": _sampler(
            "start",
            seconds=4,
            seed=1,
            steps=64,
            guidance=7.5,
            previous_guidance=1.5,
            negative_tokens=True,
            control="randomize",
        ),
        **_video("magi1_base_guidance"),
    }
    return Workflow("magi1_base_guidance", nodes, _standard("start"))


def _native_clip() -> Workflow:
    prompt = "A potter shapes a bowl of clay on a turning wheel, her wet hands press the rim outwards. Close-up, warm light from a window."
    nodes = {
        "note": _note(
            "With the T5 you have",
            "Text to video with a *t5xxl* file of ComfyUI's own (as for Flux, SD3, LTX or Mochi) instead of MAGI-1's 19 GB encoder. In "
            f"*ComfyUI/models/text_encoders*, one of [these]({_T5}/tree/main): "
            f"[t5xxl_fp8_e4m3fn_scaled.safetensors]({_T5XXL['url']}), 5 GB, or "
            f"[t5xxl_fp16.safetensors]({_T5}/resolve/main/t5xxl_fp16.safetensors), 10 GB, closer to the original. The type in Load CLIP must be "
            "*mochi* (or *ltxv*).",
            _download("4.5B_distill", "9 GB", encoder=False),
            "**Change first** the prompt, *size*, *seconds*. The rest is as in *magi1_text_to_video*.",
            width=1480,
            height=130,
        ),
        "model": Node("Magi1ModelLoader", {"model": "4.5B_distill"}),
        "encoder": Node("CLIPLoader", {"clip_name": _T5XXL["name"]}, models=[_T5XXL]),
        "vae": Node("Magi1VAELoader", {"vae": "ckpt/vae"}),
        "text": Node("Magi1TextEncode", {"prompt": prompt}, {"encoder": "encoder"}),
        "start": Node("Magi1TextToVideo"),
        "sampler": _sampler("start", seconds=4, seed=1, steps=16, control="randomize"),
        **_video("magi1_native_clip"),
    }
    return Workflow("magi1_native_clip", nodes, _standard("start"))


def _upscale() -> Workflow:
    nodes = {
        "note": _note(
            "Larger and smoother",
            "Text to video, then ComfyUI's own nodes behind it: an upscale model makes the frames larger, frame interpolation makes two of "
            "each. Both are **off** at first: enable a pair of nodes (select them, Ctrl+B) once its file is there. With the second pair "
            "set *fps* of Create Video to 48. " + _NOTHING_YET,
            f"**Files**: [{_ESRGAN['name']}]({_ESRGAN['url']}) in *models/upscale_models*, [{_FILM['name']}]({_FILM['url']}) in "
            "*models/frame_interpolation* (the nodes of the second pair are in ComfyUI since 2026). "
            + _download("4.5B_distill", "9 GB"),
            "**Mind** that all frames are in RAM at once: four seconds at four times 960x544 are 3.2 GB.",
            width=1860,
            height=150,
        ),
        **_loaders(),
        "text": Node("Magi1TextEncode", {"prompt": _BALL}, {"encoder": "encoder"}),
        "start": Node("Magi1TextToVideo"),
        "sampler": _sampler("start", seconds=4, seed=1, steps=16, control="randomize"),
        "info": _info("sampler"),
        "decode": Node("Magi1VAEDecode", links={"samples": "sampler", "vae": "vae"}),
        "esrgan": Node("UpscaleModelLoader", {"model_name": _ESRGAN["name"]}, off=True, models=[_ESRGAN]),
        "larger": Node("ImageUpscaleWithModel", links={"upscale_model": "esrgan", "image": "decode"}, off=True),
        "film": Node("FrameInterpolationModelLoader", {"model_name": _FILM["name"]}, off=True, models=[_FILM]),
        "smoother": Node("FrameInterpolate", links={"interp_model": "film", "images": "larger"}, off=True),
        "create": Node("CreateVideo", {"fps": 24}, {"images": "smoother"}),
        "save": _save("magi1_upscale", "create"),
    }
    rows = _columns(
        _MODELS,
        [Group("2. What to show", [["text"]]), Group("3. Start from", [["start"]])],
        [Group("4. Sample", [["sampler", "info"]])],
        [Group("5. Decode", [["decode"]]), Group("Larger (off)", [["esrgan", "larger"]], HINT)],
        [Group("Smoother (off)", [["film", "smoother"]], HINT), Group("6. Video", [["create", "save"]])],
    )
    return Workflow("magi1_upscale", nodes, rows)


def _remote() -> Workflow:
    nodes = {
        "note": _note(
            "Remote or local",
            "One prompt and one picture feed two halves: *Remote*, where WaveSpeedAI makes the video with MAGI-1 24B for money, and *Local*. "
            "**Only the half that Save Video hangs on runs.**",
            f"**Remote** (as it is): make a key at [wavespeed.ai/accesskey]({KEY_PAGE}) (it works after the first top-up), and put it into the "
            "environment variable WAVESPEED_API_KEY before ComfyUI starts, or into the first line of *magi1/wavespeed_api_key.txt* in "
            "ComfyUI's user folder. Never into a node: it would be in every workflow and video that you pass on. *Run* costs money: see "
            f"[the service's page](https://wavespeed.ai/docs/docs-api/{SERVICE}); the same settings again are fetched for free for a week. "
            f"Your tasks: [wavespeed.ai/predictions]({TASKS_PAGE}).",
            "**Local**: drag *video* of VAE Decode onto *video* of Save Video. " + _download("4.5B_distill", "9 GB"),
            width=480,
            height=600,
        ),
        "prompt": Node(
            "PrimitiveStringMultiline",
            {"value": "The cat turns its head, looks around, then into the camera"},
            title="Prompt",
        ),
        "image": Node("Magi1DemoImage", {"picture": "cat photo"}),
        "remote": Node(
            "Magi1Remote", {"resolution": "480p", "frames": 96}, {"image": "image", "prompt": "prompt"}, size=(440, 530)
        ),
        "save": Node(
            "SaveVideo", {"filename_prefix": "video/magi1_remote"}, {"video": "remote.video"}, size=(560, 530)
        ),
        **_loaders(),
        "text": Node("Magi1TextEncode", links={"encoder": "encoder", "prompt": "prompt"}),
        "start": Node("Magi1ImageToVideo", links={"vae": "vae", "image": "image"}),
        "sampler": Node(
            "Magi1Sampler",
            {"seconds": 4, "seed": 1, "steps": 16},
            {"model": "model", "text": "text", "start": "start", "vae": "vae"},
            size=(320, 420),
        ),
        "decode": Node("Magi1VAEDecode", links={"samples": "sampler", "vae": "vae"}),
    }
    rows = [
        [
            *_TOP,
            [Group("What to show", [["prompt", "image"]])],
            [Group("Remote (WaveSpeed)", [["remote"]])],
            [Group("Video", [["save"]])],
        ],
        [[Group("Local", [["model", "encoder"], ["vae", "start"], ["text"], ["sampler"], ["decode"]])]],
    ]
    return Workflow("magi1_remote", nodes, rows)


WORKFLOWS = (
    _first_run(),
    _text_to_video(),
    _image_to_video(),
    _continue_video(),
    _base_guidance(),
    _low_memory(),
    _native_clip(),
    _upscale(),
    _remote(),
)


# -- the blueprints ----------------------------------------------------------------------------------------------------


def _continuation() -> Workflow:
    """Returns a clip's continuation with the clip in front, of which only a blueprint is made."""
    nodes = {
        **_loaders(),
        "text": Node("Magi1TextEncode", {"prompt": _STAR}, {"encoder": "encoder"}),
        "next": Node("Magi1VideoToVideo", links={"vae": "vae"}),
        "sampler": _sampler("next", seconds=4, seed=1, steps=16),
        "decode": Node("Magi1VAEDecode", links={"samples": "sampler", "vae": "vae"}),
    }
    rows = _columns(
        _MODELS,
        [Group("2. What comes next", [["text", "next"]])],
        [Group("3. Sample", [["sampler"]])],
        [Group("4. Video", [["decode"]])],
    )
    return Workflow("magi1_continuation", nodes, rows[1:])


_OUTPUTS = ("decode.video", "decode.frames", "sampler.samples")
_SETTINGS = ("sampler.seconds", "sampler.seed", "sampler.steps", "model.model")
_OUTSIDE = ("note", "info", "save", "image")
BLUEPRINTS = (
    Blueprint(
        "MAGI-1 Text to Video",
        "A prompt to a video with MAGI-1, in one node.",
        _text_to_video(),
        _OUTSIDE,
        ("text.prompt", "start.size", "start.shape", *_SETTINGS),
        _OUTPUTS,
    ),
    Blueprint(
        "MAGI-1 Image to Video",
        "A picture, which is the first frame, and a prompt to a video with MAGI-1, in one node.",
        _image_to_video(),
        _OUTSIDE,
        ("start.image", "text.prompt", "start.size", *_SETTINGS),
        _OUTPUTS,
    ),
    Blueprint(
        "MAGI-1 Continue Video",
        "A video and a prompt to a longer video with MAGI-1, in one node: the clip with its sound, and what comes next.",
        _continuation(),
        (),
        ("next.video+decode.before", "text.prompt", "next.continue_seconds", "next.size", *_SETTINGS),
        _OUTPUTS,
    ),
)
