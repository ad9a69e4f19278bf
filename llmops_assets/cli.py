"""The `llmops` command line."""

from __future__ import annotations

import getpass
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click

from llmops_assets import __version__
from llmops_assets.errors import LLMOpsError
from llmops_assets.evidence import waivers
from llmops_assets.evidence.verdicts import State
from llmops_assets.policy import check_floors, read_policy
from llmops_assets.release import Release
from llmops_assets.settings import Settings, get_settings
from llmops_assets.spec import json_schema, read_spec

EXIT_FAILED = 1
EXIT_ERROR = 2
EXIT_UNKNOWN = 3
"""The run was submitted, but its outcome is not known."""
EXIT_INTERRUPTED = 130


class Commands(click.Group):
    """Shows errors with a known cure as one message, in place of a stack trace."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LLMOpsError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(EXIT_ERROR)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """The life of a language model, from spec to archive.

    \b
    A first tour:   llmops demo
    Every day:      llmops up, llmops release MODEL, llmops approve RELEASE, llmops status
    What goes on:   llmops triggers, llmops gates RELEASE
    At night:       llmops rollback MODEL --reason WHY

    Settings are environment variables; `llmops settings` lists them.
    """


@main.command()
def up() -> None:
    """Start the local stack: Dagster, MLflow, the gateway, and what served before."""
    from llmops_assets.local import stack

    info = stack.up(get_settings(), _step)
    for problem in info.problems:
        click.echo(f"problem: {problem}", err=True)
    click.echo(f"Dagster  {info.endpoints.dagster_url}")
    click.echo(f"MLflow   {info.endpoints.mlflow_url}")
    click.echo(
        f"Gateway  {info.endpoints.gateway_url} (staging {info.endpoints.staging_gateway_url})"
    )
    if info.problems:
        sys.exit(EXIT_FAILED)


@main.command()
def down() -> None:
    """Stop everything of the local stack. What it keeps stays in the state folder."""
    from llmops_assets.local import stack

    stack.down(get_settings(), _step)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
def status(as_json: bool) -> None:
    """What runs, what answers, and what serves. Exit code 1 when something does not answer."""
    from dataclasses import asdict

    from llmops_assets.local import stack

    programs = stack.status(get_settings())
    if as_json:
        click.echo(json.dumps([asdict(program) for program in programs], indent=2))
    else:
        for program in programs:
            mark = "ready" if program.ready else "running" if program.running else "down"
            uptime = f"{program.uptime_seconds:.0f} s" if program.uptime_seconds else "-"
            click.echo(
                f"{program.name:<42} {mark:<8} port {program.port or '-':<6} "
                f"up {uptime:<9} {program.detail}"
            )
    if not all(program.ready for program in programs):
        sys.exit(EXIT_FAILED)


@main.command()
@click.argument("program", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on with new lines until Ctrl-C.")
@click.option("--lines", "-n", default=50, show_default=True, help="Last lines to begin with.")
def logs(program: str | None, follow: bool, lines: int) -> None:
    """Logs of the stack's servers; PROGRAM is a name from `llmops status`."""
    from llmops_assets.local import stack

    for line in stack.logs(get_settings(), program, follow, lines):
        click.echo(line)


@main.command()
def settings() -> None:
    """The effective settings, with the variable of each and what it means."""
    values = get_settings()
    for name, field in Settings.model_fields.items():
        value = re.sub(r"//[^/@\s]*@", "//***@", str(getattr(values, name)))  # of a URL
        click.echo(f"LLMOPS_{name.upper()}={value}\n    {field.description}")


@main.group()
def spec() -> None:
    """Model specs: their schema, and whether a file is a valid one."""


@spec.command()
def schema() -> None:
    """Print the JSON Schema of a model spec, for editors and CI."""
    click.echo(json.dumps(json_schema(), indent=2))


@spec.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def validate(files: tuple[Path, ...]) -> None:
    """Check FILES: specs, waivers, or folders of specs with their waivers.

    A spec must also be at least as strict as the policy's floors. Exit code 1 when one is
    not valid; all mistakes name their lines.
    """
    broken = False
    policy = read_policy(get_settings().policy)
    for file in (found for given in files for found in _spec_files(given)):
        try:
            if file.parent.name == waivers.FOLDER:
                waiver = waivers.read_waiver(file, policy.longest_waiver_days)
                if waiver.expired:
                    click.echo(f"{file} expired at {waiver.expires:%F %R %Z}; delete it")
            else:
                check_floors(read_spec(file), policy.floors)
        except LLMOpsError as error:
            broken = True
            click.echo(f"error: {error}", err=True)
        else:
            click.echo(f"ok: {file}")
    if broken:
        sys.exit(EXIT_FAILED)


def _spec_files(given: Path) -> list[Path]:
    """A file itself, with the waivers beside a spec; all of a folder of specs."""
    folder = given if given.is_dir() else given.parent
    specs = sorted(given.glob("*.yaml")) if given.is_dir() else [given]
    if not specs:
        raise click.UsageError(f"{given} holds no spec: there is no *.yaml in it")
    beside = sorted((folder / waivers.FOLDER).glob("*.yaml"))
    return list(dict.fromkeys([*specs, *beside]))


_SERVER = (
    click.option(
        "--url", envvar="LLMOPS_DAGSTER_URL", help="Dagster's address; the local one if unset."
    ),
    click.option(
        "--token",
        envvar="LLMOPS_DAGSTER_TOKEN",
        help="Bearer token of its proxy. Better in LLMOPS_DAGSTER_TOKEN: others on this machine "
        "can read a command's arguments.",
    ),
)


def _submits(function: Callable[..., None]) -> Callable[..., None]:
    """Options that all commands share which submit a run to Dagster."""
    for option in (
        click.option(
            "--wait/--no-wait",
            default=True,
            show_default=True,
            help="Show what the run does and exit with its outcome.",
        ),
        *_SERVER,
    ):
        function = option(function)
    return function


def _asks(function: Callable[..., None]) -> Callable[..., None]:
    """Options of a command that asks Dagster something."""
    for option in _SERVER:
        function = option(function)
    return function


@main.command()
@click.argument("model_or_release", metavar="MODEL|RELEASE")
@click.option(
    "--commit",
    help="Take the spec as it stood at this git revision, and name the release after it.",
)
@click.option(
    "--requested-by",
    envvar="LLMOPS_REQUESTED_BY",
    help="Who asks for it, and so cannot approve it; unset: the user of this machine.",
)
@_submits
def release(
    model_or_release: str,
    commit: str | None,
    requested_by: str | None,
    wait: bool,
    url: str | None,
    token: str | None,
) -> None:
    """Make a release of MODEL: from its spec to staging, through every gate.

    It costs only what changed since earlier releases. With a RELEASE that failed half-way
    it goes on where that stopped.

    CI names the --commit: the trigger on git pushes then means the same release, and
    whoever comes second follows the first one's run. Exit code 0: in staging; 1: a gate or
    a step failed; 2: it could not be submitted; 3: it was, but Dagster stopped answering.
    """
    from llmops_assets.local import releasing

    if "/" in model_or_release or model_or_release.endswith((".yaml", ".yml")):
        raise click.UsageError(
            f"{model_or_release} is a file; name the model, as {Path(model_or_release).stem}"
        )
    revision = None
    if commit is not None:
        revision = releasing.full_commit(get_settings(), commit, elsewhere=url is not None)
    named_after_commit = False
    if "." in model_or_release:
        key = Release.parse(model_or_release).key
    elif revision is not None:
        key = Release.from_commit(model_or_release, revision).key
        named_after_commit = True
    else:
        key = Release.by_hand(model_or_release, datetime.now(UTC)).key
        if url is None:
            # A mistake in the spec is found before a run is queued.
            spec = read_spec(get_settings().models / f"{model_or_release}.yaml")
            check_floors(spec, read_policy(get_settings().policy).floors)
    client = _client(url, token)
    # By its key somebody asks for a release again on purpose, such as to fill its slot.
    submission = releasing.submit_release(
        client, key, requested_by or getpass.getuser(), revision, again=not named_after_commit
    )
    click.echo(f"release {key}: {submission.standing}, {client.run_url(submission.run)}")
    next_step = f"llmops approve {key} --approver NAME --reason WHY"
    success = f"{key} is in staging. Next: {next_step}"
    if submission.standing == releasing.Standing.IN_STAGING:
        click.echo(success)
    elif wait:
        _exit_with(client, submission.run, success)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
@_asks
def triggers(as_json: bool, url: str | None, token: str | None) -> None:
    """What starts runs by itself: state, last event and action, next tick of each.

    Exit code 1 when a trigger's last tick failed, or Dagster's daemon does not run.
    """
    from llmops_assets.triggers.board import table

    board = _client(url, token).triggers()
    if as_json:
        click.echo(board.model_dump_json(indent=2))
    else:
        for line in table(board, datetime.now(UTC)):
            click.echo(line)
    if not board.works:
        sys.exit(EXIT_FAILED)


@main.command()
@click.argument("release_key", metavar="RELEASE|MODEL")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
def gates(release_key: str, as_json: bool) -> None:
    """How RELEASE stands with each decision gate, and what to do next.

    Of a MODEL it lists the releases, oldest first.

    Passed, failed, undecided (not enough data to say), waived, missing (not judged yet) or
    stale (judged about other bytes, under another policy, or beside another serving
    release). Exit code 1 when a judged gate does not let the release go on.
    """
    from llmops_assets.evidence.board import board_of
    from llmops_assets.platform import Platform

    platform = Platform(get_settings())
    if "." not in release_key:
        for release in platform.columns.releases(release_key):
            click.echo(release)
        return
    board = board_of(platform, Release.parse(release_key).key)
    if as_json:
        click.echo(board.model_dump_json(indent=2))
    else:
        for row in board.rows:
            click.echo(f"{row.gate:<22} {row.state:<10} {row.reason}")
        for row in board.closed:
            click.echo(f"to do, {row.owner}: {row.next_action} ({row.gate})")
        if not board.closed and (missing := [r for r in board.rows if r.state == State.MISSING]):
            click.echo(f"next: {missing[0].gate}, on {missing[0].asset}")
    if board.closed:
        sys.exit(EXIT_FAILED)


@main.command()
@click.argument("release_key", metavar="RELEASE")
@click.option("--approver", required=True, help="Who decides; not whoever asked for the release.")
@click.option("--reason", required=True, help="Why; it goes into the record.")
@click.option("--reject", is_flag=True, help="Decide against the release.")
@click.option(
    "--package-digest", help="The package that the decision is about. Unset: the one in the store."
)
def approve(
    release_key: str, approver: str, reason: str, reject: bool, package_digest: str | None
) -> None:
    """Record a decision about RELEASE; a trigger then puts what was approved into production.

    It returns at once; `llmops promote` decides as well, starts the run itself and waits.
    Exit code 1: it was recorded, and does not count.
    """
    from llmops_assets.local import releasing

    Release.parse(release_key)
    decision = releasing.Decision(
        approver=approver,
        reason=reason,
        approve=not reject,
        package=package_digest or releasing.package_digest(get_settings(), release_key),
    )
    recorded = releasing.record_decision(get_settings(), release_key, decision)
    click.echo(f"{approver} {'rejected' if reject else 'approved'} {release_key}: {reason}")
    click.echo(f"package {decision.package}")
    click.echo(f"record  {recorded.digest}")
    if recorded.objection is not None:
        click.echo(f"it promotes nothing: {recorded.objection}", err=True)
        sys.exit(EXIT_FAILED)
    if not reject:
        click.echo("The trigger `approval` promotes it. To watch: `llmops triggers`, "
                   f"`llmops gates {release_key}`, {_client(None, None).url}/runs")  # fmt: skip


@main.command()
@click.argument("release_key", metavar="RELEASE")
@click.option("--approver", help="Who decides; not whoever asked for the release.")
@click.option("--reason", help="Why.")
@click.option("--reject", is_flag=True, help="Decide against the release.")
@click.option(
    "--package-digest", help="The package that the decision is about. Unset: the one in the store."
)
@_submits
def promote(
    release_key: str,
    approver: str | None,
    reason: str | None,
    reject: bool,
    package_digest: str | None,
    wait: bool,
    url: str | None,
    token: str | None,
) -> None:
    """Put RELEASE into production: a decision, a candidate in the idle slot, the route's move.

    Without --approver the decision that was recorded before is used.
    """
    from llmops_assets.local import releasing

    Release.parse(release_key)
    decides = reject or any(given is not None for given in (approver, reason, package_digest))
    if decides and not (approver and reason):
        raise click.UsageError("a decision needs both --approver and --reason")
    client = _client(url, token)
    decision = None
    if approver and reason:
        decision = releasing.Decision(
            approver=approver,
            reason=reason,
            approve=not reject,
            package=package_digest or releasing.package_digest(get_settings(), release_key),
        )
        click.echo(f"deciding about package {decision.package}")
    run = releasing.start_promotion(client, release_key, decision)
    click.echo(f"promoting {release_key}: {client.run_url(run)}")
    if wait:
        _exit_with(client, run, f"{release_key} serves in production.")


def _job_command(name: str, job: str, help_text: str, done: str) -> None:
    @main.command(name, help=help_text)
    @click.argument("release_key", metavar="RELEASE")
    @_submits
    def command(release_key: str, wait: bool, url: str | None, token: str | None) -> None:
        Release.parse(release_key)
        client = _client(url, token)
        run = client.launch(job, release_key)
        click.echo(f"{name} {release_key}: {client.run_url(run)}")
        if wait:
            _exit_with(client, run, f"{release_key} {done}.")


# Command, job, help, what is true afterwards.
for _command in (
    (
        "observe",
        "observe",
        "Read metrics and incidents of RELEASE while it serves.",
        "was observed",
    ),
    ("deprecate", "deprecate", "Take RELEASE off all routes; it must not serve.", "is deprecated"),
    ("archive", "archive_release", "Put deprecated RELEASE into cold storage.", "is archived"),
    ("remove", "remove", "Remove archived RELEASE from Triton.", "is removed"),
):
    _job_command(*_command)


@main.command()
@click.argument("model")
@click.option("--reason", required=True, help="Why; it goes into the record.")
def rollback(model: str, reason: str) -> None:
    """Give MODEL's production traffic back to the release before, at once.

    It changes the route itself and waits for no run and no queue.
    """
    from llmops_assets.local import releasing

    route = releasing.roll_back_now(get_settings(), model, getpass.getuser(), reason)
    click.echo(f"{route.serving.release if route.serving else 'nothing'} serves {model} again")
    # The route has moved, whatever comes of showing it.
    if (problem := releasing.show_route(get_settings(), route)) is not None:
        click.echo(f"warning: Dagster does not show it: {problem}", err=True)


@main.command()
def demo() -> None:
    """Start everything, make a release of the example model, and put it into production."""
    from llmops_assets.local.demo import run_demo

    sys.exit(0 if run_demo(get_settings(), click.echo) else EXIT_FAILED)


def _client(url: str | None, token: str | None) -> Any:
    from llmops_assets.local.releasing import client_for

    return client_for(get_settings(), url, token)


def _exit_with(client: Any, run: str, success: str) -> NoReturn:
    """Follows a run to its end, and exits with its outcome."""
    try:
        outcome = client.follow(run, click.echo)
    except KeyboardInterrupt:
        click.echo(
            f"\nStopped watching; the run goes on: {client.run_url(run)} (terminate it there)",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)
    except LLMOpsError as error:
        click.echo(f"lost sight of the run, which may go on: {client.run_url(run)}", err=True)
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_UNKNOWN)
    if outcome.succeeded:
        click.echo(success)
        sys.exit(0)
    for failure in outcome.failures:
        click.echo(f"failed: {failure}", err=True)
    sys.exit(EXIT_FAILED)


def _step(text: str) -> None:
    click.echo(f"  {text}")


if __name__ == "__main__":
    main()
