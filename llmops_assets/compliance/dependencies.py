"""Which Python packages an environment holds: name, version, licence, and where known hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.errors import ToolchainError

LONGEST_LICENCE = 100
"""Longer texts in the metadata field `License` are a licence's text, not its name."""


class Dependency(BaseModel):
    """An installed Python package."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Normalised as in PEP 503.")
    version: str
    licence: str | None = Field(description="As its metadata declare it; SPDX where it is.")
    archive_sha256: str | None = Field(
        description="Of the wheel, hex. Only a direct URL leaves it behind (PEP 610)."
    )
    content_sha256: str | None = Field(
        description="Hex, over the hashes of its installed files in its RECORD (PEP 376), "
        "without those that differ from machine to machine."
    )
    requires: tuple[str, ...] = Field(description="Names of other dependencies of the record.")


def dependency_record(roots: Iterable[str] | None = None) -> tuple[Dependency, ...]:
    """Reads what is installed in the running environment, without importing any of it.

    Args:
        roots: packages whose requirements to follow, as `importlib.metadata` names them.
            None means everything that is installed.

    Returns:
        By name.

    Raises:
        ToolchainError: a root is not installed.
    """
    if roots is None:
        # Of two copies the first on the path is the one that is imported.
        found: dict[str, Distribution] = {}
        for installed in distributions():
            found.setdefault(_normalised(installed.name), installed)
    else:
        found = _closure(roots)
    return tuple(_dependency(name, found[name], found) for name in sorted(found))


def _closure(roots: Iterable[str]) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    for root in roots:
        try:
            found[_normalised(root)] = distribution(root)
        except PackageNotFoundError as error:
            raise ToolchainError(
                f"The package {root} is not installed, so it cannot be recorded",
                cure="install it, or record what really serves",
            ) from error
    queue = list(found.values())
    while queue:
        for name in _requirements(queue.pop()):
            if name not in found:
                try:
                    found[name] = distribution(name)
                except PackageNotFoundError:
                    # Installed against its metadata; what is not there serves nothing.
                    continue
                queue.append(found[name])
    return found


def _requirements(installed: Distribution) -> Iterator[str]:
    """Names of what a package needs here; its extras are not followed."""
    from packaging.requirements import Requirement

    for text in installed.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _normalised(requirement.name)


def _dependency(name: str, installed: Distribution, all_found: Iterable[str]) -> Dependency:
    return Dependency(
        name=name,
        version=installed.version,
        licence=_licence(installed.metadata),
        archive_sha256=_archive_sha256(installed),
        content_sha256=_content_sha256(installed),
        requires=tuple(sorted({*_requirements(installed)} & {*all_found})),
    )


def _normalised(name: str) -> str:
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


def _licence(metadata: Any) -> str | None:
    """From `License-Expression` (PEP 639), else the older fields."""
    expression = metadata.get("License-Expression")
    text = (metadata.get("License") or "").strip()
    if expression:
        return expression
    if text and text.upper() != "UNKNOWN" and "\n" not in text and len(text) <= LONGEST_LICENCE:
        return text
    classifiers = [
        classifier.rpartition(" :: ")[2]
        for classifier in metadata.get_all("Classifier") or ()
        if classifier.startswith("License ::")
    ]
    return "; ".join(classifiers) or None


def _archive_sha256(installed: Distribution) -> str | None:
    text = installed.read_text("direct_url.json")
    archive = json.loads(text).get("archive_info", {}) if text else {}
    return archive.get("hashes", {}).get("sha256")


def _content_sha256(installed: Distribution) -> str | None:
    """Bytecode has no hash in RECORD; scripts and notes of the installer differ by machine."""
    hashes = sorted(
        f"{file.as_posix()} {file.hash.mode}={file.hash.value}"
        for file in installed.files or ()
        if file.hash is not None
        and ".." not in file.parts
        and not file.parts[0].endswith((".dist-info", ".data"))
    )
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if hashes else None
