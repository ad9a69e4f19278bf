"""Delivery: what serves is never touched, and what was taken off does not come back."""

from __future__ import annotations

import pytest

from llmops_assets.deploy.delivery import (
    claim_idle_slot,
    deployment_of,
    move,
    move_back,
    take_off,
    warm,
)
from llmops_assets.errors import GatewayError, LifecycleOrderError, RefConflictError, SlotError
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Colour, Deployment, Environment, Slot

from ..release_rig import MODEL, Rig, deploy, loaded, serving

PRODUCTION = Environment.PRODUCTION
BLUE = Slot(PRODUCTION, MODEL, Colour.BLUE)
GREEN = Slot(PRODUCTION, MODEL, Colour.GREEN)


pytestmark = pytest.mark.usefixtures("packages")


def back(rig: Rig, route: Route) -> Route:
    return move_back(rig.platform.routes, rig.platform.slots, route, "sre", "it is wrong")


def test_first_release_takes_all_traffic(rig: Rig) -> None:
    """There is nothing to keep warm yet."""
    route = deploy(rig, 1)
    assert serving(rig) == 1
    assert warm(route) is None
    assert [target.colour for target in route.targets] == [Colour.BLUE]


def test_next_release_goes_to_the_idle_slot(rig: Rig) -> None:
    """The one that serves answers all the while, and stays ready for a rollback."""
    deploy(rig, 1)
    candidate = loaded(rig, 2)
    assert candidate.colour is Colour.GREEN
    assert serving(rig) == 1
    assert rig.platform.slots.state(BLUE).running
    route = move(rig.platform.routes, candidate, "ada", "deploying v2")
    assert serving(rig) == 2
    kept = warm(route)
    assert kept is not None
    assert deployment_of(kept) == rig.deployment("parrot.v1", 1)
    assert sum(target.weight for target in route.targets) == 100


def test_third_release_evicts_the_warm_one_never_the_live_one(rig: Rig) -> None:
    """Two slots are all there is."""
    deploy(rig, 1)
    deploy(rig, 2)
    candidate = loaded(rig, 3)
    assert candidate.colour is Colour.BLUE
    assert serving(rig) == 2
    assert rig.platform.slots.state(GREEN).deployment == rig.deployment("parrot.v2", 2)
    route = move(rig.platform.routes, candidate, "ada", "deploying v3")
    kept = warm(route)
    assert kept is not None
    assert (kept.version, serving(rig)) == (2, 3)


def test_loading_what_serves_touches_nothing(rig: Rig) -> None:
    """A promotion that is run again must not restart the server that answers."""
    deploy(rig, 1)
    calls = len(rig.platform.slots.calls)
    assert loaded(rig, 1).colour is Colour.BLUE
    assert len(rig.platform.slots.calls) == calls


def test_same_package_under_another_release_is_loaded_anew(rig: Rig) -> None:
    """A deployment is package, release and version; the audit must see the right one."""
    deploy(rig, 1)
    package = rig.deployment("parrot.v1", 1).package
    other = Deployment(package, "parrot.v9", 9)
    assert claim_idle_slot(rig.platform.routes, PRODUCTION, MODEL, other, "ada") == GREEN


def test_moving_again_changes_nothing(rig: Rig) -> None:
    """A run that was killed after the move is run again."""
    candidate = loaded(rig, 1)
    first = move(rig.platform.routes, candidate, "ada", "first")
    again = move(rig.platform.routes, candidate, "ada", "again")
    assert again == first


def test_moving_again_tells_a_gateway_that_did_not_hear(rig: Rig) -> None:
    """Recorded and not applied is where a kill, or a gateway that refuses, leaves a route."""
    candidate = loaded(rig, 1)
    rig.platform.gateway.refuses = True
    with pytest.raises(GatewayError):
        move(rig.platform.routes, candidate, "ada", "deploying")
    assert serving(rig) is None
    rig.platform.gateway.refuses = False
    move(rig.platform.routes, candidate, "ada", "again")
    assert serving(rig) == 1


def test_both_slots_with_traffic_leave_no_room(rig: Rig) -> None:
    """Loading would take a server away from under its requests."""
    deploy(rig, 1)
    deploy(rig, 2)
    routes = rig.platform.routes
    current, digest = routes.current(PRODUCTION, MODEL)
    assert current is not None
    halves = [target.model_copy(update={"weight": 50}) for target in current.targets]
    routes.change(PRODUCTION, MODEL, halves, actor="ada", reason="split", expected=digest)
    with pytest.raises(LifecycleOrderError, match=r"Both .* have traffic"):
        loaded(rig, 3)


def test_slot_that_does_not_load_leaves_the_route_alone(rig: Rig) -> None:
    """A package that does not start must cost no request."""
    deploy(rig, 1)
    rig.platform.slots.broken.add(GREEN)
    with pytest.raises(SlotError):
        loaded(rig, 2)
    assert serving(rig) == 1


def test_moving_back_gives_the_traffic_to_the_warm_one(rig: Rig) -> None:
    """That is what it was kept for."""
    deploy(rig, 1)
    route = deploy(rig, 2)
    changed = back(rig, route)
    assert serving(rig) == 1
    assert (changed.actor, changed.reason) == ("sre", "it is wrong")


def test_what_was_taken_off_is_not_warm_any_more(rig: Rig) -> None:
    """A rollback asked for twice would otherwise bring the bad release back."""
    deploy(rig, 1)
    changed = back(rig, deploy(rig, 2))
    assert warm(changed) is None
    assert {target.version for target in changed.targets} == {1}


def test_there_may_be_nothing_to_move_back_to(rig: Rig) -> None:
    """The caller decides between a wrong answer and none; `take_off` gives none."""
    route = deploy(rig, 1)
    with pytest.raises(LifecycleOrderError, match="nothing to roll parrot back to"):
        back(rig, route)
    assert serving(rig) == 1
    changed = take_off(rig.platform.routes, route, "sre", "it is wrong")
    assert changed.targets == ()
    assert serving(rig) is None


def test_moving_back_to_a_dead_slot_is_refused(rig: Rig) -> None:
    """A route to a server that is gone would turn a bad release into an outage."""
    deploy(rig, 1)
    route = deploy(rig, 2)
    rig.platform.slots.crash(BLUE)
    with pytest.raises(SlotError, match=r"parrot\.v1 is on the route and does not answer"):
        back(rig, route)
    assert serving(rig) == 2


def test_moving_back_to_a_slot_with_something_else_is_refused(rig: Rig) -> None:
    """No time heals that, so it is another error than a server that is late."""
    deploy(rig, 1)
    route = deploy(rig, 2)
    other = rig.deployment("parrot.v3", 3)
    rig.platform.slots.start(BLUE, rig.platform.store.describe(other.package), other)
    rig.platform.slots.crash(BLUE)
    with pytest.raises(LifecycleOrderError, match=r"parrot\.v1 is not warm any more"):
        back(rig, route)
    assert serving(rig) == 2


def test_evicted_release_leaves_the_route_before_its_slot_is_filled(rig: Rig) -> None:
    """From then on no rollback may send traffic to what is being loaded there."""
    deploy(rig, 1)
    deploy(rig, 2)
    rig.platform.slots.broken.add(BLUE)
    with pytest.raises(SlotError):
        loaded(rig, 3)
    current, _ = rig.platform.routes.current(PRODUCTION, MODEL)
    assert current is not None
    assert [target.release for target in current.targets] == ["parrot.v2"]
    assert current.reason == "parrot.v1 makes room for parrot.v3"
    assert serving(rig) == 2


def test_moving_back_what_is_not_current_is_a_conflict(rig: Rig) -> None:
    """Somebody was faster, and what they did stands."""
    deploy(rig, 1)
    second = deploy(rig, 2)
    back(rig, second)
    with pytest.raises(RefConflictError):
        back(rig, second)
    with pytest.raises(RefConflictError):
        take_off(rig.platform.routes, second, "sre", "too late")
    assert serving(rig) == 1
    assert rig.platform.routes.differences(PRODUCTION) == {}


def test_promoting_again_after_a_rollback_works(rig: Rig) -> None:
    """The release that was taken off may come back, through its gates, not by rollback."""
    deploy(rig, 1)
    back(rig, deploy(rig, 2))
    route = deploy(rig, 2)
    kept = warm(route)
    assert (serving(rig), kept.version if kept else None) == (2, 1)
