"""A run that is cancelled, or killed, in the middle of a step of the toolchain."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.sidecar import open_engine

from .conftest import write_hugging_face
from .doubles.installation import REPOSITORY

# A whole build, as a run does it, in a process that can be ended.
RUN = """
import signal
import sys
from pathlib import Path

import pytest

from llmops_assets.settings import Settings
from llmops_assets.spec import parse_spec
from llmops_assets.toolchains.tensorrt_llm.toolchain import BuiltEngines
from llmops_assets.tools import ToolRunner
from llmops_assets_tests.toolchains.tensorrt_llm.image_doubles import enter_image
from llmops_assets_tests.toolchains.tensorrt_llm.sidecars import SOURCES
from llmops_assets_tests.toolchains.tensorrt_llm.test_lifecycle import spec_text

# As Dagster ends a step when its run is cancelled.
signal.signal(signal.SIGTERM, signal.default_int_handler)
folder = Path(sys.argv[1])
here = enter_image(pytest.MonkeyPatch(), folder / "image")
here.installation.fail("trtllm-build", sys.argv[2])
engine = parse_spec(spec_text("engine", 2), "test").engine
toolchain = BuiltEngines(engine, Settings(timing_caches=folder / "caches"))
tools = ToolRunner(work=folder / "work", log=folder / "log", timeout_seconds=60)
toolchain.convert(folder / "model", folder / "converted", engine, tools)
toolchain.build(folder / "converted", folder / "engine", engine, SOURCES, tools)
"""
STAGE = "hang_in_last_rank"


@pytest.fixture
def step(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A step that waits in the middle of the last rank's file."""
    write_hugging_face(tmp_path / "model")
    step = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), STAGE], cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        log = tmp_path / "log"
        while not (log.is_file() and f"a double that hangs: {STAGE}" in log.read_text()):
            assert step.poll() is None, "the step ended"
            assert time.monotonic() < deadline, "the build did not start"
            time.sleep(0.05)
        yield step
    finally:
        step.kill()
        step.wait(10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_run_leaves_no_process_and_no_engine(
    number: signal.Signals, step: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Neither cancelled from the UI nor by the kernel: a process would hold the GPU, and files
    of the right names would be taken for an engine. The kept timing cache is not touched.
    """
    below = psutil.Process(step.pid).children(recursive=True)
    assert any("--checkpoint_dir" in process.cmdline() for process in below)
    step.send_signal(number)
    assert step.wait(20) != 0
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    assert (tmp_path / "engine" / "rank1.engine").is_file()
    with pytest.raises(ToolchainError, match="is not an engine"):
        open_engine(tmp_path / "engine")
    assert not (tmp_path / "caches").exists()
