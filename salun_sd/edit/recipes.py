"""What an erasure trains and with which numbers: what is typed comes first, then the recipe, then the method."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple, get_args

from salun_sd.checkpoint.model import Checkpoint
from salun_sd.edit.checks import check_choice
from salun_sd.edit.retain_prompts import ANCHOR
from salun_sd.edit.watch import check_until
from salun_sd.errors import UsageError
from salun_sd.methods.batches import Training
from salun_sd.methods.catalog import METHODS
from salun_sd.methods.loop import Erasure, Method, Retain
from salun_sd.methods.uce import UCE
from salun_sd.runtime.ranges import Range

PAPER = {"retain_target": "noise", "retain_prompts": ANCHOR, "probe_every": 0}
# retain_prompts None: broad. probe_every None: as often as costs 5 % of the time.
OURS = {"retain_target": "base", "retain_prompts": None, "probe_every": None}
BETTER = {"salun": {"retain_weight": 10.0}}  # than what was published, once the target is the base's: docs/results.md
# SalUn's second system (DDPM/configs and README of the authors' code): CIFAR-10, all other classes retained.
BY_CLASS = {"lr": 1e-4, "steps": 1000, "batch_size": 128, "retain_prompts": None}
BY_CLASS_ALPHA = 1e-3

OF_THE_LOOP = (
    "lr", "clip_norm", "steps", "sample_every", "save_every", "retain", "retain_caption", "retain_weight",
    "retain_target", "probe_every", "until",
)  # fmt: skip
# Of the loop, and of a mask that is computed.
OF_A_BATCH = ["batch_size", "parts", "samples", "size", "dtype", "checkpointing"]
TO_RETAIN = ("retain", "retain_caption", "retain_prompts", "retain_target")
UNTYPED = {"parts": 1, "sample_every": 0, "save_every": 10}  # values that are defaults, beside None
OWN = Range(0, 10**6)  # a number among a method's own settings


class Recipe(NamedTuple):
    """A method with all its numbers."""

    name: str
    method: Method | UCE
    values: dict[str, Any]  # lr, steps, batch_size, samples and those of OURS, by the name of their option
    typed: frozenset[str] = frozenset()  # which of them were given
    is_published: bool = False  # whether the others are the published ones alone

    def of_model(self, base: Checkpoint, size: int) -> "Recipe":
        """The same; for SalUn on a class-conditional base, with the numbers that its authors have there, where none was
        given. size: side of the training images in pixels."""
        if not base.classes or self.name != "salun":
            return self
        values = dict(BY_CLASS)
        if self.is_published:  # they add up the loss over an image's values, where here its mean counts
            side = size // base.pixels_per_latent
            values["retain_weight"] = BY_CLASS_ALPHA * base.unet_settings["in_channels"] * side**2
        return self._replace(values=self.values | {o: value for o, value in values.items() if o not in self.typed})

    @property
    def retain(self) -> Retain | None:
        """The retain term; None where nothing is retained."""
        weight = self.values.get("retain_weight")
        return Retain(weight, self.values["retain_target"]) if weight else None

    @property
    def is_closed(self) -> bool:
        """Whether the method has a closed form, and no loop."""
        return isinstance(self.method, UCE)

    @property
    def asks(self) -> int:
        """Predictions of the base that it needs for each place in a batch."""
        forgets = not self.is_closed and self.method.shows is not None and self.method.asks
        return forgets + (self.retain is not None and self.retain.asks)

    def steps(self, images: int) -> int | None:
        """Number of updates; where none is given, one pass over the images. None without a loop."""
        return None if self.is_closed else self.values["steps"] or -(-images // self.values["batch_size"])

    def erasure(self, training: Training, steps: int, seed: int = 0, parts: int = 1) -> Erasure:
        return Erasure(self.method, self.retain, training, steps, self.values["batch_size"], seed, parts)

    def record(self) -> dict:
        """For the settings of a record."""
        return {"method": self.name, "setting": asdict(self.method), **self.values}


def recipe_of(
    name: str, recipe: str | None, own: Mapping[str, Any] | Sequence[str] | None, given: Mapping[str, Any]
) -> Recipe:  # fmt: skip
    """The method of a name with its settings. recipe: "paper" for published values alone, or None for ours. own: the
    method's own settings, or texts NAME=VALUE. given: options by name; None and UNTYPED are not typed.

    Raises UsageError for a method or a setting that is unknown, and for an option that the method has no use for.
    """
    check_choice("method", name, METHODS)
    for option, words in (("anchor_from", ("current", "base")), ("retain_target", ("base", "noise"))):
        if given.get(option) is not None:
            check_choice(option.replace("_", "-"), given[option], words)
    if recipe is not None:
        check_choice("recipe", recipe, ("paper",))
    kind = METHODS[name]
    typed = {o: value for o, value in given.items() if value is not None and value != UNTYPED.get(o)}
    settings = _parsed(own)
    if "anchor_from" in settings and "anchor_from" in typed:
        raise UsageError("--setting anchor_from and --anchor-from are one setting: give one of them.")
    settings |= {o: typed.pop(o) for o in ("anchor_from",) if o in typed}
    method = _method(name, kind, settings)
    paper = PAPER if kind.needs_anchor else PAPER | {"retain_prompts": None}
    values = (OURS | kind.published | BETTER.get(name, {})) if recipe is None else (paper | kind.published)
    values |= {option: typed[option] for option in values if option in typed}
    _check_used(name, kind, values, typed)
    check_until(typed.get("until"), values["probe_every"])
    if kind is UCE:  # the others are of a loop
        values = {option: values[option] for option in ("samples", "batch_size", "retain_prompts")}
    elif (kind.join or kind.shows is None) and not values["retain_weight"]:
        raise UsageError(f"--method {name} is defined by what it retains: give a --retain-weight above 0.")
    elif kind.shows is None and values["retain_target"] == "base":
        raise UsageError(f"--retain-target base leaves --method {name} nothing to learn: give noise, or leave it out.")
    return Recipe(name, method, values, frozenset(typed), recipe is not None)


def _parsed(own: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """The method's own settings as a table; VALUE of a text NAME=VALUE is a number where it reads as one."""
    if isinstance(own, Mapping):
        return dict(own)
    settings: dict[str, Any] = {}
    for text in own or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--setting {text} has no value: write NAME=VALUE, such as scale=2.")
        if name in settings:
            raise UsageError(f"--setting {name} is given twice: give it once.")
        try:
            settings[name] = float(value)
        except ValueError:
            settings[name] = value
    return settings


def _method(method: str, kind: type[Method] | type[UCE], settings: Mapping[str, Any]) -> Method | UCE:
    """A method with its own settings, each a number in OWN or one of its words. Raises UsageError for any other."""
    types = {field.name: field.type for field in fields(kind)}
    values = {}
    for name, value in settings.items():
        if name not in types:
            of_its_own = f"its own settings are {', '.join(types)}" if types else "it has no settings of its own"
            name = "--anchor-from" if name == "anchor_from" else name
            raise UsageError(f"{name} is no setting of --method {method}: {of_its_own}.")
        words = get_args(types[name])
        if words and value not in words:
            raise UsageError(f"{name} of --method {method} is {value!r}: give one of {', '.join(words)}.")
        if not words and not OWN.holds(value):
            raise UsageError(f"{name} of --method {method} has to be {OWN.words}; it is {value!r}.")
        values[name] = value if words else float(value)
    try:
        return kind(**values)
    except ValueError as e:  # a number that this method does not take
        raise UsageError(f"--method {method}: {e}") from e


def _check_used(
    name: str, kind: type[Method] | type[UCE], values: Mapping[str, Any], typed: Mapping[str, Any]
) -> None:  # fmt: skip
    """Raise UsageError for an option that is typed and changes nothing."""
    is_salient = "density" in typed or str(typed.get("mask", kind.support)).startswith("salient")
    useless = list(OF_THE_LOOP) if kind is UCE else []
    useless += OF_A_BATCH if kind is UCE and not is_salient else []
    useless += ["until"] if kind.shows is None else []  # no concept moves
    if option := next((option for option in useless if option in typed), None):
        raise UsageError(f"--{option.replace('_', '-')} is of no use to --method {name}: leave it out.")
    retains = kind is UCE or values["retain_weight"]
    if not retains and (option := next((o for o in TO_RETAIN if o in typed), None)):
        by_default = "" if "retain_weight" in typed else f", as it is for --method {name} by default"
        raise UsageError(f"--{option.replace('_', '-')} is of no use where --retain-weight is 0{by_default}: give a "
                         "weight, or leave it out.")  # fmt: skip
