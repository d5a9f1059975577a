"""Does it matter whether the UNet is held in bfloat16 or float32? Each class of the pocket checkpoint, several seeds.

    python benchmarks/pocket_dtypes.py --out /tmp/dtypes

Runs the commands that a person would type, one process a core, and writes benchmarks/pocket_dtypes.md. Run again to go
on where it stopped. A seed changes noise, timesteps and the order of images, in the mask and in the training; images
and prompts are the same for all.
"""

import json
import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import torch
import typer
from kept_rows import machine

from salun_sd.cli import app as cli
from salun_sd.cli.demo import POCKET_TRAINING, audit_prompts, photo_of
from salun_sd.draw import prompts

DTYPES = ("float32", "bfloat16")


def erased(out: Path, dtype: str, concept: str, anchor: str, seed: int, density: float) -> dict:
    """The audit's metrics of one erasure."""
    here = out / f"{concept.replace(' ', '-')}-{dtype}-{seed}"
    here.mkdir(parents=True, exist_ok=True)
    (here / "prompts.csv").write_text(prompts.as_csv(audit_prompts(prompts.read("pocket"), concept)))
    cli.run(["erase", "pocket", "--concept", photo_of(concept), "--anchor", photo_of(anchor), "--samples",
             "200", "--density", f"{density:g}", "--dtype", dtype, "--seed", str(seed), *POCKET_TRAINING,
             "--out", str(here / "erased")])  # fmt: skip
    cli.run(["evaluate", str(here / "erased"), "--prompts", str(here / "prompts.csv"), "--out", str(here / "audit")])
    return json.loads((here / "audit" / "report.json").read_text())["metrics"]


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and audits.")],
    density: Annotated[float, typer.Option(help="Share of weights to keep.")] = 0.5,
    seeds: Annotated[int, typer.Option(min=2, help="How many, from 0 on.")] = 3,
    jobs: Annotated[int | None, typer.Option(help="Processes, of one thread each. Default: one a core.")] = None,
) -> None:
    classes = list(dict.fromkeys(p.label for p in prompts.read("pocket")))
    with ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        begun = {pair: {d: [pool.submit(erased, out, d, *pair, seed, density) for seed in range(seeds)] for d in DTYPES}
                 for pair in pairwise([*classes, classes[0]])}  # fmt: skip
        found: dict[str, dict[str, list[dict]]] = {}
        for pair, of_dtype in begun.items():
            found[" → ".join(pair)] = {d: [each.result() for each in runs] for d, runs in of_dtype.items()}
            write(found, density, seeds)


def write(found: dict[str, dict[str, list[dict]]], density: float, seeds: int) -> None:
    """The table of the classes so far: for each dtype, the metrics of one seed after another."""
    of = {metric: next(iter(found.values()))[DTYPES[0]][0][metric]["of"] for metric in ("ua", "ra")}
    counts = {metric: {name: [[m[metric]["n"] for m in runs[d]] for d in DTYPES] for name, runs in found.items()}
              for metric in of}  # fmt: skip
    table = [f"| {name} | " + " | ".join(", ".join(map(str, c)) for metric in of for c in counts[metric][name]) + " |"
             for name in found]  # fmt: skip
    said = []
    for metric, rows in counts.items():
        d = [b - a for plain, compact in rows.values() for a, b in zip(plain, compact, strict=True)]
        said.append(f"- {metric.upper()}: {mean(d):+.2f} on average of {len(d)} pairs, standard error "
                    f"{stdev(d) / len(d) ** 0.5:.2f}; from {min(d):+d} to {max(d):+d}.")  # fmt: skip
    noise = mean(stdev(plain) ** 2 for plain, _ in counts["ra"].values()) ** 0.5
    Path(__file__).with_suffix(".md").write_text(
        f"""# The pocket checkpoint's classes, erased in float32 and in bfloat16

`python benchmarks/{Path(__file__).name} {shlex.join(sys.argv[1:])}`
{date.today()}, {machine()}, PyTorch {torch.__version__}; `erase` with
`--samples 200 --density {density:g} {shlex.join(POCKET_TRAINING)}`.

Images of {of["ua"]} not classified as the concept (UA), and of {of["ra"]} of the other classes classified as asked
(RA), for seeds {", ".join(map(str, range(seeds)))}. The mask, too, is computed in the dtype named.

| concept → anchor | UA, float32 | UA, bfloat16 | RA, float32 | RA, bfloat16 |
| --- | --- | --- | --- | --- |
{chr(10).join(table)}

bfloat16 less float32, in images, on the same class and seed:

{chr(10).join(said)}

RA in float32 differs between seeds of one class by a standard deviation of {noise:.2f} images.
"""
    )


if __name__ == "__main__":
    typer.run(main)
