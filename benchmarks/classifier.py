"""Forgetting in image classifiers on Fashion-MNIST: nine methods beside Retrain, densities, the cost of a mask.

    python benchmarks/classifier.py --out /tmp/classifier
    python benchmarks/classifier.py --out /tmp/classifier --sweep --forget 0.1
    python benchmarks/classifier.py --out /tmp/classifier --mask --width 64

Runs the command that a person would type, once for each --forget, and writes benchmarks/classifier.md from all reports
in DIR. Run again to go on where it stopped; several may run at once, on one DIR, to share the work. --sweep is SalUn
and random masks at several densities; it takes over what the plain run of a --forget trained. --mask measures a mask
beside the authors' recipe, each in a process of its own, on random images.
"""

import gzip
import json
import platform
import shlex
import shutil
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from common import now
from kept_rows import machine
from reference import threshold_by_argsort

from salun_sd.classifier.architectures import build
from salun_sd.classifier.report import COLUMNS, cells, shown
from salun_sd.cli import app as cli
from salun_sd.core.mask import cut
from salun_sd.core.saliency import GradientSum
from salun_sd.runtime import memory
from salun_sd.runtime.device import default_device
from salun_sd.runtime.files import write_atomic

HERE = Path(__file__).parent
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
DENSITIES = [0.1, 0.3, 0.5, 0.7, 0.9]  # at 1, salun and random are rl
HEAD = ["UA %", "RA %", "TA %", "MIA %", "average gap", "seconds"]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the data, the runs and the numbers of the mask.")],
    forget: Annotated[list[str] | None, typer.Option(help="Default: 0.1, 0.5 and class:6 (shirts).")] = None,
    images: Annotated[int, typer.Option(help="Training images.")] = 20_000,
    width: Annotated[int, typer.Option(help="Channels in the first stage.")] = 16,
    epochs: Annotated[int, typer.Option(help="Epochs of the original and of Retrain.")] = 30,
    batch_size: Annotated[int, typer.Option(help="As in the command.")] = 256,
    augment: Annotated[str, typer.Option(help="As in the command.")] = "crop-flip",
    seeds: Annotated[int, typer.Option(help="Forget sets.")] = 3,
    tune: Annotated[str, typer.Option(help="As in the command.")] = "unpublished",
    sweep: Annotated[bool, typer.Option("--sweep", help="SalUn and random masks at several densities.")] = False,
    mask: Annotated[bool, typer.Option("--mask", help="Measure the cost of a mask, and nothing else.")] = False,
    batches: Annotated[int, typer.Option(help="Batches of 256 images, for --mask.")] = 4,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if mask:
        costs = {recipe: _alone(recipe, width, batches) for recipe in ("reference", "salun-sd")}
        (out / f"mask-{width}.json").write_text(json.dumps(costs))
    else:
        _write_images(out / "data", images)
        for what in forget or ["0.1", "0.5", "class:6"]:
            name = f"{what.replace(':', '-')}-{tune}{'-sweep' if sweep else ''}"
            line = ["classifier", "--data", str(out / "data"), "--forget", what, "--width", str(width), "--epochs",
                    str(epochs), "--batch-size", str(batch_size), "--augment", augment, "--seeds", str(seeds),
                    "--tune", tune, "--out", str(out / name)]  # fmt: skip
            if sweep:
                if (plain := out / name.removesuffix("-sweep")).exists() and not (out / name).exists():
                    shutil.copytree(plain, out / name)  # what it trained serves here, too
                line += [word for method in ("retrain", "rl", "salun", "random") for word in ("--method", method)]
                line += [word for density in DENSITIES for word in ("--density", str(density))]
            (out / f"{name}.txt").write_text(shlex.join(["salun-sd", *line]).replace(str(out), "DIR"))
            cli.run(line)
            write(out)
    write(out)


def _write_images(folder: Path, count: int) -> None:
    """The first images of Fashion-MNIST, as idx files; all test images."""
    folder.mkdir(exist_ok=True)
    for kind, before, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
        content = gzip.decompress((FASHION / f"train-{kind}-ubyte.gz").read_bytes())
        head = content[:4] + np.array([count], ">u4").tobytes() + content[8:before]
        write_atomic(folder / f"train-{kind}-ubyte", head + content[before : before + count * size])
        write_atomic(folder / f"t10k-{kind}-ubyte.gz", (FASHION / f"t10k-{kind}-ubyte.gz").read_bytes())


def _alone(recipe: str, width: int, batches: int) -> dict:
    """The cost of a mask, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(cost, recipe, width, batches).result()


def cost(recipe: str, width: int, batches: int) -> dict:
    """Seconds of the gradients and of the threshold; bytes at the peak beside the model and the images, of the whole
    and of the threshold beside |g|. The authors' recipe (generate_mask.py): dense gradients of batch means, summed,
    the threshold by two argsorts of all weights."""
    memory.return_freed_memory()
    device = default_device()
    model = build("resnet18", width, 32, [str(i) for i in range(10)], 0, device)
    model.net.eval()
    pixels, labels = torch.rand(256, 3, 32, 32, device=device), torch.randint(10, (256,), device=device)
    F.cross_entropy(model(pixels[:2]), labels[:2]).backward()  # kernels are made
    model.net.zero_grad()
    before, start = _held(), now()
    if recipe == "reference":
        saliency = _gradients_of_reference(model, pixels, labels, batches)
    else:
        with GradientSum(model.net) as sums:
            for _ in range(batches):
                (-F.cross_entropy(model(pixels), labels, reduction="sum")).backward()
        saliency = sums.result(examples=256 * batches)
    middle, whole, of_g = now(), memory.peak(), _held()
    masks = threshold_by_argsort(list(saliency.values()), 0.5) if recipe == "reference" else cut(saliency, 0.5)
    end, peak = now(), memory.peak()
    return {
        "weights": sum(p.numel() for p in model.net.parameters()),
        "gradients": middle - start,
        "kept": len(masks),
        "threshold": end - middle,
        "extra": max(whole, peak) - before,
        "extra_of_threshold": peak - of_g,
    }


def _gradients_of_reference(model, pixels: torch.Tensor, labels: torch.Tensor, batches: int) -> dict:
    named = dict(model.net.named_parameters())
    sums: dict = dict.fromkeys(named, 0)
    for _ in range(batches):
        model.net.zero_grad()
        (-F.cross_entropy(model(pixels), labels)).backward()
        for name, p in named.items():
            sums[name] += p.grad
    return {name: total.abs_() for name, total in sums.items()}


def _held() -> int:
    """Forget the peak so far; gives the bytes held now."""
    memory.reset_peak()
    return memory.peak()


def write(out: Path) -> None:
    """benchmarks/classifier.md, from what is in DIR."""
    file, data = out / "data" / "train-images-idx3-ubyte", ""
    if file.exists():
        count = int.from_bytes(file.read_bytes()[4:8], "big")
        data = f"The first {count:,} images of Fashion-MNIST's training split, and all of its test."
    parts = [
        f"""# Forgetting in image classifiers

`python benchmarks/{Path(__file__).name} --out DIR`, with the options that are in the commands below; and with `--sweep`
and `--mask`. {data}
{date.today()}, {machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}.

Percent, mean ± standard deviation over the seeds; the average gap to Retrain in percentage points, with its 95 %
interval (Student's t). Each run's command is above its table.
"""
    ]
    for file in sorted(out.glob("*/report.json")):
        report = json.loads(file.read_text())
        line = (out / f"{file.parent.name}.txt").read_text() if (out / f"{file.parent.name}.txt").exists() else ""
        parts += [f"## {file.parent.name}\n", f"`{line}`\n", _table(report)]
    for file in sorted(out.glob("mask-*.json")):
        parts += [f"## A mask, {file.stem.removeprefix('mask-')} channels\n", _costs(json.loads(file.read_text()))]
    (HERE / "classifier.md").write_text("\n".join(parts))


def _table(report: dict) -> str:
    lines = [f"| method | {' | '.join(HEAD)} |", "| --- " * (1 + len(HEAD)) + "|"]
    for name, row in report["rows"].items():
        values = [shown(number, kind) if number else "" for number, kind in zip(cells(row), COLUMNS, strict=True)]
        if row["gap"] and row["gap"]["ci95"]:
            values[4] += " [{:.2f}, {:.2f}]".format(*row["gap"]["ci95"])
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _costs(costs: dict) -> str:
    lines = ["| recipe | weights | s, gradients | s, threshold | extra MB, whole | extra MB, threshold |",
             "| --- " * 6 + "|"]  # fmt: skip
    for recipe, own in costs.items():
        lines.append(f"| {recipe} | {own['weights']:,} | {own['gradients']:.3g} | {own['threshold']:.3g} | "
                     f"{own['extra'] / 1e6:.1f} | {own['extra_of_threshold'] / 1e6:.1f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
