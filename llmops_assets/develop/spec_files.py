"""The specs in a commit: which files they are, and what is in each, parsed once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llmops_assets.errors import SpecError
from llmops_assets.evidence.attest import APPROVERS_FILE
from llmops_assets.git import read_blobs, read_git
from llmops_assets.spec import ModelSpec, parse_spec

LARGEST_SPEC_BYTES = 128 * 1024
REGULAR_FILES = ("100644", "100755")
PARSED_AT_MOST = 10_000

Parsed = ModelSpec | SpecError
"""A spec, or what is wrong with it."""


@dataclass(frozen=True)
class Repository:
    """Where commits are looked up: a mirror, or a working tree's repository."""

    folder: Path
    arguments: tuple[str, ...]
    """Of git itself. A mirror is named outright: while it is not there, git would look in
    the folders around it."""
    models: str
    """Folder of specs, from the repository's root."""

    def read(self, *arguments: str, timeout_seconds: float | None = None) -> bytes | None:
        """As `git.read_git`.

        Raises:
            SpecError: git does not answer, or refuses.
        """
        if not self.folder.is_dir():
            return None
        return read_git(self.folder, *self.arguments, *arguments, timeout_seconds=timeout_seconds)

    def ask(self, *arguments: str) -> str | None:
        """As `git.ask_git`.

        Raises:
            SpecError: git does not answer, or refuses.
        """
        output = self.read(*arguments)
        return None if output is None else output.decode("utf-8", "backslashreplace").strip()

    def resolve(self, revision: str) -> str | None:
        """The full hash of a commit that is here, or None.

        Raises:
            SpecError: git does not answer, or refuses.
        """
        return self.ask("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")


@dataclass(frozen=True)
class SpecFile:
    """A file in a commit."""

    path: str
    """From the repository's root."""
    blob: str
    mode: str
    size: int
    """Bytes."""

    @property
    def model(self) -> str:
        """The model that it should be of."""
        return model_of(self.path)


def model_of(path: str) -> str:
    """The model that a file of this path should be of."""
    return PurePosixPath(path).stem


def specs_in(repository: Repository, commit: str) -> dict[str, SpecFile]:
    """The spec files in a commit, by path; without the folders in theirs, as of waivers.

    Raises:
        SpecError: the commit is not here, or git does not answer.
    """
    output = repository.read("ls-tree", "-z", "-l", commit, "--", f"{repository.models}/")
    if output is None:
        raise SpecError(
            f"Commit {commit} is not in {repository.folder}",
            cure="fetch it, or give a commit that is there",
        )
    files: dict[str, SpecFile] = {}
    for entry in output.decode("utf-8", "backslashreplace").split("\0"):
        facts, _, path = entry.partition("\t")
        name = PurePosixPath(path).name
        if path.endswith(".yaml") and name != APPROVERS_FILE and not facts.startswith("040000"):
            mode, _, blob, size = facts.split()
            files[path] = SpecFile(path, blob, mode, int(size) if size.isdigit() else 0)
    return files


_parsed: dict[tuple[str, str, str], Parsed] = {}


def read_specs(repository: Repository, files: Iterable[SpecFile]) -> dict[SpecFile, Parsed]:
    """What is in each file. A content that this process has seen is not parsed again.

    Raises:
        SpecError: git does not answer, or lacks a file.
    """
    files = list(files)
    new = [file for file in files if _key(file) not in _parsed]
    readable = [file for file in new if _obstacle(file) is None]
    contents = read_blobs(
        repository.folder, *repository.arguments, blobs=[file.blob for file in readable]
    )
    parsed = {file: _parse(file, contents.get(file.blob, b"")) for file in new}
    found = {file: parsed.get(file) or _parsed[_key(file)] for file in files}
    if len(_parsed) > PARSED_AT_MOST:
        _parsed.clear()
    _parsed.update({_key(file): spec for file, spec in parsed.items()})
    return found


def _key(file: SpecFile) -> tuple[str, str, str]:
    return file.path, file.blob, file.mode


def _obstacle(file: SpecFile) -> str | None:
    if file.mode not in REGULAR_FILES:
        return "a symbolic link or a submodule"
    if file.size > LARGEST_SPEC_BYTES:
        return f"{file.size} bytes"
    return None


def _parse(file: SpecFile, content: bytes) -> Parsed:
    try:
        if (obstacle := _obstacle(file)) is not None:
            raise SpecError(
                f"{file.path} is not a model spec",
                expected=f"a file of at most {LARGEST_SPEC_BYTES} bytes",
                found=obstacle,
                cure="commit the spec itself there",
            )
        return parse_spec(decoded(content, file.path), file.path, expected_name=file.model)
    except SpecError as error:
        # Kept without its traceback, which would keep everything on its way alive.
        return error.with_traceback(None)


def decoded(content: bytes, source: str) -> str:
    """A spec's text.

    Raises:
        SpecError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SpecError(
            f"{source} is not a valid model spec",
            expected="UTF-8 text",
            found=f"line {line}: {error.reason}",
            cure="save it as UTF-8",
        ) from error
