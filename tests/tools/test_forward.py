"""The training forward and its windows, held to the transformer and the sampler that run in the end."""

import dataclasses
import random
from dataclasses import replace

import pytest
import torch

from magi.config import ModelConfig
from magi.sampling.guidance import NEARLY_CLEAN_MIX, combine, guidance_weights
from magi.sampling.prepare import make_sampler
from magi.sampling.schedule import Schedule, time_grid
from magi.transformer.weights import tensor_shapes
from tests.conftest import TINY
from tools.train_embedded.components import USED
from tools.train_embedded.forward import TrainingTransformer
from tools.train_embedded.windows import WindowDrawer, collate, equal_lengths, window_alone, window_at

# Guidance scales (text, previous) that leave one pass alone; None are the model's own, which mix all three.
PASSES = {"guided": None, "text": (1.0, 1.0), "prev": (0.0, 1.0), "independent": (0.0, 0.0)}
CAPTION_TOKENS = (5, 0, 9, 3)  # per generated chunk; without tokens it is the null caption


@pytest.fixture
def trained(random_weights):
    """(ModelConfig) -> the training forward with the weights that `tiny_model` has."""

    def make(shape):
        model = TrainingTransformer(shape)
        model.load_state_dict(random_weights(shape))
        return model

    return make


class SampledRun:
    """A run of the sampler, and what the training forward says at each of its iterations."""

    def __init__(self, config, model, trained, captions, noise, prefix) -> None:
        self.config, self.trained, self.captions = config, trained, [c.embeds for c in captions]
        self.prefix_frames = 0 if prefix is None else prefix.shape[2]
        self.errors = []
        total = noise.shape[2] // 6
        self.schedule = Schedule.of(config.runtime, total, self.prefix_frames // 6)
        self.times = [float(t) for t in time_grid(config.runtime.num_steps, config.engine.shortcut_mode)]
        self.sampler = make_sampler(
            model,
            config,
            caption=captions,
            style_tokens=(),
            duration_tokens=False,
            noise=noise,
            prefix=prefix,
            num_frames=24 * total - 4 * self.prefix_frames,
            progress=self.compare,
        )
        for _ in self.sampler:
            pass
        assert len(self.errors) == len(self.schedule)

    def compare(self, event):
        it = self.schedule[event.iteration - 1]
        latents = dict(self.sampler.state.clean)
        latents |= dict(zip(it.chunks, event.latents.split(6, dim=2), strict=True))
        velocity = torch.cat(self.velocities(it, latents), dim=2)
        self.errors.append(float((velocity - event.velocity).norm() / event.velocity.norm()))

    def velocities(self, it, latents):
        """The velocity of each active chunk as the sampler mixes it from the passes."""
        arguments = (self.schedule, self.config)
        alone = self.forward(window_alone(it, *arguments, self.prefix_frames), latents)
        if self.config.engine.distill:
            found = self.forward(window_at(it, *arguments, "text", self.prefix_frames), latents)
            for chunk, v in alone.items():
                found[chunk] = NEARLY_CLEAN_MIX[0] * found[chunk] + NEARLY_CLEAN_MIX[1] * v
            return [found[chunk] for chunk in it.chunks]
        passes = {n: self.forward(window_at(it, *arguments, n, self.prefix_frames), latents) for n in ("text", "prev")}
        passes["independent"] = alone
        return [
            combine(
                guidance_weights(self.times[g], self.config.runtime),
                {name: found[chunk] for name, found in passes.items() if chunk in found},
            )
            for chunk, g in zip(it.chunks, it.grid, strict=True)
        ]

    def forward(self, window, latents):
        if not window:
            return {}
        batch = collate([window], 6)
        every = [*[torch.zeros(0, 12)] * self.schedule.prefix_chunks, *self.captions]
        every += every[-1:] * self.schedule.chunks  # the last of a short list is that of all later chunks
        lengths = torch.tensor([[len(caption) for caption in every]])
        padded = torch.nn.utils.rnn.pad_sequence(every, batch_first=True, padding_value=torch.nan)[None]
        inputs = torch.cat([latents[c.chunk] for c in window])[None]
        captions = batch.of_videos(padded)[:, :, : max(1, int(batch.lengths(lengths).max()))]
        with torch.no_grad():
            found = self.trained(inputs, captions=captions, lengths=batch.lengths(lengths), **batch.inputs())[0]
        return {c.chunk: v[None] for c, v in zip(window, found, strict=True) if not c.clean}


@pytest.fixture
def sampled(tiny_model, trained, tiny_caption, randn):
    """(MagiConfig, chunks, prefix_frames, size) -> the largest relative error of the training forward in a run."""

    def run(config, chunks, prefix_frames=0, size=(4, 4)):
        generated = chunks - prefix_frames // 6
        captions = [tiny_caption(i, tokens) for i, tokens in enumerate(CAPTION_TOKENS[:generated])]
        noise = randn(1, 16, 6 * chunks, *size)
        prefix = randn(1, 16, prefix_frames, *size, seed=1) if prefix_frames else None
        errors = SampledRun(config, tiny_model(config), trained(config.model), captions, noise, prefix).errors
        return max(errors)

    return run


@pytest.mark.parametrize("scales", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize(("chunks", "prefix_frames"), [(1, 0), (2, 1), (3, 9), (4, 6), (6, 0)])
def test_a_window_is_what_the_sampler_runs(chunks, prefix_frames, window, scales, tiny_config, sampled):
    config = tiny_config(window_size=window)
    if scales:
        text, prev = ((scale,) * 5 for scale in scales)
        config = config.with_runtime(text_scales=text, prev_chunk_scales=prev)
    assert sampled(config, chunks, prefix_frames) < 1e-5


@pytest.mark.parametrize("steps", [8, 12])
@pytest.mark.parametrize(("chunks", "prefix_frames", "window"), [(1, 0, 4), (3, 8, 2), (5, 0, 4), (4, 6, 1)])
def test_a_window_of_a_distilled_model(chunks, prefix_frames, window, steps, tiny_config, sampled):
    assert sampled(tiny_config(True, num_steps=steps, window_size=window), chunks, prefix_frames) < 1e-5


@pytest.mark.parametrize("distill", [False, True], ids=["base", "distill"])
@pytest.mark.parametrize("ranges", [{"noise2clean_kvrange": ()}, {"clean_chunk_kvrange": 2}], ids=["all", "clean 2"])
def test_other_ranges_of_chunks_seen(ranges, distill, tiny_config, sampled):
    assert sampled(tiny_config(distill, **ranges), 5, 7) < 1e-5


@pytest.mark.parametrize(
    "shape",
    [{"gated_linear_unit": True}, {"apply_layernorm_1p": False}, {"x_rescale_factor": 0.5}, {"num_query_groups": 8}],
    ids=str,
)
def test_other_shapes_of_the_model(shape, tiny_config, sampled):
    assert sampled(tiny_config(shape=shape), 3) < 1e-5


def test_an_oblong_picture(tiny_config, sampled):
    assert sampled(tiny_config(), 3, 2, size=(6, 10)) < 1e-5


def test_a_batch_gives_what_its_windows_give_alone(tiny_config, trained, randn):
    """Windows of other lengths, captions and padding beside it change nothing for a window."""
    drawer, rng = WindowDrawer(tiny_config(), windows=(1, 2, 4)), random.Random(0)
    windows = [drawer.draw(1 + i % 5, rng) for i in range(12)]
    model = trained(TINY)

    def run(chosen, tokens):
        batch = collate([windows[i] for i in chosen], 6)
        latents = torch.stack([randn(5, 16, 6, 4, 4, seed=i) for i in chosen])
        captions = torch.stack([randn(5, 70, 12, seed=f"caption {i}") for i in chosen])[:, :, :tokens]
        lengths = batch.lengths(torch.tensor([[4, 0, 7, 1, 3]]).expand(len(chosen), -1))
        inputs = batch.inputs() | {"captions": batch.of_videos(captions), "lengths": lengths}
        with torch.no_grad():
            return model(batch.of_videos(latents), **inputs)

    together = run(range(len(windows)), 60)
    assert together.isfinite().all()
    assert len({len(window) for window in windows}) > 2
    for i, window in enumerate(windows):
        torch.testing.assert_close(together[i, : len(window)], run([i], 7)[0], rtol=1e-4, atol=1e-5)
    groups = equal_lengths(windows)
    assert sorted(i for group in groups for i in group) == list(range(len(windows)))
    assert all(len({len(windows[i]) for i in group}) == 1 for group in groups)


def test_what_is_drawn(tiny_config):
    """All times, passes, prefixes and clean chunks of a run turn up, and nothing is learned from what is clean."""
    config = tiny_config(num_steps=16)
    drawer, rng = WindowDrawer(config, windows=(1, 2, 4), late=0), random.Random(0)
    windows = [drawer.draw(4, rng) for _ in range(3000)]
    active = [c for window in windows for c in window if not c.clean]
    times = torch.tensor([c.time for c in active])
    counts = torch.histc((times * 3 / (1 + 2 * times)).sqrt(), 16, 0, 1)  # back to steps, which are equally long
    assert counts.min() > 0.7 * counts.max()
    assert {c.prefix_frames for c in active} == set(range(6))
    assert {c.chunk for c in active} == set(range(4))
    assert all(c.time == config.runtime.clean_t and not c.captioned for w in windows for c in w if c.clean)
    assert {(c.captioned, c.conditional) for c in active} == {(True, True), (False, False)}
    assert {len(window) for window in windows} == {1, 2, 3, 4}
    apart = [w for w in windows if len(w) > 1 and all(c.first_seen == i for i, c in enumerate(w))]
    assert apart
    assert all(c.position == 0 and not c.captioned for w in apart for c in w if w[0].position == w[1].position)
    later = [c.time for _ in range(500) for c in replace(drawer, late=0.5).draw(1, rng) if not c.clean]
    assert sum(later) / len(later) > 1.3 * float(times.mean())
    on_grid = {float(t) for t in time_grid(16)}
    assert not {c.time for c in active} <= on_grid
    still = WindowDrawer(config, jitter=False)
    assert {c.time for _ in range(200) for c in still.draw(4, rng) if not c.clean} <= on_grid


def test_noise_and_loss_leave_the_prefix_alone(tiny_config, randn):
    config = tiny_config()
    schedule = Schedule.of(config.runtime, 3, 1)
    window = window_at(schedule[3], schedule, config, "text", prefix_frames=8)
    batch = collate([window], 6)
    n = len(window)
    clean, noise = randn(1, n, 16, 6, 4, 4), randn(1, n, 16, 6, 4, 4, seed=1)
    latents = batch.latents(clean, noise)
    assert [c.clean for c in window] == [True, False, False]
    assert torch.equal(latents[:, 0], clean[:, 0])
    assert torch.equal(latents[:, 1, :, :2], clean[:, 1, :, :2])
    t = window[1].time
    assert 0 < t < 1
    torch.testing.assert_close(latents[:, 1, :, 2:], t * clean[:, 1, :, 2:] + (1 - t) * noise[:, 1, :, 2:])
    velocity = clean - noise
    velocity[:, 0] += 5
    velocity[:, 1, :, :2] += 5
    assert float(batch.loss(velocity, clean, noise)) == 0
    velocity[:, 1, :, 2] += 1
    assert float(batch.loss(velocity, clean, noise)) == pytest.approx(1 / 10)  # of 4 + 6 frames
    later = dataclasses.replace(batch, times=torch.full_like(batch.times, 0.9))
    assert float(later.loss(velocity, clean, noise)) == pytest.approx(0.2 / 10)
    velocity[:, :, USED:] += 7  # empty channels
    assert float(batch.loss(velocity, clean, noise)) == pytest.approx(1 / 10)


def test_names_shapes_and_types_are_the_official_ones():
    state = TrainingTransformer(TINY).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == tensor_shapes(TINY)
    assert {x.dtype for x in state.values()} == {torch.float32}


def test_models_that_take_latents_twice_are_refused():
    with pytest.raises(ValueError, match="half_channel_vae"):
        TrainingTransformer(replace(TINY, half_channel_vae=True, in_channels=32, out_channels=32))


def loss_of(model, windows, clean, noise, captions, lengths):
    batch = collate(windows, 6)
    clean, noise = batch.of_videos(clean), batch.of_videos(noise)
    velocity = model(
        batch.latents(clean, noise),
        captions=batch.of_videos(captions),
        lengths=batch.lengths(lengths),
        **batch.inputs(),
    )
    return batch.loss(velocity, clean, noise)


@pytest.mark.parametrize("distill", [False, True], ids=["base", "distill"])
def test_gradients_reach_every_parameter_that_is_used(distill, tiny_config, trained, randn):
    drawer, rng = WindowDrawer(tiny_config(distill, num_steps=8)), random.Random(0)
    windows = [drawer.draw(3, rng) for _ in range(8)]
    model = trained(TINY)
    videos = [randn(8, 3, 16, 6, 4, 4, seed=seed) for seed in range(2)]
    loss_of(model, windows, *videos, randn(8, 3, 7, 12), torch.full((8, 3), 5)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A number added to the scores of all text tokens of a query changes nothing.
        without_effect = name.endswith("k_layernorm_xattn.bias")
        assert (parameter.grad.abs().max() > 1e-6) != without_effect, name
    rows = model.y_embedder.null_caption_embedding.grad.abs().amax(dim=1) > 0
    used = torch.zeros(60, dtype=torch.bool)
    used[:50], used[58], used[59] = True, True, not distill
    assert torch.equal(rows, used)


def test_two_videos_are_learned_by_their_captions(tiny_config, randn):
    """Only the caption tells which of the two videos the noise becomes."""
    shape = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=16,
        caption_channels=12,
        caption_max_length=16,
    )
    torch.manual_seed(0)
    model = TrainingTransformer(shape)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    drawer, rng = WindowDrawer(tiny_config(), passes={"text": 1.0}, no_prefix=1.0), random.Random(0)
    videos = randn(2, 2, 16, 1, 1, 1).expand(2, 2, 16, 6, 4, 4).repeat(4, 1, 1, 1, 1, 1)
    captions = randn(2, 1, 3, 12).repeat(4, 2, 1, 1)
    lengths, losses = torch.full((8, 2), 3), []
    for _ in range(160):
        windows = [drawer.draw(2, rng) for _ in range(8)]
        loss = loss_of(model, windows, videos, torch.randn_like(videos), captions, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # Clean latents and noise have a variance of one each, and the first velocity is zero.
    assert losses[0] == pytest.approx(2, rel=0.1)
    assert sum(losses[-10:]) / 10 < 0.4
