"""Prompts that an engine would refuse are named before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer
from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.prompts import tokenized_prompts


def test_prompts_are_tokenized_and_long_ones_named(tmp_path: Path) -> None:
    """The LLM API fails at the first of them after minutes of loading, without saying which;
    cut off, it would be another question.
    """
    save_tokenizer(build_tokenizer([]), tmp_path, 512)
    rows = pa.table({"prompt": ["ab", "abcdefgh", *["abcdefghi"] * 6]})
    prompts = tokenized_prompts(tmp_path, rows, 16)
    assert [len(prompt) for prompt in prompts[:3]] == [4, 10, 11]
    with pytest.raises(ToolchainError, match=r"row 2 has 10, row 3 has 11.*and 2 more") as caught:
        tokenized_prompts(tmp_path, rows, 9)
    assert "constraints.max_input_tokens" in str(caught.value)
