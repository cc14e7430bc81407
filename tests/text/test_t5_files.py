"""The text encoder's other files: config, tokenizer, names in the folder; and weights that are damaged but complete."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from magi.errors import MagiError
from magi.text import t5_checkpoint
from magi.text.embedding_cache import EmbeddingCache
from magi.text.encode import encode_prompts
from magi.text.encoder import TextEncoder, encoder_fingerprint
from magi.text.t5_checkpoint import find_t5_files, read_t5, t5_is_missing
from magi.text.t5_tokenizer import load_tokenizer

FP8 = torch.float8_e4m3fn
QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.fixture
def folder(official, tmp_path):
    return shutil.copytree(official, tmp_path / "t5")


def _single(state, folder):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "t5xxl.safetensors")
    return folder / "t5xxl.safetensors"


# --- config.json -----------------------------------------------------------------------------------------------------


def _config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_in_another_encoding_is_read(folder, encoding):
    _config(folder, layer_norm_epsilon=0.5)
    file = folder / "config.json"
    file.write_text(file.read_text("utf-8"), encoding)
    assert read_t5(folder).shape.layer_norm_epsilon == 0.5


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b'{"d_model": 6', b"[" * 10_000, b'{"a":' * 10_000, b"[]", b"null", b"\xff\xfe\xfd", bytes(100)),
        *(b"<html>", b"version https://git-lfs.github.com/spec/v1"),
    ],
    ids=lambda content: repr(content[:10]),
)
def test_a_config_that_cannot_be_read_is_not_passed_over(folder, content):
    (folder / "config.json").write_bytes(content)
    for use in (read_t5, TextEncoder.load, encoder_fingerprint):
        with pytest.raises(MagiError, match=r"config\.json.*not a readable T5 config"):
            use(folder)


def test_a_folder_in_place_of_a_config(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(MagiError, match=r"config\.json.*not a readable T5 config"):
        read_t5(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_layers", 3), ("num_layers", 99999999), ("num_layers", "2"), ("num_heads", 0), ("d_kv", 16.5)),
        *(("vocab_size", 10**30), ("d_ff", None), ("d_model", [64]), ("relative_attention_num_buckets", 16)),
    ],
    ids=str,
)
def test_a_config_that_describes_other_weights(folder, name, value):
    _config(folder, **{name: value})
    with pytest.raises(MagiError, match=rf"{name} \d+ by its tensors, and .* by its config\.json"):
        read_t5(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("layer_norm_epsilon", value) for value in ("1e-6", -1e-6, 1e300, True, None, [])),
        *(("relative_attention_max_distance", value) for value in (0, 8, -128, 128.5, "128", 10**30, False)),
    ],
    ids=str,
)
def test_values_of_a_config_that_cannot_be(folder, name, value):
    _config(folder, **{name: value})
    with pytest.raises(MagiError, match=rf"not a readable T5 config: {name} cannot be"):
        read_t5(folder)


@pytest.mark.parametrize("change", [{"layer_norm_epsilon": 0.5}, {"relative_attention_max_distance": 20}], ids=str)
def test_what_a_config_decides_is_another_encoder(folder, tmp_path, change):
    cache = EmbeddingCache(tmp_path / "cache")
    before, usual = encode_prompts(["a cat"], folder, cache=cache)[0], encoder_fingerprint(folder)
    (folder / "config.json").rename(tmp_path / "away.json")
    assert encoder_fingerprint(folder) == usual, "it says what every T5 v1.1 has"
    (tmp_path / "away.json").rename(folder / "config.json")
    _config(folder, **change)
    assert not torch.equal(encode_prompts(["a cat"], folder, cache=cache)[0], before) or "distance" in str(change)
    assert encoder_fingerprint(folder) != usual


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"])
def test_an_index_or_a_shard_stands_for_its_folder(folder, name):
    _config(folder, layer_norm_epsilon=0.25)
    assert read_t5(folder / name).shape == read_t5(folder).shape
    assert encoder_fingerprint(folder / name) == encoder_fingerprint(folder)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"shared.weight": torch.zeros(300, 64)},
        lambda state: state | {QUERY: torch.zeros(64, 64)},
        lambda state: state | {"encoder.final_layer_norm.weight": torch.zeros(64)},
        lambda state: {name: torch.zeros_like(x) if "block.1" in name else x.to(FP8) for name, x in state.items()},
    ],
    ids=["embedding", "a layer", "norm", "second half"],
)
def test_weights_of_zeros(encoder_state, tmp_path, change):
    with pytest.raises(
        MagiError, match=r"tensors nothing but zeros, as a download that broke off leaves them: .*again"
    ):
        read_t5(_single(change(encoder_state), tmp_path))


@pytest.mark.parametrize("name", ["encoder.final_layer_norm.weight", QUERY, "shared.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_give_no_video(encoder_state, official, tmp_path, name, value):
    file = _single(encoder_state | {name: torch.full_like(encoder_state[name], value)}, tmp_path)
    cache = EmbeddingCache(tmp_path / "cache")
    with pytest.raises(MagiError, match=r"text encoder .*t5xxl\.safetensors' gave values that are no numbers"):
        encode_prompts(["a cat"], file, tokenizer=official, cache=cache)
    assert not list(cache.folder.glob("*.safetensors"))


def test_an_encoding_of_zeros_is_none(encoder_state, official, tmp_path):
    tiny = {**encoder_state, "encoder.final_layer_norm.weight": torch.full((64,), 1e-45)}  # no zeros, but as good as
    with pytest.raises(MagiError, match=r"t5xxl\.safetensors' gave nothing but zeros"):
        encode_prompts(["a cat"], _single(tiny, tmp_path), tokenizer=official, dtype=torch.bfloat16)


def _scaled(state, **scales):
    """As scaled float8, all linear layers by 0.01 but where another scale is given; by None without."""
    found = {}
    for name, tensor in state.items():
        if t5_checkpoint._LINEAR.search(name):
            found[name] = (tensor * 100).to(FP8)
            scale = scales.get(name.split(".")[-2], torch.tensor(0.01))
            if scale is not None:
                found[name.removesuffix("weight") + "scale_weight"] = scale.clone()
        else:
            found[name] = tensor.half()
    return found


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (None, "have no scale"),
        (torch.tensor(float("nan")), "a scale that is no number, or zero"),
        (torch.tensor(float("inf")), "a scale that is no number, or zero"),
        (torch.zeros(1), "a scale that is no number, or zero"),
        (torch.zeros(0), "scaled in a way that cannot be used"),
        (torch.ones(7), "scaled in a way that cannot be used"),
    ],
    ids=str,
)
def test_odd_scales(encoder_state, tmp_path, scale, told):
    read_t5(_single(_scaled(encoder_state), tmp_path))
    read_t5(_single(_scaled(encoder_state, k=torch.full((64, 1), 0.01)), tmp_path))
    with pytest.raises(MagiError, match=rf"{told}.*SelfAttention\.k\.weight"):
        read_t5(_single(_scaled(encoder_state, k=scale), tmp_path))


def test_a_tensor_in_two_shards(folder):
    first, second = sorted(folder.glob("*.bin"))
    torch.save(torch.load(first, weights_only=True) | torch.load(second, weights_only=True), second)
    with pytest.raises(MagiError, match=r"is both in '.*00002-of-00002\.bin'"):
        read_t5(folder)


def test_a_layer_that_is_missing_at_the_end(folder, encoder_state, monkeypatch, tmp_path):
    shallow = {name: tensor for name, tensor in encoder_state.items() if "block.1" not in name}
    for shard in folder.glob("*.bin*"):
        shard.unlink()
    _single(shallow, folder)
    with pytest.raises(MagiError, match="num_layers 1 by its tensors, and 2 by its config"):
        read_t5(folder)
    monkeypatch.setattr(t5_checkpoint, "_XXL_WIDTH", 64)
    monkeypatch.setattr(t5_checkpoint, "_XXL_LAYERS", 2)
    with pytest.raises(MagiError, match=r"has 1 layers, and T5 v1\.1 XXL, which is as wide, 2"):
        read_t5(_single(shallow, tmp_path))
    assert read_t5(_single(encoder_state, tmp_path)).shape.num_layers == 2


# --- names in the folder ---------------------------------------------------------------------------------------------


def test_hidden_files_are_no_weights(folder):
    expected = find_t5_files(folder)
    for name in ("._model.safetensors", "._pytorch_model.bin.index.json", ".pytorch_model.bin", "._spiece.model"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07" + bytes(100))
    (folder / "model.safetensors.part").write_bytes(b"x")  # a download that is not finished
    assert find_t5_files(folder) == expected
    assert not t5_is_missing(folder)
    read_t5(folder)
    for file in expected:
        file.unlink()
    assert t5_is_missing(folder)


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(folder, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refused)
    for use in (find_t5_files, t5_is_missing):
        with pytest.raises(MagiError, match="cannot be read: Permission denied"):
            use(folder)


def test_a_name_that_no_disk_has(official):
    with pytest.raises(MagiError, match=r"aaa.*(cannot be looked at|is not at)"):
        TextEncoder.load(f"/{'a' * 5000}", official)
    with pytest.raises(MagiError, match=r"cannot be looked at|no tokenizer"):
        TextEncoder.load(official, "a" * 5000)


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty"),
        (b"<!doctype html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (bytes(5000), "zeros"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"[" * 10_000, ""),
        (b"\xff" * 1000, ""),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_a_tokenizer_that_is_something_else(folder, name, content, told):
    (folder / "spiece.model").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(MagiError, match=rf"{name}' is not a readable tokenizer: .*{told}.* Download spiece\.model"):
        TextEncoder.load(folder)


def test_a_tokenizer_that_is_cut_off(folder):
    whole = (folder / "spiece.model").read_bytes()
    (folder / "spiece.model").write_bytes(whole[: len(whole) // 2 + 1])
    with pytest.raises(MagiError, match=r"spiece\.model' is not a readable tokenizer"):
        TextEncoder.load(folder)


def test_weights_in_place_of_a_tokenizer_are_not_read_into_memory(folder, tmp_path):
    with (tmp_path / "t5xxl.safetensors").open("wb") as file:
        file.write(b"\x40" + bytes(7) + b'{"')
        file.truncate(70 << 20)
    for use in (TextEncoder.load, encoder_fingerprint):
        with pytest.raises(MagiError, match="73,400,320 bytes, too many for one"):
            use(folder, tmp_path / "t5xxl.safetensors")


def test_the_end_token_tells_models_apart(tmp_path, folder):
    """As that of Llama, which has as many pieces and </s> as 2."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat walks"] * 5),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(MagiError, match="another model: it numbers with 2, not 1, its </s>"):
        TextEncoder.load(folder, tmp_path / "spiece.model")


def _words(file, words, **options):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel(words, **options)).save(str(file))
    return file


def test_the_largest_id_counts_not_the_number_of_words(tmp_path, folder):
    file = _words(tmp_path / "tokenizer.json", {"<unk>": 0, "</s>": 1, "cat": 5000}, unk_token="<unk>")
    with pytest.raises(MagiError, match=r"5,001 entries.* only 300"):
        TextEncoder.load(folder, file)


def test_a_tokenizer_without_an_unknown_token(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.Unigram([("</s>", 0.0), ("</s>", 0.0), ("cat", -1.0)])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MagiError, match=r"tokenizer\.json' is"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_with_too_few_pieces_for_t5(folder, monkeypatch):
    monkeypatch.setattr("magi.text.encoder._T5_ROWS", 300)
    with pytest.raises(MagiError, match=r"entries.* 300: they belong to different models, or the tokenizer is cut off"):
        TextEncoder.load(folder)


@pytest.mark.parametrize("content", [b"[" * 10_000, b'{"tokenizer_class": "ByT5', b""], ids=["deep", "cut", "empty"])
def test_a_tokenizer_config_that_cannot_be_read(folder, content):
    (folder / "spiece.model").unlink()
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(MagiError, match=r"tokenizer_config\.json' is unreadable"):
        TextEncoder.load(folder)
