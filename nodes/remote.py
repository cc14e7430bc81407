"""The node that has a paid service make the video, for those without a graphics card."""

import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import InputImpl, io

from ..magi.errors import MagiError
from ..magi.media.video_reader import read_video
from ..magi.remote.address import BaseUrl
from ..magi.remote.api import Api
from ..magi.remote.client import Client, RemoteVideo
from ..magi.remote.download import Facts
from ..magi.remote.errors import Cancelled
from ..magi.remote.key import find_key, refuse_key_in
from ..magi.remote.request import RemoteRequest
from .comfyui import host, media, schema
from .comfyui.progress import NodeProgress
from .comfyui.threads import in_thread

KEY_FILE = "wavespeed_api_key.txt"  # in the user folder, below magi1
_FRAMES, _FPS = (96, 192), (5, 30)
_MOST_SEED = 2**31 - 1
_ADDRESS = "https://api.wavespeed.ai"
_LARGEST = {"480p": (480, 854), "720p": (720, 1280)}


class Magi1Remote(io.ComfyNode):
    """Has WaveSpeedAI make the video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the inputs and outputs."""
        return schema.schema(
            node_id="Magi1Remote",
            display_name="MAGI-1 Remote (WaveSpeed)",
            aliases=["api", "cloud", "wavespeed"],
            price="paid: WaveSpeedAI",
            description="Has MAGI-1 24B make the video at WaveSpeedAI, for money: nothing runs on this machine. It needs an API key, which is never part of a workflow: see the help.",
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What to show. In English: the model knows little else.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture that the video begins with; of a batch, the first. It is uploaded to WaveSpeedAI.",
                ),
                io.Int.Input(
                    "frames",
                    default=96,
                    min=_FRAMES[0],
                    max=_FRAMES[1],
                    tooltip="WaveSpeedAI's pages contradict each other: 96 to 192, 81 to 100, at most 64. What comes is compared with what was asked for.",
                ),
                io.Int.Input(
                    "fps", default=24, min=_FPS[0], max=_FPS[1], tooltip="Frames per second. MAGI-1 was made for 24."
                ),
                io.Combo.Input("resolution", options=["480p", "720p"], default="720p", tooltip="480p costs half."),
                io.Combo.Input(
                    "aspect_ratio",
                    options=["auto", "16:9", "9:16", "1:1"],
                    default="auto",
                    tooltip="auto: the picture's. Without a picture, choose one.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=-1,
                    max=_MOST_SEED,
                    control_after_generate=False,
                    tooltip="Another number, another video, another bill: so it does not change by itself. -1: every run makes another one.",
                ),
                io.Boolean.Input(
                    "safety_checker",
                    default=True,
                    tooltip="WaveSpeedAI checks the content, and may withhold the video.",
                ),
                schema.advanced(
                    io.Combo.Input(
                        "api_version",
                        options=["v2", "v3"],
                        default="v2",
                        tooltip="v2 takes all settings here; v3 is newer, and its page lists only prompt, image and seed.",
                    )
                ),
                schema.advanced(
                    io.String.Input(
                        "base_url",
                        default=_ADDRESS,
                        tooltip="For a gateway, or the test server on this machine. Your key goes to another address only if you have allowed that: see the help.",
                    )
                ),
                schema.advanced(
                    io.String.Input(
                        "resume_id",
                        default="",
                        tooltip="A task's id: its video is fetched, nothing is submitted. Or, after an attempt of unknown outcome, the confirm code from its message, to submit again.",
                    )
                ),
            ],
            outputs=[
                io.Video.Output(display_name="video"),
                io.Image.Output(display_name="frames"),
                io.String.Output(
                    display_name="task_id", tooltip="By this the video can be fetched again, for about 7 days."
                ),
                io.String.Output(
                    display_name="url",
                    tooltip="Where it lies at WaveSpeedAI, for about 7 days. Whoever has it can open it.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, prompt: str | None = None, base_url: str | None = None, resume_id: str | None = None
    ) -> bool | str:
        """Returns True, or what is wrong; a missing key is told when the node runs, where front ends show it in full."""
        try:
            if prompt is not None and not prompt.strip():
                return 'The prompt is blank. Say what to show, for example "A lighthouse in a storm".'
            if base_url is not None:  # a graph with a key in it must not even reach the queue's history
                refuse_key_in(host.cache_folder() / KEY_FILE, base_url, *filter(None, (prompt, resume_id)))
                BaseUrl(base_url)
        except MagiError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, seed: int | None = None, **_: Any) -> Any:
        """Returns a new value at every run without a seed: each makes another video."""
        return uuid.uuid4().hex if seed == -1 else None

    @classmethod
    @schema.checked
    async def execute(
        cls,
        prompt: str,
        frames: int,
        fps: int,
        resolution: str,
        aspect_ratio: str,
        seed: int,
        safety_checker: bool,
        api_version: str = "v2",
        base_url: str = _ADDRESS,
        resume_id: str = "",
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Makes the request in a thread and waits for its video."""
        request = RemoteRequest(
            prompt,
            None if image is None else media.frames_of(image[:1])[0],
            frames,
            fps,
            resolution,
            aspect_ratio,
            None if seed == -1 else seed,
            safety_checker,
        )
        media.check_room(frames, *_LARGEST[resolution], "Ask for fewer frames, or 480p.")
        client = Client(_api(base_url, api_version, prompt, resume_id), host.cache_folder() / "remote", _log)
        progress = NodeProgress(cls.hidden.unique_id, make=0.95, frames=0.05)
        images: list[torch.Tensor] = []

        def work(left: Callable[[], bool]) -> RemoteVideo:
            def show(phase: str, part: float, text: str) -> None:
                try:
                    progress.move(phase, part)
                except host.Interrupted:
                    raise Cancelled from None
                if cancelled():
                    raise Cancelled
                if left():
                    raise _LeftError
                progress.show_text(text)

            def take(path: Path, facts: Facts) -> None:
                images.append(_frames(path, facts, lambda part: show("frames", part, f"taking the frames, {part:.0%}")))

            with host.interrupt_watched() as cancelled:
                return client.make(request, host.temp_folder(), lambda p: show("make", p.part, p.text), resume_id, take)

        try:
            made = await in_thread(work)
        except Cancelled:
            progress.show_now("Cancelled. A task that was not finished is deleted, as far as the service does that.")
            raise host.Interrupted from None
        shown = progress.show_now(" ".join([f"{made.facts}, task {made.task_id}.", *made.notes]))
        return io.NodeOutput(InputImpl.VideoFromFile(str(made.path)), images[0], made.task_id, made.url, ui=shown)


class _LeftError(Exception):
    """ComfyUI has ended the graph. The task continues, and the same request resumes it."""


def _api(base_url: str, version: str, *widgets: str | None) -> Api:
    """Opens the account. Raises MagiError where there is no key for it, or where the key stands in a widget."""
    file = host.cache_folder() / KEY_FILE
    refuse_key_in(file, base_url, *filter(None, widgets))
    base = BaseUrl(base_url)
    return Api(base, version, find_key(file, base))


def _frames(path: Path, facts: Facts, progress: Callable[[float], None]) -> torch.Tensor:
    """Reads a video as an IMAGE batch."""
    remedy = f"The video itself is {str(path)!r}. Make room, and run it again: nothing is billed for that."
    media.check_room(facts.frames, facts.height, facts.width, remedy)
    return media.images_of(read_video(path, facts.fps, progress=lambda done, _: progress(done / facts.frames)))


def _log(sentence: str) -> None:
    logging.info(f"MAGI-1 Remote: {sentence}")
