"""Registering a release: what it was made of goes to the registry as tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from llmops_assets.develop.registry import ModelRegistry
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.release import Release
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Action, Columns, Result

TAGGED = ("model_spec", "training_data", "evaluation_data", "checkpoint", "evaluation")
"""Assets whose digests the registered version carries, as `llmops.<asset>`."""


class Registration(BaseModel):
    """The document of the `registered_model` artifact."""

    model_config = ConfigDict(frozen=True)

    model: str
    version: int
    tags: dict[str, str]


def register(
    columns: Columns, registry: ModelRegistry, release: str, column: Mapping[str, ArtifactHandle]
) -> tuple[Result, str]:
    """Gives the release its version; a second call finds the first one's.

    A release that was made from a registered version keeps that one.

    Returns:
        What was published, and the page that shows the version.

    Raises:
        RegistryError: the registry does not answer, or the version that the release was
            made from is gone or another release's.
    """
    started = datetime.now(UTC)
    source = json.loads((column["model_spec"].path / "source.json").read_text(encoding="utf-8"))
    digests = {asset: column[asset].digest for asset in TAGGED}
    tags = {f"llmops.{asset}": digest for asset, digest in digests.items()}
    tags["llmops.spec_commit"] = source["commit"] or "not in git"
    if source["changed"]:
        tags["llmops.spec_commit"] += ", with changes that are not committed"
    parsed = Release.parse(release)
    registered = registry.register(
        parsed.model,
        release,
        tags,
        columns.store.record(digests["checkpoint"]),
        parsed.registered_version,
    )
    action = Action(
        asset="registered_model",
        media_type="application/vnd.llmops.registration.v1",
        inputs=digests,
    )
    document = Registration(
        model=registered.model, version=registered.version, tags=dict(registered.tags)
    )
    return columns.record(release, action, document, started), registered.url


def judge_registered(
    registry: ModelRegistry, release: str, column: Mapping[str, ArtifactHandle]
) -> Judgement:
    """The registry, asked again, holds the version with the digests of what was evaluated."""
    document = Registration.model_validate_json(column["registered_model"].document)
    found = registry.find(document.model, release)
    measured = dict(found.tags) if found is not None else {}
    expected = {f"llmops.{asset}": column[asset].digest for asset in ("checkpoint", "evaluation")}
    passed = (
        found is not None
        and found.version == document.version
        and all(measured.get(tag) == digest for tag, digest in expected.items())
    )
    return Judgement(
        decision=Decision.of(passed),
        measured={tag: measured.get(tag) for tag in expected},
        threshold=expected,
        reason=f"Version {document.version} carries the evaluated digests."
        if passed
        else f"Version {document.version} in the registry does not carry the evaluated digests.",
    )
