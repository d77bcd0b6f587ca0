"""Names of runs, methods and folders where others read them: nothing in them means anything."""

import re

# What marks up a text; an underscore does between words, a colon and a dot in addresses.
_MARKUP = re.compile(
    r"[\\`*\[\]<>&|~#!@$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE
)
_FORMULA = ("=", "+", "-", "@")


def one_line(text: str) -> str:
    """A text in one line, with what cannot be printed as its escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown(text: str) -> str:
    """A text in one line of Markdown, which shows it as it is."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def csv(text: str) -> str:
    """A text in a cell of CSV. One that spreadsheets would take for a formula gets an apostrophe
    in front, by which they know a text."""
    cell = one_line(text)
    return f"'{cell}" if cell.startswith(_FORMULA) else cell
