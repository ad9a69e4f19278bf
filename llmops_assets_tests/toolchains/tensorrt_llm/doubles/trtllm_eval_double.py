"""A double of `trtllm-eval`; its accuracies are made up. The real one writes no report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llmops_assets_tests.toolchains.tensorrt_llm.doubles.behaviour import Behaviour, strict_parser
from llmops_assets_tests.toolchains.tensorrt_llm.doubles.layouts import load_engine, require_local

TOOL = "trtllm-eval"
ACCURACY = 62.5
TASKS = (
    "mmlu", "gsm8k", "cnn_dailymail", "gpqa_diamond", "gpqa_main", "gpqa_extended",
    "json_mode_eval", "mmmu",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    flags = strict_parser(TOOL)
    add = flags.add_argument
    add("--model", type=str, required=True)
    add("--tokenizer", type=str, default=None)
    add("--backend", choices=("pytorch", "tensorrt"), default="pytorch")
    for name in (
        "--max_batch_size", "--max_num_tokens", "--max_seq_len", "--max_beam_width", "--tp_size",
        "--pp_size", "--ep_size", "--gpus_per_node",
    ):  # fmt: skip
        add(name, type=int, default=None)
    add("--kv_cache_free_gpu_memory_fraction", type=float, default=0.9)
    add("--extra_llm_api_options", type=str, default=None)
    for name in ("--trust_remote_code", "--disable_kv_cache_reuse"):
        add(name, action="store_true")
    commands = flags.add_subparsers(dest="task", required=True)
    for task in TASKS:
        add = commands.add_parser(task, allow_abbrev=False).add_argument
        add("--dataset_path", type=str, default=None)
        add("--num_samples", type=int, default=None)
        add("--random_seed", type=int, default=0)
        if task == "mmlu":
            add("--check_accuracy", action="store_true")
            add("--accuracy_threshold", type=float, default=30.0)
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)
    behaviour = Behaviour(TOOL)
    behaviour.speak()
    engine = Path(flags.model)
    if flags.backend == "tensorrt":
        load_engine(behaviour, engine)
    elif (engine / "rank0.engine").exists():
        # PyTorch, the default, looks for weights in what is an engine.
        behaviour.fail(
            "not_an_engine_directory", f"RuntimeError: No weight files found in {engine}"
        )
    require_local(flags.dataset_path or f"the dataset of {flags.task}")
    number = flags.num_samples or 100
    if not behaviour.is_to("no_accuracy"):
        if flags.task == "mmlu":
            print(f"MMLU weighted average accuracy: {ACCURACY:.2f} ({number})", flush=True)
        else:
            print(f"lm-eval {flags.task} average accuracy: {ACCURACY:.2f}", flush=True)
    if flags.task == "mmlu" and flags.check_accuracy:
        assert flags.accuracy_threshold <= ACCURACY, "Expected accuracy is not reached"
    behaviour.leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
