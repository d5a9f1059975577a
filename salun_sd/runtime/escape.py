"""Text that people and models wrote, made visible and harmless where it is shown: terminal, pages, Markdown, CSV."""

import re
import unicodedata

KEPT = "\t\n\u200c\u200d"  # the last two join letters, and the parts of an emoji
INVISIBLE = ("Cc", "Cf", "Zl", "Zp")  # controls, marks of format and direction, ends of lines and paragraphs
MARKUP = re.compile(r"[\\`*_\[\]<>|#~&$@]|:(?=//)|(?<=www)\.")  # what Markdown would read as more than text
FORMULA = re.compile(r"\t|\s*[=+\-@＝＋－＠]")  # the beginning of a cell that a spreadsheet would compute


def visible(value):
    """A text in which characters that would change how others are read are replaced by visible ones; any other value
    as it is. A tab and a newline stay. Half of a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD."""
    if not isinstance(value, str) or hasattr(value, "__html__") or value.isprintable():
        return value
    return "".join(map(_seen, value))


def _seen(character: str) -> str:
    """A character, or what stands for it."""
    category, number = unicodedata.category(character), ord(character)
    if category == "Cs":
        return "\ufffd"
    if character in KEPT or category not in INVISIBLE:
        return character
    return chr(0x2400 + number) if number < 0x20 else "\u2421" if number == 0x7F else f"⟨U+{number:04X}⟩"


def line(value: object) -> str:
    """A value as visible text in one line."""
    return visible(str(value)).replace("\n", "␊")


def text(value):
    """A value as Markdown text of one line, in which markup, @names and links do nothing. What is Markdown already
    (`markupsafe.Markup`) stays as it is."""
    return value if hasattr(value, "__html__") else MARKUP.sub(r"\\\g<0>", line(value))


def code(value: object) -> str:
    """A value as a Markdown code span of one line, in which markup, @names and links do nothing."""
    shown = line(value)
    fence = _fence(shown, 1)
    gap = " " if not shown or "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{gap}{shown}{gap}{fence}"


def block(value: str) -> str:
    """A text of any number of lines as a Markdown code block, which no line of it can end."""
    fence = _fence(value, 3)
    return f"{fence}\n{visible(value)}\n{fence}"


def _fence(inside: str, least: int) -> str:
    """More backticks than stand together anywhere inside."""
    return "`" * max([least, *(1 + len(ticks) for ticks in re.findall("`+", inside))])


def in_csv(value):
    """A value of a CSV: a text in one visible line, with an apostrophe in front where a spreadsheet would take it for a
    formula; any other value as it is."""
    if not isinstance(value, str):
        return value
    return f"'{line(value)}" if FORMULA.match(line(value)) else line(value)
