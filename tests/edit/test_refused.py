"""What mask, erase and apply refuse: models, configs, patches and places, each named before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import models
from helpers.commands import fails, files_up_to
from helpers.forms import CAT, UNET, apply, erase, files_of, training, write_forms
from helpers.runs import fails_with
from safetensors.torch import load_file, save_file

from salun_sd.cli import app as cli


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A model, a mask of it, what it is erased to, and two patches of it: `once` cannot be reverted."""
    here = write_forms(tmp_path_factory.mktemp("here"))
    models.write_single_file(here / "sd1", here / "sd1.ckpt")
    cli.run(["mask", str(here / "sd1"), "--concept", CAT, "--forget", str(here / "forget"), "--size", "16",
             "--out", str(here / "mask.safetensors")])  # fmt: skip
    erase(here, here / "sd1", "--format", "patch", "--reversible", "--out", here / "patch.safetensors")
    erase(here, here / "sd1.ckpt", "--config", here / "sd1", "--format", "patch", "--out", here / "once.safetensors")
    apply(here / "sd1", here / "patch.safetensors", here / "erased")
    return here


@pytest.fixture(scope="module")
def odd(here, tmp_path_factory):
    """Files and folders that are no Stable Diffusion checkpoint, or that do not go with the one of `here`."""
    odd = tmp_path_factory.mktemp("odd")
    whole, entry = load_file(here / "sd1.safetensors"), f"{UNET}input_blocks.0.0.weight"
    text, vae, little = "cond_stage_model.transformer.text_model.", "first_stage_model.", torch.zeros(2, 2)
    for name, content in {
        "lora": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": little},
        "peft": {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": little},
        "vae": {k.removeprefix(vae): t for k, t in whole.items() if k.startswith(vae)},
        "inpainting": whole | {entry: torch.zeros(16, 9, 3, 3)},
        "flux": {"double_blocks.0.img_attn.qkv.weight": little},
        "flux-ui": {f"{UNET}double_blocks.0.img_attn.qkv.weight": little},
        "flux-diffusers": {"single_transformer_blocks.0.attn.to_q.weight": little},
        "sd3": {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": little},
        "refiner": {k.replace(text, "conditioner.embedders.0.model."): t for k, t in whole.items()},
        "textless": {k: t for k, t in whole.items() if not k.startswith(text)},
    }.items():
        save_file(content, odd / f"{name}.safetensors")
    inpainting = shutil.copytree(here / "sd1", odd / "inpainting")
    config = json.loads((inpainting / "unet" / "config.json").read_text())
    (inpainting / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    (odd / "sd3").mkdir()
    (odd / "sd3" / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    models.write_pipeline(odd / "sdxl", "sdxl", dtype=torch.float16)
    models.write_pipeline(odd / "other", "sd1", dtype=torch.float16, seed=1)
    unet = models.TINY["sd1"]["unet"]
    for name, change in {
        "wide": {"block_out_channels": (24, 48)},
        "deep": {**models.blocks("x.."), "block_out_channels": (16, 32, 32)},
    }.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(models.TINY["sd1"], "unet", unet | change)
            models.write_pipeline(odd / name, "sd1", dtype=torch.float16)
    return odd


@pytest.fixture(scope="module")
def places(here, odd, hub) -> dict[str, Path]:
    """What stands in braces below."""
    files = {name: here / f"{name}.safetensors" for name in ("patch", "once")}
    return {"here": here, "odd": odd, "sd1": here / "sd1", "file": here / "sd1.safetensors", **files}


FAMILIES = "'Stable Diffusion 1.x'"
MASKED = {  # models, and what a refusal names
    "a LoRA": ("{odd}/lora.safetensors", 2, "LoRA"),
    "a LoRA of peft": ("{odd}/peft.safetensors", 2, "LoRA"),
    "a VAE": ("{odd}/vae.safetensors", 2, "'VAE,' UNet"),
    "a pipeline's VAE": ("{sd1}/vae/diffusion_pytorch_model.safetensors", 2, "'VAE,' UNet"),
    "a pipeline's UNet": ("{sd1}/unet/diffusion_pytorch_model.safetensors", 2, "UNet diffusers"),
    "an inpainting file": ("{odd}/inpainting.safetensors --config {sd1}", 2, "inpainting '9 input'"),
    "an inpainting folder": ("{odd}/inpainting", 2, "inpainting '9 input' 4"),
    "Flux": ("{odd}/flux.safetensors", 2, f"Flux {FAMILIES}"),
    "Flux for a web UI": ("{odd}/flux-ui.safetensors", 2, f"Flux {FAMILIES}"),
    "Flux of diffusers": ("{odd}/flux-diffusers.safetensors", 2, f"Flux {FAMILIES}"),
    "SD 3": ("{odd}/sd3.safetensors", 2, "'Stable Diffusion 3'"),
    "a folder of SD 3": ("{odd}/sd3", 2, f"StableDiffusion3Pipeline {FAMILIES}"),
    "a refiner": ("{odd}/refiner.safetensors", 2, "refiner"),
    "no text encoder": ("{odd}/textless.safetensors", 2, "'text encoder'"),
    "a mask": ("{here}/mask.safetensors", 2, "mask.safetensors 'mask or'"),
    "a patch": ("{once}", 2, "once.safetensors 'or a patch'"),
    # configs, revisions and variants; the hub's cache has nothing else and there is no network
    "no config": ("{file}", 2, "--config"),
    "a config that is nowhere": ("{file} --config nowhere/at-all", 2, "--config nowhere/at-all"),
    "a config of another family": ("{file} --config {odd}/sdxl", 2, f"--config {FAMILIES} {{odd}}/sdxl"),
    "a wider config": ("{file} --config {odd}/wide", 1, "--config shape"),
    "a deeper config": ("{file} --config {odd}/deep", 1, "--config"),
    "a revision of a file": ("{file} --config {sd1} --revision old", 2, "--revision"),
    "a config of a folder": ("{sd1} --config {sd1}", 2, "--config"),
    "a revision of a folder": ("{sd1} --revision old", 2, "--revision"),
    "a revision that is not there": ("someone/tiny --revision new", 2, "someone/tiny --revision"),
}
APPLIED = {
    "a wider config": ("{file} {once} --config {odd}/wide", 1, "--config shape"),
    "another base": ("{odd}/other {once}", 1, "sd1.ckpt {odd}/other"),
    "a base of another family": ("{odd}/sdxl {once}", 1, "sd1.ckpt {odd}/sdxl"),
    "another one to revert": ("{odd}/other {patch} --revert", 1, "sd1 {odd}/other"),
    "once more": ("{here}/erased {once}", 1, "{here}/erased already"),
    "no values to revert": ("{here}/erased {once} --revert", 1, "--reversible"),
    "the base to revert": ("{sd1} {patch} --revert", 1, "{sd1} revert"),
    "a checkpoint": ("{sd1} {file}", 1, "{file} patch"),
    "a mask": ("{sd1} {here}/mask.safetensors", 1, "mask.safetensors patch"),
    "a text": ("{sd1} {sd1}/model_index.json", 1, "model_index.json"),
    "a folder": ("{sd1} {sd1}", 2, "{sd1} patch"),
    "a file in a checkpoint": ("{sd1} {once} --format single-file --out {sd1}/a.safetensors", 2, "{sd1} --out"),
    "no file": ("{sd1} {odd}/nowhere.safetensors", 2, "{odd}/nowhere.safetensors patch"),
    "a folder for a file": ("{sd1} {once} --format single-file --out {out}", 2, ".safetensors --format"),
    "a file for a folder": ("{sd1} {once} --out {saved}", 2, "{saved} --format"),
    "a patch for a checkpoint": ("{sd1} {once} --format patch --out {saved}", 2, "patch"),
}
ERASED = {
    "a folder for a file": ("--format single-file --out {out}", 2, ".safetensors '--format single-file'"),
    "a folder for a patch": ("--format patch --out {out}", 2, ".safetensors '--format patch'"),
    "a file for a folder": ("--out {saved}", 2, "{saved} --format"),
    "a folder in a checkpoint": ("--out {sd1}/erased", 2, "{sd1} --out"),
    "the folder one is in": ("--out .", 2, "--out"),
    "reversible folder": ("--reversible --out {out}", 2, "--reversible '--format patch'"),
    "reversible file": ("--reversible --format single-file --out {saved}", 2, "--reversible '--format patch'"),
}


def refuses(line: str, places, tmp_path, code, named, capsys):
    fails_with(line, places | {"out": tmp_path / "out", "saved": tmp_path / "out.safetensors"}, code, named, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("model", "code", "named"), MASKED.values(), ids=MASKED)
def test_mask(model, code, named, places, tmp_path, capsys):
    line = f"mask {model} --concept '{CAT}' --forget {{here}}/forget --size 16 --out {{saved}}"
    refuses(line, places, tmp_path, code, named, capsys)


@pytest.mark.parametrize(("given", "code", "named"), APPLIED.values(), ids=APPLIED)
def test_apply(given, code, named, places, tmp_path, capsys):
    refuses(f"apply {given}" + " --out {out}" * ("--out" not in given), places, tmp_path, code, named, capsys)


@pytest.mark.parametrize(("options", "code", "named"), ERASED.values(), ids=ERASED)
def test_erase(options, code, named, places, tmp_path, capsys):
    line = f"erase {{sd1}} --concept '{CAT}' --anchor 'a dog' --mask none {options}"
    refuses(line, places, tmp_path, code, named, capsys)


def test_what_is_there_already_is_not_written_over(here, capsys):
    before = files_of(here)
    for argv, out in (
        (["apply", here / "sd1", here / "patch.safetensors"], here / "erased"),
        (["apply", here / "sd1", here / "patch.safetensors", "--format", "single-file"], here / "once.safetensors"),
        (["erase", here / "sd1", *training(here), "--format", "single-file"], here / "once.safetensors"),
        (["erase", here / "sd1", *training(here), "--format", "patch"], here / "sd1.safetensors"),
    ):
        sentence = fails([*argv, "--out", out], 2, capsys)
        assert str(out) in sentence and "--out" in sentence
    assert files_of(here) == before


@pytest.mark.parametrize("kind", ["mask", "new"])
def test_a_patch_whose_bytes_were_damaged_is_named(here, tmp_path, capsys, kind):
    file, data = tmp_path / "patch.safetensors", bytearray((here / "patch.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    data[start + next(v["data_offsets"][0] for k, v in header.items() if k.startswith(kind))] ^= 0x7F
    file.write_bytes(data)
    sentence = fails(["apply", here / "sd1", file, "--out", tmp_path / "out"], 1, capsys)
    assert str(file) in sentence and "damaged" in sentence and not (tmp_path / "out").exists()


def test_a_full_disk_is_said_and_leaves_nothing(here, tmp_path, capsys):
    applied = ["apply", here / "sd1", here / "patch.safetensors"]
    erase = ["erase", here / "sd1", "--save-every", "0"]
    for name, argv in (
        ("erased.safetensors", [*erase, *training(here), "--format", "single-file"]),
        ("patch.safetensors", [*erase, *training(here, "none"), "--format", "patch", "--reversible"]),
        ("applied.safetensors", [*applied, "--format", "single-file"]),
        ("applied", applied),
    ):
        with files_up_to(2**17):
            sentence = fails([*argv, "--out", tmp_path / name], 1, capsys)
        assert "File too large" in sentence and f" {tmp_path / name}: " in sentence  # and no source of a copy
        assert list(tmp_path.iterdir()) == []
