"""Whether `moved`, which the probe of `erase` measures in seconds, says what an audit finds: the UA of the concept. And
which drift a ruined model has.

    python benchmarks/moved.py --out /tmp/moved

Erases classes of the pocket checkpoint with several seeds and numbers of steps, and audits each; then one class with
learning rates that are too high. The points are kept in benchmarks/moved.jsonl, and benchmarks/moved.md and moved.svg
are written from all of them. Run again to go on where it stopped.
"""

import json
import math
import platform
import shutil
from datetime import date
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, NamedTuple

import kept_rows
import numpy as np
import torch
import typer
from kept_rows import machine

from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.cli.demo import photo_of
from salun_sd.draw import prompts
from salun_sd.draw.prompts import Prompt
from salun_sd.edit import watch
from salun_sd.methods.probe import Measure, Points, Probe
from salun_sd.runtime import seals

HERE = Path(__file__).parent
POINTS = HERE / "moved.jsonl"
PAIRS = {"dress": "coat", "sneaker": "bag", "trouser": "shirt", "bag": "sandal", "pullover": "t-shirt"}
SEEDS, ANCHORS, STEPS, LR = (0, 1), ("current", "base"), (8, 20, 50), 1e-4
RUINED = (1e-3, 3e-3, 1e-2)  # learning rates, of the first pair
RUNS = [(concept, seed, anchor_from, steps, LR)
        for anchor_from, seed, concept, steps in product(ANCHORS, SEEDS, PAIRS, STEPS)]  # fmt: skip
RUINS = [(next(iter(PAIRS)), 0, ANCHORS[0], max(STEPS), lr) for lr in RUINED]
TRAINING = "--samples 200 --retain-prompts pocket --batch-size 16".split()
BOUND = watch.RUNAWAY
DRAWS = 2000  # of the bootstrap


class Both(Probe):
    """The probe, and beside it the same measure with the other goal that lies at hand: the anchor's prediction by the
    base, where the probe takes the model's own, and the model's own, where it takes the base's."""

    other = 0.0

    def __init__(self, unet: torch.nn.Module, points: Points, size: int, name: str, *, keeps_goals: bool):
        super().__init__(unet, points, size, name, keeps_goals=keeps_goals)
        self.of_base = self.predictions(unet, points.goal, self.own[self.is_concept])

    def __call__(self, unet: torch.nn.Module) -> Measure:
        measure, goals = super().__call__(unet), self.goals
        self.goals = self.of_base if goals is None else None
        [Both.other] = super().__call__(unet).moved.values()
        self.goals = goals
        return measure


class Point(NamedTuple):
    """An erasure: what the probe measured after the last step, and what the audit found."""

    concept: str
    seed: int
    anchor_from: str
    steps: int
    lr: float
    moved: float
    other: float  # moved, with the other goal
    drift: float
    ua: float
    ra: float


def main(out: Annotated[Path, typer.Option(help="Folder for masks, checkpoints and audits.")]) -> None:
    watch.RUNAWAY, watch.Probe = math.inf, Both  # so that ruined models are audited, too
    for run in [*RUINS, *RUNS]:
        if run not in {point[:5] for point in kept_rows.read(POINTS, Point)}:
            kept_rows.add(POINTS, measured(out, *run))
            write(kept_rows.read(POINTS, Point))


def measured(out: Path, concept: str, seed: int, anchor_from: str, steps: int, lr: float) -> Point:
    """Erase a class, and audit what is left of it and of the others."""
    here = out / concept / f"{seed}-{anchor_from}-{steps}-{lr:g}"
    mask, asked, pair = here.parent / "mask.safetensors", here.parent / "prompts.csv", ["--concept", photo_of(concept)]
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    asked.write_text(prompts.as_csv(audited(concept)))
    if not mask.exists():
        cli.run(["mask", "pocket", *pair, "--samples", "200", *kept_rows.FLOAT32, "--out", str(mask)])
    cli.run(["erase", "pocket", *pair, "--anchor", photo_of(PAIRS[concept]), "--mask", str(mask), *TRAINING, "--steps",
             str(steps), "--seed", str(seed), "--anchor-from", anchor_from, "--lr", f"{lr:g}",
             *kept_rows.FLOAT32, "--out", str(here / "erased")])  # fmt: skip
    cli.run(["evaluate", str(here / "erased"), "--prompts", str(asked), *kept_rows.FLOAT32, "--out",
             str(here / "audit")])  # fmt: skip
    *_, last = seals.read_lines(here / "erased.run" / "losses.jsonl")
    rates = json.loads((here / "audit" / "report.json").read_text())["metrics"]
    [moved] = last["moved"].values()
    return Point(concept, seed, anchor_from, steps, lr, moved, Both.other, last["drift"],
                 rates["ua"]["rate"], rates["ra"]["rate"])  # fmt: skip


def audited(concept: str) -> list[Prompt]:
    """Every other of the concept's 100 prompts, and 5 of each other class."""
    return [p for i, p in enumerate(prompts.read("pocket")) if i % (2 if p.label == concept else 20) == 0]


def ranks(values: list[float]) -> np.ndarray:
    """The ranks, equal values sharing the mean of theirs."""
    a = np.array(values)
    return ((a[:, None] > a).sum(1) + (a[:, None] >= a).sum(1) + 1) / 2


def spearman(points: list[Point], measure: str) -> float:
    """The rank correlation of a measure and UA."""
    return float(np.corrcoef(ranks([getattr(p, measure) for p in points]), ranks([p.ua for p in points]))[0, 1])


def correlation(points: list[Point], measure: str) -> str:
    """With its 95 % percentile bootstrap over (class, seed), each with all of its erasures."""
    groups = [[p for p in points if (p.concept, p.seed) == key] for key in {(p.concept, p.seed): 0 for p in points}]
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(groups), size=len(groups)) for _ in range(DRAWS))
    values = [spearman([p for i in places for p in groups[i]], measure) for places in drawn]
    return "{:.2f} [{:.2f}, {:.2f}]".format(spearman(points, measure), *np.nanquantile(values, (0.025, 0.975)))


def share_in_words(least: float, below: float) -> str:
    if math.isinf(least):
        return f"below {below:g}"
    return f"{least:g} or more" if math.isinf(below) else f"{least:g} to {below:g}"


def write(points: list[Point]) -> None:
    usual, ruined = [p for p in points if p.lr == LR], [p for p in points if p.lr != LR]
    if len({p.concept for p in usual}) < 2:
        return
    by_bin = []
    for least, below in pairwise((-math.inf, 0.25, 0.5, 0.75, 0.95, math.inf)):
        if uas := [p.ua for p in usual if least <= p.moved < below]:
            by_bin.append(f"| {share_in_words(least, below)} | {len(uas)} | {np.mean(uas):.2f} | {min(uas):.2f} |")
    of_anchors = {anchor_from: [p for p in usual if p.anchor_from == anchor_from] for anchor_from in ANCHORS}
    by_anchor = []
    for name, some in {"all": usual, **of_anchors}.items():
        if len({p.concept for p in some}) > 1:
            both = (correlation(some, measure) for measure in ("moved", "other"))
            by_anchor.append(f"| {name} | {len(some)} | {' | '.join(both)} |")
    denoising, _ = find("pocket").sampling
    rows = [f"| {p.concept} → {PAIRS[p.concept]} | {p.seed} | {p.anchor_from} | {p.steps} | {p.moved:.3f} "
            f"| {p.other:.3f} | {p.drift:.4f} | {p.ua:.2f} | {p.ra:.2f} |" for p in usual]  # fmt: skip
    high_lr = [f"| {p.lr:g} | {p.moved:.3f} | {p.drift:.3f} | {p.ua:.2f} | {p.ra:.2f} |" for p in ruined]
    (HERE / "moved.svg").write_text(scatter(usual))
    (HERE / "moved.md").write_text(
        f"""# Whether `moved` says what an audit finds

`python benchmarks/{Path(__file__).name}`, {date.today()}, {machine()}, Python {platform.python_version()};
`erase pocket` with `{" ".join(TRAINING)} --lr {LR:g}` and a mask of density 0.5;
the last measure of each run. Audits: UA on 50 prompts of the concept, RA on 45 of the other classes, {denoising}
denoising steps. {len(usual)} of {len(RUNS)} erasures were run.

Spearman's rank correlation of a measure with UA, with its 95 % bootstrap over pairs of class and seed. `moved` is
1 - |e(c) - g|² / |e_base(c) - e_base(c')|². With the anchor from the base, g is the base's prediction e_base(c'); with
the anchor from the current weights, g is the model's own e(c'). "The other goal" swaps the two.

| anchor from | erasures | moved | the other goal |
| --- | --- | --- | --- |
{chr(10).join(by_anchor)}

![UA against moved](moved.svg)

| moved | erasures | mean UA | least UA |
| --- | --- | --- | --- |
{chr(10).join(by_bin)}

## The drift of a ruined model

{next(iter(PAIRS))}, seed 0, {max(STEPS)} steps, with learning rates that are too high. The bound of `erase` on the
drift, {BOUND}, was lifted for these runs.

| lr | moved | drift | UA | RA |
| --- | --- | --- | --- | --- |
{chr(10).join(high_lr)}

## All erasures

| concept → anchor | seed | anchor from | steps | moved | the other goal | drift | UA | RA |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""
    )


def scatter(points: list[Point]) -> str:
    """UA against moved, a colour for each number of steps."""
    low, high = min(0, *(p.moved for p in points)), max(1, *(p.moved for p in points))
    colours = dict(zip(STEPS, ("#c9a227", "#a8441b", "#14746f"), strict=True))

    def x(moved: float) -> float:
        return 60 + 340 * (moved - low) / (high - low)

    def y(ua: float) -> float:
        return 250 - 220 * ua

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts += [f'<line x1="60" x2="400" y1="{y(tick)}" y2="{y(tick)}"/>',
                  f'<text x="52" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>',
                  f'<text x="{x(tick):.1f}" y="268" text-anchor="middle">{tick:g}</text>']  # fmt: skip
    for p in points:
        name = f"{p.concept}, seed {p.seed}, anchor from {p.anchor_from}, {p.steps} steps"
        place = f'cx="{x(p.moved):.1f}" cy="{y(p.ua):.1f}"'
        parts.append(f'<circle {place} r="4" fill="{colours[p.steps]}"><title>{name}</title></circle>')
    for n, (steps, colour) in enumerate(colours.items()):
        parts += [f'<circle cx="420" cy="{40 + 20 * n}" r="4" fill="{colour}"/>',
                  f'<text x="430" y="{44 + 20 * n}">{steps} steps</text>']  # fmt: skip
    parts += ['<text x="230" y="290" text-anchor="middle">moved</text>',
              '<text x="16" y="140" text-anchor="middle" transform="rotate(-90 16 140)">UA</text>']  # fmt: skip
    style = ("text { font: 12px system-ui, sans-serif; fill: #80868f } line { stroke: #80868f; stroke-opacity: .3 } "
             "circle { fill-opacity: .8 }")  # fmt: skip
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 500 300" width="500" height="300" role="img">\n'
            f"<style>{style}</style>\n" + "\n".join(parts) + "\n</svg>\n")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
