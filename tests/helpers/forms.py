"""A model in the forms that people have it in, erasures of it, and comparisons to the last bit."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from helpers import models
from helpers.commands import python, until
from PIL import Image

from salun_sd.cli import app as cli

CAT, DOG = "a photo of a cat", "a photo of a dog"
UNET = "model.diffusion_model."  # in the names of a single file
COMMITS = {"main": "a" * 40, "old": "0123456789" * 4}  # as the hub names snapshots


def write_forms(folder: Path) -> Path:
    """Images to forget/ and to retain/, and an SD 1.x pipeline in float16 as the folder sd1 and as sd1.safetensors."""
    for n, name in enumerate(("forget", "retain")):
        (folder / name).mkdir()
        for i in range(3):
            noise = np.random.RandomState(10 * n + i).randint(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{i}.png")
    models.write_single_file(models.write_pipeline(folder / "sd1", "sd1", dtype=torch.float16),
                             folder / "sd1.safetensors")  # fmt: skip
    return folder


def write_hub(cache: Path, model: Path) -> None:
    """The hub's cache with a pipeline as the revision "old" of someone/tiny, and another one as "main"."""
    repo = cache / "models--someone--tiny"
    models.write_pipeline(repo / "snapshots" / COMMITS["main"], "sd1", dtype=torch.float16, seed=1)
    old = shutil.copytree(model, repo / "snapshots" / COMMITS["old"])
    (old / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [cats]\n---\n# Tiny\n")
    (repo / "refs").mkdir()
    for name, commit in COMMITS.items():
        (repo / "refs" / name).write_text(commit)


def training(here: Path, mask: str | None = "random:0.3") -> list[str]:
    """Options of an erasure with the images of `write_forms`; without a mask, one is computed."""
    return [
        "--concept", CAT, "--anchor", DOG, "--forget", str(here / "forget"), "--retain", str(here / "retain"),
        "--size", "16", "--steps", "2", "--batch-size", "2", "--lr", "1e-4", *(("--mask", mask) if mask else ()),
    ]  # fmt: skip


def erase(here: Path, model: Path | str, *options, mask: str | None = "random:0.3") -> None:
    cli.run(["erase", str(model), *training(here, mask), *map(str, options)])


def apply(model: Path | str, patch: Path, out: Path, *options) -> Path:
    """Into a folder, or into a file where the name has an ending."""
    form = "single-file" if out.suffix else "diffusers"
    cli.run(["apply", str(model), str(patch), "--format", form, "--out", str(out), *map(str, options)])
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the last bit."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def all_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same(t, b[name]) for name, t in a.items())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def raw_tensors(file: Path) -> tuple[dict[str, tuple], dict[str, str]]:
    """Name -> dtype, shape and bytes in a .safetensors file, and its metadata, read without a library."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    values = memoryview(data)[start:]
    return {name: (t["dtype"], t["shape"], values[slice(*t["data_offsets"])]) for name, t in header.items()}, metadata


def check_a_kill_changes_nothing(argv: Sequence[str], folder: Path, monkeypatch) -> None:
    """An `erase` that is killed after a step was saved, and begun again, ends with the bytes of one that was not."""
    argv, ends = [*argv, "--format", "patch", "--save-every", "1e-9", "--out", "p.safetensors"], []
    for name, is_killed in (("whole", False), ("killed", True)):
        (folder / name).mkdir()
        monkeypatch.chdir(folder / name)
        if is_killed:
            process, losses = python(["-m", "salun_sd", *argv]), Path("p.safetensors.run/losses.jsonl")
            until(lambda: losses.is_file() and losses.read_text().count("\n") > 1, process)  # noqa: B023
            process.kill()
            process.communicate()
            assert not Path("p.safetensors").exists()
        cli.run(argv)
        ends.append({name: content for name, content in files_of(Path()).items() if "run.json" not in name})
    assert ends[0] == ends[1]
