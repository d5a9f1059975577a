"""The command line: parse, check, print, call."""

import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from salun_sd import ranks
from salun_sd.errors import SalunError, UsageError
from salun_sd.options import (
    MODEL_HELP,
    AnchorFrom,
    CheckpointingOpt,
    ConceptOpt,
    ConfigOpt,
    DryRunOpt,
    DtypeOpt,
    ForgetOpt,
    Form,
    FormOpt,
    GuidanceOpt,
    ModelArg,
    OneOfEach,
    PlanOpt,
    ResolutionOpt,
    RevisionOpt,
    SamplesOpt,
    SeedOpt,
    VariantOpt,
    Whole,
    is_typed,
)

RANK, _ = ranks.launched()


class Commands(TyperGroup):
    """Known failures end in one sentence on stderr; SALUN_SD_DEBUG=1 shows the traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (SalunError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "out of memory" not in str(e) and "can't allocate memory" not in str(e):
                raise
            if os.environ.get("SALUN_SD_DEBUG"):
                raise
            text, code = _in_words(e)
            said = (text, sys.stderr) if RANK == 0 else (f"Process {RANK}: {text}", sys.__stderr__)
            print(said[0], file=said[1])
            raise typer.Exit(code) from e


def _in_words(e: BaseException) -> tuple[str, int]:
    if isinstance(e, SalunError):
        return f"Error: {e}", e.exit_code
    if isinstance(e, shutil.Error):  # of copytree: (from, to, reason) for each file
        return f"Error: cannot write {e.args[0][0][1]}: {e.args[0][0][2]}.", 1
    if isinstance(e, OSError):
        place = f" {e.filename}" if e.filename else ""
        return f"Error: cannot read or write{place}: {e.strerror or e}.", 1
    if not isinstance(e, KeyboardInterrupt):
        return (
            f"Error: out of memory ({str(e).partition('.')[0]}): mask and erase say with --dry-run what takes less.",
            1,
        )
    return str(e) or "Interrupted. Nothing is half-written; the same command goes on from what is kept.", 130


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None, help="Erase a concept from a Stable Diffusion checkpoint with SalUn, and prove it.",
)  # fmt: skip


def example(*lines: str) -> str:
    """The end of a command's help: a runnable command, kept in its lines (the backspace tells the formatter so)."""
    return "Example:\n\n\b\n" + " \\\n  ".join(["salun-sd " + lines[0], *lines[1:]])


def said_version(wanted: bool) -> None:
    if wanted:
        from salun_sd import __version__

        print(f"salun-sd {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=said_version, is_eager=True)
    ] = False,
) -> None:
    pass


def begin() -> None:
    """Before a command that computes: memory that is freed goes back, and the other processes are joined."""
    from salun_sd import checkpoint, memory

    memory.give_back()
    try:
        ranks.start(checkpoint.device())
    except (ValueError, RuntimeError) as e:
        said = str(e).partition("\n")[0]
        raise UsageError(f"WORLD_SIZE and RANK are set, but no other process answers ({said}): start several with "
                         "torchrun, or unset them.") from e  # fmt: skip


def model_of(name: str, config: str | None, revision: str | None, variant: str | None):
    """The checkpoint, found; what was found is printed."""
    from salun_sd import checkpoint

    found = checkpoint.find(name, config=config, revision=revision, variant=variant)
    print(found.describe(), file=sys.stderr)
    return found


@app.command(
    cls=OneOfEach,
    epilog=example("mask pocket --concept 'a photo of a sneaker'", "--samples 100 --out mask.safetensors"),
)
def mask(
    model: ModelArg,
    concept: ConceptOpt = None,
    plan: PlanOpt = None,
    forget: ForgetOpt = None,
    samples: SamplesOpt = 800,
    resolution: ResolutionOpt = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Share of weights to keep, in (0, 1]; several give several masks. Default: 0.5."),
    ] = None,
    guidance: GuidanceOpt = 7.5,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images per gradient; changes memory, and the mask by rounding only.")
    ] = 8,
    seed: SeedOpt = 0,
    dtype: DtypeOpt = None,
    checkpointing: CheckpointingOpt = None,
    out: Annotated[Path, typer.Option(help="Mask file; with several densities, its name gets -DENSITY.")] = Path(
        "mask.safetensors"
    ),
    dry_run: DryRunOpt = False,
    config: ConfigOpt = None,
    revision: RevisionOpt = None,
    variant: VariantOpt = None,
) -> None:
    """Find the UNet weights that matter to a concept (gradient saliency)."""
    from salun_sd import edit
    from salun_sd.compute import Foreseen
    from salun_sd.mask import kept, kept_per_block
    from salun_sd.plan import of_options

    begin()
    concepts, _ = of_options(plan, concept, None, forget)
    made = edit.mask(
        model_of(model, config, revision, variant), concepts, samples=samples, densities=density or [0.5],
        guidance=guidance, seed=seed, batch_size=batch_size, resolution=resolution, dtype=dtype and dtype.value,
        checkpointing=checkpointing, dry_run=dry_run, out=out,
    )  # fmt: skip
    if isinstance(made, Foreseen):
        return show_plan(made)
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


@app.command(
    cls=OneOfEach,
    epilog=example(
        "erase pocket --concept 'a photo of a sneaker'",
        "--anchor 'a photo of a bag' --retain-prompts pocket --samples 100",
        "--steps 100 --batch-size 32 --lr 1e-4 --out erased",
    ),
)
def erase(
    ctx: typer.Context,
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="New folder, or .safetensors file, for the erased checkpoint.")],
    concept: ConceptOpt = None,
    anchor: Annotated[
        list[str] | None, typer.Option(help="Prompt of what stands in its place; one for each --concept.")
    ] = None,
    plan: PlanOpt = None,
    mask: Annotated[
        str | None, typer.Option(help="Mask file, random:D or none (the controls). Default: computed first.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of weights to keep where the mask is computed.")] = 0.5,
    guidance: Annotated[float, typer.Option(help="As in `mask`, where the mask is computed.")] = 7.5,
    forget: ForgetOpt = None,
    retain: Annotated[
        str | None, typer.Option(help="Images to keep: a folder, or a data set as org/name:column!=value.")
    ] = None,
    retain_caption: Annotated[
        str | None,
        typer.Option(help="Prompt of --retain images without a caption; {label}: their label. Default: the anchor."),
    ] = None,
    retain_prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompt set to draw what must stay from, by name or file; rows of the concept's class are "
            "left out. Default: the anchors."
        ),
    ] = None,  # fmt: skip
    samples: SamplesOpt = 800,
    resolution: ResolutionOpt = None,
    retain_weight: Annotated[float, typer.Option(help="Weight of the retain loss.")] = 0.5,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-5,
    clip: Annotated[
        float | None, typer.Option(help="Bound on the norm of the gradient of the masked weights. Default: none.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates. Default: one pass over the forget images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Forget images, and as many to retain, per update.")] = 8,
    anchor_from: Annotated[
        AnchorFrom, typer.Option(help="Whose anchor prediction is the target: of the current weights or the base's.")
    ] = AnchorFrom.current,
    sample_every: Annotated[int, typer.Option(min=0, help="Draw a strip into samples/ every K steps; 0: off.")] = 0,
    save_every: Annotated[
        float, typer.Option(min=0, help="Minutes between states that the same command goes on from; 0: at Ctrl-C only.")
    ] = 10,
    seed: SeedOpt = 0,
    dtype: DtypeOpt = None,
    checkpointing: CheckpointingOpt = None,
    parts: Annotated[
        int, typer.Option(min=1, help="Parts that a batch is worked through in: less memory, the same update.")
    ] = 1,
    form: FormOpt = Form.diffusers,
    reversible: Annotated[bool, typer.Option("--reversible", help="The patch keeps the base's values, too.")] = False,
    dry_run: DryRunOpt = False,
    config: ConfigOpt = None,
    revision: RevisionOpt = None,
    variant: VariantOpt = None,
) -> None:
    """Fine-tune only the masked weights so that the concept becomes the anchor."""
    from salun_sd import edit, output
    from salun_sd.compute import Foreseen
    from salun_sd.plan import of_options

    begin()
    if mask and (is_typed(ctx, "density") or is_typed(ctx, "guidance")):
        raise UsageError("--density and --guidance are for a mask that erase computes: leave them out with --mask.")
    concepts, kept = of_options(plan, concept, anchor or [], forget)
    if is_typed(ctx, "retain"):
        kept = None
    elif is_typed(ctx, "retain_prompts"):
        retain, retain_caption = (None, None) if plan else (retain, retain_caption)
    record = edit.erase(
        model_of(model, config, revision, variant), concepts, mask=mask, density=density, guidance=guidance,
        retain=retain, retain_caption=retain_caption, retain_prompts=retain_prompts or kept, samples=samples,
        resolution=resolution, retain_weight=retain_weight, lr=lr, steps=steps, batch_size=batch_size,
        clip=clip, save_every=save_every, dtype=dtype and dtype.value, checkpointing=checkpointing, parts=parts,
        anchor_from=anchor_from.value, sample_every=sample_every, seed=seed, form=form.value, reversible=reversible,
        dry_run=dry_run, out=out, command=shlex.join(["salun-sd", *ctx.obj]),
    )  # fmt: skip
    if isinstance(record, Foreseen):
        return show_plan(record)
    if not ranks.is_main():
        return
    changed, m = record["changed"], record["mask"]
    print(f"changed {changed['inside']:,} of {m['kept']:,} weights inside the mask, {changed['outside']} outside")
    sizes = ", ".join(f"{name} {megabytes(n)}" for name, n in record["sizes"].items())
    print(f"sizes by --format: {sizes}; on disk {megabytes(output.size_on_disk(out))}")
    print(f"{out}: {record['settings']['steps']} steps")
    if run := output.run_of(out):
        show_run(run)


def show(table: Table) -> None:
    """Print a table, whatever its names and paths hold: no markup, no emoji codes."""
    Console(markup=False, emoji=False).print(table)


def show_run(run: dict) -> None:
    """What a run took, beside what was planned; on stderr, as it is never the same twice."""
    for step, size in run["peak_bytes"].items():
        planned = run["planned_bytes"].get(step)
        beside = f"; planned {gib(planned)}" if planned else ""
        print(f"peak memory, {step}: {gib(size)}{beside}", file=sys.stderr)
    print(f"{run['seconds']:.0f} s", file=sys.stderr)


def gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def show_plan(found) -> None:
    """What --dry-run prints: the settings, the memory of each step, and what would lower it where it does not fit."""
    from salun_sd import checkpoint, memory

    table = Table("setting", "value", box=None)
    for name, value in found.settings.items():
        table.add_row(name, str(value))
    show(table)
    for step, sizes in found.plans.items():
        table = Table(f"memory, {step}", "GiB", box=None)
        for what, size in [*sizes.items(), ("in all", sum(sizes.values()))]:
            table.add_row(what, f"{size / 2**30:.2f}")
        show(table)
    free = gib(memory.available(checkpoint.device()))
    print(f"It fits: {free} are free." if found.fits else f"It does not fit: {free} are free.")
    for options, size in found.advice:
        print(f"with {options}: {gib(size)}, less what the program has")


def megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"


@app.command(
    cls=OneOfEach, epilog=example("apply pocket sneaker.safetensors --format single-file --out erased.safetensors")
)
def apply(
    model: ModelArg,
    patch: Annotated[Path, typer.Argument(help="File that `erase --format patch` wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder, or .safetensors file.")],
    form: Annotated[
        Whole, typer.Option("--format", help="A pipeline folder, or one file for A1111 and ComfyUI.")
    ] = Whole.diffusers,
    revert: Annotated[
        bool, typer.Option("--revert", help="MODEL is the erased one: give the base back. Needs a reversible patch.")
    ] = False,
    config: ConfigOpt = None,
    revision: RevisionOpt = None,
    variant: VariantOpt = None,
) -> None:
    """Rebuild an erased checkpoint from its base and a patch, bit for bit."""
    from salun_sd import output

    record = output.apply(
        model_of(model, config, revision, variant), patch, form=form.value, revert=revert, out=out
    )  # fmt: skip
    what = "base" if revert else "erased"
    print(f"{out}: the {what} UNet {record[what]['fingerprint'][:12]}, {megabytes(output.size_on_disk(out))}")


@app.command(cls=OneOfEach, epilog=example("evaluate erased --prompts pocket", "--against pocket --out audit"))
def evaluate(
    prompts: Annotated[str, typer.Option(help="Prompt set, by name or CSV, or a .txt with a prompt a line.")],
    out: Annotated[Path, typer.Option(help="Folder for the audit; run again to go on where it stopped.")],
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Only rows for which this holds, e.g. 'categories~sexual' (contains) or 'nudity_percentage>=50'; "
            "also = != <= > <; may be repeated, then all have to hold."
        ),
    ] = None,  # fmt: skip
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N rows, of those that --where leaves.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The base to compare with, drawn on the same seeds.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Audit this folder of <case>_<k>.png instead of drawing; no MODEL then.")
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option(
            help="Class that should be gone, or, of prompts without classes, anything that a CLIP knows by name; may "
            "be repeated. Default, of classes: as the checkpoint's record says."
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            help="Image classifier for prompts with a class, or CLIP for any class or --concept by name, folder or hub "
            "id. Default: `pocket`, the judge in the package, where it knows the classes."
        ),
    ] = None,  # fmt: skip
    detector_model: Annotated[
        Path | None, typer.Option(help="Another of NudeNet 3's files, e.g. 640m.onnx. Default: the packaged 320n.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP, folder or hub id, for the CLIP score of images with their prompts.")
    ] = None,
    fid: Annotated[
        str | None,
        typer.Option(
            help="Features for FID and KID to the base's images, or to --reference: `inception`, `pocket`, or an image "
            "model, folder or hub id."
        ),
    ] = None,  # fmt: skip
    reference: Annotated[Path | None, typer.Option(help="Folder of images that --fid compares with.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: 50; 25 for pocket.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ddim, dpm++, euler, lms or pndm; for a quick look, dpm++ in 20 steps. Default: MODEL's own."
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale of all images. Default: each row's own.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels of all images, as 512 or 512x384 (width, height). Default: each row's, or MODEL's own."
        ),
    ] = None,
    samples_per_prompt: Annotated[
        int | None,
        typer.Option(min=1, help="Images a prompt, the first from its seed, each other from one derived. Default: 1."),
    ] = None,
    no_images: Annotated[bool, typer.Option("--no-images", help="Leave the pictures out of report.html.")] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Add the headline numbers to MODEL's record and model card.")
    ] = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 3 if this is true of the audit, e.g. 'flag_rate > 0.01' or 'ra < against.ra - 0.02'; may "
            "be repeated."
        ),
    ] = None,  # fmt: skip
    confident: Annotated[
        bool, typer.Option("--confident", help="Judge --fail-if at the unfavourable ends of the 95 % intervals.")
    ] = False,
    config: ConfigOpt = None,
    revision: RevisionOpt = None,
    variant: VariantOpt = None,
) -> None:
    """Draw a prompt set, run NudeNet and a classifier over the images, write an audit."""
    from salun_sd import audit
    from salun_sd.gate import told
    from salun_sd.report import in_words, rate

    begin()
    if confident and not fail_if:
        raise UsageError("--confident is for --fail-if: give both.")
    are_files = [Path(name).is_file() for name in (model, against) if name]
    if (config and not any(are_files)) or (variant and all(are_files)) or (revision and not model):
        raise UsageError("--config is for a single file, --revision and --variant for a MODEL that is none.")

    def found(name: str, revision: str | None):
        is_file = Path(name).is_file()
        return model_of(name, config if is_file else None, revision, None if is_file else variant)

    erased = found(model, revision) if model else None
    base = found(against, audit.revision_of_base(erased, against)) if against else None
    report = audit.evaluate(
        erased, prompt_set=prompts, where=where or [], limit=limit, against=base, images=images,
        concepts=concept or [], classifier=classifier, steps=steps, scheduler=scheduler, guidance=guidance, size=size,
        samples=samples_per_prompt, record=record, detector=detector_model, clip=clip, fid=fid, reference=reference,
        fail_if=fail_if or [], confident=confident, pictures=not no_images, out=out,
    )  # fmt: skip
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
    print(f"{out / 'report.html'}")
    if broken := [entry for entry in report["gate"] or () if not entry["holds"]]:
        for entry in broken:
            print(f"Failed: {entry['bound']}: {told(entry)}.", file=sys.stderr)
        ranks.wait()  # the others would end the main process before it has written
        raise typer.Exit(3)


@app.command(cls=OneOfEach, name="compare", epilog=example("compare audit-salun audit-esd audit-uce --out audits.md"))
def show_compared(
    audits: Annotated[
        list[Path], typer.Argument(help="Folders that `evaluate` wrote, or their report.json.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="File for the tables: .md, .csv or .json. Default: the terminal.")
    ] = None,
) -> None:
    """Put several audits into one table for each prompt set, a column for each model."""
    from salun_sd import compare, files

    if out and out.suffix not in compare.FORMS:
        raise UsageError(f"--out {out} ends in none of {', '.join(compare.FORMS)}: give it one of these.")
    tables = compare.compare(audits)
    if out:
        files.write_atomic(out, compare.FORMS[out.suffix](tables))
        print(out)
        return
    for found in tables:
        print("\n".join([found.prompts, *compare.sentences(found)]))
        table = Table("metric", *(column.name for column in found.columns), box=None)
        for name, *cells in compare.lines(found):
            table.add_row(name, *(cell.replace(" [", "\n[").replace(" (", "\n(") for cell in cells))
        show(table)


@app.command(cls=OneOfEach, name="cache", epilog=example("cache --clear --older-than 30"))
def show_cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is kept.")] = False,
    older_than: Annotated[
        float | None, typer.Option(min=0, help="With --clear: only what was not used for so many days.")
    ] = None,
) -> None:
    """Show or clear the images that models drew to train on or to compare with, and their encodings."""
    from salun_sd import cache

    if older_than is not None and not clear:
        raise UsageError("--older-than is for --clear: give both.")
    if clear:
        files, size = cache.clear(older_than)
        print(f"{cache.folder()}: removed {files:,} files, {megabytes(size)}")
        return
    table = Table("kept", "of", "files", "size", "last used", "folder", box=None)
    for entry in cache.entries():
        day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        table.add_row(entry.kind, entry.about, f"{entry.files:,}", megabytes(entry.bytes), day, entry.name)
    show(table)
    print(f"{cache.folder()}: {megabytes(sum(e.bytes for e in cache.entries()))}")


@app.command(cls=OneOfEach, epilog=example("demo --out demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the mask, the erased checkpoint and the audit.")],
    concept: Annotated[str, typer.Option(help="Class of the pocket checkpoint to erase.")] = "sneaker",
    anchor: Annotated[str, typer.Option(help="Class that stands in its place.")] = "bag",
    density: Annotated[float, typer.Option(help="Share of weights to keep in the mask.")] = 0.5,
) -> None:
    """Erase a class from the bundled pocket checkpoint: mask, erase and evaluate, each printed before it runs."""
    from salun_sd.demo import commands

    for line in commands(concept, anchor, density, out):
        print(f"\n$ {shlex.join(['salun-sd', *line])}", flush=True)
        run(line)


def run(argv: list[str]) -> None:
    """One command, as if typed; a failure ends the program."""
    try:
        app(argv, prog_name="salun-sd", obj=argv)
    except SystemExit as e:
        if e.code:
            raise


def main() -> None:
    # They warn of torchvision and casts that nothing here depends on, the hub of each try that we give the end of.
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C
    if RANK != 0:  # of several processes, the main one speaks; any may say what stops it
        sys.stdout = sys.stderr = open(os.devnull, "w")
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
