"""Reading the logs of supervised programs, which supervisord writes and rotates."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

POLL_SECONDS = 0.3
BLOCK_BYTES = 65536


def tail(file: Path, lines: int, since: int = 0) -> list[str]:
    """The last lines of a log, without those before byte `since`; empty if there is no log."""
    try:
        with file.open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            # A log shorter than `since` was rotated meanwhile: all of it is newer.
            floor = since if since <= end else 0
            start, content = end, b""
            while start > floor and content.count(b"\n") <= lines:
                start = max(floor, start - BLOCK_BYTES)
                stream.seek(start)
                content = stream.read(end - start)
    except FileNotFoundError:
        return []
    return content.decode("utf-8", "replace").splitlines()[-lines:] if lines > 0 else []


def last_words(file: Path, since: int = 0, lines: int = 15) -> str:
    """The end of a log in one line, for an error message."""
    words = [line.strip() for line in tail(file, lines, since) if line.strip()]
    return f"the log ends with: {' | '.join(words)}" if words else "its log is empty"


def size(file: Path) -> int:
    """Bytes in a log now; 0 if there is none."""
    return file.stat().st_size if file.exists() else 0


def follow(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Lines that come from now on, as (program, line); never ends. Survives rotation."""
    places = {name: (_inode(file), size(file)) for name, file in files.items()}
    pending = dict.fromkeys(files, b"")
    while True:
        for name, file in files.items():
            inode, offset = places[name]
            if (now := _inode(file)) != inode or size(file) < offset:
                inode, offset = now, 0
            if inode is None:
                continue
            with file.open("rb") as stream:
                stream.seek(offset)
                content = stream.read()
            places[name] = (inode, offset + len(content))
            *complete, pending[name] = (pending[name] + content).split(b"\n")
            for line in complete:
                yield name, line.decode("utf-8", "replace").rstrip("\r")
        time.sleep(POLL_SECONDS)


def _inode(file: Path) -> int | None:
    return file.stat().st_ino if file.exists() else None
