"""SalUn's experiments with Stable Diffusion, from the masks to the attacks: one table, beside the published figures.

    python benchmarks/paper_sd.py --model MODEL --out DIR --dry-run
    python benchmarks/paper_sd.py --model MODEL --out DIR --rehearse
    python benchmarks/paper_sd.py --model MODEL --out DIR --captions coco_10k.csv --attack-prompts nudity.csv

Each step is a command that a person would type, in a process of its own. Type the same line again to go on: what is
finished is not run again, and what was stopped resumes. If a step fails, those that need its result are left out, and
the others go on. DIR/table.md has what was measured so far.

--rehearse runs the same steps with two images and two updates each, into DIR/rehearsal: does all of it run here? With
--model pocket, the concept is a dress, and no other model is needed. The protocol is in docs/sd15-nudity.md.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import kept_rows
import typer
from paper_tasks import POCKET, SD, Line, Step, Task

from salun_sd.audit import bounds, saved
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.mask import keep_count
from salun_sd.draw import prompts
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.files import check_place, write_atomic

SMALL = {  # what a rehearsal adds to each command
    "mask": "--samples 2",
    "erase": "--samples 2 --steps 2 --batch-size 2",
    "evaluate": "--denoising-steps 2 --limit 2",
    "attack": "--denoising-steps 2 --limit 1",
}
NEEDS = {"inception": ("torch_fidelity", "fid"), "imagenette-church": ("datasets", "datasets")}  # word: package, extra

START, INTERRUPTED = subprocess.Popen, 130  # what starts a process; the exit code at Ctrl-C


class Given(NamedTuple):
    """The options that change the commands."""

    captions: Path | None
    reference: Path | None
    attack_prompts: Path | None
    density: float
    parts: int
    rehearse: bool


class Row(NamedTuple):
    """A step that was run, once. It is finished if its exit code is 0."""

    step: str
    command: str
    seconds: float
    code: int


def main(
    model: Annotated[str, typer.Option(help="Stable Diffusion 1.x, as `salun-sd erase` takes it; or pocket.")],
    out: Annotated[Path, typer.Option(help="Folder for everything.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="A step, or all that begin so, such as nudity/default; or a pattern, such as '*/prefix'."),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Prompt set of other things, such as captions of COCO: for FID and CLIP score.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of images that FID compares with. Default: the base's images.")
    ] = None,
    attack_prompts: Annotated[
        Path | None, typer.Option(help="Prompt set to attack. Default: those of I2P with a nudity of 50 % or more.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the weights in the masks.")] = 0.5,
    parts: Annotated[int, typer.Option(min=1, help="Parts of a batch, as in `salun-sd erase`: less memory.")] = 1,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Two images, two updates: does all of it run?")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, and what they will take.")] = False,
    card: Annotated[
        float | None, typer.Option(min=1, help="With --dry-run: the plan for a GPU of so many GiB, and not for this.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="With --dry-run: 10^12 operations a second, sustained.")
    ] = None,
) -> None:
    given = Given(captions, reference, attack_prompts, density, parts, rehearse)
    try:
        base = checked(model, given)
        if (card or tflops) and (not dry_run or rehearse):
            raise UsageError("--card and --tflops are for the plan that --dry-run prints of the whole.")
        if card and not tflops:
            raise UsageError("--card says nothing of its speed: give --tflops, too.")
        tasks, out = POCKET if model == "pocket" else SD, out / "rehearsal" if rehearse else out
        steps = chosen([step for task in tasks for step in steps_of(task, model, out, given)], only or [])
        if not dry_run:
            check_inputs(steps)
            check_place(out / "table.md")
    except SalunError as e:
        print(f"Error: {e}", file=sys.stderr)
        raise typer.Exit(e.exit_code) from e
    if not dry_run:
        raise typer.Exit(run(steps, tasks, out))
    print("\n".join(f"$ {command(step)}" for step in steps))
    if not rehearse:
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it warns of casts
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import paper_plan

        machine = paper_plan.Machine.of(card, tflops)
        print("\n" + paper_plan.shown(steps, paper_plan.plans(steps, base, machine, density, parts), machine))


def checked(model: str, given: Given) -> Checkpoint:
    """The model. Raises UsageError or SalunError for what is wrong in the options."""
    keep_count(given.density, sys.maxsize)  # raises outside (0, 1]
    if given.reference and not given.captions:
        raise UsageError("--reference is what the images of --captions are compared with: give both.")
    if given.reference and not given.reference.is_dir():
        raise UsageError(f"--reference {given.reference} is no folder: give one with images.")
    base = find(model)
    if base.family.key != "sd1":
        raise UsageError(f"{model} is {base.family.name}, and these experiments are of Stable Diffusion 1.x: give such "
                         "a model, or pocket.")  # fmt: skip
    return base


def steps_of(task: Task, model: str, out: Path, given: Given) -> Iterator[Step]:
    """The steps of a task, in their order. The files of the user are for the task that has options for them."""

    def step(name: str, command: str, *words: str, prompts: int = 0) -> Step:
        few = task.few.get(name.rpartition("/")[2], "")
        small = shlex.split(f"{SMALL[command]} {few}") if given.rehearse else []
        place = f"{out / name}.safetensors" if command == "mask" else str(out / name)
        return Step(name, [command, *changed(words, small), "--out", place], task, prompts)

    share = f"{given.density:g}"
    mask = step(f"{task.name}/mask-{share}", "mask", model, *shlex.split(task.mask), "--density", share)
    yield mask
    audits, (attacked, count) = dict(task.audits), task.prompts
    if given.captions and task.captions:
        asked = ["--prompts", str(given.captions)] + (["--reference", str(given.reference)] if given.reference else [])
        audits["captions"] = f"{task.captions} {shlex.join(asked)}", len(prompts.read(str(given.captions)))
    if given.attack_prompts and task.captions:
        asked = ["--prompts", str(given.attack_prompts)]
        attacked, count = shlex.join(asked), len(prompts.read(str(given.attack_prompts)))
    parts = ["--parts", str(min(given.parts, 2) if given.rehearse else given.parts)] if given.parts > 1 else []
    for erasure, options in task.erasures.items():
        here = f"{task.name}/{erasure}"
        erase = step(f"{here}/erased", "erase", model, *shlex.split(options), "--mask", mask.out, *parts)
        yield erase
        for audit, (options, rows) in audits.items():
            yield step(
                f"{here}/{audit}", "evaluate", erase.out, *shlex.split(options), "--against", model, prompts=rows
            )
        for attack in task.attacks:
            yield step(f"{here}/{attack}", "attack", erase.out, *shlex.split(f"{task.attack} {attacked}"), "--with",
                       attack, "--base", model, "--budget", "quick" if given.rehearse else "paper",
                       prompts=count)  # fmt: skip


def changed(words: Sequence[str], small: Sequence[str]) -> list[str]:
    """A model and options, each with its value: with those of `small`, in place of those that they change."""
    first, *options = words
    pairs = zip(options[::2], options[1::2], strict=True)
    kept = [pair for pair in pairs if pair[0] == "--where" or pair[0] not in small]
    return [first, *(word for pair in kept for word in pair), *small]


def chosen(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps that one of the patterns names, in their order; all without a pattern."""
    for pattern in only:
        if not any(named(step, pattern) for step in steps):
            raise UsageError(f"--only {pattern} names no step: they are {', '.join(step.name for step in steps)}.")
    return [step for step in steps if not only or any(named(step, pattern) for pattern in only)]


def named(step: Step, pattern: str) -> bool:
    return fnmatch(step.name, pattern) or fnmatch(step.name, f"{pattern}/*")


def check_inputs(steps: Sequence[Step]) -> None:
    """Raise UsageError or SalunError where a step lacks a package or its prompts: a later one would say so days after
    the first."""
    words = {word for step in steps for word in step.argv}
    for word, (package, extra) in NEEDS.items():
        if word in words and not find_spec(package):
            raise UsageError(f"A step needs the package {package}: pip install 'salun-sd[{extra}]'")
    for asked in {step.argv[step.argv.index("--prompts") + 1] for step in steps if "--prompts" in step.argv}:
        prompts.read(asked)


def command(step: Step) -> str:
    return shlex.join(["salun-sd", *step.argv])


def run(steps: Sequence[Step], tasks: Sequence[Task], out: Path) -> int:
    """Run what is not finished, and write the table after each step; gives the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    rows, failed = out / "steps.jsonl", []
    finished = {row[:2] for row in kept_rows.read(rows, Row) if row.code == 0}
    for step in steps:
        lacks = any(other.makes and step.name.startswith(f"{other.makes}/") for other in failed)
        if lacks or (step.name, command(step)) in finished:
            continue
        print(f"\n$ {command(step)}", flush=True)
        begun, code = time.monotonic(), ended(step)
        kept_rows.add(rows, Row(step.name, command(step), round(time.monotonic() - begun, 1), code))
        write_atomic(out / "table.md", table(tasks, out))
        if code == INTERRUPTED:
            return code
        failed += [step] if code else []
    print(f"\n{out / 'table.md'}")
    for step in failed:
        print(f"{step.name} failed: type the same line again, and it goes on there.", file=sys.stderr)
    return int(bool(failed))


def ended(step: Step) -> int:
    """Run a step in a process of its own; its exit code. Ctrl-C reaches the process, which saves its state and ends."""
    stops: list[int] = []  # one that comes before the process listens ends it with another code
    before = signal.signal(signal.SIGINT, lambda number, _: stops.append(number))
    try:
        code = START([sys.executable, "-m", "salun_sd", *step.argv]).wait()
        return INTERRUPTED if code and stops else code
    finally:
        signal.signal(signal.SIGINT, before)


def table(tasks: Sequence[Task], out: Path | None) -> str:
    """What was measured below a folder, beside what was published; without a folder, the columns to be filled."""
    parts = []
    for task in tasks:
        rows = [["", "SalUn, published", "where, and how", "base", *task.erasures]]
        rows += [["---"] * len(rows[0]), *(cells(line, task, out) for line in task.lines)]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"### {task.name}, published and measured\n\n{lines}\n")
    return "\n".join(parts)


def cells(line: Line, task: Task, out: Path | None) -> list[str]:
    """The cells of a line. The base's number is that of the first audit that has it."""
    files = [out and out / task.name / erasure / line.step / "report.json" for erasure in task.erasures]
    reports = [saved.read(file).report if file and file.is_file() else None for file in files]
    own = [number(report, line.name, line.percent) for report in reports]
    of_base = next((number(report, line.of_base, line.percent) for report in reports if report and line.of_base), "")
    return [line.what, line.published, line.source, of_base, *own]


def number(report: dict | None, name: str, percent: bool) -> str:
    """A number of a report, with its 95 % interval."""
    if report is None:
        return ""
    if not (found := bounds.measured(report, name)):
        return "not measured"
    value, *ends = [f"{float(n * (100 if percent else 1)):.4g}" for n in (found.value, *(found.ci95 or ()))]
    return f"{value} [{', '.join(ends)}]" if ends else value


if __name__ == "__main__":
    typer.run(main)
