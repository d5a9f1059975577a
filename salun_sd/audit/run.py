"""The work of `evaluate`: draw or collect images, look at them, report."""

import json
import logging
import shutil
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch

from salun_sd.audit import bounds, detectors, markdown, page, quality
from salun_sd.audit.clip import Clip
from salun_sd.audit.collected import Pairs, collected, gathered, line_of, matched, tools, with_classes
from salun_sd.audit.detect import load_detector
from salun_sd.audit.examine import examine
from salun_sd.audit.features import extractor
from salun_sd.audit.report import Run, assemble, headline_metrics, images_of, numbers
from salun_sd.audit.request import JUDGE, Request, check_options, check_record, check_values
from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.load import load_pipeline, load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import generate
from salun_sd.draw.encode import warn_of_long
from salun_sd.draw.kept import kept_images
from salun_sd.draw.prompts import CLASSES
from salun_sd.draw.sample import scheduler_class
from salun_sd.errors import UsageError, some
from salun_sd.report import gate
from salun_sd.runtime import ranks, seals, tracker
from salun_sd.runtime.cache import folder as cache_folder
from salun_sd.runtime.device import Precision, check_dtype, default_device, dtype_name
from salun_sd.runtime.escape import line
from salun_sd.runtime.files import check_place, new_file, remove_stale, write_atomic

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
    no_images: bool = False, record: bool = False, fail_if: str | Sequence[str] = (), confident: bool = False,
    track: str | Sequence[str] | None = None, config: str | None = None, revision: str | None = None,
    variant: str | None = None,
) -> dict:  # fmt: skip
    """Audit a checkpoint on a prompt set, or a folder of images. Writes the audit into `out`; returns what report.json
    holds.

    The parameters are the options of `salun-sd evaluate`. The report's `gate` says whether each bound of `fail_if`
    holds. Running it again draws, detects and classifies only what is missing. Raises UsageError for arguments that are
    wrong or cannot go together, SalunError for what fails; the text of both is a sentence for a person.
    """
    # check: whatever can fail without drawing fails here, and what needs no model before one is opened
    check_values(
        model=model, prompts=prompts, out=out, where=where, limit=limit, against=against, images=images,
        concept_class=concept_class, classifier=classifier, detector=detector, detector_model=detector_model, clip=clip,
        fid=fid,
        reference=reference, denoising_steps=denoising_steps, size=size, samples_per_prompt=samples_per_prompt,
        fail_if=fail_if, config=config, revision=revision, variant=variant,
    )  # fmt: skip
    trackers = tracker.check(track)
    out, images, reference, weights = Path(out), _path(images), _path(reference), _path(detector_model)
    where, fail_if, concept_class = _texts(where), _texts(fail_if), _texts(concept_class)
    size = None if size is None else str(size)
    check_dtype(dtype)
    names = detectors.checked(_texts(detector), weights)
    check_options(model, against, images, out, prompts=prompts, filters=(where, limit), recursive=recursive,
                  drawing=(denoising_steps, scheduler, guidance, size, dtype), samples=samples_per_prompt,
                  confident=confident, fail_if=fail_if)  # fmt: skip
    check_place(out / "report.json", out / "images" / "0_0.png")
    quality.check_options(fid, reference, has_base=against is not None)
    if weights:
        load_detector(weights)
    models = cache(partial(_models, model, against if prompts else None, config, revision, variant))
    sampling = {"steps": denoising_steps, "scheduler": None if scheduler is None else scheduler_class(scheduler)}
    if prompts is None:
        manifest, twins, unpaired = _gather(images, _path(against), out, recursive, concept_class, classifier, clip)
        request = Request.of_images(manifest)
    else:
        class_model = (models()[0] or models()[1]) if prompts == CLASSES else None
        request, twins, unpaired = Request.of(prompts, where, limit, guidance, size, class_model), None, None
        manifest = collected(images, request.rows, out, subset=bool(where or limit)) if images else None
    samples = len(manifest) // len(request.rows) if images else samples_per_prompt or 1
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

    # look at each model
    tracked = tracker.started(trackers, out, {"images": samples * len(request.rows)})
    settings |= {"sampling": None, "metadata": None if prompts else tools(manifest)}
    if audited:
        manifest, settings["sampling"] = _draw(audited, request, samples, out, **sampling)
    run_of_base = None
    if base:
        drawn, settings["sampling_against"] = _draw(base, request, samples, out / "against", keep=True, **sampling)
        run_of_base = examine(base.name, drawn, judge, looking, out / "against")
    elif twins:
        run_of_base = examine(str(against), twins, judge, looking, out / "against")
    run = examine(audited.name if audited else str(images), manifest, judge, looking, out, run_of_base)

    # assemble
    qualities = quality.measure(measures, run, run_of_base, request.concepts)
    report = assemble(run, run_of_base, prompts=request.name, settings=settings, concepts=request.concepts,
                      quality=qualities) | {"unpaired": unpaired}  # fmt: skip
    report["gate"] = [gate.judge(b, bounds.parts(report, b, in_pairs=confident), confident) for b in parsed] or None
    _warn(report)

    # write
    if ranks.is_main():
        _write(report, run, run_of_base, out, pictures=not no_images)
        if record:
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


def _draw(
    model: Checkpoint, request: Request, samples: int, out: Path, *, steps: int | None, scheduler: str | None,
    dtype: torch.dtype, keep: bool = False,
) -> tuple[list[dict], dict]:  # fmt: skip
    """Draw the images that are missing in out/images. Returns the manifest, a line for each image in the order of the
    prompts, and the sampling settings for the report.

    With `keep`, the images also stay in the user's cache for the next audit.
    """
    sampling = {"scheduler": scheduler or model.scheduler, "steps": steps or model.sampling[0],
                "dtype": dtype_name(dtype)}  # fmt: skip
    default_size = model.image_size, model.image_size
    rows = {(p, k): generate.row_of(p, k, default_size) for p in request.rows for k in range(samples)}
    files = {out / generate.file_of(p, k): row for (p, k), row in rows.items()}
    pipeline, what = cache(partial(load_pipeline, model, dtype=dtype)), line(Path(model.name).name)
    if not keep:
        for _ in generate.draw(pipeline, files, identity=model.identity, what=what, **sampling):
            pass
    elif missing := generate.missing(files, identity=model.identity, **sampling):
        with kept_images("audited", model, pipeline, list(missing.values()), what=what, **sampling) as kept:
            if ranks.is_main():
                remove_stale(out / "images")
                for source, file in zip(kept, missing, strict=True):
                    with new_file(file, many=True) as new:
                        shutil.copyfile(source, new)  # no link: changing the audit's image would change the cache's
    manifest = [line_of(p, k, generate.file_of(p, k), row, sampling["steps"]) for (p, k), row in rows.items()]
    return manifest, {"identity": model.identity, **sampling, "samples": samples, "safety_checker": "off"}


def _warn(report: dict) -> None:
    """Log, each once, the lines of a report that a person should see at once."""
    lines = []
    for key, files in (report["unpaired"] or {}).items():
        if files:
            whose = report[key]["model"] if key == "against" else report["model"]
            lines.append(f"{whose}: images without a partner of the same path, in no count: {len(files)} "
                         f"({some(files)}).")  # fmt: skip
    for side in filter(None, (report, report["against"])):
        if broken := [f"{Path(file).name} ({why})" for file, why in side["broken"].items()]:
            total = len(broken) + images_of(side)
            lines.append(f"{side['model']}: {len(broken)} of {total} images are broken and excluded from every count: "
                         f"{some(broken)}.")  # fmt: skip
        if (score := side["quality"]["clip_score"]) and score["truncated"]:
            lines.append(f"{score['truncated']} prompts are longer than CLIP reads: only their beginning is compared.")
        if (fid := side["quality"]["fid"]) and fid["note"]:
            lines.append(f"{fid['name']}: {fid['note']}")
    for warning in dict.fromkeys(lines):
        logger.warning(warning)


def _write(report: dict, run: Run, base: Run | None, out: Path, pictures: bool) -> None:
    write_atomic(out / "report.json", json.dumps(seals.sealed(report), indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / "report.html", page.html(report, run, base, images=pictures))
    write_atomic(out / "report.md", markdown.page(report))
