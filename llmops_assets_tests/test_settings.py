"""Settings: the environment decides, and a wrong value is explained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmops_assets.errors import SettingsError
from llmops_assets.settings import Settings, get_settings


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The settings are cached for the process; tests change the environment."""
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_environment_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Servers get their settings as variables, and run in other working directories."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMOPS_STATE", "here")
    monkeypatch.setenv("LLMOPS_MODELS", "~/models")
    monkeypatch.setenv("LLMOPS_GATEWAY_PORT", "9000")
    settings = get_settings()
    assert settings.state == tmp_path / "here"
    assert settings.models == Path.home() / "models"
    assert settings.gateway_port == 9000
    assert settings.mlflow_port is None


def test_everything_is_kept_below_the_state_folder(tmp_path: Path) -> None:
    """Removing one folder must remove all, and two state folders share nothing."""
    settings = Settings(state=tmp_path)
    folders = [
        settings.store, settings.work, settings.slots, settings.gateway, settings.cold,
        settings.logs, settings.dagster_home,
    ]  # fmt: skip
    assert len(set(folders)) == len(folders)
    assert all(folder.parent == tmp_path for folder in folders)


def test_settings_do_not_change(tmp_path: Path) -> None:
    """Parts that were built from them would disagree."""
    settings = Settings(state=tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        settings.threads = 3


def test_wrong_value_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`llmops up` must not answer a typing mistake with a stack trace."""
    monkeypatch.setenv("LLMOPS_THREADS", "many")
    monkeypatch.setenv("LLMOPS_TOOL_NICENESS", "-5")
    with pytest.raises(SettingsError, match=r"LLMOPS_THREADS=many: .*integer") as caught:
        get_settings()
    assert "LLMOPS_TOOL_NICENESS=-5: " in str(caught.value)


def test_every_setting_says_what_it_is() -> None:
    """`llmops settings` prints these sentences."""
    assert all(field.description for field in Settings.model_fields.values())
