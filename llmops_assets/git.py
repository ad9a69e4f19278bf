"""Asking git. With fixed arguments and a timeout."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
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
# What a hook, for one, leaves in the environment, and what would lead git elsewhere.
REPOSITORY_VARIABLES = frozenset(
    {
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_COMMON_DIR",
        "GIT_DIR",
        "GIT_INDEX_FILE",
        "GIT_NAMESPACE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_PREFIX",
        "GIT_SHALLOW_FILE",
        "GIT_WORK_TREE",
    }
)


def ask_git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in a folder, or None when there is nothing of the kind.

    Raises:
        SpecError: git is not installed, does not answer, or refuses.
    """
    output = read_git(folder, *arguments)
    return None if output is None else output.decode("utf-8", "backslashreplace").strip()


def read_git(
    folder: Path, *arguments: str, given: bytes = b"", timeout_seconds: float | None = None
) -> bytes | None:
    """What a git command in a folder writes, as it is; see `ask_git`.

    Args:
        given: its standard input.
        timeout_seconds: unset: `TIMEOUT_SECONDS`.

    Raises:
        SpecError: git is not installed, does not answer, or refuses.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            input=given,
            timeout=TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds,
            check=False,
            env=git_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SpecError(
            "git cannot be asked for what is committed",
            found=error,
            cure="install git, and check that the repository's file system answers",
        ) from error
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.decode("utf-8", "replace").strip()
    if any(words in said for words in NONE):
        return None
    raise SpecError(
        f"git refuses to say what is committed in {folder}",
        found=said or f"exit code {done.returncode}",
        cure="do what git says, then try again",
    )


def read_blobs(folder: Path, *arguments: str, blobs: Iterable[str]) -> Mapping[str, bytes]:
    """Contents of files, by the ids that git knows them by.

    Args:
        arguments: of git itself, such as `--git-dir=.`.

    Raises:
        SpecError: see `ask_git`; or one of them is not there.
    """
    wanted = list(dict.fromkeys(blobs))
    if not wanted:
        return {}
    asked = "".join(f"{blob}\n" for blob in wanted).encode()
    output = read_git(folder, *arguments, "cat-file", "--batch", given=asked) or b""
    found: dict[str, bytes] = {}
    for blob in wanted:
        header, _, output = output.partition(b"\n")
        kind, _, size = header.decode().partition(" ")[2].partition(" ")
        if kind != "blob":
            raise SpecError(
                f"The repository in {folder} lacks the file with the id {blob}",
                found=header.decode(),
                cure="check it with `git fsck`; a mirror in the state folder can be deleted and "
                "is fetched again",
            )
        found[blob], output = output[: int(size)], output[int(size) + 1 :]
    return found


def git_environment() -> dict[str, str]:
    """This process's environment, for git."""
    inherited = {k: v for k, v in os.environ.items() if k not in REPOSITORY_VARIABLES}
    # Its messages are read above, so they must not be translated.
    return {**inherited, "LC_ALL": "C"}
