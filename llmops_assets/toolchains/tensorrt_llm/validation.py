"""Compares what TensorRT-LLM serves with its checkpoint; run in the serving image.

Run as `python -m llmops_assets.toolchains.tensorrt_llm.validation …` through the tool
runner. It writes what every toolchain's validation writes: `validation.json` and
`predictions.parquet`.

The checkpoint answers first and leaves the GPU before the engine comes, as one card seldom
holds both. An engine is loaded by `tensorrt_llm._tensorrt_engine.LLM`: `tensorrt_llm.LLM` has
been the PyTorch backend since 1.0 and does not load engines (TensorRT-LLM#8223).

Nothing here was run against a GPU: names and arguments are those of TensorRT-LLM's sources.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmops_assets.develop import metrics
from llmops_assets.develop.data import read_data
from llmops_assets.develop.directory import whole_directory
from llmops_assets.errors import LLMOpsError, ToolchainError
from llmops_assets.evidence.latency import RequestTimes
from llmops_assets.toolchains.tensorrt_llm.containers import Backend
from llmops_assets.toolchains.tensorrt_llm.model_yaml import MODEL_YAML, read_llmapi_model
from llmops_assets.tools import report_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREDICTIONS_FILE = "predictions.parquet"
VALIDATION_FILE = "validation.json"
LLM_MODULES: Mapping[Backend, str] = {
    "engine": "tensorrt_llm._tensorrt_engine",
    "llmapi": "tensorrt_llm",
}
COMPARED_PROMPTS = 50
"""How many prompts both answer, evenly spread over the data."""
NOT_MEASURED = math.inf
"""Loss where the engine gives no logits of prompts: worse than any bound, so that no gate on
it can pass."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    `token_ids` end with the end token if the model ended the answer. `logits` are float32 of
    shape (tokens, vocabulary): row i chose token i. An engine may have more columns, as
    TensorRT-LLM pads the vocabulary for tensor parallelism.
    """

    token_ids: list[int]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class TimedAnswer:
    """An answer as a user gets it, alone on the machine."""

    text: str
    times: RequestTimes


class Reference(Protocol):
    """What an engine is compared with."""

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer: ...


class Served(Reference, Protocol):
    """What serves."""

    def timed_answer(self, prompt: Sequence[int], max_tokens: int) -> TimedAnswer: ...

    def prompt_logits(self, token_ids: Sequence[int]) -> NDArray[np.float32] | None:
        """Logits after each token, (tokens, vocabulary); None if the engine gives none."""
        ...


@dataclass(frozen=True)
class LogitDistance:
    """Absolute differences of logits over all compared tokens and the whole vocabulary."""

    largest: float
    mean: float


@dataclass(frozen=True)
class Agreement:
    """How close the greedy answers are to the checkpoint's.

    `token_agreement` is the share of 1 of token positions, the longer answer counting, that
    hold the same token. Logits are compared up to the first token that differs and at it,
    as both have read the same text until then.
    """

    prompts: int
    token_agreement: float
    prompts_equal: int
    logit_distance: LogitDistance


def compare(expected: Sequence[Answer], found: Sequence[Answer]) -> Agreement:
    """How close answers are to those of the checkpoint to the same prompts.

    Raises:
        ToolchainError: there is nothing to compare, the engine's vocabulary is smaller than
            the checkpoint's, it gave too few logits, or they are not finite.
    """
    same = positions = prompts_equal = compared = 0
    largest = total = 0.0
    for left, right in zip(expected, found, strict=True):
        pairs = list(zip(left.token_ids, right.token_ids, strict=False))
        same += sum(one == other for one, other in pairs)
        positions += max(len(left.token_ids), len(right.token_ids))
        prompts_equal += left.token_ids == right.token_ids
        differing = (index for index, (one, other) in enumerate(pairs) if one != other)
        rows = next(differing, len(pairs) - 1) + 1
        # Versions differ in whether the row that chose the end token is there.
        if rows == len(right.token_ids) == right.logits.shape[0] + 1:
            rows -= 1
        vocabulary = left.logits.shape[1]
        if right.logits.shape[0] < rows or right.logits.shape[1] < vocabulary:
            raise ToolchainError(
                "The engine's logits do not fit those of its checkpoint",
                expected=f"at least {rows} rows of {vocabulary}",
                found=f"shape {right.logits.shape}",
                cure="convert and build again from this checkpoint",
            )
        distance = np.abs(left.logits[:rows].astype(np.float64) - right.logits[:rows, :vocabulary])
        if not np.isfinite(distance).all():
            raise ToolchainError(
                "Logits are not finite",
                expected="finite numbers from checkpoint and engine",
                found="infinity or NaN",
                cure="choose a data type with a larger range, such as bfloat16",
            )
        largest = max(largest, float(distance.max(initial=0.0)))
        total += float(distance.sum())
        compared += distance.size
    if not compared:
        raise ToolchainError(
            "There is nothing to compare",
            expected="answers of at least one token",
            found=f"{len(expected)} answers without any",
            cure="give evaluation data with prompts",
        )
    return Agreement(
        prompts=len(expected),
        token_agreement=same / positions,
        prompts_equal=prompts_equal,
        logit_distance=LogitDistance(largest=largest, mean=total / compared),
    )


def until_end(token_ids: Sequence[int], end: int, ended: bool) -> list[int]:
    """Tokens up to the first end token, which is added where the model ended without it.

    Versions of the LLM API differ in whether the end token is part of an answer.
    """
    ids = list(token_ids)
    if end in ids:
        return ids[: ids.index(end) + 1]
    return [*ids, end] if ended else ids


class CheckpointModel:
    """A Hugging Face checkpoint, in its own data type, over all GPUs there are."""

    def __init__(self, checkpoint: Path, end: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._end = end
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            torch_dtype="auto",
            # Spread over the GPUs by accelerate, which the serving image has.
            device_map="auto" if torch.cuda.is_available() else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        import torch

        ids = torch.tensor([list(prompt)], device=self._model.device)
        with torch.inference_mode():
            generated = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_tokens,
                eos_token_id=self._end,
                pad_token_id=self._end,
                return_dict_in_generate=True,
                output_logits=True,
            )
        logits = torch.cat(generated.logits).float().cpu().numpy()
        tokens = generated.sequences[0, len(prompt) :].tolist()
        return Answer(until_end(tokens, self._end, ended=False), logits)


class ServedModel:
    """An engine, or a checkpoint as the `llmapi` backend serves it, by TensorRT-LLM's LLM API.

    Args:
        backend: decides the class, see the module's docstring.
        arguments: of that class.
        end: the end token's id.
        context_logits: whether there are logits of prompts; an engine must have been built
            with `--gather_context_logits`.
    """

    def __init__(
        self, backend: Backend, arguments: Mapping[str, Any], end: int, *, context_logits: bool
    ) -> None:
        # Only the serving image has tensorrt_llm.
        package: Any = importlib.import_module("tensorrt_llm")
        llm: Any = importlib.import_module(LLM_MODULES[backend]).LLM
        self._end = end
        self._context_logits = context_logits
        self._sampling: Any = package.SamplingParams
        self.version: str = package.__version__
        self._llm: Any = llm(**arguments, gather_generation_logits=True)

    def shutdown(self) -> None:
        """Ends the workers, which would keep the GPUs' memory."""
        self._llm.shutdown()

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        sampling = self._sampling(
            max_tokens=max_tokens, temperature=0.0, return_generation_logits=True
        )
        output = self._llm.generate([{"prompt_token_ids": list(prompt)}], sampling, use_tqdm=False)[
            0
        ].outputs[0]
        if output.generation_logits is None:
            raise ToolchainError(
                "The engine gave no logits of its answer",
                expected="generation_logits, as gather_generation_logits asks for",
                found="none",
                cure="check the version of TensorRT-LLM in the serving image",
            )
        logits = np.asarray(output.generation_logits.float().cpu().numpy())
        return Answer(
            until_end(output.token_ids, self._end, output.finish_reason == "stop"),
            # One beam; versions differ in whether it has a dimension of its own.
            logits.reshape(-1, logits.shape[-1]),
        )

    def timed_answer(self, prompt: Sequence[int], max_tokens: int) -> TimedAnswer:
        sampling = self._sampling(max_tokens=max_tokens, temperature=0.0)
        started = time.perf_counter()
        first: float | None = None
        output: Any = None
        for result in self._llm.generate_async(
            {"prompt_token_ids": list(prompt)}, sampling, streaming=True
        ):
            first = time.perf_counter() if first is None else first
            output = result.outputs[0]
        ended = time.perf_counter()
        first = ended if first is None else first
        tokens = 0 if output is None else len(output.token_ids)
        return TimedAnswer(
            text="" if output is None else output.text,
            times=RequestTimes(
                time_to_first_token=first - started,
                inter_token_latency=(ended - first) / (tokens - 1) if tokens > 1 else None,
                end_to_end=ended - started,
                output_tokens=tokens,
            ),
        )

    def prompt_logits(self, token_ids: Sequence[int]) -> NDArray[np.float32] | None:
        if not self._context_logits:
            return None
        sampling = self._sampling(max_tokens=1, temperature=0.0, return_context_logits=True)
        output = self._llm.generate(
            [{"prompt_token_ids": list(token_ids)}], sampling, use_tqdm=False
        )[0]
        return np.asarray(output.context_logits.float().cpu().numpy())


def loss(served: Served, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Negative log-likelihood (nats) of a completion; `NOT_MEASURED` without logits."""
    # The logits that foretell the first token are those after the prompt's last one.
    found = served.prompt_logits([*prompt, *completion[:-1]])
    if found is None:
        return NOT_MEASURED
    logits = found[len(prompt) - 1 :].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    normalisation = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return float((normalisation - logits[np.arange(len(completion)), list(completion)]).sum())


def chosen_rows(rows: int) -> list[int]:
    """Which rows both models answer: at most `COMPARED_PROMPTS`, evenly spread."""
    spread: list[int] = np.linspace(0, rows - 1, COMPARED_PROMPTS).astype(int).tolist()
    return sorted(set(spread))


def tokenizer_parity(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool) -> int:
    """For how many texts Triton's preprocessing makes the ids that the model was trained on.

    With `add_special_tokens` off, models that begin with a start token answer garbage
    (tensorrtllm_backend#234, #445).
    """
    return sum(
        tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=add_special_tokens)
        for text in texts
    )


def validation_json(
    predictions: Any, agreement: Agreement, parity: Mapping[str, int]
) -> dict[str, Any]:
    """What gates and people read, as plain JSON values; a loss not measured is null."""
    measured = metrics.measure(predictions).as_json()
    if measured["loss"] is None:
        # Perplexity is bounded, and the bound would look like a figure.
        measured["perplexity"] = None
    return {**asdict(agreement), "tokenizer_parity": dict(parity), **measured}


@contextmanager
def served_model(
    backend: Backend, engine: Path, checkpoint: Path, end: int
) -> Iterator[ServedModel]:
    """Loads what serves, as it serves, and ends its workers.

    Args:
        backend: what `engine` is.
        engine: engine directory, or checkpoint with its frozen `model.yaml`.
        checkpoint: Hugging Face directory; its tokenizer is used.
        end: the end token's id.

    Raises:
        ToolchainError: there is no frozen `model.yaml`.
    """
    if backend == "engine":
        config = json.loads((engine / "config.json").read_text(encoding="utf-8"))
        mapping = config["pretrained_config"]["mapping"]
        arguments = {
            "tensor_parallel_size": mapping["tp_size"],
            "pipeline_parallel_size": mapping["pp_size"],
        }
        context_logits = bool(config["build_config"]["gather_context_logits"])
    else:
        frozen = read_llmapi_model(engine / MODEL_YAML).model_dump(
            mode="json", exclude={"model", "triton_config"}
        )
        # What Triton's llmapi model does with its model.yaml (its 1/model.py).
        utilities: Any = importlib.import_module("tensorrt_llm.llmapi.llm_utils")
        arguments = utilities.update_llm_args_with_extra_dict({}, frozen)
        # The PyTorch backend needs no build that asks for them.
        context_logits = True
    model = ServedModel(
        backend,
        {**arguments, "model": str(engine), "tokenizer": str(checkpoint)},
        end,
        context_logits=context_logits,
    )
    try:
        yield model
    finally:
        model.shutdown()


def validate(
    backend: Backend,
    checkpoint: Path,
    engine: Path,
    evaluation_data: Path,
    output: Path,
    *,
    max_output_tokens: int,
    add_special_tokens: bool,
) -> None:
    """Writes `predictions.parquet`, see `develop.metrics`, and `validation.json`.

    Args:
        backend: what `engine` is.
        checkpoint: Hugging Face directory that the engine was made from.
        engine: engine directory, or checkpoint with its frozen `model.yaml`.
        evaluation_data: data directory.
        output: directory to write; must not exist.
        max_output_tokens: longest answer, tokens.
        add_special_tokens: as the package sets it.

    Raises:
        LLMOpsError: the data are not valid, the answers cannot be compared, or the output
            exists.
    """
    import pandas as pd
    import torch
    from transformers import AutoTokenizer

    rows: dict[str, list[str]] = read_data(evaluation_data).to_pydict()
    tokenizer: Any = AutoTokenizer.from_pretrained(
        checkpoint, local_files_only=True, trust_remote_code=False
    )
    end: int = tokenizer.eos_token_id
    prompts = [tokenizer.encode(text) for text in rows["prompt"]]
    completions = [
        [*tokenizer.encode(text, add_special_tokens=False), end] for text in rows["completion"]
    ]
    chosen = chosen_rows(len(prompts))
    reference = CheckpointModel(checkpoint, end)
    expected = _answers(reference, prompts, chosen, max_output_tokens, "checkpoint")
    del reference
    gc.collect()
    torch.cuda.empty_cache()
    with served_model(backend, engine, checkpoint, end) as served:
        found = _answers(served, prompts, chosen, max_output_tokens, "engine")
        agreement = compare(expected, found)
        # The engine is warm now: it has answered.
        timed: list[TimedAnswer] = []
        losses: list[float] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            timed.append(served.timed_answer(prompt, max_output_tokens))
            losses.append(loss(served, prompt, completion))
            report_progress(phase="answers", step=len(timed), of=len(prompts))
        version = served.version
    predictions = pd.DataFrame(rows)
    predictions["prediction"] = [answer.text for answer in timed]
    predictions["correct"] = [
        metrics.is_exact_match(answer.text, completion)
        for answer, completion in zip(timed, rows["completion"], strict=True)
    ]
    predictions = metrics.with_times(predictions, [answer.times for answer in timed])
    predictions["loss"] = losses
    predictions["tokens"] = [len(completion) for completion in completions]
    predictions = predictions[[*metrics.PREDICTION_COLUMNS, *metrics.TIME_COLUMNS]]
    parity = {
        "prompts": len(prompts),
        "equal": tokenizer_parity(tokenizer, rows["prompt"], add_special_tokens),
    }
    report = {
        "backend": backend,
        "tensorrt_llm": version,
        **validation_json(predictions, agreement, parity),
    }
    with whole_directory(output) as folder:
        predictions.to_parquet(folder / PREDICTIONS_FILE, index=False)
        (folder / VALIDATION_FILE).write_text(
            json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )


def _answers(
    model: Reference,
    prompts: Sequence[list[int]],
    chosen: Sequence[int],
    max_tokens: int,
    phase: str,
) -> list[Answer]:
    answers: list[Answer] = []
    for row in chosen:
        answers.append(model.answer(prompts[row], max_tokens))
        report_progress(phase=phase, step=len(answers), of=len(chosen))
    return answers


def options_of(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """The arguments of `validate`, as the command line names them."""
    parser = argparse.ArgumentParser(
        prog="llmops_assets.toolchains.tensorrt_llm.validation", description=__doc__
    )
    parser.add_argument("--backend", required=True, choices=("engine", "llmapi"))
    parser.add_argument("--checkpoint", required=True, type=Path, help="Hugging Face directory")
    parser.add_argument("--engine", required=True, type=Path, help="the engine's directory")
    parser.add_argument("--evaluation-data", required=True, type=Path, help="data directory")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--max-output-tokens", required=True, type=int, help="longest answer")
    parser.add_argument(
        "--no-special-tokens", dest="add_special_tokens", action="store_false",
        help="as the package's preprocessing is set",
    )  # fmt: skip
    return parser.parse_args(None if arguments is None else list(arguments))


def main(arguments: Iterable[str] | None = None) -> int:
    options = options_of(arguments)
    try:
        validate(**vars(options))
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


# The LLM API starts workers that import this module when there are several GPUs.
if __name__ == "__main__":
    sys.exit(main())
