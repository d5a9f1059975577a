"""push: what it sends to a stand-in for the hub, and what it refuses to send."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from helpers.commands import CONCEPT, fails, files_in
from helpers.hub import standing_in
from helpers.runs import PAIR

import salun_sd
from salun_sd.checkpoint import provenance
from salun_sd.cli import app as cli

NAME = "org/without-sneakers"


@pytest.fixture(scope="module")
def erased(tiny, tmp_path_factory):
    """patch.safetensors, with its run beside it; folder and file.safetensors, which it makes."""
    place = tmp_path_factory.mktemp("push")
    patch = place / "patch.safetensors"
    cli.run(["erase", tiny, *PAIR, "--samples", "2", "--steps", "1", "--mask", "none", "--format", "patch", "--out",
             str(patch)])  # fmt: skip
    salun_sd.apply(tiny, patch, out=place / "folder")
    salun_sd.apply(tiny, patch, out=place / "file.safetensors", format="single-file")
    return place


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, in the place of the hub."""
    constants = huggingface_hub.constants
    with standing_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "writes")
        yield hub


def content_of(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def test_a_folder_is_sent_whole_and_nothing_beside_it(erased, hub, capsys):
    cli.run(["push", str(erased / "folder"), NAME])
    [repo] = hub.repos.values()
    assert repo.private and len(repo.commits) == 1
    assert repo.files == content_of(erased / "folder") | {".gitattributes": b""}
    assert f"{hub.url}/{NAME}" in capsys.readouterr().out
    sent = len(hub.objects)
    hub.calls.clear()
    (erased / "folder" / ".hidden").write_text("x")
    salun_sd.push(erased / "folder", NAME)  # again: the large files are known
    assert len(hub.objects) == sent and not any(call.startswith("PUT") for call in hub.calls)
    assert ".hidden" not in repo.files


@pytest.mark.parametrize("name", ["file.safetensors", "patch.safetensors"])
def test_a_file_goes_with_its_card(name, erased, hub, caplog):
    file = erased / name
    salun_sd.push(file, NAME, public=True, config=None if "patch" in name else str(erased / "folder"))
    repo = hub.repos[NAME]
    card = repo.files.pop("README.md")
    assert not repo.private and repo.files == {".gitattributes": b"", name: file.read_bytes()}
    beside = erased / f"{name}.run" / "README.md"
    assert card == beside.read_bytes() if "patch" in name else CONCEPT.encode() in card and not beside.exists()
    assert ("is a patch" in caplog.text) == ("patch" in name)


def test_a_dry_run_lists_what_would_be_sent_and_asks_nobody(erased, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    pushed = salun_sd.push(erased / "folder", NAME, dry_run=True)
    assert pushed.url is None
    assert pushed.files == {name: len(content) for name, content in content_of(erased / "folder").items()
                            if name != ".hidden"}  # fmt: skip
    cli.run(["push", str(erased / "folder"), NAME, "--dry-run"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in pushed.files) and hub.calls == []


def test_what_is_sent_names_no_folder_of_this_machine(tiny, erased, hub):
    salun_sd.push(erased / "folder", NAME)
    files = hub.repos[NAME].files
    for text in (files["README.md"].decode(), files["salun.json"].decode()):
        assert str(erased) not in text and str(Path(tiny).parent) not in text
        assert "patch.safetensors" in text and Path(tiny).name in text
    for name in ("patch.safetensors", "file.safetensors"):
        assert str(erased).encode() not in (erased / name).read_bytes()


def test_a_config_names_no_folder_of_this_machine(tiny, erased, hub, tmp_path, capsys):
    base, place = shutil.copytree(tiny, tmp_path / "base"), b'/home/jane doe/models/a \\"base\\"'
    (base / "tokenizer" / "tokenizer_config.json").write_bytes(b'{"name_or_path": "%s/", "n": "/w"}' % place)
    config = base / "unet" / "config.json"
    whole = config.read_bytes()
    config.write_bytes(whole.replace(b"{", b'{"_name_or_path": "%s",' % place, 1))
    folder = tmp_path / "folder"
    salun_sd.apply(base, erased / "patch.safetensors", out=folder)
    now = (folder / "unet" / "config.json").read_bytes()
    assert now == whole.replace(b"{", b'{"_name_or_path": "a \\"base\\"",', 1)
    text = (folder / "tokenizer" / "tokenizer_config.json").read_bytes()
    assert text == b'{"name_or_path": "a \\"base\\"", "n": "/w"}'
    record = provenance.read(folder)
    record["base"]["header"] = {"ss_train_dir": "/home/jane"}  # the base's own texts are no places
    provenance.write_folder(record, folder)
    salun_sd.push(folder, NAME, dry_run=True)
    shutil.copy(config, folder / "unet")  # as an earlier version copied it
    provenance.write_folder(provenance.read(folder), folder)
    said = fails(["push", folder, NAME], 2, capsys)
    assert f"{folder / 'unet' / 'config.json'}" in said and "--out" in said and hub.calls == []


def test_a_record_of_an_earlier_version_that_names_folders_is_not_sent(erased, hub, tmp_path, capsys):
    folder = shutil.copytree(erased / "folder", tmp_path / "folder")
    record = provenance.read(folder)
    record["base"]["model"] = "/home/jane doe/models/base"
    provenance.write_folder(record, folder)
    said = fails(["push", folder, NAME], 2, capsys)
    assert "/home/jane doe/models/base" in said and "--record" in said and hub.calls == []
    audit = {"prompts": "/home/jane doe/few.csv where class=coat", "prompts_sha256": "", "images": 1, "metrics": {},
             "against": None, "sampling": {"samples": 1, "steps": 1}}  # fmt: skip
    provenance.add_audit(folder, audit)
    salun_sd.push(folder, NAME)
    sent = hub.repos[NAME].files
    [audit] = json.loads(sent["salun.json"])["audits"].values()
    assert audit["prompts"] == "few.csv where class=coat"
    assert not any(b"jane" in sent[name] for name in ("salun.json", "README.md"))


@pytest.mark.parametrize("name", ["org", "a/b/c", "org/", "org/a--b", "org/ü", "https://huggingface.co/org/name"])
def test_a_name_is_one_of_the_hubs(name, erased, hub, capsys):
    assert name in fails(["push", erased / "folder", name], 2, capsys) and hub.calls == []


@pytest.mark.parametrize("odd", ["mask.safetensors", "images/0_0.png", "run.py", "unet/losses.jsonl",
                                 "unet/diffusion_pytorch_model.non_ema.safetensors"])  # fmt: skip
def test_what_is_not_of_the_checkpoint_is_named_and_nothing_is_sent(odd, erased, hub, tmp_path, capsys):
    folder = shutil.copytree(erased / "folder", tmp_path / "folder")
    (folder / odd).parent.mkdir(exist_ok=True)
    shutil.copy(erased / "patch.safetensors.run" / "mask.safetensors", folder / odd)
    assert odd in fails(["push", folder, NAME], 2, capsys) and hub.calls == []


def test_what_was_not_erased_or_is_damaged_is_not_sent(tiny, erased, hub, tmp_path, capsys):
    assert "mask" in fails(["push", erased / "patch.safetensors.run" / "mask.safetensors", NAME], 2, capsys)
    assert "record" in fails(["push", tiny, NAME], 2, capsys)
    assert "nowhere" in fails(["push", tmp_path / "nowhere", NAME], 2, capsys)
    folder = shutil.copytree(erased / "folder", tmp_path / "folder")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(
        (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    fails(["push", folder, NAME], 1, capsys)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "diffusion_pytorch_model.safetensors" in fails(["push", folder, NAME], 1, capsys)
    assert hub.repos == {}


@pytest.mark.parametrize(("token", "word"), [("reads", "read"), ("elsewhere", NAME), ("unknown", "HF_TOKEN"),
                                             (None, "HF_TOKEN")])  # fmt: skip
def test_a_token_without_rights_is_said(token, word, erased, hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert word in fails(["push", erased / "folder", NAME], 1, capsys) and hub.repos == {}


def test_a_repository_with_other_content_or_visibility_stays_as_it_is(erased, hub, capsys):
    salun_sd.push(erased / "folder", NAME)
    repo = hub.repos[NAME]
    assert "--public" in fails(["push", erased / "folder", NAME, "--public"], 2, capsys)
    assert "model_index.json" in fails(["push", erased / "patch.safetensors", NAME], 2, capsys)
    repo.files["unet/diffusion_pytorch_model.safetensors"] = b"of another"
    assert "unet/diffusion_pytorch_model.safetensors" in fails(["push", erased / "folder", NAME], 2, capsys)
    assert len(repo.commits) == 1


def test_without_a_network_it_says_so(erased, hub, monkeypatch, capsys):
    hub.shutdown()
    hub.server_close()
    assert hub.url in fails(["push", erased / "folder", NAME], 1, capsys)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline" in fails(["push", erased / "folder", NAME], 1, capsys)


@pytest.mark.slow
def test_the_numbers_of_an_audit_go_with_the_card(erased, hub, caplog, tmp_path):
    salun_sd.push(erased / "folder", NAME, dry_run=True)
    assert "--record" in caplog.text
    caplog.clear()
    folder = shutil.copytree(erased / "folder", tmp_path / "folder")
    salun_sd.evaluate(str(folder), prompts="pocket", limit=1, denoising_steps=1, record=True, out=tmp_path / "audit")
    salun_sd.push(folder, NAME)
    files = hub.repos[NAME].files
    assert json.loads(files["salun.json"])["audits"] and b"## Audit on pocket" in files["README.md"]
    assert "The card has no audit" not in caplog.text
