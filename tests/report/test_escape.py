import re

import pytest
from helpers.audits import EVIL

from salun_sd.report.escape import code, visible


@pytest.mark.parametrize("text", [EVIL, "`", "``a`", "a``", "", "plain", "a\\|b", "\u202e\x00", "“x”"])
def test_code_is_one_span_that_gives_the_text_back(text):
    """Read as CommonMark does: to the next fence of as many backticks, a blank at both ends taken away."""
    shown = code(text)
    fence = re.match("`+", shown)[0]
    assert shown.endswith(fence) and "\n" not in shown and shown.isprintable()
    inner = shown[len(fence) : -len(fence)]
    assert fence not in re.findall("`+", inner)
    inner = inner[1:-1] if inner.startswith(" ") and inner.endswith(" ") and inner.strip() else inner
    if text.isprintable():
        assert inner.strip() == text
    elif "\n" in text:
        assert inner == " ".join(text.split())
    else:
        assert inner == r"\u202e\x00"


def test_control_characters_and_marks_of_direction_are_shown():
    assert visible("\u202eevil\u2066\u200f \x00 \x1b[31m \x85 \x7f \ud800") == (
        "⟨U+202E⟩evil⟨U+2066⟩⟨U+200F⟩ ␀ ␛[31m ⟨U+0085⟩ ␡ \ufffd"
    )
    visible("\ud800").encode()


def test_all_other_text_stays_as_it_is():
    assert visible("tab\tline\nemoji 👩‍🚀 שלום") == "tab\tline\nemoji 👩‍🚀 שלום"
    assert visible(3) == 3 and visible(None) is None
