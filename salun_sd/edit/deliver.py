"""The end of `erase`, and the work of `apply`: write a checkpoint in one of its formats, and read it back."""

import json
import logging
from pathlib import Path

from salun_sd.checkpoint import provenance, save, tensors
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.edit import maskfile
from salun_sd.edit import patch as patches
from salun_sd.edit.checks import check_place
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.patch import Patch
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.files import new_file, new_folder

logger = logging.getLogger(__name__)


def proof(base: Checkpoint, patch: Patch, mask: Mask) -> dict:
    """What an erasure changed, for the record: counted against the base's own bytes. Raises SalunError if a weight
    outside the mask differs."""
    erased = patches.merged(base.unet, patch)
    changed = patches.changes(base.unet, erased, mask.bits)
    if changed["outside"]:
        raise SalunError(f"{changed['outside']} weights outside the mask changed, so nothing was kept: please report "
                         "it.")  # fmt: skip
    kept, total = masks.kept(mask.bits)
    return {
        "base": provenance.of_base(base),
        "erased": {"fingerprint": tensors.fingerprint(erased)},
        "mask": {**mask.settings, "kept": kept, "of": total},
        "changed": changed,
        "sizes": save.sizes(base, patch.tensors),
        "versions": provenance.versions(),
        "audits": {},
    }


def deliver(base: Checkpoint, patch: Patch, mask: Mask, format: str, out: Path, beside: Path) -> None:
    """Write `out` in a format. `beside` is the folder that will become `out` or, where `out` is a file, lies beside
    it."""
    if format == "diffusers":
        (beside / "mask.safetensors").write_bytes(maskfile.pack(mask))
        write_checked(base, patch, format, beside)
    else:
        provenance.write_folder(patch.record, beside)
        with new_file(out) as partial:
            write_checked(base, patch, format, partial)


def write_checked(base: Checkpoint, patch: Patch, format: str, place: Path, revert: bool = False) -> None:
    """Write the base with the patch merged in, and read it back. `place` is a file or, for "diffusers", an empty
    folder. Raises SalunError unless the saved UNet is, to the last bit, the one that the record names."""
    unet = patches.merged(base.unet, patch, "old" if revert else "new")
    if format == "patch":
        patches.write(place, patch)
        saved = patches.merged(base.unet, patches.read(place))
    elif format == "single-file":
        header = patch.record["base"]["header"] if revert else provenance.metadata(patch.record, base)
        tensors.write(place, save.single_file(base, unet), header)
        saved = _saved_unet(base, place)
    else:
        save.folder(base, unet, place)
        if not revert:
            provenance.write_folder(patch.record, place)
        saved = _saved_unet(base, place)
    if tensors.fingerprint(saved) != patch.record["base" if revert else "erased"]["fingerprint"]:
        raise SalunError("What was read back from the disk is not what was written, so nothing was kept: please report "
                         "it.")  # fmt: skip


def _saved_unet(base: Checkpoint, place: Path) -> tensors.Tensors:
    """The UNet of a checkpoint that was made of the base: a folder or a single file."""
    return Checkpoint(str(place), place, place if place.is_dir() else base.config, base.family).unet


def _is_free(out: Path, format: str) -> bool:
    """Whether a result can be written to `out`: nothing is there or, for "diffusers", an empty folder."""
    return not out.exists() or (format == "diffusers" and out.is_dir() and not any(out.iterdir()))


def finished(out: Path, format: str, base: Checkpoint, settings: dict, inputs: dict) -> dict | None:
    """The record in `out`, where an earlier run left it there with the same settings and inputs; None where `out` does
    not exist, or is an empty folder. Raises UsageError where `out` is anything else, SalunError where the result in it
    was changed since."""
    beside = provenance.run_folder(out)
    if format != "diffusers" and not out.exists() and beside.is_dir() and any(beside.iterdir()):
        raise UsageError(f"{beside} is of another run, whose {out.name} is gone: choose another --out, or remove it.")
    if _is_free(out, format):
        return None
    try:
        patch = patches.read(out) if format == "patch" else None
        record = patch.record if patch else provenance.read(out)
        same = record["settings"] == settings and record["inputs"] == inputs
    except (OSError, SalunError, KeyError, TypeError) as e:
        raise UsageError(f"{out} holds something else: choose another --out, or remove it.") from e
    if not same:
        raise UsageError(f"{out} was erased with other settings or inputs: choose another --out, or remove it.")
    unet = patches.merged(base.unet, patch) if patch else _saved_unet(base, out)
    if tensors.fingerprint(unet) != record["erased"]["fingerprint"]:
        raise SalunError(f"The UNet in {out} is not the one that was saved there: remove {out} and run again.")
    logger.info(f"{out} was already made from these inputs with these settings; nothing to do.")
    return record


def apply(
    model: str | Path | Checkpoint, patch: str | Path, *, out: str | Path, format: str = "diffusers",
    revert: bool = False, config: str | None = None, revision: str | None = None, variant: str | None = None,
) -> dict:  # fmt: skip
    """Write the checkpoint that a patch makes of its base or, with `revert`, the base again; gives the patch's record.
    Parameters are those of `salun-sd apply`. Only one tensor at a time is in memory.

    Raises UsageError for arguments that are wrong or cannot go together, SalunError for anything else that fails.
    """
    file, out = Path(patch), Path(out)
    check_place(out, format, ("diffusers", "single-file"))
    if not _is_free(out, format):
        raise UsageError(f"{out} exists: choose another --out, or remove it.")
    changes = patches.read(file)
    base = opened(model, config, revision, variant)
    patches.check(changes, file, base.unet, base.name, base.fingerprint, revert)
    with new_folder(out) if format == "diffusers" else new_file(out) as partial:
        write_checked(base, changes, format, partial, revert)
    return changes.record


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def run_of(out: Path) -> dict | None:
    """The run.json of the run that wrote `out`: seconds, and for each step peak_bytes and, where planned,
    planned_bytes. None where the file is gone."""
    file = (out if out.is_dir() else provenance.run_folder(out)) / "run.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
