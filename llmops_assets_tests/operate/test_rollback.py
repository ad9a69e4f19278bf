"""Rollback: at once, to a release that served and still runs, and on record."""

from __future__ import annotations

import pytest

from llmops_assets.errors import GateRefusedError, GatewayError, LifecycleOrderError
from llmops_assets.evidence.gates import CANARY
from llmops_assets.operate.incidents import incidents_of
from llmops_assets.operate.rollback import roll_back
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Colour, Environment, Slot

from ..release_rig import FAILED, MODEL, Rig, deploy, serving

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
