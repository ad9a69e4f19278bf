"""Who is behind a release, and so does not approve it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmops_assets.develop import branch
from llmops_assets.develop.freezing import frozen_source
from llmops_assets.errors import ApprovalError, LifecycleOrderError
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.serving.slots import Environment

COMMITS_AT_MOST = 1000
"""Of the commits since what serves, so many are asked for their authors."""


def people_behind(platform: Platform, release: str, started_by: str | None) -> Mapping[str, str]:
    """What each person has to do with a release, by every name that is known.

    Args:
        release: its key.
        started_by: who started the run that would deploy it, where that is known.

    Raises:
        ApprovalError: its commit is in no repository any more, so that its authors are unknown.
        TriggerError: the commit is not here, and LLMOPS_GIT_REPOSITORY does not answer.
    """
    people: dict[str, str] = {}
    if started_by is not None:
        people[started_by] = "started the run"
    people |= dict.fromkeys(_authors(platform, release), "wrote the change")
    asked = platform.columns.get(release, "model_spec").facts.get("requested_by")
    return people | {str(asked): "asked for the release"}


def _authors(platform: Platform, release: str) -> Iterator[str]:
    """Authors and committers of what is new since what serves, as far as it is known here.

    A mirror has one commit of each push. So of a push of several commits only the newest is
    known.
    """
    commit = frozen_source(platform, release).commit
    if commit is None:
        return
    settings = platform.settings
    if branch.obtain(settings, commit) is None:
        raise ApprovalError(
            f"Nobody can tell who wrote {release}: its commit {commit} is not here",
            expected="the commit that the release was made from",
            cure="push it again, or make a new release",
        )
    repository = branch.repository(settings)
    since = _serving_commit(platform, Release.parse(release).model)
    known = since is not None and since != commit and repository.resolve(since) is not None
    arguments = (f"--max-count={COMMITS_AT_MOST}", f"^{since}") if known else ("--max-count=1",)
    said = repository.ask("log", "--format=%an%n%ae%n%cn%n%ce", *arguments, commit)
    # Without what lies between, the release's own commit counts all the same.
    own = repository.ask("log", "--format=%an%n%ae%n%cn%n%ce", "--max-count=1", commit)
    yield from filter(None, dict.fromkeys(f"{said or ''}\n{own or ''}".splitlines()))


def _serving_commit(platform: Platform, model: str) -> str | None:
    route, _ = platform.routes.current(Environment.PRODUCTION, model)
    if route is None or route.serving is None:
        return None
    try:
        return frozen_source(platform, route.serving.release).commit
    except LifecycleOrderError:
        return None  # removed since
