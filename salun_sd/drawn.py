"""Training images that the base draws itself, as the paper does, kept in the user's cache folder."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from salun_sd import checkpoint, generate
from salun_sd.prompts import Prompt


def cache_folder() -> Path:
    """$SALUN_SD_CACHE, or salun-sd in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SALUN_SD_CACHE") or Path(root) / "salun-sd")


def drawn_images(base: Path, pipeline, rows: list[tuple[str, float]], what: str) -> list[Path]:
    """One image file for each (text, guidance scale), drawn by the base once; `what` names them on the progress bar.

    The n-th image of a text starts from seed n and is filed under what it is drawn from, so that `mask` and `erase`
    share images, and more of them extend fewer.
    """
    steps, _ = checkpoint.sampling(base)
    identity = checkpoint.identity(base)
    seen: Counter = Counter()
    wanted = []
    for text, guidance in rows:
        seed = seen[text, guidance]
        seen[text, guidance] += 1
        name = hashlib.sha256(json.dumps([text, guidance, seed]).encode()).hexdigest()[:15]
        wanted.append(Prompt(int(name, 16), text, seed, guidance))
    folder = cache_folder() / "drawn" / f"{identity[:16]}-{steps}"
    drawing = generate.draw(pipeline, wanted, folder, steps=steps, identity=identity)
    for _ in tqdm(drawing, total=len(wanted), desc=f"draw {what}", unit="image"):
        pass
    return [folder / generate.file_of(p, 0) for p in wanted]
