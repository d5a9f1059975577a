import errno
import json
import os
import shutil

import pytest
import torch
from helpers import models
from safetensors.torch import load_file, save_file

from salun_sd.checkpoint import save
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import POCKET
from salun_sd.checkpoint.tensors import in_memory
from salun_sd.core.mask import Bits, kept, random_bits
from salun_sd.edit import patch
from salun_sd.errors import SalunError, UsageError

COMMIT = "0123456789" * 4  # as the hub names a snapshot
INDEX, SINGLE = "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the pocket pipeline that a test may break."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(POCKET / part, tmp_path / "model" / part)
    shutil.copy(POCKET / "model_index.json", tmp_path / "model")
    return tmp_path / "model"


def as_shards(folder):
    """Split the UNet's file in two with an index, as diffusers saves large models."""
    whole = load_file(folder / "unet" / SINGLE)
    names = sorted(whole)
    index = {"metadata": {}, "weight_map": {}}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({n: whole[n] for n in part}, folder / "unet" / file, {"format": "pt"})
        index["weight_map"].update(dict.fromkeys(part, file))
    (folder / "unet" / INDEX).write_text(json.dumps(index))
    (folder / "unet" / SINGLE).unlink()


def found(folder):
    return find(str(folder))


def test_a_folder_and_pocket_are_found(folder):
    assert found(folder).path == folder and found("pocket").path == POCKET
    assert found("pocket").sampling == (10, 3.0) and found(folder).sampling == (50, 7.5)
    described = found("pocket").describe()
    for word in ("pocket", "Stable Diffusion 1.x", "epsilon", "32 x 32", "5,560,644", "float16"):
        assert word in described


def test_what_is_no_stable_diffusion_pipeline_is_named(tmp_path, folder):
    with pytest.raises(UsageError, match="nowhere .*pocket"):
        found("nowhere")
    with pytest.raises(UsageError, match="nowhere.ckpt"):
        found("nowhere.ckpt")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match="notes.txt .*safetensors"):
        found(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="model_index.json"):
        found(tmp_path)
    with pytest.raises(UsageError, match="AutoencoderKL"):
        found(folder / "vae")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UsageError, match="FluxPipeline.* 1.x, 2.x .*SDXL"):
        found(folder)
    (folder / "model_index.json").write_text("[")
    with pytest.raises(UsageError, match="damaged"):
        found(folder)


def test_a_hub_id_is_found_in_the_hubs_cache_and_a_missing_one_is_named(tmp_path, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--tiny-sd"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    assert found("someone/tiny-sd").fingerprint == found("pocket").fingerprint
    with pytest.raises(UsageError, match="someone/else"):
        found("someone/else")


@pytest.mark.parametrize("asked", ["hub id", "single file"])
def test_a_download_that_fails_is_said_and_a_full_disk_stays_one(tmp_path, folder, monkeypatch, asked):
    file = models.write_single_file(folder, tmp_path / "m.safetensors")
    model, named = ("someone/else", "someone/else") if asked == "hub id" else (str(file), f"{file}.*v1-5.*--config")

    def download(*args, **options):
        raise reason

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    reason: Exception = RuntimeError("the hub is away")
    with pytest.raises(UsageError, match=f"{named}") as e:
        find(model)
    assert "the hub is away" in str(e.value)
    for number in (errno.ENOSPC, errno.EDQUOT):
        reason = OSError(number, "full")
        with pytest.raises(OSError, match="full"):
            find(model)


def test_what_a_file_or_a_folder_says_of_its_prediction_is_heeded(tmp_path):
    v, epsilon = (
        models.write_pipeline(tmp_path / kind, "sd2", prediction=kind) for kind in ("v_prediction", "epsilon")
    )
    file = models.write_single_file(v, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="--config"):
        find(str(file))
    assert find(str(file), config=str(epsilon)).prediction_type == "epsilon"  # the person knows
    for said in ({"modelspec.prediction_type": "v"}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}):
        save_file(load_file(file), file, said)
        assert find(str(file), config=str(v)).prediction_type == "v_prediction"
        with pytest.raises(UsageError, match="v_prediction.* epsilon.* --config"):
            find(str(file), config=str(epsilon))


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDM .*EDMEulerScheduler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "sample.* epsilon"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "VAE"),
    ],
)
def test_a_model_trained_for_something_else_is_refused(folder, part, change, named):
    file = folder / part
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=f"{folder}.*{named}"):
        found(folder)


def test_a_variant_that_is_not_there_is_said_and_the_plain_files_are_read(folder, caplog):
    assert find(str(folder), variant="fp16").fingerprint == found(folder).fingerprint
    [line] = caplog.messages
    assert "fp16" in line and str(folder) in line


def test_the_fingerprint_is_of_the_weights_not_of_the_files(folder):
    before = found(folder)
    assert before.fingerprint and before.identity
    as_shards(folder)
    assert found(folder).fingerprint == before.fingerprint == found("pocket").fingerprint
    assert found(folder).identity == before.identity == found("pocket").identity
    file = sorted((folder / "unet").glob("*.safetensors"))[0]
    changed = load_file(file)
    changed[min(changed)].view(-1)[0] += 1
    save_file(changed, file)
    assert found(folder).fingerprint != before.fingerprint


def test_a_folder_among_the_configs_counts_for_nothing_and_a_pipe_there_is_refused(folder):
    before = found(folder).identity
    (folder / "unet" / "notes.json").mkdir()
    assert found(folder).identity == before
    os.mkfifo(folder / "vae" / "pipe.json")
    with pytest.raises(SalunError, match="pipe.json"):
        assert found(folder).identity


def test_a_checkpoint_that_encodes_an_empty_prompt_otherwise_is_another_one(tmp_path):
    folder = models.write_pipeline(tmp_path / "sdxl", "sdxl")
    file, identities = folder / "model_index.json", []
    settings = json.loads(file.read_text())
    del settings["force_zeros_for_empty_prompt"]
    for empty in ({}, {"force_zeros_for_empty_prompt": True}, {"force_zeros_for_empty_prompt": False}):
        file.write_text(json.dumps(settings | empty))
        identities.append(find(str(folder)).identity)
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_another_text_encoder_or_tokenizer_is_another_checkpoint(folder, part):
    """The UNet alone does not say what an image was drawn from."""
    if part == "text_encoder":
        weights = load_file(folder / part / "model.safetensors")
        weights[min(weights)].view(-1)[0] += 1
        save_file(weights, folder / part / "model.safetensors", {"format": "pt"})
    else:
        (folder / part / "tokenizer_config.json").write_text("{}")
    assert found(folder).fingerprint == found("pocket").fingerprint
    assert found(folder).identity != found("pocket").identity


def patched(folder, density=0.1, add=1.0):
    """A patch whose every value inside the mask is the base's plus one, and its mask."""
    base = found(folder).unet
    bits = random_bits({name: t.shape for name, t in base.items()}, density, seed=0)
    values = {name: t.read()[bits[name]].float() + add for name, t in base.items()}
    return patch.of_training(values, bits, base, reversible=False), bits


@pytest.mark.parametrize(
    ("dtype", "sharded"),
    [(torch.float16, False), (torch.bfloat16, False), (torch.float32, False), (torch.float16, True)],
)
def test_saving_takes_trained_values_inside_the_mask_and_the_bases_bytes_elsewhere(tmp_path, sharded, dtype):
    folder = models.write_pipeline(tmp_path / "model", "sd1", dtype=dtype, shards=sharded)
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    base, (change, bits) = found(folder), patched(folder)
    out = tmp_path / "out"
    out.mkdir()
    save.folder(base, patch.merged(base.unet, change), out)
    erased = found(out)
    assert list(erased.unet) == list(base.unet)
    for name, t in base.unet.items():
        old, new = t.read(), erased.unet[name].read()
        assert new.dtype == dtype
        assert torch.equal(new[~bits[name]], old[~bits[name]])
        assert torch.equal(new[bits[name]], (old.float() + 1).to(dtype)[bits[name]])
    assert patch.changes(base.unet, erased.unet, bits) == {"inside": kept(bits)[0], "outside": 0}
    assert not (out / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()  # the base would ride along
    for file in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()


def test_a_weight_that_changed_outside_the_mask_is_counted(folder):
    base = found(folder).unet
    first = torch.arange(base["conv_in.bias"].shape[0]) == 0
    drawn = random_bits({n: t.shape for n, t in base.items()}, 0.1, 0)
    bits = Bits.of((name, first if name == "conv_in.bias" else b) for name, b in drawn.items())
    other = base | {"conv_in.bias": in_memory(base["conv_in.bias"].read() + 1)}
    assert patch.changes(base, other, bits) == {"inside": 1, "outside": 63}
    del other["conv_in.bias"]
    with pytest.raises(SalunError, match="conv_in.bias"):
        patch.changes(base, other, bits)
    with pytest.raises(SalunError, match="odd"):
        patch.changes(base, base | {"odd": base["conv_in.bias"]}, bits)


def test_a_damaged_part_is_named(folder):
    file = folder / "unet" / SINGLE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SalunError, match="diffusion_pytorch_model.safetensors .*damaged"):
        found(folder)
    file.unlink()
    with pytest.raises(SalunError, match="diffusion_pytorch_model.safetensors .*missing"):
        found(folder)
    shutil.copy(POCKET / "unet" / SINGLE, file)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(SalunError, match="tokenizer"):
        load_pipeline(found(folder))
    (folder / "vae" / SINGLE).unlink()
    with pytest.raises(SalunError, match="vae/diffusion_pytorch_model.safetensors"):
        found(folder)


def test_a_lost_shard_and_a_link_to_nothing_are_said(folder):
    link = folder / "vae" / SINGLE
    link.unlink()
    link.symlink_to("../../blobs/0123")  # as a hub's cache that was cleared in part
    with pytest.raises(SalunError, match=f"{link}.* ../../blobs/0123"):
        found(folder)
    as_shards(folder)
    shard = sorted((folder / "unet").glob("*-of-*"))[1]
    shard.unlink()
    with pytest.raises(SalunError, match=f"{shard}.*{INDEX}") as e:
        found(folder)
    assert "--variant" not in str(e.value)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SalunError, match=f"{shard}.*git lfs pull"):
        found(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}']
)
def test_a_damaged_index_of_shards_is_named(folder, content):
    as_shards(folder)
    (folder / "unet" / INDEX).write_text(content)
    with pytest.raises(SalunError, match=f"{INDEX} is damaged"):
        found(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_part_whose_file_lacks_a_weight_is_refused(folder, part):
    """diffusers and transformers would draw the weight at random and only warn."""
    [file] = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    gone = "conv_in.bias" if part == "unet" else "encoder.layers.1.mlp.fc1.bias"
    del weights[gone]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SalunError, match=gone):
        load_pipeline(found(folder))


def test_a_value_that_its_dtype_cannot_hold_is_refused(folder):
    with pytest.raises(SalunError, match="torch.float16.*--lr"):
        patched(folder, density=1.0, add=1e6)
