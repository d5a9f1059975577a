"""The work of `mask` and `erase`, files in and files out: draw or read images, encode, saliency, train, save."""

import hashlib
import json
import os
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

from salun_sd import checkpoint, data, generate, prompts
from salun_sd import erase as erasing
from salun_sd import mask as masks
from salun_sd.checkpoint import new_folder, write_atomic
from salun_sd.diffusion import Examples, Schedule
from salun_sd.errors import SalunError, UsageError
from salun_sd.mask import Mask
from salun_sd.prompts import Prompt
from salun_sd.saliency import Saliency


class Base(NamedTuple):
    """A checkpoint that is about to be edited or drawn from."""

    name: str  # as the person gave it
    folder: Path
    fingerprint: str
    pipeline: object

    @property
    def resolution(self) -> int:
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.pipeline.unet.named_parameters()}


def open_base(model: str) -> Base:
    folder = checkpoint.resolve(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Base(model, folder, checkpoint.fingerprint(folder), checkpoint.load(folder, device))


def cache_folder() -> Path:
    """$SALUN_SD_CACHE, or salun-sd in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SALUN_SD_CACHE") or Path(root) / "salun-sd")


def drawn_images(base: Base, rows: list[tuple[str, float]], what: str) -> list[Path]:
    """One image file for each (text, guidance scale), drawn by the base once and kept in the cache folder.

    Image i starts from seed i, so that `mask` and `erase` share what they draw, and more images extend fewer.
    """
    steps, _ = checkpoint.sampling(base.folder)
    key = hashlib.sha256(json.dumps([base.fingerprint, steps, sorted(set(rows))]).encode()).hexdigest()[:16]
    folder = cache_folder() / "drawn" / key
    wanted = [Prompt(i, text, i, guidance) for i, (text, guidance) in enumerate(rows)]
    drawing = generate.draw(base.pipeline, wanted, folder, steps=steps, fingerprint=base.fingerprint)
    for _ in tqdm(drawing, total=len(wanted), desc=f"draw {what}", unit="image"):
        pass
    return [folder / generate.file_of(p, 0) for p in wanted]


def encode(base: Base, files: list[Path], texts: list[str]) -> Examples:
    """Image files with a prompt each => latents and text embeddings, every distinct prompt encoded once."""
    distinct = sorted(set(texts))
    bar = tqdm(files, desc="encode", unit="image")
    return Examples(
        torch.stack([data.encode_image(base.pipeline.vae, file, base.resolution) for file in bar]),
        data.encode_prompts(base.pipeline.tokenizer, base.pipeline.text_encoder, distinct),
        torch.tensor([distinct.index(text) for text in texts]),
    )


def forget_examples(base: Base, concept: str, folder: Path | None, samples: int) -> Examples:
    """D_f: the images of a folder, or images that the base draws from the concept prompt; captioned with it."""
    rows = [(concept, checkpoint.sampling(base.folder)[1])] * samples
    files = data.images_in(folder) if folder else drawn_images(base, rows, "forget images")
    return encode(base, files, [concept] * len(files))


def retain_examples(
    base: Base, concept: str, anchor: str, folder: Path | None, prompt_set: str | None, samples: int
) -> Examples:
    """D_r: the images of a folder, captioned with the anchor; or drawn from the rows of a prompt set, less those
    whose class the concept names; or drawn from the anchor, as the paper does for nudity."""
    if folder:
        files = data.images_in(folder)
        return encode(base, files, [anchor] * len(files))
    rows = [(anchor, checkpoint.sampling(base.folder)[1])]
    if prompt_set:
        rows = [(p.text, p.guidance) for p in prompts_to_retain(prompt_set, concept)]
    rows = [rows[i * len(rows) // samples] for i in range(samples)]  # spread evenly over the set
    return encode(base, drawn_images(base, rows, "retain images"), [text for text, _ in rows])


def prompts_to_retain(prompt_set: str, concept: str) -> list[Prompt]:
    rows = prompts.read(prompt_set)
    gone = prompts.class_in(concept, (p.label for p in rows))
    if not (left := [p for p in rows if gone is None or p.label != gone]):
        raise UsageError(f"Every prompt of {prompt_set} asks for {gone}, the concept: none is left to retain.")
    return left


def make_masks(
    base: Base, forget: Examples, concept: str, densities: list[float], guidance: float, seed: int, batch_size: int
) -> list[Mask]:
    """One gradient pass over D_f, one mask for each density."""
    total = sum(shape.numel() for shape in base.shapes.values())
    counts = [masks.keep_count(d, total) for d in densities]
    empty = data.encode_prompts(base.pipeline.tokenizer, base.pipeline.text_encoder, [""])
    saliency = Saliency(base.pipeline.unet, Schedule.of(base.pipeline.scheduler), empty, guidance, seed)
    with tqdm(total=len(forget), desc="saliency", unit="image") as bar:
        for done in saliency.accumulate(forget, batch_size):
            bar.update(done - bar.n)
    values = saliency.result()
    made = []
    for density, count, threshold in zip(densities, counts, masks.thresholds(values, counts), strict=True):
        settings = {
            "concept": concept,
            "density": density,
            "threshold": threshold,
            "guidance": guidance,
            "images": saliency.images,
            "seed": seed,
            "base": base.fingerprint,
            "model": base.name,
            "salun_sd": version("salun-sd"),
        }
        made.append(Mask(masks.select(values, threshold, count), settings))
    return made


def mask(
    model: str, concept: str, forget: Path | None, samples: int, densities: list[float], guidance: float, seed: int,
    batch_size: int, out: Path,
) -> list[tuple[Path, Mask]]:  # fmt: skip
    """Compute and write a mask file for each density; with several, the density goes into the file's name."""
    if len(set(densities)) < len(densities):
        raise UsageError("The same --density is given twice.")
    for density in densities:
        masks.keep_count(density, sys.maxsize)  # outside (0, 1]: say so before a checkpoint is loaded
    paths = [out if len(densities) == 1 else out.with_name(f"{out.stem}-{d:g}{out.suffix}") for d in densities]
    for path in paths:
        if path.exists():
            _check_mask_file(path)
    base = open_base(model)
    examples = forget_examples(base, concept, forget, samples)
    made = make_masks(base, examples, concept, densities, guidance, seed, batch_size)
    for path, each in zip(paths, made, strict=True):
        write_atomic(path, masks.pack(each))
    return list(zip(paths, made, strict=True))


def _check_mask_file(path: Path) -> None:
    """A mask may be made anew in its place; any other file is not ours to replace."""
    try:
        masks.unpack(path.read_bytes(), str(path))
    except (SalunError, OSError) as e:
        raise UsageError(f"{path} exists and is not a mask of salun-sd; choose another --out.") from e


def erase(
    model: str, concept: str, anchor: str, *, mask: str | None, density: float, guidance: float, forget: Path | None,
    retain: Path | None, retain_prompts: str | None, samples: int, retain_weight: float, lr: float, steps: int | None,
    batch_size: int, anchor_from: str, sample_every: int, seed: int, out: Path, command: str,
) -> dict:  # fmt: skip
    """Erase the concept and write the pipeline folder `out`; gives back what it wrote into salun.json."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items() if k not in ("out", "command")}
    if " ".join(concept.lower().split()) == " ".join(anchor.lower().split()):
        raise UsageError(f"Concept and anchor are both {concept!r}: the anchor has to be something else.")
    if retain and retain_prompts:
        raise UsageError("--retain and --retain-prompts cannot go together: give one of them.")
    masks.keep_count(density, sys.maxsize)
    stored = _stored_mask(mask)
    for folder in filter(None, (forget, retain)):
        data.images_in(folder)
    keep = [p.text for p in prompts_to_retain(retain_prompts, concept)] if retain_prompts else [anchor]
    if (done := _finished(out, settings)) is not None:
        return done

    started = time.monotonic()
    base = open_base(model)
    if isinstance(stored, Mask):
        masks.check(stored, base.shapes, base.fingerprint)
    forgotten = forget_examples(base, concept, forget, samples)
    retained = retain_examples(base, concept, anchor, retain, retain_prompts, samples)
    anchor_context = data.encode_prompts(base.pipeline.tokenizer, base.pipeline.text_encoder, [anchor])
    if isinstance(stored, Mask):
        chosen = stored
    elif mask == "none":
        chosen = Mask(masks.full_bits(base.shapes), {"base": base.fingerprint, "kind": "none"})
    elif stored is not None:
        bits = masks.random_bits(base.shapes, stored, seed)
        chosen = Mask(bits, {"base": base.fingerprint, "kind": "random", "density": stored, "seed": seed})
    else:
        [chosen] = make_masks(base, forgotten, concept, [density], guidance, seed, batch_size)
    if not sample_every:
        base.pipeline.vae = base.pipeline.text_encoder = None  # not needed to train: leave memory

    steps = steps or -(-len(forgotten) // batch_size)
    strip = [(text, 2**31 + i) for i, text in enumerate([concept] * 4 + [keep[i * len(keep) // 4] for i in range(4)])]
    with new_folder(out) as folder:
        losses = []
        loop = erasing.erase(
            base.pipeline.unet, chosen.bits, Schedule.of(base.pipeline.scheduler), forgotten, anchor_context, retained,
            steps=steps, batch_size=batch_size, lr=lr, retain_weight=retain_weight, anchor_from=anchor_from, seed=seed,
        )  # fmt: skip
        if sample_every:
            _write_strip(base, strip, folder / "samples" / "step-00000.png")
        for row in (bar := tqdm(loop, total=steps, desc="erase", unit="step")):
            losses.append(json.dumps(row) + "\n")
            bar.set_postfix(forget=f"{row['forget']:.4f}", retain=f"{row['retain']:.4f}")
            if sample_every and row["step"] % sample_every == 0:
                _write_strip(base, strip, folder / "samples" / f"step-{row['step']:05d}.png")

        checkpoint.save_erased(base.folder, base.pipeline.unet, chosen.bits, folder)
        changed = checkpoint.count_changes(base.folder, folder, chosen.bits)
        if changed["outside"]:
            raise SalunError(f"{changed['outside']} weights outside the mask changed, so nothing was kept; report it.")
        kept, total = masks.kept(chosen.bits)
        record = {
            "schema": 1,
            "command": command,
            "base": {"model": model, "fingerprint": base.fingerprint},
            "erased": {"fingerprint": checkpoint.fingerprint(folder)},
            "settings": settings,
            "steps": steps,
            "images": {"forget": len(forgotten), "retain": len(retained)},
            "mask": {**chosen.settings, "kept": kept, "of": total},
            "changed": changed,
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory(),
            "versions": {name: version(name) for name in ("salun-sd", "torch", "diffusers", "transformers")},
        }
        (folder / "losses.jsonl").write_text("".join(losses))
        (folder / "mask.safetensors").write_bytes(masks.pack(chosen))
        (folder / "salun.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(record), encoding="utf-8")
    return record


def _stored_mask(spec: str | None) -> Mask | float | None:
    """What --mask says: a mask file read, the density of random:D, or None for "none" and for no --mask."""
    if spec in (None, "none"):
        return None
    if spec.startswith("random:"):
        try:
            density = float(spec.removeprefix("random:"))
        except ValueError as e:
            raise UsageError(f"--mask {spec} has no density: write random:0.5, say.") from e
        masks.keep_count(density, sys.maxsize)
        return density
    if not Path(spec).is_file():
        raise UsageError(f"Mask {spec} was not found: give a file that salun-sd mask wrote, random:0.5, or none.")
    return masks.unpack(Path(spec).read_bytes(), spec)


def _finished(out: Path, settings: dict) -> dict | None:
    """What an earlier run with these settings left in `out`; None if there is nothing. Else UsageError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / "salun.json").read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"{out} holds something else: choose another --out, or remove it.") from e
    if record.get("settings") != settings:
        raise UsageError(f"{out} holds a checkpoint erased with other settings: choose another --out, or remove it.")
    print(f"{out} was already made with these settings; nothing to do.", file=sys.stderr)
    return record


def _write_strip(base: Base, rows: list[tuple[str, int]], file: Path) -> None:
    steps, guidance = checkpoint.sampling(base.folder)
    images = generate.sample(base.pipeline, rows, guidance, steps)
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    file.parent.mkdir(exist_ok=True)
    strip.save(file)


def peak_memory() -> int:
    """The most memory this process has held, in bytes: resident, or on the GPU where one is used."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def model_card(record: dict) -> str:
    """The README.md of an erased checkpoint, in Markdown, from its salun.json."""
    templates = Environment(loader=PackageLoader("salun_sd", ""), undefined=StrictUndefined, keep_trailing_newline=True)
    return templates.get_template("card.md.j2").render(record)
