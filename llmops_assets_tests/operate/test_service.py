"""What serves is judged by what is known of it; what is not known does not pass."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from llmops_assets.errors import LifecycleOrderError
from llmops_assets.operate.incidents import Incident, IncidentReport, judge_answered
from llmops_assets.operate.service import (
    ScalingPolicy,
    judge_scaling,
    judge_service,
    sample_of,
    scaling_now,
    serving_target,
)
from llmops_assets.serving.metrics import Latency, ServiceSample
from llmops_assets.serving.slots import Colour, Environment, Slot
from llmops_assets.spec import ServiceGate

from ..release_rig import MODEL, Rig, deploy

pytestmark = pytest.mark.usefixtures("packages")

GATE = ServiceGate(error_rate=0.01, latency_p99_seconds=2.0)
NOW = datetime(2026, 1, 31, tzinfo=UTC)


def sample(
    requests: int | None = 100,
    failures: int | None = 0,
    p99: float | None = 0.5,
    missing: tuple[str, ...] = (),
) -> ServiceSample:
    return ServiceSample(
        time=NOW, environment=Environment.PRODUCTION, model=MODEL, generation=1,
        release="parrot.v1", version=1, weight=100, requests=requests, failures=failures,
        latency_seconds=None if p99 is None else Latency(p50=p99, p95=p99, p99=p99),
        missing=missing,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reading", "passed", "because"),
    [
        (sample(), True, "100 requests were within"),
        (sample(failures=1), True, "100 requests"),
        (sample(failures=2), False, "0.0200 of the requests failed"),
        (sample(p99=2.0), True, "100 requests"),
        (sample(p99=math.nextafter(2.0, 3)), False, "the slowest per cent"),
        (sample(p99=math.nan), False, "the slowest per cent"),
        (sample(requests=0), False, "no request was counted"),
        (sample(requests=None, failures=None), False, "no request was counted"),
        (sample(missing=("Triton",)), False, "no reading of Triton"),
    ],
)
def test_service_objectives(reading: ServiceSample, passed: bool, because: str) -> None:
    """A service that nobody can see is not within its objectives."""
    judgement = judge_service(reading, GATE)
    assert judgement.passed is passed
    assert because in judgement.reason


def test_serving_target_is_what_has_traffic(rig: Rig) -> None:
    """The warm release is on the route, but its numbers are nobody's service."""
    with pytest.raises(LifecycleOrderError, match="no release serves"):
        serving_target(rig.platform.routes, MODEL, "parrot.v1")
    deploy(rig, 1)
    deploy(rig, 2)
    assert serving_target(rig.platform.routes, MODEL, "parrot.v2").version == 2
    with pytest.raises(LifecycleOrderError, match=r"parrot\.v1 does not serve.*Found: parrot\.v2"):
        serving_target(rig.platform.routes, MODEL, "parrot.v1")


def test_sample_is_of_the_release_asked_for(rig: Rig) -> None:
    """Numbers of the release that took over meanwhile would be a lie in its column."""
    deploy(rig, 1)
    assert sample_of(rig.platform.metrics, MODEL, "parrot.v1").version == 1
    deploy(rig, 2)
    with pytest.raises(LifecycleOrderError, match="does not serve any more"):
        sample_of(rig.platform.metrics, MODEL, "parrot.v1")


def test_scaling_counts_servers_that_answer(rig: Rig) -> None:
    """A bound that counts what should run hides what does not."""
    deploy(rig, 1)
    target = serving_target(rig.platform.routes, MODEL, "parrot.v1")

    def policy() -> ScalingPolicy:
        return scaling_now(rig.platform.slots, MODEL, target, "parrot.v1", NOW)

    assert judge_scaling(policy()).passed
    rig.platform.slots.crash(Slot(Environment.PRODUCTION, MODEL, Colour.BLUE))
    assert policy().replicas == 0
    assert not judge_scaling(policy()).passed


@pytest.mark.parametrize(
    ("minimum", "replicas", "maximum", "passed"),
    [(1, 1, 1, True), (1, 3, 3, True), (2, 1, 3, False), (1, 4, 3, False), (0, 0, 3, False)],
)
def test_scaling_bounds(minimum: int, replicas: int, maximum: int, passed: bool) -> None:
    """Zero servers is no bound for something that serves."""
    policy = ScalingPolicy(
        release="parrot.v1", minimum=minimum, maximum=maximum, replicas=replicas,
        autoscaler=None, reason="test", time=NOW,
    )  # fmt: skip
    assert judge_scaling(policy).passed is passed


def test_an_unanswered_incident_fails() -> None:
    """A page that nobody looked at is what this gate is for."""
    answered = Incident(
        model=MODEL, release="parrot.v1", what="slow", action="scaled", actor="sre",
        detected=NOW, answered=NOW,
    )  # fmt: skip
    open_one = answered.model_copy(update={"what": "wrong", "action": None, "answered": None})
    assert judge_answered(IncidentReport(release="parrot.v1", incidents=())).passed
    assert judge_answered(IncidentReport(release="parrot.v1", incidents=(answered,))).passed
    judgement = judge_answered(IncidentReport(release="parrot.v1", incidents=(answered, open_one)))
    assert not judgement.passed
    assert judgement.measured["unanswered"] == ["wrong"]
