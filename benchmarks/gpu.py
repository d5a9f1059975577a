"""The first thing to type on a machine with a GPU: is it right there, how fast is it, and what does it take.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --rehearse --out /tmp/gpu

At most 10 minutes on one card with 16 GB or more. Runs the tests marked gpu, which compare the GPU with the CPU; then
scale.py, a step of SD 1.x at 512 px (8 + 8 images) and of SDXL at 1024 px (1 + 1) beside the authors' recipe, with the
share of the card's matrix rate; then draw.py, drawing beside diffusers' own pipeline. All weights are random, in true
architectures: nothing is downloaded. Writes gpu.md, with machine and date, into --out. A part that fails or takes too
long is said there, and the next one begins.

Beside a stock PyTorch image, it needs what `pip install '.[test]'` installs: diffusers, transformers, accelerate,
safetensors, typer, nudenet with onnxruntime, rich, jinja2, filelock, pytest, pytest-xdist and scikit-image.

With --rehearse, the same parts run on the CPU at the smallest size, so that only the device is new on the day.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from kept_rows import machine

HERE = Path(__file__).parent
REHEARSED = "SALUN_SD_REHEARSE"  # in the environment: tests/test_gpu.py runs without a GPU


class Part(NamedTuple):
    title: str
    command: list[str]
    small: list[str]  # what a rehearsal adds
    seconds: int  # at most


def parts(out: Path) -> list[Part]:
    tests = ["-m", "pytest", "-n", "0", "-q", "-m", "gpu", str(HERE.parent / "tests" / "test_gpu.py")]
    step = [str(HERE / "scale.py"), "--only", "gpu", "--out", str(out / "scale.md")]
    drawing = [str(HERE / "draw.py"), "--against", "diffusers", "--out", str(out / "draw.md")]
    return [
        Part("The GPU beside the CPU", tests, [], 200),
        Part("A step", step, ["--only", "erase", "--steps", "1"], 240),
        Part("Drawing", drawing, ["--arch", "pocket", "--images", "2", "--steps", "2"], 160),
    ]


def ran(part: Part, rehearse: bool) -> str:
    """Run a part in a process of its own; what it printed on stdout, and how it ended."""
    argv = [sys.executable, *part.command, *(part.small if rehearse else [])]
    env = os.environ | ({REHEARSED: "1"} if rehearse else {})
    print(f"{part.title} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        limit = None if rehearse else part.seconds
        done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, timeout=limit)
        end, text = f"exit code {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as e:
        end, text = "stopped: it took too long", (e.stdout or b"").decode()
    return f"## {part.title}\n\n{text.strip()}\n\n{end}, {time.monotonic() - began:.0f} s\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder for gpu.md.")] = HERE,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="On the CPU, at the smallest size.")] = False,
) -> None:
    if not torch.cuda.is_available() and not rehearse:
        raise typer.BadParameter("There is no GPU that PyTorch sees: type --rehearse to try the parts on the CPU.")
    out.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/gpu.py {shlex.join(sys.argv[1:])}".rstrip()
    where = f"{date.today()}, {machine()}, {platform.platform()}, PyTorch {torch.__version__}"
    (out / "gpu.md").write_text(f"# A GPU\n\n`{command}`\n{where}\n")
    for part in parts(out):
        with (out / "gpu.md").open("a") as f:
            f.write(f"\n{ran(part, rehearse)}")
    print((out / "gpu.md").read_text())


if __name__ == "__main__":
    typer.run(main)
