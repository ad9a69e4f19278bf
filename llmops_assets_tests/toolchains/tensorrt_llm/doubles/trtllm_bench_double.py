"""A double of `trtllm-bench`; its times are made up.

Of its commands `throughput` and `latency`: the flags of `build` are not known.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
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
        add("--extra_llm_api_options", type=str, default=None)
        for name in ("--max_batch_size", "--max_num_tokens", "--ep"):
            add(name, type=int, default=None)
        for name in ("--tp", "--pp", "--beam_width"):
            add(name, type=int, default=1)
        if command == "throughput":
            add("--concurrency", type=int, default=-1)
            add("--streaming", action="store_true")
            add("--output_json", type=str, default=None)
            add("--request_json", type=str, default=None)
            add("--eos_id", type=int, default=-1)
            add("--enable_chunked_context", action="store_true")
            add("--scheduler_policy", choices=("guaranteed_no_evict", "max_utilization"),
                default="guaranteed_no_evict")  # fmt: skip
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)
    behaviour = Behaviour(TOOL)
    assert not (flags.backend == "tensorrt" and flags.max_seq_len is not None), (
        "max_seq_len is not a runtime parameter for C++ backend"
    )
    behaviour.speak()
    if flags.extra_llm_api_options is not None:
        # Read by a YAML library that this double, with the standard library alone, has not.
        assert Path(flags.extra_llm_api_options).read_text(encoding="utf-8").strip()
    requests = _requests(Path(flags.dataset), flags.num_requests)
    config = None
    if flags.backend == "tensorrt":
        assert flags.engine_dir is not None, "the tensorrt backend needs an engine"
        config = load_engine(behaviour, Path(flags.engine_dir))
        _check_lengths(behaviour, requests, config["build_config"]["max_seq_len"])
    records = _records(requests, _concurrency(flags, requests))
    if flags.command == "throughput" and flags.request_json is not None:
        write_json(Path(flags.request_json), records)
    if flags.report_json is not None and not behaviour.is_to("no_report"):
        write_json(Path(flags.report_json), _report(behaviour, flags, config, records))
    behaviour.leave()
    return 0


def _requests(dataset: Path, number: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines()]
    assert rows, f"no requests in {dataset}"
    assert all("output_tokens" in row and ("prompt" in row or "input_ids" in row) for row in rows)
    return rows[:number] if number else rows


def _input_tokens(request: Mapping[str, Any]) -> int:
    return len(request.get("input_ids") or request["prompt"].split())


def _check_lengths(behaviour: Behaviour, requests: list[dict[str, Any]], most: int) -> None:
    longest = max(_input_tokens(request) + request["output_tokens"] for request in requests)
    if longest > most:
        behaviour.fail(
            "requests_too_long",
            f"RuntimeError: Engine supports a max sequence of {most}. Provided dataset contains "
            f"a maximum sequence of {longest}. Please rebuild a new engine to support this "
            "dataset.",
        )


def _concurrency(flags: argparse.Namespace, requests: list[dict[str, Any]]) -> int:
    if flags.command == "latency":
        return 1
    return flags.concurrency if flags.concurrency > 0 else len(requests)


def _records(requests: list[dict[str, Any]], concurrency: int) -> list[dict[str, Any]]:
    """One record a request, as `--request_json` holds it; times in nanoseconds.

    20 ms to the first token and 5 ms for each further one, a little more every time.
    """
    free = [0] * concurrency
    records = []
    for number, request in enumerate(requests):
        tokens = request["output_tokens"]
        start = free[number % concurrency]
        first = start + 20_000_000 + 100_000 * number
        end = first + 5_000_000 * (tokens - 1)
        if tokens == 1:
            # The first token came with the end, and is not timed by itself.
            first = -1
        free[number % concurrency] = end
        records.append(
            {
                "id": number,
                "num_input_tokens": _input_tokens(request),
                "error_tokens": 0,
                "start_timestamp": start,
                "first_token_timestamp": first,
                "end_timestamp": end,
                "decode_iteration": tokens - 1,
                "output": "",
                "output_tokens": tokens,
            }
        )
    return records


def _milliseconds(records: list[dict[str, Any]], since: str, until: str) -> list[float]:
    # What was not timed counts as no time in the averages of the real report.
    return [
        max(0, record[f"{until}_timestamp"] - record[f"{since}_timestamp"]) / 1e6
        if record[f"{until}_timestamp"] >= 0
        else 0.0
        for record in records
    ]


def _report(
    behaviour: Behaviour,
    flags: argparse.Namespace,
    config: dict[str, Any] | None,
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    tensorrt = flags.backend == "tensorrt" and not behaviour.is_to("other_backend")
    model = config["pretrained_config"] if config else {}
    build = config["build_config"] if config else {}
    mapping = model.get("mapping", {})
    world_size = mapping.get("world_size", flags.tp * flags.pp)
    outputs = [record["output_tokens"] for record in records]
    inputs = [record["num_input_tokens"] for record in records]
    latencies = _milliseconds(records, "start", "end")
    total = max(record["end_timestamp"] for record in records) / 1e6
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
            "tp_size": mapping.get("tp_size", flags.tp),
            "pp_size": mapping.get("pp_size", flags.pp),
            "ep_size": None,
            "world_size": world_size,
            "max_batch_size": build.get("max_batch_size"),
            "max_num_tokens": build.get("max_num_tokens"),
            "scheduling_policy": getattr(flags, "scheduler_policy", "guaranteed_no_evict").upper(),
            "kv_cache_percentage": flags.kv_cache_free_gpu_mem_fraction,
            "issue_rate": 1e9,
        },
        "request_info": {
            "num_requests": len(records),
            "avg_num_concurrent_requests": sum(latencies) / total,
            "avg_input_length": sum(inputs) / len(inputs),
            "avg_output_length": sum(outputs) / len(outputs),
        },
        "performance": {
            "total_latency_ms": total,
            "avg_request_latency_ms": sum(latencies) / len(latencies),
            "request_throughput_req_s": 1000 * len(records) / total,
            "system_output_throughput_tok_s": 1000 * sum(outputs) / total,
            "system_total_throughput_tok_s": 1000 * (sum(inputs) + sum(outputs)) / total,
            "output_throughput_per_user_tok_s": 1000 * sum(outputs) / sum(latencies),
            "output_throughput_per_gpu_tok_s": 1000 * sum(outputs) / total / world_size,
            "request_latency_percentiles_ms": percentiles(latencies),
        },
        "dataset": {"isl": percentiles(inputs), "osl": percentiles(outputs)},
    }
    if flags.command == "latency" or flags.streaming:
        first = _milliseconds(records, "start", "first_token")
        later = [5.0] * len(records)
        report["streaming_metrics"] = {
            "token_output_speed_tok_s": 200.0,
            "avg_ttft_ms": sum(first) / len(first),
            "avg_tpot_ms": 5.0,
            "tpot_percentiles": percentiles(later),
            "ttft_percentiles": percentiles(first),
            "gen_tps_percentiles": percentiles([200.0] * len(records)),
        }
    return report


if __name__ == "__main__":
    raise SystemExit(main())
