"""JSON from disk: the value, or an error that names the file and the key."""

import json

import pytest

from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.documents import parse_json, read_json

SHAPE = {"size": (int, [int], None), "name": str, "parts?": [{"rate": float}], "files?": {str: {"n": int}}}


@pytest.mark.parametrize("value", [
    {"size": 64, "name": "a"}, {"size": [8, 8], "name": ""}, {"size": None, "name": "é", "more": {"x": [1.5]}},
    {"size": 1, "name": "a", "parts": [{"rate": 1}, {"rate": 0.5}]},
    {"size": 1, "name": "a", "files": {"a?": {"n": 1}, "": {"n": 2}}}, {"size": 1, "name": "a", "files": {}},
])  # fmt: skip
def test_a_value_of_the_shape_is_given_as_it_is(value, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json", SHAPE) == value == parse_json(json.dumps(value), "a", SHAPE)


@pytest.mark.parametrize("text, named", [
    ('{"name": "a"}', "size"), ('{"size": true, "name": "a"}', "size"), ('{"size": "64", "name": "a"}', "size"),
    ('{"size": 1.5, "name": "a"}', "size"), ('{"size": [8, null], "name": "a"}', "size"),
    ('{"size": 1, "name": "a", "parts": [{"rate": 1}, {"rate": NaN}]}', "parts[1].rate"),
    ('{"size": 1, "name": "a", "parts": [{"rate": 1' + "0" * 400 + "}]}", "parts[0].rate"),
    ('{"size": 1, "name": "a", "files": {"x": {"n": 1}, "y?": {"n": "2"}}}', "files.y?.n"),
    ('{"size": 1, "name": "a", "parts": [{}]}', "parts[0].rate"), ("[1]", "object"), ("", "line 1"),
    ('{"size": 1, "name": "\\ud800"}', "ud800"), ('{"size": 1, "name": "a", "\\udfff": 0}', "udfff"),
    ("[" * 100_000, "deep"), ("[" * 200 + "]" * 200, "deep"), ('{"a":' * 100_000, "deep"), ("1" * 5000, "digits"),
])  # fmt: skip
def test_anything_else_is_an_error_that_names_the_file_and_the_key(text, named, tmp_path):
    (file := tmp_path / "odd.json").write_text(text)
    with pytest.raises(UsageError) as failure:
        read_json(file, SHAPE, UsageError)
    assert str(file) in str(failure.value) and named in str(failure.value)


def test_bytes_that_are_no_text_and_files_that_are_too_large_are_errors(tmp_path):
    (file := tmp_path / "odd.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(SalunError, match="UTF-8"):
        read_json(file)
    with pytest.raises(SalunError, match="MiB"):
        read_json(file, most=5)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")
