"""What the ComfyUI registry and Manager get: the metadata, and the package that comfy-cli makes of the repository."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.support.paths import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = "magi1-local/magi1-local"
DEVELOPMENT = {
    "tests",
    "tools",
    "docs",
    "run.py",
    "requirements-dev.txt",
    ".ci",
    ".gitignore",
    ".gitattributes",
    ".comfyignore",
}


def git(*arguments, **options) -> str:
    return subprocess.run(["git", *map(str, arguments)], check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository of its own with what git would track of this one."""
    tracked = tmp_path_factory.mktemp("registry")
    folder = tracked / "pack"
    git("init", "--quiet", "--bare", tracked / "git")
    source = [f"--git-dir={tracked / 'git'}", f"--work-tree={ROOT}", "-c", "core.bare=false"]
    git(*source, "add", "--all", cwd=ROOT)
    git(*source, "checkout-index", "--all", f"--prefix={folder.as_posix()}/", cwd=ROOT)
    git("init", "--quiet", folder)
    git("-C", folder, "add", "--all")
    return folder


@pytest.fixture(scope="module")
def comfy_cli(checkout, tmp_path_factory):
    """Runs `comfy node COMMAND` in the checkout: nothing asked, nothing sent, nothing written to the user's home."""
    home = str(tmp_path_factory.mktemp("home"))
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {
        **dict.fromkeys(("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "APPDATA", "LOCALAPPDATA"), home),
        **dict.fromkeys(("DO_NOT_TRACK", "COMFY_NO_TELEMETRY"), "1"),
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), nowhere),
        "PYTHONUTF8": "1",  # it prints a check mark
        "PYTHONWARNINGS": "ignore",  # those of its own libraries
    }

    def run(command: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-json", "node", command],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        said = result.stdout + result.stderr
        assert result.returncode == 0, said
        assert not re.search("warning|error", said, re.IGNORECASE), said
        return said

    return run


@pytest.fixture(scope="module")
def package(checkout, comfy_cli, tmp_path_factory) -> Path:
    """The package as a user's ComfyUI gets it, unpacked."""
    comfy_cli("pack")
    folder = tmp_path_factory.mktemp("custom_nodes") / "magi1-local"
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        archive.extractall(folder)
    return folder


def test_the_registry_finds_nothing_to_complain_about(comfy_cli):
    assert "All validation checks passed" in comfy_cli("validate")


def test_the_metadata_arrive_in_the_registry(checkout):
    from comfy_cli.registry.config_parser import extract_node_configuration

    found = extract_node_configuration(str(checkout / "pyproject.toml"))
    project, comfy = found.project, found.tool_comfy
    assert re.fullmatch(r"[a-z](-?[a-z0-9])*", project.name)
    assert "comfyui" not in project.name
    assert project.description
    assert project.license.file == "LICENSE"
    assert project.urls.repository == f"https://github.com/{REPOSITORY}"
    assert project.urls.documentation.startswith(project.urls.repository)
    assert project.urls.issues == f"{project.urls.repository}/issues"
    assert project.supported_os == ["OS Independent"]
    assert project.supported_accelerators == ["GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Apple Metal"]
    assert (comfy.publisher_id, comfy.display_name) == (REPOSITORY.partition("/")[0], "MAGI-1")


@pytest.mark.parametrize(("key", "shape", "most"), [("Icon", 1, 400), ("Banner", 21 / 9, 1300)])
def test_the_pictures_lie_where_the_registry_is_told(key, shape, most):
    url = re.search(rf'^{key} = "(.*)"$', PYPROJECT, re.MULTILINE)[1]
    folder = f"https://raw.githubusercontent.com/{REPOSITORY}/main/"
    assert url.startswith(folder)
    file = ROOT / url.removeprefix(folder)
    width, height = Image.open(file).size
    assert width / height == pytest.approx(shape)
    assert width <= most
    assert file.stat().st_size < 256 * 1024


def test_the_least_comfyui_is_the_one_the_nodes_ask_for():
    spec = importlib.util.spec_from_file_location("pack_requirements", ROOT / "nodes" / "comfyui" / "requirements.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f'requires-comfyui = ">={module.COMFYUI}"' in PYPROJECT


def test_the_package_holds_what_runs_and_nothing_else(checkout, package):
    files = {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()}
    tracked = set(git("-C", checkout, "ls-files").splitlines())
    assert files == {file for file in tracked if file.partition("/")[0] not in DEVELOPMENT}
    folders = {"magi", "nodes", "web", "workflows", "subgraphs", "locales"}
    assert {file.partition("/")[0] for file in files} - {*folders} == {
        "__init__.py",
        "__main__.py",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "requirements.txt",
    }
    assert {"magi/assets/cat.jpg", "web/docs/Magi1Sampler.md", "nodes/extension.py"} <= files
    assert any(re.fullmatch(r"workflows/[^/]+\.json", file) for file in files)


def test_the_package_runs_without_the_repository_around_it(package, tmp_path):
    code = """
        import asyncio, folder_paths, importlib, importlib.util, pathlib, pkgutil, sys
        folder_paths.use_base(pathlib.Path(sys.argv[2]))
        file = sys.argv[1] + "/__init__.py"
        spec = importlib.util.spec_from_file_location("custom_pack", file, submodule_search_locations=[sys.argv[1]])
        pack = sys.modules["custom_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
        for module in pkgutil.walk_packages(pack.__path__, "custom_pack."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        assert sys.modules["custom_pack.magi.model_files.embedded"].DEMO_IMAGE.is_file()
        assert "magi" not in sys.modules
        print(*(node.GET_SCHEMA().node_id for node in nodes))
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), package, tmp_path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support" / "comfy_stand_in")},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    pages = {page.stem for page in (package / "web" / "docs").glob("*.md")}
    assert set(found.stdout.split()) == pages
