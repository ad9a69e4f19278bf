"""Text generation by ONNX Runtime GenAI, the same at validation and in Triton.

A package takes this file along, so it imports nothing of the platform.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

og: Any = onnxruntime_genai  # its names live in an extension module without types

LARGEST_SEED = 2**31 - 1
GENERATION_CONFIG = "genai_config.json"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, drawn at random above it.

    A seed makes the draw repeatable. `top_k` and penalties are the checkpoint's own, from
    its `generation_config.json`.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class TextGenerator:
    """An engine with its tokenizer. One answer at a time; not safe for several threads."""

    def __init__(self, engine: Path, tokenizer: Path, threads: int) -> None:
        """Loads an engine.

        Args:
            engine: directory with `genai_config.json` and the ONNX model.
            tokenizer: a `tokenizer.json` of Hugging Face tokenizers. GenAI's own tokenizer
                leaves out the begin-of-sequence token, so it is not used.
            threads: CPU threads of one forward pass.
        """
        # Read when the runtime starts, at the first model: it would report to its makers.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        model = json.loads((engine / GENERATION_CONFIG).read_text(encoding="utf-8"))["model"]
        ends = model["eos_token_id"]
        self.end_tokens = frozenset(ends if isinstance(ends, list) else [ends])
        self.vocabulary_size = int(model["vocab_size"])
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer))
        # Padding or truncation that training left switched on is not part of a prompt.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        configuration = og.Config(str(engine))
        session = {
            "intra_op_num_threads": threads,
            # Idle threads that spin take the cores of other servers on the same host.
            "session.intra_op.allow_spinning": "0",
        }
        configuration.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(configuration)

    def encode(self, text: str) -> list[int]:
        """The prompt's token ids, with the special tokens that the model was trained on."""
        return self.tokenizer.encode(text).ids

    def tokens(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The answer's tokens as they come, at most `max_tokens`; an end token is the last."""
        parameters = og.GeneratorParams(self._model)
        seed = secrets.randbelow(LARGEST_SEED) if sampling.seed is None else sampling.seed
        parameters.set_search_options(
            max_length=len(prompt) + sampling.max_tokens,
            # Given in any case: without a seed the generator takes 14 ms to make one up.
            random_seed=seed,
            # Given in any case: the checkpoint's generation_config.json may ask for sampling.
            do_sample=sampling.temperature > 0,
        )
        if sampling.temperature > 0:
            parameters.set_search_options(temperature=sampling.temperature, top_p=sampling.top_p)
        generator = og.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in range(sampling.max_tokens):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            yield token
            if token in self.end_tokens:
                return

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of the tokens, in one forward pass; shape (tokens, vocabulary)."""
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(tokens) + 1, random_seed=0, do_sample=False)
        generator = og.Generator(self._model, parameters)
        generator.append_tokens(np.array(tokens, dtype=np.int32))
        return generator.get_output("logits")[0]


class Answer:
    """The text of an answer while its tokens come.

    Gives out whole characters only (a token may be part of one), and holds text back as
    long as it may turn out to be the beginning of a stop word.
    """

    def __init__(self, tokenizer: Tokenizer, stop_words: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop_words = tuple(stop_words)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded = ""
        self._held = ""
        self.stopped = False
        """Whether a stop word came; the answer ends before it."""

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that is certain now, often one character."""
        self._tokens.append(token)
        return self._give_out(self._stream.step(self._tokenizer, token) or "")

    def finish(self) -> str:
        """The text still held back when no more tokens come."""
        if self.stopped:
            return ""
        # The stream keeps an unfinished character for ever; decoding at once replaces it.
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        rest = whole.removeprefix(self._decoded) if whole.startswith(self._decoded) else ""
        certain = self._give_out(rest)
        return certain if self.stopped else certain + self._held

    def _give_out(self, text: str) -> str:
        self._decoded += text
        pending = self._held + text
        found = [pending.find(word) for word in self._stop_words if word in pending]
        if found:
            self.stopped = True
            self._held = ""
            return pending[: min(found)]
        keep = max((_overlap(pending, word) for word in self._stop_words), default=0)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that `word` begins with."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
