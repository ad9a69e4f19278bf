"""The `llmops` command line."""

from __future__ import annotations

import getpass
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from llmops_assets import __version__
from llmops_assets.errors import EvidenceError, LLMOpsError, ReleaseError
from llmops_assets.evidence import waivers
from llmops_assets.evidence.attest import APPROVERS_FILE
from llmops_assets.evidence.verdicts import State
from llmops_assets.policy import check_floors, read_policy
from llmops_assets.release import Release
from llmops_assets.settings import Settings, get_settings
from llmops_assets.spec import json_schema, read_spec

if TYPE_CHECKING:
    from llmops_assets.local.releasing import Recorded, SigningKey
    from llmops_assets.platform import Platform

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


class AuditCommands(click.Group):
    """`llmops audit RELEASE` and `llmops audit --serving ...` beside its subcommands.

    What is not the name of a subcommand belongs to `show`; a release's key has a dot, which
    no subcommand has.
    """

    DEFAULT = "show"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named or not args else [self.DEFAULT, *args])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "RELEASE [OPTIONS]")
        formatter.write_usage(ctx.command_path, "--serving ENVIRONMENT --model M --at TIME")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands[self.DEFAULT].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """The life of a language model, from spec to archive.

    \b
    A first tour:   llmops demo
    Every day:      llmops up, llmops release MODEL, llmops approve RELEASE, llmops status
    What goes on:   llmops triggers, llmops gates RELEASE
    At night:       llmops rollback MODEL --reason WHY
    For an audit:   llmops audit RELEASE, llmops diff A B

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
    """What runs, what answers, and what serves.

    Exit code 1: something does not answer, or is not as the signed routes say.
    """
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
            for difference in program.differences:
                click.echo(f"    drift: {difference}")
    if not all(program.ready and not program.differences for program in programs):
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


@main.command()
@click.option(
    "--socket",
    "socket_path",
    required=True,
    type=click.Path(path_type=Path),
    help="Unix socket to listen on.",
)
@click.option(
    "--keys",
    "key_folder",
    type=click.Path(path_type=Path),
    help="Folder of the keys, made if there are none. Unset: LLMOPS_KEYS.",
)
@click.option(
    "--allow-uid", "users", type=int, multiple=True, help="User id that may ask, beside this one's."
)
def signer(socket_path: Path, key_folder: Path | None, users: tuple[int, ...]) -> None:
    """Hold the keys and sign for others, as a user of its own."""
    import logging

    from llmops_assets.evidence.signer_process import serve

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    serve(socket_path, key_folder or get_settings().key_folder, users)


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
    """Check FILES: specs, waivers, approvers.yaml, or folders of specs with these.

    A spec must also be at least as strict as the policy's floors. Exit code 1 when one is
    not valid; all mistakes name their lines.
    """
    from llmops_assets.deploy import approvers

    broken = False
    policy = read_policy(get_settings().policy)
    for file in (found for given in files for found in _spec_files(given)):
        try:
            if file.parent.name == waivers.FOLDER:
                waiver = waivers.read_waiver(file, policy.longest_waiver_days)
                if waiver.expired:
                    click.echo(f"{file} expired at {waiver.expires:%F %R %Z}; delete it")
            elif file.name == APPROVERS_FILE:
                approvers.read_policy_file(file)
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
@click.argument("release_key", metavar="RELEASE", required=False)
@click.option("--reason", required=True, help="Why; it goes into the record.")
@click.option("--reject", is_flag=True, help="Decide against the release.")
@click.option(
    "--key",
    "key_file",
    envvar="LLMOPS_APPROVER_KEY",
    type=click.Path(path_type=Path),
    default=Path("~/.ssh/id_ed25519"),
    show_default=True,
    help="Your OpenSSH Ed25519 key; a .pub file: the ssh-agent signs.",
)
@click.option("--days", type=click.FloatRange(min=0, min_open=True),
              help="How long it counts. Unset: as settings and policy say.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False),
              help="Write the signed decision to a file, and record nothing.")  # fmt: skip
@click.option("--policy", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="In place of RELEASE: sign this new version of approvers.yaml.")  # fmt: skip
@click.option("--approver", help="Decide unsigned, in this name. Counts only without a policy of "
              "approvers; not whoever asked for the release.")  # fmt: skip
@click.option(
    "--package-digest", help="The package that the decision is about. Unset: the one in the store."
)
def approve(
    release_key: str | None,
    reason: str,
    reject: bool,
    key_file: Path,
    days: float | None,
    output: Path | None,
    policy: Path | None,
    approver: str | None,
    package_digest: str | None,
) -> None:
    """Decide about RELEASE; a trigger then puts what was approved into production.

    The decision is signed with your key. What it binds, and who may decide what, is in
    docs/approvals.md.

    It returns at once; `llmops promote` starts the run itself and waits.
    Exit code 1: it was recorded, and promotes nothing (yet).
    """
    from llmops_assets.local import releasing

    key = releasing.SigningKey(key_file, lambda: click.prompt("Passphrase", hide_input=True))
    if policy is not None:
        if release_key is not None or approver is not None or output is not None or reject:
            raise click.UsageError("--policy goes with --reason and --key alone")
        signed = releasing.sign_policy_file(get_settings(), policy, key, reason)
        click.echo(f"signed {policy}; commit it together with {signed}")
        return
    if release_key is None:
        raise click.UsageError("name a RELEASE, or --policy FILE")
    Release.parse(release_key)
    if approver is None:
        _approve_signed(release_key, key, reason, reject, package_digest, days, output)
        return
    if days is not None or output is not None:
        raise click.UsageError("--days and --output are of signed decisions, without --approver")
    decision = releasing.Decision(
        approver=approver,
        reason=reason,
        approve=not reject,
        package=package_digest or releasing.package_digest(get_settings(), release_key),
    )
    recorded = releasing.record_decision(get_settings(), release_key, decision)
    click.echo(f"{approver} {'rejected' if reject else 'approved'} {release_key}: {reason}")
    click.echo(f"package {decision.package}")
    _show_recorded(release_key, recorded, reject)


def _approve_signed(
    release: str,
    key: SigningKey,
    reason: str,
    reject: bool,
    package: str | None,
    days: float | None,
    output: Path | None,
) -> None:
    from llmops_assets.deploy.signed_decision import read_signed
    from llmops_assets.local import releasing

    envelope = releasing.sign_release_decision(
        get_settings(), release, key, reason, approve=not reject, about=package, days=days
    )
    signed = read_signed(envelope)
    click.echo(f"{signed.approver} {'rejected' if reject else 'approved'} {release}: {reason}")
    click.echo(f"package {signed.package}")
    click.echo(f"key     {envelope.signatures[0].keyid}")
    click.echo(f"until   {signed.expires:%F %T} UTC")
    if output is not None:
        output.write_text(envelope.model_dump_json(indent=2) + "\n", encoding="utf-8")
        click.echo(f"{output} is to be committed to approvals/ on the protected ref, or pasted "
                   "into `envelope` in the launchpad of promote")  # fmt: skip
        return
    _show_recorded(release, releasing.record_signed_decision(get_settings(), envelope), reject)


def _show_recorded(release: str, recorded: Recorded, reject: bool) -> None:
    click.echo(f"record  {recorded.digest}")
    if recorded.objection is not None:
        click.echo(f"it promotes nothing: {recorded.objection}", err=True)
        sys.exit(EXIT_FAILED)
    if not reject:
        click.echo("The trigger `approval` promotes it. To watch: `llmops triggers`, "
                   f"`llmops gates {release}`, {_client(None, None).url}/runs")  # fmt: skip


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
@click.option(
    "--environment",
    type=click.Choice(["production", "staging"]),
    default="production",
    show_default=True,
)
@click.option(
    "--set",
    "shares",
    multiple=True,
    metavar="RELEASE=WEIGHT",
    help="Share of the traffic, per cent; once for each release. They add up to 100.",
)
@click.option("--reason", help="Of --set: why; it goes into the record.")
@click.option("--dry-run", is_flag=True, help="Of --set: say what would change.")
@click.option("--yes", is_flag=True, help="Of --set: do not ask.")
@click.option("--deep", is_flag=True, help="Read every byte in the slots as well.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
def route(
    model: str,
    environment: str,
    shares: tuple[str, ...],
    reason: str | None,
    dry_run: bool,
    yes: bool,
    deep: bool,
    as_json: bool,
) -> None:
    """What serves MODEL: generation, since when, by whom, why, and each slot with its share.

    With --set it changes the shares, between releases that are loaded, verified, approved and
    not revoked, if nobody else changed the route since it was shown. Exit code 1: something is
    not as it is recorded, or the answer was no; 2: refused.
    """
    from llmops_assets.local.production import opened
    from llmops_assets.operate import traffic, traffic_text
    from llmops_assets.serving.slots import Environment

    platform = opened(get_settings(), model)
    where = Environment(environment)
    if not shares:
        view = traffic.view(platform, where, model, deep=deep)
        if as_json:
            click.echo(view.model_dump_json(indent=2))
        else:
            for line in traffic_text.route_lines(view):
                click.echo(line)
        if view.differences:
            sys.exit(EXIT_FAILED)
        return
    if not (reason or "").strip() and not dry_run:
        raise click.UsageError("--set needs --reason")
    planned = traffic.plan_shares(platform, where, model, _shares(shares))
    for line in traffic_text.share_lines(planned):
        click.echo(line, err=as_json)
    if dry_run:
        return
    if not yes and not click.confirm(f"Change the {environment} route of {model}?", err=as_json):
        sys.exit(EXIT_FAILED)
    changed = traffic.set_shares(platform, planned, getpass.getuser(), str(reason))
    click.echo(changed.model_dump_json(indent=2) if as_json else traffic_text.changed_line(changed))
    if where is Environment.PRODUCTION:
        _show_in_dagster(changed)


def _shares(given: tuple[str, ...]) -> dict[str, int]:
    shares: dict[str, int] = {}
    for text in given:
        release_key, _, weight = text.rpartition("=")
        if not release_key or not weight.isascii() or not weight.isdigit():
            raise click.UsageError(f"{text!r} is not RELEASE=WEIGHT, such as parrot.v7=10")
        if release_key in shares:
            raise click.UsageError(f"{release_key} is there twice")
        shares[release_key] = int(weight)
    return shares


@main.command()
@click.argument("model")
@click.option(
    "--to",
    metavar="VERSION|RELEASE",
    help="One that had all traffic before; unset: the one that is still warm.",
)
@click.option("--reason", help="Why; it goes into the record.")
@click.option("--dry-run", is_flag=True, help="Check everything, and say what would happen.")
def rollback(model: str, to: str | None, reason: str | None, dry_run: bool) -> None:
    """Give MODEL's production traffic back to a release that served before, at once.

    It changes the route itself and waits for no run and no queue. What loses the traffic is
    revoked. A release that is not warm any more is loaded from the store first.
    """
    from llmops_assets.local import production

    if dry_run:
        for line in production.rehearse_rollback(get_settings(), model, to):
            click.echo(line)
        return
    if not (reason or "").strip():
        raise click.UsageError("Missing option '--reason': it goes into the record")
    done = production.roll_back_now(
        get_settings(), model, getpass.getuser(), str(reason), to, _step
    )
    serving = done.route.serving
    click.echo(
        f"{serving.release if serving else 'nothing'} serves {model} again: generation "
        f"{done.route.generation}, acknowledged by the gateway at {done.acknowledged:%T.%f} UTC"
    )
    _show_in_dagster(done.route)


def _show_in_dagster(changed: Any) -> None:
    """Shows a route that has moved already, whatever comes of showing it."""
    from llmops_assets.local.production import show_route

    if (problem := show_route(get_settings(), changed)) is not None:
        click.echo(f"warning: Dagster does not show it: {problem}", err=True)


@main.group()
def incident() -> None:
    """What went wrong with what serves, and what was done about it."""


@incident.command("list")
@click.argument("model", required=False)
@click.option("--all", "closed_too", is_flag=True, help="Also those that are closed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
def incident_list(model: str | None, closed_too: bool, as_json: bool) -> None:
    """Open incidents, of MODEL or of all models, oldest first, with their times.

    Exit code 1: one is open.
    """
    from llmops_assets.local.production import opened
    from llmops_assets.operate.incidents import all_incidents, incidents_of_model
    from llmops_assets.operate.traffic_text import incident_json, incident_lines

    evidence = opened(get_settings(), model).evidence
    found = list(all_incidents(evidence) if model is None else incidents_of_model(evidence, model))
    shown = [each for each in found if closed_too or each.answered is None]
    if as_json:
        click.echo(json.dumps([incident_json(each) for each in shown], indent=2))
    else:
        for each in shown:
            for line in incident_lines(each):
                click.echo(line)
    if any(each.answered is None for each in found):
        sys.exit(EXIT_FAILED)


@incident.command("note")
@click.argument("incident_id", metavar="ID")
@click.argument("text")
def incident_note(incident_id: str, text: str) -> None:
    """Add TEXT to incident ID, for good. The beginning of the id is enough."""
    from llmops_assets.local.production import opened
    from llmops_assets.operate.incidents import add_note, find_incident

    evidence = opened(get_settings()).evidence
    note = add_note(evidence, find_incident(evidence, incident_id), getpass.getuser(), text)
    click.echo(f"noted on {note.incident}")


@incident.command("close")
@click.argument("incident_id", metavar="ID")
@click.option("--reason", required=True, help="Why nothing else is to be done.")
def incident_close(incident_id: str, reason: str) -> None:
    """Answer incident ID: nothing else is to be done about it."""
    from llmops_assets.local.production import opened
    from llmops_assets.operate.incidents import add_note, find_incident

    evidence = opened(get_settings()).evidence
    found = find_incident(evidence, incident_id)
    note = add_note(evidence, found, getpass.getuser(), reason, closes=True)
    click.echo(f"closed {note.incident}")


@main.group(cls=AuditCommands)
def audit() -> None:
    """Everything on record of RELEASE, from signed statements; or what served at a time.

    TIME is ISO 8601, such as "2026-11-17 14:05" or 2026-11-17T14:05:00Z; without a zone it is
    this machine's local time. Exit code 1: the evidence does not hold.
    """


@audit.command(hidden=True)
@click.argument("release_key", metavar="RELEASE", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
@click.option(
    "--html",
    "html_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page for a browser, one file that needs no network.",
)
@click.option(
    "--annex-iv",
    "annex_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write EU AI Act Annex IV as far as known; JSON for *.json, else Markdown.",
)
@click.option("--as-of", metavar="TIME", help="As things were on record at this time.")
@click.option(
    "--serving",
    type=click.Choice(["staging", "production"]),
    help="Show what served in this environment in place of a release.",
)
@click.option("--model", help="Of --serving: the model.")
@click.option("--at", metavar="TIME", help="Of --serving: when; unset: now.")
def show(
    release_key: str | None,
    as_json: bool,
    html_file: Path | None,
    annex_file: Path | None,
    as_of: str | None,
    serving: str | None,
    model: str | None,
    at: str | None,
) -> None:
    """The same as `llmops audit RELEASE`."""
    if serving is not None:
        if model is None or release_key is not None:
            raise click.UsageError("--serving needs --model, and no RELEASE")
        if html_file or annex_file or as_of:
            raise click.UsageError("--html, --annex-iv and --as-of are of a RELEASE")
        _show_serving(serving, model, at, as_json)
        return
    if release_key is None or model is not None or at is not None:
        raise click.UsageError("name a RELEASE; or --serving ENVIRONMENT --model M --at TIME")
    _show_release(release_key, as_json, html_file, annex_file, as_of)


def _show_release(
    release: str, as_json: bool, html_file: Path | None, annex_file: Path | None, as_of: str | None
) -> None:
    from llmops_assets.reports.annex_iv import annex_iv
    from llmops_assets.reports.audit import audit
    from llmops_assets.reports.audit_page import html
    from llmops_assets.reports.audit_text import page

    record = audit(_installation(), release, None if as_of is None else _time(as_of))
    if html_file is not None:
        _written(html_file, html(record))
    if annex_file is not None:
        annex = annex_iv(record)
        is_json = annex_file.suffix == ".json"
        _written(annex_file, annex.model_dump_json(indent=2) if is_json else annex.markdown())
    if as_json:
        click.echo(record.model_dump_json(indent=2))
    elif html_file is None and annex_file is None:
        for line in page(record, colour=sys.stdout.isatty()):
            click.echo(line)
    if not record.integrity.holds:
        if html_file is not None or annex_file is not None:
            click.echo("error: the evidence does not hold: "
                       + "; ".join(record.integrity.problems), err=True)  # fmt: skip
        sys.exit(EXIT_FAILED)


def _show_serving(environment: str, model: str, at: str | None, as_json: bool) -> None:
    from llmops_assets.reports.serving_at import lines, serving_at
    from llmops_assets.serving.slots import Environment

    time = datetime.now(UTC) if at is None else _time(at)
    found = serving_at(_installation(), Environment(environment), model, time)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        for line in lines(found):
            click.echo(line)


def _time(text: str) -> datetime:
    """A time that somebody typed; says so where it was taken as local."""
    from llmops_assets.reports.serving_at import has_zone, read_time

    time = read_time(text)
    if not has_zone(text):
        click.echo(f"{text} is taken as local time: {time:%Y-%m-%d %H:%M:%S %Z} is "
                   f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC", err=True)  # fmt: skip
    if time > datetime.now(UTC):
        raise click.UsageError(f"{text} is in the future, of which nothing is on record")
    return time


def _written(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise click.FileError(str(path), error.strerror) from error
    click.echo(f"written: {path}", err=True)


@main.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
def diff(first: str, second: str, as_json: bool) -> None:
    """What differs between releases A and B, and nothing else.

    Spec, code, data, weights, toolchain, engine, files of the package, gates, approvals and
    serving. Exit code 0: nothing differs but key, times and people; 1: something does; 2: it
    could not be found out.
    """
    from llmops_assets.reports.release_difference import difference, lines

    found = difference(_installation(), first, second)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        for line in lines(found):
            click.echo(line)
    if not found.equal:
        sys.exit(EXIT_FAILED)


@main.command()
@click.argument("subject", metavar="BUNDLE|RELEASE")
@click.option(
    "--root",
    envvar="LLMOPS_TRUST_ROOT",
    help="Fingerprint of the trust root, from the platform's operator. Unset: of this "
    "installation's own.",
)
@click.option("--require-anchor", is_flag=True, help="Fail unless somebody else vouches for it.")
@click.option(
    "--anchor-git", multiple=True, help="Git repository that `llmops anchor --git` wrote to."
)
@click.option("--anchor-ref", default="refs/heads/llmops-evidence", show_default=True)
@click.option(
    "--timestamp-certificates",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="PEM file with the certificates of the time stamping authority.",
)
@click.option(
    "--approvers",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the approvers' OpenSSH public keys, one a line.",
)
@click.option("--deep", is_flag=True, help="Of a RELEASE: hash its artifacts as well.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
def verify(
    subject: str,
    root: str | None,
    require_anchor: bool,
    anchor_git: tuple[str, ...],
    anchor_ref: str,
    timestamp_certificates: Path | None,
    approvers: Path | None,
    deep: bool,
    as_json: bool,
) -> None:
    """Check a BUNDLE of `llmops audit export`, or a RELEASE on this installation.

    Of a bundle nothing but the trust root's fingerprint is needed: no network, no settings, no
    store. Exit code 0: it holds; 1: it does not, the lines with FAILED say what; 2: it could
    not be checked.
    """
    from llmops_assets.evidence.anchors import held_in_git, read_certificates
    from llmops_assets.evidence.verification import verify_bundle
    from llmops_assets.evidence.witnesses import GitWitness, Witnesses, read_approvers

    def read(file: Path | None, reader: Callable[[bytes, str], tuple[Any, ...]]) -> tuple[Any, ...]:
        return () if file is None else reader(file.read_bytes(), str(file))

    witnesses = Witnesses(
        certificates=read(timestamp_certificates, read_certificates),
        git=tuple(
            GitWitness(f"{repository} {anchor_ref}", held_in_git(repository, anchor_ref))
            for repository in anchor_git
        ),
        approvers=read(approvers, read_approvers),
    )
    bundle = Path(subject)
    if not bundle.is_file():
        _check_release_key(subject)
        _installation()
    fingerprint, whose = _fingerprint(root)
    if bundle.is_file():
        found = verify_bundle(
            bundle.read_bytes(), fingerprint, witnesses, require_anchor=require_anchor
        )
    else:
        found = _verify_release(subject, fingerprint, witnesses, require_anchor, deep)
    if as_json:
        document = {"holds": found.holds, **found.model_dump(mode="json")}
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo(f"trust root {fingerprint}, {whose}")
        for check in found.checks:
            mark = {True: "ok", False: "FAILED", None: "-"}[check.holds]
            click.echo(f"{mark:<7} {check.name}: {check.detail}")
        if found.holds:
            click.echo(f"complete up to {found.complete_up_to}")
    if not found.holds:
        sys.exit(EXIT_FAILED)


def _fingerprint(given: str | None) -> tuple[str, str]:
    """Of the trust root to verify against, and where it is from."""
    from llmops_assets.evidence.keys import TRUST_ROOT, read_trust_root
    from llmops_assets.storage.store import DIGEST

    if given is not None:
        fingerprint = f"sha256:{given.removeprefix('sha256:')}"
        if DIGEST.fullmatch(fingerprint) is None:
            raise click.UsageError(
                f"{given!r} is no fingerprint, which is sha256: and 64 hex digits. Ask the "
                "platform's operator, to whom `llmops audit export` and `llmops verify RELEASE` "
                f"print it. `sha256sum` is right for the {TRUST_ROOT} of a bundle, not for that "
                "of a key folder, which is formatted for people"
            )
        return fingerprint, "as given"
    folder = get_settings().key_folder
    if not (folder / TRUST_ROOT).exists():
        raise click.UsageError(
            "there is no trust root to verify against. Ask the platform's operator for its "
            f"fingerprint, by another way than the bundle came (`sha256sum` of the bundle's "
            f"{TRUST_ROOT} is what it must equal), and pass it with --root or LLMOPS_TRUST_ROOT"
        )
    return read_trust_root(folder).fingerprint, f"this installation's own in {folder}"


def _check_release_key(subject: str) -> None:
    try:
        Release.parse(subject)
    except ReleaseError as error:
        raise click.UsageError(
            f"{subject}: there is no such file, and no release key looks like this"
        ) from error


def _installation() -> Platform:
    """The platform in the state folder, for who only looks.

    Raises:
        EvidenceError: there is none; nothing was made.
    """
    from llmops_assets.evidence.keys import TRUST_ROOT
    from llmops_assets.evidence.log import LOG
    from llmops_assets.platform import Platform

    values = get_settings()
    # By its folder: opening a store makes one.
    signs = (values.key_folder / TRUST_ROOT, values.store / "logs" / LOG)
    if not any(path.exists() for path in signs):
        raise EvidenceError(
            f"There is no installation in {values.state.absolute()}",
            expected="the state folder of a platform that was started",
            found="neither a trust root nor an evidence log",
            cure="set LLMOPS_STATE to it (and LLMOPS_KEYS, if its keys are elsewhere)",
        )
    return Platform(values)


def _verify_release(
    release_key: str, fingerprint: str, witnesses: Any, require_anchor: bool, deep: bool
) -> Any:
    from llmops_assets.evidence.keys import read_trust_root
    from llmops_assets.evidence.live_verification import verify_release

    key = Release.parse(release_key).key
    own = read_trust_root(get_settings().key_folder).fingerprint
    if own != fingerprint:
        raise click.UsageError(f"this installation has another trust root: {own}")
    with _progress() as progress:
        return verify_release(
            _installation(),
            key,
            witnesses,
            require_anchor=require_anchor,
            deep=deep,
            progress=progress,
        )


@main.command()
@click.option("--git", "repository", help="Git repository, as `git clone` takes it.")
@click.option("--ref", default="refs/heads/llmops-evidence", show_default=True)
@click.option("--timestamp", "url", help="URL of a time stamping authority (RFC 3161).")
def anchor(repository: str | None, ref: str, url: str | None) -> None:
    """Put the head of the evidence log where whoever writes the store cannot take it back.

    Run it every day: what came before an anchor cannot be rewritten unseen, not even with the
    key. It fails, and that is the alarm, if the repository holds a head that is not of this log.
    """
    from llmops_assets.evidence.anchors import anchor_in_git, anchor_with_time_stamp
    from llmops_assets.platform import Platform

    if repository is None and url is None:
        raise click.UsageError("name a place: --git REPOSITORY or --timestamp URL")
    values = get_settings()
    evidence = Platform(values).evidence
    made = []
    if repository is not None:
        made.append(anchor_in_git(evidence, repository, ref))
    if url is not None:
        seconds = values.http_timeout_seconds
        made.append(anchor_with_time_stamp(evidence, url, timeout_seconds=seconds))
    for entry in made:
        anchored = entry.statement.predicate
        click.echo(
            f"{anchored['kind']} {anchored['place']}: the log's first {anchored['size']} entries, "
            f"entry {entry.sequence}"
        )


@audit.command("export")
@click.argument("releases", nargs=-1, required=True, metavar="RELEASE...")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write. Unset: evidence-RELEASE.zip.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def audit_export(releases: tuple[str, ...], output: Path | None, force: bool) -> None:
    """Write all evidence about the RELEASEs into one file, for `llmops verify`.

    The export itself becomes evidence. Weights and data are not in it, only their digests.
    """
    from llmops_assets.evidence import export

    platform = _installation()
    path = output or Path(f"evidence-{releases[0]}.zip")
    export.check_free(path, force=force)
    with _progress() as progress:
        content = export.export(platform, releases, getpass.getuser(), progress)
    export.write_bundle(content, path, force=force)
    fingerprint, _ = _fingerprint(None)
    click.echo(f"{path}: {len(content)} bytes")
    click.echo(f"To check it: llmops verify {path} --root {fingerprint}")
    click.echo("Give the fingerprint to the verifier by another way than the file.")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the terminal for each thing that is done; nothing where there is none."""
    with ExitStack() as stack:
        shown: dict[str, Any] = {}

        def progress(what: str, done: int, of: int) -> None:
            if what not in shown:
                stack.close()
                bar = click.progressbar(length=of, label=what, file=sys.stderr)
                shown[what] = stack.enter_context(bar)
            shown[what].update(done - shown[what].pos)

        yield progress if sys.stderr.isatty() else lambda what, done, of: None


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
