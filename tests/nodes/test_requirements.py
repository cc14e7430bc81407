"""What a user reads whose ComfyUI or Python lacks something: one line that names it and the remedy."""

import asyncio
import importlib.metadata
import importlib.util
import sys
import time
import types
from pathlib import Path

import pytest

from tests.support.paths import ROOT

EVERY = [line.partition(">")[0] for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]


def load(file: Path, name: str, **options):
    spec = importlib.util.spec_from_file_location(name, file, **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def requirements(monkeypatch):
    monkeypatch.setitem(sys.modules, "pack_requirements", None)  # taken out again afterwards
    return load(ROOT / "nodes" / "comfyui" / "requirements.py", "pack_requirements")


@pytest.fixture
def lacking(monkeypatch):
    """Makes modules look as if they were not installed."""
    find = importlib.util.find_spec

    def lack(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a))

    return lack


@pytest.fixture
def comfyui(monkeypatch):
    """Puts a ComfyUI of some version there, by default the oldest that will do."""

    def put(version: str | None = "0.3.64", api: bool = True):
        module = types.ModuleType("comfyui_version")
        module.__version__ = version
        monkeypatch.setitem(sys.modules, "comfyui_version", module if version else None)
        for name in ("comfy_api", "comfy_api.latest"):
            module = types.ModuleType(name)
            module.__spec__ = importlib.util.spec_from_loader(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        if not api:
            monkeypatch.setitem(sys.modules, "comfy_api", None)  # importing it fails
            monkeypatch.delitem(sys.modules, "comfy_api.latest")

    put()
    return put


def test_nothing_is_said_where_everything_is_there(requirements, comfyui):
    before = set(sys.modules)
    start = time.perf_counter()
    requirements.check_comfyui()
    requirements.check_packages()
    assert time.perf_counter() - start < 0.5
    assert {name.partition(".")[0] for name in set(sys.modules) - before} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", EVERY)
def test_every_package_that_is_missing_is_named(requirements, lacking, name):
    lacking({"pillow": "PIL", "beautifulsoup4": "bs4"}.get(name, name))
    with pytest.raises(ImportError, match=rf"needs Python packages: {name} is missing\. Remedy: "):
        requirements.check_packages()


def test_the_remedy_is_a_command_for_comfyuis_own_python(requirements, lacking):
    lacking("einops", "ftfy")
    with pytest.raises(ImportError) as caught:
        requirements.check_packages()
    message = str(caught.value)
    assert "einops is missing, ftfy is missing. " in message
    assert f'run "{sys.executable}" -m pip install -r "{ROOT / "requirements.txt"}" and restart ComfyUI' in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("version", "fine"),
    [("4.44.0", True), ("4.44", True), ("5.0.0.dev0", True), ("4.100.1", True), ("4.43.9", False), ("3.5", False)],
)
def test_a_package_that_is_too_old_is_named_with_both_versions(requirements, monkeypatch, version, fine):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "transformers" else real(name))
    if fine:
        requirements.check_packages()
        return
    with pytest.raises(ImportError, match=rf"transformers is {version}, needs 4\.44 or newer"):
        requirements.check_packages()


def test_pip_is_not_sent_after_pytorch(requirements, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.4.1+cu121" if name == "torch" else real(name))
    with pytest.raises(ImportError, match=r"torch is 2\.4\.1\+cu121, needs 2\.5 or newer.*pytorch\.org") as caught:
        requirements.check_packages()
    assert "pip install" not in str(caught.value)


def test_a_package_without_a_version_counts_as_there(requirements, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    requirements.check_packages()


@pytest.mark.parametrize("version", ["0.3.63", "0.2.9", "0.3"])
def test_an_older_comfyui_is_refused(requirements, comfyui, version):
    comfyui(version)
    with pytest.raises(ImportError, match=rf"needs ComfyUI 0\.3\.64 or newer, this is {version}"):
        requirements.check_comfyui()


@pytest.mark.parametrize("version", ["0.3.64", "0.3.100", "0.8.0", "1.0.0rc1", None])
def test_a_newer_comfyui_and_one_of_unknown_version_are_fine(requirements, comfyui, version):
    comfyui(version)
    requirements.check_comfyui()


def test_a_comfyui_without_the_interface_is_refused(requirements, comfyui):
    comfyui(None, api=False)
    with pytest.raises(ImportError, match="this is older: update ComfyUI"):
        requirements.check_comfyui()


def load_pack(monkeypatch):
    for name in ("pack_root", "pack_root.nodes", "pack_root.nodes.comfyui", "pack_root.nodes.comfyui.requirements"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]  # monkeypatch now takes out what is put there
    return load(ROOT / "__init__.py", "pack_root", submodule_search_locations=[str(ROOT)])


def test_comfyui_is_told_in_one_line_and_can_go_on(monkeypatch, comfyui, lacking):
    lacking("einops")
    pack = load_pack(monkeypatch)
    assert (ROOT / pack.WEB_DIRECTORY / "docs").is_dir()
    with pytest.raises(ImportError, match=r"^MAGI-1 needs Python packages: einops is missing.*$"):
        asyncio.run(pack.comfy_entrypoint())
    comfyui("0.3.40")
    with pytest.raises(ImportError, match=r"needs ComfyUI 0\.3\.64"):
        load_pack(monkeypatch)
