"""`llmops audit` and `llmops diff`: exit codes that scripts rely on, and files that they write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from llmops_assets.cli import AuditCommands, main
from llmops_assets.reports.annex_iv import AnnexIV
from llmops_assets.reports.audit_record import AuditRecord
from llmops_assets.reports.release_difference import ReleaseDifference
from llmops_assets.reports.serving_at import ServingAt
from llmops_assets.settings import get_settings

from ..evidence_rig import blob_of
from ..release_rig import Rig
from .conftest import FIRST, SECOND


@pytest.fixture
def installed(audited: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The command line, on the platform of the two releases."""
    yield from use(audited, monkeypatch)


def use(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setenv("LLMOPS_STATE", str(rig.platform.settings.state))
    monkeypatch.setenv("LLMOPS_MODELS", str(rig.models))
    get_settings.cache_clear()
    yield rig
    get_settings.cache_clear()


def llmops(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.usefixtures("installed")
def test_release_is_shown_as_a_page_and_as_json() -> None:
    """The same command for people and for scripts."""
    shown = llmops("audit", FIRST)
    assert shown.exit_code == 0
    assert shown.output.startswith(f"Audit of release {FIRST}: removed; its archive stays")
    record = AuditRecord.model_validate_json(llmops("audit", FIRST, "--json").stdout)
    assert record.identity.release == FIRST
    assert llmops("audit", "--json", FIRST).exit_code == 0


@pytest.mark.usefixtures("installed")
def test_files_are_written(tmp_path: Path) -> None:
    """What is handed to an auditor who has no access."""
    page, annex, text = (tmp_path / name for name in ("page.html", "annex.json", "annex.md"))
    result = llmops("audit", FIRST, "--html", str(page), "--annex-iv", str(annex))
    assert result.exit_code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert AnnexIV.model_validate_json(annex.read_text()).release == FIRST
    assert llmops("audit", FIRST, "--annex-iv", str(text)).exit_code == 0
    assert text.read_text().startswith("# Technical documentation of parrot.v1")
    assert llmops("audit", FIRST, "--html", str(tmp_path / "no" / "folder.html")).exit_code == 1


def test_what_served_leads_to_its_audit(installed: Rig) -> None:
    """From the time in a complaint to the evidence, in two commands."""
    routes = installed.platform.evidence.entries("routes/production/parrot")
    first, second, *_ = [entry.time.isoformat() for entry in routes]
    asked = ("audit", "--serving", "production", "--model", "parrot", "--at")
    found = ServingAt.model_validate_json(llmops(*asked, first, "--json").stdout)
    assert [share.release for share in found.serving] == [FIRST]
    assert found.ended is not None
    assert found.ended.time.isoformat() == second
    shown = llmops(*asked, first).stdout
    command = next(line for line in shown.splitlines() if line.startswith("next: llmops "))
    then = llmops(*command.removeprefix("next: llmops ").split())
    assert then.exit_code == 0
    assert f"Audit of release {FIRST}: serves in production" in then.stdout
    now = datetime.now().replace(microsecond=0).isoformat()
    assert "100 % to release parrot.v2" in llmops(*asked, now).stdout
    assert "is taken as local time" in llmops(*asked, now).output


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "parrot"),
        ("--serving", "production"),
        ("--serving", "production", "--model", "parrot", FIRST),
        (FIRST, "--at", "2026-01-01"),
        ("--serving", "production", "--model", "parrot", "--as-of", "2026-01-01"),
    ],
)
def test_questions_that_make_no_sense_are_refused(arguments: tuple[str, ...]) -> None:
    """Half of a question must not be answered as if it were another."""
    assert llmops("audit", *arguments).exit_code == 2


@pytest.mark.usefixtures("installed")
def test_errors_say_what_to_do() -> None:
    """A typing mistake is no stack trace."""
    for arguments in (("audit", "parrot.v9"), ("audit", "parrot"), ("diff", FIRST, "parrot.v9")):
        result = llmops(*arguments)
        assert result.exit_code == 2
        assert "To do: " in result.output


@pytest.mark.usefixtures("installed")
def test_future_is_not_answered() -> None:
    """What serves next year is on no record; the present is not it."""
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    for arguments in (
        ("audit", FIRST, "--as-of", later),
        ("audit", "--serving", "production", "--model", "parrot", "--at", later),
    ):
        result = llmops(*arguments)
        assert result.exit_code == 2
        assert "is in the future" in result.output


def test_folder_without_an_installation_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Nothing is on record" would be believed by who only stands in the wrong folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMOPS_STATE", raising=False)
    monkeypatch.delenv("LLMOPS_KEYS", raising=False)
    get_settings.cache_clear()
    for arguments in (
        ("audit", FIRST),
        ("audit", "export", FIRST),
        ("audit", "--serving", "production", "--model", "parrot"),
        ("diff", FIRST, SECOND),
        ("verify", FIRST),
        ("verify", FIRST, "--root", "0" * 64),
    ):
        result = llmops(*arguments)
        assert result.exit_code == 2
        assert f"There is no installation in {tmp_path / '.llmops'}" in result.output
        assert "set LLMOPS_STATE" in result.output
    assert list(tmp_path.iterdir()) == []
    get_settings.cache_clear()


def test_broken_evidence_is_exit_code_1(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A nightly job must notice it, also where it only writes files."""
    rig.freeze(FIRST)
    rig.publish(FIRST, "engine", {"a": "1"})
    for _ in use(rig, monkeypatch):
        assert llmops("audit", FIRST).exit_code == 0
        blob = blob_of(rig.platform.evidence, 1)
        blob.write_bytes(blob.read_bytes().replace(b'"keyid"', b'"keyiD"'))
        shown = llmops("audit", FIRST)
        assert shown.exit_code == 1
        assert "THE EVIDENCE DOES NOT HOLD" in shown.output
        written = llmops("audit", FIRST, "--html", str(tmp_path / "page.html"))
        assert written.exit_code == 1
        assert "The evidence does not hold" in (tmp_path / "page.html").read_text()


@pytest.mark.usefixtures("installed")
def test_diff_has_the_exit_codes_of_diff() -> None:
    """0 equal, 1 different, 2 trouble: as every script expects."""
    assert llmops("diff", FIRST, FIRST).exit_code == 0
    found = llmops("diff", FIRST, SECOND)
    assert found.exit_code == 1
    assert "  engine.precision\n    - int8\n    + fp32\n" in found.output
    read = ReleaseDifference.model_validate_json(llmops("diff", FIRST, SECOND, "--json").stdout)
    assert "spec" in read.topics
    assert json.loads(llmops("diff", FIRST, FIRST, "--json").stdout)["topics"] == {}


def test_group_takes_subcommands_beside_releases() -> None:
    """`llmops audit export` must not be taken for a release, nor a release for a command."""

    @click.group(cls=AuditCommands)
    def group() -> None: ...

    @group.command()
    @click.argument("release", required=False)
    @click.option("--json", "as_json", is_flag=True)
    def show(release: str | None, as_json: bool) -> None:
        click.echo(f"show {release} {as_json}")

    @group.command()
    @click.argument("release")
    def export(release: str) -> None:
        click.echo(f"export {release}")

    def run(*arguments: str) -> str:
        return CliRunner().invoke(group, arguments).output

    assert run("parrot.v1") == "show parrot.v1 False\n"
    assert run("--json", "parrot.v1") == "show parrot.v1 True\n"
    assert run("export", "parrot.v1") == "export parrot.v1\n"
    assert "--json" in run("--help")
    assert "export" in run("--help")
