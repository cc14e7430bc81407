"""A transformer and a VAE that share a card, as far as a CPU can play one."""

import dataclasses

import pytest
import torch

from magi.checkpoint.reader import Checkpoint
from magi.config import MagiConfig
from magi.errors import MagiError
from magi.model_files import load
from magi.model_files.locate import ModelFiles
from magi.model_files.repeating import REPEATING_CONFIG, repeating_files
from magi.pipeline import resident_models
from magi.pipeline.resident_models import ResidentModels
from magi.planning.footprint import kv_bytes, weight_sizes
from magi.planning.placement import MemoryOptions, place, smallest
from magi.vae.video_vae import VideoVAE

RUN = REPEATING_CONFIG.with_runtime(num_frames=240, window_size=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(embedded_home) -> ModelFiles:
    return repeating_files(embedded_home)


class Card:
    """How much is free on it, whatever is loaded."""

    def __init__(self, monkeypatch):
        self.free: int | None = None
        self.emptied = 0
        monkeypatch.setattr(resident_models, "free_memory", lambda device: self.free)
        monkeypatch.setattr(resident_models, "empty_cache", self._empty)

    def _empty(self, device):
        self.emptied += 1


@pytest.fixture
def card(monkeypatch) -> Card:
    return Card(monkeypatch)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """What is read, in order; headers do not count."""
    found: list[str] = []

    def count(function, name):
        def counted(path, *args, **options):
            if "meta" not in args:
                found.append(name)
            return function(path, *args, **options)

        return counted

    monkeypatch.setattr(resident_models, "load_transformer", count(resident_models.load_transformer, "transformer"))
    monkeypatch.setattr(resident_models, "load_vae", count(resident_models.load_vae, "vae"))
    return found


@pytest.fixture
def models(files):
    """(**memory options) -> a pipeline's models."""

    def make(**memory) -> ResidentModels:
        return ResidentModels(
            files,
            REPEATING_CONFIG,
            CPU,
            dtype=None,
            vae_dtype=torch.float32,
            precision="auto",
            attention="auto",
            memory=MemoryOptions(**memory),
        )

    return make


@pytest.fixture(scope="module")
def sizes(files):
    with Checkpoint(files.transformer) as checkpoint:
        return weight_sizes(checkpoint.tensors, RUN.model, CPU)


@pytest.fixture(scope="module")
def vae_and_tile(files) -> tuple[int, int]:
    """Bytes of the VAE, and of a tile in it."""
    model = resident_models.load_vae(files.vae, "cpu", torch.float32)
    tiling, scores = resident_models.Tiling(), resident_models.makes_scores(CPU, torch.float32, model.config)
    return model.nbytes, resident_models.tile_bytes(model.config, tiling, torch.float32, scores)


@pytest.fixture
def parked(monkeypatch) -> list[str]:
    """What becomes of the VAE, which a CPU never parks."""
    done: list[str] = []
    monkeypatch.setattr(VideoVAE, "park", lambda self: done.append("parked"))
    return done


def chunks(done: list[str]):
    for i in range(3):
        done.append(f"made {i}")
        yield i


def through(models: ResidentModels, done: list[str]) -> list[str]:
    """The life of three chunks."""
    for chunk in models.share_device(chunks(done)):
        done.append(f"decoded {chunk}")
    return done


STAYS = ["made 0", "decoded 0", "made 1", "decoded 1", "made 2", "decoded 2"]
GIVES_WAY = [step for i in range(3) for step in ("parked", f"made {i}", f"decoded {i}")] + ["parked"]


# -- both on a card --------------------------------------------------------------------------------------------------


def test_a_card_with_room_for_both(card, models, parked, sizes, vae_and_tile):
    roomy = place(RUN, sizes, 10**12, other_model_bytes=vae_and_tile[1])
    card.free = roomy.needed_bytes + vae_and_tile[0]
    both = models()
    assert both.place(RUN, 0, allow_smaller_window=True) == roomy
    assert both.vae.device_bytes > 0
    assert through(both, parked) == STAYS
    assert card.emptied == 1, "it costs time"


@pytest.mark.parametrize("run", [RUN, RUN.with_runtime(video_size_h=64, video_size_w=64)], ids=["large", "small"])
def test_a_byte_less_and_the_vae_gives_way(run, card, models, parked, sizes, vae_and_tile):
    card.free = place(run, sizes, 10**12, other_model_bytes=vae_and_tile[1]).needed_bytes + vae_and_tile[0] - 1
    both = models()
    placed = both.place(run, 0, allow_smaller_window=True)
    assert placed == place(run, sizes, card.free, other_model_bytes=sum(vae_and_tile))
    assert placed.working_bytes >= sum(vae_and_tile), "between two chunks it comes back"
    assert through(both, []) == STAYS, "there is none yet"
    assert both.vae.device_bytes > 0
    assert through(both, parked) == GIVES_WAY
    assert card.emptied > 3


def test_what_was_chosen_for_the_last_run_does_not_hold_for_the_next(card, models, parked, sizes, vae_and_tile):
    both = models()
    assert both.vae.device_bytes == vae_and_tile[0]
    little = smallest(RUN, sizes, other_model_bytes=sum(vae_and_tile)).needed_bytes
    for free, steps in ((little, GIVES_WAY), (10**10, STAYS), (little, GIVES_WAY), (None, STAYS)):
        card.free = free if free is None else free - both.vae.device_bytes
        both.place(RUN, 0, allow_smaller_window=True)
        parked.clear()
        assert through(both, parked) == steps


def test_a_smaller_token_block_by_hand_does_not_drive_the_vae_away(card, models, parked):
    card.free = 10**10
    both = models(token_block=64)
    assert both.place(RUN, 0, allow_smaller_window=True).token_block == 64
    assert both.vae
    assert through(both, parked) == STAYS


def test_what_is_loaded_counts_as_free(card, models, sizes, vae_and_tile):
    alone = place(RUN, sizes, 10**12, other_model_bytes=vae_and_tile[1])
    card.free = alone.needed_bytes + vae_and_tile[0]
    both = models()
    placed = both.place(RUN, 0, allow_smaller_window=False)
    card.free -= both.transformer(placed).nbytes + both.vae.device_bytes
    assert both.place(RUN, 0, allow_smaller_window=False) == placed


def test_the_hosts_own_memory_moves_nothing(card, models, parked, reads):
    both = models()
    placed = both.place(RUN, 0, allow_smaller_window=True)
    assert not placed.streaming
    assert reads == []
    assert both.vae
    assert through(both, parked) == STAYS


def test_no_room_is_an_error_before_anything_is_loaded(card, models, reads):
    card.free = 10**6
    with pytest.raises(MagiError, match=r"free are 0\.0 GB\. Try a smaller size"):
        models().place(RUN, 0, allow_smaller_window=True)
    assert reads == []


def test_a_window_that_was_asked_for_is_kept(card, models, sizes, vae_and_tile):
    two, four = (
        smallest(RUN.with_runtime(window_size=n), sizes, other_model_bytes=sum(vae_and_tile)).needed_bytes
        for n in (2, 4)
    )
    card.free = (two + four) // 2
    assert models().place(RUN, 0, allow_smaller_window=True).window == 2
    with pytest.raises(MagiError, match="with a window of 4 needs"):
        models().place(RUN, 0, allow_smaller_window=False)


def test_given_chunks_and_options_are_passed_on(card, models, sizes):
    card.free = 10**10
    short = RUN.with_runtime(num_frames=24)
    alone, after = (models().place(short, given, allow_smaller_window=True) for given in (0, 48))
    assert after.working_bytes - alone.working_bytes > 2 * kv_bytes(short, 48)
    placed = models(cache="host", token_block=32, streaming=True).place(RUN, 0, allow_smaller_window=True)
    assert (placed.cache, placed.token_block, placed.on_device) == ("host", 32, ())


# -- loading ---------------------------------------------------------------------------------------------------------


def placed(models: ResidentModels, config: MagiConfig = RUN):
    return models.place(config, 0, allow_smaller_window=True)


def test_a_run_like_the_last_reads_nothing(card, models, reads):
    both = models()
    first = both.transformer(placed(both))
    vae = both.vae
    again = both.transformer(placed(both, RUN.with_runtime(num_frames=480, video_size_h=256, video_size_w=256)))
    assert again is first
    assert both.vae is vae
    assert reads == ["transformer", "vae"]
    assert first.blocks.on_device == {0, 1}


def test_layers_that_are_to_lie_elsewhere_are_read_anew(card, models, reads):
    both = models()
    everything = placed(both)
    kept = both.transformer(everything).nbytes
    for on_device in ((0,), (1,), ()):
        wanted = dataclasses.replace(everything, on_device=on_device)
        moved = both.transformer(wanted)
        assert moved.blocks.on_device == set(on_device)
        assert moved.nbytes < kept
        assert both.transformer(wanted) is moved
    assert reads == ["transformer"] * 4


def test_the_old_layers_are_gone_before_new_ones_are_read(card, models, monkeypatch):
    both = models()
    everything = placed(both)
    both.transformer(everything)
    seen = []
    load = resident_models.load_transformer

    def loading(*args, **options):
        seen.append((both._transformer, card.emptied))
        return load(*args, **options)

    monkeypatch.setattr(resident_models, "load_transformer", loading)
    before = card.emptied
    both.transformer(dataclasses.replace(everything, on_device=(0,)))
    assert seen == [(None, before + 1)]


def test_a_token_block_or_another_place_for_keys_needs_no_reading(card, models, reads):
    both = models()
    everything = placed(both)
    transformer = both.transformer(everything)
    assert (transformer.cache_device, transformer.token_block) == ("device", everything.token_block)
    other = both.transformer(dataclasses.replace(everything, cache="host", token_block=128, window=2))
    assert other is transformer
    assert (transformer.cache_device, transformer.token_block) == ("host", 128)
    both.transformer(everything)
    assert (transformer.cache_device, transformer.token_block) == ("device", everything.token_block)
    assert reads == ["transformer"]


def test_less_room_for_layers_that_pass_through_is_made_by_reading_anew(card, models, reads):
    both = models()
    for slots, times in ((3, 1), (2, 2), (3, 2)):
        wanted = dataclasses.replace(placed(both), on_device=(0,), slots=slots)
        both.transformer(wanted)
        assert reads == ["transformer"] * times
    everything = placed(both)
    both.transformer(dataclasses.replace(everything, slots=3))
    both.transformer(dataclasses.replace(everything, slots=2))
    assert reads == ["transformer"] * 3, "nothing passes through"


class Cancelled(Exception):
    pass


def test_loading_that_was_cancelled_begins_anew(card, models):
    both = models()
    wanted = placed(both)

    def cancel(done, total):
        raise Cancelled

    for _ in range(2):
        with pytest.raises(Cancelled):
            both.transformer(wanted, cancel)
    seen = []
    assert both.transformer(wanted, lambda done, total: seen.append((done, total))).nbytes > 0
    assert seen == [(1, 2), (2, 2)]


# -- after memory ran out --------------------------------------------------------------------------------------------

LARGE = RUN.with_runtime(
    video_size_h=1280, video_size_w=1280
)  # more than 4096 tokens a chunk: each token block takes less


@pytest.fixture
def total(card, models, monkeypatch):
    """(bytes) -> models on a card, or for None in a host's memory, of that size, less what they hold themselves."""

    def make(nbytes: int | None) -> ResidentModels:
        both = models()
        both.total = nbytes
        free = lambda device: None if both.total is None else both.total - both._loaded_bytes()  # noqa: E731
        monkeypatch.setattr(resident_models, "free_memory", free)
        monkeypatch.setattr(resident_models, "memory_beside", lambda device: 10**11)
        return both

    return make


def laid_out(transformer) -> tuple[int, int, str]:
    return transformer.token_block, len(transformer.blocks.on_device), transformer.cache_device


def announced(placement) -> tuple[int, int, str]:
    return placement.token_block, len(placement.on_device), placement.cache


def no_larger(a: tuple, b: tuple) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and (a[2], b[2]) != ("device", "host")


def after_shortage(both: ResidentModels, times: int, run: MagiConfig = LARGE) -> tuple:
    """What was planned, and what is left of it after memory ran out so many times."""
    first = placed(both, run)
    transformer = both.transformer(first)
    for _ in range(times):
        assert transformer.shrink()
    return first, laid_out(transformer)


@pytest.mark.parametrize(  # a host takes few tokens at a time from the start, and has less to give up
    ("times", "free"), [*((times, 10**10) for times in range(1, 10)), *((times, None) for times in range(1, 6))]
)
def test_a_later_run_is_no_larger_than_what_the_last_was_left_with(times, free, total):
    both = total(free)
    _, left = after_shortage(both, times)
    for run in (LARGE, LARGE.with_runtime(num_frames=480), LARGE):
        again = placed(both, run)
        assert no_larger(announced(again), left)
        assert laid_out(both.transformer(again)) == announced(again), "what is announced is so"
    assert both.place(LARGE, 0, allow_smaller_window=True).window == LARGE.runtime.window_size


def test_memory_that_runs_out_again_takes_still_more_away(total):
    both = total(10**10)
    _, left = after_shortage(both, 1)
    for times in (1, 2, 1, 1):
        again, less = after_shortage(both, times)
        assert no_larger(announced(again), left)
        assert less != left
        assert no_larger(less, left)
        left = less


@pytest.mark.parametrize("times", range(1, 10))
def test_as_much_more_memory_as_was_given_up_brings_everything_back(times, total):
    both = total(10**10)
    first, left = after_shortage(both, times)
    again = placed(both, LARGE)
    given_up = first.device_bytes - again.device_bytes
    assert given_up > 0
    both.total += given_up
    assert no_larger(announced(placed(both, LARGE)), left), "not yet more than what ran out then had"
    both.total += 1
    assert announced(placed(both, LARGE)) == announced(first)


@pytest.mark.parametrize("times", [3, 9])
def test_a_run_that_takes_no_more_than_the_last_was_left_with_is_not_held_back(times, total):
    both = total(10**10)
    after_shortage(both, times)
    assert not placed(both, RUN.with_runtime(video_size_h=32, video_size_w=32)).streaming
    assert placed(both, LARGE).streaming, "it is not forgotten"


def test_what_the_vae_takes_has_not_become_free_since_memory_ran_out(total, sizes, vae_and_tile):
    """Where the run that ran out had the VAE off the device, what it was left with is not known to fit beside it."""
    beside = place(LARGE, sizes, 10**12, other_model_bytes=vae_and_tile[1])
    both = total(beside.needed_bytes + vae_and_tile[0] - 1)
    _, left = after_shortage(both, 1)
    assert both._parks_vae
    known = place(LARGE, sizes, 10**12, MemoryOptions(token_block=left[0])).device_bytes

    def fits_alone_only(run: MagiConfig) -> bool:
        return 0 < known - place(run, sizes, 10**12, other_model_bytes=vae_and_tile[1]).device_bytes < vae_and_tile[0]

    sides = range(1120, 1440, 16)
    runs = (LARGE.with_runtime(video_size_h=height, video_size_w=width) for height in sides for width in sides)
    both.place(next(run for run in runs if fits_alone_only(run)), 0, allow_smaller_window=True)
    assert both._parks_vae


def test_a_window_that_became_smaller_is_planned_unless_another_was_asked_for(total):
    both = total(10**10)
    after_shortage(both, 9)
    both.left_with(2)
    assert both.place(LARGE, 0, allow_smaller_window=False).window == 4
    assert both.place(LARGE, 0, allow_smaller_window=True).window <= 2


def test_layers_that_found_no_room_while_they_were_read_are_not_tried_again(total, monkeypatch):
    both = total(10**10)
    make, tries = load.StreamedBlocks, []

    def short(reader, staying, *args, **options):
        tries.append(len(staying))
        if len(staying) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return make(reader, staying, *args, **options)

    monkeypatch.setattr(load, "StreamedBlocks", short)
    with pytest.warns(UserWarning, match="ran out of memory while the model was loaded"):
        both.transformer(placed(both, LARGE))
    assert laid_out(both.transformer(placed(both, LARGE)))[1] == 1
    assert tries.count(2) == 1
