"""Compares what TensorRT-LLM serves with its checkpoint; run by the Python of its image.

Run as `python -m llmops_assets.toolchains.tensorrt_llm.validation …` through the tool
runner. It writes answers; `validation_report` makes of them what every toolchain's validation
writes. NVIDIA's image has not what the platform is installed with, so this imports the
standard library, NumPy, PyTorch, transformers and TensorRT-LLM, and of this package only what
imports no more.

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
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from llmops_assets.errors import LLMOpsError, ToolchainError
from llmops_assets.tools import report_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

Backend = Literal["engine", "llmapi"]
"""As `containers.Backend`, whose module imports more than the image has."""

LLM_MODULES: Mapping[Backend, str] = {
    "engine": "tensorrt_llm._tensorrt_engine",
    "llmapi": "tensorrt_llm",
}
ADD_SPECIAL_TOKENS = True
"""As packages set Triton's preprocessing."""
COMPARED_PROMPTS = 50
"""How many prompts both answer, evenly spread over the data."""


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
class Times:
    """How long one answer took, seconds; as `evidence.latency.RequestTimes`."""

    time_to_first_token: float
    inter_token_latency: float | None
    """None with a single token."""
    end_to_end: float
    output_tokens: int


@dataclass(frozen=True)
class TimedAnswer:
    """An answer as a user gets it, alone on the machine."""

    text: str
    times: Times


class Reference(Protocol):
    """What an engine is compared with."""

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer: ...


class Served(Reference, Protocol):
    """What serves."""

    def timed_answer(self, prompt: Sequence[int], max_tokens: int) -> TimedAnswer: ...

    def texts(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
        """Answers to all prompts, batched as the engine sees fit."""
        ...

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
            times=Times(
                time_to_first_token=first - started,
                inter_token_latency=(ended - first) / (tokens - 1) if tokens > 1 else None,
                end_to_end=ended - started,
                output_tokens=tokens,
            ),
        )

    def texts(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
        sampling = self._sampling(max_tokens=max_tokens, temperature=0.0)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self._llm.generate(inputs, sampling, use_tqdm=False)
        return [result.outputs[0].text for result in results]

    def prompt_logits(self, token_ids: Sequence[int]) -> NDArray[np.float32] | None:
        if not self._context_logits:
            return None
        sampling = self._sampling(max_tokens=1, temperature=0.0, return_context_logits=True)
        output = self._llm.generate(
            [{"prompt_token_ids": list(token_ids)}], sampling, use_tqdm=False
        )[0]
        return np.asarray(output.context_logits.float().cpu().numpy())


def loss(served: Served, prompt: Sequence[int], completion: Sequence[int]) -> float | None:
    """Negative log-likelihood (nats) of a completion; None if the engine gives no logits."""
    # The logits that foretell the first token are those after the prompt's last one.
    found = served.prompt_logits([*prompt, *completion[:-1]])
    if found is None:
        return None
    logits = found[len(prompt) - 1 :].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    normalisation = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return float((normalisation - logits[np.arange(len(completion)), list(completion)]).sum())


def spread(rows: int, number: int) -> list[int]:
    """At most `number` of the rows, evenly spread: the first ones may be of one slice."""
    chosen: list[int] = np.linspace(0, rows - 1, number).astype(int).tolist()
    return sorted(set(chosen))


def load_tokenizer(directory: Path) -> Any:
    """As Triton's preprocessing and the LLM API load it, but for their trust in its code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        directory, legacy=False, padding_side="left", local_files_only=True,
        trust_remote_code=False,
    )  # fmt: skip


def tokenizer_parity(
    tokenizer: Any, served: Any, texts: Sequence[str], add_special_tokens: bool
) -> int:
    """For how many texts the server makes the token ids that the model was trained on.

    With `add_special_tokens` off, models that begin with a start token answer garbage
    (tensorrtllm_backend#234, #445); a file that the package lacks does it as well.

    Args:
        tokenizer: the checkpoint's.
        served: loaded from what the server has.
        texts: prompts.
        add_special_tokens: as the server is set.
    """
    return sum(
        tokenizer.encode(text) == served.encode(text, add_special_tokens=add_special_tokens)
        for text in texts
    )


@contextmanager
def served_model(
    backend: Backend,
    engine: Path,
    checkpoint: Path,
    settings: Mapping[str, Any],
    end: int,
) -> Iterator[ServedModel]:
    """Loads what serves, as it serves, and ends its workers.

    Args:
        backend: what `engine` is.
        engine: engine directory, or checkpoint.
        checkpoint: Hugging Face directory; its tokenizer is used.
        settings: of the LLM API, as in a YAML file of its options.
        end: the end token's id.
    """
    # What Triton's llmapi model does with its model.yaml (its 1/model.py).
    utilities: Any = importlib.import_module("tensorrt_llm.llmapi.llm_utils")
    arguments = utilities.update_llm_args_with_extra_dict({}, dict(settings))
    # The PyTorch backend needs no build that asks for them.
    context_logits = True
    if backend == "engine":
        config = json.loads((engine / "config.json").read_text(encoding="utf-8"))
        context_logits = bool(config["build_config"]["gather_context_logits"])
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
    tokenizer: Path,
    settings: Path,
    questions: Path,
    output: Path,
    *,
    max_output_tokens: int,
    timed_rows: int,
) -> None:
    """Writes answers, as `validation_report.Answers` reads them.

    Args:
        backend: what `engine` is.
        checkpoint: Hugging Face directory that the engine was made from.
        engine: engine directory, or checkpoint.
        tokenizer: directory that the server takes its tokenizer from.
        settings: JSON file, see `served_model`.
        questions: JSON file with the lists `prompts` and `completions`.
        output: file to write.
        max_output_tokens: longest answer, tokens.
        timed_rows: how many prompts are answered one after the other, to be timed.

    Raises:
        ToolchainError: the answers cannot be compared.
    """
    import torch

    asked = json.loads(questions.read_text(encoding="utf-8"))
    trained = load_tokenizer(checkpoint)
    end: int = trained.eos_token_id
    prompts = [trained.encode(text) for text in asked["prompts"]]
    completions = [
        [*trained.encode(text, add_special_tokens=False), end] for text in asked["completions"]
    ]
    compared = spread(len(prompts), COMPARED_PROMPTS)
    reference = CheckpointModel(checkpoint, end)
    expected = _answers(reference, prompts, compared, max_output_tokens, "checkpoint")
    del reference
    gc.collect()
    torch.cuda.empty_cache()
    arguments = json.loads(settings.read_text(encoding="utf-8"))
    with served_model(backend, engine, checkpoint, arguments, end) as served:
        # Warm, but with nothing of the timed prompts in its KV cache.
        served.texts([prompts[0][::-1]], max_output_tokens)
        timed: dict[int, TimedAnswer] = {}
        for row in spread(len(prompts), timed_rows):
            timed[row] = served.timed_answer(prompts[row], max_output_tokens)
            report_progress(phase="timed", step=len(timed), of=timed_rows)
        found = _answers(served, prompts, compared, max_output_tokens, "engine")
        agreement = compare(expected, found)
        untimed = [row for row in range(len(prompts)) if row not in timed]
        texts = served.texts([prompts[row] for row in untimed], max_output_tokens)
        answers = {row: answer.text for row, answer in timed.items()}
        answers |= dict(zip(untimed, texts, strict=True))
        losses = [
            loss(served, prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        version = served.version
    report = {
        "tensorrt_llm": version,
        "agreement": asdict(agreement),
        "tokenizer_parity": {
            "prompts": len(prompts),
            "equal": tokenizer_parity(
                trained, load_tokenizer(tokenizer), asked["prompts"], ADD_SPECIAL_TOKENS
            ),
        },
        "rows": [
            {
                "prediction": answers[row],
                "loss": losses[row],
                "tokens": len(completions[row]),
                "times": asdict(timed[row].times) if row in timed else None,
            }
            for row in range(len(prompts))
        ],
    }
    output.write_text(json.dumps(report, ensure_ascii=False) + "\n", encoding="utf-8")


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
    add = parser.add_argument
    add("--backend", required=True, choices=("engine", "llmapi"))
    add("--checkpoint", required=True, type=Path, help="Hugging Face directory")
    add("--engine", required=True, type=Path, help="the engine's directory")
    add("--tokenizer", required=True, type=Path, help="directory of the server's tokenizer")
    add("--settings", required=True, type=Path, help="JSON file of settings of the LLM API")
    add("--questions", required=True, type=Path, help="JSON file of prompts and completions")
    add("--output", required=True, type=Path, help="JSON file to write")
    add("--max-output-tokens", required=True, type=int, help="longest answer")
    add("--timed-rows", required=True, type=int, help="prompts answered one after the other")
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
