"""The board of a release's gates: how it stands with each, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.evidence.gates import CANARY, OPERATED, PROVEN, RETIRED, NextAction
from llmops_assets.evidence.verdicts import Standing, State, Verdict
from llmops_assets.evidence.waivers import Waiver

if TYPE_CHECKING:
    from llmops_assets.platform import Platform


JUDGED_AGAINST = (State.FAILED, State.UNDECIDED, State.WAIVED)


class BoardRow(BaseModel):
    """One gate."""

    model_config = ConfigDict(frozen=True)

    gate: str
    asset: str
    state: State
    reason: str
    action: NextAction | None = Field(description="None when nothing is to be done.")
    next_action: str
    owner: str
    judged: datetime | None
    verdict: Verdict | None
    waiver: Waiver | None


class Board(BaseModel):
    """All gates of a release in the order of the lifecycle.

    Gates of serving and of retirement are on it once they were judged.
    """

    model_config = ConfigDict(frozen=True)

    release: str
    rows: tuple[BoardRow, ...]

    @property
    def closed(self) -> tuple[BoardRow, ...]:
        """Gates that were judged and do not let the release go on."""
        shut = (State.FAILED, State.UNDECIDED, State.STALE)
        return tuple(row for row in self.rows if row.state in shut)


def board_of(platform: Platform, release: str) -> Board:
    """Where the release stands as of now.

    Raises:
        LifecycleOrderError: there is no such release, or its spec was never frozen.
    """
    platform.spec(release)
    column = platform.column(release)
    found = (
        *platform.standings(release, (*PROVEN, CANARY), column),
        *_judged(platform.standings(release, (*OPERATED, *RETIRED), column)),
    )
    return Board(release=release, rows=tuple(_row(standing) for standing in found))


def _judged(standings: Iterable[Standing]) -> Iterable[Standing]:
    return (standing for standing in standings if standing.verdict is not None)


def _row(standing: Standing) -> BoardRow:
    gate, verdict = standing.gate, standing.verdict
    return BoardRow(
        gate=gate.name,
        asset=gate.asset,
        state=standing.state,
        reason=standing.reason,
        action=gate.action if standing.state in JUDGED_AGAINST else None,
        next_action=standing.next_action,
        owner=gate.owner,
        judged=None if verdict is None else verdict.time,
        verdict=verdict,
        waiver=standing.waiver,
    )
