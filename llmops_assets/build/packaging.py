"""What every package holds, whichever toolchain made it, and how its gate judges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmops_assets.errors import LLMOpsError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.store import Artifact
from llmops_assets.toolchains.base import VERSION_FOLDER

PACKAGE_MEDIA_TYPE = "application/vnd.llmops.package.triton.v1"


def tree_of(package: Artifact) -> str:
    """The package's files with their sizes in bytes, one a line."""
    return "\n".join(f"{file.size:>12}  {file.path}" for file in package.files)


def judge_package(spec: ModelSpec, column: Mapping[str, ArtifactHandle]) -> Judgement:
    """The package is whole, holds the judged engine and tokenizer, and Triton can read it."""
    package = column["packaged_model"]
    problems: list[str] = []
    try:
        problems += _config_problems(package.path, spec.name)
    except LLMOpsError as error:
        problems.append(str(error))
    packaged = {file.digest for file in package.artifact.files}
    for asset, required in {
        "engine": lambda path: path != "engine.json",
        "checkpoint": lambda path: path == "tokenizer.json",
    }.items():
        problems += [
            f"{file.path} of the {asset} is not in the package"
            for file in column[asset].artifact.files
            if required(file.path) and file.digest not in packaged
        ]
    folder = f"repository/{spec.name}/{VERSION_FOLDER}/"
    if not any(file.path.startswith(folder) for file in package.artifact.files):
        problems.append(f"it has no {folder}")
    return Judgement(
        decision=Decision.of(not problems),
        measured={"problems": problems},
        threshold={"problems": []},
        reason="; ".join(problems) or "The package holds the judged engine and tokenizer.",
    )


def _config_problems(package: Path, model: str) -> list[str]:
    """Parses every config.pbtxt with Triton's own protobuf."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    proto: Any = model_config_pb2  # generated at import, so without types
    problems: list[str] = []
    repository = package / "repository"
    if not repository.is_dir():
        return ["it has no folder repository/"]
    folders = sorted(path for path in repository.iterdir() if path.is_dir())
    if model not in [folder.name for folder in folders]:
        problems.append(f"there is no model {model}")
    for folder in folders:
        try:
            text = (folder / "config.pbtxt").read_text(encoding="utf-8")
            config = text_format.Parse(text, proto.ModelConfig())
        except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
            problems.append(f"config.pbtxt of {folder.name} cannot be read: {error}")
            continue
        if config.name != folder.name:
            problems.append(f"config.pbtxt of {folder.name} names the model {config.name}")
    return problems
