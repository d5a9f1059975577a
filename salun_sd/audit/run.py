"""The work of `evaluate`: draw or collect images, look at them, report."""

import inspect
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from salun_sd.audit import deliver, detectors, drawing, looked, quality
from salun_sd.audit.bounds import NO_ATTACKS
from salun_sd.audit.classify import Judge
from salun_sd.audit.clip import Clip
from salun_sd.audit.collected import Pairs, collected, digest, gathered, matched, tools, with_classes
from salun_sd.audit.detect import load_detector
from salun_sd.audit.detectors import Detectors
from salun_sd.audit.examine import examine
from salun_sd.audit.features import extractor
from salun_sd.audit.looked import Looked
from salun_sd.audit.report import Run, assemble, headline_metrics, numbers, part_of
from salun_sd.audit.request import JUDGE, Request, check_images, check_options, check_record, check_values
from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import shards
from salun_sd.draw.prompts import CLASSES, Prompt
from salun_sd.draw.sample import scheduler_class
from salun_sd.draw.shards import Shard
from salun_sd.errors import UsageError
from salun_sd.report import gate
from salun_sd.runtime import ranks, tracker
from salun_sd.runtime.device import check_dtype, default_device
from salun_sd.runtime.files import check_place
from salun_sd.runtime.texts import listed

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
    if (Path(out) / "attacks").is_dir():
        raise UsageError(f"{out} holds attacks, whose report this would replace: choose another --out.")
    job = prepared(SimpleNamespace(**locals()))
    with tracker.started(job.trackers, job.out, {"images": job.samples * len(job.prompts)}) as tracked:
        rows, run, of_base = examined(job)
        found = quality.look(job.measures, run, of_base, job.request.concepts)
        report = assembled(job, rows, run, of_base, found)
        if shard and ranks.is_main():
            looked.save(found, job.out)
        deliver.finish(report, run, of_base, job.out, job.bounds, confident=confident, pictures=not no_images)
        if record and ranks.is_main():
            how = {key: job.settings[key] for key in ("prompts_sha256", "sampling")}
            provenance.add_audit(job.audited.path, headline_metrics(report) | how)
        tracked.log(tracked.last + 1, numbers(report))
    return report


def options(**given: object) -> SimpleNamespace:
    """The parameters of `evaluate`, given by name, with its defaults for the others."""
    bound = inspect.signature(evaluate).bind(**given)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments, begun=time.monotonic())


class Job(NamedTuple):
    """An audit that is about to begin, checked."""

    out: Path
    request: Request
    prompts: list[Prompt]  # the rows of the shard, in the order in which they are drawn; or all
    there: Pairs  # the lines of images that are there already
    samples: int  # images of a prompt
    audited: Checkpoint | None
    base: Checkpoint | None
    names: tuple[str, str]  # of what is audited, and of its base
    sampling: dict
    ends: list[float | None]  # the moment at which each model's drawing ends
    bounds: list[gate.Bound]
    judge: Judge | None
    measures: quality.Measures
    detectors: Detectors
    settings: dict  # as in the report; the sampling is added when it is known
    shard: Shard | None
    trackers: list[str]


def prepared(
    o: SimpleNamespace, attacks: Callable[..., Mapping[str, Collection[str]]] = lambda model, request: NO_ATTACKS
) -> Job:
    """The options of `evaluate`, checked: whatever can fail without drawing fails here, and what needs no model before
    one is opened. `attacks` gives, of the model and the request, those whose numbers the bounds may have: see
    `bounds.unmeasured`."""
    check_values(**vars(o))
    trackers, out = tracker.check(o.track), Path(o.out)
    o.images, o.reference, o.detector_model = _path(o.images), _path(o.reference), _path(o.detector_model)
    o.where, o.fail_if, o.concept_class = listed(o.where), listed(o.fail_if), listed(o.concept_class)
    o.size = None if o.size is None else str(o.size)
    check_dtype(o.dtype)
    names = detectors.checked(listed(o.detector), o.detector_model)
    check_options(
        o.model, o.against, o.images, out, prompts=o.prompts, filters=(o.where, o.limit), recursive=o.recursive,
        drawing=(o.denoising_steps, o.scheduler, o.guidance, o.size, o.dtype, o.limit_time),
        samples=o.samples_per_prompt, confident=o.confident, fail_if=o.fail_if, shard=o.shard, record=o.record,
    )  # fmt: skip
    shard = o.shard and shards.parse(o.shard)
    ends = drawing.ends(o.begun, o.limit_time, models=bool(o.model) + bool(o.against))
    check_place(out / "report.json", out / "images" / "0_0.png")
    quality.check_options(o.fid, o.reference, has_base=o.against is not None)
    if o.detector_model:
        load_detector(o.detector_model)
    models = cache(partial(_models, o.model, o.against if o.prompts else None, o.config, o.revision, o.variant))
    sampling = {"steps": o.denoising_steps, "scheduler": None if o.scheduler is None else scheduler_class(o.scheduler)}
    request, prompts, there = _requested(o, out, shard, models)
    for folder, lines in ((out, there.model), (out / "against", there.base)):
        if lines:
            check_images(folder, lines)
    samples = len(there.model) // len(prompts) if o.images else o.samples_per_prompt or 1
    if samples * len(request.rows) > MOST_IMAGES:
        raise UsageError(f"{samples * len(request.rows):,} images are too many for one audit, which holds "
                         f"{MOST_IMAGES:,}: lower --samples-per-prompt, or give --limit.")  # fmt: skip
    audited, base, erasure = models()
    if o.record:
        check_record(audited, erasure)
    request = request.judging(o.concept_class, o.classifier, erasure)
    drawing.check(audited, base, request, sampling)
    if audited or base:
        sampling["dtype"] = drawing.dtype_to_draw_in(o.dtype)
    quality.check_others(o.clip, o.fid, samples * request.others())
    if not (names or request.classifier or o.clip or o.fid or o.against):
        raise UsageError("--detector none leaves nothing to measure: add --classifier, --clip or --against.")
    parsed = request.bounds(o.fail_if, detectors=names, against=o.against is not None, clip=bool(o.clip),
                            fid=bool(o.fid), reference=o.reference is not None,
                            attacks=attacks(audited, request))  # fmt: skip
    judge = request.judge()
    measures = quality.Measures(
        o.clip and Clip(o.clip, default_device()), o.fid and extractor(o.fid, JUDGE, default_device()), o.reference
    )
    looking = detectors.load(names, o.detector_model, default_device())
    settings = request.settings(judge, o.where, o.limit, o.guidance, o.size) | looking.settings()
    settings |= {"sampling": None, "metadata": None if o.prompts else tools(there.model)}
    of_both = audited.name if audited else str(o.images), base.name if base else str(o.against)
    return Job(out, request, prompts, there, samples, audited, base, of_both, sampling, ends, parsed, judge, measures,
               looking, settings, shard, trackers)  # fmt: skip


def _requested(
    o: SimpleNamespace, out: Path, shard: Shard | None, models: Callable
) -> tuple[Request, list[Prompt], Pairs]:  # fmt: skip
    """The prompts, those of them that are the shard's, and the images that are there: without --prompts, each image is
    a row."""
    if o.prompts is None:
        there = _gather(o.images, _path(o.against), out, o.recursive, o.concept_class, o.classifier, o.clip)
        request = Request.of_lines(f"{len(there.model):,} image files", digest(there.model), there.model)
        return request, request.rows, there
    class_model = (models()[0] or models()[1]) if o.prompts == CLASSES else None
    request = Request.of(o.prompts, o.where, o.limit, o.guidance, o.size, class_model)
    prompts = shards.own(request.rows, shard)
    lines = collected(o.images, prompts, out, subset=bool(o.where or o.limit or shard)) if o.images else []
    return request, prompts, Pairs(lines, None, None)


def examined(job: Job) -> tuple[list[Prompt], Run, Run | None]:
    """Draw what is missing, and look at each model's images. The rows that have all of theirs; the base comes first,
    for the change from it."""
    rows, settings, (lines, twins, _) = job.prompts, job.settings, job.there
    folder_of_base, (name, name_of_base) = job.out / "against", job.names
    if model := job.audited:
        rows, settings["sampling"] = drawing.draw(model, rows, job.samples, job.out, until=job.ends[0], **job.sampling)
    if base := job.base:
        rows, settings["sampling_against"] = drawing.draw(
            base, rows, job.samples, folder_of_base, until=job.ends[-1], keep=True, **job.sampling
        )
        twins = drawing.manifest(base, rows, job.samples, job.sampling)
    if model:
        lines = drawing.manifest(model, rows, job.samples, job.sampling)
    else:
        cases = {p.case for p in rows}
        lines = [line for line in lines if line["case"] in cases]
    look = partial(examine, judge=job.judge, detectors=job.detectors, is_shard=bool(job.shard))
    run_of_base = look(name_of_base, twins, out=folder_of_base) if twins else None
    return rows, look(name, lines, out=job.out, base=run_of_base), run_of_base


def assembled(job: Job, rows: list[Prompt], run: Run, base: Run | None, found: Looked) -> dict:
    """The report, without its `gate`."""
    request = job.request
    part = part_of(len(rows), len(request.rows), len(job.prompts) - len(rows), job.shard and str(job.shard))
    qualities = quality.measure(found, run, base, request.concepts, is_part=bool(part))
    return assemble(run, base, prompts=request.name, settings=job.settings, concepts=request.concepts,
                    quality=qualities, part=part, unpaired=job.there.alone)  # fmt: skip


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


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
