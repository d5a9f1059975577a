"""The saved state of an erasure and its losses, read back or damaged."""

import pytest
import torch

from salun_sd.core.mask import random_bits
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.predictions import Predictions
from salun_sd.edit.resume import Progress
from salun_sd.errors import SalunError, TrainingError, UsageError
from salun_sd.runtime import seals
from salun_sd.runtime.finite import NotFinite


@pytest.fixture
def stopped(tmp_path) -> Progress:
    """A run that was stopped after three steps."""
    progress = Progress(tmp_path / "out", {"seed": 1}, 1)
    progress.folder.mkdir()
    progress.save(Mask(random_bits({"w": (40,)}, 0.5, 0), {}))
    with progress.losses(0) as losses:
        losses.writelines(seals.line({"step": step, "forget": step / 7}) for step in (1, 2, 3, 4))
    return progress


def test_a_state_that_was_changed_is_refused_with_what_to_do(stopped):
    state = stopped.folder / "state.safetensors"
    whole = state.read_bytes()
    for n in range(0, 8 * len(whole), 203):
        damaged = bytearray(whole)
        damaged[n // 8] ^= 1 << n % 8
        state.write_bytes(damaged)
        with pytest.raises(SalunError) as caught, stopped.held():
            pass
        assert str(state) in str(caught.value) and isinstance(caught.value, SalunError)
    state.write_bytes(whole)
    with stopped.held() as again:
        assert again.steps == 0


def test_damaged_predictions_cost_no_state_and_without_them_the_same_command_resumes(stopped):
    kept = Predictions(stopped.folder, (1, 2, 4, 8, 8))
    kept.append(torch.randn(kept.shape))
    content = bytearray(kept.file.read_bytes())
    content[17] ^= 4
    kept.file.write_bytes(content)
    with pytest.raises(SalunError, match=str(kept.file)), stopped.held(), stopped.no_state_of_a_failure():
        kept(1)
    kept.file.unlink()
    with stopped.held() as again:
        assert again.steps == 0


@pytest.mark.parametrize("error", [TrainingError, NotFinite, UsageError])
def test_a_training_that_would_fail_again_leaves_nothing(stopped, error):
    with pytest.raises(error), stopped.held(), stopped.no_state_of_a_failure():
        raise error("it failed")
    assert not stopped.folder.exists()


def test_losses_that_were_damaged_are_left_out_and_named_and_the_run_goes_on(stopped, caplog):
    file = stopped.folder / "losses.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    with stopped.losses(3) as losses:
        losses.write(lines[3])
    assert file.read_text() == "".join(lines) and not caplog.text
    file.write_text(lines[0] + lines[1].replace("0.28", "0.29") + lines[2][:20])
    with stopped.losses(3) as losses:
        losses.write(lines[3])
    assert file.read_text() == lines[0] + lines[3]
    assert str(file) in caplog.text and "2, 3" in caplog.text
