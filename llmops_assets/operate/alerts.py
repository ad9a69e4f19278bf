"""What is done about an alert: which rule decides, and that each alert acts once.

Two records tell that an alert was acted on: the route, whose actor names the alert that
moved it, and the model's incidents. The route moves first; whoever dies between the two
leaves a route that names the alert, and the incident is written after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from llmops_assets.deploy.delivery import way_back
from llmops_assets.errors import (
    ApprovalError,
    ArtifactCorruptError,
    GateRefusedError,
    LifecycleOrderError,
    SpecError,
)
from llmops_assets.operate.alertmanager import Alert
from llmops_assets.operate.incidents import Incident, IncidentBook
from llmops_assets.operate.rollback import ALERT, enforce, moved_by, take_back, taken_off
from llmops_assets.platform import Platform
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment
from llmops_assets.spec import AlertRule, canonical
from llmops_assets.storage.store import canonical_json

DAMPED = "nothing: the rule acted a short time ago"
ENDED = "nothing: the alert ended, or somebody silenced it"


def matching(alert: Alert, route: Route, rules: Iterable[AlertRule]) -> AlertRule | None:
    """The first rule that an alert matches, if it is about what this route serves.

    An alert that names another model, environment or release is somebody else's.
    """
    if route.serving is None or alert.labels.get("model") != route.model:
        return None
    if alert.labels.get("environment", str(route.environment)) != str(route.environment):
        return None
    serve = {target.release for target in route.targets if target.weight > 0}
    if alert.labels.get("release", route.serving.release) not in serve:
        return None
    return next((rule for rule in rules if rule.match.items() <= alert.labels.items()), None)


def name_of(rule: AlertRule) -> str:
    """A rule's name in incidents: its action and what it matches."""
    return f"{rule.action} {canonical_json(canonical(rule)['match']).decode()}"


def mover(route: Route) -> str | None:
    """Id of the alert that made a route; None where something else did."""
    return route.actor.removeprefix(ALERT) if route.actor.startswith(ALERT) else None


def handle(
    platform: Platform, book: IncidentBook, route: Route, alert: Alert, rule: AlertRule
) -> Incident:
    """Does what the rule says about an alert, unless that was done before.

    Returns:
        What stands about the alert; its action is `DAMPED` while the rule rests, and asking
        again acts once that is over.

    Raises:
        RefConflictError: somebody changed the route meanwhile; decide anew.
        GatewayError: the gateway did not take the route.
    """
    known = book.of(route.model).get(alert.id)
    if known is not None and known.action == ENDED:
        # It was only out of sight, as after a restart of Alertmanager.
        return book.report(known.model_copy(update={"action": None, "answered": None}))
    if known is not None and known.action != DAMPED:
        return known
    moved = moved_by(platform.routes, route.model, ALERT + alert.id)
    if moved is not None:
        done = _rolled_back(platform, moved, alert.id, alert.summary)
        return book.report(done.model_copy(update=_of_alert(alert, rule)))
    if _rests(rule, book.of(route.model).values()):
        if known is not None and known.answered is None:
            return known
        return book.report(_incident(route, alert, rule, action=DAMPED))
    if rule.action == "rollback":
        return book.report(_roll_back(platform, route, alert, rule))
    if rule.action == "scale":
        now = datetime.now(UTC)
        asked = _incident(route, alert, rule, action="asked for a run of scale", answered=now)
        return book.report(asked.model_copy(update={"job": "scale", "decided": now}))
    return book.report(_incident(route, alert, rule).model_copy(update={"job": "observe"}))


def resume(platform: Platform, book: IncidentBook, route: Route, alert: str) -> Incident:
    """Finishes what the alert with this id began by making this route.

    Its rule went with the release that it took off, so the route itself is asked.

    Raises:
        GatewayError: the gateway uses another route, and does not take this one.
    """
    enforce(platform, route)
    known = book.of(route.model).get(alert)
    return known or book.report(_rolled_back(platform, route, alert, route.reason))


def close(book: IncidentBook, model: str, alert: str) -> None:
    """Answers the incident of an alert that fires no longer."""
    incident = book.of(model).get(alert)
    if incident is not None and incident.answered is None:
        answer = {"action": incident.action or ENDED, "answered": datetime.now(UTC)}
        book.report(incident.model_copy(update=answer))


def _roll_back(platform: Platform, route: Route, alert: Alert, rule: AlertRule) -> Incident:
    detected = datetime.now(UTC)
    previous = way_back(platform.routes, route)
    if previous is not None and previous.release == alert.labels.get("release"):
        what = f"{alert.summary}; not rolled back: {previous.release} would get all traffic"
        incident = _incident(route, alert, rule, what=what)
        return incident.model_copy(update={"job": "observe"})
    try:
        moved = take_back(platform, route, ALERT + alert.id, alert.summary)
    except (
        ApprovalError,
        ArtifactCorruptError,
        GateRefusedError,
        LifecycleOrderError,
        SpecError,
    ) as error:
        # Asking again would change nothing: a person has to look.
        incident = _incident(route, alert, rule, what=f"{alert.summary}; not rolled back: {error}")
        return incident.model_copy(update={"job": "observe"})
    done = _rolled_back(platform, moved, alert.id, alert.summary)
    return done.model_copy(update=_of_alert(alert, rule) | {"detected": detected})


def _rests(rule: AlertRule, earlier: Iterable[Incident]) -> bool:
    """Whether the rule acted within its damping time. A time in the future counts for nothing."""
    now = datetime.now(UTC)
    name = name_of(rule)
    return any(
        timedelta() <= now - incident.answered < timedelta(seconds=rule.damping_seconds)
        for incident in earlier
        if incident.rule == name
        and incident.answered is not None
        and incident.action not in (None, DAMPED, ENDED)
    )


def _incident(
    route: Route,
    alert: Alert,
    rule: AlertRule,
    *,
    what: str | None = None,
    action: str | None = None,
    answered: datetime | None = None,
) -> Incident:
    assert route.serving is not None  # or no rule would match
    return Incident(
        id=alert.id,
        rule=name_of(rule),
        model=route.model,
        release=alert.labels.get("release", route.serving.release),
        what=what or alert.summary,
        action=action,
        actor=ALERT + alert.id,
        began=alert.starts_at,
        detected=datetime.now(UTC),
        answered=answered,
    )


def _of_alert(alert: Alert, rule: AlertRule) -> dict[str, object]:
    """What an incident has of its alert, and of the rule that decided."""
    return {"rule": name_of(rule), "began": alert.starts_at}


def _rolled_back(platform: Platform, moved: Route, alert: str, what: str) -> Incident:
    """The incident of an alert that is answered by this route."""
    history = platform.routes.history(Environment.PRODUCTION, moved.model)
    before = next((r for _, r in history if r.generation == moved.generation - 1), None)
    bad = None if before is None else taken_off(before, moved)
    now = datetime.now(UTC)
    return Incident(
        id=alert,
        model=moved.model,
        release="nothing" if bad is None else bad.release,
        what=what,
        action=f"rolled back to {moved.serving.release}" if moved.serving else "took it off",
        # Another one where the route was moved before and the gateway only lagged behind.
        actor=moved.actor,
        job="rollback",
        detected=moved.time,
        decided=moved.time,
        restored=now,
        answered=now,
    )
