"""What a bound of `evaluate --fail-if` may name, and the numbers of an audit that it judges. Pure."""

from collections.abc import Sequence
from fractions import Fraction

from salun_sd.audit.protocols import LABELS, PROTOCOLS
from salun_sd.report.gate import AGAINST, Bound, Measured

METRICS = ("ua", "ra", "flag_rate")


QUALITY = ("clip_score", "fid", "kid")


def names(concepts: Sequence[str], categories: Sequence[str]) -> list[str]:
    """The names that a bound may have for the audited model; the base's are the same after `against.`."""
    parts = {"ua": concepts, "categories": categories, "labels": LABELS, "protocols": PROTOCOLS}
    return [*METRICS, "broken", *QUALITY, *(f"{group}.{name}" for group, of in parts.items() for name in of)]


def unmeasured(
    *, against: bool, clip: bool, fid: bool, reference: bool, judged: bool, has_concepts: bool, has_others: bool
) -> dict[str, str]:  # fmt: skip
    """What an audit will not measure, by a name's first part, and why: from the options that are given, whether a
    classifier judges, and whether prompts ask for a concept, and for other classes."""
    no_twin = "is of what --fid compares with, which has no distance of its own: give --reference, too"
    no_judge = "needs a classifier, and prompts with classes: give --classifier, and --prompts with a column `class`"
    by_name = "; or --concept-class and a CLIP as --classifier, which needs no classes"
    reasons = [
        ("against", against, "is measured with --against: give it, too"),
        ("clip_score", clip, "is measured with --clip: give it, too"),
        *((name, fid, "is measured with --fid: give it, too") for name in ("fid", "kid")),
        *((AGAINST + name, reference, no_twin) for name in ("fid", "kid")),
        (
            "ua",
            has_concepts,
            "is of a concept's images, and no prompt asks for a known one: give --concept-class, or others",
        ),
        ("ra", has_others, "is of the classes that are no concept, and these prompts have none: leave it out"),
        ("ua", judged, no_judge + by_name),
        ("ra", judged, no_judge),
    ]
    return {name: why for name, is_there, why in reasons if not is_there}


def measured(report: dict, name: str) -> Measured | None:
    """A name's number in a report; None where it was not measured.

    Protocols count what is their unit; where that is images, their interval is the share's, times the images.
    """
    side = report["against"] if name.startswith(AGAINST) else report
    group, _, part = name.removeprefix(AGAINST).partition(".")
    if group == "broken":
        return Measured(Fraction(len(side["broken"])), None)
    if group in QUALITY:
        found = side["quality"][group]
        return found and Measured(_exact(found["value"]), _ends(found.get("ci95")))
    if group == "protocols":
        found = side["protocols"][part]
        return Measured(Fraction(found["n"]), _ends(found.get("ci95"), found["of"])) if found["of"] else None
    if group == "ua" and part:
        found = side["concepts"][part]["ua"]
    else:
        found = side[group].get(part) if part else side["metrics"][group]
    return found and Measured(Fraction(found["n"], found["of"]), _ends(found["ci95"]))


def _exact(number: float) -> Fraction:
    """A number of a report, as its digits say."""
    return Fraction(str(number))


def _ends(ci95: Sequence[float] | None, times: int = 1) -> tuple[Fraction, Fraction] | None:
    return ci95 and (_exact(ci95[0]) * times, _exact(ci95[1]) * times)


def parts(report: dict, bound: Bound, in_pairs: bool) -> dict[str, tuple[Fraction, Measured | None]]:
    """Name => factor and number of what a bound adds up.

    `in_pairs`: `ra - against.ra` and its like are one number where every image has its twin: the difference on the same
    images, with an interval of its own.
    """
    found = {name: (factor, measured(report, name)) for name, factor in bound.terms.items() if factor}
    for name in METRICS if in_pairs else ():
        both, pairs = (name, AGAINST + name), (report["paired"] or {}).get(name)
        if not pairs or not all(found.get(one, (0, None))[1] for one in both):
            continue
        compared = sum(pairs[kind] for kind in ("both", "only_base", "only_model", "neither"))
        of = [side["metrics"][name]["of"] for side in (report, report["against"])]
        if found[both[0]][0] == -found[both[1]][0] and of == [compared, compared]:
            (factor, mine), (_, base) = (found.pop(one) for one in both)
            found[" - ".join(both)] = factor, Measured(mine.value - base.value, _ends(pairs["ci95"]))
    return found
