"""Handles of artifacts: what travels between assets, in place of bytes.

Knows nothing of Dagster, whose import takes longer than a rollback may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmops_assets.storage.columns import DOCUMENT, Result
from llmops_assets.storage.store import Artifact, Store


@dataclass(frozen=True)
class ArtifactHandle:
    """A published artifact: what it is, and where its verified bytes are once asked for."""

    result: Result
    store: Store

    @property
    def digest(self) -> str:
        return self.result.artifact

    @cached_property
    def artifact(self) -> Artifact:
        """Its file list, from the manifest."""
        return self.store.describe(self.digest)

    @cached_property
    def path(self) -> Path:
        """A read-only directory with its files, verified when first asked for.

        Raises:
            StoreError: it is missing or damaged.
        """
        return self.store.open(self.digest)[1]

    @property
    def document(self) -> str:
        """The JSON text of an artifact that records an event."""
        return (self.path / DOCUMENT).read_text(encoding="utf-8")


def digests(column: Mapping[str, ArtifactHandle]) -> dict[str, str]:
    """Digest of each asset of a column."""
    return {asset: handle.digest for asset, handle in column.items()}
