"""The work of `attack`: an audit of the model, then each attack, and what its images show."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import groupby, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from salun_sd.attacks.attack import Attack, Scene
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.given import Material, Pictures, Texts, without_name
from salun_sd.attacks.positions import check_mask
from salun_sd.attacks.prompts import attacked_with
from salun_sd.attacks.run import Run
from salun_sd.attacks.target import LARGE, Target
from salun_sd.audit import attacked, deliver, detectors, quality
from salun_sd.audit import run as audit
from salun_sd.audit.examine import examine
from salun_sd.checkpoint.families import DIT
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.mask import Bits
from salun_sd.draw.generate import file_of
from salun_sd.draw.prompts import Prompt, class_in
from salun_sd.edit import maskfile
from salun_sd.edit.budget import Attacking
from salun_sd.edit.resources import Compute, Forecast
from salun_sd.errors import SalunError, UsageError, first_line
from salun_sd.runtime import ranks
from salun_sd.runtime.contents import no_file
from salun_sd.runtime.device import Precision, default_device, dtype_name
from salun_sd.runtime.ranges import RANGES, check_numbers
from salun_sd.runtime.texts import check_given, listed

logger = logging.getLogger(__name__)


class Side(NamedTuple):
    """A model that is attacked, or its control."""

    name: str
    model: Checkpoint
    control: bool = False
    nameless: bool = False  # whether the prompts do not name the concept


def attack(
    model: str | Path | Checkpoint, *, concept: str, prompts: str, out: str | Path, with_: str | Sequence[str] = (),
    base: str | Path | Checkpoint | None = None, floor: str | Path | Checkpoint | None = None, budget: str = "quick",
    concept_class: str | None = None, classifier: str | None = None, detector: str | Sequence[str] = (),
    detector_model: str | Path | None = None, pictures: str | Path | None = None, words: str | Path | None = None,
    adversarial: str | Path | None = None, mask: str | Path | None = None, where: Sequence[str] = (),
    limit: int | None = None, denoising_steps: int | None = None, scheduler: str | None = None,
    guidance: float | None = None, size: str | int | None = None, dtype: str | None = None, seed: int = 0,
    dry_run: bool = False, no_images: bool = False, fail_if: str | Sequence[str] = (), confident: bool = False,
    config: str | None = None, revision: str | None = None, variant: str | None = None,
) -> dict | Forecast:  # fmt: skip
    """Attack a checkpoint, its control and, if they are given, its base and a floor. Writes the audit of the checkpoint
    and what the attacks show into `out`; returns what report.json holds.

    With `dry_run`, returns what each attack will do and the memory instead, and writes nothing.

    The parameters are the options of `salun-sd attack`. An attack that fails is named in the report, and the others go
    on. Running it again searches, draws and judges only what is missing. Raises UsageError for arguments that are wrong
    or cannot go together, SalunError for what fails; the text of both is a sentence for a person.
    """
    o = SimpleNamespace(**locals())
    check_given(concept=concept, floor=floor, pictures=pictures, words=words, adversarial=adversarial, mask=mask)
    check_numbers(RANGES | {"limit": RANGES["steps"]}, seed=seed, limit=limit)
    attacks = _chosen(o)
    job = audit.prepared(audit.options(
        model=model, prompts=prompts, out=out, against=base, concept_class=concept_class or (), classifier=classifier,
        detector=detector, detector_model=detector_model, where=where, denoising_steps=denoising_steps,
        scheduler=scheduler, guidance=guidance, size=size, dtype=dtype, no_images=no_images, fail_if=fail_if,
        confident=confident, config=config, revision=revision, variant=variant,
    ), attacks={name: _measured(o, attacks[name]) if name in attacks else () for name in ATTACKS})  # fmt: skip
    cases, sides = _attacked(o, job), _sides(job, floor)
    attacks = _possible(job, attacks, cases, listed(with_))
    pictures, size = _pictures(o, job, cases), None if o.size is None else cases[0].size
    texts = Texts.of(o.concept, job.audited, o.words, o.adversarial, o.guidance, size)
    bits = _mask(Path(o.mask), job.audited) if "positions" in attacks else None
    material = Material(pictures, texts, bits, maskfile.digest(o.mask and str(o.mask)))
    if dry_run:
        return _forecast(o, job, attacks, len(cases))
    rows, run, of_base = audit.examined(job)
    report = audit.assembled(job, rows, run, of_base, quality.look(job.measures, run, of_base, job.request.concepts))
    tries, failed = _attack_all(o, job, attacks, sides, cases, material)
    entries = {name: _entry(o, attacks[name], of, job.request.concepts) for name, of in tries.items()}
    report["attacks"] = attacked.in_report(entries, report, of_base or run, failed)
    deliver.finish(report, run, of_base, job.out, job.bounds, confident=confident, pictures=not no_images,
                   attacks={name: of["model"].tries for name, of in tries.items()})  # fmt: skip
    return report


def _chosen(o: SimpleNamespace) -> dict[str, Attack]:
    """The attacks of --with, or all that can run with what is given. Raises UsageError for one that is unknown, or
    lacks what it needs."""
    if o.budget not in Attack.cases:
        raise UsageError(f"There is no --budget {o.budget}: give {' or '.join(Attack.cases)}.")
    names = listed(o.with_)
    if unknown := [name for name in names if name not in ATTACKS]:
        raise UsageError(f"There is no attack {unknown[0]}: give --with one of {', '.join(ATTACKS)}.")
    lacks = {name: _lacking(kind, o) for name, kind in ATTACKS.items()}
    for name in names:
        if lacks[name]:
            raise UsageError(f"--with {name} needs {lacks[name]}.")
    return {name: ATTACKS[name].of(o.budget) for name in ATTACKS if (name in names if names else not lacks[name])}


def _possible(
    job: audit.Job, attacks: dict[str, Attack], cases: list[Prompt], named: Sequence[str]
) -> dict[str, Attack]:  # fmt: skip
    """The attacks that this model and these prompts allow. Raises UsageError for one of --with that they do not."""
    lacks, model = {}, job.audited
    if model.classes:
        lacks["text"] = f"is for models that read a text, and {model.name} draws a class: leave it out"
    if model.family is DIT:
        lacks["embedding"] = f"searches for an embedding, and the DiT {model.name} has one in each block: leave it out"
    if not model.is_guided:
        lacks["null"] = f"draws without a class, and {model.name} has no null class: leave it out"
    if len(cases) == len(job.own):
        lacks["others"] = "trains on pictures of other things, and these prompts ask for none: give other --prompts"
    for name, attack in attacks.items():
        if name in named and (wrong := [need for need in lacks if need in attack.needs]):
            raise UsageError(f"--with {name} {lacks[wrong[0]]}.")
    return {name: attack for name, attack in attacks.items() if attack.needs.isdisjoint(lacks)}


def _lacking(kind: type[Attack], o: SimpleNamespace) -> str | None:
    """What an attack needs and is not given, with the option that gives it."""
    needs = {
        "picture": (o.base or o.pictures, "pictures of the concept: give --base, which draws them, or --pictures"),
        "base": (o.base, "the model before the erasure: give --base"),
        "others": (o.base, "pictures of other things, which the base draws: give --base"),
        "adversarial": (o.adversarial, "prompts of others: give --adversarial with a CSV file"),
        "mask": (o.mask, "the positions of the erased weights: give --mask with a mask file"),
        "peft": (find_spec("peft"), "the package peft: pip install 'salun-sd[lora]'"),
    }
    return next((text for name, (given, text) in needs.items() if name in kind.needs and not given), None)


def _most(o: SimpleNamespace, attack: Attack) -> int | None:
    """The most prompts that are attacked: those of --limit, or of the budget; None for all."""
    return o.limit or attack.cases[o.budget]


def _attacked(o: SimpleNamespace, job: audit.Job) -> list[Prompt]:
    """The prompts that are attacked: those that ask for the concept, or all where none has a class. Raises UsageError
    where the concept is not clear, or nothing can tell whether an image shows it."""
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
    return [p for p in job.own if not job.request.classes or p.label in concepts]


def _measured(o: SimpleNamespace, attack: Attack) -> list[str]:
    """What is measured of an attack: its sides, and fresh seeds where it draws them."""
    return ["model", "control", *["fresh"] * attack.has_fresh(), *["base"] * (o.base is not None and attack.searches),
            *["floor", "floor-control"] * (o.floor is not None)]  # fmt: skip


def _sides(job: audit.Job, floor: str | Path | Checkpoint | None) -> list[Side]:
    """What is attacked."""
    sides = [Side("model", job.audited), Side("control", job.audited, control=True)]
    if job.base:
        _check_alike("base", job.base, job.audited)
        sides.append(Side("base", job.base, nameless=True))
    if floor is not None:
        _check_alike("floor", never := opened(floor), job.audited)
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


def _forecast(o: SimpleNamespace, job: audit.Job, attacks: dict[str, Attack], prompts: int) -> Forecast:
    """What --dry-run gives: the settings of each attack, and the memory of the largest one."""
    model, precision = job.audited, _precision(job)
    compute = Compute(model, precision, precision, False, sum(t.shape.numel() for t in model.unet.values()))
    others = compute.drawing(model.image_size, draws=True).others
    if any("base" in attack.needs for attack in attacks.values()):
        others += others + compute.weights * precision.dtype.itemsize
    work = Attacking(
        model.image_size, max(getattr(attack, "batch_size", 1) for attack in attacks.values()), precision,
        compute.weights >= LARGE, model.pixels_per_latent, others, any(attack.trains for attack in attacks.values()),
    )  # fmt: skip
    settings = {name: ", ".join(f"{key} {value}" for key, value in attack.settings().items())
                for name, attack in attacks.items()}  # fmt: skip
    most = [_most(o, attack) or prompts for attack in attacks.values()]
    return compute.forecast([work], {"prompts": min(prompts, max(most)), **settings}, {})


def _precision(job: audit.Job) -> Precision:
    """That of an attack: the audit's, but for float16, in which gradients vanish."""
    return Precision.of(dtype_name(job.sampling["dtype"]), default_device())


def _mask(file: Path, model: Checkpoint) -> Bits:
    """The bits of --mask. Raises UsageError or SalunError where it is no mask of the model's UNet."""
    if fault := no_file(file):
        raise UsageError(f"--mask {file} {fault}: give mask.safetensors of the run folder of the erasure.")
    bits = maskfile.read(file).bits
    check_mask(bits, {name: t.shape for name, t in model.unet.items()}, model.name)
    return bits


def _pictures(o: SimpleNamespace, job: audit.Job, cases: list[Prompt]) -> Pictures | None:
    """The user's pictures of the concept, in turn; or those that the base drew for the same prompts."""
    drawn, asked = job.out / "against", {p.case for p in cases}
    others = [(drawn / file_of(p, 0), p.text) for p in job.own if p.case not in asked] if job.base else []
    if o.pictures:
        return Pictures.of_folder(Path(o.pictures), cases, others)
    return Pictures({p.case: drawn / file_of(p, 0) for p in cases}, others) if job.base else None


def _attack_all(
    o: SimpleNamespace, job: audit.Job, attacks: dict[str, Attack], sides: list[Side], cases: list[Prompt],
    material: Material,
) -> tuple[dict[str, dict[str, attacked.Side]], dict[str, str]]:  # fmt: skip
    """Run each attack on each side, a model at a time: what was drawn, and the attacks that failed, with the reason."""
    drawn, failed, dtype = {name: {} for name in attacks}, {}, _precision(job).dtype
    given = {name: material.digest(attack.needs) for name, attack in attacks.items()}
    opened_base = cache(lambda: Target(job.base, dtype))
    for model, group in groupby(sides, key=lambda side: side.model):
        target = opened_base() if model is job.base else Target(model, dtype)
        of_all = material.scene(target, o.concept, cases, o.seed)
        for side, (name, attack) in product(group, attacks.items()):
            if (name in failed and not drawn[name]) or (side.nameless and not attack.searches):
                continue
            base = opened_base() if "base" in attack.needs else None
            scene = replace(of_all, control=side.control, given=given[name], base=base)
            if "adversarial" in attack.needs:
                scene = attacked_with(scene, material.texts.adversarial)
            scene.prompts = scene.prompts[: _most(o, attack)]
            if side.nameless and model.is_guided:  # else it draws nothing without a class
                scene = without_name(scene, job.request.concepts)
            run = _run(name, attack, scene, side, job)
            run.keep_settings()
            try:
                drawn[name][side.name] = _on_one(run, side, job)
            except (SalunError, OSError, RuntimeError) as e:
                if ranks.count() > 1:  # the other processes wait for this one
                    raise
                logger.warning(f"The attack {name} failed on {model.name}, and the others go on: {first_line(e)}.")
                failed[name] = f"{side.name}: {first_line(e)}"
        target = of_all = scene = run = None  # before the next model is loaded
    if not (whole := {name: of for name, of in drawn.items() if "model" in of}):
        raise SalunError(f"Every attack failed; the first is {next(iter(failed))}, {next(iter(failed.values()))}.")
    return whole, failed


def _run(name: str, attack: Attack, scene: Scene, side: Side, job: audit.Job) -> Run:
    scheduler = job.sampling["scheduler"] or side.model.scheduler
    steps = job.sampling["steps"] or side.model.sampling[0]
    return Run(name, attack, scene, job.out / "attacks" / name / side.name, scheduler=scheduler, steps=steps)


def _on_one(run: Run, side: Side, job: audit.Job) -> attacked.Side:
    """One attack on one side: its tries, and what it found on fresh seeds."""
    out, model, concepts = run.out, side.model.name, job.request.concepts
    looking = detectors.load([], None, default_device()) if concepts else job.detectors
    run.search()
    tries = examine(model, run.draw(), job.judge, looking, out)
    lines = [] if side.control else run.fresh(attacked.chosen(tries, concepts))
    return attacked.Side(tries, examine(model, lines, job.judge, looking, out / "fresh") if lines else None)


def _entry(o: SimpleNamespace, attack: Attack, sides: dict[str, attacked.Side], concepts: Sequence[str]) -> dict:
    """An attack's entry in the report."""
    most = max(line["k"] for line in sides["model"].tries.manifest)
    about = attacked.About(attack.settings(), o.budget, most, attack.from_picture, attack.labels(),
                           attack.counts_last)  # fmt: skip
    return attacked.attacked(about, sides, concepts)
