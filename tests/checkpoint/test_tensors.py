"""Files of tensors: read one at a time, written with the same bytes each time, and refused where they are not whole."""

import os
import pickle

import pytest
import torch
from helpers import models
from safetensors.torch import load_file, save_file

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.tensors import PlainTensors
from salun_sd.errors import SalunError


def test_a_written_file_is_the_librarys_own_and_the_same_bytes_each_time(tmp_path):
    values = {"a": torch.randn(3, 4), "z": torch.arange(5), "h": torch.randn(7).half(), "s": torch.tensor(4.6)}
    save_file(values, tmp_path / "own.safetensors", {"k": "v"})
    read, metadata = tensors.read(tmp_path / "own.safetensors")
    tensors.write(tmp_path / "ours.safetensors", read, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "own.safetensors").read_bytes()
    several = {str(i): "v" for i in range(9)}
    tensors.write(tmp_path / "x.safetensors", read, several)
    first = (tmp_path / "x.safetensors").read_bytes()
    tensors.write(tmp_path / "x.safetensors", read, several)
    assert (tmp_path / "x.safetensors").read_bytes() == first
    assert all(torch.equal(t, values[name]) for name, t in load_file(tmp_path / "x.safetensors").items())


def test_plain_tensors_are_read_anew_at_each_look(tmp_path):
    file, values = tmp_path / "t.safetensors", {"a": torch.randn(3, 4), "b": torch.arange(5)}
    save_file(values, file)
    plain = PlainTensors(tensors.read(file)[0])
    assert len(plain) == 2 and plain.keys() == values.keys() and "c" not in plain
    assert all(torch.equal(t, values[name]) for name, t in plain.items())
    plain["a"].zero_()  # what a caller does to one is in no other
    assert torch.equal(plain["a"], values["a"])
    save_file({"a": values["a"] + 1, "b": values["b"]}, file)
    assert torch.equal(plain["a"], values["a"] + 1)  # nothing is kept in memory
    with pytest.raises(KeyError, match="c"):
        plain["c"]


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("saved", ["zip", "legacy", "bare"])
def test_a_pickle_with_code_in_it_is_not_run_and_what_it_asks_for_is_named(tmp_path, saved, protocol):
    file, marker = tmp_path / "model.ckpt", tmp_path / "marker"
    content = {"state_dict": {"a": torch.zeros(2)}, "callbacks": Evil(str(marker))}
    if saved == "bare":
        file.write_bytes(pickle.dumps({"callbacks": Evil(str(marker))}, protocol=protocol))
    else:
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=saved == "zip")
    with pytest.raises(SalunError, match="model.ckpt") as e:
        tensors.read(file)
    sentence = str(e.value).replace(str(file), "")
    assert not marker.exists() and "weights_only" not in sentence
    assert ("posix.mkdir" if protocol == 2 else "pickle") in sentence
    del content["callbacks"]
    torch.save(content, file)
    assert list(tensors.read(file)[0]) == ["a"] and not marker.exists()


def test_a_ckpt_that_is_cut_off_or_odd_is_named(tmp_path):
    folder = models.write_pipeline(tmp_path / "model", "sd1", dtype=torch.float16)
    file = models.write_single_file(folder, tmp_path / "model.ckpt")
    whole = file.read_bytes()
    assert len(tensors.read(file)[0]) > 300
    for data in (whole[:100], whole[:5000], whole[: len(whole) // 2], whole[:-10]):
        file.write_bytes(data)
        with pytest.raises(SalunError, match=r"model.ckpt .*damaged \(.+\)"):
            tensors.read(file)
    torch.save({0: torch.zeros(2)}, file)  # an optimizer's state, say
    with pytest.raises(SalunError, match="model.ckpt .*name"):
        tensors.read(file)
