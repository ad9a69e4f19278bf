"""Compares an engine with its checkpoint and measures it; run through the tool runner.

Run as `python -m llmops_assets.toolchains.onnxruntime_genai.validate …`. The engine
answers through the code that serves it in Triton. Perplexity is not compared: an engine
can keep it and still answer differently.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmops_assets.develop import metrics
from llmops_assets.develop.data import read_data
from llmops_assets.develop.directory import whole_directory
from llmops_assets.develop.evaluate import load_checkpoint
from llmops_assets.errors import LLMOpsError, ToolchainError
from llmops_assets.toolchains.onnxruntime_genai.engine_directory import TOKENIZER
from llmops_assets.toolchains.onnxruntime_genai.triton_model.generation import (
    Answer,
    Sampling,
    TextGenerator,
)
from llmops_assets.tools import report_progress

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
) -> None:
    """Writes `predictions.parquet` and `validation.json`.

    Args:
        checkpoint: Hugging Face directory, computed in float32.
        engine: the engine's directory.
        evaluation_data: data directory.
        output: directory to write; must not exist.
        max_input_tokens: longest prompt, tokens.
        max_output_tokens: longest answer, tokens.
        threads: CPU threads of each of the two models.

    Raises:
        LLMOpsError: the data are not valid, a prompt is too long for the model's limits,
            or the output exists.
    """
    torch.set_num_threads(threads)
    rows: dict[str, list[str]] = read_data(evaluation_data).to_pydict()
    generator = TextGenerator(engine, engine / TOKENIZER, threads)
    prompts = [generator.encode(prompt) for prompt in rows["prompt"]]
    _check_lengths(prompts, max_input_tokens)
    tokenizer, model = load_checkpoint(checkpoint)
    equal = sum(
        tokenizer.encode(text) == ids for text, ids in zip(rows["prompt"], prompts, strict=True)
    )
    agreement = _compare(model, tokenizer, generator, rows["prompt"], max_output_tokens)
    del model  # it would disturb what is measured next
    predictions = _answer(generator, rows, prompts, max_output_tokens)
    latency = asdict(metrics.latency(predictions["latency_seconds"]))
    first = asdict(metrics.latency(predictions["time_to_first_token_seconds"]))
    slices = metrics.slice_metrics(predictions)
    validation: dict[str, Any] = {
        **asdict(agreement),
        "tokenizer_parity": {"prompts": len(prompts), "equal": equal},
        "rows": len(predictions),
        "exact_match": metrics.exact_match(predictions),
        "slices": {name: asdict(of_slice) for name, of_slice in slices.items()},
        "latency_seconds": latency,
        "time_to_first_token_seconds": first,
        "tokens_per_second": float(
            predictions["output_tokens"].sum() / predictions["latency_seconds"].sum()
        ),
    }
    with whole_directory(output) as folder:
        predictions.to_parquet(folder / PREDICTIONS_FILE, index=False)
        (folder / VALIDATION_FILE).write_text(
            json.dumps(validation, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )


def _check_lengths(prompts: Sequence[Sequence[int]], max_input_tokens: int) -> None:
    for row, prompt in enumerate(prompts):
        if len(prompt) > max_input_tokens:
            raise ToolchainError(
                f"Row {row} of the evaluation data would be refused in production",
                expected=f"at most {max_input_tokens} tokens",
                found=f"{len(prompt)} tokens",
                cure="raise constraints.max_input_tokens in the spec, or shorten the prompt",
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
    generator: TextGenerator,
    rows: dict[str, list[str]],
    prompts: Sequence[Sequence[int]],
    max_output_tokens: int,
) -> pd.DataFrame:
    """Every row answered alone; times in seconds, tokens without the prompt's."""
    answers: list[dict[str, Any]] = []
    reported = 0.0
    for row, prompt in enumerate(prompts):
        answer = Answer(generator.tokenizer)
        text = ""
        tokens = 0
        first = 0.0
        started = time.perf_counter()
        for token in generator.tokens(prompt, Sampling(max_output_tokens)):
            tokens += 1
            if tokens == 1:
                first = time.perf_counter() - started
            if token not in generator.end_tokens:
                text += answer.add(token)
        text += answer.finish()
        answers.append(
            {
                "prediction": text,
                "correct": metrics.is_exact_match(text, rows["completion"][row]),
                "output_tokens": tokens,
                "latency_seconds": time.perf_counter() - started,
                "time_to_first_token_seconds": first,
            }
        )
        if time.monotonic() - reported >= 1 or row + 1 == len(prompts):
            report_progress(phase="answers", step=row + 1, of=len(prompts))
            reported = time.monotonic()
    return pd.concat([pd.DataFrame(rows), pd.DataFrame(answers)], axis="columns")


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
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        validate(**vars(options))
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
