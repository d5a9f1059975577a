"""Bounds that fail an audit, such as 'ra < against.ra - 0.02': parsed, judged, explained. Pure."""

import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import NamedTuple

from salun_sd.errors import UsageError, cut

SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
AGAINST = "against."
FEW = 5  # most names of one group, as in ua.CLASS, that an error lists
TERM = r"(?:n\*v|v\*n|n|v)"  # a letter for each token: n a number, v a name
# Exact, so that a larger exponent would take all memory; and Python reads no whole number of many thousand digits.
NUMBER = r"(?:\d{1,99}\.?\d{0,99}|\.\d{1,99})(?:e[-+]?\d{1,3})?"
SUM = rf"[-+]?{TERM}(?:[-+]{TERM})*"


class Bound(NamedTuple):
    """A condition that fails an audit if it is true: `constant` plus the sum of `terms` (name => factor), compared by
    `sign` with 0."""

    text: str
    sign: str
    constant: Fraction
    terms: dict[str, Fraction]


class Measured(NamedTuple):
    """A number of a report, exact, and the ends of its 95 % interval if it has one."""

    value: Fraction
    ci95: tuple[Fraction, Fraction] | None

    def end(self, upper: bool) -> Fraction:
        """The upper or lower end of the interval; without one, the value."""
        return self.ci95[upper] if self.ci95 else self.value


def parse(text: str, known: Sequence[str], absent: Mapping[str, str] = MappingProxyType({})) -> Bound:
    """The bound that a text describes: one of < <= > >= between two sums of numbers, names and number * name.

    `known` has the names of the audited model; `against.` before a name makes it the base's. A name may have blanks and
    hyphens ("ua.ankle boot", "ua.t-shirt"): the longest one that fits is taken. `absent` has the names, or first parts
    of names, that will not be measured, and why. Raises UsageError if the text is not a bound, or has a name that is
    not known or will not be measured.
    """
    tokens = _tokens(text, known)
    letters = {"name": "v", "number": "n", "sign": "<"}
    kinds = "".join(letters.get(kind, value) for kind, value in tokens)
    if not re.fullmatch(f"{SUM}<{SUM}", kinds) or "v" not in kinds:
        raise _no_bound(text)
    for name in [value for kind, value in tokens if kind == "name"]:
        group = name.removeprefix(AGAINST).partition(".")[0]
        parts = ("against", group, AGAINST + group) if name.startswith(AGAINST) else (name, group)
        if why := next((absent[part] for part in parts if part in absent), None):
            raise UsageError(f"--fail-if {cut(text)!r}: {name} {why}.")
    at = kinds.index("<")
    terms: dict[str, Fraction] = {"": Fraction(0)}
    for term in re.finditer(rf"([-+]?)({TERM})", kinds):
        factor, name = Fraction(-1 if (term[1] == "-") != (term.start() > at) else 1), ""
        for kind, value in tokens[term.start(2) : term.end(2)]:
            factor *= Fraction(value) if kind == "number" else 1
            name = value if kind == "name" else name
        terms[name] = terms.get(name, Fraction(0)) + factor
    return Bound(text, tokens[at][1], terms.pop(""), terms)


def _tokens(text: str, known: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, text) of each name, number, comparison sign and operator; blanks are left out."""
    every = sorted([*known, *(AGAINST + name for name in known)], key=len, reverse=True)
    token = re.compile(
        rf"(?P<name>{'|'.join(map(re.escape, every))})(?![\w.])|(?P<number>{NUMBER})(?![\w.])"
        r"|(?P<sign>[<>]=?)|(?P<other>[-+*])|(?P<blank>\s+)"
    )
    tokens, at = [], 0
    while at < len(text):
        match = token.match(text, at)
        if not match:
            raise _unknown(text, text[at:], known) if re.match(r"\w", text[at:]) else _no_bound(text)
        at = match.end()
        if match.lastgroup != "blank":
            tokens.append((match.lastgroup, match[0]))
    return tokens


def _no_bound(text: str) -> UsageError:
    return UsageError(f"--fail-if {cut(text)!r} is not a bound: give names, numbers, + - *, and one of < <= > >=, as "
                      "in 'flag_rate > 0.01' or 'ra < against.ra - 0.02'.")  # fmt: skip


def _unknown(text: str, rest: str, known: Sequence[str]) -> UsageError:
    """The error for a text whose `rest` begins with neither a name nor a number."""
    wrong = re.split(r"\s*[<>+*]|\s-|\s+\d", rest)[0].strip()
    group = re.match(rf"(?:{re.escape(AGAINST)})?(\w+\.)", wrong)
    alike = [name for name in known if group and name.startswith(group[1])]
    groups = Counter(name.partition(".")[0] for name in known if "." in name)
    names = [name for name in known if "." not in name or groups[name.partition(".")[0]] <= FEW]
    large = sorted(group for group, size in groups.items() if size > FEW)
    listed = alike or [*names, *(f"{group}.NAME" for group in large)]
    return UsageError(
        f"--fail-if {cut(text)!r}: there is no number {cut(wrong)}. The numbers are {', '.join(listed)}, and those of "
        f"the base with {AGAINST} before the name."
    )


def judge(bound: Bound, numbers: Mapping[str, tuple[Fraction, Measured | None]], confident: bool) -> dict:
    """A bound's entry in report.json: whether the audit passes, and the values that decide.

    `numbers` has the factor and the number of each name in the bound; a number is None if it was not measured, and then
    the audit fails. Rates count exactly, as n of N. With `confident`, a value with an interval is judged at the
    end that breaks the bound sooner. For one value, or one difference in pairs, that is a one-sided test at 2.5 %. For
    several, each is judged at its own such end, and the error is at most 2.5 % times their number (Bonferroni).
    """
    if_large, total, values = bound.sign in (">", ">="), bound.constant, {}
    for name, (factor, number) in numbers.items():
        if number is None:
            values[name] = None
            continue
        used = number.end(upper=(factor > 0) == if_large) if confident else number.value
        total += factor * used
        value, at = round(float(number.value), 6), round(float(used), 6)
        values[name] = {"value": value, "ci95": number.ci95 and [*map(float, number.ci95)], "judged_at": at}
    holds = None not in values.values() and not SIGNS[bound.sign](total, 0)
    return {"bound": bound.text, "holds": holds, "confident": confident, "values": values}


def reasons(entry: dict) -> str:
    """The values behind a judgement, in words."""

    def reason(name: str, value: dict | None) -> str:
        if value is None:
            return f"{name} was not measured, so the check fails"
        interval = " [{:.6g}, {:.6g}]".format(*value["ci95"]) if value["ci95"] else ", without an interval"
        judged = f", judged at {value['judged_at']:.6g}" if entry["confident"] and value["ci95"] else ""
        return f"{name} is {value['value']:.6g}{interval}{judged}"

    return "; ".join(reason(name, value) for name, value in entry["values"].items())
