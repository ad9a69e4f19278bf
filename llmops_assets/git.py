"""Asking git. Only reading, with fixed arguments and a timeout."""

from __future__ import annotations

import subprocess
from pathlib import Path

from llmops_assets.errors import SpecError

TIMEOUT_SECONDS = 20
# What git says when the answer is "there is none". Anything else that it says on a
# failure, such as that it does not trust the folder's owner, is an error: "not in git"
# would be a lie in the record.
NONE = (
    "not a git repository",
    "Needed a single revision",
    "unknown revision",
    "does not exist in",
    "exists on disk, but not in",
    "Not a valid object name",
    "invalid object name",
)


def ask_git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in a folder, or None when there is nothing of the kind.

    Raises:
        SpecError: git is not installed, does not answer, or refuses.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
            env=_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SpecError(
            "git cannot be asked for what is committed",
            found=error,
            cure="install git, and check that the repository's file system answers",
        ) from error
    if done.returncode == 0:
        return done.stdout.strip()
    if any(words in done.stderr for words in NONE):
        return None
    raise SpecError(
        f"git refuses to say what is committed in {folder}",
        found=done.stderr.strip() or f"exit code {done.returncode}",
        cure="do what git says, then try again",
    )


def _environment() -> dict[str, str]:
    import os

    # Its messages are read above, so they must not be translated.
    return {**os.environ, "LC_ALL": "C"}
