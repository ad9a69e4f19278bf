"""An engine as EleutherAI's lm-evaluation-harness asks it, through the code that serves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmops_assets.develop.harness_model import LocalModel
from llmops_assets.toolchains.onnxruntime_genai.triton_model.generation import (
    Answer,
    Sampling,
    TextGenerator,
)


class EngineModel(LocalModel):
    """An engine of ONNX Runtime GenAI."""

    def __init__(self, generator: TextGenerator, max_length: int, prefix_token: int) -> None:
        """See `LocalModel` for the numbers; they are the checkpoint's."""
        self._generator = generator
        super().__init__(max_length, prefix_token)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._generator.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return self._generator.tokenizer.decode(
            list(tokens), skip_special_tokens=skip_special_tokens
        )

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self._generator.logits(tokens))

    def answer(self, prompt: Sequence[int], max_tokens: int, until: Sequence[str]) -> list[int]:
        found: list[int] = []
        text = Answer(self._generator.tokenizer, until)
        for token in self._generator.tokens(prompt, Sampling(max_tokens)):
            found.append(token)
            text.add(token)
            if text.stopped:
                break
        return found
