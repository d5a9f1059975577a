"""The training loop of an erasure: its losses, states and sample images on disk."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.mask import gather
from salun_sd.core.masked import MaskedAdam
from salun_sd.draw.sample import Row, Sampler
from salun_sd.edit import predictions
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.resources import Compute
from salun_sd.edit.resume import Progress, State, note_interrupts
from salun_sd.edit.watch import Watch
from salun_sd.errors import TrainingError, first_line
from salun_sd.methods.loop import Erasure, erase
from salun_sd.runtime import memory, ranks, seals
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.files import named_where_full
from salun_sd.runtime.finite import NotFinite

logger = logging.getLogger(__name__)

ROUNDING = 1e-8  # a forget loss in float32: a prompt against itself gives 1e-13, near synonyms 5e-6
LITTLE = 1e-6  # a change of the salient weights, as a share of their norm: about one in 30 steps of --lr 1e-9


def train(
    model: Checkpoint, unet, mask: Mask, erasure: Erasure, settings: Mapping, progress: Progress, state: State | None,
    write_strip: Callable[[int], None],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Train to the last step, from the state on where there is one; gives the trained values, float32 [k] for each
    parameter with k salient weights.

    Writes the losses into the folder of `progress`, and what the probe measures, for which some retain images are held
    out. It is over before the last step where --until is reached. Calls `write_strip` with the number of steps done,
    before the first step and after each. Logs where the training changed nothing that matters.
    """
    watch = Watch(unet, erasure, settings, model.name)
    erasure = watch.erasure
    adam = MaskedAdam(
        unet, mask.bits, settings["lr"], values=tensors.PlainTensors(model.unet), clip=settings["clip"],
        holds=erasure.holds,
    )  # fmt: skip
    of_base = predictions.of_base(progress.folder, unet, erasure, done=state.steps if state else 0)
    if state and state.steps:
        adam.restore(tensors.PlainTensors(state.adam), state.steps)
        logger.info(f"Resuming from step {state.steps}, where an earlier run was interrupted.")
        watch.at(adam.steps)  # it may have been over then
    else:
        write_strip(0)
        progress.tracker.log(0, {}, {"samples": strip_of(progress.folder / "samples", 0)})
    loop = () if watch.is_over else erase(unet, adam, erasure, of_base=of_base, name=model.name)
    first_loss = math.inf  # to forget, before a weight has moved
    with (
        progress.losses(adam.steps) as losses, note_interrupts() as interrupts,
        Bar(loop, total=settings["steps"], initial=adam.steps, desc="erase", unit="step") as bar,
    ):  # fmt: skip
        for row in bar:
            measured = watch.at(row["step"])
            losses.write(seals.line(row | measured))
            bar.set_postfix({term: f"{row[term]:.4f}" for term in ("forget", "retain") if term in row} | watch.shown())
            if measured:
                progress.draw(f"Erased from {model.name}")
            if row["step"] == 1:
                first_loss = abs(row.get("forget", math.inf))
            write_strip(row["step"])
            strip = strip_of(progress.folder / "samples", row["step"])
            progress.tracker.log(row["step"], _tracked(row, measured), {"samples": strip})
            progress.save_or_stop(mask, adam, interrupts)
            if watch.is_over:
                break
    progress.probe = watch.last
    if progress.minutes:  # writing the result takes time, too
        progress.save(mask, adam)
    values = adam.values()
    adam.close()
    if ranks.is_main():
        progress.remove_predictions()
        if not erasure.method.needs_anchor:
            first_loss = math.inf
        _warn_of_no_erasure(model, values, mask, first_loss, predictions.DTYPE if erasure.method.asks else unet.dtype)
    return values


def _tracked(row: Mapping, measured: Mapping) -> dict[str, float | None]:
    """What a tracker is sent of a step. A concept has a number there: its prompt stays here."""
    losses = {f"loss/{term}".removesuffix("/loss"): value for term, value in row.items() if term != "step"}
    moved = {f"moved/{n}": share for n, share in enumerate(measured.get("moved", {}).values(), 1)}
    return losses | moved | {"drift": measured.get("drift"), "memory/peak_gib": memory.peak() / 2**30}


def _warn_of_no_erasure(
    model: Checkpoint, values: Mapping[str, torch.Tensor], mask: Mask, first_loss: float, dtype: torch.dtype
) -> None:  # fmt: skip
    """Log where the forget loss of the first step, of predictions in a dtype, is only rounding, or where the trained
    values, as they will be on disk, are hardly others than the base's."""
    rounding = max(ROUNDING, torch.finfo(dtype).eps ** 2 / 2)
    if first_loss < rounding:
        logger.warning(f"Nothing was erased: the forget loss began at {first_loss:.1e}, which is rounding. The model "
                       "predicts the same for the concept and its anchor: choose others.")  # fmt: skip
    moved = size = 0.0
    for name, trained in values.items():
        base = gather(model.unet[name].read(), mask.bits.packed[name])
        moved += float((trained.to(base.dtype).double() - base.double()).square().sum())
        size += float(base.double().square().sum())
    change = math.sqrt(moved / size) if size else float(moved > 0)
    if change < LITTLE:
        logger.warning(f"Hardly anything was erased: the weights in the mask changed by {change:.1e} of their norm. "
                       "Raise --lr or --steps.")  # fmt: skip


def strip_writer(compute: Compute, unet, texts: list[str], folder: Path, every: int) -> Callable[[int], None]:
    """A function of the number of steps done. After each `every` steps it draws one image for each text, side by side,
    in the main process. every=0: never."""
    if not every or not ranks.is_main():
        return lambda step: None
    pipeline = load_pipeline(compute.model, unet=unet, dtype=compute.drawn_in.dtype)

    def write(step: int) -> None:
        if step % every:
            return
        try:
            _write_strip(pipeline, compute.model, texts, strip_of(folder, step))
        except NotFinite as e:
            if not step:  # the weights are still the base's
                raise
            raise TrainingError(f"After step {step} no sample can be drawn: lower --lr. {first_line(e)}.") from e

    return write


def strip_of(folder: Path, step: int) -> Path:
    """The sample images after a step."""
    return folder / f"step-{step:05d}.png"


def _write_strip(pipeline, model: Checkpoint, texts: list[str], file: Path) -> None:
    """One image for each text, side by side."""
    steps, guidance = model.sampling
    size = model.image_size, model.image_size
    sampler, rows = Sampler(pipeline, steps), [Row(text, 2**31 + i, guidance, size) for i, text in enumerate(texts)]
    images = []
    for places in sampler.passes(rows):
        images += sampler.draw([rows[i] for i in places], len(places))
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    file.parent.mkdir(exist_ok=True)
    with named_where_full(file):
        strip.save(file)
