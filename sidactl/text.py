"""Text from outside as it may be shown: on a terminal, in a shell's command, in Markdown; not what it means."""

import os
import re
import shlex

# Controls, what ends a line, what turns the direction of writing, and bytes that are no text.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {c: "\\" + c for c in "\\`*[]|~"})


def visible(text: str) -> str:
    r"""The text in one line that a terminal shows as it is: `\x1b`, `\n` or `\u202e` for what would not be seen."""
    return _HIDDEN.sub(lambda found: _SHORT.get(found[0]) or _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # a byte that is not UTF-8, as Python reads names
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shell_word(word: str | os.PathLike[str]) -> str:
    r"""The word as a shell reads it; with `$'\x1b'` for what would not be seen."""
    text = os.fspath(word)
    if not _HIDDEN.search(text):
        return shlex.quote(text)
    kept = {ord("\\"): r"\\", ord("'"): r"\'"} | {byte: chr(byte) for byte in range(0x20, 0x7F) if byte not in b"\\'"}
    # Three octal digits, since a digit after two hexadecimal ones would be read with them.
    return "$'" + "".join(kept.get(byte, f"\\{byte:03o}") for byte in os.fsencode(text)) + "'"


def markdown(text: str) -> str:
    """The text within a line of Markdown, as text: it opens no heading, no list, no link, no table and no HTML."""
    return visible(text).translate(_MARKUP)
