"""Before a command that computes: memory, and the other processes of its run."""

from salun_sd.cli.streams import loading
from salun_sd.runtime import ranks


def begin() -> None:
    """Before a command that computes: give freed memory back to the system, and join the other processes, if any.

    Raises UsageError where the other processes do not answer.
    """
    loading()
    from salun_sd.runtime import memory
    from salun_sd.runtime.device import default_device

    memory.return_freed_memory()
    ranks.start(default_device())
