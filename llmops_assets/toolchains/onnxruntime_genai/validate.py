"""Compares an engine with its checkpoint and measures it; run through the tool runner.

Run as `python -m llmops_assets.toolchains.onnxruntime_genai.validate …`. The engine
answers through the code that serves it in Triton. Its loss and perplexity are measured as
its checkpoint's are, but never pass it alone: an engine can keep them and still answer
differently.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmops_assets.develop import metrics
from llmops_assets.develop.data import read_data
from llmops_assets.develop.directory import whole_directory
from llmops_assets.develop.evaluate import load_checkpoint
from llmops_assets.develop.harness_tasks import add_tool_options, read_metrics
from llmops_assets.errors import LLMOpsError, ToolchainError
from llmops_assets.evidence.latency import RequestTimes
from llmops_assets.toolchains.onnxruntime_genai.engine_directory import (
    GENERATION_CONFIG,
    TOKENIZER,
    read_json,
)
from llmops_assets.toolchains.onnxruntime_genai.triton_model.generation import (
    Answer,
    Sampling,
    TextGenerator,
)
from llmops_assets.tools import report_progress

Item = TypeVar("Item")

PREDICTIONS_FILE = "predictions.parquet"
VALIDATION_FILE = "validation.json"
COMPARED_PROMPTS = 50
"""How many prompts checkpoint and engine both answer, evenly spread over the data."""


@dataclass(frozen=True)
class LogitDistance:
    """Absolute differences of logits over all compared tokens and the whole vocabulary."""

    largest: float
    mean: float


@dataclass(frozen=True)
class Agreement:
    """How close the engine's greedy answers are to the checkpoint's.

    `token_agreement` is the share of 1 of token positions, the longer answer counting,
    that hold the same token; `prompts_equal` counts prompts with equal answers. Logits are
    compared on the checkpoint's answers.
    """

    prompts: int
    token_agreement: float
    prompts_equal: int
    logit_distance: LogitDistance


def validate(
    checkpoint: Path,
    engine: Path,
    evaluation_data: Path,
    output: Path,
    *,
    max_input_tokens: int,
    max_output_tokens: int,
    threads: int,
    harness: Path | None = None,
    repository: Path | None = None,
) -> None:
    """Writes `predictions.parquet`, see `develop.metrics`, and `validation.json`.

    The latter holds the metrics of the predictions, `Agreement` and `tokenizer_parity`.

    Args:
        checkpoint: Hugging Face directory, computed in float32.
        engine: the engine's directory.
        evaluation_data: data directory.
        output: directory to write; must not exist.
        max_input_tokens: longest prompt, tokens.
        max_output_tokens: longest answer, tokens.
        threads: CPU threads of each of the two models.
        harness: JSON array of metrics of lm-evaluation-harness to measure as well.
        repository: where their files are; needed with them.

    Raises:
        LLMOpsError: the data are not valid, a prompt is too long for the model's limits
            or a row for the engine, or the output exists.
    """
    torch.set_num_threads(threads)
    rows: dict[str, list[str]] = read_data(evaluation_data).to_pydict()
    generator = TextGenerator(engine, engine / TOKENIZER, threads)
    prompts = [generator.encode(prompt) for prompt in rows["prompt"]]
    tokenizer, model = load_checkpoint(checkpoint)
    completions = [
        [*generator.tokenizer.encode(completion, add_special_tokens=False).ids,
         tokenizer.eos_token_id]
        for completion in rows["completion"]
    ]  # fmt: skip
    context_length = read_json(engine / GENERATION_CONFIG)["model"]["context_length"]
    _check_lengths(prompts, completions, max_input_tokens, context_length)
    equal = sum(
        tokenizer.encode(text) == ids for text, ids in zip(rows["prompt"], prompts, strict=True)
    )
    agreement = _compare(model, tokenizer, generator, rows["prompt"], max_output_tokens)
    longest = model.config.max_position_embeddings
    del model  # it would disturb what is measured next
    predictions = _answer(generator, rows, max_output_tokens)
    predictions["loss"] = _losses(generator, prompts, completions)
    predictions["tokens"] = [len(completion) for completion in completions]
    predictions = predictions[[*metrics.PREDICTION_COLUMNS, *metrics.TIME_COLUMNS]]
    validation: dict[str, Any] = {
        **asdict(agreement),
        "logit_distance": {
            name: metrics.finite(value) for name, value in asdict(agreement.logit_distance).items()
        },
        "tokenizer_parity": {"prompts": len(prompts), "equal": equal},
        **metrics.measure(predictions).as_json(),
    }
    with whole_directory(output) as folder:
        predictions.to_parquet(folder / PREDICTIONS_FILE, index=False)
        (folder / VALIDATION_FILE).write_text(
            json.dumps(validation, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )
        if tasks := read_metrics(harness):
            from llmops_assets.develop.harness import run_tasks
            from llmops_assets.develop.harness_model import prefix_token
            from llmops_assets.toolchains.onnxruntime_genai.harness_model import EngineModel

            assert repository is not None, "tasks come from a repository"
            asked = EngineModel(generator, longest, prefix_token(tokenizer))
            run_tasks(asked, tasks, repository, folder)


def _check_lengths(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    max_input_tokens: int,
    context_length: int,
) -> None:
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(prompt) > max_input_tokens:
            raise ToolchainError(
                f"Row {row} of the evaluation data would be refused in production",
                expected=f"at most {max_input_tokens} tokens",
                found=f"{len(prompt)} tokens",
                cure="raise constraints.max_input_tokens in the spec, or shorten the prompt",
            )
        if len(prompt) + len(completion) > context_length:
            raise ToolchainError(
                f"Row {row} of the evaluation data does not fit into the engine's context",
                expected=f"at most {context_length} tokens of prompt and completion",
                found=f"{len(prompt)} + {len(completion)} tokens",
                cure="shorten the row, or use a model with a longer context",
            )


@torch.inference_mode()
def _compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generator: TextGenerator,
    texts: Sequence[str],
    max_output_tokens: int,
) -> Agreement:
    chosen: list[int] = np.unique(
        np.linspace(0, len(texts) - 1, COMPARED_PROMPTS).astype(int)
    ).tolist()
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_output_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generate: Any = model.generate  # transformers declares it as an attribute of any kind
    same = positions = prompts_equal = compared = 0
    largest = total = 0.0
    for done, row in enumerate(chosen, start=1):
        prompt = tokenizer.encode(texts[row])
        ids = torch.tensor([prompt])
        sequence = generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )[0]
        reference = sequence[len(prompt) :].tolist()
        # The engine gets the prompt as its own tokenizer reads it, as in production.
        answer = list(generator.tokens(generator.encode(texts[row]), Sampling(max_output_tokens)))
        same += sum(left == right for left, right in zip(reference, answer, strict=False))
        positions += max(len(reference), len(answer))
        prompts_equal += reference == answer
        # The logits that chose the answer's tokens are those of the tokens before them.
        context = sequence[:-1]
        expected = model(input_ids=context[None]).logits[0, len(prompt) - 1 :].numpy()
        found = generator.logits(context.tolist())[len(prompt) - 1 :]
        distance = np.abs(expected.astype(np.float64) - found)
        largest = max(largest, float(distance.max()))
        total += float(distance.sum())
        compared += distance.size
        report_progress(phase="agreement", step=done, of=len(chosen))
    return Agreement(
        prompts=len(chosen),
        token_agreement=same / positions,
        prompts_equal=prompts_equal,
        logit_distance=LogitDistance(largest=largest, mean=total / compared),
    )


def _answer(
    generator: TextGenerator, rows: dict[str, list[str]], max_output_tokens: int
) -> pd.DataFrame:
    """Every row answered alone. The engine must be warm: it must have answered before."""
    answers = [
        _timed_answer(generator, prompt, max_output_tokens)
        for prompt in _reported(rows["prompt"], "answers")
    ]
    predictions = pd.DataFrame(rows)
    predictions["prediction"] = [text for text, _ in answers]
    predictions["correct"] = [
        metrics.is_exact_match(text, completion)
        for (text, _), completion in zip(answers, rows["completion"], strict=True)
    ]
    return metrics.with_times(predictions, [times for _, times in answers])


def _timed_answer(
    generator: TextGenerator, prompt: str, max_output_tokens: int
) -> tuple[str, RequestTimes]:
    started = time.perf_counter()
    answer = Answer(generator.tokenizer)
    text = ""
    came: list[float] = []
    for token in generator.tokens(generator.encode(prompt), Sampling(max_output_tokens)):
        came.append(time.perf_counter())
        if token not in generator.end_tokens:
            text += answer.add(token)
    text += answer.finish()
    return text, RequestTimes.of(
        time_to_first_token=came[0] - started,
        inter_token_latencies=[after - before for before, after in pairwise(came)],
        end_to_end=time.perf_counter() - started,
    )


def _losses(
    generator: TextGenerator, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> list[float]:
    """Negative log-likelihood (nats) of each completion, its end token included."""
    losses: list[float] = []
    for prompt, completion in _reported(list(zip(prompts, completions, strict=True)), "loss"):
        # The logits that foretell the first token are those after the prompt's last one.
        logits = generator.logits([*prompt, *completion[:-1]])[len(prompt) - 1 :]
        likelihoods = torch.tensor(logits).log_softmax(dim=-1)
        losses.append(-likelihoods.gather(1, torch.tensor(completion)[:, None]).sum().item())
    return losses


def _reported(items: Sequence[Item], phase: str) -> Iterator[Item]:
    reported = 0.0
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - reported >= 1 or done == len(items):
            report_progress(phase=phase, step=done, of=len(items))
            reported = time.monotonic()


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llmops_assets.toolchains.onnxruntime_genai.validate", description=__doc__
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="Hugging Face directory")
    parser.add_argument("--engine", required=True, type=Path, help="the engine's directory")
    parser.add_argument("--evaluation-data", required=True, type=Path, help="data directory")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--max-input-tokens", required=True, type=int, help="longest prompt")
    parser.add_argument("--max-output-tokens", required=True, type=int, help="longest answer")
    parser.add_argument("--threads", required=True, type=int, help="CPU threads")
    add_tool_options(parser)
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        validate(**vars(options))
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
