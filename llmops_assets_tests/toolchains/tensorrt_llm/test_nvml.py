"""What NVIDIA's driver says of the GPUs becomes facts, or an error with a cure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.nvml import VISIBLE, GPUFacts, gpus_here


class NVMLError(Exception):
    """As nvidia-ml-py has it."""


class DoubleOfNVML:
    """nvidia-ml-py's functions, for GPUs given as name, compute capability and bytes."""

    NVMLError = NVMLError

    def __init__(self, gpus: Sequence[tuple[str | bytes, tuple[int, int], int]]) -> None:
        self.gpus = gpus
        self.open = False

    def nvmlInit(self) -> None:  # noqa: N802
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        assert self.open
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802
        return self.gpus[handle][0]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return self.gpus[handle][1]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=self.gpus[handle][2])

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}a-of-a-machine"

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 12080


@pytest.fixture(autouse=True)
def _all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)


H100 = (b"NVIDIA H100 80GB HBM3", (9, 0), 85520809984)
L4 = ("NVIDIA L4", (8, 9), 24152899584)


def test_gpus_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old releases of nvidia-ml-py give bytes for text; both must read the same."""
    double = DoubleOfNVML([H100, ("NVIDIA H100 80GB HBM3", (9, 0), 85520809984)])
    monkeypatch.setitem(sys.modules, "pynvml", double)
    assert gpus_here() == GPUFacts(
        name="NVIDIA H100 80GB HBM3",
        compute_capability="9.0",
        count=2,
        memory_bytes=85520809984,
        driver="580.65.06",
        cuda="12.8",
    )
    assert not double.open


@pytest.mark.parametrize(("gpus", "found"), [([H100, L4], "L4 .8.9"), ([], "no GPU")])
def test_other_than_one_kind_of_gpu_is_refused(
    gpus: list[tuple[str | bytes, tuple[int, int], int]],
    found: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks of one engine cannot be spread over different GPUs."""
    monkeypatch.setitem(sys.modules, "pynvml", DoubleOfNVML(gpus))
    with pytest.raises(ToolchainError, match=found):
        gpus_here()


def test_machine_without_driver_or_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest mistake: the step ran on a node without GPUs."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ToolchainError, match="pip install nvidia-ml-py"):
        gpus_here()

    def fail() -> None:
        raise NVMLError("NVML Shared Library Not Found")

    double = DoubleOfNVML([H100])
    monkeypatch.setattr(double, "nvmlInit", fail)
    monkeypatch.setitem(sys.modules, "pynvml", double)
    with pytest.raises(ToolchainError, match=r"Library Not Found.*machine with an NVIDIA GPU"):
        gpus_here()


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0,1", 2),
        ("GPU-1a", 1),
        (" 1 , GPU-0a-of-a-machine", 2),
        # As CUDA: what follows a name of nothing does not count.
        ("0,7,1", 1),
        ("1,-1", 1),
    ],
)
def test_only_visible_gpus_count(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was given one of two cards would be let in as having both, and fail at the
    second rank.
    """
    monkeypatch.setitem(sys.modules, "pynvml", DoubleOfNVML([H100, H100, L4]))
    monkeypatch.setenv(VISIBLE, visible)
    assert gpus_here().count == count


@pytest.mark.parametrize("visible", ["", "GPU-", "MIG-0a", "7"])
def test_no_visible_gpu_is_named(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable, as the machine has some."""
    monkeypatch.setitem(sys.modules, "pynvml", DoubleOfNVML([H100, H100]))
    monkeypatch.setenv(VISIBLE, visible)
    with pytest.raises(ToolchainError, match=f"no GPU; {VISIBLE} is {visible}"):
        gpus_here()
