"""What is taken from trtllm-bench, and what is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.spec import LatencyObjective
from llmops_assets.toolchains.tensorrt_llm.benchmark import (
    Benchmark,
    read_level,
    read_summary,
    write_dataset,
)
from llmops_assets.toolchains.tensorrt_llm.containers import Backend

from .doubles import trtllm_bench_double

REQUESTS = 20
FIRST = 20_000_000
"""Nanoseconds to the first token; the n-th request takes a millisecond more for each n."""
BETWEEN = 5_000_000
TOKENS = 11


def benchmark(folder: Path, backend: Backend = "engine", concurrency: int = 4) -> Benchmark:
    return Benchmark(
        backend=backend,
        model_name="chat-8b",
        checkpoint=folder / "checkpoint",
        engine=folder / "engine",
        dataset=folder / "dataset.jsonl",
        output=folder,
        requests=REQUESTS,
        concurrency=concurrency,
    )


def records() -> list[dict[str, Any]]:
    """`--request_json`, as far as it is read."""
    found: list[dict[str, Any]] = []
    for number in range(REQUESTS):
        start = 10**15 + number
        first = start + FIRST + number * 1_000_000
        found.append(
            {
                "id": number,
                "num_input_tokens": 128,
                "error_tokens": 0,
                "start_timestamp": start,
                "first_token_timestamp": first,
                "end_timestamp": first + BETWEEN * (TOKENS - 1),
                "output": "text",
                "output_tokens": TOKENS,
            }
        )
    return found


def report(folder: Path, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """`--report_json`, with the averages of these requests."""

    def mean(name: str) -> float:
        times = [one[name] - one["start_timestamp"] for one in requests]
        return sum(times) / len(times) / 1e6

    return {
        "engine": {
            "model": "chat-8b",
            "engine_dir": str(folder / "engine"),
            "version": "1.2.1",
            "backend": "TRT",
        },
        "world_info": {"tp_size": 1, "pp_size": 1, "world_size": 1},
        "request_info": {"num_requests": len(requests), "avg_num_concurrent_requests": 4.0},
        "performance": {
            "total_latency_ms": 500.0,
            "avg_request_latency_ms": mean("end_timestamp"),
        },
        "streaming_metrics": {"avg_ttft_ms": mean("first_token_timestamp")},
    }


def write(
    folder: Path, change: Callable[[dict[str, Any], list[dict[str, Any]]], object] | None = None
) -> Benchmark:
    requests = records()
    summary = report(folder, requests)
    if change is not None:
        change(summary, requests)
    measured = benchmark(folder)
    measured.report.write_text(json.dumps(summary))
    measured.request_records.write_text(json.dumps(requests))
    return measured


def test_figures_are_those_of_every_toolchain(tmp_path: Path) -> None:
    """Gates judge seconds and intervals, wherever they come from."""
    measured = write(tmp_path)
    summary = read_summary([measured], LatencyObjective(time_to_first_token=0.0295))
    level = summary.at(4)
    assert level is not None
    assert (level.requests, level.errors, level.duration) == (REQUESTS, 0, 0.5)
    assert level.time_to_first_token.p50 == pytest.approx(0.0295)
    assert level.time_to_first_token.bounds["p50"].high is not None
    assert level.inter_token_latency.mean == pytest.approx(0.005)
    assert level.end_to_end.p50 == pytest.approx(0.0795)
    assert level.request_throughput == pytest.approx(40)
    assert level.output_token_throughput == pytest.approx(440)
    assert level.goodput is not None
    assert level.goodput.share.value == 0.5


def test_failed_requests_are_errors(tmp_path: Path) -> None:
    """A request that failed fast must not make an engine faster."""

    def fail(_: dict[str, Any], requests: list[dict[str, Any]]) -> None:
        requests[0]["error_tokens"] = 1

    level = read_level(write(tmp_path, fail))
    assert (level.requests, level.errors, level.end_to_end.n) == (REQUESTS, 1, REQUESTS - 1)


def test_answer_of_one_token_has_nothing_between(tmp_path: Path) -> None:
    """Dividing by none would end the parse of all others."""

    def shorten(_: dict[str, Any], requests: list[dict[str, Any]]) -> None:
        requests[0]["output_tokens"] = 1

    assert read_level(write(tmp_path, shorten)).inter_token_latency.n == REQUESTS - 1


def test_answer_of_one_token_is_timed_by_its_end(tmp_path: Path) -> None:
    """Its only token comes with the end, so trtllm-bench has no time of a first one, and counts
    none in its average.
    """
    requests = records()
    requests[0] |= {
        "output_tokens": 1,
        "end_timestamp": requests[0]["first_token_timestamp"],
        "first_token_timestamp": -1,
    }
    summary = report(tmp_path, requests)
    summary["streaming_metrics"]["avg_ttft_ms"] = sum(
        (one["first_token_timestamp"] - one["start_timestamp"]) / 1e6 for one in requests[1:]
    ) / len(requests)  # fmt: skip
    measured = benchmark(tmp_path)
    measured.report.write_text(json.dumps(summary))
    measured.request_records.write_text(json.dumps(requests))
    level = read_level(measured)
    assert level.time_to_first_token.n == REQUESTS
    assert level.end_to_end.n == REQUESTS


def set_backend(name: str) -> Callable[[dict[str, Any], Any], object]:
    return lambda summary, _: summary["engine"].update(backend=name)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        # TensorRT-LLM#8223: the default is PyTorch, which measures the checkpoint.
        (set_backend("Pytorch"), "not about what serves.*--backend tensorrt"),
        (lambda summary, _: summary["engine"].update(engine_dir="/other"), "another engine"),
        # A checkpoint that serves on several GPUs, measured on one.
        (lambda summary, _: summary["world_info"].update(world_size=2), "number of GPUs"),
        (lambda summary, _: summary.pop("streaming_metrics"), "no time to first token"),
        (lambda summary, _: summary["request_info"].update(num_requests=19), "not about the req"),
        (lambda _, requests: requests.pop(), "not about the requests"),
        (lambda summary, _: summary.pop("performance"), "not a report .*performance"),
        (lambda summary, _: summary["engine"].pop("backend"), "not a report .*backend"),
        (lambda _, requests: requests[3].pop("end_timestamp"), "not a report .*end_timestamp"),
        (lambda _, requests: requests[3].update(first_token_timestamp=-1), "times that cannot be"),
        (
            lambda summary, _: summary["performance"].update(avg_request_latency_ms=0.0795),
            "does not agree .*average latency",
        ),
        (
            lambda summary, _: summary["streaming_metrics"].update(avg_ttft_ms=30.0),
            "does not agree .*time to first token",
        ),
    ],
)
def test_report_is_refused(
    tmp_path: Path,
    change: Callable[[dict[str, Any], list[dict[str, Any]]], object],
    problem: str,
) -> None:
    """Each would be figures of something else, or in another unit, under the engine's name."""
    with pytest.raises(ToolchainError, match=problem):
        read_level(write(tmp_path, change))


@pytest.mark.parametrize("content", [None, "{"])
def test_missing_report_is_refused(tmp_path: Path, content: str | None) -> None:
    """trtllm-bench may end with 0 and leave none."""
    measured = write(tmp_path)
    measured.report.unlink()
    if content is not None:
        measured.report.write_text(content)
    with pytest.raises(ToolchainError, match="left no report"):
        read_level(measured)


def test_llmapi_is_measured_with_pytorch(tmp_path: Path) -> None:
    """There the engine's backend would be the wrong one."""
    measured = write(tmp_path, set_backend("Pytorch"))
    checkpoint = benchmark(tmp_path, "llmapi")
    assert read_level(checkpoint).requests == REQUESTS
    with pytest.raises(ToolchainError, match="not about what serves"):
        read_level(measured)


def test_command_of_an_engine_is_one_that_the_tool_takes(tmp_path: Path) -> None:
    """Parsed strictly by the double: the backend is told, and streaming is on."""
    measured = benchmark(tmp_path)
    name, *arguments = measured.command()
    assert name == "trtllm-bench"
    options = trtllm_bench_double.parser().parse_args(arguments)
    assert options.command == "throughput"
    assert options.backend == "tensorrt"
    assert options.engine_dir == str(measured.engine)
    assert options.streaming
    assert options.max_seq_len is None
    assert (options.num_requests, options.concurrency) == (REQUESTS, 4)
    assert (options.scheduler_policy, options.enable_chunked_context) == (
        "guaranteed_no_evict", False,
    )  # fmt: skip
    assert options.request_json == str(measured.request_records)
    assert options.report_json == str(measured.report)


def test_command_of_llmapi_has_no_engine(tmp_path: Path) -> None:
    """The checkpoint is what serves there."""
    _, *arguments = benchmark(tmp_path, "llmapi").command()
    options = trtllm_bench_double.parser().parse_args(arguments)
    assert options.backend == "pytorch"
    assert options.engine_dir is None
    assert options.extra_llm_api_options is None


def test_what_is_measured_is_set_as_what_serves(tmp_path: Path) -> None:
    """With the defaults of trtllm-bench an engine is measured that nobody serves."""
    engine = replace(benchmark(tmp_path), scheduler="max_utilization", chunked_context=True)
    options = trtllm_bench_double.parser().parse_args(engine.command()[1:])
    assert options.scheduler_policy == "max_utilization"
    assert options.enable_chunked_context
    frozen = tmp_path / "options.yaml"
    checkpoint = replace(benchmark(tmp_path, "llmapi"), llm_options=frozen)
    options = trtllm_bench_double.parser().parse_args(checkpoint.command()[1:])
    assert options.extra_llm_api_options == str(frozen)


def test_each_concurrency_has_its_own_reports(tmp_path: Path) -> None:
    """One would overwrite the other, and both would be the last."""
    one, two = (benchmark(tmp_path, concurrency=number) for number in (1, 2))
    assert len({one.report, one.request_records, two.report, two.request_records}) == 4


def test_dataset_is_one_prompt_a_line(tmp_path: Path) -> None:
    """Token ids, so that no tokenizer of another version reads the prompts differently."""
    path = tmp_path / "dataset.jsonl"
    write_dataset([[1, 2], [3]], 16, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"task_id": 0, "input_ids": [1, 2], "output_tokens": 16},
        {"task_id": 1, "input_ids": [3], "output_tokens": 16},
    ]
    with pytest.raises(ToolchainError, match="no prompts"):
        write_dataset([], 16, path)
