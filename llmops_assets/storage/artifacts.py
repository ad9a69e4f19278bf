"""How artifacts travel between assets: as handles. Bytes never pass through Dagster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dagster as dg

from llmops_assets.errors import StoreError
from llmops_assets.explained import explained
from llmops_assets.storage.columns import DOCUMENT, Columns, Result
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


class ArtifactIOManager(dg.IOManager):
    """Passes handles between assets; the store's refs say which artifact a release has.

    Outputs were published by `Columns` before they come here, so that publishing does
    not depend on Dagster. Here it is made sure that nothing else is reported.
    """

    def __init__(self, columns: Callable[[], Columns]) -> None:
        """
        Args:
            columns: opens them; called only when an asset runs.
        """
        self._columns = columns

    def handle_output(self, context: dg.OutputContext, obj: ArtifactHandle) -> None:
        published = self._columns().get(context.partition_key, context.asset_key.path[-1])
        if published.artifact != obj.digest:
            raise StoreError(
                f"{context.asset_key.to_user_string()} reports what it has not published",
                expected=published.artifact,
                found=obj.digest,
                cure="materialize the asset again; if it repeats, report it",
            )

    def load_input(self, context: dg.InputContext) -> ArtifactHandle:
        with explained():
            columns = self._columns()
            result = columns.get(context.partition_key, context.asset_key.path[-1])
            return ArtifactHandle(result, columns.store)
