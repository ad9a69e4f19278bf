"""A build that was killed leaves nothing that a later step could take for an engine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmops_assets.errors import ToolchainError, ToolError
from llmops_assets.toolchains.tensorrt_llm.outputs import (
    check_converted_weights,
    check_engine_directory,
)
from llmops_assets.toolchains.tensorrt_llm.sidecar import SIDECAR, open_engine
from llmops_assets.tools import ToolRunner

from .conftest import build_command, write_hugging_face
from .doubles.installation import REPOSITORY, Installation
from .sidecars import write

# The step of the toolchain, in a process that can be killed.
STEP = """
import sys
from pathlib import Path

import pytest

from llmops_assets.settings import Settings
from llmops_assets.spec import parse_spec
from llmops_assets.toolchains.tensorrt_llm.toolchain import BuiltEngines
from llmops_assets.tools import ToolRunner
from llmops_assets_tests.toolchains.tensorrt_llm.image_doubles import enter_image
from llmops_assets_tests.toolchains.tensorrt_llm.sidecars import SOURCES
from llmops_assets_tests.toolchains.tensorrt_llm.specs import spec_text

folder = Path(sys.argv[1])
here = enter_image(pytest.MonkeyPatch(), folder / "image")
section = parse_spec(spec_text("engine", 2), "test").engine
toolchain = BuiltEngines(section, Settings(timing_caches=folder / "caches"))
tools = ToolRunner(work=folder / "work", log=folder / "tool.log", timeout_seconds=60)
toolchain.convert(folder / "model", folder / "converted", section, tools)
if len(sys.argv) > 2:
    here.installation.fail("trtllm-build", sys.argv[2])
toolchain.build(folder / "converted", folder / "engine", section, SOURCES, tools)
"""
STAGES = {
    "hang_after_config": ["config.json"],
    "hang_in_last_rank": ["config.json", "rank0.engine", "rank1.engine"],
    "hang_at_end": ["config.json", "rank0.engine", "rank1.engine"],
}


def start(folder: Path, *failure: str) -> subprocess.Popen[bytes]:
    write_hugging_face(folder / "model")
    return subprocess.Popen([sys.executable, "-c", STEP, str(folder), *failure], cwd=REPOSITORY)


def wait_for(log: Path, text: str, step: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not (log.is_file() and text in log.read_text()):
        assert step.poll() is None, "the step ended"
        assert time.monotonic() < deadline, f"no {text!r} in {log}"
        time.sleep(0.02)


def test_step_that_is_not_killed_makes_an_engine(tmp_path: Path) -> None:
    """Otherwise the tests below would show nothing."""
    assert start(tmp_path).wait(60) == 0
    config, sidecar = open_engine(tmp_path / "engine")
    assert config.pretrained_config.mapping.world_size == 2
    assert sidecar.toolchain == "tensorrt_llm"


@pytest.mark.parametrize("stage", STAGES)
def test_killed_step_leaves_no_engine_and_no_process(stage: str, tmp_path: Path) -> None:
    """kill -9 of the run worker, when all, some or none of the engine is there."""
    step = start(tmp_path, stage)
    try:
        wait_for(tmp_path / "tool.log", f"a double that hangs: {stage}", step)
        below = psutil.Process(step.pid).children(recursive=True)
        assert any("--checkpoint_dir" in process.cmdline() for process in below)
    finally:
        step.kill()
        step.wait(10)
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    engine = tmp_path / "engine"
    assert sorted(path.name for path in engine.iterdir()) == STAGES[stage]
    with pytest.raises(ToolchainError, match="is not an engine"):
        open_engine(engine)


def test_build_that_ran_out_of_time_leaves_no_engine(
    installation: Installation, converted: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """The runner ends it, and what is there is half an engine of the right shape."""
    installation.fail("trtllm-build", "hang_in_last_rank")
    engine = tmp_path / "engine"
    short = ToolRunner(tools.work, tools.log, timeout_seconds=2)
    with pytest.raises(ToolError, match="stopped after 2 s"):
        short.run("trtllm-build", build_command(installation, converted, engine))
    # All ranks are there, and only one byte is missing: no look at the files tells.
    check_engine_directory(engine, version="1.2.1", converted=converted)
    with pytest.raises(ToolchainError, match="is not an engine"):
        open_engine(engine)


@pytest.mark.parametrize("stage", ["hang_after_config", "hang_in_last_rank"])
def test_killed_conversion_leaves_no_weights(
    stage: str, installation: Installation, hugging_face: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """Weights say how long they are, so that even a missing byte is seen."""
    installation.fail("convert_checkpoint.py", stage)
    output = tmp_path / "converted"
    command = installation.command(
        "convert_checkpoint.py",
        "--model_dir", hugging_face, "--output_dir", output, "--tp_size", 2,
    )  # fmt: skip
    short = ToolRunner(tools.work, tools.log, timeout_seconds=1)
    with pytest.raises(ToolError, match="stopped after 1 s"):
        short.run("convert_checkpoint.py", command)
    assert (output / "config.json").is_file()
    with pytest.raises(ToolchainError, match=r"no weights|cut off"):
        check_converted_weights(output)


def test_sidecar_that_was_half_written_makes_no_engine(engine: Path) -> None:
    """It appears by a rename, so what a kill leaves has another name."""
    write(engine)
    (engine / SIDECAR).rename(engine / (SIDECAR + ".partial"))
    with pytest.raises(ToolchainError, match="is not an engine"):
        open_engine(engine)
