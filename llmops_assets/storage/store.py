"""The interface of the artifact store.

Artifacts are immutable and known by their digest; refs are the only mutable things;
logs only grow. A folder implements it (`folder.py`), object storage can as well: every
write is either content-addressed or a conditional create.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmops_assets.errors import StoreError

Record = Mapping[str, Any]
"""A JSON object. Its digest is that of its canonical form, see `canonical_json`."""

REF_NAME = re.compile(r"[a-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path relative to its root, digest, size in bytes."""

    path: str
    digest: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """An immutable directory.

    `digest` is the digest of its OCI image manifest, `media_type` the manifest's
    `artifactType` (OCI Image Specification 1.1).
    """

    digest: str
    media_type: str
    files: tuple[FileEntry, ...]

    @property
    def size(self) -> int:
        """Sum of its files' sizes, bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class LogEntry:
    """A record and its place in its log; sequence numbers count from 0 without gaps."""

    sequence: int
    digest: str
    record: Record


class Store(Protocol):
    """Where artifacts, refs and records live. Safe with several processes at once."""

    def put(self, directory: Path, media_type: str) -> Artifact:
        """Stores a directory's files; the same files always give the same digest."""
        ...

    def open(self, digest: str) -> tuple[Artifact, Path]:
        """The artifact and a read-only directory that holds its files, verified.

        Raises:
            StoreError: there is no such artifact.
            ArtifactCorruptError: stored bytes differ from their digest.
        """
        ...

    def describe(self, digest: str) -> Artifact:
        """The artifact's file list, without reading the files.

        Raises:
            StoreError: there is no such artifact.
        """
        ...

    def resolve(self, ref: str) -> str | None:
        """The digest that a ref points to, or None."""
        ...

    def compare_and_set(self, ref: str, old: str | None, new: str | None) -> None:
        """Points a ref to `new` if it points to `old`; None means that it does not exist.

        Raises:
            RefConflictError: the ref points elsewhere.
        """
        ...

    def refs(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Refs below `prefix/` with their digests, by name."""
        ...

    def append(self, log: str, record: Record, at: int | None = None) -> LogEntry:
        """Adds a record to a log.

        Args:
            log: its name.
            record: what to add.
            at: sequence number that the record must get; None for the next one.

        Raises:
            RefConflictError: `at` is not the log's next sequence number (any more).
        """
        ...

    def log(self, log: str, start: int = 0) -> Iterator[LogEntry]:
        """The records of a log, oldest first; empty for a log nobody wrote to.

        Args:
            log: its name.
            start: sequence number of the first one wanted; those before are not read.
        """
        ...

    def record(self, digest: str) -> Record:
        """The record with this digest.

        Raises:
            StoreError: there is no such record.
            ArtifactCorruptError: stored bytes differ from their digest.
        """
        ...


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces, so that equal values have equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_of(content: bytes) -> str:
    """The content's digest in OCI notation, `sha256:<hex>`."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def check_digest(digest: str) -> str:
    """Returns the hex part of a digest.

    Raises:
        StoreError: it is not a SHA-256 digest.
    """
    if not DIGEST.fullmatch(digest):
        raise StoreError(
            "This is not a digest",
            expected="sha256: and 64 hex digits",
            found=repr(digest),
            cure="pass the digest as the asset's metadata shows it",
        )
    return digest.removeprefix("sha256:")


def check_name(name: str) -> str:
    """Returns a ref's or log's name if it cannot leave its folder.

    Raises:
        StoreError: it could.
    """
    if len(name) > 255 or not REF_NAME.fullmatch(name):
        raise StoreError(
            "This name cannot be used for a ref or a log",
            expected="segments of letters, digits, dot, hyphen and underscore, joined by /",
            found=repr(name),
            cure="use the release key and asset names as they are",
        )
    return name


def hash_file(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """Digest of a file, or of the names and contents of all files below a directory.

    Raises:
        StoreError: there is nothing at `path`.
    """
    if path.is_file():
        return hash_file(path)
    files = {
        file.relative_to(path).as_posix(): hash_file(file)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    if not files:
        raise StoreError(
            f"There is nothing at {path}",
            expected="a file, or a directory with files",
            cure="correct the path in the spec; it counts from the folder that holds models/",
        )
    return digest_of(canonical_json(files))
