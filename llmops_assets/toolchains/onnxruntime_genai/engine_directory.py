"""What a converted model and an engine must hold, checked without loading the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmops_assets.errors import ToolchainError

GENERATION_CONFIG = "genai_config.json"
MODEL = "model.onnx"
TOKENIZER = "tokenizer.json"
SIDECAR = "engine.json"
REQUIRED_KEYS = ("context_length", "eos_token_id", "vocab_size", "decoder")
AGAIN = "look into the step's log for the cause, then materialize the asset again"


def check_model_directory(directory: Path) -> Mapping[str, Any]:
    """Checks that a model is whole: its files, its configuration, its weights' extent.

    Weights are external data of the ONNX model (onnx.proto3, `external_data`): each
    tensor names a file, an offset and a length in bytes.

    Returns:
        `genai_config.json`'s model section.

    Raises:
        ToolchainError: something is missing or cut off.
    """
    missing = [
        name for name in (GENERATION_CONFIG, MODEL, TOKENIZER) if not (directory / name).is_file()
    ]
    if missing:
        raise ToolchainError(
            f"{directory} is not a whole ONNX Runtime GenAI model",
            expected=f"{GENERATION_CONFIG}, {MODEL} and {TOKENIZER}",
            found="no " + ", no ".join(missing),
            cure=AGAIN,
        )
    model = read_json(directory / GENERATION_CONFIG).get("model")
    absent = [key for key in REQUIRED_KEYS if not isinstance(model, dict) or key not in model]
    if not isinstance(model, dict) or absent:
        raise ToolchainError(
            f"{directory / GENERATION_CONFIG} is incomplete",
            expected="model: with " + ", ".join(REQUIRED_KEYS),
            found="no " + ", no ".join(absent),
            cure=AGAIN,
        )
    _check_external_data(directory)
    return model


def read_sidecar(engine_directory: Path) -> Mapping[str, Any]:
    """`engine.json`.

    Raises:
        ToolchainError: there is none, or it is incomplete.
    """
    sidecar = read_json(engine_directory / SIDECAR)
    target = sidecar.get("target")
    if "toolchain" not in sidecar or not isinstance(target, dict) or "architecture" not in target:
        raise ToolchainError(
            f"{engine_directory / SIDECAR} is incomplete",
            expected="toolchain and target.architecture",
            found=", ".join(sidecar),
            cure="build the engine again",
        )
    return sidecar


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ToolchainError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolchainError(f"{path} cannot be read", found=error, cure=AGAIN) from error
    if not isinstance(content, dict):
        raise ToolchainError(
            f"{path} is not what it should be",
            expected="a JSON object",
            found=type(content).__name__,
            cure=AGAIN,
        )
    return content


def _check_external_data(directory: Path) -> None:
    # Only needed here, and importing it takes longer than the check.
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        model = onnx.load(str(directory / MODEL), load_external_data=False)
    except DecodeError as error:
        raise ToolchainError(
            f"{directory / MODEL} is not an ONNX model", found=error, cure=AGAIN
        ) from error
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            end = int(info.offset or 0) + int(info.length or 0)
            ends[info.location] = max(end, ends.get(info.location, 0))
    for location, end in ends.items():
        path = directory / location
        if Path(location).name != location:
            raise ToolchainError(
                f"{directory / MODEL} keeps weights outside its directory",
                expected="a file beside it",
                found=location,
                cure=AGAIN,
            )
        size = path.stat().st_size if path.is_file() else 0
        if size < end:
            raise ToolchainError(
                f"{path} is cut off",
                expected=f"at least {end} bytes, which {MODEL} refers to",
                found=f"{size} bytes",
                cure="check the free disk space, then materialize the asset again",
            )
