"""What every package holds, whichever toolchain made it, and how its gate judges."""

from __future__ import annotations

from collections.abc import Mapping

from llmops_assets.errors import LLMOpsError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.serving.model_repository import read_repository
from llmops_assets.serving.package_description import read_package
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.store import Artifact
from llmops_assets.toolchains.base import VERSION_FOLDER

REPOSITORY = "repository"
PACKAGE_MEDIA_TYPE = "application/vnd.llmops.package.triton.v1"


def tree_of(package: Artifact) -> str:
    """The package's files with their sizes in bytes, one a line."""
    return "\n".join(f"{file.size:>12}  {file.path}" for file in package.files)


def judge_package(spec: ModelSpec, column: Mapping[str, ArtifactHandle]) -> Judgement:
    """The package is whole, holds the judged engine and tokenizer, and Triton can read it."""
    package = column["packaged_model"]
    try:
        read_package(package.path)
        problems = list(read_repository(package.path / REPOSITORY, spec.name).problems)
    except LLMOpsError as error:
        problems = [str(error)]
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
    folder = f"{REPOSITORY}/{spec.name}/{VERSION_FOLDER}/"
    if not any(file.path.startswith(folder) for file in package.artifact.files):
        problems.append(f"it has no {folder}")
    return Judgement(
        decision=Decision.of(not problems),
        measured={"problems": problems},
        threshold={"problems": []},
        reason="; ".join(problems) or "The package holds the judged engine and tokenizer.",
    )
