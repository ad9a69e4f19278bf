"""The built-in load generator against known delays, broken servers and a real Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmops_assets.errors import DataError, SlotError
from llmops_assets.evidence.latency import summarize
from llmops_assets.serving import load, triton
from llmops_assets.serving.load import LoadResult, RequestResult
from llmops_assets.serving.request_contract import RequestContract
from llmops_assets.toolchains.tensorrt_llm.packaging import ENSEMBLE_CONTRACT, LLMAPI_CONTRACT
from llmops_assets.tools import module_command, run_tool

from . import stream_double
from .conftest import MODEL, Server, free_endpoint
from .stream_double import FIRST_SECONDS, NEXT_SECONDS, TOKENS

PROMPT = "3 août 1990"
# A wait is never shorter than asked for, but on a busy machine longer.
LATE_SECONDS = 0.02


@pytest.fixture
def url() -> Iterator[str]:
    with stream_double.stream_double() as address:
        yield address


def measure(url: str, prompts: list[str], **changes: Any) -> LoadResult:
    arguments = {"concurrency": 1, "requests": len(prompts), "warm_up": 0, "max_tokens": TOKENS,
                 "timeout_seconds": 5.0}  # fmt: skip
    return load.measure(url, MODEL, prompts, **(arguments | changes))


def asked(url: str) -> dict[str, Any]:
    return httpx.get(url, timeout=5).json()


def only(result: LoadResult) -> RequestResult:
    assert len(result.requests) == 1
    return result.requests[0]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_known_delays_are_measured(url: str, concurrency: int) -> None:
    """The figures that gates judge: right by the clock of the server that waits."""
    result = measure(url, ["fine"], concurrency=concurrency, requests=8 * concurrency)
    level = summarize([result]).levels[0]
    assert level.errors == 0
    whole = FIRST_SECONDS + (TOKENS - 1) * NEXT_SECONDS
    first, between, end = (level.time_to_first_token, level.inter_token_latency, level.end_to_end)
    assert first.p50 == pytest.approx(FIRST_SECONDS, abs=LATE_SECONDS)
    assert between.p50 == pytest.approx(NEXT_SECONDS, abs=LATE_SECONDS / (TOKENS - 1))
    assert end.p50 == pytest.approx(whole, abs=LATE_SECONDS)
    assert level.request_throughput == pytest.approx(concurrency / whole, rel=0.25)
    assert level.output_token_throughput == pytest.approx(TOKENS * level.request_throughput)
    for request in result.requests:
        assert request.output_tokens == TOKENS
        assert request.time_to_first_token is not None
        assert len(request.inter_token_latencies) == TOKENS - 1
        # The parts are the whole: nothing is counted twice or lost.
        assert request.time_to_first_token + sum(request.inter_token_latencies) == pytest.approx(
            request.end_to_end
        )


def test_clients_keep_their_connections(url: str) -> None:
    """A connection per request would measure connecting; more clients, another load."""
    measure(url, ["fine"], concurrency=3, requests=12, warm_up=3)
    server = asked(url)
    assert len(server["prompts"]) == 15
    assert server["connections"] == 3
    assert server["most_under_way"] == 3


def test_warm_up_is_left_out(url: str) -> None:
    """The first requests find cold caches; here they are the slow ones."""
    prompts = [f"{number}" for number in range(3)] + ["slow"]
    # An order that a seed decides, in which the slow one comes first.
    seed = next(s for s in range(100) if next(load._shuffled(prompts, s)) == "slow")
    result = measure(url, prompts, warm_up=1, requests=3, seed=seed)
    assert asked(url)["prompts"][0] == "slow"
    assert (len(result.requests), result.warm_up) == (3, 1)
    assert max(request.end_to_end for request in result.requests) < stream_double.SLOW_SECONDS
    assert min(request.start for request in result.requests) < LATE_SECONDS


def test_seed_decides_the_order(url: str) -> None:
    """Two measurements are to be compared, so they must ask the same."""
    prompts = [f"{number}" for number in range(6)]
    for seed in (1, 1, 2):
        measure(url, prompts, seed=seed)
    orders = asked(url)["prompts"]
    assert orders[:6] == orders[6:12] != orders[12:]
    assert sorted(orders[12:]) == prompts


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("error", "error in the stream: generation failed: out of pages"),
        ("not json", "not a JSON object in the stream: {"),
        ("cut", "the stream ended before the answer did"),
        ("broken", "RemoteProtocolError"),
        ("unavailable", "status 503: {\"error\": \"no slot is ready\"}"),
    ],
)  # fmt: skip
def test_failed_request_is_an_error(url: str, prompt: str, reason: str) -> None:
    """A stream that fails has status 200 and tokens; counted as an answer, it is a fast one."""
    request = only(measure(url, [prompt]))
    assert request.error is not None
    assert reason in request.error
    if prompt != "unavailable":
        assert request.output_tokens == 2
        assert request.time_to_first_token is not None
    level = summarize([measure(url, [prompt, "fine"])]).levels[0]
    assert (level.requests, level.errors, level.end_to_end.n) == (2, 1, 1)


def test_request_that_takes_too_long_is_an_error(url: str) -> None:
    """Each wait of a dripping stream is short; the limit is one of the whole request."""
    limit = 1.5 * FIRST_SECONDS
    request = only(measure(url, ["fine"], timeout_seconds=limit))
    assert request.error == f"no end within {limit:g} s"
    assert request.end_to_end < limit + FIRST_SECONDS


def test_tokens_that_come_together_share_their_time(url: str) -> None:
    """A server that sends two tokens in a piece is not twice as slow, nor has it half of them."""
    request = only(measure(url, ["pairs"]))
    assert request.output_tokens == TOKENS
    assert len(request.inter_token_latencies) == TOKENS - 2
    mean = sum(request.inter_token_latencies) / (TOKENS - 2)
    assert mean == pytest.approx(NEXT_SECONDS, abs=LATE_SECONDS / TOKENS)


def test_pieces_are_counted_where_the_model_does_not(url: str) -> None:
    """Other models have no output_tokens; their latency is measured all the same."""
    request = only(measure(url, ["uncounted"]))
    assert (request.output_tokens, len(request.inter_token_latencies)) == (TOKENS, TOKENS - 1)


@pytest.mark.parametrize(
    ("model", "contract"), [("ensemble", ENSEMBLE_CONTRACT), ("llmapi", LLMAPI_CONTRACT)]
)
def test_streams_of_nvidias_templates_are_measured(
    url: str, model: str, contract: RequestContract
) -> None:
    """Neither ends a stream nor counts as the embedded model does: read so, no answer of
    theirs was whole, and no release of TensorRT-LLM passed its load test.
    """
    request = only(load.measure(
        url, model, ["fine"], concurrency=1, requests=1, warm_up=0, max_tokens=TOKENS,
        timeout_seconds=5, contract=contract,
    ))  # fmt: skip
    assert request.error is None
    assert (request.output_tokens, len(request.inter_token_latencies)) == (TOKENS, TOKENS - 1)
    whole = FIRST_SECONDS + (TOKENS - 1) * NEXT_SECONDS
    assert request.end_to_end == pytest.approx(whole, abs=LATE_SECONDS)


@pytest.mark.parametrize(
    ("model", "contract", "prompt", "reason"),
    [
        ("ensemble", ENSEMBLE_CONTRACT, "error", "out of pages"),
        ("ensemble", ENSEMBLE_CONTRACT, "broken", "RemoteProtocolError"),
        ("llmapi", LLMAPI_CONTRACT, "error", "out of pages"),
        ("llmapi", LLMAPI_CONTRACT, "cut", "ended before the answer did"),
    ],
)
def test_failed_streams_of_nvidias_templates_are_errors(
    url: str, model: str, contract: RequestContract, prompt: str, reason: str
) -> None:
    """A stream without a finish reason is whole only if HTTP says so and no piece is an error;
    a reason `None` is none.
    """
    request = only(load.measure(
        url, model, [prompt], concurrency=1, requests=1, warm_up=0, max_tokens=TOKENS,
        timeout_seconds=5, contract=contract,
    ))  # fmt: skip
    assert request.error is not None
    assert reason in request.error


def test_time_limits_a_measurement(url: str) -> None:
    """In CI the time is given and not the number; what was started is still waited for."""
    result = measure(url, ["fine"], concurrency=2, requests=None, seconds=0.3)
    assert 4 <= len(result.requests) <= 8
    assert all(request.error is None for request in result.requests)
    assert all(request.start < 0.3 for request in result.requests)
    assert result.duration >= 0.3


def test_dead_server_is_an_error() -> None:
    """Thousands of refused connections are no measurement; the reader needs the reason."""
    with pytest.raises(SlotError, match=r"answered none of 2 requests.*ConnectError"):
        measure(free_endpoint().http, ["fine"], warm_up=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": []},
        {"concurrency": 0},
        {"requests": None},
        {"seconds": 1.0},
        {"concurrency": 2},
        {"warm_up": -1},
        {"requests": None, "seconds": float("nan")},
    ],
)
def test_senseless_arguments_are_refused(url: str, changes: dict[str, Any]) -> None:
    """A load that cannot be must not end as a measurement of nothing."""
    with pytest.raises(DataError):
        measure(url, **({"prompts": ["fine"]} | changes))
    assert asked(url)["prompts"] == []


def test_real_triton_through_the_tool_runner(server: Server, tmp_path: Path) -> None:
    """As assets run it: a process of its own, one result for each concurrency."""
    (tmp_path / "prompts.json").write_text(json.dumps([PROMPT]))
    command = module_command(
        "llmops_assets.serving.load", "--url", server.endpoint.http, "--model", MODEL,
        "--version", str(server.version), "--prompts", tmp_path / "prompts.json",
        "--concurrency", "1", "2", "--seconds", "1.2", "--max-tokens", "50",
        "--timeout-seconds", "20", "--output", tmp_path / "load.json",
    )  # fmt: skip
    progress: list[Any] = []
    run_tool("load", command, work=tmp_path / "work", log=tmp_path / "log", timeout_seconds=60,
             on_progress=progress.append)  # fmt: skip
    found = json.loads((tmp_path / "load.json").read_text())
    results = [LoadResult.model_validate(result) for result in found]
    summary = summarize(results)
    assert [level.concurrency for level in summary.levels] == [1, 2]
    tokens = triton.generate(server.endpoint, MODEL, PROMPT, max_tokens=50)["output_tokens"]
    for result in results:
        assert all(request.error is None for request in result.requests)
        assert {request.output_tokens for request in result.requests} == {tokens}
        assert all(len(request.inter_token_latencies) == tokens - 1 for request in result.requests)
    assert any(report["phase"] == "latency at concurrency 2" for report in progress)


def test_refused_requests_are_errors_of_the_command(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that is not there must fail the step, with Triton's reason in its log."""
    (tmp_path / "prompts.json").write_text(json.dumps(["3 août 1990"]))
    code = load.main(
        ["--url", server.endpoint.http, "--model", "other", "--prompts",
         str(tmp_path / "prompts.json"), "--concurrency", "1", "--requests", "1",
         "--max-tokens", "5", "--timeout-seconds", "5"]
    )  # fmt: skip
    assert code == 1
    assert "unknown model" in capsys.readouterr().err
