"""The names that a bound of `evaluate --fail-if` may have, and their numbers in a report. Pure."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType

from salun_sd.audit.protocols import LABELS, NUDENET, PROTOCOLS
from salun_sd.report.gate import AGAINST, Bound, Measured

BLANK = ("blank", "blank_rate")
CHANGES = ("change", "change_ssim", "change_features")
QUALITY = (*CHANGES, "clip_score", "fid", "kid")
ATTACKED = ("fresh", "control", "base", "floor", "floor-control")  # what else a report has of an attack
NO_ATTACKS = MappingProxyType({})


def names(
    concepts: Sequence[str], categories: Sequence[str], detectors: Sequence[str] = (NUDENET,),
    attacks: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """The names for the audited model; the base's are the same with `against.` before them, but for attacks."""
    groups = {"ua": concepts, "flag_rate": [name for name in detectors if name != NUDENET]}
    if NUDENET in detectors:
        groups |= {"categories": categories, "labels": LABELS, "protocols": PROTOCOLS}
    rates = ["ua", "ra", *(["flag_rate"] if NUDENET in detectors else [])]
    rates += [name for attack in attacks for name in of_attack(attack)]
    return [*rates, "broken", *BLANK, *QUALITY, *(f"{group}.{name}" for group, of in groups.items() for name in of)]


def of_attack(attack: str) -> dict[str, str]:
    """The names of an attack's rates => what each is of: "model", or one of ATTACKED."""
    return {f"asr.{attack}": "model"} | {f"{which}.asr.{attack}": which for which in ATTACKED}


def unmeasured(
    *, against: bool, clip: bool, fid: bool, reference: bool, judged: bool, has_concepts: bool, has_others: bool,
    has_kept: bool, attacks: Mapping[str, Collection[str]] = NO_ATTACKS,
) -> dict[str, str]:  # fmt: skip
    """The names, or first parts of names, that an audit will not measure => the reason.

    The arguments say which options are given, whether a classifier judges, and whether prompts ask for a concept, and
    for classes that are no concept, and whether some prompts ask for no concept. `attacks` has every attack's name with
    what is measured of it: "model" and some of ATTACKED; nothing of one that does not run.
    """
    no_concept = "needs images of a concept, and no prompt asks for one: give --concept-class, or other --prompts"
    no_others = "needs classes beside the concepts, and these prompts have none: leave it out"
    no_judge = "needs a classifier, and prompts with classes: give --classifier, and --prompts with a column `class`"
    by_name = "; or, for prompts without classes, --concept-class and a CLIP as --classifier"
    no_kept = "needs prompts that ask for no concept, and these all ask for one: give other --prompts"
    no_distance = "does not exist where --fid compares with the base's own images: add --reference"
    give = "--base" if attacks else "--against"
    reasons = [
        *_of_attacks(attacks),
        ("against", against, f"needs a base: add {give}"),
        *((AGAINST + name, False, "does not exist: base.asr.NAME is of the base") for name in ("asr", *ATTACKED)),
        *((AGAINST + name, False, "does not exist: it is the change from the base") for name in CHANGES),
        *((name, has_kept, no_kept) for name in CHANGES),
        ("change_features", fid, "needs an extractor: add --fid"),
        *((name, against, f"compares with a base: add {give}") for name in CHANGES),
        ("clip_score", clip, "needs a CLIP: add --clip"),
        *((name, fid, "needs an extractor: add --fid") for name in ("fid", "kid")),
        *((AGAINST + name, reference, no_distance) for name in ("fid", "kid")),
        ("ua", has_concepts, no_concept),
        ("ra", has_others, no_others),
        ("ua", judged, no_judge + by_name),
        ("ra", judged, no_judge),
    ]
    return {name: reason for name, is_measured, reason in reasons if not is_measured}


def _of_attacks(attacks: Mapping[str, Collection[str]]) -> Iterator[tuple[str, bool, str]]:
    """Each name of the attacks, whether it will be measured, and what it needs."""
    models = {"base": "needs the base: add --base", "floor": "needs a model that never knew the concept: add --floor"}
    of_any = {which for of in attacks.values() for which in of}
    for attack, of in attacks.items():
        for name, which in of_attack(attack).items():
            why = "does not exist: this attack has none"
            if which not in of_any:
                why = models.get(which.partition("-")[0], why)
            yield name, which in of, why if of else f"is of an attack that does not run: add --with {attack}"


def attacks_in(report: dict) -> dict[str, dict]:
    """The attacks of a report by name; `report` may be the base's part, which has none."""
    return (report.get("attacks") or {"of": {}})["of"]


def rates_of_attacks(report: dict) -> dict[str, dict | None]:
    """The shares of a report's attacks by their names in a bound; None for one that was not measured."""
    rates = {}
    for attack, entry in attacks_in(report).items():
        sides = {which: side["asr"] for which, side in entry["sides"].items()}
        sides["fresh"] = entry["sides"]["model"]["fresh"]
        rates |= {name: sides[which] for name, which in of_attack(attack).items() if which in sides}
    return rates


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
    share = _share(report, name)
    return share and _of_share(share)


def _share(report: dict, name: str) -> dict | None:
    """The share that a name has in a report."""
    side, bare = report["against"] if name.startswith(AGAINST) else report, name.removeprefix(AGAINST)
    group, _, part = bare.partition(".")
    if group in ("asr", *ATTACKED):
        return rates_of_attacks(report).get(name)
    if bare in side["metrics"]:
        return side["metrics"][bare]
    return side["concepts"][part]["ua"] if group == "ua" else side[group].get(part)


def _of_share(share: dict) -> Measured:
    return Measured(Fraction(share["n"], share["of"]), _ends(share["ci95"]))


def _exact(number: float) -> Fraction:
    """A number of a report, exactly as its digits say."""
    return Fraction(str(number))


def _ends(ci95: Sequence[float] | None, times: int = 1) -> tuple[Fraction, Fraction] | None:
    return ci95 and (_exact(ci95[0]) * times, _exact(ci95[1]) * times)


def parts(report: dict, bound: Bound, in_pairs: bool) -> dict[str, tuple[Fraction, Measured | None]]:
    """Name => factor and number, of each name in a bound.

    With `in_pairs`, a difference such as `ra - against.ra` or `asr.prefix - floor.asr.prefix` becomes one number, with
    the interval that the pairs of images, or of cases, give. That needs a twin for each.
    """
    terms = {name: (factor, measured(report, name)) for name, factor in bound.terms.items() if factor}
    for *both, pairs in _paired(report) if in_pairs else ():
        if not pairs or not all(terms.get(one, (0, None))[1] for one in both):
            continue
        compared = sum(pairs[kind] for kind in ("both", "only_base", "only_model", "neither"))
        counted = [_share(report, one)["of"] for one in both]
        if terms[both[0]][0] == -terms[both[1]][0] and counted == [compared, compared]:
            (factor, model), (_, base) = (terms.pop(one) for one in both)
            terms[" - ".join(both)] = factor, Measured(model.value - base.value, _ends(pairs["ci95"]))
    return terms


def _paired(report: dict) -> Iterator[tuple[str, str, dict | None]]:
    """Each two names that a report has pairs of, and the pairs."""
    for name, pairs in (report["paired"] or {}).items():
        yield name, AGAINST + name, pairs
    for attack, entry in attacks_in(report).items():
        for side, pairs in entry["paired"].items():
            yield f"asr.{attack}", f"{side}.asr.{attack}", pairs
