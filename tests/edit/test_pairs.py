"""Every method on every support, by the command: what may move, in every format; and what a kill may not change."""

import pytest
from helpers.commands import ANCHOR, CONCEPT, fails
from helpers.forms import check_a_kill_changes_nothing
from helpers.runs import record_of

from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.core.mask import kept
from salun_sd.edit import maskfile
from salun_sd.edit.supports import FORMS, NONE, NOT_CROSS
from salun_sd.methods.catalog import METHODS

pytestmark = pytest.mark.slow

SHORT = "--samples 2 --batch-size 2 --lr 1e-3 --probe-every 0".split()
OPTIONS = {name: [*SHORT, "--retain-prompts", "anchor"] for name in ("salun", "ascent", "erasediff", "finetune")}
OPTIONS |= {"ablation": SHORT, "forget-me-not": SHORT, "esd": SHORT[2:], "uce": []}
OF_SALIENCY = {"esd": SHORT[:2], "uce": SHORT[:4]}  # which have no other use for images of the concept
OUT = {"diffusers": "out", "single-file": "out.safetensors", "patch": "patch.safetensors"}


def line(model: str, method: str, mask: str, *more: str, steps: int = 1) -> list[str]:
    length = [] if method == "uce" else ["--steps", str(steps)]
    images = OF_SALIENCY.get(method, []) if mask.startswith("salient") else []
    return ["erase", model, "--method", method, "--mask", mask, "--concept", CONCEPT, "--anchor", ANCHOR,
            *OPTIONS[method], *length, *images, *more]  # fmt: skip


@pytest.mark.parametrize("mask", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_of_the_support_change_and_no_others(tiny, tmp_path, method, mask, capsys):
    """In each format by turns."""
    form = list(OUT)[(list(METHODS).index(method) + FORMS.index(mask)) % len(OUT)]
    argv = line(tiny, method, mask, "--format", form, "--out", str(tmp_path / OUT[form]))
    if (method, mask) == ("uce", NOT_CROSS):
        assert "keys and values" in fails(argv, 2, capsys)
        return
    cli.run(argv)
    out = tmp_path / OUT[form]
    if form == "patch":
        cli.run(["apply", tiny, str(out), "--out", str(tmp_path / "out")])
        out = tmp_path / "out"
    bits = maskfile.read(provenance.run_folder(tmp_path / OUT[form]) / "mask.safetensors").bits
    before, after = find(tiny).unet, find(str(out), config=tiny if form == "single-file" else None).unet
    share = kept(bits)[0] / kept(bits)[1]
    assert share == pytest.approx(0.5, abs=1e-3) if ":" in mask else (share == 1) == (mask == NONE)
    moved = {name: before[name].read() != after[name].read() for name in before}
    assert any(where.any() for where in moved.values())
    assert not any((where & ~bits[name]).any() for name, where in moved.items())
    if out.is_dir():
        assert record_of(out)["settings"]["method"] == method


@pytest.mark.parametrize("method", ["esd", "forget-me-not", "erasediff"])
def test_a_killed_erasure_by_another_method_ends_with_the_same_bytes(tiny, tmp_path, monkeypatch, method):
    argv = line(tiny, method, "random:0.2", steps=30)
    check_a_kill_changes_nothing(argv, tmp_path, monkeypatch)
