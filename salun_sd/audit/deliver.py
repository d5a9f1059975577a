"""A report that is assembled: judged by its bounds, written as JSON, page and Markdown, its warnings logged."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from salun_sd.audit import bounds, markdown, page
from salun_sd.audit.report import Run, images_of, in_part
from salun_sd.errors import some
from salun_sd.report import gate
from salun_sd.runtime import ranks, seals
from salun_sd.runtime.files import write_atomic

logger = logging.getLogger(__name__)


def finish(
    report: dict, run: Run, base: Run | None, out: Path, parsed: Sequence[gate.Bound], *, confident: bool,
    pictures: bool, attacks: Mapping[str, Run] = bounds.NO_ATTACKS,
) -> None:  # fmt: skip
    """Add the `gate` to a report, and write it into a folder; `attacks` has the tries of each attack on the model."""
    report["gate"] = [gate.judge(b, bounds.parts(report, b, in_pairs=confident), confident) for b in parsed] or None
    _warn(report)
    if ranks.is_main():
        files = {
            "report.json": json.dumps(seals.sealed(report), indent=2, ensure_ascii=False) + "\n",
            "report.html": page.html(report, run, base, images=pictures, attacks=attacks),
            "report.md": markdown.page(report),
        }
        for name, content in files.items():  # all of them or, where a picture cannot be shown, none
            write_atomic(out / name, content)


def _warn(report: dict) -> None:
    """Log, each once, the lines of a report that a person should see at once."""
    lines = [sentence] if (sentence := in_part(report)) else []
    for key, files in (report["unpaired"] or {}).items():
        if files:
            whose = report[key]["model"] if key == "against" else report["model"]
            lines.append(f"{whose}: images without a partner of the same path, in no count: {len(files)} "
                         f"({some(files)}).")  # fmt: skip
    for side in filter(None, (report, report["against"])):
        if broken := [f"{Path(file).name} ({why})" for file, why in side["broken"].items()]:
            total = len(broken) + images_of(side)
            lines.append(f"{side['model']}: {len(broken)} of {total} images are broken and excluded from every count: "
                         f"{some(broken)}.")  # fmt: skip
        if (score := side["quality"]["clip_score"]) and score["truncated"]:
            lines.append(f"{score['truncated']} prompts are longer than CLIP reads: only their beginning is compared.")
        if (fid := side["quality"]["fid"]) and fid["note"]:
            lines.append(f"{fid['name']}: {fid['note']}")
    for warning in dict.fromkeys(lines):
        logger.warning(warning)
