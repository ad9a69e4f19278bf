"""Incidents: what went wrong with what serves, and what was done about it."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.storage.store import Store


class Incident(BaseModel):
    """One incident of a model; kept in the model's log."""

    model_config = ConfigDict(frozen=True)

    model: str
    release: str
    """The release that served badly."""
    what: str
    action: str | None
    """What was done; None while nobody answered."""
    actor: str | None
    detected: datetime
    answered: datetime | None


class IncidentReport(BaseModel):
    """Document of `incidents`: everything that happened to a release so far."""

    model_config = ConfigDict(frozen=True)

    release: str
    incidents: tuple[Incident, ...]


def report_incident(store: Store, incident: Incident) -> None:
    """Adds an incident to its model's log."""
    store.append(_log(incident.model), incident.model_dump(mode="json"))


def incidents_of(store: Store, model: str, release: str) -> IncidentReport:
    """The incidents of one release, oldest first."""
    all_of_model = (Incident.model_validate(entry.record) for entry in store.log(_log(model)))
    return IncidentReport(
        release=release,
        incidents=tuple(incident for incident in all_of_model if incident.release == release),
    )


def judge_answered(report: IncidentReport) -> Judgement:
    """Somebody did something about every incident."""
    open_ones = [incident.what for incident in report.incidents if incident.answered is None]
    return Judgement(
        decision=Decision.of(not open_ones),
        measured={"incidents": len(report.incidents), "unanswered": open_ones},
        threshold={"unanswered": []},
        reason=f"{len(open_ones)} of {len(report.incidents)} incidents are unanswered.",
    )


def _log(model: str) -> str:
    return f"incidents/{model}"
