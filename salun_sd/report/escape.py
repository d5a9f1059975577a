"""Text that people and models wrote, made visible and harmless."""

import re

# Characters that would change how others are read, each with its visible replacement: controls (but not tab and
# newline), marks and overrides of direction, and surrogates, which UTF-8 cannot hold.
CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}
CONTROLS |= {
    code: f"⟨U+{code:04X}⟩"
    for code in (*range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def visible(value):
    """A text with its control characters replaced by visible ones; any other value as it is."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return value.translate(CONTROLS) if is_text else value


def code(value: object) -> str:
    """A value as a Markdown code span of one line, in which markup, @names and links do nothing.

    Invisible characters are shown as their Python escapes.
    """
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(str(value).split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", seen)), default=0))
    gap = " " if not seen or "`" in (seen[0], seen[-1]) else ""
    return f"{fence}{gap}{seen}{gap}{fence}"
