"""Checkpoints of every family in and out, in every form that people have and other programs load."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import models
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file

from salun_sd.checkpoint import provenance, tensors
from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.core import mask
from salun_sd.edit import maskfile, patch

CONCEPT, ANCHOR = "a photo of a cat", "a photo of a dog"
UNET = "model.diffusion_model."


def fails(argv, code, capsys) -> str:
    """Run a command that must fail; its one sentence."""
    with pytest.raises(SystemExit) as ended:
        cli.run([str(a) for a in argv])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == code, said
    return said


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Images to forget and to retain, and an SD 1.x pipeline in fp16 as a folder and as a single file."""
    here = tmp_path_factory.mktemp("forms")
    for n, name in enumerate(("forget", "retain")):
        (here / name).mkdir()
        for i in range(3):
            noise = np.random.RandomState(10 * n + i).randint(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(noise).save(here / name / f"{i}.png")
    folder = models.write_pipeline(here / "sd1", "sd1", dtype=torch.float16)
    models.write_single_file(folder, here / "sd1.safetensors")
    return here


def training(here, mask="random:0.3") -> list[str]:
    return [
        "--concept", CONCEPT, "--anchor", ANCHOR, "--forget", str(here / "forget"), "--retain", str(here / "retain"),
        "--resolution", "16", "--steps", "2", "--batch-size", "2", "--lr", "1e-3", *(("--mask", mask) if mask else ()),
    ]  # fmt: skip


def erase(here, model, *options, mask="random:0.3"):
    cli.run(["erase", str(model), *training(here, mask), *map(str, options)])


def apply(model, change, out, *options):
    form = "single-file" if out.suffix else "diffusers"
    cli.run(["apply", str(model), str(change), "--format", form, "--out", str(out), *map(str, options)])
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the last bit."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def all_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same(t, b[name]) for name, t in a.items())


def files_of(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Made(NamedTuple):
    """One command's work in each form."""

    dtype: torch.dtype
    base: Path
    folder: Path
    file: Path
    patch: Path


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("sd1", torch.float32), id="sd1-fp32"),
        pytest.param(("sd2", torch.bfloat16), id="sd2-bf16-v"),
        pytest.param(("sdxl", torch.float16), id="sdxl-fp16", marks=pytest.mark.slow),
    ],
)
def made(request, here):
    family, dtype = request.param
    place, prediction = here / f"made-{family}", "v_prediction" if family == "sd2" else "epsilon"
    base = models.write_pipeline(place / "base", family, dtype=dtype, prediction=prediction)
    made = Made(dtype, base, place / "erased", place / "erased.safetensors", place / "patch.safetensors")
    erase(here, base, "--out", made.folder, mask=None)
    erase(here, base, "--format", "single-file", "--out", made.file, mask=None)
    erase(here, base, "--format", "patch", "--reversible", "--out", made.patch, mask=None)
    return made


def test_a_command_gives_the_same_weights_in_each_form_and_moves_them_inside_the_mask_alone(made):
    before, after = models.load_parts(made.base), models.load_parts(made.folder)
    bits = maskfile.unpack((made.folder / "mask.safetensors").read_bytes(), "").bits
    unet, moved = before.pop("unet"), 0
    assert unet.keys() == after["unet"].keys() == bits.keys()
    for name, t in unet.items():
        new = after["unet"][name]
        assert new.dtype == made.dtype and same(new[~bits[name]], t[~bits[name]]), name
        moved += int((new != t).sum())
    assert mask.kept(bits)[0] / 2 < moved == json.loads((made.folder / "salun.json").read_text())["changed"]["inside"]
    assert all(all_same(t, after[part]) for part, t in before.items())
    base, folder = files_of(made.base), files_of(made.folder)
    assert folder.keys() == base.keys() | {"README.md", "salun.json", "mask.safetensors", "losses.jsonl", "run.json"}
    apart = {"unet/diffusion_pytorch_model.safetensors", "model_index.json"}
    assert [name for name in base.keys() - apart if folder[name] != base[name]] == []

    assert all_same(load_file(made.file), models.single_file_tensors(made.folder))
    of_file = find(str(made.file), config=str(made.base)).fingerprint
    of_patch = patch.read(made.patch).record["erased"]["fingerprint"]
    assert of_file == of_patch == find(str(made.folder)).fingerprint


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_diffusers_opens_the_folder_and_the_file_as_they_are(made):
    options = {"torch_dtype": made.dtype, "local_files_only": True}
    opened = DiffusionPipeline.from_pretrained(made.folder, **options)
    from_file = type(opened).from_single_file(str(made.file), config=str(made.base), **options)
    for part, of_folder in models.load_parts(made.folder).items():
        for pipeline in (opened, from_file):
            found = getattr(pipeline, part).state_dict()
            named = {name.removeprefix("text_model."): t for name, t in found.items() if "position_ids" not in name}
            assert all_same(named, of_folder), part
    assert opened.scheduler.config.prediction_type == ("v_prediction" if made.dtype == torch.bfloat16 else "epsilon")


def test_a_patch_makes_of_its_base_what_erase_makes_and_takes_it_back(made, tmp_path):
    folder, file = (apply(made.base, made.patch, tmp_path / name) for name in ("folder", "file.safetensors"))
    erased, base = models.load_parts(made.folder), models.load_parts(made.base)
    assert all(all_same(t, erased[part]) for part, t in models.load_parts(folder).items())
    assert all_same(load_file(file), load_file(made.file))
    record = patch.read(made.patch).record
    assert provenance.read(folder) == provenance.read(file) == record and record["command"].startswith("salun-sd erase")

    file = apply(made.folder, made.patch, tmp_path / "base.safetensors", "--revert")
    folder = apply(made.file, made.patch, tmp_path / "base", "--revert", "--config", made.base)
    assert all(all_same(t, base[part]) for part, t in models.load_parts(folder).items())
    assert all_same(load_file(file), models.single_file_tensors(made.base))
    assert provenance.read(folder) is provenance.read(file) is None and not (folder / "README.md").exists()


COMMITS = {"main": "a" * 40, "old": "0123456789" * 4}


@pytest.fixture(scope="module")
def hub(here, tmp_path_factory):
    """The hub's cache with the model of `here` as the revision "old" of someone/tiny, and nothing else in it."""
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / "models--someone--tiny"
    models.write_pipeline(repo / "snapshots" / COMMITS["main"], "sd1", dtype=torch.float16, seed=1)
    old = shutil.copytree(here / "sd1", repo / "snapshots" / COMMITS["old"])
    (old / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [cats]\n---\n# Tiny\n")
    (repo / "refs").mkdir()
    for name, commit in COMMITS.items():
        (repo / "refs" / name).write_text(commit)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield repo


@pytest.fixture(scope="module")
def patches(here, hub):
    """The same erasure of the same model in each form that a person may have it in, as a patch."""
    models.write_pipeline(here / "sharded", "sd1", dtype=torch.float16, shards=True)
    models.write_pipeline(here / "variant", "sd1", dtype=torch.float16, variant="fp16")
    models.write_single_file(here / "sd1", here / "sd1.ckpt")
    bases = {
        "folder": [here / "sd1"],
        "sharded": [here / "sharded"],
        "variant": [here / "variant", "--variant", "fp16"],
        "file": [here / "sd1.safetensors", "--config", here / "sd1"],
        "ckpt": [here / "sd1.ckpt", "--config", here / "sd1"],
        "hub": ["someone/tiny", "--revision", "old"],
    }
    for name, model in bases.items():
        also = ["--reversible"] if name in ("folder", "file") else []
        erase(here, *model, "--format", "patch", *also, "--out", here / f"{name}-patch.safetensors", mask=None)
    return {name: here / f"{name}-patch.safetensors" for name in bases}


def test_the_erased_weights_do_not_depend_on_the_form_of_the_base(patches):
    records = {name: patch.read(file).record for name, file in patches.items()}
    for which in ("base", "erased"):
        found = {name: record[which]["fingerprint"] for name, record in records.items()}
        assert len(set(found.values())) == 1, found
    revisions = {name: record["base"]["revision"] for name, record in records.items()}
    assert revisions == dict.fromkeys(records) | {"hub": COMMITS["old"]}


def test_a_random_mask_is_the_same_for_each_form_of_the_base(here, tmp_path):
    erased = []
    for name, model in (("folder", [here / "sd1"]), ("file", [here / "sd1.safetensors", "--config", here / "sd1"])):
        out = tmp_path / f"{name}.safetensors"
        erase(here, *model, "--format", "patch", "--out", out)
        erased.append(patch.read(out).record["erased"]["fingerprint"])
    assert erased[0] == erased[1]


def test_the_card_names_the_hubs_base_and_inherits_its_licence(patches):
    card = ModelCard.load(provenance.run_folder(patches["hub"]) / "README.md").data
    assert (card.base_model, card.license, card.license_name) == ("someone/tiny", "creativeml-openrail-m", None)
    assert card.library_name is None and "concept-erasure" in card.tags  # a patch, which no library loads
    card = ModelCard.load(provenance.run_folder(patches["folder"]) / "README.md").data
    assert (card.base_model, card.license) == (None, None)  # a folder here is no id there


def raw_tensors(file):
    """Name -> dtype, shape and bytes in a .safetensors file, and its metadata, read without a library."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    said = header.pop("__metadata__", {})
    values = memoryview(data)[start:]
    return {name: (t["dtype"], t["shape"], values[slice(*t["data_offsets"])]) for name, t in header.items()}, said


def test_what_else_a_single_file_holds_stays_but_for_a_second_unet(here, patches, tmp_path):
    whole = load_file(here / "sd1.safetensors")
    unet = [name for name in whole if name.startswith(UNET)]
    ema = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": whole[name].clone() for name in unet}
    extra = {"alphas_cumprod": torch.linspace(1, 0, 1000), "model_ema.num_updates": torch.tensor(7), **ema}
    said = {
        "format": "pt", "modelspec.author": "someone", "modelspec.hash_sha256": "0x12", "ss_note": "Grüße",
        "modelspec.license": "CreativeML Open RAIL++-M License",
    }  # fmt: skip
    base, out, plain = (tmp_path / f"{name}.safetensors" for name in ("base", "erased", "plain"))
    save_file(whole | extra, base, said)
    erase(here, base, "--config", here / "sd1", "--format", "single-file", "--out", out, mask=None)
    (before, _), (after, header) = raw_tensors(base), raw_tensors(out)
    assert after.keys() == whole.keys() | {"alphas_cumprod"}
    assert [name for name in after if not name.startswith(UNET) and after[name] != before[name]] == []
    assert all(after[name][:2] == before[name][:2] for name in unet)
    assert len(unet) / 2 < sum(after[name] != before[name] for name in unet) <= len(unet)

    record = json.loads(header["salun_sd"])
    assert record["erased"]["fingerprint"] == find(str(out), config=str(here / "sd1")).fingerprint
    assert record["changed"]["outside"] == 0 < record["changed"]["inside"]
    assert header["modelspec.architecture"] == "stable-diffusion-v1" and header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.prediction_type"] == "epsilon" and header["modelspec.resolution"] == "32x32"
    assert CONCEPT in header["modelspec.title"] and "modelspec.hash_sha256" not in header  # that was of other bytes
    kept = {k: v for k, v in said.items() if k != "modelspec.hash_sha256"}
    assert kept.items() <= header.items()
    card = ModelCard.load(provenance.run_folder(out) / "README.md").data
    assert (card.license, card.license_name) == ("other", said["modelspec.license"])

    # and back to every byte that was there, where nothing was left out
    save_file(whole | {"alphas_cumprod": extra["alphas_cumprod"]}, plain, {"format": "pt"})
    config = ["--config", here / "sd1"]
    erased = apply(plain, patches["file"], tmp_path / "applied.safetensors", *config)
    assert raw_tensors(erased)[0] == after
    back = apply(erased, patches["file"], tmp_path / "back.safetensors", "--revert", *config)
    assert back.read_bytes() == plain.read_bytes()


APPLY = """import json, sys
from salun_sd.cli import app as cli

def held(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))

for argv in json.loads(sys.argv[1]):
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = held("VmRSS")
    cli.run(argv)
    print("held", held("VmHWM") - before)"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_apply_holds_a_few_tensors_and_never_the_checkpoint(here, patches, tmp_path, monkeypatch):
    """What it takes for a model of 100 MB, once a tiny one has brought the libraries in."""
    unet = {**models.TINY["sd1"]["unet"], "block_out_channels": (320, 320), "layers_per_block": 2}
    monkeypatch.setitem(models.TINY["sd1"], "unet", unet)
    large = models.write_pipeline(tmp_path / "large", "sd1", dtype=torch.float16)
    file = models.write_single_file(large, tmp_path / "large.safetensors")
    base, found, g = find(str(large)), {}, torch.Generator().manual_seed(0)
    for name, t in base.unet.items():
        bits = torch.rand(t.shape, generator=g) < 0.1
        found[f"mask/{name}"] = tensors.given(mask.packed_bits(bits))
        found[f"new/{name}"] = tensors.given(t.read()[bits] + 1)
    record, change = patch.read(patches["folder"]).record, tmp_path / "patch.safetensors"
    record["base"]["fingerprint"] = base.fingerprint
    record["erased"]["fingerprint"] = tensors.fingerprint(patch.merged(base.unet, patch.Patch(found, {})))
    patch.write(change, patch.Patch(found, record))
    runs = [
        [here / "sd1.safetensors", patches["folder"], "--config", here / "sd1", "--format", "single-file"],
        [large, change, "--format", "single-file"],
        [file, change, "--config", large],
    ]
    argv = [["apply", *map(str, run), "--out", str(tmp_path / f"{i}{'.safetensors' if 'single-file' in run else ''}")]
            for i, run in enumerate(runs)]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", APPLY, json.dumps(argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = [int(line.split()[1]) / file.stat().st_size for line in done.stdout.splitlines() if line.startswith("held")]
    assert len(held) == 3 and max(held[1:]) < 0.5 and file.stat().st_size > 90e6, held


def test_a_full_disk_is_said_and_leaves_nothing(here, patches, tmp_path, capsys):
    """A limit on the size of files stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    applied = ["apply", here / "sd1", patches["folder"]]
    for name, argv in (
        ("erased.safetensors", ["erase", here / "sd1", *training(here), "--format", "single-file"]),
        ("patch.safetensors", ["erase", here / "sd1", *training(here, "none"), "--format", "patch", "--reversible"]),
        ("applied.safetensors", [*applied, "--format", "single-file"]),
        ("applied", applied),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
        try:
            said = fails([*argv, "--out", tmp_path / name], 1, capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in said and name in said, said
        assert list(tmp_path.iterdir()) == []


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
        "no-text": {k: t for k, t in whole.items() if not k.startswith(text)},
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
    cli.run(["mask", str(here / "sd1"), "--concept", CONCEPT, "--forget", str(here / "forget"), "--resolution", "16",
             "--out", str(odd / "mask.safetensors")])  # fmt: skip
    return odd


def test_what_cannot_be_done_is_said_before_anything_is_written(here, odd, patches, hub, tmp_path, capsys):
    sd1, file, once = here / "sd1", here / "sd1.safetensors", patches["ckpt"]
    other_width = "another shape than its config says: --config is of another model"
    not_a_patch = "is not a patch of salun-sd"

    def mask(model, *options):
        return ["mask", model, *options, "--concept", CONCEPT, "--forget", here / "forget", "--resolution", 16]

    def erase(*options):
        return ["erase", sd1, *training(here), *options]

    erased = apply(sd1, patches["folder"], odd / "erased")
    out, saved = tmp_path / "out", tmp_path / "out.safetensors"
    for argv, to, code, said in [
        (mask(odd / "lora.safetensors"), saved, 2, "is a LoRA, which only adds to a model: give the checkpoint"),
        (mask(odd / "peft.safetensors"), saved, 2, "is a LoRA, which only adds to a model: give the checkpoint"),
        (mask(odd / "vae.safetensors"), saved, 2, "is a VAE, which has no UNet to edit"),
        (mask(sd1 / "vae" / "diffusion_pytorch_model.safetensors"), saved, 2, "is a VAE, which has no UNet to edit"),
        (mask(sd1 / "unet" / "diffusion_pytorch_model.safetensors"), saved, 2, "is a UNet alone in diffusers' names"),
        (mask(odd / "inpainting.safetensors", "--config", sd1), saved, 2, "has an inpainting UNet, 9 input channels"),
        (mask(odd / "inpainting"), saved, 2, "has an inpainting UNet, 9 input channels instead of 4"),
        (mask(odd / "flux.safetensors"), saved, 2, "is a Flux model. Salun-sd edits Stable Diffusion 1.x, 2.x and"),
        (mask(odd / "flux-ui.safetensors"), saved, 2, "is a Flux model. Salun-sd edits Stable Diffusion 1.x, 2.x and"),
        (mask(odd / "flux-diffusers.safetensors"), saved, 2, "is a Flux model"),
        (mask(odd / "sd3.safetensors"), saved, 2, "is a Stable Diffusion 3 model"),
        (mask(odd / "sd3"), saved, 2, "is a StableDiffusion3Pipeline; salun-sd edits Stable Diffusion 1.x, 2.x and"),
        (mask(odd / "refiner.safetensors"), saved, 2, "is an SDXL refiner"),
        (mask(odd / "no-text.safetensors"), saved, 2, "has a UNet but no text encoder: give the whole checkpoint"),
        (mask(odd / "mask.safetensors"), saved, 2, "is a mask or a patch of salun-sd: give the checkpoint"),
        (mask(once), saved, 2, "is a mask or a patch of salun-sd: give the checkpoint that it was made for"),
        # configs, revisions and variants; the hub's cache has nothing else and there is no network
        (mask(file), saved, 2, "a hub id that is cached here: --config FOLDER"),
        (mask(file, "--config", "nowhere/at-all"), saved, 2, "could not be had from the hub as nowhere/at-all"),
        (mask(file, "--config", odd / "sdxl"), saved, 2, "is Stable Diffusion 1.x, but its config"),
        (mask(file, "--config", odd / "wide"), saved, 1, other_width),
        (mask(file, "--config", odd / "deep"), saved, 1, "it is not whole, or --config is of another model"),
        (mask(file, "--config", sd1, "--revision", "old"), saved, 2, "--revision and --variant are for a hub id or a"),
        (mask(sd1, "--config", sd1), saved, 2, "--config is for a single file"),
        (mask(sd1, "--revision", "old"), saved, 2, "--revision is for a hub id"),
        (mask("someone/tiny", "--revision", "new"), saved, 2, "the hub did not give it"),
        (["apply", file, once, "--config", odd / "wide"], out, 1, other_width),
        # patches
        (["apply", odd / "other", once], out, 1, f"The patch is for {here / 'sd1.ckpt'} (UNet "),
        (["apply", odd / "sdxl", once], out, 1, f"not for {odd / 'sdxl'} (UNet "),
        (["apply", odd / "other", patches["folder"], "--revert"], out, 1, f"The patch is for what it made of {sd1}"),
        (["apply", erased, once], out, 1, f"{erased} has this patch already"),
        (["apply", erased, once, "--revert"], out, 1, "it was made without --reversible"),
        (["apply", sd1, patches["folder"], "--revert"], out, 1, "is the base already: there is nothing to revert"),
        (["apply", sd1, file], out, 1, not_a_patch),
        (["apply", sd1, odd / "mask.safetensors"], out, 1, not_a_patch),
        (["apply", sd1, sd1 / "model_index.json"], out, 1, "model_index.json"),
        (["apply", sd1, sd1], out, 2, "was not found: give a file that salun-sd erase --format patch wrote"),
        (["apply", sd1, odd / "nowhere.safetensors"], out, 2, "nowhere.safetensors was not found"),
        # forms
        (["apply", sd1, once, "--format", "single-file"], out, 2, "has to end in .safetensors for --format"),
        (["apply", sd1, once], saved, 2, "looks like a file, and a diffusers checkpoint is a folder: see --format"),
        (["apply", sd1, once, "--format", "patch"], saved, 2, "patch"),
        (erase("--format", "single-file"), out, 2, "has to end in .safetensors for --format single-file"),
        (erase("--format", "patch"), out, 2, "has to end in .safetensors for --format patch"),
        (erase(), saved, 2, "looks like a file, and a diffusers checkpoint is a folder: see --format"),
        (erase("--reversible"), out, 2, "--reversible is for --format patch"),
        (erase("--reversible", "--format", "single-file"), saved, 2, "--reversible is for --format patch"),
    ]:  # fmt: skip
        assert said in (found := fails([*argv, "--out", to], code, capsys)), f"{argv}: {found}"
        assert list(tmp_path.iterdir()) == [], argv


def test_what_is_there_already_is_not_written_over(here, patches, capsys):
    before = files_of(here)
    for argv, out in (
        (["apply", here / "sd1", patches["folder"]], here / "sd1"),
        (["apply", here / "sd1", patches["folder"], "--format", "single-file"], patches["folder"]),
        (["erase", here / "sd1", *training(here), "--format", "single-file"], patches["folder"]),
        (["erase", here / "sd1", *training(here), "--format", "patch"], here / "sd1.safetensors"),
    ):
        assert "choose another --out, or remove it" in fails([*argv, "--out", out], 2, capsys)
    assert files_of(here) == before


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


@pytest.mark.parametrize("kind", ["mask", "new"])
def test_a_patch_whose_bytes_were_damaged_is_named(here, patches, tmp_path, capsys, kind):
    file = tmp_path / "patch.safetensors"
    data = bytearray(patches["folder"].read_bytes())
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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
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
