"""Delivery of a package: into an idle slot, and onto the route.

What serves is never touched: a package is loaded where no traffic goes, and only the
route decides who gets requests. Every function may be repeated after a crash.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from llmops_assets.deploy.smoke import Answer
from llmops_assets.errors import LifecycleOrderError
from llmops_assets.serving.routes import Route, Routes, RouteTarget
from llmops_assets.serving.slots import Colour, Deployment, Endpoint, Environment, Slot, Slots
from llmops_assets.storage.store import Artifact


class LoadedPackage(BaseModel):
    """Document of `staging_deployment` and `production_candidate`: a package in a slot."""

    model_config = ConfigDict(frozen=True)

    environment: Environment
    model: str
    colour: Colour
    deployment: Deployment
    endpoint: Endpoint
    load_seconds: float
    answers: tuple[Answer, ...]
    """To the known questions, asked of the slot itself."""
    time: datetime

    @property
    def target(self) -> RouteTarget:
        """The slot as a route names it, with all traffic."""
        return RouteTarget(
            colour=self.colour,
            weight=100,
            package=self.deployment.package,
            release=self.deployment.release,
            version=self.deployment.version,
            host=self.endpoint.host,
            http_port=self.endpoint.http_port,
            grpc_port=self.endpoint.grpc_port,
            metrics_port=self.endpoint.metrics_port,
        )


class RouteMove(BaseModel):
    """Document of `production_deployment`: the change that made a release serve."""

    model_config = ConfigDict(frozen=True)

    environment: Environment
    model: str
    generation: int
    deployment: Deployment
    colour: Colour
    previous: Deployment | None
    """What served before, kept warm for a rollback."""
    answers: tuple[Answer, ...]
    """To the known questions, asked through the gateway after the move."""
    time: datetime


def idle_slot(routes: Routes, environment: Environment, model: str, deployment: Deployment) -> Slot:
    """The slot to load a deployment into: one without traffic, or where it serves already.

    Raises:
        LifecycleOrderError: both colours have traffic.
    """
    route, _ = routes.current(environment, model)
    busy = {} if route is None else {t.colour: t for t in route.targets if t.weight > 0}
    for colour, target in busy.items():
        if deployment_of(target) == deployment:
            return Slot(environment, model, colour)
    idle = [colour for colour in Colour if colour not in busy]
    if not idle:
        raise LifecycleOrderError(
            f"Both {environment} slots of {model} have traffic",
            expected="one idle slot",
            found=f"generation {route.generation if route else 0} of the route",
            cure="finish or roll back the release that is on its way, then try again",
        )
    return Slot(environment, model, idle[0])


def load(
    slots: Slots, routes: Routes, environment: Environment, model: str,
    package: Artifact, deployment: Deployment,
) -> tuple[Slot, Endpoint]:  # fmt: skip
    """Loads a package into the environment's idle slot, in place of what is warm there.

    Raises:
        LifecycleOrderError: no slot is idle.
        SlotError, ArtifactCorruptError: it did not load.
    """
    slot = idle_slot(routes, environment, model, deployment)
    return slot, slots.start(slot, package, deployment)


def move(routes: Routes, loaded: LoadedPackage, actor: str, reason: str) -> Route:
    """Gives a loaded package all traffic. What served before stays on the route at 0.

    Raises:
        RefConflictError: somebody else changed the route meanwhile.
        GatewayError: the gateway did not take it.
    """
    route, digest = routes.current(loaded.environment, loaded.model)
    if route is not None and route.serving == loaded.target:
        # Perhaps recorded by a run that was killed before the gateway heard of it.
        routes.reconcile()
        return route
    former = () if route is None or route.serving is None else (route.serving,)
    targets = (
        loaded.target,
        *(t.model_copy(update={"weight": 0}) for t in former if t.colour != loaded.colour),
    )
    return routes.change(
        loaded.environment, loaded.model, targets, actor=actor, reason=reason, expected=digest
    )


def move_back(routes: Routes, route: Route, actor: str, reason: str) -> Route:
    """Gives all traffic back to what is warm on the route, or to nothing.

    What is taken off leaves the route for good, so that no second rollback leads back to it.

    Args:
        route: the route that is to be undone.

    Raises:
        RefConflictError: somebody changed the route since; theirs stands.
        GatewayError: the gateway did not take it.
    """
    current, digest = routes.current(route.environment, route.model)
    previous = warm(route)
    targets = () if previous is None else (previous.model_copy(update={"weight": 100}),)
    return routes.change(
        route.environment,
        route.model,
        targets,
        actor=actor,
        reason=reason,
        # A route that is no longer the one to undo makes this a conflict.
        expected=digest if current == route else route.predecessor,
    )


def warm(route: Route) -> RouteTarget | None:
    """What served before and still waits in its slot, without traffic."""
    return next((target for target in route.targets if target.weight == 0), None)


def deployment_of(target: RouteTarget) -> Deployment:
    """What a route's target names."""
    return Deployment(target.package, target.release, target.version)
