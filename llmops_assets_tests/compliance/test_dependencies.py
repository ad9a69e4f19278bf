"""The record of what is installed, on the environment that runs the test."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from llmops_assets.compliance.dependencies import dependency_record
from llmops_assets.errors import ToolchainError


def test_everything_installed_is_recorded() -> None:
    """An auditor asks which versions were there, by the names of the package index."""
    record = {dependency.name: dependency for dependency in dependency_record()}
    assert record["pydantic"].version == version("pydantic")
    assert record["pydantic"].licence == "MIT"
    assert "pydantic-core" in record["pydantic"].requires
    assert len(record["pydantic"].content_sha256 or "") == 64
    assert {"onnxruntime-genai", "nvidia-pytriton"} <= set(record)
    assert list(record) == sorted(record)


def test_requirements_of_what_serves_are_followed() -> None:
    """What serves needs little of what builds; a record of all would hide it."""
    record = dependency_record(["HTTPX"])
    names = {dependency.name for dependency in record}
    assert {"httpx", "httpcore", "h11", "certifi"} <= names
    assert not {"dagster", "torch", "pytest"} & names
    # Every edge leads to something in the record.
    assert all(set(dependency.requires) <= names for dependency in record)
    assert dependency_record(["httpx"]) == record


def test_what_is_not_installed_cannot_be_recorded() -> None:
    """A record without it would say that nothing of it serves."""
    with pytest.raises(ToolchainError, match="no-such-package is not installed"):
        dependency_record(["no-such-package"])
