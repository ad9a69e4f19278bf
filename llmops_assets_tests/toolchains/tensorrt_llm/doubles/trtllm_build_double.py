"""A double of `trtllm-build`."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmops_assets_tests.toolchains.tensorrt_llm.doubles.behaviour import (
    LOG_LEVELS,
    Behaviour,
    strict_parser,
)
from llmops_assets_tests.toolchains.tensorrt_llm.doubles.layouts import (
    engine_file,
    write_json,
    write_ranks,
)

TOOL = "trtllm-build"
DEFAULT_TIMING_CACHE = "model.cache"
EVER_PRESENT = (
    "[TRT-LLM] [W] Option --gather_generation_logits is deprecated, a build flag is not "
    "required anymore. Use --output_generation_logits at runtime instead."
)
ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM",
    "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM",
    "GPTForCausalLM",
)  # fmt: skip

TYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
FP8 = ("fp8", "disable")
PLUGINS = {
    "--bert_attention_plugin": (TYPES, "auto"),
    "--gpt_attention_plugin": (TYPES, "auto"),
    "--gemm_plugin": ((*TYPES, "fp8", "nvfp4"), None),
    "--gemm_swiglu_plugin": (FP8, "disable"),
    "--fp8_rowwise_gemm_plugin": (TYPES, "disable"),
    "--lora_plugin": (TYPES, "disable"),
    "--moe_plugin": (TYPES, "auto"),
    "--mamba_conv1d_plugin": (TYPES, "auto"),
    "--nccl_plugin": (TYPES, "auto"),
    "--low_latency_gemm_plugin": (FP8, "disable"),
    "--low_latency_gemm_swiglu_plugin": (FP8, "disable"),
    "--gemm_allreduce_plugin": (("float16", "bfloat16", "disable"), "disable"),
}
SWITCHES = {
    "--dora_plugin": False, "--context_fmha": True, "--bert_context_fmha_fp32_acc": False,
    "--remove_input_padding": True, "--use_paged_context_fmha": True,
    "--use_fp8_context_fmha": True, "--fuse_fp4_quant": False, "--multiple_profiles": False,
    "--paged_state": True, "--streamingllm": False, "--norm_quant_fusion": False,
    "--reduce_fusion": False, "--user_buffer": False, "--use_fused_mlp": True,
    "--pp_reduce_scatter": False,
}  # fmt: skip
# The first compute capability with the arithmetic.
NEEDS = {"fp8": (8, 9), "nvfp4": (10, 0)}


def parser() -> argparse.ArgumentParser:
    flags = strict_parser(TOOL)
    add = flags.add_argument
    # The real tool also takes only a --model_config; nothing of ours does that.
    add("--checkpoint_dir", type=str, required=True)
    for name in (
        "--model_config", "--build_config", "--model_cls_file", "--model_cls_name",
        "--input_timing_cache", "--visualize_network",
    ):  # fmt: skip
        add(name, type=str, default=None)
    add("--output_dir", type=str, default="engine_outputs")
    add("--output_timing_cache", type=str, default=DEFAULT_TIMING_CACHE)
    for name, default in {
        "--max_batch_size": 2048, "--max_input_len": 1024, "--max_beam_width": 1,
        "--max_num_tokens": 8192, "--opt_num_tokens": None, "--max_encoder_input_len": 1024,
        "--workers": 1, "--max_lora_rank": 64, "--max_draft_len": 0, "--tokens_per_block": 32,
    }.items():  # fmt: skip
        add(name, type=int, default=default)
    add("--max_seq_len", "--max_decoder_seq_len", dest="max_seq_len", type=int, default=None)
    add("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int, default=0)
    add("--kv_cache_type", choices=("continuous", "paged", "disabled"), default=None)
    add("--paged_kv_cache", choices=("enable", "disable"), default=None)
    add("--profiling_verbosity", choices=("layer_names_only", "detailed", "none"),
        default="layer_names_only")  # fmt: skip
    for name in (
        "--strip_plan", "--weight_sparsity", "--weight_streaming", "--fast_build",
        "--enable_debug_output", "--dry_run", "--monitor_memory",
        "--gather_context_logits", "--gather_generation_logits", "--gather_all_token_logits",
    ):  # fmt: skip
        add(name, action="store_true")
    add("--log_level", choices=LOG_LEVELS, default="info")
    add("--logits_dtype", choices=("float16", "float32"), default=None)
    add("--lora_dir", type=str, nargs="+", default=None)
    add("--lora_ckpt_source", choices=("hf", "nemo"), default="hf")
    add("--lora_target_modules", type=str, nargs="+", default=None)
    add("--speculative_decoding_mode", default=None, choices=(
        "draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle",
    ))  # fmt: skip
    for name, (choices, default) in PLUGINS.items():
        add(name, choices=choices, default=default)
    for name, on in SWITCHES.items():
        add(name, choices=("enable", "disable"), default="enable" if on else "disable")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)
    behaviour = Behaviour(TOOL)
    print(EVER_PRESENT, flush=True)
    checkpoint, output = Path(flags.checkpoint_dir), Path(flags.output_dir)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["architecture"] not in ARCHITECTURES:
        behaviour.fail(
            "unsupported_architecture",
            f"Unsupported model architecture: {config['architecture']}",
        )
    if flags.streamingllm == "enable":
        behaviour.fail("streaming_llm")
    _check_plugins(behaviour, flags)
    weights = _weights(behaviour, checkpoint, config["mapping"])
    if flags.input_timing_cache is not None:
        print(f"[TRT] Loaded engine cache of {_size(flags.input_timing_cache)} bytes", flush=True)
    if flags.dry_run:
        return 0

    output.mkdir(parents=True, exist_ok=True)
    # Before any engine, so that what a killed build leaves looks as whole as it can.
    write_json(
        output / "config.json",
        config
        if behaviour.is_to("checkpoint_config")
        else {
            "version": behaviour.version,
            "pretrained_config": config,
            "build_config": _build_config(flags, config),
        },
    )
    behaviour.hang("hang_after_config")
    behaviour.speak()
    ranks = range(config["mapping"]["world_size"])
    # Ranks of context parallelism share their weights.
    contents = [
        engine_file(behaviour, rank, b"" if flags.strip_plan else weights[rank % len(weights)])
        for rank in ranks
    ]
    write_ranks(behaviour, [output / f"rank{rank}.engine" for rank in ranks], contents)
    if flags.fast_build:
        for rank in ranks:
            path = output / f"rank{rank}_managed_weights.safetensors"
            path.write_bytes(weights[rank % len(weights)])
    if (checkpoint / "quant_cfg.json").is_file():
        shutil.copyfile(checkpoint / "quant_cfg.json", output / "quant_cfg.json")
    if not behaviour.is_to("no_timing_cache"):
        before = _size(flags.input_timing_cache) if flags.input_timing_cache else 0
        # Grows with each build, as the real one does.
        Path(flags.output_timing_cache).write_bytes(b"a double's timing cache\n" + b"." * before)
    print("Total time of building all engines: 00:00:00", flush=True)
    behaviour.leave()
    return 0


def _check_plugins(behaviour: Behaviour, flags: argparse.Namespace) -> None:
    major, minor = map(int, behaviour.compute_capability.split("."))
    for name in PLUGINS:
        plugin = name.removeprefix("--")
        value = getattr(flags, plugin)
        if value in NEEDS and (major, minor) < NEEDS[value]:
            behaviour.fail(
                "plugin_not_on_this_gpu",
                f"ValueError: {plugin}={value} is not supported on SM {major}{minor}",
            )


def _weights(behaviour: Behaviour, checkpoint: Path, mapping: dict[str, int]) -> list[bytes]:
    paths = [
        checkpoint / f"rank{rank}.safetensors"
        for rank in range(mapping["tp_size"] * mapping["pp_size"])
    ]
    if missing := [path.name for path in paths if not path.is_file()]:
        behaviour.fail("tensors_not_provided", f"Required but not provided tensors:{set(missing)}")
    return [path.read_bytes() for path in paths]


def _size(path: str) -> int:
    return Path(path).stat().st_size


def _build_config(flags: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "max_input_len": flags.max_input_len,
        # Deduced where it is not given.
        "max_seq_len": flags.max_seq_len or config["max_position_embeddings"],
        "opt_batch_size": 8,
        "max_batch_size": flags.max_batch_size,
        "max_beam_width": flags.max_beam_width,
        "max_num_tokens": flags.max_num_tokens,
        "opt_num_tokens": flags.opt_num_tokens or flags.max_batch_size,
        "max_prompt_embedding_table_size": flags.max_prompt_embedding_table_size,
        "kv_cache_type": (flags.kv_cache_type or "paged").upper(),
        "gather_context_logits": flags.gather_context_logits or flags.gather_all_token_logits,
        "gather_generation_logits": flags.gather_generation_logits or flags.gather_all_token_logits,
        "strongly_typed": True,
        "force_num_profiles": None,
        "profiling_verbosity": flags.profiling_verbosity,
        "enable_debug_output": flags.enable_debug_output,
        "max_draft_len": flags.max_draft_len,
        "speculative_decoding_mode": 1,
        "use_refit": False,
        "input_timing_cache": flags.input_timing_cache,
        "output_timing_cache": flags.output_timing_cache,
        "lora_config": {"lora_dir": flags.lora_dir or [], "max_lora_rank": flags.max_lora_rank},
        "weight_sparsity": flags.weight_sparsity,
        "weight_streaming": flags.weight_streaming,
        "plugin_config": {
            **{name[2:]: _or_none(getattr(flags, name[2:])) for name in PLUGINS},
            **{name[2:]: getattr(flags, name[2:]) == "enable" for name in SWITCHES},
            "tokens_per_block": flags.tokens_per_block,
        },
        "use_strip_plan": flags.strip_plan,
        "max_encoder_input_len": flags.max_encoder_input_len,
        "monitor_memory": flags.monitor_memory,
        "use_mrope": False,
    }


def _or_none(value: str | None) -> str | None:
    return None if value == "disable" else value


if __name__ == "__main__":
    raise SystemExit(main())
