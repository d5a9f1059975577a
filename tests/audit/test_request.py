"""What `evaluate --out` may write into: a folder with nothing in it but an audit."""

import pytest

import salun_sd
from salun_sd.errors import UsageError

FOREIGN = {
    "another program's page": {"report.html": "<!doctype html>\n<title>Test report</title>"},
    "another program's numbers": {"report.json": '{"tests": []}', "images": None},
    "another program's list": {"manifest.jsonl": '{"audio_filepath": "a.wav"}\n'},
    "notes": {"report.md": "# What I found\n"},
    "a file beside an audit": {"report.md": "# Audit of `x` on `y`\n", "thesis.tex": ""},
    "a folder for a file": {"report.json": None},
    "what attacks found": {"attacks": None},
    "other things of the base": {"report.md": "# Audit of `x` on `y`\n", "against": None, "against/photo.jpg": ""},
}
OWN = {
    "nothing": {},
    "images of a run that was stopped": {"images": None},
    "what a kill leaves of a write": {".report.json.0123456789abcdef.partial": "", ".report.json.ab.partial-lock": ""},
    "what a kill leaves of a pass": {"images": None, ".detections.0.partial": "", ".stamps-0": ""},
    "a whole audit": {
        "report.json": '{\n  "schema": 4',
        "report.html": "<title>Audit of x",
        "report.md": "# Audit of `",
    },
    "an audit with a damaged report": {"report.json": "x", "manifest.jsonl": '{"file": "images/0_0.png"}\n'},
}


def into(folder, files):
    """The words of `evaluate` into a folder with these files; None stands for a folder. No model is there to draw."""
    for name, text in files.items():
        (folder / name).mkdir() if text is None else (folder / name).write_text(text)
    with pytest.raises(UsageError) as e:
        salun_sd.evaluate("no/such/model", prompts="pocket", out=folder, images=None, size="no size")
    assert {str(p.relative_to(folder)) for p in folder.rglob("*")} == set(files)
    return str(e.value)


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_of_an_audit_stays(files, tmp_path):
    assert "--out" in into(tmp_path, files)


@pytest.mark.parametrize("files", OWN.values(), ids=OWN)
def test_an_audit_may_be_written_again(files, tmp_path):
    assert "--size" in into(tmp_path, files)  # what is checked next
