"""The chunk loop: denoises a sliding window of chunks and yields each one when it is clean (paper section 2.3).

All that a run is lies in its `SamplerState`: the place in the schedule, the latents in the window and the last clean chunks.
A run that is started from a copy of a state goes on exactly as the run it was taken from, for the keys of clean chunks depend
on nothing but those chunks; the cache is filled from them again, by the very code that takes in a given video's first chunks.
"""

from collections.abc import Callable, Iterator, Sequence
from warnings import warn

import torch

from ..config import SPATIAL_DOWNSAMPLE, MagiConfig
from ..errors import MagiError
from ..offload.kv_cache import KVCache
from ..system.device import empty_cache, is_out_of_memory
from ..transformer.inputs import ChunkInput, EncodedCaption, Pass
from ..transformer.model import Transformer
from .guidance import NEARLY_CLEAN_MIX, PassName, combine, guidance_weights, is_nearly_clean, members
from .schedule import Iteration, Schedule, smaller_windows, step_size_signal, time_grid
from .state import Chunk, Noise, Progress, ProgressEvent, SamplerState


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
        heartbeat: Callable[[float], None] | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """`captions` are those of the generated chunks, `prefix` is (1, 16, Tp, h, w); `generate` checks and builds all this."""
        self._model = model
        self._config = config
        self._wanted = schedule  # what the settings ask for
        self._noise = noise
        self._prefix = prefix
        self._progress = progress
        self._heartbeat = heartbeat
        self._report_shortage = report or (lambda text: warn(text, stacklevel=4))
        self._times = [float(t) for t in time_grid(schedule.num_steps, config.engine.shortcut_mode)]
        self._captions = captions
        self._encoded: dict[int, EncodedCaption] = {}
        self._null = model.encode_caption(null)
        self._cache: KVCache | None = None
        self.state = state or self._first_state()

    @property
    def _schedule(self) -> Schedule:
        return self.state.schedule(self._wanted)

    @property
    def total(self) -> int:
        """Forward iterations of the whole run."""
        return len(self._schedule)

    @property
    def nbytes(self) -> int:
        """Bytes of latents and of the cache: they do not grow with the video."""
        return self.state.nbytes + (self._cache.nbytes if self._cache else 0)

    def __iter__(self) -> Iterator[Chunk]:
        short = False
        while self.state.iteration < len(self._schedule):
            try:
                if short:  # not in the handler, which would keep alive what the iteration had made
                    self._take_less()
                chunk = self._next()
                short = False
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                short = True
            else:
                if chunk is not None:
                    yield chunk

    @torch.inference_mode()
    def _next(self) -> Chunk | None:
        """The next iteration, and the chunk it finishes."""
        if self._cache is None:
            self.fill_cache()
        return self._iterate(self._schedule[self.state.iteration])

    # -- when memory runs out ------------------------------------------------------------------------------------------

    def _take_less(self) -> None:
        """Makes do with less memory from the last finished iteration on. Raises MagiError if there is no way left."""
        device, cache_device = self._model.device, self._model.cache_device
        empty_cache(device)
        change = self._model.shrink() or self._narrow()
        if change is None:
            *_, height, width = (SPATIAL_DOWNSAMPLE * side for side in self._noise.shape)
            raise MagiError(
                f"{device} ran out of memory at {width}x{height}, with all that can be on the host there and a window of 1. "
                "Try a smaller size."
            )
        if self._cache is not None and self._model.cache_device != cache_device:
            self._cache.move_to_host()
        empty_cache(device)
        self._report_shortage(f"{device} ran out of memory. From the last finished step on {change}.")

    def _narrow(self) -> str | None:
        """A smaller window: its chunks begin anew, after the last finished one."""
        now = self._schedule
        window = next(iter(smaller_windows(now.num_steps, now.window)), None)
        if window is None:
            return None
        done = max(self.state.clean, default=-1) + 1
        self.state = SamplerState(clean=self.state.clean, window_size=window, done=done)
        self._cache = None
        return (
            f"{window} instead of {now.window} chunks are denoised at a time. The video will differ from what it would have "
            f"become, and chunks that were begun after number {done - self._wanted.prefix_chunks} begin anew"
        )

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
            for chunk in [c for c in state.clean if c <= it.finishes - self._wanted.kept_chunks]:
                del state.clean[chunk]
        state.iteration += 1
        self.state = state
        return finished

    def _three_passes(self, it: Iteration, state: SamplerState) -> list[torch.Tensor]:
        """Guided velocities of base models. Passes and chunks whose result has no weight are left out."""
        weights = [guidance_weights(self._times[g], self._config.runtime) for g in it.grid]
        passes: list[Pass] = []
        # Per pass its name and which active chunks it holds; -1 stands for the refresh.
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
        """Velocities of distilled models: the oldest chunk, once nearly clean, is mixed with a view of itself alone."""
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
            alone_velocity = results[1][0]
            assert alone_velocity is not None  # noqa: S101 (it was wanted)
            velocities[0] = NEARLY_CLEAN_MIX[0] * velocities[0] + NEARLY_CLEAN_MIX[1] * alone_velocity
        return velocities

    def _context_pass(
        self, it: Iteration, state: SamplerState, wanted: list[bool], conditional: bool, store: bool
    ) -> tuple[Pass, list[int]]:
        """The pass over active chunks that see one another and the cache, and which of them are in it (-1: the refresh)."""
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
        assert self._cache is not None  # noqa: S101 (made when the iteration began)
        return self._model.forward(passes, self._cache, signal, self._heartbeat)

    # -- around it ---------------------------------------------------------------------------------------------------

    def _first_state(self) -> SamplerState:
        """Nothing done; the whole chunks of the prefix that later ones can see are clean."""
        given = self._wanted.prefix_chunks
        first = max(0, given - self._wanted.kept_chunks)
        width = self._config.runtime.chunk_width
        clean = {}
        if self._prefix is not None:
            frames = self._prefix.to(self._model.device, torch.float32)
            clean = {c: frames[:, :, c * width : (c + 1) * width].clone() for c in range(first, given)}
        return SamplerState(clean=clean)

    @torch.inference_mode()
    def fill_cache(self) -> None:
        """Runs the clean chunks of the state through the model for their keys; iterating does it where it was not done."""
        *_, height, width = self._noise.shape
        self._cache = KVCache.for_run(self._model, self._schedule.cached_chunks, height, width)
        if self.state.iteration >= len(self._schedule):
            return
        coming = self._schedule[self.state.iteration].refresh  # will be shown to the model anyway
        done = max(self.state.clean, default=-1) + 1
        try:
            for chunk in sorted(self.state.clean):
                if chunk != coming and chunk >= done - self._schedule.replayed_chunks:
                    clean = self._clean_input(chunk, self.state.clean[chunk])
                    self._forward([Pass((clean,), conditional=self._config.engine.distill)])
        except BaseException:
            self._cache = None  # it lacks something
            raise

    def _caption(self, chunk: int) -> EncodedCaption:
        embeds = self._captions[chunk - self._wanted.prefix_chunks]
        if not len(embeds):
            return self._null
        if id(embeds) not in self._encoded:
            alive = {id(self._captions[c - self._wanted.prefix_chunks]) for c in self.state.window}
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
        # A copy: what the receiver does to it must not reach the state.
        return Chunk(chunk - self._wanted.prefix_chunks, latents[:, :, skip:].clone())

    def _report(self, it: Iteration, state: SamplerState, velocities: list[torch.Tensor]) -> None:
        assert self._progress is not None  # noqa: S101 (asked before)
        event = ProgressEvent(
            iteration=it.index + 1,
            total=len(self._schedule),
            first_chunk=it.chunks[0] - self._wanted.prefix_chunks,
            timesteps=tuple(self._times[g] for g in it.grid),
            latents=torch.cat([state.window[c] for c in it.chunks], dim=2),
            velocity=torch.cat(velocities, dim=2),
        )
        self._progress(event)
