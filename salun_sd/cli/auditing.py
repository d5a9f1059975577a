"""The commands that look at images: evaluate, merge, compare."""

from pathlib import Path
from typing import Annotated

from salun_sd.cli import options as o
from salun_sd.cli import tables
from salun_sd.cli.failures import fail_on, stop_on
from salun_sd.cli.start import begin
from salun_sd.cli.streams import loading, print_lines


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
) -> dict[str, float]:
    """Draw a prompt set, or take your images; write an audit.

    NudeNet looks for nudity; a classifier names the class of each image. The audit is report.html, report.md and
    report.json.
    """
    begin()
    from salun_sd.audit import run as audit
    from salun_sd.audit.report import numbers

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
    return numbers(report)


def merge(
    shards: Annotated[list[Path], o.SHARDS],
    out: Annotated[Path, o.MERGED_OUT],
    allow_missing: Annotated[bool, o.ALLOW_MISSING] = False,
    no_images: Annotated[bool, o.NO_IMAGES] = False,
    fail_if: Annotated[list[str] | None, o.FAIL_IF] = None,
    confident: Annotated[bool, o.CONFIDENT] = False,
) -> dict[str, float]:
    """Make one audit of the shards of an audit.

    Its report.json is that of an audit without --shard. Nothing is drawn or looked at again.
    """
    loading()
    from salun_sd.audit import merge as merging
    from salun_sd.audit.report import numbers

    report = merging.merge(
        shards, out=out, allow_missing=allow_missing, no_images=no_images, fail_if=fail_if or (), confident=confident
    )
    tables.show_audit(report)
    print_lines(f"{out / 'report.html'}")
    fail_on(report["gate"])
    return numbers(report)


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
