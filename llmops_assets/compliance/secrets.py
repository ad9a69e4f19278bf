"""Passwords, keys and tokens in the files of a package, found with detect-secrets.

It keeps its settings in globals of the process, so the platform looks for them in a process
of its own (`package_report`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.compliance.report import Report
from llmops_assets.errors import DataError

if TYPE_CHECKING:
    from detect_secrets.settings import Settings

LARGEST_TEXT_BYTES = 64 * 2**20
CHUNK_BYTES = 2**20

# Files whose lines are tokens of a model: words such as "password" and strings of random
# letters are their content. Keys that have a form of their own are looked for all the same.
VOCABULARIES = {
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
}  # fmt: skip
VOCABULARY_SUFFIX = ".tiktoken"
GUESSES = ("Base64HighEntropyString", "HexHighEntropyString", "KeywordDetector")
"""Plugins that judge by randomness or by a word nearby, not by the form of a key."""

# Not secrets, though they are found as such: addresses are data of a config.
UNWANTED = ("IPPublicDetector",)

# Filters with which a file or a line could hide itself from the scan: by a comment
# ("pragma: allowlist secret") or by its name.
EVASIONS = (
    "detect_secrets.filters.allowlist.is_line_allowlisted",
    "detect_secrets.filters.heuristic.is_lock_file",
    "detect_secrets.filters.heuristic.is_non_text_file",
    "detect_secrets.filters.heuristic.is_swagger_file",
)
HEX = re.compile(r"[0-9a-fA-F]{32,128}")
DIGEST_KEY = re.compile(
    r"(digest|sha-?\d+|md5|hash|checksum|fingerprint|commit|revision|etag)[\w\- ]*[\"']?\s*[:=]\s*"
    r"[\"']?(sha\d+:)?$",
    re.IGNORECASE,
)


class SecretFinding(BaseModel):
    """Where a secret is: line counts from 1, `redacted` is its first characters."""

    model_config = ConfigDict(frozen=True)

    kind: str
    path: str
    line: int
    redacted: str


class SecretReport(Report):
    """What was found, without repeating it."""

    scanned: int = Field(description="Text files scanned.")
    binary: tuple[str, ...] = Field(description="Files that are not text and were not scanned.")
    findings: tuple[SecretFinding, ...]


def find_secrets(directory: Path) -> SecretReport:
    """Scans every text file of a directory; links are not followed.

    A file with null characters is binary, and listed. One that is neither that nor UTF-8,
    or is too large, is a problem, as a secret in it would not be found.

    Not for several threads at once, see above.

    Raises:
        DataError: there is no such directory.
    """
    from detect_secrets.settings import default_settings

    if not directory.is_dir():
        raise DataError(
            f"There is no folder {directory} to scan", cure="materialize the asset again"
        )
    problems: list[str] = []
    binary: list[str] = []
    findings: list[SecretFinding] = []
    scanned = 0
    with default_settings() as settings:
        settings.disable_plugins(*UNWANTED)
        settings.disable_filters(*EVASIONS)
        _add_filter(settings, "llmops_assets.compliance.secrets.is_digest")
        for path, name in _files(directory):
            if _is_binary(path):
                binary.append(name)
                continue
            if path.stat().st_size > LARGEST_TEXT_BYTES:
                problems.append(f"{name}: larger than {LARGEST_TEXT_BYTES} bytes; remove it")
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                problems.append(f"{name}: neither UTF-8 text nor binary ({error}); remove it")
                continue
            scanned += 1
            findings += _vocabulary(name, text) if _is_vocabulary(path) else _text(path, name)
    problems += [
        f"{found.path}:{found.line}: {found.kind} ({found.redacted}); "
        "remove it from the package, and revoke it"
        for found in findings
    ]
    return SecretReport(
        problems=tuple(problems),
        scanned=scanned,
        binary=tuple(binary),
        findings=tuple(findings),
    )


def is_digest(secret: str, line: str) -> bool:
    """A filter of detect-secrets: hexadecimal digits behind a key that names a digest."""
    place = line.find(secret)
    return bool(HEX.fullmatch(secret) and place >= 0 and DIGEST_KEY.search(line[:place]))


def _add_filter(settings: Settings, path: str) -> None:
    from detect_secrets.settings import get_filters

    settings.filters[path] = {"path": path}
    get_filters.cache_clear()


def _files(directory: Path) -> Iterator[tuple[Path, str]]:
    for folder, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path, ascii(path.relative_to(directory).as_posix())[1:-1]


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            if b"\0" in chunk:
                return True
    return False


def _is_vocabulary(path: Path) -> bool:
    return path.name in VOCABULARIES or path.suffix == VOCABULARY_SUFFIX


def _text(path: Path, name: str) -> Iterator[SecretFinding]:
    from detect_secrets.core.secrets_collection import SecretsCollection

    collection = SecretsCollection()
    collection.scan_file(str(path))
    for _, secret in sorted(collection, key=lambda found: (found[1].line_number, found[1].type)):
        yield _finding(secret.type, name, secret.line_number, secret.secret_value or "")


def _vocabulary(name: str, text: str) -> Iterator[SecretFinding]:
    """All at once: line by line the vocabulary of a large model takes minutes."""
    from detect_secrets.settings import get_plugins

    for plugin in get_plugins():
        if type(plugin).__name__ not in GUESSES:
            for secret in dict.fromkeys(_strings(plugin, text)):
                line = text.count("\n", 0, text.index(secret)) + 1
                yield _finding(plugin.secret_type, name, line, secret)


def _strings(plugin: Any, text: str) -> Iterator[str]:
    return (match for match in plugin.analyze_string(text) if match)


def _finding(kind: str, path: str, line: int, secret: str) -> SecretFinding:
    shown = secret[: min(4, len(secret) // 5)]
    return SecretFinding(
        kind=kind, path=path, line=line, redacted=f"{shown}… ({len(secret)} characters)"
    )
