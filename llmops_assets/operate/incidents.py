"""Incidents: what went wrong with what serves, and what was done about it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.storage.store import Store


class Incident(BaseModel):
    """One incident of a model; kept in the model's log.

    The log only grows: a later entry with the same `id` stands for the earlier ones.
    """

    model_config = ConfigDict(frozen=True)

    id: str | None = None
    """Of the alert that it came from, see `alerts.Alert.id`; None for what people reported."""
    rule: str | None = None
    """Of the alert rule that decided, see `alerts.name_of`."""
    job: Literal["rollback", "scale", "observe"] | None = None
    """Whose run shows what was done, or does it; None where nothing is to follow."""
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


class IncidentBook:
    """Incidents by alert, each model's log read once: for one look at many alerts."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._models: dict[str, dict[str, Incident]] = {}

    def of(self, model: str) -> dict[str, Incident]:
        """A model's incidents that came from alerts, by id."""
        if model not in self._models:
            self._models[model] = {
                incident.id: incident
                for incident in incidents_of_model(self._store, model)
                if incident.id is not None
            }
        return self._models[model]

    def report(self, incident: Incident) -> Incident:
        """Adds an incident, or what became of it, to its model's log."""
        assert incident.id is not None  # an alert's, or nobody looks for it here
        before = self.of(incident.model)
        report_incident(self._store, incident)
        before[incident.id] = incident
        return incident


def report_incident(store: Store, incident: Incident) -> None:
    """Adds an incident to its model's log."""
    store.append(_log(incident.model), incident.model_dump(mode="json"))


def incidents_of_model(store: Store, model: str) -> list[Incident]:
    """A model's incidents as they stand, oldest first."""
    standing: dict[str, Incident] = {}
    for place, incident in enumerate(_entries(store, model)):
        standing[incident.id or f"entry {place}"] = incident
    return list(standing.values())


def incidents_of(store: Store, model: str, release: str) -> IncidentReport:
    """The incidents of one release, oldest first."""
    return IncidentReport(
        release=release,
        incidents=tuple(
            incident for incident in incidents_of_model(store, model) if incident.release == release
        ),
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


def _entries(store: Store, model: str) -> Iterator[Incident]:
    return (Incident.model_validate(entry.record) for entry in store.log(_log(model)))


def _log(model: str) -> str:
    return f"incidents/{model}"
