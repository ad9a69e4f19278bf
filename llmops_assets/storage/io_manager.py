"""How Dagster passes artifacts between assets: as handles. Bytes never pass through it."""

from __future__ import annotations

from collections.abc import Callable

import dagster as dg

from llmops_assets.errors import StoreError
from llmops_assets.explained import explained
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Columns


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
