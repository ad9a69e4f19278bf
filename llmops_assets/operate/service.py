"""What serves: whether it is this release, how it does, and how far it may scale."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from llmops_assets.errors import LifecycleOrderError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.serving.metrics import Metrics, ServiceSample
from llmops_assets.serving.routes import Routes, RouteTarget
from llmops_assets.serving.slots import Environment, Slot, Slots
from llmops_assets.spec import ServiceGate


class ScalingPolicy(BaseModel):
    """Document of `scaling_policy`: bounds as declared, replicas as found."""

    model_config = ConfigDict(frozen=True)

    release: str
    minimum: int
    maximum: int
    replicas: int
    """Servers of this release that answer, over the slots that have traffic."""
    autoscaler: str | None
    """What changes the number of replicas; None where nothing does."""
    reason: str
    time: datetime


def serving_target(routes: Routes, model: str, release: str) -> RouteTarget:
    """The release's place on production's route.

    Raises:
        LifecycleOrderError: it has no traffic.
    """
    route, _ = routes.current(Environment.PRODUCTION, model)
    targets = () if route is None else route.targets
    for target in targets:
        if target.release == release and target.weight > 0:
            return target
    serving = None if route is None else route.serving
    raise LifecycleOrderError(
        f"Release {release} does not serve",
        expected="a release with traffic in production",
        found=serving.release if serving is not None else "no release serves",
        cure=f"choose the partition of what serves, or promote {release} first",
    )


def sample_of(metrics: Metrics, model: str, release: str) -> ServiceSample:
    """The newest reading of a release that serves.

    Raises:
        LifecycleOrderError: the release lost its traffic meanwhile.
    """
    for sample in metrics.samples(Environment.PRODUCTION, model):
        if sample.release == release:
            return sample
    raise LifecycleOrderError(
        f"Release {release} does not serve any more",
        expected="a release with traffic in production",
        cure="choose the partition of what serves now",
    )


def judge_service(sample: ServiceSample, gate: ServiceGate) -> Judgement:
    """Errors and latency are within the objectives. Without a request there is no verdict."""
    p99 = None if sample.latency_seconds is None else sample.latency_seconds.p99
    problems = [f"no reading of {source}" for source in sample.missing]
    if not sample.requests:
        problems.append("no request was counted yet, so nothing can be said")
    # Written so that a NaN, which compares as neither more nor less, is a problem.
    if sample.error_rate is not None and not sample.error_rate <= gate.error_rate:
        problems.append(f"{sample.error_rate:.4f} of the requests failed")
    if p99 is None:
        problems.append("no latency was counted yet")
    elif not p99 <= gate.latency_p99_seconds:
        problems.append(f"the slowest per cent took {p99:.3f} s or more")
    return Judgement(
        decision=Decision.of(not problems),
        measured={
            "error_rate": sample.error_rate,
            "latency_p99_seconds": p99,
            "requests": sample.requests,
        },
        threshold={
            "error_rate": gate.error_rate,
            "latency_p99_seconds": gate.latency_p99_seconds,
        },
        reason="; ".join(problems) or f"{sample.requests} requests were within the objectives.",
    )


def scaling_now(
    slots: Slots, model: str, target: RouteTarget, release: str, now: datetime
) -> ScalingPolicy:
    """What holds on one machine: one server per slot, and nothing that changes that."""
    state = slots.state(Slot(Environment.PRODUCTION, model, target.colour))
    return ScalingPolicy(
        release=release,
        minimum=1,
        maximum=1,
        replicas=1 if state.running else 0,
        autoscaler=None,
        reason="one machine: a slot is one server process",
        time=now,
    )


def judge_scaling(policy: ScalingPolicy) -> Judgement:
    """The bounds are sane, and as many servers run as they allow."""
    return Judgement(
        decision=Decision.of(1 <= policy.minimum <= policy.replicas <= policy.maximum),
        measured={"replicas": policy.replicas},
        threshold={"minimum": policy.minimum, "maximum": policy.maximum},
        reason=f"{policy.replicas} replicas run, of {policy.minimum} to {policy.maximum}.",
    )
