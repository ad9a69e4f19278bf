"""Routes and incidents as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from llmops_assets.operate.incidents import Incident
from llmops_assets.operate.traffic import RouteView, Shares
from llmops_assets.serving.routes import Route

SHORT = len("sha256:") + 12
"""Characters of a digest that tell packages apart."""


def route_lines(view: RouteView) -> Iterator[str]:
    """A route with its slots, what served before, and what is not as recorded."""
    used = "the gateway uses it"
    if view.observed != view.generation:
        used = "the gateway uses " + (
            "none" if view.observed is None else f"generation {view.observed}"
        )
    yield f"{view.environment} {view.model}: generation {view.generation}, {used}"
    yield f"since {_time(view.since)} ({_age(view.since)}), by {view.actor}: {view.reason}"
    for slot in view.slots:
        share = "   -" if slot.weight is None else f"{slot.weight:>3}%"
        release = f"{slot.release} version {slot.version}" if slot.release else "empty"
        package = "" if slot.package is None else slot.package[:SHORT]
        yield f"  {slot.colour:<6} {share} {slot.state:<12} {release:<48} {package}".rstrip()
    for service in view.earlier:
        until = "now" if service.until is None else _time(service.until)
        release = f"{service.release} version {service.version}"
        yield f"  had all traffic: {release:<48} {_time(service.since)} to {until}"
    for difference in view.differences:
        yield f"drift: {difference}"


def share_lines(planned: Shares) -> Iterator[str]:
    """What setting shares changes."""
    route = planned.seen[0]
    before = {} if route is None else {t.release: t.weight for t in route.targets}
    for target in planned.targets:
        was = f"{before[target.release]} %" if target.release in before else "not on the route"
        yield f"{target.release} (version {target.version}): {was} -> {target.weight} %"
    for release in planned.dropped:
        yield f"{release}: leaves the route, as its slot does not serve it any more"


def changed_line(route: Route) -> str:
    """A route that the gateway has just taken."""
    shares = ", ".join(f"{target.release} {target.weight} %" for target in route.targets)
    return f"generation {route.generation}, acknowledged by the gateway: {shares or 'no traffic'}"


def incident_lines(incident: Incident) -> Iterator[str]:
    """An incident with its times and notes."""
    state = "open" if incident.answered is None else "closed"
    yield f"{incident.id}  {state}  {incident.release}: {incident.what}"
    times = {
        "began": incident.began,
        "detected": incident.detected,
        "decided": incident.decided,
        "restored": incident.restored,
        "answered": incident.answered,
    }
    yield "    " + ", ".join(f"{name} {_time(time)}" for name, time in times.items() if time)
    seconds = {
        "to detect": incident.seconds_to_detect,
        "to decide": incident.seconds_to_decide,
        "to restore": incident.seconds_to_restore,
    }
    if known := [f"{name} {s:.1f} s" for name, s in seconds.items() if s is not None]:
        yield "    " + ", ".join(known)
    yield f"    {incident.action or 'nothing done yet'}, by {incident.actor or 'nobody'}"
    for note in incident.notes:
        yield f"    {_time(note.time)} {note.actor}: {note.text}"


def incident_json(incident: Incident) -> dict[str, object]:
    """An incident as a JSON object, with its durations in seconds."""
    return {
        **incident.model_dump(mode="json"),
        "seconds_to_detect": incident.seconds_to_detect,
        "seconds_to_decide": incident.seconds_to_decide,
        "seconds_to_restore": incident.seconds_to_restore,
    }


def _time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%F %T} UTC"


def _age(time: datetime) -> str:
    minutes = int((datetime.now(UTC) - time).total_seconds() // 60)
    if minutes < 120:
        return f"{minutes} min ago"
    return f"{minutes // 60} h ago" if minutes < 48 * 60 else f"{minutes // (24 * 60)} days ago"
