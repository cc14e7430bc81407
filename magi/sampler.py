"""The chunk loop: denoises a sliding window of chunks and yields each one when it is clean (paper section 2.3).

All that a run is lies in its `SamplerState`: the place in the schedule, the latents in the window and the last clean chunks.
A run that is started from a copy of a state goes on exactly as the run it was taken from, for the keys of clean chunks depend
on nothing but those chunks; the cache is filled from them again, by the very code that takes in a given video's first chunks.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .config import LATENT_CHANNELS, SPATIAL_DOWNSAMPLE, MagiConfig
from .errors import MagiError
from .guidance import NEARLY_CLEAN_MIX, PassName, combine, guidance_weights, is_nearly_clean, needed
from .kv_cache import KVCache
from .model import ChunkInput, EncodedCaption, Pass, Transformer
from .prompt import Caption, caption_per_chunk, null_caption
from .schedule import Iteration, Schedule, step_size_signal, time_grid
from .special_tokens import SpecialTokens


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: index from the first generated one, latents (1, 16, t, h, w) float32 without given frames."""

    index: int
    latents: torch.Tensor


@dataclass(frozen=True)
class ProgressEvent:
    """What happened in a forward iteration, for progress bars and previews (latents + (1 - t) * velocity).

    Attributes:
        iteration: iterations done, this one included.
        total: iterations of the run.
        first_chunk: index of the first active chunk, from the first generated one.
        timesteps: of each active chunk, before the step.
        latents: (1, 16, n * W, h, w), the n active chunks before the step.
        velocity: like latents, guided.
    """

    iteration: int
    total: int
    first_chunk: int
    timesteps: tuple[float, ...]
    latents: torch.Tensor
    velocity: torch.Tensor


Progress = Callable[[ProgressEvent], None]


@dataclass
class SamplerState:
    """Everything a run needs beside its settings to go on.

    Attributes:
        iteration: forward iterations done.
        window: active chunks' latents by chunk, (1, 16, W, h, w) float32.
        clean: the last finished (or given) chunks as the model is to see them, by chunk.
    """

    iteration: int = 0
    window: dict[int, torch.Tensor] = field(default_factory=dict)
    clean: dict[int, torch.Tensor] = field(default_factory=dict)

    def copy(self) -> "SamplerState":
        """An independent state; tensors are replaced, never written to, and may be shared."""
        return SamplerState(self.iteration, dict(self.window), dict(self.clean))

    @property
    def nbytes(self) -> int:
        """Bytes of all latents held."""
        return sum(x.numel() * x.element_size() for x in (*self.window.values(), *self.clean.values()))


class Noise:
    """Initial latents, chunk by chunk: given whole, or drawn from (seed, chunk) so that a video's start does not depend on its length."""

    def __init__(self, shape: tuple[int, ...], seed: int, given: torch.Tensor | None = None) -> None:
        """`shape` is a chunk's, (1, 16, W, h, w); `given` all chunks' side by side."""
        self._shape = shape
        self._seed = seed
        self._given = given

    def chunk(self, index: int) -> torch.Tensor:
        """Noise of one chunk, float32 on the CPU."""
        width = self._shape[2]
        if self._given is not None:
            return self._given[:, :, index * width : (index + 1) * width].float().clone()
        digest = hashlib.sha256(f"{self._seed}/{index}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(self._shape, generator=generator)


class Sampler:
    """One run. Iterate over it for the finished chunks; `state` can be copied between two of them and given to another run."""

    def __init__(
        self,
        model: Transformer,
        config: MagiConfig,
        schedule: Schedule,
        noise: Noise,
        captions: Sequence[torch.Tensor],
        null: torch.Tensor,
        prefix: torch.Tensor | None = None,
        state: SamplerState | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`captions` are those of the generated chunks, `prefix` (1, 16, Tp, h, w); `generate_latents` checks and builds all this."""
        self._model = model
        self._config = config
        self._schedule = schedule
        self._noise = noise
        self._prefix = prefix
        self._progress = progress
        self._times = [float(t) for t in time_grid(schedule.num_steps, config.engine.shortcut_mode)]
        self._captions = captions
        self._encoded: dict[int, EncodedCaption] = {}
        self._null = model.encode_caption(null)
        self._cache: KVCache | None = None
        self.state = state or self._first_state()

    @property
    def nbytes(self) -> int:
        """Bytes of latents and of the cache: they do not grow with the video."""
        return self.state.nbytes + (self._cache.nbytes if self._cache else 0)

    def __iter__(self) -> Iterator[Chunk]:
        with torch.inference_mode():
            self._fill_cache()
        while self.state.iteration < len(self._schedule):
            with torch.inference_mode():
                chunk = self._iterate(self._schedule[self.state.iteration])
            if chunk is not None:
                yield chunk

    # -- one iteration -----------------------------------------------------------------------------------------------

    def _iterate(self, it: Iteration) -> Chunk | None:
        state = self.state.copy()
        for chunk in it.chunks:
            latents = state.window[chunk] if chunk in state.window else self._noise.chunk(chunk).to(self._model.device)
            state.window[chunk] = self._with_prefix(chunk, latents)
        distilled = self._config.engine.distill
        velocities = (self._one_pass if distilled else self._three_passes)(it, state)
        if self._progress:
            self._report(it, state, velocities)
        for chunk, velocity, g in zip(it.chunks, velocities, it.grid, strict=True):
            state.window[chunk] = state.window[chunk] + velocity * (self._times[g + 1] - self._times[g])
        finished = None
        if it.finishes is not None:
            latents = state.window.pop(it.finishes)
            finished = self._finish(it.finishes, latents)
            state.clean[it.finishes] = self._with_prefix(it.finishes, latents)
            for chunk in [c for c in state.clean if c <= it.finishes - max(1, self._schedule.replayed_chunks)]:
                del state.clean[chunk]
        state.iteration += 1
        self.state = state
        return finished

    def _three_passes(self, it: Iteration, state: SamplerState) -> list[torch.Tensor]:
        """Guided velocities of base models. Passes and chunks whose result has no weight are left out."""
        weights = [guidance_weights(self._times[g], self._config.runtime) for g in it.grid]
        passes: list[Pass] = []
        slots: list[
            tuple[PassName, list[int]]
        ] = []  # per pass: its name and the active chunks it holds, -1 the refresh
        for name in ("text", "prev"):
            wanted = [getattr(w, name) != 0 for w in weights]
            made, chunks = self._context_pass(it, state, wanted, conditional=name == "text", store=name == "prev")
            if chunks:
                passes.append(made)
                slots.append((name, chunks))
        for i, (chunk, g) in enumerate(zip(it.chunks, it.grid, strict=True)):
            if weights[i].independent:
                alone = ChunkInput(0, state.window[chunk], self._times[g], self._null, first_key=0)
                passes.append(Pass((alone,), conditional=False))
                slots.append(("independent", [i]))
        found: list[dict[PassName, torch.Tensor]] = [{} for _ in it.chunks]
        for (name, chunks), velocities in zip(slots, self._forward(passes), strict=True):
            for i, velocity in zip(chunks, velocities, strict=True):
                if i >= 0 and velocity is not None:
                    found[i][name] = velocity
        return [combine(w, f) for w, f in zip(weights, found, strict=True)]

    def _one_pass(self, it: Iteration, state: SamplerState) -> list[torch.Tensor]:
        """Velocities of distilled models: the oldest chunk, once nearly clean, is mixed with a view of itself alone."""
        made, chunks = self._context_pass(it, state, [True] * len(it.chunks), conditional=True, store=True)
        passes = [made]
        t = self._times[it.grid[0]]
        mix = is_nearly_clean(t, self._config.engine.distill_nearly_clean_chunk_threshold)
        if mix:
            oldest = made.chunks[chunks.index(0)]
            alone = ChunkInput(oldest.chunk, oldest.latents, t, oldest.caption, first_key=oldest.chunk)
            passes.append(Pass((alone,), conditional=True))
        results = self._forward(passes, it.step)
        velocities = [v for v in results[0] if v is not None]
        if mix:
            alone_velocity = results[1][0]
            assert alone_velocity is not None  # noqa: S101 (it was wanted)
            velocities[0] = NEARLY_CLEAN_MIX[0] * velocities[0] + NEARLY_CLEAN_MIX[1] * alone_velocity
        return velocities

    def _context_pass(
        self, it: Iteration, state: SamplerState, wanted: list[bool], conditional: bool, store: bool
    ) -> tuple[Pass, list[int]]:
        """The pass over active chunks that see one another and the cache, and which of them are in it (-1: the refresh)."""
        first = [self._schedule.first_key(c, g) for c, g in zip(it.chunks, it.grid, strict=True)]
        compute = needed(wanted, [f - it.chunks[0] for f in first])
        inputs: list[ChunkInput] = []
        places: list[int] = []
        if it.refresh is not None:
            seen = any(c and f <= it.refresh for c, f in zip(compute, first, strict=True))
            if store or seen:
                inputs.append(self._clean_input(it.refresh, state.clean[it.refresh], store))
                places.append(-1)
        for i, chunk in enumerate(it.chunks):
            if compute[i]:
                caption = self._caption(chunk) if conditional else self._null
                t = self._times[it.grid[i]]
                inputs.append(ChunkInput(chunk, state.window[chunk], t, caption, first[i], wanted=wanted[i]))
                places.append(i)
        return Pass(tuple(inputs), conditional), places

    def _clean_input(self, chunk: int, latents: torch.Tensor, store: bool = True) -> ChunkInput:
        t = self._config.runtime.clean_t
        first = self._schedule.first_clean_key(chunk)
        return ChunkInput(chunk, latents, t, self._null, first, store=store, wanted=False)

    def _forward(self, passes: Sequence[Pass], step: int = 0) -> list[list[torch.Tensor | None]]:
        engine = self._config.engine
        signal = step_size_signal(self._schedule.num_steps, step, engine.shortcut_mode) if engine.distill else None
        assert self._cache is not None  # noqa: S101 (made when the iteration began)
        return self._model.forward(passes, self._cache, signal)

    # -- around it ---------------------------------------------------------------------------------------------------

    def _first_state(self) -> SamplerState:
        """Nothing done; the whole chunks of the prefix that later ones can see are clean."""
        given = self._schedule.prefix_chunks
        first = max(0, given - self._schedule.replayed_chunks)
        width = self._config.runtime.chunk_width
        clean = {}
        for chunk in range(first, given) if self._prefix is not None else ():
            clean[chunk] = self._prefix[:, :, chunk * width : (chunk + 1) * width].to(self._model.device, torch.float32)
        return SamplerState(clean=clean)

    def _fill_cache(self) -> None:
        """Runs the clean chunks of the state through the model for their keys. The pass they are cached from is the model's own."""
        *_, height, width = (
            self._noise.chunk(0).shape if not self.state.window else next(iter(self.state.window.values())).shape
        )
        self._cache = self._model.new_cache(self._schedule.cached_chunks, height, width)
        if self.state.iteration >= len(self._schedule):
            return
        coming = self._schedule[self.state.iteration].refresh  # will be shown to the model anyway
        for chunk in sorted(self.state.clean):
            if chunk != coming:
                clean = self._clean_input(chunk, self.state.clean[chunk])
                self._forward([Pass((clean,), conditional=self._config.engine.distill)])

    def _caption(self, chunk: int) -> EncodedCaption:
        embeds = self._captions[chunk - self._schedule.prefix_chunks]
        if not len(embeds):
            return self._null
        if id(embeds) not in self._encoded:
            alive = {id(self._captions[c - self._schedule.prefix_chunks]) for c in self.state.window}
            self._encoded = {key: value for key, value in self._encoded.items() if key in alive}
            self._encoded[id(embeds)] = self._model.encode_caption(embeds)
        return self._encoded[id(embeds)]

    def _with_prefix(self, chunk: int, latents: torch.Tensor) -> torch.Tensor:
        """The chunk's latents with the frames that were given put in their place."""
        width = self._config.runtime.chunk_width
        given = 0 if self._prefix is None else self._prefix.shape[2] - chunk * width
        if self._prefix is None or given <= 0:
            return latents
        start = self._prefix[:, :, chunk * width : (chunk + 1) * width].to(latents)
        return torch.cat([start, latents[:, :, start.shape[2] :]], dim=2)

    def _finish(self, chunk: int, latents: torch.Tensor) -> Chunk:
        """Cuts off given frames, except an image's single one, which begins the video."""
        given = 0 if self._prefix is None else self._prefix.shape[2]
        skip = 0 if given == 1 else max(0, given - chunk * self._config.runtime.chunk_width)
        return Chunk(chunk - self._schedule.prefix_chunks, latents[:, :, skip:])

    def _report(self, it: Iteration, state: SamplerState, velocities: list[torch.Tensor]) -> None:
        assert self._progress is not None  # noqa: S101 (asked before)
        event = ProgressEvent(
            iteration=it.index + 1,
            total=len(self._schedule),
            first_chunk=it.chunks[0] - self._schedule.prefix_chunks,
            timesteps=tuple(self._times[g] for g in it.grid),
            latents=torch.cat([state.window[c] for c in it.chunks], dim=2),
            velocity=torch.cat(velocities, dim=2),
        )
        self._progress(event)


def make_sampler(
    model: Transformer,
    config: MagiConfig | None = None,
    *,
    caption: Caption | Sequence[Caption],
    special_tokens: SpecialTokens | None = None,
    style_tokens: Sequence[str] = ("hq",),
    duration_tokens: bool = True,
    negative_tokens: bool = False,
    noise: torch.Tensor | None = None,
    seed: int = 0,
    prefix: torch.Tensor | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    state: SamplerState | None = None,
    progress: Progress | None = None,
) -> Sampler:
    """Checks everything and builds a run; nothing heavy happens until it is iterated. Arguments as for `generate_latents`.

    `state` continues a run: a copy of another sampler's state with the same model and arguments.
    """
    config = (config or model.config).with_runtime(num_frames=num_frames, video_size_h=height, video_size_w=width)
    if config.model != model.shape:
        raise MagiError(
            "The config's model_config is not the loaded model's. Use the config the model was loaded with."
        )
    runtime = config.runtime
    latent_size = _latent_size(config, noise, prefix, explicit=height is not None or width is not None)
    given = 0 if prefix is None else prefix.shape[2]
    if runtime.num_frames < runtime.temporal_downsample_factor:
        raise MagiError(
            f"num_frames is {runtime.num_frames}; it must be at least {runtime.temporal_downsample_factor}."
        )
    chunks = -(-(runtime.num_frames // runtime.temporal_downsample_factor + given) // runtime.chunk_width)
    shape = (1, LATENT_CHANNELS, runtime.chunk_width, *latent_size)
    whole = (*shape[:2], chunks * runtime.chunk_width, *latent_size)
    if noise is not None and tuple(noise.shape) != whole:
        raise MagiError(
            f"The noise has the shape {tuple(noise.shape)}; {runtime.num_frames} frames after {given} given latents need {whole}."
        )
    schedule = Schedule.of(runtime, chunks, given // runtime.chunk_width)
    captions = caption_per_chunk(
        caption, chunks - schedule.prefix_chunks, config.model, special_tokens, style_tokens, duration_tokens
    )
    null = null_caption(model.outer.null_caption.cpu(), special_tokens, negative_tokens)
    return Sampler(model, config, schedule, Noise(shape, seed, noise), captions, null, prefix, state, progress)


def generate_latents(
    model: Transformer,
    config: MagiConfig | None = None,
    *,
    caption: Caption | Sequence[Caption],
    special_tokens: SpecialTokens | None = None,
    style_tokens: Sequence[str] = ("hq",),
    duration_tokens: bool = True,
    negative_tokens: bool = False,
    noise: torch.Tensor | None = None,
    seed: int = 0,
    prefix: torch.Tensor | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Chunk]:
    """Finished chunks of latents, one by one, as soon as each is clean.

    Args:
        model: the transformer.
        config: settings; None takes the model's own.
        caption: for all chunks, or one a chunk (the last of a short list holds to the end). No tokens: unconditional.
        special_tokens: needed for style, duration and negative tokens.
        style_tokens: names out of `special_tokens.STYLES`.
        duration_tokens: tell each chunk how many are to come.
        negative_tokens: steer away from burnt-in captions, logos, transitions and borders (base models).
        noise: initial latents (1, 16, K * 6, h, w) of all K chunks, given ones included; None draws them from `seed`.
        seed: any integer.
        prefix: (1, 16, Tp, h, w) scaled latents to go on from; one frame is an image.
        num_frames: video frames to make after the prefix, rounded up to whole chunks; None takes the config's.
        height: in pixels, a multiple of 16; None takes the noise's, the prefix's or the config's.
        width: likewise.
        progress: called after every forward iteration; what it raises ends the run.

    Raises:
        MagiError: at once, before any computing, for anything that does not fit together.
    """
    return iter(
        make_sampler(
            model,
            config,
            caption=caption,
            special_tokens=special_tokens,
            style_tokens=style_tokens,
            duration_tokens=duration_tokens,
            negative_tokens=negative_tokens,
            noise=noise,
            seed=seed,
            prefix=prefix,
            num_frames=num_frames,
            height=height,
            width=width,
            progress=progress,
        )
    )


def _latent_size(
    config: MagiConfig, noise: torch.Tensor | None, prefix: torch.Tensor | None, explicit: bool
) -> tuple[int, int]:
    """Height and width of the latents. Raises MagiError for sizes the model cannot take and tensors that disagree."""
    runtime = config.runtime
    size = (runtime.video_size_h / SPATIAL_DOWNSAMPLE, runtime.video_size_w / SPATIAL_DOWNSAMPLE)
    for name, x in (("noise", noise), ("prefix", prefix)):
        if x is None:
            continue
        if x.ndim != 5 or x.shape[:2] != (1, LATENT_CHANNELS) or x.shape[2] < 1:
            raise MagiError(
                f"The {name} has the shape {tuple(x.shape)}; it must be (1, {LATENT_CHANNELS}, frames, height / 8, width / 8)."
            )
    sized = next((x for x in (noise, prefix) if x is not None), None)
    if sized is not None and not explicit:
        size = (sized.shape[3], sized.shape[4])
    for name, x in (("noise", noise), ("prefix", prefix)):
        if x is not None and tuple(x.shape[3:]) != size:
            raise MagiError(
                f"The {name} is {x.shape[4] * SPATIAL_DOWNSAMPLE}x{x.shape[3] * SPATIAL_DOWNSAMPLE} pixels, the video "
                f"{size[1] * SPATIAL_DOWNSAMPLE:g}x{size[0] * SPATIAL_DOWNSAMPLE:g}. Make both the same size."
            )
    patch = config.model.patch_size
    for name, n in zip(("height", "width"), size, strict=True):
        step = patch * SPATIAL_DOWNSAMPLE
        pixels = n * SPATIAL_DOWNSAMPLE
        if pixels % step or pixels < 2 * step:
            below = max(2 * step, int(pixels // step) * step)
            nearest = f"{below} or {below + step}" if pixels > below else f"{below}"
            raise MagiError(
                f"The {name} is {pixels:g} pixels; it must be a multiple of {step}, at least {2 * step}. The nearest: {nearest}."
            )
    return int(size[0]), int(size[1])
