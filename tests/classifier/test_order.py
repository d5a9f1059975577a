"""The order of things on Fashion-MNIST: a narrow net, 1,200 photographs of clothing."""

import gzip
from pathlib import Path

import numpy as np
import pytest

import salun_sd

PLACE = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
TRAIN, TEST = 1200, 1000


def write_part(folder):
    """The first images of Fashion-MNIST as idx files."""
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        for kind, before, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
            content = gzip.decompress((PLACE / f"{split}-{kind}-ubyte.gz").read_bytes())
            head = content[:4] + np.array([count], ">u4").tobytes() + content[8:before]
            (folder / f"{split}-{kind}-ubyte").write_bytes(head + content[before : before + count * size])


@pytest.mark.slow  # some minutes
@pytest.mark.skipif(not PLACE.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_retrain_fails_on_what_it_never_saw_ascent_forgets_more_than_it_should_and_salun_is_near(tmp_path):
    write_part(tmp_path)
    rows = salun_sd.unlearn(
        data=tmp_path, forget="0.1", out=tmp_path / "out", architecture="resnet10", width=8, epochs=20, batch_size=64,
        augment="none", seeds=1, tune="none", method=["retrain", "ft", "rl", "salun", "ga"],
        setting=["ft.lr=0.03", "rl.lr=0.03", "salun.lr=0.03", "ga.lr=0.03"],
    )["rows"]  # fmt: skip

    def value(name, metric):
        return rows[name]["metrics"][metric]["mean"]

    assert value("retrain", "ua") > value("original", "ua") + 2
    assert value("ga", "ra") < value("ft", "ra")
    assert rows["salun"]["gap"]["mean"] <= rows["rl"]["gap"]["mean"] + 3
