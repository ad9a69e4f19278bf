"""Rollback: the route goes back to the release that is still warm. It waits for nothing."""

from __future__ import annotations

from datetime import UTC, datetime

from llmops_assets.deploy.delivery import move_back, warm
from llmops_assets.errors import LifecycleOrderError
from llmops_assets.evidence.gates import CANARY
from llmops_assets.evidence.verdicts import Circumstances, require
from llmops_assets.operate.incidents import Incident, report_incident
from llmops_assets.platform import Platform
from llmops_assets.policy import Policy
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment


def roll_back(platform: Platform, model: str, actor: str, reason: str) -> Route:
    """Gives production's traffic to the release that served before, and records why.

    Repeated after a gateway that did not take it, it applies the route recorded then.

    Raises:
        LifecycleOrderError: no earlier release is warm, or its slot does not serve it.
        GateRefusedError: the earlier release never served fully.
        RefConflictError: somebody else changed the route meanwhile.
        GatewayError: the gateway did not take it.
    """
    detected = datetime.now(UTC)
    route, _ = platform.routes.current(Environment.PRODUCTION, model)
    if route is None or route.serving is None:
        raise LifecycleOrderError(
            f"There is nothing to roll {model} back from",
            expected="a release that serves",
            found="no route" if route is None else f"generation {route.generation} without traffic",
            cure="promote a release that served well: `llmops promote RELEASE`",
        )
    previous = warm(route)
    if previous is None and model in platform.routes.differences(Environment.PRODUCTION):
        platform.routes.reconcile()
        return route
    if previous is not None:
        require(
            platform.store,
            [CANARY],
            Circumstances(
                previous.release,
                platform.spec(previous.release),
                # The canary has no floor, and a broken policy file must not stop a rollback.
                Policy(),
                {"packaged_model": previous.package},
            ),
        )
    changed = move_back(platform.routes, platform.slots, route, actor, reason)
    report_incident(
        platform.store,
        Incident(
            model=model,
            release=route.serving.release,
            what=reason,
            action=f"rolled back to {changed.serving.release}" if changed.serving else None,
            actor=actor,
            detected=detected,
            answered=datetime.now(UTC),
        ),
    )
    return changed
