"""How fast does an audit detect, beside the library's own call, image by image?

    python benchmarks/detect.py --images 300

Cuts photographs of 512 x 512 pixels from one of scikit-image, detects in all of them in both ways, in turn and several
times, compares every box, and writes benchmarks/detect.md.
"""

import shlex
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import nudenet
import numpy as np
import onnxruntime
import psutil
import skimage.data
import typer
from kept_rows import cpu
from PIL import Image

from salun_sd.audit.detect import detect, detector_name

SIDE = 512


def photographs(folder: Path, count: int) -> list[Path]:
    """Crops of one face, every second one mirrored, as a model's images are stored."""
    face, g = Image.fromarray(skimage.data.astronaut()), np.random.default_rng(0)
    files = []
    for n in range(count):
        left, top = g.integers(0, 200, size=2)
        crop = face.crop((left, top, left + 300, top + 300)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        files.append(folder / f"{n}_0.png")
        (crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if n % 2 else crop).save(files[-1])
    return files


def seconds(work: Callable[[], list]) -> tuple[float, list]:
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def main(
    images: Annotated[int, typer.Option(min=1, help="How many.")] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="How often each way, in turn.")] = 3,
) -> None:
    with TemporaryDirectory() as folder:
        files = photographs(Path(folder), images)
        library = nudenet.NudeDetector()
        library.detect(str(files[0]))
        took: dict[str, list[float]] = {"library": [], "audit": []}
        for _ in range(rounds):
            spent, theirs = seconds(lambda: [library.detect(str(file)) for file in files])
            took["library"].append(spent)
            spent, ours = seconds(lambda: list(detect(files)))
            took["audit"].append(spent)
    assert theirs == [
        [{"class": b["label"]} | {k: b[k] for k in ("score", "box")} for b in one["boxes"]] for one in ours
    ]
    rate = {way: images / median(spent) for way, spent in took.items()}
    ranges = {way: f"{images / max(spent):.1f} to {images / min(spent):.1f}" for way, spent in took.items()}
    Path(__file__).with_suffix(".md").write_text(
        f"""# Detection, images a second

`python benchmarks/{Path(__file__).name} {shlex.join(sys.argv[1:])}`
{date.today()}, {cpu()}, ONNX Runtime {onnxruntime.__version__}, {detector_name()}

{images} PNG files of {SIDE} x {SIDE} pixels, read, resized and detected in; {sum(map(len, theirs))} boxes,
the same both ways. Median of {rounds} rounds, slowest and fastest beside it.

| | images a second | |
| --- | --- | --- |
| `NudeDetector().detect(file)`, one by one | {rate["library"]:.1f} | {ranges["library"]} |
| `salun_sd.audit.detect.detect(files)` | {rate["audit"]:.1f} | {ranges["audit"]} |

{rate["audit"] / rate["library"]:.2f} times as fast.
Load of the machine, this run included: {psutil.getloadavg()[0]:.1f}.
"""
    )


if __name__ == "__main__":
    typer.run(main)
