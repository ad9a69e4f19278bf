"""Evaluates a checkpoint on held-out data: greedy answers, loss and latency.

Run as `python -m llmops_assets.develop.evaluate …`, through the tool runner.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from llmops_assets.develop.data import read_data
from llmops_assets.develop.directory import whole_directory
from llmops_assets.develop.harness_tasks import add_tool_options, read_metrics
from llmops_assets.develop.metrics import (
    PREDICTION_COLUMNS,
    TIME_COLUMNS,
    Metrics,
    is_exact_match,
    measure,
    with_times,
)
from llmops_assets.errors import DataError, LLMOpsError
from llmops_assets.evidence.latency import RequestTimes
from llmops_assets.spec import HarnessMetric
from llmops_assets.tools import report_progress

PREDICTIONS_FILE = "predictions.parquet"
EVALUATION_FILE = "evaluation.json"

BATCH_SIZE = 64
LATENCY_ROWS = 110
"""How many prompts are also answered one by one, to measure latency.

A 95th percentile needs 104 at a confidence of 99 %, see `latency_judgement.requests_needed`.
"""


def evaluate(
    checkpoint: Path,
    evaluation_data: Path,
    max_tokens: int,
    output: Path,
    threads: int,
    harness: Sequence[HarnessMetric] = (),
    repository: Path | None = None,
) -> Metrics:
    """Writes `predictions.parquet` and `evaluation.json`, see `metrics`.

    With metrics of the harness also what `harness.run_tasks` writes.

    Args:
        checkpoint: Hugging Face directory; computed in float32 whatever it is stored in.
        evaluation_data: data directory.
        max_tokens: longest answer, tokens.
        output: directory to write; must not exist.
        threads: CPU threads.
        harness: tasks of lm-evaluation-harness to run as well.
        repository: where their files are; needed with tasks.

    Raises:
        SpecError: a task cannot be run.
        DataError: the data are not valid, the output exists, or the checkpoint's
            tokenizer has no end-of-sequence token.
    """
    torch.set_num_threads(threads)
    rows: dict[str, list[str]] = read_data(evaluation_data).to_pydict()
    with whole_directory(output) as folder:
        tokenizer, model = load_checkpoint(checkpoint)
        # Batches of prompts of like length waste little on padding.
        order = sorted(range(len(rows["prompt"])), key=lambda row: len(rows["prompt"][row]))
        predictions = _answers(model, tokenizer, rows, order, max_tokens)
        predictions["loss"], predictions["tokens"] = _losses(model, tokenizer, rows, order)
        times = _times(model, tokenizer, rows["prompt"], max_tokens)
        predictions = with_times(predictions, times)[[*PREDICTION_COLUMNS, *TIME_COLUMNS]]
        metrics = measure(predictions)
        predictions.to_parquet(folder / PREDICTIONS_FILE, index=False)
        (folder / EVALUATION_FILE).write_text(
            json.dumps(metrics.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )
        if harness:
            from llmops_assets.develop.harness import run_tasks
            from llmops_assets.develop.harness_model import CheckpointModel

            assert repository is not None, "tasks come from a repository"
            run_tasks(CheckpointModel(tokenizer, model), harness, repository, folder)
    return metrics


def load_checkpoint(checkpoint: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model of a Hugging Face directory, in float32; runs no code from it.

    Raises:
        DataError: the tokenizer has no end-of-sequence token.
    """
    safely: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **safely)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, use_safetensors=True, dtype=torch.float32, **safely
    )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer of {checkpoint} has no end-of-sequence token",
            expected="eos_token in tokenizer_config.json",
            cure="set it to the token that ends an answer, and import the checkpoint again",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    return tokenizer, model


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list[str]],
    order: list[int],
    max_tokens: int,
) -> pd.DataFrame:
    answers: dict[int, str] = {}
    for batch in _batches(order, "answers"):
        texts = _generate(model, tokenizer, [rows["prompt"][row] for row in batch], max_tokens)
        answers |= dict(zip(batch, texts, strict=True))
    predictions = pd.DataFrame(rows)
    predictions["prediction"] = [answers[row] for row in range(len(order))]
    predictions["correct"] = [
        is_exact_match(prediction, completion)
        for prediction, completion in zip(
            predictions["prediction"], predictions["completion"], strict=True
        )
    ]
    return predictions


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Greedy answers, without special tokens; a streamer takes one prompt only."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    generated = model.generate(  # pyright: ignore[reportCallIssue] - a mixin's, typed as Tensor
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        streamer=streamer,
    )
    answers = generated[:, encoded["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@torch.inference_mode()
def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list[str]],
    order: list[int],
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood (nats) of each completion with its end token, and its length."""
    losses, lengths = [0.0] * len(order), [0] * len(order)
    for batch in _batches(order, "loss"):
        prompts = [tokenizer.encode(rows["prompt"][row]) for row in batch]
        completions = [
            [*tokenizer.encode(rows["completion"][row], add_special_tokens=False),
             tokenizer.eos_token_id]
            for row in batch
        ]  # fmt: skip
        longest = max(map(len, map(list.__add__, prompts, completions)))
        # Padding is on the right, where causal attention never looks at it: any id will do.
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids[place, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        likelihoods = model(input_ids=ids).logits.log_softmax(dim=-1)
        for place, row in enumerate(batch):
            start, length = len(prompts[place]), len(completions[place])
            target = ids[place, start : start + length]
            chosen = likelihoods[place, start - 1 : start - 1 + length].gather(1, target[:, None])
            losses[row], lengths[row] = -chosen.sum().item(), length
    return losses, lengths


class TokenClock(BaseStreamer):
    """Notes when each token of an answer came (`time.perf_counter`, seconds)."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then one token at a time."""
        if self._prompt_came:
            self.times.append(time.perf_counter())
        self._prompt_came = True

    def end(self) -> None:
        """Nothing is held back."""


def _times(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_tokens: int,
) -> list[RequestTimes | None]:
    """Times of evenly spread prompts answered one by one, after a warm-up; else None."""
    times: list[RequestTimes | None] = [None] * len(prompts)
    chosen = np.unique(np.linspace(0, len(prompts) - 1, LATENCY_ROWS).astype(int)).tolist()
    _generate(model, tokenizer, prompts[:1], max_tokens)
    for done, row in enumerate(chosen, start=1):
        clock = TokenClock()
        started = time.perf_counter()
        _generate(model, tokenizer, [prompts[row]], max_tokens, clock)
        ended = time.perf_counter()
        times[row] = RequestTimes.of(
            time_to_first_token=clock.times[0] - started,
            inter_token_latencies=[after - before for before, after in pairwise(clock.times)],
            end_to_end=ended - started,
        )
        report_progress(phase="latency", step=done, of=len(chosen))
    return times


def _batches(order: list[int], phase: str) -> Iterable[list[int]]:
    reported = 0.0
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        yield batch
        done = start + len(batch)
        if time.monotonic() - reported >= 1 or done == len(order):
            report_progress(step=done, of=len(order), phase=phase)
            reported = time.monotonic()


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmops_assets.develop.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="Hugging Face directory")
    parser.add_argument("--evaluation-data", required=True, type=Path, help="data directory")
    parser.add_argument("--max-tokens", required=True, type=int, help="longest answer")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--threads", required=True, type=int, help="CPU threads")
    add_tool_options(parser)
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        evaluate(
            options.checkpoint,
            options.evaluation_data,
            options.max_tokens,
            options.output,
            options.threads,
            read_metrics(options.harness),
            options.repository,
        )
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
