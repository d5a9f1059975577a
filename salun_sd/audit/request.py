"""What `evaluate` was asked for, checked before anything is drawn: prompts, concepts, classifier, bounds."""

import json
import logging
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from salun_sd.audit import bounds, classify
from salun_sd.audit.classify import Judge
from salun_sd.audit.looked import FILE as LOOKED
from salun_sd.audit.saved import AT, begins
from salun_sd.checkpoint.model import POCKET, Checkpoint
from salun_sd.draw import prompts
from salun_sd.draw.prompts import Prompt
from salun_sd.errors import UsageError, some
from salun_sd.report import gate
from salun_sd.runtime import seals
from salun_sd.runtime.device import default_device
from salun_sd.runtime.files import HIDDEN, check_place
from salun_sd.runtime.stamps import FILE as STAMPS
from salun_sd.runtime.texts import check_given
from salun_sd.runtime.tracker import FOLDER as TRACKED

logger = logging.getLogger(__name__)

JUDGE = POCKET / "judge"
MATCHES = 20  # most classes whose labels are logged
COUNTS = ("limit", "samples_per_prompt", "denoising_steps")
BEGINNINGS = {  # of the files of an audit
    "report.json": r'\{\s*"schema": ',
    "report.html": r"\s*<!doctype html>[^\0]*<title>Audit of ",
    "report.md": "# Audit of `",
    "manifest.jsonl": r'\{"file": "',
    "detections.jsonl": r'\{"file": "',
    LOOKED: r'[\s\S]{1,8}\{"',
}
ELSEWHERE = r'\{"file": "(?!images/)'  # the beginning of the manifest of images that no model drew there
WRITES = {"images", "against", "attacks", TRACKED, *BEGINNINGS}


def check_values(**options: object) -> None:
    """Raise UsageError for an option, by its parameter's name, whose text is empty or no valid Unicode, or whose number
    is not whole or below 1. None: it was not given."""
    check_given(**options)
    for name in COUNTS:
        value = options[name]
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise UsageError(f"--{name.replace('_', '-')} is {value!r}: give a whole number from 1 on.")


def check_options(
    model: object, against: object, images: Path | None, out: Path, *, prompts: str | None, filters: Sequence[object],
    recursive: bool, drawing: Sequence[object], samples: int | None, confident: bool, fail_if: Sequence[str],
    shard: str | None, record: bool,
) -> None:  # fmt: skip
    """Raise UsageError if options of `evaluate` cannot go together, or `out` holds anything but an audit. `filters` has
    the options that choose prompts, `drawing` those of drawing."""
    if confident and not fail_if:
        raise UsageError("--confident needs --fail-if: give both.")
    if shard and (fail_if or record):
        option = "--fail-if" if fail_if else "--record"
        raise UsageError(f"{option} is for a whole audit, and --shard makes a part of one: leave it out. "
                         "salun-sd merge takes --fail-if.")  # fmt: skip
    if (model is None) == (images is None):
        raise UsageError("Give either a MODEL to draw from, or --images with a folder of images.")
    if images and not (against and prompts) and any(option is not None for option in drawing):
        raise UsageError("--denoising-steps, --scheduler, --guidance, --size, --dtype and --limit-time are for images "
                         "that are drawn: leave them out.")  # fmt: skip
    if prompts is None:
        _check_without_prompts(against, images, filters, shard)
    elif recursive:
        raise UsageError("--recursive is for --images of any names: leave it out, or --prompts.")
    if images and samples is not None:
        raise UsageError("--samples-per-prompt is for a MODEL, and --images has a number of its own: leave it out.")
    check_out(out)
    if images and (out / "images").is_dir():
        raise UsageError(f"{out} holds the audit of a model, with the images that it drew: choose another --out.")
    if not images and begins(out / "manifest.jsonl", ELSEWHERE):
        raise UsageError(f"{out} holds the audit of images in other folders: choose another --out.")


def _check_without_prompts(against: object, images: Path | None, filters: Sequence[object], shard: str | None) -> None:
    if not images:
        raise UsageError("A MODEL draws from prompts: give --prompts, such as --prompts everyday.")
    if shard:
        raise UsageError("--shard divides the rows of --prompts: give it, too, or leave it out.")
    if any(filters):
        raise UsageError("--where and --limit choose rows of --prompts: give it, too, or leave them out.")
    if against is not None and not (isinstance(against, str | Path) and _is_image_folder(Path(against))):
        raise UsageError(f"--against {against} is no folder of images, and a checkpoint draws from prompts: give a "
                         "folder, or --prompts, too.")  # fmt: skip


def _is_image_folder(path: Path) -> bool:
    """Whether a path is a folder, and not that of a checkpoint."""
    return path.is_dir() and not (path / "model_index.json").exists()


def check_out(out: Path) -> None:
    """Raise UsageError if `out` holds anything but an audit."""
    if out.exists() and (not out.is_dir() or not _is_audit(out)):
        raise UsageError(f"{out} holds something that is not of an audit: choose another --out.")


def check_images(out: Path, manifest: list[dict]) -> None:
    """Raise UsageError if `out` holds the audit of images of which the manifest has none."""
    if (earlier := out / "manifest.jsonl").is_file():
        audited = (line["file"] for line in seals.read_lines(earlier, AT, skip=True))
        files = {line["file"] for line in manifest}
        if (first := next(audited, None)) and first not in files and files.isdisjoint(audited):
            raise UsageError(f"{out} holds the audit of other images, or of a folder that was moved, such as {first}: "
                             "choose another --out.")  # fmt: skip


def seconds_in(text: str) -> int:
    """ "2h", "1h30m", "90m" or "1800s" => seconds. Raises UsageError for any other text, and for no time."""
    match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,9})s)?", text.strip().lower())
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    if not (time := 3600 * hours + 60 * minutes + seconds):
        raise UsageError(f"--limit-time {text} is not a time: give hours, minutes or seconds, as in 2h, 90m or 1800s.")
    return time


def _is_audit(folder: Path) -> bool:
    """Whether a folder, and `against` in it, hold nothing but what `evaluate` writes, and what a kill leaves of it. Of
    the files of each, one that is recognised is enough: the others may be damaged, and are written again."""
    names = {path.name for path in folder.iterdir()}
    names = {name for name in names if not HIDDEN.fullmatch(name) and not STAMPS.fullmatch(name)}
    files, base = names & BEGINNINGS.keys(), folder / "against"
    are_own = not files or any(begins(folder / name, BEGINNINGS[name]) for name in files)
    return names <= WRITES and are_own and (not base.is_dir() or _is_audit(base))


def check_record(model: Checkpoint | None, record: dict | None) -> None:
    """Raise UsageError if a checkpoint has no record of its erasure, for --record to add to, or cannot be written."""
    if model is None or record is None:
        raise UsageError("--record needs a checkpoint that salun-sd erased, and MODEL has no record: leave it out.")
    place = model.path / "salun.json" if model.path.is_dir() else model.path
    check_place(place, advice="leave out --record, which writes into MODEL")


class Request(NamedTuple):
    """The prompts of an audit, and what is judged on their images."""

    name: str  # of the prompt set, with its filters in words
    digest: str  # SHA-256 of what two audits share if their images can be compared one by one
    rows: list[Prompt]  # with --guidance and --size, as they are drawn; or one for each image that is there
    concepts: Sequence[str] = ()  # what should be gone
    classifier: str | Path | None = None  # a folder or hub id

    @classmethod
    def of(
        cls, name: str, where: Sequence[str], limit: int | None, guidance: float | None, size: str | None,
        model: Checkpoint | None = None,
    ) -> "Request":  # fmt: skip
        """The prompts of these options of `evaluate`, with nothing to judge yet; `model` is for the set "classes".
        Raises UsageError or SalunError for values that do not exist or cannot be used."""
        sides = None if size is None else prompts.parse_size(size)
        if guidance is not None and not 0 <= guidance <= prompts.MOST_GUIDANCE:
            raise UsageError(f"--guidance {guidance} is not a guidance scale: give a number from 0 to "
                             f"{prompts.MOST_GUIDANCE}, such as 7.5.")  # fmt: skip
        originals = prompts.read(name, where, limit, model)
        rows = prompts.overridden(originals, guidance, sides)
        filtered = f" where {' and '.join(where)}" if where else ""
        first = f", the first {limit}" if limit else ""
        return cls(f"{name}{filtered}{first}", prompts.digest(originals), rows)

    @classmethod
    def of_lines(cls, name: str, digest: str, manifest: list[dict]) -> "Request":
        """A row for each image that a manifest has, with nothing to judge yet."""
        rows = [Prompt(line["case"], line["prompt"] or "", line["seed"] or 0, 0, line["class"],
                       tuple(line.get("categories") or ())) for line in manifest]  # fmt: skip
        return cls(name, digest, rows)

    @property
    def classes(self) -> list[str]:
        """The classes of the rows."""
        return list(dict.fromkeys(p.label for p in self.rows if p.label))

    @property
    def categories(self) -> list[str]:
        """The categories of the rows."""
        return list(dict.fromkeys(category for p in self.rows for category in p.categories))

    def judging(self, concepts: Sequence[str], classifier: str | None, record: dict | None) -> "Request":
        """The same prompts, with what is judged; `record` is the audited checkpoint's. Raises UsageError for classes
        that the prompts do not have, and for a classifier that is missing or has nothing to judge."""
        classes = self.classes
        concepts = _concepts(concepts, classes, record)
        return self._replace(concepts=concepts, classifier=_classifier(classifier, classes, concepts))

    def others(self) -> int:
        """The number of prompts that ask for no concept. If concepts are asked by name, all prompts count for them."""
        return 0 if self.concepts and not self.classes else sum(p.label not in self.concepts for p in self.rows)

    def bounds(
        self, texts: Sequence[str], *, detectors: Sequence[str], against: bool, clip: bool, fid: bool, reference: bool,
        attacks: Mapping[str, Collection[str]] = bounds.NO_ATTACKS,
    ) -> list[gate.Bound]:  # fmt: skip
        """The bounds of --fail-if; of `attacks`, see `bounds.unmeasured`. Raises UsageError for a text that is not a
        bound, or needs what is not measured."""
        absent = bounds.unmeasured(
            against=against, clip=clip, fid=fid, reference=reference, judged=bool(self.classifier),
            has_concepts=bool(self.concepts), has_others=any(name not in self.concepts for name in self.classes),
            has_kept=any(p.label not in self.concepts for p in self.rows), attacks=attacks,
        )  # fmt: skip
        known = bounds.names(self.concepts, self.categories, detectors, attacks)
        return [gate.parse(text, known, absent) for text in texts]

    def judge(self) -> Judge | None:
        """The classifier, loaded; None without one. Its label for each class is logged, but not the pocket judge's,
        which are the same."""
        if not self.classifier:
            return None
        judge = classify.load(self.classifier, self.classes, self.concepts, default_device())
        if self.classifier != JUDGE:
            matches = [f"{name!r} is {label!r}" for name, label in judge.matches]
            logger.info(f"In {self.classifier} {some(matches, MATCHES)}.")
        return judge

    def settings(
        self, judge: Judge | None, where: Sequence[str], limit: int | None, guidance: float | None, size: str | None
    ) -> dict:  # fmt: skip
        """The report's `settings` that are known before anything is drawn."""
        name = judge and ("pocket judge" if self.classifier == JUDGE else judge.name)
        return {"prompts_sha256": self.digest, "where": list(where), "limit": limit,
                "guidance": guidance, "size": size, "classifier": name,
                "classifier_sha256": judge and judge.digest}  # fmt: skip


def _concepts(given: Sequence[str], classes: list[str], record: dict | None) -> list[str]:
    """What should be gone: the given classes, or else those that the concepts in the record name. For prompts without
    classes, whatever is given."""
    given = [unicodedata.normalize("NFC", c) for c in given]
    if classes and (unknown := [c for c in given if c not in classes]):
        raise UsageError(f"--concept-class {unknown[0]} is not a class of these prompts or folders: the classes are "
                         f"{', '.join(classes)}.")  # fmt: skip
    if given or not classes:
        return list(dict.fromkeys(given))
    if record is None:
        logger.warning("No --concept-class: UA is not measured, and RA counts all classes.")
        return []
    texts = [text for c in record["concepts"] for text in [c["prompt"], *c["synonyms"]]]
    label_of = {text: prompts.class_in(text, classes) for text in texts}
    for text in [text for text, label in label_of.items() if label is None]:
        logger.warning(f"The concept {text!r} names no class of these prompts: UA is not measured for it.")
    return list(dict.fromkeys(label for label in label_of.values() if label))


def _classifier(given: str | None, classes: list[str], concepts: list[str]) -> str | Path | None:
    """The given classifier; without one, the pocket judge if it knows every class of the prompts."""
    if given:
        if not classes and not concepts:
            raise UsageError("--classifier has nothing to judge: there are no classes, of a column `class` or of "
                             "sub-folders with --recursive. Add --concept-class, and a CLIP as --classifier looks for "
                             "it in every image.")  # fmt: skip
        return JUDGE if given == "pocket" else given
    if concepts and not classes:
        raise UsageError(f"--concept-class {concepts[0]} needs a --classifier, because it is no class of a column "
                         "`class` or of sub-folders with --recursive: give a CLIP, such as "
                         "openai/clip-vit-base-patch32.")  # fmt: skip
    known = json.loads((JUDGE / "config.json").read_text())["label2id"]
    if classes and set(classes) <= set(known):
        return JUDGE
    if classes:
        logger.warning("No --classifier for these classes: UA and RA are not measured.")
    return None
