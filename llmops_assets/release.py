"""A release: one candidate of one model on its way through the lifecycle.

The release key is the one partition dimension of the asset graph, so its form is
checked in one place: it is a valid Kubernetes label value and a safe file name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from llmops_assets.errors import ReleaseError

MODEL_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
"""DNS label (RFC 1123) of at most 40 characters."""

ORIGIN = re.compile(
    r"g[0-9a-f]{12}"  # git push: the commit
    r"|s[0-9]{8}(t[0-9]{6})?"  # schedule: the date, in UTC
    r"|v[0-9]{1,9}"  # registry: the version
    r"|t[0-9a-f]{12}"  # toolchain bump: digest of the toolchain and of what served
    r"|m[0-9]{8}t[0-9]{6}"  # by hand: the time, in UTC
)


@dataclass(frozen=True, order=True)
class Release:
    """A release key, `<model>.<origin>`. Build one with `parse` or a named constructor."""

    model: str
    origin: str

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.model):
            raise ReleaseError(
                "The model's name cannot be used",
                expected="a DNS label: lower-case letters, digits and inner hyphens, at most 40",
                found=repr(self.model),
                cure="rename the model in its spec and the spec's file with it",
            )
        if not ORIGIN.fullmatch(self.origin):
            raise ReleaseError(
                "The release's origin is malformed",
                expected="g<12 hex>, s<date>, v<number>, t<12 hex> or m<date>t<time>",
                found=repr(self.origin),
                cure=f"let `llmops release {self.model}` make the key",
            )

    @classmethod
    def parse(cls, key: str) -> Self:
        """Reads a key.

        Raises:
            ReleaseError: the key is malformed.
        """
        model, dot, origin = key.partition(".")
        if not dot:
            raise ReleaseError(
                "The release key is malformed",
                expected="<model>.<origin>, such as date-normalizer.m20260131t120000",
                found=repr(key),
                cure="let `llmops release MODEL` make the key",
            )
        return cls(model, origin)

    @classmethod
    def by_hand(cls, model: str, at: datetime) -> Self:
        """The release somebody asks for at `at`."""
        return cls(model, f"m{at.astimezone(UTC):%Y%m%dt%H%M%S}")

    @classmethod
    def from_commit(cls, model: str, commit: str) -> Self:
        """The release of a spec as it stands in a git commit (full or 12+ hex digits)."""
        return cls(model, f"g{commit[:12]}")

    @classmethod
    def from_registry(cls, model: str, version: int) -> Self:
        """The release of a version that somebody registered in the model registry."""
        return cls(model, f"v{version}")

    @classmethod
    def scheduled(cls, model: str, due: datetime) -> Self:
        """The release that a schedule asks for at `due`."""
        return cls(model, f"s{due.astimezone(UTC):%Y%m%dt%H%M%S}")

    @classmethod
    def bumped(cls, model: str, toolchain: str) -> Self:
        """The release of what serves with other tools; the digest is of both."""
        return cls(model, f"t{toolchain.removeprefix('sha256:')[:12]}")

    @property
    def registered_version(self) -> int | None:
        """The registry's version that it was made from; None for other origins."""
        return int(self.origin[1:]) if self.origin.startswith("v") else None

    @property
    def follows_spec(self) -> bool:
        """Whether it froze its model's spec as that stood, and nothing in place of it."""
        return self.origin[0] not in "vt"

    @property
    def commit(self) -> str | None:
        """The first 12 digits of the commit that it was made from; None for other origins."""
        return self.origin[1:] if self.origin.startswith("g") else None

    @property
    def key(self) -> str:
        return f"{self.model}.{self.origin}"

    def __str__(self) -> str:
        return self.key
