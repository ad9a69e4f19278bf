"""Freezing a model spec: the file as it stands, and the commit it stands at."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmops_assets.errors import SpecError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.git import ask_git
from llmops_assets.spec import ModelSpec, canonical, parse_spec, read_spec


class SpecSource(BaseModel):
    """Where a frozen spec came from."""

    model_config = ConfigDict(frozen=True)

    file: str
    """Path of the spec, relative to its repository where it is in one."""
    commit: str | None
    """The commit it stands at; None outside of git or before the first commit."""
    changed: bool
    """Whether the file differs from that commit, or is not in it."""


def load(models: Path, model: str, commit: str | None) -> tuple[ModelSpec, SpecSource]:
    """Reads a model's spec from its folder, or as it stood in a commit.

    Args:
        models: the folder of specs.
        commit: a git revision of the repository that holds the folder; None for the file
            as it is now.

    Raises:
        SpecError: it is missing or not valid.
    """
    path = models / f"{model}.yaml"
    if commit is None:
        return read_spec(path), _source_of(path)
    revision = resolve_commit(models, commit)
    top = ask_git(models, "rev-parse", "--show-toplevel")
    assert top is not None  # the commit is in a repository
    file = path.relative_to(top).as_posix()
    text = ask_git(models, "show", f"{revision}:{file}")
    if text is None:
        raise SpecError(
            f"Commit {revision} has no {file}",
            cure="check the model's name, or give the commit that added it",
        )
    return (
        parse_spec(text, f"{file} at {revision[:12]}", expected_name=model),
        SpecSource(file=file, commit=revision, changed=False),
    )


def resolve_commit(models: Path, commit: str) -> str:
    """The full hash of a git revision of the repository that holds the folder of specs.

    Raises:
        SpecError: there is none, or the folder is not in a repository.
    """
    revision = ask_git(models, "rev-parse", "--verify", "--end-of-options", f"{commit}^{{commit}}")
    if revision is None:
        raise SpecError(
            f"There is no commit {commit} in the repository of {models}",
            cure="fetch it, or give a commit that is there",
        )
    return revision


def judge_complete(spec: ModelSpec) -> Judgement:
    """Use case, metrics and constraints are there, and the known answers fit the constraints."""
    missing = [
        problem
        for problem, found in {
            "the use case is shorter than three words": len(spec.use_case.split()) < 3,
            "a known answer is longer than constraints.max_output_tokens": any(
                len(known.answer) > 16 * spec.constraints.max_output_tokens
                for known in spec.serving.known_answers
            ),
        }.items()
        if found
    ]
    return Judgement(
        decision=Decision.of(not missing),
        measured={"problems": missing, "metrics": canonical(spec)["metrics"]},
        threshold={"problems": []},
        reason="; ".join(missing) or "Use case, metrics and constraints are complete.",
    )


def _source_of(path: Path) -> SpecSource:
    top = ask_git(path.parent, "rev-parse", "--show-toplevel")
    if top is None:
        return SpecSource(file=path.name, commit=None, changed=False)
    file = path.relative_to(top).as_posix()
    return SpecSource(
        file=file,
        commit=ask_git(path.parent, "rev-parse", "--verify", "HEAD"),
        changed=bool(ask_git(path.parent, "status", "--porcelain", "--ignored", "--", str(path))),
    )
