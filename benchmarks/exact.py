"""How close each erasure comes to the exact answer: pocket or pocket-ddpm, trained anew without the class.

    python benchmarks/exact.py --out /tmp/exact --quick
    python benchmarks/exact.py --out /tmp/exact --class sneaker --model salun --model esd --seed 1
    python benchmarks/exact.py --out /tmp/exact --kind ddpm --class dress

Runs the commands that a person would type. A class's retrained model is trained if it is not in DIR (48 to 75 minutes
on one core; a training that was stopped goes on). Each row, a model without a class, is kept in benchmarks/exact.jsonl,
and benchmarks/exact.md and the pictures are written from all of them. A row that is there is not measured again. The
pictures need the extra `figures`.
"""

import json
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import by_class
import exact_page
import kept_rows
import numpy as np
import typer
from distances import jackknife, jensen_shannon, per_timestep
from exact_drawn import EXAMPLES, Drawn, audited_prompts, draw, seen_in_data
from methods import RUNS, erase

from salun_sd.audit.fidelity import frechet, kid, moments
from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.find import find
from salun_sd.pocket import train
from salun_sd.pocket.fashion import CLASSES
from salun_sd.pocket.train import Kind

ROWS = Path(__file__).parent / "exact.jsonl"
QUICK = ("sneaker", "dress")
BASE, RETRAINED = "base", "retrained"
OTHER_IMAGES = "retrained, other image seeds"  # the same model: what so many images can tell apart
OTHER_TRAINING = "retrained, another training seed"  # as far as two exact answers are from each other
ERASURES = {  # name => a run of methods.py, and its support where it is not the run's own
    **{run: (run, None) for run in RUNS if run.startswith("salun")},
    "density 0.1": ("salun", "salient:0.1"),
    "density 0.02": ("salun", "salient:0.02"),
    "random mask": ("salun", "random:0.5"),
    "no mask": ("salun", "none"),
    **{run: (run, None) for run in RUNS if not run.startswith("salun")},
}
PICTURED = (BASE, RETRAINED, "salun", "salun:paper", "no mask", "esd", "uce")
BY_CLASS = [run for run in by_class.RUNS if run != by_class.RETRAIN]
YARDSTICKS = [BASE, RETRAINED, OTHER_IMAGES, OTHER_TRAINING]
MODELS = {Kind.stable_diffusion: [*YARDSTICKS, *ERASURES], Kind.ddpm: [*YARDSTICKS, *BY_CLASS]}
BASES = {Kind.stable_diffusion: "pocket", Kind.ddpm: by_class.MODEL}


class Row(NamedTuple):
    """A model beside the retrained one. A value stands with its standard error, by a jackknife over images."""

    concept: str
    model: str
    seed: int  # of the erasure
    options: str
    values: dict[str, tuple[float, float]]
    curves: dict[str, list[float]]  # "concept", "kept" => ‖ε - ε_retrained‖² / ‖ε_retrained‖² at each of TIMESTEPS
    seconds: float | None = None  # of `erase`
    peak: float | None = None  # GiB of memory, of `erase`
    changed: float | None = None  # share of the UNet's weights
    kind: str = Kind.stable_diffusion.value
    machine: str = kept_rows.FORMER


class Task(NamedTuple):
    """A class that is to be forgotten: by which kind of model, and where models and images are kept."""

    concept: str
    kind: Kind
    out: Path
    data: Path

    def folder(self, name: str, seed: int = 0) -> Path:
        kind = "" if self.kind is Kind.stable_diffusion else f"{self.kind.value}-"
        return self.out / f"{kind}{self.concept}-{name}-{seed}".translate(str.maketrans(" :", "__", ","))

    def retrained(self, seed: int = 0) -> str:
        """The model that never saw the class, trained as long as the base; trained now, unless it is there."""
        folder = self.folder("retrained-model", seed)
        train.train(self.data, folder, self.kind, seed=seed, without=self.concept)
        return str(folder)


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and images.")],
    concept: Annotated[list[str] | None, typer.Option("--class", help="Default: all ten.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"{' and '.join(QUICK)} alone.")] = False,
    kind: Annotated[Kind, typer.Option(help="stable-diffusion: pocket. ddpm: pocket-ddpm.")] = Kind.stable_diffusion,
    model: Annotated[list[str] | None, typer.Option(help=f"Default: all but {OTHER_TRAINING!r}.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the erasures. Default: 0.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of Fashion-MNIST.")] = Path("/usr/share/datasets/fashion-mnist"),
) -> None:
    if not find_spec("matplotlib"):
        raise typer.BadParameter("the pictures need matplotlib: pip install 'salun-sd[figures]'.")
    if unknown := [name for name in model or [] if name not in MODELS[kind]]:
        raise typer.BadParameter(f"there is no model {unknown[0]!r}: give one of {', '.join(MODELS[kind])}.")
    for c in concept or (QUICK if quick else CLASSES):
        task = Task(c, kind, out, data)
        for s in seed or [0]:
            for name in model or [name for name in MODELS[kind] if name != OTHER_TRAINING]:
                measure(task, name, 0 if name in YARDSTICKS else s)
                write(kept_rows.read(ROWS, Row))
        if kind is Kind.stable_diffusion:
            write_pictures(task)


def measure(task: Task, name: str, seed: int) -> None:
    """Make a model without a class, and compare it, unless there is such a row."""
    options = [] if name in YARDSTICKS else options_of(task.kind, name)
    key = (task.concept, name, seed, shlex.join(options))
    if (*key, task.kind.value) in {(*row[:4], row.kind) for row in kept_rows.read(ROWS, Row)}:
        return
    here, is_erased = task.folder(name, seed), name not in YARDSTICKS
    if is_erased and task.kind is Kind.ddpm:
        by_class.erase(task.concept, options, seed, here / "erased")
    elif is_erased:
        erase(task.concept, ERASURES[name][0], options, seed, here / "erased")
    exact, base = reference(task, RETRAINED), reference(task, BASE)
    if is_erased:
        own = draw(here, str(here / "erased"), task.concept, task.data)
    elif name in (BASE, RETRAINED):
        own = {BASE: base, RETRAINED: exact}[name]
    elif name == OTHER_TRAINING:
        own = draw(here, task.retrained(seed=1), task.concept, task.data)
    else:
        own = draw(here, exact.model, task.concept, task.data, shifted=1000)
    relative = per_timestep(own.predictions, exact.predictions)
    values = compared(own, exact, base, relative.mean(axis=0), same_seeds=name != OTHER_IMAGES)
    curves = {"concept": relative[:, :EXAMPLES], "kept": relative[:, EXAMPLES:]}
    curves = {of: [round(float(v), 8) for v in by_image.mean(axis=1)] for of, by_image in curves.items()}
    costs = cost(here / "erased", find(base.model).weights) if is_erased else {}
    kept_rows.add(ROWS, Row(*key, values, curves, **costs, kind=task.kind.value, machine=kept_rows.machine()))


def options_of(kind: Kind, name: str) -> list[str]:
    """The options of `erase` for an erasure."""
    if kind is Kind.ddpm:
        return by_class.RUNS[name]
    run, support = ERASURES[name]
    return [*(["--mask", support] if support else []), *shlex.split(RUNS[run])]


def write(rows: list[Row]) -> None:
    """The page, with the rows of each kind in the order of its models."""
    order = [*YARDSTICKS, *ERASURES, *BY_CLASS]
    rows = sorted(rows, key=lambda row: order.index(row.model))
    exact_page.write(*([row for row in rows if row.kind == kind.value] for kind in MODELS))


def write_pictures(task: Task) -> None:
    """The same prompts and seeds, by the models of PICTURED that were drawn."""
    audits = {name: task.folder(name) / "audit" for name in PICTURED}
    whole = {name: audit for name, audit in audits.items() if (audit / "report.json").is_file()}
    if whole:
        drawn = {name: Drawn(audit, name, task.concept, task.data) for name, audit in whole.items()}
        exact_page.pictures(task.concept, drawn)


def cost(erased: Path, weights: int) -> dict[str, float]:
    """What an erasure cost, by its own records; weights: those of the base's UNet."""
    of_run = json.loads((provenance.run_folder(erased) / "run.json").read_text())
    changed = json.loads((erased / "salun.json").read_text())["changed"]["inside"]
    peak = max(of_run["peak_bytes"].values()) / 2**30
    return {"seconds": kept_rows.on_cpu(round(of_run["seconds"])), "peak": kept_rows.on_cpu(round(peak, 2)),
            "changed": round(changed / weights, 4)}  # fmt: skip


@cache
def reference(task: Task, name: str) -> Drawn:
    """What the base or the retrained model draws."""
    model = BASES[task.kind] if name == BASE else task.retrained()
    return draw(task.folder(name), model, task.concept, task.data)


def compared(
    own: Drawn, exact: Drawn, base: Drawn, relative: np.ndarray, same_seeds: bool
) -> dict[str, list[float]]:  # fmt: skip
    """What a model's images and predictions differ by from the retrained one's, and from the data and the base.
    relative: the distance of the predictions of each example, the mean over timesteps."""
    labels = np.array([CLASSES.index(p.label) for p in audited_prompts(own.concept)])
    is_concept = labels == CLASSES.index(own.concept)
    concept, kept = np.flatnonzero(is_concept), np.flatnonzero(~is_concept)
    (p, x), (p_exact, x_exact), x_data = own.seen, exact.seen, seen_in_data(own.data, own.concept)
    right, right_exact = (100 * (of.argmax(axis=1) == labels) for of in (p, p_exact))

    def gap(i: np.ndarray) -> float:
        """The mean over UA and RA of the distance to the retrained model's, in points."""
        parts = [i[is_concept[i]], i[~is_concept[i]]]
        return float(np.mean([abs(right[part].mean() - right_exact[part].mean()) for part in parts]))

    measures = {
        "ua": (lambda i: 100 - right[i].mean(), concept),
        "ra": (lambda i: right[i].mean(), kept),
        "gap": (gap, np.arange(len(labels))),
        "js": (lambda i: jensen_shannon(p[i].mean(axis=0), p_exact[i].mean(axis=0)), concept),
        # Row i of both has the same class, and no sum of the KID has their pair: so all three have the classes' shares
        "fid_concept": (lambda i: frechet(moments(x[i]), moments(x_exact[i])), concept),
        "kid_concept": (lambda i: 1000 * kid(x[i], x_exact[i], paired=True), concept),
        "fid_kept": (lambda i: frechet(moments(x[i]), moments(x_exact[i])), kept),
        "kid_kept": (lambda i: 1000 * kid(x[i], x_exact[i], paired=True), kept),
        "fid_data": (lambda i: frechet(moments(x[i]), moments(x_data)), kept),
        "kid_data": (lambda i: 1000 * kid(x[i], x_data[i - len(concept)], paired=True), kept),
        "eps_concept": (lambda i: relative[i].mean(), np.arange(EXAMPLES)),
        "eps_kept": (lambda i: relative[i].mean(), np.arange(EXAMPLES, len(relative))),
    }
    if same_seeds:
        to_base, to_exact = (abs(own.pixels - of.pixels).mean(axis=(1, 2, 3)) for of in (base, exact))
        measures |= {
            "change": (lambda i: to_base[i].mean(), kept),
            "change_exact": (lambda i: to_exact[i].mean(), kept),
        }
    return {name: [round(value, 6) for value in jackknife(*measure)] for name, measure in measures.items()}


if __name__ == "__main__":
    typer.run(main)
