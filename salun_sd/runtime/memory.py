"""How much memory a device has left, and how much a run has used at most."""

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from salun_sd.runtime import ranks

M_MMAP_THRESHOLD, MEGABYTE = -3, 1 << 20  # of <malloc.h>


def return_freed_memory() -> None:
    """Make glibc map every block of a megabyte or more by itself, so that freed blocks go back to the system.

    By default it keeps freed blocks of up to 32 MB on its heap: 0.9 GiB more at the peak of an SD 1.x step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MEGABYTE)


def available(device: torch.device | str) -> int:
    """Bytes that this process can still allocate on a device; on the host, its share among the processes there."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what is freed
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // ranks.beside()


def resident() -> int:
    """Bytes of host memory that this process uses now."""
    return psutil.Process().memory_info().rss


def device_with_room(device: torch.device, size: int) -> torch.device:
    """The device, if it has more than twice `size` bytes left; else the host."""
    return device if device.type == "cpu" or available(device) > 2 * size else torch.device("cpu")


def peak() -> int:
    """The most bytes that this process has used since it started or since `reset_peak`: on the GPU if one is used,
    else resident on the host."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:  # ru_maxrss would count what a parent held when it forked
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> int:
    """Give the peak so far, and start a new one where the system allows it."""
    so_far = peak()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return so_far
