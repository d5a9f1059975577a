"""Failures of the machine, in words."""

import errno

import pytest
import typer

from salun_sd.cli import app as cli
from salun_sd.cli.failures import in_words, said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), []),
        (MemoryError("Unable to allocate 7.28 TiB for an array with shape (10,)"), ["7.28 TiB"]),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 79 GiB."), ["20.00 MiB"]),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 1024 bytes. Error code 12"), ["1024 bytes"]),
    ],
)  # fmt: skip
def test_no_memory_says_how_much_was_asked_for(error, words):
    sentence, code = in_words(error)
    assert code == 1 and "memory" in sentence and "()" not in sentence and "enforce" not in sentence
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(ModuleNotFoundError("No module named 'peft'", name="peft"), 1),
     (ImportError("cannot import name 'x' from 'salun_sd'", name="salun_sd"), None), (ValueError("x"), None)],
)  # fmt: skip
def test_a_missing_package_is_a_sentence_and_a_bug_is_none(error, code, capfd):
    with pytest.raises((typer.Exit, type(error))) as stop, said():
        raise error
    assert getattr(stop.value, "exit_code", None) == code


def test_of_a_copy_that_fails_the_place_is_named_and_not_the_source():
    sentence, code = in_words(OSError(errno.EACCES, "Permission denied", "the source", None, "the place"))
    assert code == 1 and "the place" in sentence and "source" not in sentence
    assert "the file" in in_words(OSError(errno.EACCES, "Permission denied", "the file"))[0]
    assert "no shard" in in_words(OSError("There is no shard\nof it."))[0]


@pytest.mark.parametrize("word", ["--\udcff", "-\udcff", "\udcff"])
def test_a_wrong_word_that_utf_8_cannot_hold_is_named_in_one_that_it_can(word, caplog):
    with pytest.raises(SystemExit) as exit:
        cli.run(["evaluate", word])
    assert exit.value.code == 2 and "Error: " in caplog.text and caplog.text.encode()
