"""The manifest of an audit: a line for each image. The manifest of a folder that another program filled."""

import logging
import os
import re
from pathlib import Path

from salun_sd.draw.folders import images_in, left_out
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Row
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.texts import checked_text

logger = logging.getLogger(__name__)


def collected(folder: Path, rows: list[Prompt], out: Path, subset: bool) -> list[dict]:
    """The manifest of a folder of images named <case>_<k>.png; `out` is the folder of the audit.

    If `rows` are a `subset` of the prompts, images of other cases are skipped. If several files are the same image, its
    line has `error`. Raises UsageError if the folder has no images of these prompts, SalunError if an image is missing
    or is of no prompt.
    """
    if not folder.is_dir():
        raise UsageError(f"Image folder {folder} was not found: give one with images named <case_number>_<k>.png.")
    checked_text(os.path.relpath(folder.resolve(), out.resolve()), f"The path from {out} to {folder}")
    files = images_in(folder)
    if others := left_out(folder):
        logger.warning(f"{folder}: left out are {others}.")
    of_case = {p.case: p for p in rows}
    images = _by_name(files, of_case, subset)
    if not images:
        raise UsageError(f"Image folder {folder} holds no images of these prompts, named <case_number>_<k>.png.")
    samples = 1 + max(k for _, k in images)
    if missing := (total := len(of_case) * samples) - len(images):
        first = next(f"{case}_{k}.png" for case in of_case for k in range(samples) if (case, k) not in images)
        raise SalunError(f"{folder} has no {first} ({missing:,} of {total:,} images missing): add them, or leave their "
                         "prompts out with --where or --limit.")  # fmt: skip
    manifest = []
    for (case, k), same in sorted(images.items()):
        file = os.path.relpath(folder.resolve() / same[0].name, out.resolve())
        line = line_of(of_case[case], k, file, None, None)
        if len(same) > 1:
            line["error"] = f"{' and '.join(file.name for file in same)} are the same image of case {case}"
        manifest.append(line)
    return manifest


def _by_name(files: list[Path], of_case: dict[int, Prompt], subset: bool) -> dict[tuple[int, int], list[Path]]:
    """Case and k => the files with that name."""
    images: dict[tuple[int, int], list[Path]] = {}
    for file in files:
        name = re.fullmatch(r"(\d+)_(\d+)", file.stem)
        if name and subset and int(name[1]) not in of_case:
            continue
        if not name or int(name[1]) not in of_case:
            raise SalunError(f"{file} is of no prompt: image files are named <case_number>_<k>.png.")
        images.setdefault((int(name[1]), int(name[2])), []).append(file)
    return images


def line_of(p: Prompt, k: int, file: str, row: Row | None, steps: int | None) -> dict:
    """An image's line of manifest.jsonl; `row` is what it was drawn from, None if that is unknown."""
    line = {"file": file, "case": p.case, "k": k, "prompt": p.text, "class": p.label, "seed": row and row.seed,
            "guidance": row and row.guidance, "size": row and list(row.size), "steps": steps}  # fmt: skip
    return line | ({"categories": list(p.categories)} if p.categories else {})
