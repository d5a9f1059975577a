import csv
import dataclasses
import io
import json
import shutil

import pytest
from test_markdown import EVIL, read_table
from test_report import base, erased, line, make_run  # noqa: F401

from salun_sd.compare import as_csv, as_json, as_markdown, compare, lines, sentences
from salun_sd.errors import SalunError, UsageError
from salun_sd.report import Run, assemble, in_pairs
from salun_sd.stats import mcnemar


def write(folder, run: Run, base: Run | None = None, prompts="pocket", concepts=("sneaker",), **settings):  # noqa: F811
    """An audit's folder, as evaluate leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"sampling": {"identity": run.model, "scheduler": "DDIMScheduler", "steps": 25, "samples": 1}}
    kept = {"where": [], "limit": None, "classifier": "pocket judge"} | drawn | settings
    made = assemble(run, base, prompts=prompts, settings=kept, concepts=concepts)
    (folder / "report.json").write_text(json.dumps(made))
    for name, of in (("manifest", run.manifest), ("detections", run.detections)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of))
    return folder


def named(run: Run, model: str) -> Run:
    return dataclasses.replace(run, model=model)


@pytest.fixture
def salun(tmp_path, erased, base):  # noqa: F811
    return write(tmp_path / "audits" / "salun", named(erased, "out/nudity/salun"), base)


@pytest.fixture
def esd(tmp_path, base):  # noqa: F811
    """Another model: all of the base's images but one sneaker, which is a bag."""
    seen = ["bag", "sneaker", "bag", "bag", "bag", "dress", "dress"]
    return write(tmp_path / "audits" / "esd", make_run(tmp_path / "esd", "out/nudity/esd", seen, {}), base)


def test_models_stand_side_by_side_and_their_base_once(salun, esd, base, erased):  # noqa: F811
    [table] = compare([salun, esd / "report.json"])
    assert [column.name for column in table.columns] == ["salun", "esd", "base: pocket"]
    assert [column.is_base for column in table.columns] == [False, False, True] and table.differs == {}
    report = json.loads((salun / "report.json").read_text())
    assert table.rows["ra"][0] == report["metrics"]["ra"] and table.rows["ra"][2] == report["against"]["metrics"]["ra"]
    assert table.rows["salun, boxes"] == [3, 0, 4] and table.rows["images"] == [7, 7, 7]
    assert list(table.rows)[:3] == ["ua", "ra", "flag_rate"] and "ua of sneaker" not in table.rows


def test_other_models_are_paired_with_the_first(salun, esd, erased, base):  # noqa: F811
    [table] = compare([salun, esd])
    pairs = table.paired["esd"]
    assert pairs["ra"] == {**pairs["ra"], "both": 2, "only_base": 0, "only_model": 2, "neither": 0, "p": mcnemar(0, 2)}
    runs = [Run(folder.name, folder, *([json.loads(row) for row in (folder / f"{name}.jsonl").open()]
                                       for name in ("manifest", "detections"))) for folder in (esd, salun)]  # fmt: skip
    assert pairs == in_pairs(
        *runs, ["sneaker"], json.loads((esd / "report.json").read_text())["settings"]["labels"], 0.5
    )
    turned = compare([esd, salun])[0].paired["salun"]["ra"]
    assert (turned["only_base"], turned["p"]) == (2, pairs["ra"]["p"]) and turned["difference"] == -0.5
    shown = lines(table)
    assert shown[3] == ["ra: p", "", "0.5 (0 : 2)", ""]
    [said] = sentences(table)
    assert said.startswith("p: exact McNemar, image by image, against “salun”;")


def test_what_does_not_compare_is_said_and_between_which(salun, tmp_path, erased, base):  # noqa: F811
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
    said = sentences(table)
    assert said[0] == "Not the same: steps: “25” for “salun”, “bag”; “10” for “quick”."
    assert said[3] == "No pairs of “quick” and “salun”: “other detector”."
    assert "holds no manifest.jsonl and detections.jsonl" in said[4] and table.paired == {}
    assert table.rows["ua of bag"][1] is None and [row[0] for row in lines(table)][3:5] == [
        "ua of sneaker",
        "ua of bag",
    ]


def test_other_prompts_under_one_name_have_no_pairs(salun, tmp_path, erased):  # noqa: F811
    half = dataclasses.replace(erased, manifest=erased.manifest[:4], detections=erased.detections[:4])
    write(tmp_path / "half", half)
    changed = [line(row, prompt="a bag") if row["case"] == 3 else row for row in erased.manifest]
    write(tmp_path / "changed", named(dataclasses.replace(erased, manifest=changed), "other"))
    [table] = compare([salun, tmp_path / "half", tmp_path / "changed"])
    assert table.differs["images"] == {"7": ["out/nudity/salun", "other"], "4": ["out/erased"]}
    assert "lacks case 4, image 0" in table.unpaired["out/erased"]
    assert "prompt of case 3" in table.unpaired["other"] and len(lines(table)[0]) == 5


def test_each_prompt_set_has_its_table(salun, esd, tmp_path, erased):  # noqa: F811
    people = [line(row, prompt="a person") for row in erased.manifest]
    for name in ("salun", "esd"):
        run = named(dataclasses.replace(erased, manifest=people), f"out/nudity/{name}")
        write(tmp_path / f"people-{name}", run, prompts="people")
    tables = compare([salun, tmp_path / "people-salun", esd, tmp_path / "people-esd"])
    assert [(t.prompts, [c.name for c in t.columns if not c.is_base]) for t in tables] == [
        ("pocket", ["salun", "esd"]), ("people", ["salun", "esd"])]  # fmt: skip
    with pytest.raises(SalunError, match="No two of these audits are of the same prompts: .*'pocket'.*'people'"):
        compare([salun, tmp_path / "people-esd"])


def test_a_prompt_set_called_by_two_paths_is_one(salun, tmp_path, erased):  # noqa: F811
    write(tmp_path / "again", named(erased, "other"), prompts="/data/pocket.csv")
    [table] = compare([salun, tmp_path / "again"])
    assert len(table.paired["other"]) == 3


def test_names_are_short_and_never_the_same(salun, tmp_path, erased, base):  # noqa: F811
    shutil.copytree(salun, tmp_path / "audits" / "again")
    [table] = compare([salun, tmp_path / "audits" / "again"])
    assert [c.name for c in table.columns] == ["out/nudity/salun (salun)", "out/nudity/salun (again)", "base: pocket"]
    other = write(tmp_path / "third", named(erased, "org/salun"), named(base, "sd15"))
    [table] = compare([salun, other])
    assert [c.name for c in table.columns] == [
        "out/nudity/salun", "org/salun", "base of out/nudity/salun: pocket", "base of org/salun: sd15"]  # fmt: skip


def test_what_is_no_audit_is_said(salun, tmp_path):
    def said(*paths) -> str:
        with pytest.raises(SalunError) as error:
            compare([salun, *paths])
        return str(error.value)

    assert "There is no" in said(tmp_path / "nowhere") and "There is no" in said(tmp_path)
    assert "is given twice" in said(salun / "report.json")
    with pytest.raises(UsageError, match="two audits or more"):
        compare([salun])
    file = tmp_path / "report.json"
    report = json.loads((salun / "report.json").read_text())
    for content, words in [
        ("{", "is damaged: it is no JSON"), (b"\xff\xfe", "is damaged"), ("[]", "is no report of an audit"),
        ('{"schema": 3}', "is no report"), (json.dumps(report | {"schema": 2}), "has schema 2, and compare reads 3 to"),
        (json.dumps(report | {"schema": 99}), "of a newer salun-sd"),
        (json.dumps({k: v for k, v in report.items() if k != "concepts"}), "is damaged: it is not what"),
        (json.dumps(report | {"metrics": {"ua": {"n": "x", "of": 3}}}), "is damaged: it is not what"),
        (json.dumps(report | {"model": None}), "is damaged: it is not what"),
    ]:  # fmt: skip
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert words in said(tmp_path), content
    file.write_text(json.dumps(report))
    (tmp_path / "manifest.jsonl").write_text("{")
    (tmp_path / "detections.jsonl").write_text("")
    assert "manifest.jsonl is damaged" in said(tmp_path)


def test_the_oldest_schema_is_still_read(salun, esd):
    """Schema 3 had counts of labels, and no differences."""
    report = json.loads((esd / "report.json").read_text())
    for side in (report, report["against"]):
        side["labels"] = {name: share["n"] for name, share in side["labels"].items()}
    report["paired"] = {k: {n: v[n] for n in ("both", "only_base", "only_model", "neither", "p")} for k, v in
                        report["paired"].items()}  # fmt: skip
    before = as_csv(compare([salun, esd]))
    (esd / "report.json").write_text(json.dumps(report | {"schema": 3}))
    assert as_csv(compare([salun, esd])) == before


def test_tables_to_files(salun, tmp_path, erased, base):  # noqa: F811
    manifest = [line(row, prompt="a\u2028b") for row in erased.manifest]
    evil = named(dataclasses.replace(erased, manifest=manifest), EVIL)
    report = json.loads((write(tmp_path / "evil", evil) / "report.json").read_text())
    report["quality"] = {
        "fid": {"name": f"fid[{EVIL}]", "value": 1.5, "images": [7, 9], "reference": "photos"},
        "kid": None,
    }
    (tmp_path / "evil" / "report.json").write_text(json.dumps(report))
    tables = compare([salun, tmp_path / "evil"])
    [table] = tables
    shown = read_table(as_markdown(tables), "# Audits")
    assert len(shown) == 2 + len(lines(table)) and {len(row) for row in shown} == {4} and "@mention" in shown[0][2]
    rows = list(csv.DictReader(io.StringIO(as_csv(tables))))
    assert len(rows) == len(table.rows) * 3 and rows[0]["metric"] == "ua" and rows[0]["n"] == "3"
    [fid] = [row for row in rows if row["metric"].startswith("fid") and row["value"]]
    assert (fid["model"], fid["value"], fid["n"]) == (EVIL, "1.5", "")
    assert table.differs["reference"] == {"none": ["out/nudity/salun"], "photos": [EVIL]}
    kept = json.loads(as_json(tables))["tables"][0]
    assert kept["rows"] == table.rows and kept["columns"][1]["model"] == EVIL and kept["unpaired"] == table.unpaired
