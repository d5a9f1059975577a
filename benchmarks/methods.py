"""Methods on supports: how well they erase a class of the pocket checkpoint, and how much they change the rest.

    python benchmarks/methods.py --out /tmp/methods
    python benchmarks/methods.py --out /tmp/methods --method salun --support none --seed 0 --seed 1 --seed 2

Runs the commands that a person would type, one audit for each of RUNS. Keeps each row in DIR/rows.jsonl, and writes
benchmarks/methods.md with benchmarks/methods.svg from all of them. Run again to go on where it stopped; several may run
at once, each with other options.

A method's numbers are found with `--tune`, on other classes and seeds than those of the table.
"""

import json
import platform
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Annotated, NamedTuple

import typer
from pocket_classes import cpu

from salun_sd.cli import app as cli
from salun_sd.cli.demo import POCKET_TRAINING, audit_prompts, photo_of
from salun_sd.draw import prompts

HERE = Path(__file__).parent
PUBLISHED = "published"  # a method's own support
SUPPORTS = (PUBLISHED, "salient:0.5", "random:0.5", "none")
# name => recipe and numbers. The pocket is small: its learning rates are some 10 times those of Stable Diffusion.
RUNS = {
    "salun": ["--samples", "200", *POCKET_TRAINING],
    "salun:paper": "--recipe paper --samples 200 --retain-prompts pocket --steps 60 --batch-size 32 --lr 1e-4".split(),
}


NO_ANCHOR = ("esd", "ascent", "finetune")  # as published


class Row(NamedTuple):
    """An erasure and its audit."""

    run: str
    support: str
    concept: str
    seed: int
    options: str
    ua: float
    ra: float
    base_ra: float
    change: float  # mean absolute difference of the kept images' pixels from the base's, 0 to 1
    ssim: float
    seconds: float  # of `erase`
    peak: int  # bytes of memory, of `erase`


def main(
    out: Annotated[Path, typer.Option(help="Folder for masks, checkpoints, audits and rows.jsonl.")],
    method: Annotated[list[str] | None, typer.Option(help="A run of RUNS. Default: all.")] = None,
    support: Annotated[
        list[str] | None, typer.Option(help="A support of SUPPORTS. Default: the published one.")
    ] = None,
    concept: Annotated[list[str] | None, typer.Option(help="A class. Default: all ten.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0.")] = None,
    tune: Annotated[
        str | None, typer.Option(help="Options in place of a run's own; the row is not in the table.")
    ] = None,
) -> None:
    classes = list(dict.fromkeys(p.label for p in prompts.read("pocket")))
    for s in seed or [0]:
        for c in concept or classes:
            for run in method or RUNS:
                for where in support or [PUBLISHED]:
                    measured(out, run, where, c, s, shlex.split(tune) if tune else RUNS[run], bool(tune))
                    write(rows_of(out))


def anchor_of(concept: str) -> str:
    """The next class, as in pocket_classes.py."""
    classes = list(dict.fromkeys(p.label for p in prompts.read("pocket")))
    return classes[(classes.index(concept) + 1) % len(classes)]


def rows_of(out: Path, name: str = "rows") -> list[Row]:
    file = out / f"{name}.jsonl"
    return [Row(**row) for row in map(json.loads, file.read_text().splitlines())] if file.exists() else []


def measured(out: Path, run: str, support: str, concept: str, seed: int, options: list[str], tunes: bool) -> None:
    """Erase a class and audit it, unless there is such a row."""
    key = (run, support, concept, seed, shlex.join(options))
    if key in {row[:5] for row in rows_of(out, "tuned" if tunes else "rows")}:
        return
    here = out / "-".join(map(str, key[:4])).replace(" ", "_").replace(":", "_")
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    (here / "prompts.csv").write_text(prompts.as_csv(audit_prompts(prompts.read("pocket"), concept)))
    pair = ["--concept", photo_of(concept), *([] if run in NO_ANCHOR else ["--anchor", photo_of(anchor_of(concept))])]
    mask = [] if support == PUBLISHED else ["--mask", support]
    cli.run(["erase", "pocket", *pair, "--method", run.partition(":")[0], *mask, *options, "--seed", str(seed), "--out",
             str(here / "erased")])  # fmt: skip
    base = out / f"base-{concept}"
    if base.exists():  # the base's images, drawn once for a class
        shutil.copytree(base, here / "audit" / "against")
    cli.run(["evaluate", str(here / "erased"), "--prompts", str(here / "prompts.csv"), "--against", "pocket",
             "--no-images", "--out", str(here / "audit")])  # fmt: skip
    if not base.exists():
        shutil.copytree(here / "audit" / "against", base)
    report = json.loads((here / "audit" / "report.json").read_text())
    of_run = json.loads((here / "erased.run" / "run.json").read_text())
    rates, before, quality = report["metrics"], report["against"]["metrics"], report["quality"]
    row = Row(*key, rates["ua"]["rate"], rates["ra"]["rate"], before["ra"]["rate"], quality["change"]["value"],
              quality["change_ssim"]["value"], of_run["seconds"], max(of_run["peak_bytes"].values()))  # fmt: skip
    with (out / ("tuned.jsonl" if tunes else "rows.jsonl")).open("a") as f:
        f.write(json.dumps(row._asdict()) + "\n")
    for name in ("erased", "audit"):
        shutil.rmtree(here / name)


def write(rows: list[Row]) -> None:
    """The table and the picture."""
    (HERE / "methods.md").write_text(
        f"""# Methods and supports, on the classes of the pocket checkpoint

`python benchmarks/{Path(__file__).name} --out DIR`, with the options that the last table names
{date.today()}, {cpu()}, Python {platform.python_version()}; one thread. Seconds were taken while other programs ran.

Each class is erased towards the next one. UA: share of the concept's 100 prompts whose image is not classified as it.
RA: share of 180 prompts of the other classes classified as what they ask for, less the base's on the same prompts and
seeds. Change: mean absolute difference of the kept images' pixels from the base's, 0 to 1. Beside a mean stands the
worst class.

![UA against change](methods.svg)

| run | support | classes, seeds | UA | worst | RA - base | worst | change | SSIM | seconds | peak GiB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(_summary(*item) for item in _groups(rows, ("run", "support")))}

## By class

| run | support | class | seeds | UA | RA - base | change |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(_of_class(*item) for item in _groups(rows, ("run", "support", "concept")))}

## Options of each run

| run | options |
| --- | --- |
{chr(10).join(f"| {run} | `{options}` |" for run, options in dict.fromkeys((row.run, row.options) for row in rows))}
"""
    )
    (HERE / "methods.svg").write_text(_scatter(rows))


def _groups(rows: list[Row], names: tuple[str, ...]) -> Iterable[tuple[tuple, list[Row]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(getattr(row, name) for name in names)].append(row)
    return groups.items()


def _means(rows: list[Row], number) -> list[float]:
    """Of each class, the mean over its seeds."""
    return [mean(map(number, of_class)) for _, of_class in _groups(rows, ("concept",))]


def _lost(row: Row) -> float:
    return row.ra - row.base_ra


def _summary(key: tuple, rows: list[Row]) -> str:
    ua, lost = _means(rows, lambda row: row.ua), _means(rows, _lost)
    seeds = len({row.seed for row in rows})
    cells = [f"{len(ua)}, {seeds}", f"{mean(ua):.3f}", f"{min(ua):.3f}", f"{mean(lost):+.3f}", f"{min(lost):+.3f}",
             f"{mean(_means(rows, lambda row: row.change)):.4f}", f"{mean(_means(rows, lambda row: row.ssim)):.3f}",
             f"{mean(row.seconds for row in rows):.0f}", f"{max(row.peak for row in rows) / 2**30:.2f}"]  # fmt: skip
    return f"| {' | '.join([*key, *cells])} |"


def _of_class(key: tuple, rows: list[Row]) -> str:
    cells = [str(len(rows)), f"{mean(row.ua for row in rows):.3f}", f"{mean(map(_lost, rows)):+.3f}",
             f"{mean(row.change for row in rows):.4f}"]  # fmt: skip
    return f"| {' | '.join([*key, *cells])} |"


def _scatter(rows: list[Row]) -> str:
    """A point for each run on each support: the means over its classes. The best is at the top left."""
    width, height, pad, most = 720, 420, 48, max(row.change for row in rows) * 1.05
    marks = []
    for (run, support), of_run in _groups(rows, ("run", "support")):
        change, ua = mean(_means(of_run, lambda row: row.change)), mean(_means(of_run, lambda row: row.ua))
        x, y = pad + change / most * (width - 2 * pad), height - pad - ua * (height - 2 * pad)
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/><text x="{x + 7:.1f}" y="{y + 4:.1f}">'
                     f"{run}{'' if support == PUBLISHED else ', ' + support}</text>")  # fmt: skip
    ticks = [f'<text x="{pad + i / 4 * (width - 2 * pad):.1f}" y="{height - pad + 16}" text-anchor="middle">'
             f"{i / 4 * most:.3f}</text>" for i in range(5)]  # fmt: skip
    ticks += [f'<text x="{pad - 6}" y="{height - pad - i / 4 * (height - 2 * pad) + 4:.1f}" text-anchor="end">{i / 4:g}'
              "</text>" for i in range(5)]  # fmt: skip
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return f"""{head} font-family="sans-serif" font-size="12">
<rect width="{width}" height="{height}" fill="white"/>
<path d="M{pad} {pad}V{height - pad}H{width - pad}" fill="none" stroke="#888"/>
{chr(10).join(ticks)}
<text x="{width / 2}" y="{height - 8}" text-anchor="middle">change of the kept images</text>
<text x="12" y="{height / 2}" text-anchor="middle" transform="rotate(-90 12 {height / 2})">UA</text>
{chr(10).join(marks)}
</svg>
"""


if __name__ == "__main__":
    typer.run(main)
