import json

import pytest
from PIL import Image

from salun_sd import checkpoint, generate
from salun_sd.errors import UsageError
from salun_sd.prompts import Prompt

ROWS = [Prompt(i, text, 50 + i, g, None) for i, (text, g) in enumerate(
    [("a photo of a bag", 3.0), ("a sneaker", 3.0), ("", 1.0), ("a coat", 5.0), ("a dress", 3.0)])]  # fmt: skip


def draw(pipeline, rows, out, *, steps=2, samples=1, identity="f"):
    return list(generate.draw(lambda: pipeline, rows, out, steps=steps, samples=samples, identity=identity))


def contents(folder):
    return {f.name: f.read_bytes() for f in sorted((folder / "images").iterdir())}


@pytest.fixture(scope="module")
def whole(pocket, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert sorted(draw(pocket, ROWS, out)) == [(p, 0) for p in ROWS]
    return contents(out)


def test_an_image_is_the_same_bytes_in_any_order_subset_and_resumed_run(pocket, whole, tmp_path):
    draw(pocket, ROWS[::-1], tmp_path / "reversed")
    draw(pocket, ROWS[3:4], tmp_path / "one")
    draw(pocket, ROWS[:2], tmp_path / "resumed")
    (tmp_path / "resumed" / "images" / "0_0.png").write_bytes(whole["0_0.png"][:-20])  # half-written by someone
    draw(pocket, ROWS, tmp_path / "resumed")
    assert contents(tmp_path / "reversed") == contents(tmp_path / "resumed") == whole
    assert contents(tmp_path / "one") == {"3_0.png": whole["3_0.png"]}
    assert len(set(whole.values())) == len(ROWS)


def test_the_number_of_images_in_a_pass_changes_no_more_than_rounding(pocket, whole, tmp_path):
    (tmp_path / "x.png").write_bytes(whole["1_0.png"])
    for size in (1, 5):
        [image] = generate.sample(pocket, [(ROWS[1].text, 51)], 3.0, 2, size)
        far = max(abs(a - b) for a, b in zip(image.tobytes(), Image.open(tmp_path / "x.png").tobytes(), strict=True))
        assert far <= 1  # of 255 grey levels


def test_several_images_a_prompt_differ_and_the_first_is_the_prompts_own(pocket, whole, tmp_path):
    draw(pocket, ROWS[:2], tmp_path, samples=3)
    drawn = contents(tmp_path)
    assert drawn["0_0.png"] == whole["0_0.png"] and len(set(drawn.values())) == len(drawn) == 6


def test_nothing_is_drawn_twice(pocket, tmp_path):
    draw(pocket, ROWS[:1], tmp_path)
    before = (tmp_path / "images" / "0_0.png").stat().st_mtime_ns
    assert draw(None, ROWS[:1], tmp_path) == [(ROWS[0], 0)]  # no model is asked
    assert (tmp_path / "images" / "0_0.png").stat().st_mtime_ns == before


@pytest.mark.parametrize("other", [{"steps": 3}, {"identity": "g"}])
def test_images_of_other_settings_are_never_taken_for_ours(pocket, tmp_path, other):
    draw(pocket, ROWS[:1], tmp_path)
    with pytest.raises(UsageError, match="0_0.png was drawn by another model or with other settings"):
        draw(pocket, ROWS[:1], tmp_path, **other)


def test_every_pass_of_a_checkpoint_has_one_size(pocket):
    assert generate.images_per_pass(pocket.unet.config) == 32
    assert json.loads((checkpoint.POCKET / "sampling.json").read_text()) == {"steps": 25, "guidance": 3.0}
