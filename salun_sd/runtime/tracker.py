"""The numbers of a run, for programs that show them as curves: TensorBoard and Weights & Biases, through accelerate.

What is sent is what the callers of `Tracker` give it, and nothing that wandb collects by itself.
"""

import importlib.util
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from salun_sd.errors import SalunError, UsageError, first_line
from salun_sd.runtime import ranks
from salun_sd.runtime.texts import listed

logger = logging.getLogger(__name__)

FOLDER = "tracked"  # in the folder of a run
NAMES = ("tensorboard", "wandb")  # also of the packages, and of the extras of pip
PRIVATE = {  # settings of wandb: it sends no name, path, command, code or output of this machine
    "silent": True, "console": "off", "save_code": False, "disable_code": True, "disable_git": True,
    "disable_job_creation": True, "x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True,
    "x_save_requirements": False,
}  # fmt: skip


def check(names: str | Sequence[str] | None) -> list[str]:
    """The trackers, each once. Raises UsageError for one that is not known, or whose package is not installed."""
    names = list(dict.fromkeys(listed(names)))
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--track {name} is not known: give {' or '.join(NAMES)}.")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--track {name} needs a package that is not installed: pip install 'salun-sd[{name}]'")
    return names


class Tracker:
    """Several trackers as one. A step is sent once, also where a run was interrupted and comes to it again. A tracker
    that fails is given up, with a warning: the run goes on. As a context manager, it finishes at the end."""

    def __init__(self, folder: Path, trackers: Sequence = ()):
        """folder: has the steps that were sent. trackers: accelerate's, which have started."""
        self._trackers, self._file = [*trackers], folder / "steps.txt"
        sent = self._file.read_text().split() if self._file.is_file() else []
        self.last = int(sent[-1]) if sent else -1  # the last step that was sent

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *failure) -> None:
        self.finish()

    def log(self, step: int, numbers: Mapping[str, float | None], pictures: Mapping[str, Path] | None = None) -> None:
        """Send the numbers of a step, without those that are None, and those of the pictures that exist. Steps grow."""
        if step <= self.last or not self._trackers:
            return
        numbers = {name: float(number) for name, number in numbers.items() if number is not None}
        pictures = {name: file for name, file in (pictures or {}).items() if file.is_file()}
        for tracker in [*self._trackers]:
            self._try(tracker, partial(_send, tracker, step, numbers, pictures))
        self.last = step
        with suppress(OSError), self._file.open("a") as lines:
            lines.write(f"{step}\n")

    def describe(self, settings: Mapping[str, float]) -> None:
        """Send the settings of the run."""
        for tracker in [*self._trackers]:
            self._try(tracker, partial(tracker.store_init_configuration, dict(settings)))

    def finish(self) -> None:
        for tracker in [*self._trackers]:
            self._try(tracker, tracker.finish)

    def _try(self, tracker, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as e:  # a disk or a network that fails: of many types
            self._trackers.remove(tracker)
            logger.warning(f"--track {tracker.name} failed, and gets nothing more ({first_line(e)}). The run goes on.")


def _send(tracker, step: int, numbers: dict[str, float], pictures: dict[str, Path]) -> None:
    if pictures:
        import numpy as np
        from PIL import Image

        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        images = {name: np.asarray(Image.open(file).convert("RGB"))[None] for name, file in pictures.items()}
        tracker.log_images(images, step=step, **layout)
    tracker.log(numbers, step=step)


def started(names: Sequence[str], out: Path, settings: Mapping[str, object]) -> Tracker:
    """A Tracker that writes into out/FOLDER, in the main process; without names, and elsewhere, one that does nothing.
    Of the settings it sends the numbers. Raises SalunError for a tracker that does not start."""
    folder, trackers = out / FOLDER, []
    for name in names if ranks.is_main() else ():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trackers.append(_of_accelerate(name, folder))
        except Exception as e:  # without a network or an account: of many types
            advice = "; run wandb login, or set WANDB_MODE=offline" if name == "wandb" else ""
            raise SalunError(f"--track {name} did not start: {first_line(e)}{advice}.") from e
    tracker = Tracker(folder, trackers)
    if tracker.last < 0:
        tracker.describe({name: number for name, number in settings.items() if isinstance(number, bool | int | float)})
    return tracker


def _of_accelerate(name: str, folder: Path):
    """accelerate's tracker, started. wandb goes on with the run that the folder names, if it names one."""
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    from salun_sd.runtime.device import default_device

    PartialState(cpu=default_device() == "cpu")  # the trackers ask it for the main process
    if name == "tensorboard":
        tracker = TensorBoardTracker(name, folder)
    else:
        file, project = folder / "wandb.txt", os.environ.get("WANDB_PROJECT", "salun-sd")
        if not file.is_file():
            file.write_text(secrets.token_hex(4))
        tracker = WandBTracker(project, id=file.read_text(), resume="allow", dir=folder, settings=PRIVATE)
    tracker.start()
    if name == "wandb" and not tracker.tracker.offline:
        logger.info(f"--track wandb: {tracker.tracker.url}")
    return tracker
