"""What a push to the branch means for each spec, and what stands on the branch after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from llmops_assets.develop import branch
from llmops_assets.develop.spec_files import (
    Parsed,
    Repository,
    SpecFile,
    model_of,
    read_specs,
    specs_in,
)
from llmops_assets.errors import SpecError, TriggerError
from llmops_assets.platform import Platform
from llmops_assets.policy import Floors, check_floors
from llmops_assets.release import Release
from llmops_assets.serving.slots import Environment
from llmops_assets.settings import Settings
from llmops_assets.spec import ModelSpec, canonical

logger = logging.getLogger(__name__)


class What(StrEnum):
    """What became of a spec."""

    CHANGED = "changed"
    UNCHANGED = "unchanged"
    """Other bytes, such as a comment, and the same spec."""
    BROKEN = "broken"
    DELETED = "deleted"
    RENAMED = "renamed"
    """Deleted, and under another name there is a similar one."""


@dataclass(frozen=True)
class Difference:
    """A spec file that is not the same in two commits; None where there is no such file."""

    path: str
    old: SpecFile | None
    new: SpecFile | None

    @property
    def model(self) -> str:
        return model_of(self.path)


@dataclass(frozen=True)
class Change:
    """What a push did to one spec."""

    file: str
    model: str
    what: What
    detail: str = ""
    """What is wrong with it, or what it was renamed from or to."""


@dataclass(frozen=True)
class Push:
    """The way from one commit of the branch to another."""

    old: str | None
    """None as well when it is gone."""
    commit: str
    differences: tuple[Difference, ...]
    """By path."""
    since_releases: bool
    """Whether the commit before is gone, so that specs are compared with what the newest
    release of their model froze; all are among the differences then."""


def push_between(settings: Settings, old: str | None, new: str) -> Push:
    """What differs between two commits, whatever the history between them.

    Args:
        old: None for everything that is in `new`.
        new: a commit that is here.

    Raises:
        TriggerError: `old` is not here, and the repository does not answer.
        SpecError: git does not answer.
    """
    repository = branch.repository(settings)
    files = specs_in(repository, new)
    before: Mapping[str, SpecFile] = {}
    gone = False
    if old is not None:
        gone = branch.obtain(settings, old) is None
        before = {} if gone else specs_in(repository, old)
    if gone:
        logger.warning(
            "commit %s is gone; the specs at %s are compared with what the newest release of "
            "their model froze", old, new,
        )  # fmt: skip
    differences = tuple(
        Difference(path, before.get(path), files.get(path))
        for path in sorted(before.keys() | files.keys())
        if before.get(path) != files.get(path)
    )
    return Push(None if gone else old, new, differences, since_releases=gone)


def changes(
    platform: Platform, push: Push, differences: Sequence[Difference] | None = None
) -> tuple[Change, ...]:
    """What a push did to each spec, by path; unchanged files are not read.

    Args:
        differences: those of the push that are asked about; unset: all.

    Raises:
        SpecError: git does not answer.
    """
    asked = push.differences if differences is None else differences
    repository = branch.repository(platform.settings)
    files = [file for each in asked for file in (each.old, each.new) if file is not None]
    parsed = read_specs(repository, files)

    def before(difference: Difference) -> ModelSpec | None:
        if push.since_releases:
            return newest_frozen_spec(platform, difference.model)
        spec = None if difference.old is None else parsed[difference.old]
        return spec if isinstance(spec, ModelSpec) else None

    renamed = _renamed(push, repository)
    floors = platform.policy.floors
    return tuple(_change(each, parsed, before, renamed, floors) for each in asked)


def newest_frozen_spec(platform: Platform, model: str) -> ModelSpec | None:
    """What the newest release of a model froze, if it can be read."""
    own = [
        key for key in platform.columns.releases(model)
        if Release.parse(key).follows_spec
    ]  # fmt: skip
    if not own:
        return None
    try:
        return platform.spec(own[-1])
    except SpecError as error:  # as another version of the platform froze it
        logger.warning("taking the spec of %s for a changed one: %s", model, error)
        return None


def broken_specs(platform: Platform, commit: str) -> tuple[Change, ...]:
    """Every spec in a commit that is not valid or below the policy, by path.

    Raises:
        SpecError: git does not answer.
    """
    repository = branch.repository(platform.settings)
    floors = platform.policy.floors
    return tuple(
        Change(file.path, file.model, What.BROKEN, problem)
        for file, spec in read_specs(repository, specs_in(repository, commit).values()).items()
        if (problem := _problem(file, spec, floors)) is not None
    )


def serving_without_spec(platform: Platform, commit: str) -> Mapping[str, str]:
    """What serves in production of models without a spec in a commit: release by model.

    Raises:
        SpecError: git does not answer.
        EvidenceError: a recorded route is not what was signed.
    """
    repository = branch.repository(platform.settings)
    models = {file.model for file in specs_in(repository, commit).values()}
    return {
        model: route.serving.release
        for model, route in sorted(platform.routes.all(Environment.PRODUCTION).items())
        if route.serving is not None and model not in models
    }


def retirement(platform: Platform, model: str) -> str:
    """What is proposed when a model's spec is deleted; nothing does it by itself."""
    route, _ = platform.routes.current(Environment.PRODUCTION, model)
    if route is not None and route.serving is not None:
        release = route.serving.release
        return (
            f"retirement proposed: `llmops deprecate {release}`, then `llmops archive` and "
            "`llmops remove` of it; it serves in production, and deprecate refuses for as long"
        )
    releases = platform.columns.releases(model)
    if not releases:
        return "nothing to retire: it has no release"
    return (
        f"retirement proposed: `llmops deprecate {releases[-1]}`, then `llmops archive` and "
        "`llmops remove` of it and of its earlier releases; none serves in production"
    )


def pushed(settings: Settings, commit: str | None, previous: str | None) -> Push:
    """The push of a commit; of the newest that was fetched, where none is named.

    Raises:
        TriggerError: LLMOPS_GIT_REPOSITORY is not set, or has to be asked and does not answer.
        SpecError: there is no such commit.
    """
    named = commit or branch.head_commit(settings)
    if named is None:
        raise TriggerError(
            "There is no branch whose specs could be looked at",
            cure="set LLMOPS_GIT_REPOSITORY to a path or URL",
        )
    found = branch.obtain(settings, named)
    if found is None:
        raise SpecError(
            f"There is no commit {named}",
            cure="give one that was pushed, with all digits, or none for the newest",
        )
    return push_between(settings, previous, found)


def proposal(platform: Platform, change: Change) -> str:
    """What somebody should decide after a change; empty when there is nothing."""
    deleted = change.what in (What.DELETED, What.RENAMED)
    return retirement(platform, change.model) if deleted else ""


def release_of(change: Change, push: Push) -> Release | None:
    """The release that a change asks for, if it asks for one."""
    if change.what is not What.CHANGED:
        return None
    return Release.from_commit(change.model, push.commit)


def _change(
    difference: Difference,
    parsed: Mapping[SpecFile, Parsed],
    before: Callable[[Difference], ModelSpec | None],
    renamed: Mapping[str, str],
    floors: Floors,
) -> Change:
    path, model = difference.path, difference.model
    if difference.new is None:
        to = renamed.get(path)
        return Change(
            path, model, What.DELETED if to is None else What.RENAMED, f"to {to}" if to else ""
        )
    spec = parsed[difference.new]
    if (problem := _problem(difference.new, spec, floors)) is not None:
        return Change(path, model, What.BROKEN, problem)
    assert isinstance(spec, ModelSpec)  # it has no problem
    old = before(difference)
    if old is not None and canonical(old) == canonical(spec):
        return Change(path, model, What.UNCHANGED)
    origins = [source for source, to in renamed.items() if to == path]
    return Change(path, model, What.CHANGED, f"renamed from {origins[0]}" if origins else "")


def _problem(file: SpecFile, spec: Parsed, floors: Floors) -> str | None:
    if isinstance(spec, SpecError):
        return str(spec)
    try:
        check_floors(spec, floors)
    except SpecError as error:
        return f"{file.path}: {error}"
    return None


def _renamed(push: Push, repository: Repository) -> Mapping[str, str]:
    """New path by old path, where git finds the contents similar."""
    gone = any(each.new is None for each in push.differences)
    if push.old is None or not gone:
        return {}
    output = repository.read(
        "diff-tree", "-r", "-z", "-M", "--diff-filter=R", "--name-status", "--no-ext-diff",
        push.old, push.commit, "--", f"{repository.models}/",
    )  # fmt: skip
    words = (output or b"").decode("utf-8", "backslashreplace").split("\0")
    pairs = dict(zip(words[1::3], words[2::3], strict=False))  # after each pair's status
    specs = {each.path for each in push.differences}
    return {old: new for old, new in pairs.items() if old in specs and new in specs}
