import csv
import dataclasses
import functools
import io
import json
import re
import shutil

import pytest
from helpers.audits import EVIL, blanked, line, make_entry, make_run, read_table, several

from salun_sd.audit.compare import compare
from salun_sd.audit.forms import as_csv, as_json, as_markdown, lines, sentences
from salun_sd.audit.report import Run, assemble
from salun_sd.draw.prompts import Prompt, digest
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime import escape, seals


def write(folder, run: Run, base: Run | None = None, prompts="pocket", concepts=("sneaker",), **settings):
    """An audit's folder, as evaluate leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"sampling": {"identity": run.model, "scheduler": "DDIMScheduler", "steps": 25, "samples": 1}}
    rows = {row["case"]: Prompt(row["case"], row["prompt"], row["seed"], 3.0, row["class"]) for row in run.manifest}
    judge = {"classifier": "pocket judge", "classifier_sha256": "of the judge"}
    kept = {"prompts_sha256": digest(rows.values()), "where": [], "limit": None} | judge | drawn | settings
    made = assemble(run, base, prompts=prompts, settings=kept, concepts=concepts)
    (folder / "report.json").write_text(seals.line(made))
    seen = [line(found, classifier=kept["classifier_sha256"]) for found in run.detections]
    for name, of in (("manifest", run.manifest), ("detections", seen)):
        (folder / f"{name}.jsonl").write_text("".join(map(seals.line, of)))
    return folder


def named_in(sentence: str) -> list[str]:
    """What a sentence quotes."""
    return re.findall("“(.*?)”", sentence)


def named(run: Run, model: str) -> Run:
    return dataclasses.replace(run, model=model)


@pytest.fixture
def salun(tmp_path, erased, base):
    return write(tmp_path / "audits" / "salun", named(erased, "out/nudity/salun"), base)


@pytest.fixture
def esd(tmp_path, base):
    """Another model: all of the base's images but one sneaker, which is a bag."""
    seen = ["bag", "sneaker", "bag", "bag", "bag", "dress", "dress"]
    return write(tmp_path / "audits" / "esd", make_run(tmp_path / "esd", "out/nudity/esd", seen, {}), base)


def test_models_stand_side_by_side_and_their_base_once(salun, esd, base, erased):
    [table] = compare([salun, esd / "report.json"])
    assert [column.name for column in table.columns] == ["salun", "esd", "base: pocket"]
    assert [column.is_base for column in table.columns] == [False, False, True] and table.differs == {}
    report = json.loads((salun / "report.json").read_text())
    assert table.rows["ra"][0] == report["metrics"]["ra"] and table.rows["ra"][2] == report["against"]["metrics"]["ra"]
    assert table.rows["salun, boxes"] == [3, 0, 4] and table.rows["images"] == [7, 7, 7]
    assert list(table.rows)[:3] == ["ua", "ra", "flag_rate"] and "ua of sneaker" not in table.rows


def test_a_report_of_the_version_before_has_a_column_without_the_change(salun, esd):
    new, old = (json.loads((folder / "report.json").read_text()) for folder in (salun, esd))
    change = {"name": "change[x]", "sha256": None, "value": 0.1, "ci95": [0.05, 0.2], "images": 4}
    new["quality"]["change"] = change
    old["schema"] = 5
    for side in (old, old["against"]):
        side["quality"] = {name: None for name in side["quality"] if not name.startswith("change")}
    for folder, report in ((salun, new), (esd, old)):
        (folder / "report.json").write_text(seals.line(report))
    [table] = compare([salun, esd])
    assert table.rows["change[x]"] == [change, None, None] and table.differs == {} and "esd" in table.paired


def test_images_of_one_colour_have_a_row_of_their_own(salun, tmp_path, erased, base):
    other = write(tmp_path / "other", blanked(named(erased, "other"), 0, 1), base)
    [table] = compare([salun, other])
    assert table.rows["blank"] == table.rows["broken"] == [0, 2, 0] and table.rows["images"] == [7, 5, 7]


def test_lines_of_a_newer_run_are_not_paired_under_the_report_of_an_older_one(salun, esd, erased):
    """A run that was not finished leaves its .jsonl files beside the last report."""
    seen = [json.loads(text) for text in (esd / "detections.jsonl").read_text().splitlines()]
    another = [line(found, detector="nudenet 2") for found in seen]
    for detections, manifest in ((another, erased.manifest), (seen[:5], erased.manifest[:5])):
        for name, rows in (("detections.jsonl", detections), ("manifest.jsonl", manifest)):
            (esd / name).write_text("".join(map(seals.line, rows)))
        [table] = compare([salun, esd])
        assert table.paired == {} and list(table.unpaired) == ["esd"] and str(esd) in table.unpaired["esd"]


def test_other_models_are_paired_with_the_first(salun, esd, erased, base):
    [table] = compare([salun, esd])
    pairs = table.paired["esd"]
    counts = {name: [of[kind] for kind in ("both", "only_base", "only_model", "neither")] for name, of in pairs.items()}
    assert counts == {"ua": [2, 1, 0, 0], "ra": [2, 0, 2, 0], "flag_rate": [0, 0, 0, 7]}
    assert [of["p"] for of in pairs.values()] == [1, 0.5, 1]  # of 1 and of 2 that differ, all to one side
    turned = compare([esd, salun])[0].paired["salun"]["ra"]
    assert (turned["only_base"], turned["p"]) == (2, pairs["ra"]["p"]) and turned["difference"] == -0.5
    shown = lines(table)
    assert shown[3] == ["ra: p", "", "0.5 (0 : 2)", ""]
    [sentence] = sentences(table)
    assert "McNemar" in sentence and named_in(sentence) == ["salun"]


def test_what_does_not_compare_is_said_and_between_which(salun, tmp_path, erased, base):
    quick = named(erased, "out/nudity/quick")
    other = [line(found, detector="nudenet 2") for found in quick.detections]
    steps = {"sampling": {"identity": "x", "scheduler": "DDIMScheduler", "steps": 10, "samples": 1}}
    write(tmp_path / "quick", dataclasses.replace(quick, detections=other), **steps)
    write(tmp_path / "bag", named(erased, "out/nudity/bag"), concepts=["bag"])
    (tmp_path / "bag" / "manifest.jsonl").unlink()
    [table] = compare([salun, tmp_path / "quick", tmp_path / "bag"])
    assert table.differs == {
        "steps": {"25": ["salun", "bag"], "10": ["quick"]},
        "concepts": {"sneaker": ["salun", "quick"], "bag": ["bag"]},
        "detector": {"nudenet 3.4.2 320n.onnx c15d8273adad": ["salun", "bag"], "nudenet 2": ["quick"]},
    }
    steps, _, _, no_twin, no_lines = sentences(table)
    assert "steps" in steps and named_in(steps) == ["steps", "25", "salun", "bag", "10", "quick"]
    assert named_in(no_twin)[:2] == ["quick", "salun"] and "detector" in no_twin
    assert named_in(no_lines)[:2] == ["bag", "salun"] and "manifest.jsonl" in no_lines and table.paired == {}
    assert table.rows["ua of bag"][1] is None
    assert [row[0] for row in lines(table)][3:5] == ["ua of sneaker", "ua of bag"]


def test_what_was_not_counted_alike_is_said(salun, esd, base):
    """A protocol that another version counted otherwise, the version, and how the base was drawn."""
    report = json.loads((esd / "report.json").read_text())
    report["settings"]["protocols"]["esd"] |= {"threshold": 0.3, "labels": ["ANUS_EXPOSED"], "source": "read again"}
    report["settings"]["sampling_against"] = {"identity": "x", "steps": 50}
    (esd / "report.json").write_text(seals.line(report | {"salun_sd": "0.9"}))
    [table] = compare([salun, esd])
    assert list(table.differs) == ["protocols.esd.labels", "protocols.esd.threshold", "salun_sd"]
    assert table.differs["protocols.esd.threshold"] == {"0.0": ["salun"], "0.3": ["esd"]}
    [threshold] = [sentence for sentence in sentences(table) if "protocols.esd.threshold" in sentence]
    assert named_in(threshold)[1:] == ["0.0", "salun", "0.3", "esd"]
    first = json.loads((salun / "report.json").read_text())
    first["settings"]["sampling_against"] = {"identity": "x", "steps": 25}
    (salun / "report.json").write_text(seals.line(first))
    assert compare([salun, esd])[0].differs["against.steps"] == {"25": ["salun"], "50": ["esd"]}


def test_an_older_audit_whose_dtype_is_not_said_drew_in_float32(salun, tmp_path, erased):
    drawn = {"identity": "x", "scheduler": "DDIMScheduler", "steps": 25, "samples": 1}
    for dtype in ("float32", "bfloat16"):
        write(tmp_path / dtype, named(erased, f"out/nudity/{dtype}"), sampling=drawn | {"dtype": dtype})
    [table] = compare([salun, tmp_path / "float32", tmp_path / "bfloat16"])
    assert table.differs == {"dtype": {"float32": ["salun", "float32"], "bfloat16": ["bfloat16"]}}


def test_other_numbers_of_images_have_no_pairs(salun, tmp_path, erased):
    write(tmp_path / "three", several(erased, 3))
    [table] = compare([salun, tmp_path / "three"])
    assert table.differs["images"] == {"7": ["nudity/salun"], "21": ["erased"]}
    assert "case 0, image 1" in table.unpaired["erased"] and len(lines(table)[0]) == 4


def test_other_weights_of_one_name_are_said(tmp_path, erased):
    def audit(model, sha256, clip):
        folder = write(tmp_path / model, named(erased, model), classifier_sha256=sha256)
        report = json.loads((folder / "report.json").read_text())
        report["quality"]["clip_score"] = {"name": "clip_score[c]", "sha256": clip, "value": 0.3, "images": 4}
        (folder / "report.json").write_text(seals.line(report))
        return folder

    first, alike, other = audit("a", "one", "x"), audit("b", "one", "x"), audit("c", "two", "y")
    assert compare([first, alike])[0].differs == {} and "b" in compare([first, alike])[0].paired
    [table] = compare([first, other])
    assert table.differs["classifier_sha256"] == {"one": ["a"], "two": ["c"]}
    assert table.differs["clip_score sha256"] == {"x": ["a"], "y": ["c"]}
    assert list(table.unpaired) == ["c"] and "classifier_sha256" in table.unpaired["c"]


def test_other_prompts_of_one_name_have_tables_of_their_own(salun, esd, tmp_path, erased):
    changed = [line(row, prompt="a bag") if row["case"] == 3 else row for row in erased.manifest]
    for name in ("c", "d"):
        write(tmp_path / name, named(dataclasses.replace(erased, manifest=changed), name))
    tables = compare([salun, tmp_path / "c", esd, tmp_path / "d"])
    assert [[c.name for c in t.columns if not c.is_base] for t in tables] == [
        ["out/nudity/salun", "out/nudity/esd"],
        ["c", "d"],
    ]
    for table in tables:
        assert table.prompts == "pocket" and table.namesake and named_in(sentences(table)[0]) == ["pocket"]
    assert tables[0].prompts_sha256 != tables[1].prompts_sha256
    [alone] = compare([salun, esd])
    assert not alone.namesake and not any("pocket" in sentence for sentence in sentences(alone))
    with pytest.raises(SalunError, match="'pocket'.*'pocket'.*--prompts"):
        compare([salun, tmp_path / "c"])


def test_the_digest_is_of_what_is_drawn_and_in_no_order():
    rows = [Prompt(0, "a", 5, 7.5, "bag"), Prompt(1, "b\ud800", 6, 7.5)]
    assert digest(rows) == digest(rows[::-1]) == digest([rows[0]._replace(categories=("x",)), rows[1]])
    others = [{"case": 2}, {"text": "c"}, {"seed": 7}, {"guidance": 7}, {"label": None}, {"size": (512, 768)}]
    assert len({digest([rows[0]._replace(**other), rows[1]]) for other in [{}, *others]}) == 7


def test_a_prompt_set_called_by_two_paths_is_one(salun, tmp_path, erased):
    write(tmp_path / "again", named(erased, "other"), prompts="/data/pocket.csv")
    [table] = compare([salun, tmp_path / "again"])
    assert len(table.paired["other"]) == 3


def test_names_are_short_and_never_the_same(salun, tmp_path, erased, base):
    shutil.copytree(salun, tmp_path / "audits" / "again")
    [table] = compare([salun, tmp_path / "audits" / "again"])
    assert [c.name for c in table.columns] == ["out/nudity/salun (salun)", "out/nudity/salun (again)", "base: pocket"]
    reports = [tmp_path / "reports" / name for name in ("salun.json", "esd.json", "esd.txt")]
    reports[0].parent.mkdir()
    for report in reports:
        shutil.copy(salun / "report.json", report)
    [table] = compare(reports[:2])
    assert [c.name for c in table.columns[:2]] == ["out/nudity/salun (salun)", "out/nudity/salun (esd)"]
    assert len(list(csv.DictReader(io.StringIO(as_csv([table]))))) == 3 * len(table.rows)
    assert [c.name for c in compare(reports)[0].columns[:3]] == [
        "1. out/nudity/salun (salun)", "2. out/nudity/salun (esd)", "3. out/nudity/salun (esd)"]  # fmt: skip
    other = write(tmp_path / "third", named(erased, "org/salun"), named(base, "sd15"))
    [table] = compare([salun, other])
    assert [c.name for c in table.columns] == [
        "out/nudity/salun", "org/salun", "base of out/nudity/salun: pocket", "base of org/salun: sd15"]  # fmt: skip


def test_what_is_no_audit_is_named(salun, tmp_path):
    def fails(*paths, error=SalunError) -> str:
        with pytest.raises(error) as caught:
            compare([salun, *paths])
        return str(caught.value)

    assert str(tmp_path / "nowhere") in fails(tmp_path / "nowhere", error=UsageError)
    assert str(tmp_path) in fails(tmp_path, error=UsageError)
    assert "twice" in fails(salun / "report.json", error=UsageError)
    assert "two" in fails(error=UsageError)


def test_what_is_no_report_is_named_with_what_to_do(salun, tmp_path):
    def fails() -> str:
        with pytest.raises(SalunError) as caught:
            compare([salun, tmp_path])
        return str(caught.value)

    file = tmp_path / "report.json"
    report = json.loads((salun / "report.json").read_text())
    for content, word in [
        ("{", "damaged"), (b"\xff\xfe", "damaged"), ("[]", "damaged"), ('{"schema": 3}', "no report"),
        (json.dumps(report | {"schema": 3}), "schema 3"), (json.dumps(report | {"schema": 99}), "schema 99"),
        (json.dumps({k: v for k, v in report.items() if k != "concepts"}), "damaged"),
        (json.dumps(report | {"metrics": {"ua": {"n": "x", "of": 3}}}), "damaged"),
        (json.dumps(report | {"metrics": report["metrics"] | {"ra": share(0, 0, 0.0)}}), "damaged"),
        (json.dumps(report | {"metrics": report["metrics"] | {"ra": share(1, 2, 0.5) | {"ci95": []}}}), "damaged"),
        (json.dumps(report | {"model": None}), "damaged"),
        (json.dumps(report | {"settings": report["settings"] | {"prompts_sha256": []}}), "damaged"),
    ]:  # fmt: skip
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        sentence = fails()
        assert str(file) in sentence and word in sentence and "evaluate" in sentence or "Update" in sentence, content
    file.write_text(seals.line(report))
    (tmp_path / "manifest.jsonl").write_text("{")
    (tmp_path / "detections.jsonl").write_text("")
    assert "manifest.jsonl, line 1, is damaged" in fails()
    for name in ("manifest.jsonl", "detections.jsonl"):
        shutil.copy(salun / name, tmp_path)
    found = next(seals.read_lines(salun / "detections.jsonl"))
    for key, value in [("detector", []), ("flags", None), ("flags", {"five": {"score": 0.5}}), ("boxes", [{}]),
                       ("concepts", {"a": None}), ("predicted", []), ("change", {})]:  # fmt: skip
        (tmp_path / "detections.jsonl").write_text(seals.line(found | {key: value}))
        assert f"line 1, is damaged: {key}" in fails().replace("it has no ", "")


def share(n: int, of: int, rate: float, low: float = 0.0, high: float = 1.0) -> dict:
    return {"n": n, "of": of, "rate": rate, "ci95": [low, high], "interval": "wilson"}


def attack(folder, judge="the judge", **about):
    """An attack more in the report of an audit."""
    report = json.loads((folder / "report.json").read_text())
    entry = make_entry() | about
    entry["sides"]["base"] = entry["sides"]["control"]
    under = {"judged_by": judge, "false_positives": None, "of": {"prefix": entry}, "failed": {}, "not_run": {}}
    (folder / "report.json").write_text(seals.line(report | {"attacks": under}))
    return folder


def test_attacks_stand_beside_their_control_and_floor(salun, esd):
    attack(salun), attack(esd)
    [table] = compare([salun, esd])
    names = [f"{which}asr.prefix, best of 2" for which in ("", "control.", "floor.", "base.")]
    assert [[metric and metric["n"] for metric in table.rows[name]] for name in names] == [
        [3, 3, None], [2, 2, None], [1, 1, None], [2, 2, None]]  # fmt: skip
    assert list(table.rows)[3:7] == names and table.differs == {}
    rows = list(csv.DictReader(io.StringIO(as_csv([table]))))
    assert [row["n"] for row in rows if row["metric"] == names[0]] == ["3", "3", ""]


def test_attacks_that_were_not_run_alike_are_said_and_have_rows_of_their_own(salun, esd, tmp_path, erased):
    attack(salun), attack(esd, judge="another", tries=9)
    [table] = compare([salun, esd])
    assert [row for row in table.rows if row.startswith("asr.")] == ["asr.prefix, best of 2", "asr.prefix, best of 9"]
    assert list(table.differs) == ["attack prefix judge"]
    without = write(tmp_path / "without", named(erased, "none"))
    [table] = compare([salun, without])
    assert table.differs == {} and table.rows["asr.prefix, best of 2"][1] is None


def test_a_report_of_the_version_before_has_no_attacks(salun, esd):
    report = json.loads((esd / "report.json").read_text())
    del report["attacks"]
    (esd / "report.json").write_text(seals.line(report | {"schema": 7}))
    [table] = compare([attack(salun), esd])
    assert table.rows["asr.prefix, best of 2"][1] is None and "esd" in table.paired


@pytest.mark.parametrize(("place", "value"), [
    ("sides.model.asr", {"n": 5, "of": 4, "rate": 1.25, "ci95": [0.0, 1.0]}),
    ("sides.floor.pre.rate", 0.5),
    ("sides.model.curve", [{"n": 1, "of": 4, "rate": 0.5, "ci95": [0.0, 1.0]}]),
    ("paired.floor.difference", 0.75),
])  # fmt: skip
def test_a_report_whose_attacks_contradict_themselves_is_refused_with_their_key(salun, esd, place, value):
    report = json.loads((attack(salun) / "report.json").read_text())
    *inside, last = place.split(".")
    functools.reduce(dict.__getitem__, inside, report["attacks"]["of"]["prefix"])[last] = value
    (salun / "report.json").write_text(json.dumps(report))
    with pytest.raises(SalunError, match=rf"attacks\.of\.prefix\.{'.'.join(place.split('.')[:2])}"):
        compare([salun, esd])


def test_a_report_whose_attacks_lack_something_is_damaged(salun, esd):
    report = json.loads((attack(salun) / "report.json").read_text())
    del report["attacks"]["of"]["prefix"]["sides"]["model"]["asr"]
    (salun / "report.json").write_text(json.dumps(report))
    with pytest.raises(SalunError, match="damaged"):
        compare([salun, esd])


IMPOSSIBLE = {  # a value that the numbers of a report cannot have, by its place
    "metrics.ua": share(4, 3, 1.333333),
    "metrics.ra": share(1, 4, 0.5),
    "metrics.flag_rate": share(-1, 7, -0.142857),
    "concepts.sneaker.ua": share(8, 8, 1.0),
    "labels.FACE_FEMALE": share(1, 7, 0.142857, 0.2, 0.3),
    "classes.bag.became": {"bag": 4},
    "protocols.salun.of": 8,
    "against.metrics.ra.rate": float("nan"),
    "against.metrics.flag_rate.ci95": [float("-inf"), 1.0],
    "quality.fid": {"name": "FID", "value": float("nan"), "sha256": "x", "reference": "y"},
    "paired.ra.difference": 0.75,
    "paired.flag_rate.p": 1.5,
    "paired.ua.both": -1,
}


@pytest.mark.parametrize("place", IMPOSSIBLE)
def test_a_report_that_contradicts_itself_is_refused_with_file_and_key(salun, esd, place):
    file = salun / "report.json"
    report = json.loads(file.read_text())
    *inside, last = place.split(".")
    functools.reduce(dict.__getitem__, inside, report)[last] = IMPOSSIBLE[place]
    file.write_text(json.dumps(report))
    with pytest.raises(SalunError) as caught:
        compare([salun, esd])
    key = ".".join(place.removeprefix("against.").split(".")[:2])
    assert str(file) in str(caught.value) and key in str(caught.value)


@pytest.mark.parametrize("name", ["report.json", "manifest.jsonl", "detections.jsonl"])
def test_a_sealed_file_that_was_edited_is_named(salun, esd, name):
    file = salun / name
    file.write_text(file.read_text().replace("sneaker", "sneakeR", 1))
    with pytest.raises(SalunError, match=re.escape(str(file))):
        compare([salun, esd])


def test_tables_beside_another_report_are_not_its_own(salun, esd):
    """The .jsonl files are of report.json, not of what else lies in the folder."""
    kept = (salun / "report.json").rename(salun / "kept.json")
    [table] = compare([kept, esd])
    assert list(table.unpaired) == ["esd"] and str(salun) in table.unpaired["esd"] and table.paired == {}


def test_tables_to_files(salun, tmp_path, erased, base):
    manifest = [line(row, prompt="a\u2028b") for row in erased.manifest]
    evil = named(dataclasses.replace(erased, manifest=manifest), EVIL)
    rows = json.loads((salun / "report.json").read_text())["settings"]["prompts_sha256"]
    report = json.loads((write(tmp_path / "evil", evil, prompts_sha256=rows) / "report.json").read_text())
    report["quality"] = {
        "fid": {"name": f"fid[{EVIL}]", "sha256": "x", "value": 1.5, "images": [7, 9], "reference": "photos"},
        "kid": None,
    }
    (tmp_path / "evil" / "report.json").write_text(seals.line(report))
    tables = compare([salun, tmp_path / "evil"])
    [table] = tables
    shown = read_table(as_markdown(tables), "# Audits")
    assert len(shown) == 2 + len(lines(table)) and {len(row) for row in shown} == {4} and "@mention" in shown[0][2]
    rows = list(csv.DictReader(io.StringIO(as_csv(tables))))
    assert len(rows) == len(table.rows) * 3 and rows[0]["metric"] == "ua" and rows[0]["n"] == "3"
    [fid] = [row for row in rows if row["metric"].startswith("fid") and row["value"]]
    assert (fid["model"], fid["value"], fid["n"]) == (escape.line(EVIL), "1.5", "")
    assert table.differs["reference"] == {"none": ["out/nudity/salun"], "photos": [EVIL]}
    kept = json.loads(as_json(tables))["tables"][0]
    assert kept["rows"] == table.rows and kept["columns"][1]["model"] == EVIL and kept["unpaired"] == table.unpaired
