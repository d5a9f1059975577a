"""The order of things on Fashion-MNIST: a narrow net, 1,200 photographs of clothing."""

from pathlib import Path

import pytest

import salun_sd

FASHION = Path(__file__).parents[1] / "fashion"


@pytest.mark.slow  # some minutes
def test_retrain_fails_on_what_it_never_saw_ascent_forgets_more_than_it_should_and_salun_is_near(tmp_path):
    rows = salun_sd.unlearn(
        data=FASHION, forget="0.1", out=tmp_path / "out", architecture="resnet10", width=8, epochs=20, batch_size=64,
        augment="none", seeds=1, tune="none", method=["retrain", "ft", "rl", "salun", "ga"],
        setting=["ft.lr=0.03", "rl.lr=0.03", "salun.lr=0.03", "ga.lr=0.03"],
    )["rows"]  # fmt: skip

    def value(name, metric):
        return rows[name]["metrics"][metric]["mean"]

    assert value("retrain", "ua") > value("original", "ua") + 2
    assert value("ga", "ra") < value("ft", "ra")
    assert rows["salun"]["gap"]["mean"] <= rows["rl"]["gap"]["mean"] + 3
