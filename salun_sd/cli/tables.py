"""What the commands print: results as tables on stdout, times and memory on stderr."""

import sys
import time

from rich.console import Console
from rich.table import Table


def show(table: Table) -> None:
    """Print a table, whatever its names and paths hold: no markup, no emoji codes."""
    Console(markup=False, emoji=False).print(table)


def gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"


def show_masks(made) -> None:
    """How much of each block the masks keep, and where they are."""
    from salun_sd.core.mask import kept
    from salun_sd.edit.maskfile import kept_per_block

    table = Table("block", "weights", *(f"density {m.settings['density']:g}" for _, m in made.files), box=None)
    blocks = [kept_per_block(m.bits) for _, m in made.files]
    for block, (_, total) in blocks[0].items():
        table.add_row(block, f"{total:,}", *(f"{each[block][0] / total:.3f}" for each in blocks))
    totals = [kept(m.bits) for _, m in made.files]
    table.add_row("all", f"{totals[0][1]:,}", *(f"{n / of:.3f}" for n, of in totals))
    show(table)
    for (path, m), (n, of) in zip(made.files, totals, strict=True):
        print(f"{path}: {n:,} of {of:,} weights, threshold {m.settings['threshold']:.4g}")
    show_run(made.run)


def show_erased(record: dict, out) -> None:
    """What an erasure changed, and what it wrote."""
    from salun_sd.edit import deliver

    changed, m = record["changed"], record["mask"]
    print(f"changed {changed['inside']:,} of {m['kept']:,} weights inside the mask, {changed['outside']} outside")
    sizes = ", ".join(f"{name} {megabytes(n)}" for name, n in record["sizes"].items())
    print(f"sizes by --format: {sizes}; on disk {megabytes(deliver.size_on_disk(out))}")
    print(f"{out}: {record['settings']['steps']} steps")
    if run := deliver.run_of(out):
        show_run(run)


def show_run(run: dict) -> None:
    """What a run took, beside what was planned; on stderr, as it is never the same twice."""
    for step, size in run["peak_bytes"].items():
        planned = run["planned_bytes"].get(step)
        beside = f"; planned {gib(planned)}" if planned else ""
        print(f"peak memory, {step}: {gib(size)}{beside}", file=sys.stderr)
    print(f"{run['seconds']:.0f} s", file=sys.stderr)


def show_plan(plan) -> None:
    """What --dry-run prints: the settings, the memory of each step, and what would lower it where it does not fit."""
    from salun_sd.runtime import memory
    from salun_sd.runtime.device import default_device

    table = Table("setting", "value", box=None)
    for name, value in plan.settings.items():
        table.add_row(name, str(value))
    show(table)
    for step, sizes in plan.plans.items():
        table = Table(f"memory, {step}", "GiB", box=None)
        for what, size in [*sizes.items(), ("in all", sum(sizes.values()))]:
            table.add_row(what, f"{size / 2**30:.2f}")
        show(table)
    free = gib(memory.available(default_device()))
    print(f"It fits: {free} are free." if plan.fits else f"It does not fit: {free} are free.")
    for options, size in plan.advice:
        print(f"with {options}: {gib(size)}, beside what the program holds")


def show_audit(report: dict) -> None:
    """The metrics of an audit, the base's beside them."""
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
    show(table)


def show_compared(tables) -> None:
    """Audits side by side, a table for each prompt set."""
    from salun_sd.audit import compare

    for each in tables:
        print("\n".join([each.prompts, *compare.sentences(each)]))
        table = Table("metric", *(column.name for column in each.columns), box=None)
        for name, *cells in compare.lines(each):
            table.add_row(name, *(cell.replace(" [", "\n[").replace(" (", "\n(") for cell in cells))
        show(table)


def show_entries(entries) -> None:
    """What the cache holds."""
    table = Table("kept", "of", "files", "size", "last used", "folder", box=None)
    for entry in entries:
        day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        table.add_row(entry.kind, entry.about, f"{entry.files:,}", megabytes(entry.bytes), day, entry.name)
    show(table)
