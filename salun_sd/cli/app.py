"""The command line: parse, check, print, call."""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from salun_sd.cli import options as o
from salun_sd.cli import tables
from salun_sd.cli.failures import RANK, Commands, show_log
from salun_sd.cli.options import Command, is_typed
from salun_sd.errors import UsageError
from salun_sd.runtime import ranks

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Erase a concept from a Stable Diffusion checkpoint with SalUn, and measure the result.",
)  # fmt: skip


def example(*lines: str) -> str:
    """The end of a command's help: a runnable command, kept in its lines (the backspace tells the formatter so)."""
    return "Example:\n\n\b\n" + " \\\n  ".join(["salun-sd " + lines[0], *lines[1:]])


def show_version(wanted: bool) -> None:
    if wanted:
        from salun_sd import __version__

        print(f"salun-sd {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def begin() -> None:
    """Before a command that computes: memory that is freed goes back, and the other processes are joined."""
    from salun_sd.runtime import memory
    from salun_sd.runtime.device import default_device

    memory.give_back()
    try:
        ranks.start(default_device())
    except (ValueError, RuntimeError) as e:
        reason = str(e).partition("\n")[0]
        raise UsageError(f"WORLD_SIZE and RANK are set, but no other process answers ({reason}): start several with "
                         "torchrun, or unset them.") from e  # fmt: skip


@app.command(
    cls=Command,
    epilog=example("mask pocket --concept 'a photo of a sneaker'", "--samples 100 --out mask.safetensors"),
)
def mask(
    model: o.ModelArg,
    concept: o.ConceptOpt = None,
    plan: o.PlanOpt = None,
    forget: o.ForgetOpt = None,
    samples: o.SamplesOpt = 800,
    size: o.TrainingSizeOpt = None,
    density: o.DensitiesOpt = None,
    saliency_guidance: o.SaliencyGuidanceOpt = 7.5,
    batch_size: o.GradientBatchOpt = 8,
    seed: o.SeedOpt = 0,
    dtype: o.DtypeOpt = None,
    checkpointing: o.CheckpointingOpt = None,
    out: o.MaskOutOpt = Path("mask.safetensors"),
    dry_run: o.DryRunOpt = False,
    config: o.ConfigOpt = None,
    revision: o.RevisionOpt = None,
    variant: o.VariantOpt = None,
) -> None:
    """Find the UNet weights that matter to a concept (gradient saliency)."""
    from salun_sd.edit import run as edit
    from salun_sd.edit.concepts import of_options
    from salun_sd.edit.resources import Foreseen

    begin()
    found = edit.mask(
        model, of_options(plan, concept, None)["concept"], forget=forget, samples=samples, size=size,
        density=density or 0.5, saliency_guidance=saliency_guidance, batch_size=batch_size, seed=seed,
        dtype=dtype and dtype.value, checkpointing=checkpointing, out=out, dry_run=dry_run, config=config,
        revision=revision, variant=variant,
    )  # fmt: skip
    tables.show_plan(found) if isinstance(found, Foreseen) else tables.show_masks(found)


@app.command(
    cls=Command,
    epilog=example(
        "erase pocket --concept 'a photo of a sneaker'",
        "--anchor 'a photo of a bag' --retain-prompts pocket --samples 100",
        "--steps 100 --batch-size 32 --lr 1e-4 --out erased",
    ),
)
def erase(
    ctx: typer.Context,
    model: o.ModelArg,
    out: o.ErasedOutOpt,
    concept: o.ConceptOpt = None,
    anchor: o.AnchorOpt = None,
    plan: o.PlanOpt = None,
    mask: o.MaskOpt = None,
    density: o.DensityOpt = 0.5,
    saliency_guidance: o.SaliencyGuidanceOpt = 7.5,
    forget: o.ForgetOpt = None,
    retain: o.RetainOpt = None,
    retain_caption: o.RetainCaptionOpt = None,
    retain_prompts: o.RetainPromptsOpt = None,
    samples: o.SamplesOpt = 800,
    size: o.TrainingSizeOpt = None,
    retain_weight: o.RetainWeightOpt = 0.5,
    lr: o.LrOpt = 1e-5,
    clip: o.ClipOpt = None,
    steps: o.StepsOpt = None,
    batch_size: o.BatchSizeOpt = 8,
    anchor_from: o.AnchorFromOpt = o.AnchorFrom.current,
    sample_every: o.SampleEveryOpt = 0,
    save_every: o.SaveEveryOpt = 10,
    seed: o.SeedOpt = 0,
    dtype: o.DtypeOpt = None,
    checkpointing: o.CheckpointingOpt = None,
    parts: o.PartsOpt = 1,
    format: o.FormatOpt = o.Format.diffusers,
    reversible: o.ReversibleOpt = False,
    dry_run: o.DryRunOpt = False,
    config: o.ConfigOpt = None,
    revision: o.RevisionOpt = None,
    variant: o.VariantOpt = None,
) -> None:
    """Fine-tune only the masked weights so that the concept becomes the anchor."""
    from salun_sd.edit import run as edit
    from salun_sd.edit.concepts import of_options
    from salun_sd.edit.resources import Foreseen

    begin()
    if mask and (is_typed(ctx, "density") or is_typed(ctx, "saliency_guidance")):
        raise UsageError("--density and --saliency-guidance are for a mask that erase computes: leave them out with "
                         "--mask.")  # fmt: skip
    asked = of_options(plan, concept, anchor or [])
    if is_typed(ctx, "retain"):
        asked["retain_prompts"] = None
    elif is_typed(ctx, "retain_prompts"):
        retain, retain_caption = (None, None) if plan else (retain, retain_caption)
    record = edit.erase(
        model, **asked | ({"retain_prompts": retain_prompts} if retain_prompts else {}), out=out, mask=mask,
        density=density, saliency_guidance=saliency_guidance, forget=forget, retain=retain,
        retain_caption=retain_caption, samples=samples, size=size, retain_weight=retain_weight, lr=lr, clip=clip,
        steps=steps, batch_size=batch_size, anchor_from=anchor_from.value, sample_every=sample_every,
        save_every=save_every, seed=seed, dtype=dtype and dtype.value, checkpointing=checkpointing, parts=parts,
        format=format.value, reversible=reversible, dry_run=dry_run, config=config, revision=revision,
        variant=variant, command=shlex.join(["salun-sd", *ctx.obj]),
    )  # fmt: skip
    if isinstance(record, Foreseen):
        tables.show_plan(record)
    elif ranks.is_main():
        tables.show_erased(record, out)


@app.command(
    cls=Command, epilog=example("apply pocket sneaker.safetensors --format single-file --out erased.safetensors")
)
def apply(
    model: o.ModelArg,
    patch: o.PatchArg,
    out: o.AppliedOutOpt,
    format: o.WholeOpt = o.Whole.diffusers,
    revert: o.RevertOpt = False,
    config: o.ConfigOpt = None,
    revision: o.RevisionOpt = None,
    variant: o.VariantOpt = None,
) -> None:
    """Rebuild an erased checkpoint from its base and a patch, bit for bit."""
    from salun_sd.edit import deliver

    record = deliver.apply(
        model, patch, out=out, format=format.value, revert=revert, config=config, revision=revision, variant=variant
    )
    what = "base" if revert else "erased"
    size = tables.megabytes(deliver.size_on_disk(out))
    print(f"{out}: the {what} UNet {record[what]['fingerprint'][:12]}, {size}")


@app.command(cls=Command, epilog=example("evaluate erased --prompts pocket", "--against pocket --out audit"))
def evaluate(
    prompts: o.PromptsOpt,
    out: o.AuditOutOpt,
    model: o.AuditedArg = None,
    where: o.WhereOpt = None,
    limit: o.LimitOpt = None,
    against: o.AgainstOpt = None,
    images: o.ImagesOpt = None,
    concept_class: o.ConceptClassOpt = None,
    classifier: o.ClassifierOpt = None,
    detector_model: o.DetectorOpt = None,
    clip: o.ClipOptionOpt = None,
    fid: o.FidOpt = None,
    reference: o.ReferenceOpt = None,
    denoising_steps: o.DenoisingStepsOpt = None,
    scheduler: o.SchedulerOpt = None,
    guidance: o.GuidanceOpt = None,
    size: o.SizeOpt = None,
    samples_per_prompt: o.SamplesPerPromptOpt = None,
    no_images: o.NoImagesOpt = False,
    record: o.RecordOpt = False,
    fail_if: o.FailIfOpt = None,
    confident: o.ConfidentOpt = False,
    config: o.ConfigOpt = None,
    revision: o.RevisionOpt = None,
    variant: o.VariantOpt = None,
) -> None:
    """Draw a prompt set, run NudeNet and a classifier over the images, write an audit."""
    from salun_sd.audit import run as audit
    from salun_sd.report.gate import told

    begin()
    report = audit.evaluate(
        model, prompts=prompts, out=out, where=where or (), limit=limit, against=against, images=images,
        concept_class=concept_class or (), classifier=classifier, detector_model=detector_model, clip=clip, fid=fid,
        reference=reference, denoising_steps=denoising_steps, scheduler=scheduler, guidance=guidance, size=size,
        samples_per_prompt=samples_per_prompt, no_images=no_images, record=record, fail_if=fail_if or (),
        confident=confident, config=config, revision=revision, variant=variant,
    )  # fmt: skip
    tables.show_audit(report)
    print(f"{out / 'report.html'}")
    if broken := [entry for entry in report["gate"] or () if not entry["holds"]]:
        for entry in broken:
            print(f"Failed: {entry['bound']}: {told(entry)}.", file=sys.stderr)
        ranks.wait()  # the others would end the main process before it has written
        raise typer.Exit(3)


@app.command(cls=Command, epilog=example("compare audit-salun audit-esd audit-uce --out audits.md"))
def compare(audits: o.AuditsArg, out: o.TablesOutOpt = None) -> None:
    """Put several audits into one table for each prompt set, a column for each model."""
    from salun_sd.audit import compare
    from salun_sd.runtime import files

    if out and out.suffix not in compare.FORMS:
        raise UsageError(f"--out {out} ends in none of {', '.join(compare.FORMS)}: give it one of these.")
    found = compare.compare(audits)
    if out:
        files.write_atomic(out, compare.FORMS[out.suffix](found))
        print(out)
    else:
        tables.show_compared(found)


@app.command(cls=Command, epilog=example("cache --clear --older-than 30"))
def cache(clear: o.ClearOpt = False, older_than: o.OlderThanOpt = None) -> None:
    """Show or clear the images that models drew to train on or to compare with, and their encodings."""
    from salun_sd.runtime import cache

    if older_than is not None and not clear:
        raise UsageError("--older-than is for --clear: give both.")
    if clear:
        files, size = cache.clear(older_than)
        print(f"{cache.folder()}: removed {files:,} files, {tables.megabytes(size)}")
        return
    entries = cache.entries()
    tables.show_entries(entries)
    print(f"{cache.folder()}: {tables.megabytes(sum(e.bytes for e in entries))}")


@app.command(cls=Command, epilog=example("demo --out demo"))
def demo(
    out: o.DemoOutOpt,
    concept_class: o.DemoConceptOpt = "sneaker",
    anchor_class: o.DemoAnchorOpt = "bag",
    density: o.DemoDensityOpt = 0.5,
) -> None:
    """Erase a class from the bundled pocket checkpoint: mask, erase and evaluate, each printed before it runs."""
    from salun_sd.cli.demo import commands

    for line in commands(concept_class, anchor_class, density, out):
        print(f"\n$ {shlex.join(['salun-sd', *line])}", flush=True)
        run(line)


def run(argv: list[str]) -> None:
    """One command, as if typed; a failure ends the program."""
    show_log()
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
