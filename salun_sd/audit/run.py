"""The work of `evaluate`: draw or collect images, look at them, report."""

import json
import logging
import shutil
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from salun_sd.audit import bounds, markdown, page, quality
from salun_sd.audit.clip import Clip
from salun_sd.audit.collected import collected, line_of
from salun_sd.audit.detect import detector_digest, load_detector
from salun_sd.audit.examine import examine
from salun_sd.audit.features import extractor
from salun_sd.audit.report import Run, assemble, headline_metrics, images_of
from salun_sd.audit.request import JUDGE, Request, check_options, record_of
from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import generate
from salun_sd.draw.kept import drawn
from salun_sd.draw.sample import scheduler_class
from salun_sd.errors import UsageError, some
from salun_sd.report import gate
from salun_sd.runtime import ranks
from salun_sd.runtime.device import default_device
from salun_sd.runtime.files import one_of_many, remove_stale, write_atomic

logger = logging.getLogger(__name__)


def evaluate(
    model: str | Path | Checkpoint | None = None, *, prompts: str, out: str | Path, where: Sequence[str] = (),
    limit: int | None = None, against: str | Path | Checkpoint | None = None, images: str | Path | None = None,
    concept_class: str | Sequence[str] = (), classifier: str | None = None, detector_model: str | Path | None = None,
    clip: str | None = None, fid: str | None = None, reference: str | Path | None = None,
    denoising_steps: int | None = None, scheduler: str | None = None, guidance: float | None = None,
    size: str | None = None, samples_per_prompt: int | None = None, no_images: bool = False, record: bool = False,
    fail_if: str | Sequence[str] = (), confident: bool = False, config: str | None = None, revision: str | None = None,
    variant: str | None = None,
) -> dict:  # fmt: skip
    """Audit a checkpoint, or a folder of images, on a prompt set; write the audit into `out`, give the report that
    report.json holds. Parameters are those of `salun-sd evaluate`. Whether the bounds of `fail_if` hold is in the
    report's `gate`.

    Running it again draws and detects only what is missing. Raises UsageError for what cannot go together, SalunError
    for what fails; both are sentences for a person.
    """
    # check: what can be refused is refused here
    out, images, reference, detector = Path(out), _path(images), _path(reference), _path(detector_model)
    where, fail_if, concept_class = _texts(where), _texts(fail_if), _texts(concept_class)
    check_options(model, against, images, out, drawing=(denoising_steps, scheduler, guidance, size),
                  samples=samples_per_prompt, confident=confident, fail_if=fail_if)  # fmt: skip
    audited, base = _models(model, against, config, revision, variant)
    known = record_of(audited, record)
    wanted = Request.of(prompts, where, limit, guidance, size, concept_class, classifier, known)
    for each in filter(None, (audited, base)):
        generate.check(each, wanted.rows, denoising_steps)
    how = {"steps": denoising_steps, "scheduler": scheduler and scheduler_class(scheduler)}
    manifest = collected(images, wanted.rows, out, subset=bool(where or limit)) if images else None
    samples = len(manifest) // len(wanted.rows) if images else samples_per_prompt or 1
    quality.check_asked(clip, fid, reference, has_base=base is not None, others=samples * wanted.others())
    parsed = wanted.bounds(fail_if, against=base is not None, clip=bool(clip), fid=bool(fid),
                           reference=reference is not None)  # fmt: skip
    judge = wanted.judge()
    if detector:
        load_detector(detector)  # a wrong file is said before anything is drawn
    measured = quality.Asked(
        clip and Clip(clip, default_device()), fid and extractor(fid, JUDGE, default_device()), reference
    )
    settings = wanted.settings(judge, where, limit, guidance, size) | {"detector_sha256": detector_digest(detector)}

    # look at each model
    settings["sampling"] = None
    if audited:
        manifest, settings["sampling"] = _drawn(audited, wanted, samples, out, **how)
    run = examine(audited.name if audited else str(images), manifest, judge, detector, out)
    run_of_base = None
    if base:
        manifest, settings["sampling_against"] = _drawn(base, wanted, samples, out / "against", keep=True, **how)
        run_of_base = examine(base.name, manifest, judge, detector, out / "against")

    # assemble
    qualities = quality.of_sides(measured, run, run_of_base, wanted.concepts)
    report = assemble(run, run_of_base, prompts=wanted.name, settings=settings, concepts=wanted.concepts,
                      quality=qualities)  # fmt: skip
    report["gate"] = [gate.judge(b, bounds.parts(report, b, in_pairs=confident), confident) for b in parsed] or None
    _warn(report)

    # write
    if ranks.is_main():
        _write(report, run, run_of_base, out, pictures=not no_images)
        if record:
            provenance.add_audit(audited.path, headline_metrics(report) | {"sampling": settings["sampling"]})
    return report


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _texts(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _models(
    model: str | Path | Checkpoint | None, against: str | Path | Checkpoint | None, config: str | None,
    revision: str | None, variant: str | None,
) -> tuple[Checkpoint | None, Checkpoint | None]:  # fmt: skip
    """The model and its base, opened. --config is for those that are single files, --variant for the others; a base of
    the hub is taken at the commit that the model was erased from."""
    are_files = [Path(name).is_file() for name in (model, against) if isinstance(name, str | Path)]
    if (config and not any(are_files)) or (variant and all(are_files)) or (revision and not model):
        raise UsageError("--config is for a single file, --revision and --variant for a MODEL that is none.")

    def found(name: str | Path | Checkpoint | None, revision: str | None) -> Checkpoint | None:
        if name is None:
            return None
        is_file = isinstance(name, str | Path) and Path(name).is_file()
        return opened(name, config if is_file else None, revision, None if is_file else variant)

    audited = found(model, revision)
    record = provenance.read(audited.path) if audited else None
    of_base = record["base"]["revision"] if record and record["base"]["model"] == str(against) else None
    return audited, found(against, of_base)


def _drawn(
    model: Checkpoint, wanted: Request, samples: int, out: Path, *, steps: int | None, scheduler: str | None,
    keep: bool = False,
) -> tuple[list[dict], dict]:  # fmt: skip
    """Draw what is missing in out/images; the manifest, a line for each image in the order of the prompts, and how.

    With `keep`, the images are kept in the user's cache for the next audit, too.
    """
    how = {"scheduler": scheduler or model.scheduler, "steps": steps or model.sampling[0]}
    own = model.image_size, model.image_size
    rows = {(p, k): generate.row_of(p, k, own) for p in wanted.rows for k in range(samples)}
    files = {out / generate.file_of(p, k): row for (p, k), row in rows.items()}
    pipeline, what = cache(partial(load_pipeline, model)), Path(model.name).name
    if not keep:
        drawing = generate.draw(pipeline, files, identity=model.identity, **how)
        for _ in tqdm(drawing, total=len(files), desc=f"draw {what}", unit="image"):
            pass
    elif left := generate.missing(files, identity=model.identity, **how):
        with drawn("audited", model, pipeline, list(left.values()), what=what, **how) as kept:
            if ranks.is_main():
                remove_stale(out / "images")
                for source, file in zip(kept, left, strict=True):
                    with one_of_many(file) as new:
                        shutil.copyfile(source, new)  # no link: who blurs the image would change the cache's
    manifest = [line_of(p, k, generate.file_of(p, k), row, how["steps"]) for (p, k), row in rows.items()]
    return manifest, {"identity": model.identity, **how, "samples": samples, "safety_checker": "off"}


def _warn(report: dict) -> None:
    """Log what of the report a person should hear at once, each line once."""
    lines = []
    for side in filter(None, (report, report["against"])):
        if broken := [f"{Path(file).name} ({why})" for file, why in side["broken"].items()]:
            of = len(broken) + images_of(side)
            lines.append(f"{side['model']}: {len(broken)} of {of} images could not be read and count for nothing: "
                         f"{some(broken)}.")  # fmt: skip
        if (score := side["quality"]["clip_score"]) and score["truncated"]:
            lines.append(f"{score['truncated']} prompts are longer than CLIP reads: only their beginning is compared.")
        if (fid := side["quality"]["fid"]) and fid["note"]:
            lines.append(f"{fid['name']}: {fid['note']}")
    for line in dict.fromkeys(lines):
        logger.warning(line)


def _write(report: dict, run: Run, base: Run | None, out: Path, pictures: bool) -> None:
    write_atomic(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / "report.html", page.html(report, run, base, images=pictures))
    write_atomic(out / "report.md", markdown.page(report))
