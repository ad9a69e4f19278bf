"""Whether TensorRT-LLM's tools wrote all that they promise, checked without a GPU.

An exit code of 0 proves nothing: `convert_checkpoint.py` without a model writes a made-up
`config.json` and ends well, and a killed build leaves a `config.json` beside some ranks.
Layouts and keys are those of TensorRT-LLM 1.2.1 (`tensorrt_llm/builder.py`,
`tensorrt_llm/models/modeling_utils.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmops_assets.errors import ToolchainError

CONFIG = "config.json"
QUANTIZATION_CONFIG = "quant_cfg.json"
MIXED_PRECISION = "MIXED_PRECISION"

RANK_WEIGHTS = re.compile(r"rank(\d+)\.safetensors")
RANK_ENGINE = re.compile(r"rank(\d+)\.engine")
MANAGED_WEIGHTS = re.compile(r"rank(\d+)_managed_weights\.safetensors")

# An engine holds the weights that it was built from, so it cannot be much smaller. Kernels
# come on top; what shares or pads tensors changes far less than half.
SMALLEST_SHARE_OF_WEIGHTS = 0.5
LONGEST_SAFETENSORS_HEADER = 100 * 2**20

AGAIN = "look into the step's log for the cause, then materialize the asset again"


class Written(BaseModel):
    """Base of what the tools write: they may write more keys than are read here."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ParallelMapping(Written):
    """How a model is spread over ranks: tensor, pipeline and context parallelism."""

    world_size: int = Field(ge=1)
    tp_size: int = Field(ge=1)
    pp_size: int = Field(ge=1)
    cp_size: int = Field(default=1, ge=1)
    # -1 until TensorRT-LLM has worked out its own.
    moe_tp_size: int = -1
    moe_ep_size: int = -1

    @model_validator(mode="after")
    def _sizes_fit(self) -> ParallelMapping:
        product = self.tp_size * self.pp_size * self.cp_size
        if self.world_size != product:
            raise ValueError(
                f"world_size is {self.world_size}, but tp_size * pp_size * cp_size is {product}"
            )
        if self.moe_tp_size > 0 and self.moe_ep_size > 0:
            experts = self.moe_tp_size * self.moe_ep_size
            if experts != self.tp_size:
                raise ValueError(
                    f"moe_tp_size * moe_ep_size is {experts}, but tp_size is {self.tp_size}"
                )
        return self

    @property
    def weight_ranks(self) -> int:
        """Files of weights in a checkpoint; ranks of context parallelism share theirs."""
        return self.tp_size * self.pp_size


class Quantization(Written):
    """How weights and KV cache are quantised, in TensorRT-LLM's own names."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None


class CheckpointConfig(Written):
    """`config.json` of a converted checkpoint, as far as it is needed here."""

    architecture: str = Field(min_length=1)
    dtype: str = Field(min_length=1)
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    max_position_embeddings: int | None = None
    mapping: ParallelMapping
    quantization: Quantization


class BuildConfig(Written):
    """`build_config` of an engine. Lengths are in tokens, batches in requests."""

    max_input_len: int = Field(ge=1)
    max_seq_len: int = Field(ge=1)
    max_batch_size: int = Field(ge=1)
    max_beam_width: int = Field(ge=1)
    max_num_tokens: int = Field(ge=1)
    kv_cache_type: str | None = None
    use_strip_plan: bool = False
    plugin_config: Mapping[str, Any]


class EngineConfig(Written):
    """`config.json` of an engine directory; `version` is TensorRT-LLM's."""

    version: str = Field(min_length=1)
    pretrained_config: CheckpointConfig
    build_config: BuildConfig


Config = TypeVar("Config", CheckpointConfig, EngineConfig)


def check_converted_weights(directory: Path) -> CheckpointConfig:
    """Checks that a converted checkpoint is whole: its configuration, and each rank's weights.

    Returns:
        Its configuration.

    Raises:
        ToolchainError: a rank's file is missing, cut off or one too many, or the
            configuration is incomplete.
    """
    config = _read_config(directory, CheckpointConfig)
    _check_ranks(directory, RANK_WEIGHTS, "rank{}.safetensors", config.mapping.weight_ranks)
    for rank in range(config.mapping.weight_ranks):
        check_safetensors(directory / f"rank{rank}.safetensors")
    _check_quantization_config(directory, config)
    return config


def check_engine_directory(
    directory: Path,
    *,
    version: str,
    converted: Path | None = None,
    asked: Mapping[str, object] | None = None,
) -> EngineConfig:
    """Checks that an engine directory is whole and is what was asked for.

    What it cannot see is an engine file that was cut off near its end; the sizes in the
    sidecar and TensorRT itself find that.

    Args:
        directory: what `trtllm-build` wrote.
        version: of TensorRT-LLM, in the image that built it.
        converted: the checkpoint that it was built from, if that is at hand.
        asked: keys of `build_config` with the values that were asked for, such as
            `max_batch_size`. Values that were left to the tool are not in it.

    Returns:
        Its configuration.

    Raises:
        ToolchainError: a rank's file is missing, empty, too small or one too many, the
            configuration is incomplete, or it is not what was asked for.
    """
    config = _read_config(directory, EngineConfig)
    ranks = config.pretrained_config.mapping.world_size
    _check_ranks(directory, RANK_ENGINE, "rank{}.engine", ranks)
    managed = _numbers(directory, MANAGED_WEIGHTS)
    if managed:  # written with --fast_build
        _check_ranks(directory, MANAGED_WEIGHTS, "rank{}_managed_weights.safetensors", ranks)
        for rank in range(ranks):
            check_safetensors(directory / f"rank{rank}_managed_weights.safetensors")
    _check_quantization_config(directory, config.pretrained_config)
    if stray := sorted(path.name for path in directory.rglob("*.cache")):
        raise ToolchainError(
            f"The engine directory {directory} holds a timing cache",
            expected="the timing cache in the folder that keeps it",
            found=", ".join(stray),
            cure="give --output_timing_cache a path outside the engine directory",
        )
    _check_request(directory, config, version, asked or {})
    if converted is not None:
        _check_same_model(directory, config, converted)
        if not managed and not config.build_config.use_strip_plan:
            _check_engine_holds_weights(directory, converted)
    return config


def _read_config(directory: Path, model: type[Config]) -> Config:
    path = directory / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolchainError(
            f"{path} cannot be read", expected="a JSON object", found=error, cure=AGAIN
        ) from error
    if model is EngineConfig and isinstance(content, dict) and "architecture" in content:
        raise ToolchainError(
            f"{path} is not that of an engine",
            expected="version, pretrained_config and build_config, as trtllm-build writes them",
            found="the config.json of a converted checkpoint",
            cure="build into a folder of its own, and never copy a checkpoint's config.json there",
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ToolchainError(
            f"{path} is incomplete or contradicts itself",
            expected="the keys that TensorRT-LLM 1.2.1 writes",
            found="; ".join(
                ".".join(map(str, detail["loc"])) + f": {detail['msg']}"
                for detail in error.errors()
            ),
            cure=AGAIN,
        ) from error


def _numbers(directory: Path, pattern: re.Pattern[str]) -> set[int]:
    matches = (pattern.fullmatch(path.name) for path in directory.iterdir() if path.is_file())
    return {int(match[1]) for match in matches if match is not None}


def _check_ranks(directory: Path, pattern: re.Pattern[str], name: str, ranks: int) -> None:
    found = _numbers(directory, pattern)
    expected = set(range(ranks))
    if not found:
        raise ToolchainError(
            f"{directory} holds a {CONFIG} and no weights",
            expected=", ".join(name.format(rank) for rank in sorted(expected)),
            found="none, although the tool may have ended with exit code 0",
            cure="check that the tool was given a model (--model_dir or --checkpoint_dir), then "
            "materialize the asset again",
        )
    if found != expected:
        raise ToolchainError(
            f"{directory} has not the ranks that its {CONFIG} says",
            expected=", ".join(name.format(rank) for rank in sorted(expected)),
            found=", ".join(name.format(rank) for rank in sorted(found)),
            cure=AGAIN,
        )
    for rank in sorted(expected):
        path = directory / name.format(rank)
        if path.stat().st_size == 0:
            raise ToolchainError(
                f"{path} is empty", expected="weights", found="0 bytes", cure=AGAIN
            )


def check_safetensors(path: Path) -> None:
    """Compares a file's length with the extent of its tensors, without reading them.

    The format (safetensors README): eight bytes with the header's length, the header as
    JSON, then the tensors, which fill the rest exactly.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LONGEST_SAFETENSORS_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        ends = [
            int(entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ToolchainError(
            f"{path} is not a whole safetensors file", found=error, cure=AGAIN
        ) from error
    if not ends:
        raise ToolchainError(
            f"{path} holds no tensors", expected="weights", found="an empty header", cure=AGAIN
        )
    if size != (whole := 8 + length + max(ends)):
        raise ToolchainError(
            f"{path} is cut off",
            expected=f"{whole} bytes, as its header says",
            found=f"{size} bytes",
            cure="check the free disk space, then materialize the asset again",
        )


def _check_quantization_config(directory: Path, config: CheckpointConfig) -> None:
    """With mixed precision the algorithm of each layer stands in a file of its own."""
    if config.quantization.quant_algo != MIXED_PRECISION:
        return
    if not (directory / QUANTIZATION_CONFIG).is_file():
        raise ToolchainError(
            f"{directory} does not say how its layers are quantised",
            expected=f"{QUANTIZATION_CONFIG} beside a {CONFIG} with {MIXED_PRECISION}",
            found="none",
            cure=AGAIN,
        )


def _check_request(
    directory: Path, config: EngineConfig, version: str, asked: Mapping[str, object]
) -> None:
    if config.version != version:
        raise ToolchainError(
            f"The engine in {directory} is by another version of TensorRT-LLM",
            expected=version,
            found=config.version,
            cure="build it in the image that serves it",
        )
    built = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["build_config"]
    different = {key: value for key, value in asked.items() if built.get(key) != value}
    if different:
        raise ToolchainError(
            f"The engine in {directory} is not what was asked for",
            expected=", ".join(f"{key}={value}" for key, value in different.items()),
            found=", ".join(f"{key}={built.get(key)}" for key in different),
            cure="compare the command in the step's log with the spec's engine section",
        )


def _check_same_model(directory: Path, config: EngineConfig, converted: Path) -> None:
    # The build works out what a checkpoint may leave open, such as the experts' parallelism.
    left_open = {"mapping": {"moe_tp_size", "moe_ep_size"}, "max_position_embeddings": True}
    source = _read_config(converted, CheckpointConfig).model_dump(exclude=left_open)
    built = config.pretrained_config.model_dump(exclude=left_open)
    if different := [key for key in source if built[key] != source[key]]:
        raise ToolchainError(
            f"The engine in {directory} is not of the checkpoint in {converted}",
            expected="; ".join(f"{key}: {source[key]}" for key in different),
            found="; ".join(f"{key}: {built[key]}" for key in different),
            cure=AGAIN,
        )


def _check_engine_holds_weights(directory: Path, converted: Path) -> None:
    engine = sum(path.stat().st_size for path in directory.glob("rank*.engine"))
    weights = sum(path.stat().st_size for path in converted.glob("rank*.safetensors"))
    if engine < SMALLEST_SHARE_OF_WEIGHTS * weights:
        raise ToolchainError(
            f"The engine in {directory} is too small to hold its weights",
            expected=f"at least {SMALLEST_SHARE_OF_WEIGHTS:.0%} of {weights} bytes of weights",
            found=f"{engine} bytes",
            cure="check the free disk space, then materialize the asset again",
        )
