"""How many tokens a second the packaged model gives one client, and eight at once.

    .venv/bin/python -m benchmarks.serving [--rounds 5] [--tokens 64] [--layers 12] [--width 768]

It makes a Llama with random weights (97 million by default), has the CPU toolchain convert,
build (int8) and package it, and serves the package in a real Triton. Each round measures, one
right after the other, so that what else the machine does hits all alike:

- the engine alone, in this process: one answer, and a batch of eight prompts of one length;
- through Triton: one client; eight at once; eight at once with prompts of 8 to 56 tokens.

It prints the medians of the tokens per second, and the medians of each round's ratios. It
exits with 1 if eight clients get less than twice the tokens per second of one, or less than
0.7 of the engine alone: below what was measured on quiet cores (3 times, 0.89), since it is
for noticing that batching broke, on any machine.
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer
from llmops_assets.serving import triton
from llmops_assets.serving.slots import Endpoint
from llmops_assets.spec import parse_spec
from llmops_assets.toolchains import toolchain_for
from llmops_assets.toolchains.base import VERSION_FOLDER
from llmops_assets.toolchains.onnxruntime_genai.triton_model.generation import (
    Sampling,
    TextGenerator,
)
from llmops_assets.tools import ToolRunner

MODEL = "benchmark"
CLIENTS = 8
CONTEXT = 1024
PROMPT_TOKENS = 32
THREADS = 2
HEAD_SIZE = 64
READY_SECONDS = 120
CALL_SECONDS = 120
LEAST_OF_ONE_CLIENT = 2.0
LEAST_OF_THE_ENGINE = 0.7
SPEC = f"""\
name: {MODEL}
use_case: Answers nonsense, at the speed of a model that makes sense.
owner: team:benchmarks
metrics: [exact_match]
constraints: {{max_input_tokens: 64, max_output_tokens: 512}}
weights: {{source: path, path: unused}}
data: {{source: files, training: unused.parquet, evaluation: unused.parquet}}
engine: {{toolchain: onnxruntime_genai, precision: int8}}
serving: {{threads: {THREADS}, known_answers: [{{prompt: a, answer: b}}]}}
gates:
  accuracy: {{exact_match: {{at_least: 0}}}}
  engine_accuracy: {{exact_match: {{at_least: 0}}}}
  fairness: null
  latency:
    evaluation: [{{measure: end_to_end, at_most: 5}}]
    build: [{{measure: end_to_end, at_most: 5}}]
    staging: [{{measure: end_to_end, at_most: 5}}]
"""
TRITON_ONE, TRITON_MANY = "Triton, 1 client", f"Triton, {CLIENTS} clients"
TRITON_MIXED = f"Triton, {CLIENTS} clients, prompts of any length"
ENGINE_ONE, ENGINE_MANY = "engine alone, 1", f"engine alone, batch of {CLIENTS}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="Of each answer.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="Hidden size, a multiple of 64.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmops-serving-") as name:
        folder = Path(name)
        engine, package = make_package(folder, options.layers, options.width)
        generator = TextGenerator(engine, engine / "tokenizer.json", THREADS)
        with serving(package, folder) as endpoint:
            rounds = measure(generator, endpoint, options.rounds, options.tokens)
    for what in rounds[0]:
        speeds = [speed[what] for speed in rounds]
        print(f"{what:45} {statistics.median(speeds):8.0f} tokens/s"
              f"  [{min(speeds):.0f} to {max(speeds):.0f}]")  # fmt: skip

    def ratio(upper: str, lower: str) -> float:
        ratios = [speed[upper] / speed[lower] for speed in rounds]
        median = statistics.median(ratios)
        print(f"{upper} / {lower}: {median:.2f}  [{min(ratios):.2f} to {max(ratios):.2f}]")
        return median

    of_one_client = ratio(TRITON_MANY, TRITON_ONE)
    of_the_engine = ratio(TRITON_MANY, ENGINE_MANY)
    ratio(TRITON_MIXED, TRITON_ONE)
    ratio(TRITON_ONE, ENGINE_ONE)
    ratio(ENGINE_MANY, ENGINE_ONE)
    return int(of_one_client < LEAST_OF_ONE_CLIENT or of_the_engine < LEAST_OF_THE_ENGINE)


def make_package(folder: Path, layers: int, width: int) -> tuple[Path, Path]:
    """Directories of an engine and its package."""
    tokenizer = build_tokenizer([])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_SIZE,
            num_key_value_heads=width // HEAD_SIZE,
            max_position_embeddings=CONTEXT,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # so that no answer ends before its limit
    model.save_pretrained(folder / "checkpoint")
    save_tokenizer(tokenizer, folder / "checkpoint", CONTEXT)
    spec = parse_spec(SPEC, MODEL)
    toolchain = toolchain_for(spec.engine)
    tools = ToolRunner(work=folder / "work", log=folder / "tools.log", timeout_seconds=600)
    toolchain.convert(folder / "checkpoint", folder / "converted", spec.engine, tools)
    toolchain.build(folder / "converted", folder / "engine", spec.engine, {}, tools)
    toolchain.package(folder / "engine", folder / "checkpoint", folder / "package", spec)
    return folder / "engine", folder / "package"


@contextmanager
def serving(package: Path, folder: Path) -> Iterator[Endpoint]:
    """A Triton with the package, until the end."""
    repository = package / "repository"
    (repository / MODEL / VERSION_FOLDER).rename(repository / MODEL / "1")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    endpoint = Endpoint("127.0.0.1", *(listening.getsockname()[1] for listening in sockets))
    for listening in sockets:
        listening.close()
    command, environment = triton.server_command(
        repository, endpoint, triton.backend_directory(folder)
    )
    with (folder / "triton.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not triton.ready(endpoint, MODEL, 1):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit((folder / "triton.log").read_text(errors="replace"))
            time.sleep(0.1)
        yield endpoint
    finally:
        process.terminate()
        try:
            process.wait(triton.EXIT_TIMEOUT_SECONDS + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def measure(
    generator: TextGenerator, endpoint: Endpoint, rounds: int, tokens: int
) -> list[dict[str, float]]:
    """Tokens per second of everything, by round."""
    draw = random.Random(0)

    def prompts(shortest: int, longest: int) -> list[str]:
        # A token is a character, and the tokenizer puts one before them and one after.
        lengths = [draw.randint(shortest, longest) - 2 for _ in range(CLIENTS)]
        return ["".join(draw.choices("abcdefgh 0123", k=length)) for length in lengths]

    def engine(texts: Sequence[str]) -> int:
        batch = [generator.encode(text) for text in texts]
        steps = generator.steps(batch, [Sampling(tokens)] * len(batch))
        return sum(token is not None for step in steps for token in step)

    # Kept open: making a client takes as long as several tokens.
    http = httpx.Client(base_url=endpoint.http, timeout=CALL_SECONDS)

    def clients(texts: Sequence[str]) -> int:
        def ask(text: str) -> int:
            body = {"text_input": text, "max_tokens": tokens}
            answer = http.post(f"/v2/models/{MODEL}/generate", json=body).raise_for_status()
            return int(answer.json()["output_tokens"])

        with ThreadPoolExecutor(len(texts)) as pool:
            return sum(pool.map(ask, texts))

    found: list[dict[str, float]] = []
    for number in range(rounds + 1):
        equal = prompts(PROMPT_TOKENS, PROMPT_TOKENS)
        everything: dict[str, tuple[Callable[[Sequence[str]], int], Sequence[str]]] = {
            ENGINE_ONE: (engine, equal[:1]),
            TRITON_ONE: (clients, equal[:1]),
            ENGINE_MANY: (engine, equal),
            TRITON_MANY: (clients, equal),
            TRITON_MIXED: (clients, prompts(8, 56)),
        }
        speeds = {}
        for what, (answer, texts) in everything.items():
            started = time.perf_counter()
            speeds[what] = answer(texts) / (time.perf_counter() - started)
        if number:  # the first one warms up
            found.append(speeds)
    return found


if __name__ == "__main__":
    sys.exit(main())
