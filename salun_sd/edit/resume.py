"""The saved state of an erasure, from which the same command resumes after a kill or Ctrl-C."""

import json
import logging
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.tensors import Lazy, Tensors, in_memory
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
    """A run when it was saved."""

    steps: int
    mask: Mask
    adam: Tensors


class Progress:
    """The folder `<out>.state` of a run: its state, and the losses and strips that become part of the result.

    run: settings and inputs, by which a state is known as this run's. minutes: between saved states; 0: at Ctrl-C only.
    """

    def __init__(self, out: Path, run: dict, minutes: float):
        self.out, self.run, self.minutes = out, json.loads(json.dumps(run)), minutes
        self.folder, self.saved_at = out.with_name(f"{out.name}.state"), time.monotonic()

    @contextmanager
    def held(self) -> Iterator[State | None]:
        """Lock the folder for this run; gives the state that an earlier run of the same command left. At the end the
        folder is removed, unless the run ends early and has saved a state.

        Raises UsageError where the folder is another command's or holds other files, or a running process has it.
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
                if state is None:  # the strips may be of another run, which saved no state
                    shutil.rmtree(self.folder / "samples", ignore_errors=True)
                try:
                    ranks.wait()
                    yield state
                    self._remove_state()
                finally:
                    if not (self.folder / STATE).is_file():
                        shutil.rmtree(self.folder, ignore_errors=True)
        except Timeout as e:
            raise UsageError(f"Another run is making {self.out}: wait for it, or choose another --out.") from e

    @contextmanager
    def no_state_after_an_error(self) -> Iterator[None]:
        """Remove the state where a SalunError is raised inside: a run that resumed from it would fail again."""
        try:
            yield
        except SalunError:
            if ranks.is_main():
                self._remove_state()
            raise

    def clean_up(self) -> None:
        """Remove the folder of a run that has its result: it was killed after it wrote that."""
        with suppress(SalunError, Timeout):
            if ranks.is_main() and self._read():
                with FileLock(self.folder / LOCK).acquire(blocking=False):
                    shutil.rmtree(self.folder)

    def _read(self) -> State | None:
        file = self.folder / STATE
        if not file.is_file():
            return None
        try:
            content, metadata = tensors.read(file)
            header = json.loads(metadata["salun_sd"])
            run, steps, shapes, settings = (header[key] for key in ("run", "steps", "shapes", "mask"))
        except (SalunError, KeyError, ValueError) as e:
            raise SalunError(f"{file} is damaged: remove {self.folder}, and run the same command again.") from e
        if run != self.run:
            raise UsageError(
                f"{self.folder} is of an erasure with other settings or inputs that was interrupted: repeat its "
                "command, choose another --out, or remove it."
            )
        packed = {name.removeprefix("mask/"): t.read() for name, t in content.items() if name.startswith("mask/")}
        return State(steps, Mask(Bits(packed, shapes), settings), content)

    def save(self, mask: Mask, adam: MaskedAdam | None = None) -> None:
        """Replace the saved state, whole or not at all. Before the first step there is no Adam, only the mask."""
        if not ranks.is_main():
            return
        content = {f"mask/{name}": in_memory(packed) for name, packed in mask.bits.packed.items()}
        content |= {name: Lazy(t.dtype, t.shape, t.cpu) for name, t in adam.state().items()} if adam else {}
        header = {"run": self.run, "steps": adam.steps if adam else 0, "mask": mask.settings,
                "shapes": {name: list(shape) for name, shape in mask.bits.shapes.items()}}  # fmt: skip
        with new_file(self.folder / STATE) as partial:
            tensors.write(partial, content, {"salun_sd": json.dumps(header)})
        self.saved_at = time.monotonic()

    def save_or_stop(self, mask: Mask, adam: MaskedAdam, noted: list) -> None:
        """After a step: save where it is time. Where one of the processes has noted an interrupt, save and stop all."""
        stops = bool(ranks.summed(torch.tensor(float(len(noted)))))
        if stops or 0 < 60 * self.minutes <= time.monotonic() - self.saved_at:
            self.save(mask, adam)
        if stops:
            ranks.wait()  # a launcher ends the others when one ends
            raise KeyboardInterrupt(f"Interrupted after step {adam.steps}, which is kept in {self.folder}: the same "
                                    "command resumes from there.")  # fmt: skip

    def _remove_state(self) -> None:
        (self.folder / STATE).unlink(missing_ok=True)

    @contextmanager
    def losses(self, start: int) -> Iterator:
        """The file of losses, open to write one line per step; its lines after step `start` are removed."""
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
        """Copy losses and strips into the folder of the result."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", STATE))


@contextmanager
def note_interrupts() -> Iterator[list]:
    """Inside, the first Ctrl-C or SIGTERM only adds to the list that this gives; a second Ctrl-C interrupts.

    Outside the main thread the list stays empty: Python handles signals only in the main thread.
    """
    noted: list = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

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
