"""One attack on one model: search, keep what was found, draw it. Both go on where they were stopped."""

import hashlib
import json
from collections.abc import Container, Iterable
from contextlib import closing
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import torch

from salun_sd.attacks import kept
from salun_sd.attacks.attack import Attack, Scene, Try, plain
from salun_sd.core.diffusion import on_device
from salun_sd.draw import generate
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Given, Row
from salun_sd.errors import UsageError, some
from salun_sd.runtime import ranks, seals
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.device import dtype_mark, dtype_name
from salun_sd.runtime.documents import read_json
from salun_sd.runtime.files import write_atomic

SETTINGS, FOR_ALL = "settings.json", "found.safetensors"
FRESH_FOLDER = "fresh"
FRESH, FRESH_IMAGES = 1000, 3  # the first number of the fresh seeds, and how many there are for a prompt


class Shot(NamedTuple):
    """An image of an attack: try or stage `k` of a prompt."""

    prompt: Prompt
    k: int
    one: Try  # without its tensors
    number: int  # of the try: its tensors are read when it is drawn
    is_given: bool  # whether it has tensors, or tokens before its text

    @classmethod
    def of(cls, prompt: Prompt, k: int, one: Try, number: int = 0) -> "Shot":
        is_given = bool(one.tokens or one.condition or one.start is not None)
        return cls(prompt, k, one._replace(start=None, condition=None), number, is_given)

    @property
    def text(self) -> str:
        """What tells the image apart from others of its seed."""
        return f"{self.prompt.case}.{self.number} {self.one.text}" if self.is_given else self.one.text


class Left(NamedTuple):
    """What a run has still to do; and its images in all."""

    for_all: bool  # whether what serves all prompts is to be found, or a stage has images to draw
    prompts: int  # whose tries are to be found: the most of a process
    batches: list[int]  # of images
    images: int


class Run:
    """One attack on one model, in a folder of its own. `scheduler` is a class of diffusers."""

    def __init__(self, name: str, attack: Attack, scene: Scene, out: Path, *, scheduler: str, steps: int):
        self.name, self.attack, self.scene, self.out = name, attack, scene, out
        self.scheduler, self.steps = attack.drawing or (scheduler, steps)
        self.model, self.labels, self.dtype = scene.target.model, attack.labels(), dtype_name(scene.target.dtype)
        # of a prompt, whose tensors may be large; it does not know the run, which could then not free the model at once
        self.tries = lru_cache(8)(lambda case: kept.read(kept.file_of(out, case)))

    def search(self) -> None:
        """Search for what is not found yet. Several processes share the prompts. Raises UsageError where the folder has
        another search."""
        self._keep_settings()
        together = self.out / FOR_ALL
        if ranks.is_main():
            kept.remove_partial(self.out)
            if not kept.is_whole(together):
                kept.save_tensors(together, self.attack.prepare(self.scene))
        ranks.wait()
        found, prompts = kept.read_tensors(together), self.scene.prompts
        files = {prompt: kept.file_of(self.out, prompt.case) for prompt in prompts[ranks.rank() :: ranks.count()]}
        left = [prompt for prompt, file in files.items() if not kept.is_whole(file, kept.read)]
        for prompt in Bar(left, desc=f"search {self.name}", unit="prompt", leave=None):
            kept.save(files[prompt], self.attack.tries(self.scene, prompt, found))
        ranks.wait()

    def draw(self) -> list[dict]:
        """Draw, for each prompt, the prompt itself as number 0, then each try; or each stage, of an attack that has
        some. Returns the lines of the manifest, for the images in the folder `out`."""
        first = [Shot.of(prompt, 0, plain(prompt)) for prompt in self.scene.prompts]
        stages = {n: self._shots(n) for n in range(1, len(self.labels))} if self.labels else {1: self._shots(None)}
        self._draw(first, 0)
        if any(self._missing(shots, stage) for stage, shots in stages.items()):
            with closing(self.attack.stages(self.scene)) as changes:  # so that a failure ends them, too
                for stage in changes:
                    self._draw(stages[stage], stage)
        return self._lines([*first, *chain(*stages.values())])

    def fresh(self, chosen: dict[int, int]) -> list[dict]:
        """Draw the chosen try of each case with seeds that the search did not see, into the folder `out`/fresh. Returns
        the lines of the manifest; none of an attack whose finds have no other seeds."""
        if not self.attack.has_fresh():
            return []
        tries = {case: self.tries(case)[k - 1] for case, k in chosen.items()}
        shots = []
        for prompt in self.scene.prompts:
            one, number = tries[prompt.case], chosen[prompt.case]
            seeds = [generate.seed_of(prompt, FRESH + n) for n in range(1, FRESH_IMAGES + 1)]
            shots += [Shot.of(prompt, n, one._replace(seed=seed), number) for n, seed in enumerate(seeds, 1)]
        self._draw(shots, 1, FRESH_FOLDER)
        return self._lines(shots)

    def left(self) -> Left:
        """What is not on the disk yet, by the names of the files. A prompt whose tries are not found counts with the
        most that it may have."""
        prompts, most, processes = self.scene.prompts, self.attack.most_tries(self.scene), ranks.count()
        found = [kept.count(kept.file_of(self.out, prompt.case)) for prompt in prompts]

        def files(images: Iterable[tuple[Prompt, int]], folder: str = "") -> list[Path]:
            return [self.out / folder / generate.file_of(*image) for image in images]

        if self.labels:
            batches = [files(product(prompts, [stage])) for stage in range(1, most + 1)]
        else:
            tries = zip(prompts, found, strict=True)
            batches = [files((prompt, k) for prompt, count in tries for k in range(1, 1 + (count or most)))]
        if self.attack.has_fresh() and not self.scene.control:
            batches.append(files(product(prompts, range(1, FRESH_IMAGES + 1)), FRESH_FOLDER))
        missing = [sum(not file.is_file() for file in batch) for batch in [files(product(prompts, [0])), *batches]]
        return Left(
            any(missing[1:]) if self.labels else not (self.out / FOR_ALL).is_file(),
            max(found[n::processes].count(None) for n in range(processes)),
            missing, len(prompts) + sum(map(len, batches)),
        )  # fmt: skip

    def _shots(self, stage: int | None) -> list[Shot]:
        """The images of a stage, which has one of each prompt: its only try, or the try of that number. Or the images
        of all tries."""
        shots = []
        for prompt in self.scene.prompts:
            tries = self.tries(prompt.case)
            numbers = [min(stage, len(tries))] if stage else range(1, len(tries) + 1)
            shots += [Shot.of(prompt, stage or number, tries[number - 1], number) for number in numbers]
        return shots

    def check(self, without: Container[str] = ()) -> None:
        """Raise UsageError where the folder has another search. The settings `without` are not known yet."""
        file = self.out / SETTINGS
        if not file.is_file():
            return
        there = read_json(file, dict, seals.advising(f"Remove {self.out}, or give another --out."))
        settings = json.loads(json.dumps(self._settings()))
        if differ := [key for key in {**settings, **there} if there.get(key) != settings.get(key)
                      and key not in without]:  # fmt: skip
            raise UsageError(f"{self.out} holds a search that differs in {some(differ)}: give another --out.")

    def _keep_settings(self) -> None:
        """Write what the search depends on. Raises UsageError as `check` does."""
        self.check()
        if ranks.is_main() and not (file := self.out / SETTINGS).is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(self._settings(), indent=2) + "\n")
        ranks.wait()

    def _settings(self) -> dict:
        scene, base = self.scene, self.scene.base
        prompts = hashlib.sha256(repr(list(scene.prompts)).encode()).hexdigest()
        return {"attack": self.name, **self.attack.settings(), "concept": scene.concept, "control": scene.control,
                "seed": scene.seed, "model": self.model.identity + dtype_mark(self.dtype),
                "base": base and base.model.identity, "prompts": prompts, "given": scene.given}  # fmt: skip

    def _row(self, shot: Shot) -> Row:
        row = generate.row_of(shot.prompt, 0, (self.model.image_size, self.model.image_size))
        guidance = row.guidance if shot.one.guidance is None else shot.one.guidance
        return row._replace(text=shot.text, seed=shot.one.seed, guidance=guidance)

    def _wanted(self, shots: list[Shot], folder: str) -> dict[Path, Row]:
        return {self.out / folder / generate.file_of(shot.prompt, shot.k): self._row(shot) for shot in shots}

    def _sampling(self, stage: int) -> dict:
        """What images are drawn with. Their identity has the whole search: it may find something else next time."""
        search = hashlib.sha256(json.dumps(self._settings()).encode()).hexdigest()[:16]
        return {"identity": f"{self.model.identity} {self.name}={search}.{stage}", "scheduler": self.scheduler,
                "steps": self.steps, "dtype": self.dtype}  # fmt: skip

    def _missing(self, shots: list[Shot], stage: int) -> bool:
        return bool(generate.missing(self._wanted(shots, ""), **self._sampling(stage)))

    def _draw(self, shots: list[Shot], stage: int, folder: str = "") -> None:
        target, by_text = self.scene.target, {shot.text: shot for shot in shots if shot.is_given}

        @lru_cache(64)
        def given(row: Row) -> Given:
            if not (shot := by_text.get(row.text)):
                return Given()
            one = self.tries(shot.prompt.case)[shot.number - 1]
            with torch.no_grad():
                condition = one.condition or target.with_tokens(one.tokens, one.text)
            return Given(on_device(condition, "cpu"), one.start, one.begins)

        settings = {"what": self.name, "given": given, **self._sampling(stage)}
        redraw = bool(folder)  # a try that another judge chose is in the place of this one
        for _ in generate.draw(lambda: target.pipeline, self._wanted(shots, folder), redraw=redraw, **settings):
            pass

    def _lines(self, shots: list[Shot]) -> list[dict]:
        """The lines of the manifest. A line of a try has what its search says of it: `search_loss`, `facts`, and its
        `tokens` as text."""
        lines = []
        for shot in sorted(shots, key=lambda shot: (shot.prompt.case, shot.k)):
            one, prompt = shot.one, shot.prompt
            text = " ".join(filter(None, [one.tokens and self.scene.target.tokenizer.decode(one.tokens), one.text]))
            line = generate.line_of(prompt._replace(text=text), shot.k, generate.file_of(prompt, shot.k),
                                    self._row(shot), self.steps)  # fmt: skip
            lines.append(line | {"search_loss": one.loss, "facts": one.facts})
        return lines
