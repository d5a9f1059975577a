"""The true architectures with random weights in fp16, in and out in every form, each command in a process of its own.

`pytest -m slow -s tests/test_fullsize.py` shows what each took. SDXL runs only where SALUN_SD_SDXL is set.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.find import find
from salun_sd.core import mask
from salun_sd.edit import maskfile, patch
from salun_sd.edit.deliver import size_on_disk

UNET_WEIGHTS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
CONCEPT, ANCHOR = "a photo of a cat", "a photo of a dog"

# ru_maxrss would count what the parent held when it forked
PEAK = "\nprint('VmHWM', next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
COMMAND = "import sys; from salun_sd.cli import app as cli; cli.run(sys.argv[1:])"
WRITE = """import sys, torch
from helpers import models
folder, family, prediction = sys.argv[1:]
models.write_pipeline(models.Path(folder), family, full=True, dtype=torch.float16, prediction=prediction)"""
WRITE_FILE = "import sys; from helpers import models; models.write_single_file(*map(models.Path, sys.argv[1:]))"
OPEN = """import sys, torch, diffusers
from salun_sd.checkpoint import find
path, config = sys.argv[1:]
ours = find.find(path, config=config or None)
kind, options = getattr(diffusers, ours.family.pipeline), {"torch_dtype": torch.float16, "local_files_only": True}
if config:
    loaded = kind.from_single_file(path, config=config, **options).unet.state_dict()
else:
    loaded = diffusers.DiffusionPipeline.from_pretrained(path, **options).unet.state_dict()
assert loaded.keys() == ours.unet.keys(), loaded.keys() ^ ours.unet.keys()
for name, t in ours.unet.items():
    assert loaded[name].dtype == torch.float16 and torch.equal(loaded[name], t.read()), name"""


@pytest.fixture
def here(tmp_path):
    """A folder that is emptied at once: pytest would keep the last three."""
    (tmp_path / "images").mkdir()
    for i in range(2):
        noise = np.random.RandomState(i).randint(0, 256, (80, 72, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def run(here):
    """Run Python code in a process of its own; its most resident memory in bytes. Prints a row for each."""
    env = os.environ | {"SALUN_SD_CACHE": str(here / "cache"), "HF_HUB_OFFLINE": "1",
                        "PYTHONPATH": str(Path(__file__).parent)}  # fmt: skip
    print(f"\n{'':<32} {'seconds':>8} {'peak GiB':>9}")

    def run(label, code, *argv):
        started = time.monotonic()
        command = [sys.executable, "-c", code + PEAK, *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, f"{label}: {done.returncode}\n{done.stderr[-3000:]}"
        peak = int(done.stdout.split()[-1]) * 1024
        print(f"{label:<32} {time.monotonic() - started:8.1f} {peak / 2**30:9.2f}", flush=True)
        return peak

    return run


def raw(t: tensors.Lazy) -> torch.Tensor:
    """The bits of 16-bit values: what equals what, be it a NaN or a signed zero."""
    return t.read().view(torch.int16)


def moved(base, other, mask_file=None) -> int:
    """Compare every tensor of every part; how many weights differ, all of them in the UNet and inside the mask."""
    bits = tensors.read(mask_file)[0] if mask_file else {}
    count = 0
    assert other.parts.keys() == base.parts.keys()
    for part, of_base in base.parts.items():
        of_other = other.parts[part]
        assert of_other.keys() == of_base.keys()
        for name, t in of_base.items():
            assert (of_other[name].dtype, of_other[name].shape) == (torch.float16, t.shape), f"{part} {name}"
            differs = raw(t) != raw(of_other[name])
            if part == "unet" and mask_file:
                count += int(differs.sum())
                differs &= ~mask.unpacked_bits(bits[name].read(), t.shape)
            assert not differs.any(), f"{part} {name}"
    return count


NO_SDXL = pytest.mark.skipif("SALUN_SD_SDXL" not in os.environ, reason="it takes 24 GB of memory")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "prediction"),
    [("sd1", "epsilon"), ("sd2", "v_prediction"), pytest.param("sdxl", "epsilon", marks=NO_SDXL)],
)
def test_every_form_of_the_true_architecture(here, run, family, prediction):
    folder, file, pickled = here / "base", here / "base.safetensors", here / "base.ckpt"
    mask_file, images = here / "mask.safetensors", here / "images"
    run("write the folder", WRITE, folder, family, prediction)
    bases = {"folder": [folder], "file": [file, "--config", folder]}
    run("write the single file", WRITE_FILE, folder, file)
    if family == "sd1":
        bases["ckpt"] = [pickled, "--config", folder]
        run("write the .ckpt", WRITE_FILE, folder, pickled)
    base = find(str(folder))
    assert base.prediction_type == prediction and base.family.key == family

    train = ["--forget", images, "--resolution", 64, "--batch-size", 1, "--concept", CONCEPT]
    run("mask", COMMAND, "mask", folder, *train, "--density", 0.1, "--guidance", 0, "--out", mask_file)
    kept, of = mask.kept(maskfile.unpack(mask_file.read_bytes(), "").bits)
    assert (kept, of) == (round(0.1 * UNET_WEIGHTS[family]), UNET_WEIGHTS[family])

    train += ["--anchor", ANCHOR, "--retain", images, "--steps", 2, "--lr", 1e-4, "--mask", mask_file]

    def erase(name, form, *options):
        out = here / f"{form}-of-{name}.safetensors"
        argv = ["erase", *bases[name], *train, "--format", form, *options, "--out", out]
        run(f"erase {name} -> {form}", COMMAND, *argv)
        return out

    change = erase("folder", "patch", "--reversible")
    record = patch.read(change).record
    erased = record["erased"]["fingerprint"]
    assert erased != record["base"]["fingerprint"] == base.fingerprint
    assert record["changed"]["outside"] == 0 < record["changed"]["inside"] <= kept

    def check(out, config):
        """An erased checkpoint on disk is the base, but for what the record says."""
        found = find(str(out), config=str(folder) if config else None)
        assert moved(base, found, mask_file) == record["changed"]["inside"]
        assert found.fingerprint == erased

    out = erase("file", "single-file")
    check(out, folder)
    before, (after, header) = tensors.read(file)[0], tensors.read(out)
    assert json.loads(header["salun_sd"])["erased"]["fingerprint"] == erased
    assert list(after) == list(before)  # what diffusers has no name for as well
    others = [key for key in before if not key.startswith("model.diffusion_model.")]
    assert others and all(torch.equal(before[key].read(), after[key].read()) for key in others)
    out.unlink()
    if "ckpt" in bases:
        of_ckpt = patch.read(erase("ckpt", "patch")).record
        assert of_ckpt["erased"]["fingerprint"] == erased and of_ckpt["changed"] == record["changed"]

    for name, (model, *config) in bases.items():
        for form, out in (("single-file", here / "out.safetensors"), ("diffusers", here / "out")):
            argv = ["apply", model, change, *config, "--format", form, "--out", out]
            peak = run(f"apply {name} -> {form}", COMMAND, *argv)
            share = peak / size_on_disk(model)
            print(f"{'of the size of the ' + name:<32} {share:18.2f}")
            assert share < 1.2
            of_folder = folder if out.is_file() else ""
            check(out, of_folder)
            if name == "folder":
                run(f"open the {form} in diffusers", OPEN, out, of_folder)
            if name == "folder" and form == "diffusers":
                reverted = here / "reverted"
                run("apply --revert", COMMAND, "apply", out, change, "--revert", "--out", reverted)
                again = find(str(reverted))
                assert moved(base, again) == 0 and again.fingerprint == base.fingerprint
                shutil.rmtree(reverted)
            out.unlink() if out.is_file() else shutil.rmtree(out)
        if model != folder:  # which is the config of the others
            model.unlink()
