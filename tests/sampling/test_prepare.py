"""Every mistake in the arguments ends in one clear error, before anything is computed."""

import dataclasses
import re

import pytest
import torch

from magi.errors import MagiError
from magi.pipeline.request import Request, make_plan
from magi.sampling.captions import Caption, caption_per_chunk
from magi.sampling.prepare import generate_latents, make_sampler
from magi.sampling.schedule import Schedule
from magi.sampling.special_tokens import SpecialTokens


@pytest.fixture
def refuse(tiny_config, tiny_model, tiny_caption, tiny_tokens):
    """(pattern, **generate_latents') -> asserts that the call itself raises a MagiError with the pattern."""

    def check(pattern, config=None, **options):
        model = tiny_model(tiny_config())
        model.blocks = None  # nothing may be computed
        options = {"caption": tiny_caption(), "special_tokens": tiny_tokens} | options
        with pytest.raises(MagiError, match=pattern):
            generate_latents(model, config, **options)

    return check


@pytest.mark.parametrize(
    ("size", "pattern"),
    [
        ({"height": 40}, "eight 40.*32 and 48"),
        ({"width": 100}, "idth 100.*96 and 112"),
        ({"width": 721}, "idth 721.*720 and 736"),
        ({"height": 16}, "eight 16.*32"),
        ({"width": 16}, "idth 16.*32"),
        ({"width": 0}, "idth 0.*32"),
        ({"height": -64}, "eight -64.*32"),
    ],
)
def test_sizes_the_model_cannot_take(size, pattern, refuse):
    refuse(pattern, **size)


@pytest.mark.parametrize(("name", "frames"), [("noise", 24), ("prefix", 3)])
def test_sizes_of_tensors_that_the_model_cannot_take(name, frames, refuse, randn):
    refuse("40.*32 and 48", **{name: randn(1, 16, frames, 5, 4)})


@pytest.mark.parametrize("frames", [-24, -1, 0, 3])
def test_no_frames(frames, refuse):
    refuse(f"num_frames is {frames};.*at least 4", num_frames=frames)


@pytest.mark.parametrize("shape", [(1, 16, 18, 4, 4), (1, 16, 30, 4, 4), (1, 16, 23, 4, 4)])
def test_noise_of_another_length(shape, refuse, randn):
    refuse(rf"noise.*{re.escape(str(shape))}.*96 frames.*\(1, 16, 24, 4, 4\)", noise=randn(*shape))


def test_noise_that_does_not_count_the_prefix(refuse, randn):
    refuse(r"after 7 prefix latents.*\(1, 16, 36, 4, 4\)", noise=randn(1, 16, 24, 4, 4), prefix=randn(1, 16, 7, 4, 4))


@pytest.mark.parametrize("shape", [(16, 24, 4, 4), (2, 16, 24, 4, 4), (1, 4, 24, 4, 4), (1, 16, 0, 4, 4)])
@pytest.mark.parametrize("name", ["noise", "prefix"])
def test_tensors_that_are_no_latents(name, shape, refuse):
    refuse(rf"{name}.*{re.escape(str(shape))}.*\(1, 16, frames", **{name: torch.zeros(shape)})


def test_a_prefix_of_another_size(refuse, randn):
    refuse("prefix is 64x32 pixels, the video 32x32", noise=randn(1, 16, 30, 4, 4), prefix=randn(1, 16, 1, 4, 8))
    refuse("prefix is 64x32 pixels, the video 48x32", width=48, prefix=randn(1, 16, 1, 4, 8))
    refuse("noise is 32x32 pixels, the video 32x48", height=48, noise=randn(1, 16, 24, 4, 4))


@pytest.mark.parametrize("sizes", [{}, {"height": 48}, {"width": 64}, {"height": 48, "width": 64}])
def test_sizes_left_out_are_the_tensors(sizes, tiny_config, tiny_model, tiny_caption, tiny_tokens, randn):
    sampler = make_sampler(
        tiny_model(tiny_config(num_frames=24)),
        caption=tiny_caption(),
        special_tokens=tiny_tokens,
        prefix=randn(1, 16, 1, 6, 8),
        **sizes,
    )
    assert next(iter(sampler)).latents.shape == (1, 16, 6, 6, 8)


def test_captions_that_do_not_fit(refuse, tiny_caption):
    refuse("5 captions for 4 generated chunks", caption=[tiny_caption(i) for i in range(5)])
    refuse("list of captions is empty", caption=[])
    refuse("4096 channels, the model takes 12", caption=Caption(torch.zeros(5, 4096)))
    with pytest.raises(MagiError, match=r"\(1, 5, 12\)"):
        Caption(torch.zeros(1, 5, 12))
    with pytest.raises(MagiError, match=r"none \(NaN or infinity\) in the prompt's embeddings"):
        Caption(torch.full((5, 12), torch.inf))


def test_a_prefix_counts_no_captions(refuse, tiny_caption, randn):
    captions = [tiny_caption(i) for i in range(5)]
    refuse("5 captions for 4 generated chunks", caption=captions, prefix=randn(1, 16, 12, 4, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"duration_tokens": False},
        {"style_tokens": ()},
        {"style_tokens": (), "duration_tokens": False, "negative_tokens": True},
        {"caption": Caption(torch.zeros(0, 12)), "negative_tokens": True},
    ],
)
def test_special_tokens_missing_or_of_another_model(options, refuse, tiny_tokens):
    refuse("special-token file.*download special_tokens", special_tokens=None, **options)
    wide = SpecialTokens(*(torch.zeros(n, 4096) for n in (1, 1, 100)))
    refuse("4096 wide, the model's captions 12", special_tokens=wide, **options)


def test_special_tokens_are_asked_for_only_where_they_are_used(
    tiny_config, tiny_model, tiny_caption, tiny_tokens, randn
):
    model = tiny_model(tiny_config())
    plain = {"caption": tiny_caption(), "style_tokens": (), "duration_tokens": False}
    wide = SpecialTokens(*(torch.zeros(n, 4096) for n in (1, 1, 100)))
    for special in (None, tiny_tokens, wide):
        make_sampler(model, special_tokens=special, **plain)


def test_a_caption_of_no_tokens_fits_every_model(tiny_config, tiny_caption, tiny_tokens):
    for width in (1, 12, 4096):
        captions = [Caption(torch.zeros(0, width)), tiny_caption()]
        made = caption_per_chunk(captions, 4, tiny_config().model, tiny_tokens)
        assert [tuple(c.shape)[1] for c in made] == [12] * 4
        assert len(made[0]) == 0


def test_an_unknown_style(refuse):
    refuse("no style token 'cartoon'.*2d_anime", style_tokens=("hq", "cartoon"))


def test_steps_that_cannot_be_divided(refuse, tiny_config):
    refuse("10 steps.*8 or 12", tiny_config().with_runtime(num_steps=10))
    refuse("8 steps.*window of 3.*12", tiny_config().with_runtime(window_size=3))


def test_the_config_of_another_model(refuse, tiny_config):
    config = tiny_config()
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3))
    refuse("model_config is not the loaded model's", other)


def test_a_caption_that_is_too_long_is_cut_with_a_warning(tiny_config, tiny_model, tiny_caption, tiny_tokens):
    model = tiny_model(tiny_config())
    with pytest.warns(UserWarning, match="70 tokens; the model sees 60"):
        make_sampler(model, caption=tiny_caption(tokens=70), special_tokens=tiny_tokens)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("distill", [False, True], ids=["base", "distill"])
def test_every_run_has_the_schedule_that_its_memory_is_planned_for(
    distill, window, tiny_config, tiny_model, tiny_caption, tiny_tokens, randn
):
    config = tiny_config(distill, window_size=window)
    model, captions = tiny_model(config), [tiny_caption()]
    for prefix_frames in range(21):
        prefix = randn(1, 16, prefix_frames, 4, 4) if prefix_frames else None
        for seconds in (1, 1.5, 2, 3, 4):
            request = Request(captions=captions, latents=prefix, seconds=seconds, height=32, width=32)
            plan = make_plan(request, config, tiny_tokens)
            planned = Schedule.of_run(plan.config.runtime, prefix_frames)
            assert plan.run.schedule == planned
            sampler = make_sampler(
                model, plan.config, caption=tiny_caption(), special_tokens=tiny_tokens, prefix=prefix
            )
            assert sampler.total == len(planned)
            assert (plan.chunks, len(plan.captions)) == (planned.chunks - planned.prefix_chunks,) * 2
            hidden = 0 if prefix_frames == 1 else prefix_frames  # a single latent frame is an image
            assert plan.frames == (6 * planned.chunks - hidden) * 4 >= 24 * seconds
