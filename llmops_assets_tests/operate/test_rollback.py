"""Rollback: at once, to a release that served and still runs, and on record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from dagster import DagsterInstance, ExecuteInProcessResult

from llmops_assets.deploy.delivery import move
from llmops_assets.errors import (
    GateRefusedError,
    GatewayError,
    LifecycleOrderError,
    RefConflictError,
)
from llmops_assets.evidence.gates import CANARY
from llmops_assets.operate.incidents import incidents_of
from llmops_assets.operate.rollback import moved_by, roll_back, take_back
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Colour, Environment, Slot

from ..release_rig import FAILED, MODEL, PASSED, Rig, deploy, loaded, serving
from ..test_reporting import Runs, description, failures

pytestmark = pytest.mark.usefixtures("packages")

BLUE = Slot(Environment.PRODUCTION, MODEL, Colour.BLUE)


def back(rig: Rig) -> Route:
    return roll_back(rig.platform, MODEL, "sre", "wrong dates")


def test_traffic_returns_and_the_incident_is_kept(rig: Rig) -> None:
    """Who took what off, why and when is asked the next morning."""
    deploy(rig, 1)
    deploy(rig, 2)
    route = back(rig)
    assert serving(rig) == 1
    assert (route.actor, route.reason) == ("sre", "wrong dates")
    (incident,) = incidents_of(rig.platform.store, MODEL, "parrot.v2").incidents
    assert (incident.what, incident.actor) == ("wrong dates", "sre")
    assert incident.action == "rolled back to parrot.v1"
    assert incident.answered is not None
    assert incident.detected <= incident.answered
    assert incidents_of(rig.platform.store, MODEL, "parrot.v1").incidents == ()


def test_second_rollback_does_not_lead_back_to_the_bad_release(rig: Rig) -> None:
    """Two people, or one in doubt, press it twice."""
    deploy(rig, 1)
    deploy(rig, 2)
    back(rig)
    with pytest.raises(LifecycleOrderError, match="nothing to roll parrot back to"):
        back(rig)
    assert serving(rig) == 1


def test_without_an_earlier_release_there_is_nothing(rig: Rig) -> None:
    """And the message says what would help."""
    with pytest.raises(LifecycleOrderError, match="no route"):
        back(rig)
    deploy(rig, 1)
    with pytest.raises(LifecycleOrderError, match=r"generation 1 without one.*llmops promote"):
        back(rig)
    assert serving(rig) == 1


def test_stopped_slot_gets_no_traffic(rig: Rig) -> None:
    """A route to a dead server would turn a bad release into an outage."""
    deploy(rig, 1)
    deploy(rig, 2)
    rig.platform.slots.crash(BLUE)
    with pytest.raises(LifecycleOrderError, match="not warm any more"):
        back(rig)
    assert serving(rig) == 2


def test_slot_with_another_release_gets_no_traffic(rig: Rig) -> None:
    """A candidate that took the warm slot has not passed its gates."""
    deploy(rig, 1)
    deploy(rig, 2)
    candidate = rig.deployment("parrot.v3", 3)
    rig.platform.slots.start(BLUE, rig.platform.store.describe(candidate.package), candidate)
    with pytest.raises(LifecycleOrderError, match=r"parrot\.v1 is not warm.*parrot\.v3"):
        back(rig)
    assert serving(rig) == 2


def test_release_that_never_served_fully_gets_no_traffic(rig: Rig) -> None:
    """Rollback asks for no gate of the future, but for the one that says it served well."""
    deploy(rig, 1)
    deploy(rig, 2)
    rig.judge("parrot.v1", [CANARY], FAILED)
    with pytest.raises(GateRefusedError, match="canary: failed"):
        back(rig)
    assert serving(rig) == 2


def test_gateway_that_is_down_changes_nothing(rig: Rig) -> None:
    """What is recorded and what serves must not part without need."""
    deploy(rig, 1)
    deploy(rig, 2)
    rig.platform.gateway.down = True
    with pytest.raises(GatewayError):
        back(rig)
    rig.platform.gateway.down = False
    current, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert current is not None
    assert current.serving is not None
    assert current.serving.version == 2


def test_repeated_after_a_gateway_that_refused(rig: Rig) -> None:
    """The route is recorded, the gateway has not got it: the next try must finish that."""
    deploy(rig, 1)
    deploy(rig, 2)
    rig.platform.gateway.refuses = True
    with pytest.raises(GatewayError):
        back(rig)
    assert serving(rig) == 2
    rig.platform.gateway.refuses = False
    back(rig)
    assert serving(rig) == 1


ROUTE_STEP = "roll_back_route"


def run_rollback(rig: Rig, instance: DagsterInstance, **config: Any) -> ExecuteInProcessResult:
    config = {"model": MODEL, "reason": "wrong dates", "actor": "sre", **config}
    return Runs(rig, instance).job("rollback", None, {"ops": {ROUTE_STEP: {"config": config}}})


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def served_twice(rig: Rig) -> None:
    """Version 2 serves and version 1 is warm, as whole packages that can be asked."""
    for version in (1, 2):
        rig.build(f"parrot.v{version + 10}", version + 10)
        route = move(rig.platform.routes, loaded(rig, version + 10), "ada", "deploying")
        assert route.serving is not None
        rig.judge(f"parrot.v{version + 10}", [CANARY], PASSED)


def shown(result: ExecuteInProcessResult) -> dict[str, Any]:
    """The production_route event of a run."""
    (event,) = (
        event.step_materialization_data.materialization
        for event in result.all_events
        if event.event_type_value == "ASSET_MATERIALIZATION"
    )
    assert event.asset_key.to_user_string() == "production_route"
    assert event.partition == MODEL
    return {name: value.value for name, value in event.metadata.items()}


@pytest.mark.usefixtures("served_twice")
def test_run_by_hand_moves_shows_and_verifies(rig: Rig, instance: DagsterInstance) -> None:
    """From the launchpad it is one run that does it all."""
    result = run_rollback(rig, instance)
    assert result.success, failures(result)
    assert serving(rig) == 11
    event = shown(result)
    assert (event["serving"], event["actor"], event["generation"]) == ("parrot.v11", "sre", 3)
    assert rig.platform.gateway.asked


@pytest.mark.usefixtures("served_twice")
def test_run_after_the_tick_moves_nothing_again(rig: Rig, instance: DagsterInstance) -> None:
    """It verifies and shows what the trigger did."""
    route, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    take_back(rig.platform, route, "alert f00d@now", "wrong dates")
    for _ in range(2):
        result = run_rollback(rig, instance, actor="alert f00d@now", moved=True)
        assert result.success, failures(result)
        event = shown(result)
        assert (event["generation"], event["actor"]) == (3, "alert f00d@now")
    assert incidents_of(rig.platform.store, MODEL, "parrot.v12").incidents == ()


@pytest.mark.usefixtures("served_twice")
def test_run_that_finds_no_move_says_so(rig: Rig, instance: DagsterInstance) -> None:
    """Moving the route then would be a second rollback that nobody asked for."""
    result = run_rollback(rig, instance, actor="alert f00d@now", moved=True)
    assert "leave `moved` out" in description(result, ROUTE_STEP)
    assert serving(rig) == 12


@pytest.mark.usefixtures("served_twice")
def test_run_fails_when_the_good_release_answers_badly(rig: Rig, instance: DagsterInstance) -> None:
    """The route has moved and clients are no better off: somebody has to know."""
    rig.platform.gateway.answers["hello"] = "nothing"
    text = description(run_rollback(rig, instance), ROUTE_STEP)
    assert "parrot.v11 has the traffic of parrot and does not answer well" in text
    assert "llmops promote" in text
    assert serving(rig) == 11


@pytest.mark.usefixtures("served_twice")
def test_run_applies_what_the_gateway_lacks_or_fails(rig: Rig, instance: DagsterInstance) -> None:
    """Recorded is not served."""
    route, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    rig.platform.gateway.refuses = True
    with pytest.raises(GatewayError):
        take_back(rig.platform, route, "alert f00d@now", "wrong dates")
    result = run_rollback(rig, instance, actor="alert f00d@now", moved=True)
    assert "To do: " in description(result, ROUTE_STEP)
    assert serving(rig) == 12
    rig.platform.gateway.refuses = False
    assert run_rollback(rig, instance, actor="alert f00d@now", moved=True).success
    assert serving(rig) == 11


@pytest.mark.usefixtures("served_twice")
def test_gateway_that_lags_silently_is_found(
    rig: Rig, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says yes to a route and uses another one."""
    monkeypatch.setattr(rig.platform.gateway, "apply", lambda environment, routes: None)
    text = description(run_rollback(rig, instance), ROUTE_STEP)
    assert "does not use the recorded route of parrot. Expected: generation 3" in text


@pytest.mark.usefixtures("served_twice")
def test_route_that_another_followed_is_not_verified(rig: Rig, instance: DagsterInstance) -> None:
    """A run that started late must not fail for a release that serves no more."""
    route, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    take_back(rig.platform, route, "alert f00d@now", "wrong dates")
    rig.build("parrot.v13", 13)
    move(rig.platform.routes, loaded(rig, 13), "ada", "a fix")
    rig.platform.gateway.answers["hello"] = "nothing"
    assert run_rollback(rig, instance, actor="alert f00d@now", moved=True).success


def test_take_back_of_a_route_that_changed_is_a_conflict(rig: Rig) -> None:
    """What was decided about one route must not be done to the next."""
    before = deploy(rig, 1)
    deploy(rig, 2)
    with pytest.raises(RefConflictError, match="Somebody else changed"):
        take_back(rig.platform, before, "sre", "wrong dates")
    assert serving(rig) == 2


def test_moves_are_found_by_their_actor(rig: Rig) -> None:
    """The newest of several; a person makes many."""
    deploy(rig, 1)
    newest = deploy(rig, 2)
    assert moved_by(rig.platform.routes, MODEL, "ada") == newest
    assert moved_by(rig.platform.routes, MODEL, "alert f00d@now") is None
