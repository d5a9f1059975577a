"""Checkpoints of every family in and out, in every form that people have and other programs load."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import models
from helpers.forms import (
    CAT,
    COMMITS,
    UNET,
    all_same,
    apply,
    erase,
    files_of,
    raw_tensors,
    same,
    write_forms,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from salun_sd.checkpoint import provenance, tensors
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.core import mask
from salun_sd.edit import maskfile, patch
from salun_sd.edit.supports import support_of


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return write_forms(tmp_path_factory.mktemp("forms"))


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
        pytest.param(("sd1", torch.float32), id="sd1-fp32", marks=pytest.mark.slow),
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


def test_what_helps_to_bring_the_concept_back_is_not_in_the_folder_and_the_card_says_why(made):
    assert not {"mask.safetensors", "losses.jsonl"} & {file.name for file in made.folder.rglob("*")}
    for folder in (made.folder, provenance.run_folder(made.file), provenance.run_folder(made.patch)):
        assert "2603.06640" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_command_gives_the_same_weights_in_each_form_and_moves_them_inside_the_mask_alone(made):
    before, after = models.load_parts(made.base), models.load_parts(made.folder)
    bits = maskfile.read(provenance.run_folder(made.folder) / "mask.safetensors").bits
    unet, moved = before.pop("unet"), 0
    assert unet.keys() == after["unet"].keys() == bits.keys()
    for name, t in unet.items():
        new = after["unet"][name]
        assert new.dtype == made.dtype and same(new[~bits[name]], t[~bits[name]]), name
        moved += int((new != t).sum())
    assert mask.kept(bits)[0] / 2 < moved == json.loads((made.folder / "salun.json").read_text())["changed"]["inside"]
    assert all(all_same(t, after[part]) for part, t in before.items())
    base, folder = files_of(made.base), files_of(made.folder)
    assert folder.keys() == base.keys() | {"README.md", "salun.json"}
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
    record, of_folder, of_file = patch.read(made.patch).record, provenance.read(folder), provenance.read(file)
    assert of_folder["settings"] == record["settings"] | {"format": "diffusers"}
    assert of_file["settings"] == record["settings"] | {"format": "single-file"}
    alike = record.keys() - {"settings"}
    assert [key for key in alike if not of_folder[key] == of_file[key] == record[key]] == []
    applied, of_erase = (ModelCard.load(place / "README.md") for place in (folder, made.folder))
    assert applied.data.to_dict() == of_erase.data.to_dict() and applied.data.library_name == "diffusers"
    about = [card.text.partition("| concept |")[0] for card in (applied, of_erase)]
    assert about[0] == about[1] and "BASE PATCH" not in about[0]

    file = apply(made.folder, made.patch, tmp_path / "base.safetensors", "--revert")
    folder = apply(made.file, made.patch, tmp_path / "base", "--revert", "--config", made.base)
    assert all(all_same(t, base[part]) for part, t in models.load_parts(folder).items())
    assert all_same(load_file(file), models.single_file_tensors(made.base))
    assert provenance.read(folder) is provenance.read(file) is None and not (folder / "README.md").exists()


@pytest.fixture(scope="module")
def bases(here, hub) -> dict[str, dict[str, str]]:
    """The same model in each form that a person may have it in, as `find` is asked for it."""
    models.write_pipeline(here / "shards", "sd1", dtype=torch.float16, shards=True, variant="fp16")
    models.write_single_file(here / "sd1", here / "sd1.ckpt")
    config = {"config": str(here / "sd1")}
    return {
        "folder": {"model": str(here / "sd1")},
        "shards": {"model": str(here / "shards"), "variant": "fp16"},
        "file": {"model": str(here / "sd1.safetensors"), **config},
        "ckpt": {"model": str(here / "sd1.ckpt"), **config},
        "hub": {"model": "someone/tiny", "revision": "old"},
    }


@pytest.fixture(scope="module")
def patches(here, bases):
    """The same erasure of two forms, as patches; the file's can be reverted."""
    for name, also in (("file", ["--reversible"]), ("hub", [])):
        asked = [word for key, value in bases[name].items() for word in (f"--{key}", value)]
        erase(here, *asked[1:], "--format", "patch", *also, "--out", here / f"{name}-patch.safetensors", mask=None)
    return {name: here / f"{name}-patch.safetensors" for name in ("file", "hub")}


def test_each_form_is_the_same_model(bases):
    forms = {name: find(**asked) for name, asked in bases.items()}
    assert len({(form.fingerprint, form.identity) for form in forms.values()}) == 1
    assert {name: form.revision for name, form in forms.items()} == dict.fromkeys(forms) | {"hub": COMMITS["old"]}
    loaded = [load_pipeline(form) for form in forms.values()]
    for part in ("unet", "vae", "text_encoder"):
        first, *others = [getattr(pipeline, part).state_dict() for pipeline in loaded]
        assert all(all_same(first, other) for other in others), part


def test_the_erased_weights_do_not_depend_on_the_form_of_the_base(patches):
    records = [patch.read(file).record for file in patches.values()]
    for which in ("base", "erased"):
        assert len({record[which]["fingerprint"] for record in records}) == 1
    assert [record["base"]["revision"] for record in records] == [None, COMMITS["old"]]


def test_a_random_mask_is_the_same_for_each_form_of_the_base(here):
    folder, file = find(str(here / "sd1")), find(str(here / "sd1.safetensors"), config=str(here / "sd1"))
    of_folder, of_file = (support_of("random:0.3").mask(base, [], 0) for base in (folder, file))
    other = support_of("random:0.3").mask(folder, [], 1)
    same, differ = (all_same(of_folder.bits, mask.bits) for mask in (of_file, other))
    assert same and of_folder.settings == of_file.settings and not differ


def test_the_card_names_the_hubs_base_and_inherits_its_licence(patches):
    card = ModelCard.load(provenance.run_folder(patches["hub"]) / "README.md").data
    assert (card.base_model, card.license, card.license_name) == ("someone/tiny", "creativeml-openrail-m", None)
    assert card.library_name is None and "concept-erasure" in card.tags  # a patch, which no library loads
    card = ModelCard.load(provenance.run_folder(patches["file"]) / "README.md").data
    assert (card.base_model, card.license) == (None, None)  # a file here is no id there


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
    assert CAT in header["modelspec.title"] and "modelspec.hash_sha256" not in header  # that was of other bytes
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
        found[f"mask/{name}"] = tensors.in_memory(mask.packed_bits(bits))
        found[f"new/{name}"] = tensors.in_memory(t.read()[bits] + 1)
    record, change = patch.read(patches["file"]).record, tmp_path / "patch.safetensors"
    record["base"]["fingerprint"] = base.fingerprint
    record["erased"]["fingerprint"] = tensors.fingerprint(patch.merged(base.unet, patch.Patch(found, {})))
    patch.write(change, patch.Patch(found, record))
    runs = [
        [here / "sd1.safetensors", patches["file"], "--config", here / "sd1", "--format", "single-file"],
        [large, change, "--format", "single-file"],
        [file, change, "--config", large],
    ]
    argv = [["apply", *map(str, run), "--out", str(tmp_path / f"{i}{'.safetensors' if 'single-file' in run else ''}")]
            for i, run in enumerate(runs)]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", APPLY, json.dumps(argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = [int(line.split()[1]) / file.stat().st_size for line in done.stdout.splitlines() if line.startswith("held")]
    assert len(held) == 3 and max(held[1:]) < 0.5 and file.stat().st_size > 90e6, held


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
