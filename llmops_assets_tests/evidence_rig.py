"""An evidence log in a folder, with keys of its own."""

from __future__ import annotations

from pathlib import Path

from llmops_assets.evidence.keys import create_keys
from llmops_assets.evidence.log import LOG, EvidenceLog, evidence_log
from llmops_assets.settings import Settings
from llmops_assets.storage.folder import FolderStore


def open_evidence(folder: Path) -> EvidenceLog:
    """The log in a state folder, as any process of an installation opens it."""
    settings = Settings(state=folder)
    create_keys(settings.key_folder)
    return evidence_log(settings, FolderStore(settings.store))


def blob_of(evidence: EvidenceLog, sequence: int) -> Path:
    """The file with an entry, made writable."""
    assert isinstance(evidence.store, FolderStore)
    logged = next(evidence.store.log(LOG, sequence))
    blob = evidence.store.root / "blobs" / logged.digest.replace(":", "/")
    blob.chmod(0o600)
    return blob
