"""What the probe measured, step by step, as a picture."""

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from salun_sd.report.html import ticks
from salun_sd.runtime.escape import line

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 412, 40, 212  # the edges of the plot
STYLE = """
  svg { --ink: #23262b; --soft: #5f646c; --line: #e4e1da; --moved: #14746f; --drift: #a8441b }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6e4df; --soft: #a3a7ae; --line: #30343a; --moved: #4fb8ae; --drift: #f0996b }
  }
  text { font: 12px system-ui, sans-serif; fill: var(--soft) } .title { font-size: 14px; fill: var(--ink) }
  line { stroke: var(--line) } polyline { fill: none; stroke-width: 2 }
  .moved { stroke: var(--moved) } .drift { stroke: var(--drift) }
"""


def svg(title: str, rows: Sequence[dict]) -> str:
    """Lines over the steps: how far each concept moved, and the drift. rows: of the losses, those with "moved". At the
    right stands how far the concept moved that moved least."""
    lines = [(f"moved, {concept}", "moved", [(row["step"], row["moved"].get(concept)) for row in rows])
             for concept in (rows[-1]["moved"] if rows else ())]  # fmt: skip
    lines.append(("drift", "drift", [(row["step"], row["drift"]) for row in rows]))
    values = [value for *_, points in lines for _, value in points if value is not None]
    steps, low, high = ticks(rows[-1]["step"] if rows else 1), min([0, *values]), max([1, *values])

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / steps[-1]

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    parts = [f'<text class="title" x="{LEFT}" y="20">{escape(line(title))}</text>']
    for value in (0, 0.5, 1) if high - low < 3 else (low, high):
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts += [f'<text x="{x(step):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{step}</text>' for step in steps]
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">steps</text>')
    ends = {}  # of the lines of a kind
    for name, kind, points in lines:
        known = [(0, 0.0), *((step, value) for step, value in points if value is not None)]
        if len(known) > 1:
            path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in known)
            parts.append(f'<polyline class="{kind}" points="{path}"><title>{escape(line(name))}</title></polyline>')
            ends[kind] = min(known[-1][1], ends.get(kind, math.inf))
    for kind, value in ends.items():
        parts.append(f'<text x="{RIGHT + 8}" y="{y(value) + 4:.1f}">{kind} {value:.3f}</text>')
    body = "\n".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'role="img">\n<style>{STYLE}</style>\n{body}\n</svg>\n')  # fmt: skip
