"""The folder beside the result of an erasure: what its maker keeps, and while the run goes on its state, from which the
same command resumes after a kill or Ctrl-C."""

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

from salun_sd.checkpoint import provenance, tensors
from salun_sd.checkpoint.tensors import Lazy, Tensors, in_memory
from salun_sd.core.masked import MaskedAdam
from salun_sd.edit import maskfile
from salun_sd.edit.curve import svg
from salun_sd.edit.maskfile import Mask
from salun_sd.errors import SalunError, TrainingError, UsageError, some
from salun_sd.runtime import ranks, seals
from salun_sd.runtime.documents import parse_json
from salun_sd.runtime.files import HIDDEN, is_full, named_where_full, new_file, remove_stale, write_atomic
from salun_sd.runtime.finite import NotFinite
from salun_sd.runtime.tracker import FOLDER as TRACKED
from salun_sd.runtime.tracker import Tracker

logger = logging.getLogger(__name__)

STATE, LOSSES, LOCK = "state.safetensors", "losses.jsonl", ".lock"
PREDICTIONS = "predictions"  # of the base, a file of each process
MASK, RUN, CURVE = "mask.safetensors", "run.json", "probe.svg"
KEPT = (MASK, RUN, "salun.json", "README.md")  # what stays beside a result
OURS = re.compile(  # in the folder
    rf"samples/step-\d+\.png|{TRACKED}/.*|{PREDICTIONS}.*\.bin|"
    + "|".join(map(re.escape, (LOCK, STATE, LOSSES, CURVE, *KEPT)))
)
HEADER = {"run": dict, "steps": int, "mask": dict, "shapes": dict}  # of a state


class State(NamedTuple):
    """A run when it was saved."""

    steps: int
    mask: Mask
    adam: Tensors


class Progress:
    """The folder `<out>.run` of a run: while it goes on, its state; afterwards the mask, the losses, the strips and
    run.json. Who publishes `out` keeps them: the places of a concept's weights help to bring it back (arXiv
    2603.06640).

    run: settings and inputs, by which a state is known as this run's. minutes: between saved states; 0: at Ctrl-C only.
    """

    def __init__(self, out: Path, run: dict, minutes: float):
        self.out, self.run, self.minutes = out, json.loads(json.dumps(run)), minutes
        self.folder, self.saved_at = provenance.run_folder(out), time.monotonic()
        self.probe: dict | None = None  # what the probe measured last, for the record
        self.tracker = Tracker(self.folder)

    @contextmanager
    def held(self) -> Iterator[State | None]:
        """Lock the folder for this run; gives the state that an earlier run of the same command left. The state is
        removed at the end; the whole folder, if the run ends early and has saved no state.

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
            partial = HIDDEN.fullmatch(name)  # left by a kill
            if not OURS.fullmatch(partial["of"] if partial else name):
                raise UsageError(f"{self.folder} is for this run's state, and holds {name}: choose another --out.")
        try:
            lock = FileLock(self.folder / LOCK).acquire(blocking=False)
        except Timeout as e:
            raise UsageError(f"Another run is making {self.out}: wait for it, or choose another --out.") from e
        with lock:
            state = self._read()
            if state is None and any((self.folder / name).exists() for name in KEPT):
                raise UsageError(f"{self.folder} is of a run whose {self.out.name} is gone: choose another --out, or "
                                 "remove it.")  # fmt: skip
            if state is None:  # what is there may be of another run, which saved no state
                for name in ("samples", TRACKED):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                (self.folder / CURVE).unlink(missing_ok=True)
                self.remove_predictions()
            try:
                ranks.wait()
                yield state
            except BaseException:
                if not (self.folder / STATE).is_file():
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise
            self._end()

    @contextmanager
    def no_state_of_a_failure(self) -> Iterator[None]:
        """Remove the state where the training fails inside, or what it was given: a run that resumed from it would fail
        again. After any other error, such as of a damaged file, the same command resumes."""
        try:
            yield
        except (TrainingError, NotFinite, UsageError):
            if ranks.is_main():
                self._remove_state()
            raise

    def clean_up(self) -> None:
        """Remove the state of a run that has its result: it was killed after it wrote that."""
        with suppress(SalunError, Timeout):
            if ranks.is_main() and self._read():
                with FileLock(self.folder / LOCK).acquire(blocking=False):
                    remove_stale(self.folder, STATE)  # of a save that the kill cut short
                    self._end()

    def _read(self) -> State | None:
        file = self.folder / STATE
        if not file.is_file():
            return None
        try:
            content, metadata = tensors.read_sealed(file)
            header = parse_json(metadata["salun_sd"], str(file), HEADER)
            packed = {name.removeprefix("mask/"): t for name, t in content.items() if name.startswith("mask/")}
            mask = Mask(maskfile.bits_of(packed, header["shapes"]), header["mask"])
            tensors.warn_without_digest(file, metadata)
        except (SalunError, KeyError) as e:
            raise SalunError(f"{file} is damaged: remove {self.folder}, and run the same command again.") from e
        if header["run"] != self.run:
            raise UsageError(
                f"{self.folder} is of an erasure with other settings or inputs that was interrupted: repeat its "
                "command, choose another --out, or remove it."
            )
        return State(header["steps"], mask, content)

    @contextmanager
    def _unless_full(self, name: str) -> Iterator[None]:
        """Go on, with a warning, where the disk has no room for a file of the folder: the result may be smaller."""
        try:
            yield
        except OSError as e:
            if not is_full(e):
                raise
            logger.warning(f"The disk is full, so {self.folder / name} was not written. The run goes on.")

    def save(self, mask: Mask, adam: MaskedAdam | None = None) -> None:
        """Replace the saved state, whole or not at all. Before the first step there is no Adam, only the mask."""
        if not ranks.is_main():
            return
        content = {f"mask/{name}": in_memory(packed) for name, packed in mask.bits.packed.items()}
        content |= {name: Lazy(t.dtype, t.shape, t.cpu) for name, t in adam.state().items()} if adam else {}
        header = {"run": self.run, "steps": adam.steps if adam else 0, "mask": mask.settings,
                "shapes": {name: list(shape) for name, shape in mask.bits.shapes.items()}}  # fmt: skip
        with self._unless_full(STATE), new_file(self.folder / STATE) as partial:
            tensors.write(partial, content, {"salun_sd": json.dumps(header)}, sealed=True)
        self.saved_at = time.monotonic()

    def save_or_stop(self, mask: Mask, adam: MaskedAdam, noted: list) -> None:
        """After a step: save where it is time. Where one of the processes has noted an interrupt, save and stop all."""
        stops = bool(ranks.summed(torch.tensor(float(len(noted)))))
        if stops or 0 < 60 * self.minutes <= time.monotonic() - self.saved_at:
            self.save(mask, adam)
        if stops:
            ranks.wait()  # a launcher ends the others when one ends
            goes_on = "resumes from" if (self.folder / STATE).is_file() else "begins again, as the disk had no room in"
            raise KeyboardInterrupt(f"Interrupted after step {adam.steps}: the same command {goes_on} {self.folder}.")

    def _remove_state(self) -> None:
        (self.folder / STATE).unlink(missing_ok=True)

    def remove_predictions(self) -> None:
        for file in self.folder.glob(f"{PREDICTIONS}*.bin"):
            file.unlink()

    def _end(self) -> None:
        """Leave only what belongs to the result. The lock is still held: who waits for it finds the result."""
        self._remove_state()
        self.remove_predictions()
        (self.folder / LOCK).unlink(missing_ok=True)

    def keep(self, mask: Mask, run: dict, record: dict | None) -> None:
        """Write what stays beside the result; a record where the result is one file."""
        with self._unless_full(MASK), new_file(self.folder / MASK) as partial:
            maskfile.write(partial, mask)
        with self._unless_full(RUN):
            write_atomic(self.folder / RUN, seals.line(run))
            if record:
                provenance.write_folder(record, self.folder)

    @contextmanager
    def losses(self, start: int) -> Iterator:
        """The file of losses, open to write one line per step; its lines after step `start` are removed."""
        if not ranks.is_main():
            with open("/dev/null", "w") as nowhere:
                yield nowhere
            return
        file = self.folder / LOSSES
        rows = seals.read_lines(file, {"step": int}, skip=True) if start and file.is_file() else ()
        kept = {row["step"]: seals.line(row) for row in rows if row["step"] <= start}
        if lost := [str(step) for step in range(1, start + 1) if step not in kept]:
            logger.warning(f"{file} has lost the losses of these steps: {some(lost)}. The weights are not concerned.")
        write_atomic(file, "".join(kept.values()))
        with named_where_full(file), file.open("a", buffering=1) as lines:
            yield lines

    def draw(self, title: str) -> None:
        """Replace the curve of what the probe measured."""
        if ranks.is_main() and (self.folder / LOSSES).is_file():
            rows = seals.read_lines(self.folder / LOSSES, {"step": int}, skip=True)
            with self._unless_full(CURVE):
                write_atomic(self.folder / CURVE, svg(title, [row for row in rows if "moved" in row]))


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
        logger.warning("Finishing this step, to save it; Ctrl-C again to stop at once.")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
