"""What people write: whatever it is, there is a result or one sentence, and never another failure."""

import unicodedata
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import typer
from helpers.commands import files_in
from helpers.runs import PAIR
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from salun_sd.audit import collected
from salun_sd.cli import app as cli
from salun_sd.cli.streams import repair_streams
from salun_sd.draw import prompts
from salun_sd.edit import concepts, datasets
from salun_sd.errors import SalunError

FILES = {  # what is altered: a file and its content
    "p.csv": b'case_number,prompt,evaluation_seed,evaluation_guidance,class\n0,a cat,1,7,cat\n1,"a, dog",2,7,dog\n',
    "p.txt": b"a cat\na dog\n",
    "p.toml": b'[[concept]]\nprompt = "a"\nanchor = "b"\n[settings]\nsteps = 3\n',
    "images/metadata.csv": b"file_name,text\na.png,one\nb.png,two\n",
    "images/metadata.jsonl": b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n',
    "images/a.txt": b"one",
    "images/b.caption": b"two",
}
PIECES = [
    b"", b",", b";", b"\t", b"|", b"\n", b"\r\n", b"\r", b'"', b"'''", b"\0", b"\xff", b"\xfe", b"\xef\xbb\xbf",
    b"\xff\xfe", b"prompt", b"Prompt", b"evaluation_seed", b"class", b"sd_image_width", b"1", b"-1", b"7,5", b"1_0",
    b"9" * 5000, b"1e999999999", b"nan", b"sep=;\n", b"sep=", b"{", b"}", b"]", b":", b"=", b"[" * 2000, b"[[concept]]",
    b"prompt = ", b"\\ud800", b"\\u0000", b"file_name", b"text", b"a.png", b"../a.png", b"/", b" ", b"e\xcc\x81",
    b"\xd9\xa3", b"\xe2\x80\xae",
]  # fmt: skip
VALUES = [
    "", " ", "0", "-1", "1e-320", "1e400", "nan", "0.5", "9" * 5000, "true", "x", "-x", "--", "=", "a=b", "a:b=c", "*",
    "~", ".", "..", "/dev/null", "images", "set.csv", "nothing.toml", "p.safetensors", "e\u0301", "\udce9",
    "\x1b[31m", "a\nb", "\u202e", "pocket", "nudity", "none", "random:", "random:2", "random:0.1", "flag_rate > 0",
    "a" * 300,
]  # fmt: skip
COMMANDS = typer.main.get_command(cli.app).commands
LETTERS = st.characters(exclude_characters="/\0", exclude_categories=()) | st.sampled_from("_0a\udce9\u0301")


def altered(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with one to four pieces in place of some of its bytes."""

    def with_pieces(edits: list[tuple[int, int, bytes]]) -> bytes:
        result = content
        for start, length, piece in edits:
            result = result[:start] + piece + result[start + length :]
        return result

    piece = st.sampled_from(PIECES) | st.text(max_size=6).map(str.encode)
    edit = st.tuples(st.integers(0, len(content)), st.sampled_from((0, 1, 5, 20)), piece)
    return st.lists(edit, min_size=1, max_size=4).map(with_pieces)


def holds(count: int, property: Callable, *strategies: st.SearchStrategy) -> None:
    """Run a property on `count` examples, the same each time."""
    settings(max_examples=count, derandomize=True, deadline=None)(given(*strategies)(property))()


def counts(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny):
    """A folder with a folder of two images, a model, and a prompt set."""
    here = tmp_path_factory.mktemp("properties")
    (here / "model").symlink_to(tiny)
    (here / "set.csv").write_text("prompt\na cat\n")
    for image in "ab":
        (here / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(here / "images" / f"{image}.png")
    return here


def read(file: Path) -> None:
    """Read a file of FILES as the commands do."""
    if file.parent.name == "images":
        assert datasets.digest(datasets.captioned(datasets.items(str(file.parent)), "x"))
    elif file.suffix == ".toml":
        assert concepts.read(str(file)).concepts
    else:
        rows = prompts.read(str(file))
        assert written_and_read(rows, file.parent) == rows


def written_and_read(rows: list[prompts.Prompt], folder: Path) -> list[prompts.Prompt]:
    (folder / "again.csv").write_text(prompts.as_csv(rows), encoding="utf-8", newline="")
    return prompts.read(str(folder / "again.csv"))


@counts(60, 3_000)
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_or_refused_by_its_name(place, name, count):
    outcomes = set()

    def property(content):
        (place / name).write_bytes(content)
        try:
            read(place / name)
            outcomes.add("read")
        except SalunError as e:
            outcomes.add("refused")
            assert str(place) in str(e)

    try:
        holds(count, property, altered(FILES[name]))
    finally:
        (place / name).unlink()
    assert outcomes == {"read", "refused"}


@counts(100, 3_000)
def test_a_prompt_set_that_is_written_reads_back_the_same(place, count):
    whole, text = st.integers(0, 2**63 - 1), st.text(st.characters(exclude_characters="\0", codec="utf-8"))
    name = text.map(str.strip).map(partial(unicodedata.normalize, "NFC"))
    categories = st.lists(name.filter(lambda s: s and "," not in s), unique=True).map(tuple)
    row = st.builds(
        prompts.Prompt, whole, text, whole, st.floats(0, 10**6), name.map(lambda s: s or None), categories,
        st.none() | st.tuples(whole, whole),
    )  # fmt: skip

    def property(rows):
        assert written_and_read(rows, place) == rows

    holds(count, property, st.lists(row, min_size=1, max_size=4, unique_by=lambda p: p.case))


@counts(60, 1_000)
def test_files_of_any_name_are_taken_or_refused(tmp_path_factory, place, count):
    rows, image = [prompts.Prompt(0, "a cat", 1, 7.5)], (place / "images" / "a.png").read_bytes()

    def property(names):
        folder = tmp_path_factory.mktemp("names")
        for name in names:
            try:
                (folder / name).write_bytes(image if name.endswith(".png") else b"a caption")
            except (OSError, UnicodeError):  # no name for this file system
                return
        for take in (lambda: datasets.digest(datasets.items(str(folder))),
                     lambda: collected.collected(folder, rows, folder / "audit", subset=False)):  # fmt: skip
            try:
                assert take()
            except SalunError as e:
                assert str(e).encode()

    stem = st.text(LETTERS, min_size=1, max_size=12) | st.sampled_from(("0_0", "a", "a" * 250))
    name = st.builds(str.__add__, stem, st.sampled_from((".png", ".PNG", ".txt", ".caption", ".jsonl", "")))
    holds(count, property, st.sets(name, min_size=1, max_size=4))


def typed(command: str, *given: str) -> st.SearchStrategy[list[str]]:
    """What a person may type: a command, its arguments, what is given, and up to three other options with odd values,
    of all that the command has."""
    value = st.sampled_from(VALUES) | st.text(max_size=8)
    options = [p for p in COMMANDS[command].params if p.param_type_name == "option" and p.opts[-1] not in given]
    words = [st.tuples(st.just(p.opts[-1]), *[value] * (not p.is_flag)) for p in options]
    arguments = st.lists(st.sampled_from(["pocket", "model"]) | value, min_size=1, max_size=2)
    others = st.lists(st.one_of(words), max_size=3)
    return st.builds(lambda a, b: [command, *a, *given, *chain(*b)], arguments, others)


# None of these writes anything: they only plan, or are refused.
TYPED = {
    "mask": ["mask", *PAIR[:2], "--dry-run"],
    "mask of a plan": ["mask", "--dry-run"],
    "erase": ["erase", *PAIR, "--mask", "random:0.1", "--out", "out", "--dry-run"],
    "erase of a plan": ["erase", "--out", "out", "--dry-run"],
    "apply": ["apply", "--out", "out"],
    "evaluate": ["evaluate", "--prompts", "pocket", "--out", "out", "--fail-if", "nothing > 0"],
    "compare": ["compare"],
}


@counts(12, 200)
@pytest.mark.parametrize("name", TYPED)
def test_whatever_is_typed_is_planned_or_refused_and_writes_nothing(place, monkeypatch, capsys, name, count):
    monkeypatch.chdir(place)
    repair_streams()  # as `main` does
    before, codes = files_in(place), set()

    def property(argv):
        code = 0
        try:
            cli.run(argv)
        except SystemExit as e:
            code = e.code
        codes.add(code)
        assert files_in(place) == before
        assert code == 0 or "Error: " in capsys.readouterr().err

    holds(count, property, typed(*TYPED[name]))
    assert codes <= {0, 1, 2} and codes & {1, 2}
