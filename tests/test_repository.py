"""The repository's own rules: who may import what, equal dependency lists, small files, and the script that runs it all."""

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import INTERRUPTIBLE

MODULES = sorted((ROOT / "magi").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "execution", "nodes"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def absolute_imports(file: Path) -> set[str]:
    """The top-level packages that a file imports by absolute name, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("file", MODULES, ids=relative)
def test_the_pipeline_knows_nothing_of_comfyui(file):
    assert not absolute_imports(file) & COMFYUI


@pytest.mark.parametrize("file", MODULES + NODES, ids=relative)
def test_the_package_is_imported_relatively(file):
    assert "magi" not in absolute_imports(file), "as a custom node it has another name"


@pytest.mark.parametrize("file", MODULES + NODES, ids=relative)
def test_no_file_grows_beyond_its_one_responsibility(file):
    """A file ends where its responsibility does; none has needed so many lines for one yet."""
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= 420


def test_import_magi_loads_nothing_heavy():
    heavy = {"torch", "numpy", "transformers", "av", "safetensors", "huggingface_hub"}
    code = f"import sys, magi; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_requirements_equal_the_project_dependencies():
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", pyproject(), re.MULTILINE | re.DOTALL)
    assert dependencies
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == sorted(ast.literal_eval(f"[{dependencies[1]}]"))
    assert not [line for line in lines if "==" in line], "ComfyUI has its own versions: pin nothing"


def test_version_and_license():
    assert re.search(r'^version = "\d+\.\d+\.\d+"$', pyproject(), re.MULTILINE)
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in license_text
    assert "Version 2.0, January 2004" in license_text


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_ci_runs_the_readme_test_command():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert text.startswith("#!")
    assert "run.py test" in text
    assert "\r" not in text
    if os.name != "nt":  # Windows has no such permission
        assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.fixture
def run():
    spec = importlib.util.spec_from_file_location("run_script", ROOT / "run.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls(run, monkeypatch, tmp_path):
    """What run.py would start, in an environment below `tmp_path` that is taken to exist."""
    started: list[list[str]] = []

    def call(command, **options):
        started.append([str(part) for part in command])
        return 0

    monkeypatch.setattr(run, "call", call)
    monkeypatch.setenv("MAGI_VENV", str(tmp_path / "env"))
    monkeypatch.delenv("MAGI_TORCH", raising=False)
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python.parent.mkdir(parents=True)
    python.touch()
    return started


def modules(calls) -> list[str]:
    return [" ".join(call[2:]) for call in calls]


def test_torch_comes_first_and_alone_and_nothing_twice(run, calls):
    assert run.main(["demo", "--out", "x y.mp4"]) == 0
    install = "pip install --quiet --disable-pip-version-check"
    assert modules(calls) == [
        f"{install} torch==2.13.0",
        f"{install} -r {ROOT / 'requirements.txt'}",
        "magi demo --out x y.mp4",
    ]
    assert calls[-1][-1] == "x y.mp4"
    calls.clear()
    run.main(["demo"])
    assert modules(calls) == ["magi demo"]


def test_tests_add_the_tools_and_run_every_check(run, calls):
    assert run.main(["test"]) == 0
    assert modules(calls)[2].endswith("requirements-dev.txt")
    assert modules(calls)[3:] == ["ruff format --check .", "ruff check .", "mypy", "pytest"]
    calls.clear()
    run.main(["test", "tests/test_x.py", "-k", "y"])
    assert modules(calls) == ["pytest tests/test_x.py -k y"]


def test_every_check_runs_and_a_failure_is_the_exit_status(capsys, run, calls, monkeypatch):
    run.main(["test", "-k", "nothing"])  # installs
    monkeypatch.setattr(run, "call", lambda command, **options: calls.append(command) or ("check" in command) * 3)
    calls.clear()
    assert run.main(["test"]) == 3
    assert len(calls) == 4
    assert "Failed: ruff check .\n" in capsys.readouterr().err


def test_another_torch_replaces_the_one_that_was_asked_for_before(run, calls, monkeypatch):
    run.main(["demo"])
    calls.clear()
    monkeypatch.setenv("MAGI_TORCH", "torch --index-url 'https://example.org/my wheels'")
    run.main(["demo"])
    assert modules(calls)[0].startswith("pip uninstall")
    if os.name != "nt":
        assert calls[1][-3:] == ["torch", "--index-url", "https://example.org/my wheels"]
    assert modules(calls)[2:] == ["magi demo"]  # the other packages stay


def test_an_interrupted_or_failed_install_is_repeated(run, calls, monkeypatch, tmp_path):
    succeed = run.call

    def fails_at_the_requirements(command, **options):
        return int("-r" in command) or succeed(command)

    monkeypatch.setattr(run, "call", fails_at_the_requirements)
    with pytest.raises(SystemExit, match=r"could not install requirements\.txt.*HTTPS_PROXY"):
        run.main(["demo"])
    monkeypatch.setattr(run, "call", succeed)
    calls.clear()
    run.main(["demo"])
    assert [name for name in modules(calls) if "torch" in name] == []
    assert len(calls) == 2
    (tmp_path / "env" / run.STAMP).write_text('{"torch": "torch==2.1', encoding="utf-8")
    calls.clear()
    run.main(["demo"])
    assert len(calls) == 3


def test_changed_requirements_are_installed(run, calls, tmp_path):
    run.main(["demo"])
    stamp = tmp_path / "env" / run.STAMP
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"requirements.txt": "older"}), encoding="utf-8")
    calls.clear()
    run.main(["demo"])
    assert len(calls) == 2
    assert "requirements.txt" in calls[0][-1]


def test_what_cannot_work_is_said_with_its_remedy(run, calls, monkeypatch, tmp_path):
    monkeypatch.setenv("MAGI_TORCH", "torch 'open quote")
    if os.name != "nt":
        with pytest.raises(SystemExit, match="MAGI_TORCH is"):
            run.main(["demo"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("MAGI_VENV", str(tmp_path / "new"))
    with pytest.raises(SystemExit, match=r"apt install python3-venv.*MAGI_VENV"):
        run.main(["demo"])
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"needs 3\.10"):
        run.main(["demo"])
    assert calls == []


def test_help_installs_nothing(run, calls, capsys):
    run.main([])
    run.main(["--help"])
    assert capsys.readouterr().out.count("MAGI_TORCH") == 2
    assert calls == []


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal to a process group")
def test_ctrl_c_leaves_the_command_time_to_finish_its_file(tmp_path):
    child = """
        import pathlib, sys, time
        try:
            print("ready", flush=True)
            time.sleep(20)
        except KeyboardInterrupt:
            time.sleep(0.6)
            pathlib.Path(sys.argv[1]).write_text("finished")
            sys.exit(7)
    """
    code = f"import run, sys; run.call([sys.executable, '-c', {textwrap.dedent(child)!r}, {str(tmp_path / 'file')!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **INTERRUPTIBLE,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (tmp_path / "file").read_text() == "finished"
    assert process.returncode == 130
    assert errors == ""
