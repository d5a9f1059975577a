"""What Python may give to mask, erase and apply beside what the command line can: paths, numbers of numpy, objects."""

import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import write_photographs

import salun_sd
from salun_sd.checkpoint.find import find
from salun_sd.edit.concepts import Concept
from salun_sd.edit.resources import Forecast
from salun_sd.edit.resume import note_interrupts
from salun_sd.errors import UsageError

CAT, DOG = "a photo of a cat", "a photo of a dog"
NOWHERE = "no/such/model/anywhere"  # named only where everything else is right
SHARED = {
    **{f"{name} {n}": ({name: n}, f"--{name.replace('_', '-')} ") for name in ("samples", "batch_size", "size")
       for n in (2.5, 0, "3")},
    **{f"seed {n}": ({"seed": n}, "--seed ") for n in (-1, 2**31, 0.5)},
    "a dtype": ({"dtype": "float64"}, "--dtype "),
    "a blank concept": ({"concept": " "}, "--concept "),
    **{f"{n} of guidance": ({"saliency_guidance": n}, "--saliency-guidance ") for n in (1e300, float("nan"), -1e-9)},
    "a density just above 1": ({"density": 1.0000001}, "1.0000001"),
}  # fmt: skip
MASKED = {
    **SHARED,
    "no density": ({"density": []}, "--density"),
    "a density twice": ({"density": [0.5, np.float64(0.5)]}, "--density"),
    "a density above 1": ({"density": [0.5, 1.5]}, "1.5"),
    "a file for a folder": ({"out": Path(__file__) / "m.safetensors"}, "--out"),
}
ERASED = {
    **SHARED,
    **{f"{name} {n}": ({name: n}, f"--{name.replace('_', '-')} ") for name in ("steps", "parts") for n in (2.5, 0)},
    **{f"sample_every {n}": ({"sample_every": n}, "--sample-every ") for n in (-1, 0.5)},
    "no anchor": ({"anchor": None}, "--anchor"),
    "a concept without an anchor": ({"concept": Concept(CAT, None), "anchor": None}, "anchor"),
    "an anchor from nowhere": ({"anchor_from": "mine"}, "--anchor-from"),
    "a format": ({"format": "zip"}, "--format"),
    "a file for a folder": ({"out": Path("out.safetensors")}, "--out"),
    "reversible": ({"reversible": True}, "--reversible"),
    **{
        f"{name} {n}": ({name: n}, f"--{name.replace('_', '-')} is {re.escape(str(n))}")
        for name, n in (
            ("lr", 1e-320),
            ("lr", 1.5),
            ("retain_weight", 1e300),
            ("density", 0),
            ("clip_norm", 0.0),
            ("save_every", -1),
            ("steps", True),
            ("samples", 2**31),
            ("size", 10**6),
            ("until", 0.0),
            ("until", 1.5),
            ("until", float("nan")),
        )
    },
    "a density beside a mask": ({"mask": "none", "density": 0.5}, "--density"),
    "a guidance beside a mask": ({"mask": "random:0.5", "saliency_guidance": 7.5}, "--saliency-guidance"),
    "no such mask": ({"mask": Path("nowhere.safetensors")}, "nowhere.safetensors"),
    "a mask of no density": ({"mask": "random:x"}, "random:x"),
    "images and prompts": ({"retain": Path("photos"), "retain_prompts": "pocket"}, "--retain-prompts"),
    **{
        f"images, of no use to {method}": (
            {"method": method, "concept": Concept(CAT, DOG, images="photos"), "anchor": None},
            f"'{CAT}', photos, .*--method {method}",
        )
        for method in ("esd", "ablation", "finetune", "uce")
    },
    "images to forget, of no use to esd": ({"method": "esd", "forget": "photos"}, "photos.* esd.*--forget"),
    "a caption of nothing": ({"retain_caption": "x"}, "--retain-caption"),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("arguments", "named"), MASKED.values(), ids=MASKED)
def test_mask_refuses_before_it_looks_for_the_model(arguments, named, tmp_path):
    with pytest.raises(UsageError, match=named):
        salun_sd.mask(NOWHERE, **{"concept": CAT, "out": tmp_path / "new" / "m.safetensors"} | arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "named"), ERASED.values(), ids=ERASED)
def test_erase_refuses_before_it_looks_for_the_model(arguments, named, tmp_path):
    with pytest.raises(UsageError, match=named):
        salun_sd.erase(NOWHERE, **{"concept": CAT, "anchor": DOG, "out": tmp_path / "out"} | arguments)
    assert list(tmp_path.iterdir()) == []


def test_apply_refuses_before_it_looks_for_the_model(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    for arguments, named in (
        ({"out": "out"}, "p.safetensors"),
        ({"out": "taken"}, "taken"),
        ({"out": "out", "format": "zip"}, "--format"),
        ({"out": "out.safetensors"}, "--format"),
    ):
        with pytest.raises(UsageError, match=named):
            salun_sd.apply(NOWHERE, "p.safetensors", **arguments)


def test_a_dry_run_writes_nothing(tiny, tmp_path):
    assert isinstance(salun_sd.mask(tiny, CAT, out="new/m.safetensors", dry_run=True), Forecast)
    assert isinstance(salun_sd.erase(tiny, CAT, DOG, out="new/erased", dry_run=True), Forecast)
    with pytest.raises(UsageError, match=NOWHERE):
        salun_sd.mask(NOWHERE, CAT, out="new/m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["mask", "erase"])
def test_a_density_that_keeps_no_weight_is_refused_before_anything_is_drawn(tiny, tmp_path, call):
    given = {"anchor": DOG, "out": tmp_path / "out"} if call == "erase" else {"out": tmp_path / "m.safetensors"}
    with pytest.raises(UsageError, match="1e-07"):
        getattr(salun_sd, call)(tiny, CAT, density=1e-7, dry_run=True, **given)
    assert isinstance(getattr(salun_sd, call)(tiny, CAT, density=1e-5, dry_run=True, **given), Forecast)


@pytest.mark.parametrize("option", ["config", "revision", "variant"])
def test_options_of_a_name_do_not_go_with_a_checkpoint(tiny, option):
    with pytest.raises(UsageError, match=f"--{option}"):
        salun_sd.mask(find(tiny), CAT, dry_run=True, **{option: "fp16"})


def test_paths_and_numbers_of_numpy_do_what_texts_and_pythons_numbers_do(tiny, tmp_path):
    write_photographs(tmp_path / "photos")
    (tmp_path / "own.csv").write_text(f"case_number,prompt,evaluation_seed,evaluation_guidance\n0,{DOG},0,7\n")
    half, one, size = np.float32(0.5), np.int64(1), np.int64(16)
    for density in (half, 0.5):
        made = salun_sd.mask(tiny, Concept(CAT, None, (), Path("photos")), out="new/m.safetensors", density=density,
                             size=size, seed=one, saliency_guidance=half)  # fmt: skip
        assert [file for file, _ in made.files] == [Path("new/m.safetensors")] and made.files[0][0].is_file()
    common = {"steps": 1, "batch_size": 2, "format": "patch", "size": 16, "samples": 2, "retain_weight": 0.5}
    records = [
        salun_sd.erase(tiny, CAT, DOG, out=f"{kind.__name__}.safetensors", mask=kind("new/m.safetensors"),
                       forget=kind("photos"), **{"retain": kind("photos"), **common} | numbers)
        for kind, numbers in ((str, {}), (Path, {"steps": one, "seed": np.int64(0), "retain_weight": half}))
    ]  # fmt: skip
    assert records[0]["erased"] == records[1]["erased"]
    assert json.loads(json.dumps(records[0]["settings"])) == records[1]["settings"]
    [text, path] = [
        salun_sd.erase(tiny, CAT, DOG, out="out", retain_prompts=kind("own.csv"), mask="random:0.1", seed=one,
                       dry_run=True) for kind in (str, Path)
    ]  # fmt: skip
    assert text.settings == path.settings and path.settings["retain_prompts"] == "own.csv"


def test_outside_the_main_thread_no_interrupt_is_noted():
    noted = []

    def work():
        with note_interrupts() as interrupts:
            noted.append(list(interrupts))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [[]]
