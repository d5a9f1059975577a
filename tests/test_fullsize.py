"""The true architectures with random weights in fp16, in and out in every form, each command in a process of its own.

`pytest -n 0 -m slow -s tests/test_fullsize.py` shows what each took. SDXL runs only where SALUN_SD_SDXL is set.
Each form is read once and written once or twice: that each form gives the same from each other one is tested on small
models. One output is compared with the base weight by weight, the others with it by their fingerprints.
"""

import json
import os
import shutil
import subprocess
import time

import diffusers
import numpy as np
import pytest
import torch
from helpers import by_class, models
from helpers.commands import python
from PIL import Image

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.find import find
from salun_sd.core import mask
from salun_sd.edit import maskfile, patch
from salun_sd.edit.deliver import size_on_disk

UNET_WEIGHTS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
CONCEPT, ANCHOR = "a photo of a cat", "a photo of a dog"

# ru_maxrss would count what the parent held when it forked
COMMAND = """import sys
from salun_sd.cli import app as cli
cli.run(sys.argv[1:])
print("VmHWM", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""


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
    """Run a command in a process of its own; its most resident memory in bytes. Prints a row for each."""
    env = os.environ | {"SALUN_SD_CACHE": str(here / "cache")}
    print(f"\n{'':<32} {'seconds':>8} {'peak GiB':>9}")

    def run(label, *argv):
        started = time.monotonic()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = python(["-c", COMMAND, *map(str, argv)], env=env, **pipes)
        out, err = process.communicate()
        assert process.returncode == 0, f"{label}: {process.returncode}\n{err[-3000:]}"
        peak = int(out.split()[-1]) * 1024
        print(f"{label:<32} {time.monotonic() - started:8.1f} {peak / 2**30:9.2f}", flush=True)
        return peak

    return run


def raw(t: tensors.Lazy) -> torch.Tensor:
    """The bits of 16-bit values: what equals what, be it a NaN or a signed zero."""
    return t.read().view(torch.int16)


def moved(base, other, change) -> int:
    """Compare every tensor of every part; how many weights differ, all of them in the denoiser and inside the mask."""
    bits = {key.removeprefix("mask/"): t for key, t in change.tensors.items() if key.startswith("mask/")}
    count = 0
    assert other.parts.keys() == base.parts.keys()
    for part, of_base in base.parts.items():
        of_other = other.parts[part]
        assert of_other.keys() == of_base.keys()
        for name, t in of_base.items():
            assert (of_other[name].dtype, of_other[name].shape) == (torch.float16, t.shape), f"{part} {name}"
            differs = raw(t) != raw(of_other[name])
            if part == base.denoiser and name in bits:
                count += int(differs.sum())
                differs &= ~mask.unpacked_bits(bits[name].read(), t.shape)
            assert not differs.any(), f"{part} {name}"
    return count


def fingerprints(checkpoint) -> dict[str, str]:
    """Of each part, over names, dtypes, shapes and bytes."""
    return {part: tensors.fingerprint(of_part) for part, of_part in checkpoint.parts.items()}


def opens_in_diffusers(path, config) -> None:
    """diffusers' own loaders find every weight of the UNet, in the file's dtype, bit for bit."""
    ours = find(str(path), config=config and str(config))
    kind, options = getattr(diffusers, ours.family.pipeline), {"torch_dtype": torch.float16, "local_files_only": True}
    if config:
        loaded = kind.from_single_file(str(path), config=str(config), **options).unet.state_dict()
    else:
        loaded = diffusers.DiffusionPipeline.from_pretrained(path, **options).unet.state_dict()
    assert loaded.keys() == ours.unet.keys(), loaded.keys() ^ ours.unet.keys()
    for name, t in ours.unet.items():
        assert loaded[name].dtype == torch.float16 and torch.equal(loaded[name], t.read()), name


NO_SDXL = pytest.mark.skipif("SALUN_SD_SDXL" not in os.environ, reason="it takes 24 GB of memory")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "prediction"),
    [("sd1", "epsilon"), ("sd2", "v_prediction"), pytest.param("sdxl", "epsilon", marks=NO_SDXL)],
)
def test_every_form_of_the_true_architecture(here, run, family, prediction):
    folder, file, pickled = here / "base", here / "base.safetensors", here / "base.ckpt"
    started = time.monotonic()
    models.write_pipeline(folder, family, full=True, dtype=torch.float16, prediction=prediction)
    models.write_single_file(folder, file)
    bases = {"folder": [folder], "file": [file, "--config", folder]}
    if family == "sd1":
        bases["ckpt"] = [models.write_single_file(folder, pickled), "--config", folder]
    print(f"{'write the base':<32} {time.monotonic() - started:8.1f}")
    base = find(str(folder))
    assert base.prediction_type == prediction and base.family.key == family

    train = ["--forget", here / "images", "--size", 64, "--batch-size", 1, "--concept", CONCEPT]
    of_mask = ["--density", 0.1, "--saliency-guidance", 0]
    change, mask_file = here / "patch.safetensors", here / "mask.safetensors"
    if family == "sd1":  # the mask by itself, from another form than the erasure
        run("mask of the file", "mask", *bases["file"], *train, *of_mask, "--out", mask_file)
        of_mask = ["--mask", mask_file]
    train += [*of_mask, "--anchor", ANCHOR, "--retain", here / "images", "--steps", 1, "--lr", 1e-4]
    form = "ckpt" if family == "sd1" else "file"
    delivered = ["--format", "patch", "--reversible", "--out", change]
    run(f"erase of the {form} -> patch", "erase", *bases[form], *train, *delivered)
    written = patch.read(change)
    record, kept = written.record, written.record["mask"]["kept"]
    assert (kept, record["mask"]["of"]) == (round(0.1 * UNET_WEIGHTS[family]), UNET_WEIGHTS[family])
    assert record["mask"]["base"] == record["base"]["fingerprint"] == base.fingerprint
    assert record["erased"]["fingerprint"] != base.fingerprint
    assert record["changed"]["outside"] == 0 < record["changed"]["inside"] <= kept
    if family == "sd1":
        packed = maskfile.read(mask_file).bits.packed
        salient = {f"mask/{name}": bits for name, bits in packed.items() if bits.any()}
        assert salient.keys() == {key for key in written.tensors if key.startswith("mask/")}
        assert all(torch.equal(bits, written.tensors[key].read()) for key, bits in salient.items())

    def apply(name, model, *options):
        out = here / (f"of-{name}.safetensors" if "single-file" in options else f"of-{name}")
        peak = run(f"apply to the {name} {' '.join(options)}", "apply", *model, change, *options, "--out", out)
        print(f"{'  of the size of the base':<32} {peak / size_on_disk(folder):18.2f}")
        assert peak < 0.6 * size_on_disk(folder)
        return out

    of_folder = apply("folder", bases["folder"], "--format", "single-file")
    erased = find(str(of_folder), config=str(folder))
    assert moved(base, erased, written) == record["changed"]["inside"]
    of_erased, of_base = fingerprints(erased), fingerprints(base)
    assert of_erased == of_base | {"unet": record["erased"]["fingerprint"]}
    opens_in_diffusers(of_folder, folder)

    of_file = apply("file", bases["file"])
    assert fingerprints(find(str(of_file))) == of_erased
    opens_in_diffusers(of_file, None)

    if family == "sd1":
        of_ckpt = apply("ckpt", bases["ckpt"], "--format", "single-file")
        assert fingerprints(find(str(of_ckpt), config=str(folder))) == of_erased
        before, (after, header) = tensors.read(pickled)[0], tensors.read(of_ckpt)
        assert json.loads(header["salun_sd"])["erased"]["fingerprint"] == of_erased["unet"]
        order = sorted(before, key=lambda key: -before[key].dtype.itemsize)
        assert list(after) == order  # what diffusers has no name for as well
        others = [key for key in before if not key.startswith("model.diffusion_model.")]
        assert others and all(torch.equal(before[key].read(), after[key].read()) for key in others)
        reverted = apply("erased folder", [of_file], "--revert")
        assert fingerprints(find(str(reverted))) == of_base


@pytest.mark.slow
def test_a_transformer_that_draws_classes(here, run):
    """DiT-XL/2 256, whose config has the class, and a key of that class, that it was published with."""
    started, labels = time.monotonic(), [f"thing {n}" for n in range(1000)]
    folder = by_class.write_dit(here / "base", labels, full=True, dtype=torch.float16)
    published = {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    by_class.change(folder / "transformer" / "config.json", **published)
    print(f"{'write the base':<32} {time.monotonic() - started:8.1f}")
    base = find(str(folder))
    weights = sum(t.shape.numel() for t in base.unet.values())
    assert (base.image_size, len(base.classes.labels), base.classes.null) == (256, 1000, 1000)

    mask_file, change, applied = here / "mask.safetensors", here / "patch.safetensors", here / "erased"
    (here / "images" / "1.png").unlink()
    train = ["--concept", "thing 7", "--forget", here / "images", "--size", 64, "--batch-size", 1]
    run("mask", "mask", folder, *train, "--density", 0.01, "--dtype", "bfloat16", "--out", mask_file)
    train += ["--anchor", 8, "--retain", here / "images", "--steps", 1, "--lr", 1e-3, "--dtype", "bfloat16"]
    run("erase -> patch", "erase", folder, *train, "--mask", mask_file, "--format", "patch", "--reversible",
        "--out", change)  # fmt: skip
    written = patch.read(change)
    assert (written.record["mask"]["kept"], written.record["mask"]["of"]) == (round(0.01 * weights), weights)
    peak = run("apply", "apply", folder, change, "--out", applied)
    assert peak < 0.6 * size_on_disk(folder)
    erased = find(str(applied))
    assert moved(base, erased, written) == written.record["changed"]["inside"] > 0
    assert fingerprints(erased) == fingerprints(base) | {"transformer": written.record["erased"]["fingerprint"]}
    opened = diffusers.DiTPipeline.from_pretrained(applied, torch_dtype=torch.float16, local_files_only=True)
    assert all(torch.equal(opened.transformer.state_dict()[name], t.read()) for name, t in erased.unet.items())
