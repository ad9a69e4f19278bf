"""Rollback: production's traffic goes back to a release that served before.

The command, the job and the alert trigger go this way, and no other. To a release that is
still warm it moves the route and waits for nothing. To one that is not, it loads the package
from the store first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from llmops_assets.deploy.delivery import (
    check_warm,
    deployment_of,
    load,
    move_back,
    nothing_warm,
    target_of,
    way_back,
)
from llmops_assets.deploy.revocation import (
    check_not_revoked,
    last_revocation,
    revoke_unless_revoked,
)
from llmops_assets.deploy.smoke import ask_known, judge_smoke, server_problem
from llmops_assets.errors import (
    GateRefusedError,
    GatewayError,
    LifecycleOrderError,
    RefConflictError,
    SlotError,
)
from llmops_assets.evidence.gates import CANARY
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.results import AttestedResults
from llmops_assets.evidence.statements import GATE_VERDICT
from llmops_assets.evidence.statistics import Decision
from llmops_assets.operate.incidents import (
    ROLLBACK_ID,
    Incident,
    incidents_of_model,
    report_incident,
)
from llmops_assets.platform import Platform
from llmops_assets.serving.package_description import read_package
from llmops_assets.serving.routes import Route, Routes, RouteTarget
from llmops_assets.serving.slots import Colour, Deployment, Environment
from llmops_assets.toolchains import toolchain_for

ALERT = "alert "
"""What the actor of a route begins with that an alert moved; its id follows."""
LATEST_ROUTES = 50
"""Among so many an alert's own is looked for; it acts within seconds of its first sight."""

OnStep = Callable[[str], None]


@dataclass(frozen=True)
class Service:
    """A time in which a release had all of production's traffic."""

    deployment: Deployment
    since: datetime
    until: datetime | None
    """None while it lasts."""


@dataclass(frozen=True)
class Plan:
    """What a rollback would do, as of the route that it looked at."""

    route: Route
    taken_off: RouteTarget
    """What loses the traffic."""
    to: Deployment
    """What gets it."""
    warm: bool
    """Whether it is loaded already; otherwise it is loaded from the store first."""
    load_seconds: float | None
    """How long loading took when it was a candidate; None if it is warm, or nobody knows."""


@dataclass(frozen=True)
class Rollback:
    """What a rollback did."""

    route: Route
    """The new route; the same one where it was only applied to a gateway that lagged behind."""
    acknowledged: datetime
    """When the gateway reported that it uses the route."""


def roll_back(
    platform: Platform,
    model: str,
    actor: str,
    reason: str,
    to: str | None = None,
    on_step: OnStep = lambda step: None,
) -> Rollback:
    """Gives production's traffic to a release that served before, and records why.

    Repeated after a gateway that did not take it, or after it was killed, it applies the route
    recorded then, and records the incident that is missing.

    Args:
        platform: where.
        model: its name.
        actor: who asks for it.
        reason: why, for the record.
        to: key or version of a release that served fully; None for the one that is warm.
        on_step: told in a few words what is being waited for.

    Raises:
        LifecycleOrderError: no earlier release is warm, or its slot does not serve it; or
            `to` never served fully, serves already, or was deprecated.
        GateRefusedError: the earlier release never served fully.
        ApprovalError: it was taken off or rejected since.
        RefConflictError: somebody else changed the route meanwhile.
        SlotError: the server of the warm one does not answer now.
        SlotError, ArtifactCorruptError: it could not be loaded again.
        GatewayError: the gateway did not take it.
    """
    detected = datetime.now(UTC)
    route = serving_route(platform, model)
    if to is None and _finish(platform, route):
        return Rollback(route, datetime.now(UTC))
    changed = take_back(platform, route, actor, reason, to, on_step)
    acknowledged = datetime.now(UTC)
    if changed != route:
        incident = _incident(changed, taken_off(route, changed), detected, acknowledged)
        report_incident(platform.evidence, incident)
    return Rollback(changed, acknowledged)


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


def plan(platform: Platform, route: Route, to: str | None = None) -> Plan:
    """What a rollback of this route does, once everything was checked that forbids it.

    Raises:
        LifecycleOrderError, GateRefusedError, ApprovalError, SlotError: as `roll_back`.
    """
    previous = way_back(platform.routes, route)
    if to is None:
        if previous is None:
            raise nothing_warm(route)
        good = deployment_of(previous)
    else:
        good = _named(platform.routes, route, to)
    check_may_return(platform, good)
    busy = [target for target in route.targets if target.weight and deployment_of(target) != good]
    if not busy:
        raise LifecycleOrderError(
            f"{good.release} serves {route.model} already",
            expected="a release that served before",
            found=f"generation {route.generation}, which gives it all traffic",
            cure=f"choose another one: `llmops route {route.model}` lists them",
        )
    warm = previous is not None and deployment_of(previous) == good
    if previous is not None and warm:
        check_warm(platform.slots, route, previous)
    if not warm and {target.colour for target in busy} == set(Colour):
        raise LifecycleOrderError(
            f"There is no idle slot to load {good.release} into",
            expected="a slot without traffic",
            found=f"generation {route.generation}, which gives traffic to both",
            cure=f"`llmops rollback {route.model} --reason WHY` first, which needs no slot; "
            "then this command again",
        )
    candidate = None if warm else platform.columns.find(good.release, "production_candidate")
    seconds = None if candidate is None else candidate.facts.get("load_seconds")
    return Plan(
        route=route,
        taken_off=max(busy, key=lambda target: target.weight),
        to=good,
        warm=warm,
        load_seconds=None if seconds is None else float(seconds),
    )


def take_back(
    platform: Platform,
    route: Route,
    actor: str,
    reason: str,
    to: str | None = None,
    on_step: OnStep = lambda step: None,
) -> Route:
    """Undoes a route, and revokes what it takes off. The caller records the incident.

    Returns:
        The new route; the same one where it was only applied to a gateway that lagged behind.

    Raises:
        LifecycleOrderError, GateRefusedError, ApprovalError, RefConflictError, SlotError,
        ArtifactCorruptError, GatewayError: as `roll_back`.
    """
    current, _ = platform.routes.current(route.environment, route.model)
    if current != route:
        raise _conflict(route, current)
    if to is None and way_back(platform.routes, route) is None and enforce(platform, route):
        return route
    planned = plan(platform, route, to)
    if planned.warm:
        _revoke(platform, planned, actor, reason)
        return move_back(platform.routes, platform.slots, route, actor, reason)
    return _redeploy(platform, planned, actor, reason, on_step)


def check_may_return(platform: Platform, deployment: Deployment) -> None:
    """Checks that a release served fully with these bytes, and that nobody took it out since.

    Signed statements decide, as they are: neither an upgrade of the platform nor a damaged store
    takes a way back away, or brings one.

    Raises:
        GateRefusedError: its canary did not pass with these bytes.
        ApprovalError: it was taken off or rejected since.
        LifecycleOrderError: it was deprecated.
    """
    release = deployment.release
    if "deprecated_version" in AttestedResults(platform.evidence).results(release):
        raise LifecycleOrderError(
            f"{release} is deprecated and takes no traffic any more",
            expected="a release that was not deprecated",
            cure="choose another one, or make a new release of the same spec",
        )
    _check_canary(platform, deployment)
    check_not_revoked(platform.evidence, release)


def services(routes: Routes, environment: Environment, model: str) -> list[Service]:
    """Which releases had all the traffic, and when, newest first; each once for each time.

    Raises:
        EvidenceError: the history is not what it was.
    """
    found: list[Service] = []
    until: datetime | None = None
    for _, route in routes.history(environment, model):
        full = route.serving
        if full is not None and full.weight == 100:
            deployment = deployment_of(full)
            if found and found[-1].deployment == deployment and found[-1].since == until:
                # Only what was warm beside it changed.
                found[-1] = Service(deployment, route.time, found[-1].until)
            else:
                found.append(Service(deployment, route.time, until))
        until = route.time
    return found


def taken_off(before: Route, after: Route) -> RouteTarget | None:
    """What lost its traffic between two routes; of several, what had most."""
    kept = {deployment_of(target) for target in after.targets if target.weight > 0}
    lost = [t for t in before.targets if t.weight > 0 and deployment_of(t) not in kept]
    return max(lost, key=lambda target: target.weight, default=None)


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


def _finish(platform: Platform, route: Route) -> bool:
    """Does what is left of the rollback that made a route.

    Returns:
        Whether anything was left.

    Raises:
        GatewayError: the gateway does not answer, or refuses the route.
    """
    if way_back(platform.routes, route) is not None:
        return False
    behind = enforce(platform, route)
    bad = _unreported(platform, route)
    if bad is not None:
        report_incident(platform.evidence, _incident(route, bad, route.time, datetime.now(UTC)))
    return behind or bad is not None


def _unreported(platform: Platform, route: Route) -> RouteTarget | None:
    """What the rollback that made a route took off, if no incident tells of it."""
    if route.actor.startswith(ALERT):
        return None  # whoever looks at alerts finishes these
    before = next(
        (
            earlier
            for _, earlier in platform.routes.history(route.environment, route.model)
            if earlier.generation == route.generation - 1
        ),
        None,
    )
    bad = None if before is None else taken_off(before, route)
    revoked = None if bad is None else last_revocation(platform.evidence, bad.release)
    if before is None or revoked is None or not before.time <= revoked.time <= route.time:
        return None  # no rollback: that revokes right before it moves
    told = incidents_of_model(platform.evidence, route.model)
    # Also told by an alert that finished it, under its own id.
    return None if any(each.decided == route.time for each in told) else bad


def _incident(
    route: Route, bad: RouteTarget | None, detected: datetime, acknowledged: datetime
) -> Incident:
    """The incident that a route answers which a person moved."""
    return Incident(
        id=f"{ROLLBACK_ID}{route.model}-{route.generation}",
        model=route.model,
        release="nothing" if bad is None else bad.release,
        what=route.reason,
        action=f"rolled back to {route.serving.release}" if route.serving else None,
        actor=route.actor,
        detected=detected,
        decided=route.time,
        restored=acknowledged,
        answered=acknowledged,
    )


def _revoke(platform: Platform, planned: Plan, actor: str, reason: str) -> None:
    """Revokes what is to be taken off, right before its traffic goes.

    Before: killed in between, a release that is to go must not be deployed again as approved.

    Raises:
        GatewayError: the gateway does not answer; nothing was revoked.
    """
    platform.gateway.applied(planned.route.environment)
    bad = planned.taken_off
    revoke_unless_revoked(platform, bad.release, actor, reason, bad.package)


def _check_canary(platform: Platform, deployment: Deployment) -> None:
    """Checks the newest verdict of the release's canary, whatever policy it was made under.

    Raises:
        GateRefusedError: there is none, it did not pass, or is about another package.
    """
    said = (
        entry.statement.predicate
        for entry in platform.evidence.entries(
            release_chain(deployment.release), GATE_VERDICT, newest_first=True
        )
    )
    verdict = next(
        (v for v in said if (v["gate"], v["release"]) == (CANARY.name, deployment.release)), None
    )
    if verdict is None:
        found = "no verdict"
    elif verdict["subjects"].get("packaged_model") != deployment.package:
        found = f"a verdict about {verdict['subjects'].get('packaged_model')}"
    elif verdict["decision"] != Decision.PASSED:
        found = f"{verdict['decision']}: {verdict['reason']}"
    else:
        return
    raise GateRefusedError(
        f"{deployment.release} may not serve again",
        expected=f"a canary that passed with package {deployment.package}",
        found=f"{CANARY.name}: {found}",
        cure=f"choose another release, or put it through its gates: "
        f"`llmops promote {deployment.release}`",
    )


def _named(routes: Routes, route: Route, name: str) -> Deployment:
    """The deployment that a key or a version means, among those that had all the traffic.

    Raises:
        LifecycleOrderError: none of them is meant.
    """
    served = services(routes, route.environment, route.model)
    version = name.removeprefix("v")
    for service in served:
        deployment = service.deployment
        if name == deployment.release or version == str(deployment.version):
            return deployment
    known = dict.fromkeys(
        f"{s.deployment.release} (version {s.deployment.version})" for s in served
    )
    raise LifecycleOrderError(
        f"{name} never had all of the traffic of {route.model}",
        expected="key or version of a release that served fully before",
        found=", ".join(known) or "none that did",
        cure=f"choose one of these, or put {name} through its gates: `llmops promote RELEASE`",
    )


def _redeploy(platform: Platform, planned: Plan, actor: str, reason: str, on_step: OnStep) -> Route:
    """Loads a release into the idle slot, asks it what is known, and gives it all traffic.

    Raises:
        SlotError: it does not load, or does not answer as it should; nothing has moved.
        ArtifactCorruptError: its bytes are not what was signed.
        RefConflictError: somebody else changed the route meanwhile.
        GatewayError: the gateway did not take the change.
    """
    route, deployment = planned.route, planned.to
    usual = (
        "" if planned.load_seconds is None else f"; the last time took {planned.load_seconds:.0f} s"
    )
    on_step(f"{deployment.release} is not warm: loading it from the store{usual}")
    package, directory = platform.store.open(deployment.package)
    description = read_package(directory)
    slot, endpoint = load(
        platform.slots, platform.routes, route.environment, route.model, package, description,
        deployment, actor,
    )  # fmt: skip
    on_step("asking it the known questions")
    spec = platform.spec(deployment.release)
    timeout_seconds = platform.settings.http_timeout_seconds
    answers = ask_known(spec, endpoint, description.asked, timeout_seconds)
    toolchain = toolchain_for(spec.engine, platform.settings)
    problem = server_problem(toolchain, directory, endpoint, timeout_seconds)
    judged = judge_smoke(answers, spec.gates.smoke, deployment.version, problem)
    if not judged.passed:
        raise SlotError(
            f"{deployment.release} does not answer well any more; the traffic stays where it is",
            expected="the known answers",
            found=judged.reason,
            cure=f"read the log of {slot}: `llmops logs`; choose another release",
        )
    # To make room, what was warm in the slot left the route, and nothing else may have changed.
    current, digest = platform.routes.current(route.environment, route.model)
    if current is None or _busy(current) != _busy(route):
        raise _conflict(route, current)
    _revoke(platform, planned, actor, reason)
    target = target_of(slot.colour, deployment, endpoint, 100)
    return platform.routes.change(
        route.environment, route.model, (target,), actor=actor, reason=reason, expected=digest
    )


def _busy(route: Route) -> list[RouteTarget]:
    return [target for target in route.targets if target.weight > 0]


def _conflict(expected: Route, found: Route | None) -> RefConflictError:
    return RefConflictError(
        f"Somebody else changed the {expected.environment} route of {expected.model}",
        expected=f"generation {expected.generation}",
        found="no route"
        if found is None
        else f"generation {found.generation} by {found.actor} ({found.reason})",
        cure="look at the route as it is now and decide anew",
    )
