"""The work of `evaluate`, files in and files out: draw or collect images, detect, classify, report."""

import json
import os
import re
import sys
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from salun_sd import checkpoint, classify, generate, prompts, provenance, quality, ranks, report
from salun_sd.checkpoint import POCKET, Checkpoint
from salun_sd.classify import Judge
from salun_sd.clip import Clip
from salun_sd.detect import detect, detector_digest, load_detector
from salun_sd.errors import SalunError, UsageError
from salun_sd.features import extractor
from salun_sd.files import write_atomic
from salun_sd.images import images_in
from salun_sd.prompts import Prompt
from salun_sd.report import Run

JUDGE = POCKET / "judge"
MATCHES = 20  # classes whose labels are printed
BATCH = 32  # images that are classified together, by one process
PARTIAL = re.compile(r"\..*\.\d+\.partial")  # what a kill leaves, and the next run takes away
WRITES = {"images", "manifest.jsonl", "detections.jsonl", "report.json", "report.html", "against"}


def evaluate(
    model: Checkpoint | None, *, prompt_set: str, where: list[str], limit: int | None, against: Checkpoint | None,
    images: Path | None, concepts: list[str], classifier: str | None, steps: int | None, samples: int, record: bool,
    detector: Path | None = None, clip: str | None = None, fid: str | None = None, reference: Path | None = None,
    out: Path,
) -> dict:  # fmt: skip
    """Audit a checkpoint, or a folder of images, on a prompt set, or on its rows that meet `where` and of these the
    first `limit`: writes the audit into `out`, gives back the report; with `record`, its headline numbers go into the
    erased checkpoint.

    Running it again draws only what is missing.
    """
    if (model is None) == (images is None):
        raise UsageError("Give either a MODEL to draw from, or --images with a folder of images.")
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir() if not PARTIAL.fullmatch(p.name)} - WRITES):
        raise UsageError(f"{out} holds something that is not of an audit: choose another --out.")
    known = provenance.read(model.path) if model else None
    if record and known is None:
        raise UsageError("--record is for a checkpoint that salun-sd erased: MODEL carries no record of that.")
    if record and model.fingerprint != known["erased"]["fingerprint"]:
        raise SalunError(f"The UNet of {model.name} is not the one that its record names: it was changed since.")
    rows = prompts.read(prompt_set, where, limit)
    asked = prompt_set + (f" where {' and '.join(where)}" if where else "") + (f", the first {limit}" if limit else "")
    classes = list(dict.fromkeys(p.label for p in rows if p.label))
    concepts = _concepts(concepts, classes, known)
    has_others = any(p.label not in concepts for p in rows)
    quality.check(clip, fid, reference, has_base=against is not None, has_others=has_others)
    judge = _judge(classifier, classes)
    if detector:
        load_detector(detector)  # a wrong file is said before anything is drawn
    asked_for = quality.Asked(
        clip and Clip(clip, checkpoint.device()), fid and extractor(fid, JUDGE, checkpoint.device()), reference
    )

    settings = {"where": where, "limit": limit, "classifier": judge and (judge.name if classifier else "pocket judge"),
                "detector_sha256": detector_digest(detector)}  # fmt: skip
    if model:
        manifest, settings["sampling"] = _drawn(model, rows, steps, samples, out)
    else:
        manifest, settings["sampling"] = _collected(images, rows, out, subset=bool(where or limit)), None
        samples = len(manifest) // len(rows)
    run = _examined(model.name if model else str(images), manifest, judge, detector, out)
    base = None
    if against:
        manifest, settings["sampling_against"] = _drawn(against, rows, steps, samples, out / "against")
        base = _examined(against.name, manifest, judge, detector, out / "against")
    of_quality = quality.measure(asked_for, run, base, concepts)
    made = report.assemble(run, base, prompts=asked, settings=settings, concepts=concepts, quality=of_quality)
    _warn(made)
    if not ranks.is_main():
        return made
    write_atomic(out / "report.json", json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / "report.html", report.html(made, run, base))
    if record:
        provenance.add_audit(model.path, report.headline_metrics(made) | {"sampling": settings["sampling"]})
    return made


def revision_of_base(model: Checkpoint | None, base: str) -> str | None:
    """The commit of the hub id `base` that a checkpoint of ours was erased from, if it was from that."""
    known = provenance.read(model.path) if model else None
    return known["base"]["revision"] if known and known["base"]["model"] == base else None


def _concepts(given: list[str], classes: list[str], record: dict | None) -> list[str]:
    """The classes that should be gone: as given, or those that the record of a checkpoint of ours names."""
    if unknown := [c for c in given if c not in classes]:
        known = f"their classes are {', '.join(classes)}" if classes else "they have no classes"
        raise UsageError(f"--concept {unknown[0]} is no class of these prompts: {known}.")
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
            of = len(broken) + (side["metrics"]["flag_rate"] or {"of": 0})["of"]
            said.append(f"{side['model']}: {len(broken)} of {of} images could not be read and count for nothing: "
                        f"{quality.some(broken)}.")  # fmt: skip
        if (score := side["quality"]["clip_score"]) and score["truncated"]:
            said.append(f"{score['truncated']} prompts are longer than CLIP reads: only their beginning is compared.")
        if (fid := side["quality"]["fid"]) and fid["note"]:
            said.append(f"{fid['name']}: {fid['note']}")
    for line in dict.fromkeys(said):
        print(line, file=sys.stderr)


def _judge(classifier: str | None, classes: list[str]) -> Judge | None:
    """The classifier asked for; without one, the pocket's judge where it knows every class of the prompts."""
    device = checkpoint.device()
    if classifier:
        if not classes:
            raise UsageError("--classifier has nothing to judge: these prompts have no column `class`.")
        judge = classify.load(classifier, classes, device)
        for name, label in judge.matches[:MATCHES]:
            print(f"class {name!r} <- {label!r} of {classifier}", file=sys.stderr)
        if len(judge.matches) > MATCHES:
            print(f"and {len(judge.matches) - MATCHES} more", file=sys.stderr)
        return judge
    known = json.loads((JUDGE / "config.json").read_text())["label2id"]
    if classes and set(classes) <= set(known):
        return classify.Classifier(JUDGE, classes, device)
    if classes:
        print("No --classifier for these classes: UA and RA are not measured.", file=sys.stderr)
    return None


def _drawn(
    model: Checkpoint, rows: list[Prompt], steps: int | None, samples: int, out: Path
) -> tuple[list[dict], dict]:  # fmt: skip
    """Draw what is missing in out/images; the manifest, a line for each image in the order of the prompts, and how."""
    steps = steps or model.sampling[0]
    pipeline = cache(partial(checkpoint.load, model))
    drawing = generate.draw(pipeline, rows, out, steps=steps, identity=model.identity, samples=samples)
    for _ in tqdm(drawing, total=len(rows) * samples, desc=f"draw {Path(model.name).name}", unit="image"):
        pass
    manifest = [
        _line(p, k, generate.file_of(p, k), generate.seed_of(p, k), p.guidance, steps)
        for p in rows
        for k in range(samples)
    ]
    return manifest, {"identity": model.identity, "scheduler": model.scheduler, "steps": steps, "samples": samples,
                      "safety_checker": "off"}  # fmt: skip


def _collected(folder: Path, rows: list[Prompt], out: Path, subset: bool) -> list[dict]:
    """The manifest of a folder of <case>_<k>.png that some other program made; with a `subset` of the prompts, images
    of other cases are left out."""
    if not folder.is_dir():
        raise UsageError(f"Image folder {folder} was not found.")
    of_case = {p.case: p for p in rows}
    found = {}
    files = images_in(folder)
    others = {f.name for f in folder.iterdir() if f.is_file() and f.name[0] != "."} - {f.name for f in files}
    if others:
        print(f"{folder}: left out, no images by their ending: {quality.some(sorted(others))}.", file=sys.stderr)
    for file in files:
        name = re.fullmatch(r"(\d+)_(\d+)", file.stem)
        if name and subset and int(name[1]) not in of_case:
            continue
        if not name or int(name[1]) not in of_case:
            raise SalunError(f"{file} is of no prompt: image files are named <case_number>_<k>.png.")
        key = int(name[1]), int(name[2])
        if key in found:
            raise SalunError(f"{file} and {found[key].name} are both image {key[1]} of case {key[0]}: keep one.")
        found[key] = file
    if not found:
        raise UsageError(f"Image folder {folder} holds no images of these prompts, named <case_number>_<k>.png.")
    samples = 1 + max(k for _, k in found)
    if absent := [(case, k) for case in of_case for k in range(samples) if (case, k) not in found]:
        of = len(of_case) * samples
        raise SalunError(f"{folder} has no {absent[0][0]}_{absent[0][1]}.png ({len(absent)} of {of} images missing).")
    return [
        _line(of_case[case], k, os.path.relpath(file, out), None, None, None)
        for (case, k), file in sorted(found.items())
    ]


def _line(p: Prompt, k: int, file: str, seed: int | None, guidance: float | None, steps: int | None) -> dict:
    line = {"file": file, "case": p.case, "k": k, "prompt": p.text, "class": p.label, "seed": seed,
            "guidance": guidance, "steps": steps}  # fmt: skip
    return line | ({"categories": list(p.categories)} if p.categories else {})


def _examined(
    model: str, manifest: list[dict], judge: Judge | None, detector: Path | None,
    out: Path,
) -> Run:  # fmt: skip
    """Run the detector, and the judge if there is one, over the manifest's images, each process over its share; writes
    both .jsonl files."""
    out.mkdir(parents=True, exist_ok=True)
    share = [n for n in range(len(manifest)) if n // BATCH % ranks.count() == ranks.rank()]
    files = [out / manifest[n]["file"] for n in share]
    answers = judge.classify(files, BATCH) if judge else ((None, None) for _ in files)
    bar = tqdm(share, desc="detect", unit="image")
    found = ranks.gathered([
        (n, boxes | {"predicted": predicted, "score": score})
        for n, boxes, (predicted, score) in zip(bar, detect(files, detector), answers, strict=True)
    ])  # fmt: skip
    detections = [
        {key: manifest[n][key] for key in ("file", "case", "k")} | answer
        for n, answer in sorted(found, key=lambda pair: pair[0])
    ]
    if not ranks.is_main():
        return Run(model, out, manifest, detections)
    for name, lines in (("manifest.jsonl", manifest), ("detections.jsonl", detections)):
        write_atomic(out / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return Run(model, out, manifest, detections)
