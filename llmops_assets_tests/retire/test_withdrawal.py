"""Out of service: never what serves, off every route, and really gone from the slots."""

from __future__ import annotations

import pytest

from llmops_assets.errors import LifecycleOrderError
from llmops_assets.retire.withdrawal import (
    judge_gone,
    judge_nothing_routes,
    refuse_if_serving,
    slots_holding,
    take_off_routes,
)
from llmops_assets.serving.slots import Environment, Slot

from ..release_rig import MODEL, Rig, deploy, loaded, serving

pytestmark = pytest.mark.usefixtures("packages")
PRODUCTION = Environment.PRODUCTION


def test_what_serves_is_refused(rig: Rig) -> None:
    """Deprecating the wrong release must not be an outage."""
    current = deploy(rig, 1)
    with pytest.raises(LifecycleOrderError, match="serves in production"):
        refuse_if_serving(current, "parrot.v1")
    with pytest.raises(LifecycleOrderError, match="serves in production"):
        take_off_routes(rig.platform.routes, MODEL, "parrot.v1", "ada")
    assert serving(rig) == 1


def test_smallest_share_of_traffic_counts_as_serving(rig: Rig) -> None:
    """One per cent of the users are users."""
    deploy(rig, 1)
    current = deploy(rig, 2)
    _, digest = rig.platform.routes.current(PRODUCTION, MODEL)
    weights = {"parrot.v1": 1, "parrot.v2": 99}
    targets = [t.model_copy(update={"weight": weights[t.release]}) for t in current.targets]
    current = rig.platform.routes.change(
        PRODUCTION, MODEL, targets, actor="ada", reason="split", expected=digest
    )
    with pytest.raises(LifecycleOrderError):
        refuse_if_serving(current, "parrot.v1")


def test_what_does_not_serve_is_let_go(rig: Rig) -> None:
    """Neither a model without a route, nor a release that is only warm, is in use."""
    refuse_if_serving(None, "parrot.v1")
    deploy(rig, 1)
    refuse_if_serving(deploy(rig, 2), "parrot.v1")


def test_warm_release_leaves_the_route(rig: Rig) -> None:
    """A rollback must not lead to what was withdrawn."""
    deploy(rig, 1)
    deploy(rig, 2)
    assert not judge_nothing_routes(rig.platform.routes, MODEL, "parrot.v1").passed
    take_off_routes(rig.platform.routes, MODEL, "parrot.v1", "ada")
    current, _ = rig.platform.routes.current(PRODUCTION, MODEL)
    assert current is not None
    assert [target.release for target in current.targets] == ["parrot.v2"]
    assert (current.actor, current.reason) == ("ada", "deprecated parrot.v1")
    assert serving(rig) == 2
    assert judge_nothing_routes(rig.platform.routes, MODEL, "parrot.v1").passed


def test_staging_is_left_though_it_serves_there(rig: Rig) -> None:
    """Staging's traffic is nobody's; it must not keep a release alive."""
    target = loaded(rig, 1).target
    rig.platform.routes.change(
        Environment.STAGING, MODEL, [target], actor="ada", reason="try", expected=None
    )
    take_off_routes(rig.platform.routes, MODEL, "parrot.v1", "ada")
    current, _ = rig.platform.routes.current(Environment.STAGING, MODEL)
    assert current is not None
    assert current.targets == ()


def test_taking_off_twice_changes_no_route(rig: Rig) -> None:
    """A run that was killed half-way is run again."""
    deploy(rig, 1)
    deploy(rig, 2)
    take_off_routes(rig.platform.routes, MODEL, "parrot.v1", "ada")
    before = rig.platform.routes.current(PRODUCTION, MODEL)
    take_off_routes(rig.platform.routes, MODEL, "parrot.v1", "ada")
    take_off_routes(rig.platform.routes, MODEL, "parrot.v9", "ada")
    assert rig.platform.routes.current(PRODUCTION, MODEL) == before


def test_gateway_behind_the_record_fails_the_gate(rig: Rig) -> None:
    """The record names nobody, while clients still reach the release."""
    deploy(rig, 1)
    deploy(rig, 2)
    take_off_routes(rig.platform.routes, MODEL, "parrot.v1", "ada")
    rig.platform.gateway.applied_routes[PRODUCTION] = {}
    judgement = judge_nothing_routes(rig.platform.routes, MODEL, "parrot.v1")
    assert not judgement.passed
    assert judgement.measured == {"routes": [], "gateway_behind": ["production"]}


def test_slots_that_hold_it_are_found_running_or_not(rig: Rig) -> None:
    """A stopped server's files are still an unremoved model."""
    deploy(rig, 1)
    deploy(rig, 2)
    ((slot, held),) = slots_holding(rig.platform.slots, MODEL, "parrot.v1")
    assert held == rig.deployment("parrot.v1", 1)
    rig.platform.slots.drain(slot)
    rig.platform.slots.stop(slot, held)
    assert not judge_gone(rig.platform.slots, MODEL, "parrot.v1").passed
    rig.platform.slots.clear(slot, held)
    assert judge_gone(rig.platform.slots, MODEL, "parrot.v1").passed
    assert [str(slot) for slot, _ in slots_holding(rig.platform.slots, MODEL, "parrot.v2")] == [
        "production/parrot/green"
    ]


def test_staging_slots_count_as_well(rig: Rig) -> None:
    """Gone means gone from every Triton."""
    deployment = rig.deployment("parrot.v1", 1)
    slot = Slot(Environment.STAGING, MODEL, loaded(rig, 2).colour)
    rig.platform.slots.start(slot, rig.platform.store.describe(deployment.package), deployment)
    assert judge_gone(rig.platform.slots, MODEL, "parrot.v1").measured == {
        "slots": ["staging/parrot/blue"]
    }
