"""Classifiers to numbers: answers to each image, accuracies, the attack on membership, the distance to Retrain. Pure
beside `answers`."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch

from salun_sd.classifier.architectures import Classifier
from salun_sd.classifier.data import Part, batches
from salun_sd.runtime.finite import NotFinite

MOST_ATTACKED = 5000  # images of each kind that the attack is trained on
PARTS = ("forget", "retain", "test")  # that are measured
METRICS = ("ua", "ra", "ta", "mia")  # of the gap
OTHERS = ("mia_entropy", "mia_correctness")  # beside them


class Answers(NamedTuple):
    """A model's answers to some images, float32 [n] each: the probability of the true class, the entropy of all
    classes' probabilities in nats, and 1 where the first class is the true one."""

    confidence: np.ndarray
    entropy: np.ndarray
    correct: np.ndarray


@torch.inference_mode()
def answers(classifier: Classifier, part: Part, size: int = 512) -> Answers:
    """The answers in evaluation mode, in the order of the images. Raises NotFinite where one is no number."""
    classifier.net.eval()
    found: list[list[torch.Tensor]] = [[], [], []]
    for pixels, labels in batches(part, size, classifier.device):
        logs = classifier(pixels).log_softmax(1)
        if logs.isnan().any():
            raise NotFinite("The model answers with NaN: lower the learning rate of its training, or the alpha of its "
                            "method, by --setting METHOD.NAME=VALUE.")  # fmt: skip
        found[0].append(logs.gather(1, labels[:, None])[:, 0].exp())
        found[1].append(-(logs.exp() * logs).nan_to_num(0).sum(1))
        found[2].append((logs.argmax(1) == labels).float())
    return Answers(*(torch.cat(each).cpu().numpy() if each else np.zeros(0, np.float32) for each in found))


def accuracy(of: Answers) -> float:
    """In percent."""
    return 100 * float(of.correct.mean()) if len(of.correct) else 0.0


def metrics(forget: Answers, retain: Answers, test: Answers, seed: int) -> dict[str, float]:
    """In percent: UA, the forget images that are not recognised; RA and TA, the retain and the test images that are;
    MIA, the forget images that an attack takes for images that the model was not trained on."""
    attacked = {"mia": "confidence", "mia_entropy": "entropy", "mia_correctness": "correct"}
    values = {"ua": 100 - accuracy(forget), "ra": accuracy(retain), "ta": accuracy(test)}
    for name, feature in attacked.items():
        values[name] = attack(*(getattr(part, feature) for part in (retain, test, forget)), seed=seed)
    return values


def attack(members: np.ndarray, others: np.ndarray, targets: np.ndarray, seed: int) -> float:
    """The share of targets, in percent, that a support vector machine takes for no member. It learns from as many
    members as others, by one number each (SalUn, arXiv 2310.12508, appendix; Song & Mittal 2021): C 3, an rbf kernel,
    gamma 1.

    From each, at most MOST_ATTACKED are drawn at random: the time grows with their square.
    """
    from sklearn.svm import SVC

    rng, count = np.random.default_rng(seed), min(len(members), len(others), MOST_ATTACKED)
    drawn = np.concatenate([rng.choice(of, count, replace=False) for of in (members, others)])
    if np.ptp(drawn) == 0:  # nothing to learn from: every target is taken for a member
        return 0.0
    machine = SVC(C=3, gamma="auto", kernel="rbf").fit(drawn[:, None], np.repeat([1, 0], count))
    kinds, places = np.unique(targets, return_inverse=True)
    return 100 * float((machine.predict(kinds[:, None])[places] == 0).mean())


def gap(values: Mapping[str, float], exact: Mapping[str, float]) -> float:
    """The mean distance to Retrain over METRICS, in percentage points."""
    return mean(abs(values[name] - exact[name]) for name in METRICS)


def summary(values: Sequence[float]) -> dict:
    """Mean, standard deviation and 95 % interval of a number over seeds (Student's t); None with one seed."""
    spread = stdev(values) if len(values) > 1 else None
    interval = None
    if spread is not None:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5
        interval = [mean(values) - half, mean(values) + half]
    return {"mean": mean(values), "sd": spread, "ci95": interval, "values": list(values)}
