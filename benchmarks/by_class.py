"""Erase classes of pocket-ddpm, as the paper does with a class-conditional DDPM: beside the same model trained without.

    python benchmarks/by_class.py --out /tmp/by_class
    python benchmarks/by_class.py --out /tmp/by_class --run retrain --concept dress

Runs the commands that a person would type, one audit for each row; `retrain` trains the model anew on the other classes
alone, which takes an hour on one core. The rows are kept in benchmarks/by_class.jsonl, and benchmarks/by_class.md is
written from all of them. Run again to go on where it stopped; several may run at once, each with other options.
"""

import json
import shlex
import shutil
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, NamedTuple

import kept_rows
import typer
from PIL import Image

from salun_sd.cli import app as cli
from salun_sd.pocket import train
from salun_sd.pocket.fashion import CLASSES, load_split
from salun_sd.runtime.files import new_folder

HERE = Path(__file__).parent
ROWS = HERE / "by_class.jsonl"
MODEL = "pocket-ddpm"
RETRAIN, BASE = "retrain", "base"
IMAGES = 30  # of each class, in an audit and of the data
DRAWING = "--denoising-steps 25 --guidance 3".split()  # as pocket-ddpm does
TRAINING = "--samples 200 --steps 60 --batch-size 32 --lr 3e-4".split()
RUNS = {  # options of `erase`
    "salun": TRAINING,
    "salun:base": [*TRAINING, "--retain-weight", "5", "--anchor-from", "base"],
    "salun:paper": ["--recipe", "paper", *TRAINING],
    "salun, no mask": [*TRAINING, "--mask", "none"],
    RETRAIN: [],
}


class Row(NamedTuple):
    """A model without a class, audited."""

    run: str
    concept: str
    seed: int
    options: str
    ua: float  # share of the class's images that are not classified as it
    ra: float  # share of the other classes' images that are classified as they should be
    base_ra: float
    change: float  # mean absolute difference of the kept images' pixels from the base's, 0 to 1
    fid_base: float  # of the kept classes, to the base's images of the same seeds
    fid_data: float  # of the kept classes, to images of the test split
    base_fid_data: float
    seconds: float | None  # of `erase`
    machine: str = kept_rows.FORMER


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and audits.")],
    run: Annotated[list[str] | None, typer.Option(help="A run of RUNS. Default: salun.")] = None,
    concept: Annotated[list[str] | None, typer.Option(help="A class. Default: all ten.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of Fashion-MNIST.")] = Path("/usr/share/datasets/fashion-mnist"),
    tune: Annotated[
        str | None, typer.Option(help="Options in place of a run's own; the row is printed, and in no table.")
    ] = None,
) -> None:
    for s in seed or [0]:
        for c in concept or CLASSES:
            for name in run or ["salun"]:
                options = shlex.split(tune) if tune else RUNS[name]
                key = (name, c, s, shlex.join(options))
                if key in {row[:4] for row in kept_rows.read(ROWS, Row)}:
                    continue
                row = measured(out, key, options, data)
                if tune:
                    print(row)
                    continue
                kept_rows.add(ROWS, row)
                write(kept_rows.read(ROWS, Row))


def measured(out: Path, key: tuple, options: list[str], data: Path) -> Row:
    """Make a model without a class, and audit it."""
    run, concept, seed, _ = key
    here = out / f"{run}-{concept}-{seed}".translate(str.maketrans(" :,", "___"))
    shutil.rmtree(here / "audit", ignore_errors=True)
    here.mkdir(parents=True, exist_ok=True)
    made = here / "made"
    if run == RETRAIN:
        retrain(concept, seed, made, data)
    else:
        shutil.rmtree(made, ignore_errors=True)
        erase(concept, options, seed, made)
    evaluate = [str(made), "--prompts", "classes", "--samples-per-prompt", str(IMAGES), "--against", MODEL,
                "--concept-class", concept, "--fid", "pocket", *DRAWING]  # fmt: skip
    of_base = kept_rows.audited(evaluate, here / "audit", out / BASE)
    reference = ["--reference", str(kept_data(out, concept, data))]
    of_data = kept_rows.audited([*evaluate, *reference], here / "audit", out / BASE)
    of_run = {} if run == RETRAIN else json.loads((here / "made.run" / "run.json").read_text())
    seconds = kept_rows.on_cpu(of_run.get("seconds"))
    shutil.rmtree(here / "audit")
    metrics, ra_of_base = of_base["metrics"], of_base["against"]["metrics"]["ra"]["rate"]
    fids = [q["fid"]["value"] for q in (of_base["quality"], of_data["quality"], of_data["against"]["quality"])]
    change = of_base["quality"]["change"]["value"]
    return Row(
        *key, metrics["ua"]["rate"], metrics["ra"]["rate"], ra_of_base, change, *fids, seconds, kept_rows.machine()
    )


def erase(concept: str, options: Sequence[str], seed: int, out: Path) -> None:
    """Erase a class towards the next one, unless `out` has that erasure."""
    cli.run(["erase", MODEL, "--concept", concept, "--anchor", kept_rows.next_class(concept), *options, "--seed",
             str(seed), *kept_rows.FLOAT32, "--out", str(out)])  # fmt: skip


def retrain(concept: str, seed: int, out: Path, data: Path) -> None:
    """The base's own training, with no image of the class."""
    train.train(data, out, train.Kind.ddpm, seed=seed, without=concept)


def kept_data(out: Path, concept: str, data: Path) -> Path:
    """A folder with the first images of the test split of each class but one."""
    folder = out / f"data-without-{concept.replace(' ', '_')}"
    if folder.exists():
        return folder
    images, labels = load_split(data, "t10k")
    with new_folder(folder) as partial:
        for number, name in enumerate(CLASSES):
            for i, image in enumerate(images[labels == number][: IMAGES if name != concept else 0]):
                pixels = image.permute(1, 2, 0).add(1).mul(127.5).round().byte().numpy()
                Image.fromarray(pixels).save(partial / f"{number}-{i}.png")
    return folder


def write(table: list[Row]) -> None:
    groups, by_class = defaultdict(list), defaultdict(list)
    for row in table:
        groups[row.run].append(row)
        by_class[row.run, row.concept].append(row)
    (HERE / "by_class.md").write_text(
        f"""# Erasing a class of pocket-ddpm

`python benchmarks/{Path(__file__).name} --out DIR`, with the options that the last table names,
{date.today()}; one thread of
{kept_rows.machines(table)}.
Seconds were taken while other programs ran. Rows of a GPU have none.

Each class is erased towards the next one; `{RETRAIN}` is the base's own training without the class. {IMAGES} images of
each class, the same seeds for every model. UA: share of the class's images that the pocket judge does not classify as
it. RA: share of the other classes' images classified as what they ask for, less the base's. Change: mean absolute
difference of the kept images' pixels from the base's, 0 to 1. FID: of the kept classes, by the judge's features, to the
base's images and to as many images of the test split; these are small numbers of images, so that FIDs compare only with
one another. Mean, and the standard deviation over classes and seeds.

| run | classes, rows | UA | least UA | RA - base | change | FID to the base | FID to the data | the base's | seconds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(_summary(run, some) for run, some in groups.items())}

## By class

| run | class | seeds | UA | RA - base | change | FID to the base | FID to the data | the base's |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(_of_class(*key, some) for key, some in by_class.items())}

## Options of each run

| run | options of `erase` |
| --- | --- |
{chr(10).join(f"| {run} | `{options}` |" for run, options in dict.fromkeys((row.run, row.options) for row in table))}
"""
    )


def _summary(run: str, some: list[Row]) -> str:
    def cell(number, digits: int = 3) -> str:
        numbers = [number(row) for row in some]
        return f"{mean(numbers):.{digits}f}" + (f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")

    seconds = [row.seconds for row in some if row.seconds is not None]
    cells = [f"{len({row.concept for row in some})}, {len(some)}", cell(lambda r: r.ua),
             f"{min(row.ua for row in some):.3f}", cell(lambda r: r.ra - r.base_ra), cell(lambda r: r.change, 4),
             cell(lambda r: r.fid_base, 1), cell(lambda r: r.fid_data, 1), cell(lambda r: r.base_fid_data, 1),
             f"{mean(seconds):.0f}" if seconds else "-"]  # fmt: skip
    return f"| {' | '.join([run, *cells])} |"


def _of_class(run: str, concept: str, some: list[Row]) -> str:
    numbers = [(lambda r: r.ua, 3), (lambda r: r.ra - r.base_ra, 3), (lambda r: r.change, 4), (lambda r: r.fid_base, 1),
               (lambda r: r.fid_data, 1), (lambda r: r.base_fid_data, 1)]  # fmt: skip
    cells = [f"{mean(map(number, some)):.{digits}f}" for number, digits in numbers]
    return f"| {' | '.join([run, concept, str(len(some)), *cells])} |"


if __name__ == "__main__":
    typer.run(main)
