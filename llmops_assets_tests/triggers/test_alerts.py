"""The trigger on alerts: each acts once, whatever dies, refuses or comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from llmops_assets.deploy import delivery
from llmops_assets.errors import RefConflictError, TriggerError
from llmops_assets.evidence.gates import CANARY
from llmops_assets.operate import rollback
from llmops_assets.operate.alertmanager import Alert
from llmops_assets.operate.incidents import Incident, IncidentBook, incidents_of_model
from llmops_assets.operate.objectives import WINDOW_SECONDS
from llmops_assets.serving.routes import Route, Routes
from llmops_assets.serving.slots import Colour, Environment, Slot
from llmops_assets.settings import Settings
from llmops_assets.triggers import alerts as trigger
from llmops_assets.triggers.requests import RUNS_PER_TICK

from ..fakes import FakeMetrics, HttpDouble
from ..operate.test_alertmanager import Answers, entry
from ..operate.test_alerts import set_clock
from ..release_rig import FAILED, MODEL, SPEC, PlatformOnDoubles, Rig, deploy, serving
from .daemon import Daemon

RULES = """\
alerts:
  - {match: {alertname: ErrorRate, severity: page}, action: rollback, damping_seconds: 60}
  - {match: {alertname: Slow}, action: rollback, damping_seconds: 60}
  - {match: {alertname: Busy}, action: scale, damping_seconds: 60}
  - {match: {alertname: ErrorRate}, action: notify}
"""
BLUE = Slot(Environment.PRODUCTION, MODEL, Colour.BLUE)
BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def alert(
    name: str = "ErrorRate", fingerprint: str = "f00d", minute: int = 0, **labels: str
) -> dict[str, Any]:
    """An alert about the model, as Alertmanager gives it."""
    began = BEGAN + timedelta(minutes=minute)
    everything = {"alertname": name, "model": MODEL, "severity": "page", **labels}
    return entry(fingerprint, startsAt=began.isoformat(), labels=everything)


def id_of(given: dict[str, Any]) -> str:
    return Alert.model_validate(given).id


class Killed(BaseException):
    """What a kill -9 looks like from inside: nothing after it happens."""


@pytest.fixture
def answers() -> Answers:
    """What Alertmanager says."""
    return Answers()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def with_settings(rig: Rig, **changes: Any) -> None:
    """A platform with other settings; whatever it has opened is left to the one before."""
    settings: Settings = rig.platform.settings.model_copy(update=changes)
    rig.platform = PlatformOnDoubles(settings)


@pytest.fixture
def daemon(rig: Rig, instance: dg.DagsterInstance, answers: Answers) -> Iterator[Daemon]:
    """Version 2 serves, version 1 is warm, both with the same rules."""
    with HttpDouble(lambda path, body: (answers.status, answers.body)) as double:
        with_settings(rig, alertmanager_url=double.url)
        release(rig, SPEC + RULES)
        deploy(rig, 1)
        deploy(rig, 2)
        yield Daemon(trigger.alerts, rig.platform, instance)


def release(rig: Rig, *texts: str) -> None:
    """Packages of three releases, with one spec for all or one for each."""
    for version in (1, 2, 3):
        rig.freeze(f"parrot.v{version}", texts[min(version, len(texts)) - 1])
        rig.publish(f"parrot.v{version}", "packaged_model", {"package": f"{version}"})


def current(rig: Rig) -> Route:
    route, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    return route


def incidents(rig: Rig) -> list[Incident]:
    return incidents_of_model(rig.platform.evidence, MODEL)


def jobs(daemon: Daemon) -> Counter[str]:
    """How many runs of each job there ever were."""
    return Counter(record.dagster_run.job_name for record in daemon.instance.get_run_records())


def acted_once(rig: Rig, daemon: Daemon, given: dict[str, Any]) -> None:
    """Version 2 was taken off by this alert: one generation, one incident, one run."""
    assert serving(rig) == 1
    assert current(rig).generation == 3
    assert current(rig).actor == f"alert {id_of(given)}"
    (incident,) = incidents(rig)
    assert (incident.id, incident.release) == (id_of(given), "parrot.v2")
    assert incident.action == "rolled back to parrot.v1"
    assert incident.answered is not None
    assert daemon.run_keys == {id_of(given)}
    assert jobs(daemon) == {"rollback": 1}


def test_route_moves_within_the_tick_and_a_run_follows(
    rig: Rig, daemon: Daemon, answers: Answers
) -> None:
    """A run takes many seconds to start; traffic must not wait for it."""
    assert daemon.tick() == []
    assert daemon.skipped == "0 alerts fire; nothing new that a rule is about."
    answers.body = [alert()]
    (run,) = daemon.tick()
    assert run.job_name == "rollback"
    assert run.partition_key is None
    assert run.tags["dagster/max_retries"] == "2", "it is made again if its worker is lost"
    assert run.run_config["ops"]["roll_back_route"]["config"] == {
        "model": MODEL,
        "reason": "ErrorRate: half of the answers fail",
        "actor": f"alert {id_of(alert())}",
        "moved": True,
    }
    for _ in range(3):
        assert daemon.tick() == []
    answers.body = []
    for _ in range(2):
        result = daemon.evaluate()
        # Not even asked for again, though Dagster would drop it.
        assert isinstance(result, dg.SensorResult)
        assert not result.run_requests
        assert daemon.tick() == []
    acted_once(rig, daemon, alert())


def test_first_tick_acts_on_what_fires(rig: Rig, daemon: Daemon, answers: Answers) -> None:
    """An alert is no past event: what fires when the trigger is switched on is bad now."""
    answers.body = [alert()]
    daemon.tick()
    acted_once(rig, daemon, alert())


def test_killed_before_the_route_moved(
    rig: Rig, daemon: Daemon, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was done, so all of it is to be done."""
    answers.body = [alert()]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Routes, "change", killed)
        daemon.evaluate()
    assert incidents(rig) == []
    daemon.tick()
    daemon.tick()
    acted_once(rig, daemon, alert())


@pytest.mark.parametrize("rules_before", [RULES, ""], ids=["rules", "no-rules"])
@pytest.mark.parametrize("fires_on", [True, False], ids=["fires-on", "ended"])
def test_killed_between_route_and_incident(
    rig: Rig,
    daemon: Daemon,
    answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
    rules_before: str,
    fires_on: bool,
) -> None:
    """The alert may be over, and the release that serves now may have no rule about it."""
    deploy_pair(rig, SPEC + rules_before)
    answers.body = [alert()]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(IncidentBook, "report", killed)
        daemon.evaluate()
    before = current(rig).generation
    answers.body = [alert()] if fires_on else []
    daemon.tick()
    daemon.tick()
    assert (serving(rig), current(rig).generation) == (11, before)
    (incident,) = incidents(rig)
    assert (incident.id, incident.release) == (id_of(alert()), "parrot.v12")
    assert incident.action == "rolled back to parrot.v11"
    assert jobs(daemon) == {"rollback": 1}


def test_killed_before_dagster_kept_the_cursor(rig: Rig, daemon: Daemon, answers: Answers) -> None:
    """Everything was done but the run: the next tick asks for that alone."""
    answers.body = [alert()]
    for _ in range(2):
        daemon.evaluate()
    daemon.tick()
    acted_once(rig, daemon, alert())


def test_cursor_cleared_by_hand(rig: Rig, daemon: Daemon, answers: Answers) -> None:
    """People clear it when in doubt. Run keys keep Dagster from a second run."""
    answers.body = [alert(), alert("Busy", "b"), alert(fingerprint="c", severity="info")]
    for _ in range(3):
        daemon.tick()
    before = incidents(rig)
    ran = jobs(daemon)
    assert ran == {"rollback": 1, "scale": 1, "observe": 1}
    daemon.cursor = None
    for _ in range(2):
        assert daemon.tick() == []
    assert (incidents(rig), current(rig).generation) == (before, 3)
    # And what ended meanwhile is not left open for ever.
    daemon.cursor = None
    answers.body = []
    assert daemon.tick() == []
    assert [incident.id for incident in incidents(rig) if incident.answered is None] == []
    assert jobs(daemon) == ran


@pytest.mark.parametrize(
    "labels", [{"environment": "staging"}, {"release": "parrot.v1"}, {"model": "other"}]
)
def test_alert_about_something_else_does_nothing(
    rig: Rig, daemon: Daemon, answers: Answers, labels: dict[str, str]
) -> None:
    """Of another environment, release or model."""
    about = alert()
    answers.body = [{**about, "labels": {**about["labels"], **labels}}]
    assert daemon.tick() == []
    assert (serving(rig), incidents(rig)) == (2, [])


@pytest.mark.parametrize("by", ["silencedBy", "inhibitedBy"])
def test_silenced_alert_does_nothing_until_the_silence_ends(
    rig: Rig, daemon: Daemon, answers: Answers, by: str
) -> None:
    """Somebody decided that it must not act, also if the server ignores what we asked for."""
    quiet = {"state": "suppressed", "silencedBy": [], "inhibitedBy": [], by: ["x"]}
    answers.body = [{**alert(), "status": quiet}]
    for _ in range(2):
        assert daemon.tick() == []
    assert (serving(rig), incidents(rig)) == (2, [])
    answers.body = [alert()]
    daemon.tick()
    acted_once(rig, daemon, alert())


def test_way_back_that_does_not_answer_now_is_tried_again(
    rig: Rig, daemon: Daemon, answers: Answers
) -> None:
    """A busy server is late for a moment; the rollback must not wait for a person then."""
    rig.platform.slots.crash(BLUE)
    answers.body = [alert()]
    for _ in range(2):
        with pytest.raises(TriggerError, match=r"parrot\.v1 is on the route and does not answer"):
            daemon.tick()
    assert (serving(rig), incidents(rig)) == (2, [])
    good = rig.deployment("parrot.v1", 1)
    rig.platform.slots.start(BLUE, rig.platform.store.describe(good.package), good)
    daemon.tick()
    acted_once(rig, daemon, alert())


def nothing_warm(rig: Rig) -> None:
    deployment = rig.deployment("parrot.v3", 3)
    delivery.claim_idle_slot(rig.platform.routes, Environment.PRODUCTION, MODEL, deployment, "ada")


def refused(rig: Rig) -> None:
    rig.judge("parrot.v1", [CANARY], FAILED)


def slot_other(rig: Rig) -> None:
    other = rig.deployment("parrot.v3", 3)
    rig.platform.slots.start(BLUE, rig.platform.store.describe(other.package), other)


@pytest.mark.parametrize("prepare", [nothing_warm, refused, slot_other])
def test_rollback_that_cannot_be_waits_for_a_person(
    rig: Rig, daemon: Daemon, answers: Answers, prepare: Any
) -> None:
    """A sensor that fails for ever would hide the next alert; an open incident does not."""
    prepare(rig)
    generation = current(rig).generation
    answers.body = [alert()]
    (run,) = daemon.tick()
    assert (run.job_name, run.partition_key) == ("observe", "parrot.v2")
    for _ in range(3):
        assert daemon.tick() == []
    assert (serving(rig), current(rig).generation) == (2, generation)
    (incident,) = incidents(rig)
    assert "not rolled back" in incident.what
    assert incident.answered is None
    answers.body = []
    daemon.tick()
    (incident,) = incidents(rig)
    assert incident.answered is not None
    assert jobs(daemon) == {"observe": 1}


def test_gateway_that_is_down_fails_the_tick(rig: Rig, daemon: Daemon, answers: Answers) -> None:
    """Nobody can move traffic; the first tick after it is back does."""
    answers.body = [alert()]
    rig.platform.gateway.down = True
    for _ in range(2):
        with pytest.raises(TriggerError, match="gateway does not answer"):
            daemon.tick()
    rig.platform.gateway.down = False
    daemon.tick()
    daemon.tick()
    acted_once(rig, daemon, alert())


def test_gateway_that_refuses_gets_the_recorded_route_later(
    rig: Rig, daemon: Daemon, answers: Answers
) -> None:
    """The store has moved and traffic has not: done is what the gateway does."""
    answers.body = [alert()]
    rig.platform.gateway.refuses = True
    for _ in range(3):
        with pytest.raises(TriggerError, match="refused the routes"):
            daemon.tick()
        assert (serving(rig), current(rig).generation, incidents(rig)) == (2, 3, [])
    answers.body = []  # even if it ended meanwhile
    rig.platform.gateway.refuses = False
    daemon.tick()
    daemon.tick()
    acted_once(rig, daemon, alert())


def test_rollback_by_hand_that_the_gateway_refused_is_finished(
    rig: Rig, daemon: Daemon, answers: Answers
) -> None:
    """The alert finds the good release recorded and the bad one serving."""
    rig.platform.gateway.refuses = True
    with pytest.raises(rollback.GatewayError):
        rollback.roll_back(rig.platform, MODEL, "sre", "wrong dates")
    rig.platform.gateway.refuses = False
    answers.body = [alert()]
    (run,) = daemon.tick()
    assert (serving(rig), current(rig).generation) == (1, 3)
    config = run.run_config["ops"]["roll_back_route"]["config"]
    # The run looks for a route by this actor.
    assert config["actor"] == current(rig).actor == "sre"
    (incident,) = incidents(rig)
    assert (incident.release, incident.actor) == ("parrot.v2", "sre")
    assert daemon.tick() == []


def test_somebody_elses_move_is_decided_about_anew(
    rig: Rig, daemon: Daemon, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the alert says of a route may not hold for the one that replaced it just now."""
    answers.body = [alert()]
    with monkeypatch.context() as patched, pytest.raises(TriggerError, match="Somebody else"):
        patched.setattr(rollback, "move_back", conflict)
        daemon.tick()
    daemon.tick()
    daemon.tick()
    acted_once(rig, daemon, alert())


def test_flapping_alert_never_brings_the_bad_release_back(
    rig: Rig, daemon: Daemon, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 is no better: after version 2 was taken off there is nowhere to go."""
    for minute in range(5):
        answers.body = [alert(minute=minute)]
        daemon.tick()
        answers.body = []
        daemon.tick()
    assert (serving(rig), current(rig).generation) == (1, 3)
    assert jobs(daemon) == {"rollback": 1}
    assert all(incident.answered for incident in incidents(rig))
    # Whoever stays is not forgotten when the rule has rested: a person is called.
    answers.body = [alert(minute=9)]
    daemon.tick()
    assert jobs(daemon) == {"rollback": 1}
    set_clock(monkeypatch, timedelta(seconds=61))
    (run,) = daemon.tick()
    assert (run.job_name, run.partition_key) == ("observe", "parrot.v1")
    assert daemon.tick() == []
    assert (serving(rig), current(rig).generation) == (1, 3)


def test_rule_that_rested_takes_the_next_bad_release_off(
    rig: Rig, daemon: Daemon, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fix that is no fix was promoted within the damping time."""
    answers.body = [alert()]
    daemon.tick()
    deploy(rig, 3)
    answers.body = [alert(minute=2)]
    assert daemon.tick() == []
    assert serving(rig) == 3
    set_clock(monkeypatch, timedelta(seconds=61))
    (run,) = daemon.tick()
    assert (serving(rig), run.job_name) == (1, "rollback")
    assert daemon.tick() == []
    assert [incident.release for incident in incidents(rig)] == ["parrot.v2", "parrot.v3"]


def test_release_that_came_back_on_purpose_is_left_alone(
    rig: Rig, daemon: Daemon, answers: Answers
) -> None:
    """A person who promotes it while the alert still fires has seen the alert."""
    answers.body = [alert()]
    daemon.tick()
    deploy(rig, 2)
    for _ in range(3):
        assert daemon.tick() == []
    assert serving(rig) == 2


def test_scale_and_notify_ask_for_their_jobs(rig: Rig, daemon: Daemon, answers: Answers) -> None:
    """And leave the route alone; what people were told of is open until it ends."""
    answers.body = [alert("Busy", "b"), alert(fingerprint="n", severity="info")]
    runs = daemon.tick()
    assert {(run.job_name, run.partition_key) for run in runs} == {
        ("scale", "parrot.v2"), ("observe", "parrot.v2"),
    }  # fmt: skip
    assert daemon.tick() == []
    answered = {incident.id: incident.answered is not None for incident in incidents(rig)}
    assert answered == {id_of(alert("Busy", "b")): True, id_of(alert(fingerprint="n")): False}
    answers.body = []
    daemon.tick()
    assert all(incident.answered for incident in incidents(rig))
    assert current(rig).generation == 2


def test_many_alerts_are_spread_over_ticks_and_rollbacks_come_first(
    rig: Rig, daemon: Daemon, answers: Answers
) -> None:
    """Two hundred pages about details must not keep a broken release on the route."""
    many = [alert(fingerprint=f"n{number}", severity="info") for number in range(60)]
    answers.body = [*many, alert()]
    sizes = [len(daemon.tick()) for _ in range(5)]
    assert serving(rig) == 1
    # The rollback ends its tick for the model: the others are about another route then.
    assert sizes == [1, RUNS_PER_TICK, RUNS_PER_TICK, 60 - 2 * RUNS_PER_TICK, 0]
    assert len(incidents(rig)) == 61
    assert len(daemon.run_keys) == 61
    assert daemon.cursor is not None
    assert len(daemon.cursor) < 200
    answers.body = []
    daemon.tick()
    assert all(incident.answered for incident in incidents(rig))


def test_resting_alerts_take_no_place_from_new_ones(
    rig: Rig, daemon: Daemon, answers: Answers
) -> None:
    """More of them than a tick handles would otherwise hide everything after them."""
    answers.body = [alert("Busy", "first")]
    daemon.tick()
    resting = [alert("Busy", f"b{number}") for number in range(RUNS_PER_TICK + 5)]
    answers.body = resting
    for _ in range(3):
        assert daemon.tick() == []
    answers.body = [*resting, alert(fingerprint="n", severity="info")]
    (run,) = daemon.tick()
    assert run.job_name == "observe"


def test_same_alert_twice_in_one_answer(rig: Rig, daemon: Daemon, answers: Answers) -> None:
    """Dagster does not notice equal run keys within a tick."""
    answers.body = [alert("Busy", "b"), alert("Busy", "b")]
    result = daemon.evaluate()
    assert isinstance(result, dg.SensorResult)
    assert len(result.run_requests or ()) == 1


def test_malformed_alert_beside_good_ones(rig: Rig, daemon: Daemon, answers: Answers) -> None:
    """The good one acts at once; then the tick fails, so that somebody looks."""
    answers.body = [{"fingerprint": "x"}, alert()]
    daemon.tick()
    for _ in range(2):
        with pytest.raises(TriggerError, match="cannot be understood"):
            daemon.tick()
    acted_once(rig, daemon, alert())


def test_alertmanager_down_and_back(rig: Rig, daemon: Daemon, answers: Answers) -> None:
    """No answer is not "nothing fires": open incidents stay open, and nothing is lost."""
    answers.body = [alert(fingerprint="n", severity="info")]
    daemon.tick()
    answers.status = 503
    with pytest.raises(TriggerError, match="503"):
        daemon.tick()
    assert incidents(rig)[0].answered is None
    answers.status = 200
    answers.body = [alert(fingerprint="n", severity="info"), alert()]
    (run,) = daemon.tick()
    assert run.job_name == "rollback"
    assert daemon.tick() == []


def test_route_is_finished_while_alertmanager_is_away(
    rig: Rig, daemon: Daemon, answers: Answers
) -> None:
    """What the gateway still lacks needs nobody's answer."""
    answers.body = [alert()]
    rig.platform.gateway.refuses = True
    with pytest.raises(TriggerError):
        daemon.tick()
    rig.platform.gateway.refuses = False
    answers.status = 503
    with pytest.raises(TriggerError):
        daemon.tick()
    assert serving(rig) == 1
    answers.status = 200
    daemon.tick()
    acted_once(rig, daemon, alert())


def test_one_models_trouble_holds_up_no_other(rig: Rig, daemon: Daemon, answers: Answers) -> None:
    """Its spec cannot be read, and the alert about the other model acts all the same."""
    target = current(rig).targets[0].model_copy(update={"release": "broken.v1"})
    rig.platform.routes.change(
        Environment.PRODUCTION, "broken", (target,), actor="ada", reason="test", expected=None
    )
    about_broken = {**alert(fingerprint="x"), "labels": {"model": "broken", "alertname": "x"}}
    answers.body = [about_broken, alert()]
    daemon.tick()
    acted_once(rig, daemon, alert())
    with pytest.raises(TriggerError, match=r"broken\.v1 has no model_spec"):
        daemon.tick()


def test_without_rules_nothing_is_done(
    rig: Rig, instance: dg.DagsterInstance, answers: Answers
) -> None:
    """Rules are what a team asks for; without Alertmanager the tick says what it lacks."""
    with HttpDouble(lambda path, body: (answers.status, answers.body)) as double:
        release(rig, SPEC)
        deploy(rig, 1)
        deploy(rig, 2)
        daemon = Daemon(trigger.alerts, rig.platform, instance)
        assert daemon.tick() == []
        assert daemon.skipped is not None
        assert "LLMOPS_ALERTMANAGER_URL is unset" in daemon.skipped
        gateway = rig.platform.gateway
        with_settings(rig, alertmanager_url=double.url)
        vars(rig.platform)["gateway"] = gateway
        daemon.platform = rig.platform
        answers.body = [alert()]
        assert daemon.tick() == []
        assert (serving(rig), incidents(rig)) == (2, [])


def test_breached_objective_takes_the_same_path(
    rig: Rig, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each time that a release comes on the route; its end closes what is open."""
    rules = "alerts: [{match: {alertname: ServiceObjectiveBreached}, action: rollback}]\n"
    release(rig, SPEC + rules)
    deploy(rig, 1)
    deploy(rig, 2)
    metrics = rig.platform.metrics
    daemon = Daemon(trigger.alerts, rig.platform, instance)
    clock = advance(monkeypatch, metrics)
    assert daemon.tick() == []
    metrics.requests, metrics.failures = 200, 100
    clock(WINDOW_SECONDS)
    (run,) = daemon.tick()
    assert (run.job_name, serving(rig), current(rig).generation) == ("rollback", 1, 3)
    for _ in range(3):
        clock(WINDOW_SECONDS)
        assert daemon.tick() == []
    (incident,) = incidents(rig)
    assert (incident.release, incident.action) == ("parrot.v2", "rolled back to parrot.v1")
    # Version 1 fails as well, and the rule has rested: a person is called.
    metrics.requests, metrics.failures = 400, 200
    set_clock(monkeypatch, timedelta(hours=1))
    clock(WINDOW_SECONDS)
    (run,) = daemon.tick()
    assert (run.job_name, run.partition_key) == ("observe", "parrot.v1")
    assert incidents(rig)[1].answered is None
    metrics.requests = 600
    clock(WINDOW_SECONDS)
    assert daemon.tick() == []
    assert incidents(rig)[1].answered is not None
    assert (current(rig).generation, jobs(daemon)) == (3, {"rollback": 1, "observe": 1})


def test_model_that_cannot_be_measured_holds_up_no_other(
    rig: Rig, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed tick keeps no window, so it must not fail before the others have one."""
    rules = "alerts: [{match: {alertname: ServiceObjectiveBreached}, action: rollback}]\n"
    release(rig, SPEC + rules)
    deploy(rig, 1)
    deploy(rig, 2)
    target = current(rig).targets[0].model_copy(update={"release": "broken.v1"})
    rig.platform.routes.change(
        Environment.PRODUCTION, "broken", (target,), actor="ada", reason="test", expected=None
    )
    clock = advance(monkeypatch, rig.platform.metrics)
    daemon = Daemon(trigger.alerts, rig.platform, instance)
    daemon.tick()
    with pytest.raises(TriggerError, match=r"broken\.v1 has no model_spec"):
        daemon.tick()
    rig.platform.metrics.requests, rig.platform.metrics.failures = 200, 100
    clock(WINDOW_SECONDS)
    daemon.tick()
    assert serving(rig) == 1


def deploy_pair(rig: Rig, text: str) -> None:
    """Version 12 serves with the rules, version 11 is warm with this spec."""
    for version, spec in ((11, text), (12, SPEC + RULES)):
        rig.freeze(f"parrot.v{version}", spec)
        rig.publish(f"parrot.v{version}", "packaged_model", {"package": f"{version}"})
        deploy(rig, version)


def advance(monkeypatch: pytest.MonkeyPatch, metrics: FakeMetrics) -> Any:
    """Readings of the metrics are from as much later as the returned function was told."""
    real = metrics.sample
    ahead = timedelta()

    def later(environment: Environment, model: str) -> Any:
        sample = real(environment, model)
        return sample.model_copy(update={"time": sample.time + ahead})

    def move(seconds: float) -> None:
        nonlocal ahead
        ahead += timedelta(seconds=seconds)

    monkeypatch.setattr(metrics, "sample", later)
    return move


def killed(*arguments: Any, **named: Any) -> None:
    raise Killed


def conflict(*arguments: Any, **named: Any) -> None:
    raise RefConflictError("Somebody else changed the route", cure="decide anew")
