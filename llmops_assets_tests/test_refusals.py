"""Whatever deploys refuses without the right verdict of every gate before it.

Each asset is launched alone, in a run of its own, where no blocking check of Dagster's is
in the way: what is left is `require`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterInstance

from llmops_assets.evidence.gates import (
    ACCURACY,
    APPROVED,
    BUILT,
    GATES,
    NOTHING_ROUTES,
    PARITY,
    PROVEN,
    REGRESSION,
    STAGED,
    STAGING_LATENCY,
    STAGING_SMOKE,
    Gate,
)
from llmops_assets.evidence.log import LOG
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import State, record_verdict
from llmops_assets.policy import read_policy
from llmops_assets.storage.artifacts import digests
from llmops_assets.storage.store import digest_of

from .release_rig import FAILED, PASSED, SPEC, Rig, deploy
from .test_reporting import APPROVE, Runs, description, materialized

pytestmark = pytest.mark.timeout(120)
RELEASE = "parrot.v1"
LOADED = ("staging_deployment", "production_candidate")
DEPLOYS: tuple[tuple[str, tuple[Gate, ...]], ...] = (
    ("staging_deployment", BUILT),
    ("production_approval", STAGED),
    ("production_candidate", APPROVED),
    ("production_deployment", PROVEN),
)
CASES = [
    pytest.param(asset, gate, id=f"{gate.name}-{asset}")
    for position, (asset, gates) in enumerate(DEPLOYS)
    for gate in gates
    # Every gate at the first asset that needs it, and the last one of all needs them all.
    if position in (0, 3) or gate not in DEPLOYS[position - 1][1]
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A release before its route moves, every gate passed; tests take verdicts from it."""
    rig = Rig(tmp_path_factory.mktemp("refusals") / "rig")
    rig.build_unjudged(RELEASE, 1)
    for asset in (*LOADED, "production_approval"):
        rig.publish(RELEASE, asset, {"document.json": f'{{"asset": "{asset}"}}'})
    for place, folder in enumerate(evidence_folders(rig)):
        shutil.copytree(folder, rig.root / f"unjudged-{place}")
    with DagsterInstance.ephemeral() as instance:
        yield Runs(rig, instance)
    rig.close()


@pytest.fixture
def rig(runs: Runs) -> Rig:
    """The rig with passed verdicts only, whatever the test before left."""
    forget(runs.rig)
    runs.rig.judge(RELEASE, PROVEN, PASSED)
    return runs.rig


def evidence_folders(rig: Rig) -> tuple[Path, Path]:
    """The log, and the index that remembers it."""
    settings = rig.platform.settings
    return settings.store / "logs" / LOG, settings.evidence_index.parent


def forget(rig: Rig) -> None:
    """Puts the evidence back to before anything was judged."""
    for place, folder in enumerate(evidence_folders(rig)):
        shutil.rmtree(folder)
        shutil.copytree(rig.root / f"unjudged-{place}", folder)


def refused(runs: Runs, asset: str) -> str:
    """What the asset says, launched alone."""
    result = runs.assets(RELEASE, asset)
    assert not result.success
    assert asset not in materialized(result)
    return description(result, asset)


def forge(runs: Runs, gate: Gate) -> None:
    """A passed check, as anyone who reaches the web server can report it."""
    key = dg.AssetCheckKey(dg.AssetKey(gate.asset), gate.name)
    if runs.instance.event_log_storage.get_asset_check_execution_history(key, limit=1):
        return  # Dagster takes one such report for a check of a partition
    runs.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(gate.asset), check_name=gate.name, passed=True,
            partition=RELEASE,
        )
    )  # fmt: skip


def others(gate: Gate, rig: Rig) -> None:
    """A passed verdict about other bytes, the newest one."""
    platform = rig.platform
    column = digests(platform.column(RELEASE))
    column |= {gate.subjects[0]: digest_of(b"other")}
    spec, policy = platform.spec(RELEASE), platform.policy
    record_verdict(platform.evidence, RELEASE, gate, spec, policy, PASSED, column, "run")


def without(gate: Gate, rig: Rig) -> None:
    """All verdicts but the gate's."""
    forget(rig)
    rig.judge(RELEASE, [other for other in PROVEN if other != gate], PASSED)


@pytest.mark.parametrize(("asset", "gate"), CASES)
def test_deployment_needs_the_verdict_itself(runs: Runs, rig: Rig, asset: str, gate: Gate) -> None:
    """Failed, forged in Dagster, never judged, or about other bytes: no means no."""
    rig.judge(RELEASE, [gate], FAILED)
    assert f"{gate.name}: failed: the test says so" in (told := refused(runs, asset))
    assert gate.next_action in told
    forge(runs, gate)
    assert f"{gate.name}: failed: the test says so" in refused(runs, asset)
    without(gate, rig)
    assert f"{gate.name}: no verdict" in refused(runs, asset)
    others(gate, rig)
    assert f"{gate.name}: the verdict is about {gate.subjects[0]}" in refused(runs, asset)


def test_undecided_is_no_pass(runs: Runs, rig: Rig) -> None:
    """Too few data to fail are too few to deploy."""
    undecided = FAILED.model_copy(update={"decision": Decision.UNDECIDED})
    rig.judge(RELEASE, [ACCURACY], undecided)
    assert "accuracy: undecided" in refused(runs, "staging_deployment")


def test_spec_below_a_new_floor_is_refused(
    runs: Runs, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A floor that was raised since holds for what is on its way, too."""
    policy = rig.root / "policy.yaml"
    policy.write_text("floors: {token_agreement: 0.999}\n")
    monkeypatch.setattr(type(rig.platform), "policy", read_policy(policy))
    told = refused(runs, "staging_deployment")
    assert "gates.parity.token_agreement is 0.98, the floor is 0.999" in told


def test_rig_deploys_when_nothing_is_wrong(rig: Rig) -> None:
    """Otherwise the refusals above would prove nothing."""
    column = rig.platform.column(RELEASE)
    assert len(rig.platform.require(RELEASE, PROVEN, column)) == len(PROVEN)


def waive(rig: Rig, gate: str, days: float) -> None:
    """Commits a waiver for the release."""
    folder = rig.models / "waivers"
    folder.mkdir(exist_ok=True)
    expires = (datetime.now(UTC) + timedelta(days=days)).isoformat()
    (folder / "parrot.yaml").write_text(
        f"gate: {gate}\nrelease: {RELEASE}\nowner: ada@example.org\n"
        f"reason: the new labels are wrong themselves\nexpires: {expires}\n"
    )
    git = ["git", "-C", str(rig.models), "-c", "user.name=ada", "-c", "user.email=ada@example.org"]
    for arguments in (["init", "--quiet"], ["add", "--all"],
                      ["commit", "--quiet", "--message", "reviewed"]):  # fmt: skip
        subprocess.run([*git, *arguments], check=True, capture_output=True, timeout=30)


def test_waiver_opens_while_it_is_valid_and_shows(tmp_path: Path) -> None:
    """In Dagster it is a warning and not a pass, so that nobody takes it for one."""
    rig = Rig(tmp_path / "rig")
    # The real gate on real predictions, which no release can reach.
    rig.build(RELEASE, 1, SPEC.replace("at_least: 0.9, e", "at_least: 1.01, e"))
    with DagsterInstance.ephemeral() as instance:
        runs = Runs(rig, instance)
        assert "Gate accuracy failed" in description(
            runs.assets(RELEASE, "evaluation"), "evaluation_gates"
        )
        waive(rig, "accuracy", days=1)
        result = runs.assets(RELEASE, "evaluation")
        assert result.success
        (check,) = [
            check for check in result.get_asset_check_evaluations()
            if check.check_name == "accuracy"
        ]  # fmt: skip
        assert not check.passed
        assert check.severity is dg.AssetCheckSeverity.WARN
        assert "Waived by ada@example.org until" in str(check.description)
        column = rig.platform.column(RELEASE)
        (standing,) = rig.platform.standings(RELEASE, [ACCURACY], column)
        assert standing.state is State.WAIVED
    rig.close()


def test_expired_waiver_blocks(runs: Runs, rig: Rig) -> None:
    """On the day after, the release is where it was before."""
    rig.judge(RELEASE, [PARITY], FAILED)
    waive(rig, "parity", days=1)
    column = rig.platform.column(RELEASE)
    assert rig.platform.require(RELEASE, BUILT, column)
    waive(rig, "parity", days=-0.001)
    assert "parity: failed" in refused(runs, "staging_deployment")


def test_regression_against_what_serves_by_now_stops_the_promotion(tmp_path: Path) -> None:
    """Staged beside nothing, then a far better release went into production."""
    rig = Rig(tmp_path / "rig")
    rig.build(RELEASE, 1, wrong={"fr": 30})
    rig.build("parrot.v2", 2)
    rig.publish(RELEASE, "staging_deployment", {"document.json": "{}"})
    rig.judge(RELEASE, [STAGING_SMOKE, STAGING_LATENCY], PASSED)
    deploy(rig, 2)
    with DagsterInstance.ephemeral() as instance:
        runs = Runs(rig, instance)
        result = runs.job("promote", RELEASE, APPROVE)
        text = description(result, "evaluation_gates")
        assert "Gate no_regression failed for parrot.v1" in text
        assert "Compared with parrot.v2: regression of exact_match is 0.075" in text
        assert not materialized(result)
        assert rig.platform.columns.find(RELEASE, "production_approval") is None
        alone = runs.assets(RELEASE, "production_candidate")
        assert "no_regression: failed" in description(alone, "production_candidate")
    rig.close()


@pytest.mark.parametrize(
    ("asset", "gate", "bound"),
    [("evaluation", "latency", "evaluation"), ("engine_validation", "engine_latency", "build")],
)
def test_slow_model_fails_where_it_is_measured(
    tmp_path: Path, asset: str, gate: str, bound: str
) -> None:
    """Each gate judges its own asset by its own bounds, and what failed goes nowhere."""
    tight = SPEC.replace(f"{bound}: [{{measure: end_to_end, at_most: 5}}]",
                         f"{bound}: [{{measure: end_to_end, at_most: 0.001}}]")  # fmt: skip
    rig = Rig(tmp_path / "rig")
    rig.build(RELEASE, 1, tight)
    with DagsterInstance.ephemeral() as instance:
        runs = Runs(rig, instance)
        result = runs.check(RELEASE, asset, gate)
        text = description(result, f"{asset}_gates")
        assert f"Gate {gate} failed for {RELEASE}: p95 of end_to_end at concurrency 1" in text
        alone = runs.assets(RELEASE, "staging_deployment")
        assert f"{gate}: failed" in description(alone, "staging_deployment")
    rig.close()


def test_biased_slice_is_refused_alone(tmp_path: Path) -> None:
    """Good enough on average and in each slice, and still much worse for one of them."""
    rig = Rig(tmp_path / "rig")
    lenient = SPEC.replace("at_least: 0.9, every_slice: 0.8", "at_least: 0.5")
    rig.build(RELEASE, 1, lenient, wrong={"fr": 60})
    with DagsterInstance.ephemeral() as instance:
        runs = Runs(rig, instance)
        result = runs.assets(RELEASE, "evaluation")
        assert "Gate fairness failed" in description(result, "evaluation_gates")
        alone = runs.assets(RELEASE, "staging_deployment")
        assert "fairness: failed: largest gap of exact_match is 0.3" in description(
            alone, "staging_deployment"
        )
    rig.close()


def test_published_measurements_outlive_the_files_of_their_tasks(tmp_path: Path) -> None:
    """A task that was deleted since must not stop a release that was measured before."""
    rig = Rig(tmp_path / "rig")
    task, data = rig.root / "dates.yaml", rig.root / "dates.jsonl"
    data.write_text('{"question": "hello"}\n')
    task.write_text(
        "task: dates\ndataset_path: json\ndataset_kwargs: {data_files: {test: dates.jsonl}}\n"
    )
    metrics = "metrics: [exact_match, {name: dates, task: dates.yaml}]"
    rig.build(RELEASE, 1, SPEC.replace("metrics: [exact_match]", metrics))
    task.unlink()
    with DagsterInstance.ephemeral() as instance:
        runs = Runs(rig, instance)
        for asset in ("evaluation", "engine_validation"):
            assert asset in materialized(runs.assets(RELEASE, asset))
    rig.close()


def test_below_a_floor_one_may_still_retire(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The very releases that policy wants gone must not be the ones that cannot go."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("floors: {token_agreement: 0.999}\n")
    monkeypatch.setattr(type(rig.platform), "policy", read_policy(policy))
    rig.publish(RELEASE, "deprecated_version", {"document.json": "{}"})
    rig.judge(RELEASE, [NOTHING_ROUTES], PASSED)
    assert rig.platform.require(RELEASE, [NOTHING_ROUTES], rig.platform.column(RELEASE))


def test_another_serving_release_is_compared_with_before_the_route_moves(tmp_path: Path) -> None:
    """The promotion judges the regression again, beside what serves by now."""
    rig = Rig(tmp_path / "rig")
    for version in (1, 2, 3):
        rig.build(f"parrot.v{version}", version)
    deploy(rig, 1)
    with DagsterInstance.ephemeral() as instance:
        runs = Runs(rig, instance)
        assert runs.assets("parrot.v2", "evaluation").success
        serving = rig.platform.serving_package("parrot")
        (before,) = rig.platform.standings(
            "parrot.v2", [REGRESSION], rig.platform.column("parrot.v2")
        )
        assert before.state is State.PASSED
        assert before.verdict is not None
        assert before.verdict.baseline == serving
        deploy(rig, 3)
        (after,) = rig.platform.standings(
            "parrot.v2", [REGRESSION], rig.platform.column("parrot.v2")
        )
        assert after.state is State.STALE
        assert "serves by now" in after.reason
        alone = runs.assets("parrot.v2", "production_candidate")
        assert "no_regression: compared with package" in description(alone, "production_candidate")
        assert runs.assets("parrot.v2", "evaluation").success
        (again,) = rig.platform.standings(
            "parrot.v2", [REGRESSION], rig.platform.column("parrot.v2")
        )
        assert again.state is State.PASSED
    rig.close()


def test_every_gate_is_tried() -> None:
    """A gate that is added later must be in one of the lists above."""
    before_traffic = {gate.name for gate in PROVEN}
    assert {case.values[1].name for case in CASES} == before_traffic  # pyright: ignore[reportAttributeAccessIssue]
    assert before_traffic <= set(GATES)
