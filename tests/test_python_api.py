"""docs/python-api.md runs, and what it claims is so. The functions have the parameters and defaults of the commands."""

import inspect
import io
import logging
import re
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path

import pytest
import torch

import salun_sd
from salun_sd.checkpoint.find import find
from salun_sd.cli import app
from salun_sd.core.mask import kept
from salun_sd.errors import SalunError, UsageError

PAGE = Path(__file__).parents[1] / "docs" / "python-api.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names after all blocks of the page, run in order in a folder of their own; also `stdout` and `folder`."""
    folder, names, out, log = tmp_path_factory.mktemp("api"), {}, io.StringIO(), logging.getLogger("salun_sd")
    level = log.level
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(folder)
        for block in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
            before = TEXT[: block.start(1)].count("\n")
            exec(compile("\n" * before + block[1], str(PAGE), "exec"), names)  # a traceback names the page's line
    log.setLevel(level)
    return names | {"stdout": out.getvalue(), "folder": folder}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], bits) -> tuple[int, int]:
    """How many weights outside the mask, and inside, have another value."""
    differ = {name: before[name] != after[name] for name in bits}
    return sum(int(d[~bits[n]].sum()) for n, d in differ.items()), sum(int(d[bits[n]].sum()) for n, d in differ.items())


@pytest.mark.slow
def test_the_functions_write_what_the_page_says(page):
    names = {p.name for p in page["folder"].iterdir()}
    assert {"mask-0.5.safetensors", "mask-0.1.safetensors", "sneaker.safetensors", "erased", "audit"} <= names
    assert "mask.safetensors" not in names and "clothed" not in names
    for (_, mask), density in zip(page["made"].files, (0.5, 0.1), strict=True):
        n, of = kept(mask.bits)
        assert n == round(density * of)
    assert page["record"]["changed"]["inside"] > 0.9 * kept(page["made"].files[0][1].bits)[0]
    erased = find(str(page["folder"] / "erased"))
    assert erased.fingerprint == page["record"]["erased"]["fingerprint"] != find("pocket").fingerprint
    for side in (page["report"], page["report"]["against"]):
        assert side["metrics"]["ua"]["of"] == 2
    assert page["foreseen"].settings["steps"] == 50 and set(page["foreseen"].plans) == {"images", "mask", "erase"}


@pytest.mark.slow
def test_nothing_but_the_pages_own_lines_is_printed(page):
    assert len(page["stdout"].splitlines()) == len(re.findall(r"^ *print\(", TEXT, re.MULTILINE))


@pytest.mark.slow
def test_a_finished_erasure_gives_its_record_again(page, monkeypatch):
    monkeypatch.chdir(page["folder"])
    again = salun_sd.erase(
        "pocket", "a photo of a sneaker", "a photo of a bag", mask=page["half"],
        out="sneaker.safetensors", format="patch", samples=8, steps=3, batch_size=4, lr=1e-4,
    )  # fmt: skip
    assert again == page["record"]


@pytest.mark.slow
def test_audits_of_the_same_prompts_are_a_table(page):
    prompts = {"prompts": "pocket", "where": ["class=sneaker"], "limit": 2, "denoising_steps": 5}
    report = salun_sd.evaluate("pocket", **prompts, concept_class="sneaker", out=page["folder"] / "audit-base")
    assert report["metrics"]["ua"] == page["report"]["against"]["metrics"]["ua"]
    [table] = salun_sd.compare([page["folder"] / "audit", page["folder"] / "audit-base"])
    assert table.prompts == report["prompts"]


@pytest.mark.parametrize(("model", "before", "bits"), [("unet", "base", "bits"), ("model", "start", "support")])
@pytest.mark.slow
def test_the_examples_move_the_masks_weights_and_no_others(page, model, before, bits):
    before, after, bits = page[before], page[model].state_dict(), page[bits]
    n, of = kept(bits)
    assert n == round(0.5 * of) == round(0.5 * sum(p.numel() for p in page[model].parameters()))
    outside, inside = moved(before, after, bits)
    assert outside == 0 and inside > 0.9 * n
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - bits.keys())  # buffers


@pytest.mark.slow
def test_what_the_example_saves_is_a_model(page):
    assert find(str(page["folder"] / "by-hand")).fingerprint != find("pocket").fingerprint


def test_every_name_is_on_the_page_and_in_the_package():
    for name in set(salun_sd.__all__) - {"SalunError", "UsageError"}:
        assert getattr(salun_sd, name) is not None and (name.startswith("_") or f"`{name}(" in TEXT), name
    with pytest.raises(AttributeError, match="nothing_such"):
        salun_sd.nothing_such  # noqa: B018


def plain(default: object) -> object:
    """A default as the library has it: enums by value, paths as text, and a list that is not given is empty."""
    value = default.value if isinstance(default, Enum) else default
    return str(value) if isinstance(value, Path) else None if value == () else value


@pytest.mark.parametrize("name", ["mask", "erase", "apply", "push", "evaluate", "merge", "compare"])
def test_a_function_has_the_parameters_and_defaults_of_its_command(name):
    [typed] = [command for command in app.COMMANDS if command.__name__ == name]
    command = dict(inspect.signature(typed).parameters)
    function = dict(inspect.signature(getattr(salun_sd, name)).parameters)
    for of_the_line in ("ctx", "plan"):
        command.pop(of_the_line, None)
    if name == "compare":
        command.pop("out")  # the tables as a file; the function returns them
    if name == "erase":
        function.pop("command")  # what the record names as the maker
    assert set(command) == set(function)
    if name in ("mask", "erase"):  # a plan may stand in its place
        assert command.pop("concept").default is None and function.pop("concept").default is inspect.Parameter.empty
    if name == "mask":  # several may be typed
        assert command.pop("density").default is None and function.pop("density").default == 0.5
    if name == "erase":  # not given, they are of a mask that is computed
        for n in ("density", "saliency_guidance"):
            assert command.pop(n).default is function.pop(n).default is None
    assert {n: plain(p.default) for n, p in command.items()} == {n: plain(p.default) for n, p in function.items()}


def test_a_plan_is_arguments_of_erase():
    arguments = salun_sd.plan("nudity")
    assert arguments.keys() <= inspect.signature(salun_sd.erase).parameters.keys()
    assert arguments["concept"][0].anchor and issubclass(SalunError, Exception)


@pytest.mark.parametrize("odd", ["", b"caf\xe9".decode("utf-8", "surrogateescape")], ids=ascii)
def test_no_function_takes_an_empty_text_or_odd_bytes(odd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for function, given in {
        salun_sd.mask: {"model": "pocket", "concept": "x"},
        salun_sd.erase: {"model": "pocket", "concept": "x", "anchor": "y", "out": "out"},
        salun_sd.apply: {"model": "pocket", "patch": "patch", "out": "out"},
        salun_sd.push: {"model": "out", "repo": "org/name"},
        salun_sd.evaluate: {"model": "pocket", "prompts": "pocket", "out": "out"},
    }.items():
        for name in inspect.signature(function).parameters.keys() & {*given, "forget", "retain", "against", "config"}:
            with pytest.raises(UsageError, match=name.upper() if name in ("model", "patch", "repo") else f"--{name}"):
                function(**given | {name: odd})
    with pytest.raises(UsageError, match="AUDITS"):
        salun_sd.compare(["here", odd])
    with pytest.raises(UsageError, match="SHARDS"):
        salun_sd.merge(["here", odd], out="out")
    assert list(tmp_path.iterdir()) == []
