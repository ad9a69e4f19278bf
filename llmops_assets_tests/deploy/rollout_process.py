"""A rollout in a process of its own, for tests that kill it."""

from __future__ import annotations

import sys
from pathlib import Path

from llmops_assets.deploy.canary import Canary
from llmops_assets.deploy.delivery import LoadedPackage
from llmops_assets.platform import Platform
from llmops_assets.serving.gateway import EnvoyGateway
from llmops_assets.serving.metrics import LocalMetrics
from llmops_assets.serving.request_contract import EMBEDDED
from llmops_assets.settings import Settings


class GatewayPlatform(Platform):
    """A platform on an Envoy that a test runs."""

    @property
    def gateway_url(self) -> str:
        return vars(self)["base"]


def main(settings: str, gateway: str, base: str, candidate: str) -> None:
    platform = GatewayPlatform(Settings.model_validate_json(settings))
    envoy = EnvoyGateway(Path(gateway))
    vars(platform).update(gateway=envoy, base=base)
    vars(platform)["metrics"] = LocalMetrics(platform.routes, envoy.admin, 5)
    loaded = LoadedPackage.model_validate_json(candidate)
    canary = Canary(platform, loaded, EMBEDDED, "the killed run")
    seen = platform.routes.current(loaded.environment, loaded.model)
    canary.roll_out(seen, lambda _: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
