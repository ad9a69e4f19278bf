"""A double of `trtllm-bench`; its times are made up.

Of its commands `throughput` and `latency`: the flags of `build` are not known.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmops_assets_tests.toolchains.tensorrt_llm.doubles.behaviour import Behaviour, strict_parser
from llmops_assets_tests.toolchains.tensorrt_llm.doubles.layouts import (
    load_engine,
    percentiles,
    write_json,
)

TOOL = "trtllm-bench"
BACKENDS = ("pytorch", "tensorrt", "_autodeploy")


def parser() -> argparse.ArgumentParser:
    flags = strict_parser(TOOL)
    flags.add_argument("-m", "--model", type=str, required=True)
    flags.add_argument("--model_path", type=str, default=None)
    flags.add_argument("-w", "--workspace", type=str, default="/tmp")
    commands = flags.add_subparsers(dest="command", required=True)
    for command in ("throughput", "latency"):
        add = commands.add_parser(command, allow_abbrev=False).add_argument
        # The trap: an engine needs `tensorrt`, and it is not the default.
        add("--backend", choices=BACKENDS, default="pytorch")
        add("--engine_dir", type=str, default=None)
        add("--dataset", type=str, required=True)
        add("--num_requests", type=int, default=0)
        add("--warmup", type=int, default=2)
        add("--max_seq_len", type=int, default=None)
        add("--kv_cache_free_gpu_mem_fraction", type=float, default=0.9)
        add("--report_json", type=str, default=None)
        add("--iteration_log", type=str, default=None)
        if command == "throughput":
            add("--concurrency", type=int, default=-1)
            add("--streaming", action="store_true")
            add("--output_json", type=str, default=None)
            add("--request_json", type=str, default=None)
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)
    behaviour = Behaviour(TOOL)
    assert not (flags.backend == "tensorrt" and flags.max_seq_len is not None), (
        "max_seq_len is not a runtime parameter for the tensorrt backend"
    )
    behaviour.speak()
    config = None
    if flags.backend == "tensorrt":
        assert flags.engine_dir is not None, "the tensorrt backend needs an engine"
        config = load_engine(behaviour, Path(flags.engine_dir))
    requests = _requests(Path(flags.dataset), flags.num_requests)
    streaming = flags.command == "latency" or flags.streaming
    if flags.report_json is not None and not behaviour.is_to("no_report"):
        write_json(Path(flags.report_json), _report(behaviour, flags, config, requests, streaming))
    behaviour.leave()
    return 0


def _requests(dataset: Path, number: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines()]
    assert rows, f"no requests in {dataset}"
    assert all("output_tokens" in row and ("prompt" in row or "input_ids" in row) for row in rows)
    return rows[:number] if number else rows


def _report(
    behaviour: Behaviour,
    flags: argparse.Namespace,
    config: dict[str, Any] | None,
    requests: list[dict[str, Any]],
    streaming: bool,
) -> dict[str, Any]:
    tensorrt = flags.backend == "tensorrt" and not behaviour.is_to("other_backend")
    model = config["pretrained_config"] if config else {}
    build = config["build_config"] if config else {}
    mapping = model.get("mapping", {})
    world_size = mapping.get("world_size", 1)
    outputs = [row["output_tokens"] for row in requests]
    inputs = [len(row.get("input_ids") or row["prompt"].split()) for row in requests]
    concurrency = 1 if flags.command == "latency" else max(flags.concurrency, 1)
    # 20 ms to the first token and 5 ms for each further one, a little more every time.
    latencies = [20.0 + 5.0 * (tokens - 1) + 0.1 * number for number, tokens in enumerate(outputs)]
    total = sum(latencies) / concurrency
    report: dict[str, Any] = {
        "engine": {
            "model": flags.model,
            "model_path": flags.model_path,
            "engine_dir": flags.engine_dir,
            "version": behaviour.version,
            "backend": "TRT" if tensorrt else "Pytorch",
            "dtype": model.get("dtype"),
            "kv_cache_dtype": model.get("quantization", {}).get("kv_cache_quant_algo"),
            "quantization": model.get("quantization", {}).get("quant_algo"),
            "max_input_length": build.get("max_input_len"),
            "max_sequence_length": build.get("max_seq_len"),
        },
        "world_info": {
            "tp_size": mapping.get("tp_size", 1),
            "pp_size": mapping.get("pp_size", 1),
            "ep_size": None,
            "world_size": world_size,
            "max_batch_size": build.get("max_batch_size"),
            "max_num_tokens": build.get("max_num_tokens"),
            "scheduling_policy": "GUARANTEED_NO_EVICT",
            "kv_cache_percentage": flags.kv_cache_free_gpu_mem_fraction,
            "issue_rate": 1e9,
        },
        "request_info": {
            "num_requests": len(requests),
            "avg_num_concurrent_requests": float(concurrency),
            "avg_input_length": sum(inputs) / len(inputs),
            "avg_output_length": sum(outputs) / len(outputs),
        },
        "performance": {
            "total_latency_ms": total,
            "avg_request_latency_ms": sum(latencies) / len(latencies),
            "request_throughput_req_s": 1000 * len(requests) / total,
            "system_output_throughput_tok_s": 1000 * sum(outputs) / total,
            "system_total_throughput_tok_s": 1000 * (sum(inputs) + sum(outputs)) / total,
            "output_throughput_per_user_tok_s": 1000 * sum(outputs) / sum(latencies),
            "output_throughput_per_gpu_tok_s": 1000 * sum(outputs) / total / world_size,
            "request_latency_percentiles_ms": percentiles(latencies),
        },
        "dataset": {"isl": percentiles(inputs), "osl": percentiles(outputs)},
    }
    if streaming:
        first = [20.0 + 0.1 * number for number in range(len(requests))]
        later = [5.0] * len(requests)
        report["streaming_metrics"] = {
            "token_output_speed_tok_s": 200.0,
            "avg_ttft_ms": sum(first) / len(first),
            "avg_tpot_ms": 5.0,
            "tpot_percentiles": percentiles(later),
            "ttft_percentiles": percentiles(first),
            "gen_tps_percentiles": percentiles([200.0] * len(requests)),
        }
    return report


if __name__ == "__main__":
    raise SystemExit(main())
