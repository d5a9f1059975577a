"""What is printed fits the terminal, and nothing of it is lost."""

import io

import pytest

from salun_sd.cli import tables
from salun_sd.cli.streams import print_lines

LONG = [f"stable-diffusion-v1-5-salun-density-{density}-nudity" for density in (0.5, 0.1, 0.05)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [200, 80, 40])
def test_a_table_keeps_every_name_whole_at_any_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    table = tables.Table("metric", *LONG, box=None)
    table.add_row("flag_rate", "1 / 3", "2 / 3", "3 / 3")
    tables.show(table)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    assert sorted("".join(shown.split())) == sorted("".join(["metric", *LONG, "flag_rate", "1/32/33/3"]))


def test_a_sentence_breaks_between_words_on_a_terminal_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    sentence = f"Error: there is no {LONG[0]}: give --out-of-all-places another name, or remove it."
    terminal, file = Terminal(), io.StringIO()
    print_lines(sentence, terminal)
    print_lines(sentence, file)
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 2 and " ".join(lines) == sentence  # no word is cut
    assert all(len(line) <= 30 or " " not in line for line in lines)
    assert file.getvalue() == sentence + "\n"
