"""The folder of a run: what lies in it, and what is done for each of its jobs."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from salun_sd.checkpoint import sources, tensors
from salun_sd.classifier import deliver, measure, original, search
from salun_sd.classifier.architectures import Classifier
from salun_sd.classifier.data import Data
from salun_sd.classifier.jobs import alone, check_same
from salun_sd.classifier.methods.be import head
from salun_sd.classifier.methods.catalog import Result
from salun_sd.classifier.methods.catalog import forget as run_method
from salun_sd.classifier.methods.task import Task
from salun_sd.classifier.request import EXACT, ORIGINAL, Job, Row, tried
from salun_sd.classifier.settings import METHODS
from salun_sd.classifier.split import Split, Wanted, split
from salun_sd.errors import UsageError
from salun_sd.runtime import ranks, seals
from salun_sd.runtime.bar import in_time
from salun_sd.runtime.device import default_device
from salun_sd.runtime.files import new_file, write_atomic
from salun_sd.runtime.finite import NotFinite

logger = logging.getLogger(__name__)

RUN = "run"  # the folder of what the maker keeps: who was forgotten, states, answers, searches
RESULT = {"run": dict, "metrics": {str: float}, "seconds": float, "changed": (dict, None), "used?": {str: int}}


def device() -> str:
    """The device of this process: with several on a machine, a GPU for each."""
    name, place = default_device(), os.environ.get("LOCAL_RANK", "").strip()
    if name == "cuda" and ranks.launched()[1] > 1 and place.isdecimal():
        return f"cuda:{int(place) % torch.cuda.device_count()}"
    return name


class Whole(NamedTuple):
    """What all jobs share: the data, what is forgotten, the validation images, the model that was given."""

    data: Data
    forget: Wanted
    held: torch.Tensor
    model: Classifier | None
    name: str | None
    empty_class: bool

    def split(self, seed: int) -> Split:
        return split(self.data, self.forget, seed, self.held, self.empty_class)


class Run:
    """A run's folder, and what is done for each of its jobs."""

    def __init__(self, out: Path, whole: Whole, training: dict, own: dict, tune: str, keep_statistics: bool):
        self.out, self.whole, self.training, self.own, self.tune = out, whole, training, own, tune
        self.keep_statistics = keep_statistics
        self.chosen: dict[str, dict] = {}  # label of a row => its search
        self.files = out / RUN

    def begin(self, table: Sequence[Row]) -> None:
        """Check that the folder is this run's, and get the original."""
        self._check_search(table)
        if self.whole.model and "be" in {row.method for row in table}:
            head(self.whole.model.net)  # SalunError where there is none
        places = hashlib.sha256(repr((self.whole.forget.text, self.whole.forget.places)).encode()).hexdigest()
        settings = {"data": self.whole.data.digest, "forget": self.whole.forget.text, "places": places,
                    "training": self.training, "keep_statistics": self.keep_statistics,
                    "tune": self.tune, "model": self.whole.model and digest(self.whole.model)}  # fmt: skip
        self.settings = json.loads(json.dumps(settings))
        file = self.files / "settings.json"
        begun = (self.out / "report.json").exists() or (self.out / ORIGINAL).exists()
        names = {f.name for f in self.files.iterdir() if f.name[0] != "."} if self.files.is_dir() else set()
        if file.name not in names:  # another process may be about to write it: its partial file is hidden
            if names or begun:
                raise UsageError(f"{self.out} holds something else: choose another --out, or remove it.")
            write_atomic(file, json.dumps(seals.sealed(self.settings), indent=2) + "\n")
        check_same(seals.read(file, dict, deliver.ADVICE), self.settings, self.out)
        self._check_results({row.method for row in table})
        self.original  # noqa: B018  trained now, if it has to be

    def _check_search(self, table: Sequence[Row]) -> None:
        """Raise UsageError where a search is wanted, and no image is left to judge it by."""
        searched = [row.label for row in table if len(tried(row.method, self.own.get(row.method, {}), self.tune)) > 1]
        if searched and not len(self.whole.split(search.SEED).validation):
            raise UsageError(f"The search for the settings of {searched[0]} has no validation image, as every class is "
                             "small: give --tune none, or more images.")  # fmt: skip

    def _check_results(self, methods: set[str]) -> None:
        """Raise UsageError where one of the methods was run here with settings that are not those of this run."""
        for file in self.files.glob("*-seed-*.json"):
            run = seals.read(file, RESULT, deliver.ADVICE)["run"]
            if run and run["method"] in methods - {EXACT}:
                method, settings = run["method"], {k: v for k, v in run["settings"].items() if k != "density"}
                if settings not in tried(method, self.own.get(method, {}), self.tune):
                    raise UsageError(f"{self.out} holds {method} with the settings {settings}: give these by "
                                     "--setting, or choose another --out.")  # fmt: skip

    @cached_property
    def original(self) -> Classifier:
        """MODEL, or the original in the folder, whichever process wrote it: trained on another machine, it would have
        other bits. Raises UsageError where models were made with one that is gone."""
        if self.whole.model:
            return self.whole.model
        folder = self.out / ORIGINAL
        with alone(self.files / f"{ORIGINAL}.lock", "opens or trains the original"):
            if not folder.exists():
                if any(self.files.glob("split-*.json")):  # a job was begun
                    raise UsageError(f"{folder}, with which the models beside it were made, is gone: put it back, or "
                                     "choose another --out.")  # fmt: skip
                made = original.trained(self.whole.data, self.whole.split(0), self.training, device())
                original.write(made, folder, {"training": dict(self.training)})
            return original.read(folder, device())

    def folder(self, job: Job) -> Path:
        return self.out / job.row.label / f"seed-{job.seed}"

    def is_done(self, job: Job) -> bool:
        return (self.files / f"{job.name}.json").is_file()

    def result(self, job: Job) -> dict:
        return {"used": {}} | seals.read(self.files / f"{job.name}.json", RESULT, deliver.ADVICE)

    def answers(self, job: Job) -> dict[str, np.ndarray]:
        with sources.meant_as("result", deliver.ADVICE):
            content, _ = tensors.read_sealed(self.files / f"{job.name}.safetensors")
        return {name: lazy.read().numpy() for name, lazy in content.items()}

    def cost(self, job: Job) -> float:
        """An estimate: images that are trained on."""
        parts, method = self.whole.split(job.seed), job.row.method
        if method in (ORIGINAL, "iu"):
            return float(len(parts.retain))
        published = METHODS[method]
        epochs = self.training["epochs"] if method == EXACT else self.own.get(method, {}).get(
            "epochs", published.settings["epochs"])  # fmt: skip
        return epochs * (len(parts.forget) + (len(parts.retain) if method not in ("ga", "bs", "be") else 0)) + 1.0

    def of(self, job: Job, settings: dict) -> dict:
        """What decides a job's result, beside the settings of the run."""
        return {"method": job.row.method, "settings": settings, "seed": job.seed, "forget": self.whole.forget.text,
                "keep_statistics": self.keep_statistics and job.row.method != EXACT}  # fmt: skip

    def search(self, row: Row) -> dict:
        """The search of a row, done or read; for a method without one, its settings."""
        if row.method == EXACT:
            return {"tried": [], "settings": {k: self.training[k] for k in ("epochs", "lr")}}
        if row.label not in self.chosen:
            candidates = tried(row.method, self.own.get(row.method, {}), self.tune)
            job, parts = Job(row, search.SEED), self.whole.split(search.SEED)

            def made(settings: dict) -> dict:
                try:
                    model, result = self.unlearned(job, settings, state=False)
                    score = search.score(model, self.original, parts, self.whole.forget.label is not None)
                    return score | {"used": result.used}
                except NotFinite:
                    return {"score": search.WORST}

            file = self.files / f"search-{row.label}.json"
            self.chosen[row.label] = search.searched(file, candidates, self.settings, made)
        return self.chosen[row.label]

    def unlearned(self, job: Job, settings: dict, state: bool = True) -> tuple[Classifier, Result]:
        """A model that a method made, and how."""
        parts, seed = self.whole.split(job.seed), job.seed
        settings = job.row.with_density(settings)
        exact = job.row.method == EXACT
        model = self.original.fresh(self.training["seed"] + 1 + seed) if exact else self.original.copy()
        task = Task(model, self.original, parts.forget, parts.retain, settings, seed, self.training["augment"],
                    self.training["batch_size"])  # fmt: skip
        what = f"{job.row.label}, " + (f"seed {seed}" if state else "search")
        result = run_method(
            job.row.method, task, what=what, keep_statistics=self.keep_statistics,
            state=self.files / f"{job.name}.state" if state else None, run=self.settings | self.of(job, settings),
        )  # fmt: skip
        return model, result

    def do(self, job: Job) -> None:
        """Make a model, if it is not there, and measure it."""
        parts, seed = self.whole.split(job.seed), job.seed
        write_atomic(self.files / f"split-{seed}.json", json.dumps(seals.sealed(parts.as_json())) + "\n")
        record, model = {"run": {}, "seconds": 0.0, "changed": None, "used": {}}, self.original
        if job.row.method != ORIGINAL:
            record, model = self.made(job, parts)
        of = {name: measure.answers(model, getattr(parts, name)) for name in measure.PARTS}
        values = measure.metrics(of["forget"], of["retain"], of["test"], seed)
        arrays = {f"{part}/{kind}": torch.from_numpy(array) for part, answers in of.items()
                  for kind, array in answers._asdict().items()}  # fmt: skip
        with new_file(self.files / f"{job.name}.safetensors") as partial:
            tensors.write(partial, {n: tensors.in_memory(t) for n, t in arrays.items()}, {}, sealed=True)
        result = {key: record.get(key, {}) for key in ("run", "seconds", "changed", "used")} | {"metrics": values}
        write_atomic(self.files / f"{job.name}.json", json.dumps(seals.sealed(result), indent=2) + "\n")
        (self.files / f"{job.name}.state").unlink(missing_ok=True)
        logger.info(f"{job.row.label}, seed {seed}: " + ", ".join(f"{n} {values[n]:.2f}" for n in measure.METRICS)
                    + f", {in_time(record['seconds'])}.")  # fmt: skip

    def made(self, job: Job, parts: Split) -> tuple[dict, Classifier]:
        """The record and the model of a job: read, where an earlier run made it, else made and written."""
        folder = self.folder(job)
        settings = self.search(job.row)["settings"]
        run = json.loads(json.dumps(self.of(job, job.row.with_density(settings))))
        if folder.exists() and any(folder.iterdir()):
            record, model = deliver.read(folder, device())
            check_same(record["run"], run, folder)
            return record, model
        model, result = self.unlearned(job, settings)
        published = METHODS[job.row.method]
        record = {"run": run, "seconds": result.seconds, "model": self.whole.name or "the original",
                  "data": self.whole.data.name, "summary": published.summary, "source": published.source,
                  "sizes": {name: len(getattr(parts, name)) for name in parts._fields},
                  "used": result.used}  # fmt: skip
        return deliver.write(folder, model, self.original, record, result.bits), model


def digest(classifier: Classifier) -> str:
    """SHA-256, in hex, of a model's weights and buffers and their names."""
    return tensors.fingerprint({n: tensors.in_memory(t.cpu()) for n, t in classifier.net.state_dict().items()})
