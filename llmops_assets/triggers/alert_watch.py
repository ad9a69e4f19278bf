"""One look at all alerts: what is new is acted on, what ended is closed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from pydantic import BaseModel, ConfigDict

from llmops_assets.errors import LLMOpsError
from llmops_assets.operate.alertmanager import Alert, Reading, active_alerts
from llmops_assets.operate.alerts import DAMPED, close, handle, matching, mover, resume
from llmops_assets.operate.incidents import Incident, IncidentBook
from llmops_assets.operate.objectives import Window, look
from llmops_assets.platform import Platform
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment
from llmops_assets.spec import AlertRule, ModelSpec

CLOSED_PER_LOOK = 100
"""Each costs a write; the next look goes on."""
URGENCY = ("rollback", "scale", "notify")


class Watched(BaseModel):
    """Alerts that fire and were looked at. What was done about them is in the incidents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    open: dict[str, str] = {}
    """Ids of those whose incident waits for an answer, with their model."""
    resting: dict[str, str] = {}
    """Of those whose rule rests: it acts when that is over and they still fire."""
    done: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """What came of one look.

    Attributes:
        incidents: of the alerts handled now; their jobs are to be run.
        problems: what could not be read or acted on, to be tried again.
        firing: how many alerts fire.
        listening: whether there was anything to listen to.
    """

    incidents: tuple[Incident, ...]
    problems: tuple[str, ...]
    watched: Watched
    windows: dict[str, Window]
    firing: int
    listening: bool


def look_at_alerts(
    platform: Platform, watched: Watched | None, windows: Mapping[str, Window], limit: int
) -> Look:
    """Acts on alerts that were not acted on. One model's trouble holds up no other's.

    Args:
        watched: what the last look left; None to begin with what the incidents say.
        windows: what the last look left.
        limit: of alerts handled now; the next look finds the rest.

    Raises:
        TriggerError: Alertmanager does not answer.
        EvidenceError: a recorded route is not what was signed.
    """
    routes = {
        model: route
        for model, route in platform.routes.all(Environment.PRODUCTION).items()
        if route.serving is not None
    }
    book = IncidentBook(platform.evidence)
    known = set() if watched is None else {*watched.open, *watched.done}
    work = _Work(platform, book, limit)
    # First, as it needs nobody's answer: these routes have moved.
    for route in routes.values():
        alert = mover(route)
        if alert is not None and alert not in known:
            work.resume(route, alert)

    specs = _Specs(platform)
    reading, following, listening = _read(platform, routes, specs, windows)
    wanted: list[tuple[AlertRule, Route, Alert]] = []
    for alert in reading.alerts:
        route = routes.get(alert.labels.get("model", ""))
        spec = None if route is None or alert.id in known else specs.of(route)
        if route is not None and spec is not None:
            rule = matching(alert, route, spec.alerts)
            if rule is not None:
                wanted.append((rule, route, alert))
    for rule, route, alert in sorted(wanted, key=lambda each: URGENCY.index(each[0].action)):
        work.handle(route, alert, rule)

    firing = {alert.id for alert in reading.alerts}
    waiting = _unanswered(book, routes) if watched is None else {**watched.open, **watched.resting}
    ended = [alert for alert in waiting if alert not in firing][:CLOSED_PER_LOOK]
    for alert in ended:
        close(book, waiting[alert], alert)
    movers = {alert for route in routes.values() if (alert := mover(route)) is not None}
    return Look(
        incidents=tuple(work.handled.values()),
        problems=(*reading.problems, *specs.problems, *work.problems),
        watched=_after(watched or Watched(), work.handled, set(ended), firing | movers),
        windows=following,
        firing=len(firing),
        listening=listening or bool(waiting) or bool(movers),
    )


class _Work:
    """What is done within one look."""

    def __init__(self, platform: Platform, book: IncidentBook, limit: int) -> None:
        self.handled: dict[str, Incident] = {}
        self.problems: list[str] = []
        self._platform = platform
        self._book = book
        self._limit = limit
        self._left: set[str] = set()
        """Models whose route is not as it was read, or that had trouble."""

    def resume(self, route: Route, alert: str) -> None:
        if len(self.handled) == self._limit:
            return
        try:
            self.handled[alert] = resume(self._platform, self._book, route, alert)
        except LLMOpsError as error:
            self._leave(route.model, error)

    def handle(self, route: Route, alert: Alert, rule: AlertRule) -> None:
        if len(self.handled) == self._limit or route.model in self._left:
            return
        before = self._book.of(route.model).get(alert.id)
        try:
            incident = handle(self._platform, self._book, route, alert, rule)
        except LLMOpsError as error:
            self._leave(route.model, error)
            return
        if incident is before and incident.action == DAMPED:
            return  # it rests on, and must not take another alert's place
        self.handled[alert.id] = incident
        if incident.job == "rollback":
            # What other alerts say of this route may hold no longer.
            self._left.add(route.model)

    def _leave(self, model: str, error: LLMOpsError) -> None:
        self.problems.append(f"{model}: {error}")
        self._left.add(model)


class _Specs:
    """Specs of what serves; one that cannot be read is a problem of its model alone."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._unreadable: dict[str, str] = {}

    def of(self, route: Route) -> ModelSpec | None:
        assert route.serving is not None
        if route.model in self._unreadable:
            return None
        try:
            return _frozen_spec(self._platform, route.serving.release)
        except LLMOpsError as error:
            self._unreadable[route.model] = f"{route.model}: {error}"
            return None

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(self._unreadable.values())


def _read(
    platform: Platform, routes: Mapping[str, Route], specs: _Specs, windows: Mapping[str, Window]
) -> tuple[Reading, dict[str, Window], bool]:
    """What fires, from Alertmanager or from the objectives of models with rules."""
    settings = platform.settings
    if settings.alertmanager_url is not None:
        reading = active_alerts(settings.alertmanager_url, settings.http_timeout_seconds)
        return reading, {}, True
    serving = {
        model: (route, spec.gates.service)
        for model, route in routes.items()
        if (spec := specs.of(route)) is not None and spec.alerts
    }
    return *look(platform.metrics, serving, windows), bool(serving)


def _unanswered(book: IncidentBook, routes: Mapping[str, Route]) -> dict[str, str]:
    """Alerts whose incidents are open, with their model."""
    return {
        alert: model
        for model in routes
        for alert, incident in book.of(model).items()
        if incident.answered is None
    }


def _after(
    before: Watched, handled: Mapping[str, Incident], ended: set[str], kept: set[str]
) -> Watched:
    """What to remember: alerts that fire, and those that made a route that stands."""
    incidents = handled.values()
    resting = {each: model for each, model in before.resting.items() if each not in handled} | {
        alert: each.model for alert, each in handled.items() if each.action == DAMPED
    }
    unanswered = before.open | {
        alert: each.model
        for alert, each in handled.items()
        if each.answered is None and each.action != DAMPED
    }
    done = {*before.done, *(str(each.id) for each in incidents if each.answered is not None)}
    return Watched(
        open={each: model for each, model in unanswered.items() if each not in ended},
        resting={each: model for each, model in resting.items() if each not in ended},
        done=tuple(sorted(done & kept)),
    )


@lru_cache(maxsize=2048)
def _frozen_spec(platform: Platform, release: str) -> ModelSpec:
    # What a release froze never changes, and it is asked for every few seconds.
    return platform.spec(release)
