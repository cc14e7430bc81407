"""Progress bars of the long steps on a terminal."""

from types import TracebackType

from tqdm import tqdm

from ..pipeline.phases import Phase

_TITLES = {
    "text": "text encoder",
    "prefix": "encoding the input",
    "load": "loading the model",
    "sample": "sampling",
    "decode": "decoding",
    "join": "the clip in front",  # the command line's own
}
_BELOW = ("decode", "join")
_FORMAT = "{desc:<20}{percentage:3.0f}%|{bar}| {n:.4g}/{total_fmt} [{elapsed}<{remaining}]"


class Bars:
    """One bar per phase; below that of the sampling, one that comes and goes with what is done with finished chunks."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def __call__(self, phase: Phase) -> None:
        """Moves the phase's bar, and closes those of earlier phases."""
        for name in [n for n in self._bars if n != phase.name and not (n == "sample" and phase.name in _BELOW)]:
            self._bars.pop(name).close()
        if phase.name not in self._bars:
            self._bars[phase.name] = tqdm(
                desc=_TITLES[phase.name],
                total=phase.total,
                initial=phase.done,  # where a resumed run stands: the time left is that of the rest
                bar_format=_FORMAT,
                leave=phase.name not in _BELOW,
            )
        bar = self._bars[phase.name]
        bar.total = phase.total
        bar.n = phase.done
        bar.update(0)
        if phase.done >= phase.total:
            bar.refresh()

    def __enter__(self) -> "Bars":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in reversed(self._bars.values()):  # the last of them is the lowest, and vanishes
            bar.close()
