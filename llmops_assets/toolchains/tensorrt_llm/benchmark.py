"""Latency and throughput by `trtllm-bench`, in the keys that every toolchain uses.

Its default backend is PyTorch everywhere, so an engine is measured only with `--backend
tensorrt`; the report says which backend it was, and that is checked. Only with `--streaming`
is there a time to first token.

Percentiles of its `--report_json` are single requests by rank, without any way to tell how
sure they are. Its `--request_json` has every request, so figures and intervals are made from
that, by the same code as everywhere; the report's own averages must agree with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmops_assets.errors import ToolchainError
from llmops_assets.evidence.latency import (
    CONFIDENCE,
    ConcurrencyLevel,
    LatencySummary,
    RequestTimes,
    level,
)
from llmops_assets.spec import LatencyObjective
from llmops_assets.toolchains.tensorrt_llm.containers import Backend

BACKEND_OPTION: Mapping[Backend, str] = {"engine": "tensorrt", "llmapi": "pytorch"}
BACKEND_IN_REPORT: Mapping[Backend, str] = {"engine": "TRT", "llmapi": "Pytorch"}
Scheduler = Literal["guaranteed_no_evict", "max_utilization"]
NOT_TIMED = -1
"""Time of a first token that came with the end."""
NANOSECONDS = 1e-9
MILLISECONDS = 1e-3
TOLERANCE = 0.01
"""Relative; how far a report's averages may be from those of its requests."""
AGAIN = "measure again; if it repeats, look into the log of trtllm-bench"


@dataclass(frozen=True)
class Benchmark:
    """One measurement at one concurrency.

    Attributes:
        backend: what is measured.
        model_name: what trtllm-bench calls the model; nothing is looked up by it.
        checkpoint: Hugging Face directory: the tokenizer, and the model for `llmapi`.
        engine: engine directory; not used for `llmapi`.
        dataset: from `write_dataset`.
        output: folder for the reports.
        requests: how many to measure.
        concurrency: requests under way at once.
        tensor_parallel_size: ways that every layer is split; an engine knows its own.
        world_size: GPUs that serve; the report must be of as many.
        warm_up: how many go first.
        kv_cache_free_gpu_mem_fraction: as in serving.
        scheduler: as in serving; for an engine.
        chunked_context: as in serving; for an engine.
        llm_options: YAML file of options of the LLM API, which win over what trtllm-bench
            would choose itself; for `llmapi`, where no build fixes them.
    """

    backend: Backend
    model_name: str
    checkpoint: Path
    engine: Path
    dataset: Path
    output: Path
    requests: int
    concurrency: int
    tensor_parallel_size: int = 1
    world_size: int = 1
    warm_up: int = 2
    kv_cache_free_gpu_mem_fraction: float = 0.9
    scheduler: Scheduler = "guaranteed_no_evict"
    chunked_context: bool = False
    llm_options: Path | None = None

    @property
    def report(self) -> Path:
        return self.output / f"report-{self.concurrency}.json"

    @property
    def request_records(self) -> Path:
        return self.output / f"requests-{self.concurrency}.json"

    def command(self) -> list[str]:
        """For the tool runner. `--max_seq_len` is left out: an engine asserts that it is."""
        model = (
            [
                "--engine_dir", str(self.engine),
                "--scheduler_policy", self.scheduler,
                *(["--enable_chunked_context"] if self.chunked_context else []),
            ]
            if self.backend == "engine"
            else [
                "--tp", str(self.tensor_parallel_size),
                "--pp", str(self.world_size // self.tensor_parallel_size),
                *(
                    []
                    if self.llm_options is None
                    else ["--extra_llm_api_options", str(self.llm_options)]
                ),
            ]
        )  # fmt: skip
        return [
            "trtllm-bench",
            "-m", self.model_name,
            "--model_path", str(self.checkpoint),
            "-w", str(self.output),
            "throughput",
            "--backend", BACKEND_OPTION[self.backend],
            *model,
            "--dataset", str(self.dataset),
            "--num_requests", str(self.requests),
            "--concurrency", str(self.concurrency),
            "--warmup", str(self.warm_up),
            "--kv_cache_free_gpu_mem_fraction", str(self.kv_cache_free_gpu_mem_fraction),
            "--streaming",
            "--report_json", str(self.report),
            "--request_json", str(self.request_records),
        ]  # fmt: skip


def write_dataset(prompts: Sequence[Sequence[int]], output_tokens: int, path: Path) -> None:
    """Writes prompts as trtllm-bench reads them: one JSON object a line.

    Args:
        prompts: token ids.
        output_tokens: how long every answer is; the benchmark does not stop at end tokens.
        path: the file.

    Raises:
        ToolchainError: there are no prompts.
    """
    if not prompts:
        raise ToolchainError(
            "There are no prompts to measure with", cure="give evaluation data with rows"
        )
    path.write_text(
        "".join(
            json.dumps({"task_id": number, "input_ids": list(ids), "output_tokens": output_tokens})
            + "\n"
            for number, ids in enumerate(prompts)
        ),
        encoding="utf-8",
    )


def read_summary(
    benchmarks: Sequence[Benchmark],
    objective: LatencyObjective | None = None,
    confidence: float = CONFIDENCE,
) -> LatencySummary:
    """What finished benchmarks measured. No server is between, so they are in-process.

    Raises:
        ToolchainError: see `read_level`.
    """
    return LatencySummary(
        source="in-process",
        confidence=confidence,
        levels=tuple(read_level(benchmark, objective, confidence) for benchmark in benchmarks),
    )


def read_level(
    benchmark: Benchmark,
    objective: LatencyObjective | None = None,
    confidence: float = CONFIDENCE,
) -> ConcurrencyLevel:
    """What one finished benchmark measured.

    Raises:
        ToolchainError: a report is missing or malformed, is of another backend, engine or
            number of GPUs, was made without streaming, or does not agree with its requests.
    """
    report = _read(benchmark.report)
    records = _read(benchmark.request_records)
    try:
        return _level(benchmark, report, records, objective, confidence)
    except (KeyError, TypeError) as error:
        raise ToolchainError(
            f"{benchmark.report} is not a report that this toolchain knows",
            expected="engine, request_info, performance and streaming_metrics, and the times "
            "of every request",
            found=f"no {error}",
            cure="check the version of TensorRT-LLM; its reports may have changed",
        ) from error


def _level(
    benchmark: Benchmark,
    report: Any,
    records: Any,
    objective: LatencyObjective | None,
    confidence: float,
) -> ConcurrencyLevel:
    _check_subject(benchmark, report["engine"])
    if report["world_info"]["world_size"] != benchmark.world_size:
        raise ToolchainError(
            f"{benchmark.report} was measured on another number of GPUs than serve",
            expected=benchmark.world_size,
            found=report["world_info"]["world_size"],
            cure="measure with the parallelism that serves",
        )
    if "streaming_metrics" not in report:
        raise ToolchainError(
            f"{benchmark.report} has no time to first token",
            expected="streaming_metrics",
            found=", ".join(report),
            cure="run trtllm-bench with --streaming",
        )
    count = report["request_info"]["num_requests"]
    if not count == benchmark.requests == len(records):
        raise ToolchainError(
            f"{benchmark.report} is not about the requests that were asked for",
            expected=f"{benchmark.requests} requests in both reports",
            found=f"{count}, and {len(records)} with times",
            cure=AGAIN,
        )
    answered = [_times(record) for record in records if not record["error_tokens"]]
    performance = report["performance"]
    found = level(
        benchmark.concurrency,
        answered,
        ["error while generating"] * (len(records) - len(answered)),
        duration=performance["total_latency_ms"] * MILLISECONDS,
        objective=objective,
        confidence=confidence,
    )
    if len(answered) == len(records):
        # Which unit the times of requests have is told by nothing but their average.
        _check_average(
            benchmark, found.end_to_end.mean, performance["avg_request_latency_ms"], "latency"
        )
        _check_average(
            benchmark,
            _average_first(records),
            report["streaming_metrics"]["avg_ttft_ms"],
            "time to first token",
        )
    return found


def _check_subject(benchmark: Benchmark, engine: Mapping[str, Any]) -> None:
    wanted = BACKEND_IN_REPORT[benchmark.backend]
    if engine["backend"] != wanted:
        raise ToolchainError(
            f"{benchmark.report} is not about what serves",
            expected=f"backend {wanted}, by --backend {BACKEND_OPTION[benchmark.backend]}",
            found=f"backend {engine['backend']}",
            cure="run trtllm-bench with the backend named; its default is pytorch",
        )
    if benchmark.backend == "engine" and engine["engine_dir"] != str(benchmark.engine):
        raise ToolchainError(
            f"{benchmark.report} is about another engine",
            expected=benchmark.engine,
            found=engine["engine_dir"],
            cure=AGAIN,
        )


def _average_first(records: Sequence[Mapping[str, Any]]) -> float:
    """Average time to first token, seconds, as trtllm-bench counts it.

    An answer of one token counts as 0 there (`RequestRecord.time_to_first_token` in
    `tensorrt_llm/bench/dataclasses/statistics.py`).
    """
    times = [
        0
        if record["first_token_timestamp"] == NOT_TIMED
        else record["first_token_timestamp"] - record["start_timestamp"]
        for record in records
    ]
    return sum(times) / len(times) * NANOSECONDS


def _times(record: Mapping[str, Any]) -> RequestTimes:
    """One request's times; trtllm-bench has them in nanoseconds of one clock."""
    start, first, end = (
        record["start_timestamp"],
        record["first_token_timestamp"],
        record["end_timestamp"],
    )
    if first == NOT_TIMED and record["output_tokens"] <= 1:
        first = end
    if not 0 <= start <= first <= end:
        raise ToolchainError(
            "A request of trtllm-bench has times that cannot be",
            expected="start, first token and end, in this order",
            found=f"{start}, {first}, {end}",
            cure=AGAIN,
        )
    tokens = record["output_tokens"]
    return RequestTimes(
        time_to_first_token=(first - start) * NANOSECONDS,
        inter_token_latency=(end - first) * NANOSECONDS / (tokens - 1) if tokens > 1 else None,
        end_to_end=(end - start) * NANOSECONDS,
        output_tokens=tokens,
    )


def _check_average(
    benchmark: Benchmark, seconds: float | None, milliseconds: float, of: str
) -> None:
    expected = milliseconds * MILLISECONDS
    if seconds is None or not math.isclose(seconds, expected, rel_tol=TOLERANCE):
        raise ToolchainError(
            f"{benchmark.report} does not agree with its own requests",
            expected=f"an average {of} of {expected:.6g} s",
            found=f"{seconds} s over the requests",
            cure="check the version of TensorRT-LLM; the unit of its times may have changed",
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolchainError(
            f"trtllm-bench left no report {path}",
            expected="JSON",
            found=error,
            cure=AGAIN,
        ) from error
