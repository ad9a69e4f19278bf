"""A Hugging Face checkpoint that the `llmapi` backend serves as it is: nothing is converted."""

from __future__ import annotations

import json
from pathlib import Path

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.inputs import refuse_code
from llmops_assets.toolchains.tensorrt_llm.outputs import check_safetensors
from llmops_assets.toolchains.tensorrt_llm.shape import read_shape

INDEX = "model.safetensors.index.json"
"""Where transformers writes which file holds which tensor, if there are several."""


def check_checkpoint(checkpoint: Path) -> None:
    """Checks that a checkpoint is whole and holds nothing but weights and their description.

    Raises:
        ToolchainError: a file of weights is missing or cut off, `config.json` is malformed,
            or something in it would run code.
    """
    refuse_code(checkpoint)
    read_shape(checkpoint)
    names = {path.name for path in checkpoint.glob("*.safetensors")}
    expected = _indexed(checkpoint) or names
    if not names or expected - names:
        raise ToolchainError(
            f"{checkpoint} has not all of its weights",
            expected=", ".join(sorted(expected)) or "files *.safetensors",
            found=", ".join(sorted(names)) or "none",
            cure="import the checkpoint again",
        )
    for path in weight_files(checkpoint):
        check_safetensors(path)


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that are loaded: those of the index, or all where there is none.

    Beside shards some checkpoints hold the same weights once more in one file.

    Raises:
        ToolchainError: the index cannot be read.
    """
    indexed = _indexed(checkpoint)
    return [
        path
        for path in sorted(checkpoint.glob("*.safetensors"))
        if not indexed or path.name in indexed
    ]


def _indexed(checkpoint: Path) -> set[str]:
    """The files that the index names; none without an index."""
    path = checkpoint / INDEX
    if not path.is_file():
        return set()
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ToolchainError(
            f"{path} is not an index of weights", found=error, cure="import the checkpoint again"
        ) from error
