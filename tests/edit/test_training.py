"""What a training says of itself: samples, and whether it erased anything."""

import pytest
import torch
from helpers.models import damage, write_pipeline
from helpers.runs import PAIR

from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.edit.resources import Compute
from salun_sd.edit.training import strip_writer
from salun_sd.errors import TrainingError
from salun_sd.runtime.finite import NotFinite


def said(capsys, model, out, lr="1e-4", dtype="float32") -> list[str]:
    """The warnings of an erasure that say that it erased nothing."""
    cli.run(["erase", str(model), *PAIR, "--samples", "2", "--mask", "random:0.3", "--steps", "2", "--batch-size", "2",
             "--lr", lr, "--dtype", dtype, "--out", str(out)])  # fmt: skip
    return [line for line in capsys.readouterr().err.splitlines() if "was erased" in line]


@pytest.mark.slow
def test_an_erasure_that_moves_no_weight_to_speak_of_says_by_how_much(tiny, tmp_path, capsys):
    assert said(capsys, tiny, tmp_path / "usual") == []
    [line] = said(capsys, tiny, tmp_path / "little", lr="1e-9")
    assert "e-08 of their norm" in line and "--lr" in line
    half = write_pipeline(tmp_path / "half", "sd1", dtype=torch.float16)
    assert said(capsys, half, tmp_path / "usual-half") == []
    [line] = said(capsys, half, tmp_path / "rounded", lr="1e-9")  # what float16 rounds away on the disk
    assert "0.0e+00" in line


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_erasure_by_a_model_that_does_not_hear_its_prompts_says_so(tiny, tmp_path, capsys, dtype):
    assert said(capsys, tiny, tmp_path / "usual", dtype=dtype) == []
    deaf = write_pipeline(tmp_path / "deaf", "sd1")
    damage(deaf, "unet", "attn2.to_v.weight", 0.0)
    line = said(capsys, deaf, tmp_path / "erased", dtype=dtype)[0]
    assert "forget loss" in line and (tmp_path / "erased" / "salun.json").exists()


def test_a_sample_that_cannot_be_drawn_is_the_models_fault_before_training_and_the_rates_after(tiny, tmp_path):
    compute = Compute.of(find(tiny), None, None)
    unet = compute.unet()
    write = strip_writer(compute, unet, ["a sneaker"], tmp_path, 2)
    write(0)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000.png"]
    unet.conv_out.weight.data.fill_(3e38)
    with pytest.raises(NotFinite, match="UNet of"):
        write(0)
    write(1)  # nothing to draw
    with pytest.raises(TrainingError, match="step 2 .*--lr") as caught:
        write(2)
    assert not isinstance(caught.value, NotFinite) and len(list(tmp_path.iterdir())) == 1
