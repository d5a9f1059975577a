"""What is typed first on a machine with a GPU runs here, too, so that only the device is new on the day."""

from pathlib import Path

import pytest
from helpers.commands import fresh

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_to_its_end_on_a_cpu(tmp_path):
    process = fresh([str(BENCHMARK), "--rehearse", "--out", str(tmp_path)])
    assert process.wait(900) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("exit code ") == text.count("exit code 0") == 3
