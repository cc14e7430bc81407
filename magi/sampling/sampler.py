"""The chunk loop: denoises a sliding window of chunks and yields each when it is clean (arXiv 2505.13211, section 2.3).

`SamplerState` holds all state of a run: the position in the schedule, the latents in the window and the last clean
chunks. A run that resumes from a copy of a state gives the same bits as the run it was copied from, because the K/V of
clean chunks depend on nothing but those chunks: the cache is filled from them again, by the code that also runs the
chunks of a prefix.

Shapes: (1, 16, W, h, w) latents and velocities of a chunk of W latent frames.
"""

from collections.abc import Callable, Iterator, Sequence
from warnings import warn

import torch

from ..config import SPATIAL_DOWNSAMPLE, MagiConfig
from ..errors import MagiError
from ..offload.kv_cache import KVCache
from ..system.device import empty_cache, retry_with_less
from ..system.finite import is_finite
from ..transformer.diagnosis import explain
from ..transformer.inputs import ChunkInput, EncodedCaption, Pass
from ..transformer.model import Transformer
from .guidance import NEARLY_CLEAN_MIX, PassName, combine, guidance_weights, is_nearly_clean, members
from .schedule import Iteration, Schedule, smaller_windows, step_size_signal, time_grid
from .state import Chunk, Noise, OnIteration, ProgressEvent, SamplerState


class Sampler:
    """One run. Iterating it yields the finished chunks; between two of them `state` may be copied."""

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
        on_iteration: OnIteration | None = None,
        on_progress: Callable[[float], None] | None = None,
        on_shortage: Callable[[str], None] | None = None,
    ) -> None:
        """Prepares a run with checked arguments; `make_sampler` is the usual way to make one.

        Args:
            model: the transformer.
            config: settings, with the run's size and length.
            schedule: the schedule that the settings ask for.
            noise: initial latents.
            captions: per generated chunk, (tokens, channels).
            null: null caption, (50, channels).
            prefix: (1, 16, Tp, h, w) scaled latents.
            state: state to resume from.
            on_iteration: called after every forward iteration.
            on_progress: called many times per iteration with the fraction of it that is done, 0 .. 1.
            on_shortage: called with a sentence when the run changed because memory ran out; None issues a warning.
        """
        self._model = model
        self._config = config
        self._full_schedule = schedule  # that of the settings; a smaller window replaces it after a memory shortage
        self._noise = noise
        self._prefix = prefix
        self._on_iteration = on_iteration
        self._on_progress = on_progress
        self._on_shortage = on_shortage or (lambda text: warn(text, stacklevel=5))
        self._times = [float(t) for t in time_grid(schedule.num_steps, config.engine.shortcut_mode)]
        self._captions = captions
        self._encoded: dict[int, EncodedCaption] = {}
        self._null = model.encode_caption(null)
        self._cache: KVCache | None = None
        self.state = state or self._first_state()

    @property
    def _schedule(self) -> Schedule:
        return self.state.schedule(self._full_schedule)

    @property
    def total(self) -> int:
        """Returns the number of forward iterations of the whole run."""
        return len(self._schedule)

    @property
    def window(self) -> int:
        """Chunks that are denoised at a time: fewer than the settings ask for where memory ran out."""
        return self._schedule.window

    @property
    def nbytes(self) -> int:
        """Returns the bytes of latents and cache, which do not grow with the length of the video."""
        return self.state.nbytes + (self._cache.nbytes if self._cache else 0)

    def __iter__(self) -> Iterator[Chunk]:
        while self.state.iteration < len(self._schedule):
            chunk = retry_with_less(self._next, self._lower_memory)
            if chunk is not None:
                yield chunk

    @torch.inference_mode()
    def _next(self) -> Chunk | None:
        """Runs the next iteration and returns the chunk it finishes, if any."""
        if self._cache is None:
            self.fill_cache()
        return self._iterate(self._schedule[self.state.iteration])

    # -- when memory runs out ------------------------------------------------------------------------------------------

    def _lower_memory(self, error: BaseException) -> None:
        """Lowers the use of memory for the next iterations. Raises MagiError once nothing is left to change."""
        device, cache_device = self._model.device, self._model.cache_device
        empty_cache(device)
        change = self._model.shrink() or self._shrink_window()
        if change is None:
            *_, height, width = (SPATIAL_DOWNSAMPLE * side for side in self._noise.shape)
            raise MagiError(
                f"{device} ran out of memory at {width}x{height}, with all that can be on the host there and a window of 1. "
                "Try a smaller size."
            ) from error
        if self._cache is not None and self._model.cache_device != cache_device:
            self._cache.move_to_host()
        empty_cache(device)
        self._on_shortage(f"{device} ran out of memory. From the last finished step on {change}.")

    def _shrink_window(self) -> str | None:
        """Restarts after the last finished chunk with a smaller window. Returns the change; None if there is none."""
        now = self._schedule
        window = next(iter(smaller_windows(now.num_steps, now.window)), None)
        if window is None:
            return None
        done = max(self.state.clean, default=-1) + 1
        self.state = SamplerState(clean=self.state.clean, window_size=window, done=done)
        self._cache = None
        return (
            f"{window} instead of {now.window} chunks are denoised at a time. The video will differ from what it would have "
            f"become, and the unfinished chunks after number {done - self._full_schedule.prefix_chunks} restart"
        )

    # -- one iteration -----------------------------------------------------------------------------------------------

    def _iterate(self, it: Iteration) -> Chunk | None:
        state = self.state.copy()
        for chunk in it.chunks:
            latents = state.window[chunk] if chunk in state.window else self._noise.chunk(chunk).to(self._model.device)
            state.window[chunk] = self._with_prefix(chunk, latents)
        distilled = self._config.engine.distill
        velocities = (self._one_pass if distilled else self._three_passes)(it, state)  # (1, 16, W, h, w) per chunk
        self._check_velocities(it, velocities)
        if self._on_iteration:
            self._on_iteration(self._event(it, state, velocities))
        for chunk, velocity, g in zip(it.chunks, velocities, it.grid, strict=True):
            state.window[chunk] = state.window[chunk] + velocity * (self._times[g + 1] - self._times[g])
        finished = None
        if it.finishes is not None:
            latents = state.window.pop(it.finishes)
            finished = self._finish(it.finishes, latents)
            state.clean[it.finishes] = self._with_prefix(it.finishes, latents)
            for chunk in [c for c in state.clean if c <= it.finishes - self._full_schedule.kept_chunks]:
                del state.clean[chunk]
        state.iteration += 1
        self.state = state
        return finished

    def _check_velocities(self, it: Iteration, velocities: list[torch.Tensor]) -> None:
        """Raises MagiError where a chunk's velocity is none. The state is then still that of before, and sound."""
        if is_finite(torch.cat(velocities, dim=2)):
            return
        chunk, g = next((c, g) for c, g, v in zip(it.chunks, it.grid, velocities, strict=True) if not is_finite(v))
        raise MagiError(
            f"Step {g + 1} of {self._schedule.num_steps} of chunk {chunk - self._full_schedule.prefix_chunks + 1} gave numbers "
            f"that are none (NaN or infinity). {explain(self._model, self._on_progress)}"
        )

    def _three_passes(self, it: Iteration, state: SamplerState) -> list[torch.Tensor]:
        """Computes the guided velocities of base models. Passes and chunks whose result has weight 0 are skipped."""
        weights = [guidance_weights(self._times[g], self._config.runtime) for g in it.grid]
        passes: list[Pass] = []
        # Per pass its name and the indices of its active chunks; -1 is the refresh.
        slots: list[tuple[PassName, list[int]]] = []
        for name in ("text", "prev"):
            wanted = [getattr(w, name) != 0 for w in weights]
            made, chunks = self._context_pass(it, state, wanted, conditional=name == "text", store=name == "prev")
            if chunks:
                passes.append(made)
                slots.append((name, chunks))
        for i, (chunk, g) in enumerate(zip(it.chunks, it.grid, strict=True)):
            if weights[i].independent:
                alone = ChunkInput(0, state.window[chunk], self._times[g], self._null, first_kv_chunk=0)
                passes.append(Pass((alone,), conditional=False))
                slots.append(("independent", [i]))
        found: list[dict[PassName, torch.Tensor]] = [{} for _ in it.chunks]
        for (name, chunks), velocities in zip(slots, self._forward(passes), strict=True):
            for i, velocity in zip(chunks, velocities, strict=True):
                if i >= 0 and velocity is not None:
                    found[i][name] = velocity
        return [combine(w, f) for w, f in zip(weights, found, strict=True)]

    def _one_pass(self, it: Iteration, state: SamplerState) -> list[torch.Tensor]:
        """Computes the velocities of distilled models; that of a nearly clean chunk is mixed with its isolated one."""
        made, chunks = self._context_pass(it, state, [True] * len(it.chunks), conditional=True, store=True)
        passes = [made]
        t = self._times[it.grid[0]]
        mix = is_nearly_clean(t, self._config.engine.distill_nearly_clean_chunk_threshold)
        if mix:
            oldest = made.chunks[chunks.index(0)]
            alone = ChunkInput(oldest.chunk, oldest.latents, t, oldest.caption, first_kv_chunk=oldest.chunk)
            passes.append(Pass((alone,), conditional=True))
        results = self._forward(passes, it.step)
        velocities = [v for v in results[0] if v is not None]
        if mix:
            alone_velocity = results[1][0]  # (1, 16, W, h, w)
            assert alone_velocity is not None  # noqa: S101 (it was wanted)
            velocities[0] = NEARLY_CLEAN_MIX[0] * velocities[0] + NEARLY_CLEAN_MIX[1] * alone_velocity
        return velocities

    def _context_pass(
        self, it: Iteration, state: SamplerState, wanted: list[bool], conditional: bool, store: bool
    ) -> tuple[Pass, list[int]]:
        """Builds the pass of active chunks that see one another and the cache, and their indices (-1: refresh)."""
        refresh, active = members(it, self._schedule, wanted, store)
        inputs: list[ChunkInput] = []
        places: list[int] = []
        if refresh and it.refresh is not None:
            inputs.append(self._clean_input(it.refresh, state.clean[it.refresh], store))
            places.append(-1)
        for i in active:
            chunk, g = it.chunks[i], it.grid[i]
            caption = self._caption(chunk) if conditional else self._null
            first = self._schedule.first_kv_chunk(chunk, g)
            inputs.append(ChunkInput(chunk, state.window[chunk], self._times[g], caption, first, wanted=wanted[i]))
            places.append(i)
        return Pass(tuple(inputs), conditional), places

    def _clean_input(self, chunk: int, latents: torch.Tensor, store: bool = True) -> ChunkInput:
        t = self._config.runtime.clean_t
        first = self._schedule.first_clean_kv_chunk(chunk)
        return ChunkInput(chunk, latents, t, self._null, first, store=store, wanted=False)

    def _forward(self, passes: Sequence[Pass], step: int = 0) -> list[list[torch.Tensor | None]]:
        engine = self._config.engine
        signal = step_size_signal(self._schedule.num_steps, step, engine.shortcut_mode) if engine.distill else None
        assert self._cache is not None  # noqa: S101 (filled when the iteration began)
        return self._model.forward(passes, self._cache, signal, self._on_progress)

    # -- prefix, cache, captions --------------------------------------------------------------------------------------

    def _first_state(self) -> SamplerState:
        """Returns the state before the first iteration: the whole prefix chunks that later ones can see are clean."""
        prefix_chunks = self._full_schedule.prefix_chunks
        first = max(0, prefix_chunks - self._full_schedule.kept_chunks)
        width = self._config.runtime.chunk_width
        clean = {}
        if self._prefix is not None:
            frames = self._prefix.to(self._model.device, torch.float32)  # (1, 16, Tp, h, w)
            clean = {c: frames[:, :, c * width : (c + 1) * width].clone() for c in range(first, prefix_chunks)}
        return SamplerState(clean=clean)

    @torch.inference_mode()
    def fill_cache(self) -> None:
        """Fills the K/V cache from the clean chunks of the state; iterating does so if it was not done."""
        *_, height, width = self._noise.shape
        self._cache = KVCache.for_run(self._model, self._schedule.cached_chunks, height, width)
        if self.state.iteration >= len(self._schedule):
            return
        coming = self._schedule[self.state.iteration].refresh  # the next iteration runs this chunk anyway
        done = max(self.state.clean, default=-1) + 1
        try:
            for chunk in sorted(self.state.clean):
                if chunk != coming and chunk >= done - self._schedule.replayed_chunks:
                    clean = self._clean_input(chunk, self.state.clean[chunk])
                    self._forward([Pass((clean,), conditional=self._config.engine.distill)])
        except BaseException:
            self._cache = None  # it is incomplete
            raise

    def _caption(self, chunk: int) -> EncodedCaption:
        embeds = self._captions[chunk - self._full_schedule.prefix_chunks]
        if not len(embeds):
            return self._null
        if id(embeds) not in self._encoded:
            used = {id(self._captions[c - self._full_schedule.prefix_chunks]) for c in self.state.window}
            self._encoded = {key: value for key, value in self._encoded.items() if key in used}
            self._encoded[id(embeds)] = self._model.encode_caption(embeds)
        return self._encoded[id(embeds)]

    def _with_prefix(self, chunk: int, latents: torch.Tensor) -> torch.Tensor:
        """Replaces the prefix frames in the latents of a chunk: (1, 16, W, h, w) -> (1, 16, W, h, w)."""
        width = self._config.runtime.chunk_width
        prefix_frames = 0 if self._prefix is None else self._prefix.shape[2] - chunk * width
        if self._prefix is None or prefix_frames <= 0:
            return latents
        start = self._prefix[:, :, chunk * width : (chunk + 1) * width].to(latents)  # (1, 16, 1 .. W, h, w)
        return torch.cat([start, latents[:, :, start.shape[2] :]], dim=2)  # (1, 16, W, h, w)

    def _finish(self, chunk: int, latents: torch.Tensor) -> Chunk:
        """Makes the finished chunk without the prefix frames, except an image's single one, which begins the video."""
        prefix_frames = 0 if self._prefix is None else self._prefix.shape[2]
        skip = 0 if prefix_frames == 1 else max(0, prefix_frames - chunk * self._config.runtime.chunk_width)
        # A copy, so that in-place changes by the receiver do not reach the state.
        return Chunk(chunk - self._full_schedule.prefix_chunks, latents[:, :, skip:].clone())  # (1, 16, W - skip, h, w)

    def _event(self, it: Iteration, state: SamplerState, velocities: list[torch.Tensor]) -> ProgressEvent:
        return ProgressEvent(
            iteration=it.index + 1,
            total=len(self._schedule),
            first_chunk=it.chunks[0] - self._full_schedule.prefix_chunks,
            timesteps=tuple(self._times[g] for g in it.grid),
            latents=torch.cat([state.window[c] for c in it.chunks], dim=2),  # (1, 16, chunks * W, h, w)
            velocity=torch.cat(velocities, dim=2),  # (1, 16, chunks * W, h, w)
        )
