"""What a toolchain does: from a Hugging Face checkpoint to a Triton model repository.

Nothing outside `toolchains/` knows which toolchain a spec picked.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from llmops_assets.spec import ModelSpec, Section
from llmops_assets.tools import ToolRunner

Facts = Mapping[str, Any]
"""What a step says of its result for people: JSON values, shown as asset metadata."""

EngineSection = TypeVar("EngineSection", bound=Section, contravariant=True)
"""The section of a spec that a toolchain is driven by, its member of `spec.Engine`."""

Step = Literal["converted_weights", "engine", "engine_validation", "packaged_model"]
"""The asset that a step of a toolchain makes."""

VERSION_FOLDER = "version"
"""Name of a packaged model's version folder; deployment renames it to the version's number."""


@dataclass(frozen=True)
class Target:
    """The machine that an engine will serve on."""

    architecture: str
    """As `platform.machine()` gives it, or a GPU's compute capability such as `sm_90`."""
    gpus: int = 0
    """GPUs of that architecture; 0 where the engine needs none."""

    @classmethod
    def here(cls) -> Target:
        """This machine's CPU; what a toolchain builds for, its `target` says."""
        return cls(architecture=platform.machine())


@dataclass(frozen=True)
class ServingImage:
    """The container image that serves a package."""

    name: str
    """With its registry, without tag."""
    tag: str
    digest: str | None
    """`sha256:…`, where it is known."""

    def __str__(self) -> str:
        """As a container engine takes it."""
        return f"{self.name}:{self.tag}" + ("" if self.digest is None else f"@{self.digest}")


class EngineToolchain(Protocol[EngineSection]):
    """Four steps, each a pure function of directories and parameters.

    Every step writes a new directory `output` (which does not exist before) and may be
    killed at any time: the caller throws an unfinished one away.
    """

    name: str
    serving_distributions: tuple[str, ...]
    """Python packages that a package by this toolchain needs where it serves."""
    serving_image: ServingImage | None
    """What serves it; None for the Triton that is installed here."""

    def versions(self, step: Step) -> Mapping[str, str]:
        """All that decides what a step produces, beside inputs and parameters.

        Packages, our own sources, the machine where it matters. Part of its action digest.
        """
        ...

    def check_weights(self, converted: Path) -> None:
        """Checks that converted weights are complete.

        Raises:
            ToolchainError: they are not.
        """
        ...

    def conversion_parameters(self, engine: EngineSection) -> Mapping[str, Any]:
        """What of the spec's engine section the conversion depends on."""
        ...

    def build_parameters(self, engine: EngineSection) -> Mapping[str, Any]:
        """What of the spec's engine section the build depends on."""
        ...

    def validation_parameters(self, spec: ModelSpec) -> Mapping[str, Any]:
        """What of the spec the validation depends on beside constraints, threads and tasks."""
        ...

    def package_parameters(self, engine: EngineSection) -> Mapping[str, Any]:
        """What of the spec's engine section the package depends on, beside the engine."""
        ...

    def target(self) -> Target:
        """What engines of this toolchain are to serve on: the machines that the spec names, or
        this one, where the local slots are. Needs no GPU.
        """
        ...

    def compatible(self, engine_directory: Path, target: Target) -> None:
        """Checks that a built engine can run on `target`, by what its files say. Needs no GPU.

        Raises:
            ToolchainError: it cannot.
        """
        ...

    def convert(
        self, checkpoint: Path, output: Path, engine: EngineSection, tools: ToolRunner
    ) -> Facts:
        """Hugging Face directory to the toolchain's checkpoint format.

        Raises:
            ToolError, ToolchainError: the tool failed, or its output is incomplete.
        """
        ...

    def build(
        self,
        converted: Path,
        output: Path,
        engine: EngineSection,
        sources: Mapping[str, str],
        tools: ToolRunner,
    ) -> Facts:
        """Converted weights to an engine with a sidecar `engine.json`.

        The sidecar holds toolchain, versions, target architecture and build parameters.
        `sources` are digests of the converted weights and of what they were made from, by
        asset, for a sidecar that names them.

        Raises:
            ToolError, ToolchainError: the tool failed, or its output is incomplete.
        """
        ...

    def validate(
        self,
        checkpoint: Path,
        engine_directory: Path,
        evaluation_data: Path,
        output: Path,
        spec: ModelSpec,
        repository: Path,
        tools: ToolRunner,
    ) -> Facts:
        """Local inference: the engine beside its checkpoint on the evaluation data.

        Tasks of lm-evaluation-harness that the spec names are run as well; their files are
        in `repository`.

        Writes `predictions.parquet` with all columns of `develop.metrics`, and
        `validation.json`: the metrics of these predictions with the same keys as an
        evaluation's, and `prompts`, `token_agreement`, `logit_distance` and
        `tokenizer_parity`, see `build/judgements.py`.

        Raises:
            ToolError, ToolchainError: the tool failed.
        """
        ...

    def package(
        self, engine_directory: Path, checkpoint: Path, output: Path, spec: ModelSpec
    ) -> Facts:
        """A Triton model repository: `repository/<model>/{config.pbtxt,version/…}`.

        The package holds neither a version nor a release; deployment adds the version.

        Raises:
            ToolchainError: the engine is incomplete.
        """
        ...


@runtime_checkable
class ServerCheck(Protocol):
    """What a toolchain has as well whose servers say in their metrics what they can do."""

    def check_server(self, package: Path, metrics: str) -> None:
        """Checks what a server that was asked says of itself.

        Args:
            package: the directory of what it serves.
            metrics: in the Prometheus text format.

        Raises:
            ToolchainError: it cannot do what the package promises.
        """
        ...
