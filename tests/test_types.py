"""Static types of the whole pack, and of what users of `import magi` get to see."""

import re
import shutil
import subprocess
import sys
import textwrap

from tests.support.paths import ROOT


def mypy(folder, *arguments: str) -> str:
    """What mypy says, run in a folder with the project's settings; nothing where all is well."""
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache", "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, *arguments]
    found = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    return found.stdout + found.stderr


def test_the_nodes_fit_the_pipeline(tmp_path):
    """The pack has the name of its folder, which need not be a name that Python can import: so it is given one."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("magi", "nodes"):
        shutil.copytree(ROOT / name, tmp_path / "pack" / name, ignore=ignored)
    shutil.copy(ROOT / "__init__.py", tmp_path / "pack")
    assert mypy(tmp_path, "--no-explicit-package-bases", "-p", "pack") == ""


def test_the_exports_are_typed(tmp_path):
    shutil.copytree(ROOT / "magi", tmp_path / "magi", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "user.py").write_text(
        textwrap.dedent(
            """
            import magi

            pipe = magi.MagiPipeline.from_files("a", "b", "c")
            for clip in pipe.generate(prompt="A cat", seconds=4):
                reveal_type(clip.frames)
            reveal_type(magi.MagiConfig.preset("4.5B_base").runtime.num_steps)
            magi.load_vae(path=3)
            magi.no_such_name
            """
        )
    )
    said = mypy(tmp_path, "user.py")
    assert 'Revealed type is "torch._tensor.Tensor"' in said
    assert re.search(r'user.py:7: note: Revealed type is "(builtins\.)?int"', said)
    assert 'Argument "path" to "load_vae" has incompatible type "int"' in said
    assert 'has no attribute "no_such_name"' in said
    assert said.count("error:") == 2, said
