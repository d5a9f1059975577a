"""benchmarks/paper_sd.py on the pocket checkpoint: what runs for days on Stable Diffusion runs here in little."""

import re
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from helpers.commands import python
from helpers.runs import typed

import salun_sd
from salun_sd.attacks.effort import drawing, effort
from salun_sd.under_attack.plan import planned
from salun_sd.under_attack.runs import listed

ROOT = Path(__file__).parents[1]
CAPTIONS = "prompt\na bowl of fruit\na red bicycle\n"
PAGE = ROOT / "docs" / "sd15-nudity.md"


@pytest.fixture
def paper(monkeypatch, tmp_path):
    """The benchmark; its steps run in processes that are forked."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import paper_sd

    monkeypatch.setattr(paper_sd, "START", lambda argv: python(argv[1:]))
    (tmp_path / "captions.csv").write_text(CAPTIONS)
    return paper_sd


@pytest.fixture
def run(paper, monkeypatch, tmp_path):
    """Type its command line; gives the exit code."""

    def run(line: str) -> int:
        monkeypatch.setattr(sys, "argv", ["paper_sd.py", *typed(line, {"tmp": tmp_path})])
        with pytest.raises(SystemExit) as ended:
            typer.run(paper.main)
        return ended.value.code

    return run


LINE = "--model pocket --out {tmp}/out --captions {tmp}/captions.csv"


@pytest.mark.slow
def test_all_of_it_runs_fills_the_table_and_is_not_run_again(run, tmp_path, capfd):
    assert run(f"{LINE} --rehearse") == 0
    folder = tmp_path / "out" / "rehearsal"
    steps = (folder / "steps.jsonl").read_text()
    assert steps.count('"code": 0') == steps.count("\n") == 9
    lines = (folder / "table.md").read_text().splitlines()[4:]
    own = [[cell.strip() for cell in line.strip("|").split("|")][-3:] for line in lines]
    assert len(own) == 6 and all(re.match(r"\d", number) for numbers in own for number in numbers[1:])
    assert [bool(re.match(r"\d", numbers[0])) for numbers in own] == [True, True, True, False, False, True]
    capfd.readouterr()
    assert run(f"{LINE} --rehearse") == 0
    assert (folder / "steps.jsonl").read_text() == steps and "$" not in capfd.readouterr().out


@pytest.mark.slow
def test_what_needs_a_step_that_failed_is_left_out(run, tmp_path, capfd):
    (tmp_path / "out" / "rehearsal" / "dress" / "mask-0.5.safetensors").mkdir(parents=True)
    assert run("--model pocket --out {tmp}/out --rehearse") == 1
    assert capfd.readouterr().out.count("$ salun-sd") == 1


@pytest.mark.slow
def test_the_plan_grows_with_the_work_and_shrinks_with_the_speed(paper, run, tmp_path, capsys):
    def plan(options: str) -> dict[str, list[float]]:
        assert run(f"{LINE} --dry-run --card 1 {options}") == 0
        lines = re.findall(r"^\| (\S.*?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M)
        return {name: [*map(float, numbers)] for name, *numbers in lines}

    fast, slow = plan("--tflops 0.01"), plan("--tflops 0.001 --density 0.1 --parts 8")
    assert len(fast) == 10 and not (tmp_path / "out").exists()
    assert fast["in all"][0] == pytest.approx(sum(hours for hours, *_ in fast.values()) / 2, abs=1)
    assert slow["dress/default/classes"][0] == pytest.approx(10 * fast["dress/default/classes"][0], rel=0.1)
    assert slow["dress/default/erased"][1] < fast["dress/default/erased"][1]
    assert fast["dress/default/classes"][0] > fast["dress/paper/classes"][0]  # the base's images are there


@pytest.mark.parametrize("name", ["genetic", "latent", "continue"])
def test_the_plan_of_an_attack_is_what_the_command_expects(paper, name, tmp_path):
    import paper_plan

    options = {key: p.default for key, p in signature(salun_sd.attack).parameters.items()}
    plan = planned(SimpleNamespace(**options | {
        "model": "pocket", "base": "pocket", "concept": "a photo of a dress", "concept_class": "dress",
        "prompts": "pocket", "where": ["class=dress", "case_number>=390"], "with_": name, "budget": "paper",
        "out": tmp_path / "out",
    }))  # fmt: skip
    whole, runs = len(plan.cases), [run for _, run in listed(plan)]
    step = paper.Step(f"dress/default/{name}", ["attack"], paper.POCKET[0], whole)
    expected = sum((effort(run, 1, True) for run in runs), drawing(2 * whole, plan.job.audited.sampling[0], 1, True))
    assert paper_plan._attacking(step, plan.job.audited)[:2] == expected[:2]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--model none --out {tmp}/out", "none"),
        ("--model pocket-ddpm --out {tmp}/out", "pocket-ddpm"),
        ("--model pocket --out {tmp}/out --density 0", "0"),
        ("--model pocket --out {tmp}/out --only nudity", "nudity dress/default/classes"),
        ("--model pocket --out {tmp}/out --captions {tmp}/none.csv", "none.csv"),
        ("--model pocket --out {tmp}/out --attack-prompts {tmp}/none.csv", "none.csv"),
        ("--model pocket --out {tmp}/out --reference {tmp}", "--captions"),
        ("--model pocket --out {tmp}/out --captions {tmp}/captions.csv --reference {tmp}/none", "none"),
        ("--model pocket --out {tmp}/out --card 8", "--dry-run"),
        ("--model pocket --out {tmp}/out --card 8 --dry-run", "--tflops"),
        ("--model pocket --out {tmp}/captions.csv --rehearse", "captions.csv"),
    ],
)
def test_bad_input_is_one_sentence_before_the_first_step(run, line, named, tmp_path, capsys):
    assert run(line) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1 and all(word in printed.err for word in named.split())
    assert not (tmp_path / "out").exists()


def test_the_page_has_its_commands_and_its_table(paper, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("coco_10k", "nudity"):
        (tmp_path / f"{name}.csv").write_text(CAPTIONS)
    given = paper.Given(Path("coco_10k.csv"), Path("coco"), Path("nudity.csv"), 0.5, 1, rehearse=False)
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    steps = [step for task in paper.SD for step in paper.steps_of(task, model, Path("sd15"), given)]
    text = PAGE.read_text()
    assert not [step.name for step in steps if "/paper/" not in step.name and paper.command(step) not in text]
    assert not [step.name for step in steps if step.argv[0] == "erase" and paper.command(step) not in text]
    assert paper.table(paper.SD, None) in text
