"""One run in several processes: each takes a share of the work, tensors are summed over all, the main one writes.

`accelerate launch -m salun_sd ...` or torchrun starts them; without either, there is one process.
"""

import logging
import os
from collections.abc import Container
from concurrent.futures import Future
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING

from salun_sd.errors import UsageError, first_line

if TYPE_CHECKING:  # commands that do not compute start without waiting for torch
    import torch

logger = logging.getLogger(__name__)

MEETING = timedelta(minutes=5)  # from the first process that is ready to the last one
LONGEST_WAIT = timedelta(hours=12)  # one process draws, encodes or writes while the others wait
ADVICE = "unset WORLD_SIZE for one process, or start several with torchrun or accelerate launch."
_place = {"rank": 0, "count": 1}


def launched() -> tuple[int, int]:
    """This process's rank and the number of processes, from the launcher's environment variables.

    Raises UsageError where they contradict each other; WORLD_SIZE alone decides whether there are others.
    """
    count = _number("WORLD_SIZE", 1, None) if os.environ.get("WORLD_SIZE", "").strip() else 1
    if count == 1:
        return 0, 1
    if absent := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name, "").strip()]:
        raise UsageError(f"WORLD_SIZE is {count}, and there is no {', no '.join(absent)}: {ADVICE}")
    _number("MASTER_PORT", 1, 2**16)
    if os.environ.get("LOCAL_RANK", "").strip():  # on a GPU there has to be one: see `start`
        _number("LOCAL_RANK", 0, count)
    return _number("RANK", 0, count), count


def _number(name: str, least: int, end: int | None) -> int:
    """An environment variable as a whole number from `least` up to, but not including, `end`."""
    text = os.environ.get(name, "").strip()
    if not (text.isdecimal() and least <= int(text) and (end is None or int(text) < end)):
        words = f"from {least} on" if end is None else f"from {least} to {end - 1}"
        raise UsageError(f"{name} is {text!r}, and has to be a whole number {words}: {ADVICE}")
    return int(text)


def start(device: str) -> None:
    """Join the other processes, if a launcher started several: over NCCL on GPUs, over gloo on the CPU.

    Ctrl-C ends the wait for them. Raises UsageError where the launcher's variables are wrong, and after MEETING where
    not all have come.
    """
    own, processes = launched()
    if processes == count():
        return
    import torch
    from accelerate import InitProcessGroupKwargs, PartialState

    if device == "cuda":  # a GPU for each process of this machine
        _number("LOCAL_RANK", 0, torch.cuda.device_count())
    _place["rank"] = own
    place = {"store": _meet(), "rank": own, "world_size": processes}
    try:
        PartialState(cpu=device == "cpu", **InitProcessGroupKwargs(timeout=LONGEST_WAIT).to_kwargs(), **place)
    except (ValueError, RuntimeError) as e:
        raise UsageError(f"The {processes} processes of WORLD_SIZE cannot work together ({first_line(e)}).") from e
    _place["count"] = processes


def _meet() -> "torch.distributed.Store":
    """What the processes share, once all of them have come to it."""
    import torch.distributed as dist

    met: Future = Future()

    def meet() -> None:  # in a thread of its own: the main one stays open to Ctrl-C
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
            store.set_timeout(LONGEST_WAIT)
            met.set_result(store)
        except Exception as e:  # sockets and names fail by many types
            met.set_exception(e)

    processes, where = os.environ["WORLD_SIZE"], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    minutes = MEETING.total_seconds() / 60
    logger.info(f"WORLD_SIZE is {processes}: waiting up to {minutes:g} minutes for the other processes at {where}.")
    Thread(target=meet, daemon=True).start()
    try:
        return met.result(MEETING.total_seconds() + 10)
    except Exception as e:
        raise UsageError(f"WORLD_SIZE is {processes}, and not all of these processes came to {where} "
                         f"({first_line(e)}): {ADVICE}") from e  # fmt: skip


def rank() -> int:
    return _place["rank"]


def count() -> int:
    return _place["count"]


def beside() -> int:
    """The number of processes of the run on this machine, as the launcher says; 1 where it does not."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "").strip()
    return max(1, int(text)) if count() > 1 and text.isdecimal() else 1


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
