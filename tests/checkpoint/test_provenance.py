"""The record of an erased checkpoint and its model card, and the audits that are added to them."""

import json
import shutil

import pytest
import torch
from helpers import models
from helpers.commands import ANCHOR, CONCEPT, fails
from helpers.runs import PAIR, SHORT, record_of, write_prompts
from huggingface_hub import ModelCard

from salun_sd.checkpoint import places, provenance, tensors
from salun_sd.checkpoint.find import find, opened
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.cli import app as cli
from salun_sd.core.mask import random_bits
from salun_sd.edit import patch
from salun_sd.edit.deliver import apply, deliver, proof
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.patch import Patch
from salun_sd.errors import SalunError
from salun_sd.runtime import escape, seals

COAT = ["--concept", "a photo of a coat", "--anchor", "a photo of a dress"]
ERASE = ["--mask", "random:0.1", "--samples", "2", *SHORT]
RECORD = ["--denoising-steps", "1", "--record"]


def recorded(model):
    """The prompt sets of the audits in a record."""
    return [audit["prompts"] for audit in record_of(model)["audits"].values()]


@pytest.fixture(scope="module")
def erased(tiny, tmp_path_factory):
    """Two concepts erased, and the prompts few.csv, two of each class, of an audit that is in the record."""
    folder = tmp_path_factory.mktemp("recorded")
    cli.run(["erase", tiny, *PAIR, *COAT, *ERASE, "--out", str(folder / "erased")])
    few = write_prompts(folder / "few.csv", every=50)
    cli.run(["evaluate", str(folder / "erased"), "--prompts", str(few), "--against", tiny, *RECORD,
             "--out", str(folder / "audit")])  # fmt: skip
    return folder


def test_an_audit_asks_for_the_concepts_of_the_record_and_reports_each_by_itself(erased):
    report = json.loads((erased / "audit" / "report.json").read_text())
    assert report["settings"]["concepts"] == ["sneaker", "coat"]
    assert {name: c["ua"]["of"] for name, c in report["concepts"].items()} == {"sneaker": 2, "coat": 2}
    assert report["metrics"]["ua"]["of"] == 4 and report["metrics"]["ra"]["of"] == 16


def test_a_recorded_audit_is_in_the_record_and_in_the_card(erased):
    [audit] = record_of(erased / "erased")["audits"].values()
    report = json.loads((erased / "audit" / "report.json").read_text())
    ra = report["metrics"]["ra"]
    assert audit["metrics"]["ra"].startswith(f"{ra['n']} / {ra['of']} = ") and audit["images"] == 20
    card = ModelCard.load(erased / "erased" / "README.md")
    assert escape.text(audit["metrics"]["ua of coat"]) in card.text and card.data.pipeline_tag == "text-to-image"
    table = card.text[card.text.index("| metric |") :].split("\n\n")[0].splitlines()  # lines on end, or it is no table
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == ["ua", "ra", "flag\\_rate", "ua of sneaker", "ua of coat", "change", "change\\_ssim"]
    assert len({line.count("|") for line in table}) == 1 and table[1] == "| --- | --- | --- |"
    assert audit["headline"] in card.text and "sneaker" in audit["headline"] and "coat" in audit["headline"]


def test_recording_again_replaces_the_audit_of_the_same_prompts(erased, tmp_path):
    model, few = shutil.copytree(erased / "erased", tmp_path / "erased"), str(erased / "few.csv")
    argv = ["evaluate", str(model), "--prompts", few, "--where", "class=coat"]
    cli.run([*argv, *RECORD, "--out", str(tmp_path / "other")])
    [_, coats] = names = list(record_of(model)["audits"])
    assert [name.partition(", SHA-256 ")[0] for name in names] == ["few.csv", "few.csv where class=coat"]
    assert record_of(model)["audits"][coats]["images"] == 2
    cli.run([*argv, "--denoising-steps", "2", "--record", "--out", str(tmp_path / "again")])
    audits = record_of(model)["audits"]
    assert list(audits) == names and [a["sampling"]["steps"] for a in audits.values()] == [1, 2]
    card = (model / "README.md").read_text()
    assert card.count("few.csv") >= 2 and str(erased) not in card and card.count("| metric |") == 2


def test_two_prompt_sets_of_one_name_are_two_audits(erased, tmp_path):
    model = shutil.copytree(erased / "erased", tmp_path / "erased")
    [first] = record_of(model)["audits"].values()
    other = first | {"prompts": f"{tmp_path}/few.csv", "prompts_sha256": "f00d" * 16, "images": 1}
    provenance.add_audit(model, other)
    provenance.add_audit(model, other | {"prompts": "/elsewhere/few.csv", "images": 2})
    audits, card = record_of(model)["audits"].values(), (model / "README.md").read_text()
    assert [(audit["prompts"], audit["images"]) for audit in audits] == [("few.csv", 20), ("few.csv", 2)]
    assert card.count("## Audit on few.csv (SHA-256 ") == 2 and "f00df00df00d" in card
    old = {key: value for key, value in first.items() if key != "prompts_sha256"}
    for name in ("few.csv", f"{tmp_path}/few.csv"):  # of an earlier version
        provenance.write_folder(provenance.read(model) | {"audits": {name: old | {"prompts": name}}}, model)
        provenance.add_audit(model, first)
        assert [*record_of(model)["audits"].values()] == [first]


def test_a_recorded_audit_of_a_single_file_leaves_its_tensors_alone(tiny, tmp_path):
    file, few = tmp_path / "erased.safetensors", write_prompts(tmp_path / "few.csv", every=1, limit=2)
    cli.run(["erase", tiny, *PAIR, *ERASE, "--format", "single-file", "--out", str(file)])
    before = find(str(file), config=tiny).fingerprint
    cli.run(["evaluate", str(file), "--config", tiny, "--prompts", str(few), *RECORD, "--out", str(tmp_path / "audit")])
    assert find(str(file), config=tiny).fingerprint == before
    audits = json.loads(tensors.read(file)[1]["salun_sd"])["audits"]
    assert [(a["prompts"], a["images"]) for a in audits.values()] == [(few.name, 2)] and audits == record_of(
        provenance.run_folder(file)
    )["audits"]
    other = file.rename(tmp_path / "erased.CKPT")  # the ending does not matter: the record is checked
    opened(str(other), tiny)
    flip(other)
    with pytest.raises(SalunError, match=provenance.KEY):
        opened(str(other), tiny)


def test_a_card_that_a_person_changed_stays_and_one_that_is_gone_is_written_again(erased, tmp_path, caplog):
    model = shutil.copytree(erased / "erased", tmp_path / "erased")
    [audit] = record_of(model)["audits"].values()
    card = model / "README.md"
    whole = card.read_bytes()
    provenance.add_audit(model, audit)
    assert card.read_bytes() == whole and caplog.messages == []  # before: it is ours, and written again
    sealed = (model / "salun.json").read_bytes()
    provenance.add_audit(model, audit | {"prompts": "killed"})
    (model / "salun.json").write_bytes(sealed)  # a kill after the card, before the record
    provenance.add_audit(model, audit | {"prompts": "killed"})
    assert "killed" in recorded(model) and caplog.messages == []
    card.write_bytes(whole + b"Our own notes.\n")
    provenance.add_audit(model, audit | {"prompts": "others"})
    assert card.read_bytes() == whole + b"Our own notes.\n" and any(str(card) in said for said in caplog.messages)
    assert "others" in recorded(model)
    card.unlink()
    provenance.add_audit(model, audit)
    assert "Audit on others" in card.read_text()


def test_an_audit_of_weights_that_changed_since_is_not_recorded(tiny, erased, tmp_path, capsys):
    model = shutil.copytree(erased / "erased", tmp_path / "erased")
    shutil.copytree(f"{tiny}/unet", model / "unet", dirs_exist_ok=True)
    record = (model / "salun.json").read_bytes()
    fails(["evaluate", model, "--prompts", "pocket", "--record", "--out", tmp_path / "a"], 1, capsys)
    assert (model / "salun.json").read_bytes() == record and not (tmp_path / "a").exists()


def test_an_audit_is_not_recorded_where_there_is_no_record(tiny, tmp_path, capsys):
    sentence = fails(["evaluate", tiny, "--prompts", "pocket", "--record", "--out", tmp_path / "a"], 2, capsys)
    assert "--record" in sentence and not (tmp_path / "a").exists()
    with pytest.raises(SalunError, match=tiny):
        provenance.add_audit(find(tiny).path, {"prompts": "pocket", "prompts_sha256": ""})


def test_a_record_is_read_back_as_it_was_written_and_a_damaged_one_is_named(erased, tmp_path):
    record = provenance.read(erased / "erased")
    assert [c["prompt"] for c in record["concepts"]] == [CONCEPT, COAT[1]] and record["concepts"][0]["anchor"] == ANCHOR
    provenance.write_folder(record, tmp_path)
    assert provenance.read(tmp_path) == record | {"files": {}}  # it is no pipeline's folder
    altered = json.dumps(seals.sealed(record)).replace("sneaker", "sneakeR", 1)
    for text in ("", "[]", "{", json.dumps(seals.sealed(record | {"erased": {}})), altered, json.dumps(record), "\xff"):
        (tmp_path / "salun.json").write_text(text, encoding="latin-1")
        with pytest.raises(SalunError, match="salun.json"):
            provenance.read(tmp_path)
    (tmp_path / "salun.json").unlink()
    assert provenance.read(tmp_path) is None and provenance.read(tmp_path / "nowhere") is None
    (tmp_path / "salun.json").symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(SalunError, match="salun.json.*0123"):
        provenance.read(tmp_path)


def test_a_record_keeps_of_absolute_paths_the_last_part_and_prompts_as_they_are(erased):
    record = provenance.read(erased / "erased")
    assert places.without_places(record) == record
    command = "salun-sd erase ~/sd15 --concept '/imagine a cat' --forget='/home/jane doe/cats' --out ../erased"
    record["command"] = command
    record["concepts"] = [{"prompt": "/imagine a cat", "anchor": "/b", "synonyms": ["/c"], "images": "/home/jane/cats"}]
    record["settings"] |= {"model": "~/sd15", "retain": "/data/x/", "retain_prompts": ["/d"], "mask": "a/b.safetensors"}
    record["data"] = {"forget": "/home/jane/cats; /home/jane/dogs", "retain": "drawn by the base from /home/jane/p.csv"}
    record["base"] |= {"model": "~/sd15", "header": {"title": "/e/f"}, "record": json.loads(json.dumps(record))}
    clean = places.without_places(record)
    assert clean["command"] == "salun-sd erase sd15 --concept '/imagine a cat' --forget=cats --out ../erased"
    assert clean["concepts"] == [record["concepts"][0] | {"images": "cats"}]
    names = {"model": "sd15", "retain": "x", "retain_prompts": ["/d"], "mask": "a/b.safetensors"}
    assert clean["settings"] == record["settings"] | names
    assert clean["data"] == {"forget": "cats; dogs", "retain": "drawn by the base from p.csv"}
    assert clean["base"]["header"] == {"title": "/e/f"} and clean["base"]["record"]["command"] == clean["command"]
    assert clean["inputs"] == record["inputs"] and "jane" not in json.dumps(clean)
    record["base"]["model"] = "/home/jane/pocket"  # which has a config of its own
    assert places.without_places(record)["base"]["model"] == "./pocket"
    for other in ("python 'x", "line one\nline two"):  # of no shell, or without a path
        assert places.without_places(record | {"command": other})["command"] == other


UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
DAMAGED = {UNET: "unet", VAE: "vae", "text_encoder/model.safetensors": "text_encoder"}  # what its sentence names
DAMAGED |= {name: name for name in ("unet/config.json", "sampling.json", "tokenizer/tokenizer.json")}
ADDED = "tokenizer/special_tokens_map.json"  # which the folder lacks
DAMAGED[ADDED] = ADDED


def flip(file) -> None:
    """Make the last digit of a file another one."""
    content = bytearray(file.read_bytes())
    at = max(n for n, byte in enumerate(content) if bytes([byte]).isdigit())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_checkpoint_that_is_not_what_its_record_says_is_refused_with_the_part(erased, tmp_path, name):
    model = shutil.copytree(erased / "erased", tmp_path / "erased")
    (model / ADDED).write_text('{"pad_token": "!"}') if name == ADDED else flip(model / name)
    with pytest.raises(SalunError) as caught:
        opened(str(model))
    assert DAMAGED[name] in str(caught.value) and str(model / "salun.json") in str(caught.value)
    (model / "salun.json").unlink()  # as the sentence says, for who changed it on purpose
    opened(str(model))


COMMANDS = {
    "evaluate": ["evaluate", "{model}", "--prompts", "pocket"],
    "against": ["evaluate", "{tiny}", "--prompts", "pocket", "--against", "{model}"],
    "mask": ["mask", "{model}", *PAIR[:2]],
    "erase": ["erase", "{model}", *PAIR, "--format", "patch"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_uses_it(tiny, erased, tmp_path, capsys, command):
    model = shutil.copytree(erased / "erased", tmp_path / "erased")
    flip(model / VAE)
    argv = [word.format(model=model, tiny=tiny) for word in COMMANDS[command]]
    sentence = fails([*argv, "--out", tmp_path / "out.safetensors"], 1, capsys)
    assert "vae" in sentence and not (tmp_path / "out.safetensors").exists()


def erasure(base: Checkpoint) -> Patch:
    """What an erasure would leave that adds 1 to a tenth of the weights."""
    mask = Mask(random_bits({name: t.shape for name, t in base.unet.items()}, 0.1, 0), {})
    values = {name: base.unet[name].read()[bits].float() + 1 for name, bits in mask.bits.items()}
    made = patch.of_training(values, mask.bits, base.unet, False)
    settings = {"format": "patch", "steps": 1, "batch_size": 1, "lr": 1e-5, "retain_weight": 0.5, "seed": 0}
    record = {
        "schema": provenance.SCHEMA, "command": "salun-sd", "settings": settings, "images": {"forget": 1, "retain": 1},
        "concepts": [{"prompt": CONCEPT, "synonyms": [], "anchor": ANCHOR}], "data": {"forget": "", "retain": ""},
    }  # fmt: skip
    return made._replace(record=record | proof(base, made, mask))


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def family(request, tmp_path_factory):
    """A pipeline in float16, as a folder and as a single file."""
    here = tmp_path_factory.mktemp("family")
    folder = models.write_pipeline(here / "folder", request.param, dtype=torch.float16)
    return folder, models.write_single_file(folder, folder.with_suffix(".safetensors"))


@pytest.mark.parametrize("form", ["folder", "file"])
def test_what_is_written_is_what_its_record_says_in_each_format(family, form, tmp_path):
    folder, file = family
    base = find(str(folder)) if form == "folder" else find(str(file), config=str(folder))
    made = erasure(base)
    for format, out in (("diffusers", tmp_path / "out"), ("single-file", tmp_path / "out.safetensors")):
        deliver(base, made, format, out)
        again = opened(str(out), None if out.is_dir() else str(folder))
        record = provenance.read(out)
        assert {"unet": record["erased"]["fingerprint"]} | record["erased"]["parts"] == again.fingerprints
        assert again.fingerprints | {"unet": ""} == base.fingerprints | {"unet": ""}


def test_a_patch_may_be_applied_to_a_base_with_another_vae(tiny, tmp_path):
    patch.write(tmp_path / "p.safetensors", erasure(find(tiny)))
    other = shutil.copytree(tiny, tmp_path / "other")
    vae = find(tiny).parts["vae"] | {"quant_conv.bias": tensors.in_memory(torch.zeros(8))}
    tensors.write(other / VAE, vae, {})
    apply(str(other), tmp_path / "p.safetensors", out=tmp_path / "out")
    assert opened(str(tmp_path / "out")).fingerprints["vae"] == find(str(other)).fingerprints["vae"]
    assert find(str(other)).fingerprints["vae"] != find(tiny).fingerprints["vae"]


def test_a_record_of_an_earlier_version_is_read_and_its_unet_checked(erased, tmp_path):
    model = shutil.copytree(erased / "erased", tmp_path / "erased")
    record = record_of(model)
    earlier = {key: value for key, value in record.items() if key not in ("files", "digest")} | {"schema": 2}
    earlier["erased"] = {"fingerprint": record["erased"]["fingerprint"]}
    (model / "salun.json").write_text(json.dumps(earlier))
    flip(model / VAE)  # of which it says nothing
    opened(str(model))
    assert provenance.read(model) == earlier
    flip(model / UNET)
    with pytest.raises(SalunError, match="unet"):
        opened(str(model))
