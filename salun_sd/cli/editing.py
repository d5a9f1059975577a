"""The commands that change a checkpoint: mask, erase, apply, push."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from salun_sd.cli import options as o
from salun_sd.cli import tables
from salun_sd.cli.command import concepts_from, is_typed
from salun_sd.cli.start import begin
from salun_sd.cli.streams import loading, print_lines
from salun_sd.runtime import ranks


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
