"""What a device can hold, and what a run holds at its peak."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

M_MMAP_THRESHOLD, MEGABYTE = -3, 1 << 20  # of <malloc.h>


def give_back() -> None:
    """Have glibc map every block of a megabyte and more by itself, so that it leaves the process when it is freed.

    By default it comes to keep blocks of up to 32 MB in a heap with holes: 0.9 GiB more at the peak of an SD 1.x step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MEGABYTE)


def available(device: torch.device | str) -> int:
    """Bytes that this process can still allocate on a device: of the host, its share among the processes there."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what is freed
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def resident() -> int:
    """Bytes of the host that this process has now."""
    return psutil.Process().memory_info().rss


def roomy(device: torch.device, size: int) -> torch.device:
    """The device, if `size` bytes leave it as much again; else the host."""
    return device if device.type == "cpu" or available(device) > 2 * size else torch.device("cpu")


def peak() -> int:
    """Most memory that this process held since it began or since `forget_peak`, in bytes: resident, or on the GPU where
    one is used."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:  # ru_maxrss would count what a parent held when it forked
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> int:
    """The peak so far; from here on, `peak` is that of what follows, where the system allows it."""
    found = peak()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return found
