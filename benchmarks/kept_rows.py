"""What benchmarks that go on where they stopped share: rows on disk, and audits beside a base that is drawn once."""

import json
import platform
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from salun_sd.cli import app as cli
from salun_sd.errors import SalunError
from salun_sd.pocket.fashion import CLASSES
from salun_sd.runtime.device import default_device
from salun_sd.runtime.files import new_folder

FORMER = "2 x AMD EPYC"  # the machine of all rows until 26 Nov 2026, which do not name theirs
FLOAT32 = ("--dtype", "float32")  # on every machine: a GPU would take bfloat16


def read(file: Path, kind: type) -> list:
    """The rows in a file, each a named tuple; none where there is no file."""
    return [kind(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def add(file: Path, row) -> None:
    with file.open("a") as f:
        f.write(json.dumps(row._asdict()) + "\n")


def cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0].partition(':')[2].strip()}" if names else platform.processor()


def machine() -> str:
    return f"{cpu()}, {torch.cuda.get_device_name()}" if default_device() == "cuda" else cpu()


def on_cpu(value: float | None) -> float | None:
    """Seconds or memory for a row; None with a GPU, which several rows share, and beside which a mean says little."""
    return None if default_device() == "cuda" else value


def machines(rows: Iterable) -> str:
    """The machines that rows were measured on, in words, a line each."""
    return ", or\n".join(sorted({row.machine for row in rows}))


def next_class(concept: str) -> str:
    """The class that an erasure goes towards, as SalUn's authors have it."""
    return CLASSES[(CLASSES.index(concept) + 1) % len(CLASSES)]


def audited(argv: Sequence[str], audit: Path, base: Path) -> dict:
    """Run `evaluate` with these options into the folder `audit`; gives its report. The images of --against are kept in
    the folder `base`, and not drawn again."""
    against = audit / "against"
    if base.exists() and not against.exists():
        shutil.copytree(base, against)
    cli.run(["evaluate", *argv, *FLOAT32, "--detector", "none", "--no-images", "--out", str(audit)])
    if not base.exists():
        with suppress(SalunError), new_folder(base) as partial:  # it is refused where another has just done so
            shutil.copytree(against, partial, dirs_exist_ok=True)
    return json.loads((audit / "report.json").read_text())
