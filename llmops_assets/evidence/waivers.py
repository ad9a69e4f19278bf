"""Waivers: reviewed files that let a release pass one failed gate, for a while.

A waiver is a file `models/waivers/<name>.yaml` that is committed: what only lies in the
working tree has not been reviewed and does not count. It is honoured until it expires,
and whatever rests on it is shown as waived.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from llmops_assets.errors import ReleaseError, SpecError
from llmops_assets.evidence.gates import GATES, Gate
from llmops_assets.git import ask_git
from llmops_assets.release import Release
from llmops_assets.storage.store import DIGEST

FOLDER = "waivers"
"""Folder of waivers, below that of the specs."""


class Waiver(BaseModel):
    """One waiver."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gate: str = Field(description="Name of the gate.")
    release: str | None = Field(default=None, description="The release that it is for,")
    digest: Annotated[str, Field(pattern=DIGEST.pattern)] | None = Field(
        default=None, description="or the artifact that the gate judges."
    )
    baseline: str | None = Field(
        default=None,
        description="For a gate that compares with what serves: digest of the serving package "
        "that was compared with.",
    )
    owner: str = Field(min_length=1, description="Who answers for it.")
    reason: str = Field(min_length=10, description="Why the failure is acceptable.")
    expires: AwareDatetime = Field(description="From when on it does not count; with time zone.")

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return datetime.now(UTC) >= self.expires

    @field_validator("gate")
    @classmethod
    def _gate_can_be_waived(cls, name: str) -> str:
        gate = GATES.get(name)
        if gate is None:
            raise ValueError(f"there is no gate {name}; there are {', '.join(sorted(GATES))}")
        if not gate.waivable:
            raise ValueError(f"{name} guards integrity, safety or approval and cannot be waived")
        return name

    @field_validator("release")
    @classmethod
    def _release_is_a_key(cls, release: str | None) -> str | None:
        try:
            return None if release is None else Release.parse(release).key
        except ReleaseError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _one_subject(self) -> Waiver:
        if (self.release is None) == (self.digest is None):
            raise ValueError("name either a release or a digest")
        if GATES[self.gate].compares != (self.baseline is not None):
            raise ValueError(
                "baseline: the digest of the serving package that the verdict names, for a gate "
                "that compares with it, and for no other"
            )
        return self

    def covers(
        self,
        gate: Gate,
        release: str,
        subjects: Iterable[str],
        baseline: str | None,
        now: datetime,
    ) -> bool:
        """Whether it lets `release` pass `gate` now.

        Args:
            subjects: digests that the verdict is about.
            baseline: digest of the serving package that it compared with.
        """
        return (
            gate.waivable
            and gate.name == self.gate
            and now < self.expires
            and (not gate.compares or self.baseline == baseline)
            and (self.release == release or self.digest in set(subjects))
        )


def parse_waiver(text: str, source: str, longest_days: int) -> Waiver:
    """Reads one waiver.

    Args:
        longest_days: a waiver that expires later than so many days from now is not valid.

    Raises:
        SpecError: it is not valid; names the file.
    """
    try:
        waiver = Waiver.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        found = (
            "; ".join(
                f"{'.'.join(map(str, detail['loc'])) or 'waiver'}: {detail['msg']}"
                for detail in error.errors()
            )
            if isinstance(error, ValidationError)
            else str(error)
        )
        raise SpecError(
            f"{source} is not a valid waiver",
            expected="gate, release or digest, owner, reason, expires",
            found=found,
            cure="mend or delete the file",
        ) from error
    latest = datetime.now(UTC) + timedelta(days=longest_days)
    if waiver.expires > latest:
        raise SpecError(
            f"{source} waives for longer than the policy allows",
            expected=f"expires at {latest:%F} or before ({longest_days} days)",
            found=waiver.expires.isoformat(),
            cure="let it expire earlier, and have it reviewed again then",
        )
    return waiver


def read_waiver(path: Path, longest_days: int) -> Waiver:
    """Reads a waiver as it lies in the working tree: to check it before it is reviewed.

    Raises:
        SpecError: it cannot be read or is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"The waiver {path} cannot be read",
            found=error,
            cure="make it a readable UTF-8 text file",
        ) from error
    return parse_waiver(text, str(path), longest_days)


def committed_waivers(models: Path, longest_days: int) -> tuple[Waiver, ...]:
    """The waivers in the commit that is checked out; none outside of git.

    Raises:
        SpecError: one of them is not valid. Nothing is waived then.
    """
    listed = ask_git(models, "ls-tree", "--name-only", "HEAD", "--", f"{FOLDER}/")
    names = [name for name in (listed or "").splitlines() if name.endswith(".yaml")]
    return tuple(_committed(models, name, longest_days) for name in names)


def waiver_for(
    waivers: Iterable[Waiver],
    gate: Gate,
    release: str,
    subjects: Iterable[str],
    baseline: str | None = None,
    now: datetime | None = None,
) -> Waiver | None:
    """The first waiver that lets `release` pass `gate`, or None."""
    at = now or datetime.now(UTC)
    digests = tuple(subjects)
    return next((w for w in waivers if w.covers(gate, release, digests, baseline, at)), None)


def _committed(models: Path, name: str, longest_days: int) -> Waiver:
    text = ask_git(models, "show", f"HEAD:./{name}")
    if text is None:
        raise SpecError(
            f"The waiver {name} cannot be read from git",
            expected="the file as it is committed",
            cure="check the repository with `git fsck`",
        )
    return parse_waiver(text, name, longest_days)
