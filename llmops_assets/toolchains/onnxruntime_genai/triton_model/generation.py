"""Text generation by ONNX Runtime GenAI, the same at validation and in Triton.

A package takes this file along, so it imports nothing of the platform.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
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
# What a checkpoint's generation_config.json can ask for that looks at the text so far.
PENALTIES_OFF = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
BLOCK_ROWS = 8
"""Divides the number of rows that the runtime computes at once; measured: 32 of them."""
NEVER = -1e9
"""Logit of a token that is not to be chosen."""


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
    """An engine with its tokenizer. Not safe for several threads.

    Several prompts can be answered in one batch, padded on the right to the longest. The
    engine's attention (`GroupQueryAttention` of ONNX Runtime's contributed operators) takes
    a length per row, so padding takes no part in it, and every row comes out bit for bit as
    alone. That was measured, and needs three precautions, here and in `together`:

    - An engine for which it does not hold is found out when it is loaded; its batches are of
      prompts of one length, which need no padding.
    - The runtime computes rows of a matrix in blocks, and a row that is alone in its block by
      another routine, whose sums differ in the last bit. So no prompt is fed in such that its
      last token is alone in a block: `_held_back`.
    - Sampling draws for all rows from one stream of random numbers, and a penalty on repetition
      sees padding as text. What asks for them is not padded, or answered alone.
    """

    def __init__(self, engine: Path, tokenizer: Path, threads: int) -> None:
        """Loads an engine, and has it answer a little, which allocates.

        Args:
            engine: directory with `genai_config.json` and the ONNX model.
            tokenizer: a `tokenizer.json` of Hugging Face tokenizers. GenAI's own tokenizer
                leaves out the begin-of-sequence token, so it is not used.
            threads: CPU threads of one forward pass.
        """
        # Read when the runtime starts, at the first model: it would report to its makers.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        description = json.loads((engine / GENERATION_CONFIG).read_text(encoding="utf-8"))
        model = description["model"]
        ends = model["eos_token_id"]
        self.end_tokens = frozenset(ends if isinstance(ends, list) else [ends])
        self.vocabulary_size = int(model["vocab_size"])
        self.context_length = int(model["context_length"])
        self._padding = int(model.get("pad_token_id", min(self.end_tokens)))
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
        search = description.get("search", {})
        self._pads = all(search.get(name, off) == off for name, off in PENALTIES_OFF.items())
        self._pads = self._pads and self._padding_changes_nothing()

    @property
    def mixes_lengths(self) -> bool:
        """Whether prompts of different lengths can share a batch."""
        return self._pads

    def encode(self, text: str) -> list[int]:
        """The prompt's token ids, with the special tokens that the model was trained on."""
        return self.tokenizer.encode(text).ids

    def together(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> bool:
        """Whether one batch can answer these, each token for token as alone."""
        if len(prompts) == 1:
            return True
        if any(sampling.temperature > 0 for sampling in samplings):
            return False
        if not self._pads:
            return len({len(prompt) for prompt in prompts}) == 1
        return all(map(self._may_be_padded, prompts)) and (
            self._length(prompts, samplings) <= self.context_length
        )

    def tokens(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The answer's tokens as they come, at most `max_tokens`; an end token is the last."""
        for (token,) in self.steps([prompt], [sampling]):
            if token is not None:
                yield token

    def steps(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> Iterator[list[int | None]]:
        """The answers to a batch, a forward pass at a time.

        Whoever has enough of some rows leaves out their tokens, and of all rows, stops
        asking: a row's place is not given to another.

        Args:
            prompts: token ids, none empty; `together` must allow them.
            samplings: one for each prompt.

        Returns:
            for each prompt its next token, or None in a pass that has none for it: before the
            first of some, and after the last of those that end sooner than others.
        """
        generator = self._generator(prompts, samplings)
        lacking = [sampling.max_tokens for sampling in samplings]
        held_back = {
            row: prompt[-1] for row, prompt in enumerate(prompts) if self._held_back(prompt)
        }
        while any(lacking):
            if held_back:
                generator.set_logits(_certain(generator.get_logits(), held_back))
            generator.generate_next_token()
            step: list[int | None] = []
            for row, token in enumerate(generator.get_next_tokens().tolist()):
                if row in held_back or not lacking[row]:
                    step.append(None)
                    continue
                step.append(token)
                lacking[row] = 0 if token in self.end_tokens else lacking[row] - 1
            held_back = {}
            yield step

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of the tokens, in one forward pass; shape (tokens, vocabulary)."""
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(tokens) + 1, random_seed=0, do_sample=False)
        generator = og.Generator(self._model, parameters)
        generator.append_tokens(np.array(tokens, dtype=np.int32))
        return generator.get_output("logits")[0]

    def _generator(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> Any:
        """A generator that has read the prompts, but for what is held back of them."""
        sampling = samplings[0]
        seed = secrets.randbelow(LARGEST_SEED) if sampling.seed is None else sampling.seed
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(
            batch_size=len(prompts),
            max_length=self._length(prompts, samplings),
            # Given in any case: without a seed the generator takes 14 ms to make one up.
            random_seed=seed,
            # Given in any case: the checkpoint's generation_config.json may ask for sampling.
            do_sample=sampling.temperature > 0,
        )
        if sampling.temperature > 0:
            parameters.set_search_options(temperature=sampling.temperature, top_p=sampling.top_p)
        fed = [list(prompt[: len(prompt) - self._held_back(prompt)]) for prompt in prompts]
        longest = max(map(len, fed))
        rows = [tokens + [self._padding] * (longest - len(tokens)) for tokens in fed]
        generator = og.Generator(self._model, parameters)
        generator.append_tokens(np.array(rows, dtype=np.int32))
        return generator

    def _length(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> int:
        """Tokens of each row of a batch, its padding included."""
        held_back = [self._held_back(prompt) for prompt in prompts]
        return max(
            len(prompt) - held for prompt, held in zip(prompts, held_back, strict=True)
        ) + max(
            sampling.max_tokens + held for sampling, held in zip(samplings, held_back, strict=True)
        )

    def _may_be_padded(self, prompt: Sequence[int]) -> bool:
        # The engine takes padding for the prompt's end, and an end token for the answer's.
        return (
            len(prompt) > 1 and self.end_tokens.isdisjoint(prompt) and (self._padding not in prompt)
        )

    def _held_back(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's last tokens get a forward pass of their own: 0 or 1."""
        return int(self._pads and self._may_be_padded(prompt) and len(prompt) % BLOCK_ROWS == 1)

    def _padding_changes_nothing(self) -> bool:
        """Whether this engine gives prompts the very same logits padded and alone."""
        usual = [
            token
            for token in range(min(self.vocabulary_size, 64))
            if token != self._padding and token not in self.end_tokens
        ]
        prompts = [usual[:2], (usual * 4)[:4]]
        alone = [self._logits_of_two_passes([prompt], usual[0]) for prompt in prompts]
        return np.array_equal(self._logits_of_two_passes(prompts, usual[0]), np.concatenate(alone))

    def _logits_of_two_passes(
        self, prompts: Sequence[Sequence[int]], token: int
    ) -> NDArray[np.float32]:
        """Logits after the prompts, and after one more token; shape (rows, 2, vocabulary)."""
        generator = self._generator(prompts, [Sampling(max_tokens=2)] * len(prompts))
        after_prompts = np.array(generator.get_logits())
        generator.set_logits(_certain(after_prompts, dict.fromkeys(range(len(prompts)), token)))
        generator.generate_next_token()
        return np.concatenate([after_prompts, generator.get_logits()], axis=1)


def _certain(logits: NDArray[np.float32], tokens: Mapping[int, int]) -> NDArray[np.float32]:
    """Logits with which nothing but the given tokens can be chosen, by row of the batch."""
    certain = np.array(logits)
    for row, token in tokens.items():
        certain[row] = NEVER
        certain[row, ..., token] = 0
    return certain


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
