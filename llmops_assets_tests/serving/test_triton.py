"""A packaged model in a real Triton: answers, streams, refusals, and who may manage it."""

from __future__ import annotations

import os
import re
import socket
import sys
import sysconfig
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import tritonclient.grpc as grpc
from transformers import AutoModelForCausalLM, AutoTokenizer
from tritonclient.utils import InferenceServerException

from llmops_assets.errors import SlotError, StackError
from llmops_assets.serving import triton
from llmops_assets.serving.slot_process import EXIT_REFUSED
from llmops_assets_tests.tiny_llama import TinyLlama

from ..waiting import wait_for
from .conftest import MODEL, Server, fill, free_endpoint, running, start_process

PROMPT = "3 août 1990"


def test_answer_is_the_checkpoints(tiny: TinyLlama, server: Server) -> None:
    """What serves must say what was evaluated: same prompt ids, same greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.checkpoint, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                               do_sample=False)[0, ids.shape[1] :]  # fmt: skip
    answer = triton.generate(server.endpoint, MODEL, PROMPT, version=server.version, max_tokens=20)
    assert answer["text_output"] == tokenizer.decode(generated, skip_special_tokens=True)
    assert (answer["input_tokens"], answer["output_tokens"]) == (ids.shape[1], len(generated))
    assert answer["finish_reason"] == "length"
    assert answer["model_version"] == str(server.version)


def test_server_says_what_it_serves(server: Server) -> None:
    """The platform asks the server itself, not its own records."""
    assert triton.loaded_version(server.endpoint, MODEL) == server.version
    assert triton.loaded_version(server.endpoint, "other") is None
    assert triton.ready(server.endpoint, MODEL, server.version)
    assert not triton.ready(server.endpoint, MODEL, server.version + 1)
    assert not triton.ready(free_endpoint(), MODEL, server.version)


def test_metrics_count_the_answers(server: Server) -> None:
    """Draining and monitoring live from these numbers."""

    def answered() -> float:
        prefix = f'nv_inference_request_success{{model="{MODEL}"'
        lines = triton.metrics_text(server.endpoint).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(prefix))

    before = answered()
    triton.generate(server.endpoint, MODEL, PROMPT, max_tokens=1)
    wait_for(lambda: answered() == before + 1)


def test_stream_comes_while_the_answer_is_made(server: Server) -> None:
    """A stream that arrives at once at the end would defeat its purpose."""
    started = time.monotonic()
    pieces: list[str] = []
    times: list[float] = []
    for piece in triton.generate_stream(server.endpoint, MODEL, PROMPT, max_tokens=1500):
        pieces.append(piece["text_output"])
        times.append(time.monotonic() - started)
    whole = triton.generate(server.endpoint, MODEL, PROMPT, max_tokens=1500)
    assert "".join(pieces) == whole["text_output"]
    assert len(pieces) > 100
    assert times[0] < 0.5 * times[-1]


def test_sampling_follows_its_parameters(server: Server) -> None:
    """Temperature 0 is greedy; above it the seed decides, and a tiny top_p is greedy again."""

    def ask(**parameters: Any) -> str:
        answer = triton.generate(server.endpoint, MODEL, PROMPT, max_tokens=20, **parameters)
        return str(answer["text_output"])

    greedy = ask()
    assert ask(temperature=0.0, seed=5) == greedy
    assert ask(temperature=1.0, seed=5) == ask(temperature=1.0, seed=5) != greedy
    assert ask(temperature=1.0, seed=5) != ask(temperature=1.0, seed=6)
    assert ask(temperature=1.0, seed=5, top_p=1e-6) == greedy
    assert ask(temperature=1.0) != ask(temperature=1.0)


def test_answer_ends_before_a_stop_word(server: Server) -> None:
    """Stop words work on text, whatever the tokens are."""
    whole = str(triton.generate(server.endpoint, MODEL, PROMPT, max_tokens=20)["text_output"])
    word = whole[5:8]
    answer = triton.generate(server.endpoint, MODEL, PROMPT, max_tokens=20, stop_words=[word])
    assert answer["text_output"] == whole[: whole.index(word)]
    assert answer["finish_reason"] == "stop"
    assert answer["output_tokens"] < 20


@pytest.mark.parametrize(
    ("prompt", "parameters", "reason"),
    [
        ("", {}, "text_input is empty"),
        ("x" * 63, {}, "text_input has 65 tokens, the model takes at most 64"),
        (PROMPT, {"max_tokens": 0}, "max_tokens is 0"),
        (PROMPT, {"max_token": 5}, "no parameter 'max_token'"),
        (PROMPT, {"temperature": -1}, "temperature is -1.0"),
        (PROMPT, {"temperature": 1e39}, "temperature is inf"),
        (PROMPT, {"top_p": 0}, "top_p is 0.0"),
        (PROMPT, {"seed": -1}, "seed is -1"),
        (PROMPT, {"stop_words": ["a", ""]}, "stop_words must be"),
        (PROMPT, {"max_tokens": "many"}, "non-signed-integer"),
    ],
)
def test_bad_request_fails_alone(
    server: Server, prompt: str, parameters: dict[str, Any], reason: str
) -> None:
    """The client learns what is wrong with it, streamed or not, and the model goes on."""
    with pytest.raises(SlotError, match=reason):
        triton.generate(server.endpoint, MODEL, prompt, **parameters)
    with pytest.raises(SlotError, match=reason):
        list(triton.generate_stream(server.endpoint, MODEL, prompt, **parameters))
    assert triton.generate(server.endpoint, MODEL, PROMPT, max_tokens=1)["output_tokens"] == 1
    assert triton.ready(server.endpoint, MODEL, server.version)


def test_longest_allowed_request_is_answered(server: Server) -> None:
    """The limits of the package are limits of what works, not one token too many."""
    answer = triton.generate(server.endpoint, MODEL, "x" * 62, max_tokens=10**6)
    assert answer["input_tokens"] == 64
    assert answer["output_tokens"] <= 3000


def test_generation_stops_when_the_client_has_gone(server: Server) -> None:
    """A model that talks on to nobody would keep everybody else waiting.

    Triton's metrics do not count a cancelled request of a decoupled model, so the next
    client's waiting time has to tell.
    """

    def seconds_of(max_tokens: int) -> float:
        started = time.monotonic()
        triton.generate(server.endpoint, MODEL, PROMPT, max_tokens=max_tokens)
        return time.monotonic() - started

    def wait_after_leaving() -> float:
        stream = triton.generate_stream(server.endpoint, MODEL, PROMPT, max_tokens=3000)
        next(stream)
        stream.close()
        return seconds_of(1)

    assert min(wait_after_leaving() for _ in range(3)) < 0.4 * min(
        seconds_of(3000) for _ in range(2)
    )


def test_requests_at_once_all_get_their_own_answer(server: Server) -> None:
    """They are answered together, but nothing of one may leak into another."""
    prompts = [f"{day} mai 2001" for day in range(1, 17)]

    def ask(prompt: str) -> str:
        return str(triton.generate(server.endpoint, MODEL, prompt, max_tokens=30)["text_output"])

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts)) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", f"/v2/repository/models/{MODEL}/load"),
        ("POST", f"/v2/repository/models/{MODEL}/unload"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/logging"),
        ("POST", "/v2/trace/setting"),
        ("POST", f"/v2/models/{MODEL}/trace/setting"),
    ],
)
def test_management_needs_the_secret(server: Server, method: str, path: str) -> None:
    """The load call can bring its own model files: whoever reaches it runs code."""
    url = server.endpoint.http + path
    for headers in ({}, {triton.SECRET_HEADER: "guess"}):
        response = httpx.request(method, url, json={}, headers=headers, timeout=10)
        assert response.status_code == 403, response.text
    assert triton.ready(server.endpoint, MODEL, server.version)


def test_not_even_the_secret_loads_models(server: Server) -> None:
    """Others on the host can read it in the process list."""
    arguments = psutil.Process(server.process.pid).cmdline()
    (option,) = [a for a in arguments if a.startswith("--http-restricted-api=")]
    headers = {triton.SECRET_HEADER: option.rpartition("=")[2]}
    base = f"{server.endpoint.http}/v2/repository"
    index = httpx.post(f"{base}/index", headers=headers, timeout=10)
    assert index.status_code == 200, "the secret was not understood, the rest proves nothing"
    for call in ("load", "unload"):
        url = f"{base}/models/{MODEL}/{call}"
        response = httpx.post(url, json={}, headers=headers, timeout=30)
        assert response.status_code >= 400, response.text
        assert "not allowed" in response.text
    assert triton.ready(server.endpoint, MODEL, server.version)


def test_management_over_grpc_needs_the_secret(server: Server) -> None:
    """The same calls exist on the other port."""
    with grpc.InferenceServerClient(
        f"{server.endpoint.host}:{server.endpoint.grpc_port}"
    ) as client:
        assert client.is_model_ready(MODEL, str(server.version), client_timeout=10)
        for call in (
            lambda: client.get_model_repository_index(client_timeout=10),
            lambda: client.load_model(MODEL, client_timeout=10),
            lambda: client.get_system_shared_memory_status(client_timeout=10),
            lambda: client.get_log_settings(client_timeout=10),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()


def test_server_listens_on_loopback_only(server: Server) -> None:
    """None of its three ports authenticates anybody."""
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")  # IPv4 through an IPv6 socket
        for connection in psutil.Process(server.process.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_server_gets_no_secrets_of_ours(server: Server) -> None:
    """A core dump or a model's code must not find the platform's passwords."""
    allowed = {
        *triton.INHERITED_ENVIRONMENT, "PATH", "LD_LIBRARY_PATH", "OMP_WAIT_POLICY",
        "ORT_DISABLE_TELEMETRY", "PYTHONUNBUFFERED",
    }  # fmt: skip
    assert set(psutil.Process(server.process.pid).environ()) <= allowed


def test_two_servers_side_by_side_and_one_killed(
    start: Callable[[str, int], Server], state: Path
) -> None:
    """Blue and green live on one host, and one must be able to die without the other.

    The killed one starts again in the same slot, over its own bytecode and shared memory,
    which stays behind when nobody of it is left to clean up.
    """
    blue, green = start("blue", 1), start("green", 2)
    assert triton.loaded_version(blue.endpoint, MODEL) == 1
    assert triton.loaded_version(green.endpoint, MODEL) == 2
    server = psutil.Process(blue.process.pid)
    stubs = server.children(recursive=True)
    assert stubs
    arguments = " ".join(server.cmdline())
    found = re.search(r"shm-region-prefix-name=(\w+)", arguments)
    assert found is not None

    def regions() -> list[Path]:
        return list(triton.SHARED_MEMORY.glob(found[1] + "*"))

    failures: list[SlotError] = []
    enough = threading.Event()

    def ask_green() -> None:
        while not enough.is_set():
            try:
                triton.generate(green.endpoint, MODEL, PROMPT, max_tokens=5)
            except SlotError as error:
                failures.append(error)

    asking = threading.Thread(target=ask_green)
    asking.start()
    try:
        server.suspend()
        for process in (*stubs, server):
            process.kill()
        blue.process.wait(10)
        wait_for(lambda: not any(stub.is_running() for stub in stubs))
        assert regions()
        with running(blue.slot_directory, blue.endpoint, 1, state) as again:
            assert triton.generate(again.endpoint, MODEL, PROMPT, max_tokens=5)
            assert len(regions()) == 1  # a server has one for each model instance
    finally:
        enough.set()
        asking.join(30)
    assert failures == []


def test_model_that_does_not_load_ends_the_server(
    tiny: TinyLlama, state: Path, tmp_path: Path
) -> None:
    """A server without its model would look alive to a supervisor for ever."""
    package = tmp_path / "package"
    version = package / "repository" / MODEL / "version"
    version.mkdir(parents=True)
    source = tiny.package / "repository" / MODEL
    (package / "repository" / MODEL / "config.pbtxt").write_bytes(
        (source / "config.pbtxt").read_bytes()
    )
    (version / "model.py").write_text("raise RuntimeError('no such engine')")
    fill(package, tmp_path / "slot", state)
    process = start_process(tmp_path / "slot", state)
    try:
        assert process.wait(60) not in (0, EXIT_REFUSED)
    finally:
        process.kill()
        process.wait(10)
    assert "no such engine" in (tmp_path / "slot" / "log").read_text()


def test_backends_are_copied_once_by_many(tmp_path: Path) -> None:
    """Slots start at the same time; none may find a half-copied backend."""
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(triton.backend_directory, [tmp_path] * 16))
    (backends,) = found
    assert os.access(backends / "python" / triton.STUB, os.X_OK)
    assert (backends / "python" / "libtriton_python.so").is_file()
    assert list(backends.parent.iterdir()) == [backends]


def test_python_without_shared_library_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise the model load hangs, and only the stub's output says why."""
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    with pytest.raises(StackError, match=r"Debian package libpython3\.\d+"):
        triton.server_command(tmp_path, free_endpoint(), tmp_path)


def test_python_without_stub_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A newer Python than the wheel knows must be told before Triton is started."""
    Version = namedtuple("Version", "major minor micro")
    monkeypatch.setattr(sys, "version_info", Version(3, 99, 0))
    with pytest.raises(StackError, match=r"does not support Python 3\.99"):
        triton.backend_directory(tmp_path)


def test_broken_stream_is_not_an_answer() -> None:
    """A stream that ends early has status 200 all the same."""

    def answer_half(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            # Until the client has nothing more to say: what is not read makes closing a reset.
            request = connection.recv(65536)
            while not request.endswith(b"}"):
                request += connection.recv(65536)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
                b'data: {"text_output": "20", "finish_reason": ""}\n\n'
            )

    with (
        ThreadPoolExecutor(1) as pool,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        listening.settimeout(10)
        pool.submit(answer_half, listening)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(SlotError, match="ended before the answer did"):
            list(triton.generate_stream(url, MODEL, PROMPT))
