"""benchmarks/exact.md and its figures, from the rows of exact.py."""

import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import mean, stdev

import attacks
import kept_rows
from exact_drawn import TIMESTEPS, Drawn

from salun_sd.runtime.files import write_atomic

HERE = Path(__file__).parent
# a column's head, and its measure in a row's values, with its digits
IMAGES = {
    "UA": ("ua", 1), "RA": ("ra", 1), "gap": ("gap", 2), "JS": ("js", 3), "KID, concept": ("kid_concept", 0),
    "change": ("change", 4), "change to retrained": ("change_exact", 4), "KID, kept": ("kid_kept", 1),
    "KID to the data": ("kid_data", 1),
}  # fmt: skip
MORE = {
    "FID, concept": ("fid_concept", 2), "FID, kept": ("fid_kept", 2), "FID to the data": ("fid_data", 2),
    "noise, concept": ("eps_concept", 4), "noise, kept": ("eps_kept", 5),
}  # fmt: skip
SHOWN = {"base": "#888888", "retrained, another training seed": "#1a7f37", "salun": "#0969da", "salun:paper": "#cf222e",
         "no mask": "#8250df", "esd": "#bf8700"}  # fmt: skip


def write(rows: Sequence, by_class: Sequence) -> None:
    """The page and its figure, from the rows of pocket, and those of pocket-ddpm."""
    by_model, of_ddpm = _by_model(rows), _by_model(by_class)
    write_atomic(
        HERE / "exact.md",
        f"""# The distance to the exact answer

`python benchmarks/exact.py --out DIR`, {date.today()}, Python {platform.python_version()}; one thread of
{kept_rows.machines([*rows, *by_class])}.

The exact answer to "forget this class" is the model that was trained without it: `python -m salun_sd.pocket.train
--without CLASS`, as long as the base and with the same seed; the VAE is the base's. Each erasure goes towards the next
class, with the options in [methods.md](methods.md), and is compared with that model: on the class's 100 prompts
("concept") and 50 prompts of each other class ("kept"), the same seeds for all models.

Beside each mean stands its standard error: over classes and seeds, or, of a single row, over its images (jackknife of
ten blocks). The first rows are the yardsticks. "Retrained, other image seeds" is the retrained model itself: a distance
that is smaller than in its row cannot be told from zero with so many images.

- UA, RA: % of the concept's images that are not recognised, of the kept ones that are. Gap: mean distance of UA and
  RA to the retrained model's, in points.
- JS: Jensen-Shannon divergence of the judge's mean probabilities on the concept's images, in bits, 0 to 1.
- KID (x 1,000) and FID by the judge's features, to the retrained model's images. To the data: of the kept images, to as
  many images of the test split.
- Change: mean absolute difference of the kept images' pixels, 0 to 1, from the base's and from the retrained model's.
- Noise: ‖ε - ε_retrained‖² / ‖ε_retrained‖² on images of the test split under their own prompts, the mean over ten
  timesteps.

![The distance of the predictions at each timestep](exact.svg)

{_table(by_model, IMAGES)}

{_table(by_model, MORE)}

## Under attack

The share of prompts that an attack of `--budget quick` brings back, less that of the retrained model: the mean, its
standard error over classes, and their number; of a single class, its 95 % interval. Each by itself:
[attacks.md](attacks.md).

{_over_floor(by_model)}

## What it cost

Retraining takes 48 to 75 minutes on a core, and changes all weights. Seconds of `erase` with its mask and images, where
other programs may have used the core.

| model | rows | seconds | peak GiB | weights changed |
| --- | --- | --- | --- | --- |
{_lines(by_model, _cost)}

{_of_classes(of_ddpm) if of_ddpm else ""}All rows are in [exact.jsonl](exact.jsonl), with the distance at each timestep.
""",
    )
    _figure(by_model)


def _of_classes(by_model: dict[str, list]) -> str:
    """The section of the class-conditional model."""
    return f"""## A class-conditional model

`python benchmarks/exact.py --out DIR --kind ddpm`: pocket-ddpm beside the same model, trained without the class. The
erasures have the options in [by_class.md](by_class.md). What it predicts is v, and not the noise.

{_table(by_model, IMAGES)}

{_table(by_model, MORE)}

"""


def _by_model(rows: Sequence) -> dict[str, list]:
    by_model = defaultdict(list)
    for row in rows:
        by_model[row.model].append(row)
    return by_model


def _lines(by_model: dict[str, list], cells: Callable[[list], Iterable[str] | None]) -> str:
    lines = {model: cells(rows) for model, rows in by_model.items()}
    return "\n".join(f"| {' | '.join([model, *of])} |" for model, of in lines.items() if of)


def _table(by_model: dict[str, list], columns: dict[str, tuple[str, int]]) -> str:
    def cells(rows: list) -> list[str]:
        classes = len({row.concept for row in rows})
        return [f"{classes}, {len(rows)}", *(_shown(rows, name, digits) for name, digits in columns.values())]

    head = f"| model | classes, rows | {' | '.join(columns)} |\n{'| --- ' * (2 + len(columns))}|\n"
    return head + _lines(by_model, cells)


def _shown(rows: list, name: str, digits: int) -> str:
    values = [row.values[name] for row in rows if name in row.values]
    if not values:
        return ""
    numbers = [value for value, _ in values]
    error = _standard_error(numbers) if len(numbers) > 1 else values[0][1]
    return f"{mean(numbers):.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")  # 0: all images agree


def _standard_error(numbers: list[float]) -> float:
    return stdev(numbers) / len(numbers) ** 0.5


def _cost(rows: list) -> list[str] | None:
    rows = [row for row in rows if row.seconds is not None]
    if not rows:
        return None
    numbers = (f"{mean(getattr(row, name) for row in rows):{form}}"
               for name, form in (("seconds", ".0f"), ("peak", ".2f"), ("changed", ".1%")))  # fmt: skip
    return [str(len(rows)), *numbers]


def _over_floor(by_model: dict[str, list]) -> str:
    """A line for each attack of the quick budget, a column for each model that was attacked."""
    over = defaultdict(lambda: defaultdict(list))
    for row in kept_rows.read(attacks.ROWS, attacks.Row):
        if row.budget == "quick":
            over[row.attack][row.erasure].append(row)
    models = [model for model in by_model if any(model in of for of in over.values())]

    def cell(rows: list) -> str:
        if not rows:
            return ""
        values = [row.asr - row.floor for row in rows]
        if len(rows) == 1:
            low, high = rows[0].over_floor
            return f"{values[0]:+.2f} [{low:+.2f}, {high:+.2f}]"
        return f"{mean(values):+.2f} ± {_standard_error(values):.2f} ({len(values)})"

    head = f"| attack | {' | '.join(models)} |\n{'| --- ' * (1 + len(models))}|\n"
    lines = (f"| {attack} | {' | '.join(cell(of[model]) for model in models)} |" for attack, of in over.items())
    return head + "\n".join(lines)


def _figure(by_model: dict[str, list]) -> None:
    """exact.svg: the distance of predictions over t."""
    plt = _pyplot()
    figure, grid = plt.subplots(1, 2, figsize=(9, 4))
    for axes, of in zip(grid, ("concept", "kept"), strict=True):
        for model in filter(by_model.get, SHOWN):
            curve = [mean(values) for values in zip(*(row.curves[of] for row in by_model[model]), strict=True)]
            axes.plot(list(TIMESTEPS), curve, color=SHOWN[model], label=model)
        axes.set_title(f"predictions, {of} prompts", fontsize=10, color="#888888")
        axes.set(yscale="log", xlabel="timestep t", ylabel="distance to the retrained model")
    grid[0].legend(fontsize=7, frameon=False, labelcolor="#888888")
    _save(figure, "exact.svg")


def pictures(concept: str, drawn: dict[str, Drawn], columns: int = 6) -> None:
    """exact.png: the first images of the class and of others, a row for each model."""
    plt = _pyplot()
    some = [*range(0, 10 * columns, 10), *range(100, 100 + 50 * columns, 50)]
    size = len(some) * 0.8, len(drawn) * 0.85
    figure, grid = plt.subplots(len(drawn), len(some), figsize=size, squeeze=False)
    for (model, of), line in zip(drawn.items(), grid, strict=True):
        for i, axes in zip(some, line, strict=True):
            axes.imshow(of.pixels[i])
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(model, rotation=0, ha="right", va="center", color="#888888")
    figure.suptitle(f'"{concept}" was erased; the left half has its prompts', fontsize=10, color="#888888")
    _save(figure, "exact.png")


def _pyplot():
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "exact", "text.color": "#888888", "axes.edgecolor": "#888888",
                            "axes.labelcolor": "#888888", "xtick.color": "#888888", "ytick.color": "#888888",
                            "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    from matplotlib import pyplot

    return pyplot


def _save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(HERE / name, transparent=True, metadata={"Date": None} if name.endswith("svg") else None)
    _pyplot().close(figure)
