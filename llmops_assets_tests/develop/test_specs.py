"""Freezing a spec: which commit it stood at, asked of a real git."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from llmops_assets import git as git_module
from llmops_assets.develop.specs import judge_complete, load
from llmops_assets.errors import SpecError
from llmops_assets.spec import parse_spec

from ..release_rig import SPEC

BETTER = SPEC.replace("at_least: 0.9,", "at_least: 0.95,")


def git(folder: Path, *arguments: str) -> str:
    identity = {f"GIT_{who}_{what}": "test@example.org"
                for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}  # fmt: skip
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True, capture_output=True, text=True, timeout=30,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **identity},
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with one commit, whose specs are in a folder two levels down."""
    root = tmp_path.resolve() / "repository"
    models = root / "team" / "models"
    models.mkdir(parents=True)
    git(root, "init", "--quiet", "--initial-branch=main")
    (models / "parrot.yaml").write_text(SPEC)
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first")
    return models


def test_clean_file_has_its_commit(models: Path) -> None:
    """Lineage ends at a commit that anybody can check out."""
    spec, source = load(models, "parrot", None)
    assert spec.gates.accuracy["exact_match"].at_least == 0.9
    assert source.file == "team/models/parrot.yaml"
    assert source.commit == git(models, "rev-parse", "HEAD")
    assert not source.changed


def test_edited_file_is_marked_as_changed(models: Path) -> None:
    """The commit alone would be a lie about these bytes."""
    (models / "parrot.yaml").write_text(BETTER)
    spec, source = load(models, "parrot", None)
    assert spec.gates.accuracy["exact_match"].at_least == 0.95
    assert source.changed


@pytest.mark.parametrize("ignored", [False, True])
def test_file_that_git_does_not_have_is_marked_as_changed(models: Path, ignored: bool) -> None:
    """A spec that is not in the commit, ignored files included, cannot be had from it."""
    (models / "other.yaml").write_text(SPEC.replace("name: parrot", "name: other"))
    if ignored:
        (models / ".gitignore").write_text("other.yaml\n")
    _, source = load(models, "other", None)
    assert source.changed


def test_outside_of_git_there_is_no_commit(tmp_path: Path) -> None:
    """Trying the platform out needs no repository."""
    (tmp_path / "parrot.yaml").write_text(SPEC)
    _, source = load(tmp_path, "parrot", None)
    assert (source.file, source.commit) == ("parrot.yaml", None)


def test_before_the_first_commit(tmp_path: Path) -> None:
    """`git init` and a spec is how a team begins."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "parrot.yaml").write_text(SPEC)
    _, source = load(tmp_path.resolve(), "parrot", None)
    assert (source.commit, source.changed) == (None, True)


def test_spec_of_a_commit_is_that_commits(models: Path) -> None:
    """CI releases what was pushed, whatever somebody edits meanwhile."""
    first = git(models, "rev-parse", "HEAD")
    (models / "parrot.yaml").write_text(BETTER)
    git(models, "commit", "--quiet", "--all", "--message", "second")
    (models / "parrot.yaml").unlink()
    for revision, expected in ((first, 0.9), (first[:10], 0.9), ("main", 0.95), ("HEAD~1", 0.9)):
        spec, source = load(models, "parrot", revision)
        assert spec.gates.accuracy["exact_match"].at_least == expected
        assert not source.changed
        assert source.commit == git(models, "rev-parse", revision)


@pytest.mark.parametrize("commit", ["f" * 40, "no-such-branch", "", "--upload-pack=true", "HEAD:x"])
def test_unknown_commit_is_refused(models: Path, commit: str) -> None:
    """Including what git would read as an option; the revision comes from outside."""
    with pytest.raises(SpecError, match="There is no commit"):
        load(models, "parrot", commit)


def test_commit_without_the_spec_is_refused(models: Path) -> None:
    """A model that was added later has no earlier release."""
    with pytest.raises(SpecError, match=r"has no team/models/other\.yaml"):
        load(models, "other", "HEAD")


def test_broken_spec_of_a_commit_names_line_and_commit(models: Path) -> None:
    """The pushed file is meant, not the one on disk."""
    (models / "parrot.yaml").write_text(SPEC.replace("owner: team:tests", "owner: nobody"))
    git(models, "commit", "--quiet", "--all", "--message", "broken")
    (models / "parrot.yaml").write_text(SPEC)
    revision = git(models, "rev-parse", "HEAD")[:12]
    with pytest.raises(SpecError, match=rf"parrot\.yaml at {revision} is not.*line 3: owner"):
        load(models, "parrot", "HEAD")


def test_missing_git_is_explained(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slim image has no git; the commit must not silently become "none"."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SpecError, match="install git"):
        load(models, "parrot", None)


def test_hanging_git_is_given_up(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A repository on a dead network file system must not hold the run."""
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexec sleep 30\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(git_module, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SpecError, match="timed out"):
        load(models, "parrot", None)


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("Repeats in tests what it is told to say.", "Summarises everything.", "three words"),
        ("answer: pong", f"answer: {'x' * 193}", "longer than constraints"),
    ],
)
def test_incomplete_spec_fails_its_gate(right: str, wrong: str, problem: str) -> None:
    """What the schema cannot say: whether the parts fit each other."""
    assert judge_complete(parse_spec(SPEC, "test")).passed
    judgement = judge_complete(parse_spec(SPEC.replace(right, wrong), "test"))
    assert not judgement.passed
    assert problem in judgement.reason
