"""How the doubles fail on demand, in the documented ways, and what machine they pretend."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

FAILS = "LLMOPS_DOUBLE_FAILS"
UNKNOWN_FAILURE = 70
"""Exit code when a test asks for a failure that does not exist."""

ESCAPED_WORKER_PID = "escaped-worker.pid"
HANG_SECONDS = 600

# Failures that are known by a text. The telling part of each is as TensorRT-LLM or TensorRT
# prints it; what stands around it is an example.
SENTENCES: Mapping[str, str] = {
    "conversion_failed": "RuntimeError: Checkpoint conversion failed, please check error log.",
    "gptq_desc_act": "ValueError: GPTQ with desc_act=True is not implemented",
    "building_failed": "RuntimeError: Engine building failed, please check error log.",
    "unsupported_architecture": "Unsupported model architecture: ParrotForCausalLM",
    "tensors_not_provided": "RuntimeError: Required but not provided tensors:{'lm_head.weight'}",
    "streaming_llm": "ValueError: StreamingLLM is no longer supported",
    "plugin_not_on_this_gpu": "ValueError: gemm_plugin=fp8 is not supported on SM 80",
    "other_tensorrt": "[TRT] IRuntime::deserializeCudaEngine: Error Code 1: Serialization "
    "(expecting library version 10.14.1.48 got 10.13.3.9, please rebuild.)",
    "other_serialization": "[TRT] Error Code 1: Serialization (Serialization assertion failed."
    "Version tag does not match. Note: Current Version: 240, Serialized Engine Version: 239)",
    "other_gpu": "[TRT] Error Code 6: The engine plan file is generated on an incompatible "
    "device, expecting compute 8.0 got compute 9.0, please rebuild.",
    "cannot_deserialize": "[TensorRT-LLM][ERROR] Failed to deserialize cuda engine.",
    "key_value_cache_too_small": "[TensorRT-LLM][ERROR] Assertion failed: "
    "maxTokensInPagedKvCache (4096) must be large enough to process at least 1 sequence",
    "other_world_size": "AssertionError: Engine world size (2 * 1) != Runtime world size (1)",
    "other_tensor_parallelism": "[TensorRT-LLM][ERROR] Assertion failed: tensor parallelism "
    "mismatch",
    "not_an_engine_directory": "RuntimeError: No weight files found in engine",
    "prompt_too_long": "ValueError: The sum of prompt length (600.0), query length (0) should not "
    "exceed max_num_tokens (512)",
    "requests_too_long": "RuntimeError: Engine supports a max sequence of 512. Provided dataset "
    "contains a maximum sequence of 600. Please rebuild a new engine to support this dataset.",
    "not_in_its_image": "ModuleNotFoundError: No module named 'tensorrt_llm'",
    "gpu_memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
}
GENERAL_SENTENCE = {
    "convert_checkpoint.py": "conversion_failed",
    "trtllm-build": "building_failed",
    "trtllm-bench": "cannot_deserialize",
}
"""What a tool says last, whatever the cause was."""

_CONVERTED_WRONGLY = frozenset(
    {"only_config", "missing_rank", "cut_off_rank", "empty_rank", "extra_rank"}
)
_ENDS_BADLY = frozenset(
    {"killed", "escaped_worker", "hang_after_config", "hang_in_last_rank", "hang_at_end",
     "not_in_its_image", "gpu_memory"}
)  # fmt: skip
_LOADS = frozenset(
    {"killed", "escaped_worker", "hang_at_end", "not_in_its_image", "gpu_memory",
     "other_tensorrt", "other_serialization", "other_gpu", "cannot_deserialize",
     "key_value_cache_too_small", "other_world_size", "other_tensor_parallelism",
     "not_an_engine_directory"}
)  # fmt: skip

FAILURES: Mapping[str, frozenset[str]] = {
    "convert_checkpoint.py": frozenset(
        {*_CONVERTED_WRONGLY, *_ENDS_BADLY, "conversion_failed", "gptq_desc_act"}
    ),
    "quantize.py": frozenset({*_CONVERTED_WRONGLY, *_ENDS_BADLY}),
    "trtllm-build": frozenset(
        {*_CONVERTED_WRONGLY, *_ENDS_BADLY, "building_failed", "unsupported_architecture",
         "tensors_not_provided", "streaming_llm", "plugin_not_on_this_gpu",
         "checkpoint_config", "no_timing_cache"}
    ),
    "trtllm-bench": frozenset(
        {*_LOADS, "prompt_too_long", "requests_too_long", "other_backend", "no_report"}
    ),
}  # fmt: skip
"""The failures that each double has.

Those in `SENTENCES` print and end with exit code 1, without a whole output. `only_config`
and the rank failures end with exit code 0. `killed` ends as the kernel does when memory runs
out. The hangs wait until somebody ends the tool: after config.json, in the middle of the
last rank's file, or when everything is written. `escaped_worker` leaves a daemon of a
session of its own behind, and its process id in `escaped-worker.pid`, and ends well.
"""


class Behaviour:
    """What one run of a double is to do; read once, when it starts."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.version = os.environ.get("LLMOPS_DOUBLE_VERSION", "1.2.1")
        self.compute_capability = os.environ.get("LLMOPS_DOUBLE_COMPUTE_CAPABILITY", "9.0")
        self.gpus = int(os.environ.get("LLMOPS_DOUBLE_GPUS", "8"))
        print(f"[a double of {tool} {self.version}; it computes nothing]", flush=True)
        failing, _, failure = os.environ.get(FAILS, "").partition(":")
        if failing and failure not in FAILURES.get(failing, ()):
            print(f"{FAILS}: there is no failure {failing}:{failure}", file=sys.stderr)
            sys.exit(UNKNOWN_FAILURE)
        self.failure = failure if failing == tool else ""

    def is_to(self, failure: str) -> bool:
        """Whether this run shall fail in this way."""
        if failure not in FAILURES[self.tool]:
            raise ValueError(f"{self.tool} has no failure {failure}")
        return self.failure == failure

    def speak(self) -> None:
        """Fails with the sentence that was asked for, if one was."""
        if self.failure in SENTENCES:
            self.fail(self.failure)

    def fail(self, failure: str, sentence: str | None = None) -> NoReturn:
        """Prints a sentence and the general one that follows it, and ends with exit code 1."""
        print(sentence or SENTENCES[failure], file=sys.stderr)
        general = GENERAL_SENTENCE.get(self.tool)
        if general is not None and general != failure and failure != "not_in_its_image":
            print(SENTENCES[general], file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    def hang(self, failure: str) -> None:
        """Waits for its end, if that was asked for."""
        if self.is_to(failure):
            print(f"[a double that hangs: {failure}]", flush=True)
            time.sleep(HANG_SECONDS)

    def leave(self) -> None:
        """The failures of a tool that has written everything."""
        if self.is_to("killed"):
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.is_to("escaped_worker"):
            _daemonise()
        self.hang("hang_at_end")


def _daemonise() -> None:
    """Forks twice with a session in between, as an MPI worker that escapes does."""
    started, running = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(ESCAPED_WORKER_PID).write_text(str(os.getpid()), encoding="utf-8")
            os.write(running, b"1")
            # The tool's output must be able to end while the worker lives.
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            time.sleep(HANG_SECONDS)
        os._exit(0)
    os.read(started, 1)


LOG_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug")


def strict_parser(tool: str) -> argparse.ArgumentParser:
    """A parser that takes no abbreviation; it ends with exit code 2 on what it does not know."""
    return argparse.ArgumentParser(prog=f"{tool} (a double)", allow_abbrev=False)
