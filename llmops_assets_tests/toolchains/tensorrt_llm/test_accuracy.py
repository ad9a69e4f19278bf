"""What trtllm-eval says in its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.accuracy import (
    Accuracy,
    Task,
    command,
    read_accuracy,
)

from .doubles import trtllm_eval_double

PREFIX = "[11/23/2026-20:00:00] [TRT-LLM] [I] "


@pytest.mark.parametrize(
    ("task", "line", "expected"),
    [
        (
            "mmlu",
            "MMLU weighted average accuracy: 68.25 (14042)",
            Accuracy("mmlu", 0.6825, 14042),
        ),
        ("gsm8k", "lm-eval gsm8k average accuracy: 76.50", Accuracy("gsm8k", 0.765, None)),
        (
            "gpqa_diamond",
            "lm-eval gpqa_diamond_cot_zeroshot average accuracy: 0.00",
            Accuracy("gpqa_diamond_cot_zeroshot", 0.0, None),
        ),
    ],
)
def test_result_is_read_as_a_share(task: Task, line: str, expected: Accuracy) -> None:
    """The tool says 0 to 100, gates say 0 to 1; a logger's prefix may stand before it."""
    for printed in (line, PREFIX + line):
        found = read_accuracy(task, ["Average accuracy 70.00 (5) - law", printed, "done"])
        assert found.task == expected.task
        assert found.share == pytest.approx(expected.share)
        assert found.n == expected.n


@pytest.mark.parametrize(
    ("task", "log", "problem"),
    [
        ("mmlu", [], "did not say"),
        ("mmlu", ["lm-eval gsm8k average accuracy: 76.50"], "did not say"),
        ("gsm8k", ["MMLU weighted average accuracy: 68.25 (14042)"], "did not say"),
        ("gsm8k", ["lm-eval gsm8k average accuracy: 76.50"] * 2, "did not say"),
        ("gsm8k", ["lm-eval gsm8k average accuracy: nan"], "no percentage"),
        ("gsm8k", ["lm-eval gsm8k average accuracy: 101.0"], "no percentage"),
        ("gsm8k", ["lm-eval gsm8k average accuracy: -1.0"], "no percentage"),
        ("gsm8k", ["lm-eval gsm8k average accuracy: none"], "no percentage"),
    ],
)
def test_log_is_refused(task: Task, log: list[str], problem: str) -> None:
    """trtllm-eval has no report, so what is not found in its log was not measured."""
    with pytest.raises(ToolchainError, match=problem):
        read_accuracy(task, log)


@pytest.mark.parametrize("task", get_args(Task))
def test_command_is_one_that_the_tool_takes(task: Task, tmp_path: Path) -> None:
    """Parsed strictly by the double: an engine is named to the backend that loads it."""
    name, *arguments = command(
        "engine", tmp_path / "engine", tmp_path / "hf", task, tmp_path,
        tensor_parallel_size=2, samples=100, random_seed=3,
    )  # fmt: skip
    assert name == "trtllm-eval"
    options: Any = trtllm_eval_double.parser().parse_args(arguments)
    assert (options.backend, options.task, options.tp_size) == ("tensorrt", task, 2)
    assert (options.num_samples, options.random_seed) == (100, 3)
    assert not options.trust_remote_code


def test_llmapi_is_evaluated_with_pytorch(tmp_path: Path) -> None:
    """All questions unless told otherwise."""
    _, *arguments = command("llmapi", tmp_path, tmp_path, "mmlu", tmp_path)
    options = trtllm_eval_double.parser().parse_args(arguments)
    assert options.backend == "pytorch"
    assert options.num_samples is None


def test_missing_data_are_refused(tmp_path: Path) -> None:
    """The tool would look for them on the internet."""
    with pytest.raises(ToolchainError, match="are not there"):
        command("engine", tmp_path, tmp_path, "mmlu", tmp_path / "none")
