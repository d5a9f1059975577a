"""A GPU gives what the CPU gives, as far as rounding allows.

Skipped where there is no GPU. `python benchmarks/gpu.py` runs these tests, and measures; with --rehearse it runs them
where there is none: the CPU then stands in for the GPU, so that only the device is new on the day.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import models
from helpers.by_class import write_ddpm
from helpers.commands import ANCHOR, CONCEPT, ERASE
from helpers.pictures import TINY, write_idx
from PIL import Image
from safetensors.torch import load_file

from salun_sd.attacks.conditioning import Conditioning
from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.edit import maskfile

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS and "SALUN_SD_REHEARSE" not in os.environ, reason="needs a GPU"),
]


@pytest.fixture
def on(monkeypatch):
    """Run a command on the CPU, or on the GPU, without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def on(device: str, *argv) -> None:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        if device == "cpu":
            monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
        cli.run([str(a) for a in argv])

    return on


def test_the_mask_is_the_cpus_but_for_weights_at_the_threshold(on, tmp_path):
    """The GPU's mask of density 0.5 lies between the CPU's of 0.499 and 0.501."""
    line = ["mask", "pocket", "--concept", CONCEPT, "--samples", "8", "--batch-size", "4", "--dtype", "float32"]
    on("cpu", *line, "--density", "0.499", "--density", "0.501", "--out", tmp_path / "cpu.safetensors")
    on("gpu", *line, "--density", "0.5", "--out", tmp_path / "gpu.safetensors")
    fewer, more, own = (
        maskfile.read(tmp_path / f"{name}.safetensors").bits for name in ("cpu-0.499", "cpu-0.501", "gpu")
    )
    for name in own:
        assert not (fewer[name] & ~own[name]).any() and not (own[name] & ~more[name]).any(), name


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 0.02), ("bfloat16", 0.5)])
def test_three_steps_move_the_weights_as_on_the_cpu(on, tmp_path, dtype, apart):
    """And none outside the mask. apart: the mean distance of the two, as a share of what moved."""
    base = find("pocket").unet
    for device in ("cpu", "gpu"):
        on(device, *ERASE, "--mask", "random:0.5", "--dtype", dtype, "--out", tmp_path / device)
    cpu, gpu = (find(str(tmp_path / device)).unet for device in ("cpu", "gpu"))
    bits = maskfile.read(tmp_path / "gpu.run" / "mask.safetensors").bits
    far = moved = 0.0
    for name, lazy in base.items():
        before, a, b = (t.float() for t in (lazy.read(), cpu[name].read(), gpu[name].read()))
        assert torch.equal(b[~bits[name]], before[~bits[name]]), name
        far, moved = far + float((a - b).abs().sum()), moved + float((a - before).abs().sum())
    assert 0 < moved and far < apart * moved


def drawn(folder) -> list[torch.Tensor]:
    files = sorted((folder / "images").glob("*.png"))
    return [
        torch.frombuffer(bytearray(Image.open(f).convert("RGB").tobytes()), dtype=torch.uint8).float() for f in files
    ]


@pytest.mark.parametrize(
    ("guidance", "dtype", "levels"), [(1, "float32", 2), (3, "float32", 2), (3, "bfloat16", 8), (3, "float16", 8)]
)
def test_images_are_those_of_the_cpu_in_float32(on, tmp_path, guidance, dtype, levels):
    """On average to so many levels of 255."""
    (tmp_path / "p.txt").write_text(f"{CONCEPT}\n{ANCHOR}\n")
    line = ["evaluate", "pocket", "--prompts", tmp_path / "p.txt", "--denoising-steps", "5", "--guidance", guidance,
            "--detector", "none", "--against", "pocket"]  # fmt: skip
    for device, in_dtype in (("cpu", "float32"), ("gpu", dtype)):
        on(device, *line, "--dtype", in_dtype, "--out", tmp_path / device)
    pairs = zip(drawn(tmp_path / "cpu"), drawn(tmp_path / "gpu"), strict=True)
    apart = [float((a - b).abs().mean()) for a, b in pairs]
    assert len(apart) == 2 and max(apart) < levels


def test_a_class_is_erased_and_drawn_as_on_the_cpu(on, tmp_path):
    """After the probe and a strip of samples, too. The weights are to 2 % of what moved, the images to 2 of 255."""
    model = write_ddpm(tmp_path / "base")
    line = ["erase", model, "--concept", "bag", "--anchor", "coat", "--samples", "4", "--steps", "2", "--batch-size",
            "2", "--lr", "1e-3", "--probe-every", "1", "--sample-every", "2", "--dtype", "float32"]  # fmt: skip
    for device in ("gpu", "cpu"):  # the CPU takes the training images that the GPU drew
        on(device, *line, "--mask", "random:0.5", "--out", tmp_path / device)
    for device in ("gpu", "cpu"):
        on(device, "evaluate", tmp_path / "cpu", "--prompts", "classes", "--limit", "2", "--detector", "none",
           "--dtype", "float32", "--out", tmp_path / f"{device}.audit")  # fmt: skip
    base, cpu, gpu = (find(str(tmp_path / name)).unet for name in ("base", "cpu", "gpu"))
    far, moved = (
        sum(float((a[n].read() - b[n].read()).abs().sum()) for n in base) for a, b in ((gpu, cpu), (cpu, base))
    )
    assert 0 < moved and far < 0.02 * moved
    pairs = zip(drawn(tmp_path / "cpu.audit"), drawn(tmp_path / "gpu.audit"), strict=True)
    assert max(float((a - b).abs().mean()) for a, b in pairs) < 2


def test_an_attack_finds_what_it_finds_on_the_cpu(on, tmp_path, monkeypatch):
    """Each number moves by 0.04 at most, and the two are 0.002 apart on average. The same classifier judges them."""
    monkeypatch.setattr(Conditioning, "quick", {"steps": 2})
    (tmp_path / "p.csv").write_text("prompt,class\na photo of a sneaker,sneaker\na photo of a bag,bag\n")
    line = ["attack", "pocket", "--concept", CONCEPT, "--concept-class", "sneaker", "--prompts", tmp_path / "p.csv",
            "--base", "pocket", "--with", "conditioning", "--denoising-steps", "2", "--detector", "none",
            "--dtype", "float32"]  # fmt: skip
    for device in ("gpu", "cpu"):
        on(device, *line, "--out", tmp_path / device)
    folder = "attacks/conditioning/{}/found.safetensors".format
    for side in ("model", "control"):
        cpu, gpu = (load_file(tmp_path / device / folder(side)) for device in ("cpu", "gpu"))
        assert cpu.keys() == gpu.keys() and all(float((cpu[k] - gpu[k]).abs().mean()) < 0.002 for k in cpu)


def test_a_classifier_forgets_as_on_the_cpu(on, tmp_path):
    """By methods that train, mask and solve; the probabilities of the true classes are 0.02 apart on average. The GPU
    trains the original."""
    data = write_idx(tmp_path / "idx")
    line = ["classifier", "--data", data, "--forget", "0.2", *TINY, "--method", "retrain", "--method", "salun",
            "--method", "iu", "--method", "be", "--setting", "iu.samples=3"]  # fmt: skip
    for device in ("gpu", "cpu"):
        on(device, *line, "--out", tmp_path / device)
    for file in sorted((tmp_path / "cpu" / "run").glob("*.safetensors")):
        cpu, gpu = load_file(file), load_file(tmp_path / "gpu" / "run" / file.name)
        for name in (name for name in cpu if name.endswith("/confidence")):
            assert float((cpu[name] - gpu[name]).abs().mean()) < 0.02, (file.name, name)


@pytest.mark.skipif(GPUS < 2 and "SALUN_SD_REHEARSE" not in os.environ, reason="needs two GPUs")
def test_two_processes_give_what_one_gives(tmp_path):
    """Over NCCL on two GPUs."""
    line = [*ERASE, "--mask", "random:0.5", "--dtype", "float32"]
    cli.run([*line, "--out", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "salun_sd"]
    subprocess.run([*launch, *line, "--out", str(tmp_path / "two")], check=True, timeout=300)
    one, two, base = (find(name).unet for name in (str(tmp_path / "one"), str(tmp_path / "two"), "pocket"))
    far, moved = (sum(float((a[n].read() - b[n].read()).float().abs().sum()) for n in base)
                  for a, b in ((one, two), (one, base)))  # fmt: skip
    assert 0 < moved and far < 0.02 * moved


def test_a_run_takes_the_memory_that_was_planned(tmp_path):
    """SD 1.x at 512 px with random weights, within 15 %; in a rehearsal a tiny model, whatever it takes."""
    models.write_pipeline(tmp_path / "base", "sd1", full=bool(GPUS), dtype=torch.float16)
    (tmp_path / "images").mkdir()
    Image.effect_noise((512, 512), 50).convert("RGB").save(tmp_path / "images" / "1.png")
    cli.run([str(a) for a in ["erase", tmp_path / "base", "--concept", CONCEPT, "--anchor", ANCHOR, "--forget",
             tmp_path / "images", "--retain", tmp_path / "images", "--density", "0.1", "--steps", "2", "--batch-size",
             "1", "--probe-every", "0", "--format", "patch", "--out", tmp_path / "patch.safetensors"]])  # fmt: skip
    run = json.loads((tmp_path / "patch.safetensors.run" / "run.json").read_text())
    for step in ("mask", "erase"):
        planned = run["planned_bytes"].get(step, 1)
        assert run["peak_bytes"][step] == pytest.approx(planned, rel=0.15 if GPUS else float("inf")), step
