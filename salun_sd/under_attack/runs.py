"""Each attack on each of its sides: what it works with, and where."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from salun_sd.attacks.attack import Attack, Scene
from salun_sd.attacks.given import without_name
from salun_sd.attacks.prompts import attacked_with
from salun_sd.attacks.run import Run
from salun_sd.attacks.target import Target
from salun_sd.under_attack.plan import Plan, Side


def by_model(plan: Plan) -> Iterator[tuple[Scene, list[tuple[Side, str]]]]:
    """For each model, the scene of all attacks on it, and these: its sides, each with the names of attacks in turn. The
    model is loaded when an attack first needs it; only the base stays for the next one."""
    base = Target(plan.job.base, plan.precision.dtype) if plan.needs_base else None
    for model, sides in groupby(plan.sides, key=lambda side: side.model):
        target = base if base and model is plan.job.base else Target(model, plan.precision.dtype)
        scene = plan.material.scene(target, plan.concept, plan.cases, plan.seed)
        pairs = [(side, name) for side in sides for name in plan.attacks if side in plan.sides_of(plan.attacks[name])]
        yield replace(scene, base=base), pairs


def run_of(plan: Plan, name: str, side: Side, of_all: Scene, given: str = "") -> Run:
    """An attack on one side, of the scene of all attacks; `given` is the digest of what the user gave to it."""
    attack, out = plan.attacks[name], plan.job.out / "attacks" / name / side.name
    scene = _scene(plan, attack, side, replace(of_all, given=given))
    return Run(name, attack, scene, out, **plan.sampling(side.model))


def _scene(plan: Plan, attack: Attack, side: Side, of_all: Scene) -> Scene:
    """What an attack works with on one side."""
    scene = replace(of_all, control=side.control, base=of_all.base if "base" in attack.needs else None)
    if "adversarial" in attack.needs:
        scene = attacked_with(scene, plan.material.texts.adversarial)
    scene.prompts = scene.prompts[: plan.count(attack)]
    if side.nameless and side.model.is_guided:  # else it draws nothing without a class
        scene = without_name(scene, plan.job.request.concepts)
    return scene


def check(plan: Plan) -> None:
    """Raise UsageError where the folder of an attack has another search: else it would be refused after hours. What was
    given is compared when the search begins, as the base may have to draw its pictures again."""
    for of_all, pairs in by_model(plan):
        for side, name in pairs:
            run_of(plan, name, side, of_all).check(without=["given"])
