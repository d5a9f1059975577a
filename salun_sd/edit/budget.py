"""How much memory `mask`, `erase` and `attack` will take at their peak, and how long a pass takes, from the UNet's
config: no weight is loaded."""

import json
import time

import torch
from torch import nn

from salun_sd.checkpoint.configs import UNET
from salun_sd.core.diffusion import predict
from salun_sd.edit.steps import Work, inputs_of
from salun_sd.runtime import memory

PROGRAM = "the program"
LONG = 5.0  # seconds of a pass, after which no larger one is measured
_MEASURED: dict[tuple, tuple[int, int]] = {}  # of `_measured`


def plan(config: dict, work: Work, device: torch.device | str) -> dict[str, int]:
    """Bytes that the device holds at the peak of a step, by what they are for; their sum is the peak.

    config: of the UNet, or the transformer in its place. On the CPU, the bytes are resident memory; PROGRAM is what
    this process has now. On a GPU, they are what torch allocates, without CUDA itself, which takes about half a GB.
    """
    device = torch.device(device)
    count, activations = _measured(config, work, device)
    sizes = work.state(count, device)
    sizes["activations"] = activations
    if device.type == "cpu":
        sizes[PROGRAM] = memory.resident()
    return {name: size for name, size in sizes.items() if size}


def _measured(config: dict, work: Work, device: torch.device) -> tuple[int, int]:
    """The UNet's weights and the bytes of `activations`; measured once for what is asked again."""
    asked = json.dumps(config), repr(work), device, torch.get_num_threads()
    if asked not in _MEASURED:
        unet = _unet(config, work)
        _MEASURED[asked] = sum(p.numel() for p in unet.parameters()), work.activations(unet, device)
    return _MEASURED[asked]


def seconds_of_pass(config: dict, work: Work, device: torch.device | str) -> float:
    """Seconds for which an image goes once through a UNet of this config: measured on the device, with zeros in place
    of its weights. Small passes come first; a large one is left out where they take long."""
    device = torch.device(device)
    unet = _unet(config, work).to_empty(device=device).requires_grad_(False)
    for values in (*unet.parameters(), *unet.buffers()):
        values.zero_()
    for images in (1, 1, work.batch):
        inputs, begun = inputs_of(unet, work, images, device), time.monotonic()
        with torch.no_grad():
            predict(unet, *inputs).sum().item()  # waits for a GPU
        if (taken := time.monotonic() - begun) > LONG:
            break
    return taken / images


def needed(sizes: dict[str, int]) -> int:
    """Bytes of a plan that are not allocated yet: all but the program's."""
    return sum(sizes.values()) - sizes.get(PROGRAM, 0)


def fits(sizes: dict[str, int], device: torch.device | str) -> bool:
    """Whether the device can hold a plan now."""
    return needed(sizes) <= memory.available(device)


def advice(config: dict, work: Work, device: torch.device | str) -> list[tuple[str, int]]:
    """Options that lower what the step needs by 1 % or more, with the bytes that it then needs: each alone, the best
    first; then, where several are needed, as many together as make it fit."""
    device = torch.device(device)
    now = start = needed(plan(config, work, device))
    options = work.cheaper(config, device)
    alone = {flag: needed(plan(config, other, device)) for flag, other in options.items() if other != work}
    taken: list[str] = []
    for flag in options:
        if now <= memory.available(device):
            break
        other = work.cheaper(config, device)[flag]
        if other != work and (size := needed(plan(config, other, device))) < 0.99 * now:
            now, work = size, other
            taken.append(flag)
    best_first = sorted((pair for pair in alone.items() if pair[1] < 0.99 * start), key=lambda pair: pair[1])
    return best_first + ([(" ".join(taken), now)] if len(taken) > 1 else [])


def _unet(config: dict, work: Work) -> nn.Module:
    """The UNet on the meta device."""
    import diffusers

    with torch.device("meta"):
        unet = getattr(diffusers, config.get("_class_name", UNET.kind)).from_config(config)
    nn.Module.to(unet, work.dtype)  # diffusers' own warns of other models
    return work.precision.prepare(unet, work.checkpointing).eval()
