"""Runs `trtllm-bench` on the prompts of the evaluation data, at every concurrency of a spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from llmops_assets.evidence.latency import LatencySummary
from llmops_assets.spec import ModelSpec, TensorRTLLMEngine
from llmops_assets.toolchains.tensorrt_llm.benchmark import (
    Benchmark,
    read_summary,
    write_dataset,
)
from llmops_assets.toolchains.tensorrt_llm.containers import Backend
from llmops_assets.toolchains.tensorrt_llm.running import run_listening
from llmops_assets.tools import ToolRunner


@dataclass(frozen=True)
class Throughput:
    """What was measured, and how long that took (seconds)."""

    summary: LatencySummary
    seconds: float


def measure_throughput(
    backend: Backend,
    checkpoint: Path,
    engine: Path,
    prompts: Sequence[Sequence[int]],
    llm_options: Path | None,
    spec: ModelSpec,
    tools: ToolRunner,
) -> Throughput:
    """Measures an engine without a server between, at the concurrencies of the latency gate.

    Args:
        backend: what `engine` is.
        checkpoint: Hugging Face directory.
        engine: engine directory, or checkpoint with its frozen `model.yaml`.
        prompts: token ids; they are asked in turn, again if they are few.
        llm_options: see `Benchmark`.
        spec: says how many requests, at which concurrencies, with which longest answer.
        tools: run `trtllm-bench`, in a folder of theirs.

    Raises:
        ToolError, ToolchainError: the tool failed, or its report is not about this engine.
    """
    assert isinstance(spec.engine, TensorRTLLMEngine)
    gate = spec.gates.latency
    folder = tools.work / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    dataset = folder / "dataset.jsonl"
    write_dataset(
        list(islice(cycle(prompts), gate.requests)), spec.constraints.max_output_tokens, dataset
    )
    benchmarks = [
        Benchmark(
            backend=backend,
            model_name=spec.name,
            checkpoint=checkpoint,
            engine=engine,
            dataset=dataset,
            output=folder,
            requests=gate.requests,
            concurrency=concurrency,
            tensor_parallel_size=spec.engine.parallelism.tensor,
            world_size=spec.engine.parallelism.world_size,
            kv_cache_free_gpu_mem_fraction=spec.engine.kv_cache.free_gpu_mem_fraction,
            scheduler=spec.engine.scheduler,
            chunked_context=spec.engine.chunked_context,
            llm_options=llm_options,
        )
        for concurrency in gate.measured_concurrencies
    ]
    seconds = 0.0
    for benchmark in benchmarks:
        for left in (benchmark.report, benchmark.request_records):
            left.unlink(missing_ok=True)  # of a killed step: not what is measured now
        seconds += run_listening(tools, "trtllm-bench", benchmark.command()).run.seconds
    summary = read_summary(benchmarks, gate.objective, spec.gates.confidence)
    return Throughput(summary, seconds)
