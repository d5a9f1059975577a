"""Flipped bits in every kind of file that is read: an error that names the file, or the same result; never another."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.runs import PAIR, SHORT, write_photographs, write_prompts

from salun_sd.audit import examine, saved
from salun_sd.checkpoint import provenance, tensors
from salun_sd.checkpoint.find import opened
from salun_sd.cli import app as cli
from salun_sd.core.mask import random_bits
from salun_sd.draw import generate
from salun_sd.draw.images import read_image
from salun_sd.edit import deliver, encodings, maskfile, patch
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.resume import Progress
from salun_sd.errors import SalunError
from salun_sd.runtime import seals
from salun_sd.runtime.stamps import Stamps

FLIPS, MANY = 6, 150  # of one kind of file, by default and in the long sweep
ERASE = ["--mask", "random:0.1", "--samples", "2", *SHORT]
FORMATS = {"folder": "diffusers", "file.safetensors": "single-file", "patch.safetensors": "patch"}
UNET = "unet/diffusion_pytorch_model.safetensors"


class Kind(NamedTuple):
    """A kind of file, and what is read of it. A list may come back shorter: what is lost in it is made again."""

    file: Path
    read: Callable[[], object]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """An erasure in each format, an audit and its base's, a state."""
    here = tmp_path_factory.mktemp("flips")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SALUN_SD_CACHE", str(here / "cache"))
        for name, format in FORMATS.items():
            cli.run(["erase", tiny, *PAIR, *ERASE, "--format", format, "--out", str(here / name)])
        few = write_prompts(here / "few.csv", every=250)
        cli.run(["evaluate", str(here / "folder"), "--prompts", str(few), "--denoising-steps", "1",
                 "--out", str(here / "audit")])  # fmt: skip
        mask = Mask(random_bits({"a": (40,), "b": (3, 50)}, 0.5, 0), {"base": "of the base"})
        maskfile.write(here / "mask.safetensors", mask)
        progress = Progress(here / "stopped", {"seed": 1}, 1)
        progress.folder.mkdir()
        progress.save(mask)
        with progress.losses(0) as losses:
            losses.writelines(seals.line({"step": n, "forget": n / 7}) for n in range(1, 9))
        write_photographs(here / "photographs")
    return here


def of_tensors(content: tensors.Tensors) -> dict:
    return {name: (t.dtype, t.shape, bytes(tensors.raw(t.read()))) for name, t in content.items()}


def of_mask(mask: Mask) -> tuple:
    return mask.settings, mask.bits.shapes, {name: bytes(tensors.raw(t)) for name, t in mask.bits.packed.items()}


def of_patch(file: Path) -> tuple:
    content = patch.read(file)
    return of_tensors(content.tensors), content.record


def of_state(here: Path) -> tuple:
    state = Progress(here / "stopped", {"seed": 1}, 1)._read()
    return state.steps, of_mask(state.mask), of_tensors(state.adam)


def of_losses(here: Path) -> list:
    progress = Progress(here / "stopped", {"seed": 1}, 1)
    with progress.losses(8):
        return list(seals.read_lines(progress.folder / "losses.jsonl"))


def of_model(place: Path, config: str | None = None) -> tuple:
    model = opened(str(place), config)
    return model.identity, model.sampling, model.prediction_type, provenance.read(place)


def of_audit(folder: Path) -> tuple:
    audit = saved.read(folder)
    return audit.report, dataclasses.replace(audit.run, folder=Path())


def of_encodings(file: Path) -> list:
    texts, content = encodings._read(file)
    return [(texts, {name: bytes(tensors.raw(t)) for name, t in content.items()})] if texts else []


def pixels(file: Path) -> bytes:
    return read_image(file).tobytes()


def provenance_of(file: Path) -> list:
    return [recorded] if (recorded := generate._recorded(file)) is not None else []


KINDS: dict[str, Callable[[Path, str], Kind]] = {
    "mask": lambda here, tiny: Kind(f := here / "mask.safetensors", lambda: of_mask(maskfile.read(f))),
    "patch": lambda here, tiny: Kind(f := here / "patch.safetensors", lambda: of_patch(f)),
    "state": lambda here, tiny: Kind(here / "stopped.run/state.safetensors", lambda: of_state(here)),
    "losses": lambda here, tiny: Kind(here / "stopped.run/losses.jsonl", lambda: of_losses(here)),
    "run.json": lambda here, tiny: Kind(here / "folder.run/run.json", lambda: deliver.run_of(here / "folder")),
    "single file": lambda here, tiny: Kind(f := here / "file.safetensors", lambda: of_model(f, tiny)),
    "encodings": lambda here, tiny: Kind(f := next(here.glob("cache/*/*/*.safetensors")), lambda: of_encodings(f)),
    "image in the cache": lambda here, tiny: Kind(
        f := next(here.glob("cache/drawn/*/*/*.png")), lambda: provenance_of(f)
    ),
    "image of an audit": lambda here, tiny: Kind(f := next(here.glob("audit/images/*.png")), lambda: provenance_of(f)),
    "stamps": lambda here, tiny: Kind(f := here / "audit/images/.stamps-0", lambda: [*Stamps(f.parent)._notes.items()]),
    "photograph": lambda here, tiny: Kind(f := here / "photographs/0.png", lambda: pixels(f)),
    "detections, to go on": lambda here, tiny: Kind(
        here / "audit/detections.jsonl", lambda: list(examine._lines(here / "audit"))
    ),
    **{
        name: lambda here, tiny, name=name: Kind(here / "audit" / name, lambda: of_audit(here / "audit"))
        for name in ("report.json", "manifest.jsonl", "detections.jsonl")
    },
    **{
        name: lambda here, tiny, name=name: Kind(here / "folder" / name, lambda: of_model(here / "folder"))
        for name in (
            "salun.json", "model_index.json", "sampling.json", "scheduler/scheduler_config.json", "unet/config.json",
            "tokenizer/tokenizer.json", UNET, "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        )
    },
}  # fmt: skip


def places(size: int, count: int) -> list[int]:
    """Bits of a file: a few of its first 200 bytes, where a header is, and of all."""
    of = random.Random(size)
    return [of.randrange(8 * min(size, 200 if n % 2 else size)) for n in range(count)]


def another_result(kind: Kind, bit: int, content: bytes, right: object) -> object | None:
    """What is read of the file with this bit flipped, where that is neither the right result nor an error that names
    the file or its folder."""
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    kind.file.write_bytes(flipped)
    try:
        result = kind.read()
    except SalunError as e:
        is_named = any(str(place) in str(e) for place in (kind.file, *kind.file.parents[:2]))
        return None if is_named else e
    same = all(part in right for part in result) if isinstance(right, list) else result == right
    return None if same else result


@pytest.mark.parametrize("count", [FLIPS, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_named_or_changes_nothing(made, tiny, name, count):
    kind = KINDS[name](made, tiny)
    content, right = kind.file.read_bytes(), kind.read()
    try:
        wrong = {bit: another_result(kind, bit, content, right) for bit in places(len(content), count)}
    finally:
        kind.file.write_bytes(content)
    assert right and {bit: result for bit, result in wrong.items() if result is not None} == {}
    assert kind.read() == right
