"""The real thing: TensorRT-LLM on a GPU, a tiny Llama from checkpoint to package.

Only in the image of TensorRT-LLM, on a machine with a GPU; `docs/tensorrt_llm.md` has the
command. Everywhere else it is skipped, and what the toolchain does is checked by contract.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest

from llmops_assets.build.judgements import judge_parity, judge_target
from llmops_assets.develop.data import DATA_FILE
from llmops_assets.settings import get_settings
from llmops_assets.spec import ParityGate, parse_spec
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS
from llmops_assets.toolchains.tensorrt_llm.image import image_here
from llmops_assets.toolchains.tensorrt_llm.packaging import check_package
from llmops_assets.toolchains.tensorrt_llm.toolchain import toolchain_of
from llmops_assets.tools import ToolRunner
from llmops_assets_tests.release_rig import MODEL

from .sidecars import SOURCES
from .test_lifecycle import spec_text

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_llm") is None, reason="needs the image of TensorRT-LLM"
)
ROWS = 100


def write_llama(directory: Path) -> Path:
    """Random weights, with heads of 64, which TensorRT-LLM's kernels have."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer

    tokenizer = build_tokenizer([])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=256, intermediate_size=512,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    save_tokenizer(tokenizer, directory, 512)
    return directory


@pytest.mark.parametrize("backend", ["engine", "llmapi"])
def test_checkpoint_becomes_a_package(backend: str, tmp_path: Path) -> None:
    """Every command, flag, layout, key and call that was only read so far."""
    image = image_here(get_settings())
    gpu = next(name for name, gpu in GPUS.items() if gpu.architecture == image.gpus.architecture)
    more = f"version: {image.toolkit.tensorrt_llm}"
    text = spec_text(backend, more=more).replace("gpu: h100-sxm", f"gpu: {gpu}")
    spec = parse_spec(text, "test")
    assert spec.engine.toolchain == "tensorrt_llm"
    toolchain = toolchain_of(spec.engine, get_settings())
    checkpoint = write_llama(tmp_path / "checkpoint")
    data = tmp_path / "data"
    data.mkdir()
    pd.DataFrame(
        {
            "prompt": [str(row) for row in range(ROWS)],
            "completion": ["yes"] * ROWS,
            "slice": ["all"] * ROWS,
        }
    ).to_parquet(data / DATA_FILE, index=False)
    tools = ToolRunner(work=tmp_path / "work", log=tmp_path / "log", timeout_seconds=1800)
    converted, engine = tmp_path / "converted", tmp_path / "engine"
    toolchain.convert(checkpoint, converted, spec.engine, tools)
    toolchain.build(converted, engine, spec.engine, SOURCES, tools)
    assert judge_target(spec, engine).passed
    validated, package = tmp_path / "validated", tmp_path / "package"
    toolchain.validate(checkpoint, engine, data, validated, spec, tmp_path, tools)
    assert json.loads((validated / "benchmark.json").read_text())["levels"]
    assert judge_parity(validated, ParityGate(token_agreement=0.9)).passed
    toolchain.package(engine, checkpoint, package, spec)
    check_package(package, MODEL)
