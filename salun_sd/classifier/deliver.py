"""One unlearned model on the disk: its folder, its record and card, the proof that the rest kept its bits."""

import json
from pathlib import Path

import torch

from salun_sd.checkpoint.provenance import LIBRARIES, versions
from salun_sd.classifier.architectures import Classifier, digest_of, opened
from salun_sd.classifier.original import FILE
from salun_sd.classifier.settings import in_words
from salun_sd.core.mask import Bits, kept
from salun_sd.errors import SalunError
from salun_sd.runtime import seals
from salun_sd.runtime.escape import code, text
from salun_sd.runtime.files import new_folder, write_atomic

SHAPE = {"run": dict, "seconds": float, "changed": {"inside": int, "outside": int}, "digest_of_model": str}
ADVICE = "Remove the folder, and run the same command again."


def write(folder: Path, classifier: Classifier, original: Classifier, record: dict, bits: Bits | None) -> dict:
    """Write a model's folder, which transformers opens; gives its record.

    The model is read back: a weight outside the mask, or a statistic that was to be kept, has to have the bits of the
    original. Raises SalunError, and leaves nothing, where one differs.
    """
    with new_folder(folder) as partial:
        classifier.save(partial)
        saved = opened(str(partial), "cpu")
        record = record | {
            "changed": changed(saved, original, bits, record["run"]["keep_statistics"]),
            "digest_of_model": digest_of(partial),
            "libraries": {n: versions()[n] for n in LIBRARIES},
        }
        if outside := record["changed"]["outside"]:
            raise SalunError(f"{outside} weights outside the mask differ from the original's: {folder} is not kept.")
        write_atomic(partial / FILE, json.dumps(seals.sealed(record), indent=2, ensure_ascii=False) + "\n")
        write_atomic(partial / "README.md", card(record))
    return record


def read(folder: Path, device: str) -> tuple[dict, Classifier]:
    """The record and the model of a folder. Raises SalunError where either was changed since it was written."""
    record = seals.read(folder / FILE, SHAPE, ADVICE)
    if record["digest_of_model"] != digest_of(folder):
        raise SalunError(f"The model in {folder} is not the one of its record. {ADVICE}")
    return record, opened(str(folder), device)


def changed(saved: Classifier, original: Classifier, bits: Bits | None, keep_statistics: bool) -> dict[str, int]:
    """How many values have other bits than the original's: weights inside the mask; outside it, weights and, with
    keep_statistics, the statistics of batch norm. And the size of the mask."""
    inside = outside = 0
    before = dict(original.net.named_parameters())
    for name, p in saved.net.named_parameters():
        differs = ~same_bits(p.detach(), before[name].detach().cpu())
        inside_mask = torch.ones_like(differs) if bits is None else bits[name]
        inside += int((differs & inside_mask).sum())
        outside += int((differs & ~inside_mask).sum())
    if keep_statistics:
        of_original = dict(original.net.named_buffers())
        outside += sum(int((~same_bits(b, of_original[n].cpu())).sum()) for n, b in saved.net.named_buffers())
    total = sum(p.numel() for p in before.values())
    return {"inside": inside, "outside": outside, "mask": total if bits is None else kept(bits)[0], "weights": total}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one dtype have the same bits: bool of their shape. NaN equals itself, 0 is not -0."""
    kind = {4: torch.int32, 8: torch.int64, 2: torch.int16, 1: torch.uint8}[a.dtype.itemsize]
    return a.contiguous().view(kind) == b.contiguous().view(kind)


def card(record: dict) -> str:
    """The README.md of an unlearned model."""
    run, changes = record["run"], record["changed"]
    settings = in_words(run["settings"], {name: [count] for name, count in record["used"].items()})
    statistics = "kept" if run["keep_statistics"] else "those of the training"
    return f"""---
library_name: transformers
pipeline_tag: image-classification
tags:
- machine-unlearning
- {run["method"]}
---

# {text(record["model"])} without {text(run["forget"])} of {text(record["data"])}

The method {code(run["method"])} ({record["summary"]}) of salun-sd made this image classifier forget
{record["sizes"]["forget"]:,} images, and retain {record["sizes"]["retain"]:,}.

| | |
| --- | --- |
| settings | {settings}, seed {run["seed"]} |
| weights in the mask | {changes["mask"]:,} of {changes["weights"]:,} |
| weights changed inside the mask, outside it | {changes["inside"]:,}, {changes["outside"]} |
| statistics of batch norm | {statistics} |

How near it is to a model that never saw these images is in the report of the run. A classifier of salun-sd's own
architecture opens elsewhere with `trust_remote_code=True`: `small_resnet.py` lies beside the weights.
"""
