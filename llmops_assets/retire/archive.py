"""Archives: everything of one release in one file, proven to restore.

An archive is a tar file with an OCI image layout: the blobs of all artifacts of the
release, what is on record of it, and `index.json` which names them. It needs nothing
of this platform to be read.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmops_assets.develop.directory import replace_file
from llmops_assets.errors import ArtifactCorruptError, StoreError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.folder import OCI_LAYOUT, FolderStore
from llmops_assets.storage.store import Record, Store, canonical_json, digest_of, hash_file

INDEX_MEDIA_TYPE = "application/vnd.oci.image.index.v1+json"
ASSET_ANNOTATION = "llmops.asset"


class ArchiveFile(BaseModel):
    """Document of `archive`: where the release's bytes are, and what they must restore to."""

    model_config = ConfigDict(frozen=True)

    release: str
    file: str
    """Name in cold storage."""
    digest: str
    """Of the file."""
    size: int
    """Bytes of the file."""
    artifacts: dict[str, str]
    """Digest of each archived artifact, by asset."""
    keep_until: datetime


def write_archive(
    store: Store,
    cold: Path,
    release: str,
    column: Mapping[str, ArtifactHandle],
    evidence: Record,
    keep_until: datetime,
) -> ArchiveFile:
    """Writes a release's archive to cold storage; equal content gives equal bytes.

    The file appears under its name only when it is whole and on disk.

    Args:
        evidence: what is on record of the release; kept as `evidence.json`.

    Raises:
        StoreError: an artifact is missing or damaged.
    """
    cold.mkdir(parents=True, exist_ok=True)
    target = cold / f"{release}.tar"
    # A name of its own for each attempt, so that two of them cannot mix their bytes.
    partial = cold / f"{release}.{uuid.uuid4().hex}.partial"
    try:
        with tarfile.open(partial, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, source in _members(store, column, evidence):
                _add(archive, name, source)
        replace_file(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    for leftover in cold.glob(f"{release}.*.partial"):
        leftover.unlink(missing_ok=True)  # of an attempt that was killed
    return ArchiveFile(
        release=release,
        file=target.name,
        digest=hash_file(target),
        size=target.stat().st_size,
        artifacts={asset: handle.digest for asset, handle in column.items()},
        keep_until=keep_until,
    )


def find_archive(cold: Path, archived: ArchiveFile) -> Path:
    """The archive's file in cold storage, every byte checked.

    Raises:
        ArtifactCorruptError: it is gone, or not the one that was written.
    """
    file = cold / archived.file
    if not file.exists():
        raise ArtifactCorruptError(
            f"The archive of {archived.release} is gone",
            expected=file,
            cure="find out who removed it, and materialize archive again while the store has it",
        )
    if (actual := hash_file(file)) != archived.digest:
        raise ArtifactCorruptError(
            f"The archive {file} is damaged",
            expected=archived.digest,
            found=actual,
            cure="materialize archive again while the store still has the release",
        )
    return file


def restore(cold: Path, archived: ArchiveFile, target: Path) -> dict[str, str]:
    """Restores an archive into a new store folder, from the archive alone.

    Returns:
        Digest of each artifact that restored, every byte verified, by asset.

    Raises:
        ArtifactCorruptError: the file is not the one that was written, or damaged inside.
    """
    with tarfile.open(find_archive(cold, archived)) as archive:
        # The filter refuses members that would leave the folder (PEP 706).
        archive.extractall(target, filter="data")
    store = FolderStore(target)
    index = json.loads((target / "index.json").read_text(encoding="utf-8"))
    restored: dict[str, str] = {}
    for descriptor in index["manifests"]:
        artifact, _ = store.open(descriptor["digest"])
        restored[descriptor["annotations"][ASSET_ANNOTATION]] = artifact.digest
    return restored


def judge_restores(cold: Path, archived: ArchiveFile, scratch: Path) -> Judgement:
    """A restore from the archive alone gives every artifact byte for byte."""
    scratch.mkdir(parents=True, exist_ok=True)
    problem: str | None = None
    restored: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        try:
            restored = restore(cold, archived, Path(folder) / "store")
        except (StoreError, tarfile.TarError) as error:
            problem = str(error)
    passed = problem is None and restored == archived.artifacts
    return Judgement(
        decision=Decision.of(passed),
        measured={"restored": restored},
        threshold={"restored": archived.artifacts},
        reason=f"All {len(restored)} artifacts restored byte for byte."
        if passed
        else problem or "Other artifacts restored than were archived.",
    )


def _members(
    store: Store,
    column: Mapping[str, ArtifactHandle],
    evidence: Record,
) -> Iterator[tuple[str, bytes | Path]]:
    """Names in the archive, with their content or the file that holds it."""
    manifests: list[dict[str, object]] = []
    # A blob that is there twice cannot be unpacked: the first one is read-only.
    seen = {digest_of(b"{}")}
    yield _blob(digest_of(b"{}")), b"{}"
    for asset, handle in sorted(column.items()):
        content = canonical_json(store.record(handle.digest))
        manifests.append(
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "artifactType": handle.artifact.media_type,
                "digest": handle.digest,
                "size": len(content),
                "annotations": {ASSET_ANNOTATION: asset},
            }
        )
        blobs: list[tuple[str, bytes | Path]] = [(handle.digest, content)]
        blobs += [(file.digest, handle.path / file.path) for file in handle.artifact.files]
        for digest, source in blobs:
            if digest not in seen:
                seen.add(digest)
                yield _blob(digest), source
    yield "evidence.json", canonical_json(evidence)
    yield "oci-layout", OCI_LAYOUT
    yield (
        "index.json",
        canonical_json({"schemaVersion": 2, "mediaType": INDEX_MEDIA_TYPE, "manifests": manifests}),
    )


def _blob(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _add(archive: tarfile.TarFile, name: str, source: bytes | Path) -> None:
    member = tarfile.TarInfo(name)  # time, owner and group stay zero: equal bytes each time
    member.mode = 0o444
    if isinstance(source, bytes):
        member.size = len(source)
        archive.addfile(member, io.BytesIO(source))
    else:
        member.size = source.stat().st_size
        with source.open("rb") as file:
            archive.addfile(member, file)
