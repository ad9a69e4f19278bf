"""The evidence of one release, in one document, from the store alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmops_assets.evidence.verdicts import Verdict, verdicts
from llmops_assets.release import Release
from llmops_assets.serving.routes import Routes
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.columns import Columns, Result


class RouteChange(BaseModel):
    """A change of production's route that put the release on, or took it off."""

    model_config = ConfigDict(frozen=True)

    digest: str
    record: dict[str, Any]


class AuditRecord(BaseModel):
    """Document of `audit_record`."""

    model_config = ConfigDict(frozen=True)

    release: str
    results: dict[str, Result]
    """What each asset published, with digests of inputs and output."""
    verdicts: dict[str, Verdict]
    """The verdict of each gate that counts."""
    routes: tuple[RouteChange, ...]
    """Changes of production's route that name the release, newest first."""


def audit(columns: Columns, routes: Routes, release: str) -> AuditRecord:
    """Collects the evidence of a release.

    Raises:
        ArtifactCorruptError: a record is damaged, or the chain of routes is broken.
    """
    model = Release.parse(release).model
    return AuditRecord(
        release=release,
        results=_without_itself(columns.assets(release)),
        verdicts=verdicts(columns.store, release),
        routes=tuple(
            RouteChange(digest=digest, record=route.model_dump(mode="json"))
            for digest, route in routes.history(Environment.PRODUCTION, model)
            if any(target.release == release for target in route.targets)
        ),
    )


def _without_itself(results: Mapping[str, Result]) -> dict[str, Result]:
    return {asset: result for asset, result in results.items() if asset != "audit_record"}
