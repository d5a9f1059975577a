"""The end of `erase`, and the work of `apply`: an erased checkpoint in one of its forms, read back before it stands."""

import json
import logging
from pathlib import Path

from salun_sd.checkpoint import provenance, save, tensors
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.edit import maskfile, patch
from salun_sd.edit.checks import check_place
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.patch import Patch
from salun_sd.edit.patch import check as check_patch
from salun_sd.edit.patch import read as read_patch
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.files import new_file, new_folder

logger = logging.getLogger(__name__)


def proof(base: Checkpoint, made: Patch, mask: Mask) -> dict:
    """What an erasure changed, counted against the base's own bytes, for the record. Raises SalunError if one weight
    outside the mask differs."""
    erased = patch.merged(base.unet, made)
    changed = patch.changes(base.unet, erased, mask.bits)
    if changed["outside"]:
        raise SalunError(f"{changed['outside']} weights outside the mask changed, so nothing was kept; report it.")
    kept, total = masks.kept(mask.bits)
    return {
        "base": provenance.of_base(base),
        "erased": {"fingerprint": tensors.fingerprint(erased)},
        "mask": {**mask.settings, "kept": kept, "of": total},
        "changed": changed,
        "sizes": save.sizes(base, made.tensors),
        "versions": provenance.versions(),
        "audits": {},
    }


def deliver(base: Checkpoint, made: Patch, mask: Mask, form: str, out: Path, beside: Path) -> None:
    """Write `out` in its form; `beside` is the folder that is `out` in the making or, for a file, goes with it."""
    if form == "diffusers":
        (beside / "mask.safetensors").write_bytes(maskfile.pack(mask))
        written(base, made, form, beside)
    else:
        provenance.write_folder(made.record, beside)
        with new_file(out) as partial:
            written(base, made, form, partial)


def written(base: Checkpoint, made: Patch, form: str, place: Path, revert: bool = False) -> None:
    """Write the base with the patch in a form (a folder is there to be filled), read it back from the disk and raise
    SalunError unless its UNet is the one that the record names, to the last bit."""
    unet = patch.merged(base.unet, made, "old" if revert else "new")
    if form == "patch":
        patch.write(place, made)
        saved = patch.merged(base.unet, patch.read(place))
    elif form == "single-file":
        header = made.record["base"]["header"] if revert else provenance.metadata(made.record, base)
        tensors.write(place, save.single_file(base, unet), header)
        saved = Checkpoint(str(place), place, base.config, base.family).unet
    else:
        save.folder(base, unet, place)
        if not revert:
            provenance.write_folder(made.record, place)
        saved = Checkpoint(str(place), place, place, base.family).unet
    wanted = made.record["base" if revert else "erased"]["fingerprint"]
    if tensors.fingerprint(saved) != wanted:
        raise SalunError("What was read back from the disk is not what was written, so nothing was kept; report it.")


def finished(out: Path, form: str, base: Checkpoint, settings: dict, inputs: dict) -> dict | None:
    """The record that an earlier run left in `out`, if it is the same; None if there is nothing. Anything else:
    UsageError."""
    beside = provenance.run_folder(out)
    if form != "diffusers" and not out.exists() and beside.is_dir() and any(beside.iterdir()):
        raise UsageError(f"{beside} is of another run, whose {out.name} is gone: choose another --out, or remove it.")
    if not out.exists() or (form == "diffusers" and out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = patch.read(out).record if form == "patch" else provenance.read(out)
        same = record["settings"] == settings and record["inputs"] == inputs
    except (OSError, SalunError, KeyError, TypeError) as e:
        raise UsageError(f"{out} holds something else: choose another --out, or remove it.") from e
    if not same:
        raise UsageError(f"{out} was erased with other settings or inputs: choose another --out, or remove it.")
    if form == "patch":
        unet = patch.merged(base.unet, patch.read(out))
    else:
        unet = Checkpoint(str(out), out, out if out.is_dir() else base.config, base.family).unet
    if tensors.fingerprint(unet) != record["erased"]["fingerprint"]:
        raise SalunError(f"The UNet in {out} is not the one that was saved there: remove {out} and run again.")
    logger.info(f"{out} was already made from these inputs with these settings; nothing to do.")
    return record


def apply(
    model: str | Path | Checkpoint, patch: str | Path, *, out: str | Path, format: str = "diffusers",
    revert: bool = False, config: str | None = None, revision: str | None = None, variant: str | None = None,
) -> dict:  # fmt: skip
    """Write the checkpoint that a patch makes of its base, or, to revert, the base again; gives back the patch's
    record. Parameters are those of `salun-sd apply`. Nothing is loaded: tensors pass through one at a time."""
    file, out, form = Path(patch), Path(out), format
    model = opened(model, config, revision, variant)
    check_place(out, form)
    if out.exists() and not (form == "diffusers" and out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists: choose another --out, or remove it.")
    made = read_patch(file)
    check_patch(made, file, model.unet, model.name, model.fingerprint, revert)
    with new_folder(out) if form == "diffusers" else new_file(out) as partial:
        written(model, made, form, partial, revert)
    return made.record


def size_on_disk(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def run_of(out: Path) -> dict | None:
    """What the run that wrote `out` took: seconds, and for each step peak_bytes and, where planned, planned_bytes. None
    where it does not lie beside it any more."""
    file = (out if out.is_dir() else provenance.run_folder(out)) / "run.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
