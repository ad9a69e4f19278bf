"""Production's and staging's routes for people: what they are, and shares set by hand.

`llmops route`. Shares are set only between releases that are loaded, verified, approved and
not revoked, and only against the route that the person saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from llmops_assets.deploy.approval import check_still_approved
from llmops_assets.deploy.delivery import Seen, deployment_of, target_of
from llmops_assets.deploy.revocation import check_not_revoked
from llmops_assets.errors import (
    ArtifactCorruptError,
    GateRefusedError,
    GatewayError,
    LifecycleOrderError,
)
from llmops_assets.evidence.gates import BUILT, CANARY, PROVEN
from llmops_assets.operate.rollback import services
from llmops_assets.platform import Platform
from llmops_assets.serving.reconciliation import Difference, differences
from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.serving.slots import Colour, Deployment, Environment, Slot, SlotState

EARLIER = 10
"""So many releases that served before are shown."""


class SlotOnRoute(BaseModel):
    """A slot of a model, and what its place on the route is."""

    model_config = ConfigDict(frozen=True)

    colour: Colour
    release: str | None
    """None for an empty slot."""
    version: int | None
    package: str | None
    weight: int | None
    """Share of the traffic, per cent; None for what is loaded and not on the route."""
    running: bool

    @property
    def state(self) -> str:
        """In a word."""
        if self.weight:
            return "serving" if self.running else "NOT RUNNING"
        if self.weight == 0:
            return "warm" if self.running else "not running"
        return "loaded" if self.running else "stopped"


class Earlier(BaseModel):
    """A time in which a release had all of the traffic."""

    model_config = ConfigDict(frozen=True)

    release: str
    version: int
    since: datetime
    until: datetime | None


class RouteView(BaseModel):
    """A route with everything that belongs to it."""

    model_config = ConfigDict(frozen=True)

    environment: Environment
    model: str
    generation: int
    observed: int | None
    """The generation that the gateway uses; None where it has none, or does not answer."""
    since: datetime
    actor: str
    reason: str
    slots: tuple[SlotOnRoute, ...]
    earlier: tuple[Earlier, ...]
    """Newest first."""
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Shares:
    """Shares of traffic that may be set."""

    seen: Seen
    """The route as it was looked at."""
    targets: tuple[RouteTarget, ...]
    dropped: tuple[str, ...]
    """Releases that leave the route, as their slot does not serve them any more."""


def view(platform: Platform, environment: Environment, model: str, *, deep: bool) -> RouteView:
    """A model's route, its slots, and what is not as recorded.

    Args:
        platform: where.
        environment: whose route.
        model: its name.
        deep: also reads every byte in the slots of the environment.

    Raises:
        LifecycleOrderError: the model never had a route there.
        EvidenceError: the record is missing, changed, or not signed.
    """
    route = required_route(platform, environment, model)[0]
    try:
        observed = platform.gateway.applied(environment).get(model)
    except GatewayError:  # which is among the differences
        observed = None
    found = differences(platform.routes, platform.gateway, platform.slots, environment, deep=deep)
    return RouteView(
        environment=environment,
        model=model,
        generation=route.generation,
        observed=observed,
        since=route.time,
        actor=route.actor,
        reason=route.reason,
        slots=_slots(platform, route),
        earlier=tuple(
            Earlier(
                release=service.deployment.release,
                version=service.deployment.version,
                since=service.since,
                until=service.until,
            )
            for service in services(platform.routes, environment, model)[:EARLIER]
        ),
        differences=tuple(each for each in found if each.model in (None, model)),
    )


def required_route(
    platform: Platform, environment: Environment, model: str
) -> tuple[Route, str | None]:
    """The recorded route and its entry's digest.

    Raises:
        LifecycleOrderError: there is none.
    """
    route, digest = platform.routes.current(environment, model)
    if route is None:
        known = ", ".join(platform.routes.all(environment)) or "none yet"
        raise LifecycleOrderError(
            f"{model} never had a route in {environment}",
            expected=f"one of the models there: {known}",
            cure="check the name; or promote a release: `llmops promote RELEASE`",
        )
    return route, digest


def plan_shares(
    platform: Platform, environment: Environment, model: str, shares: Mapping[str, int]
) -> Shares:
    """Checks everything that forbids these shares, against the route as it is now.

    What is warm and not named stays warm.

    Args:
        platform: where.
        environment: whose route.
        model: its name.
        shares: per cent by release; they add up to 100.

    Raises:
        LifecycleOrderError: the shares do not add up, or a release is not loaded here or
            deprecated, or nothing would change.
        GateRefusedError: a release did not pass its gates with these bytes.
        ApprovalError: it is not approved, or was revoked.
        ArtifactCorruptError: the bytes in its slot are not the signed ones.
    """
    route, digest = required_route(platform, environment, model)
    total = sum(shares.values())
    if total != 100 or any(not 0 <= share <= 100 for share in shares.values()):
        raise LifecycleOrderError(
            "The shares do not add up",
            expected="each from 0 to 100, and 100 together",
            found=f"{total} together: {_words(shares)}",
            cure=f"llmops route {model} --set RELEASE=WEIGHT [--set RELEASE=WEIGHT] --reason WHY",
        )
    states = {
        state.deployment.release: state
        for state in platform.slots.slots(environment, model)
        if state.deployment is not None
    }
    routed = {deployment_of(target) for target in route.targets}
    for release, share in shares.items():
        state = _loaded(model, release, states)
        # Warm is a way back, and a rollback asks less.
        if share > 0 or state.deployment not in routed:
            _check_may_serve(platform, state, environment)
    kept = [target for target in route.targets if target.release not in shares]
    serves = {state.deployment for state in states.values() if state.running and state.deployment}
    warm = [t.model_copy(update={"weight": 0}) for t in kept if deployment_of(t) in serves]
    set_now = [_target(states[release], share) for release, share in shares.items()]
    targets = tuple(sorted([*set_now, *warm], key=lambda target: -target.weight))
    if sorted(targets, key=str) == sorted(route.targets, key=str):
        raise LifecycleOrderError(
            f"The route of {model} has these shares already",
            expected="other ones",
            found=f"generation {route.generation}",
            cure=f"nothing; `llmops route {model}` shows it",
        )
    dropped = tuple(t.release for t in kept if deployment_of(t) not in serves)
    return Shares(seen=(route, digest), targets=targets, dropped=dropped)


def set_shares(platform: Platform, planned: Shares, actor: str, reason: str) -> Route:
    """Sets what was planned.

    Raises:
        RefConflictError: somebody else changed the route since it was looked at.
        GatewayError: the gateway did not take it.
        EvidenceError: the change cannot be signed; nothing happened.
    """
    route, digest = planned.seen
    assert route is not None  # or nothing was planned
    return platform.routes.change(
        route.environment,
        route.model,
        planned.targets,
        actor=actor,
        reason=reason,
        expected=digest,
    )


def _slots(platform: Platform, route: Route) -> tuple[SlotOnRoute, ...]:
    """Every slot of the model, with its place on the route where it has one."""
    states = {
        state.slot.colour: state for state in platform.slots.slots(route.environment, route.model)
    }
    targets = {target.colour: target for target in route.targets}
    found: list[SlotOnRoute] = []
    for colour in Colour:
        target, state = targets.get(colour), states.get(colour)
        held = None if state is None else state.deployment
        if target is None and held is None:
            continue
        named = held if target is None else deployment_of(target)
        found.append(
            SlotOnRoute(
                colour=colour,
                release=None if named is None else named.release,
                version=None if named is None else named.version,
                package=None if named is None else named.package,
                weight=None if target is None else target.weight,
                running=state is not None and state.running and held == named,
            )
        )
    return tuple(found)


def _loaded(model: str, release: str, states: Mapping[str, SlotState]) -> SlotState:
    state = states.get(release)
    if state is None or not state.running or state.endpoint is None:
        loaded = [name for name, each in states.items() if each.running]
        raise LifecycleOrderError(
            f"{release} is not loaded in a slot of {model}",
            expected="a release that is loaded: " + (", ".join(loaded) or "none is"),
            found="a slot that does not answer" if state is not None else "no slot with it",
            cure=f"`llmops promote {release}`; or, if it served before, "
            f"`llmops rollback {model} --to {release} --reason WHY`",
        )
    return state


def _check_may_serve(platform: Platform, state: SlotState, environment: Environment) -> None:
    assert state.deployment is not None  # as `_loaded` saw
    release = state.deployment.release
    if platform.columns.find(release, "deprecated_version") is not None:
        raise LifecycleOrderError(
            f"{release} is deprecated and takes no traffic any more",
            expected="a release that was not deprecated",
            cure="choose another one, or make a new release of the same spec",
        )
    column = platform.column(release)
    published = column["packaged_model"].digest if "packaged_model" in column else "none"
    if published != state.deployment.package:
        raise GateRefusedError(
            f"Slot {state.slot} holds another package than {release} published",
            expected=published,
            found=state.deployment.package,
            cure=f"llmops promote {release}",
        )
    if environment is Environment.STAGING:
        platform.require(release, BUILT, column)
    else:
        check_not_revoked(platform.evidence, release)
        if _served_fully(platform, state):
            # What it was compared with when it came is history, and its approval was for
            # that deployment; a release serves for longer than an approval counts.
            platform.require(release, [*(g for g in PROVEN if not g.compares), CANARY], column)
        else:
            platform.require(release, PROVEN, column)
            check_still_approved(platform, release)
    if (damage := platform.slots.inspect(state.slot).damage) is not None:
        raise ArtifactCorruptError(
            f"The bytes in slot {state.slot} are not those of {release}",
            expected=f"package {state.deployment.package}",
            found=damage,
            cure=f"llmops promote {release}",
        )


def _served_fully(platform: Platform, state: SlotState) -> bool:
    slot: Slot = state.slot
    earlier = services(platform.routes, slot.environment, slot.model)
    return any(service.deployment == state.deployment for service in earlier)


def _target(state: SlotState, weight: int) -> RouteTarget:
    deployment: Deployment | None = state.deployment
    assert deployment is not None and state.endpoint is not None  # as `_loaded` saw
    return target_of(state.slot.colour, deployment, state.endpoint, weight)


def _words(shares: Mapping[str, int]) -> str:
    return ", ".join(f"{release}={share}" for release, share in shares.items())
