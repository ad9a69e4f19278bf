"""The prompts of the evaluation data, as a checkpoint's tokenizer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmops_assets.errors import ToolchainError

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 5


def tokenized_prompts(checkpoint: Path, rows: pa.Table, longest: int) -> list[list[int]]:
    """Token ids of every prompt.

    An engine refuses a prompt that is longer than it was built for, after minutes of loading;
    cut off, it would be another question.

    Args:
        checkpoint: Hugging Face directory with its `tokenizer.json`.
        rows: the evaluation data.
        longest: prompt that the spec allows, tokens.

    Raises:
        ToolchainError: a prompt is longer.
    """
    # Only steps with TensorRT-LLM need it, so importing this module must not.
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts: list[str] = rows.column("prompt").to_pylist()
    prompts = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    too_long = [
        f"row {number} has {len(ids)}"
        for number, ids in enumerate(prompts, start=1)
        if len(ids) > longest
    ]
    if too_long:
        more = f", and {len(too_long) - SHOWN} more" if len(too_long) > SHOWN else ""
        raise ToolchainError(
            "Prompts of the evaluation data are longer than the spec allows",
            expected=f"at most {longest} tokens, constraints.max_input_tokens",
            found=", ".join(too_long[:SHOWN]) + more,
            cure="raise constraints.max_input_tokens and the engine's limits, or shorten them",
        )
    return prompts
