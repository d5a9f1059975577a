import errno
import os
import shutil
import subprocess
import sys

import pytest
from helpers.commands import fresh

from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime import files


def names(folder):
    return {p.name for p in folder.iterdir()}


HOLD = """
import sys
from pathlib import Path
from salun_sd.runtime import files
place = Path(sys.argv[1])
with files.new_file(place) if place.suffix else files.new_folder(place) as partial:
    (partial if place.suffix else partial / "half").write_text("half")
    print("made", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def held(tmp_path):
    """Begins to write `tmp_path / name` in another process, which then waits; gives the process."""
    running = []

    def start(name):
        running.append(fresh(["-c", HOLD, tmp_path / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert running[-1].stdout.readline() == "made\n"
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_what_a_killed_run_left_goes_at_the_next_write_and_what_a_running_one_makes_stays(held, name, tmp_path):
    killed = held(name)
    killed.kill()
    killed.wait()
    left = names(tmp_path)
    held(name)  # its own write removes what the killed one left
    of_running = names(tmp_path)
    assert len(left) == len(of_running) == 2 and not left & of_running
    with (
        pytest.raises(KeyboardInterrupt),
        files.new_file(tmp_path / name) if "." in name else files.new_folder(tmp_path / name),
    ):
        assert of_running < names(tmp_path)
        raise KeyboardInterrupt
    assert names(tmp_path) == of_running


def test_partial_files_of_earlier_versions_are_stale_and_those_of_other_names_stay(tmp_path):
    for name in (".a.1.partial", f".a.{os.getppid()}.partial", ".b.1.partial", ".a.b.1.partial"):
        (tmp_path / name).write_text("")
    files.write_atomic(tmp_path / "a", b"")
    assert names(tmp_path) == {"a", ".b.1.partial", ".a.b.1.partial"}
    files.remove_stale(tmp_path)
    assert names(tmp_path) == {"a"}


def test_one_of_many_files_is_written_without_reading_the_folder(tmp_path):
    (tmp_path / ".a.1.partial").write_text("")
    with files.new_file(tmp_path / "a", many=True) as partial:
        partial.write_text("many")
    assert (tmp_path / "a").read_text() == "many" and names(tmp_path) == {"a", ".a.1.partial"}


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with files.new_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("")
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"whole"}


def test_a_file_is_whole_or_not_there(tmp_path):
    (tmp_path / "file").mkdir()  # a place that cannot be renamed into
    with pytest.raises(OSError) as raised:
        files.write_atomic(tmp_path / "file", b"data")
    assert raised.value.errno == errno.EISDIR and names(tmp_path) == {"file"}


def test_of_two_that_make_one_folder_the_second_says_so_and_leaves_the_first(tmp_path):
    with pytest.raises(SalunError, match=f"{tmp_path}/out"):
        with files.new_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "first").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "first"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a" * 200 + ".safetensors"])
def test_a_name_as_long_as_the_file_system_allows_is_written_and_swept(name, tmp_path):
    with files.new_folder(tmp_path / name) as partial:
        shutil.copytree(partial, partial.with_name(partial.name.replace(partial.name.split(".")[2], "0123")))
    assert len(names(tmp_path)) == 2  # the copy is what a killed run would have left
    (tmp_path / name).rmdir()
    files.write_atomic(tmp_path / name, b"whole")
    assert names(tmp_path) == {name}


@pytest.mark.parametrize("name, named", [
    ("x" * 256, "long"), ("a/" + "x" * 256, "long"), (os.fsdecode(b"caf\xe9"), "udce9"), ("file/a", "file"),
    ("file/a/b", "file"), ("locked/a/b", "locked"),
])  # fmt: skip
def test_a_place_that_cannot_be_written_is_refused_by_name_and_the_attempt_leaves_nothing(name, named, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir()
    if name.startswith("locked"):
        os.chmod(tmp_path / "locked", 0o500)
        if os.access(tmp_path / "locked", os.W_OK):
            pytest.skip("this user writes everywhere")
    with pytest.raises(UsageError, match=named):
        files.check_place(tmp_path / name)
    assert names(tmp_path) == {"file", "locked"}


def test_a_place_is_refused_for_what_comes_beside_it_too(tmp_path):
    out = tmp_path / ("x" * 250)
    files.check_place(out)
    with pytest.raises(UsageError, match="long"):
        files.check_place(out, out.with_name(f"{out.name}.state"))
    assert names(tmp_path) == set()


@pytest.mark.skipif(not shutil.which("unshare"), reason="no namespaces of process numbers here")
def test_in_a_container_where_every_process_has_the_same_number_a_killed_write_is_swept(tmp_path):
    code = "import os, sys; from pathlib import Path; from salun_sd.runtime import files\n" \
           "with files.new_folder(Path(sys.argv[1])) as f:\n" \
           "    (f / 'pid').write_text(str(os.getpid()))\n" \
           "    os.kill(os.getpid(), 9) if sys.argv[2] == 'dies' else None"  # fmt: skip
    inside = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", code, str(tmp_path / "out")]
    if subprocess.run([*inside[:4], "true"]).returncode:
        pytest.skip("this user makes no namespaces")
    # number 1 of a namespace cannot kill itself, so a shell is number 1
    shell = [*inside[:4], "sh", "-c", '"$@"; true', "sh", *inside[4:]]
    subprocess.run([*shell, "dies"], check=True)
    assert len(names(tmp_path)) == 2
    subprocess.run([*shell, "lives"], check=True)
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"pid"}
