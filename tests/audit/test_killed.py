"""An audit that is killed at random moments goes on, and ends with the bytes of an undisturbed one."""

import random
import time

import pytest
from helpers.commands import files_in, fresh, python, spawn

ROWS = """prompt,class,evaluation_seed,evaluation_guidance
a photo of a sneaker,sneaker,1,3
a photo of a bag,bag,2,7.5
"""
EVALUATE = ["--prompts", "prompts.csv", "--against", "pocket", "--samples-per-prompt", "12", "--out", "audit"]


def written(folder) -> int:
    """Bytes in all files. Raises FileNotFoundError where one is renamed meanwhile."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def audit(model, folder, monkeypatch, kill_at=None, start=python) -> int:
    """One `evaluate` with a cache of its own, killed once so many bytes are written; its exit code."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.csv").write_text(ROWS)
    monkeypatch.setenv("SALUN_SD_CACHE", str(folder / "cache"))
    process = spawn(["evaluate", model, *EVALUATE], start, cwd=folder)
    while kill_at is not None and process.poll() is None:
        try:
            if written(folder) >= kill_at:
                process.kill()
                break
        except FileNotFoundError:
            pass
        time.sleep(0.01)
    process.communicate()
    return process.returncode


@pytest.mark.slow  # an audit is begun many times
def test_an_audit_killed_at_any_moment_ends_with_the_same_bytes(tiny, tmp_path, monkeypatch):
    whole, killed, moments = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    assert audit(tiny, whole, monkeypatch, start=fresh) == 0  # with another order of sets
    kills = sorted(moments.uniform(0, written(whole)) for _ in range(5))
    codes = [audit(tiny, killed, monkeypatch, at) for at in kills]
    assert sum(code != 0 for code in codes) >= 3 and audit(tiny, killed, monkeypatch) == 0
    assert files_in(whole) == files_in(killed)
    assert all((whole / file).read_bytes() == (killed / file).read_bytes() for file in files_in(whole))
