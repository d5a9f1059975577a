"""What erasing did to the images it should leave alone: CLIP score, and FID and KID to a reference."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from salun_sd.audit import fidelity
from salun_sd.audit.clip import Clip
from salun_sd.audit.features import ImageModel, Inception, features, resize_of
from salun_sd.audit.measure import Key
from salun_sd.audit.report import NO_QUALITY, Run
from salun_sd.audit.vision import BATCH
from salun_sd.draw.images import images_in, in_order, read_still
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.report.stats import cluster_interval
from salun_sd.runtime import ranks

logger = logging.getLogger(__name__)

SAME_SEEDS = "the base's images of the same seeds"


class Asked(NamedTuple):
    """What is to be measured: `clip` the CLIP score, `extractor` FID and KID; `reference` is a folder of images, None
    for the base's."""

    clip: Clip | None
    extractor: ImageModel | Inception | None
    reference: Path | None


def of_sides(asked: Asked, run: Run, base: Run | None, concepts: Sequence[str]) -> tuple[dict, dict]:
    """The report's `quality` of a run, and of its base: of the images whose prompts ask for no concept.

    An image counts where it can be read, and its twin of the base, too. Without a reference folder the base's images
    are the reference, pair by pair, and have no distance of their own. Each process takes its share of the images; all
    end with the same numbers.
    """
    read = set.intersection(*({_key(row) for row in side.readable().manifest} for side in (run, base) if side))
    sides = [side and kept(side, concepts, read) for side in (run, base)]
    made = [dict(NO_QUALITY), dict(NO_QUALITY)]
    if asked.clip:
        for entry, side in zip(made, sides, strict=True):
            entry["clip_score"] = clip_score(asked.clip, side) if side else None
    if asked.extractor:
        files = [[file for file, _ in side] for side in sides if side is not None]
        vectors = [
            features_of(asked.extractor, of_side, "this audit, of those that ask for no concept,") for of_side in files
        ]
        words = str(asked.reference or SAME_SEEDS)
        there = features_of(asked.extractor, images_in(asked.reference), words) if asked.reference else vectors.pop()
        for entry, here in zip(made, vectors, strict=False):
            entry |= distances(asked.extractor, here, there, words)
    return made[0], made[1]


def check_asked(clip: str | None, fid: str | None, reference: Path | None, *, has_base: bool, others: int) -> None:
    """UsageError where --fid has nothing to compare with, --reference no use, or too few images, `others`, ask for no
    concept."""
    if (clip or fid) and not others:
        raise UsageError("--clip and --fid speak of images that ask for no concept, and these prompts all ask for one: "
                         "give --prompts with others, or leave them out.")  # fmt: skip
    if fid and others < 2:
        raise UsageError("--fid needs two images or more that ask for no concept, and this audit has one: give more "
                         "prompts, or leave it out.")  # fmt: skip
    if fid and not (reference or has_base):
        raise UsageError("--fid compares with other images: give --against BASE, or --reference with a folder of them.")
    if reference and not fid:
        raise UsageError("--reference is for --fid: give --fid pocket, inception or an image model.")
    if reference and not (reference.is_dir() and len(images_in(reference)) > 1):
        raise UsageError(f"--reference {reference} is no folder with images, two or more.")


def kept(run: Run, concepts: Sequence[str], read: set[Key]) -> list[tuple[Path, dict]]:
    """Of the images in `read`, the files that ask for none of the concepts and their lines, by case and k."""
    rows = [row for row in run.manifest if row["class"] not in concepts and _key(row) in read]
    return [(run.folder / row["file"], row) for row in sorted(rows, key=_key)]


def _key(line: dict) -> Key:
    return line["case"], line["k"]


def clip_score(clip: Clip, images: list[tuple[Path, dict]]) -> dict | None:
    """max(cos(image, text), 0) of each image and its own prompt (Hessel et al. 2021, arXiv 2104.08718, there times 2.5;
    others publish the cosine, as here, or 100 times it): the mean, and its 95 % interval, a bootstrap over prompts.

    None without images.
    """
    if not images:
        return None
    share = ranks.share(len(images), BATCH)
    cosines = tqdm(_cosines(clip, [images[n] for n in share]), total=len(share), desc="clip score", unit="image")
    of_case: dict[int, list[float]] = {}
    for n, cosine in sorted(ranks.gathered(list(zip(share, cosines, strict=True)))):
        of_case.setdefault(images[n][1]["case"], []).append(max(cosine, 0.0))
    scores = [score for several in of_case.values() for score in several]
    ends = cluster_interval([(sum(several), len(several)) for several in of_case.values()])
    return {
        "name": f"clip_score[{clip.name}, {resize_of(clip.processor)}, max(cos, 0)]",
        "sha256": clip.digest,
        "value": round(float(np.mean(scores)), 4),
        "ci95": [round(end, 4) for end in ends] if len(of_case) > 1 else None,
        "interval": "bootstrap over prompts" if len(of_case) > 1 else None,
        "images": len(scores),
        "prompts": len(of_case),
        "truncated": clip.too_long(list(dict.fromkeys(row["prompt"] for _, row in images))),
    }


def _cosines(clip: Clip, images: list[tuple[Path, dict]]) -> Iterator[float]:
    """The cosine of each image and its prompt."""
    read = in_order(lambda image: (clip.prepare(read_still(image[0])), image[1]["prompt"]), images)
    while batch := list(islice(read, BATCH)):
        prepared, texts = zip(*batch, strict=True)
        yield from (clip.of_images(list(prepared)) * clip.of_texts(texts)).sum(dim=-1).tolist()


def features_of(extractor: ImageModel | Inception, files: Sequence[Path], whose: str) -> np.ndarray:
    """The features [N, D], float32, of the readable files, in their order; those that are not are named on stderr.

    Raises SalunError where fewer than two are readable, naming `whose` they are.
    """
    share = [files[n] for n in ranks.share(len(files), BATCH)]
    bar = tqdm(features(extractor, share), total=len(share), desc="features", unit="image")
    found = dict(ranks.gathered(list(bar)))
    if absent := [file.name for file in files if file not in found]:
        logger.warning(f"{len(absent)} of {len(files)} images could not be read for --fid: {some(absent)}.")
    if len(found) < 2:
        raise SalunError(f"FID and KID need two readable images or more, and {whose} has {len(found)}: give more, or "
                         "leave out --fid.")  # fmt: skip
    return np.stack([found[file] for file in files if file in found])


def distances(
    extractor: ImageModel | Inception, here: np.ndarray, there: np.ndarray, reference: str
) -> dict[str, dict]:
    """`fid` and `kid` between features [N, D] and the reference's [M, D]; their names say how they are made."""
    (n, dimensions), m, paired = here.shape, len(there), reference == SAME_SEEDS
    how = f"[{extractor.said}, {dimensions}-d, {extractor.resize}]"
    few = min(n, m) <= dimensions
    note = f"{min(n, m)} images are too few for {dimensions} dimensions: this FID is too large, by an amount that " \
           "hangs on the number of images; compare only FIDs of as many, or KID."  # fmt: skip
    fid = fidelity.frechet(fidelity.moments(here), fidelity.moments(there))
    common = {"sha256": extractor.digest, "images": [n, m], "reference": reference}
    return {
        "fid": {"name": f"fid{how}", "value": round(fid, 4), **common, "note": note if few else None},
        "kid": {"name": f"kid{how}", "value": round(fidelity.kid(here, there, paired=paired), 6), **common},
    }
