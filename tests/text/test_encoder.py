"""Tiny T5 encoders in every layout, compared with transformers' own loading and with each other."""

import gc
import json
import shutil
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from magi.errors import MagiError
from magi.text import encoder as encoder_module
from magi.text import t5_model
from magi.text.embedding_cache import EmbeddingCache
from magi.text.encode import check_encoder, encode_prompts
from magi.text.encoder import TextEncoder, encoder_fingerprint
from magi.text.t5_checkpoint import read_t5

TEXT = "a cat walks through the sunlit garden"
FP8 = torch.float8_e4m3fn
LINEAR_ENDS = (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".wi_0.weight", ".wi_1.weight", ".wo.weight")


class Cancelled(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    """What is imported is not searched for garbage each time an encoder closes."""
    import transformers  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def expected(official):
    """(tokens, d_model) of TEXT by transformers, padded to 800 and masked as the public implementation does it."""
    return _transformers_output(official, official / "spiece.model", pad_to=800)


def _transformers_output(folder, spiece, pad_to=0):
    import sentencepiece
    import transformers

    if torch.__version__ < "2.6" and any(folder.glob("*.bin")):
        pytest.skip("transformers does not open .bin files with torch before 2.6, to compare with")
    model = transformers.T5EncoderModel.from_pretrained(folder, local_files_only=True).eval()
    ids = [*sentencepiece.SentencePieceProcessor(model_file=str(spiece)).encode(TEXT), 1]
    padded = torch.tensor([ids + [0] * (pad_to - len(ids))])
    with torch.no_grad():
        mask = (torch.arange(padded.shape[1]) < len(ids))[None].long()
        return model(input_ids=padded, attention_mask=mask).last_hidden_state[0, : len(ids)]


def _encode(path, text=TEXT, **options):
    with TextEncoder.load(path, **options) as encoder:
        return encoder.encode(text)


def _close(ours, theirs, limit=1e-5):
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert float((ours - theirs).norm() / theirs.norm()) < limit


def _single(state, folder, name="t5xxl.safetensors"):
    save_file({k: v.contiguous() for k, v in state.items()}, folder / name, metadata={"format": "pt"})
    return folder / name


def test_official_folder_equals_the_padded_and_masked_run(official, expected):
    _close(_encode(official), expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_safetensors_folder(encoder_state, official, expected, tmp_path, sharded):
    if sharded:
        names = sorted(encoder_state)
        parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
        for file, part in parts.items():
            _single({n: encoder_state[n] for n in part}, tmp_path, file)
        index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        _single(encoder_state, tmp_path, "model.safetensors")
    shutil.copy(official / "config.json", tmp_path)
    shutil.copy(official / "spiece.model", tmp_path)
    assert torch.equal(_encode(tmp_path), _encode(official))
    _close(_encode(tmp_path), expected)


def test_layout_of_diffusers_with_the_tokenizer_next_to_it(encoder_state, official, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    _single(encoder_state, tmp_path / "text_encoder", "model.safetensors")
    shutil.copy(official / "spiece.model", tmp_path / "tokenizer")
    assert torch.equal(_encode(tmp_path / "text_encoder"), _encode(official))


def test_bin_shards_without_an_index(official, tmp_path):
    shutil.copytree(official, tmp_path / "t5")
    (tmp_path / "t5" / "pytorch_model.bin.index.json").unlink()
    assert torch.equal(_encode(tmp_path / "t5"), _encode(official))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, FP8], ids=str)
@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight"])
def test_single_file_is_computed_in_float32_from_what_is_stored(
    encoder_state, official, tmp_path, reference, stored, embedding
):
    state = {k: v.to(stored) for k, v in encoder_state.items()}
    renamed = {embedding if k == "shared.weight" else k: v for k, v in state.items()}
    path = _single(renamed, tmp_path, "t5xxl.safetensors")
    ours = _encode(path, tokenizer=official)

    widened = tmp_path / "widened"
    widened.mkdir()
    _single({k: v.float() for k, v in state.items()}, widened, "model.safetensors")
    shutil.copy(official / "config.json", widened)
    _close(ours, _transformers_output(widened, official / "spiece.model"))


@pytest.mark.parametrize("names", ["scale_weight", "weight_scale"])
def test_scaled_fp8(encoder_state, official, expected, tmp_path, names):
    state, dequantised = {"scaled_fp8": torch.zeros(2, dtype=FP8)}, {}
    for name, tensor in encoder_state.items():
        dequantised[name] = tensor
        state[name] = tensor.to(torch.float16)
        if name.endswith(LINEAR_ENDS):
            scale = tensor.abs().max() / 448
            state[name] = (tensor / scale).to(FP8)
            state[f"{name.removesuffix('.weight')}.{names}"] = scale.reshape([] if names == "scale_weight" else [1])
            state[f"{name.removesuffix('.weight')}.scale_input"] = torch.ones(1)
            dequantised[name] = state[name].float() * scale
    path = _single(state, tmp_path, "t5xxl_fp8_e4m3fn_scaled.safetensors")
    with TextEncoder.load(path, official) as encoder:
        ours = encoder.encode(TEXT)
        linear = {buffer.dtype for name, buffer in encoder._model.encoder.block.named_buffers() if "stored" in name}
        assert linear == {FP8}  # as in the file, no wider copy
    plain = _single(dequantised, tmp_path, "dequantised.safetensors")
    _close(ours, _encode(plain, tokenizer=official), 2e-3)  # the embedding of the first is float16
    assert 1e-4 < float((ours - expected).norm() / expected.norm()) < 0.2


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, FP8], ids=str)
def test_bfloat16_on_request(encoder_state, official, tmp_path, stored):
    path = _single({k: v.to(stored) for k, v in encoder_state.items()}, tmp_path)
    with TextEncoder.load(path, official, dtype=torch.bfloat16) as encoder:
        ours = encoder.encode(TEXT)
        tensors = [*encoder._model.parameters(), *encoder._model.buffers()]
        assert max(t.dtype.itemsize for t in tensors) <= 2
    exact = _encode(path, tokenizer=official)
    assert 0 < float((ours - exact).norm() / exact.norm()) < 0.05


def test_byt5_folder_of_the_demo(reference, encoder_state, tmp_path):
    _single(encoder_state, tmp_path, "model.safetensors")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    text = "a cat, café"
    ours = _encode(tmp_path, text)

    import transformers

    ids = transformers.ByT5Tokenizer()(text, return_tensors="pt").input_ids
    with torch.no_grad():
        _close(ours, reference.encoder(input_ids=ids).last_hidden_state[0])


def _as_json(spiece: Path, file: Path) -> None:
    """Writes the same pieces for the tokenizers library."""
    import sentencepiece
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    model = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    model.enable_truncation(3)
    model.enable_padding(length=50)
    model.save(str(file))


def test_tokenizer_json(official, spiece, tmp_path):
    _as_json(spiece, tmp_path / "tokenizer.json")
    assert torch.equal(_encode(official, tokenizer=tmp_path), _encode(official))
    assert torch.equal(_encode(official, tokenizer=tmp_path / "tokenizer.json"), _encode(official))


@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json"])
def test_words_that_the_tokenizer_does_not_know_are_told_every_time(kind, official, spiece, tmp_path):
    folder = shutil.copytree(official, tmp_path / "encoder")
    if kind == "tokenizer.json":
        (folder / "spiece.model").unlink()
        _as_json(spiece, folder / kind)
    notices: list[str] = []
    how = {"cache": EmbeddingCache(tmp_path / "cache"), "on_notice": notices.append}
    expected = 'The text encoder does not know "\U0001f431", "1970": to it any unknown word is the same.'
    for _ in range(2):  # encoded, then from the cache
        encode_prompts(["a cat \U0001f431 walks, 1970!", "the (\U0001f431)"], folder, **how)
    assert notices == [expected] * 2
    encode_prompts([TEXT], folder, **how)
    assert len(notices) == 2
    with pytest.warns(UserWarning, match='"8" and 1 more: '):
        encode_prompts(["1 2 3 4 5 6 7 8 9"], folder)
    (folder / kind).unlink()
    encode_prompts(["the \U0001f431"], folder, tokenizer=spiece, **how)
    assert len(notices) == 3


def test_long_prompts_are_cut_with_a_warning_and_keep_the_end_token(official, spiece, reference):
    import sentencepiece

    ids = [*sentencepiece.SentencePieceProcessor(model_file=str(spiece)).encode(TEXT), 1]
    with (
        TextEncoder.load(official) as encoder,
        pytest.warns(UserWarning, match=f"{len(ids)} tokens; only the first 6"),
    ):
        cut = encoder.encode(TEXT, max_tokens=6)
    with torch.no_grad():
        _close(cut, reference.encoder(input_ids=torch.tensor([[*ids[:5], 1]])).last_hidden_state[0])


def test_progress_counts_tensors_then_blocks_and_cancels(official):
    loads, blocks = [], []
    with TextEncoder.load(official, progress=lambda *p: loads.append(p)) as encoder:
        encoder.encode(TEXT, progress=lambda *p: blocks.append(p))
        assert loads[-1][0] == loads[-1][1] == len(loads)
        assert blocks == [(1, 2), (2, 2)]

        def cancel(done, total):
            raise Cancelled(done)

        with pytest.raises(Cancelled, match="1"):
            encoder.encode(TEXT, progress=cancel)
        encoder.encode(TEXT)  # nothing of the cancelled run is left
        assert len(blocks) == 2
    with pytest.raises(Cancelled):
        TextEncoder.load(official, progress=cancel)


def test_close(official):
    encoder = TextEncoder.load(official)
    model = weakref.ref(encoder._model)
    gc.collect()
    encoder.close()
    encoder.close()
    assert model() is None
    with pytest.raises(MagiError, match="closed"):
        encoder.encode(TEXT)


def test_fingerprint(official, encoder_state, spiece, tmp_path):
    with TextEncoder.load(official) as encoder:
        assert encoder.fingerprint == encoder_fingerprint(official) == encoder_fingerprint(official, spiece)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = encoder_fingerprint(_single(encoder_state, tmp_path / "a"), spiece)
    assert encoder_fingerprint(_single(encoder_state, tmp_path / "b", "renamed.safetensors"), spiece) == first
    changed = {k: v + 0.01 if k == "shared.weight" else v for k, v in encoder_state.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    others = {
        first,
        encoder_fingerprint(official),
        encoder_fingerprint(_single(changed, tmp_path / "b"), spiece),
        encoder_fingerprint(tmp_path / "a", tmp_path),
        encoder_fingerprint(tmp_path / "a", spiece, torch.bfloat16),
    }
    assert len(others) == 5


@pytest.mark.parametrize("stored", ["bin", torch.float16], ids=str)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_weights_are_mapped_not_copied(reference, spiece, tmp_path, stored):
    rows = 200_000  # 51 MB in float32: enough to tell from noise
    state = {k: v for k, v in reference.encoder.state_dict().items() if k != "embed_tokens.weight"}
    state = {f"encoder.{k}": v for k, v in state.items()} | {"shared.weight": torch.randn(rows, 64)}
    if stored == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
        path = tmp_path / "pytorch_model.bin"
    else:
        path = _single({k: v.to(stored) for k, v in state.items()}, tmp_path)
    del state
    _encode(path, tokenizer=spiece)  # whatever the first run allocates for good
    before = _anonymous_bytes()
    with TextEncoder.load(path, spiece) as encoder:
        encoder.encode(TEXT)
        assert _anonymous_bytes() - before < path.stat().st_size / 4


def _anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


# --- what a user can get wrong ---------------------------------------------------------------------------------------


def _without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


BAD_STATES = {
    "missing": (
        lambda s: _without(s, "encoder.block.1.layer.0.SelfAttention.k.weight", "encoder.final_layer_norm.weight"),
        "missing: encoder.final_layer_norm.weight, encoder.block.1.layer.0.SelfAttention.k.weight",
    ),
    "unexpected": (lambda s: s | {"encoder.extra.weight": torch.zeros(2)}, "unexpected: encoder.extra.weight"),
    "shape": (
        lambda s: s | {"encoder.block.1.layer.0.SelfAttention.o.weight": torch.zeros(64, 63)},
        "wrong shape: encoder.block.1.layer.0.SelfAttention.o",
    ),
    "type": (
        lambda s: s | {"encoder.final_layer_norm.weight": torch.zeros(64, dtype=torch.uint8)},
        r"type that cannot be used .*final_layer_norm.weight \(uint8\)",
    ),
    "scale a block": (
        lambda s: s | {"encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(4, 4)},
        "scaled in a way .*SelfAttention.q.weight",
    ),
    "scaled embedding": (
        lambda s: s | {"encoder.embed_tokens.scale_weight": torch.ones(1)},
        "scaled in a way .*embed_tokens.weight",
    ),
    "no embedding": (lambda s: _without(s, "shared.weight"), "lacks shared.weight"),
    "vae": (lambda s: {"decoder.conv.weight": torch.zeros(2), "quant.weight": torch.zeros(2)}, "not a T5 encoder"),
    "first version": (
        lambda s: s | {"encoder.block.0.layer.1.DenseReluDense.wi.weight": torch.zeros(96, 64)},
        "T5 of the first version",
    ),
    "umt5": (
        lambda s: s | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(32, 4)},
        "UMT5",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_weights_that_do_not_fit(encoder_state, spiece, tmp_path, case):
    change, message = BAD_STATES[case]
    with pytest.raises(MagiError, match=message):
        TextEncoder.load(_single(change(encoder_state), tmp_path), spiece)


@pytest.mark.parametrize(
    "names",
    [
        ("pytorch_model.bin.index.json", "pytorch_model.fp16.bin.index.json"),
        ("pytorch_model.bin", "pytorch_model.fp16.bin"),
        ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin"),
    ],
)
def test_a_folder_of_several_encoders(names, spiece, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MagiError, match=r"Give one of these") as caught:
        TextEncoder.load(tmp_path, spiece)
    for name in (str(tmp_path), *names):
        assert name in str(caught.value)


def test_files_missing_or_damaged(official, spiece, tmp_path):
    with pytest.raises(MagiError, match=r"text encoder is not at .*nowhere.*magi download t5"):
        TextEncoder.load(tmp_path / "nowhere", spiece)
    with pytest.raises(MagiError, match="holds no text encoder"):
        TextEncoder.load(tmp_path, spiece)
    folder = tmp_path / "t5"
    shutil.copytree(official, folder)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MagiError, match=r"00002-of-00002\.bin.*not a whole torch file"):
        TextEncoder.load(folder)
    shard.unlink()
    with pytest.raises(MagiError, match=r"1 of 2 shards are missing.*00002-of-00002\.bin"):
        TextEncoder.load(folder)


def test_config_of_another_model(official, tmp_path):
    shutil.copytree(official, tmp_path / "t5")
    file = tmp_path / "t5" / "config.json"
    good = json.loads(file.read_text())
    for wrong in ({"model_type": "umt5"}, {"feed_forward_proj": "relu"}):
        file.write_text(json.dumps(good | wrong))
        with pytest.raises(MagiError, match=r"config\.json.*MAGI-1 was trained with T5 v1\.1"):
            TextEncoder.load(tmp_path / "t5")
    for broken in ("{", "[]", json.dumps(good | {"layer_norm_epsilon": "x"})):
        file.write_text(broken)
        with pytest.raises(MagiError, match=r"config\.json.*not a readable T5 config"):
            TextEncoder.load(tmp_path / "t5")
    file.write_text(json.dumps(good | {"layer_norm_epsilon": 0.5}))
    assert not torch.allclose(_encode(tmp_path / "t5"), _encode(official), atol=1e-3)


def test_tokenizer_missing_damaged_or_anothers(encoder_state, official, tmp_path):
    path = _single(encoder_state, tmp_path)
    with pytest.raises(MagiError, match=r"No tokenizer in .*spiece\.model .* is needed"):
        TextEncoder.load(path)
    with pytest.raises(MagiError, match=r"no tokenizer file or folder.*nowhere"):
        TextEncoder.load(path, tmp_path / "nowhere")
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(MagiError, match=f"{name}.*not a readable tokenizer"):
            TextEncoder.load(path, tmp_path / name)
    small = encoder_state | {"shared.weight": encoder_state["shared.weight"][:20].clone()}
    with pytest.raises(MagiError, match=r"entries.*only 20: they belong to different models"):
        TextEncoder.load(_single(small, tmp_path, "small.safetensors"), official)


def test_dtype_and_device(official):
    with pytest.raises(MagiError, match=r"float16.*Use torch\.float32 or torch\.bfloat16"):
        TextEncoder.load(official, dtype=torch.float16)
    with pytest.raises(MagiError, match="device 'toaster' cannot be used"):
        TextEncoder.load(official, device="toaster")


def test_values_that_are_not_finite(encoder_state, official, tmp_path):
    broken = encoder_state | {"encoder.final_layer_norm.weight": torch.full((64,), torch.nan)}
    with pytest.raises(
        MagiError, match=r"t5xxl\.safetensors.* values that are no numbers .*damaged\. Download it again"
    ):
        _encode(_single(broken, tmp_path), tokenizer=official)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_cleaned_and_each_distinct_one_is_encoded_once(official):
    steps = []
    texts = ["A CAT walks.", "the dog", "a  cat walks."]
    first, second, third = encode_prompts(texts, official, progress=lambda *p: steps.append(p))
    assert torch.equal(first, third)
    assert torch.equal(first, _encode(official, "a cat walks."))
    assert torch.equal(second, _encode(official, "the dog"))
    assert steps[-4:] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(encode_prompts("A Cat", official, clean=False)[0], _encode(official, "A Cat"))


def test_cached_prompts_need_no_encoder_at_all(official, tmp_path, monkeypatch):
    folder = tmp_path / "t5"
    shutil.copytree(official, folder)
    cache = EmbeddingCache(tmp_path / "cache")
    made = encode_prompts(["a cat", "a dog"], folder, cache=cache)

    def refuse(*_, **__):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(TextEncoder, "load", refuse)
    again = encode_prompts(["A dog", "a cat"], folder, cache=cache)
    assert torch.equal(again[0], made[1])
    assert torch.equal(again[1], made[0])
    shutil.rmtree(folder)
    assert torch.equal(encode_prompts(["a cat"], folder, cache=EmbeddingCache(tmp_path / "cache"))[0], made[0])
    monkeypatch.undo()
    with pytest.raises(MagiError, match=r"text encoder is not at .*t5.*magi download t5"):
        encode_prompts(["a bird"], folder, cache=cache)


SPARED = {
    "everything": lambda folder: shutil.rmtree(folder),
    "the weights": lambda folder: [file.unlink() for file in folder.glob("*.bin")],
    "the tokenizer": lambda folder: (folder / "spiece.model").unlink(),
}


@pytest.mark.parametrize("gone", SPARED)
@pytest.mark.parametrize("beside", [True, False])
def test_whatever_is_away_is_not_missed(gone, beside, official, tmp_path, monkeypatch):
    folder = shutil.copytree(official, tmp_path / "t5")
    words = None
    if not beside:
        words = tmp_path / "words" / "spiece.model"
        words.parent.mkdir()
        shutil.copy(folder / "spiece.model", words)
    how = {"tokenizer": words, "cache": EmbeddingCache(tmp_path / "cache")}
    made = encode_prompts(["a cat"], folder, **how)
    SPARED[gone](folder)
    if words and gone == "everything":
        shutil.rmtree(words.parent)
    check_encoder(["a cat"], folder, **how)
    assert torch.equal(encode_prompts(["A cat"], folder, **how)[0], made[0])
    monkeypatch.chdir(tmp_path)
    if not words:
        assert torch.equal(encode_prompts(["A cat"], "t5", **how)[0], made[0]), "the same place by another name"
    if gone != "the tokenizer":
        for ask in (check_encoder, encode_prompts):
            with pytest.raises(MagiError, match="t5"):
                ask(["a cat", "a bird"], folder, **how)


def test_a_changed_encoder_never_gives_the_old_embeddings(official, tmp_path, monkeypatch):
    """Whichever part is changed, and whichever other is away."""
    folder, cache = shutil.copytree(official, tmp_path / "t5"), EmbeddingCache(tmp_path / "cache")
    encode_prompts(["a cat"], folder, cache=cache)
    monkeypatch.setattr(TextEncoder, "load", lambda *_, **__: pytest.fail("encoded anew"))

    def encoded_anew() -> bool:
        try:
            encode_prompts(["a cat"], folder, cache=cache)
        except MagiError:
            return True
        except pytest.fail.Exception:
            return True
        return False

    assert not encoded_anew()
    shard, words = sorted(folder.glob("*.bin"))[0], folder / "spiece.model"
    changes = {shard: bytes([1]) + shard.read_bytes()[1:], words: words.read_bytes() + b"x"}
    for changed, other in ((shard, words), (words, shard)):
        was, beside = changed.read_bytes(), other.read_bytes()
        changed.write_bytes(changes[changed])
        assert encoded_anew(), changed.name
        for file in folder.glob("*.bin") if other == shard else [words]:
            file.rename(tmp_path / file.name)
        assert encoded_anew(), f"{changed.name} with {other.name} away"
        for file in tmp_path.glob("*.*"):
            file.rename(folder / file.name)
        changed.write_bytes(was)
        assert other.read_bytes() == beside
        assert not encoded_anew()
    # Some of the shards are left: nobody knows whether they are the old ones.
    shard.unlink()
    assert encoded_anew()


def test_another_place_is_another_encoder(official, tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    folder = shutil.copytree(official, tmp_path / "t5")
    encode_prompts(["a cat"], folder, cache=cache)
    for nowhere in (tmp_path / "other", tmp_path):
        with pytest.raises(MagiError, match="text encoder"):
            encode_prompts(["a cat"], nowhere, cache=cache)


def test_only_what_is_missing_is_encoded(official, tmp_path):
    cache = EmbeddingCache(tmp_path)
    encode_prompts(["a cat"], official, cache=cache)
    steps = []
    encode_prompts(["a cat", "a dog"], official, cache=cache, progress=lambda *p: steps.append(p))
    assert steps[-2:] == [(1, 2), (2, 2)]


def test_other_options_are_other_entries(official, tmp_path):
    cache = EmbeddingCache(tmp_path)
    whole = encode_prompts([TEXT], official, cache=cache)[0]
    rounded = encode_prompts([TEXT], official, cache=cache, dtype=torch.bfloat16)[0]
    with pytest.warns(UserWarning, match="only the first 4"):
        cut = encode_prompts([TEXT], official, cache=cache, max_tokens=4)[0]
    assert cut.shape == (4, 64)
    assert not torch.equal(whole, rounded)


def test_finished_prompts_survive_a_cancel(official, tmp_path):
    cache = EmbeddingCache(tmp_path)

    def cancel_in_the_second(done, total):
        if (done, total) == (3, 4):
            raise Cancelled

    with pytest.raises(Cancelled):
        encode_prompts(["a cat", "a dog"], official, cache=cache, progress=cancel_in_the_second)
    steps = []
    encode_prompts(["a cat", "a dog"], official, cache=cache, progress=lambda *p: steps.append(p))
    assert steps[-1] == (2, 2)


def test_blank_prompts_need_no_encoder_and_warn(tmp_path):
    with pytest.warns(UserWarning, match="is left to encode: it runs as unconditional") as caught:
        blank = encode_prompts(["....", ""], tmp_path / "nowhere", channels=64)
    assert [str(w.message).split("'")[1] for w in caught] == ["....", ""]
    assert [tuple(b.shape) for b in blank] == [(0, 64), (0, 64)]


def test_a_blank_prompt_is_as_wide_as_the_others(official):
    with pytest.warns(UserWarning, match="unconditional"):
        cat, blank = encode_prompts(["a cat", ""], official)
    assert blank.shape == (0, cat.shape[1])


def test_a_transformers_too_new_for_torch(official, monkeypatch):
    import transformers

    def hidden(*_):
        raise ImportError("T5EncoderModel requires the PyTorch library")

    monkeypatch.setattr(transformers, "T5EncoderModel", hidden)
    with pytest.raises(MagiError, match=r'does not work with torch.*Update torch, or .*"transformers<5"'):
        TextEncoder.load(official)


# --- a device that is too small -------------------------------------------------------------------------------------------


class Card:
    """A device of limited size, played by the CPU: what is placed is copied, and counted as long as it lives."""

    def __init__(self, monkeypatch, size=1 << 40):
        self.size, self.now, self.peak = size, 0, 0
        self._place = t5_model.place
        monkeypatch.setattr(t5_model, "place", self.place)

    def place(self, tensor, device, dtype):
        placed = self._place(tensor, device, dtype).clone()
        if self.now + placed.nbytes > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.now += placed.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(placed.untyped_storage(), self._gone, placed.nbytes)
        return placed

    def _gone(self, nbytes):
        self.now -= nbytes


@pytest.fixture
def card(monkeypatch):
    return lambda size=1 << 40: Card(monkeypatch, size)


def _sizes(checkpoint):
    """Bytes of all weights, of the largest linear layer, and of what is neither linear nor the embedding."""
    linear = [t.nbytes for name, t in checkpoint.tensors.items() if name.endswith(LINEAR_ENDS)]
    total = sum(t.nbytes for t in checkpoint.tensors.values())
    return total, max(linear), total - sum(linear) - checkpoint.tensors["shared.weight"].nbytes


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, FP8, "scaled"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streaming_gives_the_same_bits(encoder_state, official, tmp_path, stored, dtype):
    state = {k: v.to(torch.float16 if stored == "scaled" else stored) for k, v in encoder_state.items()}
    if stored == "scaled":
        for name in [name for name in state if name.endswith(LINEAR_ENDS)]:
            state[name] = (encoder_state[name] * 100).to(FP8)
            state[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.01)
    path = _single(state, tmp_path)
    resident, streamed = (_encode(path, tokenizer=official, dtype=dtype, stream=stream) for stream in (False, True))
    assert torch.equal(streamed, resident)


def test_streamed_weights_are_on_the_device_one_at_a_time(official, card):
    device = card()
    total, largest, small = _sizes(read_t5(official))
    with TextEncoder.load(official, stream=True) as encoder:
        assert encoder.streaming
        assert device.now == small < total / 20
        assert sum(p.nbytes for p in encoder._model.parameters()) == small, "the embedding waits too"
        encoder.encode(TEXT)
        assert device.now == small
        assert device.peak <= small + 2 * largest < total / 2
    with TextEncoder.load(official) as encoder:
        assert not encoder.streaming
        assert device.now >= total - largest, "resident ones stay"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("missing", "streams"), [(1, True), (0, False)])
def test_weights_stream_where_less_is_free_than_they_take(official, monkeypatch, missing, streams, dtype):
    total = _sizes(read_t5(official))[0] * dtype.itemsize // 4
    monkeypatch.setattr(encoder_module, "free_memory", lambda device: total + t5_model.WORKING_BYTES - missing)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with TextEncoder.load(official, dtype=dtype) as encoder:
            assert encoder.streaming == streams
    assert [str(w.message)[:75] for w in said] == [
        "The text encoder does not fit into the memory of cpu. Its weights stay on t"
    ] * streams


def test_room_is_asked_for_before_what_is_free_is_looked_at(monkeypatch):
    events = []
    monkeypatch.setattr(encoder_module, "free_memory", lambda device: events.append("looked") or 10)
    assert encoder_module._fits(10, torch.device("meta"), events.append)
    assert events == [10, "looked"]
    assert encoder_module._fits(10, torch.device("cpu"), lambda nbytes: pytest.fail("the host's own"))


def test_a_card_that_fills_up_while_weights_are_placed(official, card):
    total, _, small = _sizes(read_t5(official))
    expected = _encode(official)
    device = card(total // 2)
    steps = []
    with pytest.warns(UserWarning, match="copied over") as said:
        encoder = TextEncoder.load(official, progress=lambda *at: steps.append(at))
    assert len(said) == 1
    assert device.now == small
    assert steps[-1][0] == steps[-1][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(encoder.encode(TEXT), expected)
        assert torch.equal(encoder.encode(TEXT), expected)
    encoder.close()
    assert device.now == 0


def test_a_card_that_fills_up_while_a_prompt_is_encoded(official, card, monkeypatch):
    expected = _encode(official)
    device = card()
    forward = torch.nn.Linear.forward

    def full(self, x):
        if device.now > 100_000:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", full)
    steps = []
    with TextEncoder.load(official) as encoder:
        with pytest.warns(UserWarning, match="copied over") as said:
            assert torch.equal(encoder.encode(TEXT, progress=lambda *at: steps.append(at)), expected)
        assert len(said) == 1
        assert encoder.streaming
        assert steps[-1] == (2, 2)
        assert device.now == _sizes(read_t5(official))[2], "what was resident has gone"


@pytest.mark.filterwarnings("ignore:The text encoder does not fit")
@pytest.mark.parametrize("stream", [None, True])
def test_a_card_too_small_for_a_layer(official, card, stream):
    _, largest, small = _sizes(read_t5(official))
    card(small + largest // 2)
    with pytest.raises(MagiError, match=r"does not fit into the memory of cpu\. Use device 'cpu'"):
        _encode(official, stream=stream)


def test_other_errors_are_not_taken_for_it(official, monkeypatch):
    def broken(self, x):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(torch.nn.Linear, "forward", broken)
    with TextEncoder.load(official) as encoder, pytest.raises(RuntimeError, match="device-side assert"):
        encoder.encode(TEXT)


def test_prompts_can_be_encoded_by_streamed_weights(official, card, tmp_path):
    expected = encode_prompts([TEXT, "a dog"], official)
    device = card()
    made = encode_prompts([TEXT, "a dog"], official, stream=True)
    assert all(map(torch.equal, made, expected))
    assert device.peak < _sizes(read_t5(official))[0] / 2
