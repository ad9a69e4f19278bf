"""A double of Triton's `generate_stream` whose delays are known, in a process of its own.

What it does with a request is said by the prompt (see `ANSWERS`); anything else is
answered with `TOKENS` tokens, the first after `FIRST_SECONDS`, then one each
`NEXT_SECONDS`. Outputs are those of the embedded toolchain's model, or, at the addresses of
the models `ensemble` and `llmapi`, those of NVIDIA's templates. Real is: HTTP/1.1 over a
socket, chunked, connections kept open, server-sent events as Triton 2.51 writes them. `GET /`
tells what it was asked.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

FIRST_SECONDS = 0.05
NEXT_SECONDS = 0.01
TOKENS = 8
SLOW_SECONDS = 0.5
ANSWERS = ("error", "broken", "cut", "unavailable", "slow", "pairs", "uncounted", "not json")
START_SECONDS = 20


@contextmanager
def stream_double() -> Iterator[str]:
    """The double's address; it runs until the end."""
    process = subprocess.Popen([sys.executable, "-m", __name__], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(START_SECONDS)


PieceOf = Callable[[int, dict[str, Any]], dict[str, Any]]
"""From the number of a token and the request to the outputs of its piece."""


def embedded(token: int, request: dict[str, Any]) -> dict[str, Any]:
    """The embedded toolchain's model counts all tokens so far, unless asked not to."""
    prompt = request["text_input"]
    count = {} if prompt == "uncounted" else {"output_tokens": token}
    reason = {"finish_reason": "stop" if token == TOKENS else ""}
    return {"text_output": "x" * (2 if prompt == "pairs" else 1), **count, **reason}


def ensemble(token: int, request: dict[str, Any]) -> dict[str, Any]:
    """NVIDIA's ensemble counts the tokens of a piece when asked, and says nothing of the end."""
    assert {"text_input", "max_tokens", "stream"} <= request.keys()
    counted = request.get("return_num_output_tokens") is True
    # The last piece holds the end token, which is skipped in the text.
    text = "" if token == TOKENS else "x"
    return {"text_output": text, **({"num_output_tokens": 1} if counted else {})}


def llmapi(token: int, request: dict[str, Any]) -> dict[str, Any]:
    """NVIDIA's llmapi model repeats the answer, and says `None` until it has a reason."""
    assert {"text_input", "sampling_param_max_tokens", "streaming"} <= request.keys()
    told = request.get("return_finish_reason") is True
    reason = {"finish_reason": "stop" if token == TOKENS else "None"} if told else {}
    return {"text_output": "x" * min(token, TOKENS - 1), **reason}


MODELS: Mapping[str, PieceOf] = {"ensemble": ensemble, "llmapi": llmapi}


class Double:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.connections = 0
        self.prompts: list[str] = []
        self.under_way = 0
        self.most_under_way = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while line := await reader.readline():
                length = 0
                while (header := (await reader.readline()).strip().lower()) != b"":
                    if header.startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                body = await reader.readexactly(length)
                if line.startswith(b"GET"):
                    self.connections -= 1  # who asks for the count is not counted
                    self._plain(writer, "200 OK", vars(self))
                    await writer.drain()
                    break
                model = line.split(b"/")[3].decode()
                await self._answer(model, json.loads(body), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, as some tests want it to
        finally:
            writer.close()

    async def _answer(
        self, model: str, request: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        prompt = request["text_input"]
        self.prompts.append(prompt)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if prompt == "unavailable":
                self._plain(writer, "503 Service Unavailable", {"error": "no slot is ready"})
                await writer.drain()
            else:
                await self._stream(MODELS.get(model, embedded), request, writer)
        finally:
            self.under_way -= 1

    async def _stream(
        self, piece_of: PieceOf, request: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        prompt = request["text_input"]
        # Against the clock, so that what a wait is late by does not add up.
        due = asyncio.get_running_loop().time() + FIRST_SECONDS
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for token in range(1, TOKENS + 1):
            if prompt == "pairs" and token % 2:
                due += NEXT_SECONDS if token > 1 else 0.0
                continue
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            due += NEXT_SECONDS + (SLOW_SECONDS if prompt == "slow" else 0.0)
            if token == 3 and prompt == "error":
                self._event(writer, {"error": "generation failed: out of pages"})
                break
            if token == 3 and prompt == "broken":
                writer.write(b"ff\r\ndata: {")
                await writer.drain()
                raise ConnectionAbortedError
            if token == 3 and prompt == "cut":
                break
            if token == 3 and prompt == "not json":
                self._event(writer, "{")
                break
            self._event(writer, piece_of(token, request))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    @staticmethod
    def _event(writer: asyncio.StreamWriter, content: object) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        data = f"data: {text}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    @staticmethod
    def _plain(writer: asyncio.StreamWriter, status: str, content: object) -> None:
        data = json.dumps(content).encode()
        head = f"HTTP/1.1 {status}\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)


async def main() -> None:
    server = await asyncio.start_server(Double().serve, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
