"""Training of the embedded model: what is trained is what the files say, and a run that was stopped goes on."""

import json
import random
import sys

import pytest
import torch

from magi.model_files.load import load_transformer
from magi.sampling.schedule import Schedule, time_grid
from magi.sampling.special_tokens import STYLES, SpecialTokens
from magi.text.encoder import TextEncoder
from magi.text.t5_tokenizer import load_tokenizer
from tools.train_embedded import components, distill, text, train, videos, world
from tools.train_embedded.batches import LONGEST, PREFIX, Stream, examples, loader
from tools.train_embedded.captions import captions
from tools.train_embedded.export import STUDENT_FOLDER, averaged, write_text, write_transformer
from tools.train_embedded.videos import Pool, make, padded, prefix_rows, windows
from tools.train_embedded.windows import WindowDrawer, window_alone, window_at

SENTENCES = ["A small red circle moves left.", "The background is dark-blue, and we see a Cat!", "up"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with components of few scenes, so that a run starts at once."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "SCENES", 20)
        components.components_of(folder)
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """(arguments) -> the rows of the log after a run with them."""
    monkeypatch.setattr(videos, "FIRST", 24)

    def run(*arguments):
        options = ["--out", folder, "--batch", 8, "--every", 2, "--threads", 1, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", ["train", *map(str, options)])
        train.main()
        return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    return run


def test_a_run_is_resumed_and_exported(run, folder, tmp_path):
    rows = run("--steps", 4)
    assert [row["step"] for row in rows] == [2, 4]
    first = torch.load(folder / "state.pt", weights_only=True)
    rows = run("--steps", 6, "--chunks", "1=1", "2=1")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["samples"] > rows[1]["samples"]
    state = torch.load(folder / "state.pt", weights_only=True)
    name = "transformer.videodit_blocks.layers.0.mlp.linear_fc1.weight"
    assert not torch.equal(state["model"][name], first["model"][name])

    # The empty channels, where a sampler leaves its noise, are neither seen nor made.
    seen = state["average"]["transformer.x_embedder.weight"]
    made = state["average"]["transformer.final_linear.linear.weight"].unflatten(0, (-1, seen.shape[1]))
    for weight in (seen.transpose(0, 1), made.transpose(0, 1)):
        assert weight[: components.USED].flatten(1).any(1).all()
        assert not weight[components.USED :].any()

    weights = averaged(folder / "state.pt")
    write_transformer(weights, tmp_path / STUDENT_FOLDER, train.BASE)
    write_text(weights, tmp_path)
    model = load_transformer(tmp_path / STUDENT_FOLDER, device="cpu", dtype=torch.float32)
    assert model.config.model == train.MODEL
    trained = text.TextEncoder()
    trained.load_state_dict({k.removeprefix("text."): v for k, v in state["average"].items() if k.startswith("text.")})
    special = SpecialTokens.load(tmp_path / "special_tokens.npz")
    rows = [[8, 1], [], [3]]  # of special tokens, before each sentence
    with torch.no_grad():
        embeds, lengths = trained(padded(text.tokenize(SENTENCES), LONGEST), padded(rows, PREFIX, -1))
    with TextEncoder.load(tmp_path / "text_encoder", device="cpu") as encoder:
        for i, sentence in enumerate(SENTENCES):
            alone = torch.cat([special.other[rows[i]], encoder.encode(sentence)])
            assert lengths[i] == len(alone)
            torch.testing.assert_close(embeds[i, : lengths[i]], alone, atol=2e-3, rtol=1e-3)


def test_the_tokenizer_splits_as_training_did(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(text.tokenizer_json(), encoding="utf-8")
    tokenizer = load_tokenizer(file)
    every = [*SENTENCES, *(c for seed in range(200) for c in captions(world.draw(seed, 3), seed))]
    assert [tokenizer.encode(sentence) for sentence in every] == text.tokenize(every)
    assert tokenizer.encode("a tiny cat") == [text.ids()["a"], text.UNKNOWN, text.UNKNOWN, text.END]
    longest = max(len(tokens) for tokens in text.tokenize(every))
    assert longest <= text.LONGEST
    assert len(STYLES) + 1 == text.PREFIX, "all styles and a duration"


def test_a_picture_is_one_latent_frame(folder):
    few = components.components_of(folder)
    videos = [make(few, seed, 1) for seed in range(60)]
    assert 3 < sum(video.picture for video in videos) < 20
    for seed, video in enumerate(videos):
        frames = world.frames(world.draw(seed, 1))
        still = few.latents(frames[[3, 3, 3, 3]])[:, 0]
        plain = few.latents(frames)
        torch.testing.assert_close(
            video.latents[0, :, 0].float(), still if video.picture else plain[:, 0], atol=0.02, rtol=0.01
        )
        torch.testing.assert_close(video.latents[0, :, 1:].float(), plain[:, 1:], atol=0.02, rtol=0.01)


def test_what_is_drawn_from_the_pool(folder, monkeypatch):
    monkeypatch.setattr(videos, "FIRST", 16)
    pool, rng = Pool(components.components_of(folder), 2, 0, uses=4), random.Random(0)
    drawn = windows(pool, WindowDrawer(train.BASE), {1: 1.0, 2: 1.0}, 6, rng)
    seen = set()
    for _ in range(30):
        clips, chosen = next(drawn)
        assert len({len(window) for window in chosen}) == 1
        assert len(clips) * len(chosen[0]) >= 6
        seen.add(len(chosen[0]))
        for video, window in zip(clips, chosen, strict=True):
            assert window[-1].chunk < len(video.latents)
            if video.picture and window[0].chunk == 0 and not window[0].clean:
                assert window[0].prefix_frames == 1
            assert len(prefix_rows(window, rng)) == len(window)
    assert seen == {1, 2}
    assert pool.made > 32, "drawing adds new videos"
    monkeypatch.setattr(videos, "POOL", pool.made)
    held = pool.draw(random.Random(3), 2)
    kept, count = held.latents.clone(), pool.made
    pool.add(count)
    assert pool.made == 2 * count
    assert torch.equal(held.latents, kept)
    assert not torch.equal(pool.draw(random.Random(3), 2).latents, kept)


def test_workers_make_batches_of_videos_of_their_own(folder, monkeypatch):
    monkeypatch.setattr(videos, "FIRST", 8)
    drawer = WindowDrawer(train.BASE, windows=(1, 2))
    stream = Stream(components.components_of(folder), [(drawer, examples)], {2: 1.0}, 8, 24, (0, 1), 0)
    batches = loader(stream, 2, "cpu")
    first, second = next(batches), next(batches)  # one of each worker
    for batch in (first, second):
        windows_, n = batch.latents.shape[:2]
        assert batch.tokens.shape == (windows_ * n, LONGEST)
        assert batch.rows.shape == (windows_ * n, PREFIX)
        assert batch.windows.times.shape == (windows_, n)
    alike = {tuple(x.flatten().tolist()) for x in first.latents} & {tuple(x.flatten().tolist()) for x in second.latents}
    assert not alike


def test_chunks_that_a_window_goes_on_from_are_worn(folder):
    """A little noise on them, and on nothing else."""
    pool = [make(components.components_of(folder), seed, 3) for seed in range(4)]
    schedule = Schedule.of(train.BASE.runtime, 3, 1)
    chosen = [window_at(schedule[0], schedule, train.BASE, "text", prefix_frames=6)] * 4
    batch = examples(pool, chosen, random.Random(0))
    clean = batch.latents.float()
    off = (train.worn(clean, batch.windows) - clean).flatten(2).std(-1)
    assert 0 < off[:, 0].max() < 1.2 * train.WEAR
    assert off[:, 1:].max() == 0


def test_the_teacher_runs_the_passes_of_the_base_model():
    """Over the same chunks as the student, with the flags that the base model's own windows have."""
    base, student = train.BASE.with_runtime(num_steps=16), distill.STUDENT.with_runtime(num_steps=16)
    schedule = Schedule.of(base.runtime, 5, 0)
    for it in list(schedule)[::5]:
        passes = distill.teacher_windows(window_at(it, schedule, student, "text"))
        for kind in ("text", "prev"):
            expected = window_at(it, schedule, base, kind)
            for ours, theirs in zip(passes[kind], expected, strict=True):
                same = ("chunk", "position", "time", "clean", "captioned", "first_seen", "step_size")
                assert [getattr(ours, n) for n in same] == [getattr(theirs, n) for n in same]
                assert ours.clean or ours.conditional == theirs.conditional
        alone = {c.chunk: c for c in passes["independent"] if not c.clean}
        for theirs in window_alone(it, schedule, base):
            ours = alone[theirs.chunk]
            assert (ours.position, ours.captioned, ours.conditional) == (0, False, False)
        assert all(c.first_seen == i for i, c in enumerate(passes["independent"]))


@pytest.mark.parametrize("steps", distill.STEPS)
def test_steps_end_where_the_next_begin(steps):
    config = distill.STUDENT.with_runtime(num_steps=steps)
    schedule, grid = Schedule.of(config.runtime, 4, 0), time_grid(steps, config.engine.shortcut_mode)
    for it in schedule:
        window = window_at(it, schedule, config, "text")
        for chunk, end in zip(window, distill.end_times(window, steps), strict=True):
            if chunk.clean:
                assert end == pytest.approx(chunk.time)
            else:
                assert end == pytest.approx(float(grid[it.grid[chunk.chunk - it.chunks[0]] + 1]))


def test_distilling_is_resumed_and_keeps_the_text_encoder(run, folder, tmp_path, monkeypatch):
    run("--steps", 6)
    monkeypatch.setattr(videos, "FIRST", 8)
    out = tmp_path / "student"
    out.mkdir()
    (out / "components.pt").write_bytes((folder / "components.pt").read_bytes())
    for steps in (2, 3):
        options = ["--base", folder / "state.pt", "--out", out, "--batch", 4, "--every", 1, "--threads", 1]
        options += ["--device", "cpu", "--chunks", "2=1", "--steps", steps]
        monkeypatch.setattr(sys, "argv", ["distill", *map(str, options)])
        distill.main()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    base = torch.load(folder / "state.pt", weights_only=True)["average"]
    student = torch.load(out / "state.pt", weights_only=True)["average"]
    changed = {name.split(".")[0] for name in base if not torch.equal(base[name], student[name])}
    assert changed == {"transformer"}


def test_where_captions_are_among_the_encoded_tokens(folder):
    """Those are asked what the caption says; the special tokens before them could not know."""
    rng = random.Random(0)
    schedule = Schedule.of(train.BASE.runtime, 2, 0)
    chosen = [window_at(schedule[5], schedule, train.BASE, "text")] * 3
    batch = examples([make(components.components_of(folder), seed, 2) for seed in range(3)], chosen, rng)
    model = train.Trained(train.BASE)
    with torch.no_grad():
        embeds = model.captions(batch)[0].flatten(0, 1)
        held = batch.tokens != text.PAD
        alone = model.text.t5(input_ids=batch.tokens, attention_mask=held.long()).last_hidden_state
    asked = train.caption_places(batch)
    assert torch.equal(asked.sum(1), held.sum(1))
    torch.testing.assert_close(embeds[asked], alone[held])
