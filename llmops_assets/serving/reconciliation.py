"""Does what serves agree with what is recorded? It only looks; people heal with the command named.

Three things are held against each other: the routes that the evidence log records, what the
gateway says that it uses, and what is in the slots: their bytes, and what their servers say.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from llmops_assets.errors import GatewayError
from llmops_assets.serving.gateway import Gateway
from llmops_assets.serving.routes import Route, Routes, RouteTarget, ServedRoute
from llmops_assets.serving.slots import Deployment, Environment, Slot, Slots

APPLY = "llmops up"
"""Applies the recorded routes and starts slots that do not run; it changes nothing else."""


class Drift(StrEnum):
    """Kinds of differences."""

    GATEWAY_SILENT = "gateway silent"
    """What it does is not known, and no route can be changed."""
    GATEWAY_BEHIND = "gateway behind"
    """It uses another generation of a route than the recorded one."""
    GATEWAY_CHANGED = "gateway changed"
    """Somebody else than this platform changed shares or addresses of the recorded generation."""
    UNRECORDED = "unrecorded route"
    """The gateway serves a model for which no route is recorded."""
    SLOT_DOWN = "slot down"
    """A slot on a route has no server that is ready."""
    SLOT_OTHER = "slot holds something else"
    """A slot on a route is empty, or holds another package or version than the route says."""
    SLOT_MOVED = "slot moved"
    """A slot listens elsewhere than the route says."""
    SERVER_OTHER = "server has something else"
    """A slot holds the right package, and its server says that another version is loaded."""
    BYTES = "bytes differ"
    """Files of a slot are not those of the signed package: the next start will refuse them."""


class Difference(BaseModel):
    """One thing that is not as it is recorded."""

    model_config = ConfigDict(frozen=True)

    kind: Drift
    environment: Environment
    model: str | None
    """None where it is about all of them."""
    slot: str | None
    """Such as `production/date-normalizer/blue`; None where it is about the gateway."""
    expected: str
    found: str
    meaning: str
    """What it does to clients, or will."""
    cure: str
    """The command that heals it."""
    traffic: bool
    """Whether calls of clients are affected now; otherwise the way back or the next start is."""

    def __str__(self) -> str:
        where = self.slot or f"{self.environment}/{self.model or 'all models'}"
        return (
            f"{where}: {self.kind}. Expected: {self.expected}. Found: {self.found}. "
            f"{self.meaning} To do: {self.cure}"
        )


def differences(
    routes: Routes,
    gateway: Gateway,
    slots: Slots,
    environment: Environment,
    *,
    deep: bool = False,
) -> tuple[Difference, ...]:
    """Everything in an environment that is not as it is recorded; empty is good.

    Args:
        routes: the recorded ones.
        gateway: in front of the slots.
        slots: what serves.
        environment: which one.
        deep: reads every byte in the slots of the routes.

    Raises:
        EvidenceError: the recorded routes are missing, changed, or not signed.
    """
    recorded = routes.all(environment)
    found = _of_gateway(gateway, environment, recorded)
    for route in recorded.values():
        for target in route.targets:
            found += _of_slot(slots, route, target, deep=deep)
    return tuple(found)


def _of_gateway(
    gateway: Gateway, environment: Environment, recorded: Mapping[str, Route]
) -> list[Difference]:
    def difference(
        kind: Drift, model: str | None, expected: object, found: object, meaning: str
    ) -> Difference:
        return Difference(
            kind=kind,
            environment=environment,
            model=model,
            slot=None,
            expected=str(expected),
            found=str(found),
            meaning=meaning,
            cure=APPLY,
            traffic=True,
        )

    try:
        in_use = gateway.in_use(environment)
    except GatewayError as error:
        return [
            difference(
                Drift.GATEWAY_SILENT, None, "an answer of the gateway", error.found or error,
                "Nobody knows what clients get, and no route can be changed.",
            )
        ]  # fmt: skip
    found: list[Difference] = []
    for model in sorted(recorded.keys() | in_use.keys()):
        used = in_use.get(model)
        if model not in recorded:
            found.append(
                difference(
                    Drift.UNRECORDED, model, "no route, as none is recorded", used,
                    "Clients get answers for which nobody can say why.",
                )
            )  # fmt: skip
            continue
        wanted = ServedRoute.of(recorded[model])
        if used is None or used.generation != wanted.generation:
            found.append(
                difference(
                    Drift.GATEWAY_BEHIND, model, wanted, used or "no route",
                    "A change was recorded and clients do not get it.",
                )
            )  # fmt: skip
        elif used != wanted:
            found.append(
                difference(
                    Drift.GATEWAY_CHANGED, model, wanted, used,
                    "Clients get other shares or slots than were decided.",
                )
            )  # fmt: skip
    return found


def _of_slot(slots: Slots, route: Route, target: RouteTarget, *, deep: bool) -> list[Difference]:
    slot = Slot(route.environment, route.model, target.colour)
    wanted = Deployment(target.package, target.release, target.version)

    def difference(
        kind: Drift, expected: object, found: object, meaning: str, cure: str
    ) -> Difference:
        return Difference(
            kind=kind,
            environment=route.environment,
            model=route.model,
            slot=str(slot),
            expected=str(expected),
            found=str(found),
            meaning=meaning,
            cure=cure,
            traffic=target.weight > 0,
        )

    now = "Its calls fail." if target.weight else "There is no way back to it."
    state = slots.state(slot)
    if state.deployment != wanted:
        return [
            difference(
                Drift.SLOT_OTHER, _words(wanted),
                "an empty slot" if state.deployment is None else _words(state.deployment),
                "Clients get what no gate let through." if state.running and target.weight else now,
                _refill(route, target),
            )
        ]  # fmt: skip
    found: list[Difference] = []
    inspection = slots.inspect(slot, deep=deep)
    if not state.running:
        found.append(difference(Drift.SLOT_DOWN, "a server that is ready", "none", now, APPLY))
    elif inspection.version != target.version:
        found.append(
            difference(
                Drift.SERVER_OTHER, f"version {target.version} loaded",
                "no version" if inspection.version is None else f"version {inspection.version}",
                "Clients get another version than the route says." if target.weight else now,
                _refill(route, target),
            )
        )  # fmt: skip
    endpoint = state.endpoint
    if endpoint is not None:
        listens = (endpoint.host, endpoint.http_port, endpoint.grpc_port, endpoint.metrics_port)
        routed = (target.host, target.http_port, target.grpc_port, target.metrics_port)
        if listens != routed:
            found.append(difference(Drift.SLOT_MOVED, routed, listens, now, _refill(route, target)))
    if inspection.damage is not None:
        found.append(
            difference(
                Drift.BYTES, f"the bytes of package {target.package}", inspection.damage,
                "What its server loaded before was verified; the next start will refuse these.",
                _replace(route, target),
            )
        )  # fmt: skip
    return found


def _refill(route: Route, target: RouteTarget) -> str:
    """The command after which a slot holds, or the route names, what is right."""
    if route.environment is Environment.STAGING:
        return f"llmops release {target.release}"
    if target.weight == 0:
        serving = route.serving
        kept = "" if serving is None else f" --set {serving.release}=100"
        return f"llmops route {route.model}{kept} --reason WHY"
    if any(other.weight == 0 for other in route.targets):
        return f"llmops rollback {route.model} --reason WHY"
    return f"llmops promote {target.release}"


def _replace(route: Route, target: RouteTarget) -> str:
    """As `_refill` for a slot that serves, where the same release would not be loaded again."""
    cure = _refill(route, target)
    if cure == f"llmops promote {target.release}":
        return f"llmops release {route.model}, then `llmops promote` what it made"
    return cure


def _words(deployment: Deployment) -> str:
    return f"{deployment.release} version {deployment.version}, package {deployment.package}"
