"""What an erasure has done so far, on disk, so that the same command goes on after a kill or Ctrl-C."""

import json
import logging
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.tensors import Lazy, Tensors, given
from salun_sd.core.mask import Bits
from salun_sd.core.masked import MaskedAdam
from salun_sd.edit.maskfile import Mask
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime import ranks
from salun_sd.runtime.files import new_file

logger = logging.getLogger(__name__)

STATE, LOSSES, LOCK = "state.safetensors", "losses.jsonl", ".lock"
OURS = re.compile(rf"\.?{STATE}(\..*)?|{LOSSES}|{LOCK}|samples/step-\d+\.png")  # in a run's folder


class State(NamedTuple):
    """Where a run was when it was saved."""

    steps: int
    mask: Mask
    adam: Tensors


class Progress:
    """A run's folder `<out>.state`: its state, and the losses and strips that go into the result in the end."""

    def __init__(self, out: Path, run: dict, minutes: float):
        self.out, self.run, self.minutes = out, json.loads(json.dumps(run)), minutes
        self.folder, self.saved_at = out.with_name(f"{out.name}.state"), time.monotonic()

    @contextmanager
    def held(self) -> Iterator[State | None]:
        """For this run alone; gives the state that an earlier one of the same command left. At the end the folder goes,
        but where a run ends early and has saved a state.

        Raises UsageError where the folder is another command's or not ours, or a run that goes on has it.
        """
        if not ranks.is_main():
            ranks.wait()
            yield self._read()
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is in the place of this run's state: choose another --out, or move it.")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()):
            if not OURS.fullmatch(name):
                raise UsageError(f"{self.folder} is for this run's state, and holds {name}: choose another --out.")
        try:
            with FileLock(self.folder / LOCK).acquire(blocking=False):
                state = self._read()
                if state is None:  # strips may be of another run, which did not come to a state
                    shutil.rmtree(self.folder / "samples", ignore_errors=True)
                try:
                    ranks.wait()
                    yield state
                    self._forget()
                finally:
                    if not (self.folder / STATE).is_file():
                        shutil.rmtree(self.folder, ignore_errors=True)
        except Timeout as e:
            raise UsageError(f"Another run is making {self.out}: wait for it, or choose another --out.") from e

    @contextmanager
    def errors_recur(self) -> Iterator[None]:
        """Inside, an error of ours would come again from the state, which therefore goes with it."""
        try:
            yield
        except SalunError:
            if ranks.is_main():
                self._forget()
            raise

    def end(self) -> None:
        """The result is there: a run that was killed just after it made that has left its state."""
        with suppress(SalunError, Timeout):
            if ranks.is_main() and self._read():
                with FileLock(self.folder / LOCK).acquire(blocking=False):
                    shutil.rmtree(self.folder)

    def _read(self) -> State | None:
        file = self.folder / STATE
        if not file.is_file():
            return None
        try:
            found, header = tensors.read(file)
            said = json.loads(header["salun_sd"])
            run, steps, shapes, settings = (said[key] for key in ("run", "steps", "shapes", "mask"))
        except (SalunError, KeyError, ValueError) as e:
            raise SalunError(f"{file} is damaged: remove {self.folder}, and the same command begins anew.") from e
        if run != self.run:
            raise UsageError(
                f"{self.folder} is of an erasure with other settings or inputs that was interrupted: repeat its "
                "command, choose another --out, or remove it."
            )
        packed = {name.removeprefix("mask/"): t.read() for name, t in found.items() if name.startswith("mask/")}
        return State(steps, Mask(Bits(packed, shapes), settings), found)

    def save(self, mask: Mask, adam: MaskedAdam | None = None) -> None:
        """Write the state anew, whole or not at all; before the first step, it is the mask."""
        if not ranks.is_main():
            return
        content = {f"mask/{name}": given(packed) for name, packed in mask.bits.packed.items()}
        content |= {name: Lazy(t.dtype, t.shape, t.cpu) for name, t in adam.state().items()} if adam else {}
        said = {"run": self.run, "steps": adam.steps if adam else 0, "mask": mask.settings,
                "shapes": {name: list(shape) for name, shape in mask.bits.shapes.items()}}  # fmt: skip
        with new_file(self.folder / STATE) as partial:
            tensors.write(partial, content, {"salun_sd": json.dumps(said)})
        self.saved_at = time.monotonic()

    def rest(self, mask: Mask, adam: MaskedAdam, noted: list) -> None:
        """After a step: save, if it is time, or if one of the processes was asked to stop; then all stop."""
        stops = bool(ranks.added(torch.tensor(float(len(noted)))))
        if stops or 0 < 60 * self.minutes <= time.monotonic() - self.saved_at:
            self.save(mask, adam)
        if stops:
            ranks.wait()  # a launcher ends the others when one ends
            raise KeyboardInterrupt(f"Interrupted after step {adam.steps}, which is kept in {self.folder}: the same "
                                    "command goes on from there.")  # fmt: skip

    def _forget(self) -> None:
        (self.folder / STATE).unlink(missing_ok=True)

    @contextmanager
    def losses(self, start: int) -> Iterator:
        """The file of losses to go on writing, a line a step; what was written after step `start` is cut off."""
        if not ranks.is_main():
            with open("/dev/null", "w") as nowhere:
                yield nowhere
            return
        file = self.folder / LOSSES
        with file.open("r+" if start else "w", buffering=1) as lines:
            for _ in range(start):
                lines.readline()
            lines.seek(lines.tell())
            lines.truncate()
            yield lines

    def hand_over(self, folder: Path) -> None:
        """Losses and strips become part of the result."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", STATE))


@contextmanager
def patient() -> Iterator[list]:
    """Inside, the first Ctrl-C, or a cluster's SIGTERM, is only noted, in the list that this gives; the second Ctrl-C
    interrupts."""
    noted: list = []

    def note(number, frame):
        noted.append(number)
        logger.warning("\nFinishing this step, to save it; Ctrl-C again to stop at once.")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
