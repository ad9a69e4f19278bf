"""Accuracy by `trtllm-eval`, which has no report: its last words in the log are the result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.benchmark import BACKEND_OPTION
from llmops_assets.toolchains.tensorrt_llm.containers import Backend

Task = Literal[
    "mmlu", "gsm8k", "cnn_dailymail", "gpqa_diamond", "gpqa_main", "gpqa_extended",
    "json_mode_eval", "mmmu",
]  # fmt: skip

# Both lines may have a logger's prefix. The name of a task in lm-eval is not always that of
# the subcommand (gpqa_diamond is gpqa_diamond_cot_zeroshot), so it is read, not compared.
_MMLU = re.compile(r"MMLU weighted average accuracy: (?P<accuracy>\S+) \((?P<n>\d+)\)")
_LM_EVAL = re.compile(r"lm-eval (?P<task>\S+) average accuracy: (?P<accuracy>\S+)")


@dataclass(frozen=True)
class Accuracy:
    """What trtllm-eval measured.

    Attributes:
        task: as the log names it.
        share: of 1.
        n: how many questions, where the log says so.
    """

    task: str
    share: float
    n: int | None


def command(
    backend: Backend,
    model: Path,
    tokenizer: Path,
    task: Task,
    dataset: Path,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    samples: int | None = None,
    random_seed: int = 0,
) -> list[str]:
    """The command for the tool runner.

    Args:
        backend: what `model` is. trtllm-eval takes anything for PyTorch unless told.
        model: engine directory, or checkpoint.
        tokenizer: Hugging Face directory.
        task: which evaluation.
        dataset: local copy of its data; without one it would be downloaded.
        tensor_parallel_size: of the engine.
        pipeline_parallel_size: of the engine.
        samples: how many questions; None for all.
        random_seed: of their choice.

    Raises:
        ToolchainError: the dataset is not there.
    """
    if not dataset.exists():
        raise ToolchainError(
            f"The data of {task} are not there",
            expected=dataset,
            found="no such file or folder",
            cure="put a local copy there; steps of a release download nothing",
        )
    few = [] if samples is None else ["--num_samples", str(samples)]
    return [
        "trtllm-eval",
        "--model", str(model),
        "--tokenizer", str(tokenizer),
        "--backend", BACKEND_OPTION[backend],
        "--tp_size", str(tensor_parallel_size),
        "--pp_size", str(pipeline_parallel_size),
        task,
        "--dataset_path", str(dataset),
        *few,
        "--random_seed", str(random_seed),
    ]  # fmt: skip


def read_accuracy(task: Task, log: Sequence[str]) -> Accuracy:
    """The result in the lines that trtllm-eval printed.

    Raises:
        ToolchainError: there is none, there are several, or it is no percentage.
    """
    pattern = _MMLU if task == "mmlu" else _LM_EVAL
    matches = [match for line in log if (match := pattern.search(line))]
    if len(matches) != 1:
        raise ToolchainError(
            f"trtllm-eval did not say what {task} resulted in",
            expected=f"one line as {pattern.pattern!r}",
            found=f"{len(matches)} of them",
            cure="look into the step's log for the cause, then materialize the asset again",
        )
    found: Mapping[str, str] = matches[0].groupdict()
    try:
        percent = float(found["accuracy"])
    except ValueError:
        percent = -1.0
    # Written so that NaN is refused as well.
    if not 0 <= percent <= 100:
        raise ToolchainError(
            f"The accuracy of {task} is no percentage",
            expected="a number from 0 to 100",
            found=found["accuracy"],
            cure="look into the step's log; the engine may answer nothing but garbage",
        )
    return Accuracy(
        task=found.get("task", task),
        share=percent / 100,
        n=int(found["n"]) if "n" in found else None,
    )
