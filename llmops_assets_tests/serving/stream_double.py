"""A double of Triton's `generate_stream` whose delays are known, in a process of its own.

What it does with a request is said by the prompt (see `ANSWERS`); anything else is
answered with `TOKENS` tokens, the first after `FIRST_SECONDS`, then one each
`NEXT_SECONDS`. Real is: HTTP/1.1 over a socket, chunked, connections kept open, server-sent
events as Triton 2.51 writes them. `GET /` tells what it was asked.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
                await self._answer(json.loads(body), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, as some tests want it to
        finally:
            writer.close()

    async def _answer(self, request: dict[str, str], writer: asyncio.StreamWriter) -> None:
        prompt = request["text_input"]
        self.prompts.append(prompt)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if prompt == "unavailable":
                self._plain(writer, "503 Service Unavailable", {"error": "no slot is ready"})
                await writer.drain()
            else:
                await self._stream(prompt, writer)
        finally:
            self.under_way -= 1

    async def _stream(self, prompt: str, writer: asyncio.StreamWriter) -> None:
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
            piece: dict[str, object] = {"text_output": "x" * (2 if prompt == "pairs" else 1)}
            if prompt != "uncounted":
                piece["output_tokens"] = token
            self._event(writer, piece | {"finish_reason": "stop" if token == TOKENS else ""})
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
