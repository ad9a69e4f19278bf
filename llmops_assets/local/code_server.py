"""Becomes the code server: `python -m llmops_assets.local.code_server HOST PORT LOCATION MODULE`.

Run workers are children of the code server. If it is killed they live on, but nobody
can cancel them, and nobody notices when they die. So a new code server first ends what
workers are left, then fails the runs that have none. It happens before the server
listens, so no run can be launched meanwhile.

`dagster api grpc` is one process; `dagster code-server start` would put a second one
in between, with a heartbeat that lets a forgotten one linger.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dagster import DagsterInstance

from llmops_assets.local.processes import RUN_WORKER_OF, end, run_workers
from llmops_assets.local.runs import reap_dead_runs
from llmops_assets.settings import get_settings

# A worker that is told to stop first stops its tools, which takes them up to 15 s.
WORKER_GRACE_SECONDS = 20.0


def main(arguments: Sequence[str]) -> None:
    host, port, location, module = arguments
    state = get_settings().state
    if workers := run_workers(state):
        print(f"ending {len(workers)} processes of an earlier code server", flush=True)
        end(workers, WORKER_GRACE_SECONDS)
    with DagsterInstance.get() as instance:
        for run_id in reap_dead_runs(instance):
            print(f"failed run {run_id}: its worker is gone", flush=True)
    command = [
        sys.executable, "-m", "dagster", "api", "grpc",
        "--host", host,
        "--port", port,
        "--module-name", module,
        "--location-name", location,
    ]  # fmt: skip
    os.execve(sys.executable, command, {**os.environ, RUN_WORKER_OF: str(state)})


if __name__ == "__main__":
    main(sys.argv[1:])
