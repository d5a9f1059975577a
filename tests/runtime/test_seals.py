"""The digest that a JSON object carries of the rest of itself."""

import json

import pytest

from salun_sd.errors import SalunError
from salun_sd.runtime import seals

VALUE = {"b": [1, 2.5, None, {"ö": "“x”"}], "a": {"10": 1e-7, "9": True}}


def test_an_object_is_read_back_whatever_its_layout(tmp_path):
    file = tmp_path / "value.json"
    for written in (json.dumps(seals.sealed(VALUE), indent=2, ensure_ascii=False), seals.line(VALUE)):
        file.write_text(written)
        assert seals.read(file) == VALUE
    backwards = dict(reversed(seals.sealed(VALUE).items()))
    assert seals.unsealed(backwards, "here") == VALUE and seals.sealed(VALUE) == backwards


def test_keys_that_json_makes_text_of_are_sealed_as_text():
    numbered = {"counts": {2: 1, 10: 3}}
    assert seals.unsealed(json.loads(seals.line(numbered)), "here") == {"counts": {"2": 1, "10": 3}}


@pytest.mark.parametrize("key", ["a", "b", "digest"])
def test_what_was_changed_since_or_has_no_digest_is_named(tmp_path, key):
    file = tmp_path / "value.json"
    file.write_text(json.dumps(VALUE))
    with pytest.raises(SalunError, match=r"value\.json"):
        seals.read(file)
    for other in ("x", [1], {"10": 1e-7, "9": False}):
        file.write_text(json.dumps(seals.sealed(VALUE) | {key: other}))
        with pytest.raises(SalunError, match=r"value\.json"):
            seals.read(file)


def test_a_damaged_line_is_named_by_its_number_or_left_out(tmp_path, caplog):
    file, rows = tmp_path / "rows.jsonl", [{"n": n} for n in range(4)]
    lines = [seals.line(row) for row in rows]
    file.write_text("".join(lines))
    assert list(seals.read_lines(file, {"n": int})) == rows and not caplog.text
    for damaged in ('{"n": 2}\n', lines[2].replace('"n": 2', '"n": 3'), lines[2][:9] + "\n", '{"n": "2"}\n', "[]\n"):
        file.write_text("".join([*lines[:2], damaged, lines[3]]))
        with pytest.raises(SalunError, match=r"rows\.jsonl.*3"):
            list(seals.read_lines(file, {"n": int}))
        caplog.clear()
        assert list(seals.read_lines(file, {"n": int}, skip=True)) == [rows[0], rows[1], rows[3]]
        assert "rows.jsonl" in caplog.text
