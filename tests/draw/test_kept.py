import hashlib
import io
import sys
from functools import partial

import pytest
from helpers.commands import files_up_to

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import POCKET
from salun_sd.draw import generate
from salun_sd.draw.kept import called, exchange, key_of
from salun_sd.draw.sample import Row


def test_a_base_is_called_the_same_by_whoever_uses_it(tiny, tmp_path):
    for name in ("mine", "yours"):
        (tmp_path / name).symlink_to(POCKET)
    mine, yours, pocket = (find(str(name)) for name in (tmp_path / "mine", tmp_path / "yours", "pocket"))
    assert called(mine) == called(yours) != called(find(tiny))
    assert called(pocket).startswith("pocket ") and all(pocket.fingerprint[:8] in called(m) for m in (mine, pocket))


def test_images_in_half_are_kept_apart_and_those_of_float32_where_they_were(tiny):
    base = find(tiny)
    keys = [key_of(base, "DDIMScheduler", 2, *dtype) for dtype in ((), ("float32",), ("bfloat16",), ("float16",))]
    assert keys[0] == keys[1] == hashlib.sha256(f"{base.identity} DDIMScheduler 2".encode()).hexdigest()[:16]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("room", [0, 1000])
def test_a_run_goes_on_where_the_cache_is_full_and_keeps_its_images_there_later(
    room, tiny, tmp_path, monkeypatch, caplog
):
    """A limit on the size of files stands for a full disk, with room for no file, or for the line about a new entry. It
    holds for the file that pytest keeps stderr in, too."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    base, settings = find(tiny), {"scheduler": "DDIMScheduler", "steps": 1, "dtype": "float32"}
    files = {tmp_path / "out" / "0_0.png": Row("a bag", 0, 1.0, (32, 32))}
    list(generate.draw(partial(load_pipeline, base), files, identity=base.identity, **settings))
    with files_up_to(room):
        exchange("audited", base, files, {}, **settings)
    assert "SALUN_SD_CACHE" in caplog.text and not any((tmp_path / "cache").rglob("*.png"))
    exchange("audited", base, files, {}, **settings)
    assert len([*(tmp_path / "cache").rglob("*.png")]) == 1 and len(caplog.messages) == 1
