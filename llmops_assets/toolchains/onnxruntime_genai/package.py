"""Packs an engine into a Triton model repository.

A package is self-contained: beside the engine and the tokenizer it holds the code that
serves them, which needs only onnxruntime-genai, tokenizers and numpy.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from llmops_assets.errors import ToolchainError
from llmops_assets.spec import ModelSpec
from llmops_assets.toolchains.base import VERSION_FOLDER
from llmops_assets.toolchains.onnxruntime_genai import triton_model
from llmops_assets.toolchains.onnxruntime_genai.engine_directory import (
    TOKENIZER,
    check_model_directory,
    read_sidecar,
)

PACKAGE_FILE = "package.json"
REPOSITORY = "repository"
MODEL_FILES = ("model.py", "batching.py", "generation.py")

# How the model batches, and how long requests wait: `triton_model/batching.py`, `Limits`.
BATCHING = {
    "batch_size": 8,
    # Clients that were answered together ask again within it.
    "batch_window_milliseconds": 5,
    "queue_size": 64,
    # Below the time that Triton gives a model to end.
    "drain_seconds": 8,
}

# Name, type, dimensions, optional. Triton's generate extension maps JSON keys to inputs.
INPUTS = (
    ("text_input", "TYPE_STRING", 1, False),
    ("max_tokens", "TYPE_INT32", 1, True),
    ("temperature", "TYPE_FP32", 1, True),
    ("top_p", "TYPE_FP32", 1, True),
    ("seed", "TYPE_INT64", 1, True),
    ("stop_words", "TYPE_STRING", -1, True),
    ("stream", "TYPE_BOOL", 1, True),
)
OUTPUTS = (
    ("text_output", "TYPE_STRING", 1),
    ("finish_reason", "TYPE_STRING", 1),
    ("input_tokens", "TYPE_INT32", 1),
    ("output_tokens", "TYPE_INT32", 1),
)


def package(engine_directory: Path, output: Path, spec: ModelSpec) -> None:
    """Writes `repository/<model>/` and `package.json`.

    Equal inputs give equal bytes.

    Raises:
        ToolchainError: the engine is incomplete, or its context is shorter than the
            constraints of the spec allow requests to be.
    """
    sidecar = read_sidecar(engine_directory)
    context_length = int(check_model_directory(engine_directory)["context_length"])
    limits = spec.constraints
    longest = limits.max_input_tokens + limits.max_output_tokens
    if longest > context_length:
        raise ToolchainError(
            f"The engine of {spec.name} cannot hold the longest request that the spec allows",
            expected=f"max_input_tokens + max_output_tokens of at most {context_length}",
            found=f"{limits.max_input_tokens} + {limits.max_output_tokens} = {longest}",
            cure="lower the constraints in the spec, or use a model with a longer context",
        )
    model_folder = output / REPOSITORY / spec.name
    version = model_folder / VERSION_FOLDER
    engine = version / "engine"
    engine.mkdir(parents=True)
    for source in sorted(engine_directory.iterdir()):
        # The one tokenizer that serves lies beside the engine.
        target = version if source.name == TOKENIZER else engine
        shutil.copyfile(source, target / source.name)
    for name in MODEL_FILES:
        shutil.copyfile(Path(triton_model.__path__[0], name), version / name)
    (model_folder / "config.pbtxt").write_text(_configuration(spec), encoding="utf-8")
    description = {
        "model": spec.name,
        "toolchain": sidecar["toolchain"],
        "target": sidecar["target"],
        "limits": {
            "max_input_tokens": limits.max_input_tokens,
            "max_output_tokens": limits.max_output_tokens,
            "context_length": context_length,
        },
        "serving": {"threads": spec.serving.threads},
    }
    (output / PACKAGE_FILE).write_text(
        json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def _configuration(spec: ModelSpec) -> str:
    """Text of `config.pbtxt`, through Triton's own schema (model_config.proto)."""
    proto: Any = model_config_pb2  # generated at import, so without types
    configuration = proto.ModelConfig(
        name=spec.name,
        backend="python",
        max_batch_size=0,
        # Streaming sends several responses to one request.
        model_transaction_policy=proto.ModelTransactionPolicy(decoupled=True),
        version_policy=proto.ModelVersionPolicy(all=proto.ModelVersionPolicy.All()),
        instance_group=[
            proto.ModelInstanceGroup(count=1, kind=proto.ModelInstanceGroup.Kind.KIND_CPU)
        ],
        input=[
            proto.ModelInput(
                name=name, data_type=proto.DataType.Value(kind), dims=[size], optional=optional
            )
            for name, kind, size, optional in INPUTS
        ],
        output=[
            proto.ModelOutput(name=name, data_type=proto.DataType.Value(kind), dims=[size])
            for name, kind, size in OUTPUTS
        ],
    )
    settings = {
        "max_input_tokens": spec.constraints.max_input_tokens,
        "max_output_tokens": spec.constraints.max_output_tokens,
        "threads": spec.serving.threads,
        **BATCHING,
    }
    for name, value in settings.items():
        configuration.parameters[name].string_value = str(value)
    text = text_format.MessageToString(configuration)
    if text_format.Parse(text, proto.ModelConfig()) != configuration:
        raise ToolchainError(
            "config.pbtxt does not say what was meant",
            found=text,
            cure="report this; the protobuf package cannot read what it wrote",
        )
    return text
