"""Supports: the weights that an erasure may change, as --mask names them."""

import difflib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.edit import maskfile
from salun_sd.edit.concepts import Concept
from salun_sd.edit.maskfile import Mask
from salun_sd.errors import UsageError
from salun_sd.runtime.contents import no_file

logger = logging.getLogger(__name__)

SALIENT, RANDOM, NONE, FILE = "salient", "random", "none", "file"
CROSS, KEYS_AND_VALUES, NOT_CROSS = "cross-attention", "cross-attention-kv", "not-cross-attention"
FORMS = (f"{SALIENT}:0.5", f"{RANDOM}:0.5", CROSS, KEYS_AND_VALUES, NOT_CROSS, NONE)  # one of each


class Support(NamedTuple):
    """Which weights may change, before the model is known."""

    kind: str
    density: float | None = None  # salient and random: the share of weights
    guidance: float | None = None  # salient: w of the saliency; None until `of_model`: the model's own
    file: Path | None = None  # file: a mask

    def record(self) -> dict:
        """For the settings of a record."""
        share = "" if self.density is None else f":{self.density}"
        density = self.density if self.kind == SALIENT else None
        return {"mask": str(self.file or self.kind + share), "density": density, "guidance": self.guidance}

    def of_model(self, base: Checkpoint) -> "Support":
        """The same, with the model's own guidance where none is given. Raises UsageError where the model has no null
        class, and a guidance is given."""
        if self.kind != SALIENT:
            return self
        return self._replace(guidance=saliency_guidance(base, self.guidance))

    def mask(self, base: Checkpoint, concepts: Sequence[Concept], seed: int) -> Mask | None:
        """The mask of a UNet; None for salient weights, which have to be computed. Its settings say the support.

        Raises UsageError for a density that keeps no weight, and for a UNet without such layers; SalunError for a file
        that is no mask, or one of another UNet.
        """
        if self.kind == FILE:
            return _stored(self.file, base, concepts)
        shapes = {name: t.shape for name, t in base.unet.items()}
        settings = {"base": base.fingerprint, "kind": self.kind}
        if self.kind == SALIENT:
            masks.keep_count(self.density, sum(shape.numel() for shape in shapes.values()))
            return None
        if self.kind == RANDOM:
            bits = masks.random_bits(shapes, self.density, seed)
            return Mask(bits, {**settings, "density": self.density, "seed": seed})
        if self.kind == NONE:
            return Mask(masks.full_bits(shapes), settings)
        free = parameters_of(base.skeleton(base.denoiser), self.kind)
        if not free:
            raise UsageError(f"The UNet of {base.name} has no layer for --mask {self.kind}: give another --mask, such "
                             f"as {FORMS[0]}.")  # fmt: skip
        bits = masks.Bits.of((name, torch.full(shape, name in free)) for name, shape in shapes.items())
        return Mask(bits, settings)


def support_of(
    mask: str | None, density: float | None = None, guidance: float | None = None, default: str = FORMS[0]
) -> Support:  # fmt: skip
    """What --mask says; without it what --density says, D being salient:D; or else `default`, the method's own. A
    guidance, of the saliency, is for salient weights alone.

    Raises UsageError where these cannot go together, where a density is out of (0, 1], and where --mask is neither a
    support nor a file.
    """
    if mask is not None and density is not None:
        raise UsageError(f"--mask {mask} and --density {density:g} cannot go together: leave out --density, or write "
                         f"--mask {SALIENT}:{density:g}.")  # fmt: skip
    support = _parsed(default if mask is None else mask) if density is None else Support(SALIENT, float(density))
    if support.kind == SALIENT:
        return support._replace(guidance=guidance)
    if guidance is not None:
        raise UsageError(f"--saliency-guidance is for salient weights, and --mask is {mask or default}: leave it out, "
                         f"or give --mask {FORMS[0]}.")  # fmt: skip
    return support


def saliency_guidance(base: Checkpoint, given: float | None) -> float:
    """w of the saliency: the given one, or the one of the base's family; 0 where it has no null class. Raises
    UsageError where it has none and w is not 0."""
    if given and not base.is_guided:
        raise UsageError(f"--saliency-guidance is {given:g}, and {base.name} has no null class to guide away from: "
                         "leave it out.")  # fmt: skip
    if given is None:
        return base.family.saliency_guidance if base.is_guided else 0.0
    return given


def _parsed(text: str) -> Support:
    """Raises UsageError as `support_of` does."""
    kind, colon, density = text.partition(":")
    if kind in (SALIENT, RANDOM) and (colon or not Path(text).is_file()):
        return Support(kind, _density(text, density))
    if text in FORMS:
        return Support(text)
    if fault := no_file(Path(text)):
        raise UsageError(f"Mask {text} {fault}: give {_meant(text)}{', '.join(FORMS)}, or a file that salun-sd mask "
                         "wrote.")  # fmt: skip
    return Support(FILE, file=Path(text))


def _density(text: str, density: str) -> float:
    """D of salient:D or random:D."""
    try:
        value = float(density)
    except ValueError as e:
        raise UsageError(f"--mask {text} has no density: write {text.partition(':')[0]}:0.5, say.") from e
    masks.keep_count(value, sys.maxsize)  # raises outside (0, 1]
    return value


def _meant(text: str) -> str:
    """The form that a text nearly is, as the beginning of a choice; empty where there is none."""
    word, forms = text.lower().replace("_", "-"), {form.partition(":")[0]: form for form in FORMS}
    near = difflib.get_close_matches(word.partition("=")[0].partition(":")[0], forms, 1, 0.7)
    return f"{forms[near[0]]}, which it is near to, or one of " if near else ""


def parameters_of(unet: nn.Module, kind: str) -> set[str]:
    """The names of the weights and biases of a named support, as ESD has them (the authors' esd-x, esd-x-strict and
    esd-u): Linear and Conv2d layers inside cross-attention, its layers of keys and values alone, or those outside it.
    Norms are in none. Cross-attention is what diffusers' attention layers say they are."""
    inside = tuple(f"{name}." for name, module in unet.named_modules() if getattr(module, "is_cross_attention", False))
    belongs = {
        CROSS: lambda layer: layer.startswith(inside),
        KEYS_AND_VALUES: lambda layer: layer.startswith(inside) and layer.endswith((".to_k", ".to_v")),
        NOT_CROSS: lambda layer: not layer.startswith(inside),
    }[kind]
    return {
        f"{layer}.{name}"
        for layer, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d) and belongs(layer)
        for name, _ in module.named_parameters(recurse=False)
    }  # fmt: skip


def _stored(file: Path, base: Checkpoint, concepts: Sequence[Concept]) -> Mask:
    """The mask in a file, checked against the UNet. Logs where it was made for other concepts."""
    stored = maskfile.read(file)
    maskfile.check(stored, {name: t.shape for name, t in base.unet.items()}, base.fingerprint)
    made_for = stored.settings.get("concepts")  # a mask that is not salient is made for none
    if made_for and {c.prompt for c in concepts} - set(made_for):
        logger.warning(f"{file} was made for {', '.join(map(repr, made_for))}, not for these concepts.")
    return stored
