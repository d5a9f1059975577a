"""The record of an erasure, in its three forms: salun.json, the header of a single file, and the model card."""

import json
import logging
import re
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from jinja2 import Environment, PackageLoader, StrictUndefined

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.errors import SalunError
from salun_sd.runtime.files import new_file, write_atomic

logger = logging.getLogger(__name__)

KEY = "salun_sd"  # in a safetensors header's metadata; the value is the record as JSON
LIBRARIES = ("salun-sd", "torch", "diffusers", "transformers", "safetensors")
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}


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
    keys = ("license", "license_name", "license_link")
    license = {k: one_line(card_data[k]) for k in keys if isinstance(card_data.get(k), str)}
    if not license:
        logger.warning(f"No licence of {base.name} was found: check its terms before you publish the result.")
    elif not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license.get("license", "")):  # not one of the hub's names
        license = {"license_name": license.get("license", "unknown")} | license | {"license": "other"}
    return license


def title(record: dict) -> str:
    """One line: the base's name, "without", and the concepts in quotes."""
    concepts = ", ".join(f'"{one_line(c["prompt"])}"' for c in record["concepts"])
    return f"{one_line(record['base']['model'])} without {concepts}"


def one_line(text: str) -> str:
    return " ".join(text.split())


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
        "merged_from": one_line(record["base"]["model"]),
    }
    if license := record["base"]["license"]:
        spec["license"] = license.get("license_name", license["license"])
    return {
        "format": "pt",
        **inherited,
        **{f"modelspec.{k}": v for k, v in spec.items()},
        KEY: json.dumps(record, ensure_ascii=False),
    }


def model_card(record: dict) -> str:
    """The README.md of an erased checkpoint: Markdown with the hub's front matter."""
    name = record["base"]["model"]
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists()
    is_patch = record["settings"]["format"] == "patch"
    data = ModelCardData(
        base_model=name if is_hub_id else None,
        library_name=None if is_patch else "diffusers",
        pipeline_tag="text-to-image",
        tags=["stable-diffusion", "concept-erasure", "machine-unlearning", "salun"],
        **record["base"]["license"],
    )
    templates = Environment(
        loader=PackageLoader(__package__, ""), undefined=StrictUndefined, keep_trailing_newline=True
    )
    templates.filters["text"] = _as_text
    page = templates.get_template("card.md.j2").render(record, title=title(record))
    return f"---\n{data.to_yaml()}\n---\n\n{page}"


def _as_text(value: object) -> str:
    """A value that a person typed as Markdown text: in one line, with its markup escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", one_line(str(value)))


def read(model: Path) -> dict | None:
    """The record of an erased folder or single file; None for a model that salun-sd did not erase.

    Raises SalunError if the record is damaged.
    """
    if model.is_dir():
        file = model / "salun.json"
        text = file.read_text(encoding="utf-8") if file.is_file() else None
    else:
        file = model
        text = tensors.read(model)[1].get(KEY) if model.is_file() and model.suffix == ".safetensors" else None
    if text is None:
        return None
    try:
        record = json.loads(text)
        record["concepts"], record["settings"], record["erased"]["fingerprint"]
        return record
    except (ValueError, KeyError, TypeError) as e:
        raise SalunError(f"{file} is damaged: it does not hold the record that salun-sd writes.") from e


def write_folder(record: dict, folder: Path) -> None:
    """Write salun.json and the model card."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / "salun.json", text)
    write_atomic(folder / "README.md", model_card(record))


def add_audit(model: Path, audit: dict) -> None:
    """Add an audit's headline numbers to the record and the card of an erased folder or single file.

    The record keeps one audit for each prompt set. A single file is written again, with a longer header. Raises
    SalunError if the model has no record.
    """
    record = read(model)
    if record is None:
        raise SalunError(f"{model} was not erased by salun-sd: it has no record to add an audit to.")
    record["audits"] = record.get("audits", {}) | {audit["prompts"]: audit}
    if model.is_dir():
        write_folder(record, model)
        return
    content, header = tensors.read(model)
    with new_file(model) as partial:
        tensors.write(partial, content, header | {KEY: json.dumps(record, ensure_ascii=False)})
    if run_folder(model).is_dir():
        write_folder(record, run_folder(model))


def run_folder(file: Path) -> Path:
    """The folder of the record, the card and the losses of an erasure whose result is one file."""
    return file.with_name(f"{file.stem}.run")
