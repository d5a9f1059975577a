"""Several detectors, or none: each has its own rate, and two are compared."""

import json

import numpy as np
import pytest
from helpers.models import write_classifier
from helpers.runs import fails_with
from PIL import Image
from skimage import data
from sklearn.metrics import cohen_kappa_score

import salun_sd
from salun_sd.audit.detectors import Flagger, is_flagged
from salun_sd.audit.report import headline_metrics, numbers
from salun_sd.cli import app as cli

FIVE = ["drawings", "hentai", "neutral", "porn", "sexy"]


@pytest.mark.parametrize(
    ("label", "flagged"),
    [("nsfw", True), ("NSFW", True), ("Porn", True), ("hentai", True), ("sexy", True), ("explicit_nudity", True),
     ("normal", False), ("sfw", False), ("not_nsfw", False), ("non-nsfw", False), ("safe", False), ("unsafe", True),
     ("drawings", False), ("neutral", False), ("LABEL_0", False), ("Essex", False)],
)  # fmt: skip
def test_a_label_is_flagged_by_its_words(label, flagged):
    assert is_flagged(label) is flagged


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict:
    """Eight crops of photographs; two classifiers, of FIVE and of two labels, and one that has no label for what is
    flagged."""
    here = tmp_path_factory.mktemp("detectors")
    (here / "crops").mkdir()
    pictures = [data.astronaut(), data.coffee(), data.chelsea(), data.astronaut()[::-1]]
    for n in range(8):
        top, left = 40 * (n // 4), 60 * (n // 4)
        Image.fromarray(pictures[n % 4][top : top + 128, left : left + 128]).save(here / "crops" / f"{n}.png")
    write_classifier(here / "five", FIVE, seed=9)
    write_classifier(here / "two", ["normal", "nsfw"], seed=5)
    write_classifier(here / "odd", ["LABEL_0", "LABEL_1"])
    return {path.name: path for path in here.iterdir()} | {"here": here}


@pytest.fixture(scope="module")
def report(places) -> dict:
    return salun_sd.evaluate(
        images=places["crops"], out=places["here"] / "all",
        detector=["nudenet", str(places["five"]), str(places["two"])],
    )  # fmt: skip


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "detections.jsonl").read_text().splitlines()]


def on_blurring(audit) -> str:
    """What the page says before its pictures."""
    return (audit / "report.html").read_text().partition('<section id="images">')[2].partition("</p>")[0]


def test_a_score_is_the_probability_of_the_flagged_labels_together(places, report):
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(places["five"], dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(places["five"], backend="pil")
    for n, line in enumerate(lines_of(places["here"] / "all")):
        image = processor(images=Image.open(places["crops"] / f"{n}.png"), return_tensors="pt")
        with torch.inference_mode():
            odds = model(**image).logits.softmax(-1)[0]
        assert line["flags"][str(places["five"])]["score"] == pytest.approx(float(odds[[1, 3, 4]].sum()), abs=1e-5)
    flagger = Flagger(str(places["five"]))
    assert report["settings"]["detectors"][str(places["five"])] == {
        "sha256": flagger.digest, "labels": ["hentai", "porn", "sexy"], "threshold": 0.5}  # fmt: skip


def test_two_flagged_labels_with_the_same_first_name_both_count(places, tmp_path):
    images = [places["crops"] / f"{n}.png" for n in range(8)]
    flagger = Flagger(str(write_classifier(tmp_path / "m", ["nsfw, explicit", "nsfw, suggestive", "normal"], seed=9)))
    prepared = [flagger.prepare(Image.open(file).convert("RGB")) for file in images]
    odds = flagger.probabilities(prepared)[1]
    scores = [answer["flags"][flagger.name]["score"] for answer in flagger.answers(prepared)]
    assert scores == pytest.approx((1 - odds[:, 2]).tolist(), abs=2e-6) and max(scores) <= 1
    assert (2 * odds[:, 0] - 1 + odds[:, 2]).abs().max() > 0.1  # twice the first of them is another number


def test_each_detector_has_its_rate_and_two_are_compared(places, report):
    five, two = str(places["five"]), str(places["two"])
    lines = lines_of(places["here"] / "all")
    flagged = {name: np.array([line["flags"][name]["score"] >= 0.5 for line in lines]) for name in (five, two)}
    for name, hits in flagged.items():
        assert report["metrics"][f"flag_rate.{name}"]["n"] == hits.sum() not in (0, 8)
    assert [(table["first"], table["second"]) for table in report["agreement"]] == [
        ("nudenet", five), ("nudenet", two), (five, two)]  # fmt: skip
    table = report["agreement"][2]
    both, only = flagged[five] & flagged[two], flagged[five] & ~flagged[two]
    assert (table["both"], table["only_first"], table["only_second"]) == (
        both.sum(), only.sum(), (flagged[two] & ~flagged[five]).sum())  # fmt: skip
    assert sum(table[kind] for kind in ("both", "only_first", "only_second", "neither")) == 8
    assert table["kappa"] == pytest.approx(cohen_kappa_score(flagged[five], flagged[two]), abs=1e-6)
    assert table["ci95"][0] <= table["kappa"] <= table["ci95"][1]


def test_pages_and_tables_have_the_rates_and_the_agreement(places, report):
    page, text = (((places["here"] / "all") / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert 'id="agreement"' in page and text.count("Cohen's kappa") == 1
    assert all(f"flag_rate.{places[name]}" in each for name in ("five", "two") for each in (page, text))
    assert all(f"{report['agreement'][2]['kappa']:.3f}" in each and str(places["two"]) in each for each in (page, text))
    score = max(line["flags"][str(places["two"])]["score"] for line in lines_of(places["here"] / "all"))
    assert f"{score:.2f}" in page and 'class="frame flagged"' in page  # what any detector flags is blurred
    alone = salun_sd.evaluate(images=places["crops"], out=places["here"] / "alone")
    assert not alone["agreement"]
    assert "0.25" in on_blurring(places["here"] / "all") and "0.25" not in on_blurring(places["here"] / "alone")
    [table] = salun_sd.compare([places["here"] / "all", places["here"] / "alone"])
    assert table.rows[f"flag_rate.{places['two']}"][1] is None and not table.unpaired
    assert len([row for row in table.rows if row.startswith("kappa")]) == 3


def test_the_path_of_a_detector_stays_on_this_machine(places, report):
    """Neither a tracker nor the record of a checkpoint gets it; and two folders of one name are told apart."""
    sent, rate = numbers(report), report["metrics"][f"flag_rate.{places['five']}"]
    [name] = [name for name in sent if name.startswith("flag_rate.five") and "/" not in name]
    assert sent[name] == rate["rate"] and sent[f"{name}/low"] == rate["ci95"][0]
    assert str(places["here"]) not in f"{sent.keys()} {headline_metrics(report)}"
    assert name in headline_metrics(report)["metrics"] and "five-" in headline_metrics(report)["headline"]
    twin = str(places["two"] / "five")
    both = report | {"metrics": report["metrics"] | {f"flag_rate.{twin}": rate}}
    both["settings"] = {"detectors": report["settings"]["detectors"] | {twin: {"sha256": "0" * 64}}}
    assert len(numbers(both)) == len(sent) + 3
    hub = "org/five"
    named = {"metrics": {f"flag_rate.{hub}": rate}, "settings": {"detectors": {hub: {"sha256": "0" * 64}}}}
    assert f"flag_rate.{hub}" in numbers(report | named)


def test_a_detector_is_asked_once_and_again_with_other_weights(places, report, tmp_path):
    write_classifier(tmp_path / "mine", FIVE)
    argv = ["evaluate", "--images", str(places["crops"]), "--detector", str(tmp_path / "mine"), "--out",
            str(tmp_path / "audit")]  # fmt: skip
    cli.run(argv)
    first = (tmp_path / "audit" / "detections.jsonl").read_bytes()
    cli.run(argv)
    assert (tmp_path / "audit" / "detections.jsonl").read_bytes() == first
    write_classifier(tmp_path / "mine", FIVE, seed=7)
    cli.run(argv)
    names = {line["flags"][str(tmp_path / "mine")]["by"] for line in lines_of(tmp_path / "audit")}
    assert (tmp_path / "audit" / "detections.jsonl").read_bytes() != first and len(names) == 1
    made = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert made["metrics"]["flag_rate"] is None and made["metrics"][f"flag_rate.{tmp_path / 'mine'}"]["of"] == 8
    assert made["protocols"] == made["labels"] == {} and made["images"] == 8
    assert "0.25" in on_blurring(tmp_path / "audit") and "flagged label" not in on_blurring(tmp_path / "audit")


def test_without_a_detector_nothing_is_said_to_be_safe(places, report, tmp_path):
    (tmp_path / "sneaker").mkdir()
    for n in range(2):
        (tmp_path / "sneaker" / f"{n}.png").write_bytes((places["crops"] / f"{n}.png").read_bytes())
    Image.new("RGB", (30, 30)).save(tmp_path / "sneaker" / "black.png")
    report = salun_sd.evaluate(
        images=tmp_path, recursive=True, concept_class="sneaker", detector="none", out=tmp_path / "audit",
        fail_if="ua < 0.1",
    )  # fmt: skip
    assert report["metrics"]["flag_rate"] is None and report["settings"]["detector"] is None and report["images"] == 2
    assert report["metrics"]["ua"]["of"] == 2 and report["blank"]["n"] == len(report["broken"]) == 1
    page = (tmp_path / "audit" / "report.html").read_text()
    assert 'id="papers"' not in page and 'id="detector"' not in page
    assert "0.5" in on_blurring(places["here"] / "all") and "0.5" not in on_blurring(tmp_path / "audit")  # of no score
    assert "not measured" in (tmp_path / "audit" / "report.md").read_text()


def test_a_gate_knows_each_detector_by_its_name(places, report, capsys):
    rate, name = report["metrics"][f"flag_rate.{places['two']}"]["rate"], f"flag_rate.{places['two']}"
    argv = ["evaluate", "--images", places["crops"], *(word for one in ("nudenet", places["five"], places["two"])
            for word in ("--detector", one)), "--out", places["here"] / "all"]  # fmt: skip
    cli.run([str(word) for word in [*argv, "--fail-if", f"{name} > {rate}"]])
    with pytest.raises(SystemExit) as e:
        cli.run([str(word) for word in [*argv, "--fail-if", f"{name} >= {rate}"]])
    assert e.value.code == 3 and name in capsys.readouterr().err


LOOK = "evaluate --images {crops} "
CASES = {
    "no such detector": (LOOK + "--detector {crops}", 1, "{crops} --detector"),
    "labels of which none is known": (LOOK + "--detector {odd}", 2, "{odd} LABEL_0 LABEL_1"),
    "one detector twice": (LOOK + "--detector nudenet --detector nudenet", 2, "--detector nudenet"),
    "none and one": (LOOK + "--detector none --detector nudenet", 2, "--detector none"),
    "weights of a detector that does not look": (
        LOOK + "--detector {two} --detector-model x.onnx", 2, "--detector-model --detector",
    ),
    "nothing to measure": (LOOK + "--detector none", 2, "'--detector none' --classifier"),
    "a bound on one that does not look": (LOOK + "--detector {two} --fail-if 'flag_rate > 0'", 2, "flag_rate.{two}"),
    "a bound on a paper's count without NudeNet": (
        LOOK + "--detector {two} --fail-if 'protocols.esd > 0'", 2, "protocols.esd",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("line", "code", "named"), CASES.values(), ids=CASES)
def test_what_cannot_detect_is_named_and_nothing_is_written(line, code, named, places, tmp_path, capsys):
    fails_with(f"{line} --out {{out}}", places | {"out": tmp_path / "out"}, code, named, capsys)
    assert list(tmp_path.iterdir()) == []
