"""A small model and the doubles of the tools that turn it into an engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmops_assets.tools import ToolRunner

from .doubles.installation import Installation, install
from .doubles.layouts import safetensors, write_json


def write_hugging_face(directory: Path, **config: object) -> Path:
    """A Hugging Face directory of a small Llama, as far as the doubles read one."""
    directory.mkdir(parents=True)
    write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "torch_dtype": "bfloat16",
            **config,
        },
    )
    (directory / "model.safetensors").write_bytes(safetensors("weights of the model"))
    write_json(directory / "tokenizer.json", {"model": {"vocab": {"auto_map": 7}}})
    return directory


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `model`, `converted` for two ranks, and its `engine`; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    installation = install(folder / "image")
    tools = ToolRunner(work=folder / "work", log=folder / "tool.log", timeout_seconds=20)
    convert = installation.command(
        "convert_checkpoint.py",
        "--model_dir", write_hugging_face(folder / "model"),
        "--output_dir", folder / "converted", "--tp_size", 2,
    )  # fmt: skip
    tools.run("conversion", convert)
    tools.run("build", build_command(installation, folder / "converted", folder / "engine"))
    return folder


@pytest.fixture
def hugging_face(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built / "model", tmp_path / "model")


@pytest.fixture
def converted(built: Path, tmp_path: Path) -> Path:
    """A converted checkpoint of two ranks."""
    return shutil.copytree(built / "converted", tmp_path / "converted")


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """An engine of two ranks, without a sidecar."""
    return shutil.copytree(built / "engine", tmp_path / "engine")


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return install(tmp_path / "image")


@pytest.fixture
def tools(tmp_path: Path) -> ToolRunner:
    return ToolRunner(work=tmp_path / "work", log=tmp_path / "tool.log", timeout_seconds=20)


def build_command(installation: Installation, converted: Path, output: Path) -> list[str]:
    """How an engine is built."""
    return installation.command(
        "trtllm-build",
        "--checkpoint_dir", converted, "--output_dir", output, "--gemm_plugin", "auto",
        "--max_batch_size", 8, "--output_timing_cache", output.with_name("timing.cache"),
    )  # fmt: skip
