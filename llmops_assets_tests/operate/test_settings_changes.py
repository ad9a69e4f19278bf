"""Whoever looks into an incident asks which settings held then, and since when."""

from __future__ import annotations

from pathlib import Path

from llmops_assets.evidence.leaves import SETTINGS
from llmops_assets.evidence.log import EvidenceLog
from llmops_assets.operate.settings_changes import SettingsChange, record_settings
from llmops_assets.settings import Settings


def test_settings_are_recorded_when_they_change(evidence: EvidenceLog, tmp_path: Path) -> None:
    """A start like the one before leaves no trace; another names what is different."""
    settings = Settings(state=tmp_path / "state", drain_seconds=5)
    first = record_settings(evidence, settings, "ada")
    assert first is not None and "drain_seconds" in first.changed
    assert record_settings(evidence, settings, "ada") is None
    changed = record_settings(evidence, settings.model_copy(update={"drain_seconds": 9}), "bob")
    assert changed is not None
    assert (changed.changed, changed.actor) == (("drain_seconds",), "bob")
    assert changed.settings["drain_seconds"] == 9
    recorded = [
        SettingsChange.model_validate(entry.statement.predicate)
        for entry in evidence.entries(SETTINGS)
    ]
    assert recorded == [first, changed]


def test_secrets_are_not_recorded(evidence: EvidenceLog, tmp_path: Path) -> None:
    """Evidence is for many eyes, and nothing is ever taken out of it."""
    settings = Settings.model_validate(
        {
            "state": tmp_path / "state",
            "webhook_secret": "0123456789abcdef",
            "alertmanager_url": "https://sre:hunter2@alerts.example/",
        }
    )
    change = record_settings(evidence, settings, "ada")
    assert change is not None
    text = change.model_dump_json()
    assert "0123456789abcdef" not in text and "hunter2" not in text
    assert change.settings["webhook_secret"] == "(hidden)"
    assert change.settings["alertmanager_url"] == "https://***@alerts.example/"
