"""The log of incidents: what was said last about each stands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from llmops_assets.errors import EvidenceError, LifecycleOrderError
from llmops_assets.evidence.leaves import incident_chain, release_chain
from llmops_assets.evidence.statements import INCIDENT_NOTE
from llmops_assets.evidence.statistics import Decision
from llmops_assets.operate.incidents import (
    Incident,
    IncidentBook,
    add_note,
    find_incident,
    incidents_of,
    incidents_of_model,
    judge_answered,
    open_incidents,
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
    evidence = rig.platform.evidence
    report_incident(evidence, incident("a"))
    report_incident(evidence, incident("b"))
    assert judge_answered(incidents_of(evidence, MODEL, "parrot.v1")).decision is Decision.FAILED
    for alert in ("a", "b"):
        answered = {"answered": TIME + timedelta(minutes=1)}
        report_incident(evidence, incident(alert).model_copy(update=answered))
    assert [each.id for each in incidents_of_model(evidence, MODEL)] == ["a", "b"]
    assert judge_answered(incidents_of(evidence, MODEL, "parrot.v1")).decision is Decision.PASSED
    assert len(list(evidence.entries(incident_chain(MODEL)))) == 4


def test_what_people_reported_stands_for_itself(rig: Rig) -> None:
    """Two rollbacks by hand have no id, and are two incidents."""
    for what in ("first", "second"):
        report_incident(rig.platform.evidence, incident(None, what))
    assert [i.what for i in incidents_of_model(rig.platform.evidence, MODEL)] == ["first", "second"]
    assert IncidentBook(rig.platform.evidence).of(MODEL) == {}


def test_incidents_of_another_release_are_not_shown(rig: Rig) -> None:
    """A release is judged by its own."""
    report_incident(rig.platform.evidence, incident("a", release="parrot.v1"))
    report_incident(rig.platform.evidence, incident("b", release="parrot.v2"))
    (own,) = incidents_of(rig.platform.evidence, MODEL, "parrot.v2").incidents
    assert own.id == "b"


def test_book_knows_what_it_reported(rig: Rig) -> None:
    """It reads the log once; what is added after must not be decided about twice."""
    book = IncidentBook(rig.platform.evidence)
    assert book.of(MODEL) == {}
    book.report(incident("a"))
    assert set(book.of(MODEL)) == {"a"}
    assert set(IncidentBook(rig.platform.evidence).of(MODEL)) == {"a"}


def test_note_and_close_by_hand(rig: Rig) -> None:
    """What a person found belongs to the incident, also when no alert will ever close it."""
    evidence = rig.platform.evidence
    report_incident(evidence, incident(None, "slow"))
    report_incident(evidence, incident("a"))
    (slow, _) = incidents_of_model(evidence, MODEL)
    assert slow.id == f"incident-{MODEL}-0"
    add_note(evidence, slow, "bob", " a noisy neighbour ")
    assert [each.id for each in open_incidents(evidence, MODEL)] == [slow.id, "a"]
    add_note(evidence, find_incident(evidence, "incident-"), "bob", "moved it", closes=True)
    (slow, alert) = incidents_of_model(evidence, MODEL)
    assert [(note.actor, note.text) for note in slow.notes] == [
        ("bob", "a noisy neighbour"), ("bob", "moved it"),
    ]  # fmt: skip
    assert slow.answered == slow.notes[-1].time
    assert slow.action == "closed by bob: moved it"
    assert (alert.answered, alert.notes) == (None, ())
    # The chain of the release has the notes as well.
    types = [e.leaf.predicate_type for e in evidence.entries(release_chain("parrot.v1"))]
    assert types.count(INCIDENT_NOTE) == 2


def test_closed_incident_is_closed_once(rig: Rig) -> None:
    """The second one would hide who closed it, and when."""
    evidence = rig.platform.evidence
    report_incident(evidence, incident("a"))
    add_note(evidence, find_incident(evidence, "a"), "bob", "over", closes=True)
    with pytest.raises(LifecycleOrderError, match=r"closed already.*closed by bob"):
        add_note(evidence, find_incident(evidence, "a"), "ada", "over", closes=True)
    with pytest.raises(LifecycleOrderError, match="Nothing is said"):
        add_note(evidence, find_incident(evidence, "a"), "ada", " ")


def test_note_outlives_what_the_alert_says_later(rig: Rig) -> None:
    """The trigger read the incident before the note was there, and writes it whole."""
    evidence = rig.platform.evidence
    book = IncidentBook(evidence)
    book.report(incident("a"))
    add_note(evidence, find_incident(evidence, "a"), "bob", "seen")
    known = book.of(MODEL)["a"]
    answered = {"answered": TIME + timedelta(minutes=1)}
    book.report(known.model_copy(update=answered))
    # Also one that was read after it does not write the note again.
    fresh = IncidentBook(evidence)
    fresh.report(fresh.of(MODEL)["a"].model_copy(update={"action": "nothing"}))
    (standing,) = incidents_of_model(evidence, MODEL)
    assert [note.text for note in standing.notes] == ["seen"]
    assert (standing.action, standing.answered) == ("nothing", TIME + timedelta(minutes=1))


def test_incident_is_found_by_how_its_id_begins(rig: Rig) -> None:
    """Ids of alerts are long. Two that begin alike are not guessed between."""
    evidence = rig.platform.evidence
    for alert in ("ab@1", "ac@1"):
        report_incident(evidence, incident(alert))
    assert find_incident(evidence, "ac").id == "ac@1"
    for name, found in (("a", "ab@1, ac@1"), ("x", "none"), ("", "ab@1, ac@1")):
        with pytest.raises(LifecycleOrderError, match=f"Found: {found}"):
            find_incident(evidence, name)


def test_times_to_detect_decide_and_restore() -> None:
    """What is not known is not zero."""
    whole = incident("a").model_copy(
        update={
            "began": TIME - timedelta(seconds=10), "decided": TIME + timedelta(seconds=2),
            "restored": TIME + timedelta(seconds=3),
        }
    )  # fmt: skip
    assert (whole.seconds_to_detect, whole.seconds_to_decide) == (10, 2)
    assert whole.seconds_to_restore == 13
    unknown = whole.model_copy(update={"began": None, "decided": None})
    assert (unknown.seconds_to_detect, unknown.seconds_to_decide) == (None, None)
    assert unknown.seconds_to_restore == 3


def test_note_on_nothing_is_no_history(rig: Rig) -> None:
    """This platform writes none, so somebody else did."""
    evidence = rig.platform.evidence
    report_incident(evidence, incident("a"))
    gone = find_incident(evidence, "a").model_copy(update={"id": "never"})
    add_note(evidence, gone, "bob", "seen")
    with pytest.raises(EvidenceError, match="about no incident"):
        incidents_of_model(evidence, MODEL)
