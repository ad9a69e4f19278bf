"""Serving metrics: what Envoy and Triton say, and nothing that they do not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmops_assets.serving.metrics import LocalMetrics, ServiceSample
from llmops_assets.serving.slots import Colour, Environment

from .envoy_rig import Rig, Upstream, free_port, rig, upstream

PRODUCTION = Environment.PRODUCTION

# As Triton 2.51 writes it (triton-inference-server/server, docs/user_guide/metrics.md).
TRITON = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="m",version="3"} 9
nv_inference_request_success{model="m",version="2"} 500
# HELP nv_inference_request_failure Number of failed inference requests, all batch sizes
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="m",reason="OTHER",version="3"} 0
nv_inference_request_failure{model="m",reason="BACKEND",version="3"} 1
nv_inference_request_failure{model="m",reason="CANCELED",version="3"} 7
nv_inference_request_failure{model="m",reason="REJECTED",version="3"} 0
# HELP nv_inference_count Number of inferences performed (does not include cached requests)
# TYPE nv_inference_count counter
nv_inference_count{model="m",version="3"} 12
# HELP nv_inference_request_duration_us Cumulative inference request duration in microseconds
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{model="m",version="3"} 2500000
# HELP nv_inference_queue_duration_us Cumulative inference queuing duration in microseconds
# TYPE nv_inference_queue_duration_us counter
nv_inference_queue_duration_us{model="m",version="3"} 1000
"""
GPU = """\
# HELP nv_gpu_utilization GPU utilization rate [0.0 - 1.0)
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-a"} 0.5
nv_gpu_utilization{gpu_uuid="GPU-b"} 0.75
"""


@pytest.fixture
def triton() -> Iterator[Upstream]:
    with upstream("triton") as server:
        yield server


@pytest.fixture
def built(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path) as running:
        yield running


@pytest.fixture
def metrics(built: Rig) -> LocalMetrics:
    return LocalMetrics(built.routes, built.gateway.admin, timeout_seconds=5)


def _flushed(metrics: LocalMetrics) -> ServiceSample:
    """A sample after Envoy's flush of statistics, which makes the latency appear."""
    deadline = time.monotonic() + 10
    while True:
        sample = metrics.sample(PRODUCTION, "m")
        if sample.latency_seconds is not None or time.monotonic() > deadline:
            return sample
        time.sleep(0.1)


def test_sample_tells_what_the_servers_counted(
    built: Rig, triton: Upstream, metrics: LocalMetrics
) -> None:
    """Gates and alerts stand on these numbers; each has one source and one unit."""
    built.serve("m", triton.target(Colour.BLUE, version=3))
    triton.metrics_page = TRITON
    triton.pause = 0.1
    for status in ("200", "400", "200", "500"):
        built.request("POST", "/v2/models/m/infer", {"status": status})
    triton.pause = 0.0
    for _ in range(5):  # a monitor's questions must not water down the numbers
        built.request("GET", "/v2/models/m/ready")
    built.request("POST", "/v2/repository/index")  # the gateway's own answer is no request to m
    sample = _flushed(metrics)
    assert (sample.release, sample.version, sample.generation) == ("model.v3", 3, 1)
    assert sample.missing == ()
    assert (sample.requests, sample.failures, sample.refusals) == (4, 1, 1)
    assert (sample.inferences_succeeded, sample.inferences_failed) == (9, 1)
    assert sample.inferences == 12
    assert sample.inference_seconds == pytest.approx(2.5)
    assert sample.queue_seconds == pytest.approx(0.001)
    assert sample.error_rate == pytest.approx(0.25)
    assert sample.latency_seconds is not None
    assert 0.1 <= sample.latency_seconds.p50 <= sample.latency_seconds.p99 < 2
    assert sample.gpu_utilisation is None
    triton.metrics_page = TRITON + GPU
    assert metrics.sample(PRODUCTION, "m").gpu_utilisation == pytest.approx(0.625)


def test_unused_version_has_no_latency_and_no_error_rate(
    built: Rig, triton: Upstream, metrics: LocalMetrics
) -> None:
    """0 failures of 0 requests is not "no errors": a gate must see that nothing was measured."""
    built.serve("m", triton.target(Colour.BLUE, version=3))
    sample = metrics.sample(PRODUCTION, "m")
    assert sample.error_rate is None
    assert sample.latency_seconds is None
    assert sample.inferences_succeeded is None


def test_silent_sources_are_named_and_leave_no_zeros(
    built: Rig, triton: Upstream, metrics: LocalMetrics
) -> None:
    """A dead server must not look like a quiet one."""
    target = triton.target(Colour.BLUE).model_copy(update={"metrics_port": free_port()})
    built.serve("m", target)
    built.kill()
    sample = metrics.sample(PRODUCTION, "m")
    assert [source.split(" ")[0] for source in sample.missing] == ["gateway:", "Triton"]
    numbers = (
        sample.requests,
        sample.failures,
        sample.error_rate,
        sample.inferences_succeeded,
        sample.inferences_failed,
        sample.inference_seconds,
        sample.latency_seconds,
        sample.gpu_utilisation,
    )
    assert numbers == (None,) * len(numbers)


def test_page_that_is_not_prometheus_text_is_named(
    built: Rig, triton: Upstream, metrics: LocalMetrics
) -> None:
    """Another server on a reused port must not be read as Triton."""
    triton.metrics_page = "<html>what a nice day</html>"
    built.serve("m", triton.target(Colour.BLUE))
    sample = metrics.sample(PRODUCTION, "m")
    assert len(sample.missing) == 1
    assert sample.inferences_succeeded is None


def test_canary_is_sampled_beside_what_serves(
    built: Rig, triton: Upstream, metrics: LocalMetrics
) -> None:
    """A canary is judged by its own numbers, not by the sum."""
    built.serve(
        "m",
        triton.target(Colour.GREEN, weight=10, version=4),
        triton.target(Colour.BLUE, weight=90, version=3),
    )
    samples = metrics.samples(PRODUCTION, "m")
    assert [(sample.version, sample.weight) for sample in samples] == [(3, 90), (4, 10)]
    assert metrics.sample(PRODUCTION, "m").version == 3


def test_model_without_traffic_has_no_numbers(
    built: Rig, triton: Upstream, metrics: LocalMetrics
) -> None:
    """Nothing serves, so there is nothing to say, and no error either."""
    assert metrics.sample(PRODUCTION, "m").generation is None
    built.serve("m", triton.target(Colour.BLUE, weight=0))
    sample = metrics.sample(PRODUCTION, "m")
    assert (sample.generation, sample.release, sample.requests) == (1, None, None)
    assert metrics.samples(PRODUCTION, "m") == ()
