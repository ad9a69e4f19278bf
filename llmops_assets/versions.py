"""Versions of installed packages, read without importing them."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmops_assets.storage.store import canonical_json, digest_of, hash_file


def versions_of(*packages: str) -> dict[str, str]:
    """Installed version of each package; `absent` for one that is not installed.

    A package may be absent where its tool runs in another image.
    """
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def source_version(folder: Path, modules: Collection[str] | None = None) -> str:
    """Digest of Python sources of ours: a mended line ships without anybody remembering to
    raise a number.

    Args:
        folder: where they are.
        modules: names of those that decide what a step writes, where a step costs too much
            to run again for any other. None: all below the folder.
    """
    paths = folder.rglob("*.py") if modules is None else (folder / f"{m}.py" for m in modules)
    sources = {path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(paths)}
    return digest_of(canonical_json(sources))
