"""The original model: opened, or trained once and kept in the user's cache."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from salun_sd.classifier.architectures import Classifier, build, digest_of, opened
from salun_sd.classifier.data import Data
from salun_sd.classifier.methods.catalog import forget
from salun_sd.classifier.methods.task import Task
from salun_sd.classifier.split import Split
from salun_sd.errors import SalunError
from salun_sd.runtime import seals
from salun_sd.runtime.cache import held
from salun_sd.runtime.files import new_folder, write_atomic

logger = logging.getLogger(__name__)

FILE = "salun.json"  # the record in a model's folder
SHAPE = {"training": {"epochs": int, "lr": float, "seed": int}, "digest_of_model": str}


def trained(data: Data, split: Split, training: Mapping, device: str) -> Classifier:
    """The model that `training` describes, trained on all but the validation images; from the cache, where an earlier
    run trained it. Several processes wait for the one that trains.

    training: architecture, width, epochs, lr, seed, batch_size, augment.
    """
    wanted = dict(training) | {"data": data.digest, "names": hashlib.sha256(
        "\0".join(split.trained.names).encode()).hexdigest()}  # fmt: skip
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:32]
    about = f"{training['architecture']}, width {training['width']}, on {data.name}"
    with held("trained", key, about) as entry:
        folder = entry / "model"
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _train(data, split, training, device, folder, wanted)
            (entry / "state.safetensors").unlink(missing_ok=True)
        return opened(str(folder), device)


def _is_whole(folder: Path) -> bool:
    """Whether a model is there, as it was written."""
    try:
        return seals.read(folder / FILE, SHAPE)["digest_of_model"] == digest_of(folder)
    except (SalunError, OSError):
        return False


def _train(data: Data, split: Split, training: Mapping, device: str, folder: Path, wanted: dict) -> None:
    size = data.train.pixels.shape[-1]
    classifier = build(
        training["architecture"], training["width"], size, data.classes, training["seed"], device
    )  # fmt: skip
    settings = {"epochs": training["epochs"], "lr": training["lr"]}
    task = Task(classifier, classifier, split.forget, split.trained, settings, training["seed"], training["augment"],
                training["batch_size"])  # fmt: skip
    logger.info(f"Training {training['architecture']} on {len(split.trained):,} images of {data.name}; it is kept.")
    result = forget("retrain", task, what="original", state=folder.parent / "state.safetensors", run=wanted)
    write(classifier, folder, {"training": dict(training), "data": data.name, "seconds": result.seconds})


def read(folder: Path, device: str) -> Classifier:
    """The original in a run's folder. Raises SalunError where it is not as it was written."""
    if not _is_whole(folder):
        raise SalunError(f"{folder} is not as it was written: put it back, or choose another --out.")
    return opened(str(folder), device)


def write(classifier: Classifier, folder: Path, record: dict) -> None:
    """Write an original, and its record."""
    with new_folder(folder) as partial:
        classifier.save(partial)
        content = seals.sealed(record | {"digest_of_model": digest_of(partial)})
        write_atomic(partial / FILE, json.dumps(content, indent=2) + "\n")
