"""What mask and erase cost on this machine, beside the authors' recipe (reference.py), as tables in BENCHMARKS.md.

    python benchmarks/scale.py --weights 1000000
    python benchmarks/scale.py --arch pocket --arch sd1-half --arch sd1 --arch sdxl --threads 2
    python benchmarks/scale.py --only erase --arch sd1 --latents 32 --steps 1

On a CPU each measurement runs in a process of its own, so that a peak is that of the thing measured: resident memory
with the libraries in it. On a GPU a peak is PyTorch's. UNets have true architectures and random weights. What does not
fit is given as arithmetic and marked so. A table replaces the one that the file has of the same measurement on the same
machine.
"""

import gc
import io
import platform
import resource
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from datetime import date
from enum import Enum
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import common
import reference
import torch
import typer
from common import ARCHS, SCHEDULE, Case, clock, now
from helpers.models import skeleton
from kept_rows import machine
from torch.utils.flop_counter import FlopCounterMode

from salun_sd.checkpoint.model import LARGE
from salun_sd.core import mask
from salun_sd.core.diffusion import predict
from salun_sd.core.masked import MaskedAdam
from salun_sd.core.saliency import GradientSum, sum_dtype
from salun_sd.edit import budget, maskfile
from salun_sd.edit.steps import Erasing, Masking, Work
from salun_sd.methods.batches import Training
from salun_sd.methods.loop import Erasure, Retain, erase
from salun_sd.methods.salun import SalUn, forget_gradient
from salun_sd.runtime import memory
from salun_sd.runtime.device import Precision, default_device, dtype_name

DENSITIES = [0.5, 0.1, 0.01]
ON_GPU = default_device() == "cuda"
OTHERS = 3 << 30  # bytes that the reference's three graphs, its VAE and the libraries take at the least
HEAD = """# Benchmarks

Written by `benchmarks/scale.py`: each table has the machine, the date and the command that made it. UNets have true
architectures and random weights. On a CPU every number comes from a process of its own, and peaks include Python and
its libraries; on a GPU peaks are PyTorch's. "Reference" is the authors' recipe on diffusers' UNet,
`benchmarks/reference.py`; ratios are to it, in the same run. "≥" and "not run" mark arithmetic in place of a
measurement that does not fit.
"""


def gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


def _limit(threads: int) -> None:
    torch.set_num_threads(threads)
    memory.return_freed_memory()  # as the commands do
    # rather an error in this process than the system ending others
    resource.setrlimit(resource.RLIMIT_DATA, (memory.available("cpu"),) * 2)


class Bench:
    """Runs measurements, on a CPU in processes of their own; those of the reference only where it is asked for."""

    def __init__(self, threads: int, reference: bool):
        self.threads, self.reference = threads, reference

    def run(self, measure: Callable, *args):
        if ON_GPU:
            torch.set_num_threads(self.threads)
            memory.reset_peak()
            return measure(*args)
        with ProcessPoolExecutor(1, get_context("spawn"), _limit, (self.threads,)) as pool:
            return pool.submit(measure, *args).result()

    def fits(self, need: float, measure: Callable, *args):
        """What it measures, or None where it needs more memory than there is; `need` is what arithmetic says."""
        print(measure.__name__, *args, end=": ", file=sys.stderr, flush=True)
        if ON_GPU:  # what the last measurement left there
            gc.collect()
            torch.cuda.empty_cache()
        found = None
        if need < memory.available(default_device()) and (self.reference or measure.__module__ != "reference"):
            try:
                found = self.run(measure, *args)
            except (MemoryError, BrokenProcessPool):
                pass
            except RuntimeError as e:
                if "memory" not in str(e):
                    raise
        print(found or f"not run, needs {gib(need)} GiB", file=sys.stderr)
        return found


def gradients(n: int) -> dict[str, torch.Tensor]:
    """|g| of n weights in 32 tensors, of magnitudes over six decades."""
    g = torch.Generator(default_device()).manual_seed(0)
    sizes = [n // 32] * 31 + [n - 31 * (n // 32)]
    return {
        str(i): torch.randn(size, generator=g, device=default_device()).mul_(10.0 ** -(4 + i % 6)).abs_()
        for i, size in enumerate(sizes)
    }


def _timed_cut(cut: Callable, n: int) -> tuple[float, int]:
    cut(gradients(32_000))
    values = gradients(n)
    before, start = common.reset_peak(), now()
    kept = cut(values)
    found = now() - start, memory.peak() - before
    del kept
    return found


def select_all(values: dict[str, torch.Tensor], densities: list[float]) -> list[mask.Bits]:
    counts = [mask.keep_count(d, sum(v.numel() for v in values.values())) for d in densities]
    return [bits for _, bits in mask.cuts(values, counts)]


def our_cut(n: int, densities: list[float]) -> tuple[float, int]:
    return _timed_cut(partial(select_all, densities=densities), n)


def their_cut(n: int, density: float) -> tuple[float, int]:
    return _timed_cut(lambda values: reference.threshold_by_argsort(list(values.values()), density), n)


def threshold(bench: Bench, sizes: list[int]) -> Iterator[list]:
    """From |g| to masks; extra is what is held beside |g| at the peak, 40 bytes a weight and more for two argsorts.
    With a GPU both run there (the authors' code sorts on the host)."""
    yield ["weights", "", "densities", "seconds", "extra GiB", "times as fast", "times less memory"]
    for n in sizes:
        theirs = bench.fits(40 * n, their_cut, n, 0.5)
        yield [f"{n:,}", "reference", "0.5", *_cells(theirs, 40 * n), "", ""]
        for densities in ([0.5], DENSITIES):
            ours = bench.fits(5 * n, our_cut, n, densities)
            names = ", ".join(map(str, densities))
            yield [f"{n:,}", "salun-sd", names, *_cells(ours, 5 * n), *_ratios(theirs, ours, 40 * n)]


def _cells(found: tuple | None, least: float, times: int = 1) -> list[str]:
    """So many times in seconds, and bytes; where nothing was measured, at least so many bytes."""
    return [*(f"{t:.3g}" for t in found[:-1]), gib(found[-1])] if found else ["not run"] * times + [f"≥ {gib(least)}"]


def _ratios(theirs: tuple | None, ours: tuple | None, least: float) -> list[str]:
    """How much faster, and how much less memory, where it is no more than arithmetic at least `least` bytes."""
    if not ours:
        return ["", ""]
    if not theirs:  # ours has the libraries in it, which are more than a small UNet
        return ["", f"≥ {least / ours[-1]:.1f}" if least > ours[-1] else ""]
    return [f"{theirs[0] / ours[0]:.3g}", f"{theirs[-1] / ours[-1]:.3g}"]


class Counted(io.RawIOBase):
    """Counts what is written and keeps nothing."""

    size = 0

    def write(self, data) -> int:
        self.size += len(data)
        return len(data)


def our_file(arch: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        maskfile.write(file := Path(folder) / "mask.safetensors", maskfile.Mask(common.random_mask(arch, 0.5), {}))
        return file.stat().st_size


def their_file(arch: str) -> int:
    counted = Counted()
    torch.save({name: b.long() for name, b in common.random_mask(arch, 0.5).items()}, counted)
    return counted.size


def file(bench: Bench, cases: list[Case]) -> Iterator[list]:
    """The same file at every density."""
    yield ["UNet", "weights", "salun-sd MB", "reference MB", "times smaller"]
    for case in cases:
        n = common.weights(case.arch)
        ours = bench.run(our_file, case.arch)
        theirs = bench.fits(8.5 * n, their_file, case.arch)
        written = f"{theirs / 1e6:,.1f}" if theirs else f"{8 * n / 1e6:,.1f} (not run: 8 bytes a weight)"
        yield [case.arch, f"{n:,}", f"{ours / 1e6:,.2f}", written, f"{(theirs or 8 * n) / ours:.1f}"]


def our_mask(case: Case, steps: int) -> tuple[float, float, int]:
    """Seconds an image, seconds of the thresholds at all densities, peak bytes."""
    unet, forget = case.unet(), case.examples((steps + 1) * case.batch)
    passes = forget_gradient(unet, SCHEDULE, forget, forget.rows([2]), guidance=7.5, seed=0, batch_size=case.batch)
    with GradientSum(unet) as sums:
        seconds = clock(passes) / case.batch
    start = now()
    masks = select_all(sums.result(len(forget)), DENSITIES)
    return seconds, now() - start, memory.peak() if masks else 0


def planned(case: Case, kind: type[Work], **rest) -> int:
    """Bytes that --dry-run says."""
    precision = Precision.of(case.dtype, default_device())
    work = kind(8 * case.latents, case.batch, precision, case.checkpointing, **rest)
    return sum(budget.plan(ARCHS[case.arch]["unet"], work, default_device()).values())


def masks(bench: Bench, cases: list[Case], steps: int) -> Iterator[list]:
    """Guidance 7.5: two forwards an image. The threshold: ours at three densities, the reference's at one. Arithmetic
    for the reference: 4 bytes a weight each for weights, gradients, sums, their concatenation and the sort's values, 8
    for each of its two lists of positions, and activations, which are not counted."""
    yield [*_CASE, "s / image", "s / threshold", "peak GiB", "planned GiB", "times as fast", "times less memory"]
    for case in cases:
        n, bytes_ = common.weights(case.arch), getattr(torch, case.dtype).itemsize
        least = (12 if ON_GPU else 36) * n  # with a GPU, the sums and their sort are on the host
        theirs = bench.fits(least, reference.time_mask, case, steps, 0.5)
        yield [*_case(case, "reference"), *_cells(theirs, least, 2), "", "", ""]
        need = (bytes_ + sum_dtype(n).itemsize) * n
        ours = bench.fits(need, our_mask, case, steps)
        foreseen = gib(bench.run(partial(planned, case, Masking, guidance=7.5)))
        yield [*_case(case), *_cells(ours, need, 2), foreseen, *_ratios(theirs, ours, least)]


_CASE = ["UNet", "weights", "latents", "batch", "", "dtype", "activations"]


def _case(case: Case, who: str = "salun-sd") -> list[str]:
    size = [case.arch, f"{common.weights(case.arch):,}", f"{case.latents} x {case.latents}", str(case.batch)]
    dtype = "float32" if who == "reference" else case.dtype
    return [*size, who, dtype, "recomputed" if case.checkpointing else "kept"]


def our_erase(case: Case, density: float, steps: int) -> tuple[float, int]:
    """Seconds a step, peak bytes."""
    bits, unet = common.random_mask(case.arch, density), case.unet()
    forget, retain = case.examples(2 * case.batch), case.examples(2 * case.batch)
    anchors, concepts = torch.ones_like(forget.which), torch.zeros_like(forget.which)
    training = Training(SCHEDULE, forget, retain, concepts, anchors)
    erasure = Erasure(SalUn(), Retain(0.1, "noise"), training, steps + 1, case.batch, seed=0)
    with closing(MaskedAdam(unet, bits, 1e-5)) as adam:  # its hooks would keep the UNet in memory
        return clock(erase(unet, adam, erasure)), memory.peak()


def flops_of_prediction(case: Case) -> int:
    """Of one image: each multiplication, and each addition."""
    with torch.device("meta"), FlopCounterMode(display=False) as counted, torch.no_grad():
        unet, data = skeleton("unet", ARCHS[case.arch]["unet"]), case.examples(1)
        predict(unet, data.latents, data.which, data.condition(data.which))
    return counted.get_total_flops()


def flops_of_step(case: Case) -> int:
    """The anchor's forward, one for forget and retain together, twice that backward, and once more if recomputed."""
    return flops_of_prediction(case) * case.batch * (1 + 2 * (4 if case.checkpointing else 3))


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large matrix product."""
    n, repeats = (8192, 50) if ON_GPU else (1024, 4)
    a, b = (torch.randn(n, n, device=default_device()).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3 / clock(a @ b for _ in range(repeats))


def erasing(
    bench: Bench, cases: list[Case], densities: list[float], steps: int, rate: Callable[[str], float]
) -> Iterator[list]:  # fmt: skip
    """Batch: so many images to forget, as many to retain. Arithmetic: 24 bytes a weight for the reference (4 the
    weight, 4 its gradient, 8 Adam, 8 the mask, which with a GPU is on the host), and activations, which are not
    counted. Matrix rate: that of a large matrix product in the dtype that is computed in, on the same machine; the
    share of it is the step's operations, recomputing included, over its seconds."""
    yield [*_CASE, "density", "s / step", "peak GiB", "planned GiB", "share of matrix rate", "times as fast",
           "times less memory"]  # fmt: skip
    for case in cases:
        n, bytes_ = common.weights(case.arch), getattr(torch, case.dtype).itemsize
        least = (16 if ON_GPU else 24) * n
        theirs = bench.fits(least + OTHERS * (n > LARGE), reference.time_erase, case, steps, 0.5)
        yield [*_case(case, "reference"), "any", *_cells(theirs, least), "", "", "", ""]
        for density in densities:
            need = (bytes_ + 12 * density + 1 / 8) * n
            ours = bench.fits(need, our_erase, case, density, steps)
            most = rate(case.computes_in) if ours else 0
            share = f"{flops_of_step(case) / ours[0] / most:.0%} of {most / 1e12:.3g} TFLOP/s" if ours else ""
            foreseen = gib(bench.run(partial(planned, case, Erasing, density=density)))
            yield [*_case(case), f"{density:g}", *_cells(ours, need), foreseen, share, *_ratios(theirs, ours, least)]


def gpu(bench: Bench, steps: int, rate: Callable[[str], float]) -> Iterator[list]:
    """SD 1.x at 512 px and SDXL at 1024 px on one card, as above."""
    if not ON_GPU:
        yield ["SD 1.x, 512 px, 8 + 8, bfloat16", "SDXL, 1024 px, 1 + 1, bfloat16, density 0.1"]
        yield ["not measured", "not measured"]
        return
    yield from erasing(bench, [Case("sd1", 64, 8, "bfloat16", True)], DENSITIES, steps, rate)
    _, *rows = erasing(bench, [Case("sdxl", 128, 1, "bfloat16", True)], [0.1], steps, rate)
    yield from rows


def record(out: Path, title: str, about: str, rows: list[list]) -> None:
    """Print a table as Markdown and put it into the file, in place of one with the same title."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    section = f"{title}\n\n{about}\n\n" + "\n".join(lines) + "\n"
    print(f"\n## {section}", flush=True)
    head, *others = out.read_text().split("\n## ") if out.exists() else [HEAD]
    titles = [o.partition("\n")[0] for o in others]
    at = titles.index(title) if title in titles else len(titles)
    others[at : at + 1] = [section]
    out.write_text("\n## ".join([head, *others]))


class Only(str, Enum):
    threshold, file, mask, erase, gpu = "threshold", "file", "mask", "erase", "gpu"


def main(
    only: Annotated[list[Only], typer.Option(help="Measure this; several for several. All if not given.")] = (),
    arch: Annotated[list[str], typer.Option(help=f"A UNet: {', '.join(ARCHS)}; several to see growth.")] = ("pocket",),
    weights: Annotated[list[int], typer.Option(help="Weights to threshold; several for several.")] = (107_000_000,),
    latents: Annotated[int | None, typer.Option(help="Side of the latents; default each architecture's own.")] = None,
    batch: Annotated[int, typer.Option(help="Images in a step, to forget and as many to retain.")] = 1,
    density: Annotated[list[float], typer.Option(help="Of erase; several for several.")] = tuple(DENSITIES),
    dtype: Annotated[str | None, typer.Option(help="What salun-sd computes in; default as erase would.")] = None,
    checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations, here and in the reference; default as erase would.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after one that is not.")] = 3,
    with_reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Measure mask and erase of the reference, too.")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default PyTorch's.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write tables into.")] = Path("BENCHMARKS.md"),
) -> None:
    bench = Bench(threads or torch.get_num_threads(), with_reference)
    dtype = dtype_name(Precision.of(dtype, default_device()).dtype)
    recomputes = [common.weights(a) >= LARGE if checkpointing is None else checkpointing for a in arch]
    sides = [latents or ARCHS[a]["unet"]["sample_size"] for a in arch]
    cases = [Case(a, side, batch, dtype, r) for a, side, r in zip(arch, sides, recomputes, strict=True)]
    rate = cache(partial(bench.run, matmul_rate))
    tables = {
        Only.threshold: ("Threshold", threshold, lambda: threshold(bench, weights)),
        Only.file: ("Mask file", file, lambda: file(bench, cases)),
        Only.mask: ("Mask", masks, lambda: masks(bench, cases, steps)),
        Only.erase: ("Erase", erasing, lambda: erasing(bench, cases, density, steps, rate)),
        Only.gpu: ("GPU", gpu, lambda: gpu(bench, steps, rate)),
    }
    libraries = f"; libraries alone {gib(bench.run(memory.peak))} GiB" if not ON_GPU else ""
    run = f"`python benchmarks/scale.py {shlex.join(sys.argv[1:])}`\n{date.today()}, {platform.platform()}, Python "
    run += f"{platform.python_version()}, PyTorch {torch.__version__}, {bench.threads} threads{libraries}."
    at = f", latents of {latents} x {latents}" if latents else ""
    for which in only or tables:
        title, about, rows = tables[which]
        notes = " ".join(about.__doc__.split())
        record(out, f"{title}{at}: {machine()}", f"{run}\n\n{notes}", list(rows()))


if __name__ == "__main__":
    typer.run(main)
