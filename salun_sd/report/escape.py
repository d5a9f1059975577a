"""What people and models wrote, shown and not obeyed."""

import re

# Characters that would change how others read, and are shown instead of obeyed: controls but tab and newline, marks and
# overrides of direction; what UTF-8 cannot hold.
CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}
CONTROLS |= {
    code: f"⟨U+{code:04X}⟩"
    for code in (*range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def visible(value):
    """Text with its control characters shown; anything else as it is."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return value.translate(CONTROLS) if is_text else value


def code(value: object) -> str:
    """What a person or a model wrote, shown as it is: a code span, in which markup, @names and links do nothing.

    In one line; characters that cannot be seen are shown as their escapes.
    """
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(str(value).split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", seen)), default=0))
    gap = " " if not seen or "`" in (seen[0], seen[-1]) else ""
    return f"{fence}{gap}{seen}{gap}{fence}"
