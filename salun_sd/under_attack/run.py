"""The work of `attack`: an audit of the model, then each attack, and what its images show."""

import logging
from collections.abc import Sequence
from pathlib import Path
from traceback import clear_frames
from types import SimpleNamespace

from salun_sd.attacks.run import FRESH_FOLDER, Run
from salun_sd.audit import attacked, deliver, detectors, quality
from salun_sd.audit import run as audit
from salun_sd.audit.examine import examine
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.edit.resources import Forecast
from salun_sd.errors import SalunError, UsageError, is_bug, reason
from salun_sd.runtime import ranks
from salun_sd.runtime.device import default_device
from salun_sd.under_attack import runs
from salun_sd.under_attack.forecast import forecast
from salun_sd.under_attack.plan import Plan, Side, planned

logger = logging.getLogger(__name__)


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

    With `dry_run`, returns what each attack has still to do and the memory instead, and writes nothing.

    The parameters are the options of `salun-sd attack`. An attack that fails is named in the report, and the others go
    on; a bug is raised in the end. Running it again searches, draws and judges only what is missing. Raises UsageError
    for arguments that are wrong or cannot go together, SalunError for what fails; the text of both is a sentence for a
    person.
    """
    plan = planned(SimpleNamespace(**locals()))
    left = runs.listed(plan)
    expected = forecast(plan, [run for _, run in left])
    if dry_run:
        return expected
    for name, why in plan.skipped.items():
        logger.info(f"The attack {name} is not run: it {why}.")
    if not expected.fits:
        logger.warning("The attacks take more memory than is free: --dry-run names options that take less.")
    logger.info(f"Images left to draw, {expected.settings['images']}. Time: {expected.settings['time']}.")
    job = plan.job
    rows, run, of_base = audit.examined(job)
    report = audit.assembled(job, rows, run, of_base, quality.look(job.measures, run, of_base, job.request.concepts))
    sides, failed, bugs = _attack_all(plan, left)
    entries = {name: _entry(plan, name, of) for name, of in sides.items()}
    report["attacks"] = attacked.in_report(entries, report, of_base or run, failed, plan.skipped)
    deliver.finish(report, run, of_base, job.out, job.bounds, confident=confident, pictures=not no_images,
                   attacks={name: of["model"].tries for name, of in sides.items()})  # fmt: skip
    if bugs:
        raise bugs[0]
    return report


def _attack_all(
    plan: Plan, left: list[tuple[Side, Run]]
) -> tuple[dict[str, dict[str, attacked.Side]], dict[str, str], list[Exception]]:
    """Run what is left, each attack on each side: what was drawn; the attacks that failed, with the reason; and those
    failures that are bugs. Each run is taken from the list, so that its model leaves memory after the last one."""
    drawn, failed, bugs = {name: {} for name in plan.attacks}, {}, []
    while left:
        side, run = left.pop(0)
        if run.name in failed and not drawn[run.name]:
            continue
        try:
            drawn[run.name][side.name] = _on_one(plan, run)
        except UsageError:  # another search is in the folder
            raise
        except Exception as e:
            if ranks.count() > 1:  # the other processes wait for this one
                raise
            logger.warning(f"The attack {run.name} failed on {side.model.name}, and the others go on: {reason(e)}.")
            failed[run.name] = f"{side.name}: {reason(e)}"
            if is_bug(e):
                bugs.append(e)
                while e:
                    clear_frames(e.__traceback__)  # they hold the model
                    e = e.__cause__ or e.__context__
    if not (whole := {name: of for name, of in drawn.items() if "model" in of}):
        every = SalunError(f"Every attack failed; the first is {next(iter(failed))}, {next(iter(failed.values()))}.")
        raise bugs[0] if bugs else every
    return whole, failed, bugs


def _on_one(plan: Plan, run: Run) -> attacked.Side:
    """One attack on one side: its tries, and what it found on fresh seeds."""
    model, concepts, judge = run.model.name, plan.job.request.concepts, plan.job.judge
    looking = detectors.load([], None, default_device()) if concepts else plan.job.detectors
    run.scene.given = plan.material.digest(run.attack.needs)
    run.search()
    tries = examine(model, run.draw(), judge, looking, run.out)
    lines = [] if run.scene.control else run.fresh(attacked.chosen(tries, concepts))
    return attacked.Side(tries, examine(model, lines, judge, looking, run.out / FRESH_FOLDER) if lines else None)


def _entry(plan: Plan, name: str, sides: dict[str, attacked.Side]) -> dict:
    """An attack's entry in the report."""
    attack, most = plan.attacks[name], max(line["k"] for line in sides["model"].tries.manifest)
    about = attacked.About(attack.settings(), plan.budget, most, attack.from_picture, attack.labels(),
                           attack.counts_last)  # fmt: skip
    return attacked.attacked(about, sides, plan.job.request.concepts)
