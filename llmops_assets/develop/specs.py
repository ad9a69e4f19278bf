"""Freezing a model spec: the file as it stands, and the commit it stands at."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmops_assets.develop import branch
from llmops_assets.develop.remote import Remote
from llmops_assets.develop.spec_files import decoded
from llmops_assets.errors import SpecError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.git import ask_git
from llmops_assets.settings import Settings
from llmops_assets.spec import ModelSpec, canonical, parse_spec, read_spec

SOURCE_FILE = "source.json"
"""The `SpecSource` in the `model_spec` artifact."""


class SpecSource(BaseModel):
    """Where a frozen spec came from."""

    model_config = ConfigDict(frozen=True)

    file: str
    """Path of the spec, relative to its repository where it is in one."""
    commit: str | None
    """The commit it stands at; None outside of git or before the first commit."""
    changed: bool
    """Whether the file differs from that commit, or is not in it."""
    pinned: bool = False
    """Whether the release was asked for at that commit: then its tasks, code and data are
    those of the commit, and otherwise those in the folder that holds the folder of specs."""
    spec_of: str | None = None
    """The release that froze the spec before, and that this one took it from."""


def load(settings: Settings, model: str, commit: str | None) -> tuple[ModelSpec, SpecSource]:
    """Reads a model's spec from LLMOPS_MODELS, or as it stood in a commit.

    Args:
        commit: a git revision, see `resolve_commit`; None for the file as it is now.

    Raises:
        SpecError: it is missing or not valid.
        TriggerError: the commit is not here, and LLMOPS_GIT_REPOSITORY does not answer.
    """
    if commit is None:
        path = settings.models / f"{model}.yaml"
        return read_spec(path), _source_of(path)
    revision = resolve_commit(settings, commit)
    repository = branch.repository(settings)
    file = f"{repository.models}/{model}.yaml".removeprefix("./")
    content = repository.read("cat-file", "blob", f"{revision}:{file}")
    if content is None:
        raise SpecError(
            f"Commit {revision} has no {file}",
            cure="check the model's name, or give the commit that added it",
        )
    source = f"{file} at {revision[:12]}"
    return (
        parse_spec(decoded(content, source), source, expected_name=model),
        SpecSource(file=file, commit=revision, changed=False, pinned=True),
    )


def resolve_commit(settings: Settings, commit: str) -> str:
    """The full hash of a git revision.

    Args:
        commit: of the repository that holds LLMOPS_MODELS any revision; of
            LLMOPS_GIT_REPOSITORY, when that is set, a hash that may be abbreviated, or the
            branch.

    Raises:
        SpecError: there is none, or the folder of specs is not in a repository.
        TriggerError: it is not here, and LLMOPS_GIT_REPOSITORY does not answer.
    """
    revision = branch.obtain(settings, commit)
    if revision is None:
        remote = Remote.of(settings)
        where = settings.models if remote is None else remote.address
        raise SpecError(
            f"There is no commit {commit} in the repository of {where}",
            cure="fetch it, or give a commit that is there"
            if remote is None
            else "push it, or give a commit that was pushed, with all digits",
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
