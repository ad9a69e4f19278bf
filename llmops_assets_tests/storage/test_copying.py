"""Copies: the bytes of the source, read-only, and sharing nothing that can change."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmops_assets.storage.copying import CHUNK_BYTES, copy_file
from llmops_assets.storage.store import digest_of


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 3])
def test_copy_is_the_source_and_its_digest(tmp_path: Path, size: int) -> None:
    """Engines are larger than a chunk, and some files are empty."""
    content = (b"0123456789abcde" * (size // 15 + 1))[:size]
    (tmp_path / "source").write_bytes(content)
    assert copy_file(tmp_path / "source", tmp_path / "target") == digest_of(content)
    assert (tmp_path / "target").read_bytes() == content


def test_copy_is_read_only_and_has_its_own_inode(tmp_path: Path) -> None:
    """A byte changed in a slot must not change the store."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("engine")
    copy_file(source, target)
    assert target.stat().st_mode & 0o777 == 0o444
    assert target.stat().st_nlink == 1
    source.write_text("changed")
    assert target.read_text() == "engine"


def test_links_and_existing_targets_are_refused(tmp_path: Path) -> None:
    """A link in a checkpoint could bring any file of the machine into a package."""
    (tmp_path / "secret").write_text("hunter2")
    (tmp_path / "link").symlink_to("secret")
    with pytest.raises(OSError, match="symbolic"):
        copy_file(tmp_path / "link", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "secret", tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("secret")
