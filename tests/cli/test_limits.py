"""Numbers and names without measure on the command line: one line that says what may be given, before anything runs."""

import re

import pytest

from magi.cli.main import main


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """(*arguments) -> the error; the command wrote nothing."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 1
        stderr = capsys.readouterr().err
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, stderr
        assert len(errors[0]) < 700
        assert list(tmp_path.iterdir()) == []
        return errors[0]

    return run


DAY = "at most 86400 (a day)"
MANY = "9" * 5000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seconds", "1e300"], DAY),
        (["--seconds", "86401"], DAY),
        (["--seconds", "nan"], "seconds is nan"),
        (["--seconds", "inf"], DAY),
        (["--seconds", "0"], "must be above 0"),
        (["--frames", "1" + "0" * 40], "(a day)"),
        (["--frames", "-1"], "must be above 0"),
        (["--size", "100000x64"], "Width 100000 is too large; the largest is 8192"),
        (["--size", f"64x{MANY}"], "is not understood"),
        (["--size", "0x64"], "too small"),
        (["--steps", "1" + "0" * 9], "from 1 to 1000"),
        (["--steps", "-4"], "from 1 to 1000"),
        (["--window", "1" + "0" * 9], "The window is 1000000000 chunks; it must be from 1 to 1000"),
        (["--window", "0"], "from 1 to 1000"),
        (["--memory", f"{MANY}GB"], "is not understood"),
        (["--memory", "1e300GB"], "is not understood"),
        (["--device", "meta"], "cannot compute on the device 'meta'"),
        (["--device", "fpga"], "cannot compute on the device 'fpga'"),
        (["--device", "x" * 5000], "There is no device"),
        (["--text-device", "meta"], "cannot compute on the device 'meta'"),
        (["--state-minutes", "nan"], "--state-minutes is nan"),
        (["--out", f"{'x' * 300}.mp4"], "cannot be a file's name"),
        (["--out", ""], "does not end in .mp4"),
        (["--crf", "99999999999999999999"], "from 1 (best) to 51"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_videos(arguments, said, refused):
    command = ["generate", "--prompt", "A red circle"]
    assert said in refused(*command, *arguments)
    if arguments[0] not in ("--memory", "--text-device"):  # the demo has no such options
        assert said in refused("demo", *arguments)


@pytest.mark.parametrize("seconds", ["1e300", "nan", "-1", "0"])
def test_how_much_of_a_clip_is_seen(seconds, refused, tmp_path):
    assert "continue_seconds is" in refused(
        "generate", "--prompt", "A red circle", "--video", "clip.mp4", f"--continue-seconds={seconds}"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--preset", "4.5B_distill", "--seconds", "1e300"], DAY),
        (["plan", "--preset", "4.5B_distill", "--window", "1000000000"], "from 1 to 1000"),
        (["plan", "--preset", "4.5B_distill", "--size", "100000x100000"], "too large"),
        (["plan", "--preset", "4.5B_distill", "--tflops", "1e308"], "--tflops is 1e+308"),
        (["plan", "--preset", "4.5B_distill", "--bus", "1e-320"], "no speed to forecast with"),
        (["plan", "--preset", "4.5B_distill", "--disk", "nan"], "no speed to forecast with"),
        (["plan", "--preset", "4.5B_distill", "--ram", f"{MANY}GB"], "is not understood"),
        (["plan", "--preset", "4.5B_distill", "--token-block", "-5"], "holds nothing"),
        (["bench", "--layers", "1000"], "4.5B_distill cannot have 1000 layers. Choose 1 to 34."),
        (["bench", "--preset", "24B_distill_quant", "--layers", "2"], "Choose 3 to 48."),
        (["bench", "--layers", "0"], "cannot have 0 layers"),
        (["bench", "--layers", "1", "--device", "meta"], "cannot compute on the device 'meta'"),
        (["bench", "--layers", "1", "--size", "100000x100000"], "too large"),
        (["synth", "--preset", "4.5B_distill", "--out", ""], "no place for a model"),
        (["synth", "--preset", "4.5B_distill", "--out", "s.bin"], "'s.bin' is no place for a model"),
        (["synth", "--preset", "4.5B_distill", "--out", "s.safetensors", "--seed", "9" * 40], "64 bits"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_other_commands(arguments, said, refused):
    assert said in refused(*arguments)


def test_memory_that_runs_out_outside_a_run_is_no_traceback(refused, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 60000000000 bytes.")

    monkeypatch.setattr("magi.cli.measure.load_transformer", full)
    assert "The memory is too small for this" in refused("bench", "--layers", "1", "--size", "256x256")


@pytest.mark.parametrize(
    "option",
    [
        ["--vae", "vae"],
        ["--text-encoder", "t5"],
        ["--tokenizer", "spiece.model"],
        ["--special-tokens", "a.npz"],
        ["--config", "config.json"],
        ["--variant", "base"],
    ],
    ids=lambda option: option[0],
)
@pytest.mark.parametrize("model", [[], ["--model", "embedded-photo"]], ids=["default", "photo"])
def test_files_of_a_model_that_is_not_asked_for(option, model, refused):
    """They were ignored: the user thought that another model was run."""
    error = refused("generate", "--prompt", "A red circle", *model, *option)
    assert re.search(rf"{option[0]} is for a model in files.*--model", error)
