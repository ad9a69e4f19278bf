"""Incidents: what went wrong with what serves, and what was done about it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmops_assets.errors import EvidenceError, LifecycleOrderError
from llmops_assets.evidence import attest
from llmops_assets.evidence.leaves import Entry, incident_chain, release_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.evidence.statements import INCIDENT, INCIDENT_NOTE
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement

OWN_ID = "incident-"
"""What the id of an incident begins with that came from no alert: model and number follow."""
ROLLBACK_ID = "rollback-"
"""The same of a rollback by a person: model and generation of the route follow."""


class Note(BaseModel):
    """What a person said of an incident; the predicate of a statement."""

    model_config = ConfigDict(frozen=True)

    incident: str
    """Its id."""
    model: str
    release: str
    actor: str
    text: str
    closes: bool
    """Whether it answers the incident, so that nothing else is to be done."""
    time: datetime


class Incident(BaseModel):
    """One incident of a model; the predicate of a statement.

    Its chain only grows: a later entry with the same `id` stands for the earlier ones, and
    notes are entries of their own.
    """

    model_config = ConfigDict(frozen=True)

    id: str | None = None
    """Of the alert that it came from, see `alerts.Alert.id`. None for others in the log, which
    are known by their place in it: `incident-<model>-<ordinal>`."""
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
    began: datetime | None = None
    """When it began to go wrong, as the alert says; None where nobody knows."""
    detected: datetime
    """When the platform or a person noticed."""
    decided: datetime | None = None
    """When it was decided what to do; None while nothing was."""
    restored: datetime | None = None
    """When the gateway reported that what was done is in force; None where it moved nothing."""
    answered: datetime | None
    """When nothing was left to do; None while it is open."""
    notes: tuple[Note, ...] = ()
    """What people said, oldest first. In the log they are entries of their own."""

    @property
    def from_alert(self) -> bool:
        """Whether an alert reported it, and not a person or a deployment."""
        return self.id is not None and not self.id.startswith((OWN_ID, ROLLBACK_ID))

    @property
    def seconds_to_detect(self) -> float | None:
        """From when it began; None where nobody knows."""
        return _seconds(self.began, self.detected)

    @property
    def seconds_to_decide(self) -> float | None:
        """From when it was noticed; None while nothing was decided."""
        return _seconds(self.detected, self.decided)

    @property
    def seconds_to_restore(self) -> float | None:
        """From when it began, or was noticed, to when it was over for clients."""
        return _seconds(self.began or self.detected, self.restored)


class IncidentReport(BaseModel):
    """Document of `incidents`: everything that happened to a release so far."""

    model_config = ConfigDict(frozen=True)

    release: str
    incidents: tuple[Incident, ...]


class IncidentBook:
    """Incidents by alert, each model's read once: for one look at many alerts."""

    def __init__(self, evidence: EvidenceLog) -> None:
        self._evidence = evidence
        self._models: dict[str, dict[str, Incident]] = {}

    def of(self, model: str) -> dict[str, Incident]:
        """A model's incidents that came from alerts, by id."""
        if model not in self._models:
            self._models[model] = {
                incident.id: incident
                for incident in incidents_of_model(self._evidence, model)
                if incident.id is not None and incident.from_alert
            }
        return self._models[model]

    def report(self, incident: Incident) -> Incident:
        """Adds an incident, or what became of it, to the evidence."""
        assert incident.id is not None  # an alert's, or nobody looks for it here
        before = self.of(incident.model)
        report_incident(self._evidence, incident)
        before[incident.id] = incident
        return incident


def report_incident(evidence: EvidenceLog, incident: Incident) -> None:
    """Adds an incident to the evidence."""
    chains = (incident_chain(incident.model), release_chain(incident.release))
    evidence.append(Attestation(attest.incident(incident), chains))


def add_note(
    evidence: EvidenceLog, incident: Incident, actor: str, text: str, *, closes: bool = False
) -> Note:
    """Adds what a person says of an incident to the evidence.

    Args:
        incident: as `find_incident` gives it.
        closes: it answers the incident.

    Raises:
        LifecycleOrderError: there is no text, or the incident is closed already.
        EvidenceError: it cannot be signed.
    """
    assert incident.id is not None  # what stands has one
    if not text.strip():
        raise LifecycleOrderError(
            f"Nothing is said of {incident.id}",
            expected="a text, which goes into the record",
            cure=f'llmops incident note {incident.id} "WHAT YOU FOUND"',
        )
    if closes and incident.answered is not None:
        raise LifecycleOrderError(
            f"{incident.id} is closed already",
            expected="an open incident",
            found=f"{incident.action}, {incident.answered:%F %T} UTC",
            cure=f'to add something: llmops incident note {incident.id} "TEXT"',
        )
    note = Note(
        incident=incident.id,
        model=incident.model,
        release=incident.release,
        actor=actor,
        text=text.strip(),
        closes=closes,
        time=datetime.now(UTC),
    )
    chains = (incident_chain(incident.model), release_chain(incident.release))
    evidence.append(Attestation(attest.incident_note(note), chains))
    return note


def all_incidents(evidence: EvidenceLog) -> Iterator[Incident]:
    """Every model's incidents as they stand, model by model."""
    for head in evidence.heads("incidents"):
        yield from incidents_of_model(evidence, str(head.statement.predicate["model"]))


def find_incident(evidence: EvidenceLog, name: str) -> Incident:
    """The incident with an id, of which the beginning is enough.

    Raises:
        LifecycleOrderError: there is none, or several begin so.
    """
    known = {incident.id or "": incident for incident in all_incidents(evidence)}
    found = (
        [known[name]]
        if name in known
        else [incident for each, incident in known.items() if each.startswith(name)]
    )
    if len(found) != 1 or not name:
        raise LifecycleOrderError(
            f"{name!r} names no incident" if not found else f"{name!r} names several incidents",
            expected="the id of one, or how it begins",
            found=", ".join(str(incident.id) for incident in found) or "none",
            cure="llmops incident list --all",
        )
    return found[0]


def incidents_of_model(evidence: EvidenceLog, model: str) -> list[Incident]:
    """A model's incidents as they stand, each with an id, oldest first."""
    chain = incident_chain(model)
    standing: dict[str, Incident] = {}
    for entry in evidence.entries(chain, INCIDENT, INCIDENT_NOTE):
        if entry.statement.predicate_type == INCIDENT_NOTE:
            note = Note.model_validate(entry.statement.predicate)
            standing[note.incident] = _noted(entry, standing.get(note.incident), note)
            continue
        said = Incident.model_validate(entry.statement.predicate)
        name = said.id or f"{OWN_ID}{model}-{entry.leaf.links[chain].ordinal}"
        notes = standing[name].notes if name in standing else ()
        standing[name] = said.model_copy(update={"id": name, "notes": notes})
    return list(standing.values())


def open_incidents(evidence: EvidenceLog, model: str) -> list[Incident]:
    """A model's incidents that nobody answered, oldest first."""
    return [each for each in incidents_of_model(evidence, model) if each.answered is None]


def incidents_of(evidence: EvidenceLog, model: str, release: str) -> IncidentReport:
    """The incidents of one release, oldest first."""
    return IncidentReport(
        release=release,
        incidents=tuple(
            incident
            for incident in incidents_of_model(evidence, model)
            if incident.release == release
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


def _noted(entry: Entry, incident: Incident | None, note: Note) -> Incident:
    if incident is None:
        raise EvidenceError(
            f"Entry {entry.sequence} of the evidence log is about no incident",
            expected=f"an earlier entry with the incident {note.incident}",
            cure="treat the log as tampered with: this platform writes no such note",
        )
    update: dict[str, object] = {"notes": (*incident.notes, note)}
    if note.closes:
        update |= {
            "answered": note.time,
            "actor": incident.actor or note.actor,
            "action": incident.action or f"closed by {note.actor}: {note.text}",
        }
    return incident.model_copy(update=update)


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else (end - start).total_seconds()
