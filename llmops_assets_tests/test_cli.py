"""The command line: exit codes that scripts rely on, and messages in place of stack traces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmops_assets.cli import main
from llmops_assets.evidence.gates import PARITY, PROVEN
from llmops_assets.settings import get_settings

from .conftest import free_port
from .fakes import HttpDouble
from .release_rig import FAILED, SPEC, Rig

GOOD = {
    "addDynamicPartition": {"__typename": "AddDynamicPartitionSuccess"},
    "launchRun": {"__typename": "LaunchRunSuccess", "run": {"runId": "run-1"}},
}


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A state folder and specs of the test's own."""
    monkeypatch.setenv("LLMOPS_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("LLMOPS_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "parrot.yaml").write_text(SPEC)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture
def dagster() -> Iterator[HttpDouble]:
    """A double of the web server: takes every run, which fails at once."""

    def respond(_: str, body: dict[str, Any]) -> tuple[int, Any]:
        event = {
            "__typename": "ExecutionStepFailureEvent",
            "stepKey": "evaluation_gates",
            "failureMetadata": {"description": "Gate accuracy failed."},
        }
        page = {"__typename": "EventConnection", "cursor": "1", "hasMore": False, "events": [event]}
        answers = {
            **GOOD,
            "runOrError": {"__typename": "Run", "status": "FAILURE"},
            "logsForRun": page,
        }
        return 200, {"data": {k: v for k, v in answers.items() if k in body["query"]}}

    with HttpDouble(respond) as double:
        yield double


def llmops(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def test_schema_is_json_for_editors() -> None:
    """`llmops spec schema > schema.json` is how an editor learns it."""
    result = llmops("spec", "schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["title"] == "LLMOps Assets model spec"


def test_validate_tells_good_from_bad_files(tmp_path: Path) -> None:
    """CI runs it over all specs: one bad one fails, and every file is reported."""
    good = tmp_path / "models" / "parrot.yaml"
    bad = tmp_path / "models" / "other.yaml"
    bad.write_text(SPEC.replace("owner: team:tests", "owner: nobody"))
    assert llmops("spec", "validate", str(good)).exit_code == 0
    result = llmops("spec", "validate", str(bad), str(good), str(tmp_path / "missing.yaml"))
    assert result.exit_code == 1
    assert f"ok: {good}" in result.stdout
    assert "line 3: owner" in result.stderr
    assert "There is no spec" in result.stderr


def test_validate_without_files_is_a_usage_error() -> None:
    """A glob that matched nothing must not look like success."""
    assert llmops("spec", "validate").exit_code == 2


def test_validate_reads_waivers_beside_the_specs(tmp_path: Path) -> None:
    """A waiver that nobody may give is refused in review, not at the next release."""
    waivers = tmp_path / "models" / "waivers"
    waivers.mkdir()
    waiver = (
        "gate: {gate}\nrelease: parrot.v1\nowner: ada@example.org\n"
        f"reason: the new labels are wrong\nexpires: {datetime.now(UTC) + timedelta(days=3)}\n"
    )
    (waivers / "good.yaml").write_text(waiver.format(gate="accuracy"))
    spec = str(tmp_path / "models" / "parrot.yaml")
    assert llmops("spec", "validate", spec).exit_code == 0
    (waivers / "bad.yaml").write_text(waiver.format(gate="package_integrity"))
    for given in (spec, str(tmp_path / "models"), str(waivers / "bad.yaml")):
        result = llmops("spec", "validate", given)
        assert result.exit_code == 1
        assert "bad.yaml is not a valid waiver" in result.stderr
        assert "package_integrity guards integrity, safety or approval" in result.stderr
    assert f"ok: {waivers / 'good.yaml'}" in llmops("spec", "validate", spec).stdout
    (waivers / "bad.yaml").write_text(
        waiver.format(gate="accuracy").replace(str(datetime.now(UTC).year), "2020")
    )
    result = llmops("spec", "validate", spec)
    assert result.exit_code == 0
    assert "bad.yaml expired at 2020" in result.stdout


def test_validate_of_a_folder_without_specs_is_a_usage_error(tmp_path: Path) -> None:
    """A wrong path in CI must not be green."""
    (tmp_path / "empty").mkdir()
    assert llmops("spec", "validate", str(tmp_path / "empty")).exit_code == 2


def test_spec_below_a_floor_is_rejected_with_the_floor_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before review and before a run: by validation, and by the release command."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("floors: {accuracy: {exact_match: {at_least: 0.95}}}\n")
    monkeypatch.setenv("LLMOPS_POLICY", str(policy))
    get_settings.cache_clear()
    floor = "gates.accuracy.exact_match.at_least is 0.9, the floor is 0.95"
    result = llmops("spec", "validate", str(tmp_path / "models" / "parrot.yaml"))
    assert result.exit_code == 1
    assert floor in result.stderr
    result = llmops("release", "parrot")
    assert result.exit_code == 2
    assert floor in result.stderr


def test_gates_prints_the_board(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look tells what stands in the way and whose turn it is; scripts get all of it."""
    monkeypatch.setenv("LLMOPS_STATE", str(rig.platform.settings.state))
    monkeypatch.setenv("LLMOPS_MODELS", str(rig.models))
    get_settings.cache_clear()
    rig.build("parrot.v1", 1)
    result = llmops("gates", "parrot.v1")
    assert result.exit_code == 0
    lines = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines()}
    assert lines["spec_complete"] == lines["compliance"] == "passed"
    assert lines["staging_smoke"] == lines["canary"] == "missing"
    assert "gone" not in lines
    assert "next: staging_smoke, on staging_deployment" in result.stdout

    rig.judge("parrot.v1", [PARITY], FAILED)
    result = llmops("gates", "parrot.v1")
    assert result.exit_code == 1
    assert f"to do, team:ml-engineering: {PARITY.next_action} (parity)" in result.stdout
    board = json.loads(llmops("gates", "parrot.v1", "--json").stdout)
    rows = {row["gate"]: row for row in board["rows"]}
    assert list(rows)[: len(PROVEN)] == [gate.name for gate in PROVEN]
    assert rows["parity"]["state"] == "failed"
    assert (rows["parity"]["action"], rows["parity"]["owner"]) == (
        "optimise",
        "team:ml-engineering",
    )
    assert rows["parity"]["verdict"]["subjects"].keys() == set(PARITY.subjects)
    assert rows["accuracy"]["state"] == "passed"
    assert rows["accuracy"]["action"] is None


def test_gates_of_a_model_lists_its_releases(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are long, and this is the first command that asks for one."""
    monkeypatch.setenv("LLMOPS_STATE", str(rig.platform.settings.state))
    get_settings.cache_clear()
    for version in (1, 2):
        rig.freeze(f"parrot.v{version}")
    assert llmops("gates", "parrot").stdout.split() == ["parrot.v1", "parrot.v2"]


def test_gates_of_no_release_is_an_error() -> None:
    """An empty board would look like nothing in the way."""
    result = llmops("gates", "parrot.v9")
    assert result.exit_code == 2
    assert "Release parrot.v9 has no model_spec yet" in result.stderr


def test_settings_shows_values_and_variables(tmp_path: Path) -> None:
    """It is the documentation of all settings."""
    result = llmops("settings")
    assert result.exit_code == 0
    assert f"LLMOPS_STATE={tmp_path / 'state'}" in result.stdout
    assert "LLMOPS_THREADS=2" in result.stdout


def test_wrong_setting_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command reads the settings first."""
    monkeypatch.setenv("LLMOPS_THREADS", "many")
    get_settings.cache_clear()
    for arguments in (["settings"], ["release", "parrot"], ["status"]):
        result = llmops(*arguments)
        assert result.exit_code == 2
        assert "LLMOPS_THREADS=many" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["release", "no-such-model"], "There is no spec"),
        (["release", "parrot.x1"], "origin is malformed"),
        (["release", "Parrot"], "model's name cannot be used"),
        (["promote", "parrot"], "release key is malformed"),
        (["observe", "parrot.m1"], "origin is malformed"),
        (["deprecate", "parrot.v1.v2"], "origin is malformed"),
        (["archive", ".v1"], "model's name cannot be used"),
        (["remove", "parrot.v1/../v2"], "origin is malformed"),
        (["rollback", "../parrot", "--reason", "x"], "model's name cannot be used"),
        (["release", "parrot"], "The local stack has not been started"),
    ],
)
def test_mistakes_are_found_before_anything_runs(arguments: list[str], message: str) -> None:
    """Exit code 2: nothing was submitted."""
    result = llmops(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "To do: " in result.stderr


def test_broken_spec_is_found_before_a_run_is_queued(tmp_path: Path) -> None:
    """The line is named in seconds, not after the queue."""
    (tmp_path / "models" / "parrot.yaml").write_text(SPEC.replace("team:tests", "x"))
    result = llmops("release", "parrot")
    assert result.exit_code == 2
    assert "line 3: owner" in result.stderr


def test_release_is_submitted_under_a_new_key(dagster: HttpDouble) -> None:
    """With who asked for it: the approver must be somebody else."""
    result = llmops("release", "parrot", "--url", dagster.url, "--no-wait", "--commit", "abc")
    assert result.exit_code == 0
    added, launched = (body["variables"] for _, body, _ in dagster.requests)
    key = added["partition"]
    assert f"release {key}: {dagster.url}/runs/run-1" in result.stdout
    params = launched["params"]
    assert {"key": "dagster/partition", "value": key} in params["executionMetadata"]["tags"]
    assert "llmops/requested_by" in [tag["key"] for tag in params["executionMetadata"]["tags"]]
    assert params["runConfigData"]["ops"]["model_spec"]["config"] == {"commit": "abc"}


def test_failed_run_is_exit_code_1_with_its_reason(dagster: HttpDouble) -> None:
    """CI must stop, and say which gate it was."""
    result = llmops("release", "parrot.v1", "--url", dagster.url)
    assert result.exit_code == 1
    assert "failed: evaluation_gates: Gate accuracy failed." in result.stderr
    assert "is in staging" not in result.stdout


def test_unreachable_dagster_is_exit_code_2() -> None:
    """Not 1: no gate has failed."""
    result = llmops("release", "parrot.v1", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.exit_code == 2
    assert "does not answer" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--approver", "bob"],
        ["--reason", "fine"],
        ["--reject"],
        ["--reject", "--reason", "bad"],
        ["--approver", "", "--reason", "fine"],
        ["--package-digest", "sha256:" + "0" * 64],
    ],
)
def test_half_a_decision_is_not_taken_for_none(dagster: HttpDouble, options: list[str]) -> None:
    """Falling back to the decision on record would promote what somebody meant to reject."""
    result = llmops("promote", "parrot.v1", *options, "--url", dagster.url)
    assert result.exit_code == 2
    assert "--approver" in result.stderr
    assert dagster.requests == []


def test_promotion_sends_the_decision_about_a_package(dagster: HttpDouble) -> None:
    """The digest the person looked at goes along, so that other bytes are refused."""
    digest = "sha256:" + "1" * 64
    for extra, decision in ([], "approve"), (["--reject"], "reject"):
        result = llmops(
            "promote", "parrot.v1", "--approver", "bob", "--reason", "why", *extra,
            "--package-digest", digest, "--url", dagster.url, "--no-wait",
        )  # fmt: skip
        assert result.exit_code == 0
        sent = dagster.requests[-1][1]["variables"]["params"]["runConfigData"]
        assert sent["ops"]["production_approval"]["config"] == {
            "approver": "bob", "decision": decision, "reason": "why", "package_digest": digest
        }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["rollback", "parrot", "--reason", "wrong dates"],
        ["promote", "parrot.v1", "--approver", "bob", "--reason", "why"],
    ],
)
def test_empty_state_folder_is_not_taken_for_the_stack(arguments: list[str]) -> None:
    """At night, in the wrong folder: "nothing to roll back to" would be a lie."""
    result = llmops(*arguments)
    assert result.exit_code == 2
    assert "The local stack has not been started" in result.stderr


def test_rollback_needs_a_reason() -> None:
    """It goes into the record of the route and the incident."""
    assert "--reason" in llmops("rollback", "parrot").stderr


def test_every_command_has_help() -> None:
    """`llmops --help` is where everybody starts."""
    result = llmops("--help")
    assert result.exit_code == 0
    for name, command in main.commands.items():
        assert name in result.stdout
        assert command.help, name
        assert llmops(name, "--help").exit_code == 0
