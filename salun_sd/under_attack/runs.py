"""Each attack on each of its sides: what it works with, and where."""

from dataclasses import replace
from itertools import groupby

from salun_sd.attacks.attack import Attack, Scene
from salun_sd.attacks.given import without_name
from salun_sd.attacks.prompts import attacked_with
from salun_sd.attacks.run import Run
from salun_sd.attacks.target import Target
from salun_sd.under_attack.plan import Plan, Side


def listed(plan: Plan) -> list[tuple[Side, Run]]:
    """All attacks on all of their sides, a model after the other. A model is loaded when a run first needs it, and is
    in memory as long as a run of it is held.

    Raises UsageError where the folder of an attack has another search: else it would be refused after hours. What was
    given is compared when the search begins, as the base may have to draw its pictures again.
    """
    runs, base = [], Target(plan.job.base, plan.precision.dtype) if plan.needs_base else None
    for model, sides in groupby(plan.sides, key=lambda side: side.model):
        target = base if base and model is plan.job.base else Target(model, plan.precision.dtype)
        of_all = replace(plan.material.scene(target, plan.concept, plan.cases, plan.seed), base=base)
        runs += [(side, _run(plan, name, side, of_all)) for side in sides for name, attack in plan.attacks.items()
                 if side in plan.sides_of(attack)]  # fmt: skip
    for _, run in runs:
        run.check(without=["given"])
    return runs


def _run(plan: Plan, name: str, side: Side, of_all: Scene) -> Run:
    """An attack on one side, of the scene of all attacks on the model."""
    attack, out = plan.attacks[name], plan.job.out / "attacks" / name / side.name
    return Run(name, attack, _scene(plan, attack, side, of_all), out, **plan.sampling(side.model))


def _scene(plan: Plan, attack: Attack, side: Side, of_all: Scene) -> Scene:
    """What an attack works with on one side."""
    scene = replace(of_all, control=side.control, base=of_all.base if "base" in attack.needs else None)
    if "adversarial" in attack.needs:
        scene = attacked_with(scene, plan.material.texts.adversarial)
    scene.prompts = scene.prompts[: plan.count(attack)]
    if side.nameless and side.model.is_guided:  # else it draws nothing without a class
        scene = without_name(scene, plan.job.request.concepts)
    return scene
