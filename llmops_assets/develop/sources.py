"""Weights and data that a spec names by path: where they may be, and that they hold still."""

from __future__ import annotations

from pathlib import Path

from llmops_assets.errors import DataError
from llmops_assets.settings import Settings
from llmops_assets.storage.store import content_digest


def find_source(settings: Settings, path: Path, repository: Path | None = None) -> Path:
    """The file or folder that a spec means.

    A spec comes with a push; it must not be able to pull any file that the platform can
    read, such as its keys, into the store.

    Args:
        path: as in the spec; a relative one counts from the folder that holds `models/`.
        repository: that folder as the release has it, see `Platform.repository`. What git
            does not hold, as is usual for data, is taken from the folder that holds
            LLMOPS_MODELS. Unset: everything is.

    Raises:
        DataError: it is outside of the folders that specs may take from, or missing.
    """
    checkout = settings.models.parent
    places = list(dict.fromkeys([repository or checkout, checkout]))
    allowed = [*places, *([settings.sources] if settings.sources is not None else [])]
    for place in places:
        found = (place / path).resolve()
        inside = [folder for folder in allowed if _shows(folder, found)]
        in_tree = repository is not None and found.is_relative_to(repository.resolve())
        if not inside or (found.is_relative_to(settings.state) and not in_tree):
            raise DataError(
                f"A spec may not take weights or data from {found}",
                expected="a path below "
                + " or ".join(str(folder) for folder in allowed)
                + ", no part of it hidden",
                found=path,
                cure="move it there, or set LLMOPS_SOURCES to a folder that specs may take from",
            )
        if found.exists():
            return found
    raise DataError(
        f"There is nothing at {' or '.join(str(place / path) for place in places)}",
        expected="a file or folder",
        cure="correct the path in the spec; it counts from the folder that holds models/",
    )


def _shows(folder: Path, found: Path) -> bool:
    """Whether a path is below a folder, and not in what it hides.

    A checkout may hold keys, and other repositories, in files with a dot.
    """
    if not found.is_relative_to(folder.resolve()):
        return False
    return not any(part.startswith(".") for part in found.relative_to(folder.resolve()).parts)


def hold_still(path: Path, digest: str) -> None:
    """Checks that a source is what it was when its digest was taken.

    Raises:
        DataError: it changed while it was read; what was read has no name.
    """
    if (actual := content_digest(path)) != digest:
        raise DataError(
            f"{path} changed while it was read",
            expected=digest,
            found=actual,
            cure="wait until nobody writes there, then materialize the asset again",
        )
