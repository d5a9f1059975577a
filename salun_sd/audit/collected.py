"""The manifest of an audit: a line for each image. The manifest of a folder that another program filled."""

import hashlib
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from salun_sd.draw import generate, metadata
from salun_sd.draw.folders import folders_below, images_in, left_out
from salun_sd.draw.images import in_order
from salun_sd.draw.prompts import Prompt
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.texts import checked_text

logger = logging.getLogger(__name__)


def collected(folder: Path, rows: list[Prompt], out: Path, subset: bool) -> list[dict]:
    """The manifest of a folder of images named <case>_<k>.png; `out` is the folder of the audit.

    If `rows` are a `subset` of the prompts, images of other cases are skipped. If several files are the same image, its
    line has `error`. Raises UsageError if the folder has no images of these prompts, SalunError if an image is missing
    or is of no prompt.
    """
    files = _files(folder, [folder], out)
    of_case = {p.case: p for p in rows}
    images = _by_name(files, of_case, subset)
    if not images:
        raise UsageError(f"Image folder {folder} holds no images of these prompts, named <case_number>_<k>.png: to "
                         "audit images of any names, leave out --prompts.")  # fmt: skip
    samples = 1 + max(k for _, k in images)
    if missing := (total := len(of_case) * samples) - len(images):
        first = next(f"{case}_{k}.png" for case in of_case for k in range(samples) if (case, k) not in images)
        raise SalunError(f"{folder} has no {first} ({missing:,} of {total:,} images missing): add them, or leave their "
                         "prompts out with --where or --limit.")  # fmt: skip
    manifest = []
    for (case, k), same in sorted(images.items()):
        line = generate.line_of(of_case[case], k, _from(out, folder, same[0].name), None, None)
        if len(same) > 1:
            line["error"] = f"{' and '.join(file.name for file in same)} are the same image of case {case}"
        manifest.append(line)
    return manifest


def _files(folder: Path, places: list[Path], out: Path) -> list[Path]:
    """The image files of some places in a folder, in order. What else lies there is logged. Raises UsageError if the
    folder is not there."""
    if not folder.is_dir():
        raise UsageError(f"Image folder {folder} was not found: give --images one with images.")
    checked_text(os.path.relpath(folder.resolve(), out.resolve()), f"The path from {out} to {folder}")
    for place in places:
        if others := left_out(place, {p.name for p in places if p.parent == place}):
            logger.warning(f"{place}: left out are {others}.")
    return [file for place in places for file in images_in(place)]


def _from(out: Path, folder: Path, name: str) -> str:
    """The path to a file in a folder from where the audit lies."""
    return os.path.relpath(folder.resolve() / name, out.resolve())


def _by_name(files: list[Path], of_case: dict[int, Prompt], subset: bool) -> dict[tuple[int, int], list[Path]]:
    """Case and k => the files with that name."""
    images: dict[tuple[int, int], list[Path]] = {}
    for file in files:
        name = re.fullmatch(r"(\d+)_(\d+)", file.stem)
        if name and subset and int(name[1]) not in of_case:
            continue
        if not name or int(name[1]) not in of_case:
            raise SalunError(f"{file} is of no prompt: image files are named <case_number>_<k>.png. To audit images of "
                             "any names, leave out --prompts.")  # fmt: skip
        images.setdefault((int(name[1]), int(name[2])), []).append(file)
    return images


def gathered(folder: Path, out: Path, recursive: bool) -> list[dict]:
    """The manifest of a folder of images of any names, and of those in its folders if `recursive`: a line for each
    file, in the order of their paths. A file to which several links lead comes once.

    A line has the path in the folder as `name`, and what the file's metadata say: `prompt`, `negative`, `seed`, `tool`,
    each None if they do not. Images of the same prompt are one case, for they are alike. Raises UsageError if there is
    no folder or no image.
    """
    files = _files(folder, folders_below(folder) if recursive and folder.is_dir() else [folder], out)
    if not files:
        deeper = "" if recursive else "; with --recursive, its sub-folders are looked into, too"
        raise UsageError(f"Image folder {folder} holds no images: give another --images{deeper}.")
    firsts: dict[Path, str] = {}
    for name in sorted(file.relative_to(folder).as_posix() for file in files):
        firsts.setdefault((folder / checked_text(name, "An image's name")).resolve(), name)
    if links := len(files) - len(firsts):
        logger.warning(f"{folder}: {links} of {len(files)} files are links to others in it, and are not counted again.")
    generations = in_order(metadata.read, [folder / name for name in firsts.values()])
    bar = Bar(zip(firsts.values(), generations, strict=True), total=len(firsts), desc="read metadata", unit="image")
    cases: dict[str | tuple[str], int] = {}
    counts: Counter[int] = Counter()
    manifest = []
    for name, generation in bar:
        known = generation or metadata.Generation(None, None, None, None)
        case = cases.setdefault((name,) if known.prompt is None else known.prompt, len(cases))
        line = generate.line_of(Prompt(case, known.prompt, 0, 0), counts[case], _from(out, folder, name), None, None)
        manifest.append(line | known._asdict() | {"name": name})
        counts[case] += 1
    return manifest


def with_classes(manifest: list[dict], concepts: list[str], classifier: str | None) -> list[dict]:
    """The lines of `gathered`, where the name of the first folder in a path is the class that the image is of.

    It is, if it is asked for: one of `concepts` is the name of such a folder, or there are none and a classifier."""
    folders = [unicodedata.normalize("NFC", line["name"].rpartition("/")[0].partition("/")[0]) for line in manifest]
    given = {unicodedata.normalize("NFC", name) for name in concepts}
    if not (given & {*folders} if given else classifier):
        return manifest
    return [line | {"class": name or None} for line, name in zip(manifest, folders, strict=True)]


def tools(manifest: list[dict]) -> dict[str, int]:
    """The number of images that each program wrote its prompt or seed into; of the others as `none`."""
    return dict(sorted(Counter(line["tool"] or "none" for line in manifest).items()))


class Pairs(NamedTuple):
    """The lines of two folders with the same paths, in the same order and by the same case and k; and the paths that
    only one of the folders has, as `model` and as `against`. Without a base, the other two are None."""

    model: list[dict]
    base: list[dict] | None
    alone: dict[str, list[str]] | None


def matched(manifest: list[dict], base: list[dict], names: tuple[Path, Path]) -> Pairs:
    """Pairs of the images of two folders, called `names`, that have the same path in both. Raises UsageError if there
    are none. Logs in how many pairs the metadata say two prompts."""
    of_base = {line["name"]: line for line in base}
    shared = {line["name"] for line in manifest} & of_base.keys()
    pairs = [(line, of_base[line["name"]]) for line in manifest if line["name"] in shared]
    if not pairs:
        raise UsageError(f"No image of {names[0]} has the same path as one of {names[1]}: --against compares images "
                         "of the same path in both folders.")  # fmt: skip
    prompts = {line["name"]: {line["prompt"], twin["prompt"]} - {None} for line, twin in pairs}
    differ = [name for name, of_both in prompts.items() if len(of_both) > 1]
    if differ:
        logger.warning(f"{len(differ)} of {len(pairs)} pairs of images have two prompts: {some(differ)}.")
    lines, twins = zip(*pairs, strict=True)
    by = ("case", "k", "class")
    alone = {"model": [line["name"] for line in manifest if line["name"] not in shared],
             "against": [name for name in of_base if name not in shared]}  # fmt: skip
    return Pairs(list(lines), [twin | {key: line[key] for key in by} for line, twin in pairs], alone)


def digest(manifest: list[dict]) -> str:
    """SHA-256 of the paths, prompts and classes in the lines of `gathered`: two folders with the same can be compared
    image by image."""
    rows = sorted([line["name"], line["prompt"] or "", line["class"] or ""] for line in manifest)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
