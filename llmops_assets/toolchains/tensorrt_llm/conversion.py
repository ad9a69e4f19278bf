"""`conversion.json`: how weights were converted, kept with them until their engine is built.

An engine's sidecar travels alone, and the weights' own `config.json` tells neither the command
nor what it took.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.sidecar import Part, Toolkit

CONVERSION = "conversion.json"


class Conversion(Part):
    """What `conversion.json` holds."""

    toolkit: Toolkit
    parameters: Mapping[str, object] = Field(description="What the action digest covers.")
    command: tuple[str, ...] = Field(min_length=1, description="As `sidecar.portable` gives it.")
    seconds: float = Field(ge=0, description="Wall clock of the command.")


def write_conversion(directory: Path, conversion: Conversion) -> None:
    """Adds the record to converted weights that were verified."""
    text = json.dumps(conversion.model_dump(mode="json"), indent=2, sort_keys=True)
    (directory / CONVERSION).write_text(text + "\n", encoding="utf-8")


def read_conversion(directory: Path) -> Conversion:
    """The record of converted weights.

    Raises:
        ToolchainError: there is none, or it is incomplete.
    """
    try:
        return Conversion.model_validate_json((directory / CONVERSION).read_bytes())
    except (OSError, ValidationError) as error:
        raise ToolchainError(
            f"{directory} does not say how its weights were converted",
            expected=f"a {CONVERSION}, which is written when they were verified",
            found=error,
            cure="materialize converted_weights again",
        ) from error
