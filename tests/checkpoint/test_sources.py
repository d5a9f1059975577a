"""Files that people have in place of weights, and tensors that are no plain numbers: named, or read right."""

import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from salun_sd.checkpoint import sources, tensors
from salun_sd.errors import SalunError

BASE = torch.arange(24.0).reshape(4, 6)
VIEWS = {
    "end of a storage": BASE.reshape(-1)[-3:],
    "transposed": BASE.T,
    "strided": BASE[1:3, ::2],
    "expanded": BASE[0, 1:2].expand(5, 7),
    "overlapping": BASE.reshape(-1).as_strided((5, 4), (2, 1)),
    "empty": BASE[:0],
    "a number": BASE[1, 1],
    "a parameter": torch.nn.Parameter(BASE.clone()),
    "bits": torch.tensor([True, False]),
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.ckpt"


@pytest.mark.parametrize("mapped", [True, False])
def test_views_are_read_as_values_of_their_own(file, mapped, monkeypatch):
    monkeypatch.setattr(sources, "MAPPED", 100)  # so that the file is mapped anew on the way
    torch.save({"state_dict": VIEWS}, file, _use_new_zipfile_serialization=mapped)
    content = tensors.read(file)[0]
    for name, view in VIEWS.items():
        read = content[name].read()
        assert torch.equal(read, view) and read.is_contiguous() and not read.requires_grad, name
        assert read.untyped_storage().nbytes() == view.nbytes, name
        read.zero_()  # what a caller does to one is in no other
    assert all(torch.equal(content[name].read(), view) for name, view in VIEWS.items())


PASS = """import sys
from pathlib import Path
from salun_sd.checkpoint import tensors

def held(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))

open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = held("VmRSS")
for t in tensors.read(Path(sys.argv[1]))[0].values():
    t.read()
print(held("VmHWM") - before)"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_a_pass_over_a_large_file_never_holds_it(tmp_path, ending):
    file, values = tmp_path / f"large.{ending}", {f"t{i}": torch.ones(1024, 1024) for i in range(200)}
    torch.save(values, file) if ending == "ckpt" else save_file(values, file)
    held = int(subprocess.run([sys.executable, "-c", PASS, file], capture_output=True, text=True, check=True).stdout)
    assert held < (sources.MAPPED if ending == "ckpt" else 0) + 80e6 < file.stat().st_size / 2


HOSTILE = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "without values": lambda: torch.ones(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "complex64": lambda: torch.ones(2, dtype=torch.complex64),
    "uint16": lambda: torch.ones(2).to(torch.uint16),
    "claims": lambda: torch.ones(1).expand(2**40, 2**10),  # four petabytes in one number
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_tensor_that_is_no_plain_array_is_named(file, what):
    torch.save({"fine": torch.ones(2), "odd.weight": HOSTILE[what]()}, file)
    with pytest.raises(SalunError, match="odd.weight") as e:
        tensors.read(file)
    assert what in str(e.value) and str(file) in str(e.value)


def test_a_dtype_that_is_not_known_is_named_with_its_tensor(tmp_path):
    save_file({"odd.weight": torch.ones(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(SalunError, match="odd.weight.*model.safetensors.*C64"):
        tensors.read(tmp_path / "model.safetensors")


def test_a_dictionary_inside_itself_ends(file):
    content = {"a": torch.ones(2)}
    content["state_dict"] = content
    torch.save(content, file)
    assert list(tensors.read(file)[0]) == ["a"]
    file.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")  # lists, each in the one before
    with pytest.raises(SalunError, match=str(file)):
        tensors.read(file)
    torch.save({"\ud800": torch.ones(2)}, file)
    with pytest.raises(SalunError, match="Unicode"):
        tensors.read(file)


PAGES = {  # what a file holds, and a word of the advice
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n": "git lfs pull",
    b"\n<!DOCTYPE html><html><title>Sign in</title>": "web page",
    b"<?xml version='1.0'?><Error>AccessDenied</Error>": "web page",
    b'{"error": "Unauthorized"}': "Unauthorized",
    b"Entry not found": "Entry not found",
    b"GGUF\3\0\0\0" * 9: "GGUF",
    b"": "empty",
}


@pytest.mark.parametrize("content", PAGES)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_what_is_no_file_of_tensors_is_said(tmp_path, content, ending):
    file = tmp_path / f"model.{ending}"
    file.write_bytes(content)
    with pytest.raises(SalunError, match=PAGES[content]) as e:
        tensors.read(file)
    assert str(file) in str(e.value) and "damaged" not in str(e.value)


@pytest.mark.parametrize("mapped", [True, False])
def test_the_content_says_what_a_file_is_and_not_its_ending(tmp_path, mapped):
    file, plain = tmp_path / "model.safetensors", tmp_path / "plain.ckpt"
    torch.save({"a": BASE}, file, _use_new_zipfile_serialization=mapped)
    with pytest.raises(SalunError, match="model.safetensors.*pickle.*model.ckpt"):
        tensors.read(file)
    save_file({"a": BASE}, plain, {"k": "v"})
    content, metadata = tensors.read(plain)
    assert torch.equal(content["a"].read(), BASE) and metadata == {"k": "v"}


def test_a_zip_that_cannot_be_mapped_is_named(file):
    torch.save({"a": BASE}, file)
    with zipfile.ZipFile(file) as z:
        records = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in records.items():
            z.writestr(name, data)
    with pytest.raises(SalunError, match=f"{file}.*compressed"):
        tensors.read(file)
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("program/constants.pkl", b"")
    with pytest.raises(SalunError, match=f"{file}.*TorchScript"):
        tensors.read(file)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_zip_of_something_else_is_no_pickle(tmp_path, ending):
    file = tmp_path / f"model.{ending}"
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("photos/a.png", b"PNG")
    with pytest.raises(SalunError, match=f"{file}.* zip .*photos/a.png") as e:
        tensors.read(file)
    assert "pickle" not in str(e.value)


@pytest.mark.parametrize("checked", [True, False])
def test_a_flipped_byte_of_a_pickle_is_an_error_where_its_writer_left_a_checksum(file, checked):
    torch.serialization.set_crc32_options(checked)
    try:
        torch.save({"a": BASE}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    whole = file.read_bytes()
    assert torch.equal(tensors.read(file)[0]["a"].read(), BASE)
    places = [whole.index(BASE.numpy().tobytes()) + 5, whole.index(b"FloatStorage")] if checked else []
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        os.utime(file, (place, place))
        with pytest.raises(SalunError, match=str(file)):
            tensors.read(file)


def test_a_link_to_nothing_and_what_is_no_file_are_named_at_once(tmp_path):
    link, pipe = tmp_path / "link.safetensors", tmp_path / "pipe.safetensors"
    link.symlink_to("../blobs/0123")
    os.mkfifo(pipe)
    with pytest.raises(SalunError, match=f"{link}.* ../blobs/0123"):
        tensors.read(link)
    for place in (pipe, tmp_path):
        with pytest.raises(SalunError, match=f"{place} is no regular file"):
            tensors.read(place)
    with pytest.raises(FileNotFoundError):
        tensors.read(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("change", ["cut", "swapped"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, change):
    file = tmp_path / "model.safetensors"
    save_file({"a": BASE, "b": -BASE}, file)
    os.utime(file, (0, 0))  # long ago
    content = tensors.read(file)[0]
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        save_file({"a": BASE, "c": -BASE}, file)
    with pytest.raises(SalunError, match=str(file)):
        content["b"].read()


def test_a_file_that_is_written_again_with_a_longer_header_is_read_right(tmp_path):
    """As `evaluate --record` does with a single file."""
    file = tmp_path / "model.safetensors"
    save_file({"a": BASE, "b": -BASE}, file)
    content = tensors.read(file)[0]
    save_file({"a": BASE, "b": -BASE}, file, {"record": "x" * 999})
    assert all(torch.equal(content[name].read(), t) for name, t in load_file(file).items())


def test_the_header_is_read_once_for_all_tensors(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.full((3,), float(i)) for i in range(50)}, file, {f"tag{i}": "" for i in range(50)})
    content = tensors.read(file)[0]
    monkeypatch.setattr(sources, "safe_open", None)
    assert [t.read()[0].item() for t in content.values()] == [float(n[1:]) for n in content]


def test_a_legacy_pickle_of_a_foreign_object_is_not_run(file):
    file.write_bytes(pickle.dumps({"a": os.getcwd}, protocol=2))
    with pytest.raises(SalunError, match="getcwd"):
        tensors.read(file)
