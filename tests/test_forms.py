"""Checkpoints of every family in and out, in every form that people have and other programs load."""

import json
import os
import pickle
import shutil

import models
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from salun_sd import cli, patch

CONCEPT, ANCHOR = "a photo of a cat", "a photo of a dog"


def fails(argv, code, capsys) -> str:
    """Run a command that must fail; its one sentence."""
    with pytest.raises(SystemExit) as ended:
        cli.run([str(a) for a in argv])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == code, said
    return said


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Images to forget and to retain, and an SD 1.x pipeline in fp16 as a folder, sharded, and as a single file."""
    here = tmp_path_factory.mktemp("forms")
    for n, name in enumerate(("forget", "retain")):
        (here / name).mkdir()
        for i in range(3):
            noise = np.random.RandomState(10 * n + i).randint(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(noise).save(here / name / f"{i}.png")
    folder = models.write_pipeline(here / "sd1", "sd1", dtype=torch.float16)
    models.write_pipeline(here / "sharded", "sd1", dtype=torch.float16, shards=True)
    models.write_single_file(folder, here / "sd1.safetensors")
    return here


def erase(here, model, *options, mask="random:0.3"):
    cli.run([
        "erase", str(model), "--concept", CONCEPT, "--anchor", ANCHOR, "--forget", str(here / "forget"),
        "--retain", str(here / "retain"), "--resolution", "16", "--steps", "2", "--batch-size", "2", "--lr", "1e-3",
        *(("--mask", mask) if mask else ()), *map(str, options),
    ])  # fmt: skip


def test_a_folder_from_a_single_file_opens_where_the_config_names_a_safety_checker(here, tmp_path):
    """As the hub gives the config of SD 1.x: safety_checker/config.json is there, and no weights."""
    config = shutil.copytree(here / "sd1", tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((config / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (config / "model_index.json").write_text(json.dumps(index))
    (config / "safety_checker").mkdir()
    (config / "safety_checker" / "config.json").write_text('{"architectures": ["StableDiffusionSafetyChecker"]}')
    erase(here, here / "sd1.safetensors", "--config", config, "--out", tmp_path / "erased")
    DiffusionPipeline.from_pretrained(tmp_path / "erased", local_files_only=True)


@pytest.mark.parametrize("mask", ["random:0.3", None])
def test_the_erased_weights_do_not_depend_on_the_form_of_the_base(here, tmp_path, mask):
    bases = {"folder": [here / "sd1"], "shards": [here / "sharded"],
             "file": [here / "sd1.safetensors", "--config", here / "sd1"]}  # fmt: skip
    erased = {}
    for name, model in bases.items():
        out = tmp_path / f"{name}.safetensors"
        erase(here, *model, "--format", "patch", "--out", out, mask=mask)
        erased[name] = patch.read(out).record["erased"]["fingerprint"]
    assert len(set(erased.values())) == 1, erased


@pytest.mark.parametrize("kind", ["mask", "new"])
def test_a_patch_whose_bytes_were_damaged_is_named(here, tmp_path, capsys, kind):
    file = tmp_path / "patch.safetensors"
    erase(here, here / "sd1", "--format", "patch", "--out", file)
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    data[start + next(v["data_offsets"][0] for k, v in header.items() if k.startswith(kind))] ^= 0x7F
    file.write_bytes(data)
    said = fails(["apply", here / "sd1", file, "--out", tmp_path / "out"], 1, capsys)
    assert "patch.safetensors" in said and "damaged" in said and not (tmp_path / "out").exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("saved", ["zip", "legacy", "bare"])
def test_a_pickle_with_code_in_it_is_refused_by_what_it_asks_for(tmp_path, capsys, saved, protocol):
    file, marker = tmp_path / "model.ckpt", tmp_path / "marker"
    found = {"state_dict": {"a": torch.zeros(2)}, "callbacks": Evil(str(marker))}
    if saved == "bare":
        file.write_bytes(pickle.dumps({"callbacks": Evil(str(marker))}, protocol=protocol))
    else:
        torch.save(found, file, pickle_protocol=protocol, _use_new_zipfile_serialization=saved == "zip")
    said = fails(["mask", file, "--concept", CONCEPT, "--out", tmp_path / "m.safetensors"], 1, capsys)
    assert not marker.exists()
    wanted = "would run code: it asks for posix.mkdir" if protocol == 2 else "a pickle of more than weights"
    assert wanted in said and "weights_only" not in said


def test_a_ckpt_that_is_cut_off_or_odd_is_named(here, tmp_path, capsys):
    whole = models.write_single_file(here / "sd1", tmp_path / "whole.ckpt").read_bytes()
    file = tmp_path / "model.ckpt"
    for data in (b"", whole[:100], whole[:5000], whole[: len(whole) // 2], whole[:-10]):
        file.write_bytes(data)
        said = fails(["mask", file, "--concept", CONCEPT, "--out", tmp_path / "m.safetensors"], 1, capsys)
        assert "model.ckpt is truncated or damaged (" in said and "()" not in said, said
    torch.save({0: torch.zeros(2)}, file)  # an optimizer's state, say
    said = fails(["mask", file, "--concept", CONCEPT, "--out", tmp_path / "m.safetensors"], 1, capsys)
    assert "holds no weights by name" in said
