"""The jobs of a run, shared by any number of processes: each takes the next that is free."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from salun_sd.classifier.request import Job
from salun_sd.errors import UsageError
from salun_sd.runtime.bar import in_time

logger = logging.getLogger(__name__)

WAIT = 0.5  # seconds, where every job that is left is another process's


def work(jobs: Sequence[Job], folder: Path, is_done: Callable[[Job], bool], do: Callable[[Job], None],
         cost: Callable[[Job], float]) -> None:  # fmt: skip
    """Do every job that is not done, each in one process alone; return when all are done.

    Processes that run the same command on the same folder share the jobs by locks in `folder`: that of a process that
    was killed is free again. `cost` estimates a job, in any unit, for the time that is left.
    """
    start, spent, told = time.perf_counter(), 0.0, False
    while left := [job for job in jobs if not is_done(job)]:
        idle = True
        for job in left:
            try:
                with FileLock(folder / f"{job.name}.lock").acquire(blocking=False):
                    if is_done(job):
                        continue
                    do(job)
            except Timeout:
                continue
            idle, spent = False, spent + cost(job)
            ahead = [other for other in left if not is_done(other)]
            seconds = (time.perf_counter() - start) / spent * sum(map(cost, ahead))
            logger.info(f"{len(jobs) - len(ahead)} of {len(jobs)} done, about {in_time(seconds)} left.")
        if idle and not told:
            logger.info("Every job that is left is being done by another process: waiting.")
        told = idle
        time.sleep(WAIT if idle else 0)


@contextmanager
def alone(lock_file: Path, what: str) -> Iterator[None]:
    """Hold a lock until the block ends. While another process holds it, wait; the log says `what` it does."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info(f"Another process {what}: waiting.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_same(before: dict, now: dict, out: Path) -> None:
    """Raise UsageError where a folder holds a run with other settings."""
    if differs := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        raise UsageError(f"{out} holds a run with other settings ({', '.join(differs)}): choose another --out, or "
                         "remove it.")  # fmt: skip
