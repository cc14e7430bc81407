"""Makes the environment it needs, once, and runs MAGI-1 in it. Python 3.10 or newer is all that must be there.

    python run.py demo           a first video, with nothing downloaded but the packages
    python run.py test           format, lint, types and tests; with arguments: pytest with them
    python run.py COMMAND ...    any other `python -m magi COMMAND ...`

Environment variables:
    MAGI_TORCH   what pip installs as torch; default torch==2.13.0. Another build, for example:
                 torch --index-url https://download.pytorch.org/whl/cpu
    MAGI_VENV    the folder of the environment; default .venv beside this file
"""

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
STAMP = "magi-installed.json"  # in the environment: what was installed there
CHECKS = (["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"], ["pytest"])


def main(arguments):
    """Runs the command line `arguments` and returns the exit status."""
    if sys.version_info < (3, 10):  # noqa: UP036 (whoever has an older Python gets to read this)
        sys.exit(f"Error: this is Python {sys.version.split()[0]}; MAGI-1 needs 3.10 or newer: https://www.python.org")
    if not arguments or arguments[0] in ("-h", "--help"):
        return print(__doc__)
    testing = arguments[0] == "test"
    folder = Path(os.path.expanduser(os.environ.get("MAGI_VENV") or ROOT / ".venv")).absolute()  # noqa: PTH111
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        make_environment(folder)
    install(python, folder / STAMP, stages(os.environ.get("MAGI_TORCH") or "torch==2.13.0", testing))
    # The safe path keeps a folder `magi` in the user's working directory from being taken for the package.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    if not testing:
        return call([python, "-m", "magi", *arguments], env=environment)
    checks = [["pytest", *arguments[1:]]] if arguments[1:] else CHECKS
    statuses = [call([python, "-m", *check], env=environment, cwd=ROOT) for check in checks]
    failed = [shlex.join(check) for check, status in zip(checks, statuses, strict=True) if status]
    print("Failed: " + "; ".join(failed) if failed else "All checks passed.", file=sys.stderr)
    return max(statuses)


def make_environment(folder):
    """Makes the virtual environment `folder`, whole or not at all."""
    # On stderr, as all that is said here: stdout belongs to the command.
    print(f"Making the environment {folder} ...", file=sys.stderr)
    new, made = not folder.exists(), False
    try:
        made = importlib.util.find_spec("ensurepip") and not call([sys.executable, "-m", "venv", folder])
    finally:
        if new and not made:
            shutil.rmtree(folder, ignore_errors=True)
    if not made:
        remedy = "On Debian and Ubuntu: sudo apt install python3-venv. Or name another folder in MAGI_VENV."
        sys.exit(f"Error: {sys.executable} cannot make the environment {folder}. {remedy}")
    (folder / STAMP).unlink(missing_ok=True)  # left by an environment whose Python has gone


def stages(torch, testing):
    """Returns what to install, in order: (name, fingerprint, pip's arguments). torch goes first, so that nothing pulls another build."""
    try:  # on Windows a backslash is part of a path, not an escape
        torch_arguments = shlex.split(torch, posix=os.name != "nt")
    except ValueError as error:
        sys.exit(f"Error: MAGI_TORCH is {torch!r}: {error}. Give what would follow `pip install`.")
    files = [ROOT / name for name in ("requirements.txt", "requirements-dev.txt")[: 2 if testing else 1]]
    lists = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest(), ["-r", str(file)]) for file in files]
    return [("torch", torch, torch_arguments), *lists]


def install(python, stamp, stages):
    """Installs the stages that the file `stamp` does not record, and records each when it is done: an interrupted one is repeated."""
    try:
        done = dict(json.loads(stamp.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        done = {}
    for name, fingerprint, arguments in stages:
        if done.get(name) == fingerprint:
            continue
        print(f"Installing {f'{fingerprint} (100 MB to 3 GB)' if name == 'torch' else name} ...", file=sys.stderr)
        if name == "torch" and name in done:  # pip takes another build of the same version for the wanted one
            stamp.write_text(json.dumps({**done, name: None}), encoding="utf-8")
            call([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torch"])
        if call([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]):
            remedy = f"Check the network (a proxy goes in HTTPS_PROXY), or the torch named in MAGI_TORCH; or delete {stamp.parent}"
            sys.exit(f"Error: pip could not install {name}; its reason stands above. {remedy} and run this again.")
        done[name] = fingerprint
        stamp.write_text(json.dumps(done), encoding="utf-8")


def call(command, **options):
    """Runs `command` and returns its exit status. Ctrl-C reaches it too: it gets the time to finish its files, then this ends quietly."""
    child = subprocess.Popen([str(part) for part in command], **options)  # noqa: S603 (a list: no shell reads it)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    interrupted = False
    while child.returncode is None:
        try:
            child.wait()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and child.returncode:
        sys.exit(130)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode  # by a signal: as a shell reports it


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
