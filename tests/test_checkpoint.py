import errno
import json
import os
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from salun_sd import checkpoint
from salun_sd.errors import SalunError, UsageError
from salun_sd.mask import kept, random_bits


@pytest.fixture
def folder(tmp_path):
    """A copy of the pocket pipeline that a test may break."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(checkpoint.POCKET / part, tmp_path / "model" / part)
    shutil.copy(checkpoint.POCKET / "model_index.json", tmp_path / "model")
    return tmp_path / "model"


def as_shards(folder):
    """Split the UNet's file in two with an index, as diffusers saves large models."""
    whole = load_file(folder / "unet" / checkpoint.SINGLE)
    names = sorted(whole)
    index = {"metadata": {}, "weight_map": {}}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({n: whole[n] for n in part}, folder / "unet" / file, {"format": "pt"})
        index["weight_map"].update(dict.fromkeys(part, file))
    (folder / "unet" / checkpoint.INDEX).write_text(json.dumps(index))
    (folder / "unet" / checkpoint.SINGLE).unlink()


def test_a_folder_and_pocket_resolve(folder):
    assert checkpoint.resolve(str(folder)) == folder
    assert checkpoint.resolve("pocket") == checkpoint.POCKET


def test_what_is_no_stable_diffusion_pipeline_is_named(tmp_path, folder):
    with pytest.raises(UsageError, match="nowhere was not found: give `pocket`"):
        checkpoint.resolve("nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="single-file checkpoints are not read yet"):
        checkpoint.resolve(str(tmp_path / "model.safetensors"))
    with pytest.raises(UsageError, match="has no model_index.json"):
        checkpoint.resolve(str(tmp_path))
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UsageError, match="is a FluxPipeline; salun-sd reads a StableDiffusionPipeline"):
        checkpoint.resolve(str(folder))
    (folder / "model_index.json").write_text("[")
    with pytest.raises(UsageError, match="is damaged"):
        checkpoint.resolve(str(folder))


def test_a_hub_id_is_found_in_the_hubs_cache_and_a_missing_one_is_named(tmp_path, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--tiny-sd"
    shutil.copytree(folder, repo / "snapshots" / "abc123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    found = checkpoint.resolve("someone/tiny-sd")
    assert checkpoint.fingerprint(found) == checkpoint.fingerprint(checkpoint.POCKET)
    with pytest.raises(UsageError, match="someone/else is no folder here, and the hub did not give it"):
        checkpoint.resolve("someone/else")


def test_the_fingerprint_is_of_the_weights_not_of_the_files(folder):
    before = checkpoint.fingerprint(folder)
    as_shards(folder)
    assert checkpoint.fingerprint(folder) == before == checkpoint.fingerprint(checkpoint.POCKET)
    file = checkpoint.unet_files(folder)[0]
    changed = load_file(file)
    changed[min(changed)].view(-1)[0] += 1
    save_file(changed, file)
    assert checkpoint.fingerprint(folder) != before


@dataclass
class Trained:
    """A UNet whose every weight differs from the base's."""

    folder: object

    def named_parameters(self):
        for file in checkpoint.unet_files(self.folder):
            for name, t in checkpoint.tensors(file):
                yield name, t.float() + 1


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saving_takes_trained_values_inside_the_mask_and_the_bases_bytes_elsewhere(folder, tmp_path, sharded, dtype):
    file = folder / "unet" / checkpoint.SINGLE
    save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file, {"format": "pt"})
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(file.read_bytes())
    if sharded:
        as_shards(folder)
    base = {name: t for f in checkpoint.unet_files(folder) for name, t in checkpoint.tensors(f)}
    bits = random_bits({name: t.shape for name, t in base.items()}, 0.1, seed=0)
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.save_erased(folder, Trained(folder), bits, out)
    erased = {name: t for f in checkpoint.unet_files(out) for name, t in checkpoint.tensors(f)}
    assert erased.keys() == base.keys()
    for name, t in base.items():
        assert erased[name].dtype == dtype
        assert torch.equal(erased[name][~bits[name]], t[~bits[name]])
        assert torch.equal(erased[name][bits[name]], (t.float() + 1).to(dtype)[bits[name]])
    assert checkpoint.count_changes(folder, out, bits) == {"inside": kept(bits)[0], "outside": 0}
    assert not (out / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()  # the base would ride along
    assert (out / "vae" / "config.json").read_bytes() == (folder / "vae" / "config.json").read_bytes()
    assert oct(checkpoint.unet_files(out)[0].stat().st_mode & 0o777) == oct(0o666 & ~umask())


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_weight_that_changed_outside_the_mask_is_counted(folder, tmp_path):
    bits = random_bits({n: t.shape for f in checkpoint.unet_files(folder) for n, t in checkpoint.tensors(f)}, 0.1, 0)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    file = checkpoint.unet_files(other)[0]
    weights = load_file(file)
    weights["conv_in.bias"] += 1
    bits["conv_in.bias"][:] = False
    bits["conv_in.bias"][0] = True
    save_file(weights, file, {"format": "pt"})
    assert checkpoint.count_changes(folder, other, bits) == {"inside": 1, "outside": 63}
    del weights["conv_in.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SalunError, match="lost conv_in.bias"):
        checkpoint.count_changes(folder, other, bits)


def test_a_damaged_part_is_named(folder):
    file = folder / "unet" / checkpoint.SINGLE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SalunError, match="diffusion_pytorch_model.safetensors is truncated or damaged"):
        checkpoint.fingerprint(folder)
    file.unlink()
    with pytest.raises(SalunError, match="is missing"):
        checkpoint.fingerprint(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(SalunError, match="could not be loaded"):
        checkpoint.load(folder)


def test_a_unet_whose_file_lacks_a_weight_is_refused(folder):
    """diffusers would draw the weight at random and only warn."""
    file = folder / "unet" / checkpoint.SINGLE
    weights = load_file(file)
    del weights["conv_in.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SalunError, match="conv_in.bias is missing"):
        checkpoint.load(folder)


def test_a_value_that_its_dtype_cannot_hold_is_refused(folder, tmp_path):
    bits = {name: torch.ones(shape).bool() for name, shape in checkpoint.unet_shapes(folder).items()}
    trained = SimpleNamespace(named_parameters=lambda: ((n, torch.full(b.shape, 1e6)) for n, b in bits.items()))
    with pytest.raises(SalunError, match="does not fit into torch.float16"):
        checkpoint.save_erased(folder, trained, bits, tmp_path)


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpoint.new_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.99999999.partial").mkdir()  # as kill -9 leaves it
    (tmp_path / ".out.99999999.partial" / "stale").write_text("")
    with checkpoint.new_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in (tmp_path / "out").iterdir()] == [
        "whole"
    ]


def test_a_file_is_whole_or_not_there(tmp_path):
    (tmp_path / "file").mkdir()  # a place that cannot be renamed into
    with pytest.raises(OSError) as raised:
        checkpoint.write_atomic(tmp_path / "file", b"data")
    assert raised.value.errno == errno.EISDIR
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
