"""What each method is run with: the settings that its authors published, and what is searched where they did not."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from salun_sd.runtime.ranges import WHOLE, Range

BATCH = 256  # images of an update: the authors' code
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of SGD, in every training
TRAINING = {"epochs": 182, "lr": 0.1}  # of the original, and of Retrain
RANGES = {
    **dict.fromkeys(("width", "epochs", "size", "batch_size"), Range(1, WHOLE, is_whole=True)),
    "seeds": Range(1, 1000, is_whole=True),  # 0 to 999; the search has 1000
    "train_seed": Range(0, WHOLE, is_whole=True),
    "lr": Range(0, is_open=True),
}
DROPS = (91 / 182, 136 / 182)  # where the learning rate of a training falls to a tenth, as shares of its epochs


class Published(NamedTuple):
    """A method's settings. `searched`: the values that are tried for a number that was never published; the first is
    taken where no search is wanted. `tuned`: what a search of every method tries."""

    summary: str
    settings: dict[str, float]
    source: str
    searched: dict[str, tuple[float, ...]] = {}
    tuned: dict[str, tuple[float, ...]] = {}


RATES = (0.003, 0.01, 0.03, 0.1)
SHARED = {"epochs": 10, "lr": 0.01}
DEFAULTS = "the defaults of the authors' code"
README = "README of the authors' code, for a forget share of 0.1"
METHODS: MappingProxyType[str, Published] = MappingProxyType({
    "retrain": Published("train a new model on the retain images: the exact answer", {}, "as the original"),
    "ft": Published("go on training on the retain images", SHARED, DEFAULTS, tuned={"lr": RATES}),
    "rl": Published("random labels for the forget images", {"epochs": 10, "lr": 0.013}, README, tuned={"lr": RATES}),
    "salun": Published("random labels, on the most salient weights alone", {"epochs": 10, "lr": 0.013}, README,
                       tuned={"lr": RATES}),
    "ga": Published("gradient ascent on the forget images", {"epochs": 5, "lr": 1e-4}, README,
                    tuned={"lr": (1e-5, 1e-4, 1e-3, 3e-3)}),
    "iu": Published("one step of influence, by WoodFisher", {"samples": 1000}, DEFAULTS,
                    searched={"alpha": (1.0, 3.0, 10.0, 30.0, 100.0)}),
    "l1-sparse": Published("fine-tuning towards few weights", SHARED, DEFAULTS,
                           searched={"alpha": (1e-4, 1e-5, 1e-3)}, tuned={"alpha": (1e-4, 1e-3), "lr": RATES}),
    "bs": Published("the forget images are given the nearest other class", {"epochs": 10, "bound": 0.1}, DEFAULTS,
                    searched={"lr": (1e-3, 3e-4, 1e-4, 1e-2)}),
    "be": Published("the forget images are given a class of their own", {"epochs": 10}, DEFAULTS,
                    searched={"lr": (1e-3, 3e-4, 1e-4, 1e-2)}),
    "random": Published("random labels, on random weights: the control of salun", {"epochs": 10, "lr": 0.013}, README,
                        tuned={"lr": RATES}),
})  # fmt: skip
DEFAULT = tuple(name for name in METHODS if name != "random")
MASKED = ("salun", "random")  # methods of --density


def in_words(settings: Mapping[str, float], used: Mapping[str, Sequence[int]]) -> str:
    """Settings in words. used: of a number that is used as far as it goes, what each run of the method used; where that
    was less, it says so, as in "samples 120 to 134 of 1000"."""
    words = []
    for name, value in settings.items():
        low, high = min(used.get(name, [value])), max(used.get(name, [value]))
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        words.append(f"{name} {value:g}" if low == value else f"{name} {span} of {value:g}")
    return ", ".join(words)


def label(method: str, density: float) -> str:
    """The name of a method in reports and folders: salun is of density 0.5, salun-0.1 of another."""
    return f"{method}-{density:g}" if method in MASKED and density != 0.5 else method
