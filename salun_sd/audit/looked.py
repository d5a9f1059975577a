"""What the models of quality found of an audit's images, one by one: kept beside a shard's images, read and joined."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from salun_sd.audit.measure import Key
from salun_sd.errors import SalunError, first_line
from salun_sd.runtime.documents import parse_json
from salun_sd.runtime.files import write_atomic

FILE = "looked.safetensors"
MAKER = ({"name": str, "resize": str, "digest": str}, None)
ABOUT = {"reference": str, "clip": MAKER, "extractor": MAKER}


class Maker(NamedTuple):
    """The model that made something: its name in metrics, its resize of images, the digest of its weights."""

    name: str
    resize: str
    digest: str


class Score(NamedTuple):
    """The cosine of an image and its prompt, and whether the prompt is longer than CLIP reads."""

    cosine: float
    is_cut: bool


class Looked(NamedTuple):
    """The scores of CLIP, and the features [D], float32, of an extractor: each for the images of the model, then for
    those of its base, by case and k. `reference` names what FID compares with; `of_reference` has the features [M, D]
    of such a folder."""

    reference: str
    clip: Maker | None = None
    scores: Sequence[dict[Key, Score]] = ()
    extractor: Maker | None = None
    features: Sequence[dict[Key, np.ndarray]] = ()
    of_reference: np.ndarray | None = None

    def about(self) -> dict:
        """Who looked, at how many sides, and what FID compares with: what is joined has to agree on it."""
        clip, extractor = (maker and maker._asdict() for maker in (self.clip, self.extractor))
        reference = None if self.of_reference is None else self.of_reference.shape[0]
        sides = [len(self.scores), len(self.features)]
        return {"reference": self.reference, "clip": clip, "extractor": extractor, "reference images": reference,
                "sides": sides}  # fmt: skip


def save(looked: Looked, folder: Path) -> None:
    from safetensors.numpy import save

    tensors = {}
    for kind, sides, empty in (("scores", looked.scores, (0, 2)), ("features", looked.features, (0, 0))):
        for n, found in enumerate(sides):
            tensors[f"{kind}.{n}.of"] = np.array([*found], np.int64).reshape(-1, 2)
            tensors[f"{kind}.{n}"] = np.array([*found.values()]) if found else np.zeros(empty, np.float32)
    if looked.of_reference is not None:
        tensors["reference"] = looked.of_reference
    write_atomic(folder / FILE, save(tensors, {"about": json.dumps(looked.about())}))


def read(folder: Path) -> Looked:
    """What `save` wrote into a folder. Raises SalunError where it is absent or damaged."""
    from safetensors import safe_open

    file = folder / FILE
    try:
        with safe_open(file, "numpy") as opened:
            about = parse_json(opened.metadata()["about"], "about", ABOUT)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
        clip, extractor = (about[name] and Maker(**about[name]) for name in ("clip", "extractor"))
        scores, features = (
            [
                dict(zip(map(tuple, tensors[f"{kind}.{n}.of"].tolist()), tensors[f"{kind}.{n}"], strict=True))
                for n in range(2)
                if f"{kind}.{n}" in tensors
            ]
            for kind in ("scores", "features")
        )
        scores = [{key: Score(float(s[0]), bool(s[1])) for key, s in of_side.items()} for of_side in scores]
    except Exception as e:  # a damaged file raises many types
        why = first_line(e)
        raise SalunError(f"{file} is damaged or absent ({why}): type the shard's evaluate command again.") from e
    return Looked(about["reference"], clip, scores, extractor, features, tensors.get("reference"))


def joined(parts: Sequence[Looked]) -> Looked:
    """Several shards' as one, in the order of case and k."""
    first = parts[0]

    def union(sides: Sequence[Sequence[dict]]) -> list[dict]:
        return [dict(sorted(pair for part in of for pair in part.items())) for of in zip(*sides, strict=True)]

    scores, features = union([part.scores for part in parts]), union([part.features for part in parts])
    return first._replace(scores=scores, features=features)
