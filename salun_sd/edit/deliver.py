"""The end of `erase`, and the work of `apply`: write a checkpoint in one of its formats, and read it back."""

import logging
from pathlib import Path

from salun_sd.checkpoint import places, provenance, save, tensors
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.edit import patch as patches
from salun_sd.edit.checks import check_out, check_writable
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.patch import Patch
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime import seals
from salun_sd.runtime.files import new_file, new_folder, to_disk, write_atomic
from salun_sd.runtime.texts import check_given

logger = logging.getLogger(__name__)

RUN = {"seconds": float, "peak_bytes": dict, "planned_bytes": dict}  # of run.json


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
        "erased": provenance.of_erased(base, tensors.fingerprint(erased)),
        "mask": {**mask.settings, "kept": kept, "of": total},
        "changed": changed,
        "sizes": save.sizes(base, patch.tensors),
        "versions": provenance.versions(),
        "audits": {},
    }


def deliver(base: Checkpoint, patch: Patch, format: str, out: Path, revert: bool = False) -> None:
    """Write the base with the patch merged in or, with `revert`, taken out again: whole, or not there. Raises
    SalunError unless the UNet that is read back from the disk is, to the last bit, the one that the record names."""
    unet = patches.merged(base.unet, patch, "old" if revert else "new")
    with new_folder(out) if format == "diffusers" else new_file(out) as partial:
        if format == "patch":
            patches.write(partial, patch)
        elif format == "single-file":
            header = patch.record["base"]["header"] if revert else provenance.metadata(patch.record, base)
            tensors.write(partial, save.single_file(base, unet), header)
        else:
            save.folder(base, unet, partial)
            if not revert:
                for file, content in places.in_configs(partial).items():
                    write_atomic(file, content)
                provenance.write_folder(patch.record, partial)
        to_disk(partial)
        saved = patches.merged(base.unet, patches.read(partial)) if format == "patch" else _saved(base, partial).unet
        if tensors.fingerprint(saved) != patch.record["base" if revert else "erased"]["fingerprint"]:
            raise SalunError("What was read back from the disk is not what was written, so nothing was kept: please "
                             "report it.")  # fmt: skip


def _saved(base: Checkpoint, place: Path) -> Checkpoint:
    """A checkpoint that was made of the base: a folder or a single file."""
    return Checkpoint(str(place), place, place if place.is_dir() else base.config, base.family)


def is_free(out: Path, format: str) -> bool:
    """Whether a result can be written to `out`: nothing is there or, for "diffusers", an empty folder."""
    return not out.exists() or (format == "diffusers" and out.is_dir() and not any(out.iterdir()))


def finished(out: Path, format: str, base: Checkpoint, settings: dict, inputs: dict) -> dict | None:
    """The record in `out`, where an earlier run left it there with the same settings and inputs; None where `out` does
    not exist, or is an empty folder. Raises UsageError where `out` is anything else, SalunError where the result in it
    was changed since."""
    if is_free(out, format):
        return None
    try:
        patch = patches.read(out) if format == "patch" else None
        record = patch.record if patch else provenance.read(out)
        before, now = (places.last_parts(each) for each in (record["settings"], settings))
        same = before == now and record["inputs"] == inputs
    except (OSError, SalunError, KeyError, TypeError) as e:
        raise UsageError(f"{out} holds something else, or is damaged: choose another --out, or remove it.") from e
    if not same:
        raise UsageError(f"{out} was erased with other settings or inputs: choose another --out, or remove it.")
    if not patch:
        provenance.check(_saved(base, out))
    elif tensors.fingerprint(patches.merged(base.unet, patch)) != record["erased"]["fingerprint"]:
        raise SalunError(f"{out} is damaged: remove it and run again.")
    logger.info(f"{out} was already made from these inputs with these settings; nothing to do.")
    return record


def apply(
    model: str | Path | Checkpoint, patch: str | Path, *, out: str | Path, format: str = "diffusers",
    revert: bool = False, config: str | None = None, revision: str | None = None, variant: str | None = None,
) -> dict:  # fmt: skip
    """Write the checkpoint that a patch makes of its base or, with `revert`, the base again; gives the record of the
    erased one. Parameters are those of `salun-sd apply`. Only one tensor at a time is in memory.

    Raises UsageError for arguments that are wrong or cannot go together, SalunError for anything else that fails.
    """
    check_given(model=model, patch=patch, out=out, config=config, revision=revision, variant=variant)
    file, out = Path(patch), Path(out)
    check_out(out, format, ("diffusers", "single-file"))
    if not is_free(out, format):
        raise UsageError(f"{out} exists: choose another --out, or remove it.")
    changes = patches.read(file)
    base = opened(model, config, revision, variant)
    check_writable(base, format)
    patches.check(changes, file, base.unet, base.name, base.fingerprint, revert)
    erased = provenance.of_erased(base, changes.record["erased"]["fingerprint"])  # a patch fits any VAE, say
    record = places.without_places(provenance.in_format(changes.record, format) | {"erased": erased})
    deliver(base, changes._replace(record=record), format, out, revert)
    return record


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def run_of(out: Path) -> dict | None:
    """The run.json of the run that wrote `out`: seconds, and for each step peak_bytes and, where planned,
    planned_bytes. None where the file is gone."""
    file = provenance.run_folder(out) / "run.json"
    return seals.read(file, RUN, "It only says how long the run took: remove it.") if file.is_file() else None
