"""One audit against four shards of it that are merged; and how long a restart takes that finds all images there.

    python benchmarks/shards.py --out /tmp/shards

Runs `salun-sd evaluate` and `merge` as a person would, on the pocket checkpoint; writes benchmarks/shards.md. What is
there of an earlier run is measured anew. `--before FOLDER` restarts with the package of that folder, too.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from kept_rows import machine
from load import in_form_of_i2p
from PIL import Image, PngImagePlugin

from salun_sd.audit.detect import detector_name
from salun_sd.checkpoint.find import find
from salun_sd.draw import generate, prompts
from salun_sd.draw.sample import Row
from salun_sd.runtime import seals

OF = 4


class Took(NamedTuple):
    """Seconds by the clock, and of the processor, which do not grow if others use the machine, too."""

    clock: float
    processor: float

    def __str__(self) -> str:
        return f"{self.clock:.0f} ({self.processor:.0f})"


def run(*argv: object, package: Path | None = None) -> Took:
    """One command in a process of its own."""
    begun, paths = time.monotonic(), {"PYTHONPATH": str(package)} if package else {}
    process = subprocess.Popen([sys.executable, "-m", "salun_sd", *map(str, argv)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | paths)  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{shlex.join(map(str, argv))} ended with {os.waitstatus_to_exitcode(status)}")
    return Took(time.monotonic() - begun, used.ru_utime + used.ru_stime)


def shards(out: Path, rows: int, steps: int) -> str:
    """The lines of a table: an audit of so many rows, its shards one after another, and their merging."""
    source = in_form_of_i2p(out / f"{rows}.csv", rows)
    asked = ["evaluate", "pocket", "--prompts", source, "--size", 32, "--denoising-steps", steps]
    whole = run(*asked, "--out", out / "whole")
    parts = [run(*asked, "--shard", f"{n}/{OF}", "--out", out / f"shard-{n}") for n in range(1, OF + 1)]
    merging = run("merge", *(out / f"shard-{n}" for n in range(OF, 0, -1)), "--out", out / "merged")
    names = ("report.json", "report.html", "report.md")
    alike = [name for name in names if (out / "whole" / name).read_bytes() == (out / "merged" / name).read_bytes()]
    size = sum(file.stat().st_size for file in (out / "merged").rglob("*") if file.is_file())
    in_all = Took(*map(sum, zip(*parts, strict=True)))
    return f"""| one audit | the slowest shard | {OF} shards, in all | merge | bytes that merge wrote | the same bytes |
| --- | --- | --- | --- | --- | --- |
| {whole} | {max(parts)} | {in_all} | {merging} | {size:,} | {", ".join(alike) or "none"} |"""


def finished(folder: Path, source: Path) -> None:
    """Fill the folder of an audit as if all of its images were drawn, of 8 x 8 pixels, and nothing found in them."""
    (folder / "images").mkdir(parents=True)
    image, by = Image.linear_gradient("L").resize((8, 8)).convert("RGB"), detector_name()
    found = {"width": 8, "height": 8, "blank": False, "boxes": [], "predicted": None, "score": None}
    with (folder / "detections.jsonl").open("w", encoding="utf-8") as lines:
        for file, row in wanted(folder, source).items():
            info = PngImagePlugin.PngInfo()
            info.add_itxt(generate.PROVENANCE, generate.provenance_of(row, **settings(), dtype="float32"))
            image.save(file, "png", pnginfo=info)
            place = {"file": f"images/{file.name}", "case": int(file.stem.partition("_")[0]), "k": 0}
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            lines.write(seals.line(place | {"sha256": sha256, "detector": by, "classifier": None} | found))


def wanted(folder: Path, source: Path) -> dict[Path, Row]:
    rows = prompts.overridden(prompts.read(str(source)), None, (8, 8))
    return {folder / generate.file_of(p, 0): generate.row_of(p, 0, (8, 8)) for p in rows}


@cache
def settings() -> dict:
    model = find("pocket")
    return {"identity": model.identity, "scheduler": model.scheduler, "steps": model.sampling[0]}


def restarts(out: Path, images: int, before: Path | None) -> str:
    """The lines of a table: restarts of an audit whose images are all there."""
    source, folder, rows = in_form_of_i2p(out / f"{images}.csv", images), out / "finished", {}
    finished(folder, source)
    asked = ["evaluate", "pocket", "--prompts", source, "--size", 8, "--out", folder]
    if before:
        rows["before there were stamps"] = run(*asked, package=before)
    rows["the first, which opens each image and stamps it"] = run(*asked)
    rows["every other"] = run(*asked)
    files = wanted(folder, source)
    for what in ("of it, the look for missing images", "the same where no image is stamped"):
        begun, used = time.monotonic(), time.process_time()
        if generate.missing(files, **settings()):
            raise SystemExit("images are missing")
        rows[what] = Took(time.monotonic() - begun, time.process_time() - used)
        (folder / "images" / ".stamps-0").unlink()
    return "\n".join(
        ["| restart | seconds |", "| --- | --- |", *(f"| {what} | {took} |" for what, took in rows.items())]
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder for the audits.")],
    rows: Annotated[int, typer.Option(help="Of the audit that is divided.")] = 10_000,
    steps: Annotated[int, typer.Option(help="Denoising steps of these.")] = 2,
    images: Annotated[int, typer.Option(help="That a restart finds.")] = 100_000,
    before: Annotated[
        Path | None, typer.Option(help="Folder of another salun_sd, for a restart to compare with.")
    ] = None,
) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    of_restarts = restarts(out, images, before)
    print(of_restarts, flush=True)
    of_shards = shards(out, rows, steps)
    print(of_shards, flush=True)
    Path(__file__).with_suffix(".md").write_text(
        f"""# Shards and restarts

`python benchmarks/{Path(__file__).name} {shlex.join(sys.argv[1:])}`
{date.today()}, {machine()}, PyTorch {torch.__version__}; the pocket checkpoint. Seconds by the clock, and in brackets
those of the processor.

{rows:,} rows at 32 x 32 pixels in {steps} denoising steps, as one audit, and as {OF} shards one after another:

{of_shards}

An audit whose {images:,} images, of 8 x 8 pixels, are all there, and a line on each. `evaluate` from its start to the
report:

{of_restarts}
"""
    )


if __name__ == "__main__":
    typer.run(main)
