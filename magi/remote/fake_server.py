"""A server on this machine with the service's API: to try everything without a key or a bill, and for the tests.

Its videos name themselves as test videos. Tests script its answers and read the requests.
"""

import json
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email import policy
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .fake_video import make_video
from .request import ASPECTS, FPS, FRAMES, MODEL, RESOLUTIONS
from .transport import content_length

_V3_FIELDS = {"prompt", "image", "seed"}
_MOST_UPLOAD = 20 << 20  # bytes
# Percent-encodings in lower case, and of characters that need none: a client that normalises them is refused.
_SIGNATURE = "sig=a%2fb~c%2d%c3%a9&e=1"


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        status: HTTP's.
        content: bytes, or JSON.
        headers: more of them; those here replace the usual ones.
        wait: seconds before it is sent.
        keep: bytes after which the connection is dropped; 0: no answer at all.
        block: bytes of the content that are sent at a time.
        pause: seconds after each block.
    """

    status: int = 200
    content: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    keep: int | None = None
    block: int = 1 << 14
    pause: float = 0.0


@dataclass
class FakeTask:
    """A task and the statuses that it still goes through, one per poll."""

    id: str
    body: dict[str, Any]
    statuses: deque[str]
    video: Callable[[], bytes]
    flagged: bool = False


def result(data: Any, code: int = 200, message: str = "success") -> dict[str, Any]:
    """Wraps `data` as the service does."""
    return {"code": code, "message": message, "data": data}


class FakeServer:
    """A server that runs from `start` (or within a with-block) to `stop`.

    Attributes:
        url: its base URL.
        key: the only key that is accepted; None: any, or none.
        statuses: those that a new task goes through.
        script: answers by kind of request ("submit", "poll", "upload", "download", "delete"), each sent once instead of the usual
            one. A submitted task is created all the same, if it is answered with a status below 400 or not at all. A function
            is called with the usual answer.
        requests: all that arrived.
        tasks: all that were created.
        uploads: names and bytes.
        videos: those made so far, by their parameters; servers may share them.
        v3: "ignores" or "rejects" the fields that its page does not list.
    """

    def __init__(
        self, port: int = 0, key: str | None = None, statuses: tuple[str, ...] = ("created", "processing")
    ) -> None:
        self.key, self.statuses, self.v3 = key, statuses, "ignores"
        self.script: dict[str, deque[Answer | Callable[[Answer], Answer]]] = defaultdict(deque)
        self.requests: list[Request] = []
        self.tasks: dict[str, FakeTask] = {}
        self.uploads: dict[str, bytes] = {}
        self.videos: dict[str, bytes] = {}
        self._mutex = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> "FakeServer":
        """Serves in a thread."""
        threading.Thread(target=lambda: self._http.serve_forever(0.05), name="magi-fake-server", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stops serving and closes the port."""
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> "FakeServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def count(self, kind: str) -> int:
        """Returns how many requests of a kind arrived."""
        return sum(_kind(r.method, r.target) == kind for r in self.requests)

    # -- requests ------------------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        """Returns the answer to a request: the script's, or the usual one."""
        kind = _kind(request.method, request.target)
        with self._mutex:
            self.requests.append(request)
            scripted = self.script[kind].popleft() if self.script[kind] else None
        if isinstance(scripted, Answer) and scripted.status >= 400 and scripted.keep is None:
            return scripted
        usual = self._usual(kind, request)
        if scripted is None:
            return usual
        return scripted if isinstance(scripted, Answer) else scripted(usual)

    def _usual(self, kind: str, request: Request) -> Answer:
        if kind in ("submit", "poll", "upload", "delete"):
            bearer = request.headers.get("authorization", "")
            if self.key is not None and bearer != f"Bearer {self.key}":
                return Answer(401, result(None, 401, "invalid authentication"))
        path = request.target.partition("?")[0].split("/")
        act = {
            "submit": lambda: self._submit(request),
            "poll": lambda: self._poll(path[-2]),
            "upload": lambda: self._upload(request),
            "delete": lambda: self._delete(path[-1]),
            "download": lambda: self._download(request.target, path[-1]),
        }.get(kind)
        return act() if act else Answer(404, result(None, 404, "not found"))

    def _submit(self, request: Request) -> Answer:
        try:
            body = json.loads(request.body)
        except (ValueError, RecursionError):
            return Answer(400, result(None, 400, "the body is no JSON"))
        if "/api/v3/" in request.target:
            if (extra := sorted(set(body) - _V3_FIELDS)) and self.v3 == "rejects":
                return Answer(400, result(None, 400, f"unknown field {extra[0]}"))
            body = {name: value for name, value in body.items() if name in _V3_FIELDS}
        if fault := _fault(body):
            return Answer(400, result(None, 400, fault))
        task = FakeTask(uuid.uuid4().hex, body, deque(self.statuses), self.video_of(body))
        with self._mutex:
            self.tasks[task.id] = task
        return Answer(content=result(self._data(task, "created")))

    def _poll(self, task_id: str) -> Answer:
        with self._mutex:
            task = self.tasks.get(task_id)
            if task is None:
                return Answer(404, result(None, 404, "task not found"))
            status = task.statuses.popleft() if task.statuses else "completed"
            if not task.statuses and status not in ("created", "processing"):
                task.statuses.append(status)  # the final one
        return Answer(content=result(self._data(task, status)))

    def _data(self, task: FakeTask, status: str) -> dict[str, Any]:
        outputs = [f"{self.url}/outputs/{task.id}.mp4?{_SIGNATURE}"] if status == "completed" else []
        return {
            "id": task.id,
            "model": MODEL,
            "status": status,
            "outputs": outputs,
            "urls": {"get": f"{self.url}/api/v2/predictions/{task.id}/result"},
            "has_nsfw_contents": [task.flagged] if outputs else [],
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "error": "",
            "timings": {"inference": 0},
        }

    def _upload(self, request: Request) -> Answer:
        if len(request.body) > _MOST_UPLOAD:
            return Answer(413, result(None, 413, "the file is too large"))
        head = f"Content-Type: {request.headers.get('content-type', '')}\r\n\r\n".encode()
        parts = BytesParser(policy=policy.HTTP).parsebytes(head + request.body)
        files = [p for p in parts.iter_parts() if p.get_param("name", header="content-disposition") == "file"]
        if not files:
            return Answer(400, result(None, 400, "there is no file"))
        data = files[0].get_payload(decode=True)
        name = f"{uuid.uuid4().hex}-{files[0].get_filename()}"
        self.uploads[name] = bytes(data)
        media = {"type": "image", "download_url": f"{self.url}/media/{name}", "filename": name, "size": len(data)}
        return Answer(content=result(media))

    def _delete(self, task_id: str) -> Answer:
        with self._mutex:
            task = self.tasks.get(task_id)
            if task is None:
                return Answer(404, result(None, 404, "task not found"))
            task.statuses = deque(["deleted"])
        return Answer(content=result({"id": task_id, "status": "deleted"}))

    def _download(self, target: str, name: str) -> Answer:
        task = self.tasks.get(name.removesuffix(".mp4"))
        if task is None:
            return Answer(404, b"not found", {"Content-Type": "text/plain"})
        if not target.endswith(f"?{_SIGNATURE}"):
            return Answer(403, b"the signature does not match", {"Content-Type": "text/plain"})
        return Answer(content=task.video(), headers={"Content-Type": "video/mp4"})

    def video_of(self, body: dict[str, Any]) -> Callable[[], bytes]:
        """Returns a function that returns the task's video, made at its first call; equal tasks share it."""
        name = str(body.get("image", "")).rpartition("/")[2]
        image = self.uploads.get(name)
        shape = {k: body.get(k) for k in ("num_frames", "frames_per_second", "resolution", "aspect_ratio")}
        key = json.dumps([shape, name])

        def video() -> bytes:
            with self._mutex:
                if key not in self.videos:
                    self.videos[key] = make_video(image=image, **{k: v for k, v in shape.items() if v is not None})
                return self.videos[key]

        return video


def _fault(body: Any) -> str:
    """Returns what is wrong with a submitted body, "" if nothing."""
    if not isinstance(body, dict) or not isinstance(body.get("prompt"), str) or not body["prompt"].strip():
        return "prompt is required"
    ranges = {"num_frames": FRAMES, "frames_per_second": FPS, "seed": (-1, 9_999_999_999)}
    for name, (least, most) in ranges.items():
        value = body.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            return f"{name} must be an integer from {least} to {most}"
    for name, known in {"resolution": RESOLUTIONS, "aspect_ratio": ASPECTS}.items():
        if body.get(name, known[0]) not in known:
            return f"{name} must be one of {', '.join(known)}"
    if not isinstance(body.get("enable_safety_checker", True), bool):
        return "enable_safety_checker must be true or false"
    if not isinstance(body.get("image", ""), str):
        return "image must be an address"
    return ""


def _kind(method: str, target: str) -> str:
    path = target.partition("?")[0]
    if method == "POST":
        return "submit" if path.endswith(MODEL) else "upload" if path.endswith("/media/upload/binary") else ""
    if "/predictions/" in path:
        return "delete" if method == "DELETE" else "poll" if method == "GET" and path.endswith("/result") else ""
    return "download" if path.startswith("/outputs/") else ""


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = min(content_length(self.headers), _MOST_UPLOAD + 1)
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = server.answer(Request(self.command, self.path, headers, self.rfile.read(length)))
            with suppress(OSError):  # the client is gone
                self._send(answer)

        do_GET = do_POST = do_DELETE = do_PUT = _do  # noqa: N815 (the base class's names)

        def _send(self, answer: Answer) -> None:
            time.sleep(answer.wait)
            self.close_connection = True
            if answer.keep == 0:
                return
            content = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
            self.send_response(answer.status)
            usual = {"Content-Type": "application/json", "Content-Length": str(len(content))}
            for name, value in (usual | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            content = content[: answer.keep]
            for start in range(0, len(content), answer.block):
                self.wfile.write(content[start : start + answer.block])
                self.wfile.flush()
                time.sleep(answer.pause)

        def log_message(self, format: str, *args: Any) -> None:
            """Logs nothing: headers and signed URLs are secrets."""

    return Handler
