import json
import logging
import shutil
import time
from functools import partial
from itertools import count, islice
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import POCKET
from salun_sd.draw import generate
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Row
from salun_sd.errors import UsageError
from salun_sd.runtime import bar
from salun_sd.runtime.stamps import Stamps, state_of

PROMPTS = [Prompt(i, text, 50 + i, guidance, size=size) for i, (text, guidance, size) in enumerate(
    [("a photo of a bag", 3.0, None), ("a sneaker", 7.5, None), ("", 1.0, None), ("a coat", 5.0, (24, 16)),
     ("a dress", 3.0, None), ("a bag", 0.0, (24, 16)), ("a bag", 9.0, (24, 16))])]  # fmt: skip
HOW = {"identity": "f", "scheduler": "DDIMScheduler", "steps": 2}


def wanted(prompts, out, samples=1) -> dict:
    return {
        out / generate.file_of(p, k): generate.row_of(p, k, (32, 32)) for p in prompts for k in range(samples)
    }  # fmt: skip


def draw(pipeline, prompts, out, *, samples=1, **how):
    return list(generate.draw(lambda: pipeline, wanted(prompts, out, samples), **HOW | how))


def contents(folder):
    return {f.name: f.read_bytes() for f in sorted((folder / "images").glob("*.png"))}


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(find(tiny))


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert sorted(draw(pipeline, PROMPTS, out)) == sorted(wanted(PROMPTS, out))
    return contents(out)


def test_an_image_is_the_same_bytes_alone_in_any_order_and_whatever_is_beside_it(pipeline, whole, tmp_path):
    draw(pipeline, PROMPTS[::-1], tmp_path / "reversed")
    assert contents(tmp_path / "reversed") == whole
    for prompt in (PROMPTS[1], PROMPTS[5]):
        draw(pipeline, [prompt], tmp_path / "alone")
    assert contents(tmp_path / "alone") == {name: whole[name] for name in ("1_0.png", "5_0.png")}
    assert len(set(whole.values())) == len(PROMPTS)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(pipeline, whole, tmp_path):
    """Killed between two images, with a PNG that some program left half-written and a partial file of ours."""
    images = tmp_path / "images"
    list(islice(generate.draw(lambda: pipeline, wanted(PROMPTS, tmp_path), **HOW), 3))
    assert len(contents(tmp_path)) == 3
    before = {f: f.stat().st_mtime_ns for f in images.glob("*.png")}
    (images / "2_0.png").write_bytes(whole["2_0.png"][:-20])
    (images / ".5_0.png.4194305.partial").write_bytes(whole["5_0.png"][:-20])  # of no process: pids end before
    draw(pipeline, PROMPTS, tmp_path)
    assert contents(tmp_path) == whole
    assert all(f.stat().st_mtime_ns == then for f, then in before.items() if f.name != "2_0.png")


def test_an_image_of_which_a_bit_is_flipped_is_drawn_again(whole, tmp_path, caplog):
    """Of every bit of the header, of the beginning of the text and of the end, and of some pixels."""
    (tmp_path / "images").mkdir()
    file, data, only = tmp_path / "images" / "0_0.png", whole["0_0.png"], wanted(PROMPTS[:1], tmp_path)
    for n in [*range(8 * 64), *range(8 * 64, 8 * len(data), 101), *range(8 * len(data) - 160, 8 * len(data))]:
        damaged = bytearray(data)
        damaged[n // 8] ^= 1 << n % 8
        file.write_bytes(damaged)
        assert generate.missing(only, **HOW) == only, n
    for damaged in (data + b"\n", data[:-1], b"", data[:8]):
        file.write_bytes(damaged)
        assert generate.missing(only, **HOW) == only
    assert "0_0.png" in caplog.text


def test_an_image_that_was_found_whole_is_not_opened_again_while_it_is_as_it_was(pipeline, whole, tmp_path):
    """A stamp is believed: here it is of a file that holds no image. Any change of the file ends it, and a copy of the
    folder has none until its images were opened once."""
    draw(pipeline, PROMPTS[:2], tmp_path)
    first, second = (wanted([p], tmp_path) for p in PROMPTS[:2])
    [file], [other] = first, second
    noted = len((tmp_path / "images" / ".stamps-0").read_bytes().split())
    assert generate.missing(first | second, **HOW) == {}
    assert len((tmp_path / "images" / ".stamps-0").read_bytes().split()) == noted  # none was opened
    note = Stamps(file.parent).of(file.name)
    file.write_bytes(b"no image")
    assert generate.missing(first, **HOW) == first
    Stamps(file.parent).add(file.name, state_of(file), note)
    assert generate.missing(first, **HOW) == {}
    shutil.copyfile(other, file)
    with pytest.raises(UsageError, match="0_0.png"):
        generate.missing(first, **HOW)
    file.unlink()
    assert generate.missing(first, **HOW) == first
    copy = shutil.copytree(tmp_path, tmp_path / "far", copy_function=shutil.copy)
    assert Stamps(copy / "images").of(other.name) is None
    assert generate.missing(wanted(PROMPTS[:2], copy), **HOW) == wanted(PROMPTS[:1], copy)
    assert Stamps(copy / "images").of(other.name)


def test_a_long_run_says_after_its_first_pass_how_long_it_will_take(pipeline, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    draw(pipeline, PROMPTS, tmp_path / "short")
    assert caplog.text == ""
    monkeypatch.setattr(generate, "LONG", 0)
    clock = SimpleNamespace(monotonic=count(0, 0.1).__next__, time_ns=time.time_ns)  # a pass takes 0.1 s
    monkeypatch.setattr(generate, "time", clock)
    draw(pipeline, PROMPTS, tmp_path / "long", what="bags")
    assert "bags" in caplog.text and "7 images" in caplog.text and "0 s" in caplog.text


def test_when_time_ends_the_first_rows_are_drawn_whatever_their_sizes(pipeline, whole, tmp_path):
    """A pass at least is drawn. The next run goes on with the first row that is missing."""
    for done in ({0, 1, 4}, {0, 1, 2, 4}, {0, 1, 2, 3, 4, 6}, set(range(7))):
        draw(pipeline, PROMPTS, tmp_path, until=0.0)
        assert contents(tmp_path) == {f"{n}_0.png": whole[f"{n}_0.png"] for n in done}


def test_several_images_a_prompt_differ_and_the_first_is_the_prompts_own(pipeline, whole, tmp_path):
    draw(pipeline, PROMPTS[:2], tmp_path, samples=3)
    drawn = contents(tmp_path)
    assert drawn["0_0.png"] == whole["0_0.png"] and len(set(drawn.values())) == len(drawn) == 6


def test_nothing_is_drawn_twice(whole, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0_0.png").write_bytes(whole["0_0.png"])
    before = (tmp_path / "images" / "0_0.png").stat().st_mtime_ns
    assert draw(None, PROMPTS[:1], tmp_path) == [tmp_path / "images" / "0_0.png"]  # no model is asked
    assert (tmp_path / "images" / "0_0.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("other", "prompt"),
    [
        ({"steps": 3}, {}),
        ({"identity": "g"}, {}),
        ({"scheduler": "PNDMScheduler"}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({}, {"guidance": 3.0000001}),
        ({}, {"size": (40, 32)}),
        ({}, {"seed": 51}),
    ],
)
def test_images_of_other_settings_are_never_taken_for_ours(pipeline, whole, tmp_path, other, prompt):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0_0.png").write_bytes(whole["0_0.png"])
    assert draw(None, PROMPTS[:1], tmp_path)
    with pytest.raises(UsageError, match="0_0.png.*--out"):
        draw(pipeline, [PROMPTS[0]._replace(**prompt)], tmp_path, **other)


def test_an_image_carries_what_it_was_drawn_from(whole, tmp_path):
    (tmp_path / "3_0.png").write_bytes(whole["3_0.png"])
    with Image.open(tmp_path / "3_0.png") as image:
        assert image.size == (24, 16)
        assert (
            image.info[generate.PROVENANCE]
            == "f scheduler=DDIMScheduler steps=2 size=24x16 guidance=5.0 seed=53 a coat"
        )


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_in_half_too_an_image_is_the_same_bytes_alone_and_in_any_order(tiny, whole, tmp_path, dtype):
    pipeline, some = load_pipeline(find(tiny), dtype=getattr(torch, dtype)), [PROMPTS[i] for i in (0, 1, 4)]
    draw(pipeline, some, tmp_path / "all", dtype=dtype)
    draw(pipeline, some[::-1], tmp_path / "reversed", dtype=dtype)
    draw(pipeline, some[1:2], tmp_path / "alone", dtype=dtype)
    drawn = contents(tmp_path / "all")
    assert contents(tmp_path / "reversed") == drawn and contents(tmp_path / "alone") == {"1_0.png": drawn["1_0.png"]}
    with Image.open(tmp_path / "all" / "images" / "0_0.png") as image:
        assert f" dtype={dtype} size=32x32 " in image.info[generate.PROVENANCE]


def test_a_row_is_of_its_prompt_and_has_the_models_size_where_the_prompt_has_none():
    assert generate.row_of(PROMPTS[3], 0, (32, 32)) == Row("a coat", 53, 5.0, (24, 16))
    assert generate.row_of(PROMPTS[1], 0, (32, 32)) == Row("a sneaker", 51, 7.5, (32, 32))
    assert json.loads((POCKET / "sampling.json").read_text()) == {"steps": 10, "guidance": 3.0}


def test_what_a_model_cannot_draw_is_said_before_it_is_loaded(caplog):
    model = find("pocket")
    own = {"scheduler": None, "steps": None}
    generate.check(model, PROMPTS, scheduler=None, steps=999)  # DDIM, whose first timestep is 1, has no 1000
    assert caplog.text == ""
    with pytest.raises(UsageError, match="--denoising-steps 1001 .* 1000"):
        generate.check(model, PROMPTS, scheduler=None, steps=1001)
    for size in ((30, 32), (32, 0)):
        with pytest.raises(UsageError) as e:
            generate.check(model, [*PROMPTS, PROMPTS[0]._replace(case=9, size=size)], **own)
        assert all(word in str(e.value) for word in ("Case 9", f"{size[0]} x {size[1]}", "multiples of 4", "--size"))
    with pytest.raises(UsageError, match="8,192.*--size 32"):
        generate.check(model, [PROMPTS[0]._replace(size=(8, 10**9))], **own)
    generate.check(model, [PROMPTS[0]._replace(size=(512, 384))], **own)
    assert "--size 32" in caplog.text


def test_the_bar_moves_with_each_denoising_step_and_counts_only_what_is_drawn(pipeline, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(bar, "AFTER", 1e-9)
    monkeypatch.setitem(bar._way, "seconds", 0)  # every move
    monkeypatch.setattr(generate, "Bar", partial(generate.Bar, mininterval=0))
    with caplog.at_level(logging.INFO):
        draw(pipeline, PROMPTS[:2], tmp_path, steps=4, what="bags")
        draw(pipeline, PROMPTS[:3], tmp_path, steps=4, what="more")
        draw(pipeline, PROMPTS[:3], tmp_path, steps=4, what="nothing")
    shown = [r.fields for r in caplog.records if hasattr(r, "fields")]
    moves = {what: [(f["done"], f["of"]) for f in shown if f["what"] == f"draw {what}"] for what in ("bags", "more")}
    assert moves == {"bags": [(0, 2), (0, 2), (1, 2), (1, 2), (2, 2)], "more": [(0, 1)] * 4 + [(1, 1)]}
    assert len(shown) == 10
