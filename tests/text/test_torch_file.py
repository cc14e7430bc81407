"""Torch files as they are and as they should not be; none of what is in them is ever run."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from magi.errors import MagiError
from magi.text.torch_file import map_torch_file

STATE = {
    "layer.weight": torch.randn(30, 20, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.arange(7).to(torch.bfloat16),
    "half": torch.arange(7).half(),
    "float8": torch.arange(-4, 4).to(torch.float8_e4m3fn),
    "integers": torch.arange(5),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "part": torch.arange(100.0)[5:20:3],
    "number": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}
STATE["same"] = STATE["layer.weight"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_all_tensors_are_as_they_were_saved(tmp_path, protocol):
    torch.save(STATE, tmp_path / "model.bin", pickle_protocol=protocol)
    found = map_torch_file(tmp_path / "model.bin")
    assert list(found) == list(STATE)
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].float(), tensor.float()), name


def test_the_state_of_a_module(tmp_path):
    """It has attributes besides its tensors: the versions of the modules."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "model.bin")
    found = map_torch_file(tmp_path / "model.bin")
    assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())


def test_nothing_of_torch_opens_the_file(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it is unpickled"))
    for unpickle in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, unpickle, lambda *_, **__: pytest.fail("it is unpickled"))
    assert len(map_torch_file(tmp_path / "model.bin")) == len(STATE)


class _Code:
    """Makes a file when it is unpickled, by a function of Python or of torch itself."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda mark: {"a": _Code(Path.touch, mark)}, r"Path\.touch|pathlib|getattr|objects of another kind"),
        (lambda mark: {"a": _Code(open, str(mark), "w")}, r"calls (_?io|builtins|__builtin__)\.open"),
        (lambda mark: {"a": _Code(torch.save, 1, str(mark))}, r"calls torch\.serialization\.save"),
        (lambda mark: _Code(dict, [("a", _Code(open, str(mark), "w"))]), "objects of another kind"),
        (lambda _: {"model": torch.nn.Linear(2, 2)}, "objects of another kind"),
        (lambda _: {"a": torch.nn.Linear}, "no plain table of tensors"),
        (lambda _: ["not", "a table"], "objects of another kind"),
        (lambda _: {"a": 1}, "no plain table of tensors"),
        (lambda _: {"state_dict": STATE}, "no plain table of tensors"),
        (lambda _: {1: torch.ones(2)}, "entries without a name"),
        (lambda _: {"a": torch.ones(2).to_sparse()}, "calls torch"),
    ],
    ids=range(11),
)
def test_what_is_more_than_tensors_is_refused_by_name(tmp_path, content, told):
    mark = tmp_path / "it ran"
    torch.save(content(mark), tmp_path / "model.bin")
    with pytest.raises(MagiError, match=rf"model\.bin' holds more than plain tensors by name: it .*({told})") as caught:
        map_torch_file(tmp_path / "model.bin")
    assert not mark.exists()
    assert "weights_only" not in str(caught.value)


def _legacy(file):
    torch.save(STATE, file, _use_new_zipfile_serialization=False)


def _numpy(file):
    with file.open("wb") as stream:
        np.savez(stream, a=np.ones(3))


def _script(file):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)


def _cut(file):
    torch.save(STATE, file)
    file.write_bytes(file.read_bytes()[:2000])


def _zeros_at_the_end(file):
    torch.save(STATE, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:2000] + bytes(len(whole) - 2000))


def _a_hole(file):
    torch.save(STATE, file)
    whole = file.read_bytes()
    at = whole.index(b"model/data/0")
    file.write_bytes(whole[: at - 30] + bytes(2000) + whole[at + 1970 :])


def _packed_anew(file):
    torch.save(STATE, file.with_suffix(".whole"))
    with zipfile.ZipFile(file.with_suffix(".whole")) as was, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as now:
        for member in was.infolist():
            now.writestr(member.filename, was.read(member.filename))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "told"),
    [
        (_legacy, "saved by a torch older than 1.6.*magi download t5"),
        (lambda file: file.write_bytes(pickle.dumps({"a": 1})), "it is a pickle"),
        (_numpy, "a zip archive of something else"),
        (_script, "a TorchScript program"),
        (_cut, "its end is missing.*download it again"),
        (_zeros_at_the_end, "its end is missing.*download it again"),
        (_a_hole, "a part of it is missing"),
        (_packed_anew, "packed anew"),
        (lambda file: save_file({"a": torch.ones(2)}, file), r"it is a safetensors file\. Rename it to 'model\.safetensors'"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
        (lambda file: file.write_text("<!DOCTYPE html><html>"), r"web page \(HTML\)"),
        (lambda file: file.write_bytes(b"GGUF" + bytes(100)), "GGUF"),
        (lambda file: file.write_bytes(bytes(5000)), "zeros"),
        (lambda file: file.write_bytes(b"\xde\0\xff" * 100), "damaged or of another kind"),
        (lambda file: file.touch(), "is empty"),
        (lambda file: file.mkdir(), "cannot be read"),
        (lambda _: None, "cannot be read"),
    ],
)  # fmt: skip
def test_other_files_are_told_for_what_they_are(tmp_path, write, told):
    file = tmp_path / "model.bin"
    write(file)
    with pytest.raises(MagiError, match=rf"model\.bin'.*{told}"):
        map_torch_file(file)


def _rewritten(file, change):
    """A torch file whose pickle is changed."""
    torch.save({"name": torch.arange(6.0).view(2, 3)}, file.with_suffix(".whole"))
    with zipfile.ZipFile(file.with_suffix(".whole")) as was, zipfile.ZipFile(file, "w") as now:
        for member in was.infolist():
            data = was.read(member.filename)
            now.writestr(member.filename, change(data) if member.filename.endswith("data.pkl") else data)
    return file


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x04\x86", "larger than its storage"),
        (b"K\x03K\x01\x86", b"K\x09K\x01\x86", "larger than its storage"),
        (b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86", "impossible sizes"),
        (b"K\x03K\x01\x86", b"K\x00K\x00\x86", None),
        (b"K\x02K\x03\x86", b"M\xff\xffM\xff\xff\x86", "larger than its storage"),
        (b"K\x02K\x03\x86", b"K\x02\x85", "without a shape"),
        (b"K\x06t", b"K\x07t", "are not in it"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007", "damaged"),
        (b"FloatStorage", b"QIntXStorage", "type torch.QIntXStorage"),
        (b"ctorch\nFloatStorage\n", b"ctorch\nFloatStorage\nh\x7f0", "damaged"),
        (b".", b"", "damaged"),
    ],
)
def test_a_damaged_description_reads_nothing_outside(tmp_path, old, new, told):
    file = _rewritten(tmp_path / "model.bin", lambda data: data.replace(old, new))
    if told is None:  # equal values, as of an expanded tensor: they are in the file
        assert map_torch_file(file)["name"].tolist() == [[0.0] * 3] * 2
        return
    with pytest.raises(MagiError, match=told):
        map_torch_file(file)


def test_a_huge_tensor_of_one_number_takes_no_memory(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "model.bin")
    with pytest.raises(MagiError, match="larger than its storage"):
        map_torch_file(tmp_path / "model.bin")


def test_an_endless_description(tmp_path):
    file = _rewritten(tmp_path / "model.bin", lambda data: data[:2] + b"}0" * (1 << 20) + data[2:])
    with pytest.raises(MagiError, match=r"describes its content in 2,097,\d\d\d bytes"):
        map_torch_file(file)
