"""Attacks on erasures of pocket's classes: beside the base, a control, and a model that was trained without the class.

    python -m salun_sd.pocket.train --data /usr/share/datasets/fashion-mnist --without sneaker --out /tmp/no-sneaker
    python benchmarks/attacks.py --out /tmp/attacks --concept sneaker --floor /tmp/no-sneaker

Runs the commands that a person would type. Each row, an attack on an erasure, is kept in benchmarks/attacks.jsonl, and
benchmarks/attacks.md and attacks.svg are written from all of them. A row that is there is not measured again. What is
found in base and floor serves all erasures of a class.
"""

import json
import platform
import shlex
import shutil
from collections import defaultdict
from datetime import date
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Annotated, NamedTuple

import kept_rows
import typer
from methods import RUNS, erase

from salun_sd.attacks.catalog import ATTACKS
from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.cli.demo import photo_of
from salun_sd.draw import prompts
from salun_sd.draw.prompts import Prompt
from salun_sd.pocket.fashion import CLASSES

HERE = Path(__file__).parent
ROWS = HERE / "attacks.jsonl"
# name => a run of methods.py, and its support where it is not the published one
ERASURES = {"salun": ("salun", None), "salun:5": ("salun:5", None), "salun:base": ("salun:base", None),
            "salun:paper": ("salun:paper", None), "no mask": ("salun", "none"),
            "salun:base, no mask": ("salun:base", "none"), "esd": ("esd", None), "uce": ("uce", None)}  # fmt: skip
PROMPTS, OTHERS = 16, 3  # prompts of the class, and of each other one
SHARED = ("base", "floor", "floor-control")  # sides that do not depend on the erasure, but for its mask


class Row(NamedTuple):
    """An attack on an erasure: shares of prompts. None where there was no such side."""

    concept: str
    erasure: str
    attack: str
    budget: str
    seed: int
    prompts: int
    tries: int
    pre: float  # without attack
    asr: float
    fresh: float | None
    control: float
    base: float | None  # the prompts do not name the concept; None for an attack that does not look for it
    base_pre: float | None
    floor: float
    floor_pre: float
    floor_control: float
    over_floor: list[float]  # 95 % interval of asr - floor, paired
    seconds: float | None  # of the whole command, over the number of attacks
    fingerprint: str  # of the floor's UNet
    machine: str = kept_rows.FORMER


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and what the attacks find.")],
    concept: Annotated[str, typer.Option(help="A class.")],
    floor: Annotated[Path, typer.Option(help="A pocket checkpoint that was trained without the class.")],
    erasure: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ERASURES)}. Default: all.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Default: all that can run.")] = None,
    budget: Annotated[str, typer.Option(help="As of salun-sd attack.")] = "quick",
    seed: Annotated[int, typer.Option(help="Of erasure and search.")] = 0,
) -> None:
    for name in erasure or ERASURES:
        measure(out, concept, name, floor, attack or [], budget, seed)
        write(kept_rows.read(ROWS, Row))


def measure(out: Path, concept: str, erasure: str, floor: Path, attacks: list[str], budget: str, seed: int) -> None:
    """Erase a class and attack it, unless there are such rows."""
    known = {row.attack for row in kept_rows.read(ROWS, Row) if row[:2] + row[3:5] == (concept, erasure, budget, seed)}
    wanted = [name for name in attacks if name not in known]
    if known and not wanted:
        return
    here = out / f"{concept}-{erasure}-{budget}-{seed}".replace(" ", "_").replace(":", "_")
    shared = out / f"{concept}-shared-{budget}-{seed}"
    run, support = ERASURES[erasure]
    mask = ["--mask", support] if support else []
    erase(concept, run, [*mask, *shlex.split(RUNS[run])], seed, here / "erased")
    attacked = here / "attacked"
    if shared.exists() and not attacked.exists():
        shutil.copytree(shared, attacked)
    begun = monotonic()
    own_mask = ["--mask", str(here / "erased.run" / "mask.safetensors")]
    has_use = run.startswith("salun") and not support and (not wanted or "positions" in wanted)
    (here / "prompts.csv").write_text(prompts.as_csv(some_prompts(concept)))
    cli.run(["attack", str(here / "erased"), "--concept", photo_of(concept), "--concept-class", concept,
             "--prompts", str(here / "prompts.csv"), "--limit", str(PROMPTS), "--base", "pocket",
             "--floor", str(floor), "--detector", "none",
             *(own_mask if has_use else []), *(word for name in wanted for word in ("--with", name)),
             "--budget", budget, "--seed", str(seed), *kept_rows.FLOAT32, "--out", str(attacked)])  # fmt: skip
    seconds, report = monotonic() - begun, json.loads((attacked / "report.json").read_text())
    if not shared.exists():
        sides = [
            path for side in SHARED for path in attacked.glob(f"attacks/*/{side}") if "positions" not in path.parts
        ]
        for folder in [attacked / "against", *sides]:
            shutil.copytree(folder, shared / folder.relative_to(attacked))
    entries = report["attacks"]["of"]
    for name, entry in entries.items():
        if name not in known:
            where = {"fingerprint": find(str(floor)).fingerprint[:16], "machine": kept_rows.machine()}
            where["seconds"] = kept_rows.on_cpu(round(seconds / len(entries)))
            kept_rows.add(ROWS, Row(concept, erasure, name, budget, seed, **of_sides(entry), **where))


def some_prompts(concept: str) -> list[Prompt]:
    """The first prompts of a class, and fewer of each other class: the base's images of these are what `benign` trains
    on."""
    rows = prompts.read("pocket")
    of = {name: [p for p in rows if p.label == name][: PROMPTS if name == concept else OTHERS] for name in CLASSES}
    return [p for some in of.values() for p in some]


def of_sides(entry: dict) -> dict:
    """What a row has of an attack's entry in the report."""

    def rate(side: str, key: str) -> float | None:
        share = entry["sides"].get(side, {}).get(key)
        return share and share["rate"]

    return {
        "prompts": entry["sides"]["model"]["asr"]["of"], "tries": entry["tries"], "pre": rate("model", "pre"),
        "asr": rate("model", "asr"), "fresh": rate("model", "fresh"), "control": rate("control", "asr"),
        "base": rate("base", "asr"), "base_pre": rate("base", "pre"), "floor": rate("floor", "asr"),
        "floor_pre": rate("floor", "pre"), "floor_control": rate("floor-control", "asr"),
        "over_floor": entry["paired"]["floor"]["ci95"],
    }  # fmt: skip


def write(rows: list[Row]) -> None:
    by_class = defaultdict(lambda: defaultdict(dict))  # class, budget, seed => attack => erasure => row
    for row in rows:
        by_class[row.concept, row.budget, row.seed][row.attack][row.erasure] = row
    (HERE / "attacks.md").write_text(
        f"""# Attacks on erasures of the pocket checkpoint's classes

`python benchmarks/{Path(__file__).name} --out DIR --concept CLASS --floor MODEL`, {date.today()}, Python
{platform.python_version()}; {kept_rows.machines(rows)}: one thread, or the
GPU. In all {sum(row.seconds or 0 for row in rows) / 3600:.1f} hours for the attacks, without those on a GPU.

Each class is erased towards the next one, with the options that [methods.md](methods.md) names. The floor is `python -m
salun_sd.pocket.train --without CLASS`: text encoder and UNet trained anew without the class, as long as the base and
with the same seed; the VAE is the base's. A number is the share of prompts with an image that the pocket judge takes
for the class, among the image without attack and those of all tries (of an attack in stages: at the last one). Under
"base", the prompts say "thing" in place of the class: an attack that does not reach the class there says nothing. In
brackets, the control: as many random tries. All rows are in [attacks.jsonl](attacks.jsonl), with their intervals.

![Success of each attack; a grey stroke is the floor](attacks.svg)

The picture has the means over the classes, of the erasures that were attacked in each class.

{"".join(table(key, attacks) for key, attacks in by_class.items())}
"""
    )
    (HERE / "attacks.svg").write_text(picture(rows))


def table(key: tuple, attacks: dict[str, dict[str, Row]]) -> str:
    concept, budget, seed = key
    names = [name for name in ERASURES if any(name in of for of in attacks.values())]
    lines = []
    for attack, of in attacks.items():
        one = next(iter(of.values()))
        cells = [f"{of[name].asr:.2f} ({of[name].control:.2f})" if name in of else "" for name in names]
        kind = ATTACKS[attack].of(budget)
        effort = f"at {kind.labels()[-1]}" if kind.labels() and kind.counts_last else f"best of {one.tries}"
        base = "" if one.base is None or not kind.searches else f"{one.base:.2f} (before: {one.base_pre:.2f})"
        lines.append(f"| {attack}, {effort} | {base} "
                     f"| {one.floor:.2f} ({one.floor_control:.2f}) | {' | '.join(cells)} |\n")  # fmt: skip
    first = next(iter(next(iter(attacks.values())).values()))
    return (
        f"## {concept}, --budget {budget}, seed {seed}\n\n{first.prompts} prompts; the floor's UNet is "
        f"{first.fingerprint}.\n\n| attack | base | floor | {' | '.join(names)} |\n"
        f"| --- | --- | --- |{' --- |' * len(names)}\n{''.join(lines)}\n"
    )


def picture(rows: list[Row]) -> str:
    """A line for each attack, with the means over the classes: a stroke for the floor, a dot for each erasure that was
    attacked in all of them."""
    attacks, classes = list(dict.fromkeys(row.attack for row in rows)), {row.concept for row in rows}
    names = [name for name in ERASURES if {row.concept for row in rows if row.erasure == name} == classes]
    step, left, width = 26, 130, 620
    hues = ("#0969da", "#0a9396", "#54aeff", "#cf222e", "#8250df", "#c297ff", "#bf8700", "#1a7f37")
    colours = dict(zip(ERASURES, hues, strict=True))
    marks = []
    for n, attack in enumerate(attacks):
        y = 56 + n * step
        some = [row for row in rows if row.attack == attack]
        floor = left + width * mean({row.concept: row.floor for row in some}.values())
        marks += [f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{attack}</text>',
                  f'<path d="M{left} {y}H{left + width}" stroke="#8886"/>',
                  f'<path d="M{floor:.0f} {y - 9}V{y + 9}" stroke="#888" stroke-width="3"/>']  # fmt: skip
        for name in names:
            of = {row.concept: row.asr for row in some if row.erasure == name}
            if of.keys() == classes:
                x = left + width * mean(of.values())
                marks.append(f'<circle cx="{x:.0f}" cy="{y}" r="5" fill="{colours[name]}" fill-opacity="0.8"/>')
    for n, name in enumerate(names):
        x, y = left + 160 * (n % 4), 14 + 16 * (n // 4)
        marks.append(
            f'<circle cx="{x}" cy="{y}" r="5" fill="{colours[name]}"/><text x="{x + 10}" y="{y + 4}">{name}</text>'
        )
    height = 76 + step * len(attacks)
    ticks = [f'<text x="{left + width * share:.0f}" y="{height - 8}" text-anchor="middle">{share:g}</text>'
             for share in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 40} {height}" fill="#888" '
            f'font-family="sans-serif" font-size="12">\n' + "\n".join([*marks, *ticks]) + "\n</svg>\n")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
