"""Copying a file while hashing it, sharing blocks where the file system can."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from pathlib import Path

FICLONE = 0x40049409
"""ioctl_ficlonerange(2): the target shares the source's blocks until one is written."""
CHUNK_BYTES = 1 << 20


def copy_file(source: Path, target: Path) -> str:
    """Copies a regular file to a new one, read-only and on disk.

    Never a hard link: a byte changed in one place must not change the other, and some
    loaders (ONNX) refuse files with several links.

    Returns:
        Digest of the bytes that were written.

    Raises:
        OSError: the source is a symbolic link, the target exists, or the disk is full.
    """
    hasher = hashlib.sha256()
    with (
        os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as reader,
        target.open("x+b", buffering=0) as writer,
    ):
        shared = False
        with contextlib.suppress(OSError):  # another file system, or one without reflinks
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
            shared = True
        while chunk := (writer if shared else reader).read(CHUNK_BYTES):
            hasher.update(chunk)
            remaining = memoryview(chunk)
            while remaining and not shared:
                remaining = remaining[writer.write(remaining) :]
        os.fchmod(writer.fileno(), 0o444)
        os.fsync(writer.fileno())
    return "sha256:" + hasher.hexdigest()
