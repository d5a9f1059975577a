"""The work of `evaluate`: draw or collect images, look at them, report."""

import logging
import shutil
import time
from collections.abc import Sequence
from functools import cache, partial
from itertools import takewhile
from pathlib import Path

import torch

from salun_sd.audit import deliver, detectors, looked, quality
from salun_sd.audit.clip import Clip
from salun_sd.audit.collected import Pairs, collected, gathered, line_of, matched, tools, with_classes
from salun_sd.audit.detect import load_detector
from salun_sd.audit.examine import examine
from salun_sd.audit.features import extractor
from salun_sd.audit.report import assemble, headline_metrics, numbers, part_of
from salun_sd.audit.request import JUDGE, Request, check_options, check_record, check_values, seconds_in
from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.load import load_pipeline, load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import generate, shards
from salun_sd.draw.encode import warn_of_long
from salun_sd.draw.kept import kept_images
from salun_sd.draw.prompts import CLASSES, Prompt
from salun_sd.draw.sample import scheduler_class
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime import ranks, tracker
from salun_sd.runtime.cache import folder as cache_folder
from salun_sd.runtime.device import Precision, check_dtype, default_device, dtype_name
from salun_sd.runtime.escape import line
from salun_sd.runtime.files import check_place, new_file, remove_stale

logger = logging.getLogger(__name__)

MOST_IMAGES = 1_000_000


def evaluate(
    model: str | Path | Checkpoint | None = None, *, prompts: str | None = None, out: str | Path,
    where: Sequence[str] = (), limit: int | None = None, against: str | Path | Checkpoint | None = None,
    images: str | Path | None = None, recursive: bool = False, concept_class: str | Sequence[str] = (),
    classifier: str | None = None, detector: str | Sequence[str] = (), detector_model: str | Path | None = None,
    clip: str | None = None, fid: str | None = None, reference: str | Path | None = None,
    denoising_steps: int | None = None, scheduler: str | None = None, guidance: float | None = None,
    size: str | int | None = None, dtype: str | None = None, samples_per_prompt: int | None = None,
    shard: str | None = None, limit_time: str | None = None, no_images: bool = False, record: bool = False,
    fail_if: str | Sequence[str] = (), confident: bool = False, track: str | Sequence[str] | None = None,
    config: str | None = None, revision: str | None = None, variant: str | None = None,
) -> dict:  # fmt: skip
    """Audit a checkpoint on a prompt set, or a folder of images. Writes the audit into `out`; returns what report.json
    holds.

    The parameters are the options of `salun-sd evaluate`. The report's `gate` says whether each bound of `fail_if`
    holds, and its `part` how many of the prompts a shard has, or an audit that `limit_time` has ended. Running it again
    draws, detects and classifies only what is missing. Raises UsageError for arguments that are wrong or cannot go
    together, SalunError for what fails; the text of both is a sentence for a person.
    """
    begun = time.monotonic()
    # check: whatever can fail without drawing fails here, and what needs no model before one is opened
    check_values(
        model=model, prompts=prompts, out=out, where=where, limit=limit, against=against, images=images,
        concept_class=concept_class, classifier=classifier, detector=detector, detector_model=detector_model, clip=clip,
        fid=fid, reference=reference, denoising_steps=denoising_steps, size=size, samples_per_prompt=samples_per_prompt,
        shard=shard, limit_time=limit_time, fail_if=fail_if, config=config, revision=revision, variant=variant,
    )  # fmt: skip
    trackers = tracker.check(track)
    out, images, reference, weights = Path(out), _path(images), _path(reference), _path(detector_model)
    where, fail_if, concept_class = _texts(where), _texts(fail_if), _texts(concept_class)
    size = None if size is None else str(size)
    check_dtype(dtype)
    names = detectors.checked(_texts(detector), weights)
    check_options(model, against, images, out, prompts=prompts, filters=(where, limit), recursive=recursive,
                  drawing=(denoising_steps, scheduler, guidance, size, dtype, limit_time), samples=samples_per_prompt,
                  confident=confident, fail_if=fail_if, shard=shard, record=record)  # fmt: skip
    shard, ends = shard and shards.parse(shard), _ends(begun, limit_time, bool(model) + bool(against))
    check_place(out / "report.json", out / "images" / "0_0.png")
    quality.check_options(fid, reference, has_base=against is not None)
    if weights:
        load_detector(weights)
    models = cache(partial(_models, model, against if prompts else None, config, revision, variant))
    sampling = {"steps": denoising_steps, "scheduler": None if scheduler is None else scheduler_class(scheduler)}
    if prompts is None:
        manifest, twins, unpaired = _gather(images, _path(against), out, recursive, concept_class, classifier, clip)
        request = Request.of_images(manifest)
        own = request.rows
    else:
        class_model = (models()[0] or models()[1]) if prompts == CLASSES else None
        request, twins, unpaired = Request.of(prompts, where, limit, guidance, size, class_model), None, None
        own = shards.own(request.rows, shard)  # in the order in which they are drawn
        manifest = collected(images, own, out, subset=bool(where or limit or shard)) if images else []
    samples = len(manifest) // len(own) if images else samples_per_prompt or 1
    if samples * len(request.rows) > MOST_IMAGES:
        raise UsageError(f"{samples * len(request.rows):,} images are too many for one audit, which holds "
                         f"{MOST_IMAGES:,}: lower --samples-per-prompt, or give --limit.")  # fmt: skip
    audited, base, erasure = models()
    if record:
        check_record(audited, erasure)
    request = request.judging(concept_class, classifier, erasure)
    _check_drawing(audited, base, request, sampling)
    if audited or base:
        sampling["dtype"] = _dtype_to_draw_in(dtype)
    quality.check_others(clip, fid, samples * request.others())
    if not (names or request.classifier or clip or fid or against):
        raise UsageError("--detector none leaves nothing to measure: add --classifier, --clip or --against.")
    parsed = request.bounds(fail_if, detectors=names, against=against is not None, clip=bool(clip), fid=bool(fid),
                            reference=reference is not None)  # fmt: skip
    judge = request.judge()
    measures = quality.Measures(
        clip and Clip(clip, default_device()), fid and extractor(fid, JUDGE, default_device()), reference
    )
    looking = detectors.load(names, weights, default_device())
    settings = request.settings(judge, where, limit, guidance, size) | looking.settings()

    # draw, and look at each model
    tracked = tracker.started(trackers, out, {"images": samples * len(own)})
    settings |= {"sampling": None, "metadata": None if prompts else tools(manifest)}
    rows = own
    if audited:
        rows, settings["sampling"] = _draw(audited, rows, samples, out, until=ends[0], **sampling)
    if base:
        rows, settings["sampling_against"] = _draw(base, rows, samples, out / "against", until=ends[-1], keep=True,
                                                   **sampling)  # fmt: skip
    cases = {p.case for p in rows}
    manifest = _manifest(audited, rows, samples, sampling) if audited else [m for m in manifest if m["case"] in cases]
    twins = _manifest(base, rows, samples, sampling) if base else twins
    name = base.name if base else str(against)
    run_of_base = examine(name, twins, judge, looking, out / "against") if twins else None
    run = examine(audited.name if audited else str(images), manifest, judge, looking, out, run_of_base)
    found = quality.look(measures, run, run_of_base, request.concepts)

    # assemble and write
    part = part_of(len(rows), len(request.rows), len(own) - len(rows), shard and str(shard))
    qualities = quality.measure(found, run, run_of_base, request.concepts, is_part=bool(part))
    report = assemble(run, run_of_base, prompts=request.name, settings=settings, concepts=request.concepts,
                      quality=qualities, part=part, unpaired=unpaired)  # fmt: skip
    if shard and ranks.is_main():
        looked.save(found, out)
    deliver.finish(report, run, run_of_base, out, parsed, confident=confident, pictures=not no_images)
    if record and ranks.is_main():
        provenance.add_audit(audited.path, headline_metrics(report) | {"sampling": settings["sampling"]})
    with tracked:
        tracked.log(tracked.last + 1, numbers(report))
    return report


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _texts(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _gather(
    images: Path, against: Path | None, out: Path, recursive: bool, concepts: list[str], classifier: str | None,
    clip: str | None,
) -> Pairs:  # fmt: skip
    """The lines of a folder of images and, with `against`, of the other one. Raises UsageError where there are none,
    or no prompts for `clip`."""
    lines = gathered(images, out, recursive)
    if clip and all(line["prompt"] is None for line in lines):
        raise UsageError(f"--clip compares images with their prompts, and no image of {images} has one in its "
                         "metadata: give --prompts, or leave it out.")  # fmt: skip
    lines = with_classes(lines, concepts, classifier)
    if against is None:
        return Pairs(lines, None, None)
    return matched(lines, gathered(against, out / "against", recursive), (images, against))


def _models(
    model: str | Path | Checkpoint | None, against: str | Path | Checkpoint | None, config: str | None,
    revision: str | None, variant: str | None,
) -> tuple[Checkpoint | None, Checkpoint | None, dict | None]:  # fmt: skip
    """The model and its base, opened, and the record of the model's erasure; None for what there is not.

    `config` is for single files, `variant` for all others. If the model was erased from this base, the base is opened
    at the same commit of the hub.
    """
    are_files = [Path(name).is_file() for name in (model, against) if isinstance(name, str | Path)]
    if (config and not any(are_files)) or (variant and all(are_files)) or (revision and not model):
        raise UsageError("--config is for a single file, --revision and --variant for a MODEL that is none.")

    def find(name: str | Path | Checkpoint | None, revision: str | None) -> Checkpoint | None:
        if name is None:
            return None
        if isinstance(name, Checkpoint):
            return opened(name, revision=revision)
        is_file = Path(name).is_file()
        return opened(name, config if is_file else None, revision, None if is_file else variant)

    audited = find(model, revision)
    record = provenance.read(audited.path) if audited else None
    base_revision = record["base"]["revision"] if record and record["base"]["model"] == str(against) else None
    return audited, find(against, base_revision), record


def _check_drawing(audited: Checkpoint | None, base: Checkpoint | None, request: Request, sampling: dict) -> None:
    """Raise UsageError where a model cannot be drawn on these prompts. Logs prompts that are too long for it."""
    for checkpoint in filter(None, (audited, base)):
        generate.check(checkpoint, request.rows, **sampling)
    if drawn := audited or base:
        warn_of_long(load_tokenizers(drawn), [p.text for p in request.rows], drawn.name)
    if base:
        place = cache_folder() / "audited" / "base"  # its images are kept there
        check_place(place, advice="set SALUN_SD_CACHE to another folder")


def _dtype_to_draw_in(requested: str | None) -> torch.dtype:
    """--dtype, or what suits the device. Logs it, and why."""
    precision = Precision.to_draw(requested, default_device())
    logger.info(f"Images are drawn in {dtype_name(precision.dtype)}: {precision.reason}.")
    return precision.dtype


def _ends(begun: float, limit_time: str | None, models: int) -> list[float | None]:
    """The moments at which the drawing of each of the models has to end: they have the same share of the time."""
    if limit_time is None:
        return [None]
    return [begun + seconds_in(limit_time) * n / max(1, models) for n in range(1, models + 1)]


def _draw(
    model: Checkpoint, prompts: list[Prompt], samples: int, out: Path, *, steps: int | None, scheduler: str | None,
    dtype: torch.dtype, until: float | None, keep: bool = False,
) -> tuple[list[Prompt], dict]:  # fmt: skip
    """Draw the images that are missing in out/images, until a moment of time.monotonic. Returns the prompts before the
    first of which an image is still missing, and the sampling settings for the report.

    With `keep`, the images also stay in the user's cache for the next audit.
    """
    sampling = {"scheduler": scheduler or model.scheduler, "steps": steps or model.sampling[0],
                "dtype": dtype_name(dtype)}  # fmt: skip
    default_size = model.image_size, model.image_size
    files = {out / generate.file_of(p, k): generate.row_of(p, k, default_size) for p in prompts for k in range(samples)}
    pipeline, what = cache(partial(load_pipeline, model, dtype=dtype)), line(Path(model.name).name)
    find_missing = partial(generate.missing, files, identity=model.identity, **sampling)
    if not keep:
        for _ in generate.draw(pipeline, files, identity=model.identity, what=what, until=until, **sampling):
            pass
    elif missing := find_missing():
        rows = list(missing.values())
        with kept_images("audited", model, pipeline, rows, what=what, until=until, **sampling) as kept:
            if ranks.is_main():
                remove_stale(out / "images")
                for source, file in zip(kept, missing, strict=True):
                    if source:  # no link: changing the audit's image would change the cache's
                        with new_file(file, many=True) as new:
                            shutil.copyfile(source, new)
    if until is not None and (missing := find_missing()):
        prompts = list(
            takewhile(lambda p: all(out / generate.file_of(p, k) not in missing for k in range(samples)), prompts)
        )
        if not prompts:
            raise SalunError(f"No prompt has all of its images of {model.name} yet: type the same command again to go "
                             "on, or give a longer --limit-time.")  # fmt: skip
    return prompts, {"identity": model.identity, **sampling, "samples": samples, "safety_checker": "off"}


def _manifest(model: Checkpoint, prompts: list[Prompt], samples: int, sampling: dict) -> list[dict]:
    """A line for each image that a model drew, in the order of the cases."""
    steps, size = sampling["steps"] or model.sampling[0], (model.image_size, model.image_size)
    return [
        line_of(p, k, generate.file_of(p, k), generate.row_of(p, k, size), steps)
        for p in sorted(prompts, key=lambda p: p.case)
        for k in range(samples)
    ]
