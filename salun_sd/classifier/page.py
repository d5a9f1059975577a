"""report.html: the table of a run, and how sure each model is of each image, as one page."""

from collections.abc import Callable, Mapping

import numpy as np

from salun_sd.classifier.measure import PARTS
from salun_sd.classifier.settings import in_words
from salun_sd.report.gate import reasons
from salun_sd.report.html import template

WIDTH, HEIGHT, EDGE = 220, 150, 26  # of a picture, and of the room for its axes, in pixels
POINTS = 60  # of a line


def html(report: dict, answers: Mapping[str, Mapping[str, np.ndarray]], headline: str, shown: Callable) -> str:
    """The page. answers: of each row's first seed, the confidence in the true class for each image of each part."""
    pictures = {name: lines({part: of[f"{part}/confidence"] for part in PARTS}) for name, of in answers.items()}
    return template(__package__, "report.html.j2").render(
        report, headline=headline, shown=shown, in_words=in_words, pictures=pictures, reasons=reasons, width=WIDTH,
        height=HEIGHT, edge=EDGE,
    )  # fmt: skip


def lines(confidence: Mapping[str, np.ndarray]) -> dict[str, str]:
    """For each part, the points of a line: the share of images (upwards) whose confidence is at most that (to the
    right), both from 0 to 1."""
    grid = np.linspace(0, 1, POINTS)
    found = {}
    for part, values in confidence.items():
        shares = np.searchsorted(np.sort(values), grid, side="right") / max(1, len(values))
        x, y = EDGE + grid * (WIDTH - EDGE - 8), HEIGHT - EDGE - shares * (HEIGHT - EDGE - 8)
        found[part] = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return found
