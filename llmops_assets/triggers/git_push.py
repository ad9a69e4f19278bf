"""The trigger on git pushes: a release of each spec that a push to the branch changed."""

import dagster as dg

from llmops_assets.develop import branch, pushes
from llmops_assets.develop.pushes import Push
from llmops_assets.develop.remote import Remote
from llmops_assets.jobs import asset_jobs
from llmops_assets.platform import Platform
from llmops_assets.settings import Settings
from llmops_assets.triggers.cursors import Cursor
from llmops_assets.triggers.requests import (
    RUNS_PER_TICK,
    outcome,
    release_run,
    run_tags,
    was_requested,
)

REVIEW = "review_push"
FILES_PER_TICK = 200
"""A push may touch all specs there are; so many are read in one tick."""


class GitPushCursor(Cursor):
    """How far the branch was followed."""

    repository: str
    """Digest of its address."""
    branch: str
    commit: str
    """The commit that is done with."""
    towards: str | None = None
    """The commit that is being worked on, when that takes several ticks."""
    done: str = ""
    """Path of the last spec on that way that was dealt with."""
    pushes: int = 0
    """How many were begun; it keeps apart the reviews of a commit that comes back."""


@dg.sensor(
    name="git_push",
    description=(
        "Follows the branch LLMOPS_GIT_BRANCH of LLMOPS_GIT_REPOSITORY. For each model whose "
        "spec a push changed it starts a release at the pushed commit; comments and formatting "
        "start nothing, a deleted spec deletes nothing. The job `review_push` then shows what "
        "the push did: a spec that is broken fails the check `specs_valid` of `pushed_specs` "
        "with file and line, and holds up no other. It begins with the commit that is there on "
        "its first tick. To switch it off, stop it here or unset LLMOPS_GIT_REPOSITORY; what "
        "was pushed meanwhile is caught up in one step when it goes on."
    ),
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    jobs=[job for job in asset_jobs if job.name in ("release", REVIEW)],
)
def git_push(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Asks for the releases of one push, in several ticks where they are many."""
    settings = platform.settings
    remote = Remote.of(settings)
    if remote is None:
        return dg.SkipReason(
            "LLMOPS_GIT_REPOSITORY is not set: pushes make no releases. Set it to a path or URL."
        )
    cursor = GitPushCursor.from_json(context.cursor)
    if cursor is None or (cursor.repository, cursor.branch) != (remote.key, remote.branch):
        head = branch.fetch(settings)
        begun = GitPushCursor(repository=remote.key, branch=remote.branch, commit=head)
        reason = f"Begins with what is there: {remote.branch} is at {head[:12]}."
        return dg.SensorResult(skip_reason=reason, cursor=begun.to_json())

    cursor = _towards(settings, cursor)
    if cursor.towards is None:
        return dg.SkipReason(f"{remote.branch} is still at {cursor.commit[:12]}.")
    push = pushes.push_between(settings, cursor.commit, cursor.towards)
    if not push.differences:
        reason = f"The push of {push.commit[:12]} changed no spec."
        return dg.SensorResult(skip_reason=reason, cursor=_finished(cursor, push).to_json())

    runs = [_review(cursor, push)] if not cursor.done else []
    left = [each for each in push.differences if each.path > cursor.done]
    for change in pushes.changes(platform, push, left[:FILES_PER_TICK]):
        if len(runs) == RUNS_PER_TICK:
            break
        release = pushes.release_of(change, push)
        if release is not None and not was_requested(context.instance, "release", release.key):
            runs.append(
                release_run(
                    release,
                    event=_event(push),
                    requested_by=branch.author(settings, push.commit),
                    config={"commit": push.commit},
                )
            )
        cursor = cursor.model_copy(update={"done": change.file})
    if cursor.done == push.differences[-1].path:
        cursor = _finished(cursor, push)
    return outcome(runs, cursor)


def _towards(settings: Settings, cursor: GitPushCursor) -> GitPushCursor:
    """The cursor with the commit to work on, if there is one."""
    if cursor.towards is not None and branch.obtain(settings, cursor.towards) is not None:
        return cursor
    if cursor.towards is None and branch.remote_head(settings) == cursor.commit:
        return cursor
    begun = {"towards": branch.fetch(settings), "done": "", "pushes": cursor.pushes + 1}
    return cursor.model_copy(update=begun)


def _finished(cursor: GitPushCursor, push: Push) -> GitPushCursor:
    return cursor.model_copy(update={"commit": push.commit, "towards": None, "done": ""})


def _event(push: Push) -> str:
    return f"push of {push.commit[:12]}"


def _review(cursor: GitPushCursor, push: Push) -> dg.RunRequest:
    config = {"commit": push.commit, "previous": cursor.commit}
    return dg.RunRequest(
        run_key=f"review:{cursor.pushes}:{push.commit}",
        job_name=REVIEW,
        run_config={"ops": {"pushed_specs": {"config": config}}},
        tags=run_tags(_event(push), "git_push"),
    )
