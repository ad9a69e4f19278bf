"""What TensorRT-LLM's tools say when they fail, and what to do about each.

The tools end most failures with a general sentence far below the one that matters. Here
every sentence that is known is mapped to an error with its cure, and a scanner finds the
one that matters while the output passes by. The texts are those of TensorRT-LLM 1.2.1 and
of Triton's backend for it, read in their sources and issues, not seen on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmops_assets.errors import ToolchainError, ToolError

LARGEST_NUMBER_OF_WARNINGS = 20


@dataclass(frozen=True)
class Complaint:
    """A failure that a tool is known to print.

    `error` is `ToolchainError` where the request or the engine is wrong, and `ToolError`
    where the tool broke and a second try may go through.
    """

    name: str
    pattern: re.Pattern[str]
    problem: str
    expected: str
    cure: str
    error: type[ToolchainError] | type[ToolError] = ToolchainError
    issues: tuple[str, ...] = ()
    """Where people met it: GitHub issues, `TRT#…` of NVIDIA/TensorRT-LLM, `be#…` and `srv#…`
    of Triton's tensorrtllm_backend and server."""
    general: bool = False
    """Whether it says only that something failed, so that any other complaint matters more."""
    may_recover: bool = False
    """Whether a tool can go on after it; then it counts only when the tool fails."""


def _complaint(
    name: str,
    pattern: str,
    problem: str,
    *,
    expected: str,
    cure: str,
    error: type[ToolchainError] | type[ToolError] = ToolchainError,
    issues: tuple[str, ...] = (),
    general: bool = False,
    may_recover: bool = False,
) -> Complaint:
    return Complaint(
        name, re.compile(pattern), problem, expected, cure, error, issues, general, may_recover
    )


REBUILD = "make a new release, so that the engine is built in the image that serves it"
SEE_ABOVE = "read the lines above it in the log, mend the cause, and materialize the asset again"

CONVERSION = (
    _complaint(
        "gptq_desc_act",
        r"ValueError\b.*\bdesc_act\b",
        "The GPTQ checkpoint orders its columns by activation, which cannot be converted",
        expected="desc_act: false in its quantization_config",
        cure="quantise the model with desc_act false, or with int4_awq",
    ),
    _complaint(
        "conversion_failed",
        r"Checkpoint conversion failed, please check error log",
        "convert_checkpoint.py could not convert the checkpoint",
        expected="a converted checkpoint",
        cure=SEE_ABOVE,
        error=ToolError,
        general=True,
    ),
)

BUILD = (
    _complaint(
        "unsupported_architecture",
        r"Unsupported model architecture:",
        "trtllm-build does not know the architecture of the checkpoint",
        expected="an architecture that TensorRT-LLM of this version builds",
        cure="convert with the script of the model's family, or use the backend llmapi",
    ),
    _complaint(
        "tensors_not_provided",
        r"Required but not provided tensors:",
        "The converted checkpoint lacks tensors that its architecture needs",
        expected="weights converted by the same version, with the script of the model's family",
        cure="materialize converted_weights again in the pinned image; check the family",
    ),
    _complaint(
        "streaming_llm",
        r"StreamingLLM is no longer supported",
        "StreamingLLM is gone from TensorRT-LLM",
        expected="no streamingllm",
        cure="take streamingllm out of the spec's engine section",
    ),
    _complaint(
        "plugin_not_on_this_gpu",
        r"\w+\s*=\s*\S+ is not supported on SM",
        "A plugin does not work on this GPU",
        expected="plugins and quantisations that the GPU's compute capability has",
        cure="choose another quantisation or disable the plugin it names, or build on another GPU",
    ),
    _complaint(
        "building_failed",
        r"Engine building failed, please check error log",
        "trtllm-build could not build the engine",
        expected="an engine",
        cure=SEE_ABOVE,
        error=ToolError,
        general=True,
    ),
)

RUNTIME = (
    _complaint(
        "other_tensorrt",
        r"expecting library version \S+ got [^,\s]+,? please rebuild",
        "The engine was built by another version of TensorRT than the one that loads it",
        expected="one image that builds and serves",
        cure=REBUILD,
        issues=("be#194", "be#424", "be#531", "TRT#1695"),
    ),
    _complaint(
        "other_serialization",
        r"Version tag does not match",
        "The engine was serialised by another version of TensorRT",
        expected="one image that builds and serves",
        cure=REBUILD,
        issues=("be#194", "be#424", "be#531", "TRT#1695"),
    ),
    _complaint(
        "other_gpu",
        r"generated on an incompatible device, expecting compute \S+ got compute \S+",
        "The engine was built for a GPU of another compute capability",
        expected="the compute capability of the engine's sidecar",
        cure="serve it on nodes with that GPU, or make a release for this one",
        issues=("TRT#222", "TRT#3031"),
    ),
    _complaint(
        "key_value_cache_too_small",
        r"maxTokensInPagedKvCache\b.*must be large enough",
        "The KV cache does not hold one sequence of the longest length",
        expected="blocks times tokens per block of at least max_seq_len",
        cure="free GPU memory, raise its share for the KV cache, or lower max_seq_len",
        issues=("be#366", "be#168", "TRT#494"),
    ),
    _complaint(
        "other_world_size",
        r"Engine world size \(.*\) != Runtime world size \(.*\)",
        "The engine has another number of ranks than processes were started",
        expected="as many processes and GPUs as rank files",
        cure="start with the engine's world size, on a node with that many GPUs",
        issues=("TRT#753",),
    ),
    _complaint(
        "other_tensor_parallelism",
        r"tensor parallelism mismatch",
        "The engine was built for another tensor parallelism",
        expected="the tensor parallelism of the engine's config.json",
        cure="start with the engine's own parallelism, or build for the wanted one",
        issues=("TRT#753",),
    ),
    _complaint(
        # tensorrt_llm/bench/benchmark/throughput.py
        "requests_too_long",
        r"Engine supports a max sequence of \d+",
        "Requests of the benchmark are longer than the engine allows",
        expected="prompt and answer of at most max_seq_len tokens",
        cure="raise max_seq_len in the spec's engine section, or lower the constraints",
    ),
    _complaint(
        # tensorrt_llm/llmapi/llm.py, for either backend
        "prompt_too_long",
        r"The sum of prompt length \(.*should not exceed",
        "A prompt is longer than the engine allows",
        expected="prompts of at most max_input_tokens of the spec's constraints",
        cure="raise max_seq_len or max_num_tokens in the spec's engine section, or set "
        "chunked_context",
    ),
    _complaint(
        "not_an_engine_directory",
        r"RuntimeError: No weight files found in ",
        "The engine directory was taken for a checkpoint",
        expected="the config.json that trtllm-build wrote, and the backend tensorrt",
        cure="pass the backend tensorrt explicitly; build again if config.json was overwritten",
        issues=("TRT#8223",),
    ),
    _complaint(
        "cannot_deserialize",
        r"Failed to deserialize cuda engine",
        "TensorRT cannot read the engine",
        expected="whole rank files, built by the version that loads them",
        cure="compare the engine's digests with the store's; then " + REBUILD,
        issues=("TRT#1038", "TRT#1838"),
        # The lines above it often say which version or device did not fit.
        general=True,
    ),
)

TRITON = (
    _complaint(
        "backend_not_filled_in",
        r"unable to find backend library for backend '\$\{triton_backend\}'",
        "A config.pbtxt does not say which backend serves the model",
        expected="triton_backend: tensorrtllm or python",
        cure="package the model again; every placeholder of the image's templates is required",
        issues=("TRT#1803",),
    ),
    _complaint(
        "placeholder_left",
        r"Expected integer.*got: \$",
        "A config.pbtxt still holds a placeholder of its template",
        expected="no ${…} left",
        cure="package the model again with the templates of the image that serves",
        issues=("srv#8592", "srv#7950", "be#501"),
    ),
    _complaint(
        "engine_directory_not_there",
        r"Both encoder and decoder model paths are empty",
        "The server does not find the engine where config.pbtxt says it is",
        expected="an absolute engine_dir that exists inside the server",
        cure="mount the package at its fixed path; a model repository on S3 has none",
        issues=("be#181", "be#615", "be#727", "srv#8077", "srv#6644"),
    ),
    _complaint(
        "batching_strategy",
        r"Invalid gpt_model_type",
        "config.pbtxt names a batching strategy that does not exist",
        expected="batching_strategy: inflight_fused_batching",
        cure="package the model again with that strategy",
    ),
)

ANY_TOOL = (
    _complaint(
        "not_in_its_image",
        r"No module named '?tensorrt_llm\b",
        "TensorRT-LLM is not installed where its tool was started",
        expected="the image of TensorRT-LLM that the settings name",
        cure="run the step in that image",
        may_recover=True,
    ),
    # argparse of the standard library, and click, which some of the commands are written with.
    _complaint(
        "arguments_not_understood",
        r"error: (unrecognized arguments|argument \S+: "
        r"|the following arguments are required)|Error: (No such option|Invalid value|Missing )",
        "The tool does not understand the arguments that it was given",
        expected="the flags of TensorRT-LLM 1.2.1",
        cure="run it in the pinned image; if it is, report the line with its command",
        may_recover=True,
    ),
    # PyTorch's own text; conversion and quantisation load the whole model.
    _complaint(
        "gpu_memory",
        r"CUDA out of memory",
        "The GPU's memory ran out",
        expected="a free GPU that holds the model",
        cure="free the GPU's memory, use a larger one, or raise the tensor parallelism",
        error=ToolError,
        issues=("be#48", "srv#8969"),
        may_recover=True,
    ),
)

COMPLAINTS: Mapping[str, Complaint] = {
    complaint.name: complaint for complaint in (*CONVERSION, *BUILD, *RUNTIME, *TRITON, *ANY_TOOL)
}
"""Every known complaint by its name."""

# trtllm-build prints it however it is called, so it says nothing about this build.
EVER_PRESENT = re.compile(r"gather_generation_logits.*deprecat|deprecat.*gather_generation_logits")
WARNING = re.compile(r"\[W\]|\[WARNING\]|\b\w*Warning:|\bdeprecated\b", re.IGNORECASE)


class LogScanner:
    """Reads a tool's lines as they come; `read` fits the tool runner's `on_line`.

    `complaint` is the one that matters: the first that is neither general nor recoverable,
    else the first that says something. `line` is its line. `failed` says whether one of them
    means that the tool failed, whatever its exit code. `warnings` are the first few lines that
    warn, without the one that every build prints.
    """

    def __init__(self, complaints: Sequence[Complaint] = tuple(COMPLAINTS.values())) -> None:
        self._complaints = complaints
        self.complaint: Complaint | None = None
        self.line = ""
        self.failed = False
        self.warnings: list[str] = []

    def read(self, line: str) -> None:
        """Takes in one line of output."""
        if EVER_PRESENT.search(line):
            return
        if WARNING.search(line) and len(self.warnings) < LARGEST_NUMBER_OF_WARNINGS:
            self.warnings.append(line)
        for complaint in self._complaints:
            if complaint.pattern.search(line):
                self.failed = self.failed or not complaint.may_recover
                if self._matters_more(complaint):
                    self.complaint, self.line = complaint, line

    def _matters_more(self, new: Complaint) -> bool:
        if self.complaint is None:
            return True
        if self.complaint.may_recover:
            # The tool went on, and then came to something that it cannot recover from. A
            # general sentence may be about the recoverable one.
            return not (new.may_recover or new.general)
        return self.complaint.general and not new.general

    def error(self, log: Path) -> ToolchainError | ToolError | None:
        """The complaint as an error with its line and cure; None if there was none.

        Args:
            log: where the reader finds all of the output.
        """
        if self.complaint is None:
            return None
        return self.complaint.error(
            self.complaint.problem,
            expected=self.complaint.expected,
            found=self.line.strip(),
            cure=f"{self.complaint.cure}; the log is {log}",
        )
