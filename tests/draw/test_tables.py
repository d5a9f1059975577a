"""Texts and tables as editors and Excel save them."""

import pytest

from salun_sd.draw.tables import read_table, read_text
from salun_sd.errors import SalunError

ROWS = [{"prompt": 'a "cat", sitting; on a mat', "seed": "1"}, {"prompt": "ein Ärger\nin zwei Zeilen", "seed": "2"}]


def written(delimiter: str = ",", end: str = "\n", header: str = "prompt,seed", blank: str = "") -> str:
    """ROWS as a table."""
    cells = [['"' + r["prompt"].replace('"', '""') + '"', r["seed"]] for r in ROWS]
    gap = delimiter + blank
    return end.join([header.replace(",", gap), *map(gap.join, cells)]) + end


TABLES = {
    "commas": written(),
    "semicolons": written(";"),
    "tabs": written("\t"),
    "bars": written("|"),
    "blanks behind the commas": written(blank=" "),
    "sep=": "sep=;\r\n" + written(";", "\r\n"),
    "sep= in quotes and commas": '"sep=\t",,\n' + written("\t"),
    "Windows": written(end="\r\n"),
    "an old Mac": written(end="\r"),
    "capitals and blanks": written(header=" PROMPT , Seed"),
    "an empty column": written(header="prompt,seed,").replace(",1\n", ",1,\n"),
    "empty cells behind the last column": written().replace(",1\n", ",1,,,\n"),
    "blank rows": written() + ",\n\n , \n",
    "no end of line": written().rstrip(),
    "a mark": "\ufeff" + written(),
    "two marks": "\ufeff\ufeff" + written(),
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be"])
def test_a_table_is_read_as_it_was_meant(tmp_path, text, encoding):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "t.csv").write_bytes(mark + text.encode(encoding))
    assert [row for _, row in read_table(tmp_path / "t.csv", "prompt", ("prompt", "seed"))] == ROWS


def test_lines_are_those_of_the_file_below_sep_too(tmp_path):
    (tmp_path / "t.csv").write_text("sep=;\nprompt;n\na;1\n\nb;2\n")
    assert [line for line, _ in read_table(tmp_path / "t.csv", "prompt", ("prompt",))] == [3, 5]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"text;n\na;1\n", "prompt.* text, n"),
        (b"Prompt,prompt\na,b\n", "two columns prompt"),
        (b"prompt;n\na;b;1\n", "line 2 .*3 cells.*semicolons"),
        (b"prompt,n\na,1\nb,caf\xe9\n", "line 3 .*UTF-8"),
        ("prompt,n\na,1\n".encode("utf-16-le"), "line 1 .*UTF-8"),  # without its mark
        (b"\xff\xfep\0r", "UTF-8"),
        (b"PK\3\4\x14\0\6\0\x08\0\0\0!\0", "UTF-8"),  # an .xlsx
        (b"sep=;\nprompt,n\na,1\n", "no column prompt.* prompt,n"),
        (b'prompt,n\na,"1\n', "line 2 .*quote"),
        (b"", "no column prompt"),
    ],
)
def test_what_is_no_table_is_named_with_its_line(tmp_path, content, named):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(SalunError, match=f"t.csv.*{named}"):
        read_table(tmp_path / "t.csv", "prompt", ("prompt",))


def test_a_text_is_read_with_and_without_a_mark(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "t.txt").write_bytes("é shoe\r\n".encode(encoding))
        assert read_text(tmp_path / "t.txt") == "é shoe\r\n"
