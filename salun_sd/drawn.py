"""Training images that the base draws itself, as the paper does, kept in the user's cache folder."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from salun_sd import cache, generate
from salun_sd.checkpoint import Checkpoint
from salun_sd.prompts import Prompt
from salun_sd.sources import Item, file_bytes


def drawn_images(base: Checkpoint, pipeline: Callable, rows: list[tuple[str, float]], what: str) -> list[Item]:
    """One image for each (text, guidance scale), drawn by the base once; `what` names them on the progress bar, and
    `pipeline` gives the base's if any is missing.

    The n-th image of a text starts from seed n and is filed under what it is drawn from, so that `mask` and `erase`
    share images, and more of them extend fewer. Another run that draws from this base is waited for.
    """
    steps, _ = base.sampling
    seen: Counter = Counter()
    wanted = []
    for text, guidance in rows:
        seed = seen[text, guidance]
        seen[text, guidance] += 1
        name = hashlib.sha256(json.dumps([text, guidance, seed]).encode()).hexdigest()[:15]
        wanted.append(Prompt(int(name, 16), text, seed, guidance))
    with cache.held("drawn", f"{base.identity[:16]}-{steps}", f"by {Path(base.name).name}, {steps} steps") as folder:
        drawing = generate.draw(pipeline, wanted, folder, steps=steps, identity=base.identity)
        for _ in tqdm(drawing, total=len(wanted), desc=f"draw {what}", unit="image"):
            pass
    files = [folder / generate.file_of(p, 0) for p in wanted]
    return [Item(str(f), p.text, None, partial(file_bytes, f)) for f, p in zip(files, wanted, strict=True)]
