"""The evidence of one release, in one document, from the store alone."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from llmops_assets.evidence.verdicts import Verdict, WaiverUse, all_verdicts, waiver_uses
from llmops_assets.operate.incidents import Incident, incidents_of
from llmops_assets.release import Release
from llmops_assets.serving.routes import Routes
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.columns import Columns, Result


class RouteChange(BaseModel):
    """A change of a route after which it named the release."""

    model_config = ConfigDict(frozen=True)

    digest: str
    record: dict[str, Any]


class AuditRecord(BaseModel):
    """Document of `audit_record`: everything on record of a release, in order of time."""

    model_config = ConfigDict(frozen=True)

    release: str
    results: dict[str, tuple[Result, ...]]
    """All that each asset published, oldest first; the last one counts."""
    verdicts: tuple[Verdict, ...]
    """All verdicts, oldest first; the last one of a gate counts."""
    waivers: tuple[WaiverUse, ...]
    """Every time that the release went on by a waiver, oldest first."""
    incidents: tuple[Incident, ...]
    routes: tuple[RouteChange, ...]
    """Changes of a route that name the release, newest first, of each environment."""


def audit(columns: Columns, routes: Routes, release: str) -> AuditRecord:
    """Collects the evidence of a release.

    Raises:
        ArtifactCorruptError: a record is damaged, or the chain of routes is broken.
    """
    model = Release.parse(release).model
    store = columns.store
    return AuditRecord(
        release=release,
        results={
            asset: tuple(columns.history(release, asset))
            for asset in columns.assets(release)
            if asset != "audit_record"
        },
        verdicts=tuple(all_verdicts(store, release)),
        waivers=tuple(waiver_uses(store, release)),
        incidents=incidents_of(store, model, release).incidents,
        routes=tuple(
            RouteChange(digest=digest, record=route.model_dump(mode="json"))
            for environment in Environment
            for digest, route in routes.history(environment, model)
            if any(target.release == release for target in route.targets)
        ),
    )
