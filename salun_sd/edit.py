"""The work of `mask` and `erase`, files in and files out: read or draw images, encode, saliency, train, save."""

import hashlib
import json
import math
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from salun_sd import __version__, checkpoint, data, generate, prompts
from salun_sd import erase as erasing
from salun_sd import mask as masks
from salun_sd.checkpoint import new_folder, write_atomic
from salun_sd.diffusion import Examples, Schedule
from salun_sd.drawn import drawn_images
from salun_sd.errors import SalunError, UsageError
from salun_sd.mask import Bits, Mask
from salun_sd.saliency import Saliency


class Base(NamedTuple):
    """A checkpoint that is about to be edited."""

    name: str  # as the person gave it
    folder: Path
    fingerprint: str
    pipeline: object

    @classmethod
    def open(cls, model: str) -> "Base":
        folder = checkpoint.resolve(model)
        return cls(model, folder, checkpoint.fingerprint(folder), checkpoint.load(folder))

    def context(self, text: str) -> torch.Tensor:
        """The embedding of one prompt, [1, L, D]."""
        return data.encode_prompts(self.pipeline.tokenizer, self.pipeline.text_encoder, [text])

    def encode(self, files: list[Path], texts: list[str]) -> Examples:
        """Image files with a prompt each => latents and text embeddings, every distinct prompt encoded once."""
        distinct = sorted(set(texts))
        size = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        bar = tqdm(files, desc="encode", unit="image")
        return Examples(
            torch.stack([data.encode_image(self.pipeline.vae, file, size) for file in bar]),
            data.encode_prompts(self.pipeline.tokenizer, self.pipeline.text_encoder, distinct),
            torch.tensor([distinct.index(text) for text in texts]),
        )

    def draw(self, rows: list[tuple[str, float]], what: str) -> Examples:
        return self.encode(drawn_images(self.folder, self.pipeline, rows, what), [text for text, _ in rows])


def forget_examples(base: Base, concept: str, folder: Path | None, samples: int) -> Examples:
    """D_f: the images of a folder, or images that the base draws from the concept prompt; captioned with it."""
    if folder:
        files = data.images_in(folder)
        return base.encode(files, [concept] * len(files))
    return base.draw([(concept, checkpoint.sampling(base.folder)[1])] * samples, "forget images")


def retain_examples(base: Base, anchor: str, folder: Path | None, kept: list[tuple[str, float]], samples: int):
    """D_r: the images of a folder, captioned with the anchor; or images that the base draws, spread evenly over the
    kept prompts and their guidance scales; or, without these, from the anchor, as the paper does for nudity."""
    if folder:
        files = data.images_in(folder)
        return base.encode(files, [anchor] * len(files))
    kept = kept or [(anchor, checkpoint.sampling(base.folder)[1])]
    return base.draw([kept[i * len(kept) // samples] for i in range(samples)], "retain images")


def kept_prompts(prompt_set: str, concept: str) -> list[tuple[str, float]]:
    """Text and guidance scale of a prompt set's rows, less those whose class the concept names."""
    rows = prompts.read(prompt_set)
    classes = {p.label for p in rows if p.label}
    gone = prompts.class_in(concept, classes)
    if classes and gone is None:
        print(f"{concept!r} names no class of {prompt_set}: none of its prompts is left out.", file=sys.stderr)
    if not (left := [(p.text, p.guidance) for p in rows if gone is None or p.label != gone]):
        raise UsageError(f"Every prompt of {prompt_set} asks for {gone}, the concept: none is left to retain.")
    return left


def make_masks(
    base: Base, forget: Examples, concept: str, densities: list[float], guidance: float, seed: int, batch_size: int
) -> list[Mask]:
    """One gradient pass over D_f, one mask for each density."""
    total = sum(p.numel() for p in base.pipeline.unet.parameters())
    counts = [masks.keep_count(d, total) for d in densities]
    saliency = Saliency(base.pipeline.unet, Schedule.of(base.pipeline.scheduler), base.context(""), guidance, seed)
    with tqdm(total=len(forget), desc="saliency", unit="image") as bar:
        for done in saliency.accumulate(forget, batch_size):
            bar.update(done - bar.n)
    values = saliency.result()
    settings = {"concept": concept, "guidance": guidance, "images": len(forget), "seed": seed,
                "base": base.fingerprint, "model": base.name, "salun_sd": __version__}  # fmt: skip
    return [
        Mask(masks.select(values, threshold, count), {"density": density, "threshold": threshold, **settings})
        for density, count, threshold in zip(densities, counts, masks.thresholds(values, counts), strict=True)
    ]


def mask(
    model: str, concept: str, *, forget: Path | None, samples: int, densities: list[float], guidance: float, seed: int,
    batch_size: int, out: Path,
) -> list[tuple[Path, Mask]]:  # fmt: skip
    """Compute and write a mask file for each density; with several, the density goes into the file's name."""
    paths = [out if len(densities) == 1 else out.with_name(f"{out.stem}-{d:g}{out.suffix}") for d in densities]
    if len(set(paths)) < len(paths):
        raise UsageError("The same --density is given twice.")
    _check_concept(concept)
    _check_numbers(guidance=guidance)
    for density, path in zip(densities, paths, strict=True):
        masks.keep_count(density, sys.maxsize)  # outside (0, 1]: say so before a checkpoint is loaded
        _check_replaceable(path)
    base = Base.open(model)
    examples = forget_examples(base, concept, forget, samples)
    made = make_masks(base, examples, concept, densities, guidance, seed, batch_size)
    for path, each in zip(paths, made, strict=True):
        write_atomic(path, masks.pack(each))
    return list(zip(paths, made, strict=True))


def _check_replaceable(path: Path) -> None:
    """A mask may be made anew in its place, and that is said; any other file is not ours to replace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        print(f"{path} is there already; the mask is made anew in its place.", file=sys.stderr)
        try:
            masks.unpack(path.read_bytes(), str(path))
        except (SalunError, OSError) as e:
            raise UsageError(f"{path} exists and is not a mask of salun-sd; choose another --out.") from e


def _check_concept(concept: str) -> None:
    if not concept.strip():
        raise UsageError("--concept is empty: say what must go, as a prompt.")


def _check_numbers(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0) or (name == "lr" and value == 0):
            least = "above 0" if name == "lr" else "from 0 on"
            raise UsageError(f"--{name.replace('_', '-')} is {value:g}: give a finite number {least}.")


def erase(
    model: str, concept: str, anchor: str, *, mask: str | None, density: float, guidance: float, forget: Path | None,
    retain: Path | None, retain_prompts: str | None, samples: int, retain_weight: float, lr: float, steps: int | None,
    batch_size: int, anchor_from: str, sample_every: int, seed: int, out: Path, command: str,
) -> dict:  # fmt: skip
    """Erase the concept and write the pipeline folder `out`; gives back what it wrote into salun.json.

    Where an earlier run left the same checkpoint from the same inputs, gives back its record.
    """
    started = time.monotonic()
    _check_concept(concept)
    if " ".join(concept.lower().split()) == " ".join(anchor.lower().split()):
        raise UsageError(f"Concept and anchor are both {concept!r}: the anchor has to be something else.")
    if retain and retain_prompts:
        raise UsageError("--retain and --retain-prompts cannot go together: give one of them.")
    _check_numbers(guidance=guidance, lr=lr, retain_weight=retain_weight)
    masks.keep_count(density, sys.maxsize)
    folder = checkpoint.resolve(model)
    shapes, fingerprint = checkpoint.unet_shapes(folder), checkpoint.fingerprint(folder)
    given = _given_mask(mask, shapes, fingerprint, seed)
    kept = kept_prompts(retain_prompts, concept) if retain_prompts else []
    forget_files, retain_files = (data.images_in(f) if f else [] for f in (forget, retain))
    settings = {
        "model": model, "concept": concept, "anchor": anchor, "mask": mask, "density": None if given else density,
        "guidance": None if given else guidance, "forget": forget and str(forget), "retain": retain and str(retain),
        "retain_prompts": retain_prompts, "samples": samples, "retain_weight": retain_weight, "lr": lr,
        "steps": steps or -(-(len(forget_files) or samples) // batch_size), "batch_size": batch_size,
        "anchor_from": anchor_from, "sample_every": sample_every, "seed": seed,
    }  # fmt: skip
    inputs = {
        "base": checkpoint.identity(folder),
        "mask": _digest([Path(mask)]) if mask and Path(mask).is_file() else None,
        "forget": _digest(forget_files),
        "retain": _digest(retain_files),
        "retain_prompts": hashlib.sha256(json.dumps(kept).encode()).hexdigest() if kept else None,
    }
    if (done := _finished(out, settings, inputs)) is not None:
        return done

    with new_folder(out) as partial:
        base = Base(model, folder, fingerprint, checkpoint.load(folder))
        forgotten = forget_examples(base, concept, forget, samples)
        retained = retain_examples(base, anchor, retain, kept, samples)
        [chosen] = [given] if given else make_masks(base, forgotten, concept, [density], guidance, seed, batch_size)
        _train(base, chosen.bits, forgotten, retained, [text for text, _ in kept] or [anchor], settings, partial)
        checkpoint.save_erased(folder, base.pipeline.unet, chosen.bits, partial)
        changed = checkpoint.count_changes(folder, partial, chosen.bits)
        if changed["outside"]:
            raise SalunError(f"{changed['outside']} weights outside the mask changed, so nothing was kept; report it.")
        kept_weights, total = masks.kept(chosen.bits)
        record = {
            "schema": 1,
            "command": command,
            "base": {"model": model, "fingerprint": fingerprint},
            "erased": {"fingerprint": checkpoint.fingerprint(partial)},
            "settings": settings,
            "inputs": inputs,
            "images": {"forget": len(forgotten), "retain": len(retained)},
            "mask": {**chosen.settings, "kept": kept_weights, "of": total},
            "changed": changed,
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory(),
            "versions": {name: version(name) for name in ("salun-sd", "torch", "diffusers", "transformers")},
        }
        (partial / "mask.safetensors").write_bytes(masks.pack(chosen))
        (partial / "salun.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(model_card(record), encoding="utf-8")
    return record


def _given_mask(spec: str | None, shapes: dict[str, torch.Size], fingerprint: str, seed: int) -> Mask | None:
    """The mask that --mask asks for: a file, checked against the UNet, random:D, or none; None where it is to be
    computed."""
    if spec is None:
        return None
    if spec == "none":
        return Mask(masks.full_bits(shapes), {"base": fingerprint, "kind": "none"})
    if spec.startswith("random:"):
        try:
            density = float(spec.removeprefix("random:"))
        except ValueError as e:
            raise UsageError(f"--mask {spec} has no density: write random:0.5, say.") from e
        bits = masks.random_bits(shapes, density, seed)
        return Mask(bits, {"base": fingerprint, "kind": "random", "density": density, "seed": seed})
    if not Path(spec).is_file():
        raise UsageError(f"Mask {spec} was not found: give a file that salun-sd mask wrote, random:0.5, or none.")
    stored = masks.unpack(Path(spec).read_bytes(), spec)
    masks.check(stored, shapes, fingerprint)
    return stored


def _digest(files: list[Path]) -> str | None:
    """SHA-256 over names and bytes."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest() if files else None


def _finished(out: Path, settings: dict, inputs: dict) -> dict | None:
    """What an earlier run left in `out`, if it is the same; None if there is nothing. Anything else: UsageError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / "salun.json").read_text(encoding="utf-8"))
        same = record["settings"] == settings and record["inputs"] == inputs
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{out} holds something else: choose another --out, or remove it.") from e
    if not same:
        raise UsageError(f"{out} was erased with other settings or inputs: choose another --out, or remove it.")
    if checkpoint.fingerprint(out) != record["erased"]["fingerprint"]:
        raise SalunError(f"The UNet in {out} is not the one that was saved there: remove {out} and run again.")
    print(f"{out} was already made from these inputs with these settings; nothing to do.", file=sys.stderr)
    return record


def _train(
    base: Base, bits: Bits, forget: Examples, retain: Examples, kept: list[str], settings: dict, folder: Path
) -> None:  # fmt: skip
    """Run the loop to its end; writes losses.jsonl and, where asked for, the strips of samples/."""
    names = ("steps", "batch_size", "lr", "retain_weight", "anchor_from", "seed")
    schedule, every = Schedule.of(base.pipeline.scheduler), settings["sample_every"]
    anchor = base.context(settings["anchor"])
    if every:
        texts = [settings["concept"]] * 4 + [kept[i * len(kept) // 4] for i in range(4)]
        _write_strip(base, texts, folder / "samples" / "step-00000.png")
    else:
        base.pipeline.vae = base.pipeline.text_encoder = None  # not needed to train: leave memory
    loop = erasing.erase(
        base.pipeline.unet, bits, schedule, forget, anchor, retain, **{name: settings[name] for name in names}
    )
    with (folder / "losses.jsonl").open("w") as losses, tqdm(loop, total=settings["steps"], desc="erase") as bar:
        for row in bar:
            losses.write(json.dumps(row) + "\n")
            bar.set_postfix(forget=f"{row['forget']:.4f}", retain=f"{row['retain']:.4f}")
            if every and row["step"] % every == 0:
                _write_strip(base, texts, folder / "samples" / f"step-{row['step']:05d}.png")


def _write_strip(base: Base, texts: list[str], file: Path) -> None:
    """One row of images, from seeds that neither training images nor a prompt set use."""
    steps, guidance = checkpoint.sampling(base.folder)
    images = generate.sample(base.pipeline, [(text, 2**31 + i) for i, text in enumerate(texts)], guidance, steps)
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    file.parent.mkdir(exist_ok=True)
    strip.save(file)


def peak_memory() -> int:
    """The most memory the process has held so far, in bytes: resident, or on the GPU where one is used."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def model_card(record: dict) -> str:
    """The README.md of an erased checkpoint, in Markdown, from its salun.json."""
    templates = Environment(loader=PackageLoader("salun_sd", ""), undefined=StrictUndefined, keep_trailing_newline=True)
    return templates.get_template("card.md.j2").render(record)
