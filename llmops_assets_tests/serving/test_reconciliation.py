"""Every kind of difference between what is recorded and what serves is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmops_assets.errors import GatewayError
from llmops_assets.serving.reconciliation import Difference, Drift, differences
from llmops_assets.serving.routes import ServedRoute
from llmops_assets.serving.slots import Colour, Deployment, Environment, Slot

from ..fakes import FakeSlots
from ..release_rig import MODEL, Rig, deploy
from ..waiting import wait_for
from . import envoy_rig

PRODUCTION = Environment.PRODUCTION
BLUE = Slot(PRODUCTION, MODEL, Colour.BLUE)
GREEN = Slot(PRODUCTION, MODEL, Colour.GREEN)
"""Version 1 is warm in blue, version 2 serves in green."""


@pytest.fixture
def served(rig: Rig, packages: None) -> Rig:
    deploy(rig, 1)
    deploy(rig, 2)
    return rig


def found(rig: Rig, *, deep: bool = False) -> tuple[Difference, ...]:
    platform = rig.platform
    return differences(platform.routes, platform.gateway, platform.slots, PRODUCTION, deep=deep)


def test_what_is_as_recorded_is_no_difference(served: Rig) -> None:
    """A check that cries for nothing is soon ignored."""
    assert found(served) == ()
    assert found(served, deep=True) == ()


def _other(rig: Rig, slot: Slot) -> None:
    deployment = rig.deployment("parrot.v3", 3)
    rig.platform.slots.start(slot, rig.platform.store.describe(deployment.package), deployment)


def _clear(rig: Rig, slot: Slot, version: int) -> None:
    deployment: Deployment = rig.deployment(f"parrot.v{version}", version)
    rig.platform.slots.clear(slot, deployment)


@pytest.mark.parametrize(
    ("provoke", "kind", "slot", "traffic", "cure"),
    [
        (lambda rig: rig.platform.slots.crash(GREEN), Drift.SLOT_DOWN, GREEN, True, "llmops up"),
        (lambda rig: rig.platform.slots.crash(BLUE), Drift.SLOT_DOWN, BLUE, False, "llmops up"),
        (
            lambda rig: _clear(rig, GREEN, 2), Drift.SLOT_OTHER, GREEN, True,
            "llmops rollback parrot --reason WHY",
        ),
        (
            lambda rig: _other(rig, BLUE), Drift.SLOT_OTHER, BLUE, False,
            "llmops route parrot --set parrot.v2=100 --reason WHY",
        ),
        (
            lambda rig: rig.platform.slots.loaded.update({GREEN: 7}), Drift.SERVER_OTHER, GREEN,
            True, "llmops rollback parrot --reason WHY",
        ),
        (
            lambda rig: rig.platform.slots.damage.update({GREEN: {"cheap": "a has 3 bytes"}}),
            Drift.BYTES, GREEN, True, "llmops rollback parrot --reason WHY",
        ),
    ],
)  # fmt: skip
def test_slot_that_is_not_as_routed(
    served: Rig, provoke: Callable[[Rig], None], kind: Drift, slot: Slot, traffic: bool, cure: str
) -> None:
    """Each has its own cure, and whoever is called must not have to work it out."""
    provoke(served)
    (difference,) = found(served)
    assert (difference.kind, difference.slot) == (kind, str(slot))
    assert (difference.traffic, difference.cure) == (traffic, cure)
    assert f"To do: {cure}" in str(difference)


def test_slot_at_another_address(served: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports may be given anew; the gateway would go on with the old one."""
    slots = served.platform.slots
    elsewhere = slots._endpoint(BLUE)
    monkeypatch.setattr(slots, "_endpoint", lambda slot: elsewhere)
    (difference,) = found(served)
    assert (difference.kind, difference.slot) == (Drift.SLOT_MOVED, str(GREEN))


def test_changed_bytes_of_the_same_size_need_a_deep_look(served: Rig) -> None:
    """Reading gigabytes every few minutes is too much; on demand it is done."""
    served.platform.slots.damage[BLUE] = {"deep": "a has other bytes"}
    assert found(served) == ()
    (difference,) = found(served, deep=True)
    assert (difference.kind, difference.found) == (Drift.BYTES, "a has other bytes")


def test_serving_slot_with_nothing_warm_is_promoted_again(rig: Rig, packages: None) -> None:
    """There is nothing to roll back to, and the cure must not say so."""
    deploy(rig, 1)
    rig.platform.slots.loaded[BLUE] = 7
    assert [each.cure for each in found(rig)] == ["llmops promote parrot.v1"]
    rig.platform.slots.loaded.clear()
    rig.platform.slots.damage[BLUE] = {"cheap": "a is missing"}
    (difference,) = found(rig)
    # The same release would be found in its slot, running, and not be loaded again.
    assert difference.cure.startswith("llmops release parrot, then")


def test_staging_is_filled_by_its_release(rig: Rig, packages: None) -> None:
    """Nothing is promoted to staging."""
    deploy(rig, 1)
    platform = rig.platform
    route, _ = platform.routes.current(PRODUCTION, MODEL)
    assert route is not None
    platform.routes.change(
        Environment.STAGING, MODEL, route.targets, actor="ada", reason="a test", expected=None
    )
    (difference,) = differences(
        platform.routes, platform.gateway, platform.slots, Environment.STAGING
    )
    assert difference.cure == "llmops release parrot.v1"


@pytest.fixture
def envoy(tmp_path: Path) -> Iterator[envoy_rig.Rig]:
    with envoy_rig.rig(tmp_path / "envoy") as rig:
        yield rig


def of_envoy(rig: envoy_rig.Rig) -> list[Difference]:
    """What is different with the gateway. The slots are another matter, and hold nothing."""
    slots = FakeSlots(rig.evidence.store, {})
    all_found = differences(rig.routes, rig.gateway, slots, PRODUCTION)
    return [difference for difference in all_found if difference.slot is None]


def test_envoy_tells_what_it_uses(envoy: envoy_rig.Rig) -> None:
    """Weights and addresses as Envoy has them, not as its files say; also a route to nothing."""
    targets = [
        envoy_rig.target(4001, Colour.BLUE, weight=90),
        envoy_rig.target(4002, Colour.GREEN, weight=10, version=2),
    ]
    envoy.serve("split", *targets)
    envoy.serve("warm", targets[0].model_copy(update={"weight": 100}),
                targets[1].model_copy(update={"weight": 0}))  # fmt: skip
    envoy.serve("idle", targets[0].model_copy(update={"weight": 0}))
    envoy.serve("off")
    recorded = envoy.routes.all(PRODUCTION)
    assert envoy.gateway.in_use(PRODUCTION) == {
        model: ServedRoute.of(route) for model, route in recorded.items()
    }
    assert envoy.gateway.in_use(Environment.STAGING) == {}
    assert of_envoy(envoy) == []


def test_gateway_that_lacks_a_change(envoy: envoy_rig.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded is not served, as when the process died between the two."""
    envoy.serve("model", envoy_rig.target(4001, Colour.BLUE))
    with monkeypatch.context() as patched:
        patched.setattr(envoy.gateway, "apply", lambda environment, routes: None)
        envoy.serve("model", envoy_rig.target(4002, Colour.GREEN))
    (difference,) = of_envoy(envoy)
    assert (difference.kind, difference.model) == (Drift.GATEWAY_BEHIND, "model")
    assert difference.found.startswith("generation 1, 100 % model.v1 in blue")
    assert difference.cure == "llmops up"
    envoy.routes.reconcile()
    assert of_envoy(envoy) == []


def _with(file: Path, old: str, new: str) -> None:
    """Changes a file as Envoy notices it: a rename."""
    text = file.read_text()
    assert old in text
    beside = file.with_suffix(".mine")
    beside.write_text(text.replace(old, new))
    beside.rename(file)


def test_gateway_whose_files_somebody_edited(envoy: envoy_rig.Rig) -> None:
    """The version that Envoy reports says the same as before; what it does is another thing."""
    envoy.serve("model", envoy_rig.target(4001, Colour.BLUE, weight=90),
                envoy_rig.target(4002, Colour.GREEN, weight=10, version=2))  # fmt: skip
    file = envoy.gateway.folder / "routes.production.json"
    before = json.loads(file.read_text())["version_info"]
    _with(file, '"weight": 10,', '"weight": 60,')
    wait_for(lambda: bool(of_envoy(envoy)), "the edited file")
    (difference,) = of_envoy(envoy)
    assert difference.kind is Drift.GATEWAY_CHANGED
    assert "60 % model.v2 in green" in difference.found
    assert json.loads(file.read_text())["version_info"] == before
    assert envoy.routes.differences(PRODUCTION) == {}
    # What `llmops up` does.
    envoy.routes.reconcile()
    wait_for(lambda: not of_envoy(envoy), "the recorded route")


def test_gateway_with_a_route_that_nobody_recorded(envoy: envoy_rig.Rig) -> None:
    """As from the store of another installation, or an older backup."""
    other = envoy_rig.Rig(envoy.folder / "other")
    other.gateway = envoy.gateway
    other.routes = other.routes.__class__(other.evidence, envoy.gateway)
    other.serve("stranger", envoy_rig.target(4001, Colour.BLUE))
    (difference,) = of_envoy(envoy)
    assert (difference.kind, difference.model) == (Drift.UNRECORDED, "stranger")


def test_gateway_that_is_silent(envoy: envoy_rig.Rig) -> None:
    """Then nothing is known; that is a difference, and no stack trace."""
    envoy.serve("model", envoy_rig.target(4001, Colour.BLUE))
    envoy.kill()
    (difference,) = of_envoy(envoy)
    assert (difference.kind, difference.model) == (Drift.GATEWAY_SILENT, None)
    assert difference.cure == "llmops up"
    with pytest.raises(GatewayError):
        envoy.gateway.in_use(PRODUCTION)
