"""The record of an erasure, in its three forms: salun.json, the header of a single file, and the model card."""

import hashlib
import json
import logging
import os
import re
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from jinja2 import Environment, PackageLoader, StrictUndefined

from salun_sd.checkpoint import places, tensors
from salun_sd.checkpoint.families import BY_CLASS, DIT
from salun_sd.checkpoint.model import CONFIGS, SAMPLING, Checkpoint
from salun_sd.errors import SalunError
from salun_sd.runtime import escape, seals
from salun_sd.runtime.documents import parse_json, read_json
from salun_sd.runtime.files import new_file, write_atomic
from salun_sd.runtime.texts import is_hub_id

logger = logging.getLogger(__name__)

FILE = "salun.json"  # the record in a folder
KEY = "salun_sd"  # in a safetensors header's metadata; the value is the record as JSON
LICENSE = ("license", "license_name", "license_link")  # the hub's keys
LIBRARIES = ("salun-sd", "torch", "diffusers", "transformers", "safetensors")
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}

AGAIN = "Erase or apply again, or download it again."
SCHEMA = 3  # of a record
AUDIT = {  # the shape of an audit in a record
    "prompts": str, "prompts_sha256?": str, "images": int, "metrics": {str: str}, "headline?": str,
    "sampling": {"samples": int, "steps": int},
    "against": ({"model": str, "metrics": {str: str}}, None),
}  # fmt: skip
RECORD = {  # the shape of a record: what is read of it
    "schema": int,
    "command": str,
    "concepts": [{"prompt": str, "synonyms": [str], "anchor": (str, None)}],
    "settings": {
        "method?": str, "format": str, "steps": (int, None), "batch_size": int, "lr?": float, "retain_weight?": float,
        "seed": int,
    },
    "images": {"forget": int, "retain": int},
    "data": {"forget": str, "retain": str},
    "base": {"model": str, "revision": (str, None), "family": str, "fingerprint": str, "header": {str: str},
             "license": {f"{key}?": str for key in LICENSE}},
    "erased": {"fingerprint": str, "parts?": dict},
    "mask": {"kept": int, "of": int},
    "changed": {"inside": int, "outside": int},
    "probe?": ({"step": int, "moved": {str: (float, None)}, "drift": (float, None)}, None),
    "audits?": {str: AUDIT},
    "files?": {str: str},
}  # fmt: skip


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def of_base(base: Checkpoint) -> dict:
    """The part of a record that describes the base, with the base's own record if it was erased before."""
    return {
        "model": base.name,
        "revision": base.revision,
        "variant": base.variant,
        "family": base.family.name,
        "fingerprint": base.fingerprint,
        "license": license_of(base),
        "header": base.header,
        "record": None if base.is_file else read(base.path),  # a file's record is in its header
    }


def of_erased(base: Checkpoint, fingerprint: str) -> dict:
    """The part of a record that describes the result: the UNet's fingerprint, and those of the base's other parts."""
    others = {part: f for part, f in base.fingerprints.items() if part != base.denoiser}
    return {"fingerprint": fingerprint, "parts": others}


def license_of(base: Checkpoint) -> dict[str, str]:
    """The licence that the base's header or model card names, under the hub's keys: an erased checkpoint inherits it.

    Logs a warning and gives an empty dictionary if none is named.
    """
    card_data: dict = {}
    if base.is_file:
        card_data = {"license": base.header.get("modelspec.license")}
    else:
        try:
            card = base.path / "README.md"
            if not card.is_file() and base.revision:  # a hub id's card is not among the pipeline's files
                card = hf_hub_download(base.name, "README.md", revision=base.revision)
            card_data = ModelCard.load(card).data.to_dict()
        except Exception:  # no card, no network or no YAML in the front matter: the licence is unknown
            pass
    license = {k: escape.line(card_data[k]) for k in LICENSE if isinstance(card_data.get(k), str)}
    if not license:
        logger.warning(f"No licence of {base.name} was found: check its terms before you publish the result.")
    elif not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license.get("license", "")):  # not one of the hub's names
        license = {"license_name": license.get("license", "unknown")} | license | {"license": "other"}
    return license


def title(record: dict) -> str:
    """One line: the base's name, "without", and the concepts in quotes."""
    concepts = ", ".join(f'"{escape.line(c["prompt"])}"' for c in record["concepts"])
    return f"{escape.line(record['base']['model'])} without {concepts}"


def in_format(record: dict, format: str) -> dict:
    """The record of the same erasure, written in another format."""
    return record | {"settings": record["settings"] | {"format": format}}


def metadata(record: dict, base: Checkpoint) -> dict[str, str]:
    """The header of a single file: the base's own, the keys of ModelSpec 1.0.1, and the record."""
    prediction, size = base.prediction_type, base.image_size
    kind = ARCHITECTURES.get(base.family.key)
    if kind is None:
        kind = "stable-diffusion-v2-768-v" if prediction == "v_prediction" else "stable-diffusion-v2-512"
    of_other_bytes = ("hash", "date", "thumbnail")
    inherited = {k: v for k, v in base.header.items() if not any(word in k for word in of_other_bytes)}
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": kind,
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title(record),
        "resolution": f"{size}x{size}",
        "prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        "description": f"{title(record)}: concept erasure with SalUn (arXiv 2310.12508), by salun-sd.",
        "merged_from": escape.line(record["base"]["model"]),
    }
    if license := record["base"]["license"]:
        spec["license"] = license.get("license_name") or license.get("license", "other")
    return {
        "format": "pt",
        **inherited,
        **{f"modelspec.{k}": v for k, v in spec.items()},
        KEY: _header(record),
    }


def _header(record: dict) -> str:
    """The record as the header of a single file holds it."""
    return json.dumps(seals.sealed(record), ensure_ascii=False)


def model_card(record: dict) -> str:
    """The README.md of an erased checkpoint: Markdown with the hub's front matter. All that the record holds is shown
    as text: it may be of a patch from elsewhere."""
    name = record["base"]["model"]
    is_patch = record["settings"]["format"] == "patch"
    by_class = record["base"]["family"] in {family.name for family in BY_CLASS.values()}
    kind, task = ("class-conditional", None) if by_class else ("stable-diffusion", "text-to-image")  # the hub's words
    data = ModelCardData(
        base_model=name if is_hub_id(name) else None,
        library_name=None if is_patch else "diffusers",
        pipeline_tag=task,
        tags=[kind, "concept-erasure", "machine-unlearning", record["settings"].get("method", "salun")],
        **{key: escape.line(value) for key, value in record["base"]["license"].items() if key in LICENSE},
    )
    templates = Environment(
        loader=PackageLoader(__package__, ""), undefined=StrictUndefined, keep_trailing_newline=True,
        finalize=escape.text,
    )  # fmt: skip
    templates.filters |= {"code": escape.code, "block": escape.block}
    denoiser = "transformer" if record["base"]["family"] == DIT.name else "UNet"
    page = templates.get_template("card.md.j2").render(record, title=title(record), denoiser=denoiser)
    return f"---\n{data.to_yaml()}\n---\n\n{page}"


def read(model: Path) -> dict | None:
    """The record of an erased folder or single file; None for a model that salun-sd did not erase.

    Raises SalunError if the record is damaged.
    """
    if model.is_dir():
        file = model / FILE
        record = read_json(file, RECORD, seals.advising(AGAIN)) if os.path.lexists(file) else None
    else:
        file = model
        text = tensors.read(model)[1].get(KEY) if model.is_file() else None  # whatever the ending of its name
        record = None if text is None else parse_json(text, str(model), RECORD, seals.advising(AGAIN))
    if record is None or (record["schema"] < SCHEMA and seals.KEY not in record):  # earlier versions sealed none
        return record
    return seals.unsealed(record, str(file), AGAIN)


def check(model: Checkpoint) -> None:
    """Raise SalunError unless an erased checkpoint is what its record says: each part to the last bit, and the configs
    of a folder. A record of an earlier version names the UNet alone."""
    record = read(model.path)
    if record is None:
        return
    erased = record["erased"]
    for part, fingerprint in {model.denoiser: erased["fingerprint"], **erased.get("parts", {})}.items():
        if model.fingerprints.get(part) != fingerprint:
            raise _changed(model, f"The {part}")
    if (files := record.get("files")) is not None:
        present = _digests(model.path)
        for name in sorted(files.keys() | present.keys()):  # a file that was added can change what is drawn, too
            if present.get(name) != files.get(name):
                raise _changed(model, name)


def _changed(model: Checkpoint, what: str) -> SalunError:
    where = f"the key {KEY} of the file's header" if model.is_file else str(model.path / FILE)
    return SalunError(f"{what} of {model.name} is not the one that its record names: it was damaged, or changed on "
                      f"purpose. {AGAIN} If you changed it yourself, remove the record: {where}.")  # fmt: skip


def write_folder(record: dict, folder: Path, before: dict | None = None) -> None:
    """Write salun.json, with the digests of the folder's configs, and the model card. `before` is the record that was
    there: a card that is not the one of that record was changed by a person, and stays, with a warning."""
    card, page = folder / "README.md", model_card(record)
    if before and card.is_file() and card.read_bytes() not in (model_card(before).encode(), page.encode()):
        logger.warning(f"{card} was changed since it was written: it stays as it is, and {FILE} alone has the audit. "
                       "Remove the card first to have it written again.")  # fmt: skip
    else:
        write_atomic(card, page)
    content = seals.sealed(record | {"files": _digests(folder)})
    write_atomic(folder / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the configs and tokenizers in a pipeline folder, by their names in it; ends of lines as on Unix."""
    index = folder / "model_index.json"
    files = [index, folder / SAMPLING, *(p for p in folder.glob("*/[!.]*") if p.suffix in CONFIGS)]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        for file in sorted(files) if index.is_file() and file.is_file()
    }  # fmt: skip


def add_audit(model: Path, audit: dict) -> None:
    """Add an audit's headline numbers to the record and the card of an erased folder or single file.

    The record keeps one audit for each prompt set: for its name and the digest of its prompts. An audit of an earlier
    version has no digest, and is replaced by one of its name. A single file is written again, with a longer header.
    Raises SalunError if the model has no record.
    """
    before = read(model)
    if before is None:
        raise SalunError(f"{model} was not erased by salun-sd: it has no record to add an audit to.")
    name, digest, known = places.last(audit["prompts"]), audit["prompts_sha256"], before.get("audits", {})
    audits = {key: of for key, of in known.items() if places.last(key) != name or "prompts_sha256" in of}
    record = places.without_places(before | {"audits": audits | {f"{name}, SHA-256 {digest[:12]}": audit}})
    if model.is_dir():
        write_folder(in_format(record, "diffusers"), model, before)
        return
    content, header = tensors.read(model)
    with new_file(model) as partial:
        tensors.write(partial, content, header | {KEY: _header(record)})
    if (run_folder(model) / FILE).is_file():
        write_folder(record, run_folder(model), before)


def run_folder(out: Path) -> Path:
    """The folder beside an erased checkpoint or a patch: what its maker keeps, such as the mask and the losses."""
    return out.with_name(f"{out.name}.run")
