"""A layer over several passes: shared work is computed once, and the token block size changes only last bits."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch

from magi.offload.kv_cache import KVCache
from magi.sampling.prepare import generate_latents
from magi.transformer import block, model
from magi.transformer.block import separate_groups
from magi.transformer.inputs import ChunkInput, Pass

CAPTION_TOKENS = 5
TOKENS = 24  # of a chunk of 32 x 32 pixels
LAYERS = 3


@dataclass
class Made:
    """Results of a forward call, and the calls per layer of self and cross attention and of the K/V projection."""

    tensors: list[torch.Tensor]
    self_attn: list[int] = field(default_factory=lambda: [0] * LAYERS)
    cross_attn: list[int] = field(default_factory=lambda: [0] * LAYERS)
    kv: list[int] = field(default_factory=lambda: [0] * LAYERS)

    def __eq__(self, other):
        return len(self.tensors) == len(other.tensors) and all(map(torch.equal, self.tensors, other.tensors))


@pytest.fixture
def transformer(tiny_config, tiny_model):
    """A small model of three layers."""
    return tiny_model(tiny_config(shape={"num_layers": LAYERS}))


@pytest.fixture
def captions(transformer, tiny_caption):
    """Two captions as the model takes them."""
    return [transformer.encode_caption(tiny_caption(seed, CAPTION_TOKENS).embeds) for seed in range(2)]


@pytest.fixture
def chunk(randn, captions):
    """(place, caption, latents=of that place, **ChunkInput's) -> a chunk in a pass."""
    latents = {place: randn(1, 16, 6, 4, 4, seed=place) for place in range(6)}

    def make(place, caption, x=None, t=0.3, first_kv_chunk=0, **options):
        return ChunkInput(place, latents[place] if x is None else x, t, captions[caption], first_kv_chunk, **options)

    return make


@pytest.fixture
def forward(transformer, monkeypatch):
    """(passes, shared=True, cached=chunks with K/V in the cache) -> the results: velocities, and the stored K/V."""

    @torch.inference_mode()
    def run(passes, shared=True, cached=()):
        cache = KVCache.for_run(transformer, 4, 4, 4)
        for c in cached:
            transformer.forward([Pass((c,), conditional=False)], cache)
        made = Made([])
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(model, "shared_groups", separate_groups)
            count(made, patch)
            velocities = transformer.forward(passes, cache)
        stored = {c.chunk for p in passes for c in p.chunks if c.store}
        made.tensors = [v for found in velocities for v in found if v is not None]
        made.tensors += [kv for layer in cache.stream(sorted(stored)) for kv in layer.values()]
        return made

    def count(made, patch):
        layers = list(transformer.blocks)
        attend, write, run_layer = block.attend, block._write_kv, model.run_layer
        at = 0

        def running(settings, weights, *args):
            nonlocal at
            at = next(i for i, layer in enumerate(layers) if layer is weights)
            return run_layer(settings, weights, *args)

        def attending(q, k, *args):
            (made.cross_attn if k.shape[1] == CAPTION_TOKENS else made.self_attn)[at] += 1
            return attend(q, k, *args)

        def writing(*args):
            made.kv[at] += 1
            return write(*args)

        patch.setattr(model, "run_layer", running)
        patch.setattr(block, "attend", attending)
        patch.setattr(block, "_write_kv", writing)

    return run


# -- what passes share -----------------------------------------------------------------------------------------------


def test_the_first_layers_self_attention_is_one_for_the_passes_of_guidance(chunk, forward):
    text, prev = (tuple(chunk(place, caption) for place in (0, 1, 2)) for caption in (0, 1))
    passes = [Pass(text, conditional=True), Pass(prev, conditional=False)]
    together, apart = forward(passes), forward(passes, shared=False)
    assert apart.self_attn == apart.kv == [6, 6, 6]
    assert together.self_attn == together.kv == [3, 6, 6]
    assert together.cross_attn == apart.cross_attn == [6, 6, 6]
    assert together == apart
    assert not torch.allclose(together.tensors[0], together.tensors[3], atol=1e-3), (
        "they differ in all that comes after"
    )


def test_chunks_that_only_one_of_the_passes_holds(chunk, forward):
    refresh = chunk(0, 1, t=1.0, store=True)
    text = Pass(
        (chunk(1, 0, first_kv_chunk=1), chunk(2, 0, first_kv_chunk=1), chunk(3, 0, first_kv_chunk=1)), conditional=True
    )
    prev = Pass((refresh, chunk(1, 1, first_kv_chunk=1), chunk(2, 1, first_kv_chunk=1)), conditional=False)
    for passes in ([text, prev], [prev, text]):
        together = forward(passes)
        assert together.self_attn == together.kv == [4, 6, 6]
        assert together == forward(passes, shared=False)


def test_chunks_that_both_passes_see_in_the_cache(chunk, forward):
    old = [chunk(place, 1, t=1.0, store=True) for place in (0, 1)]
    passes = [Pass((chunk(2, name), chunk(3, name, first_kv_chunk=1)), conditional=name == 0) for name in (0, 1)]
    together = forward(passes, cached=old)
    assert together.self_attn == [2, 4, 4]
    assert together == forward(passes, shared=False, cached=old)


def test_the_independent_pass_of_the_first_chunk_is_shared_and_that_of_others_is_not(chunk, forward):
    first, second = chunk(0, 0), chunk(1, 0)
    alone = [Pass((chunk(0, 1, x=item.latents),), conditional=False) for item in (first, second)]
    passes = [Pass((first, second), conditional=True), *alone]
    together = forward(passes)
    assert together.self_attn == [3, 4, 4]
    assert together == forward(passes, shared=False)


def test_other_latents_are_another_computation(chunk, forward, randn):
    other = chunk(1, 0, x=randn(1, 16, 6, 4, 4, seed="other"))
    passes = [Pass((chunk(0, 0), chunk(1, 0)), conditional=True), Pass((chunk(0, 0), other), conditional=True)]
    together = forward(passes)
    assert together.self_attn == [4, 4, 4]
    assert together == forward(passes, shared=False)
    first, one, same, another = together.tensors
    assert torch.equal(first, same)
    assert not torch.allclose(one, another, atol=1e-3)


def test_another_range_is_another_computation(chunk, forward):
    """As in a distilled model's view of a chunk alone."""
    passes = [
        Pass((chunk(1, 0), chunk(2, 0)), conditional=True),
        Pass((chunk(1, 0, first_kv_chunk=1),), conditional=True),
    ]
    old = [chunk(0, 1, store=True)]
    together = forward(passes, cached=old)
    assert together.self_attn == [3, 3, 3]
    assert together == forward(passes, shared=False, cached=old)


@pytest.mark.parametrize("order", [1, -1])
def test_a_chunk_that_one_pass_holds_and_another_takes_from_the_cache(order, chunk, forward, randn):
    old = [chunk(0, 1, x=randn(1, 16, 6, 4, 4, seed="old"), store=True)]
    passes = [Pass((chunk(0, 0), chunk(1, 0)), conditional=True), Pass((chunk(1, 1),), conditional=False)][::order]
    assert forward(passes, cached=old) == forward(passes, shared=False, cached=old)


@pytest.mark.parametrize("distill", [False, True], ids=["base", "distill"])
@pytest.mark.parametrize(("prefix_frames", "window"), [(0, 4), (9, 2)])
def test_sharing_does_not_change_whole_runs(
    distill, prefix_frames, window, tiny_config, tiny_model, tiny_caption, tiny_tokens, randn, monkeypatch
):
    config = tiny_config(distill, num_frames=60, window_size=window)
    prefix = randn(1, 16, prefix_frames, 4, 4) if prefix_frames else None

    def run():
        options = {"caption": tiny_caption(), "special_tokens": tiny_tokens, "prefix": prefix}
        return [c.latents for c in generate_latents(tiny_model(config), **options)]

    together = run()
    monkeypatch.setattr(model, "shared_groups", separate_groups)
    assert all(map(torch.equal, together, run()))


# -- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, TOKENS, 1000])
def test_progress_rises_evenly_to_the_end(size, chunk, transformer):
    transformer.token_block = size
    passes = [Pass((chunk(0, 0), chunk(1, 0)), conditional=True), Pass((chunk(0, 1),), conditional=False)]
    seen = [0.0]
    transformer.forward(passes, KVCache.for_run(transformer, 1, 4, 4), on_progress=seen.append)
    steps = [b - a for a, b in itertools.pairwise(seen)]
    blocks = -(-TOKENS // size)
    assert min(steps) > 0
    assert seen[-1] == 1
    assert max(steps) == pytest.approx(1 / LAYERS / (2 + 3 * blocks)), "of the first layer, where K/V are shared"
    assert min(steps) == pytest.approx(1 / LAYERS / (3 + 3 * blocks))
    for layer in range(1, LAYERS):
        assert any(fraction == pytest.approx(layer / LAYERS) for fraction in seen)


def test_what_on_progress_raises_ends_the_call_at_once(chunk, transformer):
    transformer.token_block = 1
    seen = []

    def stop(fraction):
        seen.append(fraction)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transformer.forward(
            [Pass((chunk(0, 0),), conditional=True)], KVCache.for_run(transformer, 1, 4, 4), on_progress=stop
        )
    assert len(seen) == 7


# -- token blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("weights", [{}, {"fp8": True}, {"precision": "fp8"}], ids=["dense", "fp8", "stored fp8"])
@pytest.mark.parametrize("distill", [False, True], ids=["base", "distill"])
def test_any_token_block_gives_the_same(distill, weights, gated, tiny_config, tiny_model, tiny_caption, tiny_tokens):
    # float8 layers round their input: a last bit now and then becomes a step of e4m3.
    limit = 5e-3 if "fp8" in weights else 2e-6
    shape = {"num_layers": LAYERS, "gated_linear_unit": gated}
    model = tiny_model(tiny_config(distill, num_steps=4, num_frames=24, shape=shape), **weights)

    def run(size):
        model.token_block = size
        return next(generate_latents(model, caption=tiny_caption(), special_tokens=tiny_tokens)).latents

    whole = run(TOKENS)
    assert torch.equal(run(TOKENS + 1), whole)
    for size in (1, 7, TOKENS - 1):
        made = run(size)
        assert float((made - whole).norm() / whole.norm()) < limit
