"""What attacks will draw, and the memory and the time that they take: told before they begin."""

from dataclasses import replace

from salun_sd.attacks.attack import Attack
from salun_sd.attacks.effort import Effort, drawing, effort
from salun_sd.attacks.weights import Weights
from salun_sd.draw.sample import images_per_pass
from salun_sd.edit import budget
from salun_sd.edit.budget import Attacking
from salun_sd.edit.resources import Compute, Forecast
from salun_sd.runtime import ranks
from salun_sd.runtime.bar import in_time
from salun_sd.runtime.device import default_device
from salun_sd.under_attack.plan import Plan


def forecast(plan: Plan) -> Forecast:
    """What --dry-run gives: how much the audit and each attack draw, and with which settings; why others are not run;
    the memory; and the time, which is that of a pass through the UNet, measured here, times the number of passes."""
    model, precision, attacks = plan.job.audited, plan.precision, plan.attacks.values()
    side, compute = max(plan.cases[0].size), Compute(model, precision, precision, model.is_large)
    work = compute.work(
        Attacking, side, max(getattr(attack, "batch_size", 1) for attack in attacks),
        draws=compute.drawing(side, draws=False), models=2 if plan.needs_base else 1,
        trains=any(attack.trains for attack in attacks), changes=any(isinstance(attack, Weights) for attack in attacks),
    )  # fmt: skip
    told = compute.forecast([work], {}, {})
    seconds = _seconds_of_pass(plan, work) if told.fits else None
    audit, efforts = _of_audit(plan), {name: _of_attack(plan, attack) for name, attack in plan.attacks.items()}
    whole = sum(efforts.values(), audit)
    settings = {
        "attacked prompts": max(plan.count(attack) for attack in attacks),
        "images": f"{whole.images:,}",
        "time": _time(whole, seconds) + (f", as one image goes through the UNet in {seconds:.2g} s" if seconds else ""),
        "audit": _line(audit, seconds),
        **{name: _line(of, seconds, plan.attacks[name]) for name, of in efforts.items()},
        **{name: f"not run: it {why}" for name, why in plan.skipped.items()},
    }
    return told._replace(settings=settings)


def _line(of: Effort, seconds: float | None, attack: Attack | None = None) -> str:
    """The images, the time and the settings of an attack, or of the audit."""
    settings = [f"{key} {value}" for key, value in attack.settings().items()] if attack else []
    more = f", and the time of {attack.uncounted}" if attack and attack.uncounted else ""
    return "; ".join([f"{of.images:,} images", _time(of, seconds) + more, *settings])


def _time(of: Effort, seconds: float | None) -> str:
    """How long it takes, where the time of a pass is known."""
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
    """The images of the audit: of the model, and of its base."""
    own, models = plan.job.own, 2 if plan.job.base else 1
    is_guided, steps = any(p.guidance > 1 for p in own), plan.sampling(plan.job.audited)["steps"]
    return drawing([len(own)] * models, steps, _images_per_pass(plan), is_guided)


def _of_attack(plan: Plan, attack: Attack) -> Effort:
    """The images and the searches of an attack on all of its sides."""
    is_guided, steps = any(p.guidance > 1 for p in plan.cases), plan.sampling(plan.job.audited)["steps"]
    each = (effort(attack, plan.count(attack), steps, _images_per_pass(plan), is_guided, side.control)
            for side in plan.sides_of(attack))  # fmt: skip
    return sum(each, Effort())
