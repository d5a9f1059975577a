"""The work of `classifier`: prepare, train, unlearn, measure, write."""

import logging
from collections.abc import Sequence
from pathlib import Path

from salun_sd.classifier import formats, report, search
from salun_sd.classifier.architectures import DEPTHS, in_order_of, opened
from salun_sd.classifier.data import Data
from salun_sd.classifier.folder import RUN, Run, Whole, device
from salun_sd.classifier.jobs import work
from salun_sd.classifier.request import EXACT, ORIGINAL, Job, Row, bounds, check_attack, given, rows
from salun_sd.classifier.settings import RANGES
from salun_sd.classifier.split import held_out, wanted
from salun_sd.errors import UsageError
from salun_sd.runtime.files import check_place
from salun_sd.runtime.ranges import check_numbers
from salun_sd.runtime.texts import check_given, listed

logger = logging.getLogger(__name__)

AUGMENTS = ("crop-flip", "crop", "none")


def unlearn(
    model: str | Path | None = None, *, data: str | Path, forget: str, out: str | Path,
    method: str | Sequence[str] = (), density: float | Sequence[float] = (), seeds: int = 3,
    architecture: str | None = None, width: int | None = None, epochs: int = 182, lr: float = 0.1, train_seed: int = 0,
    size: int | None = None, batch_size: int = 256, augment: str = "crop-flip", tune: str = "unpublished",
    setting: str | Sequence[str] = (), keep_statistics: bool = False, empty_class: bool = False,
    fail_if: str | Sequence[str] = (),
) -> dict:  # fmt: skip
    """Make an image classifier forget images by several methods, and measure how near each comes to a model that never
    saw them. Writes the models and the report into `out`; returns what report.json holds.

    The parameters are the options of `salun-sd classifier`. Running it again resumes; several processes that run it
    share the work. Raises UsageError for arguments that are wrong or cannot go together, SalunError for what fails.
    """
    # check: whatever can be refused is refused here
    check_given(model=model, data=data, forget=forget, out=out, method=method, setting=setting, fail_if=fail_if)
    out, texts = Path(out), {"method": listed(method), "setting": listed(setting), "fail_if": listed(fail_if)}
    densities = [density] if isinstance(density, int | float) else list(density)
    table, own = rows(texts["method"], densities), given(texts["setting"])
    check_numbers(RANGES, seeds=seeds, width=width, epochs=epochs, lr=lr, train_seed=train_seed, size=size,
                  batch_size=batch_size)  # fmt: skip
    for option, value, known in (("--architecture", architecture, DEPTHS), ("--augment", augment, AUGMENTS),
                                 ("--tune", tune, ("unpublished", "all", "none"))):  # fmt: skip
        if value is not None and value not in known:
            raise UsageError(f"{option} {value} is none of {', '.join(known)}.")
    parsed = bounds(texts["fail_if"], [row.label for row in table])
    check_attack()
    check_place(out / "report.json", out / RUN / "settings.json")
    if model is not None and (architecture or width):
        raise UsageError("--architecture and --width are of a model that is trained here: leave them out, or MODEL.")
    built = {} if model is not None else {"architecture": architecture or "resnet18", "width": width or 64}
    training = built | {"epochs": epochs, "lr": lr, "seed": train_seed, "batch_size": batch_size, "augment": augment}
    whole = _prepared(model, str(data), forget, size, training, empty_class, range(seeds))

    # train
    run = Run(out, whole, training, own, tune, keep_statistics)
    run.begin(table)

    # unlearn and measure
    jobs = [Job(row, seed) for row in (Row(ORIGINAL, ORIGINAL), *table) for seed in range(seeds)]
    jobs.sort(key=lambda job: job.row.method != EXACT)  # the longest first, so that at the end no process waits for it
    work(jobs, out / RUN, run.is_done, run.do, run.cost)

    # write
    result = report.assemble(run, table, seeds, parsed)
    report.write(result, run, out)
    for name in (ORIGINAL, *(f"search-{row.label}.json" for row in table), *(job.name for job in jobs)):  # all done
        (out / RUN / f"{name}.lock").unlink(missing_ok=True)
    return result


def _prepared(
    model: str | Path | None, data: str, forget: str, size: int | None, training: dict, empty_class: bool, seeds: range
) -> Whole:  # fmt: skip
    """Model and data, opened; the split of each seed, and of the search, checked."""
    classifier = opened(str(model), device()) if model is not None else None
    read = formats.read(data, size or (max(classifier.size) if classifier else None))
    if size and read.train.pixels.shape[-1] != size:
        raise UsageError(f"--size is for image files: the images of {data} are arrays, and are not resized. Leave it "
                         "out.")  # fmt: skip
    if classifier:
        order = in_order_of(classifier, read.classes, str(model))
        classes = [name for _, name in sorted(zip(order.tolist(), read.classes, strict=True))]
        train, test = (images._replace(labels=order[images.labels]) for images in (read.train, read.test))
        read = Data(read.name, classes, train, test)
    chosen = wanted(forget, read)
    whole = Whole(read, chosen, held_out(read, chosen, training["seed"]), classifier, model and str(model), empty_class)
    for seed in (*seeds, search.SEED):
        parts = whole.split(seed)
    sizes = ", ".join(f"{name} {len(getattr(parts, name)):,}" for name in parts._fields)
    logger.info(f"{data}: {len(read.classes)} classes; {sizes} images.")
    return whole
