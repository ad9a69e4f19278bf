"""A data scientist who registers with MLflow alone, and servers to register at."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil
from mlflow.tracking import MlflowClient

from llmops_assets.tools import module_command

START_SECONDS = 120


def register_plainly(client: MlflowClient, model: str, count: int = 1) -> list[int]:
    """New versions of a model by code that knows nothing of this platform; their numbers."""
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    experiment = client.get_experiment_by_name("notebook")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("notebook")
    run = client.create_run(experiment_id).info.run_id
    versions = [
        client.create_model_version(model, source=f"runs:/{run}/model", run_id=run)
        for _ in range(count)
    ]
    return [int(version.version) for version in versions]


class ServerProcess:
    """A server of the test's own that can be killed and started again on its state."""

    def __init__(self, folder: Path, name: str, health: str) -> None:
        self.log = folder / f"{name}.log"
        self.command: list[str] = []
        self._folder = folder
        self._health = health
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Starts it and waits until it answers."""
        self.command = command
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=dict(environment), stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """As a machine that loses power would; its workers go with it."""
        if self._process is None or self._process.poll() is not None:
            return
        family = psutil.Process(self._process.pid).children(recursive=True)
        for process in (*family, self._process):
            process.kill()
        self._process.wait(10)
        psutil.wait_procs(family, 10)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _answers(self) -> bool:
        try:
            return httpx.get(self._health, timeout=2).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


class MLflowServer(ServerProcess):
    """An MLflow with a database in a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.folder = folder
        super().__init__(folder, "mlflow", f"{self.url}/health")

    def serve(self, environment: Mapping[str, str]) -> None:
        """Starts it, with more variables."""
        command = module_command(
            "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", self.folder / "artifacts", "--serve-artifacts",
        )  # fmt: skip
        fixed = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.start(command, {**os.environ, **fixed, **environment})
