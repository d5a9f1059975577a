"""An audit at I2P's size on this machine: time and peak memory by rows, kills at random moments, a folder of images.

    python benchmarks/load.py --out /tmp/load

Runs `salun-sd evaluate` as a person would, on the pocket checkpoint and a CSV file in I2P's form, made here, or on
I2P itself (`--i2p FILE`), at 32 pixels; writes benchmarks/load.md. What is there of an earlier run is measured anew.
"""

import csv
import filecmp
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from kept_rows import machine

from salun_sd.draw import prompts
from salun_sd.runtime.stamps import FILE as STAMPS

CATEGORIES = ("sexual", "violence", "shocking, hate", "self-harm", "illegal activity, harassment")
WORDS = ('a "portrait" of {}, oil on canvas', "{} ❤️‍🔥, highly detailed, 8k", "{}; <b>by night</b>", "{}")


class Took(NamedTuple):
    seconds: float
    peak: int  # bytes resident at the most, of the process or any that it waited for
    code: int


def in_form_of_i2p(file: Path, rows: int) -> Path:
    """A CSV with I2P's columns and oddities: a byte-order mark, an unnamed first column, quotes, commas, long seeds."""
    texts, drawn = [p.text for p in prompts.read("everyday")], random.Random(0)
    columns = ["", "prompt", "categories", "nudity_percentage", "evaluation_seed", "evaluation_guidance",
               "sd_image_width", "sd_image_height", "case_number"]  # fmt: skip
    with file.open("w", newline="", encoding="utf-8-sig") as f:
        lines = csv.writer(f)
        lines.writerow(columns)
        for case in range(rows):
            text = WORDS[case % len(WORDS)].format(texts[case % len(texts)])
            guidance = drawn.choice((7, 7, 7.5, 8, 10, 13))
            lines.writerow([case, text, CATEGORIES[case % len(CATEGORIES)], drawn.randrange(101),
                            drawn.getrandbits(32), guidance, 512, 512, case])  # fmt: skip
    return file


def evaluate(*options: object, kill_after: float | None = None) -> Took:
    """One `salun-sd evaluate` in a process of its own, killed after so many seconds if it still runs."""
    begun = time.monotonic()
    run = subprocess.Popen([sys.executable, "-m", "salun_sd", "evaluate", *map(str, options)],
                           stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    if kill_after is not None:
        time.sleep(kill_after)
        os.killpg(run.pid, signal.SIGKILL)
    _, status, used = os.wait4(run.pid, 0)
    return Took(time.monotonic() - begun, used.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))


def differing(a: Path, b: Path) -> list[str]:
    """Files that one folder lacks or has with other bytes."""
    files = [p for side in (a, b) for p in side.rglob("*") if p.is_file() and not STAMPS.fullmatch(p.name)]
    names = {str(p.relative_to(a if p.is_relative_to(a) else b)) for p in files}
    _, other, absent = filecmp.cmpfiles(a, b, names, shallow=False)
    return sorted(other + absent)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the audits.")],
    i2p: Annotated[Path | None, typer.Option(help="I2P's own file, in place of one that is made in its form.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Default: 500, 2000, 4703.")] = None,
    kills: Annotated[int, typer.Option(help="Of the first size.")] = 10,
    images: Annotated[int, typer.Option(help="Files in the folder for --images.")] = 10_000,
) -> None:
    rows = rows or [500, 2000, 4703]
    out.mkdir(parents=True, exist_ok=True)
    source = i2p or in_form_of_i2p(out / "prompts.csv", max(rows))
    for name in ("killed", "folder", *map(str, rows)):
        shutil.rmtree(out / name, ignore_errors=True)

    table, whole = [], []
    for n in rows:
        took = must(evaluate(*asked(source, n), "--out", out / str(n)))
        again = must(evaluate(*asked(source, n), "--out", out / str(n)))
        whole.append(took.seconds)
        page = (out / str(n) / "report.html").stat().st_size
        table.append(f"| {n:,} | {took.seconds:.0f} | {gib(took)} | {again.seconds:.0f} | {page / 1e6:.2f} |")
        print(table[-1], flush=True)

    moments, argv = random.Random(0), [*asked(source, rows[0]), "--out", out / "killed"]
    codes = [evaluate(*argv, kill_after=moments.uniform(2, whole[0] / 3)).code for _ in range(kills)]
    must(evaluate(*argv))
    odd = differing(out / str(rows[0]), out / "killed")

    folder, drawn = out / "folder" / "images", sorted((out / str(rows[-1]) / "images").iterdir())
    folder.mkdir(parents=True)
    for case in range(images):
        shutil.copyfile(drawn[case % len(drawn)], folder / f"{case}_0.png")
    many = in_form_of_i2p(out / "folder.csv", images)
    took = must(evaluate("--images", folder, "--prompts", many, "--out", out / "folder" / "audit"))

    killed = sum(code == -signal.SIGKILL for code in codes)
    Path(__file__).with_suffix(".md").write_text(
        f"""# An audit at I2P's size

`python benchmarks/{Path(__file__).name} {shlex.join(sys.argv[1:])}`
{date.today()}, {machine()}, PyTorch {torch.__version__}; the pocket checkpoint at 32 × 32 pixels, its own 25 steps.

`evaluate` from its start to the report, and the same command again, which finds all there:

| rows | seconds | peak, GiB | again, seconds | report.html, MB |
| --- | --- | --- | --- | --- |
{chr(10).join(table)}

{rows[0]:,} rows, killed (SIGKILL) at {killed} random moments of {kills} tried, then run to the end:
{"the same bytes in every file as undisturbed." if not odd else f"{len(odd)} files differ: {', '.join(odd[:5])}."}

{images:,} images given with `--images`: {took.seconds:.0f} s, {gib(took)} GiB.
"""
    )


def asked(source: Path, rows: int) -> list[object]:
    return ["pocket", "--prompts", source, "--size", 32, "--limit", rows]


def must(took: Took) -> Took:
    if took.code:
        raise SystemExit(f"evaluate ended with {took.code}")
    return took


def gib(took: Took) -> str:
    return f"{took.peak / 2**30:.2f}"


if __name__ == "__main__":
    typer.run(main)
