"""Where an image keeps the scripts that the TensorRT-LLM wheel does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from llmops_assets.errors import ToolchainError

EXAMPLE_FOLDERS = (Path("/app/tensorrt_llm/examples"), Path("/app/examples"))
"""Of `nvcr.io/nvidia/tensorrt-llm/release` and of Triton's image by its Dockerfile."""

QUANTIZE = PurePosixPath("quantization/quantize.py")


def find_script(relative: PurePosixPath, folders: Sequence[Path] = EXAMPLE_FOLDERS) -> Path:
    """The script in the first folder of examples that has it.

    Args:
        relative: path below `examples`, such as `models/core/llama/convert_checkpoint.py`.
        folders: where `examples` may be.

    Raises:
        ToolchainError: no folder has it. Below version 1.0 conversion scripts were at
            `examples/<family>/`; such an image is named as too old.
    """
    for folder in folders:
        if (script := folder / relative).is_file():
            return script
    old = PurePosixPath(*relative.parts[-2:])
    found = next((folder / old for folder in folders if (folder / old).is_file()), None)
    raise ToolchainError(
        f"This image has no {relative}",
        expected=" or ".join(str(folder / relative) for folder in folders),
        found="neither" if found is None else f"{found}, as images below version 1.0 have it",
        cure="run this step in the image that the spec's engine section names, of version 1.0 "
        "or later and below 1.3, where NVIDIA removed these scripts",
    )
