"""The command line: exit codes that scripts rely on, and messages in place of stack traces."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmops_assets.cli import main
from llmops_assets.evidence.gates import PARITY, PROVEN
from llmops_assets.evidence.leaves import APPROVALS
from llmops_assets.local import stack
from llmops_assets.local.ports import PortRequest, claim_ports
from llmops_assets.local.slots import port_file
from llmops_assets.settings import get_settings

from .conftest import free_port
from .fakes import HttpDouble
from .release_rig import FAILED, SPEC, Rig

GOOD = {
    "addDynamicPartition": {"__typename": "AddDynamicPartitionSuccess"},
    "launchRun": {"__typename": "LaunchRunSuccess", "run": {"runId": "run-1"}},
    "runsOrError": {"__typename": "Runs", "results": []},
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


def sent(dagster: HttpDouble, call: str) -> list[dict[str, Any]]:
    """Variables of the calls of a kind that the double got."""
    return [body["variables"] for _, body, _ in dagster.requests if call in body["query"]]


def test_release_is_submitted_under_a_new_key(
    dagster: HttpDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With who asked for it: the approver must be somebody else. In CI that is no machine."""
    monkeypatch.setenv("LLMOPS_REQUESTED_BY", "ada")
    result = llmops("release", "parrot", "--url", dagster.url, "--no-wait")
    assert result.exit_code == 0
    key = sent(dagster, "addDynamicPartition")[0]["partition"]
    assert key.startswith("parrot.m")
    assert f"release {key}: launched, {dagster.url}/runs/run-1" in result.stdout
    params = sent(dagster, "launchRun")[0]["params"]
    tags = params["executionMetadata"]["tags"]
    assert {"key": "dagster/partition", "value": key} in tags
    assert {"key": "llmops/requested_by", "value": "ada"} in tags


def test_release_of_a_commit_elsewhere_has_the_triggers_key(dagster: HttpDouble) -> None:
    """CI and the trigger on pushes must mean the same release, without a repository at hand."""
    result = llmops("release", "parrot", "--url", dagster.url, "--no-wait", "--commit", COMMIT)
    assert result.exit_code == 0
    assert sent(dagster, "addDynamicPartition")[0]["partition"] == "parrot.g0123456789ab"
    params = sent(dagster, "launchRun")[0]["params"]
    assert params["runConfigData"]["ops"]["model_spec"]["config"] == {"commit": COMMIT}


def test_short_commit_elsewhere_needs_a_repository(dagster: HttpDouble) -> None:
    """A key made of another spelling of the commit would be another release."""
    result = llmops("release", "parrot", "--url", dagster.url, "--commit", "0123456")
    assert result.exit_code == 2
    assert "40 hex digits" in result.stderr
    assert "$GITHUB_SHA" in result.stderr
    assert dagster.requests == []


def test_branch_is_resolved_where_the_repository_is(dagster: HttpDouble, tmp_path: Path) -> None:
    """In a checkout `--commit HEAD` is what people type."""
    for arguments in (
        ["init", "--quiet"],
        ["add", "--all"],
        ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "spec"],
    ):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, timeout=20)
    head = subprocess.run(
        ["git", "-C", tmp_path, "rev-parse", "HEAD"],
        check=True, timeout=20, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    result = llmops("release", "parrot", "--url", dagster.url, "--no-wait", "--commit", "HEAD")
    assert result.exit_code == 0
    assert sent(dagster, "addDynamicPartition")[0]["partition"] == f"parrot.g{head[:12]}"


@contextmanager
def dagster_with(*runs: dict[str, Any], raced: bool = False) -> Iterator[HttpDouble]:
    """A double whose release has these runs; all of them end well.

    Args:
        raced: they appear when the second list is asked for.
    """

    def respond(_: str, body: dict[str, Any]) -> tuple[int, Any]:
        query = body["query"]
        first = raced and "runsOrError" in query and len(sent(double, "runsOrError")) == 1
        answers = {
            **GOOD,
            "runsOrError": {"__typename": "Runs", "results": [] if first else list(runs)},
            "terminateRun": {"__typename": "TerminateRunSuccess"},
            "runOrError": {"__typename": "Run", "status": "SUCCESS"},
            "logsForRun": {
                "__typename": "EventConnection", "cursor": "1", "hasMore": False, "events": []
            },
        }  # fmt: skip
        return 200, {"data": {k: v for k, v in answers.items() if k in query}}

    with HttpDouble(respond) as double:
        yield double


def submitted(run: str, status: str, created: float) -> dict[str, Any]:
    return {"runId": run, "status": status, "creationTime": created}


@pytest.mark.parametrize("status", ["QUEUED", "STARTING", "STARTED"])
def test_ci_follows_the_run_of_the_trigger(status: str) -> None:
    """Two runs of one release would only wait for each other."""
    with dagster_with(submitted("by-sensor", status, 5), submitted("old", "FAILURE", 1)) as dagster:
        result = llmops("release", "parrot", "--url", dagster.url, "--commit", COMMIT)
        assert sent(dagster, "launchRun") == []
        assert [v["run"] for v in sent(dagster, "runOrError(")] == ["by-sensor"]
    assert result.exit_code == 0
    assert "parrot.g0123456789ab is in staging" in result.stdout


def test_ci_is_green_at_once_for_a_release_in_staging() -> None:
    """A pipeline that somebody starts again must not build again, nor wait."""
    lost = submitted("lost-a-race", "CANCELED", 6)
    with dagster_with(
        lost, submitted("done", "SUCCESS", 5), submitted("old", "FAILURE", 1)
    ) as dagster:
        result = llmops("release", "parrot", "--url", dagster.url, "--commit", COMMIT)
        assert len(dagster.requests) == 1
    assert result.exit_code == 0
    assert "parrot.g0123456789ab is in staging" in result.stdout


@pytest.mark.parametrize("status", ["FAILURE", "CANCELED", "CANCELING"])
def test_ci_goes_on_where_a_failed_run_stopped(status: str) -> None:
    """Asking again is how one recovers from an outage; finished steps are reused."""
    with dagster_with(submitted("dead", status, 5)) as dagster:
        result = llmops("release", "parrot", "--url", dagster.url, "--commit", COMMIT)
        assert len(sent(dagster, "launchRun")) == 1
        assert [v["run"] for v in sent(dagster, "runOrError(")] == ["run-1"]
    assert result.exit_code == 0


def test_release_by_its_key_is_made_again_after_success() -> None:
    """It fills the slot of a release that is in staging already; so the night guide says."""
    with dagster_with(submitted("done", "SUCCESS", 5)) as dagster:
        assert llmops("release", "parrot.v1", "--url", dagster.url, "--no-wait").exit_code == 0
        assert len(sent(dagster, "launchRun")) == 1


def test_race_with_the_trigger_leaves_one_run() -> None:
    """Both looked, both saw nothing, both launched: the earlier run does the work."""
    both = submitted("run-1", "QUEUED", 6), submitted("by-sensor", "QUEUED", 5)
    with dagster_with(*both, raced=True) as dagster:
        result = llmops("release", "parrot", "--url", dagster.url, "--commit", COMMIT)
        assert [v["run"] for v in sent(dagster, "terminateRun")] == ["run-1"]
        assert [v["run"] for v in sent(dagster, "runOrError(")] == ["by-sensor"]
    assert result.exit_code == 0
    both = submitted("by-sensor", "QUEUED", 7), submitted("run-1", "QUEUED", 6)
    with dagster_with(*both, raced=True) as dagster:
        llmops("release", "parrot", "--url", dagster.url, "--commit", COMMIT)
        assert sent(dagster, "terminateRun") == []


def test_token_goes_over_no_open_line_and_is_never_shown(dagster: HttpDouble) -> None:
    """CI's log is read by many, and so is what passes a network unencrypted."""
    result = llmops("release", "parrot.v1", "--url", dagster.url, "--token", "s3cret", "--no-wait")
    assert result.exit_code == 0
    assert {h["Authorization"] for _, _, h in dagster.requests} == {"Bearer s3cret"}
    assert "s3cret" not in result.output
    for url in ("http://dagster.example.org", "http://127.0.0.1.example.org:3000", "dagster:3000"):
        result = llmops("release", "parrot.v1", "--url", url, "--token", "s3cret")
        assert result.exit_code == 2
        assert "token was not sent" in result.stderr
        assert "s3cret" not in result.output


@pytest.fixture
def built(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A release that ada asked for, packaged, in the state folder of a stack."""
    monkeypatch.setenv("LLMOPS_STATE", str(rig.platform.settings.state))
    get_settings.cache_clear()
    servers = (stack.WEB_SERVER, stack.MLFLOW, stack.GATEWAY, stack.STAGING_GATEWAY,
               stack.CODE_SERVER)  # fmt: skip
    ports = [PortRequest(name) for name in servers]
    claim_ports(port_file(rig.platform.settings), "127.0.0.1", ports)
    rig.build("parrot.v1", 1)
    return rig


@pytest.mark.parametrize("extra", [[], ["--reject"]])
def test_approve_records_the_decision_for_the_trigger(built: Rig, extra: list[str]) -> None:
    """It needs neither Dagster nor a run; about the package that is there unless told."""
    package = built.platform.columns.get("parrot.v1", "packaged_model").artifact
    result = llmops("approve", "parrot.v1", "--approver", "bob", "--reason", "fine", *extra)
    assert result.exit_code == 0, result.output
    (entry,) = built.platform.evidence.entries(APPROVALS)
    assert entry.statement.predicate["approver"] == "bob"
    assert entry.statement.predicate["decision"] == ("reject" if extra else "approve")
    assert entry.statement.predicate["package"] == package
    assert f"package {package}" in result.stdout
    assert entry.digest in result.stdout
    assert ("llmops triggers" in result.stdout) is not bool(extra)


def test_approval_that_does_not_count_says_so_at_once(built: Rig) -> None:
    """The trigger would only write it into its log, and the person would wait."""
    result = llmops("approve", "parrot.v1", "--approver", "ada", "--reason", "mine")
    assert result.exit_code == 1
    assert "promotes nothing" in result.stderr
    assert "ada asked for the release" in result.stderr


def test_approval_of_another_package_is_not_recorded(built: Rig) -> None:
    """The digest is what the person looked at."""
    other = "sha256:" + "1" * 64
    result = llmops(
        "approve", "parrot.v1", "--approver", "bob", "--reason", "x", "--package-digest", other
    )
    assert result.exit_code == 2
    assert other in result.stderr
    assert list(built.platform.evidence.entries(APPROVALS)) == []


def test_approval_needs_who_and_why() -> None:
    """Both are the evidence."""
    assert llmops("approve", "parrot.v1", "--reason", "x").exit_code == 2
    assert llmops("approve", "parrot.v1", "--approver", "bob").exit_code == 2


TRIGGER = {
    "name": "git_push",
    "description": "Makes a release of each changed spec. Switch it off on its page.",
    "nextTick": None,
    "sensorState": {"status": "RUNNING", "ticks": [], "runs": []},
}


@pytest.mark.parametrize("failed", [True, False])
def test_triggers_exit_code_tells_a_failing_one(failed: bool) -> None:
    """A monitor asks this; the figures are in the document."""
    now = datetime.now(UTC).timestamp()
    error = {"className": "TriggerError", "message": "errors.TriggerError: git is away\n"}
    tick = {
        "timestamp": now, "status": "FAILURE" if failed else "SKIPPED",
        "skipReason": None if failed else "no new commit", "error": error if failed else None,
    }  # fmt: skip
    sensor = {**TRIGGER, "sensorState": {**TRIGGER["sensorState"], "ticks": [tick]}}
    daemon = {"daemonType": "SENSOR", "healthy": True, "lastHeartbeatTime": now}
    answer = {
        "sensorsOrError": {"__typename": "Sensors", "results": [sensor]},
        "instance": {"daemonHealth": {"allDaemonStatuses": [daemon]}},
    }
    with HttpDouble(lambda _, __: (200, {"data": answer})) as dagster:
        lines = llmops("triggers", "--url", dagster.url)
        document = llmops("triggers", "--url", dagster.url, "--json")
    assert lines.exit_code == document.exit_code == int(failed)
    (trigger,) = json.loads(document.stdout)["triggers"]
    assert trigger["state"] == ("failing" if failed else "running")
    assert trigger["purpose"] == "Makes a release of each changed spec."
    assert ("error: git is away" if failed else "idle: no new commit") in lines.stdout


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
        ["approve", "parrot.v1", "--approver", "bob", "--reason", "why"],
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
