"""The gateway's process: Envoy, for a supervisor that only knows signals.

Envoy ends at once on SIGTERM, and with it every call that runs. So this process starts
Envoy and stands between: on SIGTERM it closes the listeners, waits for running calls, and
then ends Envoy. Meanwhile it rotates the access log, which Envoy leaves to others.

`python -m llmops_assets.serving.gateway_process FOLDER` runs on the folder of an
`EnvoyGateway`, after `EnvoyGateway.bootstrap`. It ends when Envoy ends, with exit code 1,
so that a supervisor starts it again; and Envoy is killed when this process is.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llmops_assets.errors import GatewayError
from llmops_assets.serving.gateway import EnvoyGateway, envoy_command
from llmops_assets.tool_guard import PR_SET_PDEATHSIG, prctl

STOP = (signal.SIGTERM, signal.SIGINT)
AWAITED = (*STOP, signal.SIGCHLD)
# Less than the process manager waits before it kills.
DRAIN_SECONDS = 25.0
END_SECONDS = 3.0
ROTATION_SECONDS = 5.0
LARGEST_LOG_BYTES = 32 * 2**20
KEPT_LOGS = 4


def main(arguments: Sequence[str]) -> int:
    """Runs Envoy until it ends or is told to; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m llmops_assets.serving.gateway_process FOLDER", file=sys.stderr)
        return 2
    gateway = EnvoyGateway(Path(arguments[0]).resolve())
    # Blocked, they wait for sigtimedwait, also those that come before it is called.
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    envoy = subprocess.Popen(
        envoy_command(gateway.bootstrap_file),
        stdin=subprocess.DEVNULL,
        preexec_fn=_follow_parent,
        # A signal to the group of this process, such as Ctrl-C, must not end the calls.
        start_new_session=True,
    )
    while envoy.poll() is None:
        received = signal.sigtimedwait(AWAITED, ROTATION_SECONDS)
        if received is not None and received.si_signo in STOP:
            _stop(gateway, envoy)
            return 0
        _rotate(gateway)
    print(f"Envoy ended with {envoy.returncode}", file=sys.stderr)
    return 1


def _follow_parent() -> None:
    """In Envoy's process, before Envoy: it must not outlive this one, nor inherit its mask."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)


def _stop(gateway: EnvoyGateway, envoy: subprocess.Popen[bytes]) -> None:
    try:
        if running := gateway.drain(DRAIN_SECONDS):
            print(f"{running} calls are cut after {DRAIN_SECONDS:.0f} s", file=sys.stderr)
    except GatewayError as error:
        print(f"not drained: {error}", file=sys.stderr)
    envoy.terminate()
    try:
        envoy.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        envoy.kill()
        envoy.wait(END_SECONDS)


def _rotate(gateway: EnvoyGateway) -> None:
    try:
        gateway.access_log.rotate(gateway.admin.reopen_logs, LARGEST_LOG_BYTES, KEPT_LOGS)
    except (GatewayError, OSError) as error:
        # Envoy may just have ended, or the disk be full: traffic goes on without this.
        print(f"the access log is not rotated: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
