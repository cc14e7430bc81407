import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from magi.checkpoint import mapped_file
from magi.checkpoint.mapped_file import TensorInfo
from magi.checkpoint.reader import Checkpoint, find_weight_files
from magi.errors import MagiError
from magi.model_files.identify import recognise
from magi.model_files.load import load_transformer
from magi.system.whole_files import file_fingerprint
from magi.text.t5_checkpoint import find_t5_files
from magi.transformer.weights import WeightReader, check_tensors, tensor_shapes
from magi.vae.video_vae import load_vae


@pytest.fixture
def weights(tiny_config, random_weights):
    return random_weights(tiny_config().model)


def write(folder, weights, shards=1, index=True, metadata=None) -> Path:
    """A checkpoint folder: one file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata)
        return folder
    names, places = list(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata)
        places |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


# -- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_its_file_and_its_index_are_the_same(shards, tmp_path, weights):
    folder = write(tmp_path / "model", weights, shards)
    names = {"folder": folder, "text": str(folder)}
    names |= {"file": folder / "model.safetensors"} if shards == 1 else {"index": next(folder.glob("*.json"))}
    for path in names.values():
        with Checkpoint(path) as found:
            assert sorted(found) == sorted(weights)
            assert len(found.files) == shards
            assert found.nbytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            for name, tensor in weights.items():
                assert torch.equal(found.tensor(name), tensor)
                assert found.tensors[name].shape == tensor.shape
                assert found.tensors[name].nbytes == tensor.nbytes


# -- telling weights apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_the_fingerprint_is_that_of_the_weights_wherever_they_lie(shards, tmp_path, weights):
    here, there = (write(tmp_path / name, weights, shards) for name in ("here", "there/deeper"))
    name = next(iter(weights))
    other = write(tmp_path / "other", weights | {name: weights[name] + 1}, shards)
    transposed = weights | {name: weights[name].reshape(-1)}
    reshaped = write(tmp_path / "reshaped", transposed, shards)
    prints = [Checkpoint(folder).fingerprint() for folder in (here, there, other, reshaped)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    if shards == 1:
        file = (here / "model.safetensors").rename(tmp_path / "renamed.safetensors")
        assert Checkpoint(file).fingerprint() == prints[0]


def test_the_fingerprint_of_a_large_file_reads_little_and_sees_both_ends_and_the_middle(tmp_path):
    file, size = tmp_path / "large", 2_000_000_000
    with file.open("wb") as stream:
        stream.truncate(size)
    seen = {file_fingerprint(file)}
    for place in (0, size // 2, size - 1):
        with file.open("rb+") as stream:
            stream.seek(place)
            stream.write(b"x")
        seen.add(file_fingerprint(file))
    with file.open("rb+") as stream:
        stream.truncate(size + 1)
    seen.add(file_fingerprint(file))
    assert len(seen) == 5


def test_an_index_leaves_strangers_aside(tmp_path, weights):
    folder = write(tmp_path, weights, 2)
    save_file({"stranger": torch.zeros(1)}, folder / "other.safetensors")
    with Checkpoint(folder) as found:
        assert "stranger" not in found
        assert "rope.bands" in found


def test_nothing_there(tmp_path):
    with pytest.raises(MagiError, match=r"no file or folder .*nowhere.*magi download"):
        find_weight_files(tmp_path / "nowhere")


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(MagiError, match=r"holds no \.safetensors file"):
        find_weight_files(tmp_path)


def test_several_files_that_no_name_puts_in_order(tmp_path, weights):
    save_file(weights, tmp_path / "base.safetensors")
    save_file(weights, tmp_path / "distill.safetensors")
    with pytest.raises(MagiError, match=r"several .*base\.safetensors.*Give one of them"):
        Checkpoint(tmp_path)
    write(tmp_path, weights, 3, index=False)
    with pytest.raises(MagiError, match=r"several .*\(base\.\S+, distill\.\S+, model-00001-of-00003\.safetensors\)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model-0000{}-of-00003.safetensors", "x_{}_of_3.fp16.safetensors"])
@pytest.mark.parametrize("given", ["the folder", "its second shard"])
def test_shards_without_an_index_are_read_by_their_names(name, given, tmp_path, weights):
    for i, file in enumerate(sorted(write(tmp_path, weights, 3, index=False).iterdir()), 1):
        file.rename(tmp_path / name.format(i))
    with Checkpoint(tmp_path if given == "the folder" else tmp_path / name.format(2)) as found:
        assert sorted(found) == sorted(weights)
        assert [file.name for file in found.files] == [name.format(i) for i in (1, 2, 3)]


@pytest.mark.parametrize("given", ["the folder", "a shard"])
def test_shards_that_their_names_count_and_that_are_missing_are_named(given, tmp_path, weights):
    folder = write(tmp_path, weights, 3, index=False)
    (folder / "model-00002-of-00003.safetensors").unlink()
    path = folder if given == "the folder" else folder / "model-00003-of-00003.safetensors"
    with pytest.raises(MagiError, match=r"1 of 3 shards.*model-00002-of-00003\.safetensors.*again"):
        Checkpoint(path)


def test_a_shard_goes_with_its_own_index(tmp_path, weights):
    write(tmp_path, weights, 2)
    save_file({"stranger": torch.zeros(1)}, tmp_path / "other.safetensors")
    with Checkpoint(tmp_path / "model-00001-of-00002.safetensors") as found:
        assert sorted(found) == sorted(weights)


HIDDEN = ["._model.safetensors", ".model.safetensors", "._model.safetensors.index.json"]


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("shards", [1, 2])
def test_hidden_files_beside_the_weights_are_none(name, shards, tmp_path, weights):
    folder = write(tmp_path, weights, shards)
    (folder / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    with Checkpoint(folder) as found:
        assert sorted(found) == sorted(weights)


def test_a_side_file_of_macos_is_told(tmp_path):
    (tmp_path / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    with pytest.raises(MagiError, match=r"side file of macOS.*without \._"):
        Checkpoint(tmp_path / "._model.safetensors")
    with pytest.raises(MagiError, match=r"holds no \.safetensors file: nothing that shows is in it"):
        Checkpoint(tmp_path)


def test_what_a_folder_without_weights_holds_is_said(tmp_path):
    (tmp_path / "4.5B_base").mkdir()
    (tmp_path / "model.gguf").touch()
    with pytest.raises(MagiError, match=r"holds no \.safetensors file: it holds 4\.5B_base, model\.gguf"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("case", ["folder", "file"])
def test_what_may_not_be_read_is_said_to_be_so(case, tmp_path, weights, monkeypatch):
    """As the tests may run as root, who may read anything, the system's refusal is played."""
    folder = write(tmp_path / "models", weights)

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir" if case == "folder" else "stat", refused)
    with pytest.raises(MagiError, match="Permission denied") as caught:
        Checkpoint(folder if case == "folder" else folder / "model.safetensors")
    assert "models" in str(caught.value)
    assert "holds no" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 5000, "y" * 300 + ".safetensors"])
def test_names_that_are_too_long(name, tmp_path):
    with pytest.raises(MagiError) as caught:
        Checkpoint(tmp_path / name)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize("read", [Checkpoint, load_vae, find_t5_files, recognise], ids=lambda read: read.__name__)
def test_a_folder_with_several_indices(read, tmp_path, weights):
    write(tmp_path, weights, 2)
    index = tmp_path / "model.safetensors.index.json"
    shutil.copy(index, tmp_path / "model.fp8.safetensors.index.json")
    with pytest.raises(MagiError, match="2 checkpoints") as caught:
        read(tmp_path)
    for said in (str(tmp_path), "model.fp8.safetensors.index.json, model.safetensors.index.json", "Give one"):
        assert said in str(caught.value)
    assert find_weight_files(index) == sorted(tmp_path.glob("*.safetensors")), "each can be given"


def test_missing_shards_are_named(tmp_path, weights):
    folder = write(tmp_path, weights, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MagiError, match=r"1 of 3 shards.*model-00002-of-00003\.safetensors.*again"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', "\xff"])
def test_an_unreadable_index(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(MagiError, match=r"index .*unreadable.*again"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        *(
            "/etc/passwd",
            "../model.safetensors",
            "sub/../../model.safetensors",
            "C:\\model.safetensors",
            "C:model.safetensors",
        ),
        *("..\\model.safetensors", "\\\\host\\share\\model.safetensors", "//host/share/model.safetensors", ""),
    ],
)
def test_an_index_stays_in_its_folder(shard, tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"rope.bands": shard}}), encoding="utf-8")
    with pytest.raises(MagiError, match=r"unreadable \(the file .* is not in its folder\)"):
        Checkpoint(index)


def test_an_index_may_name_files_in_folders_below(tmp_path, weights):
    write(tmp_path / "sub", weights)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "sub/model.safetensors")}), encoding="utf-8")
    with Checkpoint(tmp_path) as found:
        assert sorted(found) == sorted(weights)


def test_an_index_that_names_what_is_in_no_file(tmp_path, weights, tiny_config):
    folder = write(tmp_path, weights, 2)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text(encoding="utf-8"))
    for name in [name for name in weights if "layers.1." in name]:
        places["weight_map"][name.replace("layers.1.", "layers.2.")] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(places), encoding="utf-8")
    with pytest.raises(MagiError, match=r"lacks 2\d tensors that its index names: videodit_blocks\.layers\.2"):
        load_transformer(folder, tiny_config(), device="cpu")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_an_index_in_another_encoding_is_read(encoding, tmp_path, weights):
    index = write(tmp_path, weights, 2) / "model.safetensors.index.json"
    index.write_text(index.read_text(encoding="utf-8"), encoding=encoding)
    with Checkpoint(tmp_path) as found:
        assert sorted(found) == sorted(weights)


@pytest.mark.parametrize("shard", [3, None, ["a"]])
def test_an_index_that_names_no_files(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}), encoding="utf-8")
    with pytest.raises(MagiError, match="again"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path, weights):
    folder = write(tmp_path, weights, 2)
    first, second = sorted(folder.glob("*.safetensors"))
    save_file({"rope.bands": weights["rope.bands"]}, first)
    save_file({"rope.bands": weights["rope.bands"]}, second)
    with pytest.raises(MagiError, match=r"'rope\.bands' is in both"):
        Checkpoint(folder)


# -- damaged files ---------------------------------------------------------------------------------------------------


def test_an_empty_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MagiError, match=r"model\.safetensors.* is empty.*again"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("part", [1e-5, 0.001, 0.1, 0.5, 0.999, "last byte"])
def test_a_truncated_file(part, tmp_path, weights):
    file = write(tmp_path, weights) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: -1 if part == "last byte" else max(1, int(part * len(whole)))])
    with pytest.raises(MagiError, match=r"not a whole safetensors file.*truncated"):
        Checkpoint(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello, I am a text file", "a text that begins 'hello, I am a text file'"),
        (b"PK\x03\x04" + b"\0" * 100, "a zip archive. Unpack it"),
        (b"\0" * 64, "broke off after room for it had been reserved"),
        (b"\xff" * 64, "not a whole safetensors file"),
    ],
)
def test_another_kind_of_file(content, said, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(MagiError, match=said):
        Checkpoint(file)


def test_a_type_that_this_torch_lacks(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn), "b": torch.zeros(2)}, file)
    monkeypatch.setitem(mapped_file.DTYPES, "F8_E4M3", None)
    with Checkpoint(file) as found:
        assert found.tensors["a"] == TensorInfo((2,), "F8_E4M3", file)
        assert found.tensors["a"].nbytes == 2
        assert torch.equal(found.tensor("b"), torch.zeros(2))
        with pytest.raises(MagiError, match=r"'a' has the type F8_E4M3.*Update torch, or use a bf16"):
            found.tensor("a")


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        raw([]),
        raw(b"{'a': 1}"),
        raw({"a": 3}),
        raw({"a": {"dtype": "F32", "shape": [2]}}),
        raw({"a": ENTRY | {"shape": [3]}}, bytes(8)),
        raw({"a": ENTRY | {"shape": ["x"]}}, bytes(8)),
        raw({"a": ENTRY | {"dtype": "NOPE"}}, bytes(8)),
        raw({"a": ENTRY | {"data_offsets": [-8, 0]}}, bytes(8)),
        raw({"a": ENTRY | {"shape": [-1, -2]}}, bytes(8)),
        raw({"a": ENTRY | {"shape": [True, 2]}}, bytes(8)),
        raw({"a": ENTRY | {"shape": [2.0]}}, bytes(8)),
        raw({"a": ENTRY | {"shape": ["2"]}}, bytes(8)),
        raw({"a": ENTRY | {"shape": "2"}}, bytes(8)),
        raw({"a": ENTRY | {"shape": [10**30]}}, bytes(8)),
        raw({"a": ENTRY | {"shape": [0, 10**30], "data_offsets": [0, 0]}}),
        raw({"a": ENTRY | {"shape": [2, *[1] * 1000]}}, bytes(8)),
        raw({"a": ENTRY | {"dtype": "FLOAT"}}, bytes(8)),
        raw({"a": ENTRY | {"dtype": "F\u0663\u0662"}}, bytes(8)),
        raw({"a": ENTRY | {"dtype": ["F32"]}}, bytes(8)),
        raw({"a": ENTRY | {"data_offsets": [0, 8.0]}}, bytes(8)),
        raw({"a": ENTRY | {"data_offsets": [False, 8]}}, bytes(8)),
        raw({"a": ENTRY | {"data_offsets": [0, 8, 16]}}, bytes(8)),
        raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', bytes(8)),
        raw(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)),
        raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e999]}}', bytes(8)),
        raw(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', bytes(8)),
        raw(b'{"a": %b, "a": %b}' % (json.dumps(ENTRY).encode(), json.dumps(ENTRY).encode()), bytes(8)),
        raw(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
        raw(b'{"__metadata__":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001),
        raw({"a": ENTRY, "b": ENTRY}, bytes(8)),
        raw({"a": ENTRY, "b": ENTRY | {"data_offsets": [16, 24]}}, bytes(24)),
        raw({"__metadata__": [1], "a": ENTRY}, bytes(8)),
        raw({"__metadata__": "text", "a": ENTRY}, bytes(8)),
        raw({"a": ENTRY}, bytes(9)),
        raw({"a": ENTRY})[:20],
    ],
    ids=lambda content: str(content[8:60]),
)
def test_a_header_that_lies(content, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(MagiError, match="not a whole safetensors file"):
        Checkpoint(file)


@pytest.mark.parametrize("read", [Checkpoint, recognise, load_vae, load_transformer], ids=lambda read: read.__name__)
def test_what_a_terminal_obeys_and_long_names_do_not_reach_it(read, tmp_path):
    """A name in a file may be anything; in a message it is short and prints."""
    name = "\x1b[2J\x07\u202eevil\ud800" + "x" * 100_000
    entry = ENTRY | {"data_offsets": [0, 9]}
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw({name: entry}, bytes(8)))
    with pytest.raises(MagiError) as caught:
        read(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [True, 3, {"a": [1]}, None, "text"])
def test_metadata_of_any_type_becomes_text(value, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw({"a": ENTRY, "__metadata__": {"distill": value, "variant": value}}, bytes(8)))
    with Checkpoint(file) as found:
        assert found.metadata["distill"] == (value if isinstance(value, str) else json.dumps(value))
    assert recognise(file).kind == "unknown"


def test_odd_but_legal_files(tmp_path):
    file = tmp_path / "model.safetensors"
    header = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "e": ENTRY | {"shape": [0], "data_offsets": [1, 1]},
    }
    header |= {"a": ENTRY | {"data_offsets": [1, 9]}, "s": {"dtype": "F32", "shape": [], "data_offsets": [9, 13]}}
    values = torch.tensor([1.5, -2.0, 7.0])
    file.write_bytes(raw(header | {"__metadata__": {"k": "v"}}, b"\x07" + values.numpy().tobytes()))
    with Checkpoint(file) as found:
        assert found.metadata == {"k": "v"}
        assert found.tensor("b").tolist() == [7]
        assert found.tensor("e").shape == (0,)
        assert found.tensor("a").tolist() == [1.5, -2.0], "not aligned to its type"
        assert found.tensor("s").shape == ()
        assert found.tensor("s").item() == 7.0


def test_a_file_larger_than_memory_can_be_read(tmp_path):
    size = 1 << 40  # sparse: it takes no room
    file = tmp_path / "model.safetensors"
    header = {"big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    try:
        with file.open("wb") as out:
            out.write(raw(header))
            out.truncate(out.tell() + size)
    except OSError as error:
        pytest.skip(f"this file system holds no sparse file of 1 TB: {error}")
    with Checkpoint(file) as found:
        assert found.tensor("big")[-3:].tolist() == [0, 0, 0]


# -- what programs put in front of names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "module.", "model.", "diffusion_model.", "module.model.", "_orig_mod.", "ema."]
)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_prefix_of_all_names_is_left_out(prefix, shards, tmp_path, weights, tiny_config):
    stored = {prefix + name: tensor for name, tensor in weights.items()}
    with Checkpoint(write(tmp_path, stored, shards)) as found:
        assert found.prefix == prefix
        assert sorted(found) == sorted(weights)
        assert all(torch.equal(found.tensor(name), tensor) for name, tensor in weights.items())
    assert recognise(tmp_path).model == tiny_config().model
    assert len(load_transformer(tmp_path, tiny_config(), device="cpu").blocks) == 2


def test_names_that_share_their_beginning_by_nature_keep_it(tmp_path):
    names = ["decoder.proj_in.weight", "decoder.proj_in.bias", "decoder.cls_token"]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "half_a_vae.safetensors")
    with Checkpoint(tmp_path) as found:
        assert (found.prefix, sorted(found)) == ("", sorted(names))


# -- laziness --------------------------------------------------------------------------------------------------------


def test_weights_stay_in_the_mapped_file(tmp_path, weights, tiny_config):
    low = {name: tensor.bfloat16() for name, tensor in weights.items()}
    with Checkpoint(write(tmp_path, low)) as found:
        block = WeightReader(found, tiny_config().model, torch.device("cpu"), torch.bfloat16).block(1)
        at = "videodit_blocks.layers.1."
        attention = at + "self_attention."
        for layer, name in [
            (block.q, attention + "linear_qkv.q"),
            (block.v, attention + "linear_qkv.v"),
            (block.kv_x, attention + "linear_kv_xattn"),
            (block.proj, attention + "linear_proj"),
            (block.fc1, at + "mlp.linear_fc1"),
            (block.fc2, at + "mlp.linear_fc2"),
            (block.gates, at + "ada_modulate_layer.proj.0"),
        ]:
            assert layer.weight.data_ptr() == found.tensor(name + ".weight").data_ptr()


def test_tensors_outlive_their_checkpoint(tmp_path, weights):
    with Checkpoint(write(tmp_path, weights)) as found:
        tensor = found.tensor("rope.bands")
    del found
    assert torch.equal(tensor, weights["rope.bands"])


# -- does it fit its config ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_whole_checkpoints_load(shards, tmp_path, weights, tiny_config):
    model = load_transformer(write(tmp_path, weights, shards), tiny_config(), device="cpu")
    assert model.dtype == torch.float32, "as the file"
    assert len(model.blocks) == 2


def changed(weights, case):
    names = [n for n in weights if n.startswith("videodit_blocks.layers.1.mlp")]
    if case == "missing":
        return {n: t for n, t in weights.items() if n not in names}
    if case == "unexpected":
        return weights | {f"stranger.{i}": torch.zeros(1) for i in range(5)}
    return weights | {names[0]: torch.zeros(3)}


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        ("missing", r"6 missing \(videodit_blocks\.layers\.1\.mlp\.linear_fc1\.weight, .*, .* \.\.\.\)"),
        ("unexpected", r"5 unexpected \(stranger\.0, stranger\.1, stranger\.2 \.\.\.\)"),
        ("misshapen", r"1 of another shape \(videodit_blocks\.layers\.1\.mlp\.\S+ \(3,\) instead of \("),
    ],
)
def test_tensors_that_do_not_fit_are_named(case, pattern, tmp_path, weights, tiny_config):
    with pytest.raises(MagiError, match=pattern) as caught:
        load_transformer(write(tmp_path, changed(weights, case)), tiny_config(), device="cpu")
    assert str(caught.value).count("stranger") <= 3
    assert "again, or give the config" in str(caught.value)


def test_a_config_of_another_size(tmp_path, weights, tiny_config):
    with pytest.raises(MagiError, match=r"missing.*layers\.2"):
        load_transformer(write(tmp_path, weights), tiny_config(shape={"num_layers": 3}), device="cpu")


def test_official_fp8_layers_are_all_but_the_first_and_the_last(tiny_config):
    shape = tiny_config(shape={"num_layers": 4}).model
    sizes = tensor_shapes(shape, fp8=True)
    assert {n.split(".")[2] for n in sizes if n.endswith("_scale")} == {"1", "2"}
    at = "videodit_blocks.layers.1."
    assert sizes[at + "mlp.linear_fc1.weight"] == (1, 96, 64)
    assert sizes[at + "mlp.linear_fc1.input_scale"] == (64,)
    assert at + "mlp.linear_fc1.smooth_scale" not in sizes
    assert sizes[at + "mlp.linear_fc2.weight"] == (1, 64, 96)
    assert sizes[at + "mlp.linear_fc2.input_scale"] == sizes[at + "mlp.linear_fc2.weight_scale"] == (1,)
    assert sizes[at + "mlp.linear_fc2.smooth_scale"] == (1, 96)
    assert sizes[at + "self_attention.linear_kv_xattn.weight"] == (64, 64), "not quantised"


@pytest.mark.parametrize("fp8", [False, True])
def test_tensors_that_fit_pass(fp8, tiny_config, random_weights, tmp_path):
    shape = tiny_config(shape={"num_layers": 3}).model
    with Checkpoint(write(tmp_path, random_weights(shape, fp8))) as found:
        check_tensors(found, shape, "it")
