"""What Envoy really uses: routes and clusters as its admin interface gives them back.

From `/config_dump` (RoutesConfigDump and ClustersConfigDump of Envoy's admin API v3), in
which fields with their default value, such as a weight of 0, are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmops_assets.errors import GatewayError
from llmops_assets.serving.access_log import METADATA
from llmops_assets.serving.envoy_routes import HTTP_CALLS
from llmops_assets.serving.routes import ServedRoute, ServedTarget
from llmops_assets.serving.slots import Environment

ROUTES = "dynamic_route_configs"
CLUSTERS = "dynamic_active_clusters"
"""Values of `/config_dump?resource=`."""

CALL = HTTP_CALLS[0].name
"""All calls of a model have the same weights; this one stands for them."""


def routes_in_use(
    environment: Environment,
    routes: Iterable[Mapping[str, Any]],
    clusters: Iterable[Mapping[str, Any]],
) -> dict[str, ServedRoute]:
    """What an environment's listener does with each model's calls, by model.

    Args:
        environment: whose listener.
        routes: the entries of the dump of `ROUTES`.
        clusters: the entries of the dump of `CLUSTERS`.

    Raises:
        GatewayError: they are not what this platform configures.
    """
    try:
        targets = {
            cluster["cluster"]["name"]: _target(cluster["cluster"])
            for cluster in clusters
            if cluster["cluster"]["name"].startswith(f"{environment}/")
        }
        generations: dict[str, int] = {}
        weights: dict[str, dict[str, int]] = {}
        for route in _routes(environment, routes):
            about = route.get("metadata", {}).get("filter_metadata", {}).get(METADATA)
            if about is None:
                continue
            generations[about["model"]] = int(about["generation"])
            shares = weights.setdefault(about["model"], {})
            if about.get("call") != CALL:
                continue
            for cluster in route["route"]["weighted_clusters"]["clusters"]:
                weight = 0 if about.get("pinned") else cluster.get("weight", 0)
                shares[cluster["name"]] = max(weight, shares.get(cluster["name"], 0))
        return {
            model: ServedRoute(
                generation=generation,
                targets=frozenset(
                    targets[name].model_copy(update={"weight": weight})
                    for name, weight in weights[model].items()
                ),
            )
            for model, generation in generations.items()
        }
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise GatewayError(
            "Envoy uses a configuration that this platform does not write",
            expected="routes and clusters with the metadata of releases",
            found=repr(error),
            cure="run `llmops up`, which applies the recorded routes",
        ) from error


def _routes(
    environment: Environment, dump: Iterable[Mapping[str, Any]]
) -> Iterable[Mapping[str, Any]]:
    for entry in dump:
        configuration = entry["route_config"]
        if configuration["name"] == environment:
            for host in configuration["virtual_hosts"]:
                yield from host["routes"]


def _target(cluster: Mapping[str, Any]) -> ServedTarget:
    about = cluster["metadata"]["filter_metadata"][METADATA]
    (endpoints,) = cluster["load_assignment"]["endpoints"]
    (endpoint,) = endpoints["lb_endpoints"]
    address = endpoint["endpoint"]["address"]["socket_address"]
    return ServedTarget(
        colour=about["colour"],
        weight=0,
        package=about["package"],
        release=about["release"],
        version=about["version"],
        host=address["address"],
        http_port=address["port_value"],
    )
