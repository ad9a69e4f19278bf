"""The packaged model in a real Triton with many clients: batches, departures, a full queue."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc

from llmops_assets.errors import SlotError
from llmops_assets.serving import triton
from llmops_assets.serving.slots import Endpoint
from llmops_assets.toolchains.base import VERSION_FOLDER
from llmops_assets_tests.tiny_llama import TinyLlama

from ..waiting import wait_for
from .conftest import MODEL, READY_SECONDS, free_endpoint

PROMPT = "3 août 1990"


@dataclass(frozen=True)
class Triton:
    """A server of one model."""

    endpoint: Endpoint
    process: subprocess.Popen[bytes]

    @property
    def grpc(self) -> str:
        return f"{self.endpoint.host}:{self.endpoint.grpc_port}"

    def metric(self, name: str) -> float:
        """One of the model's own metrics."""
        for line in triton.metrics_text(self.endpoint).splitlines():
            if line.startswith(f'{name}{{model="{MODEL}",version="1"}}'):
                return float(line.split()[-1])
        raise AssertionError(f"no {name}")

    def ask(self, prompt: str, max_tokens: int) -> tuple[Any, ...]:
        answer = triton.generate(self.endpoint, MODEL, prompt, max_tokens=max_tokens)
        return tuple(answer[name] for name in ("text_output", "finish_reason", "output_tokens"))


@contextmanager
def serving(package: Path, state: Path, folder: Path, **settings: int) -> Iterator[Triton]:
    """A Triton with the package, some of its parameters changed."""
    repository = folder / "repository"
    shutil.copytree(package / "repository", repository)
    (repository / MODEL / VERSION_FOLDER).rename(repository / MODEL / "1")
    configuration = repository / MODEL / "config.pbtxt"
    text = configuration.read_text()
    for name, value in settings.items():
        before, key, after = text.partition(f'key: "{name}"')
        assert key
        text = before + key + after.replace(after.split('"')[1], str(value), 1)
    configuration.write_text(text)
    endpoint = free_endpoint()
    command, environment = triton.server_command(
        repository, endpoint, triton.backend_directory(state)
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: triton.ready(endpoint, MODEL, 1), "readiness", READY_SECONDS)
        yield Triton(endpoint, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(triton.EXIT_TIMEOUT_SECONDS + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        triton.remove_leftovers(repository)


@pytest.fixture(scope="module")
def server(
    tiny: TinyLlama, state: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Triton]:
    with serving(tiny.package, state, tmp_path_factory.mktemp("batched")) as server:
        yield server


def test_many_clients_get_what_they_would_get_alone(server: Triton) -> None:
    """Prompts of any length, answers of any length, streamed and whole, in rounds."""
    draw = random.Random(1)
    letters = "abcdefghij 0123456789"
    questions = [
        ("".join(draw.choices(letters, k=draw.randint(1, 62))), draw.randint(1, 40))
        for _ in range(60)
    ]

    def streamed(prompt: str, max_tokens: int) -> tuple[Any, ...]:
        pieces = list(triton.generate_stream(server.endpoint, MODEL, prompt, max_tokens=max_tokens))
        text = "".join(piece["text_output"] for piece in pieces)
        return text, pieces[-1]["finish_reason"], pieces[-1]["output_tokens"]

    alone = [server.ask(*question) for question in questions]
    assert len({text for text, *_ in alone}) > 30
    batches, batched = (
        server.metric("llmops_batches_total"),
        server.metric("llmops_batched_requests_total"),
    )
    assert batches == batched
    tokens = sum(count for *_, count in alone)
    wait_for(lambda: server.metric("llmops_tokens_total") == tokens)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(server.ask, *zip(*questions, strict=True))) == alone
        assert list(pool.map(streamed, *zip(*questions, strict=True))) == alone
    batches, batched = (
        server.metric("llmops_batches_total") - batches,
        server.metric("llmops_batched_requests_total") - batched,
    )
    assert batched == 2 * len(questions)
    assert batched > 2 * batches, "they were not answered together"
    wait_for(lambda: server.metric("llmops_tokens_total") == 3 * tokens)
    wait_for(lambda: server.metric("llmops_requests_in_progress") == 0)


@pytest.mark.parametrize("reset", [False, True])
def test_answer_ends_with_its_client(server: Triton, reset: bool) -> None:
    """Whether it closes its connection or dies: the model generates for nobody else.

    A token of this model takes a tenth of a millisecond, so the time until Triton sees the
    end of a connection counts here in tokens.
    """
    before = server.metric("llmops_tokens_total")
    body = f'{{"text_input": "{PROMPT}", "max_tokens": 3000, "stream": true}}'
    with socket.create_connection((server.endpoint.host, server.endpoint.http_port)) as client:
        client.settimeout(10)
        client.sendall(
            f"POST /v2/models/{MODEL}/generate_stream HTTP/1.1\r\nHost: triton\r\n"
            f"Content-Length: {len(body.encode())}\r\n\r\n{body}".encode()
        )
        assert b"200 OK" in client.recv(4096)
        if reset:
            # Closing then sends a reset, as the kernel does for a process that was killed
            # with unread answers.
            linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    wait_for(lambda: server.metric("llmops_requests_in_progress") == 0)
    assert 0 < server.metric("llmops_tokens_total") - before < 2000
    assert server.ask(PROMPT, 5)[2] == 5


def test_cancelled_call_ends_for_grpc_too(server: Triton) -> None:
    """The other protocol has a cancellation of its own."""
    before = server.metric("llmops_tokens_total")
    came = threading.Event()
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: came.set())
        client.async_stream_infer(MODEL, grpc_inputs())
        assert came.wait(10)
        client.stop_stream(cancel_requests=True)
    wait_for(lambda: server.metric("llmops_requests_in_progress") == 0)
    assert 0 < server.metric("llmops_tokens_total") - before < 2000


def grpc_inputs() -> list[grpc.InferInput]:
    text, stream = (
        grpc.InferInput("text_input", [1], "BYTES"),
        grpc.InferInput("stream", [1], "BOOL"),
    )
    text.set_data_from_numpy(np.array([PROMPT.encode()], dtype=np.object_))
    stream.set_data_from_numpy(np.array([True]))
    return [text, stream]


def test_full_queue_refuses_and_stop_ends_streams(
    tiny: TinyLlama, state: Path, tmp_path: Path
) -> None:
    """Who cannot be taken is told why, and what was begun is sent to its end at a stop."""
    limits = {"batch_size": 2, "queue_size": 2, "batch_window_milliseconds": 50}
    with serving(tiny.package, state, tmp_path, **limits) as server:
        alone = server.ask(PROMPT, 1500)
        streaming = threading.Barrier(3)

        def streamed(before_the_second_piece: Callable[[], object]) -> object:
            pieces: list[Mapping[str, Any]] = []
            stream = triton.generate_stream(server.endpoint, MODEL, PROMPT, max_tokens=1500)
            try:
                for piece in stream:
                    pieces.append(piece)
                    if len(pieces) == 1:
                        before_the_second_piece()
            except SlotError as error:
                return str(error)
            text = "".join(piece["text_output"] for piece in pieces)
            return text, pieces[-1]["finish_reason"], pieces[-1]["output_tokens"]

        with ThreadPoolExecutor(10) as pool:
            found = list(pool.map(streamed, [lambda: None] * 10))
            refused = [answer for answer in found if answer != alone]
            assert 0 < len(refused) < len(found)
            assert all("2 requests wait already" in str(answer) for answer in refused)
            last = [pool.submit(streamed, lambda: streaming.wait(20)) for _ in range(2)]
            streaming.wait(20)
            server.process.send_signal(signal.SIGTERM)
            assert [future.result(60) for future in last] == [alone, alone]
        assert server.process.wait(20) == 0
