"""`plan`: what a run would take, said before anything is loaded."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from magi.checkpoint.mapped_file import MappedFile
from magi.cli import main
from magi.cli import plan as command
from magi.config import MagiConfig
from magi.planning.cost import Machine
from magi.planning.footprint import kv_bytes, weight_sizes
from magi.planning.placement import MemoryOptions, place
from magi.transformer.float8 import Kernels
from magi.transformer.random_weights import RandomTensors

GB = 10**9


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """No tensor's numbers are asked for."""

    def loaded(*_):
        pytest.fail("a weight is read")

    monkeypatch.setattr(RandomTensors, "tensor", loaded)
    monkeypatch.setattr(MappedFile, "tensor", loaded)


@pytest.fixture
def plan(capsys):
    """(*arguments) -> (exit status, what was printed, what was complained about)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main.main(["plan", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err.strip()

    return run


@pytest.fixture(scope="module")
def quant() -> tuple:
    """24B distill fp8, five seconds at 720p: config, weights."""
    config = MagiConfig.preset("24B_distill_quant")
    run = config.with_runtime(video_size_h=720, video_size_w=1280, num_frames=120, window_size=4)
    return run, weight_sizes(RandomTensors(config.model, True).tensors, config.model, kernels=Kernels())


QUANT = ("--preset", "24B_distill_quant", "--size", "720p", "--seconds", 5, "--window", 4)


def rows(text: str) -> dict[str, str]:
    return {line[:14].strip(): line[15:] for line in text.splitlines() if line}


def gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


@pytest.mark.parametrize(("memory", "ram"), [("8GB", "64GB"), ("12GB", "16GB"), ("48GB", "64GB")])
def test_the_table_says_what_is_placed(memory, ram, plan, quant):
    status, text, _ = plan(*QUANT, "--memory", memory, "--ram", ram)
    config, sizes = quant
    p = place(config, sizes, int(memory[:-2]) * GB, free_host=int(ram[:-2]) * GB)
    table, fetched = rows(text), 48 - len(p.on_device)
    staying = sum(sizes.packed[i] for i in p.on_device)
    assert status == 0
    assert table["model"] == f"24B_distill_quant, {gb(sizes.total)} of weights in 48 layers"
    assert table["run"] == "1280x720, 120 frames, window of 4"
    assert (table["card"], table["free RAM"]) == (f"{memory[:-2]}.0 GB", f"{ram[:-2]}.00 GB")
    assert table["layers there"] == f"{len(p.on_device)} stay on the card, {gb(staying)}"
    assert table["streamed"].startswith(f"{fetched} layers, {p.slots if fetched else 0} on the card at a time, ")
    assert table["streamed"].endswith(gb(p.weight_bytes - staying - sizes.outer))
    assert table["work"].startswith(f"{gb(p.working_bytes)}, {p.token_block} tokens at a time")
    assert ("with the K/V cache" in table["work"]) == (p.cache == "device")
    assert table["peak"] == f"{gb(p.device_bytes)} predicted, {gb(p.needed_bytes)} with the reserve"
    cache = "the K/V cache" if p.cache == "host" else "no K/V cache"
    assert table["in RAM"] == f"{len(p.on_host)} layers and {cache}, {gb(p.host_bytes)}"
    from_file = fetched - len(p.on_host)
    assert table["from the file"] == f"{from_file} layers" + " at every step" * (from_file > 0)
    assert table["K/V cache"].startswith(f"{gb(48 * kv_bytes(config))} on the {p.cache}")
    assert table["slow-down"].startswith(f"{p.slowdown - 1:.0%} over")


def test_json_has_the_same(plan, quant):
    status, text, _ = plan(*QUANT, "--memory", "8GB", "--ram", "64GB", "--json")
    placed = place(*quant, 8 * GB, free_host=64 * GB)
    found = json.loads(text)
    assert status == 0
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()} == {
        **{name: value for name, value in vars(placed).items() if name != "run"},
        "device_bytes": placed.device_bytes,
        "needed_bytes": placed.needed_bytes,
    }


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--offload", "on"], {"streaming": True}),
        (["--cache", "host"], {"cache": "host"}),
        (["--token-block", 700], {"token_block": 700}),
        (["--offload", "off", "--cache", "device"], {"streaming": False, "cache": "device"}),
    ],
)
def test_what_is_fixed_by_hand(arguments, options, plan, quant):
    _, text, _ = plan(*QUANT, "--memory", "80GB", "--ram", "64GB", "--json", *arguments)
    placed = place(*quant, 80 * GB, MemoryOptions(**options), free_host=64 * GB)
    assert json.loads(text)["token_block"] == placed.token_block
    assert json.loads(text)["on_device"] == list(placed.on_device)
    assert json.loads(text)["cache"] == placed.cache


def test_the_forecast_is_for_the_machine_that_is_named(plan, quant):
    speeds = ("--tflops", 900, "--bus", 1.5, "--disk", 0.5)
    _, text, _ = plan(*QUANT, "--memory", "8GB", "--ram", "16GB", "--json", *speeds)
    placed = place(*quant, 8 * GB, free_host=16 * GB, machine=Machine(900, 1.5e9, 0.5e9))
    assert json.loads(text)["slowdown"] == placed.slowdown > 1.2
    _, table, _ = plan(*QUANT, "--memory", "8GB", "--ram", "16GB", *speeds)
    assert rows(table)["slow-down"].endswith("at 900 TFLOP/s, and 1.5 GB/s from RAM, 0.5 GB/s from the file")


def test_cards_without_float8_units_and_float8_storage(plan, quant):
    card = ("--memory", "80GB", "--json")
    _, with_units, _ = plan(*QUANT, *card)
    _, without, _ = plan(*QUANT, *card, "--no-fp8-units")
    assert json.loads(without)["working_bytes"] > json.loads(with_units)["working_bytes"]
    _, whole, _ = plan("--preset", "24B_base", *card)
    _, stored, _ = plan("--preset", "24B_base", *card, "--fp8-storage")
    assert json.loads(stored)["weight_bytes"] < 0.6 * json.loads(whole)["weight_bytes"]


def test_this_machine_is_asked_where_none_is_named(plan, monkeypatch):
    monkeypatch.setattr(command, "free_memory", lambda device: 6 * GB)
    monkeypatch.setattr(command, "free_host_memory", lambda: 9 * GB)
    _, text, _ = plan("--preset", "4.5B_base")
    assert rows(text)["card"].endswith(", 6.0 GB free")
    assert rows(text)["free RAM"] == "9.00 GB"
    monkeypatch.setattr(command, "free_memory", lambda device: None)
    monkeypatch.setattr(command, "free_host_memory", lambda: None)
    _, text, _ = plan("--preset", "4.5B_base")
    assert rows(text)["card"].endswith(", which has the host's own memory")
    assert rows(text)["free RAM"] == "unknown"
    assert rows(text)["layers there"].startswith("34 stay")


def test_the_models_own_window_may_give_way_and_one_that_is_asked_for_may_not(plan):
    run = ("--preset", "4.5B_base", "--size", "1280x720", "--memory", "3.2GB", "--ram", "64GB")
    status, text, _ = plan(*run)
    table = rows(text)
    assert status == 0
    assert "window of 2" in table["run"]
    assert "a window of 4 would not fit: the video differs" in text
    config = MagiConfig.preset("4.5B_base").with_runtime(video_size_h=720, video_size_w=1280, window_size=2)
    assert table["K/V cache"].startswith(gb(34 * kv_bytes(config)))
    status, text, error = plan(*run, "--window", 4)
    assert (status, text) == (1, "")
    assert "with a window of 4 needs about" in error
    assert "free are 3.2 GB" in error


def test_too_little_memory_is_an_error(plan):
    status, text, error = plan("--preset", "24B_base", "--memory", "2GB")
    assert (status, text) == (1, "")
    assert error.startswith("error: 1280x720 with a window of 4 or 2 or 1 needs about ")
    assert "Try a smaller size" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "12x"], "'12x'.*1280x720"),
        (["--size", "1000x700"], "700.*688 and 704"),
        (["--size", "0x0"], "0 is too small"),
        (["--seconds", "0"], "seconds is 0.*above 0"),
        (["--seconds", "-1"], "seconds is -1.*above 0"),
        (["--seconds", "nan"], "seconds is nan.*above 0"),
        (["--window", "0"], "window is 0.*from 1 to 1000"),
        (["--window", "5"], "64 steps.*window of 5.*Use 60 or 80"),
        (["--memory", "8"], "'8'.*5GB"),
        (["--memory", "0GB"], "'0GB'.*5GB"),
        (["--ram", "much"], "'much'.*5GB"),
        (["--token-block", "0"], "block of 0.*at least 1"),
        *(
            ([option, speed], f"{option} is {speed}: no speed.*from 0.000001")
            for option in ("--tflops", "--bus", "--disk")
            for speed in ("0", "-1", "nan", "inf")
        ),
    ],
)
def test_what_cannot_be_is_said(arguments, message, plan):
    status, text, error = plan("--preset", "4.5B_base", *arguments)
    assert (status, text) == (1, "")
    assert error.startswith("error: ")
    assert re.search(message, error), error


def test_a_file(plan, embedded_home):
    (home,) = embedded_home.glob("magi1-repeating-*")
    status, text, _ = plan("--model", home / "transformer", "--size", "320x192", "--seconds", 2, "--memory", "8GB")
    table = rows(text)
    assert status == 0
    assert table["model"].endswith("of weights in 2 layers")
    assert str(home / "transformer") in table["model"]
    assert table["run"] == "320x192, 48 frames, window of 4"
    assert table["layers there"].startswith("2 stay")


def test_a_file_that_is_not_there_or_something_else(plan, tmp_path, embedded_home):
    (home,) = embedded_home.glob("magi1-repeating-*")
    for path in (tmp_path / "none.safetensors", home / "vae"):
        status, text, error = plan("--model", path, "--memory", "8GB")
        assert (status, text) == (1, "")
        assert str(path) in error


@pytest.mark.parametrize("kind", ["a tensor is missing", "integers"])
def test_a_file_that_cannot_be_loaded_is_not_planned_for(kind, plan, tiny_config, random_weights, tmp_path):
    weights = random_weights(tiny_config().model)
    name = "videodit_blocks.layers.1.mlp.linear_fc1.weight"
    if kind == "integers":
        weights[name] = (weights[name] * 100).to(torch.int8)
    else:
        del weights[name]
    save_file(weights, tmp_path / "magi_base.safetensors")
    status, _, said = plan("--model", tmp_path / "magi_base.safetensors", "--memory", "8GB")
    assert status == 1
    assert "linear_fc1.weight" in said
