"""The log of incidents: what was said last about each stands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from llmops_assets.evidence.statistics import Decision
from llmops_assets.operate.incidents import (
    Incident,
    IncidentBook,
    incidents_of,
    incidents_of_model,
    judge_answered,
    report_incident,
)

from ..release_rig import MODEL, Rig

TIME = datetime(2026, 3, 1, 12, tzinfo=UTC)


def incident(alert: str | None, what: str = "wrong dates", release: str = "parrot.v1") -> Incident:
    return Incident(
        id=alert, model=MODEL, release=release, what=what, action=None, actor="sre", detected=TIME,
        answered=None,
    )  # fmt: skip


def test_answer_replaces_the_report(rig: Rig) -> None:
    """The log only grows, and a closed incident must not stay open in the gate."""
    store = rig.platform.store
    report_incident(store, incident("a"))
    report_incident(store, incident("b"))
    assert judge_answered(incidents_of(store, MODEL, "parrot.v1")).decision is Decision.FAILED
    for alert in ("a", "b"):
        answered = {"answered": TIME + timedelta(minutes=1)}
        report_incident(store, incident(alert).model_copy(update=answered))
    assert [each.id for each in incidents_of_model(store, MODEL)] == ["a", "b"]
    assert judge_answered(incidents_of(store, MODEL, "parrot.v1")).decision is Decision.PASSED
    assert len(list(store.log(f"incidents/{MODEL}"))) == 4


def test_what_people_reported_stands_for_itself(rig: Rig) -> None:
    """Two rollbacks by hand have no id, and are two incidents."""
    for what in ("first", "second"):
        report_incident(rig.platform.store, incident(None, what))
    assert [i.what for i in incidents_of_model(rig.platform.store, MODEL)] == ["first", "second"]
    assert IncidentBook(rig.platform.store).of(MODEL) == {}


def test_incidents_of_another_release_are_not_shown(rig: Rig) -> None:
    """A release is judged by its own."""
    report_incident(rig.platform.store, incident("a", release="parrot.v1"))
    report_incident(rig.platform.store, incident("b", release="parrot.v2"))
    (own,) = incidents_of(rig.platform.store, MODEL, "parrot.v2").incidents
    assert own.id == "b"


def test_log_of_before_alerts_is_still_read(rig: Rig) -> None:
    """Stores that exist hold incidents without the fields that alerts brought."""
    record = incident(None).model_dump(mode="json", exclude={"id", "rule", "job"})
    rig.platform.store.append(f"incidents/{MODEL}", record)
    assert incidents_of_model(rig.platform.store, MODEL) == [incident(None)]


def test_book_knows_what_it_reported(rig: Rig) -> None:
    """It reads the log once; what is added after must not be decided about twice."""
    book = IncidentBook(rig.platform.store)
    assert book.of(MODEL) == {}
    book.report(incident("a"))
    assert set(book.of(MODEL)) == {"a"}
    assert set(IncidentBook(rig.platform.store).of(MODEL)) == {"a"}
