"""An output directory that appears whole or not at all.

A step can be killed at any instruction; whoever finds its output must be able to trust
that it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmops_assets.errors import ToolError


@contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """Gives an empty directory beside `output`, and renames it to `output` at the end.

    What a killed predecessor left beside is thrown away. After an error nothing is
    published.

    Raises:
        ToolError: `output` exists; it is never overwritten.
    """
    if output.exists():
        raise ToolError(
            f"The output {output} exists already",
            expected="a folder that does not exist yet",
            cure="give another folder, or remove this one if nothing needs it",
        )
    partial = output.with_name(output.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    for folder, _, names in os.walk(partial):
        for name in names:
            _flush(Path(folder, name))
        _flush(Path(folder))
    partial.rename(output)
    _flush(output.parent)


def replace_file(partial: Path, path: Path) -> None:
    """Moves a finished file over `path`, so that a reader finds the old or the new one."""
    _flush(partial)
    partial.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Forces a file's or folder's content to the disk (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
