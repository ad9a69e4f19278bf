"""Gates on the real thing: what quantisation destroys is seen, whatever perplexity says."""

from __future__ import annotations

import json

import pytest

from llmops_assets.evidence.verdicts import verdicts
from llmops_assets_tests.lifecycle.conftest import FirstRelease
from llmops_assets_tests.lifecycle.stack_user import StackUser


@pytest.fixture(scope="module")
def int4_release(user: StackUser, first_release: FirstRelease) -> tuple[str, str]:
    """A release of the example with 4-bit weights, and what its failed run says."""
    key, run = user.start_release(user.commit_spec(engine={"precision": "int4"}))
    return key, user.expect_failure(run)


def test_int4_fails_parity_though_its_perplexity_stays(
    user: StackUser, int4_release: tuple[str, str]
) -> None:
    """Perplexity is a mean over all tokens, and hides that single ones are chosen otherwise."""
    key, told = int4_release
    column = user.platform.columns.assets(key)
    checkpoint, engine = (
        column[asset].facts["perplexity"] for asset in ("evaluation", "engine_validation")
    )
    assert abs(engine / checkpoint - 1) < 0.01
    assert f"Gate parity failed for {key}" in told
    assert "To do: optimise: choose a finer precision" in told
    found = verdicts(user.platform.evidence, key)["parity"]
    decisions = {finding.metric: finding.decision.value for finding in found.findings}
    assert "failed" in (decisions["logit_distance"], decisions["token_agreement"])
    assert "packaged_model" not in column


def test_what_failed_is_refused_when_launched_alone(
    user: StackUser, int4_release: tuple[str, str]
) -> None:
    """Somebody packages the engine all the same, and tries to get it into staging."""
    key, _ = int4_release
    alone = user.materialize(key, "packaged_model", "compliance_report", "staging_deployment")
    refusal = user.expect_failure(alone)
    assert f"Release {key} may not go on" in refusal
    assert "parity: failed: " in refusal
    assert "staging_deployment" not in user.platform.columns.assets(key)


def test_the_board_tells_whose_turn_it_is(user: StackUser, int4_release: tuple[str, str]) -> None:
    """Without the UI, and for scripts."""
    key, _ = int4_release
    done = user.command("gates", key)
    assert done.returncode == 1
    assert "to do, team:ml-engineering: optimise: choose a finer precision" in done.stdout
    board = json.loads(user.command("gates", key, "--json").stdout)
    states = {row["gate"]: row["state"] for row in board["rows"]}
    assert (states["accuracy"], states["parity"], states["canary"]) == (
        "passed", "failed", "missing"
    )  # fmt: skip


def test_a_release_is_compared_with_what_serves(
    user: StackUser, first_release: FirstRelease, int4_release: tuple[str, str]
) -> None:
    """The verdict names the package it was compared with, and shows the interval."""
    key, _ = int4_release
    verdict = verdicts(user.platform.evidence, key)["no_regression"]
    assert verdict.baseline == user.serving().package
    (finding,) = verdict.findings
    assert finding.metric == "regression of exact_match"
    assert finding.interval is not None
    assert finding.interval.high <= 0.01
    assert verdict.dataset == user.platform.columns.get(key, "evaluation_data").artifact
