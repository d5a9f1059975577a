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
from pocket_classes import cpu

from salun_sd import cli, demo, prompts

DTYPES = ("float32", "bfloat16")


def erased(out: Path, dtype: str, concept: str, anchor: str, seed: int, density: float) -> dict:
    """The audit's metrics of one erasure."""
    here = out / f"{concept.replace(' ', '-')}-{dtype}-{seed}"
    here.mkdir(parents=True, exist_ok=True)
    (here / "prompts.csv").write_text(prompts.write(demo.asked_for(prompts.read("pocket"), concept)))
    cli.run(["erase", "pocket", "--concept", demo.photo_of(concept), "--anchor", demo.photo_of(anchor), "--samples",
             "200", "--density", f"{density:g}", "--dtype", dtype, "--seed", str(seed), *demo.POCKET_TRAINING,
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
    pairs = list(pairwise([*classes, classes[0]]))
    with ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        begun = {(pair, dtype): [pool.submit(erased, out, dtype, *pair, seed, density) for seed in range(seeds)]
                 for pair in pairs for dtype in DTYPES}  # fmt: skip
        metrics = {run: [future.result() for future in futures] for run, futures in begun.items()}

    def counts(metric: str, pair: tuple[str, str], dtype: str) -> list[int]:
        """Images, of one seed after another."""
        return [found[metric]["n"] for found in metrics[pair, dtype]]

    table, said = [], []
    for pair in pairs:
        cells = [counts(metric, pair, dtype) for metric in ("ua", "ra") for dtype in DTYPES]
        table.append("| " + " | ".join([" → ".join(pair), *(", ".join(map(str, c)) for c in cells)]) + " |")
    for metric in ("ua", "ra"):
        plain, compact = ([n for pair in pairs for n in counts(metric, pair, dtype)] for dtype in DTYPES)
        d = [b - a for a, b in zip(plain, compact, strict=True)]
        error = stdev(d) / len(d) ** 0.5
        said.append(f"- {metric.upper()}: {mean(d):+.2f} on average of {len(d)} pairs, standard error {error:.2f}; "
                    f"from {min(d):+d} to {max(d):+d}.")  # fmt: skip
    noise = mean(stdev(counts("ra", pair, "float32")) ** 2 for pair in pairs) ** 0.5
    of = {metric: metrics[pairs[0], DTYPES[0]][0][metric]["of"] for metric in ("ua", "ra")}
    Path(__file__).with_suffix(".md").write_text(
        f"""# The pocket checkpoint's classes, erased in float32 and in bfloat16

`python benchmarks/{Path(__file__).name} {shlex.join(sys.argv[1:])}`
{date.today()}, {cpu()}, PyTorch {torch.__version__}; `erase` with
`--samples 200 --density {density:g} {shlex.join(demo.POCKET_TRAINING)}`.

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
