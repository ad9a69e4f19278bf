"""`package.json`: what a package says of itself, to whoever serves it and asks it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from llmops_assets.errors import SlotError
from llmops_assets.serving.request_contract import EMBEDDED, RequestContract
from llmops_assets.toolchains.base import ServingImage

PACKAGE_FILE = "package.json"


class PackageDescription(BaseModel):
    """What of `package.json` is the same for all toolchains; the rest is for people."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    asked: RequestContract = EMBEDDED
    """How it is asked. The embedded toolchain's packages leave it out: it is the default."""
    image: ServingImage | None = None
    """The container image that serves it; None for the Triton that is installed here."""
    architecture: str | None = None
    """Of the GPUs that it runs on, such as `sm_90`; None where it needs none."""
    world_size: int = 0
    """GPUs of that architecture that one server takes."""


def read_package(package: Path) -> PackageDescription:
    """What a package says of itself.

    Args:
        package: its directory.

    Raises:
        SlotError: `package.json` is not there, or not what a toolchain writes.
    """
    path = package / PACKAGE_FILE
    try:
        return PackageDescription.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise SlotError(
            f"{path} does not say how to serve and ask the package",
            expected="what a toolchain's package step writes",
            found=error,
            cure="make a new release; do not deploy what another tool packaged",
        ) from error
