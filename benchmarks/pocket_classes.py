"""Erase each class of the pocket checkpoint in turn, anchor the next class, and audit every one on the same seeds.

    python benchmarks/pocket_classes.py --out /tmp/classes --density 0.5 --density 0.1

Runs the commands that a person would type. Writes benchmarks/pocket_classes.md (the table, its command and machine)
and docs/pocket.png (the first concept: base row above erased row). Run again to go on where it stopped.
"""

import json
import platform
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from kept_rows import machine
from PIL import Image

from salun_sd.audit.measure import measure
from salun_sd.cli import app as cli
from salun_sd.cli.demo import POCKET_TRAINING, audit_prompts, photo_of
from salun_sd.draw import prompts
from salun_sd.edit.deliver import run_of
from salun_sd.report.words import rate

HERE = Path(__file__).parent


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def picture(audit: Path, base: Path, cases: list[int], file: Path) -> None:
    """Two rows of images, the base's above the erased checkpoint's, three times as large."""
    side = 96
    sheet = Image.new("RGB", (side * len(cases), 2 * side + 4), "white")
    for column, case in enumerate(cases):
        for row, folder in enumerate((base, audit)):
            image = Image.open(folder / "images" / f"{case}_0.png").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (side * column, (side + 4) * row))
    file.parent.mkdir(exist_ok=True)
    sheet.save(file)


def main(
    out: Annotated[Path, typer.Option(help="Folder for masks, checkpoints and audits.")],
    density: Annotated[list[float], typer.Option(help="Share of weights to keep; several for several rows.")],
    first: Annotated[str, typer.Option(help="The class to begin with.")] = "sneaker",
) -> None:
    rows = prompts.read("pocket")
    classes = list(dict.fromkeys(p.label for p in rows))
    classes = classes[classes.index(first) :] + classes[: classes.index(first)]
    base = out / "base"
    cli.run(["evaluate", "pocket", "--prompts", "pocket", "--out", str(base)])
    of_base = json.loads((base / "report.json").read_text())
    base_manifest, base_detections = (read_lines(base / f"{name}.jsonl") for name in ("manifest", "detections"))

    table = []
    pairs = list(zip(classes, classes[1:] + classes[:1], strict=True))
    runs = [(*pair, d) for d in density for pair in pairs]
    for concept, anchor, d in sorted(runs, key=lambda run: run[0] != first):  # the first class at every density first
        here = out / concept.replace(" ", "-")
        mask, erased, audit = here / f"mask-{d:g}.safetensors", here / f"erased-{d:g}", here / f"audit-{d:g}"
        asked, to_forget = audit_prompts(rows, concept), ["--concept", photo_of(concept), "--samples", "200"]
        here.mkdir(parents=True, exist_ok=True)
        (here / "prompts.csv").write_text(prompts.as_csv(asked))
        if not mask.exists():
            cli.run(["mask", "pocket", *to_forget, "--density", f"{d:g}", "--out", str(mask)])
        cli.run(["erase", "pocket", *to_forget, "--anchor", photo_of(anchor), "--mask", str(mask),
                 *POCKET_TRAINING, "--out", str(erased)])  # fmt: skip
        cli.run(["evaluate", str(erased), "--prompts", str(here / "prompts.csv"), "--out", str(audit)])
        after = json.loads((audit / "report.json").read_text())["metrics"]
        of_case = [{line["case"]: line for line in lines} for lines in (base_manifest, base_detections)]
        before = measure(*([lines[p.case] for p in asked] for lines in of_case), [concept])["metrics"]
        record = json.loads((erased / "salun.json").read_text())
        changed, seconds = record["changed"], run_of(erased)["seconds"]
        table.append(
            f"| {concept} → {anchor} | {d:g} | {rate(after['ua'])} | {rate(after['ra'])} "
            f"| {rate(before['ra'])} | {changed['inside']:,} | {changed['outside']} | {seconds:.0f} |"
        )
        if concept == first and d == density[0]:
            some = [p.case for p in asked if p.label == concept][:4]
            some += [next(p.case for p in asked if p.label == other) for other in classes if other != concept]
            picture(audit, base, some, HERE.parent / "docs" / "pocket.png")
        write_table(table, of_base)


def write_table(table: list[str], of_base: dict) -> None:
    by_class = [f"| {name} | {rate(found)} |" for name, found in of_base["classes"].items()]
    (HERE / "pocket_classes.md").write_text(
        f"""# Classes of the pocket checkpoint, each erased in turn

`python benchmarks/{Path(__file__).name} {shlex.join(sys.argv[1:])}`
{date.today()}, {machine()}, Python {platform.python_version()}; `erase` with
`--samples 200 {shlex.join(POCKET_TRAINING)}`.

UA: share of the concept's 100 prompts whose image is not classified as it. RA: share of 180 prompts of the other
classes classified as what they ask for; beside it the base on the same prompts and seeds. Brackets: 95 % Wilson
interval. Changed: weights whose saved bytes differ from the base's, inside the mask and outside it. Seconds: the
whole `erase` command, drawing included where it was not cached.

| concept → anchor | density | UA | RA | RA of the base | changed inside | outside | seconds |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(table)}

The base on all 1,000 prompts of `pocket`, 100 a class: RA {rate(of_base["metrics"]["ra"])}; flagged by NudeNet,
wrongly, {rate(of_base["metrics"]["flag_rate"])}.

| class | classified as it |
| --- | --- |
{chr(10).join(by_class)}
"""
    )


if __name__ == "__main__":
    typer.run(main)
