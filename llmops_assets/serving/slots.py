"""Serving slots: one Triton server process per environment, model and colour.

A slot is filled with a package while it has no traffic, proven there, and only then
put on the route. What serves is never changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from llmops_assets.serving.package_description import PackageDescription
from llmops_assets.storage.store import Artifact


class Environment(StrEnum):
    STAGING = "staging"
    PRODUCTION = "production"


class Colour(StrEnum):
    BLUE = "blue"
    GREEN = "green"


@dataclass(frozen=True)
class Slot:
    environment: Environment
    model: str
    colour: Colour

    def __str__(self) -> str:
        return f"{self.environment}/{self.model}/{self.colour}"


@dataclass(frozen=True)
class Endpoint:
    """Where a slot's Triton listens."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def http(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def metrics(self) -> str:
        return f"http://{self.host}:{self.metrics_port}/metrics"


@dataclass(frozen=True)
class Deployment:
    """What a slot holds: a package under a version number."""

    package: str
    """Digest of the packaged model."""
    release: str
    version: int


@dataclass(frozen=True)
class SlotState:
    """What is in a slot, and whether its server is there."""

    slot: Slot
    deployment: Deployment | None
    endpoint: Endpoint | None
    running: bool


@dataclass(frozen=True)
class SlotInspection:
    """What a look into a slot found."""

    version: int | None
    """The version that its server says it has loaded; None where none answers."""
    damage: str | None
    """What is wrong with its bytes; None if nothing is, or if it is empty."""


class Slots(Protocol):
    """Starts and stops slots. Every call may be repeated after a crash."""

    def check_serves(self, package: PackageDescription) -> None:
        """Checks that servers here can serve a package, before a byte of it is copied.

        Raises:
            SlotError: they have another image, other GPUs or fewer of them.
        """
        ...

    def start(self, slot: Slot, package: Artifact, deployment: Deployment) -> Endpoint:
        """Copies the package into the slot, verifies it, loads it, waits until it is ready.

        Does nothing when the slot already serves exactly this deployment; otherwise it
        replaces what the slot holds. The caller makes sure that no traffic goes there.

        Raises:
            SlotError: it did not become ready in time; the slot is stopped again.
            EvidenceError: no trusted key signed the package.
            ArtifactCorruptError: the bytes in the slot are not the package's.
        """
        ...

    def state(self, slot: Slot) -> SlotState:
        """What the slot holds now, and whether its server says that it is ready."""
        ...

    def inspect(self, slot: Slot, *, deep: bool = False) -> SlotInspection:
        """Looks into a slot, without touching what serves.

        Args:
            slot: which one.
            deep: read every byte; otherwise the signature and the files' names and sizes.
        """
        ...

    def drain(self, slot: Slot) -> None:
        """Waits until the slot has no running request, at most the drain time of the settings."""
        ...

    def stop(self, slot: Slot, deployment: Deployment) -> None:
        """Ends the server, if the slot still holds `deployment`; the slot keeps its files.

        A slot that was filled with something else meanwhile is left alone.
        """
        ...

    def clear(self, slot: Slot, deployment: Deployment) -> None:
        """Ends the server and removes the slot's files: the version is gone from Triton.

        A slot that was filled with something else meanwhile is left alone.
        """
        ...

    def slots(self, environment: Environment, model: str) -> tuple[SlotState, ...]:
        """The slots of a model in an environment that ever held something."""
        ...
