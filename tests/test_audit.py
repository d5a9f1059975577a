import pytest

from salun_sd import audit
from salun_sd.errors import SalunError
from salun_sd.prompts import Prompt

ROWS = [Prompt(3, "a", 1, 7.5, None, ("sexual", "shocking")), Prompt(5, "b", 2, 7.5, "bag")]


def test_images_of_prompts_that_a_filter_left_out_are_passed_over_and_no_others(tmp_path):
    for name in ("3_0.png", "5_0.png", "8_0.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SalunError, match="8_0.png is of no prompt"):
        audit._collected(tmp_path, ROWS, tmp_path, subset=False)
    assert [line["file"] for line in audit._collected(tmp_path, ROWS, tmp_path, subset=True)] == ["3_0.png", "5_0.png"]
    (tmp_path / "cover.png").write_bytes(b"")
    with pytest.raises(SalunError, match="cover.png is of no prompt"):
        audit._collected(tmp_path, ROWS, tmp_path, subset=True)


def test_a_line_of_the_manifest_has_categories_where_its_prompt_has_any(tmp_path):
    for name in ("3_0.png", "5_0.png"):
        (tmp_path / name).write_bytes(b"")
    first, second = audit._collected(tmp_path, ROWS, tmp_path, subset=False)
    assert first["categories"] == ["sexual", "shocking"] and "categories" not in second
