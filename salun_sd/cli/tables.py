"""What the commands print: results on stdout, times and memory on stderr."""

import logging
import os
import time

import rich.table
from rich.console import Console

from salun_sd.cli.streams import print_lines
from salun_sd.runtime.escape import line, visible

logger = logging.getLogger(__name__)


class Table(rich.table.Table):
    """A table whose control characters are visible ones. Only in a cell after the first, a line break stays one."""

    def add_column(self, header="", *args, **kwargs):
        super().add_column(line(header), *args, **kwargs)

    def add_row(self, name, *cells, **kwargs):
        super().add_row(line(name), *map(visible, cells), **kwargs)


def show(table: Table) -> None:
    """Print a table. Names and paths in it are printed as they are: rich would read markup and emoji codes in them. A
    name that is too long for its column goes on in the next line: its end may be what tells two models apart."""
    for column in table.columns:
        column.overflow = "fold"
    colors = None if os.environ.get("NO_COLOR") else "auto"  # rich's own NO_COLOR leaves bold letters
    Console(markup=False, emoji=False, color_system=colors).print(table)


def gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"


def show_masks(result) -> None:
    """How much of each block the masks keep, and the mask files."""
    from salun_sd.core.mask import kept
    from salun_sd.edit.maskfile import kept_per_block

    masks = [mask for _, mask in result.files]
    table = Table("block", "weights", *(f"density {mask.settings['density']:g}" for mask in masks), box=None)
    by_block = [kept_per_block(mask.bits) for mask in masks]
    for block, (_, total) in by_block[0].items():
        table.add_row(block, f"{total:,}", *(f"{counts[block][0] / total:.3f}" for counts in by_block))
    totals = [kept(mask.bits) for mask in masks]
    table.add_row("all", f"{totals[0][1]:,}", *(f"{count / total:.3f}" for count, total in totals))
    show(table)
    for (path, mask), (count, total) in zip(result.files, totals, strict=True):
        print_lines(f"{path}: {count:,} of {total:,} weights, threshold {mask.settings['threshold']:.4g}")
    show_run(result.run)


def show_erased(record: dict, out, is_new: bool) -> None:
    """What an erasure changed and what it wrote; where it `is_new`, also the memory and time of its run."""
    from salun_sd.checkpoint.provenance import run_folder
    from salun_sd.edit import deliver

    changed, kept = record["changed"], record["mask"]["kept"]
    print_lines(f"changed {changed['inside']:,} of {kept:,} weights inside the mask, {changed['outside']} outside")
    sizes = ", ".join(f"{format} {megabytes(size)}" for format, size in record["sizes"].items())
    print_lines(f"sizes by --format: {sizes}; on disk {megabytes(deliver.size_on_disk(out))}")
    steps = record["probe"]["step"] if record.get("probe") else record["settings"]["steps"]
    done = "solved in closed form" if steps is None else f"{steps} steps"
    kept = "mask" if steps is None else "mask and losses"
    print_lines(f"{out}: {done}; {kept}, for you alone: {run_folder(out)}")
    if is_new and (run := deliver.run_of(out)):
        show_run(run)


def show_pushed(pushed) -> None:
    """The files that were sent, or would be, and the address."""
    table = Table("file", "bytes", box=None)
    for name, size in pushed.files.items():
        table.add_row(name, f"{size:,}")
    show(table)
    total = megabytes(sum(pushed.files.values()))
    print_lines(f"{pushed.url or 'Nothing was sent'}: {len(pushed.files)} files, {total}")


def show_run(run: dict) -> None:
    """The memory and time of a run, and the planned memory; on stderr, as they differ from run to run."""
    for step, size in run["peak_bytes"].items():
        planned = run["planned_bytes"].get(step)
        plan = f"; planned {gib(planned)}" if planned else ""
        logger.info(f"peak memory, {step}: {gib(size)}{plan}")
    logger.info(f"{run['seconds']:.0f} s")


def show_plan(plan) -> None:
    """What --dry-run prints: settings, the memory of each step and, where it does not fit, options that lower it."""
    from salun_sd.runtime import memory
    from salun_sd.runtime.device import default_device

    table = Table("setting", "value", box=None)
    for name, value in plan.settings.items():
        table.add_row(name, line(value))
    show(table)
    for step, sizes in plan.plans.items():
        table = Table(f"memory, {step}", "GiB", box=None)
        for what, size in [*sizes.items(), ("in all", sum(sizes.values()))]:
            table.add_row(what, f"{size / 2**30:.2f}")
        show(table)
    if plan.disk:
        table = Table("on the disk", "MB", box=None)
        for what, size in plan.disk.items():
            table.add_row(what, f"{size / 1e6:,.1f}")
        show(table)
    free = gib(memory.available(default_device()))
    print_lines(f"The memory {'is enough' if plan.fits else 'is too small'}: {free} are free.")
    for options, size in plan.advice:
        print_lines(f"with {options}: {gib(size)}, without what the program holds already")


def show_audit(report: dict) -> None:
    """The metrics of an audit, with the base's in a column beside them; the rates of attacks, of all their sides."""
    from salun_sd.audit.bounds import rates_of_attacks
    from salun_sd.report.words import in_words, rate

    columns = {str(report["model"]): report}
    if report["against"]:
        columns[f"base: {report['against']['model']}"] = report["against"]
    table = Table("metric", *columns, box=None)
    for name in report["metrics"]:
        table.add_row(name, *(rate(side["metrics"][name]) for side in columns.values()))
    for name in report["concepts"] if len(report["concepts"]) > 1 else ():
        table.add_row(f"ua of {name}", *(rate(side["concepts"][name]["ua"]) for side in columns.values()))
    for name in report["quality"]:
        if any(side["quality"][name] for side in columns.values()):
            table.add_row(name, *(in_words(side["quality"][name]) for side in columns.values()))
    for name, share in rates_of_attacks(report).items():
        table.add_row(name, rate(share))
    show(table)


def show_compared(tables) -> None:
    """Audits side by side: one table for each prompt set."""
    from salun_sd.audit import forms

    for each in tables:
        for sentence in (each.prompts, *forms.sentences(each)):
            print_lines(sentence)
        table = Table("metric", *(column.name for column in each.columns), box=None)
        for name, *cells in forms.lines(each):
            table.add_row(name, *(cell.replace(" [", "\n[").replace(" (", "\n(") for cell in cells))
        show(table)


def show_entries(entries) -> None:
    """The content of the cache."""
    table = Table("kept", "of", "files", "size", "last used", "folder", box=None)
    for entry in entries:
        day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        table.add_row(entry.kind, entry.about, f"{entry.files:,}", megabytes(entry.bytes), day, entry.name)
    show(table)
