"""The real thing: TensorRT-LLM on a GPU, a tiny Llama from checkpoint to package.

Only in the image of TensorRT-LLM, on a machine with a GPU; `docs/tensorrt_llm.md` has the
command. Everywhere else it is skipped, and what the toolchain does is checked by contract.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from llmops_assets.build.judgements import judge_parity, judge_target
from llmops_assets.develop.data import DATA_FILE
from llmops_assets.errors import ToolchainError
from llmops_assets.settings import Settings, get_settings
from llmops_assets.spec import ParityGate, parse_spec
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS
from llmops_assets.toolchains.tensorrt_llm.image import image_here
from llmops_assets.toolchains.tensorrt_llm.image_python import (
    find_python,
    toolkit_of,
    with_our_modules,
)
from llmops_assets.toolchains.tensorrt_llm.packaging import check_package
from llmops_assets.toolchains.tensorrt_llm.running import run_listening
from llmops_assets.toolchains.tensorrt_llm.toolchain import toolchain_of
from llmops_assets.tools import ToolRunner
from llmops_assets_tests.release_rig import MODEL

from .sidecars import SOURCES, TOOLKIT
from .specs import spec_text

WRITE_LLAMA = Path(__file__).with_name("write_llama.py")


def in_the_image() -> bool:
    """Whether there is a Python with TensorRT-LLM, beside this one or this one itself."""
    settings = Settings()
    try:
        toolkit_of(find_python(settings), settings.gpu_image_digest or TOOLKIT.image_digest)
    except ToolchainError:
        return False
    return True


pytestmark = pytest.mark.skipif(not in_the_image(), reason="needs the image of TensorRT-LLM")
ROWS = 110


@pytest.mark.parametrize("backend", ["engine", "llmapi"])
def test_checkpoint_becomes_a_package(backend: str, tmp_path: Path) -> None:
    """Every command, flag, layout, key and call that was only read so far."""
    image = image_here(get_settings())
    here = image.gpus
    gpu = next(
        name
        for name, gpu in GPUS.items()
        if (gpu.architecture, gpu.memory <= here.memory_bytes) == (here.architecture, True)
    )
    more = f"version: {image.toolkit.tensorrt_llm}"
    text = spec_text(backend, more=more).replace("gpu: h100-sxm", f"gpu: {gpu}")
    spec = parse_spec(text, "test")
    assert spec.engine.toolchain == "tensorrt_llm"
    toolchain = toolchain_of(spec.engine, get_settings())
    tools = ToolRunner(work=tmp_path / "work", log=tmp_path / "log", timeout_seconds=1800)
    checkpoint = tmp_path / "checkpoint"
    run_listening(
        tools, "write_llama.py", [str(image.python), str(WRITE_LLAMA), str(checkpoint)],
        with_our_modules(tmp_path / "modules"),
    )  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    pd.DataFrame(
        {
            "prompt": [str(row) for row in range(ROWS)],
            "completion": ["yes"] * ROWS,
            "slice": ["all"] * ROWS,
        }
    ).to_parquet(data / DATA_FILE, index=False)
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
