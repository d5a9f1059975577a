"""The work of `evaluate`, files in and files out: draw or collect images, detect, classify, report."""

import json
import os
import re
import shutil
import sys
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from salun_sd import checkpoint, classify, gate, generate, markdown, page, prompts, provenance, quality, ranks, report
from salun_sd.checkpoint import POCKET, Checkpoint
from salun_sd.classify import Judge
from salun_sd.clip import Clip
from salun_sd.detect import detector_digest, load_detector
from salun_sd.drawn import drawn
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.examine import examine
from salun_sd.features import extractor
from salun_sd.files import one_of_many, remove_stale, write_atomic
from salun_sd.images import images_in
from salun_sd.prompts import Prompt
from salun_sd.sample import Row, scheduler_class

JUDGE = POCKET / "judge"
MATCHES = 20  # classes whose labels are printed
PARTIAL = re.compile(r"\..*\.\d+\.partial")  # what a kill leaves, and the next run takes away
WRITES = {"images", "manifest.jsonl", "detections.jsonl", "report.json", "report.html", "report.md", "against"}


def evaluate(
    model: Checkpoint | None, *, prompt_set: str, where: list[str], limit: int | None, against: Checkpoint | None,
    images: Path | None, concepts: list[str], classifier: str | None, steps: int | None, scheduler: str | None,
    guidance: float | None, size: str | None, samples: int | None, record: bool, detector: Path | None,
    clip: str | None, fid: str | None, reference: Path | None,
    fail_if: list[str], confident: bool, pictures: bool, out: Path,
) -> dict:  # fmt: skip
    """Audit a checkpoint, or a folder of images, on a prompt set, or on its rows that meet `where` and of these the
    first `limit`: writes the audit into `out`, gives back the report; with `record`, its headline numbers go into the
    erased checkpoint. `scheduler` is one of sample.SCHEDULERS; `guidance` and `size` stand in for the rows' own. The
    bounds of `fail_if` are read before anything is drawn; whether they hold is in the report. Without `pictures`,
    report.html shows none. `samples` is the images a prompt, 1 where it is None; a folder of images has its own.

    Running it again draws and detects only what is missing.
    """
    if (model is None) == (images is None):
        raise UsageError("Give either a MODEL to draw from, or --images with a folder of images.")
    if images and not against and any(option is not None for option in (steps, scheduler, guidance, size)):
        raise UsageError("--steps, --scheduler, --guidance and --size are for images that are drawn: leave them out.")
    if images and samples is not None:
        raise UsageError("--samples-per-prompt is for a MODEL, and --images has its own number: leave it out.")
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir() if not PARTIAL.fullmatch(p.name)} - WRITES):
        raise UsageError(f"{out} holds something that is not of an audit: choose another --out.")
    if images and (out / "images").is_dir():
        raise UsageError(f"{out} holds the audit of a model, with the images that it drew: choose another --out.")
    known = provenance.read(model.path) if model else None
    if record and known is None:
        raise UsageError("--record is for a checkpoint that salun-sd erased: MODEL carries no record of that.")
    if record and model.fingerprint != known["erased"]["fingerprint"]:
        raise SalunError(f"The UNet of {model.name} is not the one that its record names: it was changed since.")
    own = prompts.read(prompt_set, where, limit)
    rows = _typed(own, guidance, size)
    for each in filter(None, (model, against)):
        generate.check(each, rows, steps)
    how = {"steps": steps, "scheduler": scheduler and scheduler_class(scheduler)}
    asked = prompt_set + (f" where {' and '.join(where)}" if where else "") + (f", the first {limit}" if limit else "")
    classes = list(dict.fromkeys(p.label for p in rows if p.label))
    concepts = _concepts(concepts, classes, known)
    manifest = _collected(images, rows, out, subset=bool(where or limit)) if images else None
    samples = len(manifest) // len(rows) if images else samples or 1
    by_name = bool(concepts and not classes)
    others = 0 if by_name else samples * sum(p.label not in concepts for p in rows)
    quality.check_asked(clip, fid, reference, has_base=against is not None, others=others)
    judged_by = _classifier(classifier, classes, concepts)
    known_names = gate.names(concepts, list(dict.fromkeys(category for p in rows for category in p.categories)))
    absent = gate.unmeasured(
        against=bool(against), clip=bool(clip), fid=bool(fid), reference=bool(reference), judged=bool(judged_by),
        has_concepts=bool(concepts), has_others=any(label not in concepts for label in classes),
    )  # fmt: skip
    bounds = [gate.parse(text, known_names, absent) for text in fail_if]
    judge = judged_by and _judge(judged_by, classes, concepts)
    if detector:
        load_detector(detector)  # a wrong file is said before anything is drawn
    asked_for = quality.Asked(
        clip and Clip(clip, checkpoint.device()), fid and extractor(fid, JUDGE, checkpoint.device()), reference
    )

    settings = {"prompts_sha256": prompts.digest(own), "where": where, "limit": limit, "guidance": guidance,
                "size": size,
                "classifier": judge and ("pocket judge" if judged_by == JUDGE else judge.name),
                "classifier_sha256": judge and judge.digest,
                "detector_sha256": detector_digest(detector)}  # fmt: skip
    if model:
        manifest, settings["sampling"] = _drawn(model, rows, samples, out, **how)
    else:
        settings["sampling"] = None
    run = examine(model.name if model else str(images), manifest, judge, detector, out)
    base = None
    if against:
        manifest, settings["sampling_against"] = _drawn(against, rows, samples, out / "against", keep=True, **how)
        base = examine(against.name, manifest, judge, detector, out / "against")
    of_quality = quality.of_sides(asked_for, run, base, concepts)
    made = report.assemble(run, base, prompts=asked, settings=settings, concepts=concepts, quality=of_quality)
    made["gate"] = [gate.judge(made, bound, confident) for bound in bounds] or None
    _warn(made)
    if not ranks.is_main():
        return made
    write_atomic(out / "report.json", json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / "report.html", page.html(made, run, base, images=pictures))
    write_atomic(out / "report.md", markdown.page(made))
    if record:
        provenance.add_audit(model.path, report.headline_metrics(made) | {"sampling": settings["sampling"]})
    return made


def revision_of_base(model: Checkpoint | None, base: str) -> str | None:
    """The commit of the hub id `base` that a checkpoint of ours was erased from, if it was from that."""
    known = provenance.read(model.path) if model else None
    return known["base"]["revision"] if known and known["base"]["model"] == base else None


def _concepts(given: list[str], classes: list[str], record: dict | None) -> list[str]:
    """What should be gone: classes as given, or those that the record of a checkpoint of ours names; of prompts without
    classes anything."""
    if classes and (unknown := [c for c in given if c not in classes]):
        raise UsageError(f"--concept {unknown[0]} is no class of these prompts: their classes are "
                         f"{', '.join(classes)}.")  # fmt: skip
    if given or not classes:
        return list(dict.fromkeys(given))
    if record is None:
        print("No --concept: UA is not measured, and RA is of all classes.", file=sys.stderr)
        return []
    said = {text: prompts.class_in(text, classes) for c in record["concepts"] for text in [c["prompt"], *c["synonyms"]]}
    for text in [text for text, label in said.items() if label is None]:
        print(f"The concept {text!r} names no class of these prompts: UA is not measured for it.", file=sys.stderr)
    return list(dict.fromkeys(label for label in said.values() if label))


def _warn(made: dict) -> None:
    """What of the report a person should hear at once, on stderr."""
    said = []
    for side in filter(None, (made, made["against"])):
        if broken := [f"{Path(file).name} ({why})" for file, why in side["broken"].items()]:
            of = len(broken) + report.images_of(side)
            said.append(f"{side['model']}: {len(broken)} of {of} images could not be read and count for nothing: "
                        f"{some(broken)}.")  # fmt: skip
        if (score := side["quality"]["clip_score"]) and score["truncated"]:
            said.append(f"{score['truncated']} prompts are longer than CLIP reads: only their beginning is compared.")
        if (fid := side["quality"]["fid"]) and fid["note"]:
            said.append(f"{fid['name']}: {fid['note']}")
    for line in dict.fromkeys(said):
        print(line, file=sys.stderr)


def _classifier(given: str | None, classes: list[str], concepts: list[str]) -> str | Path | None:
    """The classifier asked for; without one, the pocket's judge where it knows every class of the prompts."""
    if given:
        if not classes and not concepts:
            raise UsageError("--classifier has nothing to judge: these prompts have no column `class`. Give --concept, "
                             "and with a CLIP as --classifier every image is asked whether it shows that.")  # fmt: skip
        return JUDGE if given == "pocket" else given
    if concepts and not classes:
        raise UsageError(f"--concept {concepts[0]} needs a --classifier that is asked for it, as these prompts have no "
                         "classes: give a CLIP, such as openai/clip-vit-base-patch32.")  # fmt: skip
    known = json.loads((JUDGE / "config.json").read_text())["label2id"]
    if classes and set(classes) <= set(known):
        return JUDGE
    if classes:
        print("No --classifier for these classes: UA and RA are not measured.", file=sys.stderr)
    return None


def _judge(classifier: str | Path, classes: list[str], concepts: list[str]) -> Judge:
    """The classifier, loaded; what it takes the classes for is printed, but of the pocket's judge, which is theirs."""
    judge = classify.load(classifier, classes, concepts, checkpoint.device())
    if classifier != JUDGE:
        matches = [f"{name!r} is {label!r}" for name, label in judge.matches]
        print(f"In {classifier} {some(matches, MATCHES)}.", file=sys.stderr)
    return judge


def _typed(rows: list[Prompt], guidance: float | None, size: str | None) -> list[Prompt]:
    """The prompts with what was typed in place of their own guidance and size."""
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise UsageError(f"--guidance {guidance:g} is no guidance scale: give a number from 0 on, such as 7.5.")
    return prompts.overridden(rows, guidance, prompts.size_of(size) if size else None)


def _drawn(
    model: Checkpoint, rows: list[Prompt], samples: int, out: Path, *, steps: int | None, scheduler: str | None,
    keep: bool = False,
) -> tuple[list[dict], dict]:  # fmt: skip
    """Draw what is missing in out/images; the manifest, a line for each image in the order of the prompts, and how.

    With `keep`, the images are kept in the user's cache for the next audit, too.
    """
    how = {"scheduler": scheduler or model.scheduler, "steps": steps or model.sampling[0]}
    own = model.image_size, model.image_size
    wanted = {(p, k): generate.row_of(p, k, own) for p in rows for k in range(samples)}
    files = {out / generate.file_of(p, k): row for (p, k), row in wanted.items()}
    pipeline, what = cache(partial(checkpoint.load, model)), Path(model.name).name
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
    manifest = [_line(p, k, generate.file_of(p, k), row, how["steps"]) for (p, k), row in wanted.items()]
    return manifest, {"identity": model.identity, **how, "samples": samples, "safety_checker": "off"}


def _collected(folder: Path, rows: list[Prompt], out: Path, subset: bool) -> list[dict]:
    """The manifest of a folder of <case>_<k>.png that some other program made; with a `subset` of the prompts, images
    of other cases are left out. Where several files are one image, its line has `error`."""
    if not folder.is_dir():
        raise UsageError(f"Image folder {folder} was not found.")
    of_case = {p.case: p for p in rows}
    found: dict[tuple[int, int], list[Path]] = {}
    files = images_in(folder)
    others = {f.name for f in folder.iterdir() if f.is_file() and f.name[0] != "."} - {f.name for f in files}
    if others:
        print(f"{folder}: {len(others)} left out, no images by their ending: {some(sorted(others))}.", file=sys.stderr)
    for file in files:
        name = re.fullmatch(r"(\d+)_(\d+)", file.stem)
        if name and subset and int(name[1]) not in of_case:
            continue
        if not name or int(name[1]) not in of_case:
            raise SalunError(f"{file} is of no prompt: image files are named <case_number>_<k>.png.")
        found.setdefault((int(name[1]), int(name[2])), []).append(file)
    if not found:
        raise UsageError(f"Image folder {folder} holds no images of these prompts, named <case_number>_<k>.png.")
    samples = 1 + max(k for _, k in found)
    if absent := (of := len(of_case) * samples) - len(found):
        first = next(f"{case}_{k}.png" for case in of_case for k in range(samples) if (case, k) not in found)
        raise SalunError(f"{folder} has no {first} ({absent:,} of {of:,} images missing).")
    here, there, manifest = out.resolve(), folder.resolve(), []
    for (case, k), same in sorted(found.items()):
        line = _line(of_case[case], k, os.path.relpath(there / same[0].name, here), None, None)
        if len(same) > 1:
            line["error"] = f"{' and '.join(file.name for file in same)} are the same image of case {case}"
        manifest.append(line)
    return manifest


def _line(p: Prompt, k: int, file: str, row: Row | None, steps: int | None) -> dict:
    line = {"file": file, "case": p.case, "k": k, "prompt": p.text, "class": p.label, "seed": row and row.seed,
            "guidance": row and row.guidance, "size": row and list(row.size), "steps": steps}  # fmt: skip
    return line | ({"categories": list(p.categories)} if p.categories else {})
