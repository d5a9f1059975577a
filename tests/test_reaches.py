"""What the package uses of other libraries beside their public interface: each reach is named, and is still there."""

import re
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import tomllib
import torch
import torch.nn.functional as F
import typer
from diffusers.models.attention_processor import Attention

import salun_sd
from salun_sd.audit.detect import load_detector

ROOT = Path(__file__).parents[1]
PACKAGE = Path(salun_sd.__file__).parent
# Package with an upper bound => what is reached in it. Who raises a bound runs this file with the new version.
REACHES = {
    "accelerate": ["accelerate.utils.parse_flag_from_env"],
    "diffusers": ["diffusers.loaders.single_file_utils.fetch_diffusers_config", "diffusers.utils.DummyObject"],
    "nudenet": ["nudenet.NudeDetector"],
    "torch": [
        "torch.cpu._is_amx_fp16_supported",
        "torch.cpu._is_amx_tile_supported",
        "torch.cpu._is_avx512_bf16_supported",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "torch.utils._python_dispatch.TorchDispatchMode",
    ],
    "typer": ["typer.core.TyperCommand.make_parser", "typer.core.TyperGroup"],
}
OURS = r"self|cls|\)|\]"  # what stands before an underscore that is of this package
NAMED_TUPLE = ("_replace", "_asdict", "_fields", "_make")


def resolved(name: str):
    package, *rest = name.split(".")
    value, path = import_module(package), package
    for part in rest:
        path = f"{path}.{part}"
        value = getattr(value, part, None) or import_module(path)
    return value


@pytest.mark.parametrize("name", [name for names in REACHES.values() for name in names])
def test_what_is_reached_is_there(name):
    assert callable(resolved(name))


def test_a_package_that_is_reached_into_has_an_upper_bound():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {re.match(r"[\w-]+", line)[0]: "<" in line.partition(";")[0] for line in needed}
    assert {package for package in REACHES if not bounds[package]} == set()


def test_no_other_private_name_is_used():
    listed = {part for names in REACHES.values() for name in names for part in name.split(".") if part[0] == "_"}
    for file in PACKAGE.rglob("*.py"):
        code = re.sub(r'"[^"\n]*"|#.*', "", re.sub(r'""".*?"""', "", file.read_text(), flags=re.S))
        for owner, name in re.findall(r"([\w)\]]+)\.(_[a-z]\w*)", code):
            assert re.search(rf"({OURS})$", owner) or name in listed or name in NAMED_TUPLE, f"{file.name}: .{name}"


def test_diffusers_asks_torch_for_attention_by_the_name_that_the_memory_plan_replaces(monkeypatch):
    asked, plain = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **how: asked.append(how) or plain(q, k, v))
    layer = Attention(query_dim=8, heads=2, dim_head=4)
    layer(torch.randn(1, 3, 8))
    assert len(asked) == 1 and not asked[0].get("is_causal")
    q = torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(resolved(REACHES["torch"][3])(q, q, q)[0], plain(q, q, q))


def test_nudenet_looks_with_the_session_that_it_is_given():
    detector, runs = load_detector(), []

    class Session:
        def run(self, outputs, inputs):
            runs.append([value.shape for value in inputs.values()])
            return [np.zeros((1, 22, 2100), np.float32)]

    detector.onnx_session = Session()
    assert detector.detect_batch([np.zeros((8, 8, 3), np.uint8)], batch_size=1) == [[]]
    assert runs == [[(1, 3, 320, 320)]]


def test_typers_parser_gives_the_values_and_the_parameters_in_their_order():
    app = typer.Typer()

    @app.command()
    def command(model: str, size: int = 1, name: Annotated[list[str], typer.Option()] = ()):
        pass

    parsed = typer.main.get_command(app)
    words = ["m", "--size", "2", "--name", "a", "--size", "3"]
    values, rest, given = parsed.make_parser(parsed.make_context("command", ["m"])).parse_args(words)
    assert (values["size"], values["name"], values["model"], rest) == ("3", ["a"], "m", [])
    assert [p.name for p in given if p.param_type_name == "option"] == ["size", "name", "size"]
