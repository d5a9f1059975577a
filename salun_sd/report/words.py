"""Numbers of a report to words. Pure."""

from collections.abc import Callable, Sequence


def rate(metric: dict | None) -> str:
    """A share in one line: `n / N = rate [low, high]`."""
    if metric is None:
        return "not measured"
    low, high = metric["ci95"]
    return f"{metric['n']} / {metric['of']} = {metric['rate']:.3f} [{low:.3f}, {high:.3f}]"


def in_words(metric: dict | None) -> str:
    """A metric of quality in one line: `value [low, high] of N images`; `of N and M images` beside a reference."""
    if metric is None:
        return "not measured"
    ends = " [{:g}, {:g}]".format(*metric["ci95"]) if metric.get("ci95") else ""
    images = metric["images"]
    of = " and ".join(map(str, images)) if isinstance(images, list) else images
    return f"{metric['value']:g}{ends} of {of} images"


def cell(value: dict | int | None) -> str:
    """A number of a report in one line: a share, a metric of quality, a count, or None."""
    if isinstance(value, dict):
        return rate(value) if "of" in value else in_words(value)
    return "not measured" if value is None else f"{value:,}"


def plain(value: object) -> str:
    """A setting in one line; `none` if it is empty."""
    if value is None or value in ([], (), {}):
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def quoted(name: str) -> str:
    return f"“{name}”"


def named(names: Sequence[str], shown: Callable[[str], str] = quoted) -> str:
    """Names in a sentence: “a”, “b” and “c”."""
    each = [shown(name) for name in names]
    return " and ".join(filter(None, [", ".join(each[:-1]), *each[-1:]]))
