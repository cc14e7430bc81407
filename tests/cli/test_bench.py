"""The benchmark and the count of operations behind it."""

import gc
import json
import math
import weakref
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from magi.checkpoint.writer import write_checkpoint
from magi.cli import measure
from magi.cli.main import main
from magi.cli.measure import BenchResult, BenchSettings, run_bench
from magi.config import PRESETS, MagiConfig
from magi.errors import MagiError
from magi.offload.kv_cache import KVCache
from magi.planning.cost import forward_flops, input_tokens
from magi.transformer.inputs import ChunkInput, Pass
from magi.transformer.random_weights import RandomTensors
from magi.transformer.weights import check_tensors

LONG = {"caption_max_length": 200}  # room for the caption that is timed


@pytest.fixture
def settings(tiny_config):
    """(**BenchSettings') of the tiny distilled model on the CPU, two steps a stage."""

    def make(**changes) -> BenchSettings:
        return BenchSettings(**({"config": tiny_config(distill=True, shape=LONG), "device": "cpu"} | changes))

    return make


# Counting operations


@pytest.mark.parametrize("gated", [False, True])
def test_the_count_equals_what_torch_counts(gated, tiny_config, tiny_model, tiny_caption):
    """All but what is outside the layers, the gates and the captions' keys, which are no more than a few rows each."""
    config = tiny_config(distill=True, shape={"gated_linear_unit": gated}, video_size_h=64, video_size_w=96)
    model = tiny_model(config)
    shape = model.shape
    caption = model.encode_caption(tiny_caption(tokens=7).embeds)
    cache = KVCache.for_run(model, 2, 8, 12)
    latents = torch.zeros(1, 16, 6, 8, 12)

    def run(*passes: Pass) -> float:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model.forward(passes, cache, 4.0)
        return counter.get_total_flops()

    clean = Pass((ChunkInput(0, latents, 0.9999, caption, 0, store=True, wanted=False),), conditional=True)
    run(clean)
    passes = (
        Pass((ChunkInput(1, latents, 0.5, caption, 0), ChunkInput(2, latents, 0.1, caption, 0)), conditional=True),
        Pass((ChunkInput(2, latents, 0.5, caption, 2),), conditional=True),
    )
    tokens, d, chunks = input_tokens(shape, passes[0].chunks[0]), shape.hidden_size, 3
    assert tokens == 6 * 4 * 6
    around = tokens * 64 * d * 2  # patch embedding and final layer: 16 channels x 2 x 2
    time = (256 + shape.cond_size) * shape.cond_size * 2 + shape.caption_channels * shape.cond_size
    gates = shape.num_layers * 2 * d * shape.cond_size
    keys = shape.num_layers * 7 * d * 2 * shape.num_query_groups * shape.kv_channels
    others = 2 * (chunks * (around + time + gates) + keys)
    assert forward_flops(shape, passes) + others == pytest.approx(run(*passes), rel=1e-6)


def test_a_chunk_that_sees_more_costs_more(tiny_config, tiny_caption):
    shape = tiny_config().model
    caption = type("Encoded", (), {"states": torch.zeros(5, shape.hidden_size)})
    one, two = (
        forward_flops(shape, [Pass((ChunkInput(3, torch.zeros(1, 16, 6, 4, 4), 0.5, caption, first),), False)])
        for first in (3, 2)
    )
    assert two - one == 2 * shape.num_layers * 24 * 2 * shape.hidden_size * 24


# Random weights


@pytest.mark.parametrize("fp8", [False, True])
def test_random_weights_have_the_official_layout_and_do_not_change(fp8, tiny_config):
    shape = replace(tiny_config().model, num_layers=3)
    source, again = RandomTensors(shape, fp8), RandomTensors(shape, fp8)
    check_tensors(source, shape, "random")
    for name in reversed(source.tensors):
        tensor, info = source.tensor(name), source.tensors[name]
        assert tuple(tensor.shape) == info.shape
        assert tensor.numel() * tensor.element_size() == info.nbytes
        same = again.tensor(name)
        assert torch.equal(tensor.float(), same.float()), name
        assert tensor.float().isfinite().all()
    name = "videodit_blocks.layers.0.mlp.linear_fc2.weight"
    assert not torch.equal(RandomTensors(shape, seed=1).tensor(name), source.tensor(name))


# Timing


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"chunks": 4, "iterations": 3, "warmup": 1}])
@pytest.mark.parametrize("distill", [True, False])
def test_all_figures_are_there(options, distill, settings, tiny_config):
    wanted = settings(config=tiny_config(distill=distill, shape=LONG), dtype=torch.float32, **options)
    loads, calls = [], []
    result = run_bench(wanted, lambda *x: loads.append(x), lambda *x: calls.append(x))
    iterations = options.get("iterations", 1)
    assert len(result.seconds) == iterations
    assert min(result.seconds) <= result.seconds_per_iteration <= max(result.seconds)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds_per_iteration)
    assert result.tflops_per_second == pytest.approx(result.tflop / result.seconds_per_iteration)
    assert result.active_chunks == options.get("chunks", 1)
    assert result.size == "32x32"
    assert result.weight_bytes == sum(i.nbytes for i in RandomTensors(wanted.config.model).tensors.values())
    assert result.peak_memory is None or result.peak_memory > result.weight_bytes
    assert result.heavy_share is None
    assert loads == ([] if "offload" in options else [(1, 2), (2, 2)])
    total = iterations + options.get("warmup", 0)
    assert {call[1] for call in calls} == {total}
    assert all(0 < fraction <= 1 for _, _, fraction in calls)
    assert calls[-1][0] == total - 1


def test_work_and_time_are_those_of_the_same_iteration(settings, monkeypatch):
    """The iteration that also takes in a finished chunk has more tokens; its work over another's time would flatter."""
    ticks = (2.0**n for n in count())  # each iteration takes twice as long as the one before
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    result = run_bench(settings(chunks=4, iterations=3, warmup=0))
    #  Stages have two steps, and it starts with the second: then come a first, which has one chunk more, and a second.
    assert result.seconds == sorted(result.seconds)
    assert result.seconds_per_iteration == result.seconds[1]
    chunk = 6 * 2 * 2
    assert result.tokens == 6 * chunk  # the window, the chunk just finished, the second view of the nearly clean one
    ticks = (2.0**n for n in count())
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    mixed = run_bench(settings(chunks=4, iterations=2, warmup=0))
    assert mixed.seconds_per_iteration == mixed.seconds[0]
    assert mixed.tokens == 5 * chunk
    assert mixed.tokens_per_second == mixed.tokens / mixed.seconds[0]


def test_the_profile_says_where_the_time_goes(settings):
    result = run_bench(settings(profile=True))
    assert result.heavy_share is not None
    assert 0.01 < result.heavy_share < 1
    assert 0 < len(result.heavy_operators) <= 10
    assert sum(result.heavy_operators.values()) <= 1.001
    assert any("mm" in name or "attention" in name for name in result.heavy_operators)


@pytest.mark.parametrize(
    ("changes", "runtime", "message"),
    [
        ({"chunks": 5}, {}, "5 active chunks.*window of 4.*1 to 4"),
        ({"chunks": 0}, {}, "0 active chunks.*1 to 4"),
        ({"iterations": 0}, {}, "0 iterations.*at least 1"),
        ({"warmup": -1}, {}, "-1 of warm-up"),
        ({"device": "tpu"}, {}, "'tpu'.*cpu"),
        ({}, {"video_size_h": 100}, "Height 100.*96 and 112"),
        ({}, {"num_steps": 10}, "10 steps.*8 or 12"),
        ({}, {"window_size": 3}, "window of 3"),
    ],
)
def test_bad_settings_are_refused_before_any_weights_are_made(changes, runtime, message, settings, monkeypatch):
    monkeypatch.setattr(measure, "load_transformer", lambda *_: pytest.fail("weights are made"))
    wanted = settings(**changes)
    with pytest.raises(MagiError, match=message):
        run_bench(replace(wanted, config=wanted.config.with_runtime(**runtime)))


def test_no_layers(settings, monkeypatch):
    monkeypatch.setattr(measure, "load_transformer", lambda *_: pytest.fail("weights are made"))
    wanted = settings()
    for layers in (0, -3):
        with pytest.raises(MagiError, match=f"{layers} layers"):
            run_bench(replace(wanted, config=wanted.config.with_layers(layers)))


def test_a_cancel_ends_it(settings):
    def cancel(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(settings(), on_load=cancel)
    with pytest.raises(KeyboardInterrupt):
        run_bench(settings(), on_progress=cancel)


# The command


RESULT = BenchResult(
    "cpu (x)", "2.5", "64x64", "random weights", 2, 192, [1.0, 3.0], 1.0, 192.0, 1.5, 1.5, 10**9, 2.0, None
)


@pytest.fixture
def result(monkeypatch):
    """What the command is given instead of a measurement: {"settings": ...} of its last call."""
    from magi.cli import bench as command

    seen = {}

    def measured(wanted, on_load, on_progress):
        seen["settings"] = wanted
        on_load(1, 2)
        on_progress(0, 3, 0.5)
        return seen.get("result", RESULT)

    monkeypatch.setattr(command, "run_bench", measured)
    return seen


def test_the_table(result, capsys):
    assert main(["bench", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for part in (
        "4.5B_distill",
        "1.00 GB",
        "64x64",
        "2 active",
        "192 tokens",
        "1.000 s",
        "192 tokens/s",
        "1.500 TFLOP/s",
    ):
        assert part in out
    assert "unknown" in out  # the peak memory
    result["result"] = replace(
        RESULT,
        peak_memory=7 * 10**9,
        heavy_share=0.9,
        heavy_operators={"aten::mm": 0.8, "aten::native_layer_norm": 0.1},
    )
    main(["bench", "--device", "cpu", "--profile"])
    out = capsys.readouterr().out
    assert "7.00 GB" in out
    assert "90.0%" in out
    assert "aten::mm" in out
    assert "aten::native_layer_norm 10.0%" in out


@pytest.mark.parametrize("given", [True, False])
def test_it_says_whose_weights_were_measured(given, settings, tiny_config, tmp_path, capsys, monkeypatch):
    config, file = tiny_config(distill=True, shape=LONG), tmp_path / "mine.safetensors"
    if given:
        write_checkpoint(RandomTensors(config.model), file)
    monkeypatch.setitem(PRESETS, "4.5B_distill", config)
    command = ["bench", "--device", "cpu", "--dtype", "fp32", *(["--model", str(file)] if given else [])]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    for said in (table, figures["weights"]):
        assert ("mine.safetensors" in said, "random" in said) == (given, not given)


def test_the_help_says_that_a_file_may_be_measured(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "with random weights or a file's" in said
    assert "random ones" in said.partition("--model PATH")[2]


def test_the_arguments_reach_the_settings(result):
    argv = "bench --preset 24B_base --size 640x368 --steps 8 --window 2 --chunks 2 --iterations 5 --warmup 2 --layers 3"
    assert main([*argv.split(), "--dtype", "fp32", "--offload", "--profile", "--device", "cpu"]) == 0
    wanted = result["settings"]
    runtime = wanted.config.runtime
    assert (runtime.video_size_w, runtime.video_size_h, runtime.num_steps, runtime.window_size) == (640, 368, 8, 2)
    assert (wanted.config.model.num_layers, wanted.config.model.hidden_size) == (3, 6144)
    assert (wanted.chunks, wanted.iterations, wanted.warmup) == (2, 5, 2)
    assert (wanted.device, wanted.dtype, wanted.offload, wanted.profile) == ("cpu", torch.float32, True, True)


def test_a_layer_of_a_real_model_as_json(capsys):
    assert main(["bench", "--layers", "1", "--size", "64x64", "--device", "cpu", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["preset"] == "4.5B_distill"
    assert figures["tokens"] == 96
    assert figures["weight_bytes"] > 2e8
    assert all(math.isfinite(figures[key]) for key in ("tokens_per_second", "tflops_per_second", "load_seconds"))
    weights = 2 * 3072**2 + 2 * 1024 * 3072 + 2 * 3072**2 + 2 * 3072 * 12288
    attention = 2 * 3072 * (96 + 120)
    assert figures["tflop"] * 1e12 == pytest.approx(2 * 96 * (weights + attention))


@pytest.mark.parametrize(("argument", "message"), [("100x64", "Width 100"), ("huge", "WIDTHxHEIGHT")])
def test_a_bad_size(argument, message, capsys):
    assert main(["bench", "--size", argument, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("preset", ["4.5B_base", "24B_distill_quant"])
def test_the_plans_peak_is_what_a_card_takes(preset, offload):
    config = MagiConfig.preset(preset).with_layers(6).with_runtime(video_size_h=480, video_size_w=832)
    result = run_bench(BenchSettings(config, "cuda", iterations=2, offload=offload))
    assert result.predicted_peak == pytest.approx(result.peak_memory, rel=0.1)
    assert result.layers_on_device == (0 if offload else 6)


@pytest.mark.gpu
def test_a_budget_is_kept():
    config = MagiConfig.preset("4.5B_base").with_layers(6).with_runtime(video_size_h=480, video_size_w=832)
    whole = run_bench(BenchSettings(config, "cuda", iterations=1))
    budget = int(whole.peak_memory * 0.8)
    result = run_bench(BenchSettings(config, "cuda", iterations=1, budget=budget))
    assert result.layers_on_device < 6
    assert result.peak_memory <= budget


def test_the_model_goes_with_its_last_user(settings, monkeypatch):
    """Without waiting for Python to look for cycles: a card's memory is needed for what comes next."""
    models = []
    load = measure.load_transformer

    def loaded(*arguments, **options):
        model = load(*arguments, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(measure, "load_transformer", loaded)
    gc.collect()
    gc.disable()
    try:
        run_bench(settings())
        assert [model() for model in models] == [None]
    finally:
        gc.enable()


def test_a_real_file_can_be_measured(settings, tiny_config, tmp_path):
    config = tiny_config(True, shape=LONG)
    write_checkpoint(RandomTensors(config.model, dtype=torch.float32), tmp_path / "model.safetensors")
    result = run_bench(settings(config=config, dtype=torch.float32, model=tmp_path / "model.safetensors", offload=True))
    assert (result.layers_on_device, result.layers) == (0, 2)
    assert result.fetched_bytes > 0
    assert len(result.seconds) == 1
    with pytest.raises(MagiError, match="does not hold the transformer its config describes"):
        run_bench(settings(config=tiny_config(True), model=tmp_path / "model.safetensors"))
