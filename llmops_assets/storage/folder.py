"""The artifact store on a folder, in OCI image layout.

    oci-layout                      marks the layout's version
    blobs/sha256/<hex>              files, image manifests and records, by content
    refs/<name>                     one digest each
    logs/<name>/<sequence>          one record digest each
    checkouts/<hex>/                an artifact's files under their names, made when first opened
    locks/, tmp/                    of writers at work

Nothing is half-visible: content is written beside, flushed, and renamed or linked into
place. `index.json` of the OCI layout is not kept, as it would be one file that every
writer changes.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from llmops_assets.errors import ArtifactCorruptError, RefConflictError, StoreError
from llmops_assets.storage.copying import copy_file
from llmops_assets.storage.store import (
    Artifact,
    FileEntry,
    LogEntry,
    Record,
    canonical_json,
    check_digest,
    check_name,
    digest_of,
    hash_file,
)

MANIFEST_MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"
FILE_MEDIA_TYPE = "application/octet-stream"
OCI_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
"""Content of `oci-layout` (OCI Image Specification 1.1)."""
TITLE = "org.opencontainers.image.title"
# The "empty descriptor" of the OCI Image Specification 1.1 for artifacts without config.
EMPTY = b"{}"
EMPTY_DESCRIPTOR = {
    "mediaType": "application/vnd.oci.empty.v1+json",
    "digest": digest_of(EMPTY),
    "size": len(EMPTY),
}
# Long enough for another process to copy a large artifact out of the blobs.
LOCK_TIMEOUT_SECONDS = 600.0


class FolderStore:
    """A `Store` on a local or network folder. Safe with several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._checkouts = root / "checkouts"
        self._temporary = root / "tmp"
        for folder in ("refs", "logs", "locks/checkouts"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for folder in (self._blobs, self._checkouts, self._temporary):
            folder.mkdir(parents=True, exist_ok=True)
        layout = root / "oci-layout"
        if not layout.exists():
            self._write(layout, OCI_LAYOUT)

    def put(self, directory: Path, media_type: str) -> Artifact:
        """See `Store.put`. Regular files only; a link or an empty directory is refused."""
        files = tuple(
            self._put_file(path, path.relative_to(directory).as_posix())
            for path in _regular_files(directory)
        )
        self._put_bytes(EMPTY)
        manifest = canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_MEDIA_TYPE,
                "artifactType": media_type,
                "config": EMPTY_DESCRIPTOR,
                "layers": [
                    {
                        "mediaType": FILE_MEDIA_TYPE,
                        "digest": file.digest,
                        "size": file.size,
                        "annotations": {TITLE: file.path},
                    }
                    for file in files
                ],
            }
        )
        return Artifact(digest=self._put_bytes(manifest), media_type=media_type, files=files)

    def describe(self, digest: str) -> Artifact:
        content = json.loads(self._read_blob(digest))
        if not isinstance(content, dict) or content.get("mediaType") != MANIFEST_MEDIA_TYPE:
            raise StoreError(
                f"{digest} is not an artifact",
                expected="the digest of an image manifest",
                found="another blob",
                cure="pass the digest as the asset's metadata shows it",
            )
        return Artifact(
            digest=digest,
            media_type=content["artifactType"],
            files=tuple(
                FileEntry(layer["annotations"][TITLE], layer["digest"], layer["size"])
                for layer in content["layers"]
            ),
        )

    def open(self, digest: str) -> tuple[Artifact, Path]:
        artifact = self.describe(digest)
        hex_digest = check_digest(digest)
        checkout = self._checkouts / hex_digest
        # One process at a time judges and mends a checkout: another may be using it.
        with self._locked(f"checkouts/{hex_digest}"):
            if not checkout.exists():
                self._check_out(artifact, checkout)
            elif not _is_whole(artifact, checkout):
                # The blobs may be whole, or mended since: the checkout only repeats them.
                _discard(checkout, self._temporary)
                self._check_out(artifact, checkout)
        return artifact, checkout

    def resolve(self, ref: str) -> str | None:
        try:
            digest = (self.root / "refs" / check_name(ref)).read_text(encoding="ascii").strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        check_digest(digest)
        return digest

    def compare_and_set(self, ref: str, old: str | None, new: str | None) -> None:
        path = self.root / "refs" / check_name(ref)
        with self._locked("refs"):
            current = self.resolve(ref)
            if current != old:
                raise RefConflictError(
                    f"The ref {ref} was changed by somebody else",
                    expected=old or "no ref",
                    found=current or "no ref",
                    cure="read it again and decide anew",
                )
            if new is None:
                path.unlink(missing_ok=True)
                _sync_directory(path.parent)
            else:
                check_digest(new)
                self._write(path, new.encode() + b"\n")

    def refs(self, prefix: str) -> Iterator[tuple[str, str]]:
        root = self.root / "refs"
        for path in sorted((root / check_name(prefix)).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and (digest := self.resolve(name)) is not None:
                yield name, digest

    def append(self, log: str, record: Record, at: int | None = None) -> LogEntry:
        folder = self.root / "logs" / check_name(log)
        folder.mkdir(parents=True, exist_ok=True)
        sequence = _length(folder) if at is None else at
        if at is not None and at > 0 and not _place(folder, at - 1).exists():
            raise _not_next(log, at, f"{_length(folder)} entries")
        digest = self._put_bytes(canonical_json(record))
        with self._temporary_file() as (file, beside):
            file.write(digest.encode() + b"\n")
            _sync(file)
            while True:
                try:
                    # Creating a link fails when the name exists: a conditional create.
                    os.link(beside, _place(folder, sequence))
                    break
                except FileExistsError as error:
                    if at is not None:
                        raise _not_next(log, at, "an entry of somebody else") from error
                    sequence += 1
        _sync_directory(folder)
        return LogEntry(sequence, digest, json.loads(canonical_json(record)))

    def log(self, log: str, start: int = 0) -> Iterator[LogEntry]:
        folder = self.root / "logs" / check_name(log)
        for sequence in itertools.count(start):
            try:
                digest = _place(folder, sequence).read_text(encoding="ascii").strip()
            except FileNotFoundError:
                return  # sequence numbers have no gaps
            yield LogEntry(sequence, digest, self.record(digest))

    def record(self, digest: str) -> Record:
        content = json.loads(self._read_blob(digest))
        if not isinstance(content, dict):
            raise StoreError(
                f"{digest} is not a record",
                expected="a JSON object",
                found=type(content).__name__,
                cure="pass the digest of a record",
            )
        return content

    def _blob(self, digest: str) -> Path:
        return self._blobs / check_digest(digest)

    def _read_blob(self, digest: str) -> bytes:
        path = self._blob(digest)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(
                f"The store has no {digest}",
                cure=f"restore it to {path} from a backup or archive",
            ) from error
        if (actual := digest_of(content)) != digest:
            raise ArtifactCorruptError(
                f"The blob {path} is damaged",
                expected=digest,
                found=actual,
                cure="restore it from a backup or archive",
            )
        return content

    def _put_bytes(self, content: bytes) -> str:
        digest = digest_of(content)
        blob = self._blob(digest)
        # What is there is read again, so that putting the right bytes mends a blob.
        if not blob.exists() or blob.read_bytes() != content:
            with self._temporary_file() as (file, beside):
                file.write(content)
                _sync(file)
                self._publish(beside, blob)
        return digest

    def _put_file(self, source: Path, name: str) -> FileEntry:
        """Copies and hashes a file in one pass; bytes already stored are not kept twice."""
        beside = self._temporary / uuid.uuid4().hex
        try:
            digest = copy_file(source, beside)
            size = beside.stat().st_size
            blob = self._blob(digest)
            # What is there is read again, so that putting the right bytes mends a blob.
            if not blob.exists() or hash_file(blob) != digest:
                self._publish(beside, blob)
        finally:
            beside.unlink(missing_ok=True)
        return FileEntry(name, digest, size)

    def _publish(self, beside: Path, blob: Path) -> None:
        beside.chmod(0o444)
        beside.rename(blob)
        _sync_directory(blob.parent)

    def _check_out(self, artifact: Artifact, checkout: Path) -> None:
        """Copies an artifact's blobs to their names, checking each byte on the way.

        Raises:
            StoreError: a blob is missing, or the file system does not take the copy.
            ArtifactCorruptError: a blob is damaged.
        """
        cure = (
            "materialize the asset that made it again (the same bytes mend it), or restore the "
            f"file below {self._blobs} from an archive"
        )
        beside = Path(tempfile.mkdtemp(dir=self._temporary))
        try:
            for file in artifact.files:
                target = beside / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    found = copy_file(self._blob(file.digest), target)
                except FileNotFoundError as error:
                    raise StoreError(
                        f"The store lacks {file.path} of artifact {artifact.digest}",
                        expected=f"blob {file.digest}",
                        cure=cure,
                    ) from error
                except OSError as error:
                    raise StoreError(
                        f"{file.path} of artifact {artifact.digest} cannot be copied",
                        found=error,
                        cure=f"check space and permissions of {self.root}, then try again",
                    ) from error
                if found != file.digest:
                    raise ArtifactCorruptError(
                        f"Artifact {artifact.digest} is damaged in the store",
                        expected=f"{file.path} with {file.size} bytes and digest {file.digest}",
                        found=f"{target.stat().st_size} bytes with digest {found}",
                        cure=cure,
                    )
            beside.rename(checkout)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._temporary_file() as (file, beside):
            file.write(content)
            _sync(file)
            beside.rename(path)
        _sync_directory(path.parent)

    def sweep(self) -> None:
        """Removes what killed writers left behind. Only while nobody writes."""
        shutil.rmtree(self._temporary)
        self._temporary.mkdir()

    @contextlib.contextmanager
    def _temporary_file(self):
        descriptor, name = tempfile.mkstemp(dir=self._temporary)
        beside = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file, beside
        finally:
            beside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        lock = FileLock(self.root / "locks" / f"{name}.lock", timeout=LOCK_TIMEOUT_SECONDS)
        try:
            with lock:
                yield
        except Timeout as error:
            raise StoreError(
                f"The store's lock {name} was not free within {LOCK_TIMEOUT_SECONDS:.0f} s",
                cure="look for a stuck process of this platform and end it",
            ) from error


def _place(log: Path, sequence: int) -> Path:
    """Where a log has the entry with this number."""
    return log / f"{sequence:012d}"


def _length(log: Path) -> int:
    """Number of entries, found without listing them: there are no gaps."""
    beyond = 1
    while _place(log, beyond - 1).exists():
        beyond *= 2
    return bisect.bisect_left(
        range(beyond), True, key=lambda sequence: not _place(log, sequence).exists()
    )


def _not_next(log: str, at: int, found: str) -> RefConflictError:
    return RefConflictError(
        f"Somebody else wrote to the log {log}",
        expected=f"place {at} as the next",
        found=found,
        cure="read it again and decide anew",
    )


def _regular_files(directory: Path) -> list[Path]:
    """All files below, sorted by relative path."""
    found: list[Path] = []
    for path in directory.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(
                f"{path} cannot be part of an artifact",
                expected="regular files and folders",
                found="a symbolic link or a special file",
                cure="replace it by a regular file",
            )
        if path.is_file():
            found.append(path)
    if not found:
        raise StoreError(
            f"{directory} holds no files",
            expected="a directory with at least one file",
            cure="check that the step before wrote its output",
        )
    return sorted(found, key=lambda path: path.relative_to(directory).as_posix())


def _is_whole(artifact: Artifact, checkout: Path) -> bool:
    """Whether a checkout holds exactly the artifact's bytes; files too many are removed."""
    expected = {file.path for file in artifact.files}
    for path in list(checkout.rglob("*")):
        # Such as bytecode or a lock file of a tool. The folder is in use: it must stay.
        if (path.is_symlink() or not path.is_dir()) and (
            path.relative_to(checkout).as_posix() not in expected
        ):
            path.unlink()
    return all(
        (checkout / file.path).is_file() and hash_file(checkout / file.path) == file.digest
        for file in artifact.files
    )


def _discard(folder: Path, temporary: Path) -> None:
    """Takes a folder away in one step, then removes it at leisure."""
    aside = temporary / uuid.uuid4().hex
    folder.rename(aside)
    shutil.rmtree(aside)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Makes a rename or link in the directory survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
