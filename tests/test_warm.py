"""A forked process of `helpers.warm` ends as a new interpreter does, which the other tests of processes rest on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import warm
from helpers.commands import fresh

pytestmark = [
    pytest.mark.slow,  # its twins: every test that starts a process
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, processes are not forked"),
]


def both(args, then=lambda process: None, **kwargs):
    """Exit code, stdout and stderr of a new interpreter and of a forked process."""
    for start in (fresh, warm.Process):
        process = start(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
        then(process)
        out, err = process.communicate(timeout=60)
        assert process.poll() == process.wait() == process.returncode
        yield process.returncode, out, err


@pytest.mark.parametrize(
    "argv", [["--version"], ["mask", "nowhere", "--concept", "x"], ["erase"], ["cache"], []], ids=" ".join
)
def test_a_command_prints_the_same_and_ends_with_the_same_code(argv):
    one, other = both(["-m", "salun_sd", *argv])
    assert one[:2] == other[:2] and one[1] + one[2]
    assert one[2].endswith(other[2])  # before it, a new interpreter says what it loads


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(7)", 7), ("1/0", 1), ("raise KeyboardInterrupt", -2), ("import os; os.abort()", -6)],
)
def test_an_end_has_the_same_code(code, expected):
    one, other = both(["-c", code])
    assert one[0] == other[0] == expected
    assert one[2].splitlines()[-1:] == other[2].splitlines()[-1:]  # of the traceback


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it(number, tmp_path):
    def then(process):
        while not (ready := tmp_path / str(process.pid)).exists():
            time.sleep(0.01)
        ready.rmdir()
        process.send_signal(number)

    code = "import os, time; os.mkdir(str(os.getpid())); time.sleep(60)"  # no file: closing one can swallow the signal
    assert [ended[0] for ended in both(["-c", code], then, cwd=tmp_path)] == [-number, -number]


def test_each_has_its_own_folder_variables_and_arguments(tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['SALUN_SD_CACHE'], sys.argv, sys.path[:1])"
    one, other = both(["-c", code, "a", "b"], cwd=tmp_path, env=os.environ | {"SALUN_SD_CACHE": "here"})
    assert one == other == (0, f"{tmp_path} here ['-c', 'a', 'b'] ['']\n", "")


def test_the_package_is_imported_anew_and_the_libraries_are_not():
    code = "import sys; print([name in sys.modules for name in ('torch', 'diffusers', 'transformers', 'salun_sd')])"
    process = warm.Process(["-c", code], stdout=subprocess.PIPE)
    assert process.communicate()[0] == "[True, True, True, False]\n"
