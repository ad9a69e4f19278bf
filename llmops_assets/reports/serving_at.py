"""What answered at a time: the route that was in force, since when, until when, and by whom."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import AwareDatetime, Field

from llmops_assets.errors import EvidenceError, SettingsError
from llmops_assets.evidence.leaves import Entry, route_chain
from llmops_assets.evidence.log import EvidenceLog
from llmops_assets.platform import Platform
from llmops_assets.reports.audit import shares
from llmops_assets.reports.audit_record import Section, Share
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment


class Move(Section):
    """A change of the route."""

    generation: int
    actor: str
    reason: str
    time: datetime
    sequence: int = Field(description="Place in the evidence log.")


class ServingAt(Section):
    """What served a model in an environment at a time."""

    environment: Environment
    model: str
    at: AwareDatetime
    serving: tuple[Share, ...] = Field(description="What had traffic, most first; may be nothing.")
    warm: tuple[Share, ...] = Field(description="What was on the route without traffic.")
    moved: Move | None = Field(description="The change that gave these the traffic.")
    ended: Move | None = Field(description="The change that took it away; None: none so far.")
    commands: tuple[str, ...] = Field(description="What to ask next.")


def serving_at(platform: Platform, environment: Environment, model: str, at: datetime) -> ServingAt:
    """What served at a time, to the microsecond; a change is in force from its own time on.

    Args:
        at: with a time zone.

    Raises:
        EvidenceError: the routes' evidence does not hold, or the model never had a route there.
    """
    evidence, chain = platform.evidence, route_chain(environment, model)
    if evidence.head(chain) is None:
        raise _never_routed(evidence, environment, model)
    entry = evidence.newest(chain, at)
    targets = () if entry is None else shares(_route(entry).targets)
    serving = sorted((s for s in targets if s.weight), key=lambda share: -share.weight)
    return ServingAt(
        environment=environment,
        model=model,
        at=at,
        serving=tuple(serving),
        warm=tuple(share for share in targets if not share.weight),
        moved=None if entry is None else _move(_since(evidence, chain, entry)),
        ended=_until(evidence, chain, entry, at),
        commands=tuple(
            f"llmops audit {share.release} --as-of {at.isoformat()}" for share in serving
        ),
    )


def read_time(text: str) -> datetime:
    """A time in ISO 8601, with zone or without, such as "2026-11-17 14:05".

    Returns:
        It with a zone: that of this machine, where the text has none.

    Raises:
        SettingsError: it is no time.
    """
    try:
        # Of a naive time, `astimezone` takes the machine's zone as it was at that time.
        return datetime.fromisoformat(text.strip()).astimezone()
    except (ValueError, OverflowError) as error:
        raise SettingsError(
            "This is not a time",
            expected="ISO 8601, such as 2026-11-17T14:05:00Z or '2026-11-17 14:05'",
            found=repr(text),
            cure="write it so",
        ) from error


def has_zone(text: str) -> bool:
    """Whether a time that `read_time` takes names its zone."""
    return datetime.fromisoformat(text.strip()).tzinfo is not None


def lines(found: ServingAt) -> list[str]:
    """It as the command line shows it."""
    from llmops_assets.reports.printable import printable
    from llmops_assets.reports.wording import moment

    shown = [f"{found.environment} of {found.model} at {moment(found.at)}:"]
    if not found.serving:
        shown.append("  nothing had traffic")
    for share in found.serving:
        shown += [
            f"  {share.weight} % to release {share.release}, version {share.version}, "
            f"slot {share.colour}",
            f"      package {share.package}",
        ]
    for share in found.warm:
        shown.append(f"  warm, without traffic: {share.release}, version {share.version}")
    for name, change in (("since", found.moved), ("until", found.ended)):
        if change is not None:
            shown.append(
                f"  {name} {moment(change.time)}: generation {change.generation} by "
                f"{change.actor}, {change.reason} (entry {change.sequence})"
            )
    if found.moved is not None and found.ended is None:
        shown.append(f"  until now ({moment(datetime.now(UTC))})")
    shown += [f"next: {command}" for command in found.commands]
    return [printable(line) for line in shown]


def _never_routed(evidence: EvidenceLog, environment: Environment, model: str) -> EvidenceError:
    known = [_route(entry).model for entry in evidence.heads(f"routes/{environment}")]
    return EvidenceError(
        f"{model} never had a route in {environment}",
        expected=f"a model that was routed there: {', '.join(known) or 'none was'}",
        cure="correct the name or the environment",
    )


def _since(evidence: EvidenceLog, chain: str, entry: Entry) -> Entry:
    """The entry from which on the traffic has been as in this one, without a break."""
    traffic = _traffic(entry)
    for ordinal in range(entry.leaf.links[chain].ordinal - 1, -1, -1):
        before = next(evidence.entries(chain, start=ordinal))
        if _traffic(before) != traffic:
            break
        entry = before
    return entry


def _until(evidence: EvidenceLog, chain: str, entry: Entry | None, at: datetime) -> Move | None:
    """The first entry after a time from which on the traffic has been another."""
    traffic = () if entry is None else _traffic(entry)
    start = 0 if entry is None else entry.leaf.links[chain].ordinal + 1
    after = (later for later in evidence.entries(chain, start=start) if _traffic(later) != traffic)
    changed = next(after, None)
    return None if changed is None else _move(changed)


def _traffic(entry: Entry) -> tuple[Share, ...]:
    return tuple(share for share in shares(_route(entry).targets) if share.weight)


def _route(entry: Entry) -> Route:
    return Route.model_validate(entry.statement.predicate)


def _move(entry: Entry) -> Move:
    route = _route(entry)
    return Move(
        generation=route.generation,
        actor=route.actor,
        reason=route.reason,
        time=entry.time,
        sequence=entry.sequence,
    )
