"""The model that Triton's Python backend runs: one prompt in, an answer out, or its pieces.

Tensors and parameters are those of `config.pbtxt`. A request that cannot be answered
fails alone, with the reason; the model goes on.

Triton's own scheduler hands requests over at once: `execute` reads them and queues them, and
one thread answers them in batches (`batching.py`). What waits and runs is therefore in
metrics of the model's own, since Triton's count a request that is here as gone.

A package takes this file along, so it imports nothing of the platform.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from .batching import Batcher, Limits, UnavailableError
from .generation import LARGEST_SEED, Answer, Sampling, TextGenerator

LARGEST_TEMPERATURE = 100.0
MOST_STOP_WORDS = 16
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


class Metrics:
    """What Triton's metrics do not say, by model and version; a `batching.Observer`.

    Triton 2.51 crashes when two threads of a model change metrics at once (measured), so
    only the batcher's thread does.
    """

    def __init__(self, model: str, version: str) -> None:
        labels = {"model": model, "version": version}

        def metric(name: str, description: str, kind: Any) -> Any:
            family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
            # Triton drops a family with its last reference.
            self._families.append(family)
            return family.Metric(labels=labels)

        self._families: list[Any] = []
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        self._in_progress = metric(
            "llmops_requests_in_progress", "Requests that wait or are being answered", gauge
        )
        self._tokens = metric("llmops_tokens_total", "Tokens generated for requests", counter)
        self._batches = metric("llmops_batches_total", "Batches begun", counter)
        self._requests = metric("llmops_batched_requests_total", "Requests in batches", counter)

    def began(self, requests: int, in_progress: int) -> None:
        self._in_progress.set(in_progress)
        self._batches.increment(1)
        self._requests.increment(requests)

    def ended(self, tokens: int, in_progress: int) -> None:
        self._tokens.increment(tokens)
        self._in_progress.set(in_progress)


class TritonReply:
    """One request's answer, sent as it comes; implements `batching.Reply`."""

    def __init__(self, question: Question, generator: TextGenerator, sender: Any) -> None:
        self.prompt = question.prompt
        self.sampling = question.sampling
        self.count = 0
        self._stream = question.stream
        self._answer = Answer(generator.tokenizer, question.stop_words)
        self._end_tokens = generator.end_tokens
        self._unsent = ""
        self._sender = sender

    def take(self, token: int) -> bool:
        self.count += 1
        if token in self._end_tokens:
            self._finish("stop")
            return False
        self._unsent += self._answer.add(token)
        if self._answer.stopped:
            self._finish("stop")
            return False
        if self.count == self.sampling.max_tokens:
            self._finish("length")
            return False
        if self._stream and self._unsent:
            self._sender.send(_response(self._unsent, "", len(self.prompt), self.count))
            self._unsent = ""
        return True

    def is_gone(self) -> bool:
        if not self._sender.is_cancelled():
            return False
        _fail(self._sender, "the client has gone", pb_utils.TritonError.CANCELLED)
        return True

    def fail(self, error: RuntimeError) -> None:
        if isinstance(error, UnavailableError):
            _fail(self._sender, str(error), pb_utils.TritonError.UNAVAILABLE)
        else:
            _fail(self._sender, f"generation failed: {error}", pb_utils.TritonError.INTERNAL)

    def _finish(self, finish_reason: str) -> None:
        self._unsent += self._answer.finish()
        if self._answer.stopped:
            finish_reason = "stop"
        self._sender.send(
            _response(self._unsent, finish_reason, len(self.prompt), self.count),
            flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
        )


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
        if not self._generator.mixes_lengths:
            pb_utils.Logger.log_warn("this engine is given only prompts of one length in a batch")
        metrics = Metrics(args["model_name"], args["model_version"])
        limits = Limits(
            batch_size=setting("batch_size"),
            window_seconds=setting("batch_window_milliseconds") / 1000,
            queue_size=setting("queue_size"),
            drain_seconds=setting("drain_seconds"),
        )
        self._batcher = Batcher(self._generator, limits, metrics)
        threading.excepthook = _end_server
        self._worker = threading.Thread(target=self._batcher.run, name="batcher", daemon=True)
        self._worker.start()

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                question = self._read(request)
            except RefusedError as error:
                _fail(sender, str(error), pb_utils.TritonError.INVALID_ARG)
                continue
            reply = TritonReply(question, self._generator, sender)
            try:
                self._batcher.submit(reply)
            except UnavailableError as error:
                reply.fail(error)

    def finalize(self) -> None:
        self._batcher.close()
        self._worker.join()

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


def _end_server(arguments: threading.ExceptHookArgs) -> None:
    """Ends Triton, for whoever watches it to start anew.

    Without its worker the model would take requests and never answer, and be ready all the
    same; so it would be if this process alone ended, which Triton 2.51 does not replace.
    """
    threading.__excepthook__(arguments)
    sys.stderr.flush()
    os.kill(os.getppid(), signal.SIGTERM)
