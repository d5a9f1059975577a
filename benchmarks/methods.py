"""Methods on supports: how well they erase a class of the pocket checkpoint, and how much they change the rest.

    python benchmarks/methods.py --out /tmp/methods
    python benchmarks/methods.py --out /tmp/methods --run salun --support none --seed 0 --seed 1 --seed 2
    python benchmarks/methods.py --out /tmp/methods --run esd --tune '--steps 100 --batch-size 8 --lr 3e-4'

Runs the commands that a person would type. Each row, an erasure and its audit, is kept in benchmarks/methods.jsonl, and
benchmarks/methods.md and methods.svg are written from all of them. A row that is there is not measured again; several
may run at once, each with a DIR of its own.

The numbers in RUNS were tuned, on the classes TUNED_ON with the seed TUNING, of which no row is in the table: up to
TRIES tries for each run, settings on the first class, and the choice among them on the second, too. The choice is the
setting of the least change among those with a UA of at least ENOUGH, or else the one of the largest UA. `salun` was
chosen otherwise: docs/results.md.
"""

import json
import math
import shlex
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Annotated, NamedTuple

import kept_rows
import typer

from salun_sd.cli import app as cli
from salun_sd.cli.demo import POCKET_TRAINING, audit_prompts, photo_of
from salun_sd.draw import prompts
from salun_sd.errors import TrainingError
from salun_sd.pocket.fashion import CLASSES

HERE = Path(__file__).parent
ROWS = HERE / "methods.jsonl"
PUBLISHED = "published"  # a method's own support
TUNED_ON, TUNING, TRIES, ENOUGH = ("bag", "coat"), 100, 4, 0.95
IMAGES = "--samples 200 --retain-prompts pocket"
# name => recipe and numbers. The pocket is small: its learning rates are some 10 times those of Stable Diffusion.
RUNS = {
    "salun": f"{IMAGES} --steps 100 --batch-size 32 --lr 1e-4",
    "salun:broad": shlex.join(["--samples", "200", *POCKET_TRAINING]),  # as the demo: the default retain prompts
    "salun:5": f"{IMAGES} --steps 100 --batch-size 32 --lr 1e-4 --retain-weight 5",
    "salun:base": f"{IMAGES} --steps 150 --batch-size 32 --lr 1e-4 --retain-weight 5 --anchor-from base",
    "salun:paper": f"--recipe paper {IMAGES} --steps 60 --batch-size 32 --lr 1e-4",
    "esd": "--steps 100 --batch-size 8 --lr 3e-4",
    "esd:anchor": "--steps 100 --batch-size 8 --lr 3e-4",
    "ablation": "--steps 100 --batch-size 32 --lr 4e-4 --samples 200",
    "forget-me-not": "--steps 35 --batch-size 8 --lr 2e-4 --samples 200 --setting end_token=left-out",
    "ascent": f"--steps 30 --batch-size 32 --lr 1e-5 {IMAGES}",
    "erasediff": f"--steps 100 --batch-size 32 --lr 6e-5 {IMAGES}",
    "finetune": f"--steps 100 --batch-size 32 --lr 1e-4 {IMAGES}",
    "uce": "--setting ridge=0.001 --retain-prompts pocket",
}
COSTS = (("seconds", mean, ".0f"), ("peak", max, ".2f"))  # of a row; how to sum them up; how to write the sum
WITHOUT_ANCHOR = ("esd", "ascent", "finetune")  # as published


class Row(NamedTuple):
    """An erasure and its audit. What was measured is None where the erasure was stopped: it ruined the model."""

    run: str
    support: str
    concept: str
    seed: int
    options: str
    tries: bool  # whether the options are a try, and not those of the table
    ua: float | None = None
    ra: float | None = None
    base_ra: float | None = None
    change: float | None = None  # mean absolute difference of the kept images' pixels from the base's, 0 to 1
    ssim: float | None = None
    seconds: float | None = None  # of `erase`
    peak: float | None = None  # GiB of memory, of `erase`
    denoising: int = 25  # steps to draw an image: those of pocket; it had 25, with leading spacing, until 26 Nov 2026
    machine: str = kept_rows.FORMER

    @property
    def lost(self) -> float | None:
        return None if self.ra is None else self.ra - self.base_ra


def main(
    out: Annotated[Path, typer.Option(help="Folder for masks, checkpoints and audits.")],
    run: Annotated[list[str] | None, typer.Option(help="A run of RUNS. Default: all.")] = None,
    support: Annotated[list[str] | None, typer.Option(help="A value of --mask. Default: the published one.")] = None,
    concept: Annotated[list[str] | None, typer.Option(help="A class. Default: all ten.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0.")] = None,
    tune: Annotated[str | None, typer.Option(help="Try these options, with the classes and the seed for it.")] = None,
) -> None:
    for s in [TUNING] if tune else seed or [0]:
        for c in concept or (TUNED_ON if tune else CLASSES):
            for name in run or RUNS:
                for where in support or [PUBLISHED]:
                    measure(
                        out, Row(name, where, c, s, tune or RUNS[name], tune is not None, machine=kept_rows.machine())
                    )
                    write(kept_rows.read(ROWS, Row))


def measure(out: Path, row: Row) -> None:
    """Erase a class and audit it, unless there is such a row."""
    if row[:6] in {known[:6] for known in kept_rows.read(ROWS, Row)}:
        return
    here = out / "-".join(map(str, row[:4])).replace(" ", "_").replace(":", "_")
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    (here / "prompts.csv").write_text(prompts.as_csv(audit_prompts(prompts.read("pocket"), row.concept)))
    mask = [] if row.support == PUBLISHED else ["--mask", row.support]
    try:
        erase(row.concept, row.run, [*mask, *shlex.split(row.options)], row.seed, here / "erased")
    except SystemExit as e:
        if not isinstance(getattr(e.__context__, "__cause__", None), TrainingError):  # its model is not ruined
            raise
    else:
        row = row._replace(**audited(here, out / f"base-{row.concept}"))
    kept_rows.add(ROWS, row)
    for name in ("erased", "audit"):
        shutil.rmtree(here / name, ignore_errors=True)


def erase(concept: str, run: str, options: Sequence[str], seed: int, out: Path) -> None:
    """Erase a class towards the next one, unless `out` has that erasure."""
    anchor = [] if run in WITHOUT_ANCHOR else ["--anchor", photo_of(kept_rows.next_class(concept))]
    dtype = [] if run == "uce" else kept_rows.FLOAT32
    cli.run(["erase", "pocket", "--method", run.partition(":")[0], "--concept", photo_of(concept), *anchor, *options,
             "--seed", str(seed), *dtype, "--out", str(out)])  # fmt: skip


def audited(here: Path, base: Path) -> dict[str, float]:
    """Audit what was erased in a folder; gives what a row measures. base: the base's images, drawn once for a class."""
    options = [str(here / "erased"), "--prompts", str(here / "prompts.csv"), "--against", "pocket"]
    report = kept_rows.audited(options, here / "audit", base)
    of_run = json.loads((here / "erased.run" / "run.json").read_text())
    rates, before, quality = report["metrics"], report["against"]["metrics"], report["quality"]
    return {
        "ua": rates["ua"]["rate"], "ra": round(rates["ra"]["rate"], 6), "base_ra": round(before["ra"]["rate"], 6),
        "change": round(quality["change"]["value"], 6), "ssim": round(quality["change_ssim"]["value"], 6),
        "denoising": report["settings"]["sampling"]["steps"], "seconds": kept_rows.on_cpu(round(of_run["seconds"])),
        "peak": kept_rows.on_cpu(round(max(of_run["peak_bytes"].values()) / 2**30, 2)),
    }  # fmt: skip


def write(measured: list[Row]) -> None:
    """The tables and the picture. Rows of a run whose options are no longer its own are left out."""
    table = [row for row in measured if not row.tries and row.options == RUNS.get(row.run)]
    table.sort(key=lambda row: (list(RUNS).index(row.run), row.support != PUBLISHED, CLASSES.index(row.concept)))
    tries = sorted((row for row in measured if row.tries), key=lambda row: row.run)
    (HERE / "methods.md").write_text(
        f"""# Methods and supports, on the classes of the pocket checkpoint

`python benchmarks/{Path(__file__).name} --out DIR`, {date.today()}; one thread of
{kept_rows.machines(table)}.
Up to six other programs shared the core: seconds do not compare. Rows of a GPU have neither seconds nor memory.

Each class is erased towards the next one. The options of a run were tuned on its published support, and are the same on
every other. UA: share of the concept's 100 prompts whose image is not classified as it. RA: share of 180 prompts of the
other classes classified as what they ask for, less the base's on the same prompts and seeds. Change: mean absolute
difference of the kept images' pixels from the base's, 0 to 1. Beside a mean stands the worst class.
{drawn(table)}
All rows are in [methods.jsonl](methods.jsonl).

![UA against change](methods.svg)

| run | support | classes | seeds | UA | worst | RA - base | worst | change | SSIM | seconds | peak GiB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{lines(table, ("run", "support"), summary)}

## By class

| run | support | class | seeds | UA | RA - base | change |
| --- | --- | --- | --- | --- | --- | --- |
{lines(table, ("run", "support", "concept"), lambda some: [str(len(some)), *of_class(some)])}

## Options of each run

| run | options |
| --- | --- |
{lines(table, ("run", "options"), lambda _: [])}

## How they were tuned

On {" and ".join(TUNED_ON)} with seed {TUNING}, of which no row is above: up to {TRIES} tries for each run, settings on
the first class, and the choice among them on the second, too. The choice is the setting of the least change among those
with a UA of at least {ENOUGH}, or else the one of the largest UA. `salun` had more tries, also on dress, in 25
denoising steps and later in 10 (those with the weights 10 and 20, and with 60 or 200 steps); it was chosen by RA,
change and an attack: see docs/results.md. Its tries with another support or other retain prompts came later, to compare
them. Stopped: the model was ruined, and `erase` said so.

| run | support | options | class | UA | RA - base | change |
| --- | --- | --- | --- | --- | --- | --- |
{lines(tries, ("run", "support", "options", "concept"), of_class)}
"""
    )
    if table:
        (HERE / "methods.svg").write_text(scatter(table))


def drawn(rows: list[Row]) -> str:
    """In how many steps the images of a table were drawn, in words."""
    counts = Counter(row.denoising for row in rows)
    each = [f"{steps} denoising steps in {count} rows" for steps, count in sorted(counts.items())]
    return f"All images of a row are drawn alike: {' and '.join(each)}."


def groups(rows: list[Row], names: tuple[str, ...]) -> Iterable[tuple[tuple, list[Row]]]:
    by_key = defaultdict(list)
    for row in rows:
        by_key[tuple(f"`{row.options}`" if name == "options" else getattr(row, name) for name in names)].append(row)
    return by_key.items()


def lines(rows: list[Row], names: tuple[str, ...], cells: Callable[[list[Row]], list[str]]) -> str:
    """A line of a table for each group of rows: what they share, and their cells."""
    return "\n".join(f"| {' | '.join([*key, *cells(some)])} |" for key, some in groups(rows, names))


def means(rows: list[Row], name: str) -> list[float]:
    """Of each class, the mean over its seeds; without rows that were stopped."""
    of_classes = (some for _, some in groups([row for row in rows if getattr(row, name) is not None], ("concept",)))
    return [mean(getattr(row, name) for row in some) for some in of_classes]


def summary(rows: list[Row]) -> list[str]:
    if not means(rows, "ua"):
        return ["stopped", *[""] * 9]
    ua, lost = means(rows, "ua"), means(rows, "lost")
    costs = ((number, form, means(rows, name)) for name, number, form in COSTS)
    numbers = [f"{mean(ua):.3f}", f"{min(ua):.3f}", f"{mean(lost):+.3f}", f"{min(lost):+.3f}",
               f"{mean(means(rows, 'change')):.4f}", f"{mean(means(rows, 'ssim')):.3f}",
               *(f"{number(some):{form}}" if some else "" for number, form, some in costs)]  # fmt: skip
    return [str(len(ua)), str(len({row.seed for row in rows})), *numbers]


def of_class(rows: list[Row]) -> list[str]:
    if not means(rows, "ua"):
        return ["stopped", "", ""]
    return [f"{mean(means(rows, name)):{form}}" for name, form in (("ua", ".3f"), ("lost", "+.3f"), ("change", ".4f"))]


def scatter(rows: list[Row]) -> str:
    """A point for each run on each support: the means over its classes. The best is at the top left."""
    width, height, pad, line = 800, 460, 52, 14
    points = []
    for (run, support), some in groups([row for row in rows if row.ua is not None], ("run", "support")):
        label = run if support == PUBLISHED else f"{run}, {support}"
        points.append((mean(means(some, "ua")), mean(means(some, "change")), label))
    low, high = min(change for _, change, _ in points) / 1.5, max(change for _, change, _ in points) * 1.5

    def x(change: float) -> float:
        return pad + math.log(change / low) / math.log(high / low) * (width - 4 * pad)

    def y(ua: float) -> float:
        return height - pad - ua * (height - 2 * pad)

    marks = []
    # the ends of what is drawn, and its middle; the ticks are drawn, too
    taken = [(0, width, height - pad + 16), *((x(change) - 5, x(change) + 5, y(ua)) for ua, change, _ in points)]
    for ua, change, label in sorted(points, key=lambda point: (-point[0], -point[1])):
        left, right, middle = x(change) + 8, x(change) + 8 + 7 * len(label), y(ua)
        while any(left < end and start < right and abs(middle - other) < line for start, end, other in taken):
            middle += line if ua > 0.5 else -line
        taken.append((left, right, middle))
        marks += [f'<path d="M{x(change):.1f} {y(ua):.1f}L{left - 1:.1f} {middle:.1f}" stroke="#80868f"/>',
                  f'<circle cx="{x(change):.1f}" cy="{y(ua):.1f}" r="4" fill="#0969da"/>',
                  f'<text x="{left:.1f}" y="{middle + 4:.1f}">{label}</text>']  # fmt: skip
    for tick in (factor * 10.0**exponent for exponent in range(-5, 0) for factor in (1, 3)):
        if low < tick < high:
            marks.append(f'<text x="{x(tick):.1f}" y="{height - pad + 20}" text-anchor="middle">{tick:g}</text>')
    for ua in (0, 0.25, 0.5, 0.75, 1):
        marks.append(f'<text x="{pad - 8}" y="{y(ua) + 4:.1f}" text-anchor="end">{ua:g}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return f"""{head} font-family="sans-serif" font-size="12" fill="#80868f">
<path d="M{pad} {pad}V{height - pad}H{width - 3 * pad}" fill="none" stroke="#888"/>
{chr(10).join(marks)}
<text x="{width / 2 - pad}" y="{height - 10}" text-anchor="middle">change of the kept images</text>
<text x="14" y="{height / 2}" text-anchor="middle" transform="rotate(-90 14 {height / 2})">UA</text>
</svg>
"""


if __name__ == "__main__":
    typer.run(main)
