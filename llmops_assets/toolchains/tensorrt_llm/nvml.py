"""What this machine's NVIDIA driver says of its GPUs, through `nvidia-ml-py`."""

from __future__ import annotations

import importlib
import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.errors import ToolchainError

VISIBLE = "CUDA_VISIBLE_DEVICES"


class GPUFacts(BaseModel):
    """The GPUs of one machine, which are all of one kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="Such as NVIDIA H100 80GB HBM3.")
    compute_capability: str = Field(pattern=r"^\d+\.\d$", description="Such as 9.0.")
    count: int = Field(ge=1)
    memory_bytes: int = Field(ge=1, description="Of one GPU.")
    driver: str = Field(min_length=1, description="Version of the driver.")
    cuda: str = Field(
        pattern=r"^\d+\.\d+$", description="CUDA version that the driver supports, such as 13.0."
    )

    @property
    def architecture(self) -> str:
        """As `toolchains.base.Target` has it: `sm_90` for compute capability 9.0."""
        return "sm_" + self.compute_capability.replace(".", "")


def gpus_here() -> GPUFacts:
    """The GPUs that CUDA shows to this process: of the machine, or that its container was given.

    Source of names and units: NVIDIA's NVML reference, as `nvidia-ml-py` passes it on; the
    CUDA version is 1000 times the major plus 10 times the minor number.

    Raises:
        ToolchainError: `nvidia-ml-py` or a driver is missing, there is no GPU, or GPUs of
            different kinds, for which one engine could not be built.
    """
    try:
        # Of no use without a driver, so only installations for GPUs have it.
        pynvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError as error:
        raise _no_gpu("no module pynvml", "pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _no_gpu(error, "run the step on a machine with an NVIDIA GPU and driver") from error
    try:
        handles = _visible(pynvml)
        kinds = {
            (
                _text(pynvml.nvmlDeviceGetName(handle)),
                ".".join(map(str, pynvml.nvmlDeviceGetCudaComputeCapability(handle))),
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        }
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    except pynvml.NVMLError as error:
        raise _no_gpu(error, "check the driver with nvidia-smi") from error
    finally:
        pynvml.nvmlShutdown()
    if len(kinds) != 1:
        raise ToolchainError(
            "This machine has not one kind of GPU",
            expected="GPUs of one name, compute capability and memory",
            found="; ".join(sorted(f"{name} ({sm})" for name, sm, _ in kinds))
            or f"no GPU; {VISIBLE} is {os.environ.get(VISIBLE)}",
            cure=f"give the step GPUs of one kind, by a node selector or {VISIBLE}",
        )
    ((name, compute_capability, memory),) = kinds
    return GPUFacts(
        name=name,
        compute_capability=compute_capability,
        count=len(handles),
        memory_bytes=memory,
        driver=driver,
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
    )


def _visible(pynvml: Any) -> list[Any]:
    """Handles of the GPUs that `CUDA_VISIBLE_DEVICES` names; NVML itself does not heed it.

    As CUDA reads it (CUDA Programming Guide, environment variables): indices, or beginnings
    of UUIDs; what follows a name that is none of a GPU does not count. A slice of a GPU (MIG)
    is none: an engine is built for a whole one.
    """
    handles = [
        pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
    ]
    if (names := os.environ.get(VISIBLE)) is None:
        return handles
    by_index = {str(index): handle for index, handle in enumerate(handles)}
    by_uuid = {_text(pynvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
    visible: list[Any] = []
    for name in map(str.strip, names.split(",")):
        beginning = [uuid for uuid in by_uuid if name.startswith("GPU-") and uuid.startswith(name)]
        if name in by_index:
            visible.append(by_index[name])
        elif len(beginning) == 1:
            visible.append(by_uuid[beginning[0]])
        else:
            break
    return visible


def _text(value: str | bytes) -> str:
    """Releases of `nvidia-ml-py` before 12 return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _no_gpu(found: object, cure: str) -> ToolchainError:
    return ToolchainError(
        "The GPUs of this machine cannot be read",
        expected="an NVIDIA GPU with its driver, and the package nvidia-ml-py",
        found=found,
        cure=cure,
    )
