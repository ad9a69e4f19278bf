"""A Triton model repository as Triton's own protobuf reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops_assets.errors import ToolchainError


@dataclass(frozen=True)
class Repository:
    """What a repository says, and what is wrong with it."""

    configurations: Mapping[str, Any]
    """`ModelConfig` messages by folder, of those that could be read."""
    problems: tuple[str, ...]


def parse_configuration(text: str, name: str) -> Any:
    """A `config.pbtxt` as a `ModelConfig` message.

    Args:
        text: of the file.
        name: what errors call the model.

    Raises:
        ToolchainError: Triton could not read it.
    """
    # gRPC comes with it; whoever only imports this module should not wait for that.
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    proto: Any = model_config_pb2  # generated at import, so without types
    try:
        return text_format.Parse(text, proto.ModelConfig())
    except text_format.ParseError as error:
        raise ToolchainError(
            f"Triton could not read the configuration of {name}",
            expected="a text-format ModelConfig",
            found=error,
            cure="package the model again; if it repeats, compare the templates it is made from",
        ) from error


def read_repository(folder: Path, model: str) -> Repository:
    """Reads the configuration of every model, each of which must name its folder.

    Args:
        folder: of the repository.
        model: that clients ask; it must be among them.
    """
    if not folder.is_dir():
        return Repository({}, (f"there is no folder {folder.name}/",))
    configurations: dict[str, Any] = {}
    problems: list[str] = []
    models = sorted(path for path in folder.iterdir() if path.is_dir())
    if model not in [path.name for path in models]:
        problems.append(f"there is no model {model}")
    for path in models:
        try:
            text = (path / "config.pbtxt").read_text(encoding="utf-8")
            configuration = parse_configuration(text, path.name)
        except (OSError, UnicodeDecodeError, ToolchainError) as error:
            problems.append(f"config.pbtxt of {path.name} cannot be read: {error}")
            continue
        configurations[path.name] = configuration
        if configuration.name != path.name:
            problems.append(f"config.pbtxt of {path.name} names the model {configuration.name}")
    return Repository(configurations, tuple(problems))
