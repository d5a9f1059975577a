"""One run in several processes: each takes a share of the work, tensors are summed over all, the main one writes.

`accelerate launch -m salun_sd ...` or torchrun starts them; without either, there is one process.
"""

import os
from collections.abc import Container
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that do not compute start without waiting for torch
    import torch

LONGEST_WAIT = timedelta(hours=12)  # one process draws, encodes or writes while the others wait
_place = {"rank": 0, "count": 1}


def launched() -> tuple[int, int]:
    """This process's rank and the number of processes, from the launcher's environment variables."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ.get("RANK", 0)) if count > 1 else 0, count


def start(device: str) -> None:
    """Join the other processes, if a launcher started several: over NCCL on GPUs, over gloo on the CPU."""
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
    """This process's share of the positions 0 to `of` - 1: every count()-th block of `block` positions.

    Blocks whose positions are all in `done` are left out. A block is never split: a model rounds an example differently
    in another batch.
    """
    blocks = [range(start, min(start + block, of)) for start in range(0, of, block)]
    open_blocks = [positions for positions in blocks if any(n not in done for n in positions)]
    return [n for positions in open_blocks[rank() :: count()] for n in positions]


def summed(t: "torch.Tensor") -> "torch.Tensor":
    """Replace the tensor, in place, by its sum over all processes; gives the same tensor."""
    if count() > 1:
        import torch.distributed as dist

        on_device = t.cuda() if dist.get_backend() == "nccl" and t.device.type == "cpu" else t
        dist.all_reduce(on_device)
        if on_device is not t:
            t.copy_(on_device)
    return t


def wait() -> None:
    """Wait until every process has called this."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def gathered(items: list) -> list:
    """The items of all processes, in the order of ranks; every process gets them."""
    if count() == 1:
        return items
    import torch.distributed as dist

    lists: list = [None] * count()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
