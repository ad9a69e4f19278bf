"""Packs an engine, or a checkpoint for `llmapi`, into what a Triton server is started on.

A package is mounted at one place, the same in staging, blue and green, because Triton's
TensorRT-LLM backends read engine and tokenizer from absolute paths that stand in their
configuration:

    <PACKAGE_MOUNT>/repository/<model>/…          what clients ask
    <PACKAGE_MOUNT>/repository/<inner model>/1/…  preprocessing and so on, engine backend only
    <PACKAGE_MOUNT>/engine/, …/tokenizer/         engine backend
    <PACKAGE_MOUNT>/checkpoint/                   llmapi backend

Neither engine nor tokenizer is in a version folder: the C++ backend takes one
`gpt_model_path` per model and never appends the version to it, so two versions in one server
would share one engine. Releases are told apart by their servers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.errors import ToolchainError
from llmops_assets.serving.model_repository import parse_configuration, read_repository
from llmops_assets.serving.package_description import PACKAGE_FILE
from llmops_assets.serving.request_contract import RequestContract
from llmops_assets.spec import Constraints, TensorRTLLMEngine
from llmops_assets.toolchains.base import VERSION_FOLDER, ServingImage
from llmops_assets.toolchains.tensorrt_llm.containers import Backend
from llmops_assets.toolchains.tensorrt_llm.inputs import refuse_code
from llmops_assets.toolchains.tensorrt_llm.model_yaml import (
    CHECKPOINT,
    MODEL_YAML,
    PACKAGE_MOUNT,
    read_llmapi_model,
)
from llmops_assets.toolchains.tensorrt_llm.sidecar import NAME, SIDECAR
from llmops_assets.toolchains.tensorrt_llm.templates import INNER_MODELS, fill, rename

REPOSITORY = "repository"
ENGINE = "engine"
TOKENIZER = "tokenizer"

ENTRY_TEMPLATE = "ensemble"
ENGINE_MODEL = "tensorrt_llm"
LLMAPI_TEMPLATE = "tensorrt_llm"
INNER_VERSION = "1"

# TensorRT-LLM, triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt; that each
# streamed piece counts its own tokens is in inflight_batcher_llm/src/model_instance_state.cc.
ENSEMBLE_CONTRACT = RequestContract(
    inputs={"return_num_output_tokens": True},
    output_tokens="num_output_tokens",
    tokens_so_far=False,
    finish_reason=None,
)
# TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm: config.pbtxt, 1/helpers.py and
# 1/model.py, which sends `CompletionOutput.text`: the answer so far. Unless told otherwise it
# repeats the prompt before it.
LLMAPI_CONTRACT = RequestContract(
    max_tokens="sampling_param_max_tokens",
    streaming="streaming",
    inputs={"return_finish_reason": True, "sampling_param_exclude_input_from_output": True},
    text_so_far=True,
    output_tokens=None,
)

# Git and object storage drop empty folders, and a model without a version folder does not
# load. An ensemble has nothing of its own to put there.
VERSION_NOTE = "VERSION.txt"
VERSION_NOTE_TEXT = "This file keeps its folder alive where empty folders are dropped.\n"

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "config.json",
)  # fmt: skip
"""What `transformers.AutoTokenizer` reads, where a checkpoint has it."""

LOGITS_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}
REQUIRED: Mapping[str, frozenset[str]] = {
    "ensemble": frozenset({"triton_max_batch_size", "logits_datatype"}),
    "preprocessing": frozenset({"triton_max_batch_size", "tokenizer_dir"}),
    "postprocessing": frozenset({"triton_max_batch_size", "tokenizer_dir"}),
    "tensorrt_llm": frozenset(
        {
            "triton_max_batch_size", "triton_backend", "engine_dir", "batching_strategy",
            "decoupled_mode",
        }
    ),
    "tensorrt_llm_bls": frozenset({"triton_max_batch_size", "decoupled_mode"}),
}  # fmt: skip
UNSET = frozenset(
    {
        # Encoder-decoder and multimodal models.
        "encoder_engine_dir", "cross_kv_cache_fraction", "multimodal_model_path",
        "multimodal_encoders_name", "max_num_images", "hf_model_path",
        # Attention windows, and a KV cache in host memory.
        "max_attention_window_size", "sink_token_length", "kv_cache_host_memory_bytes",
        "kv_cache_onboard_blocks",
        # Adapters.
        "lora_cache_optimal_adapter_size", "lora_cache_max_adapter_size",
        "lora_cache_gpu_memory_fraction", "lora_cache_host_memory_bytes", "lora_prefetch_dir",
        # Speculative and guided decoding.
        "decoding_mode", "lookahead_window_size", "lookahead_ngram_size",
        "lookahead_verification_set_size", "medusa_choices", "eagle_choices",
        "speculative_decoding_fast_logits", "tensorrt_llm_draft_model_name",
        "guided_decoding_backend", "xgrammar_tokenizer_info_path",
        # The backend's own defaults are meant.
        "cancellation_check_period_ms", "stats_check_period_ms", "iter_stats_max_iterations",
        "request_stats_max_iterations", "normalize_log_probs", "gpu_weights_percent",
        "enable_context_fmha_fp32_acc", "multi_block_mode", "cuda_graph_mode",
        "cuda_graph_cache_size", "enable_trt_overlap", "max_tokens_in_paged_kv_cache",
        # Several nodes or engines in a server, and workers that were started before it.
        "participant_ids", "num_nodes", "gpu_device_ids",
    }
)  # fmt: skip
"""Placeholders of parameters that this toolchain leaves at their default."""


class EngineServing(BaseModel):
    """How Triton serves an engine; see `docs/model_config.md` of tensorrtllm_backend."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch_size: int = Field(ge=1, description="Requests in one batch; the engine's at most.")
    kv_cache_free_gpu_mem_fraction: float = Field(
        default=0.9, gt=0, lt=1, description="Of the memory that is free once the engine is in."
    )
    batch_scheduler_policy: Literal["guaranteed_no_evict", "max_utilization"] = (
        "guaranteed_no_evict"
    )
    enable_kv_cache_reuse: bool = True
    enable_chunked_context: bool = False
    max_queue_size: int = Field(default=0, ge=0, description="Requests that wait; 0: no limit.")

    @classmethod
    def of(cls, engine: TensorRTLLMEngine) -> EngineServing:
        """What a spec's engine section says of serving."""
        return cls(
            max_batch_size=engine.limits.max_batch_size,
            kv_cache_free_gpu_mem_fraction=engine.kv_cache.free_gpu_mem_fraction,
            batch_scheduler_policy=engine.scheduler,
            enable_kv_cache_reuse=engine.kv_cache.reuse,
            enable_chunked_context=engine.chunked_context,
            max_queue_size=engine.max_queue_size or 0,
        )


@dataclass(frozen=True)
class ServedBy:
    """What serves a package: whoever starts a server has only the package to know it from."""

    image: ServingImage
    """That built the engine."""
    tensorrt_llm: str
    """Version in the image."""
    architecture: str
    """Of the GPUs, such as `sm_90`."""
    world_size: int
    """GPUs of one server, one per rank."""


def package_engine(
    engine: Path,
    checkpoint: Path,
    templates: Path,
    output: Path,
    *,
    model: str,
    constraints: Constraints,
    serving: EngineServing,
    served: ServedBy,
) -> None:
    """Writes the package of an engine. Equal inputs give equal bytes.

    The entry is the image's ensemble under the model's name, so that clients ask for the
    model by the same name whichever backend serves it.

    Args:
        engine: from trtllm-build, with its sidecar, which stays behind.
        checkpoint: Hugging Face directory; its tokenizer is taken.
        templates: from `find_templates("engine")`, in the image that serves.
        output: directory to write.
        model: the model's name.
        constraints: longest prompt and answer, tokens.
        serving: settings of Triton.
        served: what is written into the package of the server.

    Raises:
        ToolchainError: the engine is smaller than what is promised, the tokenizer would run
            code or is missing, or a template is not one that this toolchain knows.
    """
    if model in INNER_MODELS:
        # The spec of a release that was frozen before specs were asked.
        raise ToolchainError(
            f"A model cannot be called {model} when an engine serves it",
            expected=f"none of {', '.join(INNER_MODELS)}, which are in every package",
            found=model,
            cure="give the model another name in its spec",
        )
    config = _read_json(engine / "config.json")
    _check_limits(config, constraints, serving)
    values = _values(config, serving)
    repository = output / REPOSITORY
    for name in (ENTRY_TEMPLATE, *INNER_MODELS):
        template = templates / name
        text = fill(
            _read_template(template), values, unset=UNSET, required=REQUIRED[name], name=name
        )
        if name == ENTRY_TEMPLATE:
            _write_model(template, repository / model, rename(text, name, model), VERSION_FOLDER)
        else:
            _write_model(template, repository / name, text, INNER_VERSION)
    _check_engine_configuration(repository / "tensorrt_llm" / "config.pbtxt")
    copy_tree(engine, output / ENGINE, leave={SIDECAR})
    copy_tokenizer(checkpoint, output / TOKENIZER)
    _write_description(
        output,
        model=model,
        backend="engine",
        served=served,
        constraints=constraints,
        serving=serving.model_dump(mode="json"),
        asked=ENSEMBLE_CONTRACT,
    )
    check_package(output, model)


def package_llmapi(
    engine: Path,
    templates: Path,
    output: Path,
    *,
    model: str,
    constraints: Constraints,
    served: ServedBy,
) -> None:
    """Writes the package of a checkpoint that Triton's `llmapi` model serves.

    Args:
        engine: the checkpoint with its frozen `model.yaml`, and a sidecar, which stays behind.
        templates: from `find_templates("llmapi")`, in the image that serves.
        output: directory to write.
        model: the model's name.
        constraints: longest prompt and answer, tokens.
        served: what is written into the package of the server.

    Raises:
        ToolchainError: `model.yaml` is not a frozen one or promises less than the spec, the
            checkpoint would run code, or the template is not one that this toolchain knows.
    """
    frozen = read_llmapi_model(engine / MODEL_YAML)
    longest = constraints.max_input_tokens + constraints.max_output_tokens
    if longest > frozen.max_seq_len:
        raise _too_short("max_seq_len", frozen.max_seq_len, longest)
    refuse_code(engine)
    template = templates / LLMAPI_TEMPLATE
    # It has no placeholders; if a version brings some, they must not slip through.
    text = fill(_read_template(template), {}, unset=(), required=(), name=LLMAPI_TEMPLATE)
    folder = output / REPOSITORY / model
    _write_model(template, folder, rename(text, LLMAPI_TEMPLATE, model), VERSION_FOLDER)
    shutil.copyfile(engine / MODEL_YAML, folder / VERSION_FOLDER / MODEL_YAML)
    copy_tree(engine, output / CHECKPOINT, leave={SIDECAR, MODEL_YAML})
    _write_description(
        output,
        model=model,
        backend="llmapi",
        served=served,
        constraints=constraints,
        serving=frozen.model_dump(mode="json"),
        asked=LLMAPI_CONTRACT,
    )
    check_package(output, model)


def check_package(package: Path, model: str) -> None:
    """Checks that Triton could start on a package.

    Every configuration is read by Triton's protobuf and names its folder, every model has
    one version folder with something in it, and every absolute path is below the mount and
    leads to something in the package.

    Raises:
        ToolchainError: naming everything that is wrong.
    """
    found = read_repository(package / REPOSITORY, model)
    problems = list(found.problems)
    for name, configuration in found.configurations.items():
        folder = package / REPOSITORY / name
        if "${" in (folder / "config.pbtxt").read_text(encoding="utf-8"):
            problems.append(f"config.pbtxt of {name} has a placeholder left")
        paths = [
            configuration.parameters[key].string_value
            for key in ("gpt_model_path", "tokenizer_dir")
            if key in configuration.parameters
        ]
        if (folder / VERSION_FOLDER / MODEL_YAML).is_file():
            paths.append(read_llmapi_model(folder / VERSION_FOLDER / MODEL_YAML).model)
        problems += [
            f"{folder.name} reads {path}, where the server will have nothing"
            for path in paths
            if not _is_in_package(package, path)
        ]
        expected = VERSION_FOLDER if folder.name == model else INNER_VERSION
        versions = [path for path in folder.iterdir() if path.is_dir()]
        if [path.name for path in versions] != [expected]:
            problems.append(f"{folder.name} has not the one version folder {expected}")
        elif not any(path.is_file() and path.stat().st_size for path in versions[0].rglob("*")):
            problems.append(f"the version folder of {folder.name} is empty")
    if problems:
        raise ToolchainError(
            f"{package} is not a package that Triton can serve",
            expected=f"models below {REPOSITORY}/, with paths below {PACKAGE_MOUNT}",
            found="; ".join(problems),
            cure="package the model again; if it repeats, compare the image's templates",
        )


def _values(config: Mapping[str, Any], serving: EngineServing) -> dict[str, str]:
    """What is written into the templates, by placeholder."""
    return {
        "triton_backend": "tensorrtllm",
        "triton_max_batch_size": str(serving.max_batch_size),
        # Streaming sends several responses to one request.
        "decoupled_mode": "true",
        "batching_strategy": "inflight_fused_batching",
        "engine_dir": str(PACKAGE_MOUNT / ENGINE),
        "tokenizer_dir": str(PACKAGE_MOUNT / TOKENIZER),
        "logits_datatype": _logits_type(config),
        "encoder_input_features_data_type": "TYPE_FP16",
        "prompt_embedding_table_data_type": "TYPE_FP16",
        # Requests are batched in flight, so none waits for others in Triton's queue.
        "max_queue_delay_microseconds": "0",
        "max_queue_size": str(serving.max_queue_size),
        "preprocessing_instance_count": "1",
        "postprocessing_instance_count": "1",
        "bls_instance_count": "1",
        # Without a start token many models answer garbage.
        "add_special_tokens": "true",
        "skip_special_tokens": "true",
        "accumulate_tokens": "false",
        "tensorrt_llm_model_name": "tensorrt_llm",
        "max_beam_width": str(config["build_config"]["max_beam_width"]),
        "kv_cache_free_gpu_mem_fraction": str(serving.kv_cache_free_gpu_mem_fraction),
        "batch_scheduler_policy": serving.batch_scheduler_policy,
        "enable_kv_cache_reuse": _boolean(serving.enable_kv_cache_reuse),
        "enable_chunked_context": _boolean(serving.enable_chunked_context),
        "exclude_input_in_output": "true",
    }


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _logits_type(config: Mapping[str, Any]) -> str:
    dtype = config["pretrained_config"].get("logits_dtype", "float32")
    try:
        return LOGITS_TYPES[dtype]
    except KeyError as error:
        raise ToolchainError(
            "Triton has no type for the engine's logits",
            expected=" or ".join(LOGITS_TYPES),
            found=dtype,
            cure="build the engine with --logits_dtype float32",
        ) from error


def _check_limits(
    config: Mapping[str, Any], constraints: Constraints, serving: EngineServing
) -> None:
    """Checks that the engine was built for what is promised."""
    build = config["build_config"]
    longest = constraints.max_input_tokens + constraints.max_output_tokens
    for key, needed in {
        "max_input_len": constraints.max_input_tokens,
        "max_seq_len": longest,
        "max_batch_size": serving.max_batch_size,
    }.items():
        if build[key] < needed:
            raise _too_short(key, build[key], needed)


def _too_short(key: str, found: int, needed: int) -> ToolchainError:
    return ToolchainError(
        "The engine was built for less than the spec promises",
        expected=f"{key} of at least {needed}",
        found=found,
        cure=f"raise {key} in the spec's engine section, or lower constraints or batch size",
    )


def _check_engine_configuration(path: Path) -> None:
    """Checks what Triton would only notice when it loads the engine, in other words."""
    configuration = parse_configuration(path.read_text(encoding="utf-8"), "tensorrt_llm")
    found = {
        # Unfilled: `unable to find backend library for backend '${triton_backend}'`.
        "backend": configuration.backend,
        # Wrong: `Both encoder and decoder model paths are empty`.
        "gpt_model_path": configuration.parameters["gpt_model_path"].string_value,
        # Wrong: `Invalid gpt_model_type`.
        "gpt_model_type": configuration.parameters["gpt_model_type"].string_value,
        "decoupled": configuration.model_transaction_policy.decoupled,
    }
    expected = {
        "backend": "tensorrtllm",
        "gpt_model_path": str(PACKAGE_MOUNT / ENGINE),
        "gpt_model_type": "inflight_fused_batching",
        "decoupled": True,
    }
    if found != expected:
        raise ToolchainError(
            "The template of tensorrt_llm puts the engine's parameters elsewhere",
            expected=expected,
            found=found,
            cure="look into the image's template; this toolchain does not know it",
        )


def _is_in_package(package: Path, path: str) -> bool:
    try:
        inside = PurePosixPath(path).relative_to(PACKAGE_MOUNT)
    except ValueError:
        return False
    return ".." not in inside.parts and (package / inside).is_dir()


def _write_model(template: Path, folder: Path, configuration: str, version: str) -> None:
    """Copies a template's files and writes its configuration.

    Its one version folder, if it still has one, becomes `version`.
    """
    # Triton ignores version folders whose names begin with 0.
    versions = [path for path in template.iterdir() if path.is_dir() and path.name.isdigit()]
    if len(versions) > 1 or any(path.name.startswith("0") for path in versions):
        raise ToolchainError(
            f"The template {template} is not one that this toolchain knows",
            expected="one version folder, or none",
            found=", ".join(sorted(path.name for path in versions)),
            cure="look into the image's templates",
        )
    target = folder / version
    if versions:
        copy_tree(versions[0], target, leave=set())
    target.mkdir(parents=True, exist_ok=True)
    if not any(path.is_file() for path in target.rglob("*")):
        (target / VERSION_NOTE).write_text(VERSION_NOTE_TEXT, encoding="utf-8")
    (folder / "config.pbtxt").write_text(configuration, encoding="utf-8")


def copy_tree(source: Path, target: Path, leave: set[str]) -> None:
    """Copies files, without bytecode; `leave` names those at the top that stay behind."""
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if path.is_symlink():
            raise ToolchainError(
                f"{path} is a link",
                expected="a file, as a package must hold its bytes",
                found=f"a link to {path.readlink()}",
                cure="replace it by the file",
            )
        if not path.is_file() or "__pycache__" in inside.parts or str(inside) in leave:
            continue
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / inside)


def copy_tokenizer(checkpoint: Path, target: Path) -> None:
    """Copies what a server needs to read and write text; `target` must not exist.

    Raises:
        ToolchainError: there is no tokenizer, or loading it would run code.
    """
    if not (checkpoint / "tokenizer.json").is_file():
        raise ToolchainError(
            f"{checkpoint} has no tokenizer",
            expected="tokenizer.json",
            found="no such file",
            cure="save the checkpoint with its fast tokenizer",
        )
    target.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, target / name)
    # Triton's preprocessing loads it with trust_remote_code=True.
    refuse_code(target)


def _write_description(
    output: Path,
    *,
    model: str,
    backend: Backend,
    served: ServedBy,
    constraints: Constraints,
    serving: Mapping[str, Any],
    asked: RequestContract,
) -> None:
    """Writes `package.json`; `serving.package_description` reads what others need of it."""
    entry = parse_configuration(
        (output / REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8"), model
    )
    _check_contract(entry, asked)
    description = {
        "model": model,
        "toolchain": NAME,
        "backend": backend,
        "mount": str(PACKAGE_MOUNT),
        "limits": constraints.model_dump(mode="json"),
        "serving": dict(serving),
        "asked": asked.model_dump(mode="json"),
        **asdict(served),
    }
    (output / PACKAGE_FILE).write_text(
        json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def _check_contract(entry: Any, asked: RequestContract) -> None:
    """Checks that a model has the inputs and outputs that it will be asked by.

    Triton loses an input that a model has not, without a word.

    Raises:
        ToolchainError: naming those that it has not.
    """
    inputs = {asked.prompt, asked.max_tokens, asked.streaming, *asked.inputs}
    outputs = {asked.text, asked.output_tokens, asked.finish_reason} - {None}
    missing = sorted(inputs - {one.name for one in entry.input})
    missing += sorted(outputs - {one.name for one in entry.output})
    if missing:
        raise ToolchainError(
            f"The template of {entry.name} has not the inputs and outputs that it is asked by",
            expected=", ".join(sorted(inputs | outputs)),
            found=f"no {', '.join(missing)}",
            cure="look into the image's template, and correct the contracts in packaging.py",
        )


def _read_template(template: Path) -> str:
    try:
        return (template / "config.pbtxt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolchainError(
            f"The image has no template for {template.name}",
            expected=template / "config.pbtxt",
            found=error,
            cure="package in the Triton image that serves",
        ) from error


def _read_json(path: Path) -> Mapping[str, Any]:
    content = _load(path)
    build = content.get("build_config") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(build, dict):
        raise ToolchainError(
            f"{path} is not the config.json of an engine",
            expected="version, pretrained_config and build_config, as trtllm-build writes them",
            found=f"{', '.join(content)}" if isinstance(content, dict) else "no object",
            cure="build the engine again; nothing may overwrite its config.json",
        )
    return content


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolchainError(
            f"{path} cannot be read",
            expected="JSON",
            found=error,
            cure="look into the step's log for the cause, then materialize the asset again",
        ) from error
