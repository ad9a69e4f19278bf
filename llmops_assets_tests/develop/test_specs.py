"""Freezing a spec: which commit it stood at, asked of a real git."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llmops_assets import git as git_module
from llmops_assets.develop import branch
from llmops_assets.develop.sources import find_source
from llmops_assets.develop.specs import SpecSource, judge_complete, load, resolve_commit
from llmops_assets.errors import DataError, SpecError, TriggerError
from llmops_assets.settings import Settings
from llmops_assets.spec import ModelSpec, parse_spec

from ..git_rig import Pushes, following, git, spec_of
from ..release_rig import SPEC

BETTER = SPEC.replace("at_least: 0.9,", "at_least: 0.95,")


def read(models: Path, model: str, commit: str | None) -> tuple[ModelSpec, SpecSource]:
    """A spec by settings that name no repository but the one that holds the folder."""
    return load(Settings(state=models / "state", models=models), model, commit)


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
    spec, source = read(models, "parrot", None)
    assert spec.gates.accuracy["exact_match"].at_least == 0.9
    assert source.file == "team/models/parrot.yaml"
    assert source.commit == git(models, "rev-parse", "HEAD")
    assert not source.changed


def test_environment_of_a_hook_names_no_repository(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that calls `llmops` has git's own variables set, of another repository."""
    expected = git(models, "rev-parse", "HEAD")
    other = Pushes(tmp_path.resolve() / "other")
    other.commit()
    monkeypatch.setenv("GIT_DIR", str(other.clone / ".git"))
    assert read(models, "parrot", None)[1].commit == expected
    assert read(models, "parrot", "HEAD")[1].commit == expected


def test_edited_file_is_marked_as_changed(models: Path) -> None:
    """The commit alone would be a lie about these bytes."""
    (models / "parrot.yaml").write_text(BETTER)
    spec, source = read(models, "parrot", None)
    assert spec.gates.accuracy["exact_match"].at_least == 0.95
    assert source.changed


@pytest.mark.parametrize("ignored", [False, True])
def test_file_that_git_does_not_have_is_marked_as_changed(models: Path, ignored: bool) -> None:
    """A spec that is not in the commit, ignored files included, cannot be had from it."""
    (models / "other.yaml").write_text(SPEC.replace("name: parrot", "name: other"))
    if ignored:
        (models / ".gitignore").write_text("other.yaml\n")
    _, source = read(models, "other", None)
    assert source.changed


def test_outside_of_git_there_is_no_commit(tmp_path: Path) -> None:
    """Trying the platform out needs no repository."""
    (tmp_path / "parrot.yaml").write_text(SPEC)
    _, source = read(tmp_path, "parrot", None)
    assert (source.file, source.commit) == ("parrot.yaml", None)


def test_before_the_first_commit(tmp_path: Path) -> None:
    """`git init` and a spec is how a team begins."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "parrot.yaml").write_text(SPEC)
    _, source = read(tmp_path.resolve(), "parrot", None)
    assert (source.commit, source.changed) == (None, True)


def test_spec_of_a_commit_is_that_commits(models: Path) -> None:
    """CI releases what was pushed, whatever somebody edits meanwhile."""
    first = git(models, "rev-parse", "HEAD")
    (models / "parrot.yaml").write_text(BETTER)
    git(models, "commit", "--quiet", "--all", "--message", "second")
    (models / "parrot.yaml").unlink()
    for revision, expected in ((first, 0.9), (first[:10], 0.9), ("main", 0.95), ("HEAD~1", 0.9)):
        spec, source = read(models, "parrot", revision)
        assert spec.gates.accuracy["exact_match"].at_least == expected
        assert not source.changed
        assert source.pinned
        assert source.commit == git(models, "rev-parse", revision)


@pytest.mark.parametrize("commit", ["f" * 40, "no-such-branch", "", "--upload-pack=true", "HEAD:x"])
def test_unknown_commit_is_refused(models: Path, commit: str) -> None:
    """Including what git would read as an option; the revision comes from outside."""
    with pytest.raises(SpecError, match="There is no commit"):
        read(models, "parrot", commit)


def test_commit_without_the_spec_is_refused(models: Path) -> None:
    """A model that was added later has no earlier release."""
    with pytest.raises(SpecError, match=r"has no team/models/other\.yaml"):
        read(models, "other", "HEAD")


def test_broken_spec_of_a_commit_names_line_and_commit(models: Path) -> None:
    """The pushed file is meant, not the one on disk."""
    (models / "parrot.yaml").write_text(SPEC.replace("owner: team:tests", "owner: nobody"))
    git(models, "commit", "--quiet", "--all", "--message", "broken")
    (models / "parrot.yaml").write_text(SPEC)
    revision = git(models, "rev-parse", "HEAD")[:12]
    with pytest.raises(SpecError, match=rf"parrot\.yaml at {revision} is not.*line 3: owner"):
        read(models, "parrot", "HEAD")


def test_missing_git_is_explained(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slim image has no git; the commit must not silently become "none"."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SpecError, match="install git"):
        read(models, "parrot", None)


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
        read(models, "parrot", None)


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


def test_pushed_commit_is_looked_up_in_the_mirror(tmp_path: Path) -> None:
    """Not in the checkout, which the platform may have of some other day, or not at all."""
    pushes = Pushes(tmp_path.resolve() / "git")
    first = pushes.push(parrot=spec_of("parrot"))
    second = pushes.push(parrot=spec_of("parrot", accuracy="0.95"))
    settings = following(tmp_path.resolve(), str(pushes.bare)).settings
    for revision, commit, expected in (
        (first, first, 0.9), (second, second, 0.95), (second[:12], second, 0.95),
        ("main", second, 0.95),
    ):  # fmt: skip
        spec, source = load(settings, "parrot", revision)
        assert spec.gates.accuracy["exact_match"].at_least == expected
        assert source == SpecSource(
            file="models/parrot.yaml", commit=commit, changed=False, pinned=True
        )
    shutil.rmtree(settings.state)
    assert resolve_commit(settings, first) == first
    with pytest.raises(SpecError, match=r"no commit f{40} in the repository of /.*team\.git"):
        load(settings, "parrot", "f" * 40)
    pushes.bare.rename(tmp_path / "away.git")
    with pytest.raises(TriggerError, match="cannot be read"):
        load(settings, "parrot", "f" * 40)


def test_spec_of_a_commit_must_be_text(tmp_path: Path) -> None:
    """A file in another encoding is the author's mistake, and named so."""
    pushes = Pushes(tmp_path.resolve() / "git")
    pushes.write("models/parrot.yaml", b"name: parrot\nowner: \xe9\n")
    commit = pushes.push()
    settings = following(tmp_path.resolve(), str(pushes.bare)).settings
    with pytest.raises(SpecError, match=r"UTF-8 text.*line 2"):
        load(settings, "parrot", commit)


def test_sources_of_a_release_come_from_its_commit_first(tmp_path: Path) -> None:
    """What was pushed counts; data, which git seldom holds, lie in the checkout."""
    pushes = Pushes(tmp_path.resolve() / "git")
    pushes.write("both.jsonl", "pushed")
    (pushes.clone / "escape").symlink_to("/etc/hostname")
    settings = following(tmp_path.resolve(), str(pushes.bare)).settings
    tree = branch.tree(settings, pushes.push())
    checkout = settings.models.parent
    (checkout / "both.jsonl").write_text("lying around")
    (checkout / "data.jsonl").write_text("data")
    (checkout / "out").symlink_to("/etc")
    assert find_source(settings, Path("both.jsonl"), tree).read_text() == "pushed"
    assert find_source(settings, Path("both.jsonl")).read_text() == "lying around"
    assert find_source(settings, Path("data.jsonl"), tree).read_text() == "data"
    for path in ("out/hostname", "/etc/hostname", "../other", "../../../../../etc/hostname"):
        with pytest.raises(DataError, match="may not take"):
            find_source(settings, Path(path), tree)
    (checkout / ".env").write_text("KEY=1")
    (settings.state / "store").mkdir(parents=True)
    for path in (".env", str(settings.state / "store")):
        with pytest.raises(DataError, match="may not take"):
            find_source(settings, Path(path), tree)
    for path in ("nothing", "escape"):
        with pytest.raises(DataError, match="There is nothing at"):
            find_source(settings, Path(path), tree)
