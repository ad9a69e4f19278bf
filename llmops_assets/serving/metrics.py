"""What serves, in numbers: requests, failures, latency, GPU utilisation.

Numbers are counters since a server's start, with the time of reading: a rate is the
difference of two samples, which is the caller's business. What is not known is None,
never zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Protocol

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.errors import GatewayError
from llmops_assets.serving.envoy_admin import EnvoyAdmin, EnvoyStats
from llmops_assets.serving.envoy_config import cluster_name
from llmops_assets.serving.routes import Route, Routes, RouteTarget
from llmops_assets.serving.slots import Environment

MILLISECONDS = 1e-3
MICROSECONDS = 1e-6


class Latency(BaseModel):
    """Quantiles of whole requests as the gateway sees them, seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    p50: float
    p95: float
    p99: float


class ServiceSample(BaseModel):
    """One reading of one version on a route.

    Counters start again at zero when a server restarts or its version leaves the route.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    time: datetime
    environment: Environment
    model: str
    generation: int | None = Field(description="Of the route; None for a model without one.")
    release: str | None = Field(default=None, description="None when nothing takes traffic.")
    version: int | None = None
    weight: int | None = Field(default=None, description="Share of the traffic, per cent.")
    requests: int | None = Field(
        default=None,
        description="Inference requests that the gateway finished, its own connect failures"
        " included.",
    )
    failures: int | None = Field(
        default=None, description="Those answered with 5xx; a cut stream counts as answered."
    )
    refusals: int | None = Field(
        default=None,
        description="Those answered with 4xx: a client's mistake, or an error that a streaming"
        " model gave before its first token, which Triton answers with 400 and counts as success.",
    )
    inferences_succeeded: int | None = Field(
        default=None, description="Triton's nv_inference_request_success."
    )
    inferences_failed: int | None = Field(
        default=None,
        description="Triton's nv_inference_request_failure, but for those that the client"
        " cancelled; sees errors inside a stream's 200.",
    )
    inferences: int | None = Field(
        default=None, description="Triton's nv_inference_count; a batch counts its rows."
    )
    inference_seconds: float | None = Field(
        default=None, description="Triton's nv_inference_request_duration_us, summed."
    )
    queue_seconds: float | None = Field(
        default=None, description="Triton's nv_inference_queue_duration_us, summed."
    )
    latency_seconds: Latency | None = Field(
        default=None, description="Over all requests since the version came on the route."
    )
    gpu_utilisation: float | None = Field(
        default=None, description="Mean over the GPUs, as a share of 1; None without a GPU."
    )
    missing: tuple[str, ...] = Field(
        default=(), description="Sources that did not answer, each with its reason."
    )

    @property
    def error_rate(self) -> float | None:
        """The worse of the gateway's and Triton's share of failed requests; None without any.

        Each sees failures that the other does not: a refused connection, an error inside
        a stream. `refusals` are not in it, as a single confused client makes many.
        """
        shares = [
            failed / total
            for failed, total in (
                (self.failures, self.requests),
                (self.inferences_failed, _sum(self.inferences_succeeded, self.inferences_failed)),
            )
            if failed is not None and total
        ]
        return max(shares, default=None)


class Metrics(Protocol):
    """Reads how a model does."""

    def sample(self, environment: Environment, model: str) -> ServiceSample:
        """The version with the largest share. Without one all numbers are None."""
        ...

    def samples(self, environment: Environment, model: str) -> tuple[ServiceSample, ...]:
        """Every version that gets traffic, largest share first: for judging a canary."""
        ...


class LocalMetrics:
    """`Metrics` from Triton's metrics endpoints and Envoy's statistics."""

    def __init__(self, routes: Routes, admin: EnvoyAdmin, timeout_seconds: float) -> None:
        """
        Args:
            routes: what should serve, and where.
            admin: of the gateway; `EnvoyGateway.admin`.
            timeout_seconds: limit of one call.
        """
        self._routes = routes
        self._admin = admin
        self._timeout_seconds = timeout_seconds

    def sample(self, environment: Environment, model: str) -> ServiceSample:
        """See `Metrics.sample`."""
        route, _ = self._routes.current(environment, model)
        if route is None or route.serving is None:
            return ServiceSample(
                time=datetime.now(UTC),
                environment=environment,
                model=model,
                generation=None if route is None else route.generation,
            )
        return self._read(route, route.serving)

    def samples(self, environment: Environment, model: str) -> tuple[ServiceSample, ...]:
        """See `Metrics.samples`."""
        route, _ = self._routes.current(environment, model)
        targets = () if route is None else route.targets
        return tuple(
            self._read(route, target)
            for target in sorted(targets, key=lambda target: -target.weight)
            if route is not None and target.weight > 0
        )

    def _read(self, route: Route, target: RouteTarget) -> ServiceSample:
        missing: list[str] = []
        cluster = f"cluster.{cluster_name(route.environment, route.model, target)}"
        gateway: EnvoyStats | None = None
        triton: list[Sample] = []
        try:
            gateway = self._admin.stats(f"^{re.escape(cluster)}\\.upstream_rq_")
        except GatewayError as error:
            missing.append(f"gateway: {error.found}")
        endpoint = f"http://{target.host}:{target.metrics_port}/metrics"
        try:
            triton = _scrape(endpoint, self._timeout_seconds)
        except (httpx.HTTPError, ValueError) as error:
            missing.append(f"Triton at {endpoint}: {error!r}")
        labels = {"model": route.model, "version": str(target.version)}
        return ServiceSample(
            time=datetime.now(UTC),
            environment=route.environment,
            model=route.model,
            generation=route.generation,
            release=target.release,
            version=target.version,
            weight=target.weight,
            requests=_counter(gateway, f"{cluster}.upstream_rq_completed"),
            failures=_answers(gateway, cluster, "5xx"),
            refusals=_answers(gateway, cluster, "4xx"),
            inferences_succeeded=_whole(triton, "nv_inference_request_success", labels),
            inferences_failed=_whole(
                [sample for sample in triton if sample.labels.get("reason") != "CANCELED"],
                "nv_inference_request_failure",
                labels,
            ),
            inferences=_whole(triton, "nv_inference_count", labels),
            inference_seconds=_seconds(triton, "nv_inference_request_duration_us", labels),
            queue_seconds=_seconds(triton, "nv_inference_queue_duration_us", labels),
            latency_seconds=_latency(gateway, f"{cluster}.upstream_rq_time"),
            gpu_utilisation=_mean(_matching(triton, "nv_gpu_utilization", {})),
            missing=tuple(missing),
        )


def _scrape(endpoint: str, timeout_seconds: float) -> list[Sample]:
    """The samples of a Prometheus text page.

    Raises:
        httpx.HTTPError: no answer, or not a 200.
        ValueError: not Prometheus text.
    """
    response = httpx.get(endpoint, timeout=timeout_seconds).raise_for_status()
    return [
        sample
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    ]


def _matching(samples: Iterable[Sample], name: str, labels: dict[str, str]) -> list[float]:
    return [
        sample.value
        for sample in samples
        # The parser gives a counter's samples the suffix of OpenMetrics, which Triton leaves out.
        if sample.name in (name, f"{name}_total")
        and labels.items() <= sample.labels.items()
        and math.isfinite(sample.value)
    ]


def _whole(samples: Iterable[Sample], name: str, labels: dict[str, str]) -> int | None:
    values = _matching(samples, name, labels)
    return int(sum(values)) if values else None


def _seconds(samples: Iterable[Sample], name: str, labels: dict[str, str]) -> float | None:
    values = _matching(samples, name, labels)
    return sum(values) * MICROSECONDS if values else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _counter(stats: EnvoyStats | None, name: str) -> int | None:
    value = None if stats is None else stats.values.get(name)
    return value if isinstance(value, int) else None


def _answers(stats: EnvoyStats | None, cluster: str, status: str) -> int | None:
    """Answers of a class such as 5xx.

    Envoy makes this counter at the first one, so its absence beside the counter of
    finished requests means that there was none.
    """
    if _counter(stats, f"{cluster}.upstream_rq_completed") is None:
        return None
    return _counter(stats, f"{cluster}.upstream_rq_{status}") or 0


def _latency(stats: EnvoyStats | None, name: str) -> Latency | None:
    quantiles = None if stats is None else stats.quantiles.get(name)
    if not quantiles:
        return None
    p50, p95, p99 = (quantiles[quantile] * MILLISECONDS for quantile in (50.0, 95.0, 99.0))
    return Latency(p50=p50, p95=p95, p99=p99)


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second
