"""Rollback: at once, to a release that served and still runs, and on record."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterInstance, ExecuteInProcessResult
from pydantic import BaseModel

from llmops_assets.deploy.delivery import move, move_back
from llmops_assets.deploy.revocation import last_revocation, revoke
from llmops_assets.errors import (
    ApprovalError,
    GateRefusedError,
    GatewayError,
    LifecycleOrderError,
    LLMOpsError,
    RefConflictError,
    SlotError,
)
from llmops_assets.evidence.gates import CANARY
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.results import AttestedResults
from llmops_assets.evidence.statements import REVOCATION
from llmops_assets.operate import rollback
from llmops_assets.operate.incidents import (
    Incident,
    incidents_of,
    incidents_of_model,
    report_incident,
)
from llmops_assets.operate.rollback import moved_by, plan, roll_back, services, take_back
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Colour, Deployment, Endpoint, Environment, Slot
from llmops_assets.storage.columns import Action
from llmops_assets.storage.store import Artifact

from ..release_rig import FAILED, MODEL, PASSED, Rig, deploy, loaded, serving
from ..test_reporting import Runs, description, failures

pytestmark = pytest.mark.usefixtures("packages")

BLUE = Slot(Environment.PRODUCTION, MODEL, Colour.BLUE)


def back(rig: Rig) -> Route:
    return roll_back(rig.platform, MODEL, "sre", "wrong dates").route


def test_traffic_returns_and_the_incident_is_kept(rig: Rig) -> None:
    """Who took what off, why and when is asked the next morning."""
    deploy(rig, 1)
    deploy(rig, 2)
    route = back(rig)
    assert serving(rig) == 1
    assert (route.actor, route.reason) == ("sre", "wrong dates")
    (incident,) = incidents_of(rig.platform.evidence, MODEL, "parrot.v2").incidents
    assert (incident.what, incident.actor) == ("wrong dates", "sre")
    assert incident.action == "rolled back to parrot.v1"
    assert incident.answered is not None
    assert incident.detected <= incident.answered
    assert incidents_of(rig.platform.evidence, MODEL, "parrot.v1").incidents == ()


def test_damaged_store_does_not_stop_it(rig: Rig) -> None:
    """The bad release may be bad because of the disk; taking it off needs nothing of its own."""
    deploy(rig, 1)
    deploy(rig, 2)
    package = rig.platform.columns.get("parrot.v2", "packaged_model").artifact
    results = AttestedResults(rig.platform.evidence).results("parrot.v2").values()
    for digest in (package, *results):
        (rig.platform.settings.store / "blobs" / digest.replace(":", "/")).unlink()
    back(rig)
    assert serving(rig) == 1
    (revoked,) = rig.platform.evidence.entries(release_chain("parrot.v2"), REVOCATION)
    assert revoked.statement.subject[0].sha256 == package


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
    with pytest.raises(SlotError, match="does not answer"):
        back(rig)
    assert serving(rig) == 2
    assert revocations(rig, 2) == 0


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
    for _ in range(3):
        with pytest.raises(GatewayError):
            back(rig)
    assert revocations(rig, 2) == 0
    rig.platform.gateway.down = False
    current, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert current is not None
    assert current.serving is not None
    assert current.serving.version == 2


def test_repeated_after_a_move_that_failed_revokes_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An alert tries every few seconds; the record must not grow with each."""
    deploy(rig, 1)
    deploy(rig, 2)

    def fails(*_: object) -> None:
        raise GatewayError("The gateway stopped just now", cure="start it")

    with monkeypatch.context() as patched:
        patched.setattr(rollback, "move_back", fails)
        for _ in range(3):
            with pytest.raises(GatewayError):
                back(rig)
    assert revocations(rig, 2) == 1
    # On the route anew, it is to be revoked anew.
    deploy(rig, 2)
    move_back(rig.platform.routes, rig.platform.slots, route_of(rig), "ada", "no reason")
    deploy(rig, 2)
    back(rig)
    assert revocations(rig, 2) == 2


@pytest.mark.parametrize("refuses", [True, False])
def test_incident_of_a_rollback_that_was_cut_off(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    """The gateway refused, or the process died before it reported: the next try tells, once."""
    deploy(rig, 1)
    deploy(rig, 2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    rig.platform.gateway.refuses = refuses
    with monkeypatch.context() as dying, pytest.raises((GatewayError, KeyboardInterrupt)):
        dying.setattr(rollback, "report_incident", killed)
        back(rig)
    assert incidents_of_model(rig.platform.evidence, MODEL) == []
    rig.platform.gateway.refuses = False
    assert back(rig) == route_of(rig)
    assert serving(rig) == 1
    (incident,) = incidents_of_model(rig.platform.evidence, MODEL)
    assert incident.id == "rollback-parrot-3"
    assert (incident.release, incident.actor, incident.what) == ("parrot.v2", "sre", "wrong dates")
    assert incident.answered is not None
    assert not incident.from_alert
    with pytest.raises(LifecycleOrderError, match="nothing to roll parrot back to"):
        back(rig)
    assert incidents_of_model(rig.platform.evidence, MODEL) == [incident]


def test_route_that_only_lagged_behind_is_no_incident(rig: Rig) -> None:
    """A first release whose route the gateway refused took nothing off."""
    rig.platform.gateway.refuses = True
    with pytest.raises(GatewayError):
        deploy(rig, 1)
    rig.platform.gateway.refuses = False
    back(rig)
    assert serving(rig) == 1
    assert incidents_of_model(rig.platform.evidence, MODEL) == []


def test_upgrade_or_damaged_spec_keeps_the_way_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary was judged by what held then, and no spec is needed to move a route."""
    deploy(rig, 1)
    deploy(rig, 2)
    later = replace(CANARY, version=CANARY.version + 1)
    monkeypatch.setattr(rollback, "CANARY", later)
    spec = rig.platform.columns.get("parrot.v1", "model_spec").artifact
    (rig.platform.settings.store / "blobs" / spec.replace(":", "/")).unlink()
    back(rig)
    assert serving(rig) == 1


def test_canary_of_other_bytes_does_not_count(rig: Rig) -> None:
    """A release may have been packaged again since."""
    deploy(rig, 1)
    other = Deployment(rig.deployment("parrot.v2", 2).package, "parrot.v1", 1)
    with pytest.raises(GateRefusedError, match="canary: a verdict about sha256:"):
        rollback.check_may_return(rig.platform, other)
    with pytest.raises(GateRefusedError, match="canary: no verdict"):
        rollback.check_may_return(rig.platform, rig.deployment("parrot.v2", 2))


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
    assert incidents_of(rig.platform.evidence, MODEL, "parrot.v12").incidents == ()


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


GREEN = Slot(Environment.PRODUCTION, MODEL, Colour.GREEN)


@pytest.fixture
def evicted(rig: Rig, packages: None) -> None:
    """Version 3 serves in blue, version 2 is warm in green, version 1 left its slot."""
    for version in (1, 2, 3):
        deploy(rig, version)


def route_of(rig: Rig) -> Route:
    route, _ = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    return route


def split(rig: Rig, *weights: int) -> None:
    """Gives both slots of the route a share."""
    route, digest = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    shares = [
        target.model_copy(update={"weight": weight})
        for target, weight in zip(route.targets, weights, strict=True)
    ]
    rig.platform.routes.change(
        Environment.PRODUCTION, MODEL, shares, actor="ada", reason="split", expected=digest
    )


def revocations(rig: Rig, version: int) -> int:
    chain = release_chain(f"parrot.v{version}")
    return len(list(rig.platform.evidence.entries(chain, REVOCATION)))


@pytest.mark.usefixtures("evicted")
@pytest.mark.parametrize("name", ["parrot.v1", "1", "v1"])
def test_evicted_release_is_loaded_from_the_store(rig: Rig, name: str) -> None:
    """Slower, and said so; it is asked before anybody else asks it."""
    steps: list[str] = []
    done = roll_back(rig.platform, MODEL, "sre", "wrong dates", name, steps.append)
    assert serving(rig) == 1
    assert steps[0].startswith("parrot.v1 is not warm: loading it from the store")
    assert {body["text_input"] for _, body in rig.platform.slots.requests(GREEN)} >= {"hello"}
    # What was warm made room for it, and what is taken off left the route.
    assert [target.release for target in done.route.targets] == ["parrot.v1"]
    (incident,) = incidents_of(rig.platform.evidence, MODEL, "parrot.v3").incidents
    assert incident.action == "rolled back to parrot.v1"
    assert incident.restored == done.acknowledged


@pytest.mark.usefixtures("evicted")
def test_warm_release_by_its_name_is_not_loaded_again(rig: Rig) -> None:
    """Naming it must not make it slow."""
    calls = list(rig.platform.slots.calls)
    assert plan(rig.platform, route_of(rig), "2").warm
    roll_back(rig.platform, MODEL, "sre", "wrong dates", "parrot.v2")
    assert serving(rig) == 2
    assert rig.platform.slots.calls == calls


@pytest.mark.usefixtures("evicted")
def test_what_may_not_come_back(rig: Rig) -> None:
    """By name as little as by being warm: each is refused with what to do, nothing moves."""
    for name in ("parrot.v7", "7", "carrot.v1", ""):
        with pytest.raises(LifecycleOrderError, match=r"never had all.*parrot\.v3 \(version 3\), "):
            roll_back(rig.platform, MODEL, "sre", "wrong dates", name)
    with pytest.raises(LifecycleOrderError, match=r"parrot\.v3 serves parrot already"):
        roll_back(rig.platform, MODEL, "sre", "wrong dates", "parrot.v3")
    rig.judge("parrot.v1", [CANARY], FAILED)
    with pytest.raises(GateRefusedError, match="canary: failed"):
        roll_back(rig.platform, MODEL, "sre", "wrong dates", "parrot.v1")
    rig.judge("parrot.v1", [CANARY], PASSED)
    revoke(rig.platform, "parrot.v1", "bob", "it lies")
    with pytest.raises(ApprovalError, match="bob revoked it"):
        roll_back(rig.platform, MODEL, "sre", "wrong dates", "parrot.v1")
    action = Action("deprecated_version", "application/vnd.llmops.test")
    document = Withdrawn(of="parrot.v2")
    rig.platform.columns.record("parrot.v2", action, document, datetime.now(UTC))
    for to in ("parrot.v2", None):
        with pytest.raises(LifecycleOrderError, match="is deprecated"):
            roll_back(rig.platform, MODEL, "sre", "wrong dates", to)
    assert serving(rig) == 3
    assert len(list(rig.platform.routes.history(Environment.PRODUCTION, MODEL))) == 4


class Withdrawn(BaseModel):
    """Stands for the document of an asset."""

    of: str


@pytest.mark.usefixtures("evicted")
def test_reloaded_release_that_answers_badly_gets_no_traffic(rig: Rig) -> None:
    """It served well once; its server may not be what it was."""
    rig.platform.slots.answers["hello"] = "nothing"
    with pytest.raises(SlotError, match=r"parrot\.v1 does not answer well any more"):
        roll_back(rig.platform, MODEL, "sre", "wrong dates", "1")
    assert serving(rig) == 3
    # It serves on, and must stay what may serve.
    assert revocations(rig, 3) == 0


@pytest.mark.usefixtures("evicted")
def test_release_that_does_not_load_revokes_nothing(rig: Rig) -> None:
    """What serves goes on serving; without its approval nothing could bring it back."""
    rig.platform.slots.broken.add(GREEN)
    with pytest.raises(SlotError, match="ended while it loaded"):
        roll_back(rig.platform, MODEL, "sre", "wrong dates", "1")
    assert (serving(rig), revocations(rig, 3)) == (3, 0)
    rig.platform.slots.broken.clear()
    roll_back(rig.platform, MODEL, "sre", "wrong dates", "1")
    assert (serving(rig), revocations(rig, 3)) == (1, 1)


@pytest.mark.usefixtures("evicted")
def test_evicted_release_needs_an_idle_slot(rig: Rig) -> None:
    """In a canary both slots have traffic; the dry run must say so as well."""
    split(rig, 90, 10)
    before = route_of(rig)
    with pytest.raises(
        LifecycleOrderError, match=r"no idle slot.*`llmops rollback parrot --reason WHY` first"
    ):
        roll_back(rig.platform, MODEL, "sre", "wrong dates", "1")
    assert route_of(rig) == before
    assert (revocations(rig, 2), revocations(rig, 3)) == (0, 0)


@pytest.mark.usefixtures("evicted")
def test_busy_slot_that_is_late_is_still_the_way_back(rig: Rig) -> None:
    """It has traffic already; under load a server may answer late that it is ready."""
    split(rig, 90, 10)
    rig.platform.slots.crash(BLUE)
    back(rig)
    assert serving(rig) == 3


@pytest.mark.usefixtures("evicted")
def test_route_that_moved_while_a_release_was_loaded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading takes a while, in which somebody else may have put things right."""
    start = rig.platform.slots.start

    def slow(slot: Slot, package: Artifact, deployment: Deployment) -> Endpoint:
        endpoint = start(slot, package, deployment)
        route, digest = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
        assert route is not None
        rig.platform.routes.change(
            Environment.PRODUCTION, MODEL, (), actor="bob", reason="off", expected=digest
        )
        return endpoint

    monkeypatch.setattr(rig.platform.slots, "start", slow)
    with pytest.raises(RefConflictError, match=r"Somebody else changed.*by bob \(off\)"):
        roll_back(rig.platform, MODEL, "sre", "wrong dates", "1")
    assert serving(rig) is None


@pytest.mark.usefixtures("evicted")
def test_dry_run_makes_every_check_and_no_change(rig: Rig) -> None:
    """It is asked by who is not sure, at a bad time."""
    before = route_of(rig)
    planned = plan(rig.platform, before)
    assert (planned.to.release, planned.warm) == ("parrot.v2", True)
    assert planned.taken_off.release == "parrot.v3"
    planned = plan(rig.platform, before, "1")
    assert (planned.to.release, planned.warm, planned.load_seconds) == ("parrot.v1", False, None)
    rig.platform.slots.crash(GREEN)
    with pytest.raises(SlotError, match=r"parrot\.v2 is on the route and does not answer"):
        plan(rig.platform, before)
    assert route_of(rig) == before
    assert last_revocation(rig.platform.evidence, "parrot.v3") is None


@pytest.mark.parametrize("share", [10, 90])
def test_split_route_goes_back_to_what_had_it_all(rig: Rig, share: int) -> None:
    """In a canary the new release is what is taken off, however much it has by then."""
    deploy(rig, 1)
    deploy(rig, 2)
    rig.platform.routes.change(
        Environment.PRODUCTION, MODEL,
        [t for t in route_of(rig).targets if t.release == "parrot.v2"],
        actor="ada", reason="v1 makes room",
        expected=rig.platform.routes.current(Environment.PRODUCTION, MODEL)[1],
    )  # fmt: skip
    candidate = loaded(rig, 3).target.model_copy(update={"weight": share})
    route, digest = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    stable = route.targets[0].model_copy(update={"weight": 100 - share})
    rig.platform.routes.change(
        Environment.PRODUCTION, MODEL, (stable, candidate), actor="ada", reason="canary",
        expected=digest,
    )  # fmt: skip
    back(rig)
    assert serving(rig) == 2
    assert last_revocation(rig.platform.evidence, "parrot.v3") is not None
    assert last_revocation(rig.platform.evidence, "parrot.v2") is None
    (incident,) = incidents_of(rig.platform.evidence, MODEL, "parrot.v3").incidents
    assert incident.action == "rolled back to parrot.v2"


@pytest.mark.usefixtures("evicted")
def test_of_two_at_once_one_wins(rig: Rig) -> None:
    """Both saw the same route; the evidence's compare-and-set lets one of them move it."""
    seen = route_of(rig)
    barrier = threading.Barrier(2)

    def one(actor: str) -> Route | LLMOpsError:
        barrier.wait(10)
        try:
            return take_back(rig.platform, seen, actor, "wrong dates")
        except LLMOpsError as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(one, ("ada", "bob")))
    (won,) = (outcome for outcome in outcomes if isinstance(outcome, Route))
    (lost,) = (outcome for outcome in outcomes if isinstance(outcome, LLMOpsError))
    assert isinstance(lost, RefConflictError)
    assert f"by {won.actor}" in str(lost)
    assert route_of(rig) == won
    assert serving(rig) == 2


@pytest.mark.usefixtures("evicted")
def test_job_takes_the_name_as_well(rig: Rig, instance: DagsterInstance) -> None:
    """One path: command, trigger and launchpad do the same."""
    result = run_rollback(rig, instance, to="parrot.v1")
    # The packages of this test have no more than delivery needs; the route has moved.
    assert serving(rig) == 1
    assert shown(result)["serving"] == "parrot.v1"


def test_services_are_times_with_all_the_traffic(rig: Rig) -> None:
    """What only made room is no new time, and a share is none at all."""
    deploy(rig, 1)
    deploy(rig, 2)
    deploy(rig, 3)
    back(rig)
    found = services(rig.platform.routes, Environment.PRODUCTION, MODEL)
    assert [service.deployment.version for service in found] == [2, 3, 2, 1]
    assert found[0].until is None
    assert [a.since for a in found[:-1]] == [b.until for b in found[1:]]


def evaluation(result: ExecuteInProcessResult, name: str) -> dg.AssetCheckEvaluation:
    (found,) = (e for e in result.get_asset_check_evaluations() if e.check_name == name)
    return found


@pytest.mark.usefixtures("served_twice")
def test_observe_shows_drift_and_open_incidents(rig: Rig, instance: DagsterInstance) -> None:
    """The run that looks at what serves also says what is not as it is recorded, and what is
    still to be done."""
    runs = Runs(rig, instance)
    check = evaluation(runs.job("observe", "parrot.v12"), "recorded_is_observed")
    assert check.passed, check.description
    report_incident(
        rig.platform.evidence,
        Incident(
            id="f00d@now", model=MODEL, release="parrot.v12", what="slow", action=None, actor=None,
            detected=datetime.now(UTC), answered=None,
        ),
    )  # fmt: skip
    rig.platform.slots.crash(BLUE)
    result = runs.job("observe", "parrot.v12")
    check = evaluation(result, "recorded_is_observed")
    assert not check.passed
    assert "production/parrot/blue: slot down" in str(check.description)
    assert "To do: llmops up" in str(check.description)
    # Clients are served; what is gone is the way back.
    assert check.severity is dg.AssetCheckSeverity.WARN
    table = check.metadata["open_incidents"]
    assert isinstance(table, dg.TableMetadataValue)
    assert [row.data["id"] for row in table.records] == ["f00d@now"]
    assert not evaluation(result, "incidents_answered").passed
