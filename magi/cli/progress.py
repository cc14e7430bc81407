"""Progress bars of the long steps on a terminal."""

from types import TracebackType

from tqdm import tqdm

from ..pipeline.pipeline import Stage

_TITLES = {
    "text": "text encoder",
    "prefix": "encoding the input",
    "load": "loading the model",
    "sample": "sampling",
    "decode": "decoding",
}
_FORMAT = "{desc:<20}{percentage:3.0f}%|{bar}| {n:.4g}/{total_fmt} [{elapsed}<{remaining}]"


class Bars:
    """One bar a stage, and below the sampling one that comes and goes with the decoding of finished chunks."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def __call__(self, stage: Stage) -> None:
        """Moves the stage's bar."""
        for name in [n for n in self._bars if n != stage.name and not (n == "sample" and stage.name == "decode")]:
            self._bars.pop(name).close()
        if stage.name not in self._bars:
            self._bars[stage.name] = tqdm(
                desc=_TITLES[stage.name],
                total=stage.total,
                initial=stage.done,  # where a resumed run stands: the time left is that of the rest
                bar_format=_FORMAT,
                leave=stage.name != "decode",
            )
        bar = self._bars[stage.name]
        bar.total = stage.total
        bar.n = stage.done
        bar.update(0)
        if stage.done >= stage.total:
            bar.refresh()

    def __enter__(self) -> "Bars":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in reversed(self._bars.values()):  # the last of them is the lowest, and vanishes
            bar.close()
