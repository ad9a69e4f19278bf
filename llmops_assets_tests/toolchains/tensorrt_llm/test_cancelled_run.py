"""A Dagster run that is terminated, or killed, in the middle of a step of the toolchain."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.instance.ref import InstanceRef

from llmops_assets.evidence.keys import create_keys
from llmops_assets.settings import Settings
from llmops_assets_tests.release_rig import PlatformOnDoubles

from .doubles.installation import REPOSITORY
from .test_lifecycle import RELEASE

# The worker of a run, in a process that can be ended.
WORKER = """
import sys
from pathlib import Path

import pytest
from dagster import DagsterInstance
from dagster._core.instance.ref import InstanceRef
from dagster._utils.interrupts import setup_interrupt_handlers

from llmops_assets.settings import Settings
from llmops_assets_tests.release_rig import PlatformOnDoubles, Rig
from llmops_assets_tests.toolchains.tensorrt_llm import test_lifecycle as lifecycle
from llmops_assets_tests.toolchains.tensorrt_llm.image_doubles import enter_image
from llmops_assets_tests.toolchains.tensorrt_llm.sidecars import TOOLKIT

folder = Path(sys.argv[1])
here = enter_image(pytest.MonkeyPatch(), folder / "image")
here.installation.fail("trtllm-build", sys.argv[2])
rig = Rig(folder / "rig")
rig.platform = PlatformOnDoubles(
    Settings(
        state=rig.root / "state", models=rig.models, gpu_image_digest=TOOLKIT.image_digest,
        timing_caches=folder / "caches", tool_timeout_seconds=60,
    )
)
lifecycle.register(rig, lifecycle.spec_text("engine", 2))
# As `dagster api execute_run` does.
setup_interrupt_handlers()
with DagsterInstance.from_ref(InstanceRef.from_dir(str(folder / "dagster"))) as instance:
    result = lifecycle.materialize(rig, instance, *lifecycle.BUILD)
sys.exit(0 if result.success else 1)
"""
STAGE = "hang_in_last_rank"


@dataclass(frozen=True)
class Worker:
    """A run's worker whose build waits in the middle of the last rank's file."""

    process: subprocess.Popen[bytes]
    platform: PlatformOnDoubles
    dagster: Path

    def cancel(self) -> None:
        """As the run page's Terminate does: the run is marked, then its worker interrupted."""
        with DagsterInstance.from_ref(InstanceRef.from_dir(str(self.dagster))) as instance:
            (run,) = instance.get_runs()
            instance.report_run_canceling(run)
        self.process.send_signal(signal.SIGTERM)

    def status(self) -> DagsterRunStatus:
        """What Dagster says of the run."""
        with DagsterInstance.from_ref(InstanceRef.from_dir(str(self.dagster))) as instance:
            (run,) = instance.get_runs()
            return run.status


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "dagster").mkdir()
    root = tmp_path / "rig"
    settings = Settings(state=root / "state", models=root / "models")
    create_keys(settings.key_folder)
    platform = PlatformOnDoubles(settings)
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path), STAGE], cwd=REPOSITORY,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        log = platform.tool_log(RELEASE, "engine")
        while not (log.is_file() and f"a double that hangs: {STAGE}" in log.read_text()):
            assert process.poll() is None, "the run ended"
            assert time.monotonic() < deadline, "the build did not start"
            time.sleep(0.05)
        yield Worker(process, platform, tmp_path / "dagster")
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("killed", [False, True])
def test_ended_run_leaves_no_process_and_no_engine(
    killed: bool, worker: Worker, tmp_path: Path
) -> None:
    """Neither terminated in the UI nor killed by the kernel: a process would hold the GPU, and
    half an engine would be taken for one. The kept timing cache is not touched.
    """
    below = psutil.Process(worker.process.pid).children(recursive=True)
    assert any("--checkpoint_dir" in process.cmdline() for process in below)
    if killed:
        worker.process.kill()
    else:
        worker.cancel()
    assert worker.process.wait(30) != 0
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    if not killed:
        assert worker.status() is DagsterRunStatus.CANCELED
    published = set(worker.platform.column(RELEASE))
    assert "converted_weights" in published
    assert published.isdisjoint({"engine", "engine_validation", "packaged_model"})
    assert not (tmp_path / "caches").exists()
