"""Rollback: the route goes back to the release that is still warm. It waits for nothing."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice

from llmops_assets.deploy.delivery import move_back, warm
from llmops_assets.deploy.smoke import ask_known, judge_smoke
from llmops_assets.errors import GatewayError, LifecycleOrderError, RefConflictError, SlotError
from llmops_assets.evidence.gates import CANARY
from llmops_assets.evidence.verdicts import Circumstances, require
from llmops_assets.operate.incidents import Incident, report_incident
from llmops_assets.platform import Platform
from llmops_assets.policy import Policy
from llmops_assets.serving.package_description import read_package
from llmops_assets.serving.routes import Route, Routes
from llmops_assets.serving.slots import Environment

LATEST_ROUTES = 50
"""Among so many an alert's own is looked for; it acts within seconds of its first sight."""


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
    route = serving_route(platform, model)
    changed = take_back(platform, route, actor, reason)
    if changed != route and route.serving is not None:
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


def serving_route(platform: Platform, model: str) -> Route:
    """Production's route of a model.

    Raises:
        LifecycleOrderError: nothing serves.
    """
    route, _ = platform.routes.current(Environment.PRODUCTION, model)
    if route is None or route.serving is None:
        raise LifecycleOrderError(
            f"There is nothing to roll {model} back from",
            expected="a release that serves",
            found="no route" if route is None else f"generation {route.generation} without traffic",
            cure="promote a release that served well: `llmops promote RELEASE`",
        )
    return route


def take_back(platform: Platform, route: Route, actor: str, reason: str) -> Route:
    """Undoes a route, and records nothing but the route that follows it.

    Returns:
        The new route; the same one where it was only applied to a gateway that lagged behind.

    Raises:
        LifecycleOrderError, GateRefusedError, RefConflictError, GatewayError: as `roll_back`.
    """
    current, _ = platform.routes.current(route.environment, route.model)
    if current != route:
        raise RefConflictError(
            f"Somebody else changed the {route.environment} route of {route.model}",
            expected=f"generation {route.generation}",
            found=f"generation {current.generation}" if current else "no route",
            cure="look at the route as it is now and decide anew",
        )
    previous = warm(route)
    if previous is None and enforce(platform, route):
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
    return move_back(platform.routes, platform.slots, route, actor, reason)


def enforce(platform: Platform, route: Route) -> bool:
    """Applies the recorded routes if the gateway uses another one for this model.

    Returns:
        Whether it did.

    Raises:
        GatewayError: the gateway does not answer, or refuses them.
    """
    behind = route.model in platform.routes.differences(route.environment)
    if behind:
        platform.routes.reconcile()
    return behind


def moved_by(routes: Routes, model: str, actor: str) -> Route | None:
    """The route that an actor made of late; None if it made none."""
    latest = islice(routes.history(Environment.PRODUCTION, model), LATEST_ROUTES)
    return next((route for _, route in latest if route.actor == actor), None)


def verify(platform: Platform, route: Route) -> None:
    """Checks that a route is in force and that what it leads to answers as it should.

    A route that another one has followed is history, and nothing is checked.

    Raises:
        GatewayError: the gateway does not use it.
        SlotError: the known questions are not answered.
    """
    current, _ = platform.routes.current(route.environment, route.model)
    if current != route:
        return
    enforce(platform, route)
    if (behind := platform.routes.differences(route.environment).get(route.model)) is not None:
        raise GatewayError(
            f"The gateway does not use the recorded route of {route.model}",
            expected=f"generation {behind[0]}",
            found=f"generation {behind[1]}",
            cure="look at `llmops status`; `llmops up` applies the recorded routes",
        )
    if route.serving is None:
        return
    spec = platform.spec(route.serving.release)
    _, package = platform.store.open(route.serving.package)
    contract = read_package(package).asked
    timeout_seconds = platform.settings.http_timeout_seconds
    answers = ask_known(spec, platform.gateway_url, contract, timeout_seconds)
    judged = judge_smoke(answers, spec.gates.smoke, route.serving.version)
    if not judged.passed:
        raise SlotError(
            f"{route.serving.release} has the traffic of {route.model} and does not answer well",
            expected="the known answers",
            found=judged.reason,
            cure="promote a release that serves well: `llmops promote RELEASE`",
        )
