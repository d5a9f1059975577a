"""What attacks have still to draw, and the memory and the time that they take: known before they begin."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from salun_sd.attacks.attack import Attack
from salun_sd.attacks.effort import Effort, drawing, effort
from salun_sd.attacks.run import Run
from salun_sd.attacks.weights import Weights
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import generate, kept
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import images_per_pass
from salun_sd.edit import budget
from salun_sd.edit.resources import Compute, Forecast
from salun_sd.edit.steps import Attacking
from salun_sd.runtime import ranks
from salun_sd.runtime.bar import in_time
from salun_sd.runtime.device import default_device, dtype_name
from salun_sd.under_attack.plan import Plan


def forecast(plan: Plan, runs: Sequence[Run]) -> Forecast:
    """What --dry-run gives: how much the audit and each attack have still to draw, and with which settings; why others
    are not run; the memory; and the time, which is that of a pass through the UNet, measured here, times the number of
    passes that are left."""
    model, precision, attacks = plan.job.audited, plan.precision, plan.attacks.values()
    side, compute = max(plan.cases[0].size), Compute(model, precision, precision, model.is_large)
    work = compute.work(
        Attacking, side, max(getattr(attack, "batch_size", 1) for attack in attacks),
        draws=compute.drawing(side, draws=False), models=2 if plan.needs_base else 1,
        trains=any(attack.trains for attack in attacks), changes=any(isinstance(attack, Weights) for attack in attacks),
    )  # fmt: skip
    memory, audit, efforts = compute.forecast([work], {}, {}), _of_audit(plan), _of_attacks(plan, runs)
    whole = sum(efforts.values(), audit)
    seconds = _seconds_of_pass(plan, work) if memory.fits and whole.passes else None
    settings = {
        "attacked prompts": max(plan.count(attack) for attack in attacks),
        "images": _images(whole) + (": the others are there" if whole.images < whole.of else ""),
        "time": _time(whole, seconds) + (f", as one image goes through the UNet in {seconds:.2g} s" if seconds else ""),
        "audit": _line(audit, seconds),
        **{name: _line(of, seconds, plan.attacks[name]) for name, of in efforts.items()},
        **{name: f"not run: it {why}" for name, why in plan.skipped.items()},
    }
    return memory._replace(settings=settings)


def _line(of: Effort, seconds: float | None, attack: Attack | None = None) -> str:
    """The images, the time and the settings of an attack, or of the audit."""
    settings = [f"{key} {value}" for key, value in attack.settings().items()] if attack else []
    more = f", and the time of {attack.uncounted}" if attack and attack.uncounted and of.passes else ""
    return "; ".join([f"{_images(of)} images", _time(of, seconds) + more, *settings])


def _images(of: Effort) -> str:
    """How many are left, and of how many."""
    return f"{of.images:,}" if of.images == of.of else f"{of.images:,} of {of.of:,}"


def _time(of: Effort, seconds: float | None) -> str:
    """How long what is left takes, where the time of a pass is known."""
    if not of.passes:
        return "nothing is left"
    return "time not known" if seconds is None else f"about {in_time(of.passes * seconds / ranks.count())}"


def _seconds_of_pass(plan: Plan, work: Attacking) -> float | None:
    """Seconds for which an image goes through the UNet, measured; None in a process that is not the main one."""
    if not ranks.is_main():
        return None
    work = replace(work, batch=2 * _images_per_pass(plan))  # as guided images are drawn
    return budget.seconds_of_pass(plan.job.audited.unet_settings, work, default_device())


def _images_per_pass(plan: Plan) -> int:
    return images_per_pass(*(side // plan.job.audited.pixels_per_latent for side in plan.cases[0].size))


def _of_audit(plan: Plan) -> Effort:
    """The images of the audit: of the model, and of its base, less those that are drawn."""
    efforts = [_of_model(plan, plan.job.audited, plan.job.out, keep=False)]
    if base := plan.job.base:
        efforts.append(_of_model(plan, base, plan.job.out / "against", keep=True))
    return sum(efforts, Effort())


def _of_model(plan: Plan, model: Checkpoint, out: Path, keep: bool) -> Effort:
    """A model's images in a folder of the audit; with `keep`, the cache may have them, too."""
    prompts, size = plan.job.prompts, (model.image_size, model.image_size)
    sampling = plan.sampling(model) | {"dtype": dtype_name(plan.job.sampling["dtype"])}

    def is_there(p: Prompt) -> bool:
        in_cache = kept.place_of("audited", model, generate.row_of(p, 0, size), **sampling)
        return (out / generate.file_of(p, 0)).is_file() or (keep and in_cache.is_file())

    count, is_guided = sum(not is_there(p) for p in prompts), any(p.guidance > 1 for p in prompts)
    return drawing(count, sampling["steps"], _images_per_pass(plan), is_guided, of=len(prompts))


def _of_attacks(plan: Plan, runs: Sequence[Run]) -> dict[str, Effort]:
    """The images and the searches of each attack on all of its sides, less what is on the disk."""
    efforts, is_guided = dict.fromkeys(plan.attacks, Effort()), any(p.guidance > 1 for p in plan.cases)
    for run in runs:
        efforts[run.name] += effort(run, _images_per_pass(plan), is_guided)
    return efforts
