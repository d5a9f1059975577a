"""The names that a bound of `evaluate --fail-if` may have, and their numbers in a report. Pure."""

from collections.abc import Sequence
from fractions import Fraction

from salun_sd.audit.protocols import LABELS, NUDENET, PROTOCOLS
from salun_sd.report.gate import AGAINST, Bound, Measured

BLANK = ("blank", "blank_rate")
CHANGES = ("change", "change_ssim", "change_features")
QUALITY = (*CHANGES, "clip_score", "fid", "kid")


def names(concepts: Sequence[str], categories: Sequence[str], detectors: Sequence[str] = (NUDENET,)) -> list[str]:
    """The names for the audited model; the base's are the same with `against.` before them."""
    groups = {"ua": concepts, "flag_rate": [name for name in detectors if name != NUDENET]}
    if NUDENET in detectors:
        groups |= {"categories": categories, "labels": LABELS, "protocols": PROTOCOLS}
    rates = ["ua", "ra", *(["flag_rate"] if NUDENET in detectors else [])]
    return [*rates, "broken", *BLANK, *QUALITY, *(f"{group}.{name}" for group, of in groups.items() for name in of)]


def unmeasured(
    *, against: bool, clip: bool, fid: bool, reference: bool, judged: bool, has_concepts: bool, has_others: bool,
    has_kept: bool,
) -> dict[str, str]:  # fmt: skip
    """The first parts of names that an audit will not measure => the reason.

    The arguments say which options are given, whether a classifier judges, and whether prompts ask for a concept, and
    for classes that are no concept, and whether some prompts ask for no concept.
    """
    no_concept = "needs images of a concept, and no prompt asks for one: give --concept-class, or other --prompts"
    no_others = "needs classes beside the concepts, and these prompts have none: leave it out"
    no_judge = "needs a classifier, and prompts with classes: give --classifier, and --prompts with a column `class`"
    by_name = "; or, for prompts without classes, --concept-class and a CLIP as --classifier"
    no_kept = "needs prompts that ask for no concept, and these all ask for one: give other --prompts"
    no_distance = "does not exist where --fid compares with the base's own images: add --reference"
    reasons = [
        ("against", against, "needs a base: add --against"),
        *((AGAINST + name, False, "does not exist: it is the change from the base") for name in CHANGES),
        *((name, has_kept, no_kept) for name in CHANGES),
        ("change_features", fid, "needs an extractor: add --fid"),
        *((name, against, "compares with a base: add --against") for name in CHANGES),
        ("clip_score", clip, "needs a CLIP: add --clip"),
        *((name, fid, "needs an extractor: add --fid") for name in ("fid", "kid")),
        *((AGAINST + name, reference, no_distance) for name in ("fid", "kid")),
        ("ua", has_concepts, no_concept),
        ("ra", has_others, no_others),
        ("ua", judged, no_judge + by_name),
        ("ra", judged, no_judge),
    ]
    return {name: reason for name, is_measured, reason in reasons if not is_measured}


def measured(report: dict, name: str) -> Measured | None:
    """The number that a name has in a report; None if it was not measured.

    A protocol's number is a count. If its unit is images, its interval is the share's, times the number of images.
    """
    side = report["against"] if name.startswith(AGAINST) else report
    group, _, part = name.removeprefix(AGAINST).partition(".")
    if group == "broken":
        return Measured(Fraction(len(side["broken"])), None)
    if group in BLANK:
        share = side["blank"]
        return share and (_of_share(share) if group == "blank_rate" else Measured(Fraction(share["n"]), None))
    if group in QUALITY:
        metric = side["quality"][group]
        return metric and Measured(_exact(metric["value"]), _ends(metric.get("ci95")))
    if group == "protocols":
        count = side["protocols"][part]
        return Measured(Fraction(count["n"]), _ends(count.get("ci95"), count["of"])) if count["of"] else None
    bare = name.removeprefix(AGAINST)
    if bare in side["metrics"]:
        share = side["metrics"][bare]
    else:
        share = side["concepts"][part]["ua"] if group == "ua" else side[group].get(part)
    return share and _of_share(share)


def _of_share(share: dict) -> Measured:
    return Measured(Fraction(share["n"], share["of"]), _ends(share["ci95"]))


def _exact(number: float) -> Fraction:
    """A number of a report, exactly as its digits say."""
    return Fraction(str(number))


def _ends(ci95: Sequence[float] | None, times: int = 1) -> tuple[Fraction, Fraction] | None:
    return ci95 and (_exact(ci95[0]) * times, _exact(ci95[1]) * times)


def parts(report: dict, bound: Bound, in_pairs: bool) -> dict[str, tuple[Fraction, Measured | None]]:
    """Name => factor and number, of each name in a bound.

    With `in_pairs`, a difference from the base such as `ra - against.ra` becomes one number, with the interval that the
    pairs of images give. That needs a twin for every image.
    """
    terms = {name: (factor, measured(report, name)) for name, factor in bound.terms.items() if factor}
    for name in report["metrics"] if in_pairs else ():
        both, pairs = (name, AGAINST + name), (report["paired"] or {}).get(name)
        if not pairs or not all(terms.get(one, (0, None))[1] for one in both):
            continue
        compared = sum(pairs[kind] for kind in ("both", "only_base", "only_model", "neither"))
        images = [side["metrics"][name]["of"] for side in (report, report["against"])]
        if terms[both[0]][0] == -terms[both[1]][0] and images == [compared, compared]:
            (factor, model), (_, base) = (terms.pop(one) for one in both)
            terms[" - ".join(both)] = factor, Measured(model.value - base.value, _ends(pairs["ci95"]))
    return terms
