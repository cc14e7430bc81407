import math
import sys
import types

import pytest
import torch

from magi.errors import MagiError
from magi.sampling.prepare import generate_latents
from magi.transformer.attention import attend, attention_choices, check_attention
from magi.transformer.rope import rope_angles, rotate

BANDS = torch.tensor([1.0, 0.3, 0.07, 0.013])  # head size 32


def angle(bands, frame, row, column, height, width) -> list[float]:
    """Returns the angles of one token by the formula, computed element by element."""

    def centred(index, n):
        r = n / math.sqrt(height * width / 256)
        return (index - (n - 1) / 2) * (r - 1) / (n - 1)

    return [x * band for x in (frame, centred(row, height), centred(column, width)) for band in bands.tolist()]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (2, 2), (3, 4), (45, 80), (2, 9)])
@pytest.mark.parametrize("first", [0, 18])
def test_angles_by_the_formula(first, height, width):
    got = rope_angles(BANDS, first, 2, height, width)
    wanted = [
        angle(BANDS.double(), first + t, h, w, height, width)
        for t in range(2)
        for h in range(height)
        for w in range(width)
    ]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_sixteen_tokens_square_are_the_plain_grid():
    got = rope_angles(torch.ones(1), 0, 1, 16, 16).reshape(16, 16, 3)
    torch.testing.assert_close(got[:, 0, 1], torch.arange(16) - 7.5)
    torch.testing.assert_close(got[0, :, 2], torch.arange(16) - 7.5)


def test_rotation_pairs_the_halves_and_leaves_the_rest(randn):
    x, angles = randn(5, 3, 32), randn(5, 12, seed=1)
    got = rotate(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :12], x[..., 12:24]) * torch.polar(torch.ones(5, 1, 12), angles[:, None])
    torch.testing.assert_close(got, torch.cat([pairs.real, pairs.imag, x[..., 24:]], dim=-1))


def test_only_the_distance_in_time_counts(randn):
    q, k = randn(1, 1, 32).double(), randn(1, 1, 32, seed=1).double()

    def score(frame_q, frame_k):
        a, b = (rope_angles(BANDS, f, 1, 4, 6)[7:8].double() for f in (frame_q, frame_k))
        return float((rotate(q, a.cos(), a.sin()) * rotate(k, b.cos(), b.sin())).sum())

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-2)


def explicit(q, k, v):
    """Computes softmax attention with the K/V of each group repeated for its consecutive query heads."""
    repeat = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(repeat, dim=0) for x in (k, v))
    scores = q.double() @ k.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("tokens", "kv_tokens"), [(1, 1), (7, 3), (24, 72)])
def test_attention_equals_the_explicit_softmax(heads, groups, tokens, kv_tokens, randn):
    q, k, v = randn(heads, tokens, 16), randn(groups, kv_tokens, 16, seed=1), randn(groups, kv_tokens, 16, seed=2)
    got = attend(q, k, v)
    assert got.shape == (tokens, heads * 16)
    torch.testing.assert_close(got.double(), explicit(q, k, v), rtol=1e-5, atol=1e-5)


def test_attention_takes_any_strides(randn):
    q = randn(24, 8, 16).transpose(0, 1)
    k, v = randn(2, 4, 90, 16)[:, :, 10:50]
    torch.testing.assert_close(attend(q, k, v).double(), explicit(q, k, v), rtol=1e-5, atol=1e-5)


# -- the choice of a kernel ------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def without_sage(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)


@pytest.fixture
def sage(monkeypatch):
    """A stand-in for the package: plain attention for the types and head sizes it takes; it lists the shapes it was
    given."""
    module = types.ModuleType("sageattention")
    module.shapes = []

    def sageattn(q, k, v, tensor_layout, is_causal):
        assert (tensor_layout, is_causal) == ("HND", False)
        assert q.dtype in (torch.float16, torch.bfloat16), (
            "Input tensors must be in dtype of torch.float16 or torch.bfloat16"
        )
        if q.shape[-1] > 128:
            raise ValueError(f"Unsupported head_dim: {q.shape[-1]}")
        module.shapes.append((tuple(q.shape), tuple(k.shape)))
        return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).to(q.dtype)

    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    return module


def test_choices_are_torchs_kernels_and_what_is_installed(without_sage):
    assert attention_choices() == ("auto", "flash", "efficient", "math")


def test_sage_is_a_choice_where_it_is_installed(sage):
    assert attention_choices() == ("auto", "flash", "efficient", "math", "sage")


def test_looking_for_sage_does_not_import_it(tmp_path, monkeypatch):
    (tmp_path / "sageattention.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    assert "sage" in attention_choices()


@pytest.mark.parametrize("choice", ["flash", "math"])
def test_every_kernel_gives_the_same(choice, randn):
    q, k, v = randn(8, 24, 16), randn(4, 72, 16, seed=1), randn(4, 72, 16, seed=2)
    check_attention(choice, CPU, torch.float32, 8, 4, 16)
    torch.testing.assert_close(attend(q, k, v, choice).double(), explicit(q, k, v), rtol=1e-5, atol=1e-5)


def test_a_kernel_that_cannot_run_is_refused_at_loading(tiny_config, tiny_model):
    with pytest.raises(MagiError, match=r"'efficient' does not run on cpu in float32 with heads of 8 .*Choose auto"):
        tiny_model(tiny_config(), attention="efficient")


def test_an_unknown_choice(without_sage, tiny_config, tiny_model):
    with pytest.raises(MagiError, match=r"no attention 'xformers'\. Choose one of auto, flash, efficient, math.$"):
        tiny_model(tiny_config(), attention="xformers")
    with pytest.raises(MagiError, match=r"no attention 'sage'.*install the package sageattention"):
        tiny_model(tiny_config(), attention="sage")


@pytest.mark.parametrize(
    ("dtype", "head_size", "reason"),
    [(torch.float32, 64, "Input tensors must be in"), (torch.bfloat16, 256, "Unsupported head_dim: 256")],
)
def test_what_sage_does_not_take_is_said_in_its_words(dtype, head_size, reason, sage):
    check_attention("sage", CPU, torch.bfloat16, 8, 4, 64)
    with pytest.raises(MagiError, match=f"'sage' does not run on cpu in .*heads of {head_size} .{reason}"):
        check_attention("sage", CPU, dtype, 8, 4, head_size)


def test_a_package_that_cannot_be_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "sageattention.py").write_text("raise ImportError('no triton here')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    with pytest.raises(MagiError, match=r"'sage' does not run on cpu .*\(no triton here\)"):
        check_attention("sage", CPU, torch.bfloat16, 8, 4, 64)


def test_the_choice_belongs_to_a_model(sage, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    config = tiny_config(True, num_steps=4, num_frames=24)

    def run(choice):
        model = tiny_model(config, dtype=torch.bfloat16, attention=choice)
        sage.shapes.clear()
        return next(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)).latents

    chosen = run("sage")
    groups, d = config.model.num_query_groups, config.model.kv_channels
    assert {k[2] for _, k in sage.shapes} == {24, 5 + 2}, (
        "self-attention to a chunk, cross-attention to words and tokens"
    )
    assert all((q[:2], k[:2], q[3]) == ((1, groups), (1, groups), d) for q, k in sage.shapes)
    own = run("auto")
    assert not sage.shapes
    assert 0 < float((chosen - own).norm() / own.norm()) < 2e-2


@pytest.mark.gpu
def test_attention_on_the_gpu(randn):
    q, k, v = randn(8, 24, 64), randn(4, 72, 64, seed=1), randn(4, 72, 64, seed=2)
    got = attend(*(x.cuda().bfloat16() for x in (q, k, v)))
    torch.testing.assert_close(got.cpu().double(), explicit(q, k, v), rtol=0, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["flash", "efficient", "math"])
def test_every_kernel_on_the_gpu(choice, randn):
    q, k, v = randn(8, 24, 64), randn(4, 72, 64, seed=1), randn(4, 72, 64, seed=2)
    check_attention(choice, torch.device("cuda"), torch.bfloat16, 8, 4, 64)
    got = attend(*(x.cuda().bfloat16() for x in (q, k, v)), choice)
    torch.testing.assert_close(got.cpu().double(), explicit(q, k, v), rtol=0, atol=2e-2)
