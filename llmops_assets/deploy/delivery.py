"""Delivery of a package: into an idle slot, and onto the route.

What serves is never touched: a package is loaded where no traffic goes, and only the
route decides who gets requests. Every function may be repeated after a crash.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from llmops_assets.deploy.smoke import Answer
from llmops_assets.errors import LifecycleOrderError, SlotError
from llmops_assets.evidence.latency import LatencySummary
from llmops_assets.serving.package_description import PackageDescription
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
    problem: str | None = None
    """What the server says of itself that speaks against it."""
    latency: LatencySummary | None = None
    """Under load; None in production, and where an answer was wrong."""
    time: datetime

    @property
    def target(self) -> RouteTarget:
        """The slot as a route names it, with all traffic."""
        return target_of(self.colour, self.deployment, self.endpoint, 100)


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


def claim_idle_slot(
    routes: Routes, environment: Environment, model: str, deployment: Deployment, actor: str
) -> Slot:
    """The slot to load a deployment into: one without traffic, or where it serves already.

    What is warm in an idle slot leaves the route first: from then on no rollback can send
    traffic there, and one that was faster makes this fail before anything is touched.

    Raises:
        LifecycleOrderError: both colours have traffic.
        RefConflictError: somebody else changed the route meanwhile.
        GatewayError: the gateway did not take the change.
    """
    route, digest = routes.current(environment, model)
    targets = () if route is None else route.targets
    busy = {target.colour: target for target in targets if target.weight > 0}
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
    slot = Slot(environment, model, idle[0])
    evicted = next((target for target in targets if target.colour == slot.colour), None)
    if evicted is not None and deployment_of(evicted) != deployment:
        routes.change(
            environment,
            model,
            tuple(target for target in targets if target != evicted),
            actor=actor,
            reason=f"{evicted.release} makes room for {deployment.release}",
            expected=digest,
        )
    return slot


def load(
    slots: Slots,
    routes: Routes,
    environment: Environment,
    model: str,
    package: Artifact,
    description: PackageDescription,
    deployment: Deployment,
    actor: str,
) -> tuple[Slot, Endpoint]:
    """Loads a package into the environment's idle slot, in place of what is warm there.

    Raises:
        SlotError: the slots cannot serve it, or it did not load.
        LifecycleOrderError: no slot is idle.
        RefConflictError, GatewayError: the route could not be changed.
        ArtifactCorruptError: the bytes in the slot are not the package's.
    """
    # What cannot be served must not cost the warm release its place.
    slots.check_serves(description)
    slot = claim_idle_slot(routes, environment, model, deployment, actor)
    return slot, slots.start(slot, package, deployment)


Seen = tuple[Route | None, str | None]
"""A route with its digest, as somebody saw it who decided by it."""


def move(
    routes: Routes,
    loaded: LoadedPackage,
    actor: str,
    reason: str,
    seen: Seen | None = None,
    weight: int = 100,
) -> Route:
    """Gives a loaded package a share of the traffic. What serves beside it keeps the rest.

    Args:
        routes: where.
        loaded: the package, in its slot.
        actor: who or what asks for it.
        reason: why, for the audit.
        seen: the route that it was decided to change; None for the route as it is now.
        weight: its share, per cent. Less than all of it only beside something that serves.

    Raises:
        RefConflictError: somebody else changed the route meanwhile.
        GatewayError: the gateway did not take it.
    """
    route, digest = seen or routes.current(loaded.environment, loaded.model)
    target = loaded.target.model_copy(update={"weight": weight})
    if route is not None and target in route.targets:
        # Perhaps recorded by a run that was killed before the gateway heard of it.
        routes.reconcile()
        return route
    targets = (
        target,
        *(
            former.model_copy(update={"weight": 100 - weight})
            for former in (() if route is None else route.targets)
            if former.weight > 0
            and former.colour != loaded.colour
            # Staging keeps nothing warm: its slot is stopped once the route has moved.
            and loaded.environment is Environment.PRODUCTION
        ),
    )
    return routes.change(
        loaded.environment, loaded.model, targets, actor=actor, reason=reason, expected=digest
    )


def move_back(routes: Routes, slots: Slots, route: Route, actor: str, reason: str) -> Route:
    """Gives all traffic back to what had it before, see `way_back`.

    What is taken off leaves the route, so that a rollback asked for twice, or repeated after
    a gateway that refused, does not bring it back.

    Args:
        route: the route that is to be undone.

    Raises:
        LifecycleOrderError: nothing is warm, or its slot holds something else.
        SlotError: its server does not answer now.
        RefConflictError: somebody changed the route since; theirs stands.
        GatewayError: the gateway did not take it.
    """
    previous = way_back(routes, route)
    if previous is None:
        raise nothing_warm(route)
    check_warm(slots, route, previous)
    target = previous.model_copy(update={"weight": 100})
    return _undo(routes, route, (target,), actor, reason)


def check_warm(slots: Slots, route: Route, previous: RouteTarget) -> None:
    """Checks that a slot on a route serves what the route says, so that traffic may go there.

    A slot that has traffic already is not asked whether it answers: under load it may be late.

    Raises:
        LifecycleOrderError: it holds something else.
        SlotError: its server does not answer, which may be over in a moment.
    """
    slot = Slot(route.environment, route.model, previous.colour)
    state = slots.state(slot)
    if state.deployment != deployment_of(previous):
        raise LifecycleOrderError(
            f"{previous.release} is not warm any more",
            expected=f"slot {slot} serving {previous.release}",
            found=state.deployment or "an empty slot",
            cure="choose a release that served before, which is loaded again: "
            f"`llmops route {route.model}` lists them; or `llmops promote {previous.release}`",
        )
    if previous.weight == 0 and not state.running:
        raise SlotError(
            f"{previous.release} is on the route and does not answer",
            expected=f"slot {slot} serving {previous.release}",
            found="a server that is not ready",
            cure="try again; `llmops up` starts a server that is gone, `llmops logs` tells why",
        )


def take_off(routes: Routes, route: Route, actor: str, reason: str) -> Route:
    """Leaves the model without traffic: for a release that must not serve, with none warm.

    Raises:
        RefConflictError: somebody changed the route since; theirs stands.
        GatewayError: the gateway did not take it.
    """
    return _undo(routes, route, (), actor, reason)


def warm(route: Route) -> RouteTarget | None:
    """What served before and still waits in its slot, without traffic."""
    return next((target for target in route.targets if target.weight == 0), None)


def way_back(routes: Routes, route: Route) -> RouteTarget | None:
    """The slot on the route that a rollback gives all traffic to; None where there is none.

    That is what is warm. Where several have traffic, as in a canary, it is the one that had
    all of it last.
    """
    busy = {deployment_of(target): target for target in route.targets if target.weight > 0}
    if len(busy) < 2:
        return warm(route)
    for _, earlier in routes.history(route.environment, route.model):
        serving = earlier.serving
        if serving is not None and serving.weight == 100:
            return busy.get(deployment_of(serving))
    return None


def nothing_warm(route: Route) -> LifecycleOrderError:
    """There is nothing that a rollback could give the traffic to at once."""
    return LifecycleOrderError(
        f"There is nothing to roll {route.model} back to",
        expected="an earlier release that is still warm on the route",
        found=f"generation {route.generation} without one",
        cure=f"`llmops rollback {route.model} --to RELEASE --reason WHY` loads one that served "
        f"before (`llmops route {route.model}` lists them); or `llmops promote RELEASE`",
    )


def deployment_of(target: RouteTarget) -> Deployment:
    """What a route's target names."""
    return Deployment(target.package, target.release, target.version)


def target_of(
    colour: Colour, deployment: Deployment, endpoint: Endpoint, weight: int
) -> RouteTarget:
    """A loaded slot as a route names it."""
    return RouteTarget(
        colour=colour,
        weight=weight,
        package=deployment.package,
        release=deployment.release,
        version=deployment.version,
        host=endpoint.host,
        http_port=endpoint.http_port,
        grpc_port=endpoint.grpc_port,
        metrics_port=endpoint.metrics_port,
    )


def _undo(
    routes: Routes, route: Route, targets: tuple[RouteTarget, ...], actor: str, reason: str
) -> Route:
    current, digest = routes.current(route.environment, route.model)
    return routes.change(
        route.environment,
        route.model,
        targets,
        actor=actor,
        reason=reason,
        # A route that is no longer the one to undo makes this a conflict.
        expected=digest if current == route else route.predecessor,
    )
