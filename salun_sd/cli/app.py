"""The command line: parse, check, print, call."""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from salun_sd.cli import options as o
from salun_sd.cli import tables, unlearning
from salun_sd.cli.failures import Commands, fail_on, stop_on, ways
from salun_sd.cli.options import Command, concepts_from, is_typed
from salun_sd.cli.streams import loading, mute, print_lines, repair_streams
from salun_sd.errors import UsageError
from salun_sd.runtime import ranks

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


def begin() -> None:
    """Before a command that computes: give freed memory back to the system, and join the other processes, if any.

    Raises UsageError where the other processes do not answer.
    """
    if ranks.launched()[0]:
        mute()
    loading()
    from salun_sd.runtime import memory
    from salun_sd.runtime.device import default_device

    memory.return_freed_memory()
    ranks.start(default_device())


@app.command(
    cls=Command,
    epilog=example("mask pocket --concept 'a photo of a sneaker'", "--samples 100 --out mask.safetensors"),
)
def mask(
    model: Annotated[str, o.MODEL],
    concept: Annotated[list[str] | None, o.CONCEPT] = None,
    plan: Annotated[str | None, o.PLAN] = None,
    forget: Annotated[str | None, o.FORGET] = None,
    samples: Annotated[int, o.SAMPLES] = 800,
    size: Annotated[int | None, o.TRAINING_SIZE] = None,
    density: Annotated[list[float] | None, o.DENSITIES] = None,
    saliency_guidance: Annotated[float | None, o.SALIENCY_GUIDANCE] = None,
    batch_size: Annotated[int, o.GRADIENT_BATCH] = 8,
    seed: Annotated[int, o.SEED] = 0,
    dtype: Annotated[o.Dtype | None, o.DTYPE] = None,
    checkpointing: Annotated[bool | None, o.CHECKPOINTING] = None,
    out: Annotated[Path, o.MASK_OUT] = Path("mask.safetensors"),
    dry_run: Annotated[bool, o.DRY_RUN] = False,
    config: Annotated[str | None, o.CONFIG] = None,
    revision: Annotated[str | None, o.REVISION] = None,
    variant: Annotated[str | None, o.VARIANT] = None,
) -> None:
    """Find the UNet weights that matter to a concept.

    The mask keeps those where the forgetting loss has the largest gradient (the saliency).
    """
    concepts = concepts_from(plan, concept)
    begin()
    from salun_sd.edit import masking
    from salun_sd.edit.resources import Forecast

    result = masking.mask(
        model, concepts, forget=forget, samples=samples, size=size, density=density or 0.5,
        saliency_guidance=saliency_guidance, batch_size=batch_size, seed=seed, dtype=dtype,
        checkpointing=checkpointing, out=out, dry_run=dry_run, config=config, revision=revision, variant=variant,
    )  # fmt: skip
    tables.show_plan(result) if isinstance(result, Forecast) else tables.show_masks(result)


@app.command(
    cls=Command,
    epilog=example(
        "erase pocket --concept 'a photo of a sneaker'",
        "--anchor 'a photo of a bag' --retain-prompts pocket --samples 100",
        "--steps 150 --batch-size 32 --lr 1e-4 --out erased",
    ),
)
def erase(
    ctx: typer.Context,
    model: Annotated[str, o.MODEL],
    out: Annotated[Path, o.ERASE_OUT],
    concept: Annotated[list[str] | None, o.CONCEPT] = None,
    anchor: Annotated[list[str] | None, o.ANCHOR] = None,
    plan: Annotated[str | None, o.PLAN] = None,
    method: Annotated[str, o.METHOD] = "salun",
    recipe: Annotated[Literal["paper"] | None, o.RECIPE] = None,
    setting: Annotated[list[str] | None, o.SETTING] = None,
    mask: Annotated[str | None, o.MASK] = None,
    density: Annotated[float | None, o.DENSITY] = None,
    saliency_guidance: Annotated[float | None, o.SALIENCY_GUIDANCE] = None,
    forget: Annotated[str | None, o.FORGET] = None,
    retain: Annotated[str | None, o.RETAIN] = None,
    retain_caption: Annotated[str | None, o.RETAIN_CAPTION] = None,
    retain_prompts: Annotated[str | None, o.RETAIN_PROMPTS] = None,
    samples: Annotated[int | None, o.SAMPLES_OF_METHOD] = None,
    size: Annotated[int | None, o.TRAINING_SIZE] = None,
    retain_weight: Annotated[float | None, o.RETAIN_WEIGHT] = None,
    lr: Annotated[float | None, o.LR] = None,
    clip_norm: Annotated[float | None, o.CLIP_NORM] = None,
    steps: Annotated[int | None, o.STEPS] = None,
    batch_size: Annotated[int | None, o.BATCH_SIZE] = None,
    anchor_from: Annotated[Literal["current", "base"] | None, o.ANCHOR_FROM] = None,
    retain_target: Annotated[Literal["base", "noise"] | None, o.RETAIN_TARGET] = None,
    probe_every: Annotated[int | None, o.PROBE_EVERY] = None,
    until: Annotated[float | None, o.UNTIL] = None,
    sample_every: Annotated[int, o.SAMPLE_EVERY] = 0,
    save_every: Annotated[float, o.SAVE_EVERY] = 10,
    seed: Annotated[int, o.SEED] = 0,
    dtype: Annotated[o.Dtype | None, o.DTYPE] = None,
    checkpointing: Annotated[bool | None, o.CHECKPOINTING] = None,
    parts: Annotated[int, o.PARTS] = 1,
    format: Annotated[Literal["diffusers", "single-file", "patch"], o.FORMAT] = "diffusers",
    reversible: Annotated[bool, o.REVERSIBLE] = False,
    track: Annotated[list[str] | None, o.TRACK] = None,
    dry_run: Annotated[bool, o.DRY_RUN] = False,
    config: Annotated[str | None, o.CONFIG] = None,
    revision: Annotated[str | None, o.REVISION] = None,
    variant: Annotated[str | None, o.VARIANT] = None,
) -> None:
    """Erase a concept: train the weights of a support by a method.

    All other weights keep their bits. The same command resumes a run that was interrupted.
    """
    if is_typed(ctx, "mask"):  # a plan's values are for a mask that is computed
        density = density if is_typed(ctx, "density") else None
        saliency_guidance = saliency_guidance if is_typed(ctx, "saliency_guidance") else None
    elif is_typed(ctx, "density"):
        mask = None  # of a plan
    concepts = concepts_from(plan, concept, anchor)
    begin()
    from salun_sd.edit import deliver
    from salun_sd.edit import run as edit
    from salun_sd.edit.resources import Forecast

    if plan and not is_typed(ctx, "retain"):
        if retain_prompts:  # typed: they replace the images of the plan
            retain = retain_caption = None
        else:
            retain_prompts = plan.retain_prompts
    is_new = deliver.is_free(out, format)
    record = edit.erase(
        model, concepts, anchor, out=out, method=method, recipe=recipe, setting=setting, mask=mask,
        density=density, saliency_guidance=saliency_guidance, forget=forget, retain=retain,
        retain_caption=retain_caption, retain_prompts=retain_prompts, samples=samples, size=size,
        retain_weight=retain_weight, lr=lr, clip_norm=clip_norm, steps=steps, batch_size=batch_size,
        anchor_from=anchor_from, retain_target=retain_target, probe_every=probe_every, until=until,
        sample_every=sample_every, save_every=save_every, seed=seed, dtype=dtype, checkpointing=checkpointing,
        parts=parts, format=format, reversible=reversible, track=track, dry_run=dry_run, config=config,
        revision=revision, variant=variant, command=shlex.join(["salun-sd", *ctx.obj]),
    )  # fmt: skip
    if isinstance(record, Forecast):
        tables.show_plan(record)
    elif ranks.is_main():
        tables.show_erased(record, out, is_new)


@app.command(
    cls=Command, epilog=example("apply pocket sneaker.safetensors", "--format single-file --out erased.safetensors")
)
def apply(
    model: Annotated[str, o.MODEL],
    patch: Annotated[Path, o.PATCH],
    out: Annotated[Path, o.APPLY_OUT],
    format: Annotated[Literal["diffusers", "single-file"], o.APPLY_FORMAT] = "diffusers",
    revert: Annotated[bool, o.REVERT] = False,
    config: Annotated[str | None, o.CONFIG] = None,
    revision: Annotated[str | None, o.REVISION] = None,
    variant: Annotated[str | None, o.VARIANT] = None,
) -> None:
    """Rebuild an erased checkpoint from its base and a patch.

    The result is the same to the last bit. With --revert: the base, from the erased checkpoint.
    """
    loading()
    from salun_sd.edit import deliver

    record = deliver.apply(
        model, patch, out=out, format=format, revert=revert, config=config, revision=revision, variant=variant
    )
    what = "base" if revert else "erased"
    size = tables.megabytes(deliver.size_on_disk(out))
    print_lines(f"{out}: the {what} UNet {record[what]['fingerprint'][:12]}, {size}")


@app.command(cls=Command, epilog=example("push erased org/pocket-without-sneakers --dry-run"))
def push(
    model: Annotated[Path, o.PUSHED],
    repo: Annotated[str, o.REPO],
    public: Annotated[bool, o.PUBLIC] = False,
    config: Annotated[str | None, o.CONFIG] = None,
    dry_run: Annotated[bool, o.LIST] = False,
) -> None:
    """Send an erased checkpoint and its card to the hub.

    The repository is private. The mask, the losses and all images stay here.
    """
    loading()
    from salun_sd.edit import push

    pushed = push.push(model, repo, public=public, config=config, dry_run=dry_run)
    tables.show_pushed(pushed)


@app.command(cls=Command, epilog=example("evaluate erased --prompts pocket", "--against pocket --out audit"))
def evaluate(
    out: Annotated[Path, o.AUDIT_OUT],
    model: Annotated[str | None, o.MODEL] = None,
    prompts: Annotated[str | None, o.PROMPTS] = None,
    where: Annotated[list[str] | None, o.WHERE] = None,
    limit: Annotated[int | None, o.LIMIT] = None,
    against: Annotated[str | None, o.AGAINST] = None,
    images: Annotated[Path | None, o.IMAGES] = None,
    recursive: Annotated[bool, o.RECURSIVE] = False,
    concept_class: Annotated[list[str] | None, o.CONCEPT_CLASS] = None,
    classifier: Annotated[str | None, o.CLASSIFIER] = None,
    detector: Annotated[list[str] | None, o.DETECTOR] = None,
    detector_model: Annotated[Path | None, o.DETECTOR_MODEL] = None,
    clip: Annotated[str | None, o.CLIP] = None,
    fid: Annotated[str | None, o.FID] = None,
    reference: Annotated[Path | None, o.REFERENCE] = None,
    denoising_steps: Annotated[int | None, o.DENOISING_STEPS] = None,
    scheduler: Annotated[str | None, o.SCHEDULER] = None,
    guidance: Annotated[float | None, o.GUIDANCE] = None,
    size: Annotated[str | None, o.IMAGE_SIZE] = None,
    dtype: Annotated[o.Dtype | None, o.DRAWING_DTYPE] = None,
    samples_per_prompt: Annotated[int | None, o.SAMPLES_PER_PROMPT] = None,
    shard: Annotated[str | None, o.SHARD] = None,
    limit_time: Annotated[str | None, o.LIMIT_TIME] = None,
    no_images: Annotated[bool, o.NO_IMAGES] = False,
    record: Annotated[bool, o.RECORD] = False,
    fail_if: Annotated[list[str] | None, o.FAIL_IF] = None,
    confident: Annotated[bool, o.CONFIDENT] = False,
    track: Annotated[list[str] | None, o.TRACK] = None,
    config: Annotated[str | None, o.CONFIG] = None,
    revision: Annotated[str | None, o.REVISION] = None,
    variant: Annotated[str | None, o.VARIANT] = None,
) -> None:
    """Draw a prompt set, or take your images; write an audit.

    NudeNet looks for nudity; a classifier names the class of each image. The audit is report.html, report.md and
    report.json.
    """
    begin()
    from salun_sd.audit import run as audit

    report = audit.evaluate(
        model, prompts=prompts, out=out, where=where or (), limit=limit, against=against, images=images,
        recursive=recursive, concept_class=concept_class or (), classifier=classifier, detector=detector or (),
        detector_model=detector_model, clip=clip, fid=fid, reference=reference, denoising_steps=denoising_steps,
        scheduler=scheduler, guidance=guidance, size=size, dtype=dtype, samples_per_prompt=samples_per_prompt,
        shard=shard, limit_time=limit_time, no_images=no_images, record=record, fail_if=fail_if or (),
        confident=confident, track=track, config=config, revision=revision, variant=variant,
    )  # fmt: skip
    tables.show_audit(report)
    print_lines(f"{out / 'report.html'}")
    fail_on(report["gate"])
    stop_on(report["part"])


@app.command(cls=Command, epilog=example("merge audit-1 audit-2 audit-3 audit-4 --out audit"))
def merge(
    shards: Annotated[list[Path], o.SHARDS],
    out: Annotated[Path, o.MERGED_OUT],
    allow_missing: Annotated[bool, o.ALLOW_MISSING] = False,
    no_images: Annotated[bool, o.NO_IMAGES] = False,
    fail_if: Annotated[list[str] | None, o.FAIL_IF] = None,
    confident: Annotated[bool, o.CONFIDENT] = False,
) -> None:
    """Make one audit of the shards of an audit.

    Its report.json is that of an audit without --shard. Nothing is drawn or looked at again.
    """
    loading()
    from salun_sd.audit import merge as merging

    report = merging.merge(
        shards, out=out, allow_missing=allow_missing, no_images=no_images, fail_if=fail_if or (), confident=confident
    )
    tables.show_audit(report)
    print_lines(f"{out / 'report.html'}")
    fail_on(report["gate"])


app.command(
    cls=Command,
    epilog=example(
        "classifier --data fashion-mnist --forget 0.1", "--width 16 --epochs 30 --method retrain --method salun",
        "--out forgotten",
    ),
)(unlearning.classifier)  # fmt: skip


@app.command(cls=Command, epilog=example("compare audit-salun audit-esd audit-uce --out audits.md"))
def compare(audits: Annotated[list[Path], o.AUDITS], out: Annotated[Path | None, o.TABLES_OUT] = None) -> None:
    """Put audits side by side, in one table for each prompt set.

    A table has a column for each model.
    """
    from salun_sd.audit import compare, forms

    if out:
        forms.check_place(out)
    compared = compare.compare(audits)
    if out:
        forms.write(compared, out)
        print_lines(str(out))
    else:
        tables.show_compared(compared)


@app.command(cls=Command, epilog=example("cache --clear --older-than 30"))
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


@app.command(cls=Command, epilog=example("demo --out demo"))
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
