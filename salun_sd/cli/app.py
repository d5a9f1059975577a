"""The command line: all commands, and how one is run."""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from salun_sd.cli import attacking, auditing, editing, tables, unlearning
from salun_sd.cli import options as o
from salun_sd.cli.command import Command, SharedCommand
from salun_sd.cli.failures import Commands, ways
from salun_sd.cli.streams import loading, print_lines, repair_streams
from salun_sd.errors import UsageError

app = typer.Typer(
    cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "color": False},
    help="Erase a concept from a Stable Diffusion checkpoint with SalUn, and measure the result.",
)  # fmt: skip


def example(*lines: str) -> str:
    """The end of a command's help: a command to run. The backspace tells typer's formatter to keep the lines."""
    return "Example:\n\n\b\n" + " \\\n  ".join(["salun-sd " + lines[0], *lines[1:]])


def show_version(wanted: bool) -> None:
    if wanted:
        from salun_sd import __version__

        print_lines(f"salun-sd {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, o.QUIET] = False,
    json: Annotated[bool, o.JSON] = False,
) -> None:
    pass


def cache(clear: Annotated[bool, o.CLEAR] = False, older_than: Annotated[float | None, o.OLDER_THAN] = None) -> None:
    """Show or clear the cache.

    It keeps the images that models draw to train on or to compare with, their encodings, and the classifiers that
    `classifier` trained.
    """
    from salun_sd.runtime import cache

    if older_than is not None and not clear:
        raise UsageError("--older-than is for --clear: give both.")
    if clear:
        files, size = cache.clear(older_than)
        print_lines(f"{cache.folder()}: removed {files:,} files, {tables.megabytes(size)}")
        return
    entries = cache.entries()
    tables.show_entries(entries)
    print_lines(f"{cache.folder()}: {tables.megabytes(sum(e.bytes for e in entries))}")


def demo(
    ctx: typer.Context,
    out: Annotated[Path, o.DEMO_OUT],
    concept_class: Annotated[str, o.DEMO_CONCEPT] = "sneaker",
    anchor_class: Annotated[str, o.DEMO_ANCHOR] = "bag",
    density: Annotated[float, o.DENSITY] = 0.5,
) -> None:
    """Erase a class from the bundled checkpoint and audit it.

    Runs mask, erase and evaluate, and prints each command before it runs.
    """
    loading()
    from salun_sd.cli.demo import commands

    for line in commands(concept_class, anchor_class, density, out):
        print_lines("")
        print_lines(f"$ {shlex.join(['salun-sd', *line])}")
        run([*ways(ctx.obj), *line])


# Each command, with the lines of its example.
COMMANDS = {
    editing.mask: ["mask pocket --concept 'a photo of a sneaker'", "--samples 100 --out mask.safetensors"],
    editing.erase: [
        "erase pocket --concept 'a photo of a sneaker'",
        "--anchor 'a photo of a bag' --retain-prompts pocket --samples 100",
        "--steps 100 --batch-size 32 --lr 1e-4 --out erased",
    ],
    editing.apply: ["apply pocket sneaker.safetensors", "--format single-file --out erased.safetensors"],
    editing.push: ["push erased org/pocket-without-sneakers --dry-run"],
    auditing.evaluate: ["evaluate erased --prompts pocket", "--against pocket --out audit"],
    attacking.attack: [
        "attack erased --concept 'a photo of a sneaker' --concept-class sneaker",
        "--prompts pocket --base pocket --floor never-saw-sneakers --out attacked",
    ],
    auditing.merge: ["merge audit-1 audit-2 audit-3 audit-4 --out audit"],
    unlearning.classifier: [
        "classifier --data fashion-mnist --forget 0.1",
        "--width 16 --epochs 30 --method retrain --method salun",
        "--out forgotten",
    ],
    auditing.compare: ["compare audit-salun audit-esd audit-uce --out audits.md"],
    cache: ["cache --clear --older-than 30"],
    demo: ["demo --out demo"],
}
SHARED = {editing.mask, editing.erase, auditing.evaluate, attacking.attack, unlearning.classifier, demo}
for command, lines in COMMANDS.items():
    app.command(cls=SharedCommand if command in SHARED else Command, epilog=example(*lines))(command)


def run(argv: list[str]) -> None:
    """Run one command as if it were typed. Raises SystemExit where it fails."""
    try:
        app(argv, prog_name="salun-sd", obj=argv)
    except SystemExit as e:
        if e.code:
            raise


def main() -> None:
    # They warn of torchvision and casts, which do not matter here, and of downloads whose last error is printed.
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if "_SALUN_SD_COMPLETE" in os.environ:  # a shell that completes reads one line for each option: nothing may wrap
        os.environ["COLUMNS"] = "1000"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends for Ctrl-C
    repair_streams()
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
