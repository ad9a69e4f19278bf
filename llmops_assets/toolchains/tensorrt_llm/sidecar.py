"""`engine.json`: what an engine directory does not say of itself.

TensorRT-LLM writes neither the GPU's architecture nor the version of TensorRT beside an
engine, and both decide where it runs. The sidecar is written last, over a directory that
was verified: a directory without one is no engine, whatever it holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from llmops_assets.develop.directory import replace_file
from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.nvml import GPUFacts
from llmops_assets.toolchains.tensorrt_llm.outputs import EngineConfig, check_engine_directory

SIDECAR = "engine.json"
NAME = "tensorrt_llm"
SECONDS_PER_HOUR = 3600

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class Part(BaseModel):
    """Base of all parts of a sidecar."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Toolkit(Part):
    """The software that builds an engine, which must be what serves it."""

    tensorrt_llm: str = Field(min_length=1, description="Version, such as 1.2.1.")
    tensorrt: str | None = Field(
        description="Version, such as 10.14.1.48; null from TensorRT-LLM 1.3 on, which does "
        "without it."
    )
    image_digest: Digest = Field(description="Of the container image.")
    cuda: str | None = Field(
        default=None,
        description="Version in the image, such as 13.0.2, from CUDA_VERSION, which NVIDIA's "
        "images set; what the driver supports is a fact of the GPU.",
    )


class Target(Part):
    """The GPU that the engine was built on, and so the only kind that it runs on."""

    architecture: str = Field(pattern=r"^sm_\d+$", description="Such as sm_90.")
    gpu: GPUFacts


class Cost(Part):
    """What the sidecar's commands took of GPUs."""

    gpu_seconds: float = Field(ge=0, description="Seconds of wall clock times GPUs held.")
    gpu_hour: Decimal | None = Field(
        description="Price of one GPU for an hour, from the settings; null when none is set."
    )
    amount: Decimal | None = Field(description="In the currency of `gpu_hour`.")

    @classmethod
    def of(cls, seconds: float, gpus: int, gpu_hour: Decimal | None) -> Cost:
        """The cost of a step.

        Args:
            seconds: wall clock of the step, for all of which it held its GPUs.
            gpus: GPUs held.
            gpu_hour: price of one GPU for an hour, if known.
        """
        gpu_seconds = round(seconds * gpus, 1)
        amount = (
            None
            if gpu_hour is None
            else (Decimal(str(gpu_seconds)) / SECONDS_PER_HOUR * gpu_hour).quantize(Decimal("0.01"))
        )
        return cls(gpu_seconds=gpu_seconds, gpu_hour=gpu_hour, amount=amount)


class Sidecar(Part):
    """What `engine.json` holds."""

    toolchain: Literal["tensorrt_llm"] = NAME
    toolkit: Toolkit
    target: Target
    parameters: Mapping[str, object] = Field(description="What the action digest covers.")
    commands: tuple[tuple[str, ...], ...] = Field(
        description="Command lines that made it, with folders by their names, see `portable`."
    )
    sources: Mapping[str, Digest] = Field(
        min_length=1, description="Digests of what it was made from, by asset."
    )
    cost: Cost
    files: Mapping[str, int] = Field(
        min_length=1, description="Size in bytes of every other file of the directory."
    )


def portable(command: Sequence[str], **folders: Path) -> tuple[str, ...]:
    """A command line with folders as `{name}`, so that it says the same on every machine.

    Args:
        command: argument list.
        folders: where things were in this run, by the names that stand for them.
    """
    # The longest first, as a folder may lie in another.
    places = sorted(folders.items(), key=lambda place: len(str(place[1])), reverse=True)
    arguments = list(command)
    for name, folder in places:
        arguments = [
            re.sub(rf"{re.escape(str(folder))}(?=/|$)", f"{{{name}}}", argument)
            for argument in arguments
        ]
    return tuple(arguments)


def write_sidecar(
    directory: Path,
    *,
    toolkit: Toolkit,
    gpu: GPUFacts,
    parameters: Mapping[str, object],
    commands: Sequence[Sequence[str]],
    sources: Mapping[str, str],
    cost: Cost,
) -> Sidecar:
    """Makes a verified directory an engine; called after everything else is in place.

    Args:
        directory: the engine, verified by `outputs.check_engine_directory`.
        toolkit: the software that built it.
        gpu: the GPU it was built on.
        parameters: JSON values, as `EngineToolchain.build_parameters` gives them.
        commands: argument lists of the tools that were run, without anything secret, each
            as `portable` gives it.
        sources: digests of checkpoint, converted weights and the like, by asset.
        cost: of all these commands together.
    """
    sidecar = Sidecar(
        toolkit=toolkit,
        target=Target(architecture=gpu.architecture, gpu=gpu),
        parameters=parameters,
        commands=tuple(tuple(command) for command in commands),
        sources=sources,
        cost=cost,
        files=_sizes(directory),
    )
    partial = directory / (SIDECAR + ".partial")
    text = json.dumps(sidecar.model_dump(mode="json"), indent=2, sort_keys=True)
    partial.write_text(text + "\n", encoding="utf-8")
    replace_file(partial, directory / SIDECAR)
    return sidecar


def read_sidecar(directory: Path) -> Sidecar:
    """`engine.json` of a directory whose files are all there in their full size.

    Raises:
        ToolchainError: there is no sidecar, it is incomplete, or a file is missing, cut off
            or one too many.
    """
    path = directory / SIDECAR
    try:
        sidecar = Sidecar.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ToolchainError(
            f"{directory} is not an engine",
            expected=f"a {SIDECAR}, which is written when a build has ended and was verified",
            found=error,
            cure="materialize the engine again; never take over what a killed build left",
        ) from error
    except ValidationError as error:
        raise ToolchainError(
            f"{path} is incomplete",
            expected="the keys that this version of llmops-assets writes",
            found="; ".join(
                ".".join(map(str, detail["loc"])) + f": {detail['msg']}"
                for detail in error.errors()
            ),
            cure="build the engine again",
        ) from error
    found = _sizes(directory)
    if found != dict(sidecar.files):
        wrong = sorted(name for name in {*found, *sidecar.files} if
                       found.get(name) != sidecar.files.get(name))  # fmt: skip
        raise ToolchainError(
            f"The engine in {directory} is not the one that was built",
            expected=", ".join(f"{name}: {sidecar.files.get(name)} bytes" for name in wrong),
            found=", ".join(f"{name}: {found.get(name)} bytes" for name in wrong),
            cure="copy it from the store again; if it is the store's, build the engine again",
        )
    return sidecar


def open_engine(directory: Path) -> tuple[EngineConfig, Sidecar]:
    """What a later step may take for an engine: its sidecar is there and all of it is whole.

    For the backend `engine`; what the backend `llmapi` serves has a sidecar and no
    `rank*.engine`, so `read_sidecar` is for that.

    Raises:
        ToolchainError: it is no whole engine; see `read_sidecar` and `check_engine_directory`.
    """
    sidecar = read_sidecar(directory)
    return check_engine_directory(directory, version=sidecar.toolkit.tensorrt_llm), sidecar


def _sizes(directory: Path) -> dict[str, int]:
    return {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / SIDECAR
    }
