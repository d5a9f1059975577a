"""The quality of the images that erasing should leave alone: CLIP score, FID and KID; and how much they changed."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from salun_sd.audit import change, fidelity
from salun_sd.audit.clip import Clip
from salun_sd.audit.features import ImageModel, Inception, features, resize_of
from salun_sd.audit.measure import Key, mean
from salun_sd.audit.report import NO_QUALITY, Run
from salun_sd.audit.vision import BATCH
from salun_sd.draw.folders import images_in, left_out
from salun_sd.draw.images import in_order, read_still
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.runtime import ranks
from salun_sd.runtime.bar import Bar

logger = logging.getLogger(__name__)

SAME_SEEDS = "the base's images of the same seeds"


class Measures(NamedTuple):
    """What is measured: the CLIP score by `clip`, FID and KID by `extractor`; None leaves it out. `reference` is the
    folder of images that FID and KID compare with; None for the base's images."""

    clip: Clip | None
    extractor: ImageModel | Inception | None
    reference: Path | None


def measure(measures: Measures, run: Run, base: Run | None, concepts: Sequence[str]) -> tuple[dict, dict]:
    """The report's `quality` of a run and of its base, on the images whose prompts ask for no concept.

    An image counts if it can be read, and its twin of the base, too. Without a reference folder, the base's images are
    the reference, pair by pair, and the base has no distance of its own. With a base, the change from it is measured,
    too: see `change.measure`. Each process takes its share of the images; all return the same numbers.
    """
    readable = set.intersection(*({_key(row) for row in side.readable().manifest} for side in (run, base) if side))
    sides = [side and _other_images(side, concepts, readable) for side in (run, base)]
    qualities, features = [dict(NO_QUALITY), dict(NO_QUALITY)], {}
    if measures.clip:
        for quality, images in zip(qualities, sides, strict=True):
            quality["clip_score"] = clip_score(measures.clip, images) if images else None
    if extractor := measures.extractor:
        whose = "this audit, of those that ask for no concept,"
        vectors = [features_of(extractor, [file for file, _ in side], whose) for side in sides if side is not None]
        features = {file: vector for side in vectors for file, vector in side.items()}
        name = str(measures.reference or SAME_SEEDS)
        if measures.reference:
            if others := left_out(measures.reference):
                logger.warning(f"{measures.reference}: left out are {others}.")
            reference = features_of(extractor, images_in(measures.reference), name)
        else:
            reference = vectors.pop()
        for quality, features_of_side in zip(qualities, vectors, strict=False):
            quality |= distances(extractor, *(np.stack([*of.values()]) for of in (features_of_side, reference)), name)
    if base:
        qualities[0] |= change.measure(run, base, concepts, measures.extractor, features)
    return qualities[0], qualities[1]


def check_options(fid: str | None, reference: Path | None, *, has_base: bool) -> None:
    """Raise UsageError if --fid and --reference do not go together, or the reference is no folder of images."""
    if fid and not (reference or has_base):
        raise UsageError("--fid compares with other images: give --against BASE, or --reference with a folder of them.")
    if reference and not fid:
        raise UsageError("--reference needs --fid: give --fid pocket, inception or an image model.")
    if reference and not (reference.is_dir() and len(images_in(reference)) > 1):
        raise UsageError(f"--reference {reference} is not a folder with two images or more.")


def check_others(clip: str | None, fid: str | None, others: int) -> None:
    """Raise UsageError if `others`, the number of images whose prompts ask for no concept, is too small to measure."""
    if (clip or fid) and not others:
        raise UsageError("--clip and --fid measure images whose prompts ask for no concept, and these prompts all ask "
                         "for one: give --prompts with others, or leave them out.")  # fmt: skip
    if fid and others < 2:
        raise UsageError("--fid needs at least two images whose prompts ask for no concept, and this audit has one: "
                         "give more prompts, or leave it out.")  # fmt: skip


def _other_images(run: Run, concepts: Sequence[str], readable: set[Key]) -> list[tuple[Path, dict]]:
    """The readable images whose prompts ask for no concept, and their lines, by case and k."""
    rows = [row for row in run.manifest if row["class"] not in concepts and _key(row) in readable]
    return [(run.folder / row["file"], row) for row in sorted(rows, key=_key)]


def _key(line: dict) -> Key:
    return line["case"], line["k"]


def clip_score(clip: Clip, images: list[tuple[Path, dict]]) -> dict | None:
    """The mean of max(cos(image, prompt), 0) of the images whose prompt is known, and its 95 % interval, a bootstrap
    over prompts; None without such images.

    Hessel et al. 2021 (arXiv 2104.08718) multiply by 2.5. Others publish the cosine, as here, or 100 times it.
    """
    images = [(file, row) for file, row in images if row["prompt"] is not None]
    if not images:
        return None
    share = ranks.share(len(images), BATCH)
    cosines = Bar(_cosines(clip, [images[n] for n in share]), total=len(share), desc="clip score", unit="image")
    of_images = sorted(ranks.gathered(list(zip(share, cosines, strict=True))))
    scores = {_key(images[n][1]): max(cosine, 0.0) for n, cosine in of_images}
    return {
        "name": f"clip_score[{clip.name}, {resize_of(clip.processor)}, max(cos, 0)]",
        "sha256": clip.digest,
        **mean(scores, digits=4),
        "truncated": clip.too_long(list(dict.fromkeys(row["prompt"] for _, row in images))),
    }


def _cosines(clip: Clip, images: list[tuple[Path, dict]]) -> Iterator[float]:
    """The cosine of each image and its prompt."""
    read = in_order(lambda image: (clip.prepare(read_still(image[0])), image[1]["prompt"]), images)
    while batch := list(islice(read, BATCH)):
        prepared, texts = zip(*batch, strict=True)
        yield from (clip.of_images(list(prepared)) * clip.of_texts(texts)).sum(dim=-1).tolist()


def features_of(extractor: ImageModel | Inception, files: Sequence[Path], whose: str) -> dict[Path, np.ndarray]:
    """The features [D], float32, of each readable file, in order; unreadable files are logged.

    Raises SalunError, which says `whose` the files are, if fewer than two are readable.
    """
    share = [files[n] for n in ranks.share(len(files), BATCH)]
    bar = Bar(features(extractor, share), total=len(share), desc="features", unit="image")
    vectors = dict(ranks.gathered(list(bar)))
    if unreadable := [file.name for file in files if file not in vectors]:
        logger.warning(f"{len(unreadable)} of {len(files)} images could not be read for --fid: {some(unreadable)}.")
    if len(vectors) < 2:
        raise SalunError(f"FID and KID need at least two readable images, and {whose} has {len(vectors)}: give more, "
                         "or leave out --fid.")  # fmt: skip
    return {file: vectors[file] for file in files if file in vectors}


def distances(
    extractor: ImageModel | Inception, images: np.ndarray, reference: np.ndarray, name: str
) -> dict[str, dict]:
    """The report's `fid` and `kid` between features [N, D] and the reference's [M, D]; `name` is the reference's."""
    (n, dimensions), m, paired = images.shape, len(reference), name == SAME_SEEDS
    settings = f"[{extractor.name}, {dimensions}-d, {extractor.resize}]"
    note = None
    if min(n, m) <= dimensions:
        note = (f"{min(n, m)} images are too few for {dimensions} dimensions: this FID is too large. Compare it only "
                "with FIDs of as many images, or use KID.")  # fmt: skip
    fid = fidelity.frechet(fidelity.moments(images), fidelity.moments(reference))
    kid = fidelity.kid(images, reference, paired=paired)
    common = {"sha256": extractor.digest, "images": [n, m], "reference": name}
    return {
        "fid": {"name": f"fid{settings}", "value": round(fid, 4), **common, "note": note},
        "kid": {"name": f"kid{settings}", "value": round(kid, 6) + 0.0, **common},  # never -0.0
    }
