"""Text of others in Markdown."""

from __future__ import annotations

from llmops_assets.reports.printable import printable

FORMATTING = "\\`*_[]<>&#|!~"


def plain(text: str) -> str:
    """The text on one line, neither formatted nor linked."""
    return "".join(f"\\{each}" if each in FORMATTING else each for each in printable(text))
