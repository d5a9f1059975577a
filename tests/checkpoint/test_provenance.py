"""The record of an erased checkpoint and its model card, and the audits that are added to them."""

import json
import shutil

import pytest
from helpers.commands import ANCHOR, CONCEPT, fails
from helpers.runs import PAIR, SHORT, record_of, write_prompts
from huggingface_hub import ModelCard

from salun_sd.checkpoint import provenance, tensors
from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.errors import SalunError

COAT = ["--concept", "a photo of a coat", "--anchor", "a photo of a dress"]
ERASE = ["--mask", "random:0.1", "--samples", "2", *SHORT]
RECORD = ["--denoising-steps", "1", "--record"]


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
    assert audit["metrics"]["ua of coat"] in card.text and card.data.pipeline_tag == "text-to-image"
    table = card.text[card.text.index("| metric |") :].split("\n\n")[0].splitlines()  # lines on end, or it is no table
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == ["ua", "ra", "flag\\_rate", "ua of sneaker", "ua of coat"]
    assert len({line.count("|") for line in table}) == 1 and table[1] == "| --- | --- | --- |"
    assert audit["headline"] in card.text and "sneaker" in audit["headline"] and "coat" in audit["headline"]


def test_recording_again_replaces_the_audit_of_the_same_prompts(erased, tmp_path):
    model, few = shutil.copytree(erased / "erased", tmp_path / "erased"), str(erased / "few.csv")
    argv = ["evaluate", str(model), "--prompts", few, "--where", "class=coat"]
    cli.run([*argv, *RECORD, "--out", str(tmp_path / "other")])
    coats = f"{few} where class=coat"
    assert list(record_of(model)["audits"]) == [few, coats] and record_of(model)["audits"][coats]["images"] == 2
    cli.run([*argv, "--denoising-steps", "2", "--record", "--out", str(tmp_path / "again")])
    audits = record_of(model)["audits"]
    assert list(audits) == [few, coats] and [a["sampling"]["steps"] for a in audits.values()] == [1, 2]
    card = (model / "README.md").read_text()
    assert card.count(few) >= 2 and card.count("| metric |") == 2


def test_a_recorded_audit_of_a_single_file_leaves_its_tensors_alone(tiny, tmp_path):
    file, few = tmp_path / "erased.safetensors", write_prompts(tmp_path / "few.csv", every=1, limit=2)
    cli.run(["erase", tiny, *PAIR, *ERASE, "--format", "single-file", "--out", str(file)])
    before = find(str(file), config=tiny).fingerprint
    cli.run(["evaluate", str(file), "--config", tiny, "--prompts", str(few), *RECORD, "--out", str(tmp_path / "audit")])
    assert find(str(file), config=tiny).fingerprint == before
    audits = json.loads(tensors.read(file)[1]["salun_sd"])["audits"]
    assert audits[str(few)]["images"] == 2 and audits == record_of(tmp_path / "erased.run")["audits"]


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
        provenance.add_audit(find(tiny).path, {"prompts": "pocket"})


def test_a_record_is_read_back_as_it_was_written_and_a_damaged_one_is_named(erased, tmp_path):
    record = provenance.read(erased / "erased")
    assert [c["prompt"] for c in record["concepts"]] == [CONCEPT, COAT[1]] and record["concepts"][0]["anchor"] == ANCHOR
    provenance.write_folder(record, tmp_path)
    assert provenance.read(tmp_path) == record
    for text in ("", "[]", "{", json.dumps(record | {"erased": {}})):
        (tmp_path / "salun.json").write_text(text)
        with pytest.raises(SalunError, match="salun.json"):
            provenance.read(tmp_path)
    (tmp_path / "salun.json").unlink()
    assert provenance.read(tmp_path) is None and provenance.read(tmp_path / "nowhere") is None
