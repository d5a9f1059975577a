"""Many processes, one run: each takes its share, sums are taken over all, the main one writes.

`accelerate launch -m salun_sd ...` or torchrun starts them; without either there is one.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

LONGEST_WAIT = timedelta(hours=12)  # one draws, encodes or writes while the others wait


def start() -> None:
    """Join the other processes, where a launcher has started several: over NCCL with GPUs, over gloo without."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        from accelerate import InitProcessGroupKwargs, PartialState

        PartialState(cpu=not torch.cuda.is_available(), **InitProcessGroupKwargs(timeout=LONGEST_WAIT).to_kwargs())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def added(t: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors, in place of each."""
    if count() > 1:
        on_device = t.cuda() if dist.get_backend() == "nccl" and t.device.type == "cpu" else t
        dist.all_reduce(on_device)
        if on_device is not t:
            t.copy_(on_device)
    return t


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


def gathered(items: list) -> list:
    """The items of all processes, those of the main one first, for each of them."""
    if count() == 1:
        return items
    lists: list = [None] * count()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
