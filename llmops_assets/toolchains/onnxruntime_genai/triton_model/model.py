"""The model that Triton's Python backend runs: one prompt in, an answer out, or its pieces.

Tensors and parameters are those of `config.pbtxt`. A request that cannot be answered
fails alone, with the reason; the model goes on.

Requests are answered one after the other. ONNX Runtime GenAI's generator holds Python's
global lock, so threads gain nothing; answering several requests in one batch does, and
would put a queue and one worker between `execute` and `TextGenerator`.

A package takes this file along, so it imports nothing of the platform.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from .generation import LARGEST_SEED, Answer, Sampling, TextGenerator

LARGEST_TEMPERATURE = 100.0
MOST_STOP_WORDS = 16
CANCELLATION_INTERVAL_SECONDS = 0.02
# Request parameters that clients send without asking anything of the model.
HARMLESS_PARAMETERS = frozenset({"model", "binary_data_output"})
RESERVED_PREFIX = "triton_"


class RefusedError(ValueError):
    """The request cannot be answered; the message says why."""


@dataclass(frozen=True)
class Question:
    """A checked request."""

    prompt: list[int]
    sampling: Sampling
    stop_words: Sequence[str]
    stream: bool


class TritonPythonModel:
    """See Triton's Python backend for when each method is called."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]

        def setting(name: str) -> int:
            return int(parameters[name]["string_value"])

        self._max_input_tokens = setting("max_input_tokens")
        self._max_output_tokens = setting("max_output_tokens")
        folder = Path(__file__).parent
        self._generator = TextGenerator(
            folder / "engine", folder / "tokenizer.json", setting("threads")
        )
        # The first forward pass allocates; the first user should not wait for that.
        for _ in self._generator.tokens(self._generator.encode(" "), Sampling(max_tokens=1)):
            pass

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(self._read(request), sender)
            except RefusedError as error:
                _fail(sender, str(error), pb_utils.TritonError.INVALID_ARG)
            except RuntimeError as error:  # what ONNX Runtime GenAI raises
                _fail(sender, f"generation failed: {error}", pb_utils.TritonError.INTERNAL)

    def _read(self, request: Any) -> Question:
        for name in json.loads(request.parameters() or "{}"):
            if name not in HARMLESS_PARAMETERS and not name.startswith(RESERVED_PREFIX):
                # Triton passes on any key; a misspelt max_tokens must not be lost.
                raise RefusedError(f"there is no parameter {name!r}; see the model's config")
        text = _strings(request, "text_input")[0]
        if not text:
            raise RefusedError("text_input is empty; send a prompt")
        prompt = self._generator.encode(text)
        if len(prompt) > self._max_input_tokens:
            raise RefusedError(
                f"text_input has {len(prompt)} tokens, the model takes at most "
                f"{self._max_input_tokens}; send a shorter prompt"
            )
        max_tokens = int(_number(request, "max_tokens", self._max_output_tokens))
        if max_tokens < 1:
            raise RefusedError(f"max_tokens is {max_tokens}; it must be 1 or more")
        temperature = float(_number(request, "temperature", 0.0))
        if not (math.isfinite(temperature) and 0 <= temperature <= LARGEST_TEMPERATURE):
            raise RefusedError(
                f"temperature is {temperature}; it must be from 0 to {LARGEST_TEMPERATURE:g}"
            )
        top_p = float(_number(request, "top_p", 1.0))
        if not 0 < top_p <= 1:
            raise RefusedError(f"top_p is {top_p}; it must be above 0 and at most 1")
        seed = _number(request, "seed", None)
        if seed is not None and not 0 <= seed <= LARGEST_SEED:
            raise RefusedError(f"seed is {seed}; it must be from 0 to {LARGEST_SEED}")
        stop_words = _strings(request, "stop_words")
        if "" in stop_words or len(stop_words) > MOST_STOP_WORDS:
            raise RefusedError(f"stop_words must be at most {MOST_STOP_WORDS}, none of them empty")
        return Question(
            prompt=prompt,
            sampling=Sampling(
                max_tokens=min(max_tokens, self._max_output_tokens),
                temperature=temperature,
                top_p=top_p,
                seed=None if seed is None else int(seed),
            ),
            stop_words=stop_words,
            stream=bool(_number(request, "stream", False)),
        )

    def _answer(self, question: Question, sender: Any) -> None:
        answer = Answer(self._generator.tokenizer, question.stop_words)
        unsent = ""
        count = 0
        finish_reason = "length"
        asked = time.monotonic()
        for token in self._generator.tokens(question.prompt, question.sampling):
            # Asking costs a round trip to the server, as much as a small model's token.
            if time.monotonic() - asked > CANCELLATION_INTERVAL_SECONDS:
                if sender.is_cancelled():
                    _fail(sender, "the client has gone", pb_utils.TritonError.CANCELLED)
                    return
                asked = time.monotonic()
            count += 1
            if token in self._generator.end_tokens:
                finish_reason = "stop"
                break
            unsent += answer.add(token)
            if answer.stopped:
                finish_reason = "stop"
                break
            if question.stream and unsent:
                sender.send(_response(unsent, "", len(question.prompt), count))
                unsent = ""
        unsent += answer.finish()
        if answer.stopped:
            finish_reason = "stop"
        sender.send(
            _response(unsent, finish_reason, len(question.prompt), count),
            flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
        )


def _number(request: Any, name: str, default: Any) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().reshape(-1)[0].item()


def _strings(request: Any, name: str) -> list[str]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return []
    try:
        return [value.decode("utf-8") for value in tensor.as_numpy().reshape(-1)]
    except UnicodeDecodeError as error:
        raise RefusedError(f"{name} is not UTF-8: {error}") from error


def _response(text: str, finish_reason: str, input_tokens: int, output_tokens: int) -> Any:
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("text_output", np.array([text.encode("utf-8")], dtype=np.object_)),
            pb_utils.Tensor("finish_reason", np.array([finish_reason.encode()], dtype=np.object_)),
            pb_utils.Tensor("input_tokens", np.array([input_tokens], dtype=np.int32)),
            pb_utils.Tensor("output_tokens", np.array([output_tokens], dtype=np.int32)),
        ]
    )


def _fail(sender: Any, reason: str, code: Any) -> None:
    sender.send(
        pb_utils.InferenceResponse(error=pb_utils.TritonError(reason, code)),
        flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )
