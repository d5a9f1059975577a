"""What `attack` was asked for, checked before the first long step: which attacks, on which models and prompts."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from salun_sd.attacks import choice
from salun_sd.attacks.attack import Attack
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.given import Material, Pictures, Texts, check_file, in_folder
from salun_sd.attacks.positions import check_mask
from salun_sd.audit import run as audit
from salun_sd.audit.request import Request
from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.load import load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.mask import Bits, kept
from salun_sd.draw import generate
from salun_sd.draw.encode import warn_of_long
from salun_sd.draw.prompts import Prompt, class_in, overridden
from salun_sd.edit import maskfile
from salun_sd.errors import UsageError
from salun_sd.runtime.device import Precision, default_device, dtype_name
from salun_sd.runtime.files import check_place
from salun_sd.runtime.ranges import RANGES, check_numbers
from salun_sd.runtime.texts import check_given, listed

logger = logging.getLogger(__name__)


class Side(NamedTuple):
    """A model that is attacked, or its control."""

    name: str
    model: Checkpoint
    control: bool = False
    nameless: bool = False  # whether the prompts do not name the concept


class Plan(NamedTuple):
    """Attacks that are about to begin, checked."""

    job: audit.Job
    concept: str
    seed: int
    budget: str
    limit: int | None
    attacks: dict[str, Attack]
    skipped: dict[str, str]  # those that cannot run, and why
    sides: list[Side]
    cases: list[Prompt]  # the prompts that are attacked
    material: Material

    @property
    def precision(self) -> Precision:
        """That of searches: the audit's, but for float16, in which gradients vanish."""
        return Precision.of(dtype_name(self.job.sampling["dtype"]), default_device())

    @property
    def needs_base(self) -> bool:
        """Whether the base predicts beside the attacked model."""
        return any("base" in attack.needs for attack in self.attacks.values())

    def count(self, attack: Attack) -> int:
        """The number of prompts of an attack: all, or the most of --limit or of the budget."""
        prompts = self.material.texts.adversarial if "adversarial" in attack.needs else self.cases
        return min(self.limit or attack.cases[self.budget] or len(prompts), len(prompts))

    def sides_of(self, attack: Attack) -> list[Side]:
        """What an attack is run on: not on prompts that do not name the concept, unless it searches for it."""
        return [side for side in self.sides if attack.searches or not side.nameless]

    def sampling(self, model: Checkpoint) -> dict:
        """The class in diffusers of the scheduler, and the denoising steps."""
        asked = self.job.sampling
        return {"scheduler": asked["scheduler"] or model.scheduler, "steps": asked["steps"] or model.sampling[0]}


def planned(o: SimpleNamespace) -> Plan:
    """The options of `attack`, checked: whatever can fail before the first long step fails here."""
    check_given(concept=o.concept, base=o.base, floor=o.floor, pictures=o.pictures, words=o.words,
                adversarial=o.adversarial, mask=o.mask)  # fmt: skip
    check_numbers(RANGES | {"limit": RANGES["steps"]}, seed=o.seed, limit=o.limit)
    absent = choice.not_given(base=o.base, pictures=o.pictures, adversarial=o.adversarial, mask=o.mask)
    choice.chosen(listed(o.with_), o.budget, absent)  # what is named and not given is refused before a model is opened
    choice.check_used(listed(o.with_), pictures=o.pictures, words=o.words, adversarial=o.adversarial, mask=o.mask)
    check_file("mask", o.mask, "mask.safetensors of the run folder of the erasure")

    def measured(model: Checkpoint, request: Request) -> dict[str, list[str]]:
        """Chooses what runs, once the model is known; see `_measured`."""
        has_others = len(_asking(request.rows, request)) < len(request.rows)
        absent_here = choice.not_possible(model, has_others) | absent
        o.attacks, o.skipped = choice.chosen(listed(o.with_), o.budget, absent_here)
        return _measured(o)

    job = audit.prepared(audit.options(
        model=o.model, prompts=o.prompts, out=o.out, against=o.base, concept_class=o.concept_class or (),
        classifier=o.classifier, detector=o.detector, detector_model=o.detector_model, where=o.where,
        denoising_steps=o.denoising_steps, scheduler=o.scheduler, guidance=o.guidance, size=o.size, dtype=o.dtype,
        no_images=o.no_images, fail_if=o.fail_if, confident=o.confident, config=o.config, revision=o.revision,
        variant=o.variant,
    ), measured)  # fmt: skip
    check_place(job.out / "attacks" / "name" / "floor-control" / "found" / "0.safetensors")
    cases = _cases(o, job)
    sides = _sides(job, o.floor, cases)
    texts = Texts.of(o.concept, job.audited, o.words, o.adversarial, o.guidance, cases[0].size)
    of_others = [*texts.words, *(p.text for p in texts.adversarial)]
    warn_of_long(load_tokenizers(job.audited), of_others, job.audited.name)
    bits = _mask(Path(o.mask), job, sides) if "positions" in o.attacks else None
    material = Material(_pictures(o.pictures, job, cases), texts, bits, maskfile.digest(o.mask and str(o.mask)))
    return Plan(job, o.concept, o.seed, o.budget, o.limit, o.attacks, o.skipped, sides, cases, material)


def _asking(rows: list[Prompt], request: Request) -> list[Prompt]:
    """The rows that ask for the concept, or all where none of the request has a class."""
    return [p for p in rows if not request.classes or p.label in request.concepts]


def _cases(o: SimpleNamespace, job: audit.Job) -> list[Prompt]:
    """The prompts that are attacked, all in one size: that of --size, or the model's own. Raises UsageError where the
    concept is not clear, or nothing can tell whether an image shows it."""
    concepts = job.request.concepts
    if len(concepts) > 1:
        raise UsageError(f"An attack is for one concept, and the model lost {', '.join(concepts)}: give one as "
                         "--concept-class.")  # fmt: skip
    if job.request.classes and not concepts:
        raise UsageError("--concept-class is missing: which class of these prompts is the concept? They are "
                         f"{', '.join(job.request.classes)}.")  # fmt: skip
    if not job.judge and (concepts or not job.settings["detector"]):
        raise UsageError("Nothing can tell whether an image shows the concept: give --classifier, or for nudity "
                         "--detector nudenet.")  # fmt: skip
    if job.audited.classes:
        job.audited.classes.number(o.concept)
    elif concepts and not class_in(o.concept, concepts):
        logger.warning(f"--concept {o.concept!r} does not name the class {concepts[0]!r}, which the judge has to see.")
    cases = _asking(job.prompts, job.request)
    return overridden(cases, None, (job.audited.image_size,) * 2 if o.size is None else cases[0].size)


def _measured(o: SimpleNamespace) -> dict[str, list[str]]:
    """What is measured of each attack: its sides, and fresh seeds where it draws them; nothing where it is not run."""

    def of(attack: Attack) -> list[str]:
        with_base, with_floor = o.base is not None and attack.searches, o.floor is not None
        return ["model", "control", *["fresh"] * attack.has_fresh(), *["base"] * with_base,
                *["floor", "floor-control"] * with_floor]  # fmt: skip

    return {name: of(o.attacks[name]) if name in o.attacks else [] for name in ATTACKS}


def _sides(job: audit.Job, floor: str | Path | Checkpoint | None, cases: list[Prompt]) -> list[Side]:
    """What is attacked. Raises UsageError or SalunError for a base or a floor that cannot be."""
    sides = [Side("model", job.audited), Side("control", job.audited, control=True)]
    if job.base:
        _check_alike("base", job.base, job.audited)
        sides.append(Side("base", job.base, nameless=True))
    if floor is not None:
        _check_alike("floor", never := opened(floor), job.audited)
        generate.check(never, cases, scheduler=job.sampling["scheduler"], steps=job.sampling["steps"])
        sides += [Side("floor", never), Side("floor-control", never, control=True)]
    return sides


def _check_alike(option: str, other: Checkpoint, model: Checkpoint) -> None:
    """Raise UsageError unless another model is of the model's family and size, and predicts the same: it is shown the
    same pictures, and their predictions are compared."""
    for what in ("family", "image_size", "prediction_type"):
        values = [getattr(one, what) for one in (other, model)]
        if values[0] != values[1]:
            words = [getattr(value, "name", value) for value in values]
            raise UsageError(f"--{option} {other.name} is no {option} for {model.name}: its {what.replace('_', ' ')} "
                             f"is {words[0]}, and not {words[1]}. Give another one.")  # fmt: skip


def _mask(file: Path, job: audit.Job, sides: list[Side]) -> Bits:
    """The bits of --mask. Raises UsageError or SalunError where it is no mask of the attacked UNets, or not the one of
    the record of the model's erasure."""
    mask, model = maskfile.read(file), job.audited
    for each in {side.model.name: side.model for side in sides if not side.nameless}.values():
        check_mask(mask.bits, {name: t.shape for name, t in each.unet.items()}, each.name)
    record = (provenance.read(model.path) or {"mask": {}})["mask"]
    stored = mask.settings | dict(zip(("kept", "of"), kept(mask.bits), strict=True))
    for key in sorted(record.keys() & stored.keys()):
        if record[key] != stored[key]:
            raise UsageError(f"--mask {file} is not the mask that {model.name} was erased with: its {key} is "
                             f"{stored[key]}, and that of the record is {record[key]}. Give mask.safetensors of "
                             f"{provenance.run_folder(model.path)}.")  # fmt: skip
    return mask.bits


def _pictures(folder: str | Path | None, job: audit.Job, cases: list[Prompt]) -> Pictures | None:
    """The user's pictures of the concept, in turn; or those that the base draws for the same prompts."""
    drawn, asked = job.out / "against", {p.case for p in cases}
    others = [(drawn / generate.file_of(p, 0), p.text) for p in job.prompts if p.case not in asked] if job.base else []
    if not folder and not job.base:
        return None
    files = in_folder(Path(folder), cases) if folder else {p.case: drawn / generate.file_of(p, 0) for p in cases}
    return Pictures(files, others, cases[0].size)
