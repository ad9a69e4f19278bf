"""Routes by hand: shown whole, and changed only towards what may serve."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterInstance
from pydantic import BaseModel

from llmops_assets.deploy.revocation import revoke
from llmops_assets.errors import (
    ApprovalError,
    ArtifactCorruptError,
    GateRefusedError,
    LifecycleOrderError,
    LLMOpsError,
    RefConflictError,
)
from llmops_assets.evidence.gates import CANARY, PROVEN
from llmops_assets.operate.traffic import Shares, plan_shares, set_shares, view
from llmops_assets.operate.traffic_text import changed_line, route_lines, share_lines
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Colour, Environment, Slot
from llmops_assets.storage.columns import Action

from ..release_rig import FAILED, MODEL, PASSED, Rig, deploy, loaded
from ..test_reporting import APPROVE, Runs, failures

PRODUCTION = Environment.PRODUCTION
BLUE = Slot(PRODUCTION, MODEL, Colour.BLUE)
GREEN = Slot(PRODUCTION, MODEL, Colour.GREEN)
V1, V2, V3 = (f"parrot.v{version}" for version in (1, 2, 3))


class Done(BaseModel):
    """Stands for the document of an asset."""

    of: str


def prove(rig: Rig, version: int) -> None:
    """Brings a release through every gate up to its candidate."""
    release = f"parrot.v{version}"
    rig.build(release, version)
    for asset in ("staging_deployment", "production_approval", "production_candidate"):
        action = Action(asset, "application/vnd.llmops.test")
        rig.platform.columns.record(release, action, Done(of=asset), datetime.now(UTC))
    rig.judge(release, PROVEN, PASSED)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with two releases that came through all gates; made once, as it takes long."""
    rig = Rig(tmp_path_factory.mktemp("built") / "rig")
    for version in (1, 2):
        prove(rig, version)
    rig.close()
    return rig.platform.settings.state


@pytest.fixture
def proven(rig: Rig, built: Path) -> Rig:
    """Version 1 is warm in blue, version 2 serves in green, both through all gates."""
    shutil.copytree(built, rig.platform.settings.state, dirs_exist_ok=True)
    for version in (1, 2):
        deploy(rig, version)
    return rig


def plan(rig: Rig, **shares: int) -> Shares:
    """Shares by version, such as v1=10."""
    return plan_shares(
        rig.platform, PRODUCTION, MODEL, {f"parrot.{name}": share for name, share in shares.items()}
    )


def put(rig: Rig, **shares: int) -> Route:
    return set_shares(rig.platform, plan(rig, **shares), "ada", "a closer look")


def in_use(rig: Rig) -> dict[str, int]:
    targets = rig.platform.gateway.in_use(PRODUCTION)[MODEL].targets
    return {target.release: target.weight for target in targets}


def test_shares_are_set_and_recorded(proven: Rig) -> None:
    """Back and forth, each with who and why."""
    route = put(proven, v1=10, v2=90)
    assert (route.generation, route.actor, route.reason) == (3, "ada", "a closer look")
    assert in_use(proven) == {V1: 10, V2: 90}
    assert changed_line(route) == (
        "generation 3, acknowledged by the gateway: parrot.v2 90 %, parrot.v1 10 %"
    )
    # What is not named stays warm.
    put(proven, v1=100)
    assert in_use(proven) == {V1: 100, V2: 0}


def test_view_says_everything(proven: Rig) -> None:
    """What the first command at night has to answer."""
    put(proven, v1=10, v2=90)
    proven.platform.slots.crash(BLUE)
    shown = view(proven.platform, PRODUCTION, MODEL, deep=False)
    assert (shown.generation, shown.observed, shown.actor) == (3, 3, "ada")
    assert [(s.colour, s.release, s.weight, s.state) for s in shown.slots] == [
        (Colour.BLUE, V1, 10, "NOT RUNNING"), (Colour.GREEN, V2, 90, "serving"),
    ]  # fmt: skip
    assert [(e.release, e.until is None) for e in shown.earlier] == [(V2, False), (V1, False)]
    assert [difference.slot for difference in shown.differences] == [str(BLUE)]
    text = "\n".join(route_lines(shown))
    package = proven.deployment(V2, 2).package
    for part in (
        "production parrot: generation 3, the gateway uses it", "by ada: a closer look",
        "green   90% serving      parrot.v2 version 2", package[:19], "drift: production/parrot/",
    ):  # fmt: skip
        assert part in text
    assert package not in text


def test_view_of_a_silent_gateway(proven: Rig) -> None:
    """At night the gateway may be what is broken."""
    proven.platform.gateway.down = True
    shown = view(proven.platform, PRODUCTION, MODEL, deep=False)
    assert shown.observed is None
    assert "the gateway uses none" in "\n".join(route_lines(shown))
    assert [each.kind.value for each in shown.differences] == ["gateway silent"]


def test_model_without_a_route(proven: Rig) -> None:
    """A misspelt name is not an empty route."""
    with pytest.raises(LifecycleOrderError, match=r"carrot never had.*there: parrot"):
        view(proven.platform, PRODUCTION, "carrot", deep=False)


def _reject(rig: Rig) -> None:
    revoke(rig.platform, V1, "bob", "it lies")


def _deprecate(rig: Rig) -> None:
    action = Action("deprecated_version", "application/vnd.llmops.test")
    rig.platform.columns.record(V1, action, Done(of="deprecated"), datetime.now(UTC))


def _other_bytes(rig: Rig) -> None:
    deployment = rig.deployment(V2, 2).__class__(rig.deployment(V2, 2).package, V1, 1)
    rig.platform.slots.start(BLUE, rig.platform.store.describe(deployment.package), deployment)


@pytest.mark.parametrize(
    ("spoil", "shares", "error", "because"),
    [
        (None, {"v1": 10, "v2": 80}, LifecycleOrderError, "90 together"),
        (None, {"v1": -10, "v2": 110}, LifecycleOrderError, "do not add up"),
        (None, {"v1": 0, "v2": 100}, LifecycleOrderError, "has these shares already"),
        (None, {"v3": 10, "v2": 90}, LifecycleOrderError, "no slot with it.*llmops promote"),
        (
            lambda rig: rig.platform.slots.crash(BLUE), {"v1": 10, "v2": 90},
            LifecycleOrderError, "does not answer.*rollback parrot --to parrot.v1",
        ),
        (_other_bytes, {"v1": 10, "v2": 90}, GateRefusedError, "holds another package"),
        (
            lambda rig: rig.judge(V1, [CANARY], FAILED), {"v1": 10, "v2": 90},
            GateRefusedError, "canary: failed",
        ),
        (
            lambda rig: rig.judge(V1, [PROVEN[-1]], FAILED), {"v1": 10, "v2": 90},
            GateRefusedError, "candidate_smoke: failed",
        ),
        (_reject, {"v1": 10, "v2": 90}, ApprovalError, "bob revoked it"),
        (_deprecate, {"v1": 10, "v2": 90}, LifecycleOrderError, "is deprecated"),
        (
            lambda rig: rig.platform.slots.damage.update({BLUE: {"cheap": "a is missing"}}),
            {"v1": 10, "v2": 90}, ArtifactCorruptError, "a is missing",
        ),
    ],
)  # fmt: skip
def test_refused_with_the_reason(
    proven: Rig, spoil: Any, shares: dict[str, int], error: type[LLMOpsError], because: str
) -> None:
    """By hand must not be a way around the gates; nothing moves."""
    if spoil is not None:
        spoil(proven)
    with pytest.raises(error, match=f"(?s){because}") as refused:
        put(proven, **shares)
    assert "To do: " in str(refused.value)
    assert in_use(proven) == {V1: 0, V2: 100}


def test_release_off_the_route_is_checked_also_without_a_share(proven: Rig) -> None:
    """On the route it is a way back, and a rollback asks for less than a share does."""
    route, digest = proven.platform.routes.current(PRODUCTION, MODEL)
    assert route is not None
    proven.platform.routes.change(
        PRODUCTION, MODEL, [t for t in route.targets if t.release == V2],
        actor="ada", reason="v1 leaves", expected=digest,
    )  # fmt: skip
    _reject(proven)
    with pytest.raises(ApprovalError, match="bob revoked it"):
        put(proven, v1=0, v2=100)
    assert in_use(proven) == {V2: 100}


def test_what_changed_since_it_was_shown_is_not_overwritten(proven: Rig) -> None:
    """Somebody else may have rolled back while the question was on the screen."""
    planned = plan(proven, v1=10, v2=90)
    put(proven, v1=100)
    with pytest.raises(RefConflictError, match=r"generation 3 by ada .*a closer look"):
        set_shares(proven.platform, planned, "bob", "too late")
    assert in_use(proven) == {V1: 100, V2: 0}


def test_broken_warm_slot_leaves_the_route(proven: Rig) -> None:
    """That is how a way back that is none is taken off, see `reconciliation`."""
    proven.platform.slots.crash(BLUE)
    planned = plan(proven, v2=100)
    assert "parrot.v1: leaves the route" in "\n".join(share_lines(planned))
    set_shares(proven.platform, planned, "ada", "blue is broken")
    assert in_use(proven) == {V2: 100}


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


def test_candidate_gets_a_share_only_with_its_approval(rig: Rig, instance: DagsterInstance) -> None:
    """One that never served needs every gate, beside what serves now, and its approval."""
    prove(rig, 1)
    deploy(rig, 1)
    rig.build(V2, 2)
    runs = Runs(rig, instance)
    assert runs.assets(V2, "staging_deployment").success
    # Loaded, and nobody decided.
    loaded(rig, 2)
    with pytest.raises(GateRefusedError, match="separation_of_duties: no verdict"):
        put(rig, v1=90, v2=10)
    result = runs.job("promote", V2, APPROVE)
    assert result.success, failures(result)
    # As a canary that goes on by hand: v2 has all traffic, so v1 comes back by what it is.
    put(rig, v1=90, v2=10)
    assert in_use(rig) == {V1: 90, V2: 10}
