"""Taking a release out of service: off the routes, then out of the slots."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from llmops_assets.errors import LifecycleOrderError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.serving.routes import Route, Routes
from llmops_assets.serving.slots import Deployment, Environment, Slot, Slots


class Deprecation(BaseModel):
    """Document of `deprecated_version`."""

    model_config = ConfigDict(frozen=True)

    release: str
    stopped: tuple[str, ...]
    """Slots that held the release and were stopped."""
    time: datetime


class Removal(BaseModel):
    """Document of `removed_version`."""

    model_config = ConfigDict(frozen=True)

    release: str
    cleared: tuple[str, ...]
    """Slots whose files of the release were removed."""
    time: datetime


def refuse_if_serving(route: Route | None, release: str) -> None:
    """Makes sure that production does not depend on a release.

    Args:
        route: production's.

    Raises:
        LifecycleOrderError: the route gives it traffic.
    """
    if route is not None and any(
        target.release == release and target.weight > 0 for target in route.targets
    ):
        raise LifecycleOrderError(
            f"Release {release} serves in production",
            expected="a release without traffic",
            found=f"generation {route.generation} of the route, which gives it traffic",
            cure="promote another release first",
        )


def take_off_routes(routes: Routes, model: str, release: str, actor: str) -> None:
    """Takes a release off every route, so that no rollback can lead to it either.

    Raises:
        LifecycleOrderError: it serves in production.
        RefConflictError, GatewayError: a route could not be changed.
    """
    for environment in (Environment.PRODUCTION, Environment.STAGING):
        route, digest = routes.current(environment, model)
        if environment is Environment.PRODUCTION:
            # Of the very route that is changed below: a rollback in between, which makes
            # the release serve, makes that change fail.
            refuse_if_serving(route, release)
        if route is None or all(target.release != release for target in route.targets):
            continue
        targets = tuple(target for target in route.targets if target.release != release)
        routes.change(
            environment, model, targets, actor=actor, reason=f"deprecated {release}",
            expected=digest,
        )  # fmt: skip


def slots_holding(slots: Slots, model: str, release: str) -> tuple[tuple[Slot, Deployment], ...]:
    """The slots of any environment that hold a release, running or not, with what they hold."""
    return tuple(
        (state.slot, state.deployment)
        for environment in Environment
        for state in slots.slots(environment, model)
        if state.deployment is not None and state.deployment.release == release
    )


def judge_nothing_routes(routes: Routes, model: str, release: str) -> Judgement:
    """No route names the release, and the gateway uses the recorded routes."""
    naming: list[str] = []
    behind: list[str] = []
    for environment in Environment:
        route, _ = routes.current(environment, model)
        if route is not None and any(target.release == release for target in route.targets):
            naming.append(str(environment))
        if model in routes.differences(environment):
            behind.append(str(environment))
    problems = [f"the {name} route names it" for name in naming]
    problems += [f"the gateway does not use the recorded {name} route" for name in behind]
    return Judgement(
        decision=Decision.of(not problems),
        measured={"routes": naming, "gateway_behind": behind},
        threshold={"routes": [], "gateway_behind": []},
        reason="; ".join(problems) or "No route names the release.",
    )


def judge_gone(slots: Slots, model: str, release: str) -> Judgement:
    """No slot holds the release."""
    holding = [str(slot) for slot, _ in slots_holding(slots, model, release)]
    return Judgement(
        decision=Decision.of(not holding),
        measured={"slots": holding},
        threshold={"slots": []},
        reason=f"{len(holding)} slots hold the release.",
    )
