"""The first moments of a command: what it imports, what it says first, and the streams that it finds."""

import json
import os
import subprocess
import sys

import pytest
from helpers.commands import fresh

# Runs command lines one after another; prints for each its exit code and the heavy libraries that are loaded after it,
# and those that were loaded when it first wrote on stderr.
PROBE = """
import io, json, sys
from salun_sd.cli import app
lines, HEAVY = json.loads(sys.argv[1]), {"torch", "diffusers", "transformers", "numpy", "PIL", "onnxruntime"}

class Stderr(io.StringIO):
    first = None
    def write(self, text):
        self.first = sorted(HEAVY & set(sys.modules)) if self.first is None else self.first
        return super().write(text)

stdout, results = sys.stdout, []
for line in lines:
    sys.stdout, sys.stderr, code = io.StringIO(), Stderr(), 0
    try:
        app.run(line)
    except SystemExit as e:
        code = e.code
    results.append([code, sorted(HEAVY & set(sys.modules)), sys.stderr.first, sys.stderr.getvalue()])
stdout.write(json.dumps(results))
"""


def probed(lines: list[str], **variables) -> list:
    argv = [sys.executable, "-c", PROBE, json.dumps([line.split() for line in lines])]
    run = subprocess.run(argv, env=os.environ | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


LIGHT = {  # a command line and its exit code
    "--version": 0, "--help": 0, "-h": 0, "mask --help": 0, "erase -h": 0, "evaluate --help": 0, "demo --help": 0,
    "cache": 0, "cache --older-than 3": 2, "nowhere": 2, "mask": 2, "mask pocket --nowhere": 2,
    "mask pocket --samples x": 2, "mask pocket --seed 1 --seed 2": 2, "evaluate pocket --prompts pocket --out=": 2,
    "apply pocket": 2,
}  # fmt: skip


@pytest.mark.parametrize("processes", ["", "two"])
def test_help_and_what_is_wrongly_typed_wait_for_no_library_and_for_no_process(processes):
    lighter = ["erase pocket --out x --plan nudity --concept x", "compare nowhere elsewhere"]  # they read files
    results = probed([*LIGHT, *lighter], WORLD_SIZE=processes)
    assert [code for code, *_ in results] == [*LIGHT.values(), 2, 2]
    assert all(modules == [] for _, modules, *_ in results[:-2])
    assert set(results[-1][1]) <= {"numpy", "PIL"}


def test_what_takes_seconds_to_load_is_said_before():
    [(code, after, before, said)] = probed(["apply nowhere patch.safetensors --out x"])
    assert code != 0 and "torch" in after and before == [] and "PyTorch" in said.splitlines()[0]


def test_wrong_variables_of_a_launcher_are_said_before_anything_is_loaded():
    [(code, modules, _, said)] = probed(["mask pocket --concept x"], WORLD_SIZE="two")
    assert code == 2 and modules == [] and "WORLD_SIZE" in said


STREAMS = {  # of `salun-sd cache ...`: the exit code, and what is on the stdout and stderr that are left
    "a closed stdout": (" >&-", 0, "", ""),
    "all closed": (" <&- >&- 2>&-", 0, "", ""),
    "a closed stdin": (" <&-", 0, "0.0 MB", ""),
    "a closed stderr": (" --older-than 3 2>&-", 2, "", ""),
    "a reader that has gone": (" | true", 0, "", ""),
    "a disk that is full": (" > /dev/full", 1, "", "Error"),
}


@pytest.mark.parametrize(("rest", "code", "out", "err"), STREAMS.values(), ids=STREAMS)
def test_no_stream_makes_a_traceback(rest, code, out, err, tmp_path):
    line = f"'{sys.executable}' -m salun_sd cache{rest}"
    variables = os.environ | {"SALUN_SD_CACHE": str(tmp_path)}
    run = subprocess.run(["bash", "-c", line], env=variables, capture_output=True, text=True)
    assert run.returncode == code and (out in run.stdout if out else run.stdout == "")
    assert len(run.stderr.splitlines()) == (1 if err else 0) and run.stderr.startswith(err)


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "TERM": "dumb", "COLUMNS": "20"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "1"},
    ],
)  # fmt: skip
def test_a_poor_terminal_gets_all_it_can_show(variables, tmp_path):
    place = tmp_path / "caf☃"
    run = fresh(["-m", "salun_sd", "cache"], env=os.environ | variables | {"SALUN_SD_CACHE": str(place)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    out, err = run.communicate()
    assert run.returncode == 0 and err == "" and "caf" in out and "0.0 MB" in out
