"""Text of others on a terminal: what could move the cursor or hide words is shown, not done."""

from __future__ import annotations

import unicodedata

# Control, format (such as right-to-left overrides), surrogate, private, line separators.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def printable(text: str) -> str:
    """The text on one line, with characters that are not seen written as their code points."""
    return "".join(
        f"\\u{{{ord(character):x}}}" if unicodedata.category(character) in HIDDEN else character
        for character in text
    )
