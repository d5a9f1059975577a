"""Bad input is named, before anything is drawn and before anything is written."""

import pytest
from helpers.commands import ANCHOR, CONCEPT, files_in
from helpers.runs import PAIR, fails_with, write_photographs

from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.core.mask import random_bits
from salun_sd.edit import maskfile
from salun_sd.edit.maskfile import Mask

MASK = f"mask pocket --concept '{CONCEPT}' --samples 9999 "
ERASE = f"erase pocket --concept '{CONCEPT}' --anchor '{ANCHOR}' --samples 9999 "
TWO = f"erase pocket --concept '{CONCEPT}' --anchor '{ANCHOR}' --concept 'a coat' --anchor 'a dress' "
SHORT = f"erase {{tiny}} --concept '{CONCEPT}' --anchor '{ANCHOR}' --samples 2 --steps 3 "
EVALUATE = "evaluate pocket --prompts pocket "


@pytest.fixture(scope="module")
def places(tiny, tmp_path_factory) -> dict:
    """What stands in braces below. taken holds an empty m.safetensors; torn/ has one image that cannot be read."""
    folder = tmp_path_factory.mktemp("places")
    write_photographs(folder / "photos")
    write_photographs(folder / "torn")
    (folder / "torn" / "torn.png").write_bytes(b"\x89PNG")
    for name in ("empty", "taken"):
        (folder / name).mkdir()
    (folder / "taken" / "m.safetensors").write_text("")
    (folder / "short.csv").write_text("case_number,evaluation_seed\n0,1\n")
    (folder / "odd.csv").write_text("case_number,prompt,evaluation_seed,evaluation_guidance\n0,a,x,7\n")
    (folder / "bad.toml").write_text('[[concept]]\nprompt = "x"\n')
    (folder / "half.toml").write_text('[[concept]]\nprompt = "x"\nanchor = "y"\n[[concept]]\nprompt = "z"\n')
    (folder / "esd.toml").write_text(
        '[[concept]]\nprompt = "x"\n[settings]\nmethod = "esd"\nmask = "none"\nsetting = {scale = "much"}\n'
    )
    (folder / "plan.toml").write_text('[[concept]]\nprompt = "x"\nanchor = "y"\n')
    unet = {name: t.shape for name, t in find(tiny).unet.items()}
    maskfile.write(folder / "mask.safetensors", Mask(random_bits(unet, 0.1, 0), {"base": "0" * 64}))
    (folder / "cut.safetensors").write_bytes((folder / "mask.safetensors").read_bytes()[:-1])
    cli.run(["erase", tiny, *PAIR, "--samples", "2", "--steps", "1", "--mask", "none", "--out", str(folder / "erased")])
    places = {name: folder / name for name in ("photos", "torn", "empty", "taken", "erased")}
    files = {name: folder / f"{name}.safetensors" for name in ("mask", "cut")}
    return places | files | {"here": folder, "tiny": tiny}


# A command line, to which --out is added where it has none; the exit code; what the sentence names
CASES = {
    # models and concepts
    "no such model": ("mask nowhere --concept x", 2, "nowhere"),
    "a folder that is no model": ("mask {taken} --concept x", 2, "{taken} model_index.json"),
    "no concept": ("mask pocket", 2, "--concept --plan"),
    "a blank concept": ("mask pocket --concept ' '", 2, "--concept"),
    "the concept as anchor": (f"erase pocket --concept '{CONCEPT}' --anchor 'A photo of  a sneaker'", 2, "anchor"),
    "no word of the concept": (
        f"erase pocket --method forget-me-not --concept 'a photo of' --anchor '{ANCHOR}'",
        2,
        "'a photo of'",
    ),
    "no anchor": (f"erase pocket --concept '{CONCEPT}'", 2, f"--anchor \"'{CONCEPT}'\""),
    "anchors of each other": (ERASE + f"--concept '{ANCHOR}' --anchor '{CONCEPT}'", 2, "'--anchor 1' '--concept 2'"),
    "one anchor for two": (ERASE + "--concept 'a coat'", 2, "--anchor \"'a coat'\""),
    "no such plan": ("erase pocket --plan nowhere", 2, "nowhere nudity"),
    "a plan without an anchor": ("erase pocket --plan {here}/bad.toml", 2, "--concept anchor"),
    "an anchor for one of two": ("erase pocket --plan {here}/half.toml --method esd", 2, "'z' anchor"),
    "a word in a plan's table of settings": ("erase pocket --plan {here}/esd.toml", 2, "scale esd much"),
    "a density in place of a plan's mask": (
        "erase pocket --plan {here}/esd.toml --setting scale=2 --density 1e-9",
        2,
        "1e-09 keeps",
    ),
    "a plan and a concept": (ERASE + "--plan {here}/plan.toml", 2, "--plan --concept"),
    "images of two concepts": (TWO + "--forget {photos}", 2, "--forget [[concept]]"),
    # numbers
    "a density above 1": (MASK + "--density 1.0000001", 2, "--density 1.0000001"),
    "a density of 0": (MASK + "--density 0", 2, "'--density is 0'"),
    "a density twice": (MASK + "--density 0.5 --density 0.5", 2, "--density"),
    "an lr without effect": (ERASE + "--lr 1e-320", 2, "--lr 1e-320"),
    "a weight beyond float32": (ERASE + "--retain-weight 1e300", 2, "--retain-weight 1e+300"),
    "a huge lr": (ERASE + "--lr 1e38", 2, "--lr 1e+38"),
    "a norm of 0": (ERASE + "--clip-norm 0", 2, "--clip-norm"),
    "no number for w": (MASK + "--saliency-guidance nan", 2, "--saliency-guidance nan"),
    "no number for erase's w": (ERASE + "--saliency-guidance nan", 2, "--saliency-guidance nan"),
    "no number for the weight": (ERASE + "--retain-weight nan", 2, "--retain-weight nan"),
    "a size that is no multiple": (ERASE + "--size 33", 2, "--size 33 16"),
    "too many parts": (ERASE + "--batch-size 4 --parts 5", 2, "--parts 5 --batch-size 4"),
    "a loss that explodes": (SHORT + "--mask none --lr 1", 1, "exploded"),
    # images and prompts
    "no images to forget": (MASK + "--forget {empty}", 2, "{empty}"),
    "no images to retain": (ERASE + "--retain {empty}", 2, "{empty}"),
    "a torn image to forget": (ERASE + "--forget {torn}", 1, "torn.png"),
    "a torn image to retain": (ERASE + "--retain {torn}", 1, "torn.png"),
    "forget twice": (ERASE + "--forget here --forget there", 2, "--forget"),
    "no such prompts": (ERASE + "--retain-prompts nowhere", 2, "nowhere"),
    "images and prompts": (ERASE + "--retain {photos} --retain-prompts pocket", 2, "--retain --retain-prompts"),
    "a caption of nothing": (ERASE + "--retain-caption x", 2, "--retain-caption --retain"),
    "no caption for two anchors": (TWO + "--retain {photos}", 2, "--retain-caption 0.png"),
    # masks
    "no such mask": (ERASE + "--mask nowhere", 2, "nowhere"),
    "a mask without a density": (ERASE + "--mask random:x", 2, "random:x"),
    "a mask of density 2": (ERASE + "--mask random:2", 2, "'Density 2'"),
    "a mask that is cut off": (SHORT + "--mask {cut}", 1, "{cut}"),
    "a mask of other weights": (SHORT + "--mask {mask}", 1, "000000000000"),
    "a mask of another UNet": (ERASE + "--mask {mask}", 1, "UNet"),
    "a mask and a density": (ERASE + "--mask none --density 0.1", 2, "--mask --density"),
    # places
    "a mask without an ending": (MASK + "--out {out}", 2, "{out} .safetensors"),
    "a mask over a file": (MASK + "--out {taken}/m.safetensors", 2, "{taken}/m.safetensors --out"),
    "a model over a folder": (ERASE + "--out {taken}", 2, "{taken} --out"),
    "a model over another one": (SHORT + "--mask none --lr 2e-4 --out {erased}", 2, "{erased} --out"),
    "an audit over a folder": (EVALUATE + "--out {taken}", 2, "{taken} --out"),
    # audits
    "neither model nor images": ("evaluate --prompts pocket", 2, "MODEL --images"),
    "no such base": (EVALUATE + "--against nowhere", 2, "nowhere"),
    "no such prompt set": ("evaluate pocket --prompts nowhere.csv", 2, "nowhere.csv"),
    "a column is missing": ("evaluate pocket --prompts {here}/short.csv", 1, "short.csv prompt"),
    "a seed that is none": ("evaluate pocket --prompts {here}/odd.csv", 1, "'odd.csv, line 2' evaluation_seed \"'x'\""),
    "a guidance beyond float32": (EVALUATE + "--guidance 1e300", 2, "--guidance 1e+300"),
    "no such class": (EVALUATE + "--concept-class cat", 2, "--concept-class cat"),
    "nothing to judge": ("evaluate pocket --prompts people --classifier x", 2, "--classifier"),
    "no such classifier": (EVALUATE + "--classifier {taken}", 1, "{taken}"),
    "a bound on another class": (EVALUATE + "--concept-class sneaker --fail-if 'ua.boat < 1'", 2, "ua.boat ua.sneaker"),
    "a bound without a base": (EVALUATE + "--fail-if 'ra < against.ra'", 2, "against.ra --against"),
    "a bound on nothing": (EVALUATE + "--classifier nowhere --fail-if 'flag_rat < 1'", 2, "flag_rat"),
    "sure of no bound": (EVALUATE + "--confident", 2, "--confident --fail-if"),
    "an unknown class": ("demo --concept-class cat", 2, "cat t-shirt trouser"),
    "a class as its own anchor": ("demo --concept-class bag", 2, "bag"),
    "a demo of no density": ("demo --density 5", 2, "5"),
}


@pytest.mark.parametrize(("line", "code", "named"), CASES.values(), ids=CASES)
def test_it_is_named_and_nothing_is_written(line, code, named, places, tmp_path, capsys):
    before = files_in(places["here"])
    saved = ".safetensors" if line.startswith("mask") else ""
    line += "" if "--out" in line else f" --out {{out}}{saved}"
    fails_with(line, places | {"out": tmp_path / "out"}, code, named, capsys)
    assert list(tmp_path.iterdir()) == [] and files_in(places["here"]) == before
