"""The command `classifier`: its options, what it calls, its table."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from salun_sd.classifier.settings import METHODS, TRAINING
from salun_sd.cli.failures import fail_on
from salun_sd.cli.streams import loading, print_lines
from salun_sd.cli.tables import Table, show

MODEL = Argument(
    help="Image classifier: a folder or hub id that transformers opens. Default: one is trained on DATA, and kept.",
    show_default=False,
)
DATA = Option(
    help="Labelled images: a folder with train/CLASS/*.png and test/CLASS/*.png, with idx files or with CIFAR's "
    "batches; or a data set of the hub, as org/name or org/name:column."
)
FORGET = Option(
    metavar="<str>",
    help="Training images to forget: a share such as 0.1, class:NAME, or a file that lists one image in each line.",
)
OUT = Option(help="Folder for the models and the report.")
METHOD = Option(
    metavar="<str>",
    help="May be repeated. Default: all but random. "
    + ". ".join(f"{name}: {published.summary}" for name, published in METHODS.items())
    + ".",
)
DENSITY = Option(metavar="<float>", help="Share of weights that salun may change. May be repeated. Default: 0.5.")
SEEDS = Option(min=1, help="Number of seeds: each forgets other images of a share, and trains in another order.")
ARCHITECTURE = Option(help="Of the model that is trained: a ResNet for small images. Default: resnet18.")
WIDTH = Option(min=1, help="Its channels in the first stage. Default: 64, as the field's ResNet-18 has.")
EPOCHS = Option(min=1, help="Epochs of its training, and of retrain's.")
LR = Option(help=f"Learning rate of both; it falls to a tenth after a half and after three quarters. Published: "
            f"{TRAINING['lr']:g}.")  # fmt: skip
TRAIN_SEED = Option(min=0, help="Random seed of its training, and of the validation images.")
SIZE = Option(min=1, help="Side to which image files are resized, in pixels. Default: MODEL's, or that of the first.")
BATCH_SIZE = Option(min=1, help="Images of an update.")
AUGMENT = Option(help="How training images are changed: random crops, and mirrored.")
TUNE = Option(
    help="Which settings a search on the validation images finds: those that were never published, those of all "
    "methods, or none."
)
SETTING = Option(metavar="<str>", help="A method's setting, such as salun.lr=0.01. May be repeated.")
KEEP_STATISTICS = Option("--keep-statistics", help="Leave the statistics of batch norm as they are.")
EMPTY_CLASS = Option("--empty-class", help="Go on where a class has no image left to retain.")
FAIL_IF = Option(
    metavar="<str>", help="Exit with code 3 if this is true of the report, such as 'gap.salun > 2'. May be repeated."
)


def classifier(
    data: Annotated[str, DATA],
    forget: Annotated[str, FORGET],
    out: Annotated[Path, OUT],
    model: Annotated[str | None, MODEL] = None,
    method: Annotated[list[str] | None, METHOD] = None,
    density: Annotated[list[float] | None, DENSITY] = None,
    seeds: Annotated[int, SEEDS] = 3,
    architecture: Annotated[Literal["resnet10", "resnet18", "resnet34"] | None, ARCHITECTURE] = None,
    width: Annotated[int | None, WIDTH] = None,
    epochs: Annotated[int, EPOCHS] = 182,
    lr: Annotated[float, LR] = 0.1,
    train_seed: Annotated[int, TRAIN_SEED] = 0,
    size: Annotated[int | None, SIZE] = None,
    batch_size: Annotated[int, BATCH_SIZE] = 256,
    augment: Annotated[Literal["crop-flip", "crop", "none"], AUGMENT] = "crop-flip",
    tune: Annotated[Literal["unpublished", "all", "none"], TUNE] = "unpublished",
    setting: Annotated[list[str] | None, SETTING] = None,
    keep_statistics: Annotated[bool, KEEP_STATISTICS] = False,
    empty_class: Annotated[bool, EMPTY_CLASS] = False,
    fail_if: Annotated[list[str] | None, FAIL_IF] = None,
) -> None:
    """Make an image classifier forget images or a class.

    Each method is compared with a model that was trained without them. The same command resumes; several processes
    that run it share the work.
    """
    loading()
    from salun_sd.classifier.run import unlearn

    report = unlearn(
        model, data=data, forget=forget, out=out, method=method or (), density=density or (), seeds=seeds,
        architecture=architecture, width=width, epochs=epochs, lr=lr, train_seed=train_seed, size=size,
        batch_size=batch_size, augment=augment, tune=tune, setting=setting or (), keep_statistics=keep_statistics,
        empty_class=empty_class, fail_if=fail_if or (),
    )  # fmt: skip
    show_report(report)
    print_lines(f"{out / 'report.html'}")
    fail_on(report["gate"])


def show_report(report: dict) -> None:
    """A row for each method: mean and standard deviation over the seeds, in percent."""
    from salun_sd.classifier.report import COLUMNS, cells, shown

    table = Table("method", *COLUMNS, box=None)
    for name, row in report["rows"].items():
        numbers = zip(cells(row), COLUMNS, strict=True)
        table.add_row(name, *("" if number is None else shown(number, kind) for number, kind in numbers))
    show(table)
