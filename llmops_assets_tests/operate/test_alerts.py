"""Which rule decides about an alert, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import BaseModel

from llmops_assets.deploy.revocation import revoke
from llmops_assets.errors import ArtifactCorruptError, LLMOpsError, SpecError
from llmops_assets.evidence.leaves import incident_chain
from llmops_assets.evidence.results import AttestedResults
from llmops_assets.operate import alerts
from llmops_assets.operate.alertmanager import Alert
from llmops_assets.operate.alerts import DAMPED, ENDED, close, handle, matching, mover, name_of
from llmops_assets.operate.incidents import Incident, IncidentBook, incidents_of_model
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment
from llmops_assets.spec import AlertRule
from llmops_assets.storage.columns import Action

from ..release_rig import MODEL, Rig, deploy, loaded, serving
from .test_alertmanager import entry

pytestmark = pytest.mark.usefixtures("packages")

ROLL_BACK = AlertRule(match={"alertname": "ErrorRate"}, action="rollback", damping_seconds=60)
SCALE = AlertRule(match={"alertname": "Busy"}, action="scale", damping_seconds=60)
NOTIFY = AlertRule(match={"severity": "info"}, action="notify")


def alert(name: str = "ErrorRate", minute: int = 0, **labels: str) -> Alert:
    began = datetime(2026, 3, 1, 12, minute, tzinfo=UTC)
    everything = {"alertname": name, "model": MODEL, **labels}
    return Alert.model_validate(entry(name, startsAt=began.isoformat(), labels=everything))


def current(rig: Rig) -> Route:
    route, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    return route


def act(rig: Rig, about: Alert, rule: AlertRule) -> Incident:
    return handle(rig.platform, IncidentBook(rig.platform.evidence), current(rig), about, rule)


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead: timedelta) -> None:
    """The clock of this machine is put forward or back, from now on."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # pyright: ignore[reportIncompatibleMethodOverride]
            return datetime.now(UTC) + ahead

    monkeypatch.setattr(alerts, "datetime", Clock)


@pytest.mark.parametrize(
    ("labels", "matches"),
    [
        ({}, True),
        ({"environment": "production", "release": "parrot.v1"}, True),
        ({"environment": "staging"}, False),
        ({"release": "parrot.v2"}, False),
        ({"model": "parrots"}, False),
        ({"model": ""}, False),
        ({"alertname": "errorrate"}, False),
    ],
)
def test_rule_reaches_its_own_model_only(rig: Rig, labels: dict[str, str], matches: bool) -> None:
    """An alert about staging, another release or another team's model must move nothing here."""
    deploy(rig, 1)
    everything = {"alertname": "ErrorRate", "model": MODEL, **labels}
    about = Alert.model_validate(entry(labels=everything))
    found = matching(about, current(rig), [ROLL_BACK])
    assert (found is ROLL_BACK) is matches


def test_alert_without_a_model_is_about_no_model(rig: Rig) -> None:
    """Otherwise one about a disk would roll back everything that serves."""
    deploy(rig, 1)
    everything = Alert.model_validate(entry(labels={"alertname": "ErrorRate"}))
    assert matching(everything, current(rig), [ROLL_BACK]) is None


def test_first_matching_rule_decides(rig: Rig) -> None:
    """People order rules from the particular to the general."""
    deploy(rig, 1)
    both = alert(severity="info")
    assert matching(both, current(rig), [SCALE, NOTIFY, ROLL_BACK]) is NOTIFY
    assert matching(both, current(rig), [SCALE, ROLL_BACK, NOTIFY]) is ROLL_BACK
    assert matching(both, current(rig), [SCALE]) is None


def test_model_without_traffic_has_nothing_to_act_on(rig: Rig) -> None:
    """Alerts go on for a while after a model was taken off."""
    deploy(rig, 1)
    _, digest = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    rig.platform.routes.change(
        Environment.PRODUCTION, MODEL, (), actor="ada", reason="gone", expected=digest
    )
    assert matching(alert(), current(rig), [ROLL_BACK]) is None


def test_rollback_is_on_record_with_the_alert(rig: Rig) -> None:
    """The route and the incident both name it, and the incident the release that was bad."""
    deploy(rig, 1)
    deploy(rig, 2)
    incident = act(rig, alert(), ROLL_BACK)
    assert serving(rig) == 1
    assert mover(current(rig)) == alert().id == incident.id
    assert (incident.release, incident.action) == ("parrot.v2", "rolled back to parrot.v1")
    assert incident.job == "rollback"
    assert incident.began == alert().starts_at
    assert incident.decided is not None and incident.restored is not None
    assert incident.detected <= incident.decided <= incident.restored
    assert incident.answered is not None
    assert incidents_of_model(rig.platform.evidence, MODEL) == [incident]


def canary(rig: Rig, share: int) -> None:
    """Version 1 had all traffic last, and version 2 beside it has a share."""
    deploy(rig, 1)
    stable = current(rig).targets[0].model_copy(update={"weight": 100 - share})
    candidate = loaded(rig, 2).target.model_copy(update={"weight": share})
    _, digest = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    rig.platform.routes.change(
        Environment.PRODUCTION, MODEL, (stable, candidate), actor="ada", reason="canary",
        expected=digest,
    )  # fmt: skip


@pytest.mark.parametrize("share", [10, 90])
def test_alert_about_either_release_of_a_split_route_counts(rig: Rig, share: int) -> None:
    """In a canary most alerts are about the release with the small share."""
    canary(rig, share)
    about = alert(release="parrot.v2")
    assert matching(about, current(rig), [ROLL_BACK]) is ROLL_BACK
    incident = act(rig, about, ROLL_BACK)
    assert serving(rig) == 1
    assert (incident.release, incident.action) == ("parrot.v2", "rolled back to parrot.v1")


@pytest.mark.parametrize("share", [10, 90])
def test_alert_never_brings_traffic_to_the_release_it_is_about(rig: Rig, share: int) -> None:
    """The way back of a canary leads to the stable release, which may be what is bad."""
    canary(rig, share)
    before = current(rig)
    about = alert(release="parrot.v1")
    assert matching(about, before, [ROLL_BACK]) is ROLL_BACK
    incident = act(rig, about, ROLL_BACK)
    assert current(rig) == before
    assert (incident.release, incident.job, incident.answered) == ("parrot.v1", "observe", None)
    assert "not rolled back: parrot.v1 would get all traffic" in incident.what


def _reject(rig: Rig) -> None:
    revoke(rig.platform, "parrot.v1", "bob", "it lies")


def _deprecate_and_lose_the_record(rig: Rig) -> None:
    action = Action("deprecated_version", "application/vnd.llmops.test")
    rig.platform.columns.record("parrot.v1", action, Withdrawn(of="v1"), datetime.now(UTC))
    digest = AttestedResults(rig.platform.evidence).results("parrot.v1")["deprecated_version"]
    (rig.platform.settings.store / "blobs" / digest.replace(":", "/")).unlink()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(_reject, "bob revoked it"), (_deprecate_and_lose_the_record, "is deprecated")],
)
def test_refused_way_back_waits_for_a_person(
    rig: Rig, spoil: Callable[[Rig], None], why: str
) -> None:
    """Trying again every few seconds would change nothing and call nobody."""
    deploy(rig, 1)
    deploy(rig, 2)
    spoil(rig)
    incident = act(rig, alert(), ROLL_BACK)
    assert serving(rig) == 2
    assert (incident.job, incident.answered) == ("observe", None)
    assert "not rolled back" in incident.what and why in incident.what


@pytest.mark.parametrize("error", [ArtifactCorruptError, SpecError])
def test_way_back_that_is_damaged_waits_for_a_person(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: type[LLMOpsError]
) -> None:
    """As one that is refused: bytes do not mend themselves."""
    deploy(rig, 1)

    def damaged(*_: object) -> None:
        raise error("It is damaged", cure="restore it")

    monkeypatch.setattr(alerts, "take_back", damaged)
    incident = act(rig, alert(), ROLL_BACK)
    assert (incident.job, incident.answered) == ("observe", None)
    assert "not rolled back: It is damaged" in incident.what


class Withdrawn(BaseModel):
    """Stands for the document of an asset."""

    of: str


def test_rule_rests_after_it_acted_and_then_acts(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alert that comes and goes acts once; one that stays is not forgotten."""
    deploy(rig, 1)
    assert act(rig, alert("Busy"), SCALE).job == "scale"
    again = alert("Busy", minute=1)
    rested = act(rig, again, SCALE)
    assert (rested.action, rested.job, rested.answered) == (DAMPED, None, None)
    assert act(rig, again, SCALE) == rested
    assert len(list(rig.platform.evidence.entries(incident_chain(MODEL)))) == 2
    set_clock(monkeypatch, timedelta(seconds=61))
    assert act(rig, again, SCALE).job == "scale"
    assert len(incidents_of_model(rig.platform.evidence, MODEL)) == 2


def test_another_rule_does_not_rest(rig: Rig) -> None:
    """Scaling a minute ago is no reason to leave a broken release on the route."""
    deploy(rig, 1)
    deploy(rig, 2)
    act(rig, alert("Busy"), SCALE)
    assert act(rig, alert(), ROLL_BACK).job == "rollback"


def test_clock_that_was_put_back_wakes_a_resting_rule(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An action that seems to lie a year ahead would silence its rule for that year."""
    deploy(rig, 1)
    set_clock(monkeypatch, timedelta(days=365))
    act(rig, alert("Busy"), SCALE)
    set_clock(monkeypatch, timedelta())
    assert act(rig, alert("Busy", minute=1), SCALE).job == "scale"


def test_alert_that_was_only_out_of_sight_is_open_again(rig: Rig) -> None:
    """Alertmanager keeps no alerts over a restart, and Prometheus sends them a minute later."""
    deploy(rig, 1)
    told = act(rig, alert(severity="info"), NOTIFY)
    assert (told.job, told.answered) == ("observe", None)
    close(IncidentBook(rig.platform.evidence), MODEL, alert().id)
    (closed,) = incidents_of_model(rig.platform.evidence, MODEL)
    assert (closed.action, closed.answered is None) == (ENDED, False)
    assert act(rig, alert(severity="info"), NOTIFY) == told
    assert incidents_of_model(rig.platform.evidence, MODEL) == [told]


def test_closing_what_was_answered_changes_nothing(rig: Rig) -> None:
    """The end of an alert must not rewrite what was done about it."""
    deploy(rig, 1)
    deploy(rig, 2)
    done = act(rig, alert(), ROLL_BACK)
    book = IncidentBook(rig.platform.evidence)
    close(book, MODEL, alert().id)
    close(book, MODEL, "unknown")
    assert incidents_of_model(rig.platform.evidence, MODEL) == [done]


def test_rollback_of_which_somebody_promoted_on_top_is_not_repeated(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alert moved the route and its process died; then a person put on a new release."""
    deploy(rig, 1)
    deploy(rig, 2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr("llmops_assets.operate.incidents.report_incident", killed)
        act(rig, alert(), ROLL_BACK)
    assert serving(rig) == 1
    deploy(rig, 3)
    incident = act(rig, alert(), ROLL_BACK)
    assert serving(rig) == 3
    assert (incident.release, incident.action) == ("parrot.v2", "rolled back to parrot.v1")


def test_names_of_rules_tell_them_apart() -> None:
    """Damping goes by name; two rules that share one would rest together."""
    rules = [ROLL_BACK, SCALE, NOTIFY, NOTIFY.model_copy(update={"action": "scale"})]
    assert len({name_of(rule) for rule in rules}) == len(rules)
    longer = ROLL_BACK.model_copy(update={"damping_seconds": 61})
    assert name_of(longer) == name_of(ROLL_BACK)
