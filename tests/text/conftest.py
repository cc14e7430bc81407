"""A tiny T5 v1.1, its tokenizer, and both laid out as the official folder."""

import json
import shutil

import pytest
import torch

from magi.text.t5_checkpoint import read_t5

SENTENCES = (
    "a cat walks through the sunlit garden",
    "the quick brown fox jumps over the lazy dog",
    "an African queen slowly walked out of the temple",
)


@pytest.fixture(scope="session")
def reference():
    """A random T5 v1.1 of transformers, with a decoder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=300, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():  # a table that stands out, so that positions matter to the comparisons
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(0, 2)
    return model


@pytest.fixture(scope="session")
def spiece(tmp_path_factory):
    import sentencepiece

    prefix = tmp_path_factory.mktemp("spiece") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_prefix=str(prefix),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def official(reference, spiece, tmp_path_factory):
    """Laid out like the official folder: two .bin shards, an index, spiece.model, config.json."""
    folder = tmp_path_factory.mktemp("t5-v1_1-tiny")
    state = {k: v.contiguous() for k, v in reference.state_dict().items() if not k.startswith("lm_head")}
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = reference.config.to_dict() | {"model_type": "t5", "architectures": ["T5EncoderModel"]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    shutil.copy(spiece, folder / "spiece.model")
    return folder


@pytest.fixture(scope="session")
def encoder_state(official):
    return dict(read_t5(official).tensors)
