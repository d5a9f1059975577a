"""What trackers wrote, as tests read it."""

from pathlib import Path

from salun_sd.runtime import tracker


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads of a run: for each name the steps and numbers; for images the steps and widths."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / tracker.FOLDER / "tensorboard"))
    events.Reload()
    numbers = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return numbers | {tag: [(e.step, e.width) for e in events.Images(tag)] for tag in events.Tags()["images"]}
