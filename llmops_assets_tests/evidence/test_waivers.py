"""Waivers: what is reviewed, valid and about a waivable gate counts, and nothing else."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from llmops_assets.errors import SpecError
from llmops_assets.evidence.gates import GATES
from llmops_assets.evidence.waivers import committed_waivers, parse_waiver, read_waiver

LONGEST_DAYS = 90


def text(gate: str = "accuracy", subject: str = "release: parrot.v1", days: float = 30) -> str:
    expires = datetime.now(UTC) + timedelta(days=days)
    return (
        f"gate: {gate}\n{subject}\nowner: ada@example.org\n"
        f"reason: the labels of the new slice are wrong\nexpires: {expires.isoformat()}\n"
    )


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of specs in a git repository of its own."""
    folder = tmp_path / "repository" / "models"
    (folder / "waivers").mkdir(parents=True)
    (folder / "parrot.yaml").write_text("a spec\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=ada", "-c", "user.email=ada@example.org",
         *arguments],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "reviewed")


def test_only_what_is_committed_counts(models: Path) -> None:
    """Whoever can write into the folder must not be able to waive a gate by that alone."""
    file = models / "waivers" / "parrot.yaml"
    file.write_text(text())
    assert committed_waivers(models, LONGEST_DAYS) == ()
    commit(models)
    (waiver,) = committed_waivers(models, LONGEST_DAYS)
    assert (waiver.gate, waiver.release) == ("accuracy", "parrot.v1")
    # Edited afterwards: what was reviewed still counts, and the edit does not.
    file.write_text(text(gate="latency"))
    assert [w.gate for w in committed_waivers(models, LONGEST_DAYS)] == ["accuracy"]


def test_one_broken_waiver_waives_nothing(models: Path) -> None:
    """Half of a policy must not be applied as if it were all of it."""
    (models / "waivers" / "a.yaml").write_text(text())
    (models / "waivers" / "b.yaml").write_text("gate: accuracy\n")
    commit(models)
    with pytest.raises(SpecError, match=r"waivers/b.yaml is not a valid waiver"):
        committed_waivers(models, LONGEST_DAYS)


def test_outside_of_git_nothing_is_waived(tmp_path: Path) -> None:
    """Without a repository nothing was reviewed."""
    (tmp_path / "waivers").mkdir()
    (tmp_path / "waivers" / "a.yaml").write_text(text())
    assert committed_waivers(tmp_path, LONGEST_DAYS) == ()


@pytest.mark.parametrize(
    "gate",
    [
        "spec_complete", "no_leakage", "checkpoint_safe", "registered_bytes", "weights_complete",
        "fits_target", "package_integrity", "package_safe", "staging_smoke",
        "separation_of_duties", "candidate_smoke", "canary", "restores", "gone", "nothing_routes",
    ],
)  # fmt: skip
def test_integrity_safety_and_approval_cannot_be_waived(gate: str) -> None:
    """These say what the bytes are and who let them through; no reason outweighs that."""
    with pytest.raises(SpecError, match=f"{gate} guards integrity, safety or approval"):
        parse_waiver(text(gate=gate), "waiver", LONGEST_DAYS)


def test_waivable_gates_are_those_of_quality_and_compliance() -> None:
    """A new gate is not waivable until somebody decides that it is."""
    assert {name for name, gate in GATES.items() if gate.waivable} == {
        "accuracy", "fairness", "no_regression", "latency", "parity", "engine_accuracy",
        "engine_latency", "staging_latency", "data_compliance", "compliance",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (text(gate="acuracy"), "there is no gate acuracy"),
        (text(subject="release: Parrot"), "release"),
        (text(subject="digest: sha256:12"), "digest"),
        (text(subject=f"release: parrot.v1\ndigest: sha256:{'a' * 64}"), "either a release or"),
        (text(subject="{}"), "not a valid waiver"),
        (text().replace("reason: the labels of the new slice are wrong\n", ""), "reason"),
        ("gate: accuracy\nrelease: parrot.v1\nowner: a\nreason: because I say so\n"
         "expires: 2050-01-01T00:00:00", "timezone"),
        ("gate: accuracy\nexpires: 2026-02-30T12:00:00Z", "day is out of range"),
        (text(gate="no_regression"), "the digest of the serving package"),
        (text(days=LONGEST_DAYS + 1), "waives for longer than the policy allows"),
    ],
    ids=["gate", "release", "digest", "both", "neither", "reason", "time zone", "no such day",
         "no baseline", "too long"],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, broken: str, told: str) -> None:
    """A waiver is written in a hurry; what is wrong with it must be plain, with its file."""
    file = tmp_path / "hurry.yaml"
    file.write_text(broken)
    with pytest.raises(SpecError) as caught:
        read_waiver(file, LONGEST_DAYS)
    assert told in str(caught.value)
    assert "hurry.yaml" in str(caught.value)
