"""A Llama of two layers with random weights, and everything the CPU toolchain makes of it.

Its answers mean nothing, but they are what the checkpoint says, token for token. Built at
most once per test session.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer
from llmops_assets.spec import ModelSpec, parse_spec
from llmops_assets.toolchains import toolchain_for
from llmops_assets.tools import ToolRunner

CONTEXT = 4096
ROWS = 60
SPEC = """\
name: tiny
use_case: Answers nonsense in tests, always the same.
owner: team:tests
metrics: [exact_match]
constraints: {max_input_tokens: 64, max_output_tokens: 12}
weights: {source: path, path: unused}
data: {source: files, training: unused.parquet, evaluation: unused.parquet}
engine: {toolchain: onnxruntime_genai, precision: fp32}
serving: {threads: 1, known_answers: [{prompt: a, answer: b}]}
gates:
  accuracy: {exact_match: {at_least: 0}}
  engine_accuracy: {exact_match: {at_least: 0}}
  fairness: null
  latency:
    evaluation: [{measure: end_to_end, at_most: 5}]
    build: [{measure: end_to_end, at_most: 5}]
    staging: [{measure: end_to_end, at_most: 5}]
"""


@dataclass(frozen=True)
class TinyLlama:
    """Directories of one model on its way through the toolchain, in fp32."""

    spec: ModelSpec
    checkpoint: Path
    evaluation_data: Path
    converted: Path
    engine: Path
    package: Path


def tools(folder: Path) -> ToolRunner:
    """A tool runner with its work folder and log below `folder`."""
    return ToolRunner(work=folder / "work", log=folder / "tools.log", timeout_seconds=120)


def serving_spec() -> ModelSpec:
    """The spec with answers long enough that a test can look at one while it is made."""
    return parse_spec(SPEC.replace("max_output_tokens: 12", "max_output_tokens: 3000"), "tiny")


def write_checkpoint(directory: Path) -> None:
    """The Hugging Face directory; the same bytes every time."""
    tokenizer = build_tokenizer([])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, CONTEXT)


@functools.cache
def tiny_llama(folder: Path) -> TinyLlama:
    """Everything, below `folder`."""
    spec = parse_spec(SPEC, "tiny")
    toolchain = toolchain_for(spec.engine)
    tiny = TinyLlama(
        spec=spec,
        checkpoint=folder / "checkpoint",
        evaluation_data=folder / "evaluation_data",
        converted=folder / "converted",
        engine=folder / "engine",
        package=folder / "package",
    )
    write_checkpoint(tiny.checkpoint)
    tiny.evaluation_data.mkdir()
    pd.DataFrame(
        {
            "prompt": [f"{day} août {1950 + day}" for day in range(ROWS)],
            "completion": [f"{1950 + day}-08-{day:02}" for day in range(ROWS)],
            "slice": ["even", "odd"] * (ROWS // 2),
        }
    ).to_parquet(tiny.evaluation_data / "data.parquet", index=False)
    runner = tools(folder)
    toolchain.convert(tiny.checkpoint, tiny.converted, spec.engine, runner)
    toolchain.build(tiny.converted, tiny.engine, spec.engine, {}, runner)
    toolchain.package(tiny.engine, tiny.checkpoint, tiny.package, serving_spec())
    return tiny
