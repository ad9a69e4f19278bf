"""The Triton server of the `nvidia-pytriton` wheel: how to start it and how to ask it.

The wheel is used for its binaries alone: tritonserver with the Python backend, HTTP,
gRPC and metrics. A server holds one model in one version for its whole life, so model
control is off: nobody can load, replace or unload anything in a running server.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import secrets
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import httpx

from llmops_assets.errors import SlotError, StackError
from llmops_assets.serving.request_contract import EMBEDDED, RequestContract
from llmops_assets.serving.slots import Endpoint

DISTRIBUTION = "nvidia-pytriton"
STUB = "triton_python_backend_stub"
SHARED_MEMORY = Path("/dev/shm")
EXIT_TIMEOUT_SECONDS = 10
STUB_TIMEOUT_SECONDS = 120
SECRET_HEADER = "x-llmops-management"
RESTRICTED_PROTOCOLS = "model-repository,shared-memory,trace,logging"
CALL_TIMEOUT_SECONDS = 10.0
GENERATE_TIMEOUT_SECONDS = 60.0

# The server's environment is built up from nothing: no password of ours gets there.
INHERITED_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "CUDA_VISIBLE_DEVICES")


def backend_directory(state: Path) -> Path:
    """The directory for `--backend-directory`: the Python backend beside its stub.

    The wheel keeps the stub of every Python version elsewhere, and may be installed
    where nobody can write, so both are copied below `state`, once per wheel and Python
    version. Several processes may ask at once: each copies beside, one rename wins.

    Raises:
        StackError: the wheel is missing, or has no stub for this Python.
    """
    source = _server_folder()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = source / "python_backend_stubs" / python / STUB
    if not stub.is_file():
        raise StackError(
            f"Triton's Python backend does not support Python {python}",
            expected=f"one of {', '.join(sorted(p.name for p in stub.parent.parent.iterdir()))}",
            found=python,
            cure="make the virtual environment with one of these, and install llmops-assets there",
        )
    version = importlib.metadata.version(DISTRIBUTION)
    target = state / "triton" / f"backends-{version}-python{python}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".backends-", dir=target.parent))
    try:
        shutil.copytree(
            source / "backends" / "python",
            beside / "python",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        copied = beside / "python" / STUB
        shutil.copyfile(stub, copied)
        copied.chmod(0o755)  # the wheel does not keep the bit
        try:
            beside.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # gone already if the rename won
    return target


def server_command(
    repository: Path, endpoint: Endpoint, backends: Path
) -> tuple[list[str], dict[str, str]]:
    """Argument list and whole environment of a Triton server for one repository.

    All models of `repository` are loaded at the start; the server ends if one of them
    does not load. Shared-memory names are derived from the repository's path, so that
    servers on one host keep apart and `remove_leftovers` knows what a killed one left.

    Every start has another secret for the management protocols, and nobody keeps it:
    the arguments of a process are visible to others on the host, so what the secret
    cannot protect (loading models) is off altogether.

    Args:
        repository: model repository; the server only reads it.
        endpoint: where to listen.
        backends: from `backend_directory`.

    Raises:
        StackError: the wheel is missing, or this Python has no shared libpython.
    """
    restriction = f"{RESTRICTED_PROTOCOLS}:{SECRET_HEADER}={secrets.token_hex(32)}"
    server = _server_folder()
    command = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--cache-directory={server / 'caches'}",
        "--model-control-mode=none",
        # config.pbtxt is complete; completing it would start every model twice.
        "--disable-auto-complete-config",
        "--exit-on-error=true",
        "--strict-readiness=true",
        f"--exit-timeout-secs={EXIT_TIMEOUT_SECONDS}",
        f"--http-address={endpoint.host}",
        f"--http-port={endpoint.http_port}",
        f"--grpc-address={endpoint.host}",
        f"--grpc-port={endpoint.grpc_port}",
        f"--metrics-address={endpoint.host}",
        f"--metrics-port={endpoint.metrics_port}",
        f"--http-restricted-api={restriction}",
        f"--grpc-restricted-protocol={restriction}",
        f"--backend-config=python,shm-region-prefix-name={_shared_memory_prefix(repository)}",
        f"--backend-config=python,stub-timeout-seconds={STUB_TIMEOUT_SECONDS}",
        # The wheel serves CPU engines; looking for GPUs only fills the log with errors.
        "--allow-gpu-metrics=false",
        "--log-format=ISO8601",
    ]
    inherited = {name: os.environ[name] for name in INHERITED_ENVIRONMENT if name in os.environ}
    binaries = Path(sys.executable).parent  # not resolved: this is how the stub finds our venv
    environment = {
        **inherited,
        "PATH": f"{binaries}:/usr/local/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": f"{_wheel_libraries()}:{_libpython().parent}",
        # Spinning threads of an idle model take the cores of the one that works.
        "OMP_WAIT_POLICY": "passive",
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return command, environment


def remove_leftovers(repository: Path) -> None:
    """Removes shared memory of an earlier, killed server of this repository.

    Triton frees it only when it ends by itself; `/dev/shm` is small in containers.
    """
    for region in SHARED_MEMORY.glob(_shared_memory_prefix(repository) + "*"):
        region.unlink(missing_ok=True)


def ready(
    endpoint: Endpoint, model: str, version: int, timeout_seconds: float = CALL_TIMEOUT_SECONDS
) -> bool:
    """Whether the server answers and has exactly this version ready."""
    try:
        response = httpx.get(
            f"{endpoint.http}/v2/models/{model}/versions/{version}/ready", timeout=timeout_seconds
        )
    except httpx.TransportError:
        return False
    return response.status_code == httpx.codes.OK


def loaded_version(
    endpoint: Endpoint, model: str, timeout_seconds: float = CALL_TIMEOUT_SECONDS
) -> int | None:
    """The version of the model that the server itself says it has; None if it has none.

    Raises:
        SlotError: the server does not answer, or has several versions.
    """
    url = f"{endpoint.http}/v2/models/{model}"
    try:
        response = httpx.get(url, timeout=timeout_seconds)
    except httpx.TransportError as error:
        raise _no_answer(url, error) from error
    if response.status_code in (httpx.codes.NOT_FOUND, httpx.codes.BAD_REQUEST):
        return None
    versions = _content(response).get("versions", [])
    if len(versions) != 1:
        raise SlotError(
            f"{url} does not serve one version",
            expected="one version per slot",
            found=versions,
            cure="deploy the release again; it fills the slot anew",
        )
    return int(versions[0])


def generate(
    url: str | Endpoint,
    model: str,
    prompt: str,
    *,
    max_tokens: int | None = None,
    contract: RequestContract = EMBEDDED,
    version: int | None = None,
    timeout_seconds: float = GENERATE_TIMEOUT_SECONDS,
    headers: Mapping[str, str] | None = None,
    **inputs: Any,
) -> Mapping[str, Any]:
    """One answer through Triton's generate extension.

    Args:
        url: a slot, or the address of a gateway.
        model: its name.
        prompt: the input text.
        max_tokens: longest answer, tokens; None for the model's own limit.
        contract: of the package that is asked.
        version: pins the request to a version; None leaves the choice to the server.
        timeout_seconds: limit of connecting, and of every wait for more bytes.
        headers: of the request, beside the usual ones.
        inputs: of this model, such as `temperature`, `top_p`, `seed`, `stop_words`.

    Returns:
        The model's outputs by name, which the contract says, and Triton's `model_name` and
        `model_version`.

    Raises:
        SlotError: there was no answer, or the request was refused.
    """
    address = _generate_url(url, model, version, "generate")
    body = contract.body(prompt, max_tokens, stream=False) | inputs
    try:
        response = httpx.post(address, json=body, headers=headers, timeout=timeout_seconds)
    except httpx.TransportError as error:
        raise _no_answer(address, error) from error
    return _content(response)


def generate_stream(
    url: str | Endpoint,
    model: str,
    prompt: str,
    *,
    max_tokens: int | None = None,
    contract: RequestContract = EMBEDDED,
    version: int | None = None,
    timeout_seconds: float = GENERATE_TIMEOUT_SECONDS,
    **inputs: Any,
) -> Generator[Mapping[str, Any]]:
    """An answer in pieces, each as `generate` returns it, as they come.

    The pieces' texts add up to the answer, or each repeats it so far, as the contract says.
    Arguments as for `generate`.

    Raises:
        SlotError: there was no answer, the request was refused, or the stream broke off.
    """
    address = _generate_url(url, model, version, "generate_stream")
    body = contract.body(prompt, max_tokens, stream=True) | inputs
    # Without a finish reason a stream that ends cleanly, after something, was whole.
    finished = False
    try:
        with httpx.stream("POST", address, json=body, timeout=timeout_seconds) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                _content(response)
            for line in response.iter_lines():
                if line.startswith("data:"):
                    piece = json.loads(line.removeprefix("data:"))
                    if "error" in piece:
                        raise _refused(address, piece["error"])
                    finished = contract.finish_reason is None or contract.ends(piece)
                    yield piece
    except httpx.TransportError as error:
        raise _no_answer(address, error) from error
    if not finished:
        raise _no_answer(address, "the stream ended before the answer did")


def metrics_text(endpoint: Endpoint, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> str:
    """Triton's metrics in the Prometheus text format.

    Raises:
        SlotError: the server does not answer.
    """
    try:
        response = httpx.get(endpoint.metrics, timeout=timeout_seconds)
    except httpx.TransportError as error:
        raise _no_answer(endpoint.metrics, error) from error
    if response.status_code != httpx.codes.OK:
        raise _no_answer(endpoint.metrics, f"status {response.status_code}")
    return response.text


def _server_folder() -> Path:
    """The wheel's folder of Triton's own files."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise StackError(
            "Triton is not installed",
            expected=f"the package {DISTRIBUTION}",
            cure="install llmops-assets with its local extra: pip install 'llmops-assets[local]'",
        )
    folder = Path(spec.origin).parent / "tritonserver"
    if not (folder / "bin" / "tritonserver").is_file():
        raise StackError(
            f"The package {DISTRIBUTION} has no tritonserver",
            expected=folder / "bin" / "tritonserver",
            cure=f"install the wheel for this platform: pip install --force-reinstall "
            f"--no-deps {DISTRIBUTION}",
        )
    return folder


def _wheel_libraries() -> Path:
    """Shared libraries that the wheel brings; auditwheel puts them beside the package."""
    return _server_folder().parent.parent / "nvidia_pytriton.libs"


def _libpython() -> Path:
    """The shared libpython that the backend's stub is linked against."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    library_folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    candidates = (
        library_folder / name,
        library_folder / multiarch / name,  # Debian
        Path(sys.base_prefix) / "lib" / name,  # relocated builds, whose LIBDIR is the builder's
    )
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    package = name.removesuffix(".so.1.0")
    raise StackError(
        "Triton's Python backend cannot run with this Python, which has no shared library",
        expected=name,
        found="nothing in " + ", ".join(str(folder.parent) for folder in candidates),
        cure=f"install the Debian package {package}, or use a Python that was configured with "
        "--enable-shared (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install)",
    )


def _shared_memory_prefix(repository: Path) -> str:
    return "llmops_" + hashlib.sha256(os.fsencode(repository.resolve())).hexdigest()[:12] + "_"


def _generate_url(url: str | Endpoint, model: str, version: int | None, call: str) -> str:
    base = url.http if isinstance(url, Endpoint) else url.rstrip("/")
    pinned = "" if version is None else f"/versions/{version}"
    return f"{base}/v2/models/{model}{pinned}/{call}"


def _content(response: httpx.Response) -> Mapping[str, Any]:
    """The answer's JSON object.

    Raises:
        SlotError: the status is not 200, or it is no JSON object.
    """
    try:
        # A stream that is refused is refused as a stream.
        content = json.loads(response.text.removeprefix("data:"))
    except ValueError:
        content = None
    if response.status_code == httpx.codes.OK and isinstance(content, dict):
        return content
    reason = content.get("error") if isinstance(content, dict) else response.text[:500]
    raise _refused(str(response.url), f"status {response.status_code}, {reason}")


def _refused(url: str, reason: object) -> SlotError:
    return SlotError(
        f"{url} refused the request",
        expected="an answer",
        found=reason,
        cure="mend the request if it says so; otherwise read the slot's log (`llmops logs`)",
    )


def _no_answer(url: str, reason: object) -> SlotError:
    return SlotError(
        f"{url} does not answer",
        found=repr(reason) if isinstance(reason, Exception) else reason,
        cure="see `llmops status` and the slot's log (`llmops logs`); deploy again if it is down",
    )
