"""Versions of installed packages, read without importing them."""

from __future__ import annotations

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


def source_version(folder: Path) -> str:
    """Digest of the Python sources below a folder of ours.

    For steps that are cheap to run again: a mended line ships without anybody
    remembering to raise a number.
    """
    sources = {
        path.relative_to(folder).as_posix(): hash_file(path)
        for path in sorted(folder.rglob("*.py"))
    }
    return digest_of(canonical_json(sources))
