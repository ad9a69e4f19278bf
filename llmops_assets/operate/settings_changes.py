"""What the installation was started with, and when that changed: a chain of signed statements."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, SecretStr

from llmops_assets.evidence import attest
from llmops_assets.evidence.leaves import SETTINGS
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.settings import Settings

HIDDEN = "(hidden)"
USER_OF_URL = re.compile(r"//[^/@\s]*@")


class SettingsChange(BaseModel):
    """The settings of a start that had others than the one before; the predicate of a statement."""

    model_config = ConfigDict(frozen=True)

    settings: dict[str, Any]
    """Every setting by its name. Of a secret only whether there is one."""
    changed: tuple[str, ...]
    """Names of those that were different before; all of the first start."""
    actor: str
    time: datetime


def record_settings(evidence: EvidenceLog, settings: Settings, actor: str) -> SettingsChange | None:
    """Adds the settings to the evidence, unless they are those of the start before.

    Returns:
        What was added; None where nothing changed.

    Raises:
        EvidenceError: it cannot be signed, or the log is not what it was.
        RefConflictError: somebody else started the installation in the same moment.
    """
    head = evidence.newest(SETTINGS)
    before = {} if head is None else head.statement.predicate["settings"]
    now = {name: _shown(getattr(settings, name)) for name in Settings.model_fields}
    changed = tuple(
        name
        for name in sorted(now.keys() | before.keys())
        if name not in now or name not in before or now[name] != before[name]
    )
    if not changed:
        return None
    change = SettingsChange(settings=now, changed=changed, actor=actor, time=datetime.now(UTC))
    evidence.append(
        Attestation(attest.settings_change(change), (SETTINGS,)),
        heads={SETTINGS: None if head is None else head.digest},
    )
    return change


def _shown(value: object) -> str | int | float | None:
    """A setting as a JSON value without secrets."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if value is None or isinstance(value, int | float):
        return value
    return USER_OF_URL.sub("//***@", str(value))
