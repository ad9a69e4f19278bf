"""Rollback: the route goes back to the release that is still warm. It waits for nothing."""

from __future__ import annotations

from datetime import UTC, datetime

from llmops_assets.deploy.delivery import deployment_of, move_back, warm
from llmops_assets.errors import LifecycleOrderError
from llmops_assets.operate.incidents import Incident, report_incident
from llmops_assets.serving.routes import Route, Routes
from llmops_assets.serving.slots import Environment, Slot, Slots
from llmops_assets.storage.store import Store


def roll_back(
    store: Store, routes: Routes, slots: Slots, model: str, actor: str, reason: str
) -> Route:
    """Gives production's traffic to the release that served before, and records why.

    Repeated after a gateway that did not answer, it applies the route recorded then.

    Raises:
        LifecycleOrderError: no earlier release is warm, or its slot does not serve it.
        RefConflictError: somebody else changed the route meanwhile.
        GatewayError: the gateway did not take it.
    """
    detected = datetime.now(UTC)
    route, _ = routes.current(Environment.PRODUCTION, model)
    previous = None if route is None else warm(route)
    if (
        route is not None
        and route.serving is not None
        and previous is None
        and model in routes.differences(Environment.PRODUCTION)
    ):
        routes.reconcile()
        return route
    if route is None or route.serving is None or previous is None:
        raise LifecycleOrderError(
            f"There is nothing to roll {model} back to",
            expected="an earlier release that is still warm on the route",
            found="no route" if route is None else f"generation {route.generation} without one",
            cure="promote a release that served well: `llmops promote RELEASE`",
        )
    slot = Slot(Environment.PRODUCTION, model, previous.colour)
    state = slots.state(slot)
    if not state.running or state.deployment != deployment_of(previous):
        raise LifecycleOrderError(
            f"{previous.release} is not warm any more",
            expected=f"slot {slot} serving {previous.release}",
            found=state.deployment if state.running else "a slot that does not answer",
            cure=f"promote it again: `llmops promote {previous.release}`",
        )
    changed = move_back(routes, route, actor, reason)
    report_incident(
        store,
        Incident(
            model=model,
            release=route.serving.release,
            what=reason,
            action=f"rolled back to {previous.release}",
            actor=actor,
            detected=detected,
            answered=datetime.now(UTC),
        ),
    )
    return changed
