"""The command that searches for an erased concept: attack."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from salun_sd.attacks.names import SUMMARIES
from salun_sd.cli import options as o
from salun_sd.cli import tables
from salun_sd.cli.failures import fail_on
from salun_sd.cli.start import begin
from salun_sd.cli.streams import print_lines

CONCEPT = Option(help="Prompt of the concept that was erased, such as 'a photo of a sneaker'.")
CONCEPT_CLASS = Option(
    help="Its class in the prompt set, which the classifier has to see. For prompts without classes: any name; "
    "--classifier must then be a CLIP."
)
PROMPTS = Option(
    help="Prompt set, as in `evaluate`. Its rows of the concept's class are attacked, or all where no row has a class."
)
WITH = Option(
    "--with",
    metavar="<str>",
    help="Attack to run. May be repeated. Default: all that can run with what is given. "
    + ". ".join(f"{name}: {summary}" for name, summary in SUMMARIES.items())
    + ".",
)
BASE = Option(
    help="Checkpoint before the erasure. It draws the pictures of the concept. It is attacked, too, with prompts that "
    "do not name the concept: so you see that an attack works."
)
FLOOR = Option(
    help="Checkpoint that never knew the concept, such as one that was trained without it. It is attacked in the same "
    "way: what an attack finds there, no erasure could have prevented."
)
BUDGET = Option(help="quick: a first look, ten prompts and a fraction of the search. paper: the published settings.")
PICTURES = Option(help="Folder with pictures of the concept, in place of those that --base draws.")
WORDS = Option(help="For paraphrase: a text file that describes the concept without its name, a description per line.")
ADVERSARIAL = Option(help="For prompts: a CSV file with adversarial prompts that you hold, in the column `prompt`.")
MASK = Option(help="For positions: the mask of the erasure, which `erase` leaves in its run folder.")
LIMIT = Option(min=1, help="Prompts of the concept that are attacked. Default: 10 for quick, all for paper.")
SEED = Option(min=0, help="Random seed of the searches.")
DRY_RUN = Option("--dry-run", help="Print what each attack has still to do, its images, the time and the memory; stop.")
OUT = Option(help="Folder for the audit and what the attacks find. The same command resumes.")


def attack(
    model: Annotated[str, o.MODEL],
    concept: Annotated[str, CONCEPT],
    prompts: Annotated[str, PROMPTS],
    out: Annotated[Path, OUT],
    with_: Annotated[list[str] | None, WITH] = None,
    base: Annotated[str | None, BASE] = None,
    floor: Annotated[str | None, FLOOR] = None,
    budget: Annotated[Literal["quick", "paper"], BUDGET] = "quick",
    concept_class: Annotated[str | None, CONCEPT_CLASS] = None,
    classifier: Annotated[str | None, o.CLASSIFIER] = None,
    detector: Annotated[list[str] | None, o.DETECTOR] = None,
    detector_model: Annotated[Path | None, o.DETECTOR_MODEL] = None,
    pictures: Annotated[Path | None, PICTURES] = None,
    words: Annotated[Path | None, WORDS] = None,
    adversarial: Annotated[Path | None, ADVERSARIAL] = None,
    mask: Annotated[Path | None, MASK] = None,
    where: Annotated[list[str] | None, o.WHERE] = None,
    limit: Annotated[int | None, LIMIT] = None,
    denoising_steps: Annotated[int | None, o.DENOISING_STEPS] = None,
    scheduler: Annotated[str | None, o.SCHEDULER] = None,
    guidance: Annotated[float | None, o.GUIDANCE] = None,
    size: Annotated[str | None, o.IMAGE_SIZE] = None,
    dtype: Annotated[o.Dtype | None, o.DRAWING_DTYPE] = None,
    seed: Annotated[int, SEED] = 0,
    dry_run: Annotated[bool, DRY_RUN] = False,
    no_images: Annotated[bool, o.NO_IMAGES] = False,
    fail_if: Annotated[list[str] | None, o.FAIL_IF] = None,
    confident: Annotated[bool, o.CONFIDENT] = False,
    config: Annotated[str | None, o.CONFIG] = None,
    revision: Annotated[str | None, o.REVISION] = None,
    variant: Annotated[str | None, o.VARIANT] = None,
) -> dict[str, float] | None:
    """Search for an erased concept in a checkpoint.

    For owners who check a checkpoint before they publish it: does the concept come back? Each attack stands beside a
    control, as many random tries; with --floor, beside a model that never knew the concept. The audit gets a section
    "Under attack".
    """
    begin()
    from salun_sd.audit.report import numbers
    from salun_sd.under_attack import run

    report = run.attack(
        model, concept=concept, prompts=prompts, out=out, with_=with_ or (), base=base, floor=floor, budget=budget,
        concept_class=concept_class, classifier=classifier, detector=detector or (), detector_model=detector_model,
        pictures=pictures, words=words, adversarial=adversarial, mask=mask, where=where or (), limit=limit,
        denoising_steps=denoising_steps, scheduler=scheduler, guidance=guidance, size=size, dtype=dtype, seed=seed,
        dry_run=dry_run, no_images=no_images, fail_if=fail_if or (), confident=confident, config=config,
        revision=revision, variant=variant,
    )  # fmt: skip
    if dry_run:
        tables.show_plan(report)
        return None
    tables.show_audit(report)
    print_lines(f"{out / 'report.html'}")
    fail_on(report["gate"])
    return numbers(report)
