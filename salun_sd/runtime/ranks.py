"""Many processes, one run: each takes its share, sums are taken over all, the main one writes.

`accelerate launch -m salun_sd ...` or torchrun starts them; without either there is one.
"""

import os
from collections.abc import Container
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command that does not compute does not wait for torch
    import torch

LONGEST_WAIT = timedelta(hours=12)  # one draws, encodes or writes while the others wait
_place = {"rank": 0, "count": 1}


def launched() -> tuple[int, int]:
    """This process's rank, and of how many, as the launcher says."""
    of = int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ.get("RANK", 0)) if of > 1 else 0, of


def start(device: str) -> None:
    """Join the other processes, where a launcher has started several: over NCCL on GPUs, over gloo on the CPU."""
    if launched()[1] > 1 and count() == 1:
        import torch
        from accelerate import InitProcessGroupKwargs, PartialState

        PartialState(cpu=device == "cpu", **InitProcessGroupKwargs(timeout=LONGEST_WAIT).to_kwargs())
        _place.update(rank=torch.distributed.get_rank(), count=torch.distributed.get_world_size())


def rank() -> int:
    return _place["rank"]


def count() -> int:
    return _place["count"]


def is_main() -> bool:
    return rank() == 0


def share(of: int, block: int, done: Container[int] = ()) -> list[int]:
    """Of the positions 0 to `of` those of this process: blocks of so many in turn, without those that are all done.
    Whole blocks, as a model rounds another way in a batch of others."""
    blocks = [range(start, min(start + block, of)) for start in range(0, of, block)]
    left = [positions for positions in blocks if any(n not in done for n in positions)]
    return [n for positions in left[rank() :: count()] for n in positions]


def added(t: "torch.Tensor") -> "torch.Tensor":
    """The sum of all processes' tensors, in place of each."""
    if count() > 1:
        import torch.distributed as dist

        on_device = t.cuda() if dist.get_backend() == "nccl" and t.device.type == "cpu" else t
        dist.all_reduce(on_device)
        if on_device is not t:
            t.copy_(on_device)
    return t


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def gathered(items: list) -> list:
    """The items of all processes, those of the main one first, for each of them."""
    if count() == 1:
        return items
    import torch.distributed as dist

    lists: list = [None] * count()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
