import ast
import dataclasses
import json
import re
import warnings

import pytest

from magi.config import (
    LATENT_SCALE,
    ONLY,
    PRESETS,
    SPATIAL_DOWNSAMPLE,
    TEMPORAL_DOWNSAMPLE,
    WITHOUT_MEANING,
    EngineConfig,
    MagiConfig,
    ModelConfig,
    RuntimeConfig,
)
from magi.errors import MagiError
from magi.runs.identity import config_settings
from magi.sampling.guidance import guidance_weights
from magi.vae.tiling import PATCH_FRAMES, PATCH_SIZE
from magi.vae.video_vae import SCALE
from tests.support.paths import GOLDEN, ROOT

CASES = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"]
OFFICIAL = CASES[0]["config"]

# The published configs: layers, hidden, ffn, heads, SwiGLU, latents duplicated, rescale, passes, steps
TABLE = {
    "4.5B_base": (34, 3072, 12288, 24, False, False, 1, 3, 64),
    "4.5B_distill": (34, 3072, 12288, 24, False, False, 1, 1, 64),
    "4.5B_distill_quant": (34, 3072, 12288, 24, False, False, 1, 1, 64),
    "24B_base": (48, 6144, 16384, 48, True, True, 0.1, 3, 32),
    "24B_distill": (48, 6144, 16384, 48, True, True, 0.1, 1, 16),
    "24B_distill_quant": (48, 6144, 16384, 48, True, True, 0.1, 1, 16),
}


def changed(part: str, **entries) -> dict:
    """The official object with some entries of one part changed; None removes one."""
    made = {k: v for k, v in (OFFICIAL[part] | entries).items() if v is not None}
    return OFFICIAL | {part: made}


# -- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_the_released_models(name):
    layers, hidden, ffn, heads, swiglu, duplicated, rescale, passes, steps = TABLE[name]
    config = MagiConfig.preset(name)
    m = config.model
    assert (m.num_layers, m.hidden_size, m.ffn_hidden_size, m.num_attention_heads) == (layers, hidden, ffn, heads)
    assert (m.gated_linear_unit, m.half_channel_vae, m.x_rescale_factor) == (swiglu, duplicated, rescale)
    assert (m.in_channels, m.out_channels) == ((32, 32) if duplicated else (16, 16))
    assert (m.kv_channels, m.num_query_groups, m.layernorm_epsilon) == (128, 8, 1e-6)
    assert (m.patch_size, m.t_patch_size, m.caption_max_length, m.caption_channels) == (2, 1, 800, 4096)
    assert m.cond_size == hidden // 4
    assert m.fc1_size == ffn * (2 if swiglu else 1)
    assert (config.runtime.cfg_number, config.runtime.num_steps) == (passes, steps)
    assert config.engine.distill == ("distill" in name)
    assert config.engine.fp8_quant == name.endswith("quant")
    assert (config.runtime.window_size, config.runtime.noise2clean_kvrange) == (4, (5, 4, 3, 2))


def test_all_presets_are_in_the_table():
    assert set(PRESETS) == set(TABLE)
    with pytest.raises(MagiError, match=r"no model '7B'.*4\.5B_base.*24B_distill_quant"):
        MagiConfig.preset("7B")


# -- the official JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_official_objects_survive_the_round_trip(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = MagiConfig.from_dict(case["config"]).to_dict()
    for part, entries in case["config"].items():
        assert {k: made[part][k] for k in entries} == entries
    assert json.loads(json.dumps(made)) == made


@pytest.mark.parametrize("name", PRESETS)
def test_files_survive_the_round_trip(name, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PRESETS[name].to_dict()), encoding="utf-8")
    assert MagiConfig.from_json(file) == PRESETS[name]
    assert MagiConfig.from_json(str(file)) == PRESETS[name]


def test_missing_entries_take_their_defaults():
    made = MagiConfig.from_dict(changed("runtime_config", window_size=None, cfg_t_range=None, fps=None))
    assert (made.runtime.window_size, made.runtime.fps) == (4, 24)
    assert made.runtime.cfg_t_range == (0, 0.0217, 0.1, 0.3, 0.999)


@pytest.mark.parametrize(("typo", "meant"), [("num_step", "num_steps"), ("windowsize", "window_size"), ("xyz", None)])
def test_unknown_entries_warn_with_a_suggestion(typo, meant):
    with pytest.warns(UserWarning, match=f"'{typo}' is unknown and ignored") as caught:
        made = MagiConfig.from_dict(changed("runtime_config", **{typo: 3}))
    assert made == MagiConfig.from_dict(OFFICIAL)
    message = str(caught[0].message)
    assert f"Did you mean '{meant}'?" in message if meant else "mean" not in message


def test_sizes_that_are_missing_are_named():
    with pytest.raises(MagiError, match="lacks num_layers, ffn_hidden_size in ModelConfig"):
        MagiConfig.from_dict(changed("model_config", num_layers=None, ffn_hidden_size=None))


@pytest.mark.parametrize(
    "data", [[], 3, {"model_config": 3}, {"model_config": OFFICIAL["model_config"], "runtime_config": [1]}]
)
def test_objects_that_are_no_config(data):
    with pytest.raises(MagiError, match="JSON object with model_config, runtime_config and engine_config"):
        MagiConfig.from_dict(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "unreadable"),
        (b"{", "unreadable"),
        (b"\xff\xfe", "unreadable"),
        (b"[]", "no MAGI-1 config"),
        (b'{"a": 1}', "no model_config"),
    ],
)
def test_files_that_are_no_config(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(MagiError, match=message) as caught:
        MagiConfig.from_json(file)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_in_another_encoding_is_read(encoding, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL), encoding=encoding)
    assert MagiConfig.from_json(tmp_path / "config.json") == MagiConfig.from_dict(OFFICIAL)


@pytest.mark.parametrize(
    ("part", "entries"),
    [
        ("model_config", {"num_layers": 10**12}),
        ("model_config", {"cond_hidden_ratio": 1e300}),
        ("runtime_config", {"window_size": 10**9}),
        ("runtime_config", {"num_steps": 0}),
        ("runtime_config", {"chunk_width": 0}),
        ("runtime_config", {"noise2clean_kvrange": [5, 10**100]}),
        ("runtime_config", {"text_scales": [1e300, 0.0, 0.0, 0.0, 0.0]}),
    ],
)
def test_numbers_that_no_model_has_are_named(part, entries):
    ((name, _),) = entries.items()
    with pytest.raises(MagiError, match=f"'{name}' is .*, which no model has") as caught:
        MagiConfig.from_dict(changed(part, **entries))
    assert len(str(caught.value)) < 300


def test_what_a_terminal_obeys_is_not_repeated():
    with pytest.warns(UserWarning, match="unknown and ignored") as caught:
        MagiConfig.from_dict(changed("model_config", **{"\x1b[2J" + "x" * 10**6: 1}))
    assert all(str(warning.message).isprintable() and len(str(warning.message)) < 300 for warning in caught)
    with pytest.raises(MagiError, match="of the wrong type") as error:
        MagiConfig.from_dict(changed("model_config", num_layers="\x1b" + "x" * 10**6))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_thousands_of_unknown_entries_are_not_warned_of_one_by_one():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MagiConfig.from_dict(changed("model_config", **{f"entry_{i}": 1 for i in range(5000)}))
    assert len(caught) <= 20


def test_no_config_file(tmp_path):
    with pytest.raises(MagiError, match=r"nowhere\.json.* unreadable"):
        MagiConfig.from_json(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("part", "entries"),
    [
        ("model_config", {"hidden_size": "256"}),
        ("model_config", {"num_layers": 3.0}),
        ("model_config", {"gated_linear_unit": "no"}),
        ("runtime_config", {"num_steps": "64"}),
        ("runtime_config", {"num_steps": True}),
        ("runtime_config", {"noise2clean_kvrange": 5}),
        ("runtime_config", {"noise2clean_kvrange": ["5"]}),
        ("runtime_config", {"cfg_t_range": {"a": 1}}),
        ("engine_config", {"distill": 1}),
        ("engine_config", {"shortcut_mode": ["8", "16"]}),
    ],
)
def test_entries_of_the_wrong_type_are_named(part, entries):
    ((name, value),) = entries.items()
    with pytest.raises(MagiError, match=f"'{name}' is {re.escape(repr(value))}, of the wrong type"):
        MagiConfig.from_dict(changed(part, **entries))


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("model_config", {"hidden_size": 250}, "hidden_size 250 is not num_attention_heads 16 x kv_channels 16"),
        ("model_config", {"num_layers": 0}, "num_layers is 0; it must be from 1 to 1000"),
        ("model_config", {"num_layers": 1001}, "num_layers is 1001; it must be from 1 to 1000"),
        ("model_config", {"patch_size": 0}, "patch_size is 0; it must be from 1"),
        ("model_config", {"caption_max_length": -1}, "caption_max_length is -1; it must be from 1"),
        ("model_config", {"num_query_groups": 5}, "16 is not a multiple of num_query_groups 5"),
        ("model_config", {"num_query_groups": 0}, "16 is not a multiple of num_query_groups 0"),
        ("runtime_config", {"cfg_number": 2}, "cfg_number is 2; it must be 3 .* or 1"),
        ("runtime_config", {"text_scales": [7.5, 0.0]}, "have 5, 5 and 2 entries"),
        ("runtime_config", {"noise2clean_kvrange": [5, 0]}, "at least 1"),
        ("runtime_config", {"clean_chunk_kvrange": 0}, "at least 1"),
        ("engine_config", {"shortcut_mode": "8,8,8"}, "'8,8,8'; it must be one of '8,16,16', '16,16,8'"),
        (
            "engine_config",
            {"distill": True},
            "distill is true but cfg_number is 3.*Set cfg_number to 1, or distill to false",
        ),
        (
            "runtime_config",
            {"cfg_number": 1},
            "distill is false but cfg_number is 1.*Set cfg_number to 3, or distill to true",
        ),
    ],
)
def test_settings_that_contradict(part, entries, message):
    with pytest.raises(MagiError, match=message):
        MagiConfig.from_dict(changed(part, **entries))


@pytest.mark.parametrize(
    ("part", "entries"),
    [
        ("model_config", {"model_name": "videodit"}),
        ("model_config", {"xattn_cond_hidden_ratio": 0.5}),
        ("model_config", {"cond_gating_ratio": 0.25}),
        ("model_config", {"t_patch_size": 2}),
        ("runtime_config", {"scale_factor": 0.13025}),
        ("runtime_config", {"temporal_downsample_factor": 8}),
    ],
)
def test_what_this_code_does_not_do_is_refused(part, entries):
    ((name, value),) = entries.items()
    with pytest.raises(MagiError, match=f"{name} is {value!r}, and this code does {ONLY[name]!r} only"):
        MagiConfig.from_dict(changed(part, **entries))
    assert name in ONLY


def names_read(file) -> set[str]:
    """What a file reads of objects: the x of every a.x; in config.py only what its properties read, not its checks."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if file.name == "config.py":
        decorated = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.decorator_list]
        tree = ast.Module(decorated, [])
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_entry_is_used_or_checked_or_said_to_be_without_meaning():
    parts = (ModelConfig, RuntimeConfig, EngineConfig)
    entries = [entry.name for part in parts for entry in dataclasses.fields(part)]
    assert len(entries) == len(set(entries)), "the tables go by name alone"
    assert not set(ONLY) & set(WITHOUT_MEANING)
    assert set(ONLY) | set(WITHOUT_MEANING) <= set(entries)
    read = set().union(*map(names_read, (ROOT / "magi").rglob("*.py")))
    assert [name for name in entries if name not in read | set(ONLY) | set(WITHOUT_MEANING)] == []
    assert all(WITHOUT_MEANING.values())


def test_settings_without_meaning_change_no_runs_identity():
    config = MagiConfig.from_dict(OFFICIAL)
    other = MagiConfig.from_dict(OFFICIAL | {"engine_config": OFFICIAL["engine_config"] | {"cp_size": 8}})
    assert other != config
    assert config_settings(other) == config_settings(config)


def test_the_only_values_are_those_of_the_vae():
    assert (LATENT_SCALE, TEMPORAL_DOWNSAMPLE, SPATIAL_DOWNSAMPLE) == (SCALE, PATCH_FRAMES, PATCH_SIZE)
    for config in PRESETS.values():
        assert all(
            getattr(part, n) == v
            for part in (config.model, config.runtime)
            for n, v in ONLY.items()
            if hasattr(part, n)
        )


# -- copies ----------------------------------------------------------------------------------------------------------


def test_copies_with_changes():
    base = MagiConfig.preset("24B_base")
    made = base.with_runtime(num_steps=8, num_frames=None)
    assert (made.runtime.num_steps, made.runtime.num_frames) == (8, base.runtime.num_frames)
    assert base.runtime.num_steps == 32
    assert base.with_engine(shortcut_mode="16,16,8").engine == EngineConfig(shortcut_mode="16,16,8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.runtime.num_steps = 3


def test_variants_change_passes_and_flags_together():
    base = MagiConfig.preset("24B_base")
    made = base.as_variant(distill=True, fp8=True)
    assert (made.engine.distill, made.engine.fp8_quant, made.runtime.cfg_number) == (True, True, 1)
    assert made.as_variant(distill=False, fp8=False) == base
    assert made.as_variant(distill=True) == made


def test_parts_can_be_made_by_hand():
    model = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, kv_channels=8)
    made = MagiConfig(model, RuntimeConfig(cfg_number=3))
    assert made == MagiConfig.from_dict(made.to_dict())


# -- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_replaces_the_scales_that_do_something():
    base = MagiConfig.preset("4.5B_base")
    made = base.with_guidance(text=5, prev=1.2).runtime
    assert made.text_scales == (5, 5, 5, 0, 0)
    assert made.prev_chunk_scales == (1.2, 1.2, 1.2, 1, 1)
    assert base.with_guidance(text=5).runtime.prev_chunk_scales == base.runtime.prev_chunk_scales
    assert base.with_guidance(prev=2).runtime.text_scales == base.runtime.text_scales
    assert base.with_guidance(text=0).runtime.text_scales == (0,) * 5
    assert base.with_guidance() == base


def test_guidance_reaches_the_shares_of_the_passes():
    made = MagiConfig.preset("4.5B_base").with_guidance(text=5, prev=1.2).runtime
    early, late = guidance_weights(0.05, made), guidance_weights(0.5, made)
    assert (early.text, early.prev, early.independent) == pytest.approx((5, -3.8, -0.2))
    assert (late.text, late.prev, late.independent) == (0, 1, 0)


def test_distilled_models_take_no_guidance():
    distilled = MagiConfig.preset("4.5B_distill")
    assert distilled.with_guidance() == distilled
    for scales in ({"text": 7.5}, {"prev": 1.5}, {"text": 0}):
        with pytest.raises(
            MagiError, match=r"Distilled models take no guidance \(\d.*Leave it out: 0 in the sampler node"
        ):
            distilled.with_guidance(**scales)


@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf")])
def test_guidance_that_is_no_strength(value):
    base = MagiConfig.preset("4.5B_base")
    with pytest.raises(MagiError, match=f"text guidance is {value}; it must be 0 or more"):
        base.with_guidance(text=value)
    with pytest.raises(MagiError, match=f"previous-chunk guidance is {value}; it must be 0 or more"):
        base.with_guidance(prev=value)
