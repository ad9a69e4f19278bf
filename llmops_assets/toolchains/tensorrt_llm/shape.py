"""The shape of a Hugging Face checkpoint, from its `config.json` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops_assets.errors import ToolchainError
from llmops_assets.spec import TensorRTLLMEngine
from llmops_assets.toolchains.tensorrt_llm.families import FAMILIES

CONFIG = "config.json"
# Two matrices between hidden and intermediate size; all others gate with a third.
WITHOUT_GATE = {
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "Starcoder2ForCausalLM",
    "NemotronForCausalLM",
    "PhiForCausalLM",
    "FalconForCausalLM",
}


@dataclass(frozen=True)
class ModelShape:
    """What of a decoder decides its size; counts and widths."""

    architecture: str
    """Such as `LlamaForCausalLM`."""
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    """Of one expert, where there are several."""
    vocabulary: int
    positions: int | None
    """Longest sequence, tokens; None when the config does not say or rotary embeddings are
    scaled beyond it."""
    experts: int = 1
    shared_intermediate: int = 0
    """Width of the expert that every token uses."""

    @property
    def matrices(self) -> int:
        """Between hidden and intermediate size, in one layer's expert."""
        return 2 if self.architecture in WITHOUT_GATE else 3

    @property
    def attention_parameters(self) -> int:
        """Of one layer, without biases."""
        queries = self.heads * self.head_size
        return 2 * self.hidden * queries + 2 * self.hidden * self.key_value_heads * self.head_size

    @property
    def feed_forward_parameters(self) -> int:
        """Of one layer, all experts and their router."""
        width = self.experts * self.intermediate + self.shared_intermediate
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.matrices * self.hidden * width + router

    @property
    def layer_parameters(self) -> int:
        return self.attention_parameters + self.feed_forward_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of the table of tokens; the head over the vocabulary has as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of all matrices; norms and biases, below a percent, are not counted."""
        return self.layers * self.layer_parameters + 2 * self.embedding_parameters


def read_shape(checkpoint: Path) -> ModelShape:
    """Reads a checkpoint's `config.json`, with the keys of each architecture.

    Raises:
        ToolchainError: it cannot be read, or a key is missing or no positive number.
    """
    path = checkpoint / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolchainError(
            f"{path} cannot be read", found=error, cure="export the checkpoint again"
        ) from error
    if not isinstance(config, dict):
        raise _malformed(path, "a JSON object", type(config).__name__)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise _malformed(path, "one entry in architectures", architectures)
    return _shape(_Config(path, config), str(architectures[0]))


@dataclass(frozen=True)
class _Config:
    path: Path
    content: Mapping[str, Any]

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of these keys that is there, a positive number."""
        value = next((self.content[name] for name in names if self.content.get(name)), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _malformed(self.path, f"a positive number {' or '.join(names)}", value)
        return value


def _shape(config: _Config, architecture: str) -> ModelShape:
    hidden = config.number("hidden_size", "n_embd")
    heads = config.number("num_attention_heads", "n_head")
    intermediate = config.number(
        "intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hidden
    )
    experts = config.number("num_local_experts", "num_experts", default=1)
    content = config.content
    # With these keys Falcon and StarCoder say that all heads share one.
    shared = (
        content.get("multi_query") is True and content.get("new_decoder_architecture") is not True
    )
    positions = content.get("max_position_embeddings") or content.get("n_positions")
    rotary = content.get("rope_scaling") or content.get("rope_parameters") or {}
    kind = rotary.get("rope_type", rotary.get("type")) if isinstance(rotary, dict) else None
    scaled = kind not in {None, "default"}
    return ModelShape(
        architecture=architecture,
        hidden=hidden,
        layers=config.number("num_hidden_layers", "n_layer"),
        heads=heads,
        key_value_heads=1
        if shared
        else config.number("num_key_value_heads", "num_kv_heads", default=heads),
        head_size=config.number("head_dim", default=hidden // heads),
        intermediate=config.number("moe_intermediate_size", default=intermediate)
        if experts > 1
        else intermediate,
        vocabulary=config.number("vocab_size"),
        positions=positions if isinstance(positions, int) and not scaled else None,
        experts=experts,
        shared_intermediate=config.number("shared_expert_intermediate_size", default=1)
        if content.get("shared_expert_intermediate_size")
        else 0,
    )


def check_shape(shape: ModelShape, engine: TensorRTLLMEngine) -> None:
    """Checks that a checkpoint can be spread and used as an engine section asks.

    Raises:
        ToolchainError: it is of another family, or heads, layers, experts or positions do
            not fit; all of it is named.
    """
    if problems := _misfits(shape, engine):
        raise ToolchainError(
            "The checkpoint does not fit the spec's engine section",
            found="; ".join(problems),
            cure="correct the engine section, or import another checkpoint",
        )


def _misfits(shape: ModelShape, engine: TensorRTLLMEngine) -> list[str]:
    ways = engine.parallelism
    problems: list[str] = []
    if engine.family is not None:
        known = FAMILIES[engine.family].architectures
        if shape.architecture not in known:
            problems.append(
                f"it is a {shape.architecture}, and the script of {engine.family} converts "
                + ", ".join(known)
            )
    if shape.heads % ways.tensor:
        problems.append(f"{shape.heads} attention heads cannot be split {ways.tensor} ways")
    larger, smaller = sorted((shape.key_value_heads, ways.tensor), reverse=True)
    if larger % smaller:
        problems.append(
            f"{shape.key_value_heads} key-value heads can be neither split nor repeated "
            f"{ways.tensor} ways"
        )
    if shape.layers < ways.pipeline:
        problems.append(f"{shape.layers} layers cannot be dealt out {ways.pipeline} ways")
    if shape.experts % ways.expert:
        problems.append(f"{shape.experts} experts cannot be dealt out {ways.expert} ways")
    if shape.architecture == "MixtralForCausalLM" and engine.quantization == "int8_smoothquant":
        problems.append("TensorRT-LLM has no SmoothQuant for Mixtral")
    if shape.positions is not None and engine.limits.max_seq_len > shape.positions:
        problems.append(
            f"limits.max_seq_len is {engine.limits.max_seq_len}, and the model knows "
            f"{shape.positions} positions"
        )
    return problems


def _malformed(path: Path, expected: str, found: object) -> ToolchainError:
    return ToolchainError(
        f"{path} does not describe a decoder whose conversion is known",
        expected=expected,
        found=found,
        cure="export the checkpoint again, or choose a model of a known family",
    )
