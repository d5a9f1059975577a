"""What `compare --out` may write over: its own tables, and nothing else."""

import json
import os
import shutil

import pytest

from salun_sd.audit import forms
from salun_sd.audit.compare import Column, Table
from salun_sd.errors import UsageError

FORMS = sorted(forms.FORMS)


def tables(models: int = 2) -> list[Table]:
    columns = [Column(f"m{n}", f"m{n}", "report.json", False) for n in range(models)]
    return [Table("pocket", "0" * 64, False, columns, {"images": [7] * models}, {}, {}, {})]


@pytest.mark.parametrize("form", FORMS)
def test_tables_are_written_over_tables_of_the_same_form(form, tmp_path):
    out = tmp_path / f"tables{form}"
    forms.write(tables(3), out)
    three = out.read_bytes()
    forms.write(tables(2), out)
    assert out.read_bytes() != three and b"m1" in out.read_bytes() and b"m2" not in out.read_bytes()


OTHERS = {
    "an empty file": b"",
    "notes": b"# Audits\n\nmine\n",
    "a report": b'{\n  "schema": 4,\n  "salun_sd": "1",\n  "metrics": {}\n}\n',
    "a page of an audit": b"# Audit of `x` on `y`\n",
    "a model's index": b'{"_class_name": "StableDiffusionPipeline"}',
    "prompts": b"case_number,prompt,evaluation_seed,evaluation_guidance\n0,a,1,7.5\n",
    "no text": b"\xff\xfe\x00\x00" * 600,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_any_other_file_stays(content, form, tmp_path):
    out = tmp_path / f"mine{form}"
    out.write_bytes(content)
    for refused in (forms.check_place, lambda out: forms.write(tables(), out)):
        with pytest.raises(UsageError, match=f"{out}.*--out"):
            refused(out)
    assert out.read_bytes() == content and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_another_form_a_folder_and_a_pipe_stay(form, tmp_path):
    other = FORMS[FORMS.index(form) - 1]
    forms.write(tables(), tmp_path / f"tables{other}")
    shutil.copy(tmp_path / f"tables{other}", tmp_path / f"a{form}")
    (tmp_path / f"b{form}").mkdir()
    os.mkfifo(tmp_path / f"c{form}")  # reading it would wait for ever
    for name in "abc":
        with pytest.raises(UsageError, match="--out"):
            forms.check_place(tmp_path / f"{name}{form}")


def test_another_ending_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(UsageError, match=r"\.md, \.csv, \.json"):
        forms.check_place(tmp_path / "tables.txt")


def test_a_json_is_of_tables_whatever_its_version(tmp_path):
    out = tmp_path / "tables.json"
    out.write_text(json.dumps({"salun_sd": "0.0.1", "tables": []}))
    forms.check_place(out)
