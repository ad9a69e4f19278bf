"""What training and evaluation data depend on, known before they are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from llmops_assets.spec import DataFiles, GeneratedDates, canonical
from llmops_assets.storage.columns import Action
from llmops_assets.storage.store import content_digest
from llmops_assets.versions import versions_of

DATA_MEDIA_TYPE = "application/vnd.llmops.data.v1"
Split = Literal["training", "evaluation"]
SPLITS: tuple[Split, ...] = ("training", "evaluation")


def data_action(data: GeneratedDates | DataFiles, split: Split, file: Path | None) -> Action:
    """The action that builds one split.

    Args:
        data: the spec's data section.
        split: which of its splits.
        file: where the split's file was found; None for data that are generated.

    Raises:
        StoreError: there is no such file.
    """
    parameters: dict[str, Any] = (
        {"data": canonical(data)} if file is None else {"file": content_digest(file)}
    )
    return Action(
        asset=f"{split}_data",
        media_type=DATA_MEDIA_TYPE,
        parameters={**parameters, "split": split},
        versions={"data": "1", **versions_of("babel", "pyarrow")},
    )
