from pathlib import Path

import pytest

from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.texts import check_given, checked_text

LATIN_1 = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python reads such a file name


def test_text_passes_as_it_is():
    for text in ("", "a photo", "café ☃", "cafe\u0301", "😀"):
        assert checked_text(text, "x") is text


@pytest.mark.parametrize("text", [LATIN_1, "half \ud83d", "\udc00"])
def test_what_utf8_cannot_hold_is_refused_and_shown_escaped(text):
    with pytest.raises(SalunError, match=r"file, line 3.*\\ud") as e:
        checked_text(text, "file, line 3", SalunError)
    str(e.value).encode()
    assert e.type is SalunError


@pytest.mark.parametrize("odd", ["", "  ", LATIN_1, Path(LATIN_1), ["sneaker", LATIN_1], ("bag", "")], ids=ascii)
def test_an_option_is_named_as_it_is_typed(odd):
    check_given(retain_prompts="pocket", model=Path("a"), steps=3, where=(), out=None, revert=False)
    for name, typed in (("retain_prompts", "--retain-prompts"), ("model", "MODEL")):
        with pytest.raises(UsageError, match=typed):
            check_given(**{"out": "out", name: odd})
