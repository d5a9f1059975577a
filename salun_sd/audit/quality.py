"""The quality of the images that erasing should leave alone: CLIP score, FID and KID; and how much they changed."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from salun_sd.audit import change, fidelity
from salun_sd.audit.clip import Clip
from salun_sd.audit.features import Extractor, ImageModel, Inception, features, resize_of
from salun_sd.audit.looked import Looked, Maker, Score
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
SAME_PATHS = "the base's images of the same paths"  # of two folders of images


class Measures(NamedTuple):
    """What is measured: the CLIP score by `clip`, FID and KID by `extractor`; None leaves it out. `reference` is the
    folder of images that FID and KID compare with; None for the base's images."""

    clip: Clip | None
    extractor: ImageModel | Inception | None
    reference: Path | None


def look(measures: Measures, run: Run, base: Run | None, concepts: Sequence[str]) -> Looked:
    """What the models make of the images of a run and of its base whose prompts ask for no concept.

    An image is looked at if it can be read, and its twin of the base, too. What is found of it depends on no other
    image. Each process takes its share of the images; all return the same.
    """
    readable = set.intersection(*({_key(row) for row in side.readable().manifest} for side in (run, base) if side))
    sides = [_other_images(side, concepts, readable) for side in (run, base) if side]
    clip, extractor, reference = measures
    of_folders = any("name" in row for row in run.manifest)
    looked = Looked(str(reference or (SAME_PATHS if of_folders else SAME_SEEDS)))
    if clip:
        name = f"clip_score[{clip.name}, {resize_of(clip.processor)}, max(cos, 0)]"
        looked = looked._replace(clip=Maker(name, "", clip.digest), scores=[_scores(clip, side) for side in sides])
    if extractor:
        maker = Maker(extractor.name, extractor.resize, extractor.digest)
        looked = looked._replace(extractor=maker, features=[_features(extractor, side) for side in sides])
    if reference:
        if others := left_out(reference):
            logger.warning(f"{reference}: left out are {others}.")
        vectors = _features(extractor, [(file, n) for n, file in enumerate(images_in(reference))])
        looked = looked._replace(of_reference=_matrix(vectors, looked.reference))
    return looked


def measure(
    looked: Looked, run: Run, base: Run | None, concepts: Sequence[str], is_part: bool = False
) -> tuple[dict, dict]:  # fmt: skip
    """The report's `quality` of a run and of its base, from what was found of the images.

    Without a reference folder, the base's images are the reference, pair by pair, and the base has no distance of its
    own. With a base, the change from it is measured, too: see `change.measure`. A distance needs two images: without
    them, a part of an audit has none, and of a whole one SalunError is raised.
    """
    qualities = [dict(NO_QUALITY), dict(NO_QUALITY)]
    prompts = {_key(row): row["prompt"] for row in run.manifest}
    for quality, scores in zip(qualities, looked.scores, strict=False):
        quality["clip_score"] = clip_score(looked.clip, scores, prompts)
    if looked.extractor:
        whose = "this audit, of those that ask for no concept,"
        few = is_part and any(len(vectors) < 2 for vectors in looked.features)
        sides = [] if few else [_matrix(vectors, whose) for vectors in looked.features]
        reference = looked.of_reference
        if reference is None and sides:
            reference = sides.pop()
        for quality, vectors in zip(qualities, sides, strict=False):
            quality |= distances(looked.extractor, vectors, reference, looked.reference)
    if base:
        qualities[0] |= change.measure(run, base, concepts, looked.extractor, looked.features)
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


def clip_score(clip: Maker, scores: dict[Key, Score], prompts: dict[Key, str]) -> dict | None:
    """The mean of max(cos(image, prompt), 0) of the images whose prompt is known, and its 95 % interval, a bootstrap
    over prompts; None without such images.

    Hessel et al. 2021 (arXiv 2104.08718) multiply by 2.5. Others publish the cosine, as here, or 100 times it.
    """
    if not scores:
        return None
    cut = {prompts[key] for key, score in scores.items() if score.is_cut}
    of_images = mean({key: max(score.cosine, 0.0) for key, score in scores.items()}, digits=4)
    return {"name": clip.name, "sha256": clip.digest, **of_images, "truncated": len(cut)}


def _scores(clip: Clip, images: list[tuple[Path, dict]]) -> dict[Key, Score]:
    """The score of each image whose prompt is known, by case and k."""
    images = [(file, row) for file, row in images if row["prompt"] is not None]
    share = ranks.share(len(images), BATCH)
    scores = Bar(_scored(clip, [images[n] for n in share]), total=len(share), desc="clip score", unit="image")
    return {_key(images[n][1]): score for n, score in sorted(ranks.gathered(list(zip(share, scores, strict=True))))}


def _scored(clip: Clip, images: list[tuple[Path, dict]]) -> Iterator[Score]:
    """The cosine of each image and its prompt, in batches of one size."""
    read = in_order(lambda image: (clip.prepare(read_still(image[0])), image[1]["prompt"]), images)
    while batch := list(islice(read, BATCH)):
        prepared, texts = zip(*batch, strict=True)
        of_texts = clip.of_texts([*texts, *texts[-1:] * (BATCH - len(texts))])
        cosines = (clip.of_images(list(prepared)) * of_texts[: len(texts)]).sum(dim=-1).tolist()
        yield from (Score(cosine, clip.too_long([text]) > 0) for cosine, text in zip(cosines, texts, strict=True))


def _features(extractor: ImageModel | Inception, images: Sequence[tuple[Path, object]]) -> dict:
    """The features [D], float32, of each readable image, by case and k of its line, or by its number; unreadable files
    are logged."""
    share = [images[n][0] for n in ranks.share(len(images), BATCH)]
    bar = Bar(features(extractor, share), total=len(share), desc="features", unit="image")
    vectors = dict(ranks.gathered(list(bar)))
    if unreadable := [file.name for file, _ in images if file not in vectors]:
        logger.warning(f"{len(unreadable)} of {len(images)} images could not be read for --fid: {some(unreadable)}.")
    return {_key(of) if isinstance(of, dict) else of: vectors[file] for file, of in images if file in vectors}


def _matrix(vectors: dict[object, np.ndarray], whose: str) -> np.ndarray:
    """Features [N, D]. Raises SalunError, which says `whose` they are, for fewer than two."""
    if len(vectors) < 2:
        raise SalunError(f"FID and KID need at least two readable images, and {whose} has {len(vectors)}: give more, "
                         "or leave out --fid.")  # fmt: skip
    return np.stack([*vectors.values()])


def distances(extractor: Extractor, images: np.ndarray, reference: np.ndarray, name: str) -> dict[str, dict]:
    """The report's `fid` and `kid` between features [N, D] and the reference's [M, D]; `name` is the reference's."""
    (n, dimensions), m, paired = images.shape, len(reference), name in (SAME_SEEDS, SAME_PATHS)
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
