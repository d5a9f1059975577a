"""The images of a folder, and what else is in it."""

import os
import re
from collections import defaultdict
from collections.abc import Container
from pathlib import Path

from PIL import Image

from salun_sd.draw.images import HEIC, formats
from salun_sd.errors import some

SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}  # beside those whose name starts with a dot
ADVICE = dict.fromkeys((".heic", ".heif", ".hif"), HEIC) | {".avif": "AVIF needs pip install --upgrade pillow"}


def visible(folder: Path) -> list[Path]:
    """Everything in a folder, sorted, but hidden files and those that systems put there: "._a.png", "Thumbs.db"."""
    return sorted(p for p in folder.iterdir() if _is_visible(p.name))


def _is_visible(name: str) -> bool:
    return name[0] != "." and name.lower() not in SYSTEM_FILES


def folders_below(folder: Path) -> list[Path]:
    """A folder and all folders in it, sorted, but hidden ones. Links to folders are not followed, so no folder comes
    twice, and none holds itself. Raises OSError for a folder that cannot be opened."""

    def fail(e: OSError) -> None:
        raise e

    places = []
    for place, names, _ in os.walk(folder, onerror=fail):
        names[:] = filter(_is_visible, names)
        places.append(Path(place))
    return sorted(places)


def images_in(folder: Path) -> list[Path]:
    """The files of a folder that have the ending of an image, sorted, without hidden ones."""
    kinds = {*formats(), "MPO"}  # MPO is opened as a JPEG
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in kinds}
    return [path for path in visible(folder) if path.suffix.lower() in endings and path.is_file()]


def left_out(folder: Path, others: Container[str] = (), wanted: str = "an image") -> str:
    """What in a folder is neither an image to read nor called as one of `others`, with the reasons, in words; "" if
    nothing is. Such are folders with images, files that are not named as what is `wanted`, pipes and dangling links.
    """
    images = set(images_in(folder))
    names = defaultdict(list)
    for path in visible(folder):
        if path not in images and path.name not in others and (reason := _reason(path, wanted)):
            names[reason].append(path.name)
    return "; ".join(f"{some(group)} ({reason})" for reason, group in names.items())


def _reason(path: Path, wanted: str) -> str | None:
    """Why a path is no image to read; None for a folder without images."""
    if path.is_dir():
        return _reason_of_folder(path)
    if not path.is_file():
        return "no regular file"
    return ADVICE.get(path.suffix.lower(), f"not named as {wanted}")


def _reason_of_folder(folder: Path) -> str | None:
    try:
        if not any(path.suffix.lower() in ADVICE for path in visible(folder)) and not images_in(folder):
            return None
    except OSError:
        return "folder that cannot be opened"
    kind = "kohya's folder, repeats_name" if re.fullmatch(r"\d+_.+", folder.name) else "folder of images"
    kind = f"link to a {kind}" if folder.is_symlink() else kind
    return f"{kind}: give it in place of {folder.parent}"
