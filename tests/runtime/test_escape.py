import csv
import io
import re

import pytest
from helpers.audits import EVIL

from salun_sd.runtime.escape import block, code, in_csv, line, text, visible

HOSTILE = "\x1b[31m\x9b2J\u202e\u2066\u200f\ufeff\u2029\r\x00\x7f"


@pytest.mark.parametrize("given", [EVIL, "`", "``a`", "a``", "", "plain", "a\\|b", HOSTILE, "“x”"])
def test_code_is_one_span_that_gives_the_text_back(given):
    """Read as CommonMark does: to the next fence of as many backticks, a blank at both ends taken away."""
    shown = code(given)
    fence = re.match("`+", shown)[0]
    assert shown.endswith(fence) and shown.isprintable()
    inner = shown[len(fence) : -len(fence)]
    assert fence not in re.findall("`+", inner)
    inner = inner[1:-1] if inner.startswith(" ") and inner.endswith(" ") and inner.strip() else inner
    assert inner.strip() == line(given)


def test_what_is_not_seen_is_shown():
    assert visible("\u202eevil\u2066\u200f \x00 \x1b[31m \x85 \x7f \ud800 \u2028\ufeff\u200b") == (
        "⟨U+202E⟩evil⟨U+2066⟩⟨U+200F⟩ ␀ ␛[31m ⟨U+0085⟩ ␡ \ufffd ⟨U+2028⟩⟨U+FEFF⟩⟨U+200B⟩"
    )
    visible("\ud800").encode()
    assert line("a\nb\r\nc") == "a␊b␍␊c" and line(7) == "7"


def test_all_other_text_stays_as_it_is():
    assert visible("tab\tline\nemoji 👩‍🚀 שלום　日本 \xa0") == "tab\tline\nemoji 👩‍🚀 שלום　日本 \xa0"
    assert visible(3) == 3 and visible(None) is None and in_csv(-3) == -3 and in_csv(None) is None


def test_text_in_markdown_is_text():
    assert text("a photo of a dog (3 of 4): 50 %") == "a photo of a dog (3 of 4): 50 %"
    shown = text(f"{EVIL} <b>&amp;~~x~~ www.x.yz [a](b) ![c](d) {HOSTILE}")
    assert "\n" not in shown and not re.search(r"(?<!\\)[<>|`*#@\[\]&~]|(?<!\\)://|www\.", shown)
    assert re.sub(r"\\(?=\W)", "", text(EVIL)) == line(EVIL)


@pytest.mark.parametrize("inside", ["", "```", "a\n```\n# b\n``````", "~~~\n`a`", HOSTILE])
def test_no_line_ends_a_block(inside):
    """Read as CommonMark does: to a line of at least as many backticks, and nothing else."""
    first, *lines, last = block(inside).split("\n")
    assert re.fullmatch("`{3,}", first) and last == first and "\n".join(lines) == visible(inside)
    assert not any(re.fullmatch(f" {{0,3}}{first}`*\\s*", each) for each in lines)


@pytest.mark.parametrize(
    "name", ["=cmd|' /C calc'!A0", "=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", " =1", "＝1"]
)
def test_no_text_in_a_csv_is_a_formula(name):
    assert in_csv(name).startswith("'") or in_csv(name)[0] == "␍"
    out = io.StringIO()
    csv.writer(out).writerow([in_csv(name)])
    assert out.getvalue().count("\n") == 1 and in_csv("a=b-c") == "a=b-c"
