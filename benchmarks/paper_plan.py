"""What the steps of paper_sd.py will take: hours, memory and disk, by arithmetic alone."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from common import ARCHS, Case
from paper_tasks import BATCH, Step
from scale import flops_of_prediction, matmul_rate

from salun_sd.attacks.attack import Scene
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.effort import Effort, drawing, effort
from salun_sd.attacks.run import Run
from salun_sd.attacks.target import Target
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw.prompts import Prompt
from salun_sd.edit import budget
from salun_sd.edit.resources import Compute
from salun_sd.edit.steps import TOKENS, Attacking, Erasing, Masking, Work
from salun_sd.runtime import memory
from salun_sd.runtime.device import Precision, default_device, dtype_name

CUDA = 1 << 29  # bytes that CUDA itself takes, about
NOWHERE = Path(os.devnull) / "none"  # the folder of a run that has not begun: no file can be in it


class Machine(NamedTuple):
    """Where the steps run, or would run."""

    device: torch.device
    precision: Precision
    free: int  # bytes
    rate: float  # operations a second

    @classmethod
    def of(cls, card: float | None, tflops: float | None) -> "Machine":
        """A card of so many GiB, which computes in bfloat16; None: this machine, with the rate of its matrix
        products, unless it is given."""
        if card is None:
            device = torch.device(default_device())
            precision = Precision.of(None, device.type)
            rate = 1e12 * tflops if tflops else matmul_rate(dtype_name(precision.dtype))
            return cls(device, precision, memory.available(device), rate)
        half = Precision(torch.bfloat16, False, "as on a card that computes in it")
        return cls(torch.device("cuda"), half, int(card * 2**30) - CUDA, 1e12 * tflops)


class Plan(NamedTuple):
    """What a step takes."""

    hours: float
    memory: int  # bytes that are not taken yet
    disk: int  # bytes, at most


def plans(steps: Sequence[Step], model: Checkpoint, machine: Machine, density: float, parts: int) -> list[Plan]:
    """The plan of each step. density, parts: of the erasures."""
    compute = Compute(model, machine.precision, machine.precision, model.is_large)
    update = 3  # forward, and twice that backward
    ARCHS[model.name] = {"unet": model.unet_settings, "vae": model.vae_settings}
    side = model.image_size // model.pixels_per_latent
    of_one = flops_of_prediction(Case(model.name, side, 1, "float32", False))
    costs = Costs(2 * model.sampling[0], update + compute.checkpointing, _flops_of_text(model) / of_one)
    known: dict[tuple, int] = {}
    plans = []
    for step in steps:
        key = (step.argv[0], step.attack, step.task.drawn > 0)  # what the memory depends on
        if key not in known:
            works = _works(step, compute, density, parts)
            with patch.object(memory, "available", lambda device: machine.free):  # a card need not be there
                sizes = [budget.plan(model.unet_settings, work, machine.device) for work in works]
            known[key] = max(map(budget.needed, sizes))
        hours = predictions(step, model, costs) * of_one / machine.rate / 3600
        plans.append(Plan(hours, known[key], _disk(step, compute, density)))
    return plans


def _flops_of_text(model: Checkpoint) -> float:
    """Of a prompt in the text encoder: each weight of its layers is multiplied and added once for each token."""
    layers = [t.shape.numel() for name, t in model.parts["text_encoder"].items() if ".layers." in name]
    return 2 * TOKENS * sum(layers)


class Costs(NamedTuple):
    """In predictions of the UNet for one image."""

    image: int  # to draw one
    update: int  # a prediction and its gradient
    text: float  # to encode a prompt


def predictions(step: Step, model: Checkpoint, costs: Costs) -> float:
    """How many predictions of the UNet for one image a step costs."""
    task, command = step.task, step.argv[0]
    if command == "mask":
        return task.drawn * costs.image + task.shown * 2 * costs.update
    if command == "erase":  # what is trained, and for each image the prediction that it goes towards
        return task.drawn * costs.image + task.updates * 2 * BATCH * (costs.update + 1)
    if command == "evaluate":
        is_first = step.name.split("/")[1] == next(iter(task.erasures))  # the base's images are kept for the others
        return step.prompts * costs.image * (2 if is_first else 1)
    return _attacking(step, model).passes + 2 * _text(step) * costs.text  # the base's, too


def _attacking(step: Step, model: Checkpoint) -> Effort:
    """What an attack draws and searches: of the model, its control and the base; and the images of its audit."""
    attack, prompts = ATTACKS[step.attack].of("paper"), [Prompt(n, "", n, 7.5) for n in range(step.prompts)]
    scenes = [Scene(Target(model), "", prompts, None, control=control) for control in (False, True, False)]
    runs = [Run(step.attack, attack, scene, NOWHERE, scheduler="", steps=model.sampling[0]) for scene in scenes]
    return sum((effort(run, 1, True) for run in runs), drawing(2 * step.prompts, model.sampling[0], 1, True))


def _text(step: Step) -> float:
    """How many prompts a search encodes, for itself alone."""
    attack = ATTACKS[step.attack].of("paper")
    if step.attack != "genetic":
        return 0
    return step.prompts * (2 + attack.generations) * attack.population / 2


def _works(step: Step, compute: Compute, density: float, parts: int) -> list[Work]:
    """What the memory of a step depends on."""
    model, command = compute.model, step.argv[0]
    size, most = model.image_size, {"most_parts": BATCH}
    drawn = compute.drawing(size, draws=command != "mask" or bool(step.task.drawn))
    if command == "mask":
        return [drawn, compute.work(Masking, size, batch=BATCH, guidance=7.5)]
    if command == "erase":
        return [drawn, compute.work(Erasing, size, batch=BATCH, density=density, parts=parts, **most)]
    if command == "evaluate":
        return [drawn]
    attack = ATTACKS[step.attack].of("paper")
    return [compute.work(Attacking, size, getattr(attack, "batch_size", 1), draws=drawn,
                         models=2 if "base" in attack.needs else 1)]  # fmt: skip


def _disk(step: Step, compute: Compute, density: float) -> int:
    """Bytes that a step leaves at the most, with its state while it runs; an image as large as its pixels."""
    image, command = 3 * compute.model.image_size**2, step.argv[0]
    if command == "mask":
        return compute.mask_bytes() + step.task.drawn * image
    if command == "erase":
        kept = compute.disk(round(density * compute.model.weights), "diffusers", False)
        return sum(kept.values()) + step.task.drawn * image
    if command == "evaluate":
        return step.prompts * 3 * image  # of the model, of the base, and those of the base in the cache
    return _attacking(step, compute.model).images * image


def shown(steps: Sequence[Step], plans: Sequence[Plan], machine: Machine) -> str:
    """The plans as a table in Markdown, and which step does not fit."""
    pairs = list(zip([step.name for step in steps], plans, strict=True))
    hours, most, disk = sum(p.hours for p in plans), max(p.memory for p in plans), sum(p.disk for p in plans)
    lines = [f"| {name} | {plan.hours:.1f} | {plan.memory / 2**30:.2f} | {plan.disk / 1e9:.1f} |"
             for name, plan in [*pairs, ("in all", Plan(hours, most, disk))]]  # fmt: skip
    large = [f"{name} does not fit into the {machine.free / 2**30:.2f} GiB that are free: give --parts {BATCH}, or a "
             "smaller --density." for name, plan in pairs if plan.memory > machine.free]  # fmt: skip
    return "\n".join(["| step | hours | memory, GiB | disk, GB |", "| --- | --- | --- | --- |", *lines, *large])
