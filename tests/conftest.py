"""Shared by all tests: the golden files, and small models of random weights in any configuration."""

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magi.checkpoint.mapped_file import TensorInfo
from magi.config import EngineConfig, MagiConfig, ModelConfig, RuntimeConfig
from magi.model_files.load import load_transformer
from magi.model_files.repeating import repeating_files
from magi.remote.fake_server import FakeServer
from magi.sampling.captions import Caption
from magi.sampling.special_tokens import SpecialTokens
from magi.transformer.model import Transformer
from magi.transformer.weights import tensor_shapes
from tests.support.comfy_host import Comfy, open_comfy
from tests.support.paths import GOLDEN, ROOT
from tests.support.remote_service import KEY, Service

# Two tokens to a chunk's side, so that a forward takes milliseconds; every size differs from every other.
TINY = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    caption_channels=12,
    caption_max_length=60,
)
HEADER_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", getattr(torch, "float8_e4m3fn", None): "F8_E4M3"}


class RootIsNoTestPackage:
    """The repository is also a ComfyUI node pack; pytest must not import its __init__.py, which needs ComfyUI."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsNoTestPackage())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of recorded outputs of the public implementation."""
    return GOLDEN


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource", reason="only POSIX can limit the size of files")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """Within `file_size_limit(bytes)` no file of this process can grow beyond: the disk is full, for real."""
    return _file_size_limit


class MemorySource:
    """Named tensors in memory, as a mapped checkpoint gives them."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.tensors = {k: TensorInfo(tuple(v.shape), HEADER_TYPES[v.dtype], Path()) for k, v in weights.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.weights[name]


def noise_of(*shape: int, seed: str | int = 0) -> torch.Tensor:
    """Normal numbers that depend on nothing but `seed`."""
    number = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


@pytest.fixture(scope="session")
def randn() -> Callable[..., torch.Tensor]:
    return noise_of


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., dict[str, torch.Tensor]]:
    """(ModelConfig, fp8=False) -> a checkpoint's tensors, scaled so that every part shows in the output."""

    def weight(name: str, shape: tuple[int, ...], fp8: bool) -> torch.Tensor:
        if name.endswith("_scale"):
            return torch.full(shape, {"weight": 0.01, "input": 0.02}.get(name.split(".")[-1][:-6], 0.03))
        value = noise_of(*shape, seed=name)
        if name == "rope.bands":
            return value.abs()
        if name.endswith("null_caption_embedding"):
            return value
        if name.endswith("layer_norm.weight"):  # the ordinary norms, not the "1p" ones
            return 1 + 0.1 * value
        fan_in = value[0].numel() if value.dim() > 1 else 25
        value = value / fan_in**0.5
        return (value / 0.01).to(torch.float8_e4m3fn) if fp8 and len(shape) == 3 else value

    def make(shape: ModelConfig, fp8: bool = False) -> dict[str, torch.Tensor]:
        return {name: weight(name, size, fp8) for name, size in tensor_shapes(shape, fp8).items()}

    return make


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., MagiConfig]:
    """(distill=False, shape={}, engine={}, **runtime) -> settings of a small model: 8 steps, 32 x 32 pixels."""

    def make(distill: bool = False, shape: dict | None = None, engine: dict | None = None, **runtime) -> MagiConfig:
        defaults = {"num_steps": 8, "video_size_h": 32, "video_size_w": 32, "num_frames": 96}
        return MagiConfig(
            replace(TINY, **(shape or {})),
            RuntimeConfig(cfg_number=1 if distill else 3, **(defaults | runtime)),
            EngineConfig(distill=distill, **(engine or {})),
        )

    return make


@pytest.fixture(scope="session")
def tiny_model(random_weights) -> Callable[..., Transformer]:
    """(MagiConfig, fp8=False, **load_transformer's) -> a model of random float32 weights on the CPU."""

    def make(config: MagiConfig, fp8: bool = False, **options) -> Transformer:
        options = {"device": "cpu", "dtype": torch.float32} | options
        return load_transformer(MemorySource(random_weights(config.model, fp8)), config, **options)

    return make


@pytest.fixture(scope="session")
def tiny_caption() -> Callable[..., Caption]:
    """(seed, tokens=5) -> a caption for the small model."""
    return lambda seed=0, tokens=5: Caption(noise_of(tokens, TINY.caption_channels, seed=f"caption {seed}"))


@pytest.fixture(scope="session")
def tiny_tokens() -> SpecialTokens:
    """Special tokens for the small model."""
    width = TINY.caption_channels
    caption, logo, other = (noise_of(n, width, seed=f"tokens {i}") for i, n in enumerate((1, 1, 100)))
    return SpecialTokens(caption, logo, other)


@pytest.fixture(scope="session")
def embedded_home(tmp_path_factory) -> Path:
    """A folder with the photo model's files."""
    from transformers import T5EncoderModel  # noqa: F401

    gc.collect()
    gc.freeze()  # a text encoder collects garbage when it is closed: half the time of a test, for what never goes
    home = tmp_path_factory.mktemp("embedded")
    repeating_files(home)
    return home


@pytest.fixture
def comfy(tmp_path, embedded_home) -> Iterator[Comfy]:
    """The pack in ComfyUI's stand-in, or in the real one at COMFYUI_PATH; nothing in its folders but the photo model."""
    yield from open_comfy(tmp_path / "comfy", embedded_home)


@pytest.fixture(scope="session")
def remote_videos(tmp_path_factory) -> dict[str, bytes]:
    """Videos that fake servers have made already: a second each. The usual one is there from the start, for tests that count seconds."""
    server = FakeServer(key=KEY, statuses=())
    with server:
        Service(server, tmp_path_factory.mktemp("remote")).make()
        server.video_of({})()  # what is made where the settings are ignored
    return server.videos


@pytest.fixture
def service(tmp_path, remote_videos) -> Iterator[Service]:
    """A client and a server that speaks as the paid service does; checked in the end."""
    server = FakeServer(key=KEY, statuses=("processing",))
    server.videos = remote_videos
    with server:
        found = Service(server, tmp_path)
        yield found
        found.check()


@pytest.fixture
def node_server(remote_videos, monkeypatch) -> Iterator[FakeServer]:
    """A service for the remote node, and its key; it must not be asked for two tasks."""
    monkeypatch.setenv("WAVESPEED_API_KEY", KEY)
    found = FakeServer(key=KEY, statuses=("created", "processing"))
    found.videos = remote_videos
    monkeypatch.setenv("WAVESPEED_BASE_URL", found.url)  # else the node keeps the key from it
    with found:
        yield found
    assert found.count("submit") <= 1


@pytest.fixture
def quick(comfy, monkeypatch) -> None:
    """Looks follow each other faster than a user could bear."""
    polling = comfy.module("magi.remote.polling")
    limits = polling.Limits(poll_first=0.05, poll_most=0.1, retries=2, retry_first=0.01, retry_most=0.02)
    monkeypatch.setattr(comfy.module("magi.remote.client"), "Limits", lambda: limits)


@pytest.fixture
def reads(comfy, monkeypatch) -> list[str]:
    """What is read from disk, in order: "transformer", "vae"."""
    found: list[str] = []
    for module, function, name in (
        ("nodes.comfyui.models", "load_transformer", "transformer"),
        ("nodes.comfyui.models", "load_vae", "vae"),
    ):
        load = getattr(comfy.module(module), function)

        def counted(path, *args, load=load, name=name, **options):
            # On the meta device only the header is read.
            if "meta" not in args and options.get("device") != "meta":
                found.append(name)
            return load(path, *args, **options)

        monkeypatch.setattr(comfy.module(module), function, counted)
    return found
