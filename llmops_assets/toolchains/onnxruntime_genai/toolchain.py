"""The toolchain for the CPU: Hugging Face directory to ONNX to an engine in Triton.

Importing it is cheap: the heavy steps run as processes of their own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmops_assets.develop.harness_tasks import tool_arguments
from llmops_assets.errors import ToolchainError
from llmops_assets.spec import ModelSpec, OnnxRuntimeGenAIEngine
from llmops_assets.toolchains.base import Facts, ServingImage, Step, Target
from llmops_assets.toolchains.onnxruntime_genai.engine_directory import (
    SIDECAR,
    TOKENIZER,
    check_model_directory,
    read_json,
    read_sidecar,
)
from llmops_assets.tools import ToolRunner, module_command
from llmops_assets.versions import source_version

NAME = "onnxruntime_genai"
# What decides the bytes of converted weights and engines.
DISTRIBUTIONS = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")

# ONNX Runtime reports to its makers and keeps a database in ~/.cache unless told not to.
ENVIRONMENT = {"ORT_DISABLE_TELEMETRY": "1"}
# The builder writes into the model which commit it is of, and asks git, in the folder it is
# installed in: the answer is the commit of whatever repository surrounds that. Without one
# it takes the commit of its own package.
CONVERSION_ENVIRONMENT = {**ENVIRONMENT, "GIT_DIR": os.devnull}


class OnnxRuntimeGenAIToolchain:
    """Implements `toolchains.base.EngineToolchain`; see there for each method.

    Conversion and build are bit-deterministic.
    """

    name = NAME
    serving_distributions: tuple[str, ...] = ("onnxruntime-genai", "tokenizers", "numpy")
    serving_image: ServingImage | None = None

    def versions(self, step: Step) -> Mapping[str, str]:
        """Versions of the packages and of our own sources, and the machine's architecture.

        The same for every step: all are cheap to run again.

        Raises:
            ToolchainError: a package is not installed.
        """
        try:
            packages = {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
        except importlib.metadata.PackageNotFoundError as error:
            raise ToolchainError(
                "The CPU toolchain is not installed",
                expected=", ".join(DISTRIBUTIONS),
                found=f"no {error.name}",
                cure="install llmops-assets with its cpu extra: pip install 'llmops-assets[cpu]'",
            ) from error
        return {
            **packages,
            "llmops_assets": source_version(Path(__file__).parent),
            # The builder and the quantiser pick what suits the machine they run on.
            "architecture": Target.here().architecture,
        }

    def check_weights(self, converted: Path) -> None:
        check_model_directory(converted)

    def conversion_parameters(self, engine: OnnxRuntimeGenAIEngine) -> Mapping[str, Any]:
        # Always full precision, so that another precision needs only another build.
        return {"precision": "fp32"}

    def build_parameters(self, engine: OnnxRuntimeGenAIEngine) -> Mapping[str, Any]:
        if engine.precision == "fp32":
            return {"precision": "fp32"}
        return {"precision": engine.precision, "block_size": engine.block_size}

    def validation_parameters(self, spec: ModelSpec) -> Mapping[str, Any]:
        return {}

    def package_parameters(self, engine: OnnxRuntimeGenAIEngine) -> Mapping[str, Any]:
        return {}

    def target(self) -> Target:
        return Target.here()

    def compatible(self, engine_directory: Path, target: Target) -> None:
        sidecar = read_sidecar(engine_directory)
        built_for = sidecar["target"]["architecture"]
        if sidecar["toolchain"] != self.name or built_for != target.architecture:
            raise ToolchainError(
                f"The engine in {engine_directory} cannot run on its target",
                expected=f"an engine by {self.name} for {target.architecture}",
                found=f"one by {sidecar['toolchain']} for {built_for}",
                cure=f"build the engine on a machine with {target.architecture}",
            )

    def convert(
        self, checkpoint: Path, output: Path, engine: OnnxRuntimeGenAIEngine, tools: ToolRunner
    ) -> Facts:
        # Options that would let the checkpoint's own code or a token of ours in are off.
        command = [
            sys.executable, "-m", "onnxruntime_genai.models.builder",
            "-i", str(checkpoint), "-o", str(output),
            "-p", "fp32", "-e", "cpu", "-c", str(tools.work / "builder-cache"),
            "--extra_options", "hf_remote=false", "hf_token=false",
        ]  # fmt: skip
        run = tools.run("the ONNX model builder", command, CONVERSION_ENVIRONMENT)
        if (checkpoint / TOKENIZER).is_file():
            # The builder saves the tokenizer anew; what was trained with serves byte for byte.
            shutil.copyfile(checkpoint / TOKENIZER, output / TOKENIZER)
        model = check_model_directory(output)
        return {
            "seconds": run.seconds,
            "bytes": _size(output),
            "context_length": model["context_length"],
            "vocabulary": model["vocab_size"],
        }

    def build(
        self,
        converted: Path,
        output: Path,
        engine: OnnxRuntimeGenAIEngine,
        sources: Mapping[str, str],
        tools: ToolRunner,
    ) -> Facts:
        # The sidecar does not name the sources: equal weights give an equal engine.
        check_model_directory(converted)
        command = module_command(
            "llmops_assets.toolchains.onnxruntime_genai.build",
            "--converted", converted, "--output", output,
            "--precision", engine.precision, "--block-size", str(engine.block_size),
        )  # fmt: skip
        run = tools.run("the engine build", command, ENVIRONMENT)
        check_model_directory(output)
        sidecar = {
            "toolchain": self.name,
            "versions": self.versions("engine"),
            "target": {"architecture": Target.here().architecture},
            "parameters": self.build_parameters(engine),
        }
        (output / SIDECAR).write_text(
            json.dumps(sidecar, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        return {
            "seconds": run.seconds,
            "bytes": _size(output),
            "converted_bytes": _size(converted),
            "architecture": sidecar["target"]["architecture"],
            "precision": engine.precision,
        }

    def validate(
        self,
        checkpoint: Path,
        engine_directory: Path,
        evaluation_data: Path,
        output: Path,
        spec: ModelSpec,
        repository: Path,
        tools: ToolRunner,
    ) -> Facts:
        self.compatible(engine_directory, Target.here())
        check_model_directory(engine_directory)
        command = module_command(
            "llmops_assets.toolchains.onnxruntime_genai.validate",
            "--checkpoint", checkpoint,
            "--engine", engine_directory,
            "--evaluation-data", evaluation_data,
            "--output", output,
            "--max-input-tokens", str(spec.constraints.max_input_tokens),
            "--max-output-tokens", str(spec.constraints.max_output_tokens),
            "--threads", str(spec.serving.threads),
            *tool_arguments(spec.harness, repository, tools.work),
        )  # fmt: skip
        run = tools.run("the engine validation", command, ENVIRONMENT)
        return {"seconds": run.seconds, **read_json(output / "validation.json")}

    def package(
        self, engine_directory: Path, checkpoint: Path, output: Path, spec: ModelSpec
    ) -> Facts:
        # Triton's protobuf, which it needs, drags gRPC in.
        from llmops_assets.toolchains.onnxruntime_genai import package

        package.package(engine_directory, output, spec)
        return {"bytes": _size(output), **read_json(output / package.PACKAGE_FILE)}


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
