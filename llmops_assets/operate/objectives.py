"""Breached service objectives, as alerts: what takes Alertmanager's place where there is none.

Only the share of failed requests is looked at. The gateway's latency quantiles are over all
requests since a version came on the route, so they cannot say that it is slow now.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import AwareDatetime, BaseModel, ConfigDict

from llmops_assets.operate.alertmanager import Alert, AlertStatus, Reading
from llmops_assets.serving.metrics import Metrics, ServiceSample
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment
from llmops_assets.spec import ServiceGate
from llmops_assets.storage.store import canonical_json, digest_of

ALERT_NAME = "ServiceObjectiveBreached"
OBJECTIVE = "error_rate"
WINDOW_SECONDS = 30.0
FEWEST_REQUESTS = 20
"""A window lasts until there are so many: below that one failure would decide."""
CONFIDENCE = 0.99998
"""Of the interval. There are 2,880 windows a day, and a false alarm costs a rollback."""

Counts = Mapping[str, tuple[int, int]]
"""By source: failed requests, all requests."""


class Window(BaseModel):
    """Counters at the beginning of what is looked at, and what the window before showed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: int
    began: AwareDatetime
    counts: dict[str, tuple[int, int]]
    breached: bool = False


def look(
    metrics: Metrics,
    serving: Mapping[str, tuple[Route, ServiceGate]],
    windows: Mapping[str, Window],
) -> tuple[Reading, dict[str, Window]]:
    """Which objectives are breached now.

    Args:
        serving: by model, its route in production and its objectives.
        windows: what the last look returned.

    Returns:
        An alert for each model whose last full window was bad, and the windows to go on with.
    """
    alerts: list[Alert] = []
    problems: list[str] = []
    following: dict[str, Window] = {}
    for model, (route, gate) in serving.items():
        sample = metrics.sample(Environment.PRODUCTION, model)
        counts = _counts(sample)
        if not counts and sample.missing:
            # A source alone may be away; with both gone nobody knows whether it serves.
            problems.append(f"{model}: " + "; ".join(sample.missing))
        window = windows.get(model)
        # The route may have moved since it was read; the next look sees that.
        if counts and sample.generation == route.generation:
            window = _next(window, route.generation, sample, counts, gate)
        if window is None:
            continue
        following[model] = window
        if window.breached and window.generation == route.generation:
            alerts.append(_alert(route, gate))
    return Reading(tuple(alerts), tuple(problems)), following


def _next(
    window: Window | None, generation: int, sample: ServiceSample, counts: Counts, gate: ServiceGate
) -> Window:
    """The window after a reading: the same, or a new one where it is over."""
    fresh = Window(generation=generation, began=sample.time, counts=dict(counts))
    if window is None or window.generation != generation:
        return fresh
    if sample.time < window.began:
        # The clock was put back; how long the window has lasted is not known.
        return fresh.model_copy(update={"breached": window.breached})
    if (sample.time - window.began).total_seconds() < WINDOW_SECONDS:
        return window
    since = [
        _since(window.counts.get(source, counted), counted) for source, counted in counts.items()
    ]
    if all(total < FEWEST_REQUESTS for _, total in since):
        return window
    return fresh.model_copy(update={"breached": any(_bad(*each, gate) for each in since)})


def _since(before: tuple[int, int], now: tuple[int, int]) -> tuple[int, int]:
    """Failed and all requests between two readings of a source."""
    if now[0] < before[0] or now[1] < before[1]:
        return now  # its server was started anew, and counts from nothing
    return now[0] - before[0], now[1] - before[1]


def _bad(failed: int, total: int, gate: ServiceGate) -> bool:
    """Whether even the lower end of the exact interval is beyond the objective."""
    from scipy.stats import binomtest

    if total < FEWEST_REQUESTS:
        return False
    interval = binomtest(min(failed, total), total).proportion_ci(CONFIDENCE, method="exact")
    return interval.low > gate.error_rate


def _counts(sample: ServiceSample) -> Counts:
    """Failed and all requests, as the gateway and Triton each see them."""
    counts: dict[str, tuple[int, int]] = {}
    if sample.requests is not None and sample.failures is not None:
        counts["gateway"] = (sample.failures, sample.requests)
    if sample.inferences_succeeded is not None and sample.inferences_failed is not None:
        total = sample.inferences_succeeded + sample.inferences_failed
        counts["triton"] = (sample.inferences_failed, total)
    return counts


def _alert(route: Route, gate: ServiceGate) -> Alert:
    assert route.serving is not None  # what has no traffic is not looked at
    labels = {
        "alertname": ALERT_NAME,
        "objective": OBJECTIVE,
        "environment": str(Environment.PRODUCTION),
        "model": route.model,
        "release": route.serving.release,
    }
    summary = f"more than {gate.error_rate:.2%} of the requests fail"
    return Alert(
        fingerprint=digest_of(canonical_json(labels)).removeprefix("sha256:")[:16],
        # Once for each time that a release comes on the route.
        startsAt=route.time,
        labels=labels,
        annotations={"summary": summary},
        status=AlertStatus(state="active"),
    )
