"""The search for settings that were never published: by forget, retain and validation images, never by the test.

Of a share it forgets a set of its own; a class or a list is the same in every seed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from salun_sd.classifier.architectures import Classifier
from salun_sd.classifier.jobs import alone
from salun_sd.classifier.measure import accuracy, answers
from salun_sd.classifier.split import Split
from salun_sd.runtime import seals
from salun_sd.runtime.files import write_atomic

SEED = 1000  # of the forget set and of the training of a search: no seed of a table
WORST = 100.0  # the score of settings with which the training diverges
SHAPE = {"tried": [{"settings": dict, "score": float}], "settings": dict, "run": dict}
RULE = (
    "The settings whose mean distance to three values is smallest: the accuracy on the forget images, to that of the "
    "original on the validation images (0 for a class); the accuracy on the retain and on the validation images, to "
    "the original's. Neither Retrain nor the test is looked at."
)


def score(model: Classifier, original: Classifier, split: Split, of_class: bool) -> dict[str, float]:
    """The number that RULE makes small, and its three accuracies, in percent."""
    forget, retain, validation = (accuracy(answers(model, part)) for part in (split.forget, split.retain,
                                                                              split.validation))  # fmt: skip
    retain_before, before = (accuracy(answers(original, part)) for part in (split.retain, split.validation))
    distance = mean([abs(forget - (0 if of_class else before)), abs(retain - retain_before), abs(validation - before)])
    return {"score": distance, "forget": forget, "retain": retain, "validation": validation}


def searched(
    file: Path, candidates: list[dict[str, float]], run: dict, made: Callable[[dict[str, float]], dict]
) -> dict:  # fmt: skip
    """The rule, what was tried with its scores, and the best settings; from the file, where an earlier run searched.

    made: settings => their `score`, and what else is told of them. Several processes wait for the one that searches.
    Where there is one candidate, nothing is tried. What was tried before a run was killed is not tried again.
    """
    if len(candidates) == 1:
        return {"tried": [], "settings": candidates[0], "run": run}
    with alone(file.with_name(f"{file.name}.lock"), "searches these settings"):
        known = seals.read(file, SHAPE, "Remove it, and run the same command again.") if file.is_file() else None
        tried = known["tried"] if known and known["run"] == run else []
        for settings in candidates:
            if settings not in [each["settings"] for each in tried]:
                tried.append({"settings": settings, **made(settings)})
                best = min(tried, key=lambda each: each["score"])["settings"]
                content = {"rule": RULE, "tried": tried, "settings": best, "run": run}
                write_atomic(file, json.dumps(seals.sealed(content), indent=2) + "\n")
        wanted = [each for each in tried if each["settings"] in candidates]
        best = min(wanted, key=lambda each: each["score"])["settings"]
        return {"rule": RULE, "tried": wanted, "settings": best, "run": run}
